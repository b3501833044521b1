"""The README against the code and the logs: its commands, numbers, tables, links and length."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import real

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def printed(folder, code):
    code = f"import sys; sys.path[:0] = [{str(ROOT / folder)!r}, {str(ROOT)!r}]; {code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip()


@pytest.mark.parametrize("readme, folder, call", [
    ("README.md", "tests/experiments", "import five_seeds; five_seeds.table()"),
    ("tests/experiments/README.md", "tests/experiments", "import study; study.overview()"),
    ("tests/assignments/README.md", "tests/assignments", "import ideas; ideas.table()")])
def test_table_comes_from_the_logs(readme, folder, call):
    table = printed(folder, call)
    assert table.count("\n") >= 4 and table in (ROOT / readme).read_text()


def test_every_interval_comes_from_the_logs():
    tables = printed("tests/experiments", "import five_seeds, study, trl_seeds; "
                     "five_seeds.table(); study.overview(); study.verdicts(); study.first(); "
                     "trl_seeds.main(0)").replace("+-", "±")
    intervals = re.findall(r"[\d.]+ ± [\d.]*\d", README)
    assert len(intervals) >= 3 and all(x in tables for x in intervals)
    for row in ("REAL | 16 | 5e-05 | 0.928 ± 0.013", "GRPO | 16 | 5e-05 | 0.931 ± 0.009",
                "REAL, KL on all groups minus REAL | -0.028 ± 0.016",
                "GRPO, KL on all groups minus GRPO | -0.017 ± 0.015",
                "REAL minus frozen credit | +0.001 ± 0.007", "REAL | 4 | 0.0001 | 0.889 ± 0.020",
                "GRPO | 4 | 0.0001 | 0.889 ± 0.017", "REAL minus GRPO | -0.004 ± 0.012"):
        assert f"\n| {row} |" in tables, row


def test_every_interval_in_the_texts_of_the_notebook_comes_from_the_logs():
    tables = printed("tests/experiments", "import study; study.overview(); study.verdicts(); "
                     "study.first()")
    cells = json.loads((ROOT / "notebook.ipynb").read_text())["cells"]
    texts = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    intervals = re.findall(r"[\d.]+ ± [\d.]*\d", texts)
    assert intervals and all(x in tables for x in intervals)


def comparisons():
    """Texts that compare REAL with GRPO by the study's numbers."""
    for file in ("README.md", "tests/experiments/README.md", "tests/assignments/README.md"):
        yield file, (ROOT / file).read_text() if (ROOT / file).exists() else ""
    for i, cell in enumerate(json.loads((ROOT / "notebook.ipynb").read_text())["cells"]):
        text = "".join(cell["source"])
        compared = re.search("GRPO ends|GRPO 0\\.|lead over GRPO", text)
        if cell["cell_type"] == "markdown" and compared:
            yield f"notebook cell {i}", text


@pytest.mark.parametrize("place, text", [pytest.param(*x, id=x[0]) for x in comparisons()])
def test_the_confound_is_named_wherever_real_is_compared_with_grpo(place, text):
    """GRPO ran with a KL term and REAL with none: their gap is not the objective's doing alone."""
    assert "GRPO" in text and "confounded" in text and re.search(r"KL\s+term", text)


def test_it_is_one_sitting():
    lines = README.splitlines()
    assert len(lines) <= 150 and len(README.split()) <= 1800
    assert [line for line in lines if len(line) > 100] == []


def test_every_command_is_one_that_the_parsers_take(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs/ of the user's is looked at
    text = README.replace("\\\n", "")  # a command may go on in the next line
    commands = re.findall(r"(?:^|`)python (real|eval)\.py([^#`\n]*)", text, re.M)
    for script, flags in commands:
        (real if script == "real" else evaluation).parse(shlex.split(flags))
    assert {script for script, _ in commands} == {"real", "eval"} and len(commands) >= 5
    flags = set(re.findall(r"--([a-z0-9_]+)", README[: README.index("## Larger machines")]))
    others = {"preset", "help", "notebook", "tables"}  # the last two: pytest's, study.py's
    assert flags - set(vars(real.parse([]))) == others


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\((?!https://)([^)]+)\)", README)
    assert len(links) >= 7
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_presets():
    rows = {row[0]: row[1:] for row in
            (re.findall(r"[^|]+", line) for line in README.splitlines()) if len(row) == 8}
    rows = {name.strip(" `"): [cell.strip() for cell in cells] for name, cells in rows.items()}
    for name, preset in real.PRESETS.items():
        model, data = rows[name][:2]
        if preset:
            assert preset["model"].endswith(model)
            assert data.lower() in preset["dataset"].lower()
            count = {"0.5b": 494_032_768, "paper-7b": 7_615_616_512}.get(name, 1_777_088_000)
            assert rows[name][4:6] == [f"{count * 20e-9:.0f}", f"{count * 28e-9:.0f}"]
    assert set(real.PRESETS) == set(rows) - {"preset", "---"}


def test_what_a_run_prints_and_logs_is_what_the_readme_shows(tmp_path, capsys):
    config = real.Config(steps=1, prompts=4, mini_batches=1, max_new_tokens=24, eval_limit=2,
                         eval_samples=1, output_dir=str(tmp_path / "run"))
    real.train(config)
    header = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("step "))
    lines = README[README.index(header) :].splitlines()
    assert lines[0] == header and all(len(line) <= len(header) for line in lines[1:3])
    section = README[README.index("| key | meaning |") :]
    section = section[: section.index("\n\n")]
    explained = {key for row in section.splitlines()[2:]
                 for key in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert explained == set(json.loads((Path(config.output_dir) / "metrics.jsonl").read_text()))


def test_every_test_that_keeps_a_promise_exists():
    table = (ROOT / "tests" / "README.md").read_text()
    tests = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)(\.\.\.)?`", table)
    missing = [n for n, more in named if not re.search(rf"def {n}" + r"\b" * (not more), tests)]
    assert len(named) > 30 and not missing
