"""Strange models: no code of theirs ever runs, and none is trained wrongly."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import real
from common import one_line, train
from real import Config, UserError


@pytest.fixture
def model(tmp_path):
    """A copy of the embedded model, to be spoilt."""
    return shutil.copytree(real.TINY, tmp_path / "model")


SHORT = ["--steps", "1", "--prompts", "2", "--mini_batches", "1", "--group_size", "2",
         "--max_new_tokens", "8"]


def edit(file, **changes):
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))


def refused(model, *flags):
    """The one line with which a run on this model is refused before anything is written."""
    folder = model.parent / "run"
    with pytest.raises(UserError) as e:
        train(folder, "--model", model, *SHORT, *flags)
    assert one_line(e.value) and {p.name for p in folder.glob("*")} <= {".lock"}
    return str(e.value)


# ---- No code of a checkpoint or a data set -------------------------------------------------------

CODE = """import pathlib
pathlib.Path({marker!r}).write_text("ran")
from transformers import Qwen2Config as C, Qwen2ForCausalLM as M, PreTrainedTokenizerFast as T
class C(C):
    model_type = "evil"
"""


@pytest.mark.parametrize("model_type", ["evil", "qwen2"])
def test_code_that_comes_with_a_model_never_runs(model_type, model, tmp_path, monkeypatch):
    """Everything is there to run it, and the answer to the question whether to trust it is y.

    qwen2: a type that transformers knows; its own classes can train the model."""
    marker = tmp_path / "marker"
    (model / "code.py").write_text(CODE.format(marker=str(marker)))
    edit(model / "config.json", model_type=model_type,
         auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", "code.T"]},
         tokenizer_class="Strange")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    try:
        train(tmp_path / "run", "--model", model, *SHORT)
    except UserError as e:
        assert model_type == "evil" and one_line(e) and str(model) in str(e)
    assert not marker.exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_pickle_in_a_model_never_runs(model, tmp_path):
    (model / "model.safetensors").unlink()
    torch.save({"a": Evil(str(tmp_path / "marker"))}, model / "pytorch_model.bin")
    refused(model)
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(str(tmp_path / "marker"))))
    refused(model)
    assert not (tmp_path / "marker").exists()


def test_a_pickle_in_a_checkpoint_never_runs(tmp_path):
    train(tmp_path / "run", "--steps", "1")
    torch.save({"step": Evil(str(tmp_path / "marker"))}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(UserError, match="checkpoint.pt") as e:
        train(tmp_path / "run", "--resume")
    assert one_line(e.value) and not (tmp_path / "marker").exists()


def test_code_that_comes_with_data_never_runs(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("data.py", "train.py", "__init__.py"):
        (data / name).write_text(f"open({str(tmp_path / 'marker')!r}, 'w')")
    tokenizer = real.AutoTokenizer.from_pretrained(real.TINY)
    for path in (data, data / "data.py"):
        with pytest.raises(UserError):
            real.load_problems(tokenizer, Config(), str(path), "train")
    assert not (tmp_path / "marker").exists()


# ---- Folders that are no model -------------------------------------------------------------------

FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
         "model.safetensors"]


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe\0"], ids=repr)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_line_or_does_not_matter(name, content, model):
    (model / name).write_bytes(content)
    try:
        train(model.parent / "run", "--model", model, *SHORT)
    except UserError as e:
        assert one_line(e) and "model" in str(e)


@pytest.mark.parametrize("change", [
    {"dtype": "float99"},
    {"hidden_size": "x"}, {"hidden_size": 64}, {"num_hidden_layers": -1},
    {"num_attention_heads": 0}, {"vocab_size": 10}, {"vocab_size": 0}, {"model_type": "mamba"},
    {"model_type": "bert"}, {"model_type": "t5"}, {"model_type": 3}, {"model_type": None},
    {"hidden_act": "none"}, {"rope_parameters": {"rope_type": "x"}}, {"rms_norm_eps": "x"},
    {"quantization_config": "x"},
    {"layer_types": ["x"] * 4}, {"num_hidden_layers": 6}, {"max_position_embeddings": "x"},
], ids=str)
def test_a_strange_configuration_is_one_line(change, model):
    edit(model / "config.json", **change)
    assert "model" in refused(model)


@pytest.mark.parametrize("dtype", [3, "int64", "bool", "bfloat16", None])
def test_the_dtype_that_a_configuration_names_does_not_matter(dtype, model):
    edit(model / "config.json", dtype=dtype)
    assert real.load_model(model)[0].dtype == torch.float32
    assert train(model.parent / "run", "--model", model, *SHORT)["step"] == 1


@pytest.mark.parametrize("eos", [-1, 1.5, [], "x", [[1]], 10**30, {}], ids=str)
def test_a_strange_end_token_is_one_line_or_does_not_matter(eos, model):
    edit(model / "generation_config.json", eos_token_id=eos)
    try:
        train(model.parent / "run", "--model", model, *SHORT)
    except UserError as e:
        assert one_line(e)


@pytest.mark.parametrize("template", [
    "{{ nothing.at.all }}", "{% for %}", "{{ raise_exception('no') }}", "", "\0", "{{ 1/0 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for m in messages %}{% endfor %}"])
def test_a_strange_template_is_one_line_or_does_not_matter(template, model):
    (model / "chat_template.jinja").write_text(template)
    try:
        train(model.parent / "run", "--model", model, *SHORT)
    except UserError as e:
        assert one_line(e)


@pytest.mark.parametrize("what", ["none", "an empty folder", "a file", "a bad id", "too long"])
def test_no_model_is_one_line(what, tmp_path):
    model = tmp_path / "model"
    if what == "an empty folder":
        model.mkdir()
    if what == "a file":
        model.write_text("x")
    names = {"a bad id": "a b//c", "too long": "x" * 5000}
    with pytest.raises((UserError, OSError)) as e:  # main makes one line of both
        train(tmp_path / "run", "--model", names.get(what, model))
    assert one_line(e.value) or isinstance(e.value, OSError)


# ---- Never trained wrongly -----------------------------------------------------------------------


def test_missing_weights_are_never_made_up(model):
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    assert "model" in refused(model)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(model):
    """The word that has no embedding is not in the first problem."""
    tokenizer = real.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"zebra{i}" for i in range(400)])
    tokenizer.save_pretrained(model)
    data = model.parent / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": p, "answer": "2"}) + "\n"
                            for p in ["1+1", "2+2", "3+3", "zebra399"]))
    with pytest.raises(UserError) as e:
        train(model.parent / "run", "--model", model, "--dataset", data)
    assert one_line(e.value) and {p.name for p in (model.parent / "run").glob("*")} <= {".lock"}


@pytest.mark.parametrize("limit", ["max_position_embeddings", "window_size",
                                   "original_max_position_embeddings"])
def test_positions_that_end_before_the_rollout_are_refused(limit, model):
    edit(model / "config.json", **{limit: 64})
    assert "positions for 64: lower --max_new_tokens" in refused(model, "--max_new_tokens", 48)


def test_positions_of_rope_parameters_are_refused_too(model):
    rope = {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    edit(model / "config.json", rope_parameters=rope)
    assert "positions for 64" in refused(model, "--max_new_tokens", 48)


SMALL = dict(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=64, eos_token_id=1, bos_token_id=0)
ARCHITECTURES = {  # Hugging Face name: settings, and whether real.py can train it
    "llama": (dict(num_key_value_heads=1), True),
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=2, n_positions=512), True),
    "mamba": (dict(state_size=4), False), "rwkv": (dict(attention_hidden_size=32), False),
    "gemma2": (dict(num_key_value_heads=1, head_dim=16), False),  # its logits are capped
    "bert": (dict(is_decoder=False), False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_cannot_be_trained_rightly_is_refused_at_the_start(name, model):
    settings, works = ARCHITECTURES[name]
    torch.manual_seed(0)
    try:
        settings = AutoConfig.for_model(name, **(SMALL | settings))
        other = AutoModelForCausalLM.from_config(settings)
    except (ValueError, ImportError) as e:
        pytest.skip(str(e))
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        (model / file).unlink()
    if name == "gemma2":  # its logits are capped at 30, so they have to be large
        other.get_input_embeddings().weight.data.mul_(2000)
    other.save_pretrained(model)
    if works:
        assert train(model.parent / "run", "--model", model, *SHORT)
    else:
        assert "model" in refused(model)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_model_that_is_sampled_wrongly_is_refused(call, model, monkeypatch):
    """The second best token as one of the four that the check draws: log-probabilities agree."""
    best, drawn = real.next_token, []

    def second(logits, *settings):
        drawn.append(best(logits, *settings))
        return logits.topk(2).indices[:, 1] if len(drawn) == call else drawn[-1]

    monkeypatch.setattr(real, "next_token", second)
    assert "another way" in refused(model)
    assert len(drawn) == 8  # four tokens, and four in the slots that are used again
