"""Five ideas from the literature, each plugged into real.py from outside, measured on the tiny
model.

    python tests/assignments/ideas.py    # 30 minutes on one core; what has its log is not run again

An idea is a label function given to `real.train`, an objective of one's own in `real.OBJECTIVES`,
or a few lines around `real.train`; nothing in real.py is patched. A run is 40 steps at the defaults
of real.Config, in a process of its own, and a line of tests/assignments/logs/ideas.jsonl. The last
thing printed is the table of Pass@1 on the 256 held-out problems, 8 samples each, always by the
real checker.
"""

import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "experiments")]
import real  # noqa: E402
import runlog  # noqa: E402

runlog.LOGS = HERE / "logs"
SEEDS, RHO = range(3), 0.2
BUDGET = {"steps": 40, "eval_every": 20, "eval_samples": 8}
KEYS = "step reward mixed solved entropy response_length pass@1 pass@1_before".split()

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
        return real.train(dataclasses.replace(config, dataset=str(data)))


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
    real.train(config)
    folders = sorted(config.folder.glob("checkpoint-*"))
    models = [real.load_model(f)[0] for f in (config.model, *folders)]
    flat = [torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in models]
    model, tokenizer = real.load_model(config.model)
    weights = extrapolate(flat[0], torch.stack(flat[1:]), [int(f.name[11:]) for f in folders], 40)
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    held_out = real.load_problems(tokenizer, config, config.eval_dataset, config.eval_split)
    score = real.validate(model, tokenizer, held_out[: config.eval_limit], config)
    with (config.folder / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 40, "pass@1": score}) + "\n")


# ---- Not an idea but exercise 5's bug ------------------------------------------------------------


@functools.cache
def end_token():
    return real.load_model(real.TINY)[1].eos_token_id


def end_token_lost(logp, old_logp, mask, labels, *, completions, tau=0.5):
    """The mask made from the pad id, where pad = eos: no end token is trained."""
    return real.real(logp, old_logp, mask & (completions != end_token()), labels, tau=tau)


OBJECTIVES = {"real_denoised": real_denoised, "dhpo": dhpo, "end_token_lost": end_token_lost}
RUNS = {  # name: what trains, its settings
    "REAL": (real.train, {}),
    "majority vote": (majority_vote, {}),
    "one example": (one_example, {}),
    "noisy verifier": (noisy_verifier, {}),
    "noisy verifier, corrected": (noisy_verifier, {"objective": "real_denoised"}),
    "rank-one extrapolation": (rank_one, {"steps": 20, "save_every": 5, "keep": 4}),
    "hybrid ratios": (real.train, {"objective": "dhpo"}),
    "end token lost (exercise 5)": (real.train, {"objective": "end_token_lost"}),
    "GRPO": (real.train, {"objective": "grpo", "kl_ref": 0.001}),
}


def run(name, seed):
    """One run, in this process."""
    real.OBJECTIVES |= OBJECTIVES
    train, settings = RUNS[name]
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        config = real.Config(seed=seed, output_dir=folder, **BUDGET | settings)
        train(config)
        rows = [json.loads(line) for line in (config.folder / "metrics.jsonl").open()]
    runlog.append("ideas", rows, KEYS, arm=name, seed=seed, config=BUDGET | settings,
                  seconds=round(time.time() - began))


def table():
    """Pass@1 before, after 20 and after 40 steps, over the seeds; and the length of the last
    training rollouts."""
    print("| run | before | after 20 steps | after 40: mean | lowest | highest "
          "| tokens a rollout |")
    print("|---|---|---|---|---|---|---|")
    for name in RUNS:
        logs = [run["rows"] for run in runlog.read("ideas") if run["arm"] == name]
        before = [log[0]["pass@1_before"] for log in logs]
        middle = [row["pass@1"] for log in logs for row in log if row["step"] == 20]
        end = [log[-1]["pass@1"] for log in logs]
        last = [[row for row in log if "reward" in row][-1] for log in logs]
        length = statistics.mean(row["response_length"] for row in last)
        cells = (*map(statistics.mean, (before, middle, end)), min(end), max(end))
        print(f"| {name} |", " | ".join(f"{x:.3f}" for x in cells), f"| {length:.1f} |")


def vote():
    """How a group of 8 votes on the held-out problems before any training."""
    torch.manual_seed(0)
    config = real.Config()
    model, tokenizer = real.load_model(config.model)
    problems = 4 * real.load_problems(tokenizer, config, config.eval_dataset, config.eval_split)
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
        vote()
