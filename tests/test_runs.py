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
from common import QUICK, ROOT, contents, main, metrics, one_line, run, start, train
from real import UserError


GO_ON = ["--resume", "--steps", "7", "--max_new_tokens", "8"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: 6 steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder)
    assert any(row["grad_norm"] for row in metrics(folder))  # else all weights are the first ones
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def same_end(folder, whole):
    """Metrics, samples, weights and AdamW's state are bit for bit those of the whole run."""
    assert metrics(folder) == metrics(whole)
    for name in ("samples.jsonl", "model/model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = real.read_checkpoint(folder), real.read_checkpoint(whole)
    assert all(torch.equal(one["model"][k], w) for k, w in other["model"].items())
    assert all(torch.equal(one["adam"][i][k], x) for i, adam in other["adam"].items()
               for k, x in adam.items())
    assert one["step"] == other["step"] and one["adam"].keys() == other["adam"].keys()


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
    assert "not empty" in refused(model)
    assert "checkpoint.pt" in refused(model, "--resume")


@pytest.mark.parametrize("content", [b"{", b"PK", 3, [1], {"step": 3}, {"model": {}}], ids=str)
def test_a_checkpoint_of_another_program_is_refused(content, tmp_path):
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
    assert "not empty" in refused(tmp_path)
    assert "checkpoint.pt" in refused(tmp_path, "--resume")


def test_any_file_of_somebody_else_is_enough(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not empty" in refused(tmp_path)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    assert "checkpoint.pt" in refused(tmp_path / "new", "--resume")
    assert contents(tmp_path / "new") == {}


def test_bad_input_leaves_no_run_behind_and_does_not_block_the_folder(tmp_path):
    with pytest.raises(UserError, match="none.jsonl"):
        train(tmp_path / "run", "--eval_every", "1", "--eval_dataset", tmp_path / "none.jsonl")
    assert contents(tmp_path / "run") == {}
    assert train(tmp_path / "run", "--steps", "1")["step"] == 1


# ---- Rule 2: only our exact names ----------------------------------------------------------------


def test_files_with_other_names_are_never_touched(copy):
    foreign = {"data.jsonl": '{"problem": "1+1", "step": 99}\nno newline', "notes.txt": "x",
               "metrics.jsonl.bak": '{"step": 99}\n', "checkpoint.pt.good": "x",
               "checkpoint-000001/model": "x", "model/notes.txt": "x", "model-best/model": "x"}
    for name, text in foreign.items():
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(text)
    train(copy, *GO_ON)
    assert {name: (copy / name).read_text() for name in foreign} == foreign
    assert metrics(copy)[-1]["step"] == 7


def test_a_checkpoint_that_is_a_link_is_replaced(copy, tmp_path):
    mine = tmp_path / "mine"
    before = (copy / "checkpoint.pt").rename(mine).read_bytes()
    (copy / "checkpoint.pt").symlink_to(mine)
    assert train(copy, *GO_ON)["step"] == 7
    assert mine.read_bytes() == before and not (copy / "checkpoint.pt").is_symlink()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_link_with_the_name_of_a_half_checkpoint_is_never_written_through(link, tmp_path):
    mine, folder = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    folder.mkdir()
    link(mine, folder / ".checkpoint.pt")
    assert train(folder, "--steps", "1")["step"] == 1
    assert mine.read_text() == "mine"


def test_a_refused_resume_deletes_nothing(copy):
    (copy / ".checkpoint.pt").write_text("half of one")
    refused(copy, "--resume", "--steps", "3")
    refused(copy, *GO_ON, "--dataset", f"{real.TINY}/train.jsonl")


def test_a_run_leaves_these_files_and_no_others(whole):
    assert {p.name for p in whole.iterdir()} == {
        ".lock", "checkpoint.pt", "metrics.jsonl", "model", "samples.jsonl"}
    model, tokenizer = real.load_model(whole / "model")
    assert model.num_parameters() > 1e5 and tokenizer.chat_template


# ---- Rule 3: a checkpoint that cannot be read ----------------------------------------------------


def test_a_pipe_in_place_of_a_checkpoint_is_one_line(tmp_path):
    """It is never opened: nobody will ever write to it."""
    os.mkfifo(tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt: no whole run"):
        train(tmp_path, "--resume")


def damage(file, how):
    if how == "one byte":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    elif how == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "other bytes":
        file.write_bytes(b"\x00\xff" * 5000)
    else:
        file.unlink()
        {"a folder": os.mkdir, "gone": str}[how](file)


@pytest.mark.parametrize("how", ["one byte", "cut short", "empty", "other bytes", "a folder",
                                 "gone"])
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_touched(how, copy):
    """It is never a reason to start over: not with --resume, and not without."""
    damage(copy / "checkpoint.pt", how)
    assert str(copy / "checkpoint.pt") in refused(copy, "--resume", "--steps", "8")
    assert "not empty" in refused(copy)


@pytest.mark.parametrize("change", [
    {"model": {}}, {"model": {"x": torch.zeros(3)}}, {"model": 3}, {"logs": {}}, {"logs": []},
    {"step": "4"}, {"step": None}, {"adam": None}, {"adam": []}, {"adam": {0: None}},
    {"adam": {0: {}}}, {"adam": {9999: {"step": torch.zeros(())}}}], ids=str)
def test_a_checkpoint_with_other_contents_is_one_line(change, copy):
    torch.save(real.read_checkpoint(copy) | change, copy / "checkpoint.pt")
    assert str(copy) in refused(copy, *GO_ON)


@pytest.mark.parametrize("key", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("shape", [(3,), (0,), (1, 10**6)], ids=str)
def test_a_state_of_adamw_with_other_shapes_is_one_line_and_no_crash(key, shape, copy):
    saved = real.read_checkpoint(copy)
    saved["adam"][0][key] = torch.zeros(shape)
    torch.save(saved, copy / "checkpoint.pt")
    assert "checkpoint.pt" in refused(copy, *GO_ON)
    saved["adam"] = {i + 1: x for i, x in saved["adam"].items()}  # those of the next weights
    torch.save(saved, copy / "checkpoint.pt")
    assert "checkpoint.pt" in refused(copy, *GO_ON)


def test_nothing_is_ever_to_be_removed(copy, tmp_path):
    """Advice to delete a user's model or data, or a whole run, would be worse than none."""
    damage(copy / "checkpoint.pt", "empty")
    for flags in (["--resume"], [], ["--model", tmp_path / "none"], ["--dataset", "none.jsonl"]):
        assert not re.search("delete |remove ", refused(copy, *flags))


# ---- Rule 4: start and resume --------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["metrics.jsonl", "samples.jsonl", "checkpoint.pt", ".lock"])
def test_a_start_beside_an_old_run_is_refused_whatever_is_gone(gone, copy):
    (copy / gone).unlink()
    assert "not empty: --resume" in refused(copy)


def test_resume_takes_a_lower_learning_rate(copy):
    train(copy, *GO_ON, "--lr", "1e-4")
    assert float(real.read_checkpoint(copy)["settings"]["lr"]) == 1e-4


def test_resume_obeys_another_beta2(copy, monkeypatch):
    seen, make = [], real.make_optimizer
    monkeypatch.setattr(real, "make_optimizer",
                        lambda *a: seen.append(make(*a)) or seen[-1])
    train(copy, *GO_ON, "--beta2", 0.9)
    assert seen[-1].param_groups[0]["betas"] == (0.9, 0.9)


def test_resume_takes_data_that_moved_and_refuses_other_problems(copy, tmp_path):
    rows = (ROOT / "tiny" / "test.jsonl").read_text().splitlines(True)
    moved, other = tmp_path / "moved.jsonl", tmp_path / "other.jsonl"
    moved.write_text("".join(rows))
    other.write_text("".join(rows[::-1]))
    assert "another --dataset" in refused(copy, *GO_ON, "--dataset", other)
    assert train(copy, *GO_ON, "--dataset", moved)["step"] == 7


def test_a_run_that_was_moved_goes_on_where_it_is_now(whole, tmp_path, monkeypatch):
    """Also in the default folder, whose name no flag repeats."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, tmp_path / "runs" / "real")
    before = contents(whole)
    assert real.train(real.parse(GO_ON))["step"] == 7
    assert metrics(tmp_path / "runs" / "real")[-1]["step"] == 7 and contents(whole) == before


def test_fewer_steps_than_done_are_refused(copy):
    for steps in (3, 5):
        assert "has done 6 --steps" in refused(copy, "--resume", "--steps", steps)


def test_resuming_a_run_that_is_done_writes_the_model_anew(copy, whole):
    shutil.rmtree(copy / "model")
    assert train(copy, "--resume")["step"] == 6
    same_end(copy, whole)


def test_data_that_moved_is_named_anew_and_so_is_a_model(copy, tmp_path):
    """The weights are the checkpoint's, whatever model of this shape is named."""
    model = shutil.copytree(real.TINY, tmp_path / "model")
    assert train(copy, *GO_ON, "--model", model)["step"] == 7


def change_settings(copy, change):
    saved = real.read_checkpoint(copy)
    new = saved["settings"] | change
    saved["settings"] = {k: v for k, v in new.items() if v is not ...}
    torch.save(saved, copy / "checkpoint.pt")


def test_settings_are_obeyed_and_flags_come_after_them(copy):
    change_settings(copy, {"steps": 7, "lr": 2e-4, "kl_old": ..., "gone_since": 1})
    config = real.parse(["--resume", "--output_dir", str(copy), "--temperature", "0.9"])
    assert (config.steps, config.lr, config.temperature, config.kl_old) == (7, 2e-4, 0.9, 0.0)
    assert real.train(config)["step"] == 7


@pytest.mark.parametrize("change", [
    None, [], 3, {"steps": "x"}, {"lr": [1]}, {"tau": None}, {5: 5}, {"objective": ["real"]},
    {"as_printed": 7}, {"prompts": 1.5}, {"lr": float("nan")}], ids=str)
def test_settings_that_were_edited_are_one_line_or_do_not_matter(change, copy, capsys):
    saved = torch.load(copy / "checkpoint.pt", weights_only=True)
    saved["settings"] = saved["settings"] | change if isinstance(change, dict) else change
    torch.save(saved, copy / "checkpoint.pt")
    try:
        assert main("--resume", "--output_dir", copy, "--steps", 7)["step"] == 7
    except SystemExit as e:
        assert e.code == 2 and one_line(capsys.readouterr().err.strip().splitlines()[-1])


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


@pytest.mark.parametrize("limit", [2**16, 4 * 2**20])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_half_one(limit, copy, capsys):
    """No file may grow past the limit: the checkpoint is written halfway."""
    before = (copy / "checkpoint.pt").read_bytes()
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
    try:
        with pytest.raises(SystemExit) as e:
            main(*QUICK, "--output_dir", copy, *GO_ON)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and f"cannot use {copy}/checkpoint.pt of 0.01 GB" in last
    assert [p.name for p in copy.glob("*checkpoint*")] == ["checkpoint.pt"]
    assert (copy / "checkpoint.pt").read_bytes() == before
    assert train(copy, *GO_ON)["step"] == 7


def test_a_tokenizer_with_several_templates_is_saved(tmp_path):
    model = shutil.copytree(real.TINY, tmp_path / "model")
    (model / "additional_chat_templates").mkdir()
    shutil.copy(model / "chat_template.jinja", model / "additional_chat_templates" / "tool.jinja")
    train(tmp_path / "run", "--model", model, "--steps", "2")
    _, tokenizer = real.load_model(tmp_path / "run" / "model")
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
    same_end(tmp_path / "halves", tmp_path / "whole")
    saved = real.read_checkpoint(tmp_path / "whole")["model"]
    assert {w.dtype for w in saved.values()} == {torch.float32}
    assert any((w != w.bfloat16()).any() for w in saved.values())
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model", dtype="auto")
    assert own.dtype == (torch.bfloat16 if low_memory == "true" else torch.float32)
    assert all(torch.equal(w, saved[k].to(w.dtype)) for k, w in own.state_dict().items())


def test_updates_that_are_not_finite_never_reach_the_weights(tmp_path, monkeypatch, capsys):
    """One of two is skipped, then both; the log counts them and a note says what to do."""
    calls, after = [], 3
    def objective(logp, old_logp, mask, labels):
        calls.append(0)
        return (logp * (torch.inf if len(calls) % 2 or len(calls) > after else 0)).sum()
    monkeypatch.setattr(real, "OBJECTIVES", real.OBJECTIVES | {"real": objective})
    train(tmp_path / "run", "--steps", "2")
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [1, 2]
    assert "not finite: lower --lr" in capsys.readouterr().out
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    first = load_file(f"{real.TINY}/model.safetensors")
    assert all(torch.equal(saved[k], first[k]) for k in first)


def test_a_step_with_updates_that_are_not_finite_replaces_no_checkpoint(tmp_path, monkeypatch):
    """So that the advice, to resume with a lower --lr, finds weights that are good."""
    saved, save = [], real.Run.save
    monkeypatch.setattr(real.Run, "save", lambda run, step, *args: saved.append(step) or save(
        run, step, *args))
    def objective(logp, old_logp, mask, labels):
        return (logp * (torch.inf if saved[-1] == 1 and len(rows) < 3 else 1)).sum()
    rows, log = [], real.Run.log
    monkeypatch.setattr(real.Run, "log", lambda run, *args: rows.append(args[0]) or log(run, *args))
    monkeypatch.setattr(real, "OBJECTIVES", real.OBJECTIVES | {"real": objective})
    train(tmp_path / "run", "--steps", "5", "--save_every", "1")
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [0, 2, 2, 0, 0]
    assert saved == [0, 1, 4, 5]


# ---- Rule 6: the lock, kills, signals, pipes -----------------------------------------------------


def test_one_run_a_folder_and_the_lock_is_released_when_train_raises(tmp_path, monkeypatch):
    folder, first, before = tmp_path / "run", [], signal.getsignal(signal.SIGINT)
    def fail(*_):
        with pytest.raises(UserError, match="in use by another run"):
            train(folder, "--resume")
        raise ZeroDivisionError
    monkeypatch.setattr(real, "draw", fail)
    try:
        train(folder, "--save_every", 1)
    except ZeroDivisionError as e:
        first.append(e)  # a notebook keeps the last exception, and with it every frame
    monkeypatch.undo()
    assert first and train(folder, "--resume", "--steps", "1")["step"] == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_the_lock_is_released_when_a_resume_is_refused(copy):
    kept = []  # a notebook keeps the last exception, and with it every frame
    for flags in (["--steps", "3"], ["--steps", "7", "--dataset", "none.jsonl"],
                  ["--steps", "7", "--dataset", f"{real.TINY}/train.jsonl"]):
        try:
            train(copy, "--resume", *flags)
        except UserError as e:
            kept.append(e)
    assert len(kept) == 3 and train(copy, *GO_ON)["step"] == 7


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
    """Go on from the checkpoint; a run that was killed before its first is begun anew."""
    return ["--resume"] * (folder / "checkpoint.pt").exists()


@pytest.mark.parametrize("moment", ["at the start", "while saving the first", "before a step",
                                    "after a step", "while saving"])
def test_killed_and_resumed_is_bit_for_bit_the_same(moment, whole, tmp_path):
    folder, half = tmp_path / "run", tmp_path / "run" / ".checkpoint.pt"
    when = {"at the start": folder.exists, "while saving the first": half.exists,
            "before a step": (folder / "checkpoint.pt").exists,
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
            process = start("--output_dir", folder, *resume(folder))
            wait_for(process, folder.exists)
            time.sleep(0.23 * i + 0.5 * k)
            hits += process.poll() is None
            process.kill()
            process.communicate()
        code, out, err = run("--output_dir", folder, *resume(folder))
        assert code == 0, err
        same_end(folder, whole)
    assert hits > 0


def test_a_run_that_ended_before_its_first_checkpoint_can_be_started_again(tmp_path):
    for name in (".lock", *real.LOGS):
        (tmp_path / name).write_text("")
    (tmp_path / ".checkpoint.pt").write_text("half of one")
    assert train(tmp_path, "--steps", "1")["step"] == 1
    assert not (tmp_path / ".checkpoint.pt").exists()


def test_a_run_that_ended_before_its_first_step_goes_on(whole, tmp_path, monkeypatch):
    """Whatever ended it: here a defect, before anything is drawn."""
    monkeypatch.setattr(real, "draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run")
    monkeypatch.undo()
    assert real.read_checkpoint(tmp_path / "run")["step"] == 0
    train(tmp_path / "run", "--resume")
    same_end(tmp_path / "run", whole)


def signals(monkeypatch, *numbers):
    """They come while step 2 is at work."""
    draw = real.draw

    def interrupted(problems, step, config):
        for number in numbers * (step == 2):
            signal.raise_signal(number)
        return draw(problems, step, config)

    monkeypatch.setattr(real, "draw", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
    assert real.read_checkpoint(folder)["step"] == 2
    assert real.load_model(folder / "model")  # what there is can be used
    command = re.search("Go on with: (.*)", capsys.readouterr().err)[1]
    if number == signal.SIGTERM:
        subprocess.run(command, shell=True, check=True, cwd="/", capture_output=True)
        same_end(folder, whole)


@pytest.mark.parametrize("second, error, saved", [
    (signal.SIGINT, KeyboardInterrupt, 0), (signal.SIGTERM, SystemExit, 2)])
def test_the_same_signal_twice_leaves_at_once(second, error, saved, tmp_path, monkeypatch):
    signals(monkeypatch, signal.SIGINT, second)
    with pytest.raises(error):
        train(tmp_path / "run", "--save_every", "100")
    assert real.read_checkpoint(tmp_path / "run")["step"] == saved


@pytest.mark.parametrize("streams", [{}, {"stderr": subprocess.STDOUT}], ids=["head", "2>&1"])
def test_a_closed_pipe_ends_the_run_after_its_step(streams, whole, tmp_path):
    """`real.py | head -1`: the step at work is saved; stderr, if open, says how to go on."""
    folder = tmp_path / "run"
    process = start("--output_dir", folder, "--save_every", "100", **streams)
    wait_for(process, lambda: lines(folder) >= 1)  # five steps before its end
    process.stdout.close()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    said = "Go on with: cd" if streams else process.stderr.read()
    assert "Go on with: cd" in said and "Traceback" not in said
    assert real.read_checkpoint(folder)["step"] == lines(folder) >= 1
    train(folder, "--resume")
    same_end(folder, whole)


def test_a_closed_terminal_ends_the_run_after_its_step(whole, tmp_path):
    """The window is closed: SIGHUP comes, and nothing can be written any more."""
    folder, (ours, theirs) = tmp_path / "run", os.openpty()
    process = start("--output_dir", folder, "--save_every", "100", start_new_session=True,
                    stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    while lines(folder) < 1 and process.poll() is None:
        os.read(ours, 2**16)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) > 128
    assert real.read_checkpoint(folder)["step"] == lines(folder) >= 1
    train(folder, "--resume")
    same_end(folder, whole)


@pytest.mark.parametrize("streams", [{}, {"stderr": subprocess.STDOUT}], ids=["tee", "2>&1"])
def test_a_signal_that_also_ends_tee_costs_no_step(streams, tmp_path):
    """`real.py | tee log` and Ctrl-C: nobody reads any more when the step at work is saved."""
    folder = tmp_path / "run"
    process = start("--output_dir", folder, "--steps", "500", "--save_every", "400", **streams)
    wait_for(process, lambda: lines(folder) >= 3)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) in (130, 143)  # SIGINT, then the pipe
    assert real.read_checkpoint(folder)["step"] == lines(folder) >= 3


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
            if 200 <= lines(folder) < 1000:  # then the model is written
                seen.append((watched.memory_info().rss, watched.num_fds()))
        except psutil.Error:
            break
    assert process.wait() == 0
    sizes, handles = zip(*seen)
    assert max(sizes) < 1.05 * sizes[0] and max(handles) <= handles[0] + 2
    assert [row["step"] for row in metrics(folder)] == list(range(1, 1001))


# ---- What a hostile user found -------------------------------------------------------------------


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
    saved = real.read_checkpoint(tmp_path / "run")["model"]
    assert saved["model.bias_of_a_router"].tolist() == [0, 1, 2]
