"""The assignments end to end: student copy, graders red on the stub and on wrong solutions, green
on the reference."""

import json
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
import graders  # noqa: E402
import ideas  # noqa: E402
from wrong import RIGHT, WRONG  # noqa: E402

EXERCISES = sorted({graders.exercise(name) for name in graders.POINTS})
pytestmark = pytest.mark.filterwarnings(
    "ignore:std"
)  # one wrong solution asks GRPO for the spread of one rollout


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """What exercises and ideas change in real.py is put back."""
    monkeypatch.setattr(real, "OBJECTIVES", dict(real.OBJECTIVES))
    for name in ("train", "label_group"):
        monkeypatch.setattr(real, name, getattr(real, name))


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder outside the repository, with the student copy generated in it; yields
    (folder, nbgrader)."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copy(HERE / "nbgrader_config.py", folder)
    shutil.copytree(HERE / "source", folder / "source")
    # nbgrader calls alembic by name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {
        "PATH": path,
        "JUPYTER_DATA_DIR": folder,
        "JUPYTER_RUNTIME_DIR": folder,
        "JUPYTER_CONFIG_DIR": folder,
        "IPYTHONDIR": folder,
        "PYTHONPATH": HERE.parents[1],
    }

    def nbgrader(*command):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, str(value))
            done = subprocess.run(
                [sys.executable, "-m", "nbgrader", *command],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stdout + done.stderr

    nbgrader("generate_assignment", "real", "--force")
    return folder, nbgrader


def verdicts(variables, exercise):
    """What each test cell of an exercise raises (None: passed)."""
    found = {}
    for name in graders.POINTS:
        if graders.exercise(name) == exercise:
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
    markdown = [
        cell.source
        for cell in nbformat.read(graders.SOURCE, 4).cells
        if cell.cell_type == "markdown"
    ]
    rows = re.findall(
        r"^\| (\d+) \| (.*?) \| (\d+) \| (\d+) min \| (.*?) \|$", markdown[0], re.MULTILINE
    )
    assert [int(row[0]) for row in rows] == EXERCISES == list(range(1, 11))
    readme = (HERE / "README.md").read_text()
    for number, title, points, minutes, compute in rows:
        assert sum(
            p for name, p in (graders.POINTS | graders.WRITTEN).items()
            if graders.exercise(name) == int(number)
        ) == int(points)
        assert f"## {number}. {title} ({points} points, {minutes} min)" in "\n".join(markdown)
        assert f"| {number} | {title} | {points} | {minutes} min | {compute} |" in readme


def test_student_copy_holds_no_solution_and_is_red(course):
    student = course[0] / "release" / "real" / "real.ipynb"
    text, found = student.read_text(), graders.cells(student)
    assert "BEGIN SOLUTION" not in text and "HIDDEN TESTS" not in text
    assert "Model answer" not in text and "Rubric" not in text and "YOUR ANSWER HERE" in text
    for name, (source, mark) in graders.REFERENCE.items():
        assert ("BEGIN SOLUTION" in source) == bool(mark.get("solution"))
        blank = r"\1# YOUR CODE HERE\n\1raise NotImplementedError()"
        stub = re.sub(r"( *)### BEGIN SOLUTION.*?### END SOLUTION", blank, source, flags=re.DOTALL)
        stub = re.sub(r" *### BEGIN HIDDEN.*?### END HIDDEN TESTS\n?", "", stub, flags=re.DOTALL)
        assert found[name][0].strip() == stub.strip()
    variables = graders.work(found)
    for exercise in EXERCISES:
        for name, error in verdicts(variables, exercise).items():
            assert isinstance(error, (NotImplementedError, real.UserError)), (
                name,
                error,
            )  # UserError: no dhpo


def changed(exercise, old, new):
    """The verdicts on the reference with a change to one exercise."""
    source, mark = graders.REFERENCE[f"ex{exercise}"]
    assert source.count(old) == 1
    cells = graders.REFERENCE | {f"ex{exercise}": (source.replace(old, new), mark)}
    own = {name: cell for name, cell in cells.items() if graders.exercise(name) in (0, exercise)}
    return verdicts(graders.work(own), exercise).values()


@pytest.mark.parametrize(
    "exercise, misconception, old, new", WRONG, ids=[f"{n}: {what}" for n, what, *_ in WRONG])
def test_wrong_solutions_are_red(exercise, misconception, old, new):
    errors = [e for e in changed(exercise, old, new) if e]
    assert errors and all(isinstance(e, (AssertionError, real.UserError)) for e in errors), errors


@pytest.mark.parametrize(
    "exercise, alternative, old, new", RIGHT, ids=[f"{n}: {what}" for n, what, *_ in RIGHT])
def test_right_alternatives_are_green(exercise, alternative, old, new):
    assert not any(changed(exercise, old, new)), changed(exercise, old, new)


def test_three_wrong_solutions_an_exercise():
    assert all(sum(n == exercise for n, *_ in WRONG) >= 3 for exercise in EXERCISES)


def test_nbgrader_gives_the_reference_all_points_and_the_stub_none(course):
    """Through nbgrader itself, with kernels. The stub's author also emptied the tests, which
    nbgrader puts back."""
    from nbgrader.api import Gradebook

    folder, nbgrader = course
    for student, origin in (("reference", "source"), ("stub", "release")):
        notebook = nbformat.read(folder / origin / "real" / "real.ipynb", 4)
        if student == "stub":
            for cell in notebook.cells:
                cell.source = (
                    "pass" if cell.metadata.get("nbgrader", {}).get("grade") else cell.source
                )
        (folder / "submitted" / student / "real").mkdir(parents=True)
        nbformat.write(notebook, folder / "submitted" / student / "real" / "real.ipynb")
    nbgrader("autograde", "real")
    with Gradebook(f"sqlite:///{folder}/gradebook.db") as book:
        scores = {
            student: book.find_submission("real", student).score
            for student in ("reference", "stub")
        }
        assert scores == {"reference": sum(graders.POINTS.values()), "stub": 0}


def test_pytest_grades_a_submission(course, monkeypatch):
    """The README's command, on the stub: every exercise fails; the reference passes in the test
    above."""
    monkeypatch.setenv("SUBMISSION", str(course[0] / "release" / "real" / "real.ipynb"))
    for name in graders.POINTS:
        with pytest.raises((NotImplementedError, real.UserError)):
            graders.test_exercise(name)


def test_gradescope_grades_a_class(course, tmp_path):
    """The zip built by its command, unpacked as Gradescope does, with a class of four
    submissions."""
    command = [sys.executable, str(HERE / "gradescope.py")]
    subprocess.run([*command, "autograder.zip"], cwd=tmp_path, check=True)
    subprocess.run(["unzip", "-q", "autograder.zip", "-d", "source"], cwd=tmp_path, check=True)
    for script in ("setup.sh", "run_autograder"):
        assert os.access(tmp_path / "source" / script, os.X_OK)
        subprocess.run(["bash", "-n", tmp_path / "source" / script], check=True)
    _, misconception, old, new = next(wrong for wrong in WRONG if wrong[0] == 7)
    reference = graders.SOURCE.read_text()
    half = nbformat.reads(reference, 4)
    for cell in half.cells:
        if cell.metadata.get("nbgrader", {}).get("grade_id") == "ex7":
            cell.source = cell.source.replace(old, new)
    next(
        cell for cell in half.cells if cell.cell_type == "code"
    ).source = "raise SystemExit"  # locked: put back
    half.cells.append(nbformat.v4.new_code_cell("raise SystemExit"))
    stub = (course[0] / "release" / "real" / "real.ipynb").read_text()
    total = sum(graders.POINTS.values())
    for text, score in (
        (reference, total),
        (stub, 0),
        (nbformat.writes(half), total - graders.POINTS["ex7a"]),
        ("no notebook", 0),
    ):
        for folder in ("submission", "results"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
            (tmp_path / folder).mkdir()
        (tmp_path / "submission" / "real.ipynb").write_text(text)
        subprocess.run(
            [tmp_path / "source" / "run_autograder"],
            check=True,
            env={**os.environ, "AUTOGRADER": str(tmp_path), "PYTHON": sys.executable},
        )
        found = json.loads((tmp_path / "results" / "results.json").read_text())
        assert found["score"] == score, found
        if text == "no notebook":
            assert "cannot be read" in found["output"]
            continue
        graded = [test for test in found["tests"] if "max_score" in test]
        assert {test["name"]: test["max_score"] for test in graded} == graders.POINTS
        assert {test["visibility"] for test in graded} == {"after_published"}
        hidden = {cell[0].partition("HIDDEN TESTS")[2] for cell in graders.REFERENCE.values()}
        for test in found["tests"]:  # what is shown at once quotes no hidden test
            if test["visibility"] == "visible" and "Error: " in test["output"]:
                message = test["output"].partition(": ")[2]
                assert not any(message and message in text for text in hidden), message


# ---- The ideas -----------------------------------------------------------------------------------


def case():
    torch.manual_seed(0)
    old = -torch.rand(3, 8, 6, dtype=torch.float64) * 3
    labels = torch.rand(3, 8) < 0.5
    labels[0] = True
    return (
        old + 0.3 * torch.randn_like(old),
        old,
        torch.arange(6) < torch.randint(1, 7, (3, 8, 1)),
        labels,
    )


def test_ideas_pass_the_graders():
    """The same function is graded in exercise 6, and in 7."""
    variables = graders.work(graders.REFERENCE)
    variables["dhpo"] = real.OBJECTIVES["dhpo"] = ideas.dhpo
    variables["majority_labels"] = ideas.majority_labels
    assert not any(verdicts(variables, 6).values()) and not any(verdicts(variables, 7).values())


def test_denoised_is_real_without_noise_and_weighs_by_bayes():
    logp, old, mask, labels = case()
    assert torch.allclose(
        ideas.real_denoised(logp, old, mask, labels, rho=0.0), real.real(logp, old, mask, labels)
    )
    four = torch.tensor(
        [[1, 1, 1, 1, 0, 0, 0, 0]]
    ).bool()  # half seem right, so half are: a label is true with 1 - rho
    zeros = torch.zeros(1, 8, 1, dtype=torch.float64, requires_grad=True)
    loss = ideas.real_denoised(
        zeros, torch.zeros(1, 8, 1), torch.ones(1, 8, 1).bool(), four, rho=0.2
    )
    push = torch.autograd.grad(loss, zeros)[0][0, :, 0]
    expected = torch.tensor(
        [-(0.8 - 0.2) / 5 / 0.5] * 4 + [(0.8 - 0.2) / 5 / 0.5] * 4, dtype=torch.float64
    )
    assert torch.allclose(push, expected)
    one = torch.zeros(1, 8).bool()
    one[0, 0] = True  # one right of eight is what noise alone would make
    assert (
        ideas.real_denoised(zeros, torch.zeros(1, 8, 1), torch.ones(1, 8, 1).bool(), one, rho=0.2)
        == 0
    )


def test_noise_flips_one_label_in_five():
    torch.manual_seed(0)
    texts = [r"\boxed{4}"] * 5000 + [r"\boxed{5}"] * 5000
    flipped = sum(
        label != (i < 5000) for i, label in enumerate(ideas.noisy_label({"answer": "4"}, texts))
    )
    assert abs(flipped - 2000) < 5 * 40  # binomial: standard deviation 40


def test_the_end_is_lost():
    """The bug of exercise 5 leaves all tokens but the end their credit, and the end none."""
    real.OBJECTIVES |= ideas.OBJECTIVES
    end = ideas.end_token()
    batch = {
        "old_logp": torch.zeros(1, 2, 3),
        "mask": torch.tensor([[[True, True, False], [True, True, True]]]),
        "labels": torch.tensor([[True, False]]),
        "completions": torch.tensor([[[5, end, 0], [6, 7, end]]]),
    }
    push = real.credit(torch.zeros(1, 2, 3), batch, real.Config(objective="end_token_lost"))[1]
    assert push.ne(0).tolist() == [[[True, False, False], [True, True, False]]]


def test_every_idea_runs(tmp_path, monkeypatch):
    """Two small steps of each, logged and read back; one example is trained on one problem."""
    small = {"steps": 2, "prompts": 4, "mini_batches": 2, "group_size": 2, "eval_every": 2,
             "eval_limit": 4, "eval_samples": 2, "max_new_tokens": 16}
    monkeypatch.setattr(ideas.runlog, "LOGS", tmp_path)
    monkeypatch.setattr(ideas, "BUDGET", small)
    train, trained_on = real.train, []

    def watched(config, **more):
        rows = real.load_rows(config.dataset, None, "train")
        trained_on.append({row["problem"] for row in rows})
        return train(config, **more)

    monkeypatch.setattr(real, "train", watched)
    for name, (call, settings) in ideas.RUNS.items():
        settings = settings | {"steps": 2, "save_every": 1}
        monkeypatch.setitem(ideas.RUNS, name, (call, settings))
        ideas.run(name, 0)
        if name == "one example":
            assert len(trained_on[-1]) == 1
    runs = ideas.runlog.read("ideas")
    assert [run["arm"] for run in runs] == list(ideas.RUNS)
    for run in runs:
        assert 0 <= run["rows"][-1]["pass@1"] <= 1 and "pass@1_before" in run["rows"][0]


def test_extrapolation_is_exact_on_a_line():
    torch.manual_seed(0)
    start, direction = torch.randn(2, 50, dtype=torch.float64)
    points = torch.stack([start + (0.3 + 0.1 * t) * direction for t in (5, 10, 15, 20)])
    assert torch.allclose(
        ideas.extrapolate(start, points, [5, 10, 15, 20], 40), start + 4.3 * direction
    )
