"""Rewards as Labels (REAL), arXiv 2602.05630, in one file: train a language model with the anchored REAL loss.

Sample G answers to a question, let a maths checker label each right or wrong, then treat those labels as
the classes of a classifier whose logit is how much the policy has moved towards the answer: push the right
ones above 0 and the wrong ones below.

    python real.py                         # the embedded tiny model, a few minutes on 2 CPU cores
    python real.py --preset 1.5b           # DeepSeek-R1-Distill-Qwen-1.5B on DeepScaleR, one GPU

Where the paper is in this file                                 Shapes
    Eq. 1        grpo                                             Q  questions of a batch
    Eq. 2        softmax_ce                                       G  rollouts (sampled answers) per question
    Eq. 3        credit (of grpo)                                 T  tokens of the longest rollout
    Eq. 4        log_ratio                                        logp, old_logp, mask        (Q, G, T)
    Eq. 5        s_bar                                            labels, s_bar, |W|          (Q, G)
    Eq. 6, 7, 8  real
    Eq. 9, 10    credit (of real)
    Eq. 11       real_bce
    Algorithm 1  train, each of its lines marked "line N"

Where this differs from the paper as printed
    1. A group that is all right or all wrong contributes nothing, but still counts in the mean over questions,
       as in the authors' released code. `--as_printed true` uses every group, as Eq. 8 does.
    2. BCE (Eq. 11 is a sum) is the mean over the rollouts of mixed groups, as released; same switch.
    3. Log-probabilities are those of the distribution that is sampled, so logits are divided by the sampling
       temperature in both places, as released.
    4. GRPO and its kin clamp a token's log-ratio to +-20 before exp, so that no inf reaches the gradient.
    5. The loss is differentiated in two steps (see `update`); the gradient is the same.
"""

import hashlib
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

HERE = Path(__file__).parent
SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."  # appended to every problem


class UserError(ValueError):
    """Bad input, said in one line that names the flag, file or row and what to do. The command line exits with 2."""


# ---------------------------------------------------------------------------------------------------------------
# Configuration: one frozen dataclass; the command line is generated from it


def arg(default, help, low=-math.inf, above=-math.inf, high=math.inf):
    """A field with its help text and its valid range: low <= value <= high and value > above."""
    return field(default=default, metadata={"help": help, "low": low, "above": above, "high": high})


@dataclass(frozen=True)
class Config:
    """Every setting of a run. Defaults train the embedded model; `PRESETS` holds the paper's (its Sec. 5.1)."""

    model: str = arg(str(HERE / "tiny"), "Hugging Face model id or folder")
    dataset: str = arg(str(HERE / "tiny"), "training problems: hub id, folder, or a .json .jsonl .csv .parquet file")
    dataset_config: str | None = arg(None, "configuration name of the data set, where the hub asks for one")
    split: str = arg("train", "split to train on")
    problem_column: str = arg("problem", "column of the question; nested as in prompt[0].content")
    answer_column: str = arg("answer", "column of the answer, or of a list of accepted answers")
    objective: str = arg("real", "the loss: one of OBJECTIVES")
    tau: float = arg(0.5, "temperature of the REAL losses (Sec. 5.1)", above=0)
    as_printed: bool = arg(False, "use all-right and all-wrong groups too, as Eq. 8 is printed (difference 1)")
    eps_low: float | None = arg(None, "lower clip of grpo, dapo, gspo (default: Sec. 5.1)", above=0, high=1)
    eps_high: float | None = arg(None, "upper clip of grpo, dapo, gspo (default: Sec. 5.1)", above=0)
    beta: float | None = arg(None, "weight of the reference model in grpo and trpa (default: Sec. 5.1)", low=0)
    kl_ref: float = arg(0.0, "weight of a KL term to the starting model, any objective (Sec. 5.3)", low=0)
    kl_old: float = arg(0.0, "weight of a KL term to the old policy, any objective (Sec. 5.3)", low=0)
    prompts: int = arg(16, "questions per step, Q (paper: 128)", low=1)
    group_size: int = arg(8, "rollouts per question, G (Sec. 5.1)", low=2)
    mini_batches: int = arg(4, "updates per step, each on prompts / mini_batches whole groups (Sec. 5.1)", low=1)
    steps: int = arg(110, "training steps, T of Algorithm 1 (paper: 1,400)", low=1)
    lr: float = arg(1e-4, "AdamW learning rate (paper: 2e-6)", above=0, high=10_000)
    warmup: int = arg(20, "updates over which the learning rate rises linearly (ours; paper: 0)", low=0)
    weight_decay: float = arg(0.01, "AdamW weight decay (Sec. 5.1)", low=0, high=1)
    beta2: float = arg(0.95, "AdamW second-moment decay (ours; released code: 0.999)", low=0, high=0.999999)
    grad_clip: float = arg(1.0, "largest gradient norm (released code)", above=0)
    temperature: float = arg(1.0, "sampling temperature, also inside log-probabilities (Sec. 5.1: 0.6)", above=0)
    max_prompt_tokens: int = arg(1024, "longer prompts are skipped (released code)", low=1)
    max_new_tokens: int = arg(48, "longest rollout, in tokens (Sec. 5.1: 8,192)", low=1)
    micro_batch_tokens: int = arg(4096, "tokens per forward pass; changes memory, never the gradient", low=1)
    dtype: str = arg("float32", "data type of the weights while computing: float32 or bfloat16")
    checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, a third slower")
    eval_dataset: str | None = arg(str(HERE / "tiny"), "held-out problems, same columns; none: no validation")
    eval_split: str = arg("test", "split to validate on")
    eval_every: int = arg(50, "steps between validations (0: only before and after)", low=0)
    eval_samples: int = arg(16, "samples per validation problem (Sec. 5.1)", low=1)
    eval_limit: int = arg(256, "validation problems used", low=1)
    seed: int = arg(0, "every random number of a step is drawn from a generator seeded by (seed, step)", low=0)
    save_every: int = arg(50, "steps between checkpoints", low=1)
    keep: int = arg(2, "checkpoints kept", low=1)
    output_dir: str | None = arg(None, "the run's own folder (default: runs/MODEL-OBJECTIVE-seedN)")
    resume: bool = arg(False, "go on with the run found in output_dir")
    overwrite: bool = arg(False, "replace a run found in output_dir")

    def __post_init__(self):
        for f in fields(self):
            value, m = getattr(self, f.name), f.metadata
            if isinstance(value, (int, float)) and not (m["low"] <= value <= m["high"] and value > m["above"]):
                bounds = [f"> {m['above']}"] * (m["above"] > -math.inf) + [f">= {m['low']}"] * (m["low"] > -math.inf)
                bounds += [f"<= {m['high']}"] * (m["high"] < math.inf) + ["finite"] * (not math.isfinite(value))
                raise UserError(f"--{f.name} must be {' and '.join(bounds)}, for example {f.default}; got {value}")
        if self.prompts % self.mini_batches:
            raise UserError(f"--mini_batches {self.mini_batches} does not divide --prompts {self.prompts}: mini-batches "
                            f"hold whole groups; try --mini_batches {math.gcd(self.prompts, self.mini_batches)}")
        for name, choices in {"objective": list(OBJECTIVES), "dtype": ["float32", "bfloat16"]}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")

    @property
    def run(self):
        """The run's folder."""
        return Path(self.output_dir or Path("runs") / f"{Path(self.model).name}-{self.objective}-seed{self.seed}")

    @property
    def hyperparameters(self):
        """The settings that this run's objective takes; those left at None keep the objective's own default."""
        names = inspect.signature(OBJECTIVES[self.objective]).parameters
        return {k: v for k, v in asdict(self).items() if k in names and v is not None}

    @property
    def needs_reference(self):
        """Whether the loss looks at the starting model, which is then held as a second, frozen copy."""
        takes_beta = "beta" in inspect.signature(OBJECTIVES[self.objective]).parameters
        return self.kl_ref > 0 or (takes_beta and self.beta != 0)


# ---------------------------------------------------------------------------------------------------------------
# Labels: r(o | q) of Algorithm 1, a checker made of regular expressions


def is_correct(response, answer):
    """Placeholder"""
    after = response.rsplit("</think>", 1)
    if "<think>" in response and len(after) < 2:
        return False
    box = re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", after[-1])
    if not box:
        return False
    got = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", box[-1])
    try:
        return Fraction(got) == Fraction(str(answer))
    except (ValueError, ZeroDivisionError):
        return got == answer


# ---------------------------------------------------------------------------------------------------------------
# Objectives: pure functions (logp, old_logp, mask, labels, *, ref_logp, hyperparameters) -> scalar loss.
# They never see a model. To add one: write the function, name it in OBJECTIVES.

ABSENT = 1e30  # stands in for infinity: e^-ABSENT is 0, and unlike -inf it leaves no NaN in the gradient


def log_ratio(logp, old_logp, mask):
    """s_t = log pi_theta(o_t | q) / pi_old(o_t | q), Eq. 4. (Q, G, T), 0 where `mask` is false."""
    return torch.where(mask, logp - old_logp, 0.0)


def token_mean(x, mask):
    """Mean of x over the tokens of each rollout: (Q, G, T) -> (Q, G). An empty rollout gives 0."""
    return torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def s_bar(logp, old_logp, mask):
    """The logit of a rollout: its mean log-ratio, Eq. 5. (Q, G)."""
    return token_mean(log_ratio(logp, old_logp, mask), mask)


def softmax_ce(z_p, z_n):
    """log(1 + sum_j e^{z_n^j} sum_i e^{-z_p^i}), Eq. 2. Positive logits (..., P), negative logits (..., N) -> (...)."""
    return F.softplus(torch.logsumexp(z_n, -1) + torch.logsumexp(-z_p, -1))


def is_mixed(labels):
    """(Q,) True where a group holds both right and wrong rollouts."""
    return labels.bool().any(-1) & ~labels.bool().all(-1)


def real(logp, old_logp, mask, labels, *, ref_logp=None, tau=0.5, as_printed=False, anchor=True):
    """REAL, Eq. 8: mean over questions of L_+ + L_-. Without the anchor: Eq. 2 between the two sets."""
    positive = labels.bool()
    z = s_bar(logp, old_logp, mask) / tau
    z_p = z.masked_fill(~positive, ABSENT)  # S_+: the other rollouts enter as e^-z_p = 0
    z_n = z.masked_fill(positive, -ABSENT)  # S_-: likewise e^z_n = 0
    if anchor:
        zero = torch.zeros_like(z[:, :1])  # S_0 = {0}: one more logit, at the score of a policy that did not move
        loss = softmax_ce(z_p, zero) + softmax_ce(zero, z_n)  # L_+ of Eq. 6 and L_- of Eq. 7
    else:
        loss = softmax_ce(z_p, z_n)
    return torch.where(is_mixed(labels) | as_printed, loss, 0.0).mean()


def real_no_anchor(logp, old_logp, mask, labels, *, ref_logp=None, tau=0.5, as_printed=False):
    """REAL without anchor logits, Sec. 4.2's vanilla loss: Eq. 2 between the right and the wrong rollouts."""
    return real(logp, old_logp, mask, labels, tau=tau, as_printed=as_printed, anchor=False)


def real_bce(logp, old_logp, mask, labels, *, ref_logp=None, tau=0.5, as_printed=False):
    """REAL with binary cross-entropy, Eq. 11: each rollout classified by itself."""
    z = s_bar(logp, old_logp, mask) / tau
    loss = F.binary_cross_entropy_with_logits(z, labels.to(z.dtype), reduction="none")
    if as_printed:
        return loss.sum(-1).mean()
    mixed = is_mixed(labels)[:, None].expand_as(loss)
    return torch.where(mixed, loss, 0.0).sum() / mixed.sum().clamp(min=1)


def advantages(labels):
    """GRPO's (r - mean) / std within each group, unbiased std. (Q, G)."""
    r = labels.float()
    return (r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-6)


def clipped(s, advantage, eps_low, eps_high):
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) per token, rho = e^s."""
    rho = s.clamp(-20, 20).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - eps_low, 1 + eps_high) * advantage)


def k3(logp, other_logp, mask):
    """Unbiased, non-negative estimate of KL(pi || pi_other) per token: e^d - d - 1, d = log pi_other - log pi."""
    d = log_ratio(other_logp, logp, mask).clamp(-20, 20)
    return d.exp() - d - 1


def kl(logp, other_logp, mask):
    """k3, mean over tokens, then over rollouts; a term that any objective can take (Sec. 5.3)."""
    return token_mean(k3(logp, other_logp, mask), mask).mean()


def grpo(logp, old_logp, mask, labels, *, ref_logp=None, eps_low=0.2, eps_high=0.2, beta=0.001, keep=None):
    """GRPO, Eq. 1: clipped policy gradient, token mean per rollout, then mean over rollouts; KL if `ref_logp`."""
    loss = clipped(log_ratio(logp, old_logp, mask), advantages(labels)[..., None], eps_low, eps_high)
    if keep is not None:
        loss = torch.where(keep, loss, 0.0)
    loss = token_mean(loss, mask).mean()
    return loss if ref_logp is None else loss + beta * kl(logp, ref_logp, mask)


def grpo_bidirectional(logp, old_logp, mask, labels, *, ref_logp=None, eps_low=0.2, eps_high=0.2, beta=0.001):
    """Fig. 2's ablation: GRPO that drops every token whose ratio leaves [1 - eps_low, 1 + eps_high], both signs."""
    rho = log_ratio(logp, old_logp, mask).detach().exp()
    keep = (rho >= 1 - eps_low) & (rho <= 1 + eps_high)
    return grpo(logp, old_logp, mask, labels, ref_logp=ref_logp, eps_low=eps_low, eps_high=eps_high, beta=beta, keep=keep)


def dapo(logp, old_logp, mask, labels, *, ref_logp=None, eps_low=0.2, eps_high=0.28):
    """DAPO: clip-higher, and one mean over all tokens of the mini-batch. No dynamic sampling."""
    loss = clipped(log_ratio(logp, old_logp, mask), advantages(labels)[..., None], eps_low, eps_high)
    return torch.where(mask, loss, 0.0).sum() / mask.sum().clamp(min=1)


def gspo(logp, old_logp, mask, labels, *, ref_logp=None, eps_low=3e-4, eps_high=4e-4):
    """GSPO: the ratio of a whole rollout, e^s_bar, clipped; its gradient spread over tokens."""
    s = s_bar(logp, old_logp, mask).detach()[..., None] + (logp - logp.detach())  # value s_bar, gradient of log pi_t
    loss = clipped(s.clamp(max=10), advantages(labels)[..., None], eps_low, eps_high)
    return token_mean(loss, mask).mean()


def trpa(logp, old_logp, mask, labels, *, ref_logp=None, beta=0.1):
    """TRPA (arXiv 2504.04524): prefer each right rollout to each wrong one, relative to the reference; small KL to old."""
    h = token_mean(log_ratio(logp, ref_logp, mask), mask)  # (Q, G)
    pair = labels.bool()[:, :, None] & ~labels.bool()[:, None, :]  # (Q, G, G): row right, column wrong
    loss = -F.logsigmoid(2.5 * beta * (h[:, :, None] - h[:, None, :]))
    loss = torch.where(pair, loss, 0.0).sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)
    kl_old = torch.where(mask, k3(logp, old_logp, mask).clamp(max=10), 0.0).sum() / mask.sum().clamp(min=1)
    return loss.mean() + 0.001 * kl_old


OBJECTIVES = {f.__name__: f for f in (real, real_bce, real_no_anchor, grpo, grpo_bidirectional, dapo, gspo, trpa)}


def credit(logp, batch, config):
    """The loss and its derivative by every log-probability: how hard each token of each rollout is pushed.

    Returns the scalar loss and dL/dlogp (Q, G, T), a minus sign meaning "make it likelier". For REAL it is Eq. 9
    over |o| and the number of questions, for GRPO Eq. 3: the whole difference between methods is in this tensor.
    """
    logp = logp.detach().requires_grad_()
    old_logp, mask, ref_logp = batch["old_logp"], batch["mask"], batch.get("ref_logp")
    objective = OBJECTIVES[config.objective]
    with torch.enable_grad():
        loss = objective(logp, old_logp, mask, batch["labels"], ref_logp=ref_logp, **config.hyperparameters)
        if config.kl_ref:
            loss = loss + config.kl_ref * kl(logp, ref_logp, mask)
        if config.kl_old:
            loss = loss + config.kl_old * kl(logp, old_logp, mask)
    return loss.detach(), torch.autograd.grad(loss, logp)[0]


# ---------------------------------------------------------------------------------------------------------------
# Log-probabilities of sampled tokens


def micro_batches(lengths, budget):
    """Split rows into lists of similar length whose padded size stays within `budget` tokens (at least one row each)."""
    rows = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) + 1) * lengths[row] > budget:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def head_logprobs(hidden, targets, head, temperature):
    """Hidden states (n, H) and their next tokens (n,) -> log-probability and entropy of each, (n,)."""
    logits = head(hidden).float() / temperature
    logz = logits.logsumexp(-1)
    entropy = None if torch.is_grad_enabled() else logz - (logits.softmax(-1) * logits).sum(-1)
    return logits.gather(-1, targets[:, None])[:, 0] - logz, entropy


def token_logprobs(model, batch, rows, config):
    """log pi_theta(o_t | q, o_<t) of the given rollouts (rows of Q*G), and the entropy where no graph is kept.

    Both (len(rows), T), 0 outside the mask. The full logits, T x vocabulary, never exist at once: the LM head runs
    on chunks of completion tokens and is recomputed in the backward pass.
    """
    G, T = batch["mask"].shape[1:]
    ids, mask = batch["completions"].view(-1, T)[rows], batch["mask"].view(-1, T)[rows]
    prompts = [batch["prompts"][row // G].to(ids.device) for row in rows]
    # prompt and rollout side by side, padded on the right: under causal attention no real token sees the padding
    sequences = [torch.cat([p, o[m]]) for p, o, m in zip(prompts, ids, mask)]
    hidden = model.base_model(input_ids=pad_sequence(sequences, batch_first=True), use_cache=False).last_hidden_state
    row, t = mask.nonzero(as_tuple=True)
    before = torch.tensor([len(p) - 1 for p in prompts], device=ids.device)  # token t is predicted one place earlier
    hidden, targets = hidden[row, before[row] + t], ids[mask]  # (n, H), (n,): completion tokens only
    chunks = [
        checkpoint(head_logprobs, h, o, model.get_output_embeddings(), config.temperature, use_reentrant=False)
        for h, o in zip(hidden.split(1024), targets.split(1024))
    ]
    zeros = torch.zeros(mask.shape, device=ids.device)
    logp, entropy = (None if c[0] is None else zeros.masked_scatter(mask, torch.cat(c)) for c in zip(*chunks))
    return logp, entropy


@torch.no_grad()
def all_logprobs(model, batch, config):
    """log pi_theta and entropy of every rollout of a batch, (Q, G, T), without a graph."""
    shape = batch["mask"].shape
    logp, entropy = torch.zeros((2, shape[0] * shape[1], shape[2]), device=batch["mask"].device)
    for rows in micro_batches(batch["lengths"].flatten().tolist(), config.micro_batch_tokens):
        logp[rows], entropy[rows] = token_logprobs(model, batch, rows, config)
    return logp.view(shape), entropy.view(shape)


# ---------------------------------------------------------------------------------------------------------------
# Rollouts


@torch.no_grad()
def sample(model, prompts, group_size, eos, max_new_tokens, temperature, top_p=1.0):
    """Draw `group_size` rollouts o ~ pi(. | q) of each prompt, token by token.

    prompts: Q vectors of token ids. eos: ids that end a rollout. Returns token ids and mask, (Q, G, T); the mask is
    true up to and including the first end token. Temperature 0 takes the likeliest token. Finished rollouts leave
    the batch, and a prompt is read once for its whole group: twice as fast as `generate` on the embedded model.
    """
    Q, device = len(prompts), model.device
    width, N = max(map(len, prompts)), len(prompts) * group_size
    attend = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)  # left-padded
    ids = pad_sequence([p.flip(0) for p in prompts], batch_first=True).flip(1).to(device)
    position = (attend.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=attend, position_ids=position, use_cache=True, logits_to_keep=1)
    cache, logits = out.past_key_values, out.logits[:, -1].repeat_interleave(group_size, 0)
    cache.batch_repeat_interleave(group_size)
    attend, position = (x.repeat_interleave(group_size, 0) for x in (attend, position[:, -1:]))

    tokens = torch.zeros((N, max_new_tokens), dtype=torch.long, device=device)
    mask = torch.zeros((N, max_new_tokens), dtype=torch.bool, device=device)
    rows, eos = torch.arange(N, device=device), torch.tensor(eos, device=device)  # the rollouts still in the batch
    running = torch.ones(N, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0) if top_p < 1 else p
            token = order.gather(-1, torch.multinomial(p, 1))[:, 0]
        tokens[rows[running], t], mask[rows[running], t] = token[running], True
        running &= ~torch.isin(token, eos)
        if t + 1 == max_new_tokens or not running.any():
            break
        if running.float().mean() < 0.75:
            cache.batch_select_indices(running.nonzero()[:, 0])
            rows, attend, position, token = (x[running] for x in (rows, attend, position, token))
            running = running[running]
        attend, position = F.pad(attend, (0, 1), value=1), position + 1
        logits = model(input_ids=token[:, None], attention_mask=attend, position_ids=position,
                       past_key_values=cache, use_cache=True).logits[:, -1]
    T = t + 1
    return tokens[:, :T].view(Q, group_size, T), mask[:, :T].view(Q, group_size, T)


def cache_rows(model, prompt_tokens, max_new_tokens):
    """How many rollouts of full length the free memory can hold the key-value cache of."""
    if model.device.type != "cuda":
        return 1024
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * model.dtype.itemsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, int(0.8 * free / (per_token * (prompt_tokens + max_new_tokens))))


def rollouts(model, tokenizer, problems, group_size, max_new_tokens, temperature, top_p=1.0):
    """Lines 6 and 7 of Algorithm 1: sample a group for each problem and label it. Returns a batch of tensors.

    As many groups at a time as memory allows; temperature and top_p as in `sample`.
    """
    prompts = [torch.tensor(p["prompt_ids"]) for p in problems]
    at_once = max(1, cache_rows(model, max(map(len, prompts)), max_new_tokens) // group_size)
    parts = [sample(model, prompts[i : i + at_once], group_size, end_tokens(model, tokenizer), max_new_tokens,
                    temperature, top_p) for i in range(0, len(prompts), at_once)]
    T = max(mask.shape[-1] for _, mask in parts)
    ids, mask = (torch.cat([F.pad(p[i], (0, T - p[i].shape[-1])) for p in parts]) for i in (0, 1))
    texts = [[tokenizer.decode(o[m], skip_special_tokens=True) for o, m in zip(*group)] for group in zip(ids, mask)]
    labels = [[is_correct(p["opening"] + text, p["answer"]) for text in group] for p, group in zip(problems, texts)]
    prompt_lengths = torch.tensor([[len(p)] for p in prompts], device=mask.device)
    return {"prompts": prompts, "completions": ids, "mask": mask, "texts": texts, "problems": problems,
            "labels": torch.tensor(labels, device=mask.device), "lengths": mask.sum(-1) + prompt_lengths}


def end_tokens(model, tokenizer):
    """Every token id that ends a response: the tokenizer's and the generation configuration's."""
    ids = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id} | set(ids if isinstance(ids, list) else [ids]) - {None})


@torch.no_grad()
def validate(model, tokenizer, problems, config):
    """Pass@1: the share of right answers over `eval_samples` rollouts of each problem."""
    right = []
    torch.manual_seed(config.seed)
    for i in range(0, len(problems), 64):
        batch = rollouts(model, tokenizer, problems[i : i + 64], config.eval_samples, config.max_new_tokens,
                         config.temperature)
        right.append(batch["labels"].float().mean(-1))
    return torch.cat(right).mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Model and data


def load_model(name, dtype, device):
    """A causal language model and its tokenizer, from the hub or a folder. Raises UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device)
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"cannot load model {name!r}: {str(e).strip().splitlines()[0]}") from e
    if tokenizer.decode(tokenizer.encode("a b", add_special_tokens=False)) != "a b":
        raise UserError(f"the tokenizer of {name!r} does not give back 'a b': update transformers (>= 5.8)")
    return model, tokenizer


def read_column(row, path):
    """row["prompt"][0]["content"] for the path prompt[0].content."""
    for key in re.findall(r"[^.\[\]]+", path):
        row = row[int(key)] if isinstance(row, list) else row[key]
    return row


def load_problems(tokenizer, path, config_name, split, problem_column, answer_column, max_prompt_tokens, limit=None):
    """Problems as dicts: problem, answer, prompt_ids, opening (the "<think>" that the template already wrote).

    Rows without a problem or an answer and prompts over the limit are skipped, with a count. Raises UserError.
    """
    try:
        if Path(path).is_file():
            kind = Path(path).suffix.lstrip(".").replace("jsonl", "json")
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(str(path), config_name, split=split)
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(f"cannot load data {str(path)!r}: {str(e).strip().splitlines()[0]}") from e
    problems, empty, long = [], 0, 0
    for number, row in enumerate(rows, 1):
        try:
            problem, answer = read_column(row, problem_column), read_column(row, answer_column)
        except (KeyError, IndexError, ValueError, TypeError) as e:
            raise UserError(f"{path}, row {number}: no column {e} ({problem_column}, {answer_column} wanted; there are "
                            f"{', '.join(rows.column_names)}); set --problem_column and --answer_column") from e
        if problem in (None, "") or answer in (None, "", []):
            empty += 1
            continue
        text = str(problem) + SUFFIX
        if tokenizer.chat_template:
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has already put BOS in the text
        if len(ids) > max_prompt_tokens:
            long += 1
            continue
        opening = "<think>" if text.rstrip().endswith("<think>") else ""
        problems.append({"problem": str(problem), "answer": answer, "prompt_ids": ids, "opening": opening})
        if len(problems) == limit:
            break
    if empty or long:
        print(f"{path}: skipped {empty} rows without problem or answer, {long} over {max_prompt_tokens} tokens")
    if not problems:
        raise UserError(f"{path}: no usable row")
    return problems


def draw(problems, step, config):
    """Line 4: the questions of a step. Each pass over the data is a new permutation, set by the seed alone."""
    chosen, n = [], len(problems)
    for i in range((step - 1) * config.prompts, step * config.prompts):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed + 7919 * (i // n)))
        chosen.append(problems[order[i % n]])
    return chosen


# ---------------------------------------------------------------------------------------------------------------
# One update (lines 9 and 10)


def update(model, optimizer, batch, config, logp=None):
    """One optimizer step on a mini-batch, exact for every objective at any micro-batch size.

    The objective couples the rollouts of a group, so it cannot be split over micro-batches; but given its gradient
    by the log-probabilities (`credit`), each rollout can be differentiated by itself: by the chain rule
    dL/dtheta = sum over tokens of dL/dlogp * dlogp/dtheta. Rollouts without credit need no backward pass at all.
    `logp`: log-probabilities under the current weights, if they are known already.
    """
    logp = all_logprobs(model, batch, config)[0] if logp is None else logp
    loss, weight = credit(logp, batch, config)
    lengths, flat = batch["lengths"].flatten().tolist(), weight.flatten(0, 1)
    used = flat.abs().sum(-1).nonzero()[:, 0].tolist()
    for rows in micro_batches([lengths[r] for r in used], config.micro_batch_tokens):
        rows = [used[r] for r in rows]
        token_logprobs(model, batch, rows, config)[0].backward(flat[rows])
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    s = s_bar(logp, batch["old_logp"], batch["mask"])
    return {"loss": loss, "s": s, "weight": weight.sum(-1).abs() * len(s), "grad_norm": norm}


# ---------------------------------------------------------------------------------------------------------------
# Training


def train(config):
    """Algorithm 1. Returns the run's summary: Pass@1 before and after, seconds, folder."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = config.run
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps(asdict(config), indent=2))
    log = (run / "metrics.jsonl").open("w", buffering=1)
    model, tokenizer = load_model(config.model, config.dtype, device)  # lines 1 and 2: pi_theta <- pi_0
    columns = (config.problem_column, config.answer_column, config.max_prompt_tokens)
    problems = load_problems(tokenizer, config.dataset, config.dataset_config, config.split, *columns)
    held_out = load_problems(tokenizer, config.eval_dataset, None, config.eval_split, *columns, config.eval_limit)
    reference = load_model(config.model, config.dtype, device)[0].eval() if config.needs_reference else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, config.beta2),
                                  weight_decay=config.weight_decay)
    model.train()
    began, first, last = time.time(), validate(model, tokenizer, held_out, config), None
    print(f"Pass@1 {first:.3f}")

    for step in (bar := tqdm(range(1, config.steps + 1), desc=config.objective)):  # line 3
        tick = time.time()
        torch.manual_seed(config.seed * 1_000_003 + step)
        questions = draw(problems, step, config)  # line 4
        batch = rollouts(model, tokenizer, questions, config.group_size, config.max_new_tokens, config.temperature)
        batch["old_logp"], entropy = all_logprobs(model, batch, config)  # line 5: pi_old <- pi_theta
        if reference:
            batch["ref_logp"] = all_logprobs(reference, batch, config)[0]

        results, size = [], config.prompts // config.mini_batches
        for i in range(config.mini_batches):  # line 8
            part = {k: v[i * size : (i + 1) * size] for k, v in batch.items()}
            number = (step - 1) * config.mini_batches + i + 1
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1, number / max(1, config.warmup))
            results.append(update(model, optimizer, part, config, part["old_logp"] if i == 0 else None))

        labels, mask = batch["labels"], batch["mask"]
        s, weight = (torch.cat([r[k] for r in results]) for k in ("s", "weight"))
        row = {"step": step, "loss": sum(r["loss"] for r in results).item() / len(results),
               "reward": labels.float().mean().item(), "entropy": entropy.sum().item() / mask.sum().item(),
               "response_length": mask.sum(-1).float().mean().item(),
               "solved": labels.all(-1).float().mean().item(), "mixed": is_mixed(labels).float().mean().item(),
               "s_positive": s[labels].mean().item(), "s_negative": s[~labels].mean().item(),
               "max_weight": weight.max().item(), "grad_norm": max(r["grad_norm"] for r in results).item(),
               "seconds": time.time() - tick}
        if config.eval_every and step % config.eval_every == 0 or step == config.steps:
            row["pass@1"] = last = validate(model, tokenizer, held_out, config)
            tqdm.write(f"step {step} Pass@1 {last:.3f}")
        log.write(json.dumps(row) + "\n")
        bar.set_postfix({k: f"{row[k]:.3g}" for k in ("reward", "entropy", "response_length", "mixed", "seconds")})
    print(f"Pass@1 {first:.3f} -> {last:.3f} in {time.time() - began:.0f} s")
    return {"before": first, "after": last, "seconds": time.time() - began}


if __name__ == "__main__":
    parser = HfArgumentParser(Config)
    train(Config(**vars(parser.parse_args())))
