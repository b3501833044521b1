"""What once went wrong, each with a test that failed then."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

import real

ROOT = Path(real.__file__).parent
QUICK = ["--steps", "2", "--prompts", "4", "--mini_batches", "2", "--group_size", "4", "--eval_every", "0"]


def start(*flags, script="real.py", threads=1, **more):
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"} | more
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, flags)], env=environment, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*flags, answers="", **more):
    """Exit code, output and errors of one command; `answers` is its stdin."""
    process = start(*flags, **more)
    out, err = process.communicate(answers, timeout=300)
    return process.returncode, out, err


def load(file):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem + "_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- One seed, one result ---------------------------------------------------------------------------------------------


def test_one_seed_gives_one_result_with_two_threads_on_a_busy_machine(tmp_path):
    """Was: seven runs of one seed gave seven results. The backward pass of h[b], where b repeats an index (a prompt's
    last token predicts the first token of every branch), adds in whatever order its threads arrive.

    Four runs at a time, of two threads each, keep each other busy; 4 x 32 branches make that order matter.
    """
    runs = [start(*QUICK, "--group_size", 32, "--output_dir", tmp_path / str(i), threads=2) for i in range(4)]
    for process in runs:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    weights = [(tmp_path / str(i) / "checkpoint-000002" / "model.safetensors").read_bytes() for i in range(4)]
    assert all(w == weights[0] for w in weights)


# ---- Low memory rounds parameters, not buffers ------------------------------------------------------------------------


def forwards(action):
    """Every module whose `forward` ran while `action` did, in the order of its first call."""
    seen = {}
    hook = register_module_forward_pre_hook(lambda module, args: seen.setdefault(id(module), module) and None)
    try:
        action()
    finally:
        hook.remove()
    return list(seen.values())


def assert_only_parameters_are_rounded(modules):
    rotary = [m for m in modules if hasattr(m, "inv_freq")]
    for m in rotary:
        assert m.inv_freq.dtype == torch.float32 and torch.equal(m.inv_freq.cpu(), type(m)(config=m.config).inv_freq)
    assert rotary and all(p.dtype == torch.bfloat16 for m in modules for p in m.parameters())


def test_low_memory_trains_the_model_with_rounded_parameters(tmp_path):
    """Was: `.to(device, torch.bfloat16)` rounded the rotary frequencies too, so that positions 3,000 tokens apart were
    some 4 rad out of phase and logits far more wrong than rounding the weights makes them.

    The model that ran must be the saved fp32 one with its parameters rounded: both are evaluated in fp32 by the same
    operations, so their logits are equal, whatever the CPU.
    """
    config = real.Config(low_memory=True, objective="grpo", steps=1, prompts=4, mini_batches=2, group_size=4,
                         eval_every=0, output_dir=str(tmp_path / "run"))
    modules = forwards(lambda: real.train(config))
    saved, _ = real.load_model(str(tmp_path / "run" / "checkpoint-000001"))
    rounded = copy.deepcopy(saved)
    for p in rounded.parameters():
        p.data = p.data.bfloat16().float()
    base = next(m for m in modules if type(m) is type(saved.base_model))  # the first to run is trained, the other pi_ref
    saved_base = copy.deepcopy(saved.base_model)
    saved_base.load_state_dict(base.state_dict())  # its parameters, in fp32
    saved_base.rotary_emb.inv_freq = base.rotary_emb.inv_freq.float()
    ids = torch.randint(100, 300, (1, 64), generator=torch.Generator().manual_seed(0))
    position = torch.cat([torch.arange(32), torch.arange(3000, 3032)])[None]
    with torch.no_grad():
        exact, alone = (m(input_ids=ids, position_ids=position).logits for m in (saved, rounded))
        live = rounded.lm_head(saved_base(input_ids=ids, position_ids=position)[0])
    error = [(x - exact).abs().mean().item() for x in (alone, live)]
    print("mean error of logits: parameters rounded {:.4f}, as trained {:.4f}".format(*error))
    assert torch.equal(live, alone)
    assert_only_parameters_are_rounded(modules)


# ---- No code from a checkpoint ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["real.py", "eval.py"])
@pytest.mark.parametrize("part", ["config", "tokenizer_config"])
def test_a_checkpoint_runs_no_code(tmp_path, part, script):
    """Was: transformers asks on stdin whether to run a checkpoint's own Python, and a `y` (from `yes |`, say) ran it."""
    model, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(ROOT / "tiny", model)
    classes = {"config": {"AutoConfig": "code.Any", "AutoModelForCausalLM": "code.Any"},
               "tokenizer_config": {"AutoTokenizer": ["code.Any", "code.Any"]}}[part]
    for name, more in (("config", {"model_type": "strange"}), ("tokenizer_config", {"tokenizer_class": "Strange"})):
        settings = json.loads((model / f"{name}.json").read_text())
        if name in ("config", part):  # a model type that transformers knows is loaded by transformers' own classes
            settings |= more | ({"auto_map": classes} if name == part else {})
        (model / f"{name}.json").write_text(json.dumps(settings))
    (model / "code.py").write_text(f"open({str(marker)!r}, 'w').write('it ran')\n\nclass Any:\n    pass\n")
    preset = ["--preset", "tiny"] if script == "real.py" else []
    code, out, err = run("--model", model, *preset, "--output_dir", tmp_path / "out", script=script, answers="y\ny\ny\n",
                         HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert not marker.exists()
    assert code == 2 and "Traceback" not in err and f"cannot load model {model}" in err.strip().splitlines()[-1]


# ---- The run's folder: what is not ours stays -------------------------------------------------------------------------


def contents(folder):
    """{path: bytes} of every file but the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    real.train(real.parse([*QUICK, "--save_every", "1", "--output_dir", str(folder)]))
    return folder


@pytest.mark.parametrize("kind", ["a model", "a user's files", "a config of something else", "checkpoints without a log"])
def test_a_folder_that_is_not_a_run_of_ours_is_refused_untouched(kind, tmp_path, finished_run, capsys):
    """Was: `--output_dir` naming a model's folder replaced its config.json, and the model no longer loaded; any other
    folder was filled; checkpoints whose log was gone were replaced."""
    folder = tmp_path / "mine"
    folder.mkdir()
    if kind == "a model":
        shutil.copytree(ROOT / "tiny", folder, dirs_exist_ok=True)
    elif kind == "a user's files":
        (folder / "rows.jsonl").write_text('{"mine": 1}\n')
    elif kind == "a config of something else":
        (folder / "config.json").write_text("[1, 2]")
    else:
        shutil.copytree(finished_run, folder, dirs_exist_ok=True)
        (folder / "metrics.jsonl").unlink()
    before = contents(folder)
    with pytest.raises(SystemExit) as e:
        real.main([*QUICK, "--output_dir", str(folder)])
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and said[-1].startswith(f"real.py: error: {folder}") and "Traceback" not in "".join(said)
    assert contents(folder) == before


def test_a_users_files_in_a_run_are_left_alone(tmp_path, finished_run):
    """Was: every *.jsonl was rewritten at each start, row by row (49 of 50 rows of a user's data were lost), a copy
    checkpoint-000001-good was deleted as too old, checkpoint-best was resumed from, and a .tar ended the run."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    (folder / "data.jsonl").write_text('{"step": 1}\n{"step": 99}\nhalf a li')
    for name in ("checkpoint-000001-good", "checkpoint-best"):
        shutil.copytree(folder / "checkpoint-000001", folder / name)
    (folder / "checkpoint-000001.tar").write_bytes(b"an archive")
    mine = {k: v for k, v in contents(folder).items() if k.startswith(("data", "checkpoint-000001-", "checkpoint-best"))
            or k.endswith("tar")}
    flags = [*QUICK, "--save_every", "1", "--keep", "1", "--output_dir", str(folder), "--resume", "--steps", "3"]
    assert real.train(real.parse(flags))["step"] == 3
    assert mine.items() <= contents(folder).items() and len(mine) > 10
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps == [1, 2, 3] and not (folder / "checkpoint-000002").exists()


@pytest.mark.parametrize("broken", [["checkpoint-000002"], ["checkpoint-000001", "checkpoint-000002"]])
@pytest.mark.parametrize("how", ["unreadable", "damaged"])
def test_a_checkpoint_that_cannot_be_read_stops_the_run(tmp_path, finished_run, broken, how, capsys):
    """Was: an I/O error was "passed over": with no other checkpoint the run began again at step 1, emptied its logs and
    replaced the good checkpoints. A damaged one is still passed over, but only for one that is whole."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    for name in broken:
        file = folder / name / "optimizer.pt"
        file.unlink()
        if how == "unreadable":
            file.symlink_to(file)  # a loop: reading it is an error of the system, for root too
        else:
            file.write_bytes(b"")
    before = contents(folder)
    flags = [*QUICK, "--save_every", "1", "--output_dir", str(folder), "--resume", "--steps", "3"]
    if how == "damaged" and len(broken) == 1:
        assert real.train(real.parse(flags))["step"] == 3
        return
    with pytest.raises(SystemExit) as e:
        real.main(flags)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 2 and said.startswith("real.py: error: ") and broken[0] in said and "--resume" in said
    after = contents(folder)
    assert before | {"config.json": after["config.json"]} == after  # the settings alone are new


# ---- Settings belong to a model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (["--model", "some/model", "--dataset", "my.jsonl"], "--model some/model"),
    (["--model", "some/model"], "--model some/model"), (["--dataset", "my.jsonl"], "--dataset my.jsonl"),
    (["--config", "CONFIG"], "--model some/model"),
    (["--preset", "tiny", "--dataset", "my.jsonl"], "--eval_dataset")])
def test_another_model_does_not_inherit_the_settings_of_the_embedded_one(tmp_path, flags, words, capsys):
    """Was: `--model X --dataset Y` trained with learning rate 5e-5, 48 tokens an answer and temperature 1, and was
    validated on the embedded model's sums. No answer could be right, and nothing said so."""
    (tmp_path / "CONFIG").write_text("model: some/model\n")
    flags = [str(tmp_path / f) if f == "CONFIG" else f for f in flags]
    with pytest.raises(SystemExit) as e:
        real.main([*flags, "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().err.strip().splitlines()
    assert e.value.code == 2 and words in said[-1] and said[-1].startswith("real.py: error: ")
    assert words == "--eval_dataset" or all(name in said[-1] for name in real.PRESETS) and "--preset" in said[-1]
    assert not (tmp_path / "run").exists()


def test_what_names_its_settings_is_accepted(tmp_path, monkeypatch):
    """A preset, a file with every setting, the embedded model under another path; and the README's own commands."""
    mine = ["--model", "some/model", "--dataset", "my.jsonl", "--eval_dataset", "held_out.jsonl"]
    assert real.parse([*mine, "--preset", "1.5b"]).max_new_tokens == 8192
    assert real.parse([*mine, "--preset", "tiny"]).max_new_tokens == 48
    complete = tmp_path / "config.json"
    complete.write_text(json.dumps(real.asdict(real.parse([*mine, "--preset", "1.5b", "--lr", "3e-6"]))))
    assert real.parse(["--config", str(complete)]).lr == 3e-6
    monkeypatch.chdir(ROOT)
    assert real.parse(["--model", "tiny", "--dataset", "tiny"]).steps == 80
