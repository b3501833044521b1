"""What the tests of the rooms share: a small run, in this process or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import real

ROOT = Path(real.__file__).parent
QUICK = ("--preset tiny --steps 6 --prompts 4 --mini_batches 2 --group_size 4 --eval_every 0 "
         "--save_every 2 --lr 1e-3 --warmup 0 --dataset").split() + [f"{real.TINY}/test.jsonl"]


def start(*flags, **more):
    """real.py in a process of its own, not waited for."""
    more = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) | more
    more["env"] = os.environ | {"OMP_NUM_THREADS": "1"} | more.get("env", {})
    command = [sys.executable, str(ROOT / "real.py"), *QUICK, *map(str, flags)]
    return subprocess.Popen(command, text=True, **more)


def run(*flags, **more):
    """Exit code, stdout and stderr of a whole run."""
    process = start(*flags, **more)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def train(folder, *flags):
    """A run in this process; returns the last row of its log."""
    return real.train(real.parse([*QUICK, "--output_dir", str(folder), *map(str, flags)]))


def main(*flags):
    """The command line in this process: bad input is one line and SystemExit."""
    with real.one_line_errors():
        return real.train(real.parse([*map(str, flags)]))


def metrics(folder):
    """The log without the only number that no seed decides."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def contents(folder):
    """Every file below a folder and its bytes, without the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file() and p.name != ".lock"}


def one_line(error):
    """Whether a message is a single printable line."""
    return str(error).isprintable() and str(error) != ""
