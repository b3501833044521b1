"""The README's first table and figure: REAL on the embedded model in 5 seeds, and two controls.

    python tests/five_seeds.py        # some 20 minutes on 2 CPU cores; runs whose log exists are not repeated

`random labels` trains on labels shuffled within each mini-batch (the reward shown is still the true one).
`more distillation` goes on imitating the two teachers for as many seconds as the REAL runs took on average.
Logs go to tests/logs/five_seeds, one JSON object a line, the last of them the summary of the run.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOGS = HERE / "logs" / "five_seeds"
RUNS = [("REAL", s) for s in range(5)] + [(k, s) for k in ("random labels", "more distillation") for s in range(3)]
KEYS = "step loss reward solved mixed entropy response_length s_positive s_negative max_weight seconds pass@1 pass@1_before"


def file_of(kind, seed):
    return LOGS / f"{kind.replace(' ', '_')}-seed{seed}.jsonl"


def rows_of(kind, seed):
    return [json.loads(line) for line in file_of(kind, seed).open()]


def child(kind, seed, folder, seconds):
    """One run, in a process of its own so that its peak memory is its own."""
    import torch

    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tiny")]
    import make
    import real

    config = real.Config(seed=seed, output_dir=folder)
    began = time.time()
    if kind == "more distillation":
        model, tokenizer = real.load_model(config.model)
        held_out = real.load_problems(tokenizer, config, config.eval_dataset, config.eval_split)
        rng = make.random.Random(1000 + seed)
        known = {json.loads(x)["problem"] for n in ("test", "train") for x in (HERE.parent / "tiny" / f"{n}.jsonl").open()}
        log = [{"pass@1_before": real.validate(model, tokenizer, held_out, config)}]
        make.distil(model, tokenizer, make.pairs(rng, known), 10**6, lr=2e-4, seconds=seconds)
        log.append({"pass@1": real.validate(model, tokenizer, held_out, config)})
    else:
        update = real.update

        def shuffled(model, master, optimizer, batch, *rest):
            labels = batch["labels"]
            mixed_up = labels.flatten()[torch.randperm(labels.numel())].view_as(labels)
            return update(model, master, optimizer, batch | {"labels": mixed_up}, *rest)

        real.update = shuffled if kind == "random labels" else update
        real.train(config)
        log = [json.loads(line) for line in (config.run / "metrics.jsonl").open()]
    log.append({"total_seconds": time.time() - began,
                "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
    LOGS.mkdir(parents=True, exist_ok=True)
    kept = {*KEYS.split(), "total_seconds", "peak_memory_mib"}
    text = "".join(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items() if k in kept}) + "\n"
                   for row in log)
    file_of(kind, seed).write_text(text)


def table():
    print("| run | seeds | Pass@1 before | Pass@1 after | lowest | seconds | peak memory |\n|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(k for k, _ in RUNS):
        logs = [rows_of(kind, s) for k, s in RUNS if k == kind]
        before, after = [x[0]["pass@1_before"] for x in logs], [x[-2]["pass@1"] for x in logs]
        seconds, memory = [x[-1]["total_seconds"] for x in logs], [x[-1]["peak_memory_mib"] for x in logs]
        print(f"| {kind} | {len(logs)} | {statistics.mean(before):.3f} | {statistics.mean(after):.3f} ± "
              f"{statistics.stdev(after):.3f} | {min(after):.3f} | {statistics.mean(seconds):.0f} ± "
              f"{statistics.stdev(seconds):.0f} | {max(memory):.0f} MiB |")


def figure():
    import matplotlib.pyplot as plt
    import numpy as np

    fig, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    looks = {"REAL": ("#0072B2", "o", "REAL, 5 seeds"), "random labels": ("#D55E00", "s", "random labels, 3 seeds")}
    for kind, (colour, marker, label) in looks.items():
        logs = [rows_of(kind, s) for k, s in RUNS if k == kind]
        points = [[(0, x[0]["pass@1_before"])] + [(r["step"], r["pass@1"]) for r in x if "pass@1" in r] for x in logs]
        steps, values = [p[0] for p in points[0]], np.array([[p[1] for p in run] for run in points])
        axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        axis.plot(steps, values.mean(0), color=colour, marker=marker, label=label + " (band: lowest to highest)")
    more = statistics.mean(rows_of("more distillation", s)[-2]["pass@1"] for k, s in RUNS if k == "more distillation")
    axis.axhline(more, color="black", linestyle="--", linewidth=1, label="more distillation for the same seconds, 3 seeds")
    seconds = statistics.mean(rows_of("REAL", s)[-1]["total_seconds"] for s in range(5))
    axis.set(xlabel=f"training step (80 steps: {seconds:.0f} s on 2 CPU cores)", ylim=(0, 1),
             ylabel="Pass@1 on 256 held-out problems")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=9)
    fig.savefig(HERE / "logs" / "five_seeds.png", dpi=130)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        child(sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
    else:
        for kind, seed in RUNS:
            if not file_of(kind, seed).exists():
                print(f"--- {kind}, seed {seed}", flush=True)
                seconds = 0 if kind != "more distillation" else statistics.mean(
                    rows_of("REAL", s)[-1]["total_seconds"] for s in range(5))
                with tempfile.TemporaryDirectory() as folder:
                    subprocess.run([sys.executable, __file__, kind, str(seed), folder, str(seconds)], check=True)
        table()
        figure()
