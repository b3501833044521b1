"""The paper's comparisons in miniature: every method and ablation on the embedded model, five seeds each (three with
large steps).

    pip install scipy
    python tests/study.py             # every missing run (some 2 hours with two processes on 2 cores), then the tables
    python tests/study.py --tables    # the tables alone, from tests/logs/study

A finished run is kept at once in tests/logs/study/EXPERIMENT/METHOD-seedN.jsonl, and a run whose log exists is not
repeated. The learning rate of each method is the one of four that does best in a sweep with a seed of its own
(mean of the Pass@1 after half the steps and after all of them); variants of REAL use REAL's.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
LOGS = HERE / "logs" / "study"
sys.path.insert(0, str(HERE.parent))
import real  # noqa: E402


def real_frozen(logp, old_logp, mask, labels, *, ref_logp=None, tau=0.5, as_printed=False):
    """REAL with its credit frozen at s_bar = 0: the gradient of the first update, however far the policy has moved."""
    return real.real(old_logp + logp - logp.detach(), old_logp, mask, labels, tau=tau, as_printed=as_printed)


def grpo_frozen(logp, old_logp, mask, labels, *, ref_logp=None):
    """GRPO likewise: advantage times log-probability, no ratio, no clip, no KL."""
    return real.grpo(old_logp + logp - logp.detach(), old_logp, mask, labels)


real.OBJECTIVES |= {"real_frozen": real_frozen, "grpo_frozen": grpo_frozen}
METHODS = {name: {"objective": name.lower()} for name in ("REAL", "GRPO", "DAPO", "GSPO", "TRPA")}
FROZEN = {"frozen credit": {"objective": "real_frozen"}}
WHY = {  # what separates GRPO from REAL: ratios, clip and KL, or the size of its gradients, which grad_clip makes equal
    "GRPO, frozen credit": {"objective": "grpo_frozen"}, "GRPO, equal steps": {"objective": "grpo", "grad_clip": 0.2}}
VARIANTS = {  # of REAL; the paper does not give the weight of its KL terms
    "BCE": {"objective": "real_bce"}, "no anchor": {"objective": "real_no_anchor"},
    "tau 0.1": {"tau": 0.1}, "tau 1.0": {"tau": 1.0},
    "KL to reference": {"kl_ref": 0.01}, "KL to old": {"kl_old": 0.01}, **FROZEN}
BUDGET = dict(steps=40, eval_every=10, eval_samples=4)
STALE = dict(mini_batches=16, warmup=80)  # 16 updates on one question each; the warm-up lasts as many steps
RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
SEEDS, SWEEP_SEED = range(5), 100


def sweep(experiment, methods, rates=RATES, **settings):
    return [(experiment, f"{name} at {lr:g}", SWEEP_SEED, m | settings | {"lr": lr})
            for name, m in methods.items() for lr in rates]


def seeds(experiment, methods, rate_of, factor=1, seeds=SEEDS, **settings):
    return [(experiment, name, seed, m | settings | {"lr": rate_of(name) * factor})
            for seed in seeds for name, m in methods.items()]


def best_rate(experiment, method):
    """The learning rate of the sweep whose mean Pass@1 (half the steps, all steps) is highest."""
    runs = {name.rpartition(" at ")[2]: runs[0] for name, runs in read(experiment).items() if name.startswith(method)}
    return float(max(runs, key=lambda lr: sum(r["pass@1"] for r in runs[lr] if r["step"] in (20, 40))))


def plan():
    """Runs in groups; a group needs the logs of the groups before it."""
    four = {name: m for name, m in METHODS.items() if name != "TRPA"}
    yield sweep("sweep", METHODS) + sweep("stale_sweep", four, RATES[:3], **STALE)
    chosen = {("sweep", m): best_rate("sweep", m) for m in METHODS} | {
        ("stale_sweep", m): best_rate("stale_sweep", m) for m in four}
    same = lambda e: lambda name: chosen[e, name if name in METHODS else "REAL"]  # noqa: E731
    hard = {"GRPO without hard tokens": {"objective": "grpo_bidirectional"}}
    yield (seeds("main", METHODS, same("sweep"))
           + seeds("stale", four | FROZEN, same("stale_sweep"), **STALE)
           + seeds("ablation", FROZEN | VARIANTS, same("sweep"))
           + seeds("ablation", hard, lambda _: chosen["sweep", "GRPO"])
           + seeds("stale", WHY, lambda _: chosen["stale_sweep", "GRPO"], **STALE)
           + seeds("large_steps", four | FROZEN, same("stale_sweep"), factor=4, seeds=SEEDS[:3], **STALE))


def file_of(experiment, method, seed):
    return LOGS / experiment / f"{method.replace(' ', '_')}-seed{seed}.jsonl"


def read(experiment):
    """{method: [rows of one run, ...]}; a row is a training step."""
    found = {}
    for path in sorted((LOGS / experiment).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.open()]
        found.setdefault(rows[-1]["method"], []).append(rows[:-1])
    return found


class Spy:
    """Stands in for real.credit and keeps what the log of a run does not hold: how far each update finds the policy."""

    def __init__(self, credit):
        self.credit, self.shares, self.scores = credit, [], []

    def __call__(self, logp, batch, config):
        labels, mask = batch["labels"], batch["mask"]
        s = real.log_ratio(logp, batch["old_logp"], mask)
        if s.any():  # not the first update of a step, which finds pi_old
            interval = torch.bucketize(s.exp(), torch.tensor([0.8, 1.2]))  # 0 below, 1 inside, 2 above 1 +- eps
            right = labels.bool()[..., None].expand_as(mask)
            self.shares.append([[((interval == k) & (right == side) & mask).sum() / mask.sum() for k in range(3)]
                                for side in (True, False)])
            scores = real.s_bar(logp, batch["old_logp"], mask)[real.is_mixed(labels)]
            self.scores.append(scores.abs().flatten() / 0.5)
        return self.credit(logp, batch, config)

    def row(self):
        """Means of a step's later updates, and the memory of them is cleared."""
        if not self.shares:  # no update moved the policy
            return {}
        shares, scores = torch.tensor(self.shares).mean(0), torch.cat(self.scores)
        self.shares, self.scores = [], []
        quantiles = scores.quantile(torch.tensor([0.5, 0.9, 0.99, 1.0])).tolist() if len(scores) else None
        return {"ratio_shares": dict(zip(("right", "wrong"), shares.tolist())), "s_over_tau": quantiles}


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def execute(run):
    """Train one run and keep its log. Raises what real.train raises."""
    experiment, method, seed, settings = run
    torch.set_num_threads(1)
    began, spy, rows = time.time(), Spy(real.credit), []
    real.credit, log = spy, real.Run.log
    real.Run.log = lambda self, step, metrics, *rest: (log(self, step, metrics, *rest), rows.append(spy.row()))
    try:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
            config = real.Config(**(BUDGET | settings), seed=seed, save_every=10**6, output_dir=folder)
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                real.train(config)
            lines = [json.loads(line) | row for line, row in zip((Path(folder) / "metrics.jsonl").open(), rows)]
    finally:
        real.credit, real.Run.log = spy.credit, log
    lines = [rounded({k: v for k, v in row.items() if v is not None}) for row in lines]
    seconds = round(time.time() - began)
    lines.append({"method": method, "seed": seed, "settings": BUDGET | settings, "total_seconds": seconds})
    path = file_of(experiment, method, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path.with_suffix(".part").replace(path)


def interval(values):
    """Mean and half the width of its 95% interval, Student's t over seeds."""
    from scipy.stats import t

    n = len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(values), half


def table(experiment):
    """Print a Markdown table of an experiment: mean and 95% interval over seeds."""
    print("| method | lr | seeds | Pass@1, step 20 | step 40 | reward | entropy (nats) | solved | length (tokens) |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for method, runs in read(experiment).items():
        path = next((LOGS / experiment).glob(f"{method.replace(' ', '_')}-seed*.jsonl"))
        lr = json.loads(path.read_text().splitlines()[-1])["settings"]["lr"]
        half = [next(r["pass@1"] for r in rows if r["step"] == 20) for rows in runs]
        cells = [half, [rows[-1]["pass@1"] for rows in runs]]
        for key in ("reward", "entropy", "solved", "response_length"):
            cells.append([statistics.mean(r[key] for r in rows[-10:]) for rows in runs])
        shown = ["{:.3f} ± {:.3f}".format(*interval(values)) for values in cells]
        print(f"| {method} | {lr:g} | {len(runs)} | " + " | ".join(shown) + " |")
    print()


def overview():
    """Print the README's table: Pass@1 at the end, mean and 95% interval over seeds, a column for each experiment."""
    columns = {"main": "4 updates a step", "stale": "16 updates a step", "large_steps": "16, 4 x learning rate"}
    found = {e: {m: [rows[-1]["pass@1"] for rows in runs] for m, runs in read(e).items()}
             for e in (*columns, "ablation")}
    found["main"] |= found.pop("ablation")
    print(f"| method | {' | '.join(columns.values())} |\n|---|---|---|---|")
    for method in dict.fromkeys((*METHODS, *FROZEN, *WHY, *VARIANTS, *found["main"])):
        cells = [found[e].get(method) for e in columns]
        cells = ["{:.3f} ± {:.3f}".format(*interval(values)) if values else "" for values in cells]
        print(f"| {method} | {' | '.join(cells)} |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables of the logs that exist")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    if not args.tables:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            for group in plan():
                missing = [run for run in group if not file_of(*run[:3]).exists()]
                for _ in tqdm(pool.map(execute, missing), total=len(missing)):
                    pass
    overview()
    for folder in sorted(LOGS.iterdir()):
        print(f"**{folder.name}** (reward, entropy, solved and length: mean of the last 10 steps)\n")
        table(folder.name)


if __name__ == "__main__":
    main()
