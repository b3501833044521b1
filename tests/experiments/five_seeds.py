"""The README's first table and figure: REAL on the embedded model in 5 seeds, and two controls.

    python tests/experiments/five_seeds.py            # some 20 minutes on 2 CPU cores
    python tests/experiments/five_seeds.py --tables   # nothing runs: table and figure alone

`random labels` trains on labels shuffled within each mini-batch (the reward shown is still the true
one). `more distillation` goes on imitating the two teachers for as many seconds as the REAL runs
took on average. A run is a line of logs/five_seeds.jsonl, and one that is there is not repeated.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import runlog

ROOT = Path(__file__).resolve().parents[2]
RUNS = [("REAL", seed) for seed in range(5)] + [
    (arm, seed) for arm in ("random labels", "more distillation") for seed in range(3)]
KEYS = "step pass@1 pass@1_before reward entropy response_length".split()


def runs_of(arm):
    found = [run for run in runlog.read("five_seeds") if run["arm"] == arm]
    return sorted(found, key=lambda run: run["seed"])


def child(arm, seed, folder, seconds):
    """One run, in a process of its own so that its peak memory is its own."""
    import torch

    sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]
    import make
    import real

    config = real.Config(seed=seed, output_dir=folder)
    began = time.time()
    if arm == "more distillation":
        model, tokenizer = real.load_model(config.model)
        held_out = real.load_problems(tokenizer, config, real.TINY, "test")
        files = [ROOT / "tiny" / f"{name}.jsonl" for name in ("test", "train")]
        known = {json.loads(line)["problem"] for file in files for line in file.open()}
        rows = [{"pass@1_before": real.validate(model, tokenizer, held_out, config)}]
        pairs = make.pairs(make.random.Random(1000 + seed), known)
        make.distil(model, tokenizer, pairs, 10**6, lr=2e-4, seconds=seconds)
        rows.append({"pass@1": real.validate(model, tokenizer, held_out, config)})
    else:
        update = real.update

        def shuffled(model, optimizer, batch, config):
            labels = batch["labels"]
            mixed_up = labels.flatten()[torch.randperm(labels.numel())].view_as(labels)
            return update(model, optimizer, batch | {"labels": mixed_up}, config)

        real.update = shuffled if arm == "random labels" else update
        real.train(config)
        rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open()]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    keys = [key for key in KEYS if any(key in row for row in rows)]
    runlog.append("five_seeds", rows, keys, arm=arm, seed=seed, config={},
                  seconds=time.time() - began, peak_memory_mib=memory)


def table():
    print("| run | seeds | Pass@1 before | Pass@1 after | lowest | seconds | peak memory |\n"
          "|---|---|---|---|---|---|---|")
    for arm in dict.fromkeys(arm for arm, _ in RUNS):
        runs = runs_of(arm)
        before = statistics.mean(run["rows"][0]["pass@1_before"] for run in runs)
        after, seconds = [run["rows"][-1]["pass@1"] for run in runs], [r["seconds"] for r in runs]
        spread = [f"{statistics.mean(x):.{n}f} ± {statistics.stdev(x):.{n}f}"
                  for x, n in ((after, 3), (seconds, 0))]
        memory = max(run["peak_memory_mib"] for run in runs)
        print(f"| {arm} | {len(runs)} | {before:.3f} | {spread[0]} | {min(after):.3f} "
              f"| {spread[1]} | {memory:.0f} MiB |")


def figure():
    import matplotlib.pyplot as plt
    import numpy as np

    fig, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for arm, colour, marker in (("REAL", "#0072B2", "o"), ("random labels", "#D55E00", "s")):
        runs = [run["rows"] for run in runs_of(arm)]
        steps = [0] + [row["step"] for row in runs[0] if "pass@1" in row]
        values = np.array([[rows[0]["pass@1_before"]] + [r["pass@1"] for r in rows if "pass@1" in r]
                           for rows in runs])
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.plot(steps, values.mean(0), color=colour, marker=marker,
                  label=f"{arm}, {len(runs)} seeds (band: lowest to highest)")
    more = statistics.mean(run["rows"][-1]["pass@1"] for run in runs_of("more distillation"))
    axis.axhline(more, color="black", linestyle="--", linewidth=1,
                 label="more distillation for the same seconds, 3 seeds")
    seconds = statistics.mean(run["seconds"] for run in runs_of("REAL"))
    axis.set(xlabel=f"training step (80 steps: {seconds:.0f} s on 2 CPU cores)", ylim=(0, 1),
             ylabel="Pass@1 on 256 held-out problems")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=9)
    fig.savefig(runlog.LOGS / "five_seeds.png", dpi=130)


def main(argv):
    if len(argv) == 4:
        return child(argv[0], int(argv[1]), argv[2], float(argv[3]))
    for arm, seed in [] if argv == ["--tables"] else RUNS:
        if seed in [run["seed"] for run in runs_of(arm)]:
            continue
        print(f"--- {arm}, seed {seed}", flush=True)
        seconds = 0
        if arm == "more distillation":
            seconds = statistics.mean(run["seconds"] for run in runs_of("REAL"))
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, arm, str(seed), folder, str(seconds)],
                           check=True)
    table()
    figure()


if __name__ == "__main__":
    main(sys.argv[1:])
