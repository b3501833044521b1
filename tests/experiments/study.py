"""The paper's comparisons in miniature: every method and ablation on the embedded model.

    pip install scipy
    python tests/experiments/study.py             # missing runs (hours on 2 cores), then the tables
    python tests/experiments/study.py --tables    # the tables alone, from logs/study.jsonl

Five seeds each, three with large steps. A finished run is a line of logs/study.jsonl, and a run
that is there is not repeated. The learning rate of each method is the one of four that does best in
a sweep with a seed of its own (mean of the Pass@1 after half the steps and after all of them);
variants of REAL use REAL's.
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import real  # noqa: E402
import runlog  # noqa: E402


def real_frozen(logp, old_logp, mask, labels, *, tau=0.5, as_printed=False):
    """REAL with its credit frozen at s_bar = 0: the gradient of a step's first update in all."""
    frozen = old_logp + logp - logp.detach()
    return real.real(frozen, old_logp, mask, labels, tau=tau, as_printed=as_printed)


def grpo_frozen(logp, old_logp, mask, labels):
    """GRPO likewise: advantage times log-probability, no ratio, no clip."""
    return real.grpo(old_logp + logp - logp.detach(), old_logp, mask, labels)


real.OBJECTIVES |= {"real_frozen": real_frozen, "grpo_frozen": grpo_frozen}
METHODS = {name: {"objective": name.lower()} for name in ("REAL", "GRPO", "DAPO", "GSPO", "TRPA")}
METHODS["GRPO"]["kl_ref"] = 0.001  # Eq. 1
FROZEN = {"frozen credit": {"objective": "real_frozen"}}
WHY = {  # what separates GRPO from REAL: drift and KL, or the size of its clipped gradients
    "GRPO, frozen credit": {"objective": "grpo_frozen"},
    "GRPO, equal steps": METHODS["GRPO"] | {"grad_clip": 0.2}}
VARIANTS = {  # of REAL; the paper does not give the weight of its KL terms
    "BCE": {"objective": "real_bce"}, "no anchor": {"objective": "real_no_anchor"},
    "tau 0.1": {"tau": 0.1}, "tau 1.0": {"tau": 1.0},
    "KL to reference": {"kl_ref": 0.01}, "KL to old": {"kl_old": 0.01}, **FROZEN}
BUDGET = dict(steps=40, eval_every=10, eval_samples=4)
STALE = dict(mini_batches=16, warmup=80)  # 16 updates on one question each; warm-up as many steps
RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
SEEDS, SWEEP_SEED = range(5), 100
KEYS = ("step pass@1 pass@1_before reward entropy solved response_length grad_norm ratio_shares "
        "s_over_tau").split()


def sweep(experiment, methods, rates=RATES, **settings):
    return [(experiment, f"{name} at {lr:g}", SWEEP_SEED, m | settings | {"lr": lr})
            for name, m in methods.items() for lr in rates]


def seeds(experiment, methods, rate_of, factor=1, seeds=SEEDS, **settings):
    return [(experiment, name, seed, m | settings | {"lr": rate_of(name) * factor})
            for seed in seeds for name, m in methods.items()]


def best_rate(experiment, method):
    """The learning rate of the sweep whose mean Pass@1 (half the steps, all steps) is highest."""
    runs = {name.rpartition(" at ")[2]: runs[0] for name, runs in read(experiment).items()
            if name.startswith(method)}
    return float(max(runs, key=lambda lr: sum(
        row["pass@1"] for row in runs[lr] if row["step"] in (20, 40))))


def plan():
    """Runs in groups; a group needs the logs of the groups before it."""
    four = {name: m for name, m in METHODS.items() if name != "TRPA"}
    yield sweep("sweep", METHODS) + sweep("stale_sweep", four, RATES[:3], **STALE)
    chosen = {("sweep", m): best_rate("sweep", m) for m in METHODS} | {
        ("stale_sweep", m): best_rate("stale_sweep", m) for m in four}
    same = lambda e: lambda name: chosen[e, name if name in METHODS else "REAL"]  # noqa: E731
    hard = {"GRPO without hard tokens": {"objective": "grpo_bidirectional", "kl_ref": 0.001}}
    yield (seeds("main", METHODS, same("sweep"))
           + seeds("stale", four | FROZEN, same("stale_sweep"), **STALE)
           + seeds("ablation", FROZEN | VARIANTS, same("sweep"))
           + seeds("ablation", hard, lambda _: chosen["sweep", "GRPO"])
           + seeds("stale", WHY, lambda _: chosen["stale_sweep", "GRPO"], **STALE)
           + seeds("large_steps", four | FROZEN, same("stale_sweep"), 4, SEEDS[:3], **STALE))


def read(experiment):
    """{arm: [rows of one run, ...]}; a row is a training step."""
    found = {}
    for run in sorted(runlog.read("study"), key=lambda run: run["seed"]):
        if run["experiment"] == experiment:
            found.setdefault(run["arm"], []).append(run["rows"])
    return found


class Spy:
    """Stands in for real.credit and keeps what no log holds: how far updates find the policy."""

    def __init__(self, credit):
        self.credit, self.shares, self.scores = credit, [], []

    def __call__(self, logp, batch, config):
        labels, mask = batch["labels"], batch["mask"]
        s = real.log_ratio(logp.detach(), batch["old_logp"], mask)
        if s.any():  # not the first update of a step, which finds pi_old
            interval = torch.bucketize(s.exp(), torch.tensor([0.8, 1.2]))  # 0: below, 1: inside
            right = labels.bool()[..., None].expand_as(mask)
            self.shares.append([[((interval == k) & (right == side) & mask).sum() / mask.sum()
                                 for k in range(3)] for side in (True, False)])
            scores = real.token_mean(s, mask)[real.is_mixed(labels)]
            self.scores.append(scores.abs().flatten() / 0.5)
        return self.credit(logp, batch, config)

    def row(self):
        """Means of a step's later updates, and the memory of them is cleared."""
        if not self.shares:  # no update moved the policy
            return {}
        shares, scores = torch.tensor(self.shares).mean(0).tolist(), torch.cat(self.scores)
        self.shares, self.scores = [], []
        quantiles = scores.quantile(torch.tensor([0.5, 0.9, 0.99, 1.0])) if len(scores) else None
        return {"ratio_shares": dict(zip(("right", "wrong"), shares)),
                "s_over_tau": None if quantiles is None else quantiles.tolist()}


def execute(run):
    """Train one run; returns its rows and seconds. Raises what real.train raises."""
    *_, seed, settings = run
    torch.set_num_threads(1)
    began, spy, spied = time.time(), Spy(real.credit), []
    real.credit, log = spy, real.Run.log
    real.Run.log = lambda self, *args: (log(self, *args), spied.append(spy.row()))
    try:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
            config = real.Config(**(BUDGET | settings), seed=seed, save_every=10**6,
                                 output_dir=folder)
            with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                real.train(config)
            rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
    finally:
        real.credit, real.Run.log = spy.credit, log
    return [row | more for row, more in zip(rows, spied)], round(time.time() - began)


def interval(values):
    """Mean and half the width of its 95% interval, Student's t over seeds."""
    from scipy.stats import t

    n = len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(values), half


def table(experiment):
    """Print a Markdown table of an experiment: mean and 95% interval over seeds."""
    print("| method | lr | seeds | Pass@1, step 20 | step 40 | reward | entropy (nats) | solved "
          "| length (tokens) |\n|---|---|---|---|---|---|---|---|---|")
    rates = {(r["experiment"], r["arm"]): r["config"]["lr"] for r in runlog.read("study")}
    for method, runs in read(experiment).items():
        lr = rates[experiment, method]
        half = [next(r["pass@1"] for r in rows if r["step"] == 20) for rows in runs]
        cells = [half, [rows[-1]["pass@1"] for rows in runs]]
        for key in ("reward", "entropy", "solved", "response_length"):
            cells.append([statistics.mean(r[key] for r in rows[-10:]) for rows in runs])
        shown = ["{:.3f} ± {:.3f}".format(*interval(values)) for values in cells]
        print(f"| {method} | {lr:g} | {len(runs)} | " + " | ".join(shown) + " |")
    print()


def overview():
    """Print the table of Pass@1 at the end, mean and 95% interval, a column for each experiment."""
    columns = {"main": "4 updates a step", "stale": "16 updates a step",
               "large_steps": "16, 4 x learning rate"}
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    if not args.tables:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            for group in plan():
                done = {(r["experiment"], r["arm"], r["seed"]) for r in runlog.read("study")}
                jobs = {pool.submit(execute, run): run for run in group if run[:3] not in done}
                for job in tqdm(as_completed(jobs), total=len(jobs)):
                    (experiment, arm, seed, settings), (rows, seconds) = jobs[job], job.result()
                    runlog.append("study", rows, KEYS, experiment=experiment, arm=arm, seed=seed,
                                  config=BUDGET | settings, seconds=seconds)
    overview()
    for name in sorted({run["experiment"] for run in runlog.read("study")}):
        print(f"**{name}** (reward, entropy, solved and length: mean of the last 10 steps)\n")
        table(name)


if __name__ == "__main__":
    main()
