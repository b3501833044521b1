"""Log-probabilities by the book, micro-batches, weights in bf16, the check at the start."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from toys import QUICK, ROUNDING, flat, made_up, plain_logprobs, sampled, tiny, toy

import real
from real import Config

MODELS = [transformers.Qwen2Config, transformers.Qwen3Config, transformers.LlamaConfig,
          transformers.MistralConfig]
BOTH = pytest.mark.parametrize("low_memory", [False, True])


def same(found, expected):
    """Equal but for fp32: log-probabilities have size log V and more, logits up to some tens."""
    return torch.allclose(found.double(), expected.double(), rtol=ROUNDING, atol=10 * ROUNDING)


@pytest.mark.parametrize("architecture", MODELS, ids=lambda c: c.model_type)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@BOTH
def test_by_the_book(architecture, temperature, low_memory):
    """Values and the gradient of every weight, for pieces of groups in any order of groups."""
    model = toy(architecture)
    batch = made_up(model)
    config = replace(QUICK, temperature=temperature, low_memory=low_memory)
    expected = plain_logprobs(model, batch, temperature)
    with torch.no_grad():
        assert same(real.all_logprobs(model, batch, config), expected)
    rows = [9, 10, 0, 2, 3]
    logp = real.token_logprobs(model, batch, rows, config)
    assert same(logp, expected.flatten(0, 1)[rows])
    assert not logp[~batch["mask"].view(12, 7)[rows]].any()
    weights = list(model.parameters())
    push = torch.sin(torch.arange(logp.numel())).view(logp.shape)
    found = flat(torch.autograd.grad((logp * push).sum(), weights))
    gradient = flat(torch.autograd.grad((expected.flatten(0, 1)[rows] * push).sum(), weights))
    assert (found - gradient).norm() <= ROUNDING * gradient.norm()


@BOTH
def test_the_example_of_the_docstring(low_memory):
    model = toy()
    batch = {"prompts": [torch.tensor([5, 6]), torch.tensor([7, 8, 9])],
             "completions": torch.tensor([[[2, 3, 1]], [[4, 1, 0]]]),
             "mask": torch.tensor([[[1, 1, 1]], [[1, 1, 0]]]).bool()}
    logp = real.token_logprobs(model, batch, [0, 1], replace(QUICK, low_memory=low_memory))

    @torch.no_grad()
    def log_pi(token, *before):
        return model(input_ids=torch.tensor([before])).logits[0, -1].log_softmax(-1)[token]

    assert same(logp, torch.tensor([[log_pi(2, 5, 6), log_pi(3, 5, 6, 2), log_pi(1, 5, 6, 2, 3)],
                                    [log_pi(4, 7, 8, 9), log_pi(1, 7, 8, 9, 4), 0.0]]))


@BOTH
def test_what_stands_outside_the_mask_is_not_seen(low_memory):
    model = toy()
    batch, config = made_up(model), replace(QUICK, low_memory=low_memory)
    other = torch.where(batch["mask"], batch["completions"], 3)
    with torch.no_grad():
        assert torch.equal(real.all_logprobs(model, batch, config),
                           real.all_logprobs(model, batch | {"completions": other}, config))


def test_the_embedded_model_by_the_book():
    model, batch = tiny()[0].double(), sampled()
    with torch.no_grad():
        assert same(real.all_logprobs(model, batch, QUICK), plain_logprobs(model, batch, 1.0))


def test_a_prompt_is_read_once():
    """The tokens that go through the model: each group's prompt once, then the completions."""
    model, batch, seen = tiny()[0], sampled(), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    real.token_logprobs(model, batch, range(16), QUICK)
    assert seen == [4, 16]


@BOTH
def test_dropout_is_off_while_training(low_memory):
    """A model whose configuration has dropout: the same gradient in one pass and in many."""
    gradients = []
    for tokens in (10**6, 1):
        model = toy(transformers.LlamaConfig, attention_dropout=0.5).train()
        if low_memory:
            model.gradient_checkpointing_enable()
        config = replace(QUICK, low_memory=low_memory, micro_batch_tokens=tokens)
        weights, batch = list(model.parameters()), made_up(model)
        for rows in real.micro_batches(batch, range(12), config):
            real.token_logprobs(model, batch, rows, config).sum().backward()
        gradients.append(flat(p.grad for p in weights))
    assert (gradients[0] - gradients[1]).norm() <= ROUNDING * gradients[0].norm()


# ---- Micro-batches -------------------------------------------------------------------------------


def of_lengths(lengths):
    """A batch of rollouts so long with their prompts, which have a token each; the lengths."""
    lengths = torch.tensor(lengths)
    mask = torch.arange(20) < lengths[..., None] - 1
    return {"prompts": [torch.tensor([2])] * len(mask), "mask": mask}, lengths.flatten().tolist()


@BOTH
@pytest.mark.parametrize("rows", [range(8), [1, 4, 6], []], ids=str)
@pytest.mark.parametrize("tokens", [1, 12, 40, 10**6])
def test_every_row_once_within_the_budget(rows, tokens, low_memory):
    batch, lengths = of_lengths([[7, 3], [9, 2], [4, 20], [4, 2]])
    config = replace(QUICK, micro_batch_tokens=tokens, low_memory=low_memory)
    parts = real.micro_batches(batch, rows, config)
    assert sorted(row for part in parts for row in part) == list(rows) and all(parts)
    assert all(len(p) == 1 or len(p) * max(lengths[i] for i in p) <= tokens for p in parts)
    assert len(parts) == (1 if rows else 0) or tokens < 10**6


def test_groups_stay_together_and_find_others_of_their_length():
    batch, _ = of_lengths([[3, 9], [4, 8], [2, 2], [9, 9]])
    for tokens, expected in ((18, [{4, 5}, {2, 3}, {0, 1}, {6, 7}]),
                             (36, [{2, 3, 4, 5}, {0, 1, 6, 7}])):
        parts = real.micro_batches(batch, range(8), replace(QUICK, micro_batch_tokens=tokens))
        assert [set(part) for part in parts] == expected


def test_where_no_prompt_is_shared_rollouts_of_like_length_go_together():
    """Whatever their group: sorted by length, as many as fit."""
    batch, lengths = of_lengths([[3, 9], [4, 8], [2, 2], [9, 9]])
    for tokens in (18, 27, 36):
        config = replace(QUICK, micro_batch_tokens=tokens, low_memory=True)
        parts = real.micro_batches(batch, range(8), config)
        taken = [lengths[row] for part in parts for row in part]
        assert taken == sorted(lengths)
        for part, following in zip(parts, parts[1:]):
            assert (len(part) + 1) * lengths[following[0]] > tokens  # one more did not fit


@BOTH
def test_a_forward_pass_keeps_the_budget(low_memory):
    """One long rollout beside short ones: the short ones are not padded to its length."""
    model = toy()
    batch = made_up(model, lengths=(5, 5, 5), T=40)
    batch["mask"][1:, :, 4:] = False
    sizes = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True)
    config = replace(QUICK, micro_batch_tokens=80, low_memory=low_memory)
    with torch.no_grad():
        logp = real.all_logprobs(model, batch, config)
        assert same(logp, plain_logprobs(model, batch, 1.0))
    passes = sizes[: len(sizes) - 12]
    assert max(passes) <= 80, passes


# ---- Weights in bf16 -----------------------------------------------------------------------------


def test_low_memory_rounds_weights_and_no_buffer():
    """Rotary frequencies in bf16 would turn queries by radians at positions beyond 2,000. What the
    rounded model holds, computed in fp32, is exactly a model whose weights alone are rounded."""
    model, expected = (toy(dtype=torch.float32, max_position_embeddings=4096) for _ in range(2))
    real.make_optimizer(model, Config(low_memory=True))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    for p in expected.parameters():
        p.data = p.data.bfloat16().float()
    turned = copy.deepcopy(expected)
    turned.base_model.rotary_emb.inv_freq = turned.base_model.rotary_emb.inv_freq.bfloat16().float()
    inputs = {"input_ids": torch.arange(2, 42)[None],
              "position_ids": torch.cat([torch.arange(4), torch.arange(3000, 3036)])[None]}
    with torch.no_grad():
        found, right, wrong = (m.eval()(**inputs).logits for m in (model.float(), expected, turned))
    assert torch.equal(found, right) and (wrong - right).norm() > 0.1 * right.norm()


# ---- The check at the start ----------------------------------------------------------------------

PROBLEMS = [{"prompt_ids": list(range(2, 2 + n)), "opening": ""} for n in (20, 13)]
TOKENIZER = SimpleNamespace(eos_token_id=1, decode=lambda *args, **kwargs: "")


def check(model, **settings):
    real.check_model(model, TOKENIZER, PROBLEMS, Config(max_new_tokens=8, **settings))


@pytest.mark.parametrize("architecture", MODELS, ids=lambda c: c.model_type)
@BOTH
def test_models_that_are_read_rightly_are_accepted(architecture, low_memory):
    for dropout in (0.0, 0.5):
        model = toy(architecture, attention_dropout=dropout, dtype=torch.float32, sliding_window=28)
        check(model.train(), temperature=0.6, low_memory=low_memory)


@pytest.mark.parametrize("architecture, more, words", [
    (transformers.MistralConfig, {"sliding_window": 27}, "28 tokens, positions for 27"),
    (transformers.LlamaConfig, {"max_position_embeddings": 27}, "28 tokens, positions for 27"),
    (transformers.Gemma2Config, {"final_logit_softcapping": 5.0}, "another way"),
    (transformers.CohereConfig, {"logit_scale": 0.25}, "another way"),
    (transformers.GraniteConfig, {"logits_scaling": 4.0}, "another way"),
    (transformers.MambaConfig, {}, "cannot use model"),
    (transformers.JambaConfig, {}, "cannot use model"),
], ids=lambda x: getattr(x, "model_type", None))
def test_models_that_would_be_read_wrongly_are_refused(architecture, more, words):
    model = toy(architecture, dtype=torch.float32, **more)
    with pytest.raises(real.UserError, match=words) as error:
        check(model)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("harm", ["nan", "bias", "dropped position", "cache"])
def test_a_model_that_reads_wrongly_is_refused(harm, monkeypatch):
    """Whatever the reason: in weights, head, positions or the cache that sampling writes."""
    model = toy(dtype=torch.float32)
    if harm == "nan":
        model.base_model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    if harm == "bias":
        old = model.forward

        def forward(*args, **kwargs):
            out = old(*args, **kwargs)
            out.logits = out.logits + torch.arange(50) / 50
            return out

        monkeypatch.setattr(model, "forward", forward)
    if harm == "dropped position":
        old_base = model.base_model.forward
        monkeypatch.setattr(model.base_model, "forward",
                            lambda position_ids=None, **kwargs: old_base(**kwargs))
    if harm == "cache":
        update = real.Slots.update
        monkeypatch.setattr(real.Slots, "update", lambda self, keys, values, layer, *a, **k:
                            update(self, keys, values * 0.5, layer))
    with pytest.raises(real.UserError):
        check(model)
