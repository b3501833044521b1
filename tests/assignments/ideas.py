"""Eight ideas from the literature, each plugged into real.py from outside, measured on the tiny
model.

    python tests/assignments/ideas.py    # an hour on one core; what has its log is not run again

An idea is a label function given to `real.train`, an objective of one's own in `real.OBJECTIVES`,
or a few lines around `real.train`. One patches real.py: idea 8 puts its own `real.rollouts` in
place while it trains. A run is 40 steps at the defaults of real.Config, in a process of its own,
and a line of tests/assignments/logs/ideas.jsonl. Printed at the end: the table of Pass@1 on the 256
held-out problems, 8 samples each, always by the real checker; and that of pass@k, idea 6, whose log
is leash.jsonl.
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "experiments")]
import eval as scoring  # noqa: E402
import real  # noqa: E402
import runlog  # noqa: E402

runlog.LOGS = HERE / "logs"
SEEDS, RHO = range(3), 0.2
BUDGET = {"steps": 40, "eval_every": 20, "eval_samples": 8}
KEYS = "step reward mixed solved entropy response_length pass@1 pass@1_before rollouts".split()

# ---- 1. No answers: the majority is right --------------------------------------------------------


def majority_labels(responses):
    """True where a response has the answer with strictly the most votes of its group; equal values
    vote together."""
    answers = [real.extract_answer(response) for response in responses]
    votes = Counter(answer for answer in answers if answer)
    agree = {a: {b for b in votes if real.is_correct(f"\\boxed{{{b}}}", a)} for a in votes}
    total = {a: sum(votes[b] for b in agree[a]) for a in votes}  # of a's own value, spelt b
    first = max(total, key=total.get, default=None)
    tie = any(total[a] == total[first] and a not in agree[first] for a in total)
    return [answer is not None and not tie and answer in agree.get(first, ()) for answer in answers]


def majority_vote(config):
    """TTRL (arXiv 2504.16084): r = 1 where the answer is the majority's, so no gold answer is used.
    A tie teaches nothing. Here every group of 8 votes for itself. The log's reward is then the
    vote's; Pass@1 is still the checker's."""
    return real.train(config, label=lambda problem, texts: majority_labels(texts))


# ---- 2. One training example ---------------------------------------------------------------------


def one_example(config):
    """1-shot RLVR (arXiv 2504.20571): every question of every step is the same one, here the first
    that the seed draws (the paper chooses its example with care). Plugs in as a data set."""
    rows = [json.loads(line) for line in (Path(config.dataset) / "train.jsonl").open()]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "one.jsonl"
        data.write_text((json.dumps(real.draw(rows, 1, config)[0]) + "\n") * config.prompts)
        return real.train(dataclasses.replace(config, dataset=str(data), eval_dataset=real.TINY))


# ---- 3. A verifier that errs, and a correction ---------------------------------------------------


def noisy_label(problem, texts):
    """The checker's labels, each flipped with probability rho = 0.2."""
    flips = (torch.rand(len(texts)) < RHO).tolist()
    return [label != flip for label, flip in zip(real.label_group(problem, texts), flips)]


def noisy_verifier(config):
    return real.train(config, label=noisy_label)


def real_denoised(logp, old_logp, mask, labels, *, tau=0.5, rho=RHO):
    """REAL (Eq. 8) with each term weighed by the probability w that the rollout is truly right
    (wrong: 1 - w): L = log(1 + sum_k w_k e^{-s_k / tau}) + log(1 + sum_k (1 - w_k) e^{s_k / tau}).

    After the idea of arXiv 2510.00915, whose backward correction is r^ = (r~ - rho0) / (1 - rho0 -
    rho1). REAL takes classes, not numbers, so here r^ corrects a group's share of right rollouts,
    and Bayes' rule then says how far to believe each label; this step is ours."""
    seen = labels.to(logp.dtype).mean(-1, keepdim=True)
    share = ((seen - rho) / (1 - 2 * rho)).clamp(0, 1)  # of right rollouts, the noise taken off
    right = torch.where(labels.bool(), 1 - rho, rho) * share
    wrong = torch.where(labels.bool(), rho, 1 - rho) * (1 - share)
    eps = torch.finfo(logp.dtype).eps
    w = (right / (right + wrong).clamp(min=eps)).clamp(eps, 1 - eps)
    z = real.s_bar(logp, old_logp, mask) / tau
    zero = torch.zeros_like(z[:, :1])
    loss = real.softmax_ce(z - w.log(), zero) + real.softmax_ce(zero, z + (1 - w).log())
    return torch.where((share > 0) & (share < 1), loss[:, None], 0.0).mean()


# ---- 4. A mix of token and sequence ratios -------------------------------------------------------


def dhpo(logp, old_logp, mask, labels, *, mix=0.5, eps=0.2, eps_low=3e-4, eps_high=4e-4):
    """GRPO's and GSPO's ratios averaged, each clipped to its own interval first:
    rho_t = mix e^{s_t} + (1 - mix) e^{s_bar}, and -min(rho_t A, clipped rho_t A), means as in GRPO.

    After the idea of DHPO (arXiv 2601.05607), with averaged mixing and a clip per branch; the exact
    form is ours. GRPO and GSPO are its two ends."""
    r = labels.to(logp.dtype)
    A = ((r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-6))[..., None]
    token = real.log_ratio(logp, old_logp, mask).clamp(-20, 20).exp()
    sequence = real.s_bar(logp, old_logp, mask).clamp(-20, 20).exp()[..., None]
    rho = mix * token + (1 - mix) * sequence
    token, sequence = token.clamp(1 - eps, 1 + eps), sequence.clamp(1 - eps_low, 1 + eps_high)
    clipped = mix * token + (1 - mix) * sequence
    return real.token_mean(-torch.minimum(rho * A, clipped * A), mask).mean()


# ---- 5. Extrapolate the checkpoints --------------------------------------------------------------


def extrapolate(start, points, steps, target):
    """Weights at step `target`: a line fitted to how far `points` (checkpoints, n) are along their
    main direction."""
    delta = points - start
    direction = torch.linalg.svd(delta, full_matrices=False).Vh[0]
    t = torch.tensor(steps, dtype=delta.dtype)
    design, along = torch.stack([torch.ones_like(t), t], 1), (delta @ direction)[:, None]
    line = torch.linalg.lstsq(design, along).solution[:, 0]
    return start + (line[0] + line[1] * target) * direction


def rank_one(config):
    """After the idea of RELEX (arXiv 2605.21468): train 20 steps, write the weights as theta_0 +
    c_t v (rank 1), fit a line to c_t at steps 5, 10, 15, 20 and jump to step 40."""
    model, tokenizer = real.load_model(config.model)
    models, steps = [model], [5, 10, 15, 20]
    for step in steps:
        real.train(dataclasses.replace(config, steps=step, resume=step > 5))
        models.append(real.load_model(Path(config.output_dir) / "model")[0])
    flat = [torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in models]
    weights = extrapolate(flat[0], torch.stack(flat[1:]), steps, 40)
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    held_out = real.load_problems(tokenizer, config, real.TINY, "test")
    score = real.validate(model, tokenizer, held_out[: config.eval_limit], config)
    with (Path(config.output_dir) / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 40, "pass@1": score}) + "\n")


# ---- 6. Does training widen what the model can do, or only sharpen it? ---------------------------

SAMPLES = 64
EVAL = ["--samples", str(SAMPLES)]
LEASH = "REAL, again", "GRPO without KL"  # the runs whose last checkpoint is asked


def times_right(model):
    """How many of 64 samples are right, of each held-out problem, by the protocol of eval.py."""
    with tempfile.TemporaryDirectory() as folder:
        scoring.main(["--model", str(model), *EVAL, "--output_dir", folder])
        text = next(Path(folder).glob("*.jsonl")).read_text()
    return [sum(json.loads(row)["labels"]) for row in text.splitlines()[1:]]


def pass_at_k(counts, k):
    """pass@k of each problem, from how many of its 64 samples are right: a mean over the seeds.

    "Invisible leash" (arXiv 2507.14843; abstract read): training lifts pass@1, but at large k the
    untrained model is often ahead: it reaches problems that the trained one has lost. The estimator
    is eval.py's, with its temperature 0.6 and top_p 0.95."""
    seeds = [[scoring.pass_at_k([True] * c + [False] * (SAMPLES - c), k) for c in count]
             for count in counts]
    return [statistics.mean(problem) for problem in zip(*seeds)]


def leash():
    """The table of pass@k, half a 95% interval over the problems beside each mean and each
    difference, which is paired; and how many problems 64 samples no longer solve, or newly do."""
    counts = {}
    for log in runlog.read("leash"):
        counts.setdefault(log["arm"], []).append([row["right"] for row in log["rows"]])
    before = counts["before"][0]
    ks = [2**i for i in range(SAMPLES.bit_length())]
    print("\n| pass@k |", " | ".join(f"k = {k}" for k in ks), "|\n" + "|---" * (len(ks) + 1) + "|")
    for name, own in counts.items():
        change = [[a - b for a, b in zip(pass_at_k(own, k), pass_at_k([before], k))] for k in ks]
        for title, cells in (name, [pass_at_k(own, k) for k in ks]), ("its change", change):
            if title == name or name != "before":
                shown = (f"{statistics.mean(x):.3f} ± {scoring.interval(x):.3f}" for x in cells)
                print(f"| {title} |", " | ".join(shown), "|")
    for name, own in counts.items():
        lost = [sum(b > 0 == a for a, b in zip(seed, before)) for seed in own]
        gained = [sum(a > 0 == b for a, b in zip(seed, before)) for seed in own]
        print(f"{name}: of {len(before)} problems, lost {lost}, gained {gained} (a seed each)")


# ---- 7. Credit where the rollouts of a group part ------------------------------------------------


def clipped_loss(logp, old_logp, mask, A, eps=0.2):
    """GRPO's clipped loss of each rollout, (Q, G), for an advantage A of each token, (Q, G, T)."""
    rho = real.log_ratio(logp, old_logp, mask).clamp(-20, 20).exp()
    return real.token_mean(-torch.minimum(rho * A, rho.clamp(1 - eps, 1 + eps) * A), mask)


def prefix_values(completions, mask, r):
    """V (Q, G, T): the mean reward of those rollouts of the group that begin as this one does, up
    to and with token t. The group as a prefix tree, V its nodes."""
    same = (completions[:, :, None] == completions[:, None]) & mask[:, None]  # (Q, G, G, T)
    together = same.long().cumprod(-1)  # 1 until the two rollouts part
    return (together * r[:, None, :, None]).sum(2) / together.sum(2).clamp(min=1)


def tempo(logp, old_logp, mask, labels, *, completions):
    """TEMPO (arXiv 2509.18314): to GRPO's advantage comes the temporal difference of the prefix
    tree, A_t = (r - mean + V(o_1 .. o_t) - V(o_1 .. o_{t-1})) / std. It is 0 but where rollouts
    part, so without branches this is GRPO.

    Read: the abstract, and the advantage in the authors' code. The rest is GRPO's, as in its row:
    clipped at 0.2 on both sides, where their scripts have 0.28 above."""
    r = labels.to(logp.dtype)
    mean, std = r.mean(-1, keepdim=True), r.std(-1, keepdim=True)
    V = prefix_values(completions, mask, r)
    before = torch.cat([mean.expand_as(r)[..., None], V[..., :-1]], -1)  # V of the empty prefix
    A = ((r - mean)[..., None] + V - before) / (std[..., None] + 1e-6)
    return clipped_loss(logp, old_logp, mask, A).mean()


# ---- 8. More rollouts for hard questions ---------------------------------------------------------


def more_rollouts(right, n):
    """How many rollouts to add to the n of a question, `right` of which are right.

    A group's advantages sum to N 2 sqrt(p (1 - p)) in size (GRPO's, divided by the standard
    deviation), so hard questions, p near 0, teach least. DARS draws more where p < 1/2, until that
    sum is 2 (1 - p) n, N = n sqrt((1 - p) / p): the more, the harder. None right counts as half a
    one."""
    p = max(right, 0.5) / n
    return max(0, math.ceil(n * math.sqrt((1 - p) / p)) - n)


def widened(batch, added, extra):
    """A batch with the `added` rollouts, `extra` of each question. Groups below the largest are
    filled up with copies of their own, which `present` (Q, G) gives away. Texts stay the first."""
    n, T = batch["labels"].shape[1], max(batch["mask"].shape[-1], added["mask"].shape[-1])
    place, wide = torch.arange(n + max(extra)), dict(batch)
    wide["present"] = torch.stack([place < n + count for count in extra])
    for key in (key for key, x in batch.items() if isinstance(x, torch.Tensor)):
        old, new = batch[key], added[key][:, 0]
        if old.dim() == 3:  # as long as the longest rollout of both
            old, new = (torch.nn.functional.pad(x, (0, T - x.shape[-1])) for x in (old, new))
        groups = [torch.cat(pair) for pair in zip(old, new.split(extra))]
        wide[key] = torch.stack([group[place % len(group)] for group in groups])
    return wide


def grpo_of_present(logp, old_logp, mask, labels, *, present):
    """GRPO for groups of different size: mean and standard deviation over a group's own rollouts,
    and one mean over all rollouts, so that a question counts by how many it has."""
    own, r = present.to(logp.dtype), labels.to(logp.dtype)
    n = own.sum(-1, keepdim=True)
    centred = own * (r - (own * r).sum(-1, keepdim=True) / n)
    std = (centred.square().sum(-1, keepdim=True) / (n - 1)).sqrt()
    loss = clipped_loss(logp, old_logp, mask, (centred / (std + 1e-6))[..., None])
    return (own * loss).sum() / own.sum()


def dars(config):
    """DARS (arXiv 2508.13755): a first group of each question says how hard it is, then the hard
    ones get more rollouts.

    Read: the abstract, and the authors' code: the schedule is their hardness-weighted one, in its
    form for advantages that are divided by the standard deviation (their scripts do not divide).
    They add large batches and several epochs, and leave groups of one kind out of the mean; here
    the rest is as in the row of GRPO. `real.rollouts` is patched for the training steps. The log's
    reward and lengths are of what is in the batch, copies included."""
    plain, drawn = real.rollouts, []

    def by_checker(problem, texts):  # its own name, by which the training steps are known
        return real.label_group(problem, texts)

    def rollouts(model, tokenizer, problems, n, config, label=real.label_group, **more):
        batch = plain(model, tokenizer, problems, n, config, label, **more)
        if label is not by_checker:
            return batch
        extra = [more_rollouts(right, n) for right in batch["labels"].sum(-1).tolist()]
        drawn.append(n * len(problems) + sum(extra))
        hard = [p for p, count in zip(problems, extra) for _ in range(count)]
        if not hard:
            return batch | {"present": torch.ones_like(batch["labels"])}
        return widened(batch, plain(model, tokenizer, hard, 1, config, label), extra)

    with mock.patch.object(real, "rollouts", rollouts):
        real.train(config, label=by_checker)
    log = Path(config.output_dir) / "metrics.jsonl"
    rows = [json.loads(row) | {"rollouts": n} for row, n in zip(log.open(), drawn, strict=True)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- Not an idea but exercise 5's bug ------------------------------------------------------------


@functools.cache
def end_token():
    return real.load_model(real.TINY)[1].eos_token_id


def end_token_lost(logp, old_logp, mask, labels, *, completions, tau=0.5):
    """The mask made from the pad id, where pad = eos: no end token is trained."""
    return real.real(logp, old_logp, mask & (completions != end_token()), labels, tau=tau)


OBJECTIVES = {f.__name__: f for f in (
    real_denoised, dhpo, end_token_lost, tempo, grpo_of_present)}
RUNS = {  # name: what trains, its settings
    "REAL": (real.train, {}),
    "majority vote": (majority_vote, {}),
    "one example": (one_example, {}),
    "noisy verifier": (noisy_verifier, {}),
    "noisy verifier, corrected": (noisy_verifier, {"objective": "real_denoised"}),
    "rank-one extrapolation": (rank_one, {"steps": 20}),
    "hybrid ratios": (real.train, {"objective": "dhpo"}),
    "end token lost (exercise 5)": (real.train, {"objective": "end_token_lost"}),
    "GRPO": (real.train, {"objective": "grpo", "kl_ref": 0.001}),
    # what follows was run later, on a newer real.py, and is to be compared with itself alone
    "REAL, again": (real.train, {}),
    "GRPO without KL": (real.train, {"objective": "grpo"}),
    "prefix tree": (real.train, {"objective": "tempo"}),
    "hard questions": (dars, {"objective": "grpo_of_present"}),
    "GRPO without KL, G = 10": (real.train, {"objective": "grpo", "group_size": 10}),
}


def run(name, seed):
    """One run, in this process."""
    real.OBJECTIVES |= OBJECTIVES
    train, settings = RUNS[name]
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        config = real.Config(seed=seed, output_dir=folder, **BUDGET | settings)
        train(config)
        rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open()]
        if name in LEASH:
            newest = Path(config.output_dir) / "model"
            asked = {("before", 0): config.model, (name, seed): newest}
            known = {(log["arm"], log["seed"]) for log in runlog.read("leash")}
            for (arm, number), model in asked.items():
                if (arm, number) not in known:
                    right = [{"right": n} for n in times_right(model)]
                    runlog.append("leash", right, ["right"], arm=arm, seed=number, eval=EVAL)
    runlog.append("ideas", rows, KEYS, arm=name, seed=seed, config=BUDGET | settings,
                  seconds=round(time.time() - began))


def table():
    """Pass@1 before, after 20 and after 40 steps, over the seeds; the length of the last training
    rollouts, and how many there were a step."""
    print("| run | before | after 20 steps | after 40: mean | lowest | highest "
          "| tokens a rollout | rollouts a step |")
    print("|---|---|---|---|---|---|---|---|")
    for name in RUNS:
        logs = [run["rows"] for run in runlog.read("ideas") if run["arm"] == name]
        before = [log[0]["pass@1_before"] for log in logs]
        middle = [row["pass@1"] for log in logs for row in log if row["step"] == 20]
        end = [log[-1]["pass@1"] for log in logs]
        last = [[row for row in log if "reward" in row][-1] for log in logs]
        length = statistics.mean(row["response_length"] for row in last)
        cells = (*map(statistics.mean, (before, middle, end)), min(end), max(end))
        drawn = 16 * RUNS[name][1].get("group_size", 8)
        drawn = statistics.mean(row.get("rollouts", drawn) for log in logs for row in log)
        print(f"| {name} |", " | ".join(f"{x:.3f}" for x in cells),
              f"| {length:.1f} | {drawn:.0f} |")


def vote():
    """How a group of 8 votes on the held-out problems before any training."""
    torch.manual_seed(0)
    config = real.Config()
    model, tokenizer = real.load_model(config.model)
    problems = 4 * real.load_problems(tokenizer, config, real.TINY, "test")
    batch = real.rollouts(model, tokenizer, problems, config.group_size, config)
    votes = [majority_labels([p["opening"] + t for t in texts])
             for p, texts in zip(problems, batch["texts"])]
    undecided = statistics.mean(not any(labels) for labels in votes)
    right = (torch.tensor(votes) & batch["labels"]).any(-1).float().mean().item()
    print(f"\nMajority of 8 before training: right {right:.2f}, "
          f"wrong {1 - right - undecided:.2f}, tie {undecided:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], int(sys.argv[2]))
    else:
        done = {(run["arm"], run["seed"]) for run in runlog.read("ideas")}
        for name, seed in itertools.product(RUNS, SEEDS):
            if (name, seed) not in done:
                print(f"--- {name}, seed {seed}", flush=True)
                subprocess.run([sys.executable, __file__, name, str(seed)], check=True)
        table()
        leash()
        vote()
