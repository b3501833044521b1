"""The notebook: complete, of one piece with real.py, and it runs. After a change of what it shows,
execute it again:

jupyter nbconvert --to notebook --execute --inplace notebook.ipynb
"""

import ast
import functools
import inspect
import re
from pathlib import Path

import pytest
import real

nbformat = pytest.importorskip("nbformat")

ROOT = Path(real.__file__).parent
NOTEBOOK = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
CELLS = NOTEBOOK.cells
CODE = [cell for cell in CELLS if cell.cell_type == "code"]


def bound(tree):
    """Every name that code binds: definitions, assignments, loops, imports; `real.x = ...` counts
    as x."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr if ast.unparse(node.value) == "real" else ""
        elif isinstance(node, ast.alias) and (node.name, node.asname) != ("real", None):
            yield node.asname or node.name


@functools.cache
def own_names():
    """The top-level names that real.py itself defines, its imports left out."""
    tree = ast.parse(inspect.getsource(real))
    definitions = [n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom))]
    names = {n.name for n in definitions if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for statement in definitions:
        for target in getattr(statement, "targets", [getattr(statement, "target", None)]):
            names |= (
                {n.id for n in ast.walk(target) if isinstance(n, ast.Name)} if target else set()
            )
    return names


def redefined(source):
    return own_names() & set(bound(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "def grpo(): pass",
        "class Config: pass",
        "tau = 1\nTINY = 2",
        "real.credit = None",
        "for s_bar in (): pass",
        "from other import train",
        "import other as kl",
    ],
)
def test_redefinition_is_noticed(source):
    assert redefined(source)


def test_redefines_nothing_of_real():
    assert len(own_names()) > 60  # else the check above looks at nothing
    assert {(cell.id, *redefined(cell.source)) for cell in CODE if redefined(cell.source)} == set()
    assert any("import real" in cell.source.splitlines() for cell in CODE)


def cell_of(pattern):
    """Position of the first markdown cell that matches."""
    return next(
        (
            i
            for i, c in enumerate(CELLS)
            if c.cell_type == "markdown" and re.search(pattern, c.source)
        ),
        None,
    )


def printed(cell):
    return "".join(o.get("text", "") for o in cell.get("outputs", []) if o.output_type == "stream")


def group_after(start):
    """The cells from `start` to the next equation or section."""
    for cell in CELLS[start + 1 :]:
        if cell.cell_type == "markdown" and re.search(r"\\tag\{|^## ", cell.source, re.M):
            return
        yield cell


@pytest.mark.parametrize("number", range(1, 25))
def test_each_equation_has_its_name_its_formula_and_printed_numbers(number):
    assert cell_of(rf"(?<!\w)Eq\. {number}(?!\d)") is not None
    start = cell_of(rf"\\tag\{{{number}\}}")
    assert start is not None
    assert any(re.search(r"\d", printed(cell)) for cell in group_after(start))


@pytest.mark.parametrize("name", ["Algorithm 1", r"Proposition 3\.1", r"Proposition 5\.1"])
def test_algorithm_and_propositions(name):
    start = cell_of(rf"^###? .*{name}(?!\d)|\n###? .*{name}(?!\d)")
    assert start is not None
    assert any(re.search(r"\d", printed(cell)) for cell in group_after(start))


INDEX = re.findall(r"^    (?:Eq\. [\d, ]*\d|Algorithm 1) +(\w+)", real.__doc__, re.M)


assert len(set(INDEX)) >= 8


@pytest.mark.parametrize("name", sorted(set(INDEX)))
def test_each_function_of_the_index_is_shown_as_it_now_is(name):
    shown = "".join(
        o.data.get("text/markdown", "")
        for c in CODE
        for o in c.outputs
        if o.output_type == "display_data"
    )
    assert inspect.getsource(getattr(real, name)) in shown, (
        "real.py has changed since: execute the notebook again"
    )


def test_outputs_are_committed_whole_and_without_errors():
    assert [cell.execution_count for cell in CODE] == list(
        range(1, len(CODE) + 1)
    )  # one pass, top to bottom
    outputs = [o for cell in CODE for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 10
    assert not re.search(
        r"(?<![\w.])/(?:home|root|tmp|usr|work|Users|content)/", "".join(map(str, outputs))
    )


BODY = CELLS[: cell_of("^## Appendix")]


def test_it_is_one_evening():
    text = [cell.source for cell in BODY if cell.cell_type == "markdown"]
    code = [cell.source for cell in BODY if cell.cell_type == "code"]
    assert len(BODY) <= 100
    assert len(" ".join(text).split()) <= 3800
    assert len([line for line in "\n".join(code).splitlines() if line.strip()]) <= 650


def test_a_model_learns_first_and_the_loss_of_real_is_near():
    shown = [i for i, cell in enumerate(BODY) if re.search(r"show\(real\.real\b", cell.source)]
    run = [i for i, cell in enumerate(BODY) if "real.train(" in cell.source]
    assert run[0] < cell_of(r"\\tag\{") and shown[0] <= 20


def test_plotting_is_in_one_hidden_cell():
    plotting = [c for c in BODY if c.cell_type == "code" and re.search(r"plt\.|axis\.", c.source)]
    assert [cell.metadata.get("jupyter") for cell in plotting] == [{"source_hidden": True}]


def test_every_section_asks_for_a_guess_and_every_fold_is_closed():
    text = "\n".join(cell.source for cell in BODY if cell.cell_type == "markdown")
    *sections, last = re.split(r"^## ", text, flags=re.M)[1:]  # the last one sums up
    assert len(sections) >= 8 and all("**Predict" in section for section in sections)
    assert text.count("<details><summary>") == text.count("</details>") >= 5


def test_every_link_leads_to_a_file():
    text = "\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!https://)([^)]+)\)", text)
    assert any("assignments" in link for link in links)
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.notebook
def test_it_runs_top_to_bottom():
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "notebook.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
