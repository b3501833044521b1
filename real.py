"""Rewards as Labels (REAL), arXiv 2602.05630, in one file: train a language model with REAL.

Sample answers and let a checker label each right or wrong. The labels are the classes of a
classifier; its logit, how much likelier an answer has become, goes above 0 if right, else below.

    python real.py                  # the embedded tiny model, about a minute on 2 CPU cores
    python real.py --preset 0.5b    # Qwen2.5-0.5B-Instruct on GSM8K, one GPU of 8 GB or more

Where the paper is in this file          Shapes
    Eq. 1        grpo                      Q   questions of a batch
    Eq. 2        softmax_ce                G   rollouts (sampled answers) of a question
    Eq. 3, 9, 10 credit                    T   tokens of the longest rollout
    Eq. 4        log_ratio                 logp, old_logp, mask    (Q, G, T)
    Eq. 5        s_bar                     labels, s_bar, |W|      (Q, G), |W| as in Eq. 9
    Eq. 6, 7, 8  real
    Eq. 11       real_bce                Three places to edit are marked EDIT.
    Algorithm 1  train, by "line N"      Differences from the paper: README."""

import csv, inspect, io, json, math, os, re, shlex, signal, sys, time, traceback, zipfile, zlib
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from decimal import Context, Decimal, localcontext
from functools import partial
from pathlib import Path

import datasets, torch
import torch.nn.functional as F
from filelock import FileLock
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

TINY = str(Path(__file__).parent / "tiny")
SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."

class UserError(ValueError):
    """Bad input, said in one line that names the flag, file or row and what to do; exit code 2."""

def refuse_if(wrong, what):
    if wrong:
        raise UserError(what)

# ==== Configuration ====
def arg(default, help):
    return field(default=default, metadata={"help": help})

@dataclass(frozen=True)
class Config:
    """All settings of a run; the command line is made from it. Defaults: the embedded model."""
    model: str = arg(TINY, "Hugging Face id or folder")
    dataset: str = arg(TINY, "problems: hub id, folder, or .json .jsonl .csv file")
    dataset_config: str | None = arg(None, "configuration of a hub data set")
    split: str = arg("train", "split to train on")
    eval_dataset: str | None = arg(None, "held-out problems, same columns; not given: dataset")
    eval_split: str = arg("test", "split to validate on")
    problem_column: str = arg("problem", "the question; or prompt[0].content, context+question")
    answer_column: str = arg("answer", "the answer, or a list of answers")
    objective: str = arg("real", "the loss, one of OBJECTIVES")
    tau: float = arg(0.5, "of the REAL losses, Sec. 5.1")
    as_printed: bool = arg(False, "Eq. 8 as printed: groups all right or all wrong count too")
    eps_low: float | None = arg(None, "lower clip of GRPO, DAPO, GSPO; not given: their own")
    eps_high: float | None = arg(None, "upper clip, likewise")
    beta: float | None = arg(None, "of TRPA; not given: its own")
    kl_ref: float = arg(0.0, "weight of a KL to the starting model, Sec. 5.3")
    kl_old: float = arg(0.0, "weight of a KL to the old policy, likewise")
    prompts: int = arg(16, "questions a step, Q; paper: 128")
    group_size: int = arg(8, "rollouts a question, G, Sec. 5.1")
    mini_batches: int = arg(4, "updates a step, Sec. 5.1")
    steps: int = arg(80, "paper: 1,400")
    lr: float = arg(5e-5, "learning rate; paper: 2e-6")
    warmup: int = arg(20, "updates over which lr rises; released code: 0")
    beta2: float = arg(0.95, "of AdamW; released code: 0.999")
    grad_clip: float = arg(1.0, "largest norm of a gradient, released code")
    temperature: float = arg(1.0, "of sampling and inside log-probabilities; paper: 0.6")
    max_prompt_tokens: int = arg(1024, "longer prompts are skipped")
    max_new_tokens: int = arg(48, "longest rollout; paper: 8,192")
    slots: int = arg(2048, "rollouts sampled side by side, each with a cache")
    micro_batch_tokens: int = arg(4096, "tokens a forward pass; changes memory, not the gradient")
    low_memory: bool = arg(False, "bf16 on the GPU, recomputed; fp32 and AdamW on the CPU")
    eval_every: int = arg(20, "steps between validations, one before and after; 0: none")
    eval_samples: int = arg(8, "samples a problem; paper: 16")
    eval_limit: int = arg(256, "validation problems")
    seed: int = arg(0, "random numbers of a step depend on (seed, step) alone")
    save_every: int = arg(10, "steps between checkpoints")
    output_dir: str = arg("runs/real", "the run's folder")
    resume: bool = arg(False, "go on with the run in output_dir")

    def __post_init__(self):
        refuse_if(self.objective not in OBJECTIVES, f"--objective: one of {', '.join(OBJECTIVES)}")
        for name, value in vars(self).items():
            if type(value) in (int, float):
                low, high = RANGE.get(name, (1 if type(value) is int else 1e-12, 1e12))
                refuse_if(not low <= value < high, f"--{name} {value}: not in [{low:g}, {high:g})")
        refuse_if(self.prompts % self.mini_batches, "--prompts is no multiple of --mini_batches")

RANGE = {"group_size": (2, 1e12), "beta2": (0, 1)} | dict.fromkeys(
    "kl_ref kl_old warmup eval_every seed".split(), (0, 1e12))  # the others: above 0

R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-"
ONE_CARD = dict(lr=2e-6, warmup=0, beta2=0.999, temperature=0.6, low_memory=True, save_every=5,
                micro_batch_tokens=16384, eval_samples=4, eval_limit=128)
PAPER = ONE_CARD | dict(model=R1 + "1.5B", dataset="agentica-org/DeepScaleR-Preview-Dataset",
    prompts=128, steps=1400, max_new_tokens=8192, eval_dataset="HuggingFaceH4/aime_2024", slots=256,
    eval_split="train", eval_every=50, eval_samples=16, micro_batch_tokens=36864)  # Sec. 5.1
PRESETS = {"tiny": {}, "paper": PAPER,  # what each of them takes, and what to expect: README
    "paper-7b": PAPER | dict(model=R1 + "7B", lr=1e-6, steps=1000, slots=104),
    "1.5b": PAPER | ONE_CARD | dict(eval_dataset="HuggingFaceH4/MATH-500", eval_split="test",
        eval_every=30, slots=40, prompts=16, mini_batches=2, steps=120, max_new_tokens=4096),
    "0.5b": ONE_CARD | dict(model="Qwen/Qwen2.5-0.5B-Instruct", dataset="openai/gsm8k", lr=1e-6,
        dataset_config="main", problem_column="question", slots=128, eval_every=25, mini_batches=2,
        steps=100, max_new_tokens=512, temperature=1.0)}

# ==== Objectives ====
# EDIT: an objective is a pure function, named in OBJECTIVES; its own settings are fields of Config.
def log_ratio(logp, old_logp, mask):
    """s_t = log [pi_theta(o_t | q, o_<t) / pi_old(o_t | q, o_<t)], Eq. 4: (Q, G, T)."""
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
    return labels.any(-1) & ~labels.all(-1)

def real(logp, old_logp, mask, labels, *, tau=0.5, as_printed=False, anchor=True):
    """REAL, Eq. 8: mean over questions of L_+ (Eq. 6) plus L_- (Eq. 7). Without anchor: Eq. 2.
    A group that is all right or all wrong counts as 0, as in the released code."""
    z = s_bar(logp, old_logp, mask) / tau
    z_p = z.masked_fill(labels == 0, 1e30)  # S_+: the wrong rollouts enter as e^-z_p = 0
    z_n = z.masked_fill(labels == 1, -1e30)  # S_-: the right ones as e^z_n = 0; -inf would give NaN
    zero = torch.zeros_like(z[:, :1])  # S_0 = {0}: the score of a policy that did not move
    loss = softmax_ce(z_p, zero) + softmax_ce(zero, z_n)  # L_+ of Eq. 6 and L_- of Eq. 7
    if not anchor:
        loss = softmax_ce(z_p, z_n)
    return torch.where(is_mixed(labels) | as_printed, loss, 0.0).mean()

def real_bce(logp, old_logp, mask, labels, *, tau=0.5):
    """REAL with binary cross-entropy, Eq. 11; as released, a mean over rollouts of mixed groups."""
    mixed = is_mixed(labels)
    z = s_bar(logp, old_logp, mask)[mixed] / tau
    loss = F.binary_cross_entropy_with_logits(z, labels[mixed].to(z), reduction="sum")
    return loss / max(1, z.numel())

def clipped(s, labels, eps_low, eps_high):
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) of each token (Q, G, T); rho = e^s, and
    the advantage A = (r - mean) / std of a group, unbiased std (Sec. 2.1)."""
    r = labels.to(s)[..., None]  # (Q, G, 1)
    advantage = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    rho = s.clamp(-20, 20).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - eps_low, 1 + eps_high) * advantage)

def kl(logp, other_logp, mask):
    """KL(pi || pi_other), estimated by e^d - d - 1, d = log pi_other - log pi; mean as in Eq. 1."""
    d = log_ratio(other_logp, logp, mask).clamp(-20, 20)
    return token_mean(d.exp() - d - 1, mask).mean()

def grpo(logp, old_logp, mask, labels, *, eps_low=0.2, eps_high=0.2, drop=False):
    """GRPO, Eq. 1 without its KL (kl_ref adds it): a clipped policy gradient, mean over tokens of a
    rollout, then over rollouts. `drop`, the ablation of Fig. 2: no token outside the interval."""
    s = log_ratio(logp, old_logp, mask)
    loss = clipped(s, labels, eps_low, eps_high)
    if drop:
        loss = loss.masked_fill((s.exp() < 1 - eps_low) | (s.exp() > 1 + eps_high), 0.0)
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
    starting model; plus a small KL to the old policy. Its constants: its public code."""
    h = s_bar(logp, ref_logp, mask)  # (Q, G)
    pair = labels[:, :, None] > labels[:, None, :]  # (Q, G, G): the first right, the second wrong
    loss = -F.logsigmoid(2.5 * beta * (h[:, :, None] - h[:, None, :]))
    loss = torch.where(pair, loss, 0.0).sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)
    d = log_ratio(old_logp, logp, mask).clamp(-20, 20)  # as in kl
    return loss.mean() + 0.001 * (d.exp() - d - 1).clamp(max=10).sum() / mask.sum().clamp(min=1)

OBJECTIVES = {f.__name__: f for f in (real, real_bce, grpo, dapo, gspo, trpa)} | {
    "real_no_anchor": partial(real, anchor=False), "grpo_bidirectional": partial(grpo, drop=True)}

def arguments(objective):
    return inspect.signature(OBJECTIVES[objective]).parameters  # of the batch, or of Config

def credit(logp, batch, config):
    """The loss and dL/dlogp (Q, G, T), how hard each token is pushed; minus: to be likelier. Q |o|
    times its size is |W| of Eq. 9, Eq. 10 for REAL, below 1 / tau; |W| / G of Eq. 3 for GRPO."""
    logp = logp.detach().requires_grad_()
    given = vars(config) | batch | {"logp": logp}  # an objective's arguments come by name
    settings = {k: given[k] for k in arguments(config.objective) if given.get(k) is not None}
    loss = OBJECTIVES[config.objective](**settings)
    for weight, other in (config.kl_ref, "ref_logp"), (config.kl_old, "old_logp"):
        if weight:
            loss = loss + weight * kl(logp, batch[other], batch["mask"])
    return loss.detach(), torch.autograd.grad(loss, logp)[0]

# ==== Log-probabilities ====
def micro_batches(batch, rows, config):
    """Split rollouts, 0 to Q*G - 1, by length into lists of at most micro_batch_tokens, padded."""
    parts, n = [], batch["mask"].sum(-1)  # (Q, G)
    n = n if config.low_memory else n.amax(-1, keepdim=True).expand_as(n)  # they share a prompt
    lengths = [len(q) + x for q, group in zip(batch["prompts"], n.tolist()) for x in group]
    for row in sorted(rows, key=lengths.__getitem__):
        if not parts or (len(parts[-1]) + 1) * lengths[row] > config.micro_batch_tokens:
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
    Where activations are recomputed (low_memory) there can be no cache: each rollout reads it."""
    for module in model.modules():  # (critical) no dropout; layers recompute only in "training"
        module.training = config.low_memory and hasattr(module, "gradient_checkpointing")
    G, device = batch["mask"].shape[1], batch["mask"].device
    completions, mask = (batch[k].flatten(0, 1)[rows] for k in ("completions", "mask"))
    n = int(mask.sum(-1).max())  # tokens of the longest of these rollouts
    before = [batch["prompts"][row // G] for row in rows]  # what is read with a completion
    past = {"use_cache": False}
    if not config.low_memory:
        groups, repeats = (torch.tensor(rows) // G).unique_consecutive(return_counts=True)
        ids = pad_sequence([batch["prompts"][g][:-1] for g in groups], batch_first=True)
        cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(repeats.to(device))
        start = torch.tensor([[len(q) - 1] for q in before], device=device)
        column = torch.arange(ids.shape[1] + n, device=device)
        past = {"past_key_values": cache, "position_ids": start + column[:n],
                "attention_mask": (column < start) | (column >= ids.shape[1])}  # all but padding
        before = [q[-1:] for q in before]  # not in the cache: it predicts the first token
    ids = [torch.cat([q, o[: n - 1]]) for q, o in zip(before, completions)]
    hidden = model.base_model(input_ids=pad_sequence(ids, batch_first=True), **past)[0]
    tells = [F.pad(m[:n], (len(q) - 1, 0)) for q, m in zip(before, mask)]  # the token before o_t
    hidden = hidden[pad_sequence(tells, batch_first=True)]  # (tokens of all rows, H)
    head = model.get_output_embeddings()  # 512 tokens at a time: logits of all would not fit
    chunks = [checkpoint(head_logprobs, h, o, head, config.temperature, use_reentrant=False)
              for h, o in zip(hidden.split(512), completions[mask].split(512))]
    return torch.zeros(mask.shape, device=device).masked_scatter(mask, torch.cat(chunks))

def all_logprobs(model, batch, config):
    """log pi_theta of every rollout of a batch: (Q, G, T)."""
    logp = torch.zeros_like(batch["mask"], dtype=torch.float32).flatten(0, 1)
    for rows in micro_batches(batch, range(len(logp)), config):
        logp[rows] = token_logprobs(model, batch, rows, config)
    return logp.view(batch["mask"].shape)

# ==== Sampling ====
def next_token(logits, temperature):
    """o_t ~ softmax(logits / temperature): (n, vocabulary) -> (n,)."""
    c = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.double)
    return (c < (1 - torch.rand_like(c[:, :1])) * c[:, -1:]).sum(-1)  # where c passes a u in (0, 1]

@torch.no_grad()
def sample(model, prompts, G, ends, max_new_tokens, temperature, slots=2048, choose=None):
    """EDIT: draw G rollouts of each prompt, a vector of token ids, until one of `ends`. Returns ids
    and mask, (Q, G, T). Up to `slots` rollouts run side by side, each in a slot of one cache; when
    a quarter of them has ended, the next prompts are read into their slots."""
    device = model.eval().device
    every, ends = 16 if device.type == "cuda" else 1, torch.as_tensor(ends, device=device)
    ids = pad_sequence(prompts, batch_first=True).repeat_interleave(G, 0)
    ids = F.pad(ids, (0, max_new_tokens + 1))  # a row: prompt, completion and a column to spare
    start = torch.tensor([len(q) for q in prompts for _ in range(G)], device=device)  # o_1's column
    at, last = start - 1, start + max_new_tokens - 1  # columns of the newest and of the last token
    rollout = active = at[:0]  # the rollout in each slot; the slots whose rollout has not ended
    waiting = torch.arange(len(ids), device=device)  # rollouts that have no slot yet
    cache = Slots(min(max(slots // G, 1), len(prompts)) * G, ids.shape[1] - 1)
    torch.cuda.empty_cache()  # its tensors would not fit between what an update has left
    bar = tqdm(desc="tokens", unit="", leave=False, delay=5)
    while len(waiting) or len(active):
        if len(active) <= 0.75 * len(rollout):
            free = (cache.slots - len(active)) // G * G  # whole groups
            new, waiting = waiting[:free], waiting[free:]
            cache.refill(model, active, [prompts[i // G] for i in new[::G].tolist()], G)
            rollout = torch.cat([rollout[active], new])
            cache.width = int(at[rollout].max())
        for _ in range(every):  # a token of every slot
            now = cache.at = at[rollout]
            cache.width = min(cache.width + 1, cache.columns)
            later = torch.arange(cache.width, device=device) > now[:, None]
            mask = torch.where(later, -math.inf, 0.0).to(model.dtype)[:, None, None]  # to be added
            logits = model(input_ids=ids[rollout, now][:, None], position_ids=now[:, None],
                           attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1]
            token = (choose or next_token)(logits, temperature)  # o_t ~ pi(. | q, o_<t)
            ids[rollout, now + 1] = token
            at[rollout] = torch.minimum(now + 1, last[rollout])  # where it has ended it stays
            last[rollout] = torch.where(torch.isin(token, ends), at[rollout], last[rollout])
        active = (at < last)[rollout].nonzero()[:, 0]  # the host waits here, not inside a token
        refuse_if(not logits.isfinite().all(), "logits are not finite: bad weights, or lower --lr")
        bar.update(every * len(rollout))
    column = start[:, None] + torch.arange(int((last - start).max()) + 1, device=device)
    mask = column <= last[:, None]  # (critical) to the first end token, inclusive
    return [x.view(len(prompts), G, -1) for x in (ids.gather(1, column) * mask, mask)]

def label_group(problem, texts):
    """EDIT: True or False for each of a group of answers to a problem, here by the checker."""
    return [is_correct(text, problem["answer"]) for text in texts]

def rollouts(model, tokenizer, problems, G, config, label=label_group, choose=None):
    """A group of rollouts of each problem and their labels, as a batch: a dict of length-Q values.
    `train` adds old_logp, and ref_logp where the loss looks at it: (Q, G, T) float32."""
    device, ends = model.device, model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    ends = torch.tensor(sorted(ends), device=device)
    prompts = [torch.tensor(p["prompt_ids"], device=device) for p in problems]
    ids, mask = sample(model, prompts, G, ends, config.max_new_tokens, config.temperature,
                       config.slots, choose)
    texts = [[tokenizer.decode(o[m], skip_special_tokens=True) for o, m in zip(*group)]
             for group in zip(ids.cpu(), mask.cpu())]
    labels = [label(p, [p["opening"] + x for x in group]) for p, group in zip(problems, texts)]
    refuse_if(any(x not in (0, 1) for group in labels for x in group), "a label is to be 0 or 1")
    return {"problems": problems, "texts": texts,  # Q dicts, see load_problems; Q lists of G str
            "prompts": prompts, "completions": ids,  # Q vectors of ids; (Q, G, T), 0 after the end
            "mask": mask, "ended": (mask & torch.isin(ids, ends)).any(-1),  # (Q, G, T); (Q, G)
            "labels": torch.tensor(labels, device=device).bool().view(len(prompts), G)}

def validate(model, tokenizer, problems, config):
    """Pass@1 by the checker: the share of right answers among eval_samples of each problem."""
    torch.manual_seed(config.seed)
    batch = rollouts(model, tokenizer, problems[: config.eval_limit], config.eval_samples, config)
    return batch["labels"].float().mean().item()

# ==== Update and training ====
def update(model, optimizer, batch, config):
    """One optimizer step on a mini-batch. An objective couples the rollouts of a group; what splits
    into micro-batches is the chain rule, dL/dtheta = sum over tokens of dL/dlogp * dlogp/dtheta:
    `credit` needs no model. If one micro-batch holds all, its graph is kept. NaN: no step."""
    whole = len(micro_batches(batch, range(batch["labels"].numel()), config)) == 1
    with torch.set_grad_enabled(whole):
        logp = all_logprobs(model, batch, config)
    loss, push = credit(logp, batch, config)  # push = dL/dlogp, (Q, G, T)
    rows = push.flatten(0, 1).any(-1).nonzero()[:, 0].tolist()
    for micro in micro_batches(batch, rows, config):
        again = logp.flatten(0, 1)[micro] if whole else token_logprobs(model, batch, micro, config)
        again.backward(push.flatten(0, 1)[micro])  # dL/dtheta = push * dlogp/dtheta
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.grad_clip)
    if rows and (loss + norm).isfinite():
        optimizer.step()
    optimizer.zero_grad(set_to_none=not config.low_memory)  # there, gradients add into .grad
    return {"loss": loss, "grad_norm": norm.to(loss.device),
            "weight": len(push) * push.sum(-1).abs(),  # (Q, G), |W| if REAL
            "s_bar": s_bar(logp.detach(), batch["old_logp"], batch["mask"])}

def train(config, label=label_group):
    """Algorithm 1; `label(problem, texts)` gives the G labels of a group. Returns the last log row.
    Validation asks `label_group` in any case. SystemExit after Ctrl-C, the step at work saved."""
    with Run(config) as run:
        model, tokenizer = load_model(config.model)  # lines 1 and 2
        problems = load_problems(tokenizer, config, config.dataset, config.split, config.prompts)
        held = config.eval_dataset or config.dataset, config.eval_split
        held_out = load_problems(tokenizer, config, *held) if config.eval_every else []
        refuse_if(held_out == problems, "--eval_dataset, --eval_split: these are trained on")
        check_model(model, tokenizer, problems + held_out, config)
        optimizer = run.restore(model.to("cuda" if torch.cuda.is_available() else "cpu"), problems)
        if not config.resume:
            run.save(0, model, optimizer)  # whatever ends it, --resume goes on
        policies = {"old_logp": model}
        if config.kl_ref or "ref_logp" in arguments(config.objective):  # the starting model
            policies["ref_logp"] = load_model(config.model, model.dtype)[0].to(model.device)
        for step in tqdm(range(run.last["step"] + 1, config.steps + 1), unit="step"):  # line 3
            first = held_out and step == 1
            row = {"pass@1_before": validate(model, tokenizer, held_out, config)} if first else {}
            began = time.time()
            torch.manual_seed(config.seed * 1_000_003 + step)
            questions = draw(problems, step, config)  # line 4; then lines 6 and 7:
            batch = rollouts(model, tokenizer, questions, config.group_size, config, label)
            Q, size = config.prompts, config.prompts // config.mini_batches
            minis = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, Q, size)]
            with torch.no_grad():  # line 5, (critical) by the passes of `update`: s_bar starts at 0
                for mini in minis:
                    mini |= {k: all_logprobs(pi, mini, config) for k, pi in policies.items()}
            updates = []
            for number, mini in enumerate(minis, (step - 1) * len(minis) + 1):  # line 8
                optimizer.param_groups[0]["lr"] = config.lr * min(1, number / max(1, config.warmup))
                updates.append(update(model, optimizer, mini, config))  # lines 9 and 10
            row |= metrics(batch, minis, updates)
            if held_out and (step == config.steps or step % config.eval_every == 0):
                row["pass@1"] = validate(model, tokenizer, held_out, config)
            run.log(step, row | {"seconds": time.time() - began}, batch)
            due = step % config.save_every == 0 and not row["skipped"]
            if due or run.signal or step == config.steps:
                run.save(step, model, optimizer)
            if run.signal:
                break
        return run.finish(model, tokenizer)  # line 13

# ==== Here the algorithm ends. What follows serves it. ====
class Slots:
    """A key-value cache allocated once: slot r is a rollout at work, its token p is in column p."""
    def __init__(self, slots, columns):  # sample sets `at`, the columns to write, and `width`
        self.slots, self.columns, self.kv = slots, columns, []

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
        own = [x[: len(self.at), :, : self.width] for x in self.kv[2 * layer : 2 * layer + 2]]
        for x, new in zip(own, (keys, values)):
            x.scatter_(2, self.at[:, None, None, None].expand_as(new), new)
        return own

def draw(problems, step, config):
    """The questions of a step. Each pass over the data is a new order that the seed decides."""
    random, end = torch.Generator().manual_seed(config.seed * 1_000_003), step * config.prompts
    passes = [torch.randperm(len(problems), generator=random) for _ in range(0, end, len(problems))]
    return [problems[i] for i in torch.cat(passes)[end - config.prompts : end]]

def metrics(batch, minis, updates):
    """What a step did, as numbers; the README says what each means."""
    labels, mask = batch["labels"], batch["mask"]
    s, w = (torch.cat([u[k] for u in updates]) for k in ("s_bar", "weight"))  # (Q, G)
    loss, norm = (torch.stack([u[k] for u in updates]) for k in ("loss", "grad_norm"))
    means = {"reward": labels, "solved": labels.all(-1), "mixed": is_mixed(labels),
             "cut_off": ~batch["ended"], "response_length": mask.sum(-1), "s_abs": s.abs()}
    return {k: x.float().mean() for k, x in means.items()} | {
        "loss": loss.mean(), "grad_norm": norm.max(), "skipped": (~(loss + norm).isfinite()).sum(),
        "entropy": -torch.cat([x["old_logp"] for x in minis])[mask].mean(),  # estimated: o ~ pi_old
        "s_positive": s[labels].mean(), "s_negative": s[~labels].mean(), "max_weight": w.max()}

def check_model(model, tokenizer, problems, config):
    """Refuse a model that would be sampled or trained wrongly: its plain logits are the judge."""
    with reading(f"model {config.model} with its tokenizer"):
        longest = max(len(p["prompt_ids"]) for p in problems) + config.max_new_tokens
        limits = re.findall(r"(?:position\w*|window(?:_size)?)': (\d+)", str(vars(model.config)))
        room = min(map(int, limits), default=longest)
        refuse_if(room < longest, f"{longest} tokens, positions for {room}: lower --max_new_tokens")
        ids = max((p["prompt_ids"] for p in problems), key=max)  # has each token an embedding?
        four = [problems[0] | {"prompt_ids": q} for q in (ids, ids[len(ids) // 2 :]) * 2]
        greedy = replace(config, max_new_tokens=4, temperature=1e-9, slots=4)
        batch = rollouts(model, tokenizer, four, 2, greedy, lambda q, texts: [0, 1])
        for q, o, mask, logp in zip(batch["prompts"], batch["completions"], batch["mask"],
                                    all_logprobs(model, batch, config)):
            logits = model.eval()(torch.cat([q.expand(2, -1), o], 1)).logits / config.temperature
            best = logits[:, len(q) - 1 : -1].log_softmax(-1).amax(-1)  # (2, T)
            if not (best - logp)[mask].abs().max() <= 2**-12 * logits.abs().max():  # half of fp32
                raise ValueError("it computes logits in another way than Qwen and Llama do")

def make_optimizer(model, config):
    """AdamW over fp32 weights: the model's or, with low_memory, originals of its bf16 ones on the
    CPU, as at lr 2e-6 most updates are below bf16's spacing and have to gather in fp32."""
    home = {}
    if config.low_memory:
        model.activation_checkpointing_enable()
        home = {p: p.detach().cpu().requires_grad_() for p in model.parameters()}
        transit = torch.empty(max(p.numel() for p in home), dtype=torch.bfloat16,
                              pin_memory=torch.cuda.is_available())  # pinned: fast to copy to
        def move(p):
            home[p].grad += transit[: p.numel()].view_as(p).copy_(p.grad)
            p.grad = None
        for p, w in home.items():
            p.data = p.data.bfloat16()  # (critical) not the buffers: rounded rotary phases are off
            w.grad = torch.zeros_like(w)
            p.register_post_accumulate_grad_hook(move)
    optimizer = torch.optim.AdamW(home.values() or model.parameters(), config.lr,
                                  (0.9, config.beta2), weight_decay=0.01, fused=True)  # Sec. 5.1
    optimizer.register_step_post_hook(lambda *_: [p.data.copy_(w) for p, w in home.items()])
    return optimizer

# ==== Labels: r(o | q) of Algorithm 1, a checker that is a table of rewrite rules ====
SYMBOLS = {old: new.replace("~", " ") for new, *olds in map(str.split, r"""+- - − –|/ ÷|= \in|± \pm
    |* × · \times \cdot|÷ \frac \dfrac \tfrac|½√ √ sqrt \sqrt|π pi \pi|∞ \infty|≤ <= \le \leq
    |≥ >= \ge \geq|\ne not \not \neq|∪ \cup \bigcup|,~ ; and or & \quad|[( \begin|),( \\|)] \end
    |@degrees@ ° ^\circ ^{\circ}|@percent@ % \%|@dollars@*~ \$|~1/2 ½|~ ~ $ \( \) \left \right
    \displaystyle \angle""".split("|")) for old in olds}
UNIT = (r"((?: */h|[ /]*(?:square|cubic|per|[cdkm]m|[km]g|ft|in|inch|foot|feet|unit|meter|mile|way"
        r"|kilometer|pound|dollar|cent|people|degree|second|minute|hour|day|week|month|year|point"
        r"|percent)(?:e?s)?){1,4})")
NAME = r"@[a-z/]+@|[A-Za-z]{2,}(?! *\^)|[A-Za-z∞]"
RULES = [(re.compile(pattern), new) for pattern, new in [  # ÷12 is a half, @cm@ a unit
    (r"\{([pb]matrix|array)\}(\{[clr|]+\})?|\\\\\s*(?=\\end)", " "),  # \begin{pmatrix}1 -> \begin 1
    (r"(?<=\d)(?<!\d{4})(,?\\!|\\[ ,]|\{,\}|[ ~])\s*(?=\d{3}(?![\d/]))", ""),  # 10,\!080 -> 10080
    (r"[<>]=|\^\{?\\circ\}?|\\?([A-Za-z]+|[^\d ])", lambda m: SYMBOLS.get(m[0], m[0])),  # \pi -> π
    (r"\\(text|math|mbox|operator|boxed)[a-z]* *(\{([^{}]*)\})?|\\[!,;: ]|\s", r" \3 "),  # \;1 -> 1
    (r"(?<![A-Za-z\\])[A-Z](?=[a-z])", lambda m: m[0].lower()),  # Even -> even
    (r"^[^\d,([{]*\d{1,3}(,\d{3})+(?![\d,])", lambda m: m[0].replace(",", "")),  # 1,234 -> 1234
    (r"(^ *\\{|^|,)([^,]*)±([^,]*?)(?=,|\\}|\.?$)", r"\1\2+\3,\2+-\3"),  # 1±x -> 1+x,1+-x
    (rf"(?<=[\d)}}π]){UNIT}(?![A-Za-z])", lambda m: f"@{m[1].replace(' ', '')}@"),  # 5 cm -> 5@cm@
    (r"÷ *(\w|{[^{}]*}) *(\w)", r"÷\1{\2}"),  # ÷12 -> ÷1{2}
    (r"(?<![\w.}/^√])(\d+) *(÷ *{?\d+}? *{\d+}| \d+/\d+)", r"(\1+\2)"),  # 1 1/2 -> (1+ 1/2)
    (r"^[ +]+|(?<=[({\[,=*/^+-]) *\+|(?<=\d[eE])\+|\\(?=[{}])|,(?= *,)|[ .,:]+$", ""),  # +5. -> 5
    (rf"({NAME}|((?<=\^)-)?(\d+\.?\d*|\.\d+)([eE]-?\d{{1,3}})?|\S) *", r"\1 "),  # 3+2x -> 3 + 2 x
    (r"(?<=[\w)}@∞.]) (?=[(½÷@∞π]|[a-zA-Z]{1,2}\b)|(?<=-) ", " * ")]]  # - 2 x -> - * 2 * x
LHS = r"(((([A-Z]{2} \+ |\\ (?!n))?[A-Za-z]+( _ [\w{} ]+)?( \* \( \w+ \))?|\([A-Za-z, ]+\)) )?= )?"
SIGNS = "() [) (] [] {} = < > ≤ ≥ ∪ + * / ^ _ √".split()  # loosest first
COMPUTE = {"+": lambda *x: sum(x), "*": lambda *x: math.prod(x), "/": lambda x, y: x / y,
           "^": lambda x, n: 1 / (1 / x) ** int(str(n)), "√": lambda half, x: x.sqrt()}
KNOWN = {c: Decimal(x) for c, x in zip("-½πei", (-1, 0.5, math.pi, math.e, 7**0.1))}  # i is any

def _value(text: str, known: dict) -> Decimal | str:
    """A number if it can be computed, else a text, sorted where order means nothing. No algebra."""
    sign = next((sign for sign in SIGNS if f" {sign} " in text), None)
    if sign is None:
        return known[text] if text in known else Decimal(text)
    parts = [_value(part, known) for part in text.split(f" {sign} ")]
    if sign in ">≥":  # 5 > x is x < 5
        sign, parts = {">": "<", "≥": "≤"}[sign], parts[::-1]
    if sign in COMPUTE and {*map(type, parts)} == {Decimal}:
        return COMPUTE[sign](*parts)
    parts = [str(p.normalize(Context(700)) or 0) if type(p) is Decimal else p for p in parts]
    return f"({sign} {' '.join(sorted(parts) if sign in ('+', '*', '=', '∪', '{}') else parts)})"

def _read(text: str) -> str:
    """The value of an answer as a text; an answer that cannot be read stands for itself."""
    known = {name: name for name in re.findall(NAME, text)} | KNOWN
    rest = "( 0 , { " + text + "} )"  # whose value is a text even where that of `text` is a number
    with localcontext(Context(800, Emax=699)), suppress(ArithmeticError, TypeError, ValueError):
        while rest not in known:  # a name takes the place of an innermost bracket
            rest = re.sub(r"÷ ([^\s{([]+) ([^\s{([]+)", r"( \1 / \2 )", rest)
            bracket = re.search(r"(?:({)|[([]) ([^][{}()]*) (?(1)}|[])])", rest)
            name, pair = f"@{len(known)}@", bracket[0][0] + bracket[0][-1]
            value = _value(bracket[2].replace(",", pair), known)
            single = pair not in ("()", "{}") and not str(value).startswith("(")  # [5] is not 5
            known[name] = f"{pair} {value}" if single else value
            rest = rest.replace(bracket[0], name)
        return known[rest]
    return re.sub(r"\{ (\S+) \}", r"\1", text)

def _same(gold: str, reply: str) -> bool:
    if gold == reply or len(gold + reply) > 600:  # this bounds the work
        return gold.strip() == reply.strip() != ""
    for pattern, new in RULES:
        gold, reply = pattern.sub(new, gold), pattern.sub(new, reply)
    if ("=" in gold) != ("=" in reply):  # one of them says x =
        gold, reply = (text.replace(re.match(LHS, text)[0], "") for text in (gold, reply))
    if ("@" in gold) != ("@" in reply):  # one of them has a unit
        unit = r"((?<!- )\* )?@\S+@ (\* )?(\^ [{\d} ]+)?"
        gold, reply = re.sub(unit, "", gold), re.sub(unit, "", reply)
    return _read(gold) == _read(reply) != ""

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{(" + r"(?:[^{}]|\{" * 6 + "[^{}]*" + r"\})*" * 6 + r")\}")
def extract_answer(response: str) -> str | None:
    r"""What is in the last \boxed{}, after the last </think>; None in an open <think>."""
    tail = response.rpartition("</think>")[2]
    boxes = BOX.findall(tail[-100_000:])
    return boxes[-1] if boxes and "<think>" not in tail else None

def is_correct(response: str, answer: str | float | list) -> bool:
    """True if the boxed answer has the value and the structure of `answer`, or of any in a list."""
    reply, golds = extract_answer(response), answer if type(answer) in (list, tuple) else [answer]
    return reply is not None and any(_same(str(gold), reply) for gold in golds if gold is not None)

# ==== Models and data ====
@contextmanager
def reading(what):
    """Whatever a library raises about somebody's files becomes one line that names them."""
    try:
        yield
    except Exception as e:
        cause = [*str(e).strip().splitlines(), type(e).__name__][0]
        raise e if isinstance(e, UserError) else UserError(f"cannot use {what}: {cause}") from None

def load_model(name, dtype=torch.float32):
    """A causal language model, in fp32 unless asked, and its tokenizer, from hub or folder."""
    with reading(f"model {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, output_loading_info=True)
        frozen = not all(p.requires_grad for p in model.parameters())
        refuse_if(frozen or report["missing_keys"], f"model {name}: weights are missing or frozen")
    return model, tokenizer

def load_rows(path, name, split):
    """Rows of a file, of FOLDER/SPLIT.jsonl or of a data set; numbers in text stay as written."""
    with reading(f"data {path}"):
        file = Path(path, f"{split}.jsonl") if Path(path).is_dir() else Path(path)
        if not file.is_file():
            return list(datasets.load_dataset(str(path), name, split=split))
        text = file.read_text(encoding="utf-8-sig").strip()
        if file.suffix.lower() == ".csv":
            return list(csv.DictReader(io.StringIO(text), strict=True))  # [None]: fields too many
        text = text if text[:1] == "[" else "[" + re.sub(r"(\S[ \t]*)\n", r"\1,\n", text) + "]"
        rows = json.loads(text, parse_int=str, parse_float=str)
        return [row if isinstance(row, dict) else {} for row in rows]

def read_column(row, column):
    """The texts at a place such as prompt[0].content, of a chat all it says; None: no such place"""
    with suppress(LookupError, TypeError, ValueError):
        for key in re.findall(r"[^.\[\]]+", column):
            row = row[int(key) if isinstance(row, list) else key]
        cells = row if isinstance(row, list) else [row]
        cells = [x["content"] if isinstance(x, dict) else x for x in cells]
        return [str(x) for x in cells if x == x and x is not None and {x}]  # {[]}: a TypeError

def load_problems(tokenizer, config, path, split, least=1):
    """Dicts of problem, answer (GSM8K: after ####), prompt_ids, opening ("<think>" or nothing)."""
    rows, problems, skipped = load_rows(path, config.dataset_config, split), [], 0
    for number, row in enumerate(rows, 1):
        asked = [read_column(row, column) for column in config.problem_column.split("+")]
        text = "" if None in asked else "\n".join(x for cells in asked for x in cells)
        gold = [x.split("####")[-1].strip() for x in read_column(row, config.answer_column) or []]
        prompt = text + SUFFIX * (SUFFIX.strip() not in text)  # some hold it already
        with reading(f"{path}, row {number}"):
            if tokenizer.chat_template:  # it writes BOS itself
                prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}],
                                                       add_generation_prompt=True, tokenize=False)
            ids = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template).input_ids
        if text.strip() and any(gold) and len(ids) <= config.max_prompt_tokens and None not in row:
            problems.append({"problem": text, "answer": gold if gold[1:] else gold[0],
                             "prompt_ids": ids, "opening": "<think>" * ("<think>" in prompt[-9:])})
        else:
            skipped = skipped or number
    found = f"{path}: {len(problems)} usable rows of {len(rows)}"
    refuse_if(len(problems) < least, f"{found}; {least} needed: set --prompts, --answer_column, "
              f"--problem_column or --max_prompt_tokens; columns: {[*rows[0]] if rows else 0}")
    if skipped:
        tqdm.write(f"{found}; row {skipped} lacks problem or answer, is too long or malformed")
    return problems

# ==== The run's folder ====
LOGS = "metrics.jsonl", "samples.jsonl"
SHOWN = "reward mixed cut_off entropy response_length s_positive s_negative seconds pass@1".split()

def read_checkpoint(folder, **how):
    with reading(file := Path(folder, "checkpoint.pt")):
        refuse_if(not file.is_file() or zipfile.ZipFile(file).testzip(), f"{file}: no whole run")
        saved = torch.load(file, "cpu", weights_only=True, **how)
        saved["settings"] = {str(k): str(v) for k, v in saved["settings"].items() if v is not None}
        return {key: saved[key] for key in ("step", "settings", "data", "logs", "model", "adam")}

class Run(ExitStack):
    """A run's folder: two logs, checkpoint.pt with all it takes to go on, and in the end model/."""
    def __init__(self, config):
        super().__init__()
        self.config, self.path, self.signal = config, Path(config.output_dir), 0
        self.path.mkdir(parents=True, exist_ok=True)
        old = {p.name for p in self.path.iterdir() if p.lstat().st_size} - {".checkpoint.pt"}
        refuse_if(old and not config.resume, f"{self.path} not empty: --resume or --output_dir NEW")
        with reading(f"{self.path}, perhaps in use by another run"):
            self.enter_context(FileLock(self.path / ".lock", timeout=0))
        for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}:
            if signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                self.callback(signal.signal, number, signal.signal(number, self.stop))

    def stop(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one ends it at once
        go_on = shlex.join([sys.executable, __file__, "--resume", "--output_dir", str(self.path)])
        sys.stderr.write(f"\nStopping. Go on with: cd {shlex.quote(os.getcwd())} && {go_on}\n")

    def restore(self, model, problems):
        """AdamW for a model; both, and the logs, as the checkpoint has them, if there is one."""
        self.data = zlib.crc32(json.dumps([[p["problem"], p["answer"]] for p in problems]).encode())
        with reading(f"{self.path / 'checkpoint.pt'} with this --model"):
            self.last = last = read_checkpoint(self.path) if self.config.resume else {"step": 0}
            refuse_if(last["step"] > self.config.steps, f"the run has done {last['step']} --steps")
            refuse_if(self.data != last.get("data", self.data), f"{self.path}: another --dataset")
            self.callback((self.path / ".checkpoint.pt").unlink, missing_ok=True)(missing_ok=True)
            model.load_state_dict(last.pop("model", model.state_dict()))
            optimizer = make_optimizer(model, self.config)
            optimizer.load_state_dict(optimizer.state_dict() | {"state": last.pop("adam", {})})
            for p, x in optimizer.state.items():  # a RuntimeError where shapes differ
                x["step"].view(()), x["exp_avg"].view_as(p), x["exp_avg_sq"].view_as(p)
            for name in LOGS:
                (self.path / name).write_text(last["logs"][name] if self.config.resume else "")
        tqdm.write(f"{model.num_parameters():,} weights on {model.device}, 28 bytes each on disk")
        return optimizer

    def log(self, step, row, batch):
        """Append a step to metrics.jsonl and its first group to samples.jsonl; show the step."""
        row = {"step": step} | {k: float(v) for k, v in row.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}  # JSON has no NaN
        p, texts, labels = (batch[k][0] for k in ("problems", "texts", "labels"))
        sample = {"step": step} | p | {"texts": texts, "labels": labels.int().tolist()}
        for name, line in zip(LOGS, (finite, sample)):
            with (self.path / name).open("a") as file:
                file.write(json.dumps(line) + "\n")
        if step % 20 == 1 or step == self.last["step"] + 1:
            end = time.localtime(time.time() + (self.config.steps - step) * row["seconds"])
            tqdm.write(time.strftime("\nEnds about %a %H:%M. ", end) + f"{p['problem'][:200]!r} -> "
                       f"{texts[0][-200:]!r} labelled {labels[0]:d}\nstep {' '.join(SHOWN)}")
        numbers = [f"{row[k]:{len(k)}.{3 if row[k] < 999 else 5}g}" for k in SHOWN if k in row]
        note = " no mixed group: too hard, too easy or a wrong --answer_column" * (not row["mixed"])
        note += " half is cut off: raise --max_new_tokens" * (row["cut_off"] >= 0.5)
        note += " updates were not finite: lower --lr" * (row["skipped"] > 0)
        tqdm.write(f"{step:4} {' '.join(numbers)}{note}")

    def save(self, step, model, optimizer):
        """checkpoint.pt: written aside, then in one move, so that it is whole or as it was."""
        file, part = self.path / "checkpoint.pt", self.path / ".checkpoint.pt"
        fp32 = dict(zip(model.parameters(), optimizer.param_groups[0]["params"]))
        state = {k: fp32.get(x, x).detach() for k, x in model.state_dict(keep_vars=True).items()}
        logs = {name: (self.path / name).read_text() for name in LOGS}
        saved = {"step": step, "settings": asdict(self.config), "data": self.data, "logs": logs}
        with reading(f"{file} of {12e-9 * model.num_parameters():.2g} GB, is the disk full?"):
            torch.save(saved | {"model": state, "adam": optimizer.state_dict()["state"]}, part)
            getattr(os, "sync", int)()  # on the disk before it gets its name
            part.replace(file)

    def finish(self, model, tokenizer):
        """Write the model as other tools load it. Returns the log's last row."""
        with reading(self.path / "model"):
            model.save_pretrained(self.path / "model")
            tokenizer.save_pretrained(self.path / "model")
        rows = [json.loads(line) for line in (self.path / LOGS[0]).open()]
        if rows[-1]["step"] < self.config.steps:  # a signal
            raise SystemExit(128 + self.signal)
        if "pass@1_before" in rows[0] and "pass@1" in rows[-1]:
            tqdm.write(f"Pass@1 {rows[0]['pass@1_before']:.2f} -> {rows[-1]['pass@1']:.2f} "
                       f"in {sum(row['seconds'] for row in rows):.0f} s")
        return rows[-1]

# ==== Command line ====
def parse(argv=None):
    """The configuration a command line asks for: flags over a run's settings over a preset's."""
    parser = HfArgumentParser(Config, description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, help="named settings; flags override them")
    args = parser.parse_args(argv)
    saved = read_checkpoint(args.output_dir, mmap=True)["settings"] if args.resume else {}
    parser.set_defaults(**PRESETS[args.preset or "tiny"] | saved | {"output_dir": args.output_dir})
    args = parser.parse_args(argv)
    refuse_if({args.model, args.dataset} != {TINY} and not (args.preset or args.resume),
              f"another --model or --dataset needs a --preset: {', '.join(PRESETS)}")
    return Config(**{f.name: getattr(args, f.name) for f in fields(Config)})

def write(stream, text):
    """Print. Where nobody reads any more (`| head`, a closed terminal), end as by a signal."""
    with suppress(OSError):
        return io.TextIOWrapper.write(stream, text)
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    signal.raise_signal(signal.SIGTERM)

@contextmanager
def one_line_errors():
    """Bad input ends in one line and exit code 2; a defect of ours shows its traceback."""
    for stream in {sys.__stdout__, sys.__stderr__} - {None}:
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
        stream.write = partial(write, stream)
    try:
        yield
    except Exception as e:
        full = isinstance(e, MemoryError) or "allocate" in str(e)  # as torch says
        if not full and not isinstance(e, (UserError, OSError)):
            raise
        flag = "--slots" if "in sample\n" in traceback.format_exc() else "--micro_batch_tokens"
        advice = f"out of memory: lower {flag} or take --low_memory true; " * full
        print(f"{Path(sys.argv[0]).name}: error: {advice}{repr(str(e))[1:-1]}", file=sys.stderr)
        sys.exit(2)

if __name__ == "__main__":
    with one_line_errors():
        train(parse())
