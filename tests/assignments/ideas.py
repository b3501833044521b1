"""Six ideas from the literature, each plugged into real.py without editing it, measured on the embedded model.

    python tests/assignments/ideas.py        # some 35 minutes on one CPU core; runs whose log exists are not repeated

Calling an idea's function plugs it in and returns the settings that it needs. A run is 40 steps at the defaults of
real.Config, in a process of its own. Logs go to tests/assignments/logs, one JSON object a line; the last thing printed
is the table of Pass@1 on the 256 held-out problems, 8 samples each, always labelled by the real checker.
"""

import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import real

LOGS, SEEDS, RHO = HERE / "logs", range(3), 0.2


def relabel(label):
    """Train on label(batch) in place of the checker's labels. The log and the validation keep the true ones."""
    update = real.update
    real.update = lambda model, master, optimizer, batch, *rest: update(
        model, master, optimizer, batch | {"labels": label(batch)}, *rest)


# ---- 1. No answers: the majority is right --------------------------------------------------------


def majority_labels(responses):
    """True where a response has the answer with strictly the most votes of its group; equal values vote together."""
    answers = [real.extract_answer(response) for response in responses]
    votes = Counter(answer for answer in answers if answer)
    agree = {a: {b for b in votes if real.is_correct(f"\\boxed{{{b}}}", a)} for a in votes}  # a's own value, spelt b
    total = {a: sum(votes[b] for b in agree[a]) for a in votes}
    first = max(total, key=total.get, default=None)
    tie = any(total[a] == total[first] and a not in agree[first] for a in total)
    return [answer is not None and not tie and answer in agree.get(first, ()) for answer in answers]


def majority_vote():
    """TTRL (arXiv 2504.16084): r = 1 where the answer is the majority's, so no gold answer is used. A tie teaches
    nothing. Here every group of 8 votes for itself. Plugs in by relabelling what `real.update` is given."""
    relabel(lambda batch: torch.tensor([majority_labels([problem["opening"] + text for text in texts])
                                        for problem, texts in zip(batch["problems"], batch["texts"])]))
    return {}


# ---- 2. One training example ---------------------------------------------------------------------


def one_example():
    """1-shot RLVR (arXiv 2504.20571): every question of every step is the same one, here the first that the seed
    draws (the paper chooses its example with care). Plugs in by wrapping `real.draw`."""
    draw = real.draw
    real.draw = lambda problems, step, config: [draw(problems, 1, config)[0]] * config.prompts
    return {}


# ---- 3. A verifier that errs, and a correction ---------------------------------------------------


def noisy_verifier():
    """Each label is flipped with probability rho = 0.2. Plugs in by relabelling what `real.update` is given."""
    relabel(lambda batch: batch["labels"] ^ (torch.rand(batch["labels"].shape) < RHO))
    return {}


def real_denoised(logp, old_logp, mask, labels, *, ref_logp=None, tau=0.5, rho=RHO):
    """REAL (Eq. 8) with each term weighed by the probability w that the rollout is truly right (wrong: 1 - w):
    L = log(1 + sum_k w_k e^{-s_k / tau}) + log(1 + sum_k (1 - w_k) e^{s_k / tau})."""
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


def corrected_verifier():
    """After the idea of arXiv 2510.00915, whose backward correction is r^ = (r~ - rho0) / (1 - rho0 - rho1). REAL takes
    classes, not numbers, so here r^ corrects a group's share of right rollouts, and Bayes' rule then says how far to
    believe each label; this step is ours. Plugs in as an objective, on top of the same noise."""
    real.OBJECTIVES["real_denoised"] = real_denoised
    return noisy_verifier() | {"objective": "real_denoised"}


# ---- 4. Temperature annealed along the response --------------------------------------------------


def annealed_decoding(hot=1.2, cold=0.5, d=40):
    """EAD (arXiv 2510.05251): token t is sampled at temperature max(1 + hot - e^{t/d}, cold): explore early, be sure
    late. The paper also spares the first tokens and corrects the gradient for sampling from another distribution; this
    does neither. Plugs in by wrapping `real.sample`, for training alone."""
    sample, validate = real.sample, real.validate

    def cooling(model, *args, **kwargs):
        t = itertools.count()

        def divide(module, inputs, out):
            out.logits = out.logits / max(1 + hot - math.exp(next(t) / d), cold)

        handle = model.register_forward_hook(divide)
        try:
            return sample(model, *args, **kwargs)
        finally:
            handle.remove()

    def untouched(*args):
        real.sample = sample
        try:
            return validate(*args)
        finally:
            real.sample = cooling

    real.sample, real.validate = cooling, untouched
    return {}


# ---- 5. A mix of token and sequence ratios -------------------------------------------------------


def dhpo(logp, old_logp, mask, labels, *, ref_logp=None, mix=0.5, eps_token=0.2, eps_low=3e-4, eps_high=4e-4):
    """GRPO's and GSPO's ratios averaged, each clipped to its own interval first:
    rho_t = mix e^{s_t} + (1 - mix) e^{s_bar}, and -min(rho_t A, clipped rho_t A), means as in GRPO."""
    r = labels.to(logp.dtype)
    advantage = ((r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-6))[..., None]
    token = real.log_ratio(logp, old_logp, mask).clamp(-20, 20).exp()
    sequence = real.s_bar(logp, old_logp, mask).clamp(-20, 20).exp()[..., None]
    rho = mix * token + (1 - mix) * sequence
    clipped = mix * token.clamp(1 - eps_token, 1 + eps_token) + (1 - mix) * sequence.clamp(1 - eps_low, 1 + eps_high)
    return real.token_mean(-torch.minimum(rho * advantage, clipped * advantage), mask).mean()


def hybrid():
    """After the idea of DHPO (arXiv 2601.05607), with averaged mixing and a clip per branch; the exact form is ours.
    Plugs in as an objective; GRPO and GSPO are its two ends."""
    real.OBJECTIVES["dhpo"] = dhpo
    return {"objective": "dhpo"}


# ---- 6. Extrapolate the checkpoints --------------------------------------------------------------


def extrapolate(start, points, steps, target):
    """Weights at step `target`: a line fitted to how far `points` (checkpoints, n) are along their main direction."""
    delta = points - start
    direction = torch.linalg.svd(delta, full_matrices=False).Vh[0]
    t = torch.tensor(steps, dtype=delta.dtype)
    line = torch.linalg.lstsq(torch.stack([torch.ones_like(t), t], 1), (delta @ direction)[:, None]).solution[:, 0]
    return start + (line[0] + line[1] * target) * direction


def rank_one():
    """After the idea of RELEX (arXiv 2605.21468): train 20 steps, write the weights as theta_0 + c_t v (rank 1), fit a
    line to c_t at steps 5, 10, 15, 20 and jump to step 40. Plugs in by wrapping `real.train`."""
    train = real.train

    def wrapped(config):
        last = train(config)
        folders = sorted(config.run.glob("checkpoint-*"))
        flat = [torch.nn.utils.parameters_to_vector(real.load_model(f)[0].parameters()).detach()
                for f in (config.model, *folders)]
        model, tokenizer = real.load_model(config.model)
        weights = extrapolate(flat[0], torch.stack(flat[1:]), [int(f.name[11:]) for f in folders], 40)
        torch.nn.utils.vector_to_parameters(weights, model.parameters())
        held_out = real.load_problems(tokenizer, config, config.eval_dataset, config.eval_split)
        row = {"step": 40, "pass@1": real.validate(model, tokenizer, held_out, config)}
        with (config.run / "metrics.jsonl").open("a") as f:
            f.write(json.dumps(row) + "\n")
        return last | row

    real.train = wrapped
    return {"steps": 20, "save_every": 5, "keep": 4}


# ---- Not an idea but exercise 5's bug ------------------------------------------------------------


def end_token_lost():
    """The mask made from the pad id, where pad = eos: no end token is trained. Plugs in by wrapping `real.update`."""
    update, end = real.update, real.load_model(real.Config().model)[1].eos_token_id
    real.update = lambda model, master, optimizer, batch, *rest: update(
        model, master, optimizer, batch | {"mask": batch["mask"] & (batch["completions"] != end)}, *rest)
    return {}


RUNS = {"REAL": dict, "majority vote": majority_vote, "one example": one_example, "noisy verifier": noisy_verifier,
        "noisy verifier, corrected": corrected_verifier, "rank-one extrapolation": rank_one,
        "annealed decoding": annealed_decoding, "hybrid ratios": hybrid, "end token lost (exercise 5)": end_token_lost,
        "GRPO": lambda: {"objective": "grpo"}}


def file_of(name, seed):
    return LOGS / f"{re.sub('[^A-Za-z0-9]+', '_', name).strip('_')}-seed{seed}.jsonl"


def rows_of(name, seed):
    return [json.loads(line) for line in file_of(name, seed).open()]


def run(name, seed):
    """One run, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"steps": 40, "eval_every": 20, "eval_samples": 8} | RUNS[name]()
        config = real.Config(seed=seed, output_dir=folder, **settings)
        real.train(config)
        rows = [json.loads(line) for line in (config.run / "metrics.jsonl").open()]
    kept = ("step", "reward", "mixed", "solved", "entropy", "response_length", "seconds", "pass@1", "pass@1_before")
    rows = [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items() if k in kept} for row in rows]
    LOGS.mkdir(exist_ok=True)
    file_of(name, seed).write_text("".join(json.dumps(row) + "\n" for row in rows))


def table():
    """Pass@1 before, after 20 and after 40 steps, over the seeds; and the length of the last training rollouts."""
    print("| run | before | after 20 steps | after 40: mean | lowest | highest | tokens a rollout |")
    print("|---|---|---|---|---|---|---|")
    for name in RUNS:
        logs = [rows_of(name, seed) for seed in SEEDS]
        end = [log[-1]["pass@1"] for log in logs]
        means = [statistics.mean(x) for x in ([log[0]["pass@1_before"] for log in logs],
                                              [row["pass@1"] for log in logs for row in log if row["step"] == 20], end)]
        length = statistics.mean([row for row in log if "reward" in row][-1]["response_length"] for log in logs)
        print(f"| {name} |", " | ".join(f"{x:.3f}" for x in (*means, min(end), max(end))), f"| {length:.1f} |")


def vote():
    """How a group of 8 votes on the held-out problems before any training."""
    torch.manual_seed(0)
    config = real.Config()
    model, tokenizer = real.load_model(config.model)
    problems = 4 * real.load_problems(tokenizer, config, config.eval_dataset, config.eval_split)
    batch = real.rollouts(model, tokenizer, problems, config.group_size, config.max_new_tokens, config.temperature)
    votes = [majority_labels([p["opening"] + t for t in texts]) for p, texts in zip(problems, batch["texts"])]
    undecided = statistics.mean(not any(labels) for labels in votes)
    right = (torch.tensor(votes) & batch["labels"]).any(-1).float().mean().item()
    print(f"\nMajority of 8 before training: right {right:.2f}, wrong {1 - right - undecided:.2f}, tie {undecided:.2f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], int(sys.argv[2]))
    else:
        for name, seed in itertools.product(RUNS, SEEDS):
            if not file_of(name, seed).exists():
                print(f"--- {name}, seed {seed}", flush=True)
                subprocess.run([sys.executable, __file__, name, str(seed)], check=True)
        table()
        vote()
