"""Log-probabilities, sampling, exact micro-batches and whole training runs on the embedded model."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import real
from real import Config, OBJECTIVES
from test_parallel import doubled, float64

ROOT = Path(real.__file__).parent
QUICK = Config(eval_every=0, steps=2, prompts=4, mini_batches=2, group_size=4)


@pytest.fixture(scope="module")
def tiny():
    model, tokenizer = real.load_model(Config().model)
    return model, tokenizer, real.load_problems(tokenizer, Config(), Config().dataset, "train")


@pytest.fixture(scope="module")
def batch(tiny):
    model, tokenizer, problems = tiny
    torch.manual_seed(0)
    batch = real.rollouts(model, tokenizer, problems[:4], 4, 48, 1.0)
    batch["old_logp"], _ = real.all_logprobs(model, batch, QUICK)
    batch["ref_logp"] = batch["old_logp"] - 0.01
    return batch


# ---- Log-probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, short", [(1.0, real.SHORT), (0.6, real.SHORT), (1.0, 0)])
def test_logprobs_match_the_plain_formula(tiny, batch, temperature, short, monkeypatch):
    """Each rollout alone, full logits, log_softmax: the values and the gradients of every weight. Short sequences: all
    rollouts of a question behind one prompt; else each behind its own."""
    model, config = tiny[0], replace(QUICK, temperature=temperature)
    monkeypatch.setattr(real, "SHORT", short)
    sequences = []  # in each forward pass
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sequences.append(len(kwargs["input_ids"])), with_kwargs=True)
    logp, entropy = real.all_logprobs(model, batch, config)
    hook.remove()
    assert sum(sequences) == (4 if short else 16)
    total = 0.0
    for q in range(4):
        for g in range(4):
            o = batch["completions"][q, g][batch["mask"][q, g]]
            ids = torch.cat([batch["prompts"][q], o])[None]
            full = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
            start = len(batch["prompts"][q]) - 1
            plain = full[start : start + len(o)].gather(-1, o[:, None])[:, 0]
            assert torch.allclose(logp[q, g][: len(o)].double(), plain, atol=1e-5)
            h = -(full.exp() * full).sum(-1)[start : start + len(o)]
            assert torch.allclose(entropy[q, g][: len(o)].double(), h, atol=1e-5)
            total = total + plain.sum()
    expected = torch.autograd.grad(total, list(model.parameters()))
    real.token_logprobs(model, batch, list(range(16)), config)[0].sum().backward()
    for p, e in zip(model.parameters(), expected):
        assert torch.allclose(p.grad, e, rtol=1e-4, atol=1e-4 * e.abs().max().item())
    model.zero_grad()


SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=128)


@pytest.mark.parametrize("architecture", [
    transformers.Qwen2Config(**SIZES), transformers.Qwen3Config(**SIZES), transformers.LlamaConfig(**SIZES),
    transformers.MistralConfig(**SIZES, sliding_window=8), transformers.Phi3Config(**SIZES, sliding_window=8, pad_token_id=0),
    transformers.Gemma3TextConfig(**SIZES, sliding_window=8)], ids=lambda c: c.model_type)
def test_logprobs_of_other_architectures(architecture):
    """Attention of some layers to a window, too: where a tree of rollouts would be read wrongly, none is made."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32).eval()
    mask = torch.arange(12) < torch.randint(1, 13, (2, 4, 1))
    prompts = [torch.randint(1, 50, (n,)) for n in (9, 14)]
    batch = {"prompts": prompts, "completions": torch.randint(1, 50, (2, 4, 12)), "mask": mask,
             "lengths": mask.sum(-1) + torch.tensor([[9], [14]])}
    logp, _ = real.all_logprobs(model, batch, QUICK)
    for q in range(2):
        for g in range(4):
            o = batch["completions"][q, g][mask[q, g]]
            full = model(input_ids=torch.cat([prompts[q], o])[None]).logits[0].log_softmax(-1)
            assert torch.allclose(logp[q, g][mask[q, g]], full[len(prompts[q]) - 1 : -1].gather(-1, o[:, None])[:, 0], atol=1e-5)


def test_s_bar_is_exactly_zero_before_the_first_update(tiny, batch):
    again, _ = real.all_logprobs(tiny[0], batch, QUICK)
    assert torch.equal(again, batch["old_logp"])


# ---- Exact at any micro-batch size ------------------------------------------------------------------------------------


def gradient(model, batch, config):
    """The mini-batch gradient that `update` hands to the optimizer (before clipping: the limit is out of reach)."""
    seen = {}

    class Spy:
        def step(self):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters()})

    logp = batch["old_logp"] + 0.1 * torch.sin(torch.arange(batch["mask"].numel()).view(batch["mask"].shape))
    real.update(model, model, Spy(), batch, config, torch.where(batch["mask"], logp, 0.0))
    return seen


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_does_not_depend_on_the_micro_batch(tiny, batch, objective):
    assert real.is_mixed(batch["labels"]).any()
    config = replace(QUICK, objective=objective, grad_clip=1e9, kl_old=0.01)
    with float64():
        model, batch = copy.deepcopy(tiny[0]).double(), doubled(batch)
        whole, groups, single = (gradient(model, batch, replace(config, micro_batch_tokens=n)) for n in (10**6, 300, 1))
    for n, g in whole.items():
        assert g.abs().max() > 0
        for other in (groups, single):
            assert (g - other[n]).norm() <= 1e-6 * g.norm()  # nine RMSNorms round to fp32 by themselves, 1.2e-7 each


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_step_gradient_is_the_gradient_of_the_loss(tiny, batch, objective):
    """`credit` then the chain rule, against plain autograd through model and objective at once."""
    model, config = tiny[0], replace(QUICK, objective=objective, grad_clip=1e9)
    old = torch.where(batch["mask"], batch["old_logp"] - 0.2 * torch.rand(batch["mask"].shape), 0.0)
    shifted = batch | {"old_logp": old}
    logp = real.token_logprobs(model, shifted, list(range(16)), config)[0].view(old.shape)
    loss = OBJECTIVES[objective](logp, old, batch["mask"], batch["labels"], ref_logp=batch["ref_logp"])
    expected = torch.autograd.grad(loss, list(model.parameters()))
    seen = []

    class Spy:
        def step(self):
            seen.extend(p.grad.clone() for p in model.parameters())

    result = real.update(model, model, Spy(), shifted, config)
    assert result["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for g, e in zip(seen, expected):
        assert (g - e).norm() <= 1e-4 * e.norm()


def test_micro_batches_hold_every_row_once_and_keep_the_budget(monkeypatch):
    lengths = [7, 3, 9, 1, 4, 20, 4, 2]
    batch = {"lengths": torch.tensor(lengths).view(4, 2)}
    for short, rows in ((0, range(8)), (512, range(8)), (0, [1, 4, 6])):
        monkeypatch.setattr(real, "SHORT", short)
        parts = real.micro_batches(batch, rows, replace(QUICK, micro_batch_tokens=12))
        assert sorted(sum(parts, [])) == list(rows) and all(p == sorted(p) for p in parts)
        assert all(len(p) == 1 or len(p) * max(lengths[r] for r in p) <= 12 for p in parts)
        assert len(parts) < len(rows)


def test_groups_stay_together_where_they_share_their_prompt():
    batch = {"lengths": torch.tensor([[3, 9], [4, 8], [1, 2]])}
    parts = real.micro_batches(batch, range(6), replace(QUICK, micro_batch_tokens=18))
    assert parts == [[4, 5], [2, 3], [0, 1]]


# ---- Sampling ---------------------------------------------------------------------------------------------------------


def test_samples_follow_the_model(tiny):
    """The frequencies of first tokens against the softmax, at two temperatures and with top-p."""
    model, tokenizer, problems = tiny
    prompt = torch.tensor(problems[0]["prompt_ids"])
    logits = model(input_ids=prompt[None]).logits[0, -1].detach().double()
    for temperature, top_p in [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)]:
        p = (logits / temperature).softmax(-1)
        if top_p < 1:
            order = p.argsort(descending=True)
            kept = order[: int((p[order].cumsum(-1) < top_p).sum()) + 1]
            p = torch.zeros_like(p).index_copy(0, kept, p[kept] / p[kept].sum())
        torch.manual_seed(1)
        ids, _ = real.sample(model, [prompt], 4000, [1], 1, temperature, top_p)
        seen = torch.bincount(ids.flatten(), minlength=len(p)) / 4000
        assert (seen - p).abs().max() < 5 * math.sqrt(0.25 / 4000)
        assert not seen[p == 0].any()


def test_greedy_samples_match_generate_and_masks_end_at_the_first_end_token(tiny):
    """Prompts of different lengths in one batch, rollouts leaving it early: the tokens are those of `generate`."""
    model, tokenizer, problems = tiny
    short = sorted(problems[:50], key=lambda p: len(p["prompt_ids"]))
    prompts = [torch.tensor(p["prompt_ids"]) for p in short[:2] + short[-2:]]
    ids, mask = real.sample(model, prompts, 2, [tokenizer.eos_token_id], 48, 0)
    for q, prompt in enumerate(prompts):
        alone = model.generate(prompt[None], do_sample=False, max_new_tokens=48, pad_token_id=1)[0, len(prompt):]
        assert torch.equal(ids[q, 0][mask[q, 0]], alone) and torch.equal(ids[q, 1], ids[q, 0])
        assert (ids[q, 0][mask[q, 0]] == tokenizer.eos_token_id).sum() == (alone[-1] == tokenizer.eos_token_id)


# ---- Whole runs -------------------------------------------------------------------------------------------------------


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").open()]


def test_training_raises_the_reward_and_saves_a_hugging_face_model(tmp_path):
    config = Config(steps=24, eval_every=24, eval_limit=64, eval_samples=4, output_dir=str(tmp_path / "run"))
    last = real.train(config)
    log = rows(tmp_path / "run")
    assert [r["step"] for r in log] == list(range(1, 25))
    assert all({"step", "loss", "reward", "entropy", "response_length"} <= r.keys() for r in log)
    assert last["pass@1"] > log[0]["pass@1_before"] + 0.1
    assert sum(r["reward"] for r in log[-6:]) > sum(r["reward"] for r in log[:6]) + 0.6
    assert max(r["max_weight"] for r in log) <= 1 / config.tau
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-000024").num_parameters() > 1e5
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tau"] == 0.5


@pytest.mark.parametrize("objective", ["grpo", "trpa", "gspo"])
def test_other_objectives_train(tmp_path, objective):
    last = real.train(replace(QUICK, objective=objective, output_dir=str(tmp_path / "run")))
    assert math.isfinite(last["loss"]) and last["grad_norm"] > 0


def test_same_seed_same_metrics(tmp_path):
    logs = []
    for name in ("a", "b", "c"):
        real.train(replace(QUICK, seed=int(name == "c"), output_dir=str(tmp_path / name)))
        logs.append([{k: v for k, v in r.items() if k != "seconds"} for r in rows(tmp_path / name)])
    assert logs[0] == logs[1] != logs[2]


def test_train_wires_algorithm_1_as_configured(tmp_path, monkeypatch):
    """What `train` hands to each update: questions, log-probabilities, reference, learning rate, weight decay."""
    base, tokenizer = real.load_model(Config().model)
    config = replace(QUICK, objective="grpo", steps=2, prompts=6, mini_batches=3, warmup=4, lr=1e-3, weight_decay=0.03,
                     output_dir=str(tmp_path / "run"))
    calls, update, at_start = [], real.update, []

    def spy(model, master, optimizer, batch, config, logp=None):
        if logp is not None:
            at_start.append(copy.deepcopy(model))  # pi_old: the weights before the first update of a step
        group = optimizer.param_groups[0]
        calls.append((batch, logp is not None, group["lr"], group["weight_decay"], group["betas"]))
        return update(model, master, optimizer, batch, config, logp)

    monkeypatch.setattr(real, "update", spy)
    real.train(config)
    assert [first for _, first, *_ in calls] == [True, False, False] * 2
    assert [lr for _, _, lr, *_ in calls] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert all(decay == 0.03 and betas == (0.9, 0.95) for *_, decay, betas in calls)
    problems = real.load_problems(tokenizer, config, config.dataset, "train")
    for step in (1, 2):
        mine = [batch for batch, *_ in calls[3 * step - 3 : 3 * step]]
        drawn = [p["problem"] for p in real.draw(problems, step, config)]
        assert [p["problem"] for batch in mine for p in batch["problems"]] == drawn
        for batch in mine:  # every mini-batch of a step is compared with the same old policy and the same reference
            old, _ = real.all_logprobs(at_start[step - 1], batch, config)
            reference, _ = real.all_logprobs(base, batch, config)
            assert torch.allclose(batch["old_logp"], old, atol=1e-4)
            assert torch.allclose(batch["ref_logp"], reference, atol=1e-4)
            assert step == 1 or not torch.allclose(old, reference, atol=1e-3)


def test_settings_reach_the_objective(batch):
    logp = torch.where(batch["mask"], batch["old_logp"] + 0.3, 0.0)
    for settings in ({"tau": 0.1}, {"tau": 1.0}, {"as_printed": True}):
        expected = real.real(logp, batch["old_logp"], batch["mask"], batch["labels"], **settings)
        assert real.credit(logp, batch, replace(QUICK, **settings))[0] == expected != real.credit(logp, batch, QUICK)[0]


def test_gradients_are_clipped(tiny, batch):
    norms = []

    class Spy:
        def step(self):
            norms.append(torch.cat([p.grad.flatten() for p in tiny[0].parameters()]).norm().item())

    result = real.update(tiny[0], tiny[0], Spy(), batch, replace(QUICK, grad_clip=0.01), batch["old_logp"])
    assert result["grad_norm"] > 0.1 and norms[0] == pytest.approx(0.01, rel=1e-3)


def test_an_answer_without_the_end_of_thinking_is_wrong(tiny, monkeypatch):
    """The prompt opens <think>, so a boxed answer that comes before </think> is not graded as an answer."""
    model, tokenizer, problems = tiny
    box = rf"\boxed{{{problems[0]['answer']}}}"
    for text, right in ((box, False), (f"</think>{box}", True)):
        monkeypatch.setattr(type(tokenizer), "decode", lambda self, *a, text=text, **k: text)
        assert real.rollouts(model, tokenizer, problems[:1], 2, 4, 1.0)["labels"].tolist() == [[right, right]]


def test_validation_sees_problems_that_training_does_not(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(real, "validate", lambda model, tokenizer, problems, config: seen.append(problems) or 0.5)
    real.train(replace(QUICK, eval_every=1, eval_limit=100, steps=1, output_dir=str(tmp_path / "run")))
    held_out, trained = ({json.loads(line)["problem"] for line in (ROOT / "tiny" / f"{split}.jsonl").open()}
                         for split in ("test", "train"))
    assert len(seen) == 2 and all(len(problems) == 100 for problems in seen)
    assert {p["problem"] for p in seen[0]} <= held_out and not held_out & trained


@pytest.mark.parametrize("offload", [False, True])
def test_low_memory_runs_and_resumes(tmp_path, offload):
    config = replace(QUICK, low_memory=True, offload_gradients=offload, save_every=1, output_dir=str(tmp_path / "a"))
    real.train(config)
    real.train(replace(config, steps=1, output_dir=str(tmp_path / "b")))
    real.train(replace(config, resume=True, output_dir=str(tmp_path / "b")))
    ends = [(tmp_path / name / "checkpoint-000002" / "model.safetensors").read_bytes() for name in "ab"]
    assert ends[0] == ends[1]


def test_low_memory_weights_learn_where_plain_bfloat16_does_not(tiny, batch, monkeypatch):
    """100 updates at lr 2e-6 on the same gradients: the change of the weights against that of an fp32 run."""
    changes = {}
    for mode in ("fp32", "low memory", "low memory, gradients offloaded", "plain bfloat16"):
        model = tiny[0].__class__.from_pretrained(Config().model, dtype=torch.float32)
        live = copy.deepcopy(model).bfloat16() if mode != "fp32" else model
        master = live if mode == "plain bfloat16" else model
        config = replace(QUICK, low_memory=True, offload_gradients=True) if "offloaded" in mode else QUICK
        if config.offload_gradients:
            real.offload_gradients(live, master)
        optimizer = torch.optim.AdamW(master.parameters(), 2e-6)
        before = [p.detach().float().clone() for p in master.parameters()]
        noise = torch.Generator().manual_seed(0)

        def fake(model, batch, rows, config):
            """Log-probabilities that depend linearly on the weights, so that every mode sees the same gradients."""
            total = sum((p.float() * (torch.randn(p.shape, generator=noise) + 0.5)).sum() for p in model.parameters())
            return total.expand(len(rows), batch["mask"].shape[-1]) * 1.0, None

        monkeypatch.setattr(real, "token_logprobs", fake)
        for _ in range(100):
            real.update(live, master, optimizer, batch, config, batch["old_logp"])
            assert not any(p.grad is not None for p in [*live.parameters(), *master.parameters()])
        changes[mode] = torch.cat([(m.detach().float() - b).flatten() for m, b in zip(master.parameters(), before)])
    size = changes["fp32"].norm()
    error = {mode: ((change - changes["fp32"]).norm() / size).item() for mode, change in changes.items()}
    print(error)
    assert max(error["low memory"], error["low memory, gradients offloaded"]) < 0.02 and error["plain bfloat16"] > 0.5


def test_the_benchmark_runs():
    import importlib.util

    spec = importlib.util.spec_from_file_location("benchmark", Path(__file__).with_name("benchmark.py"))
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert all(seconds > 0 and tokens > 1000 for seconds, tokens in benchmark.ours(1))
    benchmark.card(0)
