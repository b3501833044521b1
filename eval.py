"""Score models on maths benchmarks by the paper's protocol: Pass@1 over 16 samples of each problem.

    python eval.py                                      # the embedded model, its held-out problems
    python eval.py --model tiny runs/tiny-real-seed0/checkpoint-000080
    python eval.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --benchmarks all

Prompts, sampling and checker are real.py's. Completions are written to --output_dir as soon as
--batch problems are done; the same command goes on after an interruption, to the same table.
"""

import argparse
import json
import math
import os
import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import datasets
import torch
import transformers
from pandas import DataFrame
from tqdm import tqdm

import real

BENCHMARKS = {  # name: (data set, configuration, split, problem column, answer column)
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "amc23": ("AI-MO/aimo-validation-amc", None, "train", "problem", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "context+question",
                 "final_answer"),
    "tiny": (real.TINY, None, "test", "problem", "answer"),
}
PAPER = ["aime24", "aime25", "math500", "amc23", "minerva", "olympiad"]  # the columns of Table 1

# ==== Completions =================================================================================

def load_benchmark(name, model, tokenizer, args):
    """Problems, shortest prompt first, and how many tokens a sample may have: no more than the
    model has positions for. `name` is one of those above, a file or a hub data set."""
    path, configuration, split, problem, answer = BENCHMARKS.get(name, (
        name, args.dataset_config, args.split, args.problem_column, args.answer_column))
    config = real.Config(
        dataset=path, dataset_config=configuration, problem_column=problem, answer_column=answer,
        **{k: getattr(args, k) for k in ("max_prompt_tokens", "max_new_tokens", "slots", "seed")})
    problems = real.load_problems(tokenizer, config, path, split)[: args.limit]
    problems.sort(key=lambda p: len(p["prompt_ids"]))
    room = getattr(model.config, "max_position_embeddings", math.inf)
    room = min(args.max_new_tokens, room - len(problems[-1]["prompt_ids"]))
    real.check_model(model, problems, replace(config, max_new_tokens=room))
    return problems, room

def saved(file, settings):
    """The rows of a completions file that was made with the same settings."""
    if not file.exists():
        return []
    with real.reading(f"{file} (delete it, or choose another --output_dir)"):
        first, _, rows = file.read_text().partition("\n")
        if json.loads(first)["crc"] != zlib.crc32(rows.encode()):
            raise ValueError("it is damaged")
        changed = [k for k in settings if json.loads(first).get(k) != settings[k]]
        if changed:
            raise ValueError(f"it was made with another {', '.join(changed)}")
        return [json.loads(row) for row in rows.splitlines()]

def complete(model, tokenizer, problems, file, settings):
    """Sample and grade all problems, going on from what the file holds. Returns the file's rows.

    A batch of problems has its own seed, so an evaluation goes on to the very same completions.
    """
    rows, part, config = saved(file, settings), Path(f"{file}.part"), argparse.Namespace(**settings)
    bar = tqdm(desc=config.benchmarks, unit="problem", initial=len(rows), total=len(problems))
    while len(rows) < len(problems):
        torch.manual_seed(config.seed * 1_000_003 + len(rows))
        chosen = problems[len(rows) : len(rows) + config.batch]
        batch = real.rollouts(model, tokenizer, chosen, config.samples, config, top_p=config.top_p)
        for i, problem in enumerate(chosen):
            rows.append({"problem": problem["problem"], "answer": problem["answer"],
                         "labels": batch["labels"][i].tolist(), "ended": batch["ended"][i].tolist(),
                         "lengths": batch["mask"][i].sum(-1).tolist(),
                         "texts": [problem["opening"] + text for text in batch["texts"][i]]})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(settings | {"crc": zlib.crc32(text.encode())}) + "\n" + text)
        part.replace(file)  # in one move: no file is ever half written
        bar.update(len(chosen))
    bar.close()
    return rows

# ==== Scores ======================================================================================

def pass_at_k(labels, k):
    """Chance that one of k of n samples is right, c of which are: 1 - C(n-c, k) / C(n, k)."""
    n, c = len(labels), sum(labels)
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def majority_vote(texts, labels):
    """Whether the most frequent answer is right; what the checker holds equal is one answer."""
    votes = []  # [answer, count, label]
    for text, label in zip(texts, labels):
        answer = real.extract_answer(text)
        box = f"\\boxed{{{answer}}}"
        same = next((v for v in votes if answer and real.is_correct(box, v[0])), None)
        if same:
            same[1] += 1
        elif answer:
            votes.append([answer, 1, label])
    return max(votes, key=lambda v: v[1])[2] if votes else False

def interval(values):
    """Half the width of a 95% interval of the mean, None for one problem. The problem is the unit:
    samples of one problem are not independent."""
    return 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

def score(rows):
    """All scores of one model on one benchmark."""
    n = len(rows[0]["labels"])
    shares = [fmean(row["labels"]) for row in rows]
    return {"problems": len(rows), "pass@1": fmean(shares), "ci95": interval(shares),
            **{f"pass@{k}": fmean(pass_at_k(row["labels"], k) for row in rows)
               for k in (2, 4, 8, 16, 32, 64) if k <= n},
            f"maj@{n}": fmean(majority_vote(row["texts"], row["labels"]) for row in rows),
            "length": fmean(fmean(row["lengths"]) for row in rows),
            "cut off": 1 - fmean(fmean(row["ended"]) for row in rows),
            "per_problem": {row["problem"]: share for row, share in zip(rows, shares)}}

def report(scores):
    """The table of Pass@1, then one of all scores. scores: {model: {benchmark: score}}."""
    def shown(mean, half, sign=""):
        return f"{mean:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")

    baseline, lines, details = next(iter(scores.values())), [], []
    for model, found in scores.items():
        model = os.path.relpath(model) if os.path.exists(model) else model
        lines.append({"model": model})
        for name, s in found.items():
            lines[-1][name] = shown(s["pass@1"], s["ci95"])
            first, own = baseline[name]["per_problem"], s["per_problem"]
            change = [own[p] - first[p] for p in own if p in first]  # paired: the same problems
            if found is not baseline and change:
                lines[-1][name] += f" ({shown(fmean(change), interval(change), '+')})"
            details.append({"model": model, "benchmark": name} | s)
        lines[-1]["Avg."] = f"{fmean(s['pass@1'] for s in found.values()):.3f}"
    print("\nPass@1 ± half a 95% interval (difference to the first model)")
    print(DataFrame(lines).to_string(index=False))
    details = DataFrame(details).drop(columns=["ci95", "per_problem"])
    print("\n" + details.to_string(index=False, float_format="%.3f"))

# ==== Command line ================================================================================

def parse(argv=None):
    """The command line. Numbers that real.Config holds too are checked there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", nargs="+", default=[real.TINY], help="hub ids or folders; first: the baseline")
    add("--benchmarks", nargs="+", default=["tiny"],
        help=f"all (the paper's), {', '.join(BENCHMARKS)}, files or hub data sets")
    add("--samples", type=int, default=16, help="samples of a problem (paper: 16)")
    add("--limit", type=int, help="only the first so many problems")
    add("--temperature", type=float, default=0.6, help="paper: 0.6; 0 takes the likeliest token")
    add("--top_p", type=float, default=0.95, help="released code: 0.95")
    add("--max_new_tokens", type=int, default=8192, help="paper: 8,192")
    add("--max_prompt_tokens", type=int, default=1024, help="longer prompts are skipped")
    add("--batch", type=int, default=32, help="problems between two writes to the disk")
    add("--slots", type=int, default=64, help="samples drawn side by side; each holds a cache")
    add("--seed", type=int, default=0)
    for name, default in (("dataset_config", None), ("split", "test"),
                          ("problem_column", "problem"), ("answer_column", "answer")):
        add(f"--{name}", default=default, help=f"of data not named above ({default})")
    add("--output_dir", default="runs/eval", help="folder of the completions and of scores.json")
    args = parser.parse_args(argv)
    if min(args.samples, args.batch, 1 if args.limit is None else args.limit) < 1:
        parser.error("--samples, --batch and --limit must be at least 1")
    if not (0 <= args.temperature < math.inf and 0 < args.top_p <= 1):
        parser.error("--temperature must be at least 0, and --top_p above 0 and at most 1")
    args.benchmarks = PAPER if args.benchmarks == ["all"] else args.benchmarks
    return args

def evaluate(args):
    """{model: {benchmark: score}}; the completions are on the disk."""
    scores = {}
    for name in dict.fromkeys(args.model):
        model, tokenizer = real.load_model(name)
        # tells models of one name apart: a sum of bits, exact in any order
        weights = sum(p.data.view(torch.int32).sum().item() for p in model.parameters())
        todo = {b: load_benchmark(b, model, tokenizer, args) for b in args.benchmarks}
        if torch.cuda.is_available():
            real.round_weights(model)
            model.to("cuda")
        for benchmark, (problems, room) in todo.items():
            settings = vars(args) | dict(
                model=name, benchmarks=benchmark, output_dir="", max_new_tokens=room,
                weights=weights, precision=str(model.dtype),
                prompts=zlib.crc32(json.dumps(problems).encode()),
                ends=[tokenizer.eos_token_id, model.generation_config.eos_token_id])
            slug = "--".join(re.sub(r"\W+", "_", x)[-60:].strip("_") for x in (name, benchmark))
            mark = zlib.crc32(json.dumps([name, benchmark]).encode())  # two slugs may coincide
            file = Path(args.output_dir) / f"{slug}-{mark:08x}.jsonl"
            rows = complete(model, tokenizer, problems, file, settings)
            scores.setdefault(name, {})[benchmark] = score(rows)
    return scores

def main(argv=None):
    """Score, print the tables, save scores.json. Bad input ends in one line and exit code 2."""
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # any terminal can show any name
    try:
        scores = evaluate(args)
        report(scores)
        text = json.dumps(scores, indent=1, allow_nan=False)
        return (Path(args.output_dir) / "scores.json").write_text(text)
    except (real.UserError, OSError) as e:
        error = e
    except RuntimeError as e:
        if "allocate" not in str(e):
            raise
        error = "out of memory: lower --slots or --max_new_tokens"
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)
    print(f"eval.py: error: {error}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
