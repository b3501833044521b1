"""The run's folder: what it refuses, what it never touches, what a kill or a full disk costs."""

import json
import os
import pty
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


def same_end(folder, whole, step=6):
    """Metrics, samples, weights and AdamW's state are bit for bit those of the whole run."""
    assert metrics(folder) == metrics(whole)
    for name in ("samples.jsonl", f"checkpoint-{step:06d}/model.safetensors",
                 f"checkpoint-{step:06d}/trainer.pt"):
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
    assert "no run of real.py" in refused(model)
    assert "no run of real.py" in refused(model, "--resume")


@pytest.mark.parametrize("config", ["[]", "{}", '{"made_by": "someone"}', "3", "null", '"real.py"'])
def test_a_configuration_that_is_not_ours_is_refused(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    assert "no run of real.py" in refused(tmp_path)


@pytest.mark.parametrize("config", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_one_line(config, tmp_path):
    (tmp_path / "config.json").write_bytes(config)
    for flags in ((), ("--resume",)):
        assert "config.json" in refused(tmp_path, *flags)


def test_any_file_of_somebody_else_is_enough(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds files" in refused(tmp_path)


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    assert "no run to resume" in refused(tmp_path / "new", "--resume")
    assert not (tmp_path / "new").exists()


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
        r.size = ""
        for step in range(1, 8):
            optimizer.param_groups[0]["params"] = []
            r.save(step, model, tokenizer, optimizer)
        assert sorted(p.name for p in r.checkpoints()) == [
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
        {"a folder": os.mkdir, "a pipe": os.mkfifo}[how](file)


@pytest.mark.parametrize("name, how", [
    *((name, how) for name in ("model.safetensors", "trainer.pt", "config.json")
      for how in ("cut short", "empty", "other bytes")),
    ("trainer.pt", "a folder"), ("trainer.pt", "a pipe")])
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_touched(name, how, copy):
    newest = copy / "checkpoint-000006"
    damage(newest / name, how)
    said = refused(copy, "--resume", "--steps", "8")
    assert "checkpoint-000006" in said


@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors", "config.json"])
def test_a_damaged_checkpoint_says_how_to_go_on_without_it(name, copy):
    damage(copy / "checkpoint-000006" / name, "cut short")
    said = refused(copy, "--resume", "--steps", "8")
    assert "delete" in said and str(copy / "checkpoint-000006") in said


@pytest.mark.parametrize("change", [
    dict(exp_avg=torch.zeros(3)), dict(exp_avg_sq=torch.zeros(3)),
    dict(exp_avg=None), dict(exp_avg_sq=None), dict(step=None)], ids=str)
def test_moments_of_another_shape_are_refused(change, copy):
    """None: it is not there."""
    file = copy / "checkpoint-000006" / "trainer.pt"
    state = torch.load(file, weights_only=True)
    moments = state["adam"][0]
    moments |= change
    for name in [name for name, value in change.items() if value is None]:
        del moments[name]
    torch.save(state, file)
    assert "trainer.pt" in refused(copy, *GO_ON)


@pytest.mark.parametrize("break_state", [
    lambda state: state["weights"].pop(), lambda state: state["weights"].append(torch.zeros(3)),
    lambda state: state["weights"].__setitem__(0, torch.zeros(3)),
    lambda state: state.update(weights=None), lambda state: state.update(adam=None),
    lambda state: state.update(adam=[1]), lambda state: state.pop("adam"),
    lambda state: state.pop("weights"), lambda state: state.clear()])
def test_a_state_of_another_shape_is_refused(break_state, copy):
    file = copy / "checkpoint-000006" / "trainer.pt"
    state = torch.load(file, weights_only=True)
    break_state(state)
    torch.save(state, file)
    assert "trainer.pt" in refused(copy, *GO_ON)


def test_going_on_from_the_checkpoint_before(copy):
    """Without trainer.pt the weights are those that were saved; the log is cut back to them."""
    shutil.rmtree(copy / "checkpoint-000006")
    assert train(copy, "--resume")["step"] == 6
    assert [row["step"] for row in metrics(copy)] == [1, 2, 3, 4, 5, 6]


# ---- Rule 4: start and resume --------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["metrics.jsonl", "samples.jsonl", "metrics.png", "config.json"])
def test_a_start_beside_old_checkpoints_is_refused_whatever_else_is_gone(gone, copy):
    (copy / gone).unlink()
    said = refused(copy)
    assert "holds a run: --resume" in said or "holds files" in said


def test_resume_takes_a_lower_learning_rate(copy):
    train(copy, *GO_ON, "--lr", "1e-4")
    assert json.loads((copy / "config.json").read_text())["lr"] == 1e-4


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
        assert "has done 6 steps" in refused(copy, "--resume", "--steps", steps)


@pytest.mark.parametrize("change", [
    {"steps": [1]}, {"steps": None}, {"steps": 7.5}, {"model": 3},
    {"lr": "x"}, {"lr": None}, {"tau": {}}, {"prompts": "4"}, {"dataset": None}, {"seed": -1},
    {"objective": []}, {"steps": float("nan")}, {"kl_ref": None}], ids=str)
def test_a_wrong_type_in_our_config_is_one_line(change, copy):
    saved = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(saved))
    before = contents(copy)
    try:
        real.train(real.parse(["--resume", "--output_dir", str(copy)]))
    except (UserError, SystemExit) as e:  # argparse itself leaves with code 2
        assert one_line(e) and contents(copy) == before


def test_a_run_of_an_older_version_without_a_setting_is_one_line_or_goes_on(copy):
    saved = json.loads((copy / "config.json").read_text())
    del saved["kl_old"]
    (copy / "config.json").write_text(json.dumps(saved | {"gone_since": 1}))
    try:
        assert train(copy, *GO_ON)["step"] == 7
    except UserError as e:
        assert one_line(e) and "--kl_old" in str(e)


@pytest.mark.parametrize("line", ['{"no step": 1}', "{not json}", '{"step": "x"}', '{"step": null}',
                                  '"}', "\udcff}", "[1, {}", "\0\0}"])
def test_a_damaged_log_is_one_line_or_mended(line, copy):
    log = copy / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    checkpoints = contents(copy / "checkpoint-000006")
    try:
        train(copy, *GO_ON)
    except UserError as e:
        assert one_line(e) and "metrics.jsonl" in str(e)
    assert contents(copy / "checkpoint-000006").items() >= {
        k: v for k, v in checkpoints.items() if k != "trainer.pt"}.items()


def test_without_a_log_the_run_goes_on(copy):
    (copy / "metrics.jsonl").unlink()
    (copy / "samples.jsonl").unlink()
    assert train(copy, *GO_ON)["step"] == 7


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
    assert e.value.code == 2 and "cannot save" in last and "GB" in last
    assert "checkpoint-000007" in last and "whole" in last
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
def test_a_model_is_saved_in_its_own_dtype_and_goes_on_in_fp32(low_memory, tmp_path):
    model, tokenizer = real.load_model(real.TINY)
    model.bfloat16().save_pretrained(tmp_path / "bf16")
    tokenizer.save_pretrained(tmp_path / "bf16")
    flags = ["--model", tmp_path / "bf16", "--low_memory", low_memory]
    train(tmp_path / "whole", *flags, "--steps", "2")
    train(tmp_path / "halves", *flags, "--steps", "1")
    train(tmp_path / "halves", "--resume", "--steps", "2")
    same_end(tmp_path / "halves", tmp_path / "whole", 2)
    last = tmp_path / "whole" / "checkpoint-000002"
    assert {w.dtype for w in load_file(last / "model.safetensors").values()} == {torch.bfloat16}
    state = torch.load(last / "trainer.pt", weights_only=True)
    assert {w.dtype for w in state["weights"]} == {torch.float32}
    assert any((w != w.bfloat16()).any() for w in state["weights"])


def test_updates_that_are_not_finite_never_reach_the_weights(tmp_path, monkeypatch):
    objective = {"real": lambda logp, old_logp, mask, labels: (logp * torch.inf).sum()}
    monkeypatch.setattr(real, "OBJECTIVES", real.OBJECTIVES | objective)
    with pytest.raises(UserError, match="three updates.* --resume with a lower --lr"):
        train(tmp_path / "run", "--save_every", "1")
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


@pytest.mark.parametrize("moment", ["after a step", "while saving", *(pytest.param(
    moment, marks=pytest.mark.slow) for moment in ("before the first step",
                                                   "while cutting the log"))])
def test_killed_and_resumed_is_bit_for_bit_the_same(moment, whole, tmp_path):
    folder, when = tmp_path / "run", {
        "before the first step": lambda: (folder / "config.json").exists(),
        "after a step": lambda: lines(folder) >= 3,
        "while saving": lambda: (folder / ".checkpoint" / "model.safetensors").exists(),
        "while cutting the log": lambda: lines(folder) >= 5}[moment]
    process = start("--output_dir", folder)
    wait_for(process, when)
    process.kill()
    process.communicate()
    if moment == "while cutting the log":
        for name in ("metrics.jsonl", "samples.jsonl", "config.json"):
            (folder / ".part").write_text("{")  # as a kill inside Run.replace leaves it
            assert (folder / name).exists()
    train(folder, "--resume")
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
            resume = ["--resume"] * (folder / "config.json").exists()
            process = start("--output_dir", folder, *resume)
            time.sleep(4 + 0.23 * i + 0.5 * k)
            hits += process.poll() is None
            process.kill()
            process.communicate()
        if not (folder / "config.json").exists():
            continue
        code, out, err = run("--output_dir", folder, "--resume")
        assert code == 0 or "has done 6 steps" in err, err
        same_end(folder, whole)
    assert hits >= 10


@pytest.mark.parametrize("leftover", [".lock", ".part"])
def test_a_kill_before_the_run_is_written_leaves_a_folder_that_can_be_started(leftover, tmp_path):
    (tmp_path / leftover).write_text("{")
    assert train(tmp_path, "--steps", "1")["step"] == 1


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
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-000002"]
    command = re.search("Go on with: (.*)", capsys.readouterr().err)[1]
    if number == signal.SIGHUP:
        subprocess.run(command, shell=True, check=True, cwd="/", capture_output=True)
        same_end(folder, whole)


@pytest.mark.parametrize("second, saved", [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_the_same_signal_twice_leaves_at_once(second, saved, tmp_path, monkeypatch):
    signals(monkeypatch, signal.SIGINT, second)
    monkeypatch.setattr(os, "_exit", sys.exit)  # else pytest would end too
    with pytest.raises(SystemExit) as e:
        train(tmp_path / "run", "--save_every", "100")
    assert e.value.code == 128 + second
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == saved


def stopped_run(folder, stop, **streams):
    """A long run with a checkpoint every 100 steps only, stopped by `stop`: it must be saved."""
    process = start("--output_dir", folder, "--steps", "1000", "--save_every", "1000", **streams)
    wait_for(process, lambda: lines(folder) >= 2)
    stop(process)
    process.wait(timeout=60)
    steps = lines(folder)
    saved = [p.name for p in folder.glob("checkpoint-*")]
    assert saved == [f"checkpoint-{steps:06d}"], (saved, steps, process.returncode)
    return process


def test_a_closed_pipe_ends_the_step_and_saves_it(tmp_path):
    process = stopped_run(tmp_path / "run", lambda p: p.stdout.close())
    assert process.returncode == 128 + signal.SIGTERM
    said = process.stderr.read()
    assert f"--output_dir {tmp_path / 'run'}" in said and "--resume" in said


def test_ctrl_c_that_also_ends_the_reader_of_the_pipe_saves(tmp_path):
    """`real.py | tee log`: Ctrl-C goes to both."""
    def stop(process):
        process.stdout.close()
        process.send_signal(signal.SIGINT)
    stopped_run(tmp_path / "run", stop)


def test_both_outputs_closed_saves(tmp_path):
    """`real.py 2>&1 | head -1`."""
    stopped_run(tmp_path / "run", lambda p: p.stdout.close(), stderr=subprocess.STDOUT)


def test_a_terminal_that_is_closed_saves(tmp_path):
    """The window closes: SIGHUP comes, and from then on nothing can be printed."""
    ours, theirs = pty.openpty()
    def stop(process):
        os.close(theirs)
        os.close(ours)
        process.send_signal(signal.SIGHUP)
    stopped_run(tmp_path / "run", stop, stdout=theirs, stderr=theirs, stdin=theirs)


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
    assert "lost its checkpoints" in refused(copy, *GO_ON)


def test_a_checkpoint_that_is_a_link_is_never_written_through(copy, tmp_path):
    for step in (4, 6):
        (copy / f"checkpoint-{step:06d}").rename(tmp_path / str(step))
        (copy / f"checkpoint-{step:06d}").symlink_to(tmp_path / str(step))
    weights = (tmp_path / "4" / "model.safetensors").read_bytes()
    train(copy, *GO_ON)
    train(copy, "--resume", "--steps", "8", "--max_new_tokens", "8")
    assert sorted(p.name for p in copy.glob("*checkpoint*")) == [
        "checkpoint-000007", "checkpoint-000008"]
    assert (tmp_path / "4" / "model.safetensors").read_bytes() == weights


def test_resume_refuses_another_model(copy, tmp_path):
    model = shutil.copytree(real.TINY, tmp_path / "model")
    assert "is a run of --model" in refused(copy, *GO_ON, "--model", model)


def test_a_log_with_other_line_ends_loses_no_row(copy):
    log = copy / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b"\n", b"\r\n"))
    train(copy, *GO_ON)
    assert [row["step"] for row in metrics(copy)] == [1, 2, 3, 4, 5, 6, 7]


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


def test_a_notebooks_stream_and_a_closed_one_are_written_to(monkeypatch):
    class Stream:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    stream = Stream()
    real.Output(stream).write("π")
    real.Output(None).write("nowhere")
    assert stream.text == "π"
