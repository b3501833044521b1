"""eval.py: its statistics against brute force, resuming, and one line for every bad input."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import real

spec = importlib.util.spec_from_file_location("eval_script", Path(real.__file__).with_name("eval.py"))
ev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ev)

QUICK = ["--samples", "4", "--limit", "12", "--batch", "3", "--max_new_tokens", "40"]


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(labels, k):
    subsets = list(itertools.combinations(labels, k))
    assert ev.pass_at_k(labels, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_majority_vote_counts_equal_values_as_one_answer():
    box = lambda *answers: [rf"</think>\boxed{{{a}}}" for a in answers]
    assert ev.majority_vote(box("1/2", "3", "0.5", "3", r"\frac{2}{4}"), [1, 0, 1, 0, 1]) == 1
    assert ev.majority_vote(box("1/2", "3", "3"), [1, 0, 0]) == 0
    assert ev.majority_vote(["no box", "<think> \\boxed{1}"], [0, 0]) == 0


def test_the_interval_treats_a_problem_as_one_observation():
    """Bootstrap over problems, samples kept together, as an independent way to the same width."""
    rng = np.random.default_rng(0)
    p = rng.random(200)
    draws = [np.mean(rng.choice(p, 200)) for _ in range(4000)]
    assert ev.interval(p) == pytest.approx(np.diff(np.quantile(draws, [0.025, 0.975]))[0] / 2, rel=0.06)
    assert np.isnan(ev.interval([0.5]))


def scores(folder):
    return json.loads((folder / "scores.json").read_text())


def test_an_interrupted_evaluation_resumes_to_the_same_table(tmp_path, capsys):
    ev.main([*QUICK, "--output_dir", str(tmp_path / "a")])
    table = capsys.readouterr().out
    (tmp_path / "b").mkdir()
    for file in (tmp_path / "a").glob("*.jsonl"):
        lines = file.read_text().splitlines(True)
        assert len(lines) == 13
        (tmp_path / "b" / file.name).write_text("".join(lines[:6]) + lines[6][: len(lines[6]) // 2])  # torn by a kill
    ev.main([*QUICK, "--output_dir", str(tmp_path / "b")])
    assert capsys.readouterr().out == table and scores(tmp_path / "a") == scores(tmp_path / "b")
    assert "Pass@1" in table and "Avg." in table and "maj@4" in table
    with pytest.raises(SystemExit):
        ev.main([*QUICK, "--output_dir", str(tmp_path / "b"), "--temperature", "1"])
    assert "was made with another temperature" in capsys.readouterr().err


def test_killed_halfway_and_run_again(tmp_path):
    """kill -9 once some completions are there; the second run keeps them and ends with the whole run's scores."""
    flags = ["--samples", "4", "--limit", "96", "--batch", "2", "--max_new_tokens", "40"]
    command = [sys.executable, ev.__file__, *flags, "--output_dir"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "whole"], env=env, check=True, capture_output=True)
    process = subprocess.Popen([*command, tmp_path / "killed"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (files := list((tmp_path / "killed").glob("*.jsonl"))) or len(files[0].read_bytes().splitlines()) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = files[0].read_text().splitlines()[:20]
    assert len(files[0].read_text().splitlines()) < 97 and not (tmp_path / "killed" / "scores.json").exists()
    subprocess.run([*command, tmp_path / "killed"], env=env, check=True, capture_output=True)
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    assert files[0].read_text().splitlines()[:20] == kept


def test_several_models_give_paired_differences(tmp_path, capsys):
    model, tokenizer = real.load_model(real.Config().model)
    for p in model.model.layers[3].parameters():
        p.data.zero_()  # a broken copy
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    ev.main([*QUICK, "--output_dir", str(tmp_path / "out"), "--model", real.Config().model, str(tmp_path / "broken")])
    row = next(line for line in capsys.readouterr().out.splitlines() if "broken" in line)
    both = scores(tmp_path / "out")
    before, after = (both[m]["tiny"]["pass@1"] for m in (real.Config().model, str(tmp_path / "broken")))
    assert f"({after - before:+.3f} ±" in row and after < before


FORMATS = {  # the columns of each benchmark, as its source has them
    "aime24": [{"problem": "1+1", "answer": "025", "id": 1}], "aime25": [{"problem": "1+1", "answer": 2, "id": 1}],
    "math500": [{"problem": "1+1", "answer": r"\frac{1}{2}"}], "amc23": [{"problem": "1+1", "answer": 142.0}],
    "minerva": [{"question": "1+1", "answer": ["2", "4/2"]}],
    "olympiad": [{"question": "1+1", "context": None, "final_answer": ["$2$"]},
                 {"question": "b?", "context": "a = 1.", "final_answer": ["$3$", "4"]}],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_columns_of_every_benchmark_load(name, tmp_path, monkeypatch):
    file = tmp_path / f"{name}.parquet"
    real.datasets.Dataset.from_list(FORMATS[name]).to_parquet(file)
    _, config, split, problem, answer = ev.BENCHMARKS[name]
    monkeypatch.setitem(ev.BENCHMARKS, name, (str(file), config, split, problem, answer))
    tokenizer = real.AutoTokenizer.from_pretrained(real.Config().model)
    problems = ev.load_benchmark(name, tokenizer, ev.parse([]))
    assert len(problems) == len(FORMATS[name])
    if name == "olympiad":
        assert [p["problem"] for p in problems] == ["1+1", "a = 1.\nb?"]
        assert real.is_correct(r"\boxed{4}", problems[1]["answer"]) and real.is_correct(r"\boxed{3}", problems[1]["answer"])
    if name == "amc23":
        assert real.is_correct(r"\boxed{142}", problems[0]["answer"])


@pytest.mark.parametrize("flags, words", [
    (["--benchmarks", "aime99"], "cannot load data aime99"), (["--model", "no/such"], "cannot load model no/such"),
    (["--samples", "0"], "--samples"), (["--top_p", "0"], "--top_p"), (["--limit", "0"], "--limit"),
    (["--benchmarks", "FILE", "--answer_column", "gold"], "set --answer_column"), (["--benchmarks", "EMPTY"], "EMPTY"),
    (["--model", "BERT"], "cannot load model"),
])
def test_bad_input_is_one_line_and_exit_2(flags, words, tmp_path, capsys):
    (tmp_path / "FILE.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    (tmp_path / "EMPTY.jsonl").write_text("")
    (tmp_path / "BERT").mkdir()
    (tmp_path / "BERT" / "config.json").write_text('{"model_type": "vit"}')
    here = {"FILE": "FILE.jsonl", "EMPTY": "EMPTY.jsonl", "BERT": "BERT"}
    flags = [str(tmp_path / here[f]) if f in here else f for f in flags]
    with pytest.raises(SystemExit) as e:
        ev.main([*QUICK, "--output_dir", str(tmp_path / "out"), *flags])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and words in said
