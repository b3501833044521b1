"""The run's folder: what it refuses, what it never touches, what a kill or a full disk costs."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import real
from common import QUICK, ROOT, contents, metrics, one_line, run, start, train
from real import Config, UserError


GO_ON = ["--resume", "--steps", "7", "--max_new_tokens", "8"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: 6 steps, checkpoints 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    assert any(row["grad_norm"] for row in metrics(folder))  # else all weights are the first ones
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def settings(checkpoint):
    return json.loads((checkpoint / "run.json").read_text())


def same_end(folder, whole, step=6):
    """Metrics, samples, weights and AdamW's state are bit for bit those of the whole run."""
    assert metrics(folder) == metrics(whole)
    for name in ("samples.jsonl", f"checkpoint-{step:06d}/model.safetensors",
                 f"checkpoint-{step:06d}/trainer.pt", f"checkpoint-{step:06d}/samples.jsonl"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def refused(folder, *flags):
    """The one line that a start or a resume is refused with; the folder stays as it was."""
    before = contents(folder)
    with pytest.raises(UserError) as e:
        train(folder, *flags)
    assert one_line(e.value) and contents(folder) == before
    return str(e.value)


# ---- Rule 1: new, empty, or a run of ours --------------------------------------------------------


def test_a_models_folder_is_refused(tmp_path):
    model = shutil.copytree(real.TINY, tmp_path / "model")
    assert "no checkpoint of a run" in refused(model)
    assert "no checkpoint of a run" in refused(model, "--resume")


@pytest.mark.parametrize("settings", [b"", b"{", b"3", b"\xff\xfe", b"[" * 100_000])
def test_settings_that_cannot_be_read_are_one_line(settings, tmp_path):
    (tmp_path / "checkpoint-000500").mkdir()
    (tmp_path / "checkpoint-000500" / "run.json").write_bytes(settings)
    for flags in ((), ("--resume",)):
        assert "checkpoint-000500/run.json" in refused(tmp_path, *flags)


def test_a_checkpoint_of_another_program_is_refused_beside_ours_it_is_left_alone(copy, tmp_path):
    other = tmp_path / "other" / "checkpoint-100000"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_text("x")
    for flags in ((), ("--resume",)):
        assert "no checkpoint of a run" in refused(other.parent, *flags)
    shutil.copytree(other, copy / other.name)
    train(copy, *GO_ON, "--keep", "1")
    assert sorted(p.name for p in copy.glob("checkpoint*")) == ["checkpoint-000007", other.name]
    assert (copy / other.name / "model.safetensors").read_text() == "x"


def test_any_file_of_somebody_else_is_enough(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds files" in refused(tmp_path)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    assert "no run to resume" in refused(tmp_path / "new", "--resume")
    assert contents(tmp_path / "new") == {}


def test_bad_input_leaves_no_run_behind_and_does_not_block_the_folder(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        train(tmp_path / "run", "--eval_every", "1", "--eval_dataset", tmp_path / "none.jsonl")
    assert contents(tmp_path / "run") == {}
    assert train(tmp_path / "run", "--steps", "1")["step"] == 1


# ---- Rule 2: only our exact names ----------------------------------------------------------------


def test_files_with_other_names_are_never_touched(copy):
    foreign = {"data.jsonl": '{"problem": "1+1", "step": 99}\nno newline', "notes.txt": "x",
               "metrics.jsonl.bak": '{"step": 99}\n', "checkpoint-000002-good/model": "x",
               "checkpoint-best/model": "x", "checkpoint-000001.tar": "x", "checkpoint-1/m": "x"}
    for name, text in foreign.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    train(copy, *GO_ON)
    assert {name: (copy / name).read_text() for name in foreign} == foreign
    assert metrics(copy)[-1]["step"] == 7


def test_the_newest_checkpoints_are_kept_and_only_the_last_can_go_on_exactly(whole):
    names = sorted(p.name for p in whole.glob("checkpoint-*"))
    assert names == ["checkpoint-000004", "checkpoint-000006"]
    assert [p.parent.name for p in whole.rglob("trainer.pt")] == [names[-1]]
    model, tokenizer = real.load_model(whole / names[-1])
    assert model.num_parameters() > 1e5 and tokenizer.chat_template


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 5, 6, 9])
def test_keep_means_that_many(keep, tmp_path):
    model, tokenizer = real.load_model(real.TINY)
    config = Config(output_dir=str(tmp_path / "run"), keep=keep)
    optimizer = torch.optim.SGD(model.parameters())
    model.save_pretrained = lambda folder, **_: os.mkdir(folder)
    tokenizer.save_pretrained = lambda folder: None
    with real.Run(config) as r:
        r.settings = {}
        for name in real.LOGS:
            (r.path / name).write_text("")
        for step in range(1, 8):
            optimizer.param_groups[0]["params"] = []
            r.save(step, model, tokenizer, optimizer)
        assert sorted(p.name for p in r.path.glob("*checkpoint*")) == [
            f"checkpoint-{step:06d}" for step in range(max(1, 8 - keep), 8)]


# ---- Rule 3: a checkpoint that cannot be read ----------------------------------------------------


def damage(file, how):
    if how == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "other bytes":
        file.write_bytes(b"\x00\xff" * 5000)
    else:
        file.unlink()
        {"a folder": os.mkdir, "a pipe": os.mkfifo, "gone": str}[how](file)


@pytest.mark.parametrize("name, how", [
    *((name, how) for name in ("model.safetensors", "trainer.pt", "config.json", "run.json")
      for how in ("cut short", "empty", "other bytes")),
    ("run.json", "a folder"), ("metrics.jsonl", "a folder"), ("samples.jsonl", "a pipe")])
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_touched(name, how, copy):
    """The line says how to go on without it."""
    newest = copy / "checkpoint-000006"
    damage(newest / name, how)
    said = refused(copy, "--resume", "--steps", "8")
    assert "delete it to go on from the one before" in said and str(newest) in said


def test_only_a_checkpoint_of_the_run_is_ever_to_be_deleted(tmp_path):
    """Advice to delete a user's model or data, or a whole run, would be worse than none."""
    (tmp_path / "checkpoint-mine").mkdir()
    for flags in (["--model", tmp_path / "checkpoint-mine"],
                  ["--dataset", tmp_path / "checkpoint-data.jsonl"]):
        assert "delete" not in refused(tmp_path / "checkpoint-000001-run", *flags)


def test_what_is_in_the_way_of_a_checkpoint_is_refused_before_it_costs_steps(copy, tmp_path):
    (copy / "checkpoint-000006" / "run.json").unlink()  # so that it is not ours any more
    assert "checkpoint-000006 is in the way" in refused(copy, "--resume", "--steps", "8")
    shutil.rmtree(copy / "checkpoint-000006")
    (tmp_path / "mine").mkdir()
    (copy / ".checkpoint").symlink_to(tmp_path / "mine")
    assert "is a link" in refused(copy, "--resume", "--steps", "8")


@pytest.mark.parametrize("name, fine", [("my run\u00a0\u3000\u200d", True), ("b\udcff", False)])
def test_a_folder_of_any_characters_works_or_is_refused_before_it_costs_steps(name, fine, tmp_path):
    if fine:
        assert train(tmp_path / name, "--steps", "1")["step"] == 1
    else:
        assert "UTF-8" in refused(tmp_path / name)


def test_a_damaged_log_of_a_checkpoint_is_one_line_at_the_end(copy):
    log = copy / "checkpoint-000006" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    with pytest.raises(UserError, match="metrics.jsonl"):
        train(copy, "--resume", "--steps", "7")
    assert (copy / "checkpoint-000007" / "model.safetensors").exists()


@pytest.mark.parametrize("how", ["gone", "a pipe"])
def test_without_trainer_pt_adamw_starts_afresh_and_a_line_says_so(how, copy, capsys):
    damage(copy / "checkpoint-000006" / "trainer.pt", how)
    train(copy, "--resume", "--steps", "7")
    assert "AdamW afresh" in capsys.readouterr().out
    assert not (copy / "checkpoint-000006" / "trainer.pt").exists()


@pytest.mark.parametrize("change", [
    dict(exp_avg=torch.zeros(3)), dict(exp_avg_sq=torch.zeros(3)),
    dict(exp_avg=None), dict(exp_avg_sq=None)], ids=str)
def test_moments_of_another_shape_are_refused(change, copy):
    """None: it is not there."""
    file = copy / "checkpoint-000006" / "trainer.pt"
    state = torch.load(file, weights_only=True)
    state[0] |= change
    for name in [name for name, value in change.items() if value is None]:
        del state[0][name]
    torch.save(state, file)
    assert "checkpoint-000006" in refused(copy, *GO_ON)


@pytest.mark.parametrize("state", [
    None, 3, [], [1], {999: {}}, {"adam": {}}, {0: None}, "x"], ids=str)
def test_a_state_of_another_shape_is_refused(state, copy):
    torch.save(state, copy / "checkpoint-000006" / "trainer.pt")
    assert "checkpoint-000006" in refused(copy, *GO_ON)


def test_going_on_from_the_checkpoint_before(copy):
    """Without trainer.pt the weights are those that were saved; so are the logs."""
    shutil.rmtree(copy / "checkpoint-000006")
    assert train(copy, "--resume")["step"] == 6
    assert [row["step"] for row in metrics(copy)] == [1, 2, 3, 4, 5, 6]
    assert (copy / "samples.jsonl").read_text().count("\n") == 6


# ---- Rule 4: start and resume --------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["metrics.jsonl", "samples.jsonl", "metrics.png", ".lock"])
def test_a_start_beside_old_checkpoints_is_refused_whatever_else_is_gone(gone, copy):
    (copy / gone).unlink()
    assert "holds a run: --resume" in refused(copy)


def test_resume_takes_a_lower_learning_rate(copy, capsys):
    train(copy, *GO_ON, "--lr", "1e-4")
    assert "AdamW as saved" in capsys.readouterr().out
    assert settings(copy / "checkpoint-000007")["lr"] == 1e-4
    assert settings(copy / "checkpoint-000006")["lr"] == 1e-3


@pytest.mark.parametrize("flag, value, key, saved", [
    ("--weight_decay", 0.5, "weight_decay", 0.5), ("--beta2", 0.9, "betas", (0.9, 0.9))])
def test_resume_obeys_the_other_settings_of_adamw(flag, value, key, saved, copy, monkeypatch):
    seen, make = [], real.make_optimizer
    monkeypatch.setattr(real, "make_optimizer",
                        lambda *a: seen.append(make(*a)) or seen[-1])
    train(copy, *GO_ON, flag, value)
    assert seen[-1].param_groups[0][key] == saved


def test_resume_takes_data_that_moved_and_refuses_other_problems(copy, tmp_path):
    rows = (ROOT / "tiny" / "test.jsonl").read_text().splitlines(True)
    moved, other = tmp_path / "moved.jsonl", tmp_path / "other.jsonl"
    moved.write_text("".join(rows))
    other.write_text("".join(rows[::-1]))
    assert "other problems" in refused(copy, *GO_ON, "--dataset", other)
    assert train(copy, *GO_ON, "--dataset", moved)["step"] == 7


def test_fewer_steps_than_done_are_refused(copy):
    for steps in (3, 6):
        assert "has done 6 --steps" in refused(copy, "--resume", "--steps", steps)


def change_settings(copy, change):
    file = copy / "checkpoint-000006" / "run.json"
    saved = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in saved.items() if v is not ...}))


@pytest.mark.parametrize("change", [
    {"steps": [1]}, {"steps": 7.5}, {"model": 3}, {"lr": "x"}, {"tau": {}}, {"prompts": "four"},
    {"seed": -1}, {"objective": []}, {"steps": float("nan")}, {"low_memory": 2}, {"steps": True},
    {"lr": -1}], ids=str)
def test_settings_that_were_edited_wrongly_are_one_line(change, copy, capsys):
    change_settings(copy, {"steps": 7} | change)
    before = contents(copy)
    with pytest.raises(SystemExit) as e:
        real.main(["--resume", "--output_dir", str(copy)])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and ": error: " in said and [*change][0] in said
    assert contents(copy) == before


def test_settings_edited_by_hand_are_obeyed_and_flags_come_after_them(copy):
    change_settings(copy, {"steps": 7, "lr": 2e-4, "keep": 3, "kl_old": ..., "gone_since": 1})
    config = real.parse(["--resume", "--output_dir", str(copy), "--keep", "1"])
    assert (config.steps, config.lr, config.keep, config.kl_old) == (7, 2e-4, 1, 0.0)
    assert real.train(config)["step"] == 7
    assert [p.name for p in copy.glob("checkpoint-*")] == ["checkpoint-000007"]


@pytest.mark.parametrize("damage", [lambda log: log.unlink(), lambda log: log.write_bytes(b"{\0"),
                                    lambda log: log.write_text(log.read_text() * 2)])
@pytest.mark.parametrize("name", real.LOGS)
def test_a_damaged_log_is_mended_from_the_checkpoint(name, damage, copy, whole):
    damage(copy / name)
    assert train(copy, *GO_ON)["step"] == 7
    assert metrics(copy)[:6] == metrics(whole)
    old, new = ((folder / "samples.jsonl").read_text() for folder in (whole, copy))
    assert new.startswith(old) and new.count("\n") == 7


# ---- Rule 5: a full disk -------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2**16, 2**21, 4 * 2**20])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_half_one(limit, copy, capsys):
    """No file may grow past the limit: the config, the model or trainer.pt is written halfway."""
    before = contents(copy / "checkpoint-000006")
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
    try:
        with pytest.raises(SystemExit) as e:
            real.main([*QUICK, "--output_dir", str(copy), *GO_ON])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and f"cannot use {copy} for" in last and "GB of step 7" in last
    assert sorted(p.name for p in copy.glob("*checkpoint*")) == [
        "checkpoint-000004", "checkpoint-000006"]
    assert contents(copy / "checkpoint-000006") == before
    assert train(copy, *GO_ON)["step"] == 7


def test_a_tokenizer_with_several_templates_is_saved(tmp_path):
    model = shutil.copytree(real.TINY, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    shutil.copy(model / "chat_template.jinja", model / "additional_chat_templates" / "tool.jinja")
    train(tmp_path / "run", "--model", model, "--steps", "2")
    _, tokenizer = real.load_model(tmp_path / "run" / "checkpoint-000002")
    assert set(tokenizer.chat_template) == {"default", "tool"}


@pytest.mark.parametrize("low_memory", ["false", "true"])
def test_a_checkpoint_holds_the_fp32_weights_and_names_the_dtype_of_the_run(low_memory, tmp_path):
    """With low_memory the run's model is bf16, and so it is where other tools load it."""
    model, tokenizer = real.load_model(real.TINY)
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    flags = ["--model", tmp_path / "bf16", "--low_memory", low_memory]
    train(tmp_path / "whole", *flags, "--steps", "2")
    train(tmp_path / "halves", *flags, "--steps", "1")
    train(tmp_path / "halves", "--resume", "--steps", "2")
    same_end(tmp_path / "halves", tmp_path / "whole", 2)
    last = tmp_path / "whole" / "checkpoint-000002"
    saved = load_file(last / "model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.float32}
    assert any((w != w.bfloat16()).any() for w in saved.values())
    dtype = AutoModelForCausalLM.from_pretrained(last, dtype="auto").dtype
    assert dtype == (torch.bfloat16 if low_memory == "true" else torch.float32)


def test_updates_that_are_not_finite_never_reach_the_weights(tmp_path, monkeypatch):
    """One of two is skipped and logged; a step of which none is finite ends the run."""
    calls, after = [], 3
    def objective(logp, old_logp, mask, labels):
        calls.append(0)
        return (logp * (torch.inf if len(calls) % 2 or len(calls) > after else 0)).sum()
    monkeypatch.setattr(real, "OBJECTIVES", real.OBJECTIVES | {"real": objective})
    with pytest.raises(UserError, match="no update of step 2 .*--resume with a lower --lr"):
        train(tmp_path / "run", "--save_every", "1")
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [1, 2]
    saved = load_file(tmp_path / "run" / "checkpoint-000001" / "model.safetensors")
    first = load_file(f"{real.TINY}/model.safetensors")
    assert all(torch.equal(saved[k], first[k]) for k in first)
    monkeypatch.undo()
    assert train(tmp_path / "run", "--resume", "--steps", "3", "--lr", "1e-5")["step"] == 3


# ---- Rule 6: the lock, kills, signals, pipes -----------------------------------------------------


def test_one_run_a_folder_and_the_lock_is_released_when_train_raises(tmp_path, monkeypatch):
    folder, first, before = tmp_path / "run", [], signal.getsignal(signal.SIGINT)
    def fail(*_):
        with pytest.raises(UserError, match="in use by another run"):
            train(folder)
        raise ZeroDivisionError
    monkeypatch.setattr(real, "draw", fail)
    try:
        train(folder, "--save_every", 1)
    except ZeroDivisionError as e:
        first.append(e)  # a notebook keeps the last exception, and with it every frame
    monkeypatch.undo()
    assert first and train(folder, "--steps", "1")["step"] == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_the_lock_is_released_when_a_resume_is_refused(copy):
    kept = []  # a notebook keeps the last exception, and with it every frame
    for flags in (["--steps", "3"], ["--steps", "7", "--dataset", "none.jsonl"]):
        try:
            train(copy, "--resume", *flags)
        except UserError as e:
            kept.append(e)
    assert len(kept) == 2 and train(copy, *GO_ON)["step"] == 7


def wait_for(process, done):
    for _ in range(6000):
        if process.poll() is not None or done():
            break
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def lines(folder):
    log = folder / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def resume(folder):
    """Go on from the newest checkpoint; a run that was killed before its first begins anew."""
    if not list(folder.glob("checkpoint-*")):
        assert "no checkpoint" in refused(folder, "--resume") or contents(folder) == {}
        shutil.rmtree(folder)
    return ["--resume"] * folder.exists()


@pytest.mark.parametrize("moment", ["after a step", "while saving", *(pytest.param(
    moment, marks=pytest.mark.slow) for moment in ("at the start", "while saving the first"))])
def test_killed_and_resumed_is_bit_for_bit_the_same(moment, whole, tmp_path):
    folder, half = tmp_path / "run", tmp_path / "run" / ".checkpoint" / "model.safetensors"
    when = {"at the start": folder.exists, "while saving the first": half.exists,
            "after a step": lambda: lines(folder) >= 3,
            "while saving": lambda: lines(folder) >= 4 and half.exists()}[moment]
    process = start("--output_dir", folder)
    wait_for(process, when)
    process.kill()
    process.communicate()
    train(folder, *resume(folder))
    same_end(folder, whole)


@pytest.mark.slow
def test_runs_that_keep_each_other_busy_end_bit_for_bit_the_same(tmp_path):
    """Three runs of two threads each: they meet in another order each time."""
    folders = [tmp_path / str(i) for i in range(3)]
    runs = [start("--output_dir", folder, "--group_size", "32", env={"OMP_NUM_THREADS": "2"})
            for folder in folders]
    assert [process.wait(timeout=300) for process in runs] == [0, 0, 0]
    for folder in folders[1:]:
        same_end(folder, folders[0])


@pytest.mark.slow
def test_twenty_kills(whole, tmp_path):
    hits = 0
    for i in range(10):
        folder = tmp_path / str(i)
        for k in range(2):
            go_on = resume(folder) if folder.exists() else []
            process = start("--output_dir", folder, *go_on)
            time.sleep(4 + 0.23 * i + 0.5 * k)
            hits += process.poll() is None
            process.kill()
            process.communicate()
        go_on = resume(folder)
        code, out, err = run("--output_dir", folder, *go_on)
        assert code == 0 or "has done 6 --steps" in err, err
        same_end(folder, whole)
    assert hits >= 10


def test_a_run_that_ended_before_its_first_row_can_be_started_again(tmp_path):
    (tmp_path / ".lock").write_text("")
    assert train(tmp_path, "--steps", "1")["step"] == 1


def signals(monkeypatch, *numbers):
    """They come while step 2 is at work."""
    draw = real.draw

    def interrupted(problems, step, config):
        for number in numbers * (step == 2):
            signal.raise_signal(number)
        return draw(problems, step, config)

    monkeypatch.setattr(real, "draw", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_prints_the_way_to_go_on(number, whole, tmp_path, monkeypatch,
                                                             capsys):
    """The way to go on works in any folder, though all paths were relative."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "tiny" / "test.jsonl", "mine.jsonl")
    folder = tmp_path / "a folder; with 'quotes'"
    signals(monkeypatch, number)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as e:
        train(folder.name, "--dataset", "mine.jsonl", "--save_every", "100")
    assert e.value.code == 128 + number and signal.getsignal(number) == before
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-000002"]
    command = re.search("Go on with: (.*)", capsys.readouterr().err)[1]
    if number == signal.SIGTERM:
        subprocess.run(command, shell=True, check=True, cwd="/", capture_output=True)
        same_end(folder, whole)


@pytest.mark.parametrize("second, error, saved", [
    (signal.SIGINT, KeyboardInterrupt, 0), (signal.SIGTERM, SystemExit, 1)])
def test_the_same_signal_twice_leaves_at_once(second, error, saved, tmp_path, monkeypatch):
    signals(monkeypatch, signal.SIGINT, second)
    with pytest.raises(error):
        train(tmp_path / "run", "--save_every", "100")
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == saved


@pytest.mark.parametrize("streams", [{}, {"stderr": subprocess.STDOUT}], ids=["head", "2>&1"])
def test_a_closed_pipe_ends_the_run_and_costs_no_checkpoint(streams, whole, tmp_path):
    """`real.py | head -1`: like any program, it ends; --resume goes on."""
    folder = tmp_path / "run"
    process = start("--output_dir", folder, **streams)
    wait_for(process, lambda: lines(folder) >= 3)
    process.stdout.close()
    assert process.wait(timeout=60) == 2
    assert streams or "Traceback" not in process.stderr.read()
    train(folder, "--resume")
    same_end(folder, whole)


def test_the_log_is_json_whatever_a_step_measures(whole):
    for line in (whole / "metrics.jsonl").open():
        row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
        assert all(v is None or type(v) in (int, float) for v in row.values())


@pytest.mark.slow
def test_soak(tmp_path):
    """1,000 steps: after 200 of them neither memory nor open files grow; every line is JSON."""
    import psutil
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "real.py"), *QUICK, "--steps", "1000", "--save_every", "100",
         "--output_dir", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    watched, seen = psutil.Process(process.pid), []
    while process.poll() is None:
        time.sleep(0.5)
        try:
            if 200 <= lines(folder) < 1000:  # then matplotlib is imported, to draw the log
                seen.append((watched.memory_info().rss, watched.num_fds()))
        except psutil.Error:
            break
    assert process.wait() == 0
    sizes, handles = zip(*seen)
    assert max(sizes) < 1.05 * sizes[0] and max(handles) <= handles[0] + 2
    assert [row["step"] for row in metrics(folder)] == list(range(1, 1001))


# ---- What a hostile user found -------------------------------------------------------------------


def test_a_run_that_lost_its_checkpoints_is_not_begun_anew(copy):
    for folder in copy.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "holds files" in refused(copy, *GO_ON)
    assert "holds files" in refused(copy)


def test_a_checkpoint_that_is_a_link_is_never_written_through(copy, tmp_path):
    for step in (4, 6):
        (copy / f"checkpoint-{step:06d}").rename(tmp_path / str(step))
        (copy / f"checkpoint-{step:06d}").symlink_to(tmp_path / str(step))
    before = contents(tmp_path / "4"), contents(tmp_path / "6")
    train(copy, *GO_ON)
    train(copy, "--resume", "--steps", "8", "--max_new_tokens", "8")
    train(copy, "--resume", "--steps", "9", "--max_new_tokens", "8")
    assert sorted(p.name for p in copy.glob("*checkpoint*")) == [
        f"checkpoint-{step:06d}" for step in (4, 6, 8, 9)]  # links are left alone
    assert (contents(tmp_path / "4"), contents(tmp_path / "6")) == before


def test_resume_refuses_another_model(copy, tmp_path):
    model = shutil.copytree(real.TINY, tmp_path / "model")
    assert "began with other model" in refused(copy, *GO_ON, "--model", model)


def test_nohup_is_obeyed(tmp_path, monkeypatch):
    """A signal that is ignored when a run starts stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals(monkeypatch, signal.SIGHUP)
    try:
        assert train(tmp_path / "run", "--steps", "3")["step"] == 3
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_fingerprint_is_of_the_problems_and_not_of_a_date_in_the_template(copy, monkeypatch):
    load = real.load_problems
    monkeypatch.setattr(real, "load_problems", lambda *args: [
        p | {"prompt_ids": p["prompt_ids"] + [13]} for p in load(*args)])
    assert train(copy, *GO_ON)["step"] == 7


def test_persistent_buffers_are_saved(tmp_path, monkeypatch):
    load = real.load_model

    def with_buffer(name):
        model, tokenizer = load(name)
        model.base_model.register_buffer("bias_of_a_router", torch.arange(3.0))
        return model, tokenizer

    monkeypatch.setattr(real, "load_model", with_buffer)
    train(tmp_path / "run", "--steps", "1")
    saved = load_file(tmp_path / "run" / "checkpoint-000001" / "model.safetensors")
    assert saved["model.bias_of_a_router"].tolist() == [0, 1, 2]
