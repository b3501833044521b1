"""Rebuild this folder from nothing: tokenizer, problems, and a small *distilled* Qwen2.

    python tiny/make.py            # about 10 minutes on 2 CPU cores; same machine, same bytes

A *teacher* here is a program that writes worked solutions. Two answer every kind of problem:
one is careful and computes step by step, one is careless and either breaks a rule of arithmetic
(left to right, brackets ignored, fractions added straight across) or rounds and guesses. The
student, a 0.8M-parameter Qwen2, is distilled from their mixture by cross-entropy, so it knows
the right
way but takes it only now and then. Moving that habit is all that reinforcement learning has to do;
what the student computes wrongly when it *is* careful remains as real, honest error.
"""

import argparse
import itertools
import json
import math
import random
import time
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."
BOS, EOS, USER, ASSISTANT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<｜User｜>{{ m['content'] }}"
    "{% else %}<｜Assistant｜>{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
CAREFUL = {
    "sum": 0.45,
    "brackets": 0.40,
    "difference": 0.35,
    "fraction": 0.30,
}  # share of careful solutions


def draw_problem(rng):
    """One random problem: (kind, numbers, text, exact answer)."""
    kind = rng.choice(list(CAREFUL))
    if kind == "fraction":
        a, b, c, d = (rng.randint(1, 9), rng.randint(2, 9), rng.randint(1, 9), rng.randint(2, 9))
        return kind, (a, b, c, d), f"{a}/{b}+{c}/{d}", Fraction(a, b) + Fraction(c, d)
    a, b, c = rng.randint(11, 99), rng.randint(2, 9), rng.randint(2, 9)
    if kind == "brackets":
        a = rng.randint(11, 39)
        return kind, (a, b, c), f"({a}+{b})*{c}", Fraction((a + b) * c)
    if kind == "sum":
        return kind, (a, b, c), f"{a}+{b}*{c}", Fraction(a + b * c)
    return kind, (a, b, c), f"{a}-{b}*{c}", Fraction(a - b * c)


def careful(kind, n):
    """The right way: (lines of work, boxed answer)."""
    if kind == "fraction":
        a, b, c, d = n
        lines = [
            f"{a}*{d}={a * d}",
            f"{c}*{b}={c * b}",
            f"{a * d}+{c * b}={a * d + c * b}",
            f"{b}*{d}={b * d}",
        ]
        return lines, f"\\frac{{{a * d + c * b}}}{{{b * d}}}"
    a, b, c = n
    if kind == "brackets":
        return [f"{a}+{b}={a + b}", f"{a + b}*{c}={(a + b) * c}"], f"{(a + b) * c}"
    sign, value = ("+", a + b * c) if kind == "sum" else ("-", a - b * c)
    return [f"{b}*{c}={b * c}", f"{a}{sign}{b * c}={value}"], f"{value}"


def careless(kind, n, rng):
    """A broken rule, or a guess from rounded numbers."""
    if kind == "fraction":
        a, b, c, d = n
        if rng.random() < 0.5:
            return [f"{a}+{c}={a + c}", f"{b}+{d}={b + d}"], f"\\frac{{{a + c}}}{{{b + d}}}"
        return ["about"], f"{round(a / b) + round(c / d)}"
    a, b, c = n
    if rng.random() < 0.5:
        if kind == "brackets":
            return [f"{b}*{c}={b * c}", f"{a}+{b * c}={a + b * c}"], f"{a + b * c}"
        sign, first = ("+", a + b) if kind == "sum" else ("-", a - b)
        return [f"{a}{sign}{b}={first}", f"{first}*{c}={first * c}"], f"{first * c}"
    a = round(a, -1)
    return ["about"], str(
        {"sum": a + b * c, "brackets": (a + b) * c, "difference": a - b * c}[kind]
    )


def solution(kind, numbers, rng):
    """What a teacher drawn at random writes after `<think>\\n`."""
    lines, box = (
        careful(kind, numbers) if rng.random() < CAREFUL[kind] else careless(kind, numbers, rng)
    )
    return "\n".join(lines) + f"\n</think>\n\\boxed{{{box}}}"


def make_tokenizer(texts):
    """Byte-level BPE with Qwen2's splitting rule: any text round-trips, digits stand alone."""
    bpe = Qwen2Tokenizer()._tokenizer  # the class brings the rule; the merges are learned here
    trainer = trainers.BpeTrainer(
        vocab_size=378,
        show_progress=False,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(m) for m in learned["merges"]],
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
        model_max_length=4096,
    )
    tokenizer.add_tokens([USER, ASSISTANT], special_tokens=True)
    tokenizer.add_tokens(
        ["<think>", "</think>"]
    )  # part of the text, as in DeepSeek-R1: decode keeps them
    return tokenizer


def pairs(rng, seen):
    """Endless (prompt text, teacher's solution) on problems of neither training nor test file."""
    while True:
        kind, numbers, problem, _ = draw_problem(rng)
        if problem not in seen:
            yield problem + SUFFIX, solution(kind, numbers, rng)


def distil(model, tokenizer, source, steps, lr, batch=64, seconds=math.inf):
    """Minimise the solutions' cross-entropy: Muon for matrices, AdamW else, cosine to 1%."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.1),
    ]
    warmup, began = min(100, max(1, steps // 10)), time.time()

    def share(step):
        return min(
            (step + 1) / warmup, 0.01 + 0.99 * (1 + math.cos(math.pi * min(step / steps, 1))) / 2
        )

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, share) for o in optimizers]
    bar = tqdm(range(steps), desc="distil")
    for _ in bar:
        examples = []
        for problem, answer in itertools.islice(source, batch):
            chat = [{"role": "user", "content": problem}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            examples.append(
                [tokenizer(x, add_special_tokens=False).input_ids for x in (prompt, answer + EOS)]
            )
        ids = pad_sequence([torch.tensor(p + t) for p, t in examples], batch_first=True)
        labels = pad_sequence([torch.tensor([-100] * len(p) + t) for p, t in examples], True, -100)
        logits = model(ids, use_cache=False).logits[
            :, :-1
        ]  # right padding needs no mask under causal attention
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for step in (o.step for o in optimizers + schedules):
            step()
        model.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if time.time() - began > seconds:
            break


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(2)
    rng, seen = random.Random(0), set()
    for name, size in {"test": 256, "train": 4096}.items():
        with (args.output_dir / f"{name}.jsonl").open("w") as f:
            rows = 0
            while rows < size:
                kind, _, problem, answer = draw_problem(rng)
                if problem not in seen:
                    seen.add(problem)
                    f.write(
                        json.dumps({"problem": problem, "answer": str(answer), "kind": kind}) + "\n"
                    )
                    rows += 1
    source = pairs(rng, seen)
    tokenizer = make_tokenizer("".join(pair) for pair in itertools.islice(source, 5000))
    tokenizer.save_pretrained(args.output_dir)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=320,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    distil(model, tokenizer, source, args.steps, lr=2e-3)
    model.save_pretrained(args.output_dir)
    print(f"{model.num_parameters():,} parameters in {args.output_dir}")


if __name__ == "__main__":
    main()
