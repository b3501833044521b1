"""Flags, presets and settings: what is wrong is named before anything is read or sampled."""

import os
import re
import resource
import shlex
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

import real
from common import QUICK, ROOT, main, one_line, train
from real import Config, UserError

NUMBERS = [f.name for f in real.fields(Config) if f.type in (int, float, float | None)]


def refused(capsys, *flags):
    """The one line that main says about these flags; it leaves with exit code 2."""
    with pytest.raises(SystemExit) as e:
        main(*flags)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and ": error: " in said and one_line(said)
    return said


@pytest.mark.parametrize("flags, words", [
    ({"tau": 0}, "--tau"), ({"tau": float("nan")}, "--tau"),
    ({"lr": float("inf")}, "--lr"), ({"temperature": 0}, "--temperature"),
    ({"group_size": 1}, "--group_size"), ({"prompts": 0}, "--prompts"),
    ({"prompts": 10, "mini_batches": 4}, "--mini_batches"),
    ({"steps": 0}, "--steps"), ({"seed": -1}, "--seed"),
    ({"kl_ref": -0.1}, "--kl_ref"), ({"max_new_tokens": 0}, "--max_new_tokens"),
    ({"objective": "reel"}, "--objective: one of real, real_bce"), ({"seed": 10**12}, "--seed"),
    ({"beta2": 1}, "--beta2"), ({"save_every": 0}, "--save_every"),
    ({"slots": 0}, "--slots")])
def test_a_bad_value_is_named(flags, words):
    with pytest.raises(UserError) as e:
        Config(**flags)
    assert words in str(e.value) and one_line(e.value)


@pytest.mark.parametrize("name", NUMBERS)
@given(st.floats(max_value=-1e-9) | st.integers(max_value=-1)
       | st.sampled_from([float("nan"), float("inf")]))
def test_no_number_may_be_negative_or_infinite(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        Config(**{name: value})


MAY_BE_0 = "kl_ref kl_old warmup eval_every seed beta2".split()


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in MAY_BE_0])
def test_zero_is_allowed_only_where_it_means_something(name):
    with pytest.raises(UserError, match=f"--{name}"):
        Config(**{name: 0})


@pytest.mark.parametrize("flags, words", [
    (["--objective", "reel"], "--objective: one of"), (["--preset", "3b"], "invalid choice"),
    (["--stepz", "3"], "unrecognized arguments: --stepz"), (["--steps", "x"], "--steps"),
    (["--steps", "1e3"], "--steps"), (["--lr", "nan"], "--lr"), (["--tau"], "--tau"),
    (["--as_printed", "maybe"], "--as_printed"), (["extra"], "unrecognized"),
    (["--group_size", "1"], "--group_size"), (["--prompts", "5"], "--mini_batches"),
    (["--config", "settings.yaml"], "--config"), (["--model", "no/such"], "no/such"),
    (["--dataset", "no.jsonl"], "no.jsonl"),
    (["--problem_column", "question"], "--problem_column"), (["--problem_column", ""], "column"),
    (["--answer_column", "a.b"], "--answer_column"), (["--max_new_tokens", "5000"], "5"),
    (["--prompts", "100000", "--mini_batches", "1"], "100000 needed"),
    (["--max_prompt_tokens", "1"], "0 usable rows"), (["--resume"], "checkpoint.pt"),
    (["--eval_every", "1", "--eval_dataset", real.TINY], "eval_dataset"),
    (["--dataset", real.TINY, "--split", "nope"], "tiny"), (["--output_dir", "x" * 300], "")])
def test_bad_flags_are_one_line_and_exit_2(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "rollouts", None)  # nothing is sampled
    assert words in refused(capsys, *QUICK, *flags)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} <= {".lock"}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run", "/dev/null"):
        refused(capsys, *QUICK, "--output_dir", folder)


def test_no_flag_is_the_default_configuration():
    assert real.parse([]) == real.parse(["--preset", "tiny"]) == Config()


@pytest.mark.parametrize("name", real.PRESETS)
def test_a_preset_goes_through_the_parser_and_a_flag_overrides_it(name):
    assert real.parse(["--preset", name]) == Config(**real.PRESETS[name])
    changed = real.parse(["--preset", name, "--steps", "7", "--low_memory", "false", "--lr", "1"])
    assert changed == Config(**real.PRESETS[name] | dict(steps=7, low_memory=False, lr=1.0))
    assert real.parse(["--steps", "7", "--preset", name]).steps == 7


def test_the_presets_of_the_paper_are_those_of_section_5_1():
    paper = real.parse(["--preset", "paper"])
    assert (paper.tau, paper.prompts, paper.group_size, paper.mini_batches) == (0.5, 128, 8, 4)
    assert (paper.lr, paper.temperature) == (2e-6, 0.6)
    assert (paper.max_new_tokens, paper.steps, paper.eval_samples) == (8192, 1400, 16)


README = re.findall(r"^ *\$? ?python3? real\.py *(.*?) *(?:#.*)?$",
                    (ROOT / "README.md").read_text().replace("\\\n", ""), re.M)


@pytest.mark.parametrize("command", sorted(set(README)))
def test_every_command_of_the_readme_is_understood(command, capsys):
    argv = shlex.split(command)
    if "--help" in argv:
        with pytest.raises(SystemExit) as e:
            real.parse(argv)
        assert e.value.code == 0 and "--preset" in capsys.readouterr().out
    else:
        argv = [a for a in argv if a != "--resume"]
        assert isinstance(real.parse(argv), Config)


def test_every_setting_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        real.parse(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{f.name}" in shown for f in real.fields(Config))


@pytest.mark.parametrize("flags", [["--model", "x"], ["--dataset", "x"], ["--eval_dataset", "x"]])
def test_another_model_or_dataset_needs_a_preset(flags):
    if flags[0] == "--eval_dataset":
        assert real.parse(flags).eval_dataset == "x"  # only read, nothing is trained on it
    else:
        with pytest.raises(UserError, match="--preset.*tiny.*0.5b"):
            real.parse(flags)
    assert getattr(real.parse([*flags, "--preset", "tiny"]), flags[0][2:]) == "x"


@pytest.mark.parametrize("name", real.PRESETS)
def test_held_out_problems_are_never_the_toys_by_default(name):
    config = real.parse(["--preset", name, "--dataset", "mine.jsonl"])
    assert (config.eval_dataset or config.dataset) != real.TINY


def test_a_defect_of_our_own_shows_its_traceback(monkeypatch, tmp_path):
    def defect(*_):
        raise ValueError("ours")
    monkeypatch.setattr(real, "draw", defect)
    with pytest.raises(ValueError, match="ours"):
        main(*QUICK, "--output_dir", tmp_path / "run")


@pytest.mark.parametrize("where, setting", [("sample", "--slots"),
                                            ("update", "--micro_batch_tokens")])
@pytest.mark.parametrize("error, text", [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    (MemoryError, "")])
def test_out_of_memory_names_the_setting_to_lower(where, setting, error, text, tmp_path,
                                                  monkeypatch, capsys):
    def raising(*_, **__):
        raise error(text)
    namespace = dict(vars(real), next_token=raising, credit=raising)
    inner = {"sample": "next_token", "update": "credit"}[where]
    wait = real.check_model  # itself samples, once, before the run
    def then(*args):
        wait(*args)
        monkeypatch.setattr(real, inner, namespace[inner])
    monkeypatch.setattr(real, "check_model", then)
    said = refused(capsys, *QUICK, "--max_new_tokens", 8, "--output_dir", tmp_path / "run")
    other = {"--slots", "--micro_batch_tokens"} - {setting}
    assert "out of memory" in said and setting in said and other.pop() not in said


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_really_ends_is_one_line_and_costs_no_checkpoint(tmp_path):
    """100 MiB more than the process has when its first step, the second of the run, begins."""
    flags = ["--output_dir", str(tmp_path / "run"), "--group_size", "64", "--save_every", "1"]
    train(tmp_path / "run", "--steps", "1", "--max_new_tokens", "4", *flags[2:])
    code = f"""
import resource, sys, real
draw = real.draw
def limited(problems, step, config):
    size = int(open("/proc/self/statm").read().split()[0]) * {resource.getpagesize()}
    resource.setrlimit(resource.RLIMIT_AS, (size + 100 * 2**20,) * 2)
    return draw(problems, step, config)
real.draw = limited
with real.one_line_errors():
    real.train(real.parse())
"""
    flags = [*QUICK, *flags, "--resume", "--steps", "2", "--max_new_tokens", "128",
             "--micro_batch_tokens", "1000000"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, text=True, timeout=120,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "out of memory" in last and "lower --" in last
    assert real.read_checkpoint(tmp_path / "run")["step"] == 1
