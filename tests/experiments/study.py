"""REAL beside its rivals on the embedded model, by the plan of plan.md.

    pip install scipy
    python tests/experiments/study.py            # missing runs (hours on 2 cores), then the tables
    python tests/experiments/study.py --tables   # the tables alone, from logs/study.jsonl

A finished run is a line of logs/study.jsonl, and a run that is there is not repeated.
logs/study_first.jsonl is the study as it was before the plan.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import atlas  # noqa: E402
import real  # noqa: E402
import runlog  # noqa: E402

KL = 0.001
ALL_EIGHT = "real real_bce grpo dapo gspo trpa real_no_anchor grpo_bidirectional".split()


def real_frozen(logp, old_logp, mask, labels, *, tau=0.5):
    """REAL with its credit frozen at s_bar = 0: the gradient of a step's first update in all."""
    return real.real(old_logp + logp - logp.detach(), old_logp, mask, labels, tau=tau)


def real_sum(logp, old_logp, mask, labels, *, tau=0.5):
    """REAL with the sum of a rollout's log-ratios as its logit, in place of their mean."""
    n = mask.sum(-1, keepdim=True)  # (Q, G, 1)
    return real.real(n * logp, n * old_logp, mask, labels, tau=tau)


def real_sum_frozen(logp, old_logp, mask, labels, *, tau=0.5):
    """The same with its credit frozen."""
    return real_sum(old_logp + logp - logp.detach(), old_logp, mask, labels, tau=tau)


def with_kl_on_mixed(objective):
    """The objective plus a KL to the starting model that leaves uniform groups alone."""
    def loss(logp, old_logp, mask, labels, *, ref_logp):
        d = real.log_ratio(ref_logp, logp, mask).clamp(-20, 20)  # as in real.kl
        to_ref = real.token_mean(d.exp() - d - 1, mask).mean(-1)  # (Q,)
        on_mixed = torch.where(real.is_mixed(labels), to_ref, 0.0).mean()
        return objective(logp, old_logp, mask, labels) + KL * on_mixed
    return loss


real.OBJECTIVES |= atlas.OBJECTIVES | {
    "real_frozen": real_frozen, "real_sum": real_sum, "real_sum_frozen": real_sum_frozen,
    "real_kl_mixed": with_kl_on_mixed(real.real), "grpo_kl_mixed": with_kl_on_mixed(real.grpo)}
METHODS = {name: {"objective": name.lower()} for name in ("REAL", "GRPO", "DAPO", "GSPO", "TRPA")}
WIDE = {"GSPO, clip x 10": {"objective": "gspo", "eps_low": 0.003, "eps_high": 0.004}}
KL_ARMS = {"REAL, KL on all groups": {"objective": "real", "kl_ref": KL},
           "REAL, KL on mixed groups": {"objective": "real_kl_mixed"},
           "GRPO, KL on all groups": {"objective": "grpo", "kl_ref": KL},
           "GRPO, KL on mixed groups": {"objective": "grpo_kl_mixed"}}
TAUS = {"frozen credit": {"objective": "real_frozen"}} | {
    f"REAL, tau {tau}": {"objective": "real", "tau": tau} for tau in (0.005, 0.05)}
REGIMES = {  # of family (d), each REAL and frozen credit
    "one label in five flipped": {"flip": 0.2}, "rollouts 4 steps old": {"age": 4},
    "8 epochs": {"epochs": 8}, "sum as logit": {"sum": True}}
UPDATES = {4: {}, 16: dict(mini_batches=16, warmup=80)}  # warm-up over the first five steps
RATES = {4: (5e-5, 1e-4, 2e-4), 16: (2.5e-5, 5e-5, 1e-4)}
BUDGET = dict(steps=40, eval_every=10, eval_samples=4)
OUTCOME = (20, 30, 40)  # the steps whose Pass@1 is the outcome; the one at step 10 is not computed
SEEDS, NEW_SEEDS, ATLAS_SEEDS, SWEEP_SEED, PROBLEM_SEED = range(10), range(10, 20), range(5), 100, 1
BAND = 0.01
SILENT = {"real", "grpo", "dapo", "gspo", "real_frozen", "real_sum", "real_sum_frozen",
          "real_kl_mixed", "grpo_kl_mixed"}
KEYS = ("step pass@1 reward mixed entropy solved response_length grad_norm s_over_tau skipped "
        "clipped update_norms").split()


# ==== What is run ================================================================================

def sweep(updates, methods, rates):
    return [(f"sweep{updates}", f"{name} at {lr:g}", SWEEP_SEED, m | UPDATES[updates] | {"lr": lr})
            for name, m in methods.items() for lr in rates]


def seeds(experiment, updates, arms, rate, seeds=SEEDS):
    """Runs of arms {name: settings}; rate(name) is the learning rate."""
    return [(experiment, name, seed, m | UPDATES[updates] | {"lr": rate(name)})
            for name, m in arms.items() for seed in seeds]


def swept(updates, method):
    """{learning rate: outcome} of a method's sweep, rates rising."""
    runs = {float(arm.rpartition(" at ")[2]): runs[0]
            for arm, runs in read(f"sweep{updates}").items() if arm.startswith(f"{method} at")}
    return {lr: outcome(runs[lr]) for lr in sorted(runs)}


def best_rate(updates, method):
    found = swept(updates, method)
    return max(found, key=found.get)


def at_an_end(updates, arms):
    """One more rate for each method that does best at an end of its rates."""
    for name, m in arms.items():
        best, rates = best_rate(updates, name), swept(updates, name)
        for end, factor in ((min(rates), 0.5), (max(rates), 2)):
            if best == end:
                yield from sweep(updates, {name: m}, [float(f"{end * factor:g}")])


def sweep_groups(updates, arms):
    """The sweep, a rate wider until no method does best at an end."""
    yield sweep(updates, arms, RATES[updates])
    while wider := list(at_an_end(updates, arms)):
        yield wider


def main_runs(updates, arms):
    return seeds(f"main{updates}", updates, arms, partial(best_rate, updates))


def regime(name, experiment="eq9", seeds_of_it=SEEDS):
    """REAL and REAL with frozen credit, in a setting of their own."""
    settings = dict(REGIMES[name])
    loss = "real_sum" if settings.pop("sum", False) else "real"
    arms = {f"{kind}, {name}": {"objective": loss + end} | settings
            for kind, end in (("REAL", ""), ("frozen", "_frozen"))}
    return seeds(experiment, 16, arms, lambda _: best_rate(16, "REAL"), seeds_of_it)


def in_atlas(objectives):
    """Five seeds each at REAL's rate; those that the main comparison has at it are not repeated."""
    return seeds("atlas", 16, {name: {"objective": name} for name in objectives},
                 lambda _: best_rate(16, "REAL"), ATLAS_SEEDS)


def plan():
    """Runs in the order of plan.md; a group needs the logs of the groups before it."""
    two, three = ({name: METHODS[name] for name in names.split()}
                  for names in ("REAL GRPO", "DAPO GSPO"))
    yield from sweep_groups(16, two | three | WIDE)
    yield (main_runs(16, two) + seeds("kl", 16, KL_ARMS, lambda arm: best_rate(16, arm[:4]))
           + seeds("eq9", 16, TAUS, lambda _: best_rate(16, "REAL"))
           + main_runs(16, three | WIDE))
    yield from sweep_groups(4, METHODS)
    yield main_runs(4, METHODS) + regime("one label in five flipped")
    yield from sweep_groups(16, {"TRPA": METHODS["TRPA"]})
    yield main_runs(16, {"TRPA": METHODS["TRPA"]})
    yield in_atlas(atlas.OBJECTIVES)
    yield regime("rollouts 4 steps old")
    yield regime("sum as logit")
    yield regime("8 epochs")
    yield seeds("eq9", 16, {"REAL, tau 0.025": {"objective": "real", "tau": 0.025}},
                lambda _: best_rate(16, "REAL"))
    yield in_atlas(["real_bce", "real_no_anchor", "grpo_bidirectional", "gspo"])
    yield regime("rollouts 4 steps old", "confirm", NEW_SEEDS)


# ==== How it is run ==============================================================================

def other_problems(file):
    """Write 256 problems of neither train.jsonl nor test.jsonl, for choosing learning rates."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "tiny" / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    rng, rows = random.Random(PROBLEM_SEED), []
    seen = {json.loads(line)["problem"] for name in ("train", "test")
            for line in (ROOT / "tiny" / f"{name}.jsonl").open()}
    while len(rows) < 256:
        _, _, problem, answer = make.draw_problem(rng)
        if problem not in seen:
            seen.add(problem)
            rows.append(json.dumps({"problem": problem, "answer": str(answer)}) + "\n")
    file.write_text("".join(rows))


class Watch:
    """Stands in for functions of real.py: keeps what no log holds, and makes two regimes of Eq. 9:
    `epochs` over each batch, and rollouts by the policy as it was `age` steps before."""

    NAMES = "update validate make_optimizer metrics rollouts all_logprobs".split()

    def __init__(self, epochs=1, age=0):
        self.real = {name: getattr(real, name) for name in self.NAMES}
        self.updates, self.validations = [], 0
        self.epochs, self.age, self.past, self.trained = epochs, age, [], None

    def __enter__(self):
        for name in self.NAMES:
            setattr(real, name, getattr(self, name))
        return self

    def __exit__(self, *_):
        for name in self.NAMES:
            setattr(real, name, self.real[name])

    def rollouts(self, model, tokenizer, problems, group_size, config, *label, **choose):
        """A step's rollouts have a label; they come from the oldest policy that is kept."""
        if label and self.trained:  # before, real.py checks the model
            self.past = [*self.past, copy.deepcopy(model)][-1 - self.age:]
            model = self.past[0]
        return self.real["rollouts"](model, tokenizer, problems, group_size, config, *label,
                                     **choose)

    def all_logprobs(self, model, batch, config):
        """pi_old is the policy that sampled; it is asked for what no batch holds yet."""
        if self.past and model is self.trained[0] and "old_logp" not in batch:
            model = self.past[0]
        return self.real["all_logprobs"](model, batch, config)

    def metrics(self, batch, minis, updates):
        """The epochs after the first, over the same mini-batches; then the numbers of the first."""
        for _ in range(self.epochs - 1):
            for mini in minis:
                self.update(*self.trained, mini, self.config)
        return self.real["metrics"](batch, minis, updates)

    def make_optimizer(self, model, config):
        """The optimizer, with hooks that measure how far each of its steps moves the weights."""
        optimizer = self.real["make_optimizer"](model, config)
        self.trained, self.config = (model, optimizer), config
        weights = [w for group in optimizer.param_groups for w in group["params"]]

        def before(*_):
            self.before = [w.detach().clone() for w in weights]

        def after(*_):
            moved = [torch.linalg.vector_norm(w.detach() - b) for w, b in zip(weights, self.before)]
            self.moved = torch.stack(moved).norm().item()
        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    def update(self, model, optimizer, batch, config):
        self.moved = None  # as it stays if no group of the mini-batch gives credit
        mixed = real.is_mixed(batch["labels"])
        if config.objective in SILENT and not (mixed.any() or config.kl_ref):
            none = torch.zeros(batch["labels"].shape)  # real.update would find this, and take long
            done = {"loss": torch.tensor(0.0), "grad_norm": torch.tensor(0.0), "weight": none,
                    "s_bar": none}
        else:
            done = self.real["update"](model, optimizer, batch, config)
        scores = done["s_bar"][mixed].abs().flatten() / config.tau
        self.updates.append((self.moved, done["grad_norm"].item() > config.grad_clip, scores))
        return done

    def validate(self, model, tokenizer, problems, config):
        """Pass@1 where the outcome needs it; neither before nor after step 10."""
        self.validations += 1
        wanted = (self.validations - 1) * config.eval_every in OUTCOME
        return self.real["validate"](model, tokenizer, problems, config) if wanted else math.nan

    def row(self):
        """What a step's updates were like, and the memory of them is cleared."""
        moved, clipped, scores = zip(*self.updates)
        later = torch.cat([s for s in scores if s.any()] or [torch.empty(0)])  # pi is not pi_old
        self.updates = []
        quantiles = later.quantile(torch.tensor([0.5, 0.9, 0.99, 1.0])) if len(later) else None
        return {"update_norms": list(moved), "clipped": sum(clipped),
                "s_over_tau": None if quantiles is None else quantiles.tolist()}


def flipping(share, seed):
    """real.label_group with this share of its labels wrong, the same ones for every objective."""
    def label(problem, texts):
        rng = random.Random(f"{seed} {problem['problem']}")
        return [right ^ (rng.random() < share) for right in real.label_group(problem, texts)]
    return label


def execute(run, until=math.inf):
    """Train one run; returns its rows and seconds, or None after `until`."""
    experiment, _, seed, settings = run
    if time.time() > until:
        return None
    torch.set_num_threads(1)
    began, watched, settings = time.time(), [], BUDGET | settings
    label = flipping(settings.pop("flip"), seed) if "flip" in settings else real.label_group
    watch = Watch(settings.pop("epochs", 1), settings.pop("age", 0))
    log = real.Run.log
    methods = {"finish": lambda self, *args: None, "save": lambda self, *args: None,
               "log": lambda self, *args: (log(self, *args), watched.append(watch.row()))}
    own = {name: getattr(real.Run, name) for name in methods}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
        if experiment.startswith("sweep"):
            settings["eval_dataset"] = str(Path(folder) / "other.jsonl")
            other_problems(Path(settings["eval_dataset"]))
        config = real.Config(**settings, seed=seed, output_dir=str(Path(folder) / "run"))
        try:
            for name in methods:
                setattr(real.Run, name, methods[name])
            with watch, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                real.train(config, label)
        finally:
            for name in own:
                setattr(real.Run, name, own[name])
        rows = [json.loads(line) for line in Path(config.output_dir, "metrics.jsonl").open()]
    return [row | more for row, more in zip(rows, watched)], round(time.time() - began)


def run_missing(jobs, until, groups):
    """Run what the log lacks, a group after the other; each run is written as it ends."""
    commit = subprocess.run(["git", "log", "-1", "--format=%h", "--", ROOT / "real.py"], cwd=ROOT,
                            capture_output=True, text=True).stdout.strip()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for group in groups:
            done = {(r["experiment"], r["arm"], r["seed"]) for r in runlog.read("study")}
            work = {pool.submit(execute, run, until): run for run in group if run[:3] not in done}
            for job in tqdm(as_completed(work), total=len(work)):
                if job.result() is None:
                    continue
                (experiment, arm, seed, settings), (rows, seconds) = work[job], job.result()
                runlog.append("study", rows, KEYS, experiment=experiment, arm=arm, seed=seed,
                              config=BUDGET | settings, seconds=seconds, real=commit)
            if time.time() > until:
                return


# ==== What came of it ============================================================================

def read(experiment, log="study"):
    """{arm: [rows of one run, ...]}, seeds rising; a row is a training step."""
    found = {}
    for run in sorted(runlog.read(log), key=lambda run: run["seed"]):
        if run["experiment"] == experiment:
            found.setdefault(run["arm"], []).append(run["rows"])
    return found


def outcome(rows):
    """The plan's outcome of a run: mean held-out Pass@1 of steps 20, 30 and 40."""
    return statistics.mean(row["pass@1"] for row in rows if row["step"] in OUTCOME)


def interval(values, share=0.95):
    """Mean and half the width of its interval, Student's t over seeds."""
    from scipy.stats import t

    n = len(values)
    spread = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return statistics.mean(values), t.ppf((1 + share) / 2, n - 1) * spread


def judge(family):
    """The plan's verdicts on {comparison: paired differences}.

    Yields comparison, mean, half of the simultaneous interval, Holm's p and the verdict.
    """
    from scipy.stats import ttest_1samp

    p = {name: float(ttest_1samp(values, 0).pvalue) for name, values in family.items()}
    holm, worst = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.get)):  # the smallest first
        worst = max(worst, min(1.0, (len(p) - rank) * p[name]))
        holm[name] = worst
    for name, values in family.items():
        mean, half = interval(values, 1 - 0.05 / len(family))
        equal = abs(mean) + half <= BAND
        verdict = {(True, True): "different, within the band", (True, False): "different",
                   (False, True): "equal", (False, False): "undecided"}[holm[name] < 0.05, equal]
        yield name, mean, half, holm[name], verdict


def complete(experiment, seeds=SEEDS):
    """{arm: [rows of each seed]} of arms with all their seeds; the others count as not run."""
    return {arm: runs for arm, runs in read(experiment).items() if len(runs) == len(seeds)}


def families():
    """{title: {comparison: differences of the outcome, seed by seed}}, of complete arms."""
    main, four, kl, frozen = (
        {arm: [outcome(rows) for rows in runs] for arm, runs in complete(e).items()}
        for e in ("main16", "main4", "kl", "eq9"))
    wanted = {"16 updates a step": [(main, "REAL", main, m) for m in (*METHODS, *WIDE)],
              "4 updates a step": [(four, "REAL", four, m) for m in METHODS]}
    wanted["KL, 16 updates a step"] = [
        (kl, f"{m}, KL on {which} groups", main, m) for which in ("all", "mixed")
        for m in ("REAL", "GRPO")] + [
        (kl, f"REAL, KL on {which} groups", kl, f"GRPO, KL on {which} groups")
        for which in ("all", "mixed")]
    wanted["REAL and its frozen credit, 16 updates a step"] = [
        (main, "REAL", frozen, "frozen credit")] + [
        (frozen, arm, frozen, "frozen credit") for arm in (*TAUS, "REAL, tau 0.025")] + [
        (frozen, f"REAL, {name}", frozen, f"frozen, {name}") for name in REGIMES]
    again = {arm: [outcome(rows) for rows in runs]
             for arm, runs in complete("confirm", NEW_SEEDS).items()}
    wanted["Rollouts 4 steps old, once more with ten new seeds"] = [
        (again, "REAL, rollouts 4 steps old", again, "frozen, rollouts 4 steps old")]
    return {title: {f"{x} minus {y}": [i - j for i, j in zip(a[x], b[y])]
                    for a, x, b, y in pairs if x != y and x in a and y in b}
            for title, pairs in wanted.items()}


def verdicts():
    """Print a Markdown table of the plan's comparisons, a block a family."""
    print("| comparison | difference, simultaneous 95% interval | p (Holm) | verdict |\n"
          "|---|---|---|---|")
    for title, family in families().items():
        if family:
            print(f"| **{title}** | | | |")
        for name, mean, half, p, verdict in judge(family):
            print(f"| {name} | {mean:+.3f} ± {half:.3f} | {p:.2g} | {verdict} |")
    print()


def rates(experiment, log="study"):
    """{arm: learning rate}"""
    return {run["arm"]: run["config"]["lr"] for run in runlog.read(log)
            if run["experiment"] == experiment}


def updates_a_step(experiment):
    """{arm: updates a step}, all epochs together"""
    return {run["arm"]: run["config"].get("mini_batches", 4) * run["config"].get("epochs", 1)
            for run in runlog.read("study") if run["experiment"] == experiment}


def taken(rows):
    """The norms of a run's updates; those without credit were not taken."""
    return [norm for row in rows for norm in row["update_norms"] if norm is not None]


def scores(runs):
    """Median and upper decile of |s_bar| / tau after a step's first update, as text."""
    found = [row["s_over_tau"] for rows in runs for row in rows if "s_over_tau" in row]
    return "{:.3f}, {:.3f}".format(*map(statistics.mean, list(zip(*found))[:2]))


def overview():
    """Print the outcome of all complete arms: mean and 95% interval over ten seeds."""
    print("| objective | updates a step | lr | Pass@1, mean of steps 20, 30, 40 | step 40 "
          "| updates taken | score / tau: median, upper decile |\n|---|---|---|---|---|---|---|")
    for experiment in ("main16", "kl", "eq9", "confirm", "main4"):
        lr, updates = rates(experiment), updates_a_step(experiment)
        new = experiment == "confirm"
        for arm, runs in complete(experiment, NEW_SEEDS if new else SEEDS).items():
            cells = ["{:.3f} ± {:.3f}".format(*interval(values)) for values in (
                [outcome(rows) for rows in runs], [rows[-1]["pass@1"] for rows in runs])]
            count = statistics.mean(len(taken(rows)) for rows in runs)
            name = f"{arm}, new seeds" if new else arm
            print(f"| {name} | {updates[arm]} | {lr[arm]:g} | {' | '.join(cells)} "
                  f"| {count:.0f} | {scores(runs)} |")
    print()


def atlas_table():
    """Print the outcome of all objectives side by side, five seeds each: a description."""
    print("| objective | Pass@1, mean of steps 20, 30, 40 | step 40 | updates taken "
          "| of them clipped |\n|---|---|---|---|---|")
    found = {arm.lower(): runs[:len(ATLAS_SEEDS)] for arm, runs in read("main16").items()
             if rates("main16")[arm] == best_rate(16, "REAL")} | read("atlas")
    for name in [*ALL_EIGHT, *atlas.OBJECTIVES]:
        runs = found.get(name, [])
        if len(runs) == len(ATLAS_SEEDS):
            cells = ["{:.3f} ± {:.3f}".format(*interval(values)) for values in (
                [outcome(rows) for rows in runs], [rows[-1]["pass@1"] for rows in runs])]
            count = sum(len(taken(rows)) for rows in runs)
            share = sum(row["clipped"] for rows in runs for row in rows) / count
            print(f"| `{name}` | {' | '.join(cells)} | {count / len(runs):.0f} | {share:.0%} |")
    print()


def lengths():
    """Print the mean norm of an update in steps with few and with many mixed groups."""
    print("| KL on all groups | steps with at most 15% mixed groups | with 35% or more |\n"
          "|---|---|---|")
    for method in ("REAL", "GRPO"):
        rows = [row for run in read("kl")[f"{method}, KL on all groups"] for row in run]
        few, many = (statistics.mean(taken([row for row in rows if wanted(row["mixed"])]))
                     for wanted in (lambda x: x <= 0.15, lambda x: x >= 0.35))
        print(f"| {method} | {few:.4f} | {many:.4f} |")
    print()


def first():
    """Print the first study's Pass@1 after 40 steps, in which GRPO had a KL and REAL had none."""
    columns = {"main": "4 updates a step", "stale": "16 updates a step"}
    found = {e: {m: [rows[-1]["pass@1"] for rows in runs]
                 for m, runs in read(e, "study_first").items()} for e in (*columns, "ablation")}
    found["main"] |= found.pop("ablation")
    print(f"| method | {' | '.join(columns.values())} |\n|---|---|---|")
    for method in (*METHODS, "frozen credit"):
        cells = [found[e].get(method) for e in columns]
        cells = ["{:.3f} ± {:.3f}".format(*interval(values)) if values else "" for values in cells]
        print(f"| {method} | {' | '.join(cells)} |")
    print()


def table(experiment, log="study"):
    """Print a Markdown table of what an experiment's runs were like: mean and 95% interval."""
    new = log == "study"
    lr, found = rates(experiment, log), read(experiment, log)
    print("| method | lr | seeds | Pass@1, step 20 | step 40 | reward | entropy (nats) | solved "
          "| length (tokens) |" + " updates taken | clipped | norm of an update "
          "| score / tau: median, upper decile |" * new + "\n" + "|---" * (9 + 4 * new) + "|")
    for arm, runs in found.items():
        cells = [[next(r["pass@1"] for r in rows if r["step"] == 20) for rows in runs],
                 [rows[-1]["pass@1"] for rows in runs]]
        for key in ("reward", "entropy", "solved", "response_length"):
            cells.append([statistics.mean(r[key] for r in rows[-10:]) for rows in runs])
        shown = ["{:.3f} ± {:.3f}".format(*interval(values)) for values in cells]
        if new:
            norms = [taken(rows) for rows in runs]
            count = sum(map(len, norms))
            shown += [f"{count / len(runs):.0f}",
                      f"{sum(r['clipped'] for rows in runs for r in rows) / count:.0%}",
                      "{:.4f} ± {:.4f}".format(*interval([statistics.mean(x) for x in norms])),
                      scores(runs)]
        print(f"| {arm} | {lr[arm]:g} | {len(runs)} | " + " | ".join(shown) + " |")
    print()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="print the tables, train nothing")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--until", help="start no run after this time of day, as in 18:30")
    args = parser.parse_args()
    until = math.inf
    if args.until:
        until = time.mktime(time.strptime(f"{time.strftime('%Y-%m-%d')} {args.until}",
                                          "%Y-%m-%d %H:%M"))
    if not args.tables:
        run_missing(args.jobs, until, plan())
    overview()
    verdicts()
    atlas_table()
    lengths()
    for experiment in dict.fromkeys(run["experiment"] for run in runlog.read("study")):
        print(f"**{experiment}** (reward, entropy, solved and length: mean of the last 10 steps)\n")
        table(experiment)
    print("**The first study**\n")
    first()


if __name__ == "__main__":
    main()
