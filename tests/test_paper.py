"""real.py against the paper: the equation index of its docstring, the lines of Algorithm 1."""

import inspect
import re

import real


def test_every_function_of_the_index_exists_and_cites_its_equation():
    index = re.findall(r"^    (Eq\. [\d, ]*\d|Algorithm 1) +(\w+)", real.__doc__, re.M)
    cited = {int(n) for place, _ in index if "Eq" in place for n in re.findall(r"\d+", place)}
    assert cited == set(range(1, 12))
    for place, name in index:
        doc = inspect.getdoc(getattr(real, name))
        for number in re.findall(r"\d+", place) if "Eq" in place else []:
            assert re.search(rf"Eq\. {number}\b", doc), (name, place)
        assert "Eq" in place or place in doc


def test_every_line_of_algorithm_1_is_tagged():
    notes = re.findall(r"# lines? ([\d, and]+)", inspect.getsource(real.train))
    notes += re.findall(r"then lines ([\d and]+)", inspect.getsource(real.train))
    tagged = {int(n) for note in notes for n in re.findall(r"\d+", note)}
    assert tagged == {*range(1, 11), 13}
