"""The equation index in real.py's docstring against the code."""

import inspect
import re

import real


def test_every_function_in_the_index_exists_and_cites_its_equation():
    index = re.findall(r"^    (Eq\. [\d, ]*\d|Algorithm 1) +(\w+)", real.__doc__, re.M)
    numbers = {int(n) for equation, _ in index for n in re.findall(r"\d+", equation) if equation.startswith("Eq")}
    assert numbers == set(range(1, 12))
    for equation, name in index:
        doc = getattr(real, name).__doc__
        for number in re.findall(r"\d+", equation) if equation.startswith("Eq") else ["Algorithm 1"]:
            assert re.search(rf"Eq\. {number}\b", doc) or number == "Algorithm 1" in doc, (name, equation)


def test_every_line_of_algorithm_1_is_tagged():
    source = inspect.getsource(real.train) + inspect.getsource(real.update)
    tagged = {int(n) for note in re.findall(r"lines? ([\d, and]+)", source) for n in re.findall(r"\d+", note)}
    assert tagged >= {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
