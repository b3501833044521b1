"""Score models on maths benchmarks by the paper's protocol: Pass@1 over 16 samples of each problem.

    python eval.py                                      # the embedded model, its held-out problems
    python eval.py --model tiny runs/real/model
    python eval.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --benchmarks all

Prompts, sampling and checker are real.py's. Completions are written to --output_dir as soon as
--batch problems are done; the same command goes on after an interruption, to the same table.
"""

import argparse
import json
import math
import os
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from statistics import fmean, stdev

import torch
from pandas import DataFrame
from tqdm import tqdm

import real

COLUMNS = "dataset", "dataset_config", "split", "problem_column", "answer_column"
BENCHMARKS = {
    "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
    "aime25": ("math-ai/aime25", None, "test", "problem", "answer"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "amc23": ("AI-MO/aimo-validation-amc", None, "train", "problem", "answer"),
    "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiad": (
        "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "context+question", "final_answer"),
    "tiny": (real.TINY, None, "test", "problem", "answer"),
}

def load_benchmark(name, model, tokenizer, args):
    """Problems, shortest prompt first, and the most tokens of a sample for which there are
    positions. `name` is one of those above, a file or a hub data set."""
    given = vars(args) | dict(zip(COLUMNS, BENCHMARKS.get(name, (name,))))
    names = *COLUMNS, "max_prompt_tokens", "max_new_tokens", "slots", "seed"
    config = real.Config(model=model.name_or_path, **{k: given[k] for k in names})
    problems = real.load_problems(tokenizer, config, config.dataset, config.split)[: args.limit]
    problems.sort(key=lambda p: len(p["prompt_ids"]))
    room = getattr(model.config, "max_position_embeddings", math.inf)
    room = min(args.max_new_tokens, room - len(problems[-1]["prompt_ids"]))
    real.check_model(model, tokenizer, problems, replace(config, max_new_tokens=room))
    return problems, room

def saved(file, settings):
    """The rows of a completions file that was made with the same settings."""
    with real.reading(f"{file} (delete it, or choose another --output_dir)"):
        first, _, rows = file.read_text().partition("\n")
        first = json.loads(first)
        if first["crc"] != zlib.crc32(rows.encode()):
            raise ValueError("it is damaged")
        if changed := [k for k in settings if first.get(k) != settings[k]]:
            raise ValueError(f"it was made with another {', '.join(changed)}")
        return [json.loads(row) for row in rows.splitlines()]

def write(file, text):
    """Aside, then in one move: no file is ever half written."""
    Path(f"{file}.part").write_text(text)
    os.replace(f"{file}.part", file)

def nucleus(logits, temperature, top_p):
    """real.next_token among the fewest tokens that hold top_p; at temperature 0, the likeliest."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    p, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0).gather(-1, order.argsort(-1))
    return real.next_token(p.log(), 1.0)

def complete(model, tokenizer, problems, file, settings):
    """Sample and grade all problems into a file, going on from what it holds. Returns its rows."""
    rows = saved(file, settings) if file.exists() else []
    config = argparse.Namespace(**settings)
    choose = partial(nucleus, top_p=config.top_p)
    for start in tqdm(range(len(rows), len(problems), config.batch), desc=config.benchmarks):
        torch.manual_seed(config.seed * 1_000_003 + start)  # resumed or not, the same draws
        chosen = problems[start : start + config.batch]
        batch = real.rollouts(model, tokenizer, chosen, config.samples, config, choose=choose)
        numbers = batch["labels"], batch["ended"], batch["mask"].sum(-1)
        rows += [{"problem": p["problem"], "answer": p["answer"], "labels": labels, "ended": ended,
                  "lengths": lengths, "texts": [p["opening"] + text for text in texts]}
                 for p, texts, labels, ended, lengths in zip(
                     chosen, batch["texts"], *(x.tolist() for x in numbers))]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write(file, json.dumps(settings | {"crc": zlib.crc32(text.encode())}) + "\n" + text)
    return rows

def pass_at_k(labels, k):
    """Chance that one of k of n samples is right, c of which are: 1 - C(n-c, k) / C(n, k)."""
    return 1 - math.comb(len(labels) - sum(labels), k) / math.comb(len(labels), k)

def majority_vote(texts, labels):
    """Whether the most frequent answer is right; what the checker holds equal is one answer."""
    answers = [real.extract_answer(text) for text in texts]
    counts = Counter(answer for answer in answers if answer)
    votes = {a: sum(n for b, n in counts.items() if real.is_correct(f"\\boxed{{{a}}}", b))
             for a in counts}
    return labels[answers.index(max(votes, key=votes.get))] if votes else False

def interval(values):
    """Half a 95% interval of the mean. A problem is the unit: its samples are not independent."""
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
        line = {"model": os.path.relpath(model) if os.path.exists(model) else model}
        details += [line | {"benchmark": name} | s for name, s in found.items()]
        for name, s in found.items():
            line[name] = shown(s["pass@1"], s["ci95"])
            first, own = baseline[name]["per_problem"], s["per_problem"]
            change = [own[p] - first[p] for p in own if p in first]  # paired: the same problems
            if found is not baseline and change:
                line[name] += f" ({shown(fmean(change), interval(change), '+')})"
        lines.append(line | {"Avg.": f"{fmean(s['pass@1'] for s in found.values()):.3f}"})
    tables = DataFrame(lines), DataFrame(details).drop(columns=["ci95", "per_problem"])
    print("\nPass@1 ± half a 95% interval (difference to the first model)",
          *(x.to_string(index=False, float_format="%.3f") for x in tables), sep="\n")

def parse(argv=None):
    """The command line. Numbers that real.Config holds too are checked there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", nargs="+", default=[real.TINY], help="hub ids or folders; first: the baseline")
    add("--benchmarks", nargs="+", default=["tiny"],
        help=f"all (the paper's), {', '.join(BENCHMARKS)}, files or hub data sets")
    add("--samples", type=int, default=16, help="samples of a problem (paper: 16)")
    add("--limit", type=int, default=10**6, help="only the first so many problems")
    add("--temperature", type=float, default=0.6, help="paper: 0.6; 0 takes the likeliest token")
    add("--top_p", type=float, default=0.95, help="released code: 0.95")
    add("--max_new_tokens", type=int, default=8192, help="paper: 8,192")
    add("--max_prompt_tokens", type=int, default=1024, help="longer prompts are skipped")
    add("--batch", type=int, default=32, help="problems between two writes to the disk")
    add("--slots", type=int, default=64, help="samples drawn side by side; each holds a cache")
    add("--seed", type=int, default=0)
    for name, default in zip(COLUMNS[1:], BENCHMARKS["tiny"][1:]):
        add(f"--{name}", default=default, help=f"of data that is not named above; {default}")
    add("--output_dir", default="runs/eval", help="for completions, and scores.json (replaced)")
    args = parser.parse_args(argv)
    if min(args.samples, args.batch, args.limit) < 1 or not 0 <= args.temperature < 1e9:
        parser.error("--samples, --batch and --limit start at 1, --temperature at 0")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top_p must be above 0 and at most 1; it is {args.top_p}")
    return args

def evaluate(args):
    """Print the tables; completions and scores.json are in the output folder."""
    names, scores = list(BENCHMARKS)[:6] if args.benchmarks == ["all"] else args.benchmarks, {}
    for name in dict.fromkeys(args.model):
        model, tokenizer = real.load_model(name)
        bits = reduce(lambda crc, p: zlib.crc32(p.detach().contiguous().numpy(), crc),
                      model.parameters(), zlib.crc32(model.config.to_json_string().encode()))
        todo = {b: load_benchmark(b, model, tokenizer, args) for b in names}
        if torch.cuda.is_available():
            model = real.load_model(name, torch.bfloat16)[0].to("cuda")
        for benchmark, (problems, room) in todo.items():
            settings = vars(args) | dict(
                model=name, benchmarks=benchmark, output_dir="", max_new_tokens=room, weights=bits,
                precision=str(model.dtype), prompts=zlib.crc32(json.dumps(problems).encode()),
                ends=[tokenizer.eos_token_id, model.generation_config.eos_token_id])
            mark = zlib.crc32(json.dumps([name, benchmark]).encode())  # last names may coincide
            file = f"{args.output_dir}/{Path(name).name}-{Path(benchmark).name}-{mark:08x}.jsonl"
            rows = complete(model, tokenizer, problems, Path(file), settings)
            scores.setdefault(name, {})[benchmark] = score(rows)
    report(scores)
    write(f"{args.output_dir}/scores.json", json.dumps(scores, indent=1, allow_nan=False))

def main(argv=None):
    """Score as the command line says. Bad input ends in one line and exit code 2."""
    args = parse(argv)
    with real.one_line_errors():
        os.makedirs(args.output_dir, exist_ok=True)
        with real.FileLock(f"{args.output_dir}/.lock", timeout=0):  # one at a time
            return evaluate(args)

if __name__ == "__main__":
    main()
