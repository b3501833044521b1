"""The scripts of tests/experiments run: what they print needs time, a card or other packages."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

EXPERIMENTS = Path(__file__).parent / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXPERIMENTS))
    spec.loader.exec_module(module)
    sys.path.remove(str(EXPERIMENTS))
    return module


def test_the_questions_to_a_card_end_in_one_line_of_json():
    command = [sys.executable, EXPERIMENTS / "card.py", "--dry"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    assert {"limits", "embedded", "0.5b_step", "speed", "memory_0.5b", "memory_1.5b",
            "memory_paper"} <= found.keys()
    assert all(row["sample"] > 0 and row["generate"] > 0 for row in found["speed"].values())
    assert found["0.5b_step"]["tokens"] == 4 * 8 * (200 + 12) and found["memory_paper"]["card"]


def test_the_benchmark_runs_a_step():
    (seconds, tokens), = load("benchmark").ours(1)
    assert seconds > 0 and 16 * 8 < tokens <= 16 * 8 * 48


def test_a_study_run_becomes_a_line_of_its_log_and_is_read_again(tmp_path, monkeypatch):
    study = load("study")
    monkeypatch.setattr(study.runlog, "LOGS", tmp_path)
    monkeypatch.setattr(study, "BUDGET", dict(steps=2, eval_every=1, eval_samples=1, eval_limit=4,
                                              prompts=4, mini_batches=2, warmup=0))
    settings = study.FROZEN["frozen credit"] | {"lr": 1e-4}
    rows, seconds = study.execute(("main", "frozen credit", 0, settings))
    study.runlog.append("study", rows, study.KEYS, experiment="main", arm="frozen credit", seed=0,
                        config=settings, seconds=seconds)
    (read,), = study.read("main").values()
    assert [row["step"] for row in read] == [1, 2] and "pass@1_before" in read[0]
    assert read[1]["pass@1"] == round(rows[1]["pass@1"], 5)
    shares = read[0]["ratio_shares"]
    assert abs(sum(shares["right"] + shares["wrong"]) - 1) < 1e-4  # 6 numbers of 5 digits
    for arm, objective in (study.METHODS | study.WHY | study.VARIANTS).items():
        study.real.Config(**objective)  # each is a setting that exists


def test_random_labels_are_shuffled_within_a_mini_batch(tmp_path, monkeypatch):
    """The control of five_seeds: as many right ones, in other places."""
    five, seen = load("five_seeds"), []
    monkeypatch.setattr(five.runlog, "LOGS", tmp_path / "logs")
    import real

    update, config = real.update, real.Config

    def look(model, optimizer, batch, settings):
        seen.append(batch["labels"])
        return update(model, optimizer, batch, settings)
    monkeypatch.setattr(real, "update", look)
    monkeypatch.setattr(real, "Config", lambda **more: config(
        steps=1, eval_every=0, prompts=4, mini_batches=2, **more))
    five.child("random labels", 0, str(tmp_path / "run"), 0)
    run, = five.runlog.read("five_seeds")
    assert run["arm"] == "random labels" and run["rows"][0]["step"] == 1
    right = sum(int(labels.sum()) for labels in seen)
    assert right == round(run["rows"][0]["reward"] * 32)
