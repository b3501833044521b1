"""Rewards as Labels (REAL), arXiv 2602.05630, in one file: train a language model with REAL.

Sample G answers to a question and let a maths checker label each right or wrong. Then treat the
labels as the classes of a classifier whose logit is how much likelier the policy has made an answer
since it was sampled: push the right ones above 0 and the wrong ones below.

    python real.py                  # the embedded tiny model, about a minute on 2 CPU cores
    python real.py --preset 0.5b    # Qwen2.5-0.5B-Instruct on GSM8K, one GPU of 8 GB or more
    python real.py --help           # every setting

Where the paper is in this file          Shapes
    Eq. 1        grpo, with kl_ref         Q   questions of a batch
    Eq. 2        softmax_ce                G   rollouts (sampled answers) of a question
    Eq. 3        credit, for grpo          T   tokens of the longest rollout
    Eq. 4        log_ratio                 logp, old_logp, mask    (Q, G, T)
    Eq. 5        s_bar                     labels, s_bar, |W|      (Q, G), |W| as in Eq. 9
    Eq. 6, 7, 8  real
    Eq. 9, 10    credit, for real        Three places to edit, marked EDIT: the objectives,
    Eq. 11       real_bce                the labels, how answers are sampled.
    Algorithm 1  train, by "line N"      Differences from the paper: README.
"""

import csv
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, Underflow
from functools import partial
from pathlib import Path

with suppress(OSError):  # Linux: beside busy processes, OpenMP's waiting threads must not spin
    if int(Path("/proc/loadavg").read_text().split()[3].split("/")[0]) >= os.cpu_count():
        os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch is imported

import datasets
import pandas
import torch
import torch.nn.functional as F
import transformers
from filelock import FileLock
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from transformers.modeling_layers import GradientCheckpointingLayer

TINY = str(Path(__file__).parent / "tiny")
SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."

class UserError(ValueError):
    """Bad input, said in one line that names the flag, file or row and what to do; exit code 2."""

def refuse_if(wrong, what):
    if wrong:
        raise UserError(what)

# ==== Configuration ===============================================================================

def arg(default, help):
    return field(default=default, metadata={"help": help})

@dataclass(frozen=True)
class Config:
    """All settings of a run; the command line is made from it. Defaults: the embedded model."""

    model: str = arg(TINY, "Hugging Face model id or folder")
    dataset: str = arg(TINY, "problems: hub id, folder, or .json .jsonl .csv .parquet file")
    dataset_config: str | None = arg(None, "configuration of a hub data set that has several")
    split: str = arg("train", "split to train on")
    eval_dataset: str = arg(TINY, "held-out problems, with the same columns")
    eval_split: str = arg("test", "split to validate on")
    problem_column: str = arg("problem", "the question; also prompt[0].content, context+question")
    answer_column: str = arg("answer", "the answer, or a list of accepted answers")
    objective: str = arg("real", "the loss, one of OBJECTIVES")
    tau: float = arg(0.5, "temperature of the REAL losses, Sec. 5.1")
    as_printed: bool = arg(False, "REAL losses: all-right and all-wrong groups count too, Eq. 8")
    eps_low: float | None = arg(None, "lower clip of GRPO, DAPO, GSPO; if not given, their own")
    eps_high: float | None = arg(None, "upper clip of GRPO, DAPO, GSPO; if not given, their own")
    beta: float | None = arg(None, "beta of TRPA; if not given, its own")
    kl_ref: float = arg(0.0, "weight of a KL to the starting model, any objective, Sec. 5.3")
    kl_old: float = arg(0.0, "weight of a KL to the old policy, any objective, Sec. 5.3")
    prompts: int = arg(16, "questions a step, Q; paper: 128")
    group_size: int = arg(8, "rollouts a question, G, Sec. 5.1")
    mini_batches: int = arg(4, "updates a step, on prompts / mini_batches groups each, Sec. 5.1")
    steps: int = arg(80, "training steps; paper: 1,400")
    lr: float = arg(5e-5, "AdamW learning rate; paper: 2e-6")
    warmup: int = arg(20, "updates over which the learning rate rises; released code: 0")
    weight_decay: float = arg(0.01, "of AdamW, Sec. 5.1")
    beta2: float = arg(0.95, "AdamW's decay of the second moment; released code: 0.999")
    grad_clip: float = arg(1.0, "largest norm of a gradient, released code")
    temperature: float = arg(1.0, "of sampling and inside log-probabilities; paper: 0.6")
    max_prompt_tokens: int = arg(1024, "longer prompts are skipped, released code")
    max_new_tokens: int = arg(48, "longest rollout; paper: 8,192")
    slots: int = arg(2048, "rollouts sampled side by side; each takes memory for its cache")
    micro_batch_tokens: int = arg(4096, "tokens a forward pass; changes memory, not the gradient")
    low_memory: bool = arg(False, "bf16, activations recomputed; fp32 weights, AdamW on the CPU")
    eval_every: int = arg(20, "steps between validations, also one before and after; 0: none")
    eval_samples: int = arg(8, "samples a validation problem; paper: 16")
    eval_limit: int = arg(256, "validation problems used")
    seed: int = arg(0, "the random numbers of a step depend on (seed, step) alone")
    save_every: int = arg(50, "steps between checkpoints")
    keep: int = arg(2, "checkpoints kept; only the newest can be resumed exactly")
    output_dir: str | None = arg(None, "the run's own folder; default runs/MODEL-OBJECTIVE-seedN")
    resume: bool = arg(False, "go on with the run found in output_dir")

    def __post_init__(self):
        refuse_if(self.objective not in list(OBJECTIVES),
                  f"--objective {self.objective}: choose one of {', '.join(OBJECTIVES)}")
        for f in fields(self):
            value, (low, high) = getattr(self, f.name), RANGE.get(f.name, (1e-12, math.inf))
            kind = getattr(f.type, "__args__", (f.type,))[0]  # of float | None: float
            kinds = kind, int if kind is float else kind
            refuse_if(value != f.default and type(value) not in kinds,
                      f"--{f.name} {value!r} is no {kind.__name__}")
            least = "above 0" if low == 1e-12 else f"at least {low}"
            refuse_if(type(value) in (int, float) and not low <= value < high,
                      f"--{f.name} {value} must be {least} and below {high}")
            refuse_if(value != f.default and f.name in set(LOSS) - set(self.objective_arguments),
                      f"--{f.name} is not a setting of --objective {self.objective}")
        refuse_if(self.prompts % self.mini_batches,
                  f"--prompts must be a multiple of --mini_batches {self.mini_batches}")

    @property
    def folder(self):
        default = f"runs/{Path(self.model).name}-{self.objective}-seed{self.seed}"
        return Path(self.output_dir or default)

    @property
    def objective_arguments(self):
        """Names of the objective's arguments: each is a field of Config or a key of the batch."""
        return inspect.signature(OBJECTIVES[self.objective]).parameters

RANGE = dict.fromkeys("kl_ref kl_old warmup weight_decay eval_every".split(), (0, math.inf)) | {
    "seed": (0, 2**32), "steps": (1, 10**6), "group_size": (2, 1025), "beta2": (0, 1)}  # others > 0
LOSS = ("tau", "as_printed", "eps_low", "eps_high", "beta")  # each belongs to some objectives

# ==== Objectives ==================================================================================
# EDIT: write a pure function (logp, old_logp, mask, labels, *, its own settings) -> scalar loss; it
# never sees a model. Name it in OBJECTIVES. A setting is a field of Config of that name, in LOSS.

ABSENT = 1e30  # stands in for infinity: e^-ABSENT is 0, and unlike -inf it leaves no NaN behind

def log_ratio(logp, old_logp, mask):
    """s_t = log pi_theta(o_t | q) / pi_old(o_t | q), Eq. 4: (Q, G, T), 0 outside the mask."""
    return torch.where(mask, logp - old_logp, 0.0)

def token_mean(x, mask):
    """Mean of x over the tokens of each rollout: (Q, G, T) -> (Q, G). An empty rollout gives 0."""
    return torch.where(mask, x, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)

def s_bar(logp, old_logp, mask):
    """The logit of a rollout: its mean log-ratio, Eq. 5: (Q, G)."""
    return token_mean(log_ratio(logp, old_logp, mask), mask)

def softmax_ce(z_p, z_n):
    """log(1 + sum_j e^{z_n^j} sum_i e^{-z_p^i}), Eq. 2: logits (..., P) and (..., N) -> (...)."""
    return F.softplus(torch.logsumexp(z_n, -1) + torch.logsumexp(-z_p, -1))

def is_mixed(labels):
    """(Q,) True where a group holds both right and wrong rollouts."""
    return labels.bool().any(-1) & ~labels.bool().all(-1)

def real(logp, old_logp, mask, labels, *, tau=0.5, as_printed=False, anchor=True):
    """REAL, Eq. 8: mean over questions of L_+ (Eq. 6) plus L_- (Eq. 7). Without anchor: Eq. 2.
    A group that is all right or all wrong counts as 0, as in the released code."""
    positive = labels.bool()
    z = s_bar(logp, old_logp, mask) / tau
    z_p = z.masked_fill(~positive, ABSENT)  # S_+: the other rollouts enter as e^-z_p = 0
    z_n = z.masked_fill(positive, -ABSENT)  # S_-: likewise e^z_n = 0
    if anchor:
        zero = torch.zeros_like(z[:, :1])  # S_0 = {0}: the score of a policy that did not move
        loss = softmax_ce(z_p, zero) + softmax_ce(zero, z_n)  # L_+ of Eq. 6 and L_- of Eq. 7
    else:
        loss = softmax_ce(z_p, z_n)
    return torch.where(is_mixed(labels) | as_printed, loss, 0.0).mean()

def real_bce(logp, old_logp, mask, labels, *, tau=0.5, as_printed=False):
    """REAL with binary cross-entropy, Eq. 11: each rollout classified by itself. As released: the
    mean over the rollouts of mixed groups."""
    z = s_bar(logp, old_logp, mask) / tau
    loss = F.binary_cross_entropy_with_logits(z, labels.to(z.dtype), reduction="none")
    if as_printed:
        return loss.sum(-1).mean()
    mixed = is_mixed(labels)[:, None].expand_as(loss)
    return torch.where(mixed, loss, 0.0).sum() / mixed.sum().clamp(min=1)

def clipped(s, labels, eps_low, eps_high):
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) of each token (Q, G, T); rho = e^s, and
    the advantage A = (r - mean) / std of a group, unbiased std (Sec. 2.1)."""
    r = labels.to(s.dtype)[..., None]  # (Q, G, 1)
    advantage = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    rho = s.clamp(-20, 20).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - eps_low, 1 + eps_high) * advantage)

def k3(logp, other_logp, mask):
    """KL(pi || pi_other), estimated per token: e^d - d - 1 >= 0 with d = log pi_other - log pi.
    Unbiased for tokens that pi itself has drawn."""
    d = log_ratio(other_logp, logp, mask).clamp(-20, 20)
    return d.exp() - d - 1

def kl(logp, other_logp, mask):
    """k3, mean over tokens, then over rollouts: a term that any objective can take (Sec. 5.3)."""
    return token_mean(k3(logp, other_logp, mask), mask).mean()

def grpo(logp, old_logp, mask, labels, *, eps_low=0.2, eps_high=0.2, drop=False):
    """GRPO, Eq. 1 without its KL (kl_ref adds it): a clipped policy gradient, mean over tokens of a
    rollout, then over rollouts. `drop`, the ablation of Fig. 2: no token outside the interval."""
    s = log_ratio(logp, old_logp, mask)
    loss = clipped(s, labels, eps_low, eps_high)
    if drop:
        rho = s.detach().exp()
        loss = torch.where((rho >= 1 - eps_low) & (rho <= 1 + eps_high), loss, 0.0)
    return token_mean(loss, mask).mean()

def dapo(logp, old_logp, mask, labels, *, eps_low=0.2, eps_high=0.28):
    """DAPO: clip-higher, one mean over all tokens of the mini-batch. No dynamic sampling."""
    loss = clipped(log_ratio(logp, old_logp, mask), labels, eps_low, eps_high)
    return torch.where(mask, loss, 0.0).sum() / mask.sum().clamp(min=1)

def gspo(logp, old_logp, mask, labels, *, eps_low=3e-4, eps_high=4e-4):
    """GSPO: the ratio of a whole rollout, e^s_bar, clipped; its gradient spread over tokens."""
    s = s_bar(logp, old_logp, mask).detach()[..., None]  # (Q, G, 1)
    s = s + (logp - logp.detach())  # (Q, G, T): the value of s_bar, the gradient of log pi(o_t)
    return token_mean(clipped(s.clamp(max=10), labels, eps_low, eps_high), mask).mean()

def trpa(logp, old_logp, mask, labels, *, ref_logp, beta=0.1):
    """TRPA (arXiv 2504.04524): prefer each right rollout to each wrong one, measured against the
    starting model, which it alone is defined by; plus a small KL to the old policy."""
    h = token_mean(log_ratio(logp, ref_logp, mask), mask)  # (Q, G)
    pair = labels.bool()[:, :, None] & ~labels.bool()[:, None, :]  # (Q, G, G): right, wrong
    loss = -F.logsigmoid(2.5 * beta * (h[:, :, None] - h[:, None, :]))
    loss = torch.where(pair, loss, 0.0).sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)
    to_old = torch.where(mask, k3(logp, old_logp, mask).clamp(max=10), 0.0).sum()
    return loss.mean() + 0.001 * to_old / mask.sum().clamp(min=1)

OBJECTIVES = {f.__name__: f for f in (real, real_bce, grpo, dapo, gspo, trpa)} | {
    "real_no_anchor": partial(real, anchor=False), "grpo_bidirectional": partial(grpo, drop=True)}

def credit(logp, batch, config):
    """The loss and its derivative by each log-probability: how hard each token is pushed.

    Returns the scalar loss and dL/dlogp (Q, G, T); minus means "make it likelier". Its size over
    1 / (Q |o|) is Eq. 3 for GRPO and, for REAL, |W| of Eq. 9 with Eq. 10: a share below 1, over
    tau. All that tells methods apart is in here. Arguments come by name from batch and config.
    """
    with torch.enable_grad():
        logp = logp.detach().requires_grad_()
        given = vars(config) | batch | {"logp": logp}
        settings = {k: given[k] for k in config.objective_arguments if given.get(k) is not None}
        loss = OBJECTIVES[config.objective](**settings)
        if config.kl_ref:
            loss = loss + config.kl_ref * kl(logp, batch["ref_logp"], batch["mask"])
        if config.kl_old:
            loss = loss + config.kl_old * kl(logp, batch["old_logp"], batch["mask"])
        return loss.detach(), torch.autograd.grad(loss, logp)[0]

# ==== Log-probabilities ===========================================================================

def micro_batches(batch, rows, config):
    """Split rollouts, counted 0 to Q*G - 1, into lists of at most micro_batch_tokens once padded.
    Those of a group stay neighbours, to share their prompt; groups of like length go together."""
    longest, parts = batch["lengths"].amax(-1), []  # of each group
    longest = longest.repeat_interleave(batch["lengths"].shape[1]).tolist()
    for row in sorted(rows, key=lambda row: (longest[row], row)):
        if not parts or (len(parts[-1]) + 1) * longest[row] > config.micro_batch_tokens:
            parts.append([])
        parts[-1].append(row)
    return parts

def head_logprobs(hidden, targets, head, temperature):
    """Hidden states (n, H) and next tokens (n,) -> log-probabilities (n,), in fp32."""
    return -F.cross_entropy(head(hidden).float() / temperature, targets, reduction="none")

def token_logprobs(model, batch, rows, config):
    """log pi_theta(o_t | q, o_<t) of some rollouts: (len(rows), T), 0 outside the mask.

    Two questions with a rollout each, T = 3:
        prompts [5 6], [7 8 9]    completions [2 3 1]    mask [1 1 1]
                                              [4 1 0]         [1 1 0]
        -> [log pi(2 | 5 6)    log pi(3 | 5 6 2)    log pi(1 | 5 6 2 3)]
           [log pi(4 | 7 8 9)  log pi(1 | 7 8 9 4)  0                  ]

    A prompt is read once, into a cache that its rollouts attend to; gradients flow back through it.
    Recomputed activations (low_memory) allow no cache: there each rollout copies its prompt.
    """
    for module in model.modules():  # (critical) no dropout; layers recompute only in "training"
        module.training = config.low_memory and isinstance(module, GradientCheckpointingLayer)
    G, device = batch["mask"].shape[1], batch["mask"].device
    completions, mask = (batch[k].flatten(0, 1)[rows] for k in ("completions", "mask"))
    logp, T = torch.zeros(mask.shape, device=device), int(mask.sum(-1).max())  # T of these rows
    completions, mask = completions[:, :T], mask[:, :T]
    prompts = [batch["prompts"][row // G] for row in rows]
    if config.low_memory:
        ids = [torch.cat([q, o]) for q, o in zip(prompts, completions)]
        hidden = model.base_model(  # causal: no token sees the padding on its right
            input_ids=pad_sequence(ids, batch_first=True), use_cache=False)[0]
        hidden = torch.stack([h[len(q) - 1 :][:T] for h, q in zip(hidden, prompts)])
    else:
        groups, repeats = (torch.tensor(rows) // G).unique_consecutive(return_counts=True)
        ids = pad_sequence([batch["prompts"][g][:-1] for g in groups], batch_first=True)
        cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(repeats.to(device))
        last = torch.stack([q[-1:] for q in prompts])  # (n, 1): it predicts token 0, so fed below
        first = torch.tensor([[len(q) - 1] for q in prompts], device=device)  # its position
        column = torch.arange(ids.shape[1] + T, device=device)
        hidden = model.base_model(
            input_ids=torch.cat([last, completions[:, :-1]], 1), position_ids=first + column[:T],
            attention_mask=(column < first) | (column >= ids.shape[1]),  # all but padding
            past_key_values=cache)[0]
    head = model.get_output_embeddings()  # 512 tokens at a time: logits of all would not fit
    chunks = [checkpoint(head_logprobs, h, o, head, config.temperature, use_reentrant=False)
              for h, o in zip(hidden[mask].split(512), completions[mask].split(512))]
    return logp.masked_scatter(F.pad(mask, (0, logp.shape[1] - T)), torch.cat(chunks))

def all_logprobs(model, batch, config):
    """log pi_theta of every rollout of a batch: (Q, G, T)."""
    logp = torch.zeros(batch["mask"].shape, device=batch["mask"].device).flatten(0, 1)
    for rows in micro_batches(batch, range(len(logp)), config):
        logp[rows] = token_logprobs(model, batch, rows, config)
    return logp.view(batch["mask"].shape)

# ==== Sampling ====================================================================================

def next_token(logits, temperature, top_p):
    """o_t ~ softmax(logits / temperature): (n, vocabulary) -> (n,). Temperature 0: argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1)
    if top_p < 1:  # keep the fewest tokens that hold this much probability
        p, order = p.sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0).gather(-1, order.argsort(-1))
    return (p / torch.empty_like(p).exponential_()).argmax(-1)  # a race that token i wins with p_i

@torch.no_grad()
def sample(model, prompts, group_size, ends, max_new_tokens, temperature, top_p=1.0, slots=2048):
    """EDIT: draw `group_size` rollouts of each prompt, token by token, until one of `ends`.

    prompts: Q vectors of token ids. Returns ids and mask, (Q, G, T). Up to `slots` rollouts run
    side by side; when a quarter of them has ended, they make room for the next prompts.
    """
    model.eval()
    device, G, total = model.device, group_size, len(prompts) * group_size
    every, ends = 16 if device.type == "cuda" else 1, torch.as_tensor(ends, device=device)
    slots, waiting = min(total, max(slots // G, 1) * G), list(range(len(prompts)))
    cache = Slots(slots, max(map(len, prompts)) + max_new_tokens)
    ids = torch.zeros((total + 1, max_new_tokens), dtype=torch.long, device=device)
    last = [int(q[-1]) for q in prompts]  # it is read again, for the first logits
    # of each slot: its rollout (`total`: ended), its last token, that one's column, tokens drawn
    rollout, token, at, t = torch.zeros((4, 0), dtype=torch.long, device=device)
    bar = tqdm(desc="sampling", unit=" tokens", leave=False, delay=5)
    while True:
        active = (rollout < total).nonzero()[:, 0]  # the host waits here, not inside a token
        if len(active) <= 0.75 * len(rollout):
            free = (slots - len(active)) // G
            new, waiting = waiting[:free], waiting[free:]
            cache.refill(model, active, [prompts[q] for q in new], G)
            new = [[q * G + g, last[q], len(prompts[q]) - 1, 0] for q in new for g in range(G)]
            new = torch.tensor(new, dtype=torch.long, device=device).view(-1, 4).T
            old = torch.stack([rollout, token, at, t])[:, active]
            rollout, token, at, t = torch.cat([old, new], 1)
            cache.width = int(at.max()) if len(at) else 0
        if not len(rollout):
            break
        for _ in range(every):  # a token of every slot
            cache.at, cache.width = at, min(cache.width + 1, cache.columns)
            later = torch.arange(cache.width, device=device) > at[:, None]
            mask = torch.where(later, -math.inf, 0.0).to(model.dtype)[:, None, None]  # to be added
            logits = model(input_ids=token[:, None], position_ids=at[:, None], use_cache=True,
                           attention_mask=mask, past_key_values=cache).logits[:, -1]
            token = next_token(logits, temperature, top_p)  # o_t ~ pi(. | q, o_<t)
            ids[rollout, t] = token  # ended slots write to the spare last row
            done = torch.isin(token, ends) | (t + 1 == max_new_tokens)
            rollout = rollout.masked_fill(done, total)
            t, at = (t + 1).clamp(max=max_new_tokens - 1), (at + 1).clamp(max=cache.columns - 1)
        refuse_if(not logits.isfinite().all(), "logits are not finite: start with a lower --lr")
        bar.update(every * len(rollout))
    bar.close()
    ended = torch.isin(ids[:total], ends)
    mask = ended.cumsum(-1) - ended.long() == 0  # (critical) to the first end token, inclusive
    T = int(mask.sum(-1).max())
    return [x[:, :T].view(len(prompts), G, T) for x in (ids[:total] * mask, mask)]

def label_group(problem, texts):
    """EDIT: True or False for each of a group of answers to a problem, here by the checker."""
    return [is_correct(text, problem["answer"]) for text in texts]

def rollouts(model, tokenizer, problems, group_size, config, label=label_group, top_p=1.0):
    """A group of rollouts of each problem and their labels, as a batch: a dict of length-Q values.

    problems     list of dicts, see load_problems       prompts    list of (tokens,) int64
    completions  (Q, G, T) int64, 0 after the end       mask       (Q, G, T) bool
    lengths      (Q, G) int64, prompt and completion    labels     (Q, G) bool
    texts        Q lists of G str                       ended      (Q, G) bool, False: cut off
    `train` adds old_logp, and ref_logp where the loss looks at it: (Q, G, T) float32.
    """
    device, ends = model.device, model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    ends = torch.tensor(sorted(ends), device=device)
    prompts = [torch.tensor(p["prompt_ids"], device=device) for p in problems]
    ids, mask = sample(model, prompts, group_size, ends, config.max_new_tokens, config.temperature,
                       top_p, config.slots)
    texts = [[tokenizer.decode(o[m], skip_special_tokens=True) for o, m in zip(*group)]
             for group in zip(ids.cpu(), mask.cpu())]
    labels = [label(p, [p["opening"] + text for text in group])
              for p, group in zip(problems, texts)]
    refuse_if(any(x not in (0, 1) for group in labels for x in group), "a label is to be 0 or 1")
    return {"problems": problems, "prompts": prompts, "completions": ids, "mask": mask,
            "lengths": mask.sum(-1) + torch.tensor([[len(q)] for q in prompts], device=device),
            "labels": torch.tensor(labels, dtype=torch.bool, device=device).view(mask.shape[:2]),
            "texts": texts, "ended": (mask & torch.isin(ids, ends)).any(-1)}

def validate(model, tokenizer, problems, config):
    """Pass@1 by the checker: the share of right answers among eval_samples of each problem."""
    torch.manual_seed(config.seed)
    problems = problems[: config.eval_limit]
    batch = rollouts(model, tokenizer, problems, config.eval_samples, config)
    return batch["labels"].float().mean().item()

# ==== Update and training =========================================================================

def update(model, optimizer, batch, config):
    """One optimizer step on a mini-batch, exact for every objective at any micro-batch size.

    An objective couples the rollouts of a group and cannot be cut into micro-batches. The chain
    rule can: dL/dtheta is the sum over tokens of dL/dlogp * dlogp/dtheta. `credit` gives the first
    factor without a model, then each micro-batch brings its share of the sum; a single one keeps
    the graph of its first forward pass. Without credit, or if not finite, the weights stay.
    """
    Q, G = batch["labels"].shape
    whole = len(micro_batches(batch, range(Q * G), config)) == 1
    with torch.set_grad_enabled(whole):
        logp = all_logprobs(model, batch, config)
    loss, push = credit(logp, batch, config)  # push = dL/dlogp, (Q, G, T)
    rows = push.flatten(0, 1).any(-1).nonzero()[:, 0].tolist()
    if rows and whole:
        logp.backward(push)  # dL/dtheta = push * dlogp/dtheta
    else:
        for micro in micro_batches(batch, rows, config):
            token_logprobs(model, batch, micro, config).backward(push.flatten(0, 1)[micro])
    weights = optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(weights, config.grad_clip).to(loss.device)
    if rows and (loss + norm).isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=not config.low_memory)  # there, gradients add into .grad
    return {"loss": loss, "grad_norm": norm, "weight": Q * push.sum(-1).abs(),  # |W| of Eq. 9
            "s_bar": s_bar(logp.detach(), batch["old_logp"], batch["mask"])}

def train(config, label=label_group):
    """Algorithm 1; `label(problem, texts)` gives the G labels of a group. Returns the last log row.

    Validation asks `label_group` in any case. Raises UserError, and SystemExit after Ctrl-C or
    SIGTERM once the step at work is saved.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Run(config) as run:
        model, tokenizer = load_model(run.checkpoint or config.model)  # lines 1 and 2
        problems = load_problems(tokenizer, config, config.dataset, config.split, config.prompts)
        held_out = []
        if config.eval_every:
            held_out = load_problems(tokenizer, config, config.eval_dataset, config.eval_split)
        check_model(model, tokenizer, problems + held_out, config)
        optimizer = make_optimizer(model.to(device), config)
        run.start(model, optimizer, problems)
        reference = None  # the starting model, frozen
        if config.kl_ref or "ref_logp" in config.objective_arguments:
            reference = load_model(config.model)[0].to(device)
            if config.low_memory:
                round_weights(reference)
        row = {}
        if held_out and not run.done:
            row["pass@1_before"] = validate(model, tokenizer, held_out, config)

        for step in tqdm(range(run.done + 1, config.steps + 1), unit="step"):  # line 3
            began = time.time()
            torch.manual_seed(config.seed * 1_000_003 + step)
            questions = draw(problems, step, config)  # line 4; then lines 6 and 7:
            batch = rollouts(model, tokenizer, questions, config.group_size, config, label)
            size = config.prompts // config.mini_batches
            parts = [{k: v[i : i + size] for k, v in batch.items()}
                     for i in range(0, config.prompts, size)]
            # line 5, pi_old: its log-probabilities, by the same forward passes as in `update`
            with torch.no_grad():  # (critical) so that s_bar is exactly 0 in the step's first one
                for part in parts:
                    part["old_logp"] = all_logprobs(model, part, config)
                    if reference:
                        part["ref_logp"] = all_logprobs(reference, part, config)
            updates = []
            for part in parts:  # line 8
                number = (step - 1) * config.mini_batches + len(updates) + 1
                optimizer.param_groups[0]["lr"] = config.lr * min(1, number / max(1, config.warmup))
                updates.append(update(model, optimizer, part, config))  # lines 9 and 10
            row |= metrics(batch, parts, updates)
            last = step == config.steps
            if held_out and (last or step % config.eval_every == 0):
                row["pass@1"] = validate(model, tokenizer, held_out, config)
            row["seconds"] = time.time() - began
            run.log(step, row, batch)
            if last or run.signal or step % config.save_every == 0:
                run.save(step, model, tokenizer, optimizer)
            if run.signal:
                break
            row = {}
        return run.finish()  # line 13

# ==== Here the algorithm ends. What follows serves it. ============================================

class Slots:
    """A key-value cache allocated once: slot r is a rollout at work, its token p is in column p."""

    def __init__(self, slots, columns):
        self.slots, self.columns, self.width, self.kv = slots, columns, 0, []

    def refill(self, model, active, prompts, G):
        """Move the slots `active` to the front and read each new prompt once, for G slots more."""
        for x in self.kv:
            x[: len(active), :, : self.width] = x[active, :, : self.width]
        if prompts:
            ids = pad_sequence(prompts, batch_first=True)  # padding is overwritten before seen
            layers = model.base_model(input_ids=ids, use_cache=True).past_key_values.layers
            read = [x for layer in layers for x in (layer.keys, layer.values)]
            self.kv = self.kv or [x.new_zeros(self.slots, x.shape[1], self.columns, x.shape[3])
                                  for x in read]
            for x, new in zip(self.kv, read):
                x[len(active) :][: len(ids) * G, :, : ids.shape[1]] = new.repeat_interleave(G, 0)

    def update(self, keys, values, layer, *args, **kwargs):
        """Each attention layer calls this: store a token's keys and values, return all of them."""
        n, own = len(self.at), self.kv[2 * layer : 2 * layer + 2]
        for x, new in zip(own, (keys, values)):
            x[torch.arange(n, device=x.device), :, self.at] = new[:, :, 0]
        return [x[:n, :, : self.width] for x in own]

    def get_seq_length(self, *args):
        return 0

def draw(problems, step, config):
    """The questions of a step. Each pass over the data is a new order that the seed decides."""
    chosen = []
    for i in range((step - 1) * config.prompts, step * config.prompts):
        epoch, k = divmod(i, len(problems))
        order = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        chosen.append(problems[torch.randperm(len(problems), generator=order)[k]])
    return chosen

def metrics(batch, parts, updates):
    """What a step did, as numbers; the README says what each means."""
    labels, mask = batch["labels"], batch["mask"]
    old_logp = torch.cat([part["old_logp"] for part in parts])
    s, weight = (torch.cat([u[k] for u in updates]) for k in ("s_bar", "weight"))  # (Q, G)
    loss, norm = (torch.stack([u[k] for u in updates]) for k in ("loss", "grad_norm"))
    return {"loss": loss.mean(), "reward": labels.float().mean(),
            "solved": labels.all(-1).float().mean(), "mixed": is_mixed(labels).float().mean(),
            "cut_off": 1 - batch["ended"].float().mean(),
            "entropy": -old_logp[mask].mean(),  # an estimate: the tokens were drawn from pi_old
            "response_length": mask.sum(-1).float().mean(), "s_positive": s[labels].mean(),
            "s_negative": s[~labels].mean(), "s_abs_median": s.abs().median(),
            "s_abs_90": s.abs().quantile(0.9), "max_weight": weight.max(),
            "spread_weight": weight.std(), "grad_norm": norm.max(),
            "skipped": (~(loss + norm).isfinite()).sum()}

def round_weights(model):
    """Weights to bf16. (critical) Not the buffers: rounded rotary phases are off by radians."""
    for p in model.parameters():
        p.data = p.data.bfloat16()

def make_optimizer(model, config):
    """AdamW over fp32 weights: the model's or, with low_memory, the originals of its bf16 ones.

    At lr 2e-6 most updates are below the spacing of bf16 numbers and have to gather in fp32. With
    low_memory they do on the CPU: gradients move there as soon as they exist, new weights return
    after each step.
    """
    weights = list(model.parameters())
    refuse_if(not all(w.requires_grad for w in weights), "an adapter as --model: merge it first")
    if config.low_memory:
        weights = [p.detach().cpu().requires_grad_() for p in weights]
        round_weights(model)
        model.activation_checkpointing_enable()
        transit = torch.empty(max(w.numel() for w in weights), dtype=torch.bfloat16,
                              pin_memory=torch.cuda.is_available())  # pinned: fast to copy to
        home = dict(zip(model.parameters(), weights))

        def move(p):
            home[p].grad += transit[: p.numel()].view_as(p).copy_(p.grad)
            p.grad = None

        for p, w in home.items():
            w.grad = torch.zeros_like(w)
            p.register_post_accumulate_grad_hook(move)
    optimizer = torch.optim.AdamW(  # fused: many times as fast on a CPU
        weights, config.lr, (0.9, config.beta2), weight_decay=config.weight_decay, fused=True)
    if config.low_memory:
        optimizer.register_step_post_hook(lambda *_: [p.data.copy_(w) for p, w in home.items()])
    return optimizer

# ==== Labels: r(o | q) of Algorithm 1, a checker that is a table of rewrite rules =================
# SYMBOLS and RULES rewrite gold and reply. Each is then read as a tree: its numbers are computed,
# its sums, products, lists and unions are sorted. No algebra. A unit is a name between two @.
SYMBOLS = {old: new for new, *olds in map(str.split, r"""- − –|* × · \times \cdot|π pi \pi|∞ \infty
    |√ sqrt \sqrt|∪ \cup \bigcup|≤ <= \le \leq|≥ >= \ge \geq|± \pm|= \in|\ne \neq|),( \\|? @ \not
    |, ; and or & \quad|~ $ \( \) \left \right \displaystyle|\frac \dfrac \tfrac|\sin sin|\cos cos
    |@degree@ ° ^\circ ^{\circ}|@percent@ % \%|+@dollar@* \$""".split("|")) for old in olds}
TEXT = r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|bb)|mbox|operatorname|boxed) ?"
UNIT = (r"(?:square|cubic)?(?:[cdkm]m|[km]g|ft|in|inch|foot|feet|unit|mile|pound|dollar|cent|way"
        r"|degree|second|minute|hour|day|week|month|year|people|point|percent|(?:kilo)?meter)")
RULES = [(re.compile(pattern), new) for pattern, new in [  # in this order
    (r"(\\left ?[([] *)?\\begin\{([pb]matrix|array\}\{[clr|]+)\}", "[("),  # \begin{pmatrix}1 -> [(1
    (r"(\\\\\s*)?\\end\{([pb]matrix|array)\}( *\\right ?[)\]])?", ")]"),  # 4\end{pmatrix} -> 4)]
    (r"(?<=\d)(?<!\d{4})(,?\\!|\\[ ,]|\{,\}|[ ~])\s*(?=\d{3}(?![\d/]))", ""),  # 10,\!080 -> 10080
    (r"^((?:[^\d,([{]|\\\()*\d{1,3}),(\d{3})(?:,(\d{3}))?(?![\d,])", r"\1\2\3"),  # 1,234 -> 1234
    (r"[<>]=|\^\{?\\circ\}?|\\?([A-Za-z]+|[^\d ])", lambda m: SYMBOLS.get(m[0], m[0])),  # \pi -> π
    (TEXT + r"(\{([^{}]*)\})?", r" \2 "),  # \text{(C)} ->  (C)
    (r"(\\[!,;:> ]|~|\s)+", " "),  # 1,\,2 -> 1, 2
    (r"(^ ?\\{|^|,)([^,]*)±([^,]*?)(?=,|\\}|\.?$)", r"\1\2+\3,\2-\3"),  # 1±x -> 1+x,1-x
    (r"(?<![A-Za-z\\])[A-Z](?=[a-z])", lambda m: m[0].lower()),  # Even -> even
    (r"(?<=[A-Za-z]{2}) (?=[A-Za-z]{2})", ""),  # no solution -> nosolution
    (rf"(?<=[\d)}}π]) ?({UNIT})(e?s)?((/|per){UNIT}|/h)?(?![A-Za-z])", r"@\1\3@"),  # 5cm -> 5@cm@
    (r"\\frac ?(\d|{[^{}]*}) ?(\d)", r"\\frac \1 \2 "),  # \frac12 -> \frac 1 2
    (r"(?<![\w.}/^√])(\d+) ?(\\frac ?{?\d+}? ?{?\d+}?| \d+/\d+)", r"(\1+\2)"),  # 1 1/2 -> (1+ 1/2)
    (r"([\^_]) ?\{ ?(-?\d+|[A-Za-z]) ?\} ?", r"\1\2 "),  # x^{2}y -> x^2 y
    (r"^ +|\\(?=[{}])|,(?= ?,)|[ .,:]+$", "")]]  # 5. -> 5
LHS = r"((?!\\[gln]|not)((\\angle )?\\?[A-Za-z]+(_\w+)?( ?\(\w+\))?|\([A-Za-z, ]+\))? ?=)?"  # x =
NAME = re.compile(r"@[a-z/]+@|\d+_\d+|(?:[A-Za-z]{2,}(?! ?\^)|[A-Za-z∞])(?:_\w+)?")
TOKEN = re.compile(NAME.pattern + r"|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?|\\frac|\S")
PREFIX = {"+": [5], "-": [5], "√": [7], r"\frac": [7, 7]}  # how tightly operands are bound
INFIX = {",": 1, "=": 2, **dict.fromkeys("<≤>≥", 3), "∪": 4, "+": 5, "*": 6, "/": 6, "^": 7}
D = Context(prec=800, Emax=699, traps=[DivisionByZero, InvalidOperation, Overflow, Underflow])
COMPUTE = {"+": D.add, "-": D.minus, "*": D.multiply, "/": D.divide,
           "√": D.sqrt, "^": lambda x, n: D.power(x or 1 / 0, int(str(n)))}  # 0^{-1} is an error
CONSTANTS = {name: Decimal(random.Random(name).random()) for name in "πei"}

def _node(kind: str, *parts) -> Decimal | tuple:
    """A number where it can be computed, else kind and parts, sorted where order means nothing."""
    kind, parts = {">": ("<", parts[::-1]), "≥": ("≤", parts[::-1])}.get(kind, (kind, parts))
    if kind in COMPUTE and {*map(type, parts)} == {Decimal}:
        return COMPUTE[kind](*parts)
    parts = [str(p.normalize(Context(700)) or 0) if type(p) is Decimal else p for p in parts]
    parts = [q for p in parts for q in (p[1:] if p[0] == "," or p[0] == kind in "+*=∪" else [p])]
    return kind, *(sorted(parts, key=str) if kind in ("+", "*", "=", "∪", "{}") else parts)

def _parse(tokens: list[str], level: int = 0) -> Decimal | str | tuple:
    """Precedence climbing over reversed tokens, up to a closing bracket."""
    token = tokens.pop()
    if token in "([{":
        value, pair = _parse(tokens), token + tokens.pop()
        if pair not in ("()", "{}") or type(value) is tuple and value[0] == ",":
            value = _node(pair, value)
    elif token in PREFIX:
        parts = [_parse(tokens, max(level, tight)) for tight in PREFIX[token]]
        value = parts[0] if token == "+" else _node(token.replace(r"\frac", "/"), *parts)
    else:
        value = CONSTANTS.get(token) or (token if NAME.fullmatch(token) else Decimal(token))
    while tokens[-1] not in ")]}" and INFIX.get(tokens[-1].replace("-", "+"), 6) > level:
        if tokens[-1] not in INFIX and tokens[-1][0] not in ".0123456789{":
            tokens.append("+" if tokens[-1] == "-" else "*")  # 2x is 2*x, but 5 6 is a KeyError
        value = _node(sign := tokens.pop(), value, _parse(tokens, INFIX[sign] - (sign in ">≥")))
    return value

def _same(gold: str, reply: str) -> bool:
    if gold == reply or len(gold + reply) > 600:  # this bounds the work
        return gold.strip() == reply.strip() != ""
    for pattern, new in RULES:
        gold, reply = pattern.sub(new, gold), pattern.sub(new, reply)
    if ("=" in gold) != ("=" in reply):  # one of them says x =
        gold = gold.replace(re.match(LHS, gold)[0], "")
        reply = reply.replace(re.match(r"([A-Z]{2} ?\+ ?)?" + LHS, reply)[0], "")
    if ("@" in gold) != ("@" in reply):  # one of them has a unit
        gold, reply = (re.sub(r"\+?@[a-z/]+@\*?( ?\^-?\d)?", " ", text) for text in (gold, reply))
    a, b = (TOKEN.findall("{" + text + "})")[::-1] for text in (gold, reply))
    with suppress(ArithmeticError, LookupError, ValueError, TypeError, RecursionError):
        return len(a) > 3 and (a == b or _node("=", _parse(a)) == _node("=", _parse(b)) and a == b)
    return False

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(" + r"(?:[^{}]|\{" * 6 + "[^{}]*" + r"\})*" * 6 + r")\}")
def extract_answer(response: str) -> str | None:
    r"""What is in the last \boxed{}, after the last </think>; None in an open <think>.
    >>> extract_answer(r"<think> \boxed{1}? </think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    tail = response.rpartition("</think>")[2]
    boxes = BOX.findall(tail[-100_000:])
    return boxes[-1] if boxes and "<think>" not in tail else None

def is_correct(response: str, answer: str | float | list) -> bool:
    r"""True if the boxed answer has the value and the structure of `answer`, or of any in a list.
    >>> is_correct(r"So \boxed{x = 0.5}.", r"\frac12"), is_correct(r"\boxed{5 \text{ or } 6}", 5)
    (True, False)
    """
    reply, golds = extract_answer(response), answer if type(answer) in (list, tuple) else [answer]
    return reply is not None and any(_same(str(gold), reply) for gold in golds if gold is not None)

# ==== Models and data =============================================================================

@contextmanager
def reading(what):
    """Whatever a library raises about somebody's files becomes one line that names them."""
    try:
        yield
    except Exception as e:
        cause = [*str(e).strip().splitlines(), type(e).__name__][0]
        raise e if isinstance(e, UserError) else UserError(f"cannot use {what}: {cause}") from None

def load_model(name):
    """A causal language model in fp32 and its tokenizer, from the hub or a folder."""
    advice = " (delete it to go on from the one before)" * ("checkpoint-" in str(name))
    with reading(f"model {name}{advice}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype="auto", trust_remote_code=False, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(f"it lacks {min(report['missing_keys'])}")
    model.own_dtype = model.dtype  # checkpoints are saved in it
    return model.float(), tokenizer

def check_model(model, tokenizer, problems, config):
    """Refuse a model that would be sampled or trained wrongly: its plain logits are the judge."""
    longest = max(len(p["prompt_ids"]) for p in problems) + config.max_new_tokens
    for limit in ("max_position_embeddings", "original_max_position_embeddings", "sliding_window",
                  "window_size"):
        refuse_if(longest > (getattr(model.config.get_text_config(), limit, 0) or longest),
                  f"{limit} of the model is below {longest}: lower --max_new_tokens")
    with reading(f"model {config.model} with its tokenizer"):
        ids = max((p["prompt_ids"] for p in problems), key=max)  # has each token an embedding?
        # long and short side by side, and two more in the slots that they leave
        four = [problems[0] | {"prompt_ids": q} for q in (ids, ids[len(ids) // 2 :]) * 2]
        greedy = replace(config, max_new_tokens=4, temperature=1e-9, slots=4)
        batch = rollouts(model, tokenizer, four, 2, greedy, lambda q, texts: [0, 1])
        logp = all_logprobs(model, batch, config)
        for prompt, drawn, mask, ours in zip(batch["prompts"], *(
                x[:, 1] for x in (batch["completions"], batch["mask"], logp))):
            logits = model.eval()(torch.cat([prompt, drawn])[None]).logits[0]
            logits = logits[-len(drawn) - 1 : -1] / config.temperature  # (tokens drawn, vocabulary)
            error = (logits.log_softmax(-1).amax(-1) - ours)[mask].abs().max()
            if not error <= 2**-12 * logits.abs().max():  # half the digits of fp32
                raise ValueError("it computes logits in another way than Qwen and Llama do")

def load_rows(path, name, split):
    """Rows of a file, a folder or a hub data set; numbers in text stay as written."""
    with reading(f"data {path}"):
        kinds = ("jsonl", "json", "csv", "parquet")  # in a folder, a file a split
        files = [Path(path) / f"{split}.{kind}" for kind in kinds]
        file = next(filter(Path.is_file, files), Path(path))
        if not file.is_file():
            return list(datasets.load_dataset(str(path), name, split=split))
        if file.suffix == ".parquet":
            return list(datasets.Dataset.from_parquet(str(file)))
        text = file.read_text(encoding="utf-8-sig").strip()
        if file.suffix == ".csv":
            rows = csv.DictReader(re.split("(?<=\n)", text), strict=True)
            return [{} if None in row else row for row in rows]  # None: more fields than names
        rows = text if text.startswith("[") else "[" + text.replace("\n", ",\n") + "]"
        return json.loads(rows, parse_int=str, parse_float=str)

def read_column(row, column):
    """The texts at a place such as prompt[0].content; of a chat, all that its messages say."""
    with suppress(LookupError, TypeError, ValueError):
        for key in re.findall(r"[^.\[\]]+", column):
            row = row[int(key) if isinstance(row, list) else key]
        found = row if isinstance(row, list) else [row]
        found = [x.get("content") if isinstance(x, dict) else x for x in found]
        return [str(x) for x in found if x == x and not isinstance(x, (dict, list, type(None)))]
    return []

def load_problems(tokenizer, config, path, split, least=1):
    """Dicts of problem, answer (GSM8K: after ####), prompt_ids, opening ("<think>" or nothing)."""
    rows, problems, skipped = load_rows(path, config.dataset_config, split), [], []
    for number, row in enumerate(rows, 1):
        text = "\n".join(x for c in config.problem_column.split("+") for x in read_column(row, c))
        golds = [x.rpartition("####")[2].strip() for x in read_column(row, config.answer_column)]
        prompt = text + SUFFIX * (SUFFIX.strip() not in text)  # some hold it already
        with reading(f"{path}, row {number}"):
            if tokenizer.chat_template:  # it writes BOS itself
                prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}],
                                                       add_generation_prompt=True, tokenize=False)
            if text.strip() not in prompt:
                raise ValueError("the chat template drops the question")
            ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template).input_ids
        if text.strip() and any(golds) and len(ids) <= config.max_prompt_tokens:
            problems.append({"problem": text, "answer": golds if golds[1:] else golds[0],
                             "prompt_ids": ids, "opening": "<think>" * ("<think>" in prompt[-9:])})
        else:
            skipped.append(number)
    if skipped:
        tqdm.write(f"{path}: {len(skipped)} of {len(rows)} rows skipped, first row {skipped[0]}: "
                   "no problem, no usable answer, or over --max_prompt_tokens")
    names = {name for row in rows if isinstance(row, dict) for name in row}
    unknown = {*re.findall(r"(?:^|\+)([^+.[]+)", config.problem_column)} - names
    refuse_if(unknown or len(problems) < least,
              f"{path}: {len(problems)} usable rows of {len(rows)}, {least} are needed; set "
              f"--answer_column, --problem_column of {', '.join(sorted(names))}")
    return problems

# ==== The run's folder ============================================================================

def read_run(folder):
    """The config.json of a run of ours; an empty dict if the folder holds none."""
    file = folder / "config.json"
    with reading(file):
        found = json.loads(file.read_text()) if file.is_file() else {}
    return found if isinstance(found, dict) and found.get("made_by") == "real.py" else {}

class Run:
    """A run's folder: config.json, metrics.jsonl, samples.jsonl, metrics.png, checkpoint-NNNNNN.
    Nothing else in it is touched. A lock on .lock gives it to one process at a time."""

    def __init__(self, config):
        self.config, self.path, self.old = config, config.folder, read_run(config.folder)
        self.signal, self.skipped, self.unmixed = 0, 0, 0
        self.checkpoint = max(self.checkpoints(), default=None)
        self.done = int(self.checkpoint.name[-6:]) if self.checkpoint else 0
        others = self.path.exists() and set(os.listdir(self.path)) - {".lock", ".part"}
        refuse_if(others and not self.old, f"{self.path} holds files, but no run of real.py")
        refuse_if(config.resume and not self.old, f"{self.path} holds no run to resume")
        refuse_if(self.old and not config.resume, f"{self.path} holds a run: --resume goes on")
        refuse_if(self.old.get("model", config.model) != config.model,
                  f"{self.path} is a run of --model {self.old.get('model')}")
        refuse_if(self.done >= config.steps,
                  f"{self.path} has done {self.done} steps: set more --steps to go on")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / ".lock", timeout=0)

    def checkpoints(self):
        found = self.path.glob("checkpoint-*")
        return [path for path in found if re.fullmatch(r"checkpoint-\d{6}", path.name)]

    def __enter__(self):
        with reading(f"{self.path}, in use by another run"):
            self.lock.acquire()
        signals = [getattr(signal, name, signal.SIGINT) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        self.handlers = {number: signal.signal(number, self.stop) for number in set(signals)
                         if signal.getsignal(number) != signal.SIG_IGN}  # as nohup wants
        return self

    def stop(self, number, frame):
        if number == self.signal == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number
        print("\nStopping after this step. Ctrl-C once more to leave at once.", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.release()

    def start(self, model, optimizer, problems):
        """Read the last input, the state of a checkpoint; from here on the folder is written."""
        file = (self.checkpoint or self.path) / "trainer.pt"
        if file.exists():  # else a new run, or an older checkpoint: AdamW starts afresh
            with reading(f"{file} (delete {self.checkpoint} to go on from the one before)"):
                if not file.is_file():
                    raise ValueError("it is not a file")
                state = torch.load(file, "cpu", weights_only=True)
                optimizer.load_state_dict(optimizer.state_dict() | {"state": state["adam"]})
                weights = optimizer.param_groups[0]["params"]
                for p, w, saved in zip(model.parameters(), weights, state["weights"], strict=True):
                    adam = optimizer.state.get(w, {"exp_avg": w, "exp_avg_sq": w})
                    if {saved.shape, adam["exp_avg"].shape, adam["exp_avg_sq"].shape} != {w.shape}:
                        raise ValueError("a weight has another shape")
                    p.data.copy_(w.data.copy_(saved))
        known = [[p["problem"], p["answer"]] for p in problems]  # a template may write the date
        fingerprint = zlib.crc32(json.dumps(known).encode())
        refuse_if(self.old.get("problems", fingerprint) != fingerprint,
                  f"{self.path} was started with other problems, or in another order")
        settings = {"made_by": "real.py", "problems": fingerprint} | asdict(self.config)
        keep = {}  # bytes of each log, up to the checkpoint
        logs = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        for file in filter(Path.exists, logs):
            with reading(file):
                rows = file.read_bytes().splitlines(True)
                if rows and not rows[-1].endswith(b"\n"):  # torn by a kill
                    rows.pop()
                steps = [json.loads(row)["step"] for row in rows]
                keep[file] = sum(len(x) for x, step in zip(rows, steps) if step <= self.done)
            refuse_if(not self.checkpoint and max(steps, default=0) > self.config.save_every,
                      f"{self.path} has lost its checkpoints: bring them back, or delete it")
        (self.path / ".part").write_text(json.dumps(settings, indent=2))
        (self.path / ".part").replace(self.path / "config.json")  # a kill leaves one of them whole
        for file, size in keep.items():
            os.truncate(file, size)
        n, c = model.num_parameters(), self.config
        self.size = f"{n * model.own_dtype.itemsize / 1e9:.2g} GB, the newest {n * 12e-9:.2g} more"
        tqdm.write(f"{c.objective} on {Path(c.model).name}: {n:,} parameters on {model.device}, "
                   f"{len(problems):,} problems, {c.prompts} x {c.group_size} rollouts a step\n"
                   f"{self.path} will keep {c.keep} checkpoints ({self.size})")

    def log(self, step, row, batch):
        """Append a step to metrics.jsonl and its first group to samples.jsonl; show the step."""
        row = {"step": step} | {k: float(v) for k, v in row.items()}
        sample = {"step": step} | {k: batch["problems"][0][k] for k in ("problem", "answer")}
        sample |= {"texts": batch["texts"][0], "labels": batch["labels"][0].int().tolist()}
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}  # JSON has no NaN
        for name, line in (("metrics.jsonl", finite), ("samples.jsonl", sample)):
            with (self.path / name).open("a") as file:
                file.write(json.dumps(line) + "\n")
        if step % 20 == 1:
            end = time.ctime(time.time() + (self.config.steps - step) * row["seconds"])
            tqdm.write(f"\n{sample['problem'][:200]!r} -> {sample['texts'][0][-200:]!r} "
                       f"{'right' if sample['labels'][0] else 'wrong'}\n"
                       f"A step takes {row['seconds']:.1f} s; the last would end {end}\n\n step"
                       "  reward  mixed  cut off  entropy  length    s_bar+    s_bar-  max|W|"
                       "  seconds  Pass@1")
        tqdm.write(("{step:5} {reward:7.3f} {mixed:6.2f} {cut_off:8.2f} {entropy:8.3f} "
            "{response_length:7.1f} {s_positive:+9.4f} {s_negative:+9.4f} {max_weight:7.3f} "
            "{seconds:8.1f}" + " {pass@1:7.3f}" * ("pass@1" in row)).format(**row))
        self.unmixed = 0 if row["mixed"] else self.unmixed + 1
        self.skipped = self.skipped + row["skipped"] if row["skipped"] else 0
        if self.unmixed == 5:
            tqdm.write("Five steps without a mixed group taught nothing: the problems are too hard "
                       "or too easy, or --answer_column is another one")
        if row["cut_off"] >= 0.5 and step % 20 == 1:
            tqdm.write("Half of the answers are cut off: raise --max_new_tokens")
        refuse_if(self.skipped >= 3, "three updates were not finite: --resume with a lower --lr")

    def save(self, step, model, tokenizer, optimizer):
        """A checkpoint, whole or absent: a Hugging Face model, and trainer.pt to go on from."""
        aside, final = self.path / ".checkpoint", self.path / f"checkpoint-{step:06d}"
        weights = [w.detach() for w in optimizer.param_groups[0]["params"]]  # fp32
        buffers = dict(model.named_buffers())  # of these the persistent ones are saved
        state = {name: x.cpu() for name, x in model.state_dict().items() if name in buffers}
        state |= {name: w.to("cpu", model.own_dtype)
                  for (name, _), w in zip(model.named_parameters(), weights)}
        try:
            shutil.rmtree(aside, ignore_errors=True)
            model.save_pretrained(aside, state_dict=state)
            model.config.dtype = model.own_dtype
            model.config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            adam = optimizer.state_dict()["state"]
            torch.save({"weights": weights, "adam": adam}, aside / "trainer.pt")
            getattr(os, "sync", int)()  # on the disk before it gets its name
            aside.rename(final)
        except Exception as e:
            shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"cannot save {final} ({self.size}): {e}; the others are whole")
        older = sorted(self.checkpoints(), reverse=True)[1:]
        for folder in older:
            (folder / "trainer.pt").unlink(missing_ok=True)
        for folder in older[self.config.keep - 1 :]:
            if folder.is_symlink():
                folder.unlink()
            else:
                shutil.rmtree(folder.rename(aside))

    def finish(self):
        """Draw the log, say what the run did or how to go on. Returns the log's last row."""
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").open()]
        if rows[-1]["step"] < self.config.steps:  # a signal
            go_on = [sys.executable, os.path.abspath(__file__), "--resume", "--output_dir"]
            print(f"Saved. Go on with: cd {shlex.quote(os.getcwd())} && "
                  f"{shlex.join([*go_on, str(self.path)])}", file=sys.stderr)
            raise SystemExit(128 + self.signal)
        with suppress(ImportError):  # the picture needs matplotlib
            from matplotlib.figure import Figure
            figure, table = Figure(figsize=(13, 3), layout="constrained"), pandas.DataFrame(rows)
            for axis, (unit, *keys) in zip(figure.subplots(1, 4), (
                    ("share that is right", "reward", "pass@1"), ("nats", "entropy"),
                    ("tokens", "response_length"), ("log-ratio", "s_positive", "s_negative"))):
                columns = table.reindex(columns=["step", *keys])
                columns.plot("step", ax=axis, style=".-", ylabel=unit)
            figure.savefig(self.path / "metrics.png")
        if "pass@1_before" in rows[0] and "pass@1" in rows[-1]:
            tqdm.write("Pass@1 {:.2f} -> {:.2f} in {:.0f} s".format(
                rows[0]["pass@1_before"], rows[-1]["pass@1"], sum(row["seconds"] for row in rows)))
        tqdm.write(f"Log, samples, picture and checkpoints: {self.path}")
        return rows[-1]

# ==== Command line ================================================================================

ONE_CARD = dict(lr=2e-6, warmup=0, beta2=0.999, temperature=0.6, low_memory=True, save_every=10,
                micro_batch_tokens=16384, eval_samples=4, eval_limit=128)
PAPER = ONE_CARD | dict(  # Sec. 5.1 and the released code
    model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", slots=256, eval_samples=16,
    dataset="agentica-org/DeepScaleR-Preview-Dataset", eval_dataset="HuggingFaceH4/aime_2024",
    eval_split="train", prompts=128, steps=1400, max_new_tokens=8192, eval_every=50,
    micro_batch_tokens=18432)
PRESETS = {  # what each of them takes, and what to expect: README
    "tiny": {}, "paper": PAPER,
    "0.5b": ONE_CARD | dict(
        model="Qwen/Qwen2.5-0.5B-Instruct", dataset="openai/gsm8k", dataset_config="main",
        eval_dataset="openai/gsm8k", problem_column="question", mini_batches=2, steps=100, lr=1e-6,
        temperature=1.0, max_new_tokens=512, slots=128, eval_every=25),
    "1.5b": PAPER | ONE_CARD | dict(
        prompts=16, mini_batches=2, steps=120, max_new_tokens=4096, slots=48,
        eval_dataset="HuggingFaceH4/MATH-500", eval_split="test", eval_every=30),
    "paper-7b": PAPER | dict(
        model="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", lr=1e-6, steps=1000, slots=104,
        micro_batch_tokens=36864)}

def parse(argv=None):
    """The configuration a command line asks for: flags over a run's settings over a preset's."""
    def read():
        return Config(**{k: v for k, v in vars(parser.parse_args(argv)).items() if k != "preset"})

    parser = HfArgumentParser(Config, description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, help="named settings; flags override them")
    args = parser.parse_args(argv)
    refuse_if({args.model, args.dataset} != {TINY} and not (args.preset or args.resume),
              "another --model or --dataset needs the settings of a --preset, one of "
              f"{', '.join(PRESETS)}; the defaults fit the embedded model alone")
    parser.set_defaults(**PRESETS[args.preset or "tiny"])
    with reading("config.json"):  # edited by hand, perhaps
        saved = read_run(read().folder) if args.resume else {}
        known = {f.name for f in fields(Config)} - {"resume", "output_dir"}
        parser.set_defaults(**{k: v for k, v in saved.items() if k in known})
        config = read()
    refuse_if(config.eval_every and config.eval_dataset == TINY != config.dataset,
              "--eval_dataset: name held-out problems for --dataset, or set --eval_every 0")
    return config

class Output:
    """A stream of any encoding; once nobody reads it (`| head`), the run stops as after SIGTERM."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        with suppress(AttributeError):  # a notebook's stream takes any text
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            signal.raise_signal(signal.SIGTERM)

@contextmanager
def one_line_errors():
    """Bad input ends in one line and exit code 2; a defect of ours shows its traceback."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        yield
        return
    except (UserError, OSError) as e:  # OSError: a full disk, a folder that cannot be written
        error = str(e)
    except (RuntimeError, MemoryError) as e:
        if "allocate" not in str(e) and not isinstance(e, MemoryError):  # CUDA says so, and the CPU
            raise
        sampling = "sample" in {frame.name for frame in traceback.extract_tb(e.__traceback__)}
        flag = "--slots" if sampling else "--micro_batch_tokens, or set --low_memory true"
        error = f"out of memory while {'sampling' if sampling else 'updating'}: lower {flag}"
    except KeyboardInterrupt:  # before the run's folder is opened
        sys.exit(130)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in error)
    print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
    sys.exit(2)

def main(argv=None):
    """Train as the command line says."""
    with one_line_errors():
        return train(parse(argv))

if __name__ == "__main__":
    main()
