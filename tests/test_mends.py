"""What once went wrong, each with a test that failed then."""

import os
import subprocess
import sys
from pathlib import Path

import real

ROOT = Path(real.__file__).parent
QUICK = ["--steps", "2", "--prompts", "4", "--mini_batches", "2", "--group_size", "4", "--eval_every", "0"]


def start(*flags, script="real.py", threads=1, **more):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


def run(*flags, **more):
    """Exit code, output and errors of one command."""
    process = start(*flags, **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


# ---- One seed, one result ---------------------------------------------------------------------------------------------


def test_one_seed_gives_one_result_with_two_threads_on_a_busy_machine(tmp_path):
    """Was: seven runs of one seed gave seven results. The backward pass of h[b], where b repeats an index (a prompt's
    last token predicts the first token of every branch), adds in whatever order its threads arrive.

    Four runs at a time, of two threads each, keep each other busy; 4 x 32 branches make that order matter.
    """
    runs = [start(*QUICK, "--group_size", 32, "--output_dir", tmp_path / str(i), threads=2) for i in range(4)]
    for process in runs:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    weights = [(tmp_path / str(i) / "checkpoint-000002" / "model.safetensors").read_bytes() for i in range(4)]
    assert all(w == weights[0] for w in weights)
