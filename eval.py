"""Score models on maths benchmarks by the paper's protocol: 16 samples a problem, temperature 0.6, top-p 0.95.

    python eval.py                                               # the embedded model on its held-out problems
    python eval.py --model tiny runs/tiny-real-seed0/checkpoint-000080
    python eval.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --benchmarks all

Prompt, sampling and checker are real.py's own. Completions are written to `--output_dir` as soon as `--batch`
problems are done; the same command goes on where an earlier one was interrupted and ends with the same table.
"""

import argparse
import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from tqdm import tqdm

import real
from real import HERE, Config, UserError, is_correct

# name: (data set, configuration, split, problem columns, answer column)
BENCHMARKS = {
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "amc23": ("AI-MO/aimo-validation-amc", None, "train", "problem", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiad": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "context+question", "final_answer"),
    "tiny": (str(HERE / "tiny"), None, "test", "problem", "answer"),
}
PAPER = ["aime24", "aime25", "math500", "amc23", "minerva", "olympiad"]  # the columns of Table 1


def load_benchmark(name, tokenizer, args):
    """The problems of a benchmark named above, of a local file or of any hub data set, shortest prompt first."""
    path, config_name, split, problem, answer = BENCHMARKS.get(
        name, (name, args.dataset_config, args.split, args.problem_column, args.answer_column))
    config = replace(Config(), dataset=path, dataset_config=config_name, problem_column=problem, answer_column=answer,
                     max_prompt_tokens=args.max_prompt_tokens)
    problems = real.load_problems(tokenizer, config, path, split)[: args.limit]
    return sorted(problems, key=lambda p: len(p["prompt_ids"]))


def complete(model, tokenizer, problems, file, settings, args, label):
    """Sample and grade every problem into a JSONL file, going on from what the file holds. Returns its rows.

    A chunk of problems has its own seed, so an interrupted evaluation resumes to the very same completions.
    """
    rows = {}
    if file.exists():
        lines = [json.loads(x) for x in file.read_text().splitlines(True) if x.endswith("}\n")]
        if lines and lines[0] != settings:
            changed = ", ".join(k for k in settings if lines[0].get(k) != settings[k])
            raise UserError(f"{file} was made with another {changed}; choose another --output_dir")
        rows = {row["index"]: row for row in lines[1:]}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(x) + "\n" for x in [settings, *rows.values()]))  # without a torn last line
    part.replace(file)
    bar = tqdm(total=len(problems), desc=label, unit="problem")
    with file.open("a") as out:
        for start in range(0, len(problems), args.batch):
            chunk = problems[start : start + args.batch]
            if not all(start + i in rows for i in range(len(chunk))):
                torch.manual_seed(args.seed * 1_000_003 + start)
                batch = real.rollouts(model, tokenizer, chunk, args.samples, args.max_new_tokens, args.temperature,
                                      args.top_p)
                ends, lengths = batch["ended"], batch["mask"].sum(-1)
                for i, problem in enumerate(chunk):
                    rows[start + i] = {"index": start + i, "problem": problem["problem"], "answer": problem["answer"],
                                       "labels": batch["labels"][i].int().tolist(), "lengths": lengths[i].tolist(),
                                       "ended": ends[i].int().tolist(),
                                       "texts": [problem["opening"] + text for text in batch["texts"][i]]}
                    out.write(json.dumps(rows[start + i]) + "\n")
                out.flush()
            bar.update(len(chunk))
    bar.close()
    return [rows[i] for i in range(len(problems))]


# ==== Scores =========================================================================================================


def pass_at_k(labels, k):
    """Unbiased chance that one of k samples is right, from n >= k samples of which c are: 1 - C(n-c, k) / C(n, k)."""
    n, c = len(labels), sum(labels)
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_vote(texts, labels):
    """Whether the most frequent answer is right; answers that the checker holds equal are one answer."""
    votes = []  # [answer, count, label]
    for text, label in zip(texts, labels):
        answer = real.extract_answer(text)
        same = next((v for v in votes if answer and is_correct(f"\\boxed{{{answer}}}", v[0])), None)
        if same:
            same[1] += 1
        elif answer:
            votes.append([answer, 1, label])
    return max(votes, key=lambda v: v[1])[2] if votes else 0


def interval(per_problem):
    """Half the width of a 95% interval of the mean. The problem is the unit: samples of one are not independent."""
    n = len(per_problem)
    return 1.96 * np.std(per_problem, ddof=1) / math.sqrt(n) if n > 1 else math.nan


def score(rows):
    """All scores of one model on one benchmark."""
    samples = len(rows[0]["labels"])
    per_problem = [sum(r["labels"]) / samples for r in rows]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
    return {"problems": len(rows), "pass@1": float(np.mean(per_problem)), "ci95": float(interval(per_problem)),
            **{f"pass@{k}": float(np.mean([pass_at_k(r["labels"], k) for r in rows])) for k in ks[1:]},
            f"maj@{samples}": float(np.mean([majority_vote(r["texts"], r["labels"]) for r in rows])),
            "length": float(np.mean([r["lengths"] for r in rows])),
            "cut off": float(1 - np.mean([r["ended"] for r in rows])), "per_problem": per_problem}


def table(header, lines):
    """Print rows as an aligned Markdown table."""
    widths = [max(len(str(line[i])) for line in [header, *lines]) for i in range(len(header))]
    for line in [header, ["-" * w for w in widths], *lines]:
        print("| " + " | ".join(str(x).ljust(w) for x, w in zip(line, widths)) + " |")


def report(scores):
    """The table of Pass@1, then one of all scores. scores: {model: {benchmark: score}}."""
    models, benchmarks = list(scores), list(next(iter(scores.values())))
    lines = []
    for model in models:
        cells, first = [real.shown(model)], scores[models[0]]
        for b in benchmarks:
            s = scores[model][b]
            cells.append(f"{s['pass@1']:.3f} ± {s['ci95']:.3f}")
            if model != models[0]:
                change = np.subtract(s["per_problem"], first[b]["per_problem"])  # paired: the same problems
                cells[-1] += f" ({change.mean():+.3f} ± {interval(change):.3f})"
        mean = np.mean([s["pass@1"] for s in scores[model].values()])
        lines.append(cells + [f"{mean:.3f}"])
    print("\nPass@1 ± half a 95% interval" + (" (difference to the first model)" if len(models) > 1 else ""))
    table(["model", *map(real.shown, benchmarks), "Avg."], lines)
    keys = [k for k in scores[models[0]][benchmarks[0]] if k not in ("per_problem", "ci95")]
    digits = {"problems": 0, "length": 0}
    print()
    table(["model", "benchmark", *keys],
          [[real.shown(m), real.shown(b), *(f"{s[k]:.{digits.get(k, 3)}f}" for k in keys)]
           for m in models for b, s in scores[m].items()])


def parse(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", default=[str(HERE / "tiny")], help="hub ids or folders; the first is the baseline")
    add("--benchmarks", nargs="+", default=["tiny"], help=f"all, {', '.join(BENCHMARKS)}, any file or hub data set")
    add("--samples", type=int, default=16, help="samples per problem (paper: 16)")
    add("--limit", type=int, help="only the first so many problems")
    add("--temperature", type=float, default=0.6, help="paper: 0.6; 0 takes the likeliest token")
    add("--top_p", type=float, default=0.95, help="released code: 0.95")
    add("--max_new_tokens", type=int, default=8192, help="paper: 8,192")
    add("--max_prompt_tokens", type=int, default=1024, help="longer prompts are left out, with a count")
    add("--batch", type=int, default=32, help="problems sampled at a time")
    add("--seed", type=int, default=0)
    add("--dataset_config", help="configuration of a hub data set that is not named above")
    add("--split", default="test", help="its split")
    add("--problem_column", default="problem", help="its column of questions")
    add("--answer_column", default="answer", help="its column of answers")
    add("--output_dir", default="runs/eval", help="folder of the completions and of scores.json")
    args = parser.parse_args(argv)
    lowest = {"samples": 1, "max_new_tokens": 1, "max_prompt_tokens": 1, "batch": 1, "seed": 0, "temperature": 0}
    for name, low in lowest.items():
        if not getattr(args, name) >= low:
            parser.error(f"--{name} must be at least {low}; it is {getattr(args, name)}")
    if not 0 < args.top_p <= 1 or args.limit is not None and args.limit < 1:
        parser.error("--top_p must lie in (0, 1] and --limit be at least 1")
    args.benchmarks = PAPER if args.benchmarks == ["all"] else args.benchmarks
    return args


def main(argv=None):
    """Score, print the table, save scores.json. Bad input ends in one line and exit code 2."""
    args = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    out, scores = Path(args.output_dir), {}
    try:
        for name in args.model:
            model, tokenizer = real.load_model(name)
            if torch.cuda.is_available():
                model = real.round_weights(model).to("cuda")
            weights = sum(p.double().sum().item() for p in model.parameters())  # tells apart models of one name
            for benchmark in args.benchmarks:
                slug = "--".join(re.sub(r"[^\w.-]+", "_", str(x)).strip("_.") for x in (name, benchmark))
                problems = load_benchmark(benchmark, tokenizer, args)
                data = hashlib.sha256(json.dumps([[p["problem"], p["answer"]] for p in problems]).encode()).hexdigest()
                settings = {k: getattr(args, k) for k in ("samples", "temperature", "top_p", "max_new_tokens", "seed",
                                                          "batch", "limit", "max_prompt_tokens")} | {"weights": weights, "data": data}
                rows = complete(model.eval(), tokenizer, problems, out / f"{slug}.jsonl", settings, args, benchmark)
                scores.setdefault(name, {})[benchmark] = score(rows)
        report(scores)
        (out / "scores.json").write_text(json.dumps(scores, indent=1))
    except (UserError, OSError) as e:
        print(f"eval.py: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
