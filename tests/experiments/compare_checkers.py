"""Compare the checker of real.py with Math-Verify and with plain string normalisation.

    python tests/experiments/compare_checkers.py                       # the committed cases
    python tests/experiments/compare_checkers.py --cases FILE.jsonl  # answer, response, expected
    python tests/experiments/compare_checkers.py --write    # make the committed cases again

Math-Verify is optional (pip install math-verify), else its column is left out. Other checkers run
in a worker process with a wall-clock limit per item, since some inputs keep them busy for good.
"""

import argparse
import importlib.util
import json
import multiprocessing
import random
import re
import sys
import time
from collections import defaultdict
from math import gcd
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from real import extract_answer, is_correct

CASES = Path(__file__).with_name("compare_cases.jsonl")


# ---- the cases: golds by kind
def golds(rng: random.Random) -> dict[str, list[str]]:
    """Answers of the kinds that AIME, AMC, MATH-500, Minerva, OlympiadBench and DAPO have."""

    def n(low=2, high=99):
        return rng.randint(low, high)

    def frac():
        d = n(3, 99)
        a = rng.choice([k for k in range(1, 150) if gcd(k, d) == 1])
        return rf"\frac{{{a}}}{{{d}}}"

    def root():
        return rng.choice([2, 3, 5, 6, 7, 10, 11, 13, 15, 19, 21, 51, 66])

    def interval():
        return f"{rng.choice('([')}{n(-9, 9)},{n(10, 99)}{rng.choice(')]')}"

    makers = {
        "integer": (40, lambda: str(n(-999, 99999))),
        "padded": (10, lambda: f"{n(0, 99):03d}"),
        "float": (20, lambda: str(float(n(0, 9999)))),
        "decimal": (15, lambda: f"{n(0, 99)}.{n(1, 99):02d}"),
        "thousands": (10, lambda: rf"{n(1, 99)},\!{n(100, 999)}"),
        "fraction": (30, frac),
        "mixed": (8, lambda: rf"{n(1, 20)}\frac{{{(d := n(3, 9)) - 1}}}{{{d}}}"),
        "scientific": (
            12,
            lambda: f"{n(1, 9)}.{n(1, 9)}e{rng.choice([-34, -19, -11, -6, 5, 8, 23, 33])}",
        ),
        "radical": (15, lambda: rf"{n()}\sqrt{{{root()}}}"),
        "radical quotient": (8, lambda: rf"\frac{{{n()}\sqrt{{{root()}}}}}{{{n(101, 131)}}}"),
        "radical sum": (10, lambda: rf"{n()}+{n()}\sqrt{{{root()}}}"),
        "pi": (12, lambda: rf"{n()}\pi"),
        "pi quotient": (8, lambda: rf"\frac{{{n()}\pi}}{{{n(101, 131)}}}"),
        "complex": (8, lambda: f"{n()}+{n()}i"),
        "plus minus": (6, lambda: rf"{n()} \pm \sqrt{{{root()}}}"),
        "tuple": (12, lambda: f"({n(-20, 20)},{n(21, 60)})"),
        "triple": (8, lambda: f"({n(1, 5)},{n(100, 300)},{n(301, 999)})"),
        "interval": (12, interval),
        "half line": (6, lambda: rf"(-\infty, {n()}]"),
        "union": (6, lambda: rf"(-\infty,{n(1, 9)}) \cup ({n(10, 20)},\infty)"),
        "list": (10, lambda: f"{n(-20, 0)},{n(1, 20)},{n(21, 40)}"),
        "set": (8, lambda: rf"\{{{n(-20, 0)}, {n(1, 20)}\}}"),
        "matrix": (6, lambda: rf"\begin{{pmatrix}} {n()} & {n()} \\ {n()} & {n()} \end{{pmatrix}}"),
        "vector": (6, lambda: rf"\begin{{pmatrix}} {n()} \\ {n()} \\ {frac()} \end{{pmatrix}}"),
        "word": (
            10,
            lambda: (
                rf"\text{{{rng.choice(['even', 'odd', 'east', 'parabola', 'Monday', 'Alice'])}}}"
            ),
        ),
        "choice": (6, lambda: rf"\text{{({rng.choice('ABCDE')})}}"),
        "unit": (10, lambda: rf"{n()} \text{{ {rng.choice(['cm', 'inches', 'miles', 'cents'])}}}"),
        "degrees": (8, lambda: rf"{n()}^\circ"),
        "percent": (6, lambda: rf"{n()}\%"),
        "money": (6, lambda: rf"\${n()}.{n(10, 99)}"),
        "base": (6, lambda: f"{n(10, 66)}_{rng.choice([7, 8, 9])}"),
        "polynomial": (10, lambda: f"{n()}x^2+{n()}x-{n()}"),
        "equation": (6, lambda: f"y = {n()}x + {n()}"),
        "power": (6, lambda: f"{n(2, 9)}^{{{n(20, 60)}}}"),
    }
    return {
        kind: sorted({make() for _ in range(-(-count // 2))})
        for kind, (count, make) in makers.items()
    }


def variants(gold: str, kind: str, rng: random.Random) -> dict[str, str]:
    """The same answer, as a model may write it."""
    out = {
        "dollars": f"${gold}$",
        "spaces": f"  {gold} ",
        "period": gold + ".",
        "mathrm": rf"\mathrm{{{gold}}}"
        if kind in ("integer", "padded", "float", "decimal")
        else gold,
        "parens": rf"\({gold}\)",
        "dfrac": gold.replace(r"\frac", r"\dfrac"),
        "unicode": gold.replace("-", "−"),
        "slash": re.sub(r"^\\frac\{(\d+)\}\{(\d+)\}$", r"\1/\2", gold),
        "short root": re.sub(r"\\sqrt\{(\d)\}", r"\\sqrt\1", gold),
        "left right": re.sub(r"([)\]])$", r"\\right\1", re.sub(r"^([(\[])", r"\\left\1", gold)),
        "thin space": gold.replace(",", r",\,")
        if kind in ("tuple", "triple", "interval", "set")
        else gold,
        "times": re.sub(r"(\d)(\\sqrt|\\pi)", r"\1 \\cdot \2", gold),
    }
    if kind in ("integer", "padded", "float", "fraction", "radical", "pi", "decimal"):
        out |= {"x =": f"x = {gold}", "sum =": f"AB + AC = {gold}", "cm": rf"{gold}\text{{ cm}}"}
    if kind in ("integer", "padded"):
        out |= {
            "decimal": gold + ".0",
            "integer": str(int(gold)),
            "thousands": f"{int(gold):,}",
            "thin": f"{int(gold):,}".replace(",", r"\,"),
        }
    if kind == "float":
        out |= {"integer": str(int(float(gold)))}
    if kind == "scientific":
        m, e = gold.split("e")
        out |= {
            "times": rf"{m} \times 10^{{{e}}}",
            "star": f"{m}*10^{e}",
            "capital": f"{m}E{e}",
            "cdot": rf"{m}\cdot 10^{{{e}}}",
        }
    if kind == "mixed":
        w, a, d = map(int, re.findall(r"\d+", gold))
        out |= {"improper": rf"\frac{{{w * d + a}}}{{{d}}}", "plain": f"{w} {a}/{d}"}
    if kind == "radical":
        c, r = map(int, re.findall(r"\d+", gold))
        out |= {"under": rf"\sqrt{{{c * c * r}}}"}
    if kind in ("list", "set"):
        out |= {"reordered": re.sub(r"(-?\d+)(.*?)(-?\d+)([^\d]*)$", r"\3\2\1\4", gold)}
    if kind == "list":
        out |= {
            "and": ", ".join(gold.split(",")[:-1]) + r" \text{ and } " + gold.split(",")[-1],
            "set": rf"\{{{gold}\}}",
        }
    if kind in ("radical sum", "complex"):
        out |= {"reordered": "+".join(gold.split("+")[::-1])}
    if kind == "polynomial":
        a, b, c = re.split("[+-]", gold)
        out |= {"reordered": f"-{c} + {b}x + {a.replace('^2', '^{2}')}".replace("xx", "x")}
    if kind == "plus minus":
        out |= {"two": gold.replace(r"\pm", "+") + ", " + gold.replace(r"\pm", "-")}
    if kind == "vector" or kind == "matrix":
        out |= {"bmatrix": gold.replace("pmatrix", "bmatrix")}
    if kind in ("word", "choice"):
        inner = gold[6:-1]
        out |= {"plain": inner, "textbf": rf"\textbf{{{inner}}}", "letter": inner.strip("()")}
    if kind in ("unit", "degrees", "percent", "money"):
        out |= {"bare": re.search(r"[\d.]+", gold)[0]}
    if kind == "degrees":
        out |= {
            "word": gold.replace(r"^\circ", r"\text{ degrees}"),
            "braces": gold.replace(r"\circ", r"{\circ}"),
        }
    if kind == "equation":
        out |= {"swapped": " = ".join(gold.split(" = ")[::-1]), "right side": gold.split(" = ")[1]}
    return {name: text for name, text in out.items() if text != gold}


def wrongs(gold: str, kind: str, rng: random.Random) -> dict[str, str]:
    """Near misses, and hedges: the gold with something beside it."""
    digits = [m for m in re.finditer(r"\d+", gold)]
    out = {}
    if digits:
        m = rng.choice(digits)
        out["digit"] = gold[: m.start()] + str(int(m[0]) + rng.choice([1, 2, 10])) + gold[m.end() :]
        out["hedge or"] = rf"{gold} \text{{ or }} {out['digit']}"
        out["hedge comma"] = f"{gold}, {out['digit']}"
        out["hedge space"] = rf"{gold} \quad {out['digit']}"
    if (
        kind in ("integer", "float", "decimal", "fraction", "radical", "pi", "scientific", "money")
        and "-" not in gold
        and not re.fullmatch("[0.]+", gold)
    ):
        out |= {
            "sign": f"-{gold}",
            "hedge pm": rf"\pm {gold}",
            "hedge =": f"{out['digit']} = {gold}",
            "variable": f"{gold}x",
        }
    if kind in ("tuple", "triple"):
        out |= {
            "swapped": "(" + ",".join(gold[1:-1].split(",")[::-1]) + ")",
            "bare": gold[1:-1].replace(",", ""),
            "set": rf"\{{{gold[1:-1]}\}}",
        }
    if kind in ("interval", "half line"):
        out |= {"bracket": gold[:-1] + (")" if gold[-1] == "]" else "]")}
    if kind == "union":
        out |= {"dropped": gold.split(r" \cup ")[0]}
    if kind == "list":
        out |= {"dropped": gold.rpartition(",")[0], "extra": gold + ",12345", "tuple": f"({gold})"}
    if kind == "base":
        out |= {"base": gold.split("_")[0] + "_{10}", "bare": gold.split("_")[0]}
    if kind in ("word", "choice"):
        other = rng.choice(
            [
                w
                for w in (
                    ["A", "B", "C", "D", "E"] if kind == "choice" else ["blue", "false", "Bob"]
                )
                if w not in gold
            ]
        )
        out |= {"other": rf"\text{{{other}}}", "hedge or": rf"{gold} \text{{ or }} {other}"}
    if kind == "complex":
        out |= {"conjugate": gold.replace("+", "-")}
    if kind == "polynomial":
        out |= {"variable": gold.replace("x", "w"), "power": gold.replace("^2", "^3")}
    if kind == "radical":
        out |= {
            "index": re.sub(r"(\d+)\\sqrt", r"\\sqrt[\1]", gold),
            "root dropped": gold.split("\\")[0],
        }
    if kind == "pi":
        out |= {"pi dropped": gold.replace(r"\pi", "")}
    if kind == "unit":
        out |= {"unit": re.sub(r" \w+\}", " kg}", gold)}
    return out


def generate(seed: int = 0) -> list[dict]:
    rng, cases, seen = random.Random(seed), [], set()
    everything = golds(rng)
    flat = [(gold, kind) for kind, some in everything.items() for gold in some]

    def add(gold, reply, expected, kind):
        if (gold, reply) not in seen:
            seen.add((gold, reply))
            head = rng.choice(
                [
                    "<think>\nLet me see.\n</think>\n\nThe answer is ",
                    "So the answer is ",
                    "</think> Therefore, ",
                ]
            )
            cases.append(
                {
                    "answer": [gold],
                    "response": head + rf"\boxed{{{reply}}}",
                    "expected": expected,
                    "kind": kind,
                }
            )

    for gold, kind in flat:
        add(gold, gold, 1, "natural")
        for name, reply in variants(gold, kind, rng).items():
            add(gold, reply, 1, "variant")
        for name, reply in wrongs(gold, kind, rng).items():
            add(gold, reply, 0, "hedge" if "hedge" in name else "near miss")
        for other, other_kind in rng.sample(flat, 2):
            numbers = [
                re.sub(r"\\text\{[^}]*\}|\D", "", text).lstrip("0") for text in (gold, other)
            ]
            if numbers[0] != numbers[1]:  # surely another value
                add(gold, other, 0, "mismatch")
    return cases


# ------------------------------------------------------------------------------ the other checkers
def strings_equal(reply: str, gold: str) -> bool:
    """Plain string normalisation, in the style of the MATH benchmark's is_equiv."""

    def clean(text: str) -> str:
        for old, new in (
            (r"\!", ""),
            ("\n", ""),
            ("tfrac", "frac"),
            ("dfrac", "frac"),
            (r"\left", ""),
            (r"\right", ""),
            (r"^{\circ}", ""),
            (r"^\circ", ""),
            (r"\$", ""),
            (r"\%", ""),
            ("%", ""),
        ):
            text = text.replace(old, new)
        text = text.split(r"\text{ ")[0]
        left, equals, right = text.partition("=")
        text = right if equals and len(left.strip()) <= 2 else text
        text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text).replace(" ", "")
        text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
        text = re.sub(r"\\frac(\w)(\w)", r"\\frac{\1}{\2}", text)
        text = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", text)
        return r"\frac{1}{2}" if text == "0.5" else text

    return clean(reply) == clean(gold)


def strings(response: str, answers: list) -> bool:
    reply = extract_answer(response)
    return reply is not None and any(strings_equal(reply, str(gold)) for gold in answers)


def math_verify(response: str, answers: list) -> bool:
    from math_verify import parse, verify

    reply = parse(response.rpartition("</think>")[2])
    return any(verify(parse(rf"\boxed{{{gold}}}"), reply) for gold in answers)


def rules_then_sympy(response: str, answers: list) -> bool:
    """verl's prime_math (string rules, then sympy), a relative of the paper's checker."""
    import contextlib
    import importlib
    import types

    if "verl" not in sys.modules:  # only this one folder of it: the rest needs a GPU stack
        root = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
        for name in ("verl", "verl.utils", "verl.utils.reward_score"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules["verl.utils.py_functional"] = types.ModuleType("py_functional")

        @contextlib.contextmanager
        def no_limit(seconds):  # its own limit is a signal; ours is the worker process
            yield

        sys.modules["verl.utils.py_functional"].timeout_limit = no_limit
    from verl.utils.reward_score import prime_math

    reply = extract_answer(response)
    with contextlib.redirect_stdout(None):
        return reply is not None and any(
            prime_math.grade_answer(reply, str(gold)) for gold in answers
        )


def _serve(pipe, name: str) -> None:
    import logging

    logging.disable(logging.CRITICAL)
    check = globals()[name]
    check(r"\boxed{1}", ["1"])  # imports before the clock starts
    pipe.send("ready")
    while True:
        response, answers = pipe.recv()
        start = time.perf_counter()
        try:
            result = bool(check(response, answers))
        except Exception as error:  # another project's checker: any failure of it is a no
            result = repr(error)
        pipe.send((result, time.perf_counter() - start))


def run_limited(name: str, cases: list[dict], limit: float) -> tuple[list[bool], float, dict]:
    """Verdicts and seconds of a checker in a worker process; an item over the limit is a no."""
    verdicts, seconds, trouble, worker, pipe = [], 0.0, defaultdict(int), None, None
    for case in cases:
        if worker is None:
            pipe, theirs = multiprocessing.Pipe()
            worker = multiprocessing.Process(target=_serve, args=(theirs, name), daemon=True)
            worker.start()
            pipe.recv()
        pipe.send((case["response"], case["answer"]))
        if pipe.poll(limit):
            result, took = pipe.recv()
            trouble["raised"] += isinstance(result, str)
        else:
            worker.kill()
            worker.join()
            worker, result, took = None, False, limit
            trouble["over the limit"] += 1
        verdicts.append(result is True)
        seconds += took
    if worker is not None:
        worker.kill()
    return verdicts, seconds, dict(trouble)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=Path, default=CASES, help="JSONL with answer, response, expected, kind"
    )
    parser.add_argument(
        "--limit", type=float, default=5.0, help="seconds an item may take in the other checkers"
    )
    parser.add_argument(
        "--every", type=int, default=1, help="give the other checkers every n-th case only"
    )
    parser.add_argument("--write", action="store_true", help=f"generate {CASES.name} and stop")
    parser.add_argument(
        "--show", type=int, default=0, help="print so many wrong verdicts of each checker"
    )
    args = parser.parse_args()
    if args.write:
        CASES.write_text("".join(json.dumps(case) + "\n" for case in generate()))
        return
    cases = [json.loads(line) for line in args.cases.read_text().splitlines()]
    start = time.perf_counter()
    ours = [is_correct(case["response"], case["answer"]) for case in cases]
    results = {"ours": (cases, ours, time.perf_counter() - start, {})}
    others = cases[:: args.every]
    results["strings"] = (others, *run_limited("strings", others, args.limit))
    for name, module, install in (
        ("math_verify", "math_verify", "math-verify"),
        ("rules_then_sympy", "verl", "--no-deps verl pylatexenc sympy"),
    ):
        if importlib.util.find_spec(module):
            results[name] = (others, *run_limited(name, others, args.limit))
        else:
            print(f"{name} is left out: pip install {install}")
    kinds = sorted({(-case["expected"], case["kind"].split(":")[0]) for case in cases})
    print(
        f"{'kind (should)':28}{'cases':>7}"
        + "".join(f"{name:>18}" for name in results)
        + "   accepted"
    )
    for expected, kind in kinds:
        row = f"{kind + (' (yes)' if expected else ' (no)'):28}"
        for i, (some, verdicts, _, _) in enumerate(results.values()):
            said = [
                v
                for case, v in zip(some, verdicts)
                if (-case["expected"], case["kind"].split(":")[0]) == (expected, kind)
            ]
            row += f"{len(said):7}" if i == 0 else ""
            share = (
                f"{sum(said) / max(len(said), 1):.2%}"
                if expected
                else f"{sum(said)} of {len(said)}"
            )
            row += f"{share:>18}"
        print(row)
    print(
        f"{'checks a second':35}"
        + "".join(f"{len(some) / seconds:18,.0f}" for some, _, seconds, _ in results.values())
    )
    for name, (some, verdicts, _, trouble) in results.items():
        wrong = [
            (c["kind"], c["answer"], c["response"][-90:])
            for c, v in zip(some, verdicts)
            if v != bool(c["expected"])
        ]
        print(f"{name}: {len(wrong)} wrong verdicts of {len(some)} {trouble or ''}")
        for item in wrong[: args.show]:
            print("   ", *item, sep="  ")


if __name__ == "__main__":
    main()
