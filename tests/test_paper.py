"""The equation index in real.py's docstring against the code."""

import inspect
import re
from pathlib import Path

import real

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


INDEX = r"(Eq\. [\d, ]*\d|Algorithm 1)"


def index_of(text, pattern):
    """[(equations, name)]: ["Eq. 6", "Eq. 7", "Eq. 8"], "real" for `Eq. 6, 7, 8  real`."""
    return [
        ([f"Eq. {n}" for n in re.findall(r"\d+", what)] if what[0] == "E" else [what], name)
        for what, name in re.findall(pattern, text, re.M)
    ]


DOCSTRING = index_of(real.__doc__, rf"^    {INDEX} +(\w+)")


def test_every_function_in_the_index_exists_and_cites_its_equation():
    numbers = {equation for equations, _ in DOCSTRING for equation in equations}
    assert numbers == {f"Eq. {n}" for n in range(1, 12)} | {"Algorithm 1"}
    for equations, name in DOCSTRING:
        for equation in equations:
            assert re.search(rf"{equation}\b", getattr(real, name).__doc__), (name, equation)


def test_every_line_of_algorithm_1_is_tagged():
    source = inspect.getsource(real.train) + inspect.getsource(real.update)
    notes = re.findall(r"lines? ([\d, and]+)", source)
    assert {int(n) for note in notes for n in re.findall(r"\d+", note)} >= set(range(1, 11))


def test_the_index_of_the_readme_is_that_of_the_docstring():
    text = README[README.index("In `real.py`: Eq. 1") :].split("\n\n")[0]
    assert index_of(text, rf"{INDEX} `(\w+)`") == DOCSTRING
