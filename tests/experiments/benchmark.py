"""Speed of a training step on the CPU, real.py and TRL's GRPOTrainer in turn, in one run.

    pip install trl
    python tests/experiments/benchmark.py            # some 3 minutes on 2 CPU cores
    python tests/experiments/benchmark.py --quick    # one short round, without TRL if absent
    python tests/experiments/benchmark.py --sampler mine.py    # the `sample` of another real.py

Both train the embedded model by a clipped policy gradient on the same problems: 16 questions x 8
rollouts of at most 48 tokens, 4 optimizer updates a step, fp32. A step is sampling, labels,
log-probabilities and updates; rounds of the two alternate, each starts from the same weights, and
its first step is not counted. GPUs: card.py.
"""

import argparse
import importlib.util
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import real  # noqa: E402

CONFIG = real.Config(objective="dapo", warmup=0)  # TRL's default loss


def ours(steps):
    """[(seconds, completion tokens)] of each step, its parts called as `train` does."""
    model, tokenizer = real.load_model(CONFIG.model)
    problems = real.load_problems(tokenizer, CONFIG, CONFIG.dataset, "train")
    optimizer, size = real.make_optimizer(model, CONFIG), CONFIG.prompts // CONFIG.mini_batches
    times = []
    for step in range(1, steps + 2):
        began = time.perf_counter()
        torch.manual_seed(step)
        questions = real.draw(problems, step, CONFIG)
        batch = real.rollouts(model, tokenizer, questions, CONFIG.group_size, CONFIG)
        parts = [{k: v[i : i + size] for k, v in batch.items()}
                 for i in range(0, CONFIG.prompts, size)]
        with torch.no_grad():
            for part in parts:
                part["old_logp"] = real.all_logprobs(model, part, CONFIG)
        for part in parts:
            real.update(model, optimizer, part, CONFIG)
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
            output_dir=folder, per_device_train_batch_size=32, steps_per_generation=4,
            gradient_accumulation_steps=1, num_generations=8, temperature=1.0, top_k=0, top_p=1.0,
            max_completion_length=CONFIG.max_new_tokens, learning_rate=CONFIG.lr, beta=0.0,
            max_steps=4 * (steps + 1), save_strategy="no", report_to=[], logging_steps=10**6,
            disable_tqdm=True, bf16=False, gradient_checkpointing=False, use_cpu=True)
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
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
                ends = [tokenizer.eos_token_id]
                real.sample(model, prompts, 8, ends, CONFIG.max_new_tokens, 1.0)
            else:
                model.generate(**inputs, do_sample=True, top_k=0, num_return_sequences=8,
                               max_new_tokens=CONFIG.max_new_tokens, pad_token_id=ends[0])
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def samplers(file):
    """Print CPU seconds of another file's `sample` over ours, in turn: 16 x 8 rollouts that end
    where the model ends them, and rollouts that never end, of three lengths. One thread."""
    spec = importlib.util.spec_from_file_location("other", file)
    other = importlib.util.module_from_spec(spec)
    sys.modules["other"] = other  # dataclasses look there
    spec.loader.exec_module(other)
    torch.set_num_threads(1)
    model, tokenizer = real.load_model(CONFIG.model)
    problems = real.load_problems(tokenizer, CONFIG, CONFIG.dataset, "train")[: CONFIG.prompts]
    prompts = [torch.tensor(p["prompt_ids"]) for p in problems]
    never = len(tokenizer)  # an id that no token has
    for tokens, end, rounds in ((48, tokenizer.eos_token_id, 15), (48, never, 15), (512, never, 5),
                                (1024, never, 5)):
        ratios = []
        for seed in range(rounds):
            seconds = []
            for module in (other, real):
                torch.manual_seed(seed)
                began = time.process_time()
                module.sample(model, prompts, 8, [end], tokens, 1.0)
                seconds.append(time.process_time() - began)
            ratios.append(seconds[0] / seconds[1])
        print(f"{tokens:5} tokens{'' if end == never else ', or to the end':16} theirs / ours: "
              f"{statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")


def optimizers():
    """Ratio of AdamW's plain to its fused implementation on the CPU, 50 million weights."""
    weights = [torch.nn.Parameter(torch.randn(4000, 2500)) for _ in range(5)]
    for p in weights:
        p.grad = torch.randn_like(p)
    kinds = {fused: torch.optim.AdamW(weights, fused=fused) for fused in (False, True)}
    times = {False: [], True: []}
    for _ in range(4):
        for fused, optimizer in kinds.items():
            began = time.perf_counter()
            optimizer.step()
            times[fused].append(time.perf_counter() - began)
    return statistics.median(times[False][1:]) / statistics.median(times[True][1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of two steps each")
    parser.add_argument("--sampler", metavar="FILE", help="compare its `sample` with ours")
    args = parser.parse_args()
    if args.sampler:
        return samplers(args.sampler)
    rounds, steps = (1, 2) if args.quick else (3, 10)
    transformers.utils.logging.set_verbosity_error()
    methods = {"real.py": ours} | ({"TRL": trl} if importlib.util.find_spec("trl") else {})
    found = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            found[name] += method(steps)
    speed = {}
    for name, pairs in found.items():
        seconds = statistics.median(s for s, _ in pairs)
        speed[name] = statistics.median(n / s for s, n in pairs)
        print(f"{name:8} {seconds:6.2f} s a step, {speed[name]:6.0f} completion tokens a second "
              f"(medians of {len(pairs)})")
    if len(speed) == 2:
        print(f"ratio    {speed['real.py'] / speed['TRL']:6.2f}")
    seconds = sampling(2 if args.quick else 15)
    print(f"sampling: real.sample {seconds['sample']:.2f} s, generate {seconds['generate']:.2f} s, "
          f"ratio {seconds['generate'] / seconds['sample']:.2f}")
    if not args.quick:
        print(f"AdamW on the CPU: fused {optimizers():.1f} times as fast as plain")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
