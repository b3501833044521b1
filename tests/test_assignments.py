"""The assignments end to end: student copy, graders red on the stub and on wrong solutions, green on the reference."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

import real

HERE = Path(__file__).resolve().parent / "assignments"
sys.path.insert(0, str(HERE))
import graders
import ideas
from wrong import WRONG

EXERCISES = sorted({int(name[2]) for name in graders.POINTS})
pytestmark = pytest.mark.filterwarnings("ignore:std")  # one wrong solution asks GRPO for the spread of one rollout


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """What exercises and ideas change in real.py is put back."""
    monkeypatch.setattr(real, "OBJECTIVES", dict(real.OBJECTIVES))
    for name in ("update", "draw", "sample", "validate", "train"):
        monkeypatch.setattr(real, name, getattr(real, name))


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder outside the repository, with the student copy generated in it; yields (folder, nbgrader)."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copy(HERE / "nbgrader_config.py", folder)
    shutil.copytree(HERE / "source", folder / "source")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # nbgrader calls alembic by name
    env = {"PATH": path, "JUPYTER_DATA_DIR": folder, "JUPYTER_RUNTIME_DIR": folder, "JUPYTER_CONFIG_DIR": folder,
           "IPYTHONDIR": folder, "PYTHONPATH": HERE.parents[1]}

    def nbgrader(*command):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, str(value))
            done = subprocess.run([sys.executable, "-m", "nbgrader", *command], cwd=folder, capture_output=True,
                                  text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    nbgrader("generate_assignment", "real", "--force")
    return folder, nbgrader


def verdicts(variables, exercise):
    """What each test cell of an exercise raises (None: passed)."""
    found = {}
    for name in graders.POINTS:
        if name.startswith(f"ex{exercise}"):
            try:
                found[name] = graders.grade(name, variables)
            except Exception as e:  # noqa: BLE001, a submission may raise anything
                found[name] = e
    return found


def test_reference_is_green():
    variables = graders.work(graders.REFERENCE)
    for exercise in EXERCISES:
        assert not any(verdicts(variables, exercise).values()), verdicts(variables, exercise)


def test_every_exercise_says_what_it_is():
    """Points and minutes in the heading, in the table and in the metadata are the same."""
    markdown = [cell.source for cell in nbformat.read(graders.SOURCE, 4).cells if cell.cell_type == "markdown"]
    rows = re.findall(r"^\| (\d) \| (.*?) \| (\d+) \| (\d+) min \| (.*?) \|$", markdown[0], re.MULTILINE)
    assert [int(row[0]) for row in rows] == EXERCISES == list(range(1, 8))
    readme = (HERE / "README.md").read_text()
    for number, title, points, minutes, compute in rows:
        assert sum(p for name, p in graders.POINTS.items() if name[2] == number) == int(points)
        assert f"## {number}. {title} ({points} points, {minutes} min)" in "\n".join(markdown)
        assert f"| {number} | {title} | {points} | {minutes} min | {compute} |" in readme


def test_student_copy_holds_no_solution_and_is_red(course):
    student = course[0] / "release" / "real" / "real.ipynb"
    text, found = student.read_text(), graders.cells(student)
    assert "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text
    for name, (source, mark) in graders.REFERENCE.items():
        assert ("BEGIN SOLUTION" in source) == bool(mark.get("solution"))
        blank = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()"
        stub = re.sub(r"( *)### BEGIN SOLUTION.*?### END SOLUTION", blank, source, flags=re.DOTALL)
        stub = re.sub(r" *### BEGIN HIDDEN.*?### END HIDDEN TESTS\n?", "", stub, flags=re.DOTALL)
        assert found[name][0].strip() == stub.strip()
    variables = graders.work(found)
    for exercise in EXERCISES:
        for name, error in verdicts(variables, exercise).items():
            assert isinstance(error, (NotImplementedError, real.UserError)), (name, error)  # UserError: no dhpo


@pytest.mark.parametrize("exercise, misconception, old, new", WRONG, ids=[f"{n}: {what}" for n, what, *_ in WRONG])
def test_wrong_solutions_are_red(exercise, misconception, old, new):
    source, mark = graders.REFERENCE[f"ex{exercise}"]
    assert source.count(old) == 1
    variables = graders.work(graders.REFERENCE | {f"ex{exercise}": (source.replace(old, new), mark)})
    errors = [e for e in verdicts(variables, exercise).values() if e]
    assert errors and all(isinstance(e, (AssertionError, real.UserError)) for e in errors), errors


def test_three_wrong_solutions_an_exercise():
    assert all(sum(n == exercise for n, *_ in WRONG) >= 3 for exercise in EXERCISES)


def test_nbgrader_gives_the_reference_all_points_and_the_stub_none(course):
    """Through nbgrader itself, with kernels. The stub's author also emptied the tests, which nbgrader puts back."""
    from nbgrader.api import Gradebook

    folder, nbgrader = course
    for student, origin in (("reference", "source"), ("stub", "release")):
        notebook = nbformat.read(folder / origin / "real" / "real.ipynb", 4)
        if student == "stub":
            for cell in notebook.cells:
                cell.source = "pass" if cell.metadata.get("nbgrader", {}).get("grade") else cell.source
        (folder / "submitted" / student / "real").mkdir(parents=True)
        nbformat.write(notebook, folder / "submitted" / student / "real" / "real.ipynb")
    nbgrader("autograde", "real")
    with Gradebook(f"sqlite:///{folder}/gradebook.db") as book:
        scores = {student: book.find_submission("real", student).score for student in ("reference", "stub")}
        assert scores == {"reference": sum(graders.POINTS.values()), "stub": 0}


def test_pytest_grades_a_submission(course, monkeypatch):
    """The README's command, on the stub: every exercise fails; the reference passes in the test above."""
    monkeypatch.setenv("SUBMISSION", str(course[0] / "release" / "real" / "real.ipynb"))
    for name in graders.POINTS:
        with pytest.raises((NotImplementedError, real.UserError)):
            graders.test_exercise(name)


# ---- The ideas -----------------------------------------------------------------------------------


def case():
    torch.manual_seed(0)
    old = -torch.rand(3, 8, 6, dtype=torch.float64) * 3
    labels = torch.rand(3, 8) < 0.5
    labels[0] = True
    return old + 0.3 * torch.randn_like(old), old, torch.arange(6) < torch.randint(1, 7, (3, 8, 1)), labels


def test_ideas_pass_the_graders():
    """The same function is graded in exercise 6, and in 7."""
    variables = graders.work(graders.REFERENCE)
    variables["dhpo"] = lambda *args, eps=0.2, **kw: ideas.dhpo(*args, eps_token=eps, **kw)
    real.OBJECTIVES["dhpo"] = variables["dhpo"]
    variables["majority_labels"] = ideas.majority_labels
    assert not any(verdicts(variables, 6).values()) and not any(verdicts(variables, 7).values())


def test_denoised_is_real_without_noise_and_weighs_by_bayes():
    logp, old, mask, labels = case()
    assert torch.allclose(ideas.real_denoised(logp, old, mask, labels, rho=0.0), real.real(logp, old, mask, labels))
    four = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]).bool()  # half seem right, so half are: a label is true with 1 - rho
    zeros = torch.zeros(1, 8, 1, dtype=torch.float64, requires_grad=True)
    loss = ideas.real_denoised(zeros, torch.zeros(1, 8, 1), torch.ones(1, 8, 1).bool(), four, rho=0.2)
    push = torch.autograd.grad(loss, zeros)[0][0, :, 0]
    expected = torch.tensor([-(0.8 - 0.2) / 5 / 0.5] * 4 + [(0.8 - 0.2) / 5 / 0.5] * 4, dtype=torch.float64)
    assert torch.allclose(push, expected)
    one = torch.zeros(1, 8).bool()
    one[0, 0] = True  # one right of eight is what noise alone would make
    assert ideas.real_denoised(zeros, torch.zeros(1, 8, 1), torch.ones(1, 8, 1).bool(), one, rho=0.2) == 0


def test_annealing_changes_training_samples_and_no_validation():
    model, tokenizer = real.load_model(real.Config().model)
    problems = real.load_problems(tokenizer, real.Config(), real.Config().dataset, "train")[:3]

    def draw():
        torch.manual_seed(0)
        return real.rollouts(model, tokenizer, problems, 4, 16, 1.0)["completions"]

    plain, score, sample = draw(), real.validate(model, tokenizer, problems, real.Config(eval_samples=2)), real.sample
    ideas.annealed_decoding(hot=1.0, cold=1.0, d=1e9)
    assert torch.equal(draw(), plain)  # temperature 1 throughout
    real.sample = sample
    ideas.annealed_decoding(hot=50.0)
    assert not torch.equal(draw(), plain)
    assert real.validate(model, tokenizer, problems, real.Config(eval_samples=2)) == score


def test_relabelling_leaves_the_batch_the_end_is_lost_and_one_example_repeats():
    real.update = lambda *args: args
    ideas.relabel(lambda batch: ~batch["labels"])
    batch = {"labels": torch.tensor([[True, False]])}
    assert real.update(0, 1, 2, batch, 4)[3]["labels"].tolist() == [[False, True]] and batch["labels"][0, 0]
    real.update = lambda *args: args
    ideas.end_token_lost()
    end = real.load_model(real.Config().model)[1].eos_token_id
    batch = {"mask": torch.tensor([[[True, True, False]]]), "completions": torch.tensor([[[5, end, end]]])}
    assert real.update(0, 1, 2, batch, 4)[3]["mask"].tolist() == [[[True, False, False]]]
    problems = list(range(100))
    first = real.draw(problems, 1, real.Config())[0]
    ideas.one_example()
    assert real.draw(problems, 7, real.Config()) == [first] * 16


def test_extrapolation_is_exact_on_a_line():
    torch.manual_seed(0)
    start, direction = torch.randn(2, 50, dtype=torch.float64)
    points = torch.stack([start + (0.3 + 0.1 * t) * direction for t in (5, 10, 15, 20)])
    assert torch.allclose(ideas.extrapolate(start, points, [5, 10, 15, 20], 40), start + 4.3 * direction)
