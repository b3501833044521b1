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


def test_eval_and_benchmark_round_parameters_alone(tmp_path, monkeypatch):
    """Was: as above, wherever a model went to the GPU. Here the GPU is the CPU under another name."""
    benchmark, evaluate = (load(ROOT / file) for file in ("tests/benchmark.py", "eval.py"))
    assert_only_parameters_are_rounded(forwards(lambda: benchmark.card(0)))
    to = torch.nn.Module.to
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *args, **more: to(
        self, *("cpu" if str(x) == "cuda" else x for x in args), **{k: "cpu" if k == "device" else v for k, v in more.items()}))
    flags = ["--samples", "2", "--limit", "2", "--max_new_tokens", "8", "--output_dir", str(tmp_path)]
    assert_only_parameters_are_rounded(forwards(lambda: evaluate.main(flags)))


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
    code, out, err = run("--model", model, "--output_dir", tmp_path / "out", script=script, answers="y\ny\ny\n",
                         HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert not marker.exists()
    assert code == 2 and "Traceback" not in err and f"cannot load model {model}" in err.strip().splitlines()[-1]
