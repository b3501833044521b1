"""The graders under pytest: the tests of source/real/real.ipynb, hidden ones included, run on a
submission.

    SUBMISSION=path/to/real.ipynb python -m pytest tests/assignments/graders.py

Without SUBMISSION the reference is graded.

As under nbgrader, cells that students cannot edit are taken from the source, so a changed test
changes nothing.
"""

import contextlib
import linecache
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import real  # noqa: E402

SOURCE = HERE / "source" / "real" / "real.ipynb"


def cells(path):
    """Code cells by grade_id (an ungraded cell: by its id): (source, nbgrader's metadata)."""
    code = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    marks = [cell.metadata.get("nbgrader", {}) for cell in code]
    return {mark.get("grade_id", cell.get("id", f"cell {n}")): (cell.source, mark)
            for n, (cell, mark) in enumerate(zip(code, marks))}


REFERENCE = cells(SOURCE)
POINTS = {name: mark["points"] for name, (_, mark) in REFERENCE.items() if mark.get("grade")}
WRITTEN = {
    cell.metadata.nbgrader.grade_id: cell.metadata.nbgrader.points  # graded by a person
    for cell in nbformat.read(SOURCE, 4).cells
    if cell.cell_type == "markdown" and cell.metadata.nbgrader.grade
}


def exercise(name):
    """The number of the exercise that a cell belongs to; 0: to all."""
    return int(re.match(r"(?:ex(\d+))?", name)[1] or 0)


def execute(source, name, variables):
    """Run a cell, so that a failure shows its line."""
    linecache.cache[name] = len(source), None, source.splitlines(True), name
    exec(compile(source, name, "exec"), variables)  # noqa: S102, running it is the point


def work(submission):
    """The variables that a submission's cells leave behind; like nbgrader, go on after a cell that
    fails."""
    variables = {"__name__": "submission"}
    locked = {name: cell for name, cell in REFERENCE.items() if cell[1].get("locked")}
    restored = submission | {n: c for n, c in locked.items() if n in submission}
    for name, (source, _) in restored.items():
        if name not in POINTS:
            with contextlib.suppress(Exception, SystemExit):
                execute(source, f"<{name}>", variables)
    return variables


def grade(name, variables):
    """Run a test cell of the source; what it raises is the verdict."""
    execute(REFERENCE[name][0], f"<{name}>", dict(variables))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """What a submission registers in real.py does not outlive it."""
    monkeypatch.setattr(real, "OBJECTIVES", dict(real.OBJECTIVES))


@pytest.mark.parametrize("name", POINTS, ids=lambda name: f"{name}-{POINTS[name]}-points")
def test_exercise(name):
    grade(name, work(cells(os.environ.get("SUBMISSION", SOURCE))))
