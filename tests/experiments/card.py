"""What a GPU should be asked about this project, in some ten minutes and without a download: the
weights are random, the architectures exact. The last line is one JSON object.

    python tests/experiments/card.py             # on a GPU; no card has run this yet
    python tests/experiments/card.py --dry       # the same code on the CPU, with two layers
"""

import gc
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import real  # noqa: E402

DRY = "--dry" in sys.argv[1:]
DEVICE = "cpu" if DRY else "cuda"
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size", "tie_word_embeddings")
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True), "1.5b": (1536, 8960, 28, 12, 2, 151936, False),
    "paper-7b": (3584, 18944, 28, 28, 4, 152064, False)}
SMALL = dict(max_new_tokens=12, max_prompt_tokens=20, slots=16, micro_batch_tokens=256, prompts=4,
             mini_batches=2)

class Numbers:
    """In place of a tokenizer; without an end token each rollout is as long as it may be."""
    eos_token_id, decode = None, staticmethod(lambda ids, **_: "")

def build(preset):
    """A preset's configuration, model and optimizer, made as `train` makes them."""
    config = replace(real.Config(**real.PRESETS[preset]), **SMALL if DRY else {})
    shape = (96, 256, 2, 12, 2, 320, False) if DRY else SHAPES.get(preset, SHAPES["1.5b"])
    gc.collect()  # the model before this one
    if not DRY:
        torch.cuda.set_per_process_memory_fraction(1.0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(
        **dict(zip(NAMES, shape)), max_position_embeddings=131072), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    table = 0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    model.multiplied = model.num_parameters() - table  # weights that a token is multiplied by
    return config, model, real.make_optimizer(model.to(DEVICE), config)

def timed(function, repeats=1):
    """Seconds a call, and the peak of reserved memory in GiB, which is what a cap counts."""
    if not DRY:
        torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats(), torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    if not DRY:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / repeats
    return seconds, None if DRY else torch.cuda.max_memory_reserved() / 2**30

def limits():
    """FLOP/s of a bf16 matrix product, and bytes/s of a copy, each byte read and written."""
    n = 256 if DRY else 8192
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    return {"matrix_flops": 2 * n**3 / min(timed(lambda: a @ a, 20)[0] for _ in range(3)),
            "bytes_a_second": 2 * a.nbytes / min(timed(a.clone, 20)[0] for _ in range(3))}

def embedded(found):
    """The default run, as anybody would start it."""
    with tempfile.TemporaryDirectory() as folder:
        small = dict(steps=1, eval_every=0) if DRY else {}
        row = real.train(real.Config(output_dir=folder, **small))
    return {"pass@1": row.get("pass@1"), "last_step_seconds": row["seconds"]}

def step(config, model, optimizer, questions):
    """Tokens, seconds and peaks of a step whose rollouts are all as long as they may be."""
    problem = {"prompt_ids": list(range(5, 205)), "opening": "", "answer": "1"}
    label = [i % 2 for i in range(config.group_size)]
    batches, size = [], max(1, questions // config.mini_batches)
    sampling = timed(lambda: batches.append(real.rollouts(
        model, Numbers, [problem] * questions, config.group_size, config, lambda *_: label)))
    def updates():
        for i in range(0, questions, size):
            part = {k: v[i : i + size] for k, v in batches[0].items()}
            with torch.no_grad():
                part["old_logp"] = real.all_logprobs(model, part, config)
            real.update(model, optimizer, part, config)
    updates()  # the first makes AdamW's moments
    return {"tokens": int(batches[0]["mask"].sum()) + 200 * questions * config.group_size,
            "sampling": sampling, "updates": timed(updates)}

def speed(found):
    """Tokens/s of `sample` and of `generate`, and what reading weights and cache would allow."""
    _, model, _ = build("1.5b")
    c, rows, length = model.config, {}, 4 if DRY else 256
    kept = 4 * c.num_hidden_layers * c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    for n in (64, 128, 256):  # `kept`: bytes of a token's keys and values in bf16
        ids = torch.arange(5, 205, device=DEVICE).expand(n, -1)
        least = 2 * model.multiplied + n * kept * (200 + length / 2)  # bytes read for a token
        rows[n] = {"limit": n * found["limits"]["bytes_a_second"] / least}
        for name, way in {
                "sample": lambda: real.sample(model, list(ids[::8]), 8, [], length, 1.0, slots=n),
                "generate": lambda: model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0,
                    max_new_tokens=length, pad_token_id=0)}.items():
            try:
                rows[n][name] = n * length / timed(way)[0]
            except torch.OutOfMemoryError:
                rows[n][name] = None
    return rows

@torch.no_grad()
def last_token(model, config):
    """The dearest moments of sampling: the longest prompts are read; the last token is drawn with
    all slots at work. What lies between needs less memory, and an hour."""
    cache = real.Slots(config.slots, config.max_prompt_tokens + config.max_new_tokens)
    prompt = torch.ones(config.max_prompt_tokens, dtype=torch.long, device=DEVICE)
    groups, none = config.slots // config.group_size, torch.arange(0, device=DEVICE)
    cache.refill(model.eval(), none, [prompt] * groups, config.group_size)
    cache.width = cache.columns
    cache.at = torch.full((groups * config.group_size,), cache.columns - 1, device=DEVICE)
    see = torch.arange(cache.width, device=DEVICE) <= cache.at[:, None]
    logits = model(input_ids=cache.at[:, None] * 0, position_ids=cache.at[:, None], use_cache=True,
                   attention_mask=see[:, None, None], past_key_values=cache).logits[:, -1]
    real.next_token(logits, config.temperature)

def memory(preset, found):
    """The smallest card, of 12, 16 and 24 GiB, that can do it, with its peaks; and the share of the
    matrix rate while updating, for 8 operations a weight and token (6, and 2 of old_logp)."""
    config, model, optimizer = build(preset)
    for cap in (12, 16, 24):
        if not DRY:
            total = torch.cuda.mem_get_info()[1]
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
        try:
            peak = timed(lambda: last_token(model, config))[1]
            short = replace(config, max_new_tokens=config.max_new_tokens // 4)
            row = step(short, model, optimizer, 2)  # full micro-batches, of shorter rollouts
            work = 8 * model.multiplied * row["tokens"] / row["updates"][0]
            return row | {"card": cap, "last_token_peak": peak,
                          "matrix_share": work / found["limits"]["matrix_flops"]}
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=False)
    return {"card": None}

def main():
    if not DRY and not torch.cuda.is_available():
        sys.exit("card.py: error: there is no GPU; --dry tries the same code on the CPU")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    found = {"device": "CPU" if DRY else torch.cuda.get_device_name(), "ram": ram,
             "torch": torch.__version__, "limits": limits()}
    presets = ["0.5b", "1.5b", "paper"]
    presets += ["paper-7b"] * (ram > 140)  # 122 GB of fp32 weights, gradients and moments
    questions = {"embedded": embedded, "speed": speed,
                 "0.5b_step": lambda found: step(*build("0.5b"), 4 if DRY else 16)}
    questions |= {f"memory_{k}": lambda found, k=k: memory(k, found) for k in presets}
    for name, ask in questions.items():
        began = time.perf_counter()
        found[name] = ask(found)
        print(f"{name}: {found[name]} ({time.perf_counter() - began:.0f} s)", flush=True)
    print(json.dumps(found))

if __name__ == "__main__":
    main()
