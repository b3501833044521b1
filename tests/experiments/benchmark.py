"""Speed of a whole training step on the CPU, real.py against TRL's GRPOTrainer, measured in turn in one run.

    pip install trl
    python tests/benchmark.py             # some 3 minutes on 2 CPU cores; --quick: one short round, without TRL if absent
    python tests/benchmark.py --card 24   # on a GPU held to 24 GiB: memory and speed of the 1.5B architecture

Both train the embedded model with the GRPO objective on the same problems: 16 questions x 8 rollouts of at most 48
tokens, 4 optimizer updates a step, fp32. A step is sampling, labels, log-probabilities and updates; rounds of the two
alternate, each starts from the same weights, and its first step is not counted.

`--card` needs no download: the weights are random, the architecture is that of DeepSeek-R1-Distill-Qwen-1.5B. It
prints peak memory and speed of sampling and of one update, next to the card's own measured limits. (`--card 0` runs the
same code with a two-layer model on the CPU, to test it.)
"""

import argparse
import copy
import dataclasses
import importlib.util
import math
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import real  # noqa: E402

CONFIG = real.Config(objective="dapo", warmup=0)  # GRPO's clipped loss without a reference model, as TRL's default


def ours(steps):
    """[(seconds, completion tokens)] of each step of Algorithm 1, its parts called as `train` calls them."""
    model, tokenizer = real.load_model(CONFIG.model)
    problems = real.load_problems(tokenizer, CONFIG, CONFIG.dataset, "train")
    optimizer = torch.optim.AdamW(model.parameters(), CONFIG.lr, fused=True)
    times = []
    for step in range(1, steps + 2):
        began = time.perf_counter()
        torch.manual_seed(step)
        batch = real.rollouts(model, tokenizer, real.draw(problems, step, CONFIG), CONFIG.group_size,
                              CONFIG.max_new_tokens, CONFIG.temperature)
        batch["old_logp"], _ = real.all_logprobs(model, batch, CONFIG)
        size = CONFIG.prompts // CONFIG.mini_batches
        for i in range(CONFIG.mini_batches):
            part = {k: v[i * size : (i + 1) * size] for k, v in batch.items()}
            real.update(model, model, optimizer, part, CONFIG, part["old_logp"] if i == 0 else None)
        times.append((time.perf_counter() - began, int(batch["mask"].sum())))
    return times[1:]


def trl(steps):
    """The same from TRL's GRPOTrainer, its time taken between the ends of every fourth update."""
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = real.load_model(CONFIG.model)
    problems = real.load_problems(tokenizer, CONFIG, CONFIG.dataset, "train")
    rows = [{"prompt": tokenizer.decode(p["prompt_ids"]), "answer": p["answer"]} for p in problems]
    tokenizer.padding_side, lengths, ends = "left", [], []

    def reward(completions, answer, completion_ids, **_):
        lengths.append(sum(map(len, completion_ids)))
        return [float(real.is_correct("<think>" + c, a)) for c, a in zip(completions, answer)]

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=32, steps_per_generation=4, gradient_accumulation_steps=1,
            num_generations=8, max_completion_length=CONFIG.max_new_tokens, temperature=1.0, top_k=0, top_p=1.0,
            learning_rate=CONFIG.lr, beta=0.0, max_steps=4 * (steps + 1), save_strategy="no", report_to=[],
            logging_steps=10**6, disable_tqdm=True, bf16=False, gradient_checkpointing=False, use_cpu=True)
        trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
                              train_dataset=real.datasets.Dataset.from_list(rows), callbacks=[Clock()])
        trainer.train()
    marks = ends[3::4]
    return [(b - a, n) for a, b, n in zip(marks, marks[1:], lengths[1:])]


def sampling(repeats):
    """Seconds of real.sample and of `generate` for the same 16 x 8 rollouts, measured in turn."""
    model, tokenizer = real.load_model(CONFIG.model)
    problems = real.load_problems(tokenizer, CONFIG, CONFIG.dataset, "train")[: CONFIG.prompts]
    prompts = [torch.tensor(p["prompt_ids"]) for p in problems]
    left = dict(batch_first=True, padding_side="left")
    inputs = {"input_ids": real.pad_sequence(prompts, **left),
              "attention_mask": real.pad_sequence([torch.ones_like(p) for p in prompts], **left)}
    times = {"sample": [], "generate": []}
    for seed in range(repeats + 1):
        for name in times:
            torch.manual_seed(seed)
            began = time.perf_counter()
            if name == "sample":
                real.sample(model, prompts, 8, [tokenizer.eos_token_id], CONFIG.max_new_tokens, 1.0)
            else:
                model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=8,
                               max_new_tokens=CONFIG.max_new_tokens, pad_token_id=tokenizer.eos_token_id)
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def optimizers():
    """Ratio of AdamW's plain to its fused implementation on the CPU, 50 million weights."""
    weights = [torch.nn.Parameter(torch.randn(4000, 2500)) for _ in range(5)]
    for p in weights:
        p.grad = torch.randn_like(p)
    kinds, times = {fused: torch.optim.AdamW(weights, fused=fused) for fused in (False, True)}, {False: [], True: []}
    for _ in range(4):
        for fused, optimizer in kinds.items():
            began = time.perf_counter()
            optimizer.step()
            times[fused].append(time.perf_counter() - began)
    return statistics.median(times[False][1:]) / statistics.median(times[True][1:])


def card(gib):
    """Memory and speed of the 1.5B architecture in a preset's setting, on a GPU held to `gib` GiB."""
    device, small = ("cuda" if gib else "cpu"), not gib
    preset = {12: "1.5b-12gb", 16: "1.5b-16gb"}.get(gib, "1.5b")
    config = real.Config(**real.PRESETS[preset])
    if small:
        config = dataclasses.replace(config, max_new_tokens=64, micro_batch_tokens=512)
    size = dict(vocab_size=320, hidden_size=96, intermediate_size=256, num_hidden_layers=2) if small else dict(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28)
    architecture = transformers.Qwen2Config(**size, num_attention_heads=12, num_key_value_heads=2,
                                            tie_word_embeddings=False)
    if gib:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
        print(f"{torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB, held to {min(total / 2**30, gib):.1f}")

    def timed(function, repeats=1):
        """Seconds a call, and the peak of reserved memory in GiB, which is what the limit counts."""
        if gib:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        if gib:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / repeats, torch.cuda.max_memory_reserved() / 2**30 if gib else math.nan

    n = 256 if small else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    rate = 2 * n**3 / min(timed(lambda: a @ a, 20)[0] for _ in range(3))
    bandwidth = 2 * a.nbytes / min(timed(lambda: a.clone(), 20)[0] for _ in range(3))  # each byte is read and written
    del a
    print(f"measured limits: {rate / 1e12:.2f} TFLOP/s in bf16, {bandwidth / 1e9:.0f} GB/s")

    torch.manual_seed(0)
    master = transformers.AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    model = real.round_weights(copy.deepcopy(master)).to(device)
    model.activation_checkpointing_enable()
    for p in model.parameters():
        p.grad_dtype = torch.float32
    if config.offload_gradients:
        real.offload_gradients(model, master)
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()  # those multiplied
    heads = architecture.num_key_value_heads * architecture.hidden_size // architecture.num_attention_heads
    cache = 2 * architecture.num_hidden_layers * heads * 2  # bytes a token
    prompts, length = [torch.arange(100, 300 - i % 8) for i in range(32)], 16 if small else 1024
    print(f"preset {preset}: {weights:,} weights without the input embedding, cache {cache:,} bytes a token")

    for rows in (8, 16) if small else (64, 128, 256):
        try:
            seconds, peak = timed(lambda: real.sample(model, prompts[: rows // 8], 8, [], length, 1.0))
        except torch.OutOfMemoryError:
            print(f"sampling {rows:4} rollouts of {length}: out of memory")
            continue
        limit = bandwidth / (2 * weights + rows * cache * (200 + length / 2)) * rows
        print(f"sampling {rows:4} rollouts of {length}: {rows * length / seconds:8.0f} tokens/s, "
              f"{rows * length / seconds / limit:.0%} of the bandwidth limit, peak {peak:.1f} GiB")

    class Numbers:
        """In place of a tokenizer: these random weights never end a rollout, so each is as long as the preset allows."""
        eos_token_id, decode = None, staticmethod(lambda ids, **_: "")

    model.generation_config.eos_token_id = None
    problems = [{"prompt_ids": p.tolist(), "opening": "", "answer": "1"} for p in prompts[: 2 if small else 32]]
    seconds, peak = timed(lambda: real.rollouts(model, Numbers, problems, 8, config.max_new_tokens, 1.0))
    print(f"a step's sampling of {len(problems)} x 8 rollouts of {config.max_new_tokens}: {seconds:.0f} s, peak {peak:.1f} GiB")

    full, groups = config.max_new_tokens, 2
    mask = torch.ones((groups, 8, full), dtype=torch.bool, device=device)
    mask[:, 1::2, full // 2 :] = False  # half of the rollouts are half as long
    batch = {"prompts": prompts[:1] * groups, "completions": torch.randint(0, 300, mask.shape, device=device), "mask": mask,
             "lengths": mask.sum(-1) + len(prompts[0]), "labels": torch.arange(8, device=device).expand(groups, 8) % 2 == 0}
    tokens = int(batch["lengths"].sum())
    seconds, peak = timed(lambda: batch.update(old_logp=real.all_logprobs(model, batch, config)[0]))
    print(f"log-probabilities: {tokens / seconds:8.0f} tokens/s, {2 * weights * tokens / seconds / rate:.0%} of the matrix "
          f"rate, peak {peak:.1f} GiB")
    optimizer = torch.optim.AdamW(master.parameters(), config.lr, fused=True)
    real.update(model, master, optimizer, batch, config, batch["old_logp"])  # makes the moments
    seconds, peak = timed(lambda: real.update(model, master, optimizer, batch, config, batch["old_logp"]))
    print(f"update of {tokens:,} tokens, longest rollout {full}: {seconds:.1f} s, {tokens / seconds:.0f} tokens/s, "
          f"{6 * weights * tokens / seconds / rate:.0%} of the matrix rate (without recomputation), peak {peak:.1f} GiB")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; attention is not counted as work")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of two steps each")
    parser.add_argument("--card", type=int, metavar="GIB", help="the 1.5B architecture on a GPU held to so many GiB")
    args = parser.parse_args()
    if args.card is not None:
        return card(args.card)
    rounds, steps = (1, 2) if args.quick else (3, 10)
    transformers.utils.logging.set_verbosity_error()
    methods = {"real.py": ours} | ({"TRL": trl} if importlib.util.find_spec("trl") else {})
    found = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            found[name] += method(steps)
    speed = {}
    for name, pairs in found.items():
        seconds, speed[name] = (statistics.median(x) for x in ([s for s, _ in pairs], [n / s for s, n in pairs]))
        print(f"{name:8} {seconds:6.2f} s a step, {speed[name]:6.0f} completion tokens a second (medians of {len(pairs)})")
    if len(speed) == 2:
        print(f"ratio    {speed['real.py'] / speed['TRL']:6.2f}")
    seconds = sampling(2 if args.quick else 15)
    print(f"sampling: real.sample {seconds['sample']:.2f} s, generate {seconds['generate']:.2f} s, "
          f"ratio {seconds['generate'] / seconds['sample']:.2f}")
    if not args.quick:
        print(f"AdamW on the CPU: fused {optimizers():.1f} times as fast as plain")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
