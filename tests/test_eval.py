"""eval.py: its statistics against brute force, resuming, one line for every bad input."""

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
import torch
from transformers import PreTrainedModel

import real

EVAL = Path(real.__file__).with_name("eval.py")
spec = importlib.util.spec_from_file_location("eval_script", EVAL)
ev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ev)

QUICK = ["--samples", "4", "--limit", "12", "--batch", "3", "--max_new_tokens", "40"]


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(labels, k):
    subsets = list(itertools.combinations(labels, k))
    assert ev.pass_at_k(labels, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def test_majority_vote_counts_equal_values_as_one_answer():
    def box(*answers):
        return [rf"</think>\boxed{{{a}}}" for a in answers]

    assert ev.majority_vote(box("1/2", "3", "0.5", "3", r"\frac{2}{4}"), [1, 0, 1, 0, 1]) == 1
    assert ev.majority_vote(box("1/2", "3", "3"), [1, 0, 0]) == 0
    assert ev.majority_vote(["no box", "<think> \\boxed{1}"], [0, 0]) == 0


def test_the_interval_treats_a_problem_as_one_observation():
    """Bootstrap over problems, samples kept together, as an independent way to the same width."""
    rng = np.random.default_rng(0)
    p = rng.random(200)
    draws = [np.mean(rng.choice(p, 200)) for _ in range(4000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert ev.interval(p) == pytest.approx((high - low) / 2, rel=0.06)
    assert ev.interval([0.5]) is None


def scores(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")
    return json.loads((folder / "scores.json").read_text(), parse_constant=refuse)


def completions(folder):
    return sorted(folder.glob("*.jsonl"))


def stop_after(batches, monkeypatch):
    """Ctrl-C in the middle of the evaluation."""
    rollouts, calls = real.rollouts, []

    def stopping(*args, **kwargs):
        calls.append(args)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return rollouts(*args, **kwargs)
    monkeypatch.setattr(real, "rollouts", stopping)


def test_an_interrupted_evaluation_resumes_to_the_same_table(tmp_path, capsys, monkeypatch):
    ev.main([*QUICK, "--output_dir", str(tmp_path / "a")])
    table = capsys.readouterr().out
    assert "Pass@1" in table and "Avg." in table and "maj@4" in table and "tiny" in table
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_after(3, m)  # the first call is that of the check at the start
        ev.main([*QUICK, "--output_dir", str(tmp_path / "b")])
    assert not (tmp_path / "b" / "scores.json").exists()
    kept = completions(tmp_path / "b")[0].read_text().splitlines()[1:]
    assert len(kept) == 6
    capsys.readouterr()
    ev.main([*QUICK, "--output_dir", str(tmp_path / "b")])
    assert capsys.readouterr().out == table and scores(tmp_path / "a") == scores(tmp_path / "b")
    a, b = (completions(tmp_path / x)[0].read_text() for x in "ab")
    assert a == b and b.splitlines()[1:7] == kept


@pytest.mark.parametrize("flags, word", [
    (["--temperature", "1"], "temperature"), (["--seed", "1"], "seed"), (["--slots", "8"], "slots"),
    (["--max_new_tokens", "30"], "max_new_tokens"), (["--limit", "6"], "limit")])
def test_completions_of_other_settings_are_refused(flags, word, tmp_path, capsys):
    ev.main([*QUICK, "--output_dir", str(tmp_path)])
    file, = completions(tmp_path)
    before = file.read_bytes()
    with pytest.raises(SystemExit) as e:
        ev.main([*QUICK, "--output_dir", str(tmp_path), *flags])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and "it was made with another" in said and word in said
    assert file.read_bytes() == before


def copy_of_the_model(folder):
    model, tokenizer = real.load_model(real.TINY)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


def changed_template(folder):
    """The same texts, other prompt ids."""
    tokenizer = real.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "Question: " + tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def changed_weight(folder):
    """One number of one weight, by its last bit."""
    model, _ = real.load_model(folder)
    last = model.model.norm.weight.data
    last[0] = last[0].nextafter(last[0] + 1)
    model.save_pretrained(folder)


def changed_order(folder):
    """Two layers in each other's place: the same numbers in all."""
    model, _ = real.load_model(folder)
    layers = model.model.layers
    layers[0], layers[3] = layers[3], layers[0]
    model.save_pretrained(folder)


def changed_config(folder):
    """The same weights, another norm."""
    config = json.loads((folder / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (folder / "config.json").write_text(json.dumps(config))


def changed_end(folder):
    """Another end token, as when a generation_config.json is mended."""
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = [1, 5]
    (folder / "generation_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change, word", [(changed_template, "prompts"),
                                          (changed_weight, "weights"), (changed_end, "ends"),
                                          (changed_order, "weights"), (changed_config, "weights")])
def test_a_change_under_the_same_name_is_noticed(change, word, tmp_path, capsys):
    copy_of_the_model(tmp_path / "m")
    command = [*QUICK, "--model", str(tmp_path / "m"), "--output_dir", str(tmp_path / "out")]
    ev.main(command)
    change(tmp_path / "m")
    with pytest.raises(SystemExit) as e:
        ev.main(command)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and f"it was made with another {word};" in said + ";"


def cut(text):
    return text[: len(text) // 2]


def flipped(text):
    return text[::-1].replace("true", "false", 1).replace("eurt", "eslaf", 1)[::-1]


@pytest.mark.parametrize("damage", [
    cut, flipped, lambda text: "", lambda text: "[]", lambda text: "{}\n", lambda text: text * 2,
    lambda text: "\x00" * len(text), lambda text: "\xff\xfe\x80",
    lambda text: text.replace('"crc"', '"cr"')])
def test_a_damaged_file_is_one_line(damage, tmp_path, capsys):
    ev.main([*QUICK, "--output_dir", str(tmp_path)])
    file, = completions(tmp_path)
    damaged = damage(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged, encoding="latin1")
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        ev.main([*QUICK, "--output_dir", str(tmp_path)])
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and str(file) in said[-1] and "delete it" in said[-1]
    assert not [line for line in said[:-1] if not line.startswith("Loading weights")]
    assert file.read_text(encoding="latin1") == damaged


def test_a_completions_file_that_is_a_folder_is_one_line(tmp_path, capsys):
    ev.main([*QUICK, "--output_dir", str(tmp_path)])
    file, = completions(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(SystemExit) as e:
        ev.main([*QUICK, "--output_dir", str(tmp_path)])
    assert e.value.code == 2 and str(file) in capsys.readouterr().err


def test_one_problem_has_no_interval_and_no_nan(tmp_path, capsys):
    ev.main([*QUICK, "--limit", "1", "--output_dir", str(tmp_path)])
    found, = scores(tmp_path).values()
    assert found["tiny"]["ci95"] is None and "nan" not in capsys.readouterr().out.lower()


def test_names_never_collide(tmp_path):
    """Folders of the same last name, and files whose names differ in signs alone."""
    for folder in ("x", "y"):
        model, tokenizer = copy_of_the_model(tmp_path / folder / "m")
    row = '{"problem": "1+%d", "answer": "%d"}\n'
    for i, name in enumerate(("p/data.jsonl", "q/data.jsonl", "p_data.jsonl")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(row % (i, 1 + i))
    models = [str(tmp_path / x / "m") for x in "xy"]
    files = [str(tmp_path / x) for x in ("p/data.jsonl", "q/data.jsonl", "p_data.jsonl")]
    ev.main(["--samples", "2", "--max_new_tokens", "8", "--output_dir", str(tmp_path / "out"),
             "--model", *models, *models, "--benchmarks", *files])
    assert len(completions(tmp_path / "out")) == 6
    assert {m: set(b) for m, b in scores(tmp_path / "out").items()} == dict.fromkeys(
        models, set(files))
    for m in models:
        for i, file in enumerate(files):
            assert list(scores(tmp_path / "out")[m][file]["per_problem"]) == [f"1+{i}"]


def test_killed_halfway_and_run_again(tmp_path):
    """kill -9 once some completions are there: the second run ends with the whole run's scores."""
    flags = ["--samples", "4", "--limit", "48", "--batch", "1", "--max_new_tokens", "40"]
    command = [sys.executable, ev.__file__, *flags, "--output_dir"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, tmp_path / "whole"], env=env, check=True, capture_output=True)
    null = subprocess.DEVNULL
    process = subprocess.Popen([*command, tmp_path / "killed"], env=env, stdout=null, stderr=null)
    killed = tmp_path / "killed"
    while not (files := completions(killed)) or files[0].read_bytes().count(b"\n") < 11:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = files[0].read_text().splitlines()[1:]
    assert 9 < len(kept) < 48 and not (tmp_path / "killed" / "scores.json").exists()
    subprocess.run([*command, tmp_path / "killed"], env=env, check=True, capture_output=True)
    assert scores(tmp_path / "killed") == scores(tmp_path / "whole")
    assert files[0].read_text().splitlines()[1 : len(kept) + 1] == kept


def test_several_models_give_paired_differences(tmp_path, capsys):
    model, tokenizer = copy_of_the_model(tmp_path / "broken")
    for p in model.model.layers[3].parameters():
        p.data.zero_()
    model.save_pretrained(tmp_path / "broken")
    names = [real.TINY, str(tmp_path / "broken")]
    ev.main([*QUICK, "--output_dir", str(tmp_path / "out"), "--model", *names])
    row = next(line for line in capsys.readouterr().out.splitlines() if "broken" in line)
    shares = [scores(tmp_path / "out")[name]["tiny"]["per_problem"] for name in names]
    assert shares[0].keys() == shares[1].keys() and len(shares[0]) == 12
    change = np.array([shares[1][p] - shares[0][p] for p in shares[0]])
    assert change.mean() < 0
    half = 1.96 * change.std(ddof=1) / 12**0.5
    assert f"({change.mean():+.3f} ± {half:.3f})" in row


def test_differences_pair_problems_not_places(capsys):
    """A model whose tokenizer sorts the problems otherwise, and skips one as too long."""
    rows = [{"problem": p, "labels": labels, "lengths": [1, 1], "ended": [1, 1], "texts": ["", ""]}
            for p, labels in (("a", [1, 1]), ("b", [0, 0]), ("c", [1, 0]))]
    ev.report({"first": {"x": ev.score(rows)}, "second": {"x": ev.score(rows[1::-1])}})
    line = next(x for x in capsys.readouterr().out.splitlines() if "second" in x)
    assert "(+0.000 ± 0.000)" in line


def test_greedy_is_the_likeliest_token(tmp_path):
    ev.main([*QUICK, "--temperature", "0", "--output_dir", str(tmp_path)])
    rows = completions(tmp_path)[0].read_text().splitlines()[1:]
    texts = [json.loads(row)["texts"] for row in rows]
    assert len(texts) == 12 and all(len(set(group)) == 1 for group in texts)


def test_weights_on_a_gpu_are_rounded_and_buffers_are_not(tmp_path, monkeypatch):
    """What is sampled from on a card, looked at on the CPU: a move to "cuda" does nothing here."""
    seen, rollouts = [], real.rollouts

    def look(model, *args, **kwargs):
        seen.append(({p.dtype for p in model.parameters()}, {b.dtype for b in model.buffers()}))
        return rollouts(model, *args, **kwargs)
    monkeypatch.setattr(real, "rollouts", look)
    monkeypatch.setattr(real.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *args: self)
    ev.main([*QUICK, "--limit", "3", "--output_dir", str(tmp_path)])
    assert seen[1:] == [({real.torch.bfloat16}, {real.torch.float32})]  # [0]: the check before


FORMATS = {  # the columns of each benchmark, as its source has them
    "aime24": [{"problem": "1+1", "answer": "025", "id": 1}],
    "aime25": [{"problem": "1+1", "answer": 2, "id": 1}],
    "math500": [{"problem": "1+1", "answer": r"\frac{1}{2}"}],
    "amc23": [{"problem": "1+1", "answer": 142.0}],
    "minerva": [{"question": "1+1", "answer": ["2", "4/2"]}],
    "olympiad": [{"question": "1+1", "context": None, "final_answer": ["$2$"]},
                 {"question": "b?", "context": "a = 1.", "final_answer": ["$3$", "4"]}],
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_columns_of_every_benchmark_load(name, tmp_path, monkeypatch):
    _, config, split, problem, answer = ev.BENCHMARKS[name]
    real.datasets.Dataset.from_list(FORMATS[name]).to_parquet(tmp_path / f"{split}.parquet")
    monkeypatch.setitem(ev.BENCHMARKS, name, (str(tmp_path), None, split, problem, answer))
    problems, room = ev.load_benchmark(name, *real.load_model(real.TINY), ev.parse([]))
    assert room == 4096 - max(len(p["prompt_ids"]) for p in problems)  # the positions of `tiny`
    assert len(problems) == len(FORMATS[name])
    if name == "olympiad":
        assert [p["problem"] for p in problems] == ["1+1", "a = 1.\nb?"]
        assert all(real.is_correct(rf"\boxed{{{x}}}", problems[1]["answer"]) for x in (3, 4))
    if name == "amc23":
        assert real.is_correct(r"\boxed{142}", problems[0]["answer"])


@pytest.mark.parametrize("flags, words", [
    (["--benchmarks", "aime99"], "data aime99"), (["--model", "no/such"], "model no/such"),
    (["--samples", "0"], "--samples"), (["--top_p", "0"], "--top_p"), (["--limit", "0"], "--limit"),
    (["--temperature", "nan"], "--temperature"), (["--slots", "0"], "--slots"),
    (["--seed", "-1"], "--seed"), (["--max_new_tokens", "0"], "--max_new_tokens"),
    (["--benchmarks", "FILE", "--answer_column", "gold"], "--answer_column"),
    (["--benchmarks", "EMPTY"], "EMPTY"), (["--model", "BERT"], "model "),
    (["--max_prompt_tokens", "3"], "usable rows"), (["--output_dir", "FILE"], "FILE"),
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
    assert e.value.code == 2 and words in said and "error: " in said


def test_out_of_memory_names_the_flag(tmp_path, capsys, monkeypatch):
    def sample(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
    monkeypatch.setattr(real, "check_model", lambda *_: None)
    monkeypatch.setattr(real, "sample", sample)
    with pytest.raises(SystemExit) as e:
        ev.main([*QUICK, "--output_dir", str(tmp_path)])
    assert e.value.code == 2 and "--slots" in capsys.readouterr().err


def test_a_full_disk_leaves_the_scores_of_before(tmp_path, monkeypatch):
    ev.main([*QUICK, "--output_dir", str(tmp_path)])
    before, write_text = (tmp_path / "scores.json").read_text(), Path.write_text

    def full(path, text):
        if path.name.startswith("scores"):
            write_text(path, text[:9])
            raise OSError(28, "No space left on device")
        return write_text(path, text)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(SystemExit):
        ev.main([*QUICK, "--output_dir", str(tmp_path)])
    assert (tmp_path / "scores.json").read_text() == before


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-40, 1e-9])
def test_temperatures_next_to_0_take_the_likeliest_token(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0], [-1.0, -9.0, -0.5]])
    assert ev.nucleus(logits, temperature, 0.95).tolist() == [1, 2]


def test_one_evaluation_a_folder(tmp_path, capsys):
    with real.FileLock(tmp_path / ".lock"), pytest.raises(SystemExit) as e:
        ev.main(["--limit", "1", "--samples", "1", "--output_dir", str(tmp_path)])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and ".lock" in said
    assert [p.name for p in tmp_path.iterdir() if p.stat().st_size] == []
