"""The assignments end to end: student copy, graders red on the stub and on wrong solutions, green
on the reference."""

import csv
import functools
import io
import itertools
import json
import os
import re
import shutil
import statistics
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
from wrong import NUMBERS, RIGHT, WRONG  # noqa: E402

EXERCISES = sorted({graders.exercise(name) for name in graders.POINTS})
# One wrong solution asks GRPO for the spread of one rollout.
pytestmark = pytest.mark.filterwarnings("ignore:std")


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """What exercises and ideas change in real.py is put back."""
    monkeypatch.setattr(real, "OBJECTIVES", dict(real.OBJECTIVES))
    for name in ("train", "label_group"):
        monkeypatch.setattr(real, name, getattr(real, name))


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder outside the repository in which the README's first command ran; gives the
    folder, the student copy's text and a function that runs the README's other commands."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copy(HERE / "nbgrader_config.py", folder)
    shutil.copytree(HERE / "source", folder / "source")
    own = dict.fromkeys(("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR",
                         "IPYTHONDIR"), str(folder))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | own | {"PATH": path, "PYTHONPATH": str(HERE.parents[1])}
    readme = (HERE / "README.md").read_text()
    first, rest = re.search(r"## Hand out.*?/activate\n(.*?\n)(.*?)```", readme, re.DOTALL).groups()

    def run(commands):
        done = subprocess.run(["bash", "-ec", commands], cwd=folder, env=environment, text=True,
                              capture_output=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    run(first)
    return folder, (folder / "release" / "real" / "real.ipynb").read_text(), lambda: run(rest)


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
    cells = nbformat.read(graders.SOURCE, 4).cells
    markdown = [cell.source for cell in cells if cell.cell_type == "markdown"]
    row = r"^\| (\d+) \| (.*?) \| (\d+) \| (\d+) min \| (.*?) \|$"
    rows = re.findall(row, markdown[0], re.MULTILINE)
    assert [int(number) for number, *_ in rows] == EXERCISES == list(range(1, 11))
    given = (graders.POINTS | graders.WRITTEN).items()
    readme = (HERE / "README.md").read_text()
    for number, title, points, minutes, compute in rows:
        assert sum(p for name, p in given if graders.exercise(name) == int(number)) == int(points)
        assert f"## {number}. {title} ({points} points, {minutes} min)" in "\n".join(markdown)
        assert f"| {number} | {title} | {points} | {minutes} min | {compute} |" in readme


def test_student_copy_holds_no_solution_and_is_red(course):
    text = course[1]
    found = graders.cells(io.StringIO(text))
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
            assert isinstance(error, (NotImplementedError, real.UserError)), (name, error)


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


# ---- A class of three ----------------------------------------------------------------------------


@functools.cache
def numbers(name):
    """What the reference answers to part (b) of exercise 10 for a student."""
    own = {k: v for k, v in graders.REFERENCE.items() if graders.exercise(k) in (0, 10)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STUDENT", name)
        return graders.work(own)["own_answers"]()


def test_each_grader_accepts_its_own_numbers_alone(monkeypatch):
    monkeypatch.setattr(graders, "POINTS", {"ex10b": 3})
    answers = {name: numbers(name) for name in ("ada", "bob")}
    for name, found in itertools.product(answers, answers.values()):
        monkeypatch.setenv("STUDENT", name)
        monkeypatch.setitem(graders.REFERENCE, "name", (f"NAME = {name!r}", {}))
        errors = [e for e in changed(10, NUMBERS, f"return {found}") if e]
        assert len(errors) == (found != answers[name]), (name, found)
    monkeypatch.setenv("STUDENT", "eve")  # the name in the notebook is still bob's
    assert "NAME is 'bob'" in str(*filter(None, changed(10, NUMBERS, f"return {numbers('eve')}")))


def the_class(student_copy):
    """name: (notebook, points). Bob has exercise 7 wrong, Ada's numbers in exercise 10, a
    locked cell of his own and an end that stops; Eve did nothing and emptied the tests."""
    _, _, old, new = next(wrong for wrong in WRONG if wrong[0] == 7)
    ada, bob = nbformat.read(graders.SOURCE, 4), nbformat.read(graders.SOURCE, 4)
    for name, submission in (("ada", ada), ("bob", bob)):
        for cell in submission.cells:
            if cell.id == "name":
                cell.source = f"NAME = {name!r}"
            cell.source = cell.source.replace(NUMBERS, f"return {numbers('ada')}")
            if name == "bob":
                cell.source = cell.source.replace(old, new)
                cell.source = "raise SystemExit" if cell.id == "setup" else cell.source
    bob.cells.append(nbformat.v4.new_code_cell("raise SystemExit"))
    ada.nbformat_minor = 4  # an older format, whose cells have no ids
    for cell in ada.cells:
        del cell["id"]
    eve = nbformat.reads(student_copy, 4)
    for cell in eve.cells:
        if cell.metadata.get("nbgrader", {}).get("grade"):
            cell.source = "pass"
    total, lost = sum(graders.POINTS.values()), graders.POINTS["ex7a"] + graders.POINTS["ex10b"]
    return {"ada": (ada, total), "bob": (bob, total - lost), "eve": (eve, 0)}


def test_the_readmes_commands_grade_a_class(course):
    """nbgrader itself, with kernels: what is locked is restored, numbers are their owner's."""
    folder, student_copy, grade = course
    expected = {}
    for name, (submission, expected[name]) in the_class(student_copy).items():
        (folder / "submitted" / name / "real").mkdir(parents=True)
        nbformat.write(submission, folder / "submitted" / name / "real" / "real.ipynb")
    grade()
    with (folder / "grades.csv").open() as f:
        assert {r["student_id"]: float(r["raw_score"]) for r in csv.DictReader(f)} == expected
    assert len(list((folder / "feedback").glob("*/real/real.html"))) == 3


def test_pytest_grades_a_submission(course, tmp_path, monkeypatch):
    """The README's command, on the stub: every exercise fails; the reference passes above."""
    (tmp_path / "real.ipynb").write_text(course[1])
    monkeypatch.setenv("SUBMISSION", str(tmp_path / "real.ipynb"))
    for name in graders.POINTS:
        with pytest.raises((NotImplementedError, real.UserError)):
            graders.test_exercise(name)


def test_gradescope_grades_a_class(course, tmp_path):
    """The zip built by its command, unpacked as Gradescope does."""
    command = [sys.executable, str(HERE / "gradescope.py")]
    subprocess.run([*command, "autograder.zip"], cwd=tmp_path, check=True)
    subprocess.run(["unzip", "-q", "autograder.zip", "-d", "source"], cwd=tmp_path, check=True)
    for script in ("setup.sh", "run_autograder"):
        assert os.access(tmp_path / "source" / script, os.X_OK)
        subprocess.run(["bash", "-n", tmp_path / "source" / script], check=True)

    def graded(name, text):
        for folder in ("submission", "results"):
            shutil.rmtree(tmp_path / folder, ignore_errors=True)
            (tmp_path / folder).mkdir()
        (tmp_path / "submission" / "real.ipynb").write_text(text)
        users = {"users": [{"email": name, "id": 1, "name": "A Student"}]}
        (tmp_path / "submission_metadata.json").write_text(json.dumps(users))
        subprocess.run([tmp_path / "source" / "run_autograder"], check=True, env={
            **os.environ, "AUTOGRADER": str(tmp_path), "PYTHON": sys.executable})
        return json.loads((tmp_path / "results" / "results.json").read_text())

    found = graded("ada", "no notebook")
    assert found["score"] == 0 and "cannot be read" in found["output"]
    hidden = {source.partition("HIDDEN TESTS")[2] for source, _ in graders.REFERENCE.values()}
    for name, (submission, score) in the_class(course[1]).items():
        found = graded(name, nbformat.writes(submission))
        assert found["score"] == score, found
        points = [test for test in found["tests"] if "max_score" in test]
        assert {test["name"]: test["max_score"] for test in points} == graders.POINTS
        assert {test["visibility"] for test in points} == {"after_published"}
        for test in found["tests"]:  # what is shown at once quotes no hidden test
            if test["visibility"] == "visible" and "Error: " in test["output"]:
                message = test["output"].partition(": ")[2]
                assert not any(message and message in text for text in hidden), message


# ---- Colab ---------------------------------------------------------------------------------------


def test_the_install_cell_gets_a_clone_and_the_notebook_runs_there(tmp_path):
    """As in Colab: a notebook alone in a folder, REPO set. Here it is a local bare clone, and pip
    finds all that requirements.txt pins installed."""
    root = HERE.parents[1]
    subprocess.run(["git", "clone", "-q", "--bare", root, tmp_path / "bare.git"], check=True)
    (tmp_path / "content").mkdir()
    source = graders.REFERENCE["install"][0]
    assert source.count('REPO = ""') == 1
    source = source.replace('REPO = ""', f"REPO = {str(tmp_path / 'bare.git')!r}")
    check = "import real; assert real.__file__.startswith(os.getcwd()); print(real.__file__)"
    code = "\n".join([source, source, graders.REFERENCE["setup"][0], check])  # twice: as clicked
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "content", text=True,
                          capture_output=True, check=False,
                          env=os.environ | {"PIP_NO_INDEX": "1", "PIP_DRY_RUN": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(tmp_path / "content" / "rewards-as-labels" / "real.py")


# ---- The ideas -----------------------------------------------------------------------------------


def case():
    torch.manual_seed(0)
    old = -torch.rand(3, 8, 6, dtype=torch.float64) * 3
    labels = torch.rand(3, 8) < 0.5
    labels[0] = True
    logp = old + 0.3 * torch.randn_like(old)
    return logp, old, torch.arange(6) < torch.randint(1, 7, (3, 8, 1)), labels


def test_ideas_pass_the_graders():
    """The same function is graded in exercise 6, and in 7."""
    variables = graders.work(graders.REFERENCE)
    variables["dhpo"] = real.OBJECTIVES["dhpo"] = ideas.dhpo
    variables["majority_labels"] = ideas.majority_labels
    assert not any(verdicts(variables, 6).values()) and not any(verdicts(variables, 7).values())


def test_denoised_is_real_without_noise_and_weighs_by_bayes():
    logp, old, mask, labels = case()
    denoised = ideas.real_denoised(logp, old, mask, labels, rho=0.0)
    assert torch.allclose(denoised, real.real(logp, old, mask, labels))
    zeros = torch.zeros(1, 8, 1, dtype=torch.float64, requires_grad=True)
    rest = torch.zeros(1, 8, 1), torch.ones(1, 8, 1).bool()
    four = torch.arange(8)[None] < 4  # half seem right, so half are: a label is true with 1 - rho
    loss = ideas.real_denoised(zeros, *rest, four, rho=0.2)
    push = torch.autograd.grad(loss, zeros)[0][0, :, 0]
    size = (0.8 - 0.2) / 5 / 0.5
    assert torch.allclose(push, torch.tensor([-size] * 4 + [size] * 4, dtype=torch.float64))
    one = torch.arange(8)[None] < 1  # one right of eight is what noise alone would make
    assert ideas.real_denoised(zeros, *rest, one, rho=0.2) == 0


def test_noise_flips_one_label_in_five():
    torch.manual_seed(0)
    texts = [r"\boxed{4}"] * 5000 + [r"\boxed{5}"] * 5000
    labels = ideas.noisy_label({"answer": "4"}, texts)
    flipped = sum(label != (i < 5000) for i, label in enumerate(labels))
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
    monkeypatch.setattr(ideas, "EVAL", ["--samples", "2", "--limit", "4"])
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
        if run["arm"] == "hard questions":  # 4 questions, 2 rollouts each, or 4 if none is right
            drawn = [row["rollouts"] for row in run["rows"]]
            assert drawn != [8, 8] and set(drawn) <= {8, 10, 12, 14, 16}
    asked = {run["arm"]: [row["right"] for row in run["rows"]]
             for run in ideas.runlog.read("leash")}
    assert set(asked) == {"before", *ideas.LEASH}
    assert all(len(right) == 4 and set(right) <= {0, 1, 2} for right in asked.values())


def test_extrapolation_is_exact_on_a_line():
    torch.manual_seed(0)
    start, direction = torch.randn(2, 50, dtype=torch.float64)
    points = torch.stack([start + (0.3 + 0.1 * t) * direction for t in (5, 10, 15, 20)])
    found = ideas.extrapolate(start, points, [5, 10, 15, 20], 40)
    assert torch.allclose(found, start + 4.3 * direction)


def test_pass_at_k_before_and_after(tmp_path, monkeypatch, capsys):
    """Three problems, two seeds, all numbers by hand."""
    monkeypatch.setattr(ideas.runlog, "LOGS", tmp_path)
    for arm, seed, counts in (
            ("before", 0, [32, 0, 1]), ("REAL", 0, [64, 64, 0]), ("REAL", 1, [64, 64, 1])):
        rows = [{"right": n} for n in counts]
        ideas.runlog.append("leash", rows, ["right"], arm=arm, seed=seed)
    assert ideas.pass_at_k([[1], [64]], 32) == [0.75]  # 1 of 64 is among 32 of them half the time
    ideas.leash()
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    cells = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines if line[1:]}
    assert cells["pass@k"] == [f"k = {k}" for k in (1, 2, 4, 8, 16, 32, 64)]
    # k = 1: 1/2, 0, 1/64 before; 1, 1, 1/128 after; k = 64: 1, 0, 1 and 1, 1, 1/2
    half = 1.96 * statistics.stdev([1 / 2, 1, -1 / 128]) / 3**0.5
    assert cells["its change"][0] == f"{(3 / 2 - 1 / 128) / 3:.3f} ± {half:.3f}"
    assert cells["before"][0].startswith("0.172") and cells["REAL"][0].startswith("0.669")
    assert cells["REAL"][-1].startswith("0.833") and cells["its change"][-1].startswith("0.167")
    assert ["REAL: of 3 problems, lost [1, 0], gained [1, 1] (a seed each)"] in lines


def test_tempo_on_a_tree_by_hand():
    """Four rollouts: the first token is everyone's, then three part from one, then one from two.
    The last draws token 2 where two others do, but no longer on their branch; and the first draws
    token 0, the number that stands for no token, where the second has ended."""
    completions = torch.tensor([[[7, 1, 2, 0], [7, 1, 2, 0], [7, 1, 3, 0], [7, 4, 2, 6]]])
    mask = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]]).bool()
    labels = torch.tensor([[1, 0, 0, 1]])  # mean 1/2, standard deviation sqrt(1/3)
    V = torch.tensor([  # before the first token it is 1/2 for all
        [1 / 2, 1 / 3, 1 / 2, 1], [1 / 2, 1 / 3, 1 / 2, 0], [1 / 2, 1 / 3, 0, 0],
        [1 / 2, 1, 1, 1]], dtype=torch.float64)
    found = ideas.prefix_values(completions, mask, labels.double())[0]
    assert torch.allclose(found[mask[0]], V[mask[0]])
    A = torch.tensor([  # r - 1/2, plus V after the token, minus V before it
        [1 / 2, 1 / 3, 2 / 3, 1], [-1 / 2, -2 / 3, -1 / 3, 0], [-1 / 2, -2 / 3, -5 / 6, 0],
        [1 / 2, 1, 1 / 2, 1 / 2]], dtype=torch.float64) / ((1 / 3) ** 0.5 + 1e-6)
    zeros = torch.zeros(1, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = ideas.tempo(zeros, torch.zeros(1, 4, 4), mask, labels, completions=completions)
    push = torch.autograd.grad(loss, zeros)[0][0]
    assert torch.allclose(push, -A / torch.tensor([[4], [3], [3], [4]]) / 4)


def test_tempo_is_grpo_while_no_rollout_parts():
    logp, old, mask, labels = case()
    mask, same = torch.ones_like(mask), torch.zeros(logp.shape, dtype=torch.long)
    found = ideas.tempo(logp, old, mask, labels, completions=same)
    assert torch.allclose(found, real.grpo(logp, old, mask, labels))


def test_more_rollouts_for_hard_questions():
    """8 sqrt(15), 8 sqrt(7), 8 sqrt(3), 8 sqrt(5/3), rounded up, less the 8 that are there; and by
    the definition: the smallest number whose advantages reach the sum that was set."""
    assert [ideas.more_rollouts(right, 8) for right in range(9)] == [23, 14, 6, 3, 0, 0, 0, 0, 0]
    for n, right in itertools.product((8, 12), (1, 2, 3)):
        p, N = right / n, n + ideas.more_rollouts(right, n)
        assert (N - 1) * 2 * (p * (1 - p)) ** 0.5 < 2 * (1 - p) * n <= N * 2 * (p * (1 - p)) ** 0.5


def test_groups_of_different_size_share_a_batch():
    """The first question gets no more rollouts, the second three; by hand."""
    def batch(ids, lengths, labels):
        ids, labels = torch.tensor(ids), torch.tensor(labels).bool()
        return {"completions": ids, "mask": ids > 0, "lengths": torch.tensor(lengths),
                "labels": labels, "ended": ~labels, "problems": ["P", "R"]}

    first = batch([[[1, 2], [3, 0]], [[4, 0], [5, 6]]], [[7, 6], [6, 7]], [[1, 0], [0, 0]])
    added = batch([[[7, 7, 7]], [[8, 0, 0]], [[9, 0, 0]]], [[8], [6], [6]], [[1], [0], [0]])
    found = ideas.widened(first, added, [0, 3])
    assert found["present"].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert found["completions"].tolist() == [
        [[1, 2, 0], [3, 0, 0], [1, 2, 0], [3, 0, 0], [1, 2, 0]],
        [[4, 0, 0], [5, 6, 0], [7, 7, 7], [8, 0, 0], [9, 0, 0]]]
    assert found["mask"].equal(found["completions"] > 0) and found["problems"] == ["P", "R"]
    assert found["lengths"].tolist() == [[7, 6, 7, 6, 7], [6, 7, 8, 6, 6]]
    assert found["labels"].int().tolist() == [[1, 0, 1, 0, 1], [0, 0, 1, 0, 0]]
    assert found["ended"].equal(~found["labels"])


def test_copies_weigh_nothing_and_rollouts_weigh_the_same():
    """A group of 3 and one of 8, against GRPO of each by itself."""
    logp, old, mask, labels = case()
    group = [x[1:] for x in (logp, old, mask, labels)]
    whole = ideas.grpo_of_present(*group, present=torch.ones(2, 8).bool())
    assert torch.allclose(whole, real.grpo(*group))
    labels[1, :3] = torch.tensor([True, False, True])
    present = torch.arange(8) < torch.tensor([[3], [8]])
    logp.requires_grad_()
    group = [x[1:] for x in (logp, old, mask, labels)]
    found = ideas.grpo_of_present(*group, present=present)
    small, large = real.grpo(*(x[:1, :3] for x in group)), real.grpo(*(x[1:] for x in group))
    assert torch.allclose(found, (3 * small + 8 * large) / 11)
    assert not torch.autograd.grad(found, logp)[0][1, 3:].any()
