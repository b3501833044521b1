"""Command line, bad input, checkpoints, kill and resume: the promises of the README's section "It survives"."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import real
from real import Config, UserError

ROOT = Path(real.__file__).parent
QUICK = ["--steps", "6", "--prompts", "4", "--mini_batches", "2", "--group_size", "4", "--eval_every", "0"]


def start(*flags, **kwargs):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "real.py"), *QUICK, *map(str, flags)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def run(*flags):
    process = start(*flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def metrics(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (folder / "metrics.jsonl").open()]


def weights(folder):
    return (sorted(folder.glob("checkpoint-*"))[-1] / "model.safetensors").read_bytes()


# ---- Bad flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    ({"tau": 0}, "--tau must be finite and > 0"), ({"tau": float("nan")}, "--tau"), ({"lr": 1e3}, "--lr must be"),
    ({"lr": float("inf")}, "--lr"), ({"temperature": 0}, "--temperature"), ({"group_size": 1}, "--group_size must be"),
    ({"prompts": 0}, "--prompts"), ({"prompts": 10, "mini_batches": 4}, "does not divide --prompts 10"),
    ({"steps": 0}, "--steps"), ({"keep": 0}, "--keep"), ({"seed": -1}, "--seed"), ({"kl_ref": -0.1}, "--kl_ref"),
    ({"objective": "reel"}, "choose one of real, real_bce"), ({"max_new_tokens": 0}, "--max_new_tokens"),
    ({"grad_clip": -1}, "--grad_clip"), ({"steps": 2.5}, "--steps"), ({"lr": None}, "--lr"), ({"prompts": True}, "--prompts"),
    ({"tau": [1]}, "--tau"), ({"seed": 10**14}, "--seed"), ({"beta2": 1}, "--beta2"), ({"save_every": 0}, "--save_every"),
])
def test_every_bad_setting_is_named(flags, words):
    with pytest.raises(UserError) as e:
        Config(**flags)
    assert words in str(e.value) and "\n" not in str(e.value)


@given(st.sampled_from("tau lr prompts group_size steps temperature grad_clip micro_batch_tokens".split()),
       st.one_of(st.floats(max_value=0), st.just(float("nan")), st.just(float("-inf"))))
def test_no_value_at_or_below_zero_passes(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        Config(**{name: value})


def test_every_numeric_setting_has_a_rule():
    for f in real.fields(Config):
        if f.type in (int, float):
            assert "(>" in f.metadata["help"], f.name


@pytest.mark.parametrize("flags, words", [
    (["--objective", "reel"], "choose one of"), (["--preset", "3b"], "invalid choice"),
    (["--model", "no/such/model", "--preset", "tiny"], "cannot load model"),
    (["--dataset", "missing.jsonl", "--preset", "tiny"], "cannot load data"),
    (["--problem_column", "question"], "set --problem_column"), (["--group_size", "1"], "--group_size"),
    (["--prompts", "5"], "does not divide"), (["--stepz", "3"], "unrecognized arguments"),
    (["--resume"], "holds no run to resume"), (["--config", "missing.yaml"], "missing.yaml"),
])
def test_bad_input_on_the_command_line_is_one_line_and_exit_2(tmp_path, flags, words, capsys):
    with pytest.raises(SystemExit) as e:
        real.main([*QUICK, "--output_dir", str(tmp_path / "run"), *flags])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and words in said and said.startswith("real.py: error:") | ("error:" in said)
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_presets_and_flags_and_files(tmp_path):
    assert real.parse([]) == Config()
    paper = real.parse(["--preset", "1.5b", "--steps", "7"])
    assert (paper.lr, paper.prompts, paper.group_size, paper.mini_batches, paper.tau) == (2e-6, 128, 8, 4, 0.5)
    assert (paper.temperature, paper.max_new_tokens, paper.weight_decay, paper.steps) == (0.6, 8192, 0.01, 7)
    (tmp_path / "c.yaml").write_text("lr: 1e-4\nsteps: 9\n")
    both = real.parse(["--config", str(tmp_path / "c.yaml"), "--steps", "3"])
    assert (both.lr, both.steps) == (1e-4, 3)
    (tmp_path / "bad.json").write_text('{"learning_rate": 1}')
    with pytest.raises(UserError, match="learning_rate"):
        real.parse(["--config", str(tmp_path / "bad.json")])


# ---- Bad data: every case with its message ----------------------------------------------------------------------------

GOOD = '{"problem": "1+1", "answer": "2"}\n'
DATA = {  # case: (bytes of the file, words of the error or of the notice, usable rows)
    "missing column": (b'{"question": "1+1", "answer": "2"}\n', "has no column problem but question, answer; set", None),
    "broken JSON": ((GOOD + '{"problem": "2+2", "answer":\n' + GOOD).encode(), "line 2", None),
    "not UTF-8": ('{"problem": "é", "answer": "2"}\n'.encode("latin-1"), "cannot load data|line 1", None),
    "empty file": (b"", "cannot load data", None),
    "only answerless rows": (b'{"problem": "1+1", "answer": ""}\n', "no usable row in 1", None),
    "null and empty answers": ((GOOD + '{"problem": "1+1", "answer": null}\n{"problem": "", "answer": "3"}\n').encode(),
                               "2 of 3 rows skipped", 1),
    "long prompt": ((GOOD + json.dumps({"problem": "1+" * 3000 + "1", "answer": "2"}) + "\n").encode(), "1 of 2 rows", 1),
    "duplicates stay": ((GOOD * 3).encode(), "", 3),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data(case, tmp_path, capsys):
    content, words, usable = DATA[case]
    (tmp_path / "data.jsonl").write_bytes(content)
    tokenizer = real.AutoTokenizer.from_pretrained(Config().model)
    if usable is None:
        with pytest.raises(UserError) as e:
            real.load_problems(tokenizer, Config(), str(tmp_path / "data.jsonl"), "train")
        assert any(w in str(e.value) for w in words.split("|")) and "data.jsonl" in str(e.value)
        assert "\n" not in str(e.value)
    else:
        assert len(real.load_problems(tokenizer, Config(), str(tmp_path / "data.jsonl"), "train")) == usable
        assert words in capsys.readouterr().out


def test_a_data_set_smaller_than_a_batch_is_refused(tmp_path):
    (tmp_path / "data.jsonl").write_text(GOOD * 3)
    with pytest.raises(UserError, match="3 usable problems, too few for --prompts 4"):
        real.train(Config(dataset=str(tmp_path / "data.jsonl"), prompts=4, mini_batches=2, eval_every=0,
                          output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_file_format_and_nested_columns(tmp_path, suffix):
    rows = [{"prompt": [{"role": "user", "content": f"{i}+1"}], "reward_model": {"ground_truth": str(i + 1)}, "extra": None,
             "q": f"{i}+1", "a": i + 1.0} for i in range(5)]
    data = real.datasets.Dataset.from_list(rows if suffix != "csv" else [{"q": r["q"], "a": r["a"]} for r in rows])
    file = str(tmp_path / f"data.{suffix}")
    {"json": data.to_json, "jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[suffix](file)
    tokenizer = real.AutoTokenizer.from_pretrained(Config().model)
    plain = real.load_problems(tokenizer, Config(problem_column="q", answer_column="a"), file, "train")
    assert [p["answer"] for p in plain] == [1.0, 2.0, 3.0, 4.0, 5.0]
    if suffix != "csv":
        nested = Config(problem_column="extra+prompt[0].content", answer_column="reward_model.ground_truth")
        found = real.load_problems(tokenizer, nested, file, "train")
        assert [(p["problem"], p["answer"]) for p in found] == [(f"{i}+1", str(i + 1)) for i in range(5)]
        assert all(p["opening"] == "<think>" for p in found)


def test_each_pass_over_the_data_sees_every_problem_once():
    config, problems = Config(prompts=4, mini_batches=2), [{"n": i} for i in range(10)]
    seen = [p["n"] for step in range(1, 6) for p in real.draw(problems, step, config)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


# ---- Checkpoints, kill, resume ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = run("--output_dir", folder, "--save_every", 2)
    assert code == 0, err
    return folder


LONG = ["--steps", "24", "--save_every", "2"]  # a save every other step, so that kills also fall into saves


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A longer run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("long") / "run"
    code, out, err = run("--output_dir", folder, *LONG)
    assert code == 0, err
    return folder


def kill_and_resume(long, folder, kills, seed):
    """SIGKILL a run `kills` times at random moments after its first step, then let it end; returns where it was hit."""
    rng, hit = random.Random(seed), []
    log = folder / "metrics.jsonl"
    while len(hit) < kills:
        size = log.stat().st_size if log.exists() else 0
        process = start("--output_dir", folder, *LONG, *(["--resume"] if (folder / "config.json").exists() else []))
        while process.poll() is None and not (log.exists() and log.stat().st_size not in (0, size)):
            time.sleep(0.01)
        time.sleep(rng.random())
        if process.poll() is not None:
            break  # it came to its end before the kill
        process.send_signal(signal.SIGKILL)
        process.wait()
        hit.append("save" if (folder / ".checkpoint").exists() else "step")
    code, out, err = run("--output_dir", folder, *LONG, "--resume")
    assert code == 0, err
    assert metrics(folder) == metrics(long) and weights(folder) == weights(long)
    assert (folder / "samples.jsonl").read_bytes() == (long / "samples.jsonl").read_bytes()
    return hit


def test_killed_and_resumed_is_bit_for_bit_the_same(long, tmp_path):
    assert kill_and_resume(long, tmp_path / "run", 2, seed=0)


@pytest.mark.slow
def test_twenty_kills(long, tmp_path):
    hits = []
    for i in range(20):
        hits += kill_and_resume(long, tmp_path / f"run{i}", 4, seed=i)
        print(f"run {i}: killed in {hits[-4:]}, resumed, ended with the metrics, samples and weights of the whole run")
        if len(hits) >= 20 and "save" in hits:
            break
    assert len(hits) >= 20 and "save" in hits and "step" in hits


def test_killed_before_the_first_checkpoint_starts_over(whole, tmp_path):
    process = start("--output_dir", tmp_path / "run", "--save_every", 2)
    while not (tmp_path / "run" / "config.json").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    code, out, err = run("--output_dir", tmp_path / "run", "--resume")
    assert code == 0, err
    assert metrics(tmp_path / "run") == metrics(whole)


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path):
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        folder = tmp_path / str(code)
        process = start("--output_dir", folder, "--save_every", 100)
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code and "--resume" in out
        assert len(list(folder.glob("checkpoint-*"))) == 1
    assert run("--output_dir", folder, "--resume")[0] == 0
    assert metrics(folder) == metrics(whole)


def test_a_damaged_checkpoint_is_named_and_passed_over(whole, tmp_path, capsys):
    import shutil
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    r = real.Run(real.parse([*QUICK, "--save_every", "2", "--output_dir", str(folder), "--resume"]))
    step, source = r.restore()
    said = capsys.readouterr().out
    assert "model.safetensors is damaged" in said and newest.name in said
    assert step == 4 and source.name == "checkpoint-000004" and len(metrics(folder)) == 4


def test_a_full_disk_leaves_the_checkpoint_before(whole, tmp_path):
    """No file may grow past 2 MB in this process, so writing the model's 3.3 MB fails halfway, as on a full disk."""
    import resource
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    process = start("--output_dir", folder, "--save_every", 2, "--resume", "--steps", 8,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21)))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert "cannot save" in last and "File too large" in last and "the checkpoint before it is whole" in last
    config = real.parse([*QUICK, "--output_dir", str(folder), "--save_every", "2", "--resume", "--steps", "8"])
    assert real.Run(config).restore()[0] == 6


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        real.main([*QUICK, "--output_dir", str(tmp_path / "file" / "run")])
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "\n" not in said and "Not a directory" in said


def test_a_damaged_newer_checkpoint_never_costs_a_good_one(whole, tmp_path):
    """With --keep 1, the run that fell back saves below the damaged step and must not delete what it just saved."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "checkpoint-000006" / "optimizer.pt").write_bytes(b"")
    flags = [*QUICK, "--output_dir", str(folder), "--save_every", "2", "--keep", "1", "--resume", "--steps", "5"]
    real.train(real.parse(flags))
    assert real.Run(real.parse(flags)).restore()[0] == 5
    real.train(real.parse([*flags[:-2], "--steps", "6"]))
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-000006"]
    assert weights(folder) == weights(whole)


def test_checkpoints_are_bounded_and_load_as_hugging_face_models(whole):
    names = sorted(p.name for p in whole.glob("checkpoint-*"))
    assert names == ["checkpoint-000004", "checkpoint-000006"]
    model, tokenizer = real.load_model(str(whole / names[-1]))
    assert model.num_parameters() > 1e5 and tokenizer.chat_template


def test_one_process_a_folder_and_no_silent_overwrite(whole, tmp_path):
    with pytest.raises(UserError, match="holds a run already"):
        real.Run(Config(output_dir=str(whole)))
    first = real.Run(Config(output_dir=str(tmp_path / "run")))
    with pytest.raises(UserError, match="in use by another run"):
        real.Run(Config(output_dir=str(tmp_path / "run"), resume=True))
    first.lock.release()


def test_a_start_that_failed_does_not_block_its_folder(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="cannot load model"):
        real.train(real.parse([*QUICK, "--output_dir", str(folder), "--model", str(tmp_path / "none"), "--preset", "tiny"]))
    real.train(real.parse([*QUICK, "--output_dir", str(folder)]))
    last = real.train(real.parse([*QUICK, "--output_dir", str(folder), "--resume", "--steps", "7", "--eval_every", "7"]))
    assert last["step"] == 7 and "pass@1" in last


def test_resume_names_settings_that_changed(whole):
    with pytest.raises(UserError, match=r"--tau 0.5 \(now 0.1\)"):
        real.Run(real.parse([*QUICK, "--output_dir", str(whole), "--resume", "--tau", "0.1"]))


def test_a_loss_that_is_not_finite_never_reaches_the_weights(tmp_path, monkeypatch):
    def broken(logp, old_logp, mask, labels, **_):
        return (logp * torch.inf).sum()

    monkeypatch.setitem(real.OBJECTIVES, "real", broken)
    config = real.parse([*QUICK, "--output_dir", str(tmp_path / "run"), "--save_every", "1"])
    with pytest.raises(UserError, match="three updates in a row were not finite"):
        real.train(config)
    kept = torch.load(tmp_path / "run" / "not-finite-1.pt", weights_only=True)
    assert kept["completions"].shape[:2] == (2, 4)
    saved = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert saved
    before, after = (real.load_model(str(p))[0] for p in (Config().model, saved[-1]))
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


@pytest.mark.slow
def test_soak(tmp_path):
    """2,000 steps: resident memory within 5% from step 200 on, no file handle leak, every log line valid JSON."""
    import psutil
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "real.py"), *QUICK, "--steps", "2000", "--save_every", "100", "--output_dir",
         str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    watched, seen = psutil.Process(process.pid), {}
    while process.poll() is None:
        time.sleep(1)
        step = len((folder / "metrics.jsonl").read_text().splitlines()) if (folder / "metrics.jsonl").exists() else 0
        try:
            seen[step] = watched.memory_info().rss / 2**20, watched.num_fds()
        except psutil.Error:
            break
    assert process.wait() == 0
    later = {k: v for k, v in seen.items() if k >= 200}
    first = sorted(later)[0]
    print({k: (round(v[0]), v[1]) for k, v in sorted(later.items())[:: max(1, len(later) // 20)]})
    assert max(v[0] for v in later.values()) < 1.05 * later[first][0]
    assert max(v[1] for v in later.values()) <= later[first][1] + 2
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()] == list(range(1, 2001))


def test_out_of_memory_says_what_to_lower_and_keeps_the_checkpoint(tmp_path):
    """The limit on memory is real: 100 MiB more than the process has when its second step begins."""
    flags = ["--output_dir", str(tmp_path), "--group_size", "64", "--eval_every", "0", "--save_every", "1"]
    code = f"""
import resource, sys, real
draw = real.draw
def limited(problems, step, config):
    if step == 2:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 100 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    return draw(problems, step, config)
real.draw = limited
real.main({flags} + sys.argv[1:])
"""
    def run(*more):
        return subprocess.run([sys.executable, "-c", code, *more], cwd=ROOT, text=True, capture_output=True, timeout=120)

    assert run("--steps", "1").returncode == 0
    failed = run("--steps", "2", "--resume", "--micro_batch_tokens", "1000000")
    last = failed.stderr.strip().splitlines()[-1]
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "lower --micro_batch_tokens from 1000000 to 500000" in last and str(tmp_path) in last
    assert real.Run(real.Config(output_dir=str(tmp_path), group_size=64, eval_every=0, resume=True)).restore()[0] == 1
