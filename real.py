"""Rewards as Labels (REAL), arXiv 2602.05630, in one file: train a language model with the anchored REAL loss.

Sample G answers to a question, let a maths checker label each right or wrong, then treat those labels as
the classes of a classifier whose logit is how much the policy has moved towards the answer: push the right
ones above 0 and the wrong ones below.

    python real.py                         # the embedded tiny model, about a minute on 2 CPU cores
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

Where this differs from the paper as printed: the README lists it. In short: a group that is all right or all wrong
contributes nothing, as in the authors' released code (`--as_printed true` uses every group), and logits are divided by
the sampling temperature both when sampling and inside log-probabilities.
"""

import copy
import hashlib
import inspect
import json
import math
import operator as op
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from fractions import Fraction
from functools import partial, wraps
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import yaml
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

HERE = Path(__file__).parent
PYTHON = "python" if sys.prefix == sys.base_prefix else os.path.relpath(sys.executable)  # for the hints we print
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))  # of torchrun
SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."  # follows every problem

class UserError(ValueError):
    """Bad input, said in one line that names the flag, file or row and what to do. The command line exits with 2."""

# ==== Configuration ==================================================================================================

def arg(default, help):
    """A field of Config. A rule such as "(> 0)" in the help text is also enforced."""
    return field(default=default, metadata={"help": help})

@dataclass(frozen=True)
class Config:
    """All settings of a run; the command line is made from it. Defaults train the embedded model."""

    model: str = arg(str(HERE / "tiny"), "Hugging Face model id or folder")
    dataset: str = arg(str(HERE / "tiny"), "training problems: hub id, folder, or .json .jsonl .csv .parquet file")
    dataset_config: str | None = arg(None, "configuration of the data set, where the hub asks for one")
    split: str = arg("train", "split to train on (a single file has no splits)")
    problem_column: str = arg("problem", "column of the question, also prompt[0].content or context+question")
    answer_column: str = arg("answer", "column of the answer, or of a list of accepted answers")
    objective: str = arg("real", "the loss, one of OBJECTIVES")
    tau: float = arg(0.5, "temperature of the REAL losses (> 0), Sec. 5.1")
    as_printed: bool = arg(False, "let all-right and all-wrong groups contribute too, as Eq. 8 is printed")
    kl_ref: float = arg(0.0, "weight of a KL term to the starting model, any objective (>= 0), Sec. 5.3")
    kl_old: float = arg(0.0, "weight of a KL term to the old policy, any objective (>= 0), Sec. 5.3")
    prompts: int = arg(16, "questions per step, Q (>= 1); paper: 128")
    group_size: int = arg(8, "rollouts per question, G (>= 2) (<= 1024), Sec. 5.1")
    mini_batches: int = arg(4, "updates per step, each on prompts / mini_batches whole groups (>= 1), Sec. 5.1")
    steps: int = arg(80, "training steps (>= 1); paper: 1,400")
    lr: float = arg(5e-5, "AdamW learning rate (> 0) (<= 1); paper: 2e-6")
    warmup: int = arg(20, "updates over which the learning rate rises (>= 0); released code: 0")
    weight_decay: float = arg(0.01, "AdamW weight decay (>= 0), Sec. 5.1")
    beta2: float = arg(0.95, "AdamW decay of the second moment (> 0) (< 1); released code: 0.999")
    grad_clip: float = arg(1.0, "largest norm of a gradient (> 0), released code")
    temperature: float = arg(1.0, "for sampling and inside log-probabilities (> 0); paper: 0.6")
    max_prompt_tokens: int = arg(1024, "longer prompts are skipped (>= 1), released code")
    max_new_tokens: int = arg(48, "longest rollout (>= 1); paper: 8,192")
    micro_batch_tokens: int = arg(4096, "tokens per forward pass (>= 1); changes memory, not the gradient")
    low_memory: bool = arg(False, "bfloat16 and recomputed activations on the GPU, fp32 weights and moments on the CPU")
    offload_gradients: bool = arg(False, "with low_memory: gather gradients on the CPU too; slower, least GPU memory")
    eval_dataset: str | None = arg(str(HERE / "tiny"), "held-out problems with the same columns")
    eval_split: str = arg("test", "split to validate on")
    eval_every: int = arg(20, "steps between validations, also one before and one after (>= 0); 0: none")
    eval_samples: int = arg(16, "samples per validation problem (>= 1), Sec. 5.1")
    eval_limit: int = arg(256, "validation problems used (>= 1)")
    seed: int = arg(0, "the random numbers of a step depend on (seed, step, process) alone (>= 0) (<= 1000000)")
    save_every: int = arg(50, "steps between checkpoints (>= 1)")
    keep: int = arg(2, "checkpoints kept (>= 1)")
    output_dir: str | None = arg(None, "the run's own folder; default runs/MODEL-OBJECTIVE-seedN")
    resume: bool = arg(False, "go on with the run found in output_dir")

    def __post_init__(self):
        holds = {">": op.gt, ">=": op.ge, "<": op.lt, "<=": op.le}
        for f in fields(self):
            value, rules = getattr(self, f.name), re.findall(r"\(([<>]=?) (\S+)\)", f.metadata["help"])
            number = type(value) is int or type(value) is float and f.type is float and math.isfinite(value)
            if rules and not (number and all(holds[sign](value, float(x)) for sign, x in rules)):
                rule = " and ".join(map(" ".join, rules))
                raise UserError(f"--{f.name} must be finite and {rule}, for example {f.default}; it is {value}")
        if self.prompts % self.mini_batches:
            raise UserError(f"--mini_batches {self.mini_batches} does not divide --prompts {self.prompts} (they "
                            f"hold whole groups); try --mini_batches {math.gcd(self.prompts, self.mini_batches)}")
        if self.offload_gradients and not self.low_memory:
            raise UserError("--offload_gradients true needs --low_memory true, which keeps the fp32 weights on the CPU")
        if self.objective not in OBJECTIVES:
            raise UserError(f"--objective {self.objective} is unknown; choose one of {', '.join(OBJECTIVES)}")

    @property
    def run(self):
        """The run's folder."""
        return Path(self.output_dir or Path("runs") / f"{Path(self.model).name}-{self.objective}-seed{self.seed}")

    @property
    def hyperparameters(self):
        """Those of the loss settings that this objective takes."""
        taken = inspect.signature(OBJECTIVES[self.objective]).parameters
        return {name: getattr(self, name) for name in ("tau", "as_printed") if name in taken}

    @property
    def needs_reference(self):
        """Whether the loss looks at the starting model, which is then held as a second, frozen copy."""
        return self.kl_ref > 0 or "beta" in inspect.signature(OBJECTIVES[self.objective]).parameters

PAPER = dict(  # Sec. 5.1 and the released code
    model="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", dataset="agentica-org/DeepScaleR-Preview-Dataset",
    eval_dataset="HuggingFaceH4/aime_2024", eval_split="train", eval_samples=8, prompts=128, steps=1400, lr=2e-6,
    warmup=0, beta2=0.999, temperature=0.6, max_new_tokens=8192, micro_batch_tokens=16384, low_memory=True, save_every=5)
PRESETS = {
    "tiny": {},
    "1.5b-12gb": PAPER | dict(max_new_tokens=4096, micro_batch_tokens=10240, offload_gradients=True),
    "1.5b-16gb": PAPER | dict(micro_batch_tokens=9216),
    "1.5b": PAPER,  # on 24 GB and more
    "7b": PAPER | dict(model="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", lr=1e-6, steps=1000),
}

# ==== Labels: r(o | q) of Algorithm 1, a checker made of regular expressions ========================================

# An answer is normalised, split into its structure (list, tuple, interval, matrix), and each entry evaluated
# in exact fractions; equal forms are equal answers. A name (pi, x, apple) is a random fraction, a root its
# first 400 digits: sqrt(12) - 2 sqrt(3) rounds to 0. What does not parse is text. The caps bound the work.
MAX_RESPONSE, MAX_ANSWER, MAX_OPEN, MAX_BITS, DIGITS, SCALE = 100_000, 600, 50, 20_000, 300, 10**400
UNIT = (r"(?:(?:square|sq|cubic) )?(?:[cdkm]m|[km]g|ft|in|lbs|mph|inch(?:es)?|foot|feet|people|(?:unit|yard"
        r"|mile|pound|ounce|dollar|cent|degree|radian|sec|second|min|minute|hr|hour|day|week|month|year|way"
        r"|point|student|(?:centi|milli|kilo)?(?:meter|metre|liter|gram))s?)")
UNITS = rf"{UNIT}(?: ?(?:/|per)? ?(?:{UNIT}|[mhs]))?"  # cm, km/h, miles per hour
TEXT = r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt|normal)|[mhf]box|boxed|operatorname) ?"
SYMBOLS = {"−": "-", "–": "-", "×": "*", "·": "*", "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ",
           "±": r"\pm ", "°": "@degr", "∪": r"\cup ", r"\{": "⦃", r"\}": "⦄", "@": "?"}  # \{ as one character

def _unit(match: re.Match) -> str:
    """A unit becomes @name (m, s or N only inside \\text{}); \\text{} of anything else is unwrapped."""
    is_unit = re.fullmatch(UNITS + "|[mgshLNJWVAKC](?:/[a-z]+)?", match[1].strip())
    return "@" + re.sub("[^a-z]", "", match[1].lower()).rstrip("es") if is_unit else f" {match[1]} "

REWRITES = [(re.compile(pattern.replace("§", "(?![A-Za-z])")), new) for pattern, new in [  # §: no letter here
    (r"\\begin\{[pb]matrix\}", "[("), (r"(\\\\\s*)?\\end\{[pb]matrix\}", ")]"), (r"\\\\", "),("), ("&", ","),
    ("|".join(map(re.escape, SYMBOLS)), lambda m: SYMBOLS[m[0]]),
    ("[⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + m[0].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) + "}"),
    (r"(?<=\d)(?:,?\\!|\\,|\{,\})\s*(?=\d{3}(?!\d))", ""),  # thousands: 10,\!080  10\,080  10{,}080
    (r"\\\$ ?([\d,.]*\d)", r"\1@dollar"), (r"\\?[$€£]|\\[()\[\]]", " "),  # \$5, $..$, \(..\), \[..\]
    (r"(\\([!,;:> ]|(left|right|displaystyle|q?quad)§)|~|\s)+", " "), (r"\\?%|\bpercent§", "@percent"),
    (TEXT + r"\{([^{}]*)\}", _unit), (TEXT + r"(?=\{)", ""), (rf"(?<=[\d)}}]) ?({UNITS})§", _unit),
    (r"\^ ?(\\circ|{ ?\\circ ?})", "@degr"), (r"\*\*", "^"), (r"\\([lg])eq§", r"\\\1e"), (r"\\approx§", "="),
    (r"(?<![\d,.])\d{1,3}(,\d{3})+(?![\d,])(?=[^)\]⦄]*$)", lambda m: m[0].replace(",", "")),  # not (1,234)
    (r"\\(times|cdot)§|(?<=\d) ?x ?(?=10 ?\^)", "*"), (r"\\[dtc]frac", r"\\frac"), (r"^ *[a-z] ?\\in§", ""),
    (r"(?<![A-Za-z\\])(and|or)§", ","), (r"(?<![A-Za-z\\])(sqrt|pi|infty|sin|cos|tan|log|ln)§", r"\\\1"),
    (r"\\sqrt ?(\d+)", r"\\sqrt{\1}"), (r"(\\frac) ?(\d)", r"\1{\2}"), (r"(\\frac ?{[^{}]*})(\d)", r"\1{\2}"),
    (r"(?<=\d)E(?=[+-]?\d)", "e"), (r"(?<=\d) ?\\frac ?{(\d+)} ?{(\d+)}", r" \1/\2"),
    (r"(?<![\w.}/*^])(\d+) (\d+/\d+)(?!\.?\d)", r"(\1+\2)"), (r"(?<=[A-Za-z]{2}) (?=[A-Za-z]{2})", ""),
    (r"(?<![A-Za-z\\@])[A-Za-z]{2,}", lambda m: m[0].lower()), (r"^ +|[ .,;:]+$", "")]]  # words ignore case
NAME = r"@[a-z]*|\d+_(?:\d+|{\d+})|\\(?:pi|infty)(?![a-z])|(?:[A-Za-z]{2,}(?! ?\^)|[A-Za-z])(?:_\w|_{\w+})?"
TOKEN = re.compile(NAME + r"|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?|\\(?:frac|sqrt)(?![A-Za-z])|[^\s¦]")
FREE = re.compile(r"(?<![\\A-Za-z])(?![ei](?![A-Za-z]))[A-Za-z@]|\\infty")  # a name other than pi, e, i
REPLY_LHS = r"(?=[^=]*[A-Za-z])([_^(]{?\d+|[^\d=,;]|\([A-Za-z]+(, ?[A-Za-z]+)+\))+="  # f(2) =, AB + AC =
GOLD_LHS = r"(\\?[A-Za-z]+(_{?\w+}?)?( ?\([A-Za-z, ]*\))?|\([A-Za-z, ]+\)) *="  # x =, f(x) =, but not a + b =

def _power(base: Fraction, k: Fraction) -> Fraction:
    if k.denominator > 1 or (base.numerator * base.denominator).bit_length() * abs(k) > MAX_BITS:
        raise ValueError("not a small integer power")
    return base ** int(k)

APPLY = {"+": (1, op.add), "-": (1, op.sub), "*": (2, op.mul), "/": (2, op.truediv), "^": (3, _power)}

def _evaluate(tokens: list[str], level: int = 0) -> Fraction:
    """Precedence climbing over a reversed token list; ValueError for what is not a number."""
    token = tokens.pop()
    if token in ("+", "-"):
        value = _evaluate(tokens, max(level, 1)) * (1 if token == "+" else -1)
    elif token in ("(", "{"):
        value, _ = _evaluate(tokens), tokens.pop()  # brackets are balanced already
    elif token == r"\frac":
        value = _evaluate(tokens, 3) / _evaluate(tokens, 3)
    elif token == r"\sqrt":
        value = Fraction(math.isqrt(int(_evaluate(tokens, 3) * SCALE**2)), SCALE)
    elif re.fullmatch(NAME, token):  # the same name, the same fraction
        value = Fraction(random.Random(re.sub("[{}]", "", token)).getrandbits(200), 10**60 + 7)
    else:
        value = Fraction(token)
    while tokens[-1] not in ("", ")", "}") and APPLY.get(tokens[-1], APPLY["*"])[0] > level:
        if (re.match(r"\.?\d", tokens[-1]) or value == 0 and tokens[-1] not in APPLY
                or (value.numerator * value.denominator).bit_length() > MAX_BITS):
            raise ValueError("two numbers side by side are two answers, 0 maybe is not 0; or too large")
        precedence, apply = APPLY[tokens.pop() if tokens[-1] in APPLY else "*"]
        value = apply(value, _evaluate(tokens, precedence))
    return value

def _split(text: str, *marks: str) -> list[str]:
    """Split outside all brackets; nothing comes back where a bracket closes that was not opened."""
    parts, depth = [""], 0
    for token in re.findall("|".join(map(re.escape, marks)) + "|.", text):
        depth += (token in "([{⦃") - (token in ")]}⦄")
        if depth < 0:
            return []
        parts[-1:] = [parts[-1], ""] if depth == 0 and token in marks else [parts[-1] + token]
    return [part.strip() for part in parts if part.strip()]

def _canonical(text: str) -> tuple:
    """A hashable form of a normalised answer; equal forms are equal answers."""
    items = [part.replace(r"\pm", sign) for part in _split(text, ",", ";")
             for sign in ("+-" if r"\pm" in part.split("⦃")[0] else "+")]
    for kind, parts in (("list", items), ("union", _split(text, r"\cup")), ("equal", _split(text, "="))):
        if len(parts) > 1:
            forms = Counter(map(_canonical, parts))  # without order; and 2 + 3 = 5 is 5
            return (kind, frozenset(forms.items())) if kind == "list" or len(forms) > 1 else next(iter(forms))
    pair, inside = text[:1] + text[-1:], _split(text[1:-1], ",", ";")
    if inside and pair in ("{}", "⦃⦄"):
        return _canonical(text[1:-1].strip())
    if len(inside) > 1 and pair in ("()", "[]", "(]", "[)"):  # (2,251,252) is a triple
        return pair, *map(_canonical, inside)
    try:  # with free names, a bag of terms: 2x + 3 is 3 + 2x, but to expand or to collect would be algebra
        terms = _split(re.sub(r"(?<!\^)(?=[+-])", "¦", text), "¦") if FREE.search(text) else items
        return "value", *sorted(round(_evaluate(["", *TOKEN.findall(t)[::-1]]), DIGITS) for t in terms or "?")
    except (ValueError, IndexError, ZeroDivisionError, RecursionError):
        return "text", re.sub(r"(?<!\d) | (?!\d)", "", text)

def _same(gold: str, reply: str) -> bool:
    if gold == reply or len(gold + reply) > MAX_ANSWER or len(re.findall(r"[([{]", gold + reply)) > MAX_OPEN:
        return gold.strip() == reply.strip() != ""
    for pattern, new in REWRITES:
        gold, reply = pattern.sub(new, gold), pattern.sub(new, reply)
    if ("=" in gold) != ("=" in reply):  # one of them says x =
        gold, reply = [text.replace(lhs[0], "").strip() if (lhs := re.match(pattern, text)) else text
                       for text, pattern in ((gold, GOLD_LHS), (reply, REPLY_LHS))]
    readings = [reply]
    if ("@" in gold) != ("@" in reply):  # one of them has a unit
        gold, reply = sorted((gold, reply), key=lambda text: "@" in text)
        bare = re.sub(r"@[a-z]*( ?\^ ?(\d|{-?\d}))?", " ", reply).strip()
        readings = [bare, reply.replace("@percent", "/100")]
    return gold != "" and _canonical(gold) in map(_canonical, readings)

def extract_answer(response: str) -> str | None:
    r"""Content of the \boxed{} or \fbox{} that closes last, after the last </think>; None if there is none.

    A <think> that is never closed gives None; without think tags the whole response is read. Where the prompt
    ends in <think> (R1-style chat templates), pass "<think>" + completion: then a missing </think> counts.
    >>> extract_answer(r"<think> \boxed{1}? </think> It is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    tail, opened, answer = response.rpartition("</think>")[2], [], None
    tail = "" if "<think>" in tail else tail[-MAX_RESPONSE:]
    for match in re.finditer(r"(\\(?:boxed|fbox)\s*)?\{|\\.|\}", tail):
        if match[0] == "}" and opened and (start := opened.pop()):
            answer = tail[start:match.start()]
        elif match[0][-1] == "{" and match[0] != r"\{":
            opened.append(match.end() if match[1] else 0)  # 0: a brace, not a box
    return answer

def is_correct(response: str, answer: str | int | float | list) -> bool:
    r"""True if the boxed answer has the value and the structure of `answer`, or of any one in a list of them.

    >>> is_correct(r"So \boxed{x = 0.5}.", r"\frac12"), is_correct(r"\boxed{5 \text{ or } 6}", 5)
    (True, False)
    """
    reply, golds = extract_answer(response), answer if isinstance(answer, (list, tuple)) else [answer]
    return reply is not None and any(_same(str(gold), reply) for gold in golds if gold is not None)

# ==== Objectives ======================================================================================================
# Pure functions (logp, old_logp, mask, labels, *, ref_logp=None, hyperparameters) -> scalar loss; they never see a
# model. To add one: write the function, name it in OBJECTIVES.

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
    """REAL: the mean over questions of L_+ (Eq. 6) plus L_- (Eq. 7), which is Eq. 8. Without anchor (Sec. 4.2): Eq. 2."""
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

def real_bce(logp, old_logp, mask, labels, *, ref_logp=None, tau=0.5, as_printed=False):
    """REAL with binary cross-entropy, Eq. 11: each rollout classified by itself."""
    z = s_bar(logp, old_logp, mask) / tau
    loss = F.binary_cross_entropy_with_logits(z, labels.to(z.dtype), reduction="none")
    if as_printed:
        return loss.sum(-1).mean()
    mixed = is_mixed(labels)[:, None].expand_as(loss)
    return torch.where(mixed, loss, 0.0).sum() / mixed.sum().clamp(min=1)

def clipped(s, labels, eps_low, eps_high):
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) per token (Q, G, T), with rho = e^s and the advantage
    A = (r - mean) / std of each group (unbiased std), Sec. 2.1."""
    r = labels.to(s.dtype)
    advantage = ((r - r.mean(-1, keepdim=True)) / (r.std(-1, keepdim=True) + 1e-6))[..., None]  # (Q, G, 1)
    rho = s.clamp(-20, 20).exp()
    return -torch.minimum(rho * advantage, rho.clamp(1 - eps_low, 1 + eps_high) * advantage)

def k3(logp, other_logp, mask):
    """Unbiased, non-negative estimate of KL(pi || pi_other) per token: e^d - d - 1, d = log pi_other - log pi."""
    d = log_ratio(other_logp, logp, mask).clamp(-20, 20)
    return d.exp() - d - 1

def kl(logp, other_logp, mask):
    """k3, mean over tokens, then over rollouts; a term that any objective can take (Sec. 5.3)."""
    return token_mean(k3(logp, other_logp, mask), mask).mean()

def grpo(logp, old_logp, mask, labels, *, ref_logp=None, eps_low=0.2, eps_high=0.2, beta=0.001, drop=False):
    """GRPO, Eq. 1: clipped policy gradient, token mean per rollout, then mean over rollouts; KL if `ref_logp`."""
    loss = clipped(log_ratio(logp, old_logp, mask), labels, eps_low, eps_high)
    if drop:  # Fig. 2's ablation: without any token whose ratio has left the interval, in right and wrong rollouts
        rho = log_ratio(logp, old_logp, mask).detach().exp()
        loss = torch.where((rho >= 1 - eps_low) & (rho <= 1 + eps_high), loss, 0.0)
    loss = token_mean(loss, mask).mean()
    return loss if ref_logp is None else loss + beta * kl(logp, ref_logp, mask)

def dapo(logp, old_logp, mask, labels, *, ref_logp=None, eps_low=0.2, eps_high=0.28):
    """DAPO: clip-higher, and one mean over all tokens of the mini-batch. No dynamic sampling."""
    loss = clipped(log_ratio(logp, old_logp, mask), labels, eps_low, eps_high)
    return torch.where(mask, loss, 0.0).sum() / mask.sum().clamp(min=1)

def gspo(logp, old_logp, mask, labels, *, ref_logp=None, eps_low=3e-4, eps_high=4e-4):
    """GSPO: the ratio of a whole rollout, e^s_bar, clipped; its gradient spread over tokens."""
    s = s_bar(logp, old_logp, mask).detach()[..., None] + (logp - logp.detach())  # value s_bar, gradient of log pi_t
    loss = clipped(s.clamp(max=10), labels, eps_low, eps_high)
    return token_mean(loss, mask).mean()

def trpa(logp, old_logp, mask, labels, *, ref_logp=None, beta=0.1):
    """TRPA (arXiv 2504.04524): prefer each right rollout to each wrong one, against the reference; small KL to old."""
    h = token_mean(log_ratio(logp, ref_logp, mask), mask)  # (Q, G)
    pair = labels.bool()[:, :, None] & ~labels.bool()[:, None, :]  # (Q, G, G): row right, column wrong
    loss = -F.logsigmoid(2.5 * beta * (h[:, :, None] - h[:, None, :]))
    loss = torch.where(pair, loss, 0.0).sum((1, 2)) / pair.sum((1, 2)).clamp(min=1)
    kl_old = torch.where(mask, k3(logp, old_logp, mask).clamp(max=10), 0.0).sum() / mask.sum().clamp(min=1)
    return loss.mean() + 0.001 * kl_old

OBJECTIVES = {f.__name__: f for f in (real, real_bce, grpo, dapo, gspo, trpa)} | {
    "real_no_anchor": partial(real, anchor=False), "grpo_bidirectional": partial(grpo, drop=True)}

def credit(logp, batch, config):
    """The loss and its derivative by every log-probability: how hard each token of each rollout is pushed.

    Returns the scalar loss and dL/dlogp (Q, G, T), a minus sign meaning "make it likelier". Its size is Eq. 9 (with
    Eq. 10) over |o| and Q for REAL, Eq. 3 for GRPO: the whole difference between methods is in this tensor.
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

# ==== Log-probabilities ==============================================================================================

SHORT = 512  # tokens; in a batch without longer sequences the rollouts of a question share their prompt

def micro_batches(batch, rows, config):
    """Lists of rollouts of similar length, at most `micro_batch_tokens` tokens each once padded (or a single one).

    Every process gets its share of the lists; the sum over processes is then what one process would compute.
    """
    lengths, parts = batch["lengths"], [[]]
    if lengths.max() <= SHORT:  # whole groups side by side, so that they can share their prompt
        lengths = lengths.amax(-1, keepdim=True).expand_as(lengths)
    lengths = lengths.flatten().tolist()
    for row in sorted(rows, key=lengths.__getitem__):
        if parts[-1] and (len(parts[-1]) + 1) * lengths[row] > config.micro_batch_tokens:
            parts.append([])
        parts[-1].append(row)
    return [sorted(part) for part in parts[RANK::WORLD] if part]

def head_logprobs(hidden, targets, head, temperature):
    """Hidden states (n, H), next tokens (n,) -> their log-probability (n,), and entropy (n,) if no graph is kept."""
    logp = (head(hidden).float() / temperature).log_softmax(-1)  # (n, vocabulary)
    entropy = None if torch.is_grad_enabled() else -(logp.exp() * logp).sum(-1)
    return logp.gather(-1, targets[:, None])[:, 0], entropy

def token_logprobs(model, batch, rows, config):
    """log pi_theta(o_t | q, o_<t) of some rollouts, (len(rows), T), and the entropy; 0 outside the mask.

    `rows`, in rising order, counts rollouts through all groups, 0 to Q*G - 1. Short rollouts of one question stand in
    one sequence behind their common prompt, like the branches of a tree: each attends to the prompt and to itself. The
    logits of all tokens never exist together: the LM head takes 1,024 at a time, and again in the backward pass.
    """
    model.train(torch.is_grad_enabled())  # transformers recomputes activations in training mode only
    group_size, T = batch["mask"].shape[1:]
    ids, mask = (batch[k].view(-1, T)[rows] for k in ("completions", "mask"))
    c, trees = model.config, {}
    shared = (batch["lengths"].max() <= SHORT and c.model_type in ("qwen2", "qwen3", "llama")
              and not getattr(c, "sliding_window", None) and c._attn_implementation == "sdpa")  # others ignore the mask
    for i, row in enumerate(rows):
        trees.setdefault(row // group_size if shared else row, []).append(i)
    tokens, branch, position, before = [], [], [], []
    for members in trees.values():
        prompt = batch["prompts"][rows[members[0]] // group_size].to(ids.device)
        row, t = mask[members].nonzero(as_tuple=True)
        n, count = len(prompt), torch.arange(len(prompt) + len(row), device=ids.device)
        tokens.append(torch.cat([prompt, ids[members][row, t]]))
        branch.append(torch.cat([torch.zeros_like(prompt), row + 1]))
        position.append(torch.cat([count[:n], n + t]))
        before.append(torch.where(t == 0, n, count[n:]) - 1)  # what predicts token t stands before it
    tokens, branch, position = (pad_sequence(x, batch_first=True) for x in (tokens, branch, position))
    attend = None  # plain causal attention, positions 0, 1, ...: no real token sees the padding on the right
    if len(trees) < len(rows):
        attend = ((branch[:, :, None] == branch[:, None]) | (branch[:, None] == 0)).tril()[:, None]
    position = None if attend is None else position
    hidden = model.base_model(input_ids=tokens, attention_mask=attend, position_ids=position, use_cache=False)[0]
    # Not h[b]: b repeats indices, and in the backward pass of indexing the threads add in any order.
    hidden = torch.cat([F.embedding(b, h) for h, b in zip(hidden, before)])  # (n, H)
    head = model.get_output_embeddings()
    chunks = [checkpoint(head_logprobs, h, o, head, config.temperature, use_reentrant=False)
              for h, o in zip(hidden.split(1024), ids[mask].split(1024))]
    zeros = torch.zeros(mask.shape, device=ids.device)
    return [zeros.masked_scatter(mask, torch.cat(c)) if c[0] is not None else None for c in zip(*chunks)]

@torch.no_grad()
def all_logprobs(model, batch, config):
    """log pi_theta and entropy of every rollout of a batch, (Q, G, T) each, without a graph."""
    shape = batch["mask"].shape
    logp, entropy = both = torch.zeros((2, shape[0] * shape[1], shape[2]), device=batch["mask"].device)
    for rows in micro_batches(batch, range(len(logp)), config):
        logp[rows], entropy[rows] = token_logprobs(model, batch, rows, config)
    if WORLD > 1:
        dist.all_reduce(both)
    return logp.view(shape), entropy.view(shape)

# ==== Rollouts =======================================================================================================

@torch.no_grad()
def sample(model, prompts, group_size, ends, max_new_tokens, temperature, top_p=1.0):
    """Draw `group_size` rollouts of each prompt: o_t ~ pi(. | q, o_<t), token by token, until one of `ends`.

    prompts: Q vectors of token ids. Returns ids and mask, (Q, G, T); the mask is true up to the first end token,
    inclusive. Temperature 0 takes the likeliest token. A prompt is read once for its whole group, and rollouts that
    have ended leave the batch: nearly twice as fast as `generate` on the embedded model (tests/benchmark.py).
    """
    model.eval()
    device, rows = model.device, torch.arange(len(prompts) * group_size, device=model.device)  # rows: still running
    ids = pad_sequence(prompts, batch_first=True, padding_side="left").to(device)
    attend = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left").to(device)
    position = (attend.cumsum(-1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=attend, position_ids=position, use_cache=True, logits_to_keep=1)
    if not out.logits.isfinite().all():
        raise UserError("the model's logits are not finite, its weights are ruined; start again with a lower --lr")
    cache = out.past_key_values
    cache.batch_repeat_interleave(group_size)
    attend, position, logits = (x.repeat_interleave(group_size, 0)
                                for x in (attend, position[:, -1:], out.logits[:, -1]))
    tokens = torch.zeros((len(rows), max_new_tokens), dtype=torch.long, device=device)
    mask = torch.zeros((len(rows), max_new_tokens), dtype=torch.bool, device=device)
    running, ends = torch.ones(len(rows), dtype=torch.bool, device=device), torch.tensor(ends, device=device)
    for t in range(max_new_tokens):
        p = (logits.float() / max(temperature, 1e-6)).softmax(-1)
        if top_p < 1:  # keep the fewest tokens that hold this much probability
            p, order = p.sort(-1, descending=True)
            p = torch.zeros_like(p).scatter(-1, order, p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0))
        token = torch.multinomial(p, 1)[:, 0] if temperature > 0 else logits.argmax(-1)
        tokens[rows[running], t], mask[rows[running], t] = token[running], True
        running &= ~torch.isin(token, ends)
        if t + 1 == max_new_tokens or not running.any():
            break
        if running.float().mean() < 0.75:
            cache.batch_select_indices(running.nonzero()[:, 0])
            rows, attend, position, token, running = (x[running] for x in (rows, attend, position, token, running))
        attend, position = F.pad(attend, (0, 1), value=1), position + 1
        logits = model(input_ids=token[:, None], attention_mask=attend, position_ids=position,
                       past_key_values=cache, use_cache=True).logits[:, -1]
    return [x[:, : t + 1].view(len(prompts), group_size, -1) for x in (tokens, mask)]

def rollouts(model, tokenizer, problems, group_size, max_new_tokens, temperature, top_p=1.0):
    """A group of rollouts of each problem and their labels, as a batch: a dict whose values all have length Q.

    Every process samples its share of the groups and gets the batch of all. On a GPU, as many groups are sampled at a
    time as the free memory can hold the key-value cache of.
    """
    own, c, rows, device = problems[RANK::WORLD], model.config, 1024, model.device
    ends = model.generation_config.eos_token_id
    ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        free = min(free, torch.cuda.get_per_process_memory_fraction() * total - torch.cuda.memory_allocated())
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        kv_heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        token = 2 * c.num_hidden_layers * kv_heads * head_dim * model.dtype.itemsize  # bytes
        longest = max(len(p["prompt_ids"]) for p in problems) + max_new_tokens
        rows = int(0.8 * free / (token * longest))
    at_once, groups = max(1, rows // group_size), []
    for i in range(0, len(own), at_once):
        prompts = [torch.tensor(p["prompt_ids"]) for p in own[i : i + at_once]]
        for p, *group in zip(own[i:], *sample(model, prompts, group_size, ends, max_new_tokens, temperature, top_p)):
            texts = [tokenizer.decode(o[m], skip_special_tokens=True) for o, m in zip(*group)]
            groups.append((texts, [is_correct(p["opening"] + text, p["answer"]) for text in texts], *group))
    if WORLD > 1:
        dist.all_gather_object(parts := [None] * WORLD, [[*g[:2], g[2].cpu().clone(), g[3].cpu().clone()] for g in groups])
        groups = [parts[i % WORLD][i // WORLD] for i in range(len(problems))]
    texts, labels, ids, mask = zip(*groups)
    T = max(m.shape[-1] for m in mask)
    ids, mask = (torch.stack([F.pad(x, (0, T - x.shape[-1])) for x in xs]).to(device) for xs in (ids, mask))  # (Q, G, T)
    prompts = [torch.tensor(p["prompt_ids"]) for p in problems]
    lengths = mask.sum(-1) + torch.tensor([[len(p)] for p in prompts], device=device)
    ended = (mask & torch.isin(ids, torch.tensor(ends, device=device))).any(-1)  # the others were cut off
    return {"problems": problems, "prompts": prompts, "completions": ids, "mask": mask, "lengths": lengths,
            "texts": list(texts), "ended": ended, "labels": torch.tensor(labels, device=device)}

def validate(model, tokenizer, problems, config):
    """Pass@1: the share of right answers among `eval_samples` rollouts of each problem."""
    torch.manual_seed(config.seed * WORLD + RANK)
    batch = rollouts(model, tokenizer, problems, config.eval_samples, config.max_new_tokens, config.temperature)
    return batch["labels"].float().mean().item()

# ==== Update and training ============================================================================================

def round_weights(model):
    """Round the parameters to bfloat16, and no buffer: rounded rotary frequencies are radians off at position 1,000."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model

def offload_gradients(model, master):
    """From now on the gradient of each weight moves to its master on the CPU as soon as a backward pass has it."""
    def move(p):
        m, grad = masters[p], p.grad.to(masters[p].device, masters[p].dtype)
        m.grad, p.grad = grad if m.grad is None else m.grad.add_(grad), None

    masters = dict(zip(model.parameters(), master.parameters()))
    for p in masters:
        p.register_post_accumulate_grad_hook(move)

def update(model, master, optimizer, batch, config, logp=None):
    """One optimizer step on a mini-batch (lines 9 and 10), exact for every objective at any micro-batch size.

    An objective couples the rollouts of a group, so it cannot be cut into micro-batches. But once its derivative by
    the log-probabilities is known (`credit`), each rollout can be differentiated by itself, by the chain rule:
    dL/dtheta = sum over tokens of dL/dlogp * dlogp/dtheta. Rollouts without credit need no backward pass at all, and
    a mini-batch without any leaves the weights alone.
    `logp`: log-probabilities under the current weights, if known already. `master`: the fp32 weights that the
    optimizer holds; `model` itself, or what its bfloat16 weights are rounded from. A loss or gradient that is not
    finite changes nothing. Returns the loss, the gradient's norm, and s_bar and |W| of each rollout.
    """
    logp = all_logprobs(model, batch, config)[0] if logp is None else logp
    loss, weight = credit(logp, batch, config)
    flat = weight.flatten(0, 1)
    used = flat.abs().sum(-1).nonzero()[:, 0].tolist()
    for rows in micro_batches(batch, used, config):
        token_logprobs(model, batch, rows, config)[0].backward(flat[rows])
    holders = list((master if config.offload_gradients else model).parameters())
    if WORLD > 1 and used:
        for p in holders:
            p.grad = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(holders, config.grad_clip).to(loss.device)
    if (loss + norm).isfinite():
        for p, m in zip(model.parameters(), master.parameters()):
            if p.grad is not None and m is not p:
                m.grad, p.grad = p.grad.to(m.device, m.dtype), None
        optimizer.step()
        for p, m in zip(model.parameters(), master.parameters()):
            p.data.copy_(m.data)
    model.zero_grad()
    master.zero_grad()
    return {"loss": loss, "grad_norm": norm, "s_bar": s_bar(logp, batch["old_logp"], batch["mask"]),
            "weight": weight.sum(-1).abs() * len(weight)}  # times Q, as the loss is a mean over questions

def train(config):
    """Algorithm 1. Returns the last row of the log. Raises UserError, or SystemExit after Ctrl-C or SIGTERM."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1:  # started by torchrun: questions and micro-batches are shared out, all else every process does alike
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=12))
    run = Run(config)
    done, folder = run.restore()
    master, tokenizer = load_model(folder or config.model)  # lines 1 and 2: pi_theta <- pi_0
    problems = load_problems(tokenizer, config, config.dataset, config.split)
    held_out = load_problems(tokenizer, config, config.eval_dataset, config.eval_split) if config.eval_every else []
    held_out = held_out[: config.eval_limit]
    # At lr 2e-6 most updates are smaller than the spacing of bfloat16 numbers: they gather in fp32, on the CPU.
    rounded = round_weights if config.low_memory else lambda model: model
    model = rounded(copy.deepcopy(master) if config.low_memory else master).to(device)
    reference = rounded(load_model(config.model)[0]).to(device) if config.needs_reference else None
    optimizer = torch.optim.AdamW(  # fused: many times as fast on the CPU (tests/benchmark.py)
        master.parameters(), config.lr, (0.9, config.beta2), weight_decay=config.weight_decay, fused=True)
    if folder:
        optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    if config.low_memory:
        model.activation_checkpointing_enable()
        for p in model.parameters():
            p.grad_dtype = torch.float32  # so that micro-batches add up without rounding
    if config.offload_gradients:
        offload_gradients(model, master)
    print(f"{config.objective} on {shown(config.model)}: {model.num_parameters():,} parameters on {device}, "
          f"{len(problems):,} problems; a step is {config.prompts} questions x {config.group_size} rollouts")
    first = {"pass@1_before": validate(model, tokenizer, held_out, config)} if held_out and not done else {}
    if first:
        print(f"Pass@1 before training: {first['pass@1_before']:.3f}")
    for step in run.steps(done + 1):  # line 3
        began = time.time()
        torch.manual_seed((config.seed * 1_000_003 + step) * WORLD + RANK)  # every process draws its own rollouts
        questions = draw(problems, step, config)  # line 4; then lines 6 and 7:
        batch = rollouts(model, tokenizer, questions, config.group_size, config.max_new_tokens, config.temperature)
        batch["old_logp"], entropy = all_logprobs(model, batch, config)  # line 5: pi_old <- pi_theta
        if reference:
            batch["ref_logp"] = all_logprobs(reference, batch, config)[0]
        results, size = [], config.prompts // config.mini_batches
        for i in range(config.mini_batches):  # line 8
            number = (step - 1) * config.mini_batches + i + 1
            optimizer.param_groups[0]["lr"] = config.lr * min(1, number / max(1, config.warmup))
            part = {k: v[i * size : (i + 1) * size] for k, v in batch.items()}
            results.append(update(model, master, optimizer, part, config, part["old_logp"] if i == 0 else None))
            run.check(step, results[-1], part)

        labels, mask, last = batch["labels"], batch["mask"], step == config.steps
        joined = {k: torch.cat([torch.atleast_1d(r[k]) for r in results]) for k in results[0]}
        s, weight = joined["s_bar"], joined["weight"]
        row = {"loss": joined["loss"].mean(), "reward": labels.float().mean(), "solved": labels.all(-1).float().mean(),
               "mixed": is_mixed(labels).float().mean(), "entropy": entropy.sum() / mask.sum(),
               "response_length": mask.sum(-1).float().mean(), "s_positive": s[labels].mean(),
               "s_negative": s[~labels].mean(), "max_weight": weight.max(), "spread_weight": weight.std(),
               "grad_norm": joined["grad_norm"].max(), **first}
        first = {}
        if held_out and (last or step % config.eval_every == 0):
            row["pass@1"] = validate(model, tokenizer, held_out, config)
        run.log(step, row | {"seconds": time.time() - began}, questions[0], batch["texts"][0], labels[0].tolist())
        if last or run.stopping() or step % config.save_every == 0:
            run.save(step, master, tokenizer, optimizer)
    return run.finish()

# Here the algorithm ends. What follows loads models and data, keeps the run's folder and reads the command line.

# ==== Model and data =================================================================================================

def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

def shown(name):
    """A hub id, or a path as one would type it here."""
    return os.path.relpath(name) if os.path.exists(name) else str(name)

def load_model(name):
    """A causal language model in fp32 and its tokenizer, from the hub or a folder. Raises UserError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # unsaid, it asks, and a "y" runs code
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        raise UserError(f"cannot load model {name}: {first_line(e)}") from e
    if tokenizer.decode(tokenizer.encode("a b", add_special_tokens=False)) != "a b":
        raise UserError(f"the tokenizer of {name} does not give back 'a b'; update transformers (>= 5.8)")
    if any(getattr(model.config, k, None) for k in ("final_logit_softcapping", "logits_scaling", "logit_scale")):
        raise UserError(f"{name} rescales its logits, which token_logprobs does not; take a Qwen or Llama model")
    return model, tokenizer

def load_rows(path, name, split):
    """Column names and rows of a .json .jsonl .csv .parquet file, a folder, or a hub data set. Raises UserError."""
    kind = Path(path).suffix.lstrip(".").replace("jsonl", "json")
    try:
        if kind in ("json", "csv", "parquet"):
            data = datasets.load_dataset(kind, data_files=str(path), split="train")
        else:
            data = datasets.load_dataset(str(path), name, split=split)
        return data.column_names, list(data)
    except (OSError, ValueError, RuntimeError, StopIteration, datasets.exceptions.DatasetsError) as e:
        lines = open(path, "rb") if str(path).endswith("jsonl") and os.path.isfile(path) else []
        for number, line in enumerate(lines, 1):
            try:
                json.loads(line)
            except ValueError as bad:
                raise UserError(f"{path}, line {number}: {first_line(bad)}; mend or remove that line") from e
        raise UserError(f"cannot load data {path}: {first_line(e.__cause__ or e)}") from e

def read_column(row, column):
    """row["prompt"][0]["content"] for the column prompt[0].content; None where there is no such place."""
    for key in re.findall(r"[^.\[\]]+", column):
        if isinstance(row, list) and key.isdecimal() and int(key) < len(row):
            row = row[int(key)]
        else:
            row = row.get(key) if isinstance(row, dict) else None
    return row

def load_problems(tokenizer, config, path, split):
    """Problems as dicts: problem, answer, prompt_ids, opening (the "<think>" that the chat template already wrote).

    Rows without a problem or an answer, and prompts over `max_prompt_tokens`, are skipped with a count.
    """
    names, rows = load_rows(path, config.dataset_config if path == config.dataset else None, split)
    for flag in ("problem_column", "answer_column"):
        for column in getattr(config, flag).split("+"):
            if re.split(r"[.\[]", column)[0] not in names:
                raise UserError(f"{path} has no column {column} but {', '.join(names)}; set --{flag}")
    problems, skipped = [], []
    for number, row in enumerate(rows, 1):
        problem = "\n".join(str(v) for c in config.problem_column.split("+") if (v := read_column(row, c)) is not None)
        answer = read_column(row, config.answer_column)
        text = problem if SUFFIX.strip() in problem else problem + SUFFIX  # some data sets hold it already
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids  # a template writes BOS itself
        empty = any(value is None or not str(value).strip() or value == [] for value in (problem, answer))
        if empty or len(ids) > config.max_prompt_tokens:
            skipped.append(number)
        else:
            opening = "<think>" if text.rstrip().endswith("<think>") else ""
            problems.append({"problem": problem, "answer": answer, "prompt_ids": ids, "opening": opening})
    if skipped:
        print(f"{path}: {len(skipped)} of {len(rows)} rows skipped (the first: row {skipped[0]}): no problem, no answer "
              f"or a prompt over --max_prompt_tokens {config.max_prompt_tokens}")
    if not problems:
        raise UserError(f"{path}: no usable row in {len(rows)}")
    return problems

def draw(problems, step, config):
    """The questions of a step (line 4). Each pass over the data is a new permutation that the seed alone decides."""
    n, chosen = len(problems), []
    if n < config.prompts:
        raise UserError(f"{config.dataset} has {n} usable problems, too few for --prompts {config.prompts}")
    for i in range((step - 1) * config.prompts, step * config.prompts):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed * 1_000_003 + i // n))
        chosen.append(problems[order[i % n]])
    return chosen

# ==== The run's folder: config.json, metrics.jsonl, samples.jsonl, checkpoint-N/ =====================================

def by_one(method):
    """Let the first process alone do it, while the others wait for its result."""
    @wraps(method)
    def call(*args):
        result = [method(*args) if RANK == 0 else None]
        if WORLD > 1:
            dist.broadcast_object_list(result)
        return result[0]
    return call

class Run:
    """A folder that one run at a time writes, and in which a checkpoint is whole or absent."""

    FREE = ("steps save_every keep eval_every micro_batch_tokens max_new_tokens low_memory offload_gradients output_dir "
            "resume").split()  # may change on resume

    def __init__(self, config):
        self.config, self.path = config, config.run
        self.signal = self.leave = self.bad = 0  # bad: updates in a row that were not finite
        self.open(config)

    @by_one
    def open(self, config):
        """Claim the folder for this run."""
        file, new, old = self.path / "config.json", asdict(config), None
        started = (self.path / "metrics.jsonl").exists() or self.checkpoints()
        if config.resume and not file.exists():
            raise UserError(f"{self.path} holds no run to resume; name its folder with --output_dir")
        try:
            old = json.loads(file.read_text()) if file.exists() else None
        except ValueError:
            pass  # not a file of ours
        ours = isinstance(old, dict) and "objective" in old
        if not ours and self.path.is_dir() and {p.name for p in self.path.iterdir()} - {".lock", ".part"}:
            raise UserError(f"{self.path} is neither empty nor the folder of a run; choose another --output_dir")
        if started and not config.resume:
            raise UserError(f"{self.path} holds a run already: --resume goes on with it, or move it out of the way")
        old = old if started else new
        changed = [f"--{k} {old.get(k)} (now {v})" for k, v in new.items() if old.get(k) != v and k not in self.FREE]
        if changed:
            raise UserError(f"{self.path} has {', '.join(changed)}; only {', '.join(self.FREE)} may change")
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except Timeout as e:
            raise UserError(f"{self.path} is in use by another run; choose another --output_dir") from e
        self.write("config.json", json.dumps(new, indent=2))

    def write(self, name, text):
        """Replace a file in one move: a kill leaves the old one or the new one."""
        (self.path / ".part").write_text(text)
        (self.path / ".part").replace(self.path / name)

    def checkpoints(self):
        """Folders of our checkpoints, oldest first; names such as checkpoint-000050-good are somebody else's."""
        return sorted(p for p in self.path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{6}", p.name))

    @by_one
    def restore(self):
        """(step, folder) of the newest whole checkpoint; (0, None) if there is none. Cuts the logs back to it."""
        step, folder, paths = 0, None, self.checkpoints()
        for path in paths:
            try:
                state = json.loads((path / "trainer.json").read_text())
                for name, digest in state["sha256"].items():
                    if sha256(path / name) != digest:
                        raise ValueError(f"{name} is damaged")
                step, folder = state["step"], path
            except OSError as e:  # it may be whole: a permission, a disk that is away
                raise UserError(f"cannot read {path}: {first_line(e)}; mend that or move it away, then --resume") from e
            except (ValueError, KeyError, TypeError) as e:
                print(f"{path}: {first_line(e)}; this checkpoint is passed over")
        if paths and not folder:
            raise UserError(f"no whole checkpoint among {', '.join(map(str, paths))}; move them away, then --resume "
                            "begins again")
        for file in filter(Path.exists, (self.path / "metrics.jsonl", self.path / "samples.jsonl")):
            whole = [x for x in file.read_text().splitlines(True) if x.endswith("}\n")]
            self.write(file.name, "".join(x for x in whole if json.loads(x)["step"] <= step))
        return step, folder

    @by_one
    def save(self, step, model, tokenizer, optimizer):
        """A checkpoint: a Hugging Face model and the optimizer. Written aside, synced to disk, then renamed."""
        part, final = self.path / ".checkpoint", self.path / f"checkpoint-{step:06d}"
        try:
            shutil.rmtree(part, ignore_errors=True)
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            torch.save(optimizer.state_dict(), part / "optimizer.pt")
            state = {"step": step, "sha256": {f.name: sha256(f) for f in part.iterdir()}}
            (part / "trainer.json").write_text(json.dumps(state))
            getattr(os, "sync", int)()
            shutil.rmtree(final, ignore_errors=True)  # a damaged one that restore() passed over
            part.rename(final)
        except (OSError, RuntimeError, SafetensorError) as e:
            raise UserError(f"cannot save {final}: {first_line(e)}; the checkpoint before it is whole") from e
        for old in [p for p in self.checkpoints() if p <= final][: -self.config.keep]:
            shutil.rmtree(old)

    def steps(self, start):
        """Count steps under a progress bar; after Ctrl-C or SIGTERM, leave when the current one is done and saved."""
        def on_signal(number, frame):
            if self.signal == number:
                os._exit(128 + number)
            self.signal = number
            tqdm.write("Stopping after this step. Once more to leave at once.")

        before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in tqdm(range(start, self.config.steps + 1), None, self.config.steps, initial=start - 1, disable=RANK > 0):
                yield step
                if self.leave:
                    tqdm.write(f"Saved. Go on with: {PYTHON} real.py --output_dir {self.path} --resume")
                    raise SystemExit(128 + self.leave)
        finally:
            for n, handler in before.items():
                signal.signal(n, handler)

    def stopping(self):
        """The number of the signal that ends the run after this step, or 0; all processes agree on it."""
        self.leave = by_one(lambda: self.signal)()
        return self.leave

    def check(self, step, result, batch):
        """Count updates in a row that were skipped because loss or gradient was not finite; the third ends the run."""
        self.bad = 0 if (result["loss"] + result["grad_norm"]).isfinite() else self.bad + 1
        if self.bad and RANK == 0:
            torch.save({k: v for k, v in batch.items() if k != "problems"}, self.path / f"not-finite-{step}.pt")
            tqdm.write(f"step {step}: loss {result['loss']:.3g}, gradient {result['grad_norm']:.3g}: skipped; its "
                       f"batch is in not-finite-{step}.pt, first question {batch['problems'][0]['problem'][:60]!r}")
        if self.bad == 3:
            raise UserError(f"three updates in a row were not finite by step {step}; --resume with a lower --lr")

    @by_one
    def log(self, step, metrics, problem, texts, labels):
        """Append a step to metrics.jsonl and its first group to samples.jsonl; show the step, and a sample at times."""
        row = {k: float(v) for k, v in metrics.items()}
        sample = {"step": step, **{k: problem[k] for k in ("problem", "answer")}, "texts": texts, "labels": labels}
        finite = {"step": step} | {k: v if math.isfinite(v) else None for k, v in row.items()}
        for name, line in (("metrics.jsonl", finite), ("samples.jsonl", sample)):
            with (self.path / name).open("a") as f:
                f.write(json.dumps(line) + "\n")
        if step % 20 == 1:
            tqdm.write(f"\n{sample['problem']}  ->  {texts[0]!r}  {'right' if labels[0] else 'wrong'}\n\n"
                       " step  reward  solved  entropy  length    s_bar+    s_bar-  max|W|  seconds  Pass@1")
        tqdm.write(("{:5} {reward:7.3f} {solved:7.3f} {entropy:8.3f} {response_length:7.1f} {s_positive:+9.4f} "
                    "{s_negative:+9.4f} {max_weight:7.3f} {seconds:8.1f}" + " {pass@1:7.3f}" * ("pass@1" in row)
                    ).format(step, **row))

    @by_one
    def finish(self):
        """Draw the log, say what the run did and what to try next; returns the last row of the log."""
        rows = [json.loads(line) for line in (self.path / "metrics.jsonl").open()]
        try:
            from matplotlib.figure import Figure
            figure = Figure(figsize=(13, 3), layout="constrained")
            panels = {"share of rollouts": "reward pass@1", "entropy (nats per token)": "entropy",
                      "response length (tokens)": "response_length", "mean score": "s_positive s_negative"}
            for axis, (title, keys) in zip(figure.subplots(1, 4), panels.items()):
                for key in keys.split():
                    points = [(r["step"], r[key]) for r in rows if r.get(key) is not None]
                    if points:
                        axis.plot(*zip(*points), "o--" if key == "pass@1" else "-", label=key)
                axis.set(title=title, xlabel="step")
                axis.legend()
            figure.savefig(self.path / "metrics.png")
        except ImportError:
            print("No picture of the log: pip install matplotlib")
        self.lock.release()
        if "pass@1" in rows[-1] and "pass@1_before" in rows[0]:
            seconds = sum(r["seconds"] for r in rows)
            print(f"Pass@1 {rows[0]['pass@1_before']:.2f} -> {rows[-1]['pass@1']:.2f} in {seconds:.0f} s of training")
        print(f"Log, samples, checkpoints and a picture: {self.path}\nNext: {PYTHON} eval.py --model "
              f"{shown(self.config.model)} {self.checkpoints()[-1]}")
        return rows[-1]

def sha256(path):
    """Hex digest of a file, which may be larger than the memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**24):
            digest.update(part)
    return digest.hexdigest()

# ==== Command line ===================================================================================================

def parse(argv=None):
    """The configuration that a command line asks for: flags over a settings file over a preset."""
    def read():
        return Config(**{k: v for k, v in vars(parser.parse_args(argv)).items() if k not in ("preset", "config")})

    parser = HfArgumentParser(Config, description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", choices=PRESETS, help="named settings; needed with another model or data set")
    parser.add_argument("--config", help="a JSON or YAML file of settings; with --resume, the run's own")
    first = parser.parse_args(argv)
    parser.set_defaults(**PRESETS[first.preset or "tiny"])
    file = Path(first.config or read().run / "config.json")
    try:
        settings = (yaml.safe_load(file.read_text()) if first.config or first.resume and file.exists() else {}) or {}
    except (OSError, yaml.YAMLError) as e:
        raise UserError(f"cannot read {file}: {first_line(e)}") from e
    if not isinstance(settings, dict):
        raise UserError(f"{file} must hold settings as NAME: VALUE")
    if unknown := set(settings) - {f.name for f in fields(Config)}:
        raise UserError(f"{file} has unknown settings: {', '.join(sorted(unknown))}")
    parser.set_defaults(**settings)
    config, tiny = read(), Config()
    other = [name for name in ("model", "dataset") if os.path.abspath(getattr(config, name)) != getattr(tiny, name)]
    said = " ".join(f"--{name} {getattr(config, name)}" for name in other)
    if other and not first.preset and len(settings) < len(fields(Config)):
        raise UserError(f"{said} would train with the embedded model's settings; say which others with --preset "
                        f"({', '.join(PRESETS)}), for example: --preset 1.5b {said}")
    if "dataset" in other and config.eval_every and config.eval_dataset == tiny.eval_dataset:
        raise UserError(f"--dataset {config.dataset} would be validated on the embedded model's problems; "
                        "name held-out ones with --eval_dataset, or say --eval_every 0")
    return config

def relief(config):
    """What to change after running out of memory, the mildest remedy first."""
    longest = config.max_prompt_tokens + config.max_new_tokens
    if config.micro_batch_tokens > longest:
        return (f"lower --micro_batch_tokens from {config.micro_batch_tokens} to "
                f"{max(longest, config.micro_batch_tokens // 2)}")
    if torch.cuda.is_available() and not (config.low_memory and config.offload_gradients):
        return "set --offload_gradients true" if config.low_memory else "set --low_memory true"
    return f"lower --max_new_tokens from {config.max_new_tokens} to {config.max_new_tokens // 2}"

def fail(message):
    """End the program with one line and exit code 2."""
    print(f"real.py: error: {message}", file=sys.stderr)
    sys.exit(2)

def main(argv=None):
    """Train as the command line says; bad input ends in one line and exit code 2."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    config = None
    if RANK > 0:  # one voice
        sys.stdout = open(os.devnull, "w")
    try:
        train(config := parse(argv))
        if WORLD > 1:
            dist.destroy_process_group()
    except (UserError, OSError) as e:  # OSError: a full disk, a folder that cannot be written
        fail(e)
    except RuntimeError as e:
        if "allocate" not in str(e):  # on the GPU "Tried to allocate", on the CPU "can't allocate memory"
            raise
        fail(f"out of memory; {relief(config)}. Checkpoints in {config.run} are whole: --resume goes on")
    except KeyboardInterrupt:  # while loading: inside the training loop, Run.steps ends the run
        sys.exit(130)

if __name__ == "__main__":
    main()
