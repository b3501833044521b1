"""An update, the optimizer, what a step logs, and whole runs by Algorithm 1."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toys import (QUICK, ROUNDING, embedded, flat, made_up, plain_logprobs, round_weights,
                  sampled, tiny, toy)
from transformers import AutoModelForCausalLM

import real
from real import OBJECTIVES, Config

BOTH = pytest.mark.parametrize("low_memory", [False, True])
FREE = replace(QUICK, grad_clip=1e9)  # no clipping


def moved(model, batch, config):
    """The gradient that `update` hands to the optimizer: one step of SGD at learning rate 1."""
    model = copy.deepcopy(model)
    before = flat(model.parameters())
    result = real.update(model, torch.optim.SGD(model.parameters(), 1.0), batch, config)
    return before - flat(model.parameters()), result


def terms(model, batch, config):
    """Sum over rollouts of the norm of their share of the gradient: rounding is relative to it."""
    push = real.credit(real.all_logprobs(model, batch, config).detach(), batch, config)[1]
    total = 0.0
    for row in range(12):
        logp = real.token_logprobs(model, batch, [row], config)
        share = (logp * push.view(12, -1)[row]).sum()
        total += flat(torch.autograd.grad(share, list(model.parameters()))).norm()
    return total


# ---- Exact at any micro-batch size ---------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@BOTH
def test_an_update_is_exact_at_any_micro_batch_size(objective, low_memory):
    """`credit` and the chain rule, in one pass, in pieces of groups, a rollout at a time: all are
    plain autograd through model, objective and both KL terms at once."""
    model = toy()
    batch = made_up(model)
    config = replace(FREE, objective=objective, kl_old=0.1, kl_ref=0.2, low_memory=low_memory)
    logp = plain_logprobs(model, batch, 1.0)
    given = {k: batch[k] for k in real.arguments(config.objective) if k in batch}
    loss = OBJECTIVES[objective](logp, **given)
    for weight, other in ((0.1, "old_logp"), (0.2, "ref_logp")):
        loss = loss + weight * real.kl(logp, batch[other], batch["mask"])
    expected = flat(torch.autograd.grad(loss, list(model.parameters())))
    bound = ROUNDING * terms(model, batch, config)
    assert expected.norm() > 100 * bound
    for tokens in (10**6, 60, 1):
        found, result = moved(model, batch, replace(config, micro_batch_tokens=tokens))
        assert (found - expected).norm() <= bound, tokens
        assert abs(result["loss"] - loss) <= ROUNDING * (1 + abs(loss))
        assert result["grad_norm"].item() == pytest.approx(found.norm().item(), rel=1e-9)


def test_one_micro_batch_takes_one_pass_and_rollouts_without_credit_take_none():
    model = toy()
    batch, passes = made_up(model), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True)
    for tokens, credit in ((10**6, 0), (1, 8)):  # the first group is all right
        passes.clear()
        optimizer = torch.optim.SGD(model.parameters(), 1e-6)
        real.update(model, optimizer, batch, replace(FREE, micro_batch_tokens=tokens))
        assert len(passes) == (2 if tokens > 1 else 2 * (12 + credit))  # prompt, then completions


# ---- When the weights move, and how far ----------------------------------------------------------


def test_gradients_are_clipped():
    model, batch = toy(), made_up(toy())
    whole, result = moved(model, batch, FREE)
    clipped, same = moved(model, batch, replace(FREE, grad_clip=0.01))
    assert result["grad_norm"] == same["grad_norm"] > 0.1  # what is logged: before clipping
    assert torch.allclose(clipped, whole * 0.01 / result["grad_norm"], rtol=1e-4, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES)
@BOTH
def test_groups_that_are_all_right_or_all_wrong_move_nothing(objective, low_memory):
    """Not even AdamW's momentum or weight decay."""
    model = toy(dtype=torch.float32)
    batch = made_up(model)
    config = replace(FREE, objective=objective, low_memory=low_memory, lr=1e-3)
    optimizer = real.make_optimizer(model, config)
    start = flat(model.parameters())
    real.update(model, optimizer, batch, config)
    before, state = flat(model.parameters()), copy.deepcopy(optimizer.state_dict())
    assert not torch.equal(start, before)
    uniform = batch | {"labels": torch.tensor([[True], [False], [True]]).expand(3, 4)}
    with torch.no_grad():  # TRPA's own KL is 0 here
        uniform["old_logp"] = real.all_logprobs(model, batch, config)
    result = real.update(model, optimizer, uniform, config)
    assert torch.equal(flat(model.parameters()), before) and result["grad_norm"] == 0
    for i, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(x, state["state"][i][k]) for k, x in moments.items())


@BOTH
@pytest.mark.parametrize("harm", ["old_logp", "weights"])
@pytest.mark.parametrize("tokens", [10**6, 1])
def test_a_number_that_is_not_finite_never_reaches_the_weights(low_memory, harm, tokens):
    """And the next update is as if nothing had been."""
    model = toy(dtype=torch.float32)
    batch = made_up(model)
    config = replace(FREE, low_memory=low_memory, micro_batch_tokens=tokens, lr=1e-3)
    optimizer = real.make_optimizer(model, config)
    before = flat(model.parameters())
    if harm == "old_logp":
        bad = batch | {"old_logp": batch["old_logp"].clone()}
        bad["old_logp"][1, 0, 0] = math.nan
        result = real.update(model, optimizer, bad, config)
    else:  # a gradient that is not finite, from a loss that is
        handle = model.get_output_embeddings().weight.register_hook(lambda grad: grad * math.inf)
        result = real.update(model, optimizer, batch, config)
        handle.remove()
        assert result["loss"].isfinite()
    assert not (result["loss"] + result["grad_norm"]).isfinite()
    assert torch.equal(flat(model.parameters()), before) and not optimizer.state
    fresh = toy(dtype=torch.float32)
    real.update(fresh, real.make_optimizer(fresh, config), batch, config)
    real.update(model, optimizer, batch, config)
    assert torch.equal(flat(model.parameters()), flat(fresh.parameters()))
    assert not torch.equal(flat(fresh.parameters()), before)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_small_step_lowers_the_loss_by_what_calculus_says(objective):
    """By the square of the gradient's norm a unit of learning rate, and a second-order term."""
    if objective == "gspo":
        pytest.skip("its gradient is by design not its value's")
    model, config = toy(), replace(FREE, objective=objective)
    batch = made_up(model)
    norm = moved(model, batch, config)[1]["grad_norm"].item()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3 / norm**2)
    losses = [real.update(model, optimizer, batch, config)["loss"].item() for _ in range(2)]
    assert losses[0] - losses[1] == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_the_weight_that_is_logged_is_equation_9(tau):
    """Before the first update all scores are 0: C of Eq. 10 is the number of rollouts of the same
    label, and W = 1 / tau / (1 + C), whatever the number of questions and of tokens."""
    model = toy()
    batch, config = made_up(model), replace(FREE, tau=tau)
    with torch.no_grad():
        batch["old_logp"] = real.all_logprobs(model, batch, config)
    result = moved(model, batch, config)[1]
    assert not result["s_bar"].any()
    for labels, weights in zip(batch["labels"].tolist(), result["weight"].tolist()):
        for label, weight in zip(labels, weights):
            expected = 0 if all(labels) else 1 / tau / (1 + labels.count(label))
            assert weight == pytest.approx(expected, rel=ROUNDING, abs=0)


@pytest.mark.slow  # on a busy machine two threads wait for each other
def test_two_threads_give_one_result_and_no_atomic_adds():
    """Indexing with repeated indices adds atomically in its backward pass: in another order each
    time that two threads meet."""
    threads, gradients = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        for _ in range(6):
            gradients.append(moved(tiny()[0], sampled(), FREE)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


# ---- Low memory ----------------------------------------------------------------------------------


def hundred_steps(mode):
    """100 AdamW updates at lr 2e-6 on gradients that bf16 holds exactly, in two pieces each."""
    model = toy(dtype=torch.float32, initializer_range=0.02)
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    start, config = flat(model.parameters()), Config(lr=2e-6, low_memory=mode == "low memory")
    if mode == "plain bf16":
        round_weights(model)
    optimizer = real.make_optimizer(model, config)
    noise = torch.Generator().manual_seed(0)
    for _ in range(100):
        for _ in range(2):
            loss = 0.0
            for p in model.parameters():
                push = (torch.randn(p.shape, generator=noise) + 0.5).bfloat16().to(p.dtype)
                loss = loss + (p * push).float().sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not config.low_memory)
    return start, flat(optimizer.param_groups[0]["params"]).float(), model


def test_low_memory_learns_as_fp32_does_where_plain_bf16_does_not():
    """fp32 weights behind bf16 ones: on equal gradients bit for bit what an fp32 run reaches."""
    start, fp32, _ = hundred_steps("fp32")
    _, low, model = hundred_steps("low memory")
    _, plain, _ = hundred_steps("plain bf16")
    assert torch.equal(low, fp32)
    assert torch.equal(flat(model.parameters()), low.bfloat16())  # the model: the same, rounded
    assert all(p.grad is None for p in model.parameters())
    size = (fp32 - start).norm()
    assert size > 0 and (plain - fp32).norm() > 0.5 * size


def test_a_low_memory_update_is_nearly_the_fp32_one():
    """Between them: weights and activations of 8 bits, rounded some eight times on their way."""
    found = []
    for low_memory in (False, True):
        model = toy(dtype=torch.float32, initializer_range=0.1)
        batch, config = made_up(model), replace(FREE, low_memory=low_memory)
        optimizer = real.make_optimizer(model, config)
        grads = []
        optimizer.register_step_pre_hook(
            lambda o, *_: grads.extend(p.grad.clone() for p in o.param_groups[0]["params"]))
        real.update(model, optimizer, batch, config)
        found.append(flat(grads))
        left = [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]
        assert not any(grad.any() for grad in left)
    assert (found[1] - found[0]).norm() < 8 * 2**-8 * found[0].norm()


# ---- What a step logs ----------------------------------------------------------------------------


def test_metrics_are_what_they_are_called():
    """Three groups by hand: all right, mixed, all wrong; a mini-batch of two and one of one."""
    nan = math.nan
    labels = torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()
    mask = torch.arange(3) < torch.tensor([[2, 1], [3, 2], [1, 3]])[..., None]
    old_logp = torch.where(mask, torch.arange(-18.0, 0).view(3, 2, 3), nan)  # padding is not seen
    ended = torch.tensor([[1, 1], [0, 1], [1, 0]]).bool()
    batch = {"labels": labels, "mask": mask, "ended": ended}
    parts = [{"old_logp": old_logp[:2]}, {"old_logp": old_logp[2:]}]
    s = torch.tensor([[0.1, 0.2], [0.3, -0.4], [0.05, -0.5]])
    weight = torch.tensor([[0.0, 0.0], [1.5, 0.5], [0.0, 1.0]])
    updates = [{"loss": torch.tensor(1.0), "grad_norm": torch.tensor(3.0),
                "s_bar": s[:2], "weight": weight[:2]},
               {"loss": torch.tensor(2.0), "grad_norm": torch.tensor(7.0),
                "s_bar": s[2:], "weight": weight[2:]}]
    found = {k: float(v) for k, v in real.metrics(batch, parts, updates).items()}
    entropy = -sum([-18, -17, -15, -12, -11, -10, -9, -8, -6, -3, -2, -1]) / 12
    expected = {"loss": 1.5, "reward": 0.5, "solved": 1 / 3, "mixed": 1 / 3, "cut_off": 1 / 3,
                "entropy": entropy, "response_length": 2.0, "s_positive": 0.2,
                "s_negative": (-0.4 + 0.05 - 0.5) / 3, "s_abs": 1.55 / 6, "max_weight": 1.5,
                "grad_norm": 7.0, "skipped": 0}
    assert found == pytest.approx(expected, rel=1e-6)  # fp32
    labels[2, 0] = True  # one of three solved, two mixed
    found = {k: float(v) for k, v in real.metrics(batch, parts, updates).items()}
    assert (found["solved"], found["mixed"]) == pytest.approx((1 / 3, 2 / 3))
    updates[0]["grad_norm"], updates[1]["loss"] = torch.tensor(math.inf), torch.tensor(nan)
    assert real.metrics(batch, parts, updates)["skipped"] == 2


# ---- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Whole runs read 64 problems."""
    lines = (Path(real.TINY) / "train.jsonl").read_text().splitlines(True)
    (tmp_path / "64.jsonl").write_text("".join(lines[:64]))


def run(folder, label=real.label_group, **settings):
    settings = {"dataset": str(folder.parent / "64.jsonl")} | settings
    return real.train(replace(QUICK, output_dir=str(folder), **settings), label)


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def test_training_raises_the_reward_and_saves_a_hugging_face_model(tmp_path):
    last = run(tmp_path / "run", dataset=real.TINY, steps=12, prompts=8, mini_batches=4, lr=2e-4,
               group_size=8, warmup=4, eval_every=12, eval_limit=48, eval_samples=4)
    log = log_of(tmp_path / "run")
    assert [row["step"] for row in log] == list(range(1, 13))
    assert last["pass@1"] > log[0]["pass@1_before"] + 0.1
    assert sum(row["reward"] for row in log[-4:]) > sum(row["reward"] for row in log[:4]) + 0.4
    assert max(row["max_weight"] for row in log) <= 1 / Config().tau
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "real"])
def test_every_objective_trains(tmp_path, objective):
    last = run(tmp_path / "run", objective=objective)
    assert math.isfinite(last["loss"]) and last["grad_norm"] > 0 and last["skipped"] == 0


def test_same_seed_same_metrics(tmp_path, monkeypatch):
    """On the same questions, so that what differs is how answers were drawn."""
    monkeypatch.setattr(real, "draw", lambda problems, *args: problems[:4])
    logs = []
    for name in ("a", "b", "c"):
        run(tmp_path / name, seed=int(name == "c"))
        logs.append(log_of(tmp_path / name))
        for row in logs[-1]:
            del row["seconds"]
    assert logs[0] == logs[1] != logs[2]


@BOTH
def test_train_wires_algorithm_1_as_configured(tmp_path, monkeypatch, low_memory):
    """What `train` hands to each update: questions, log-probabilities, reference, learning rate."""
    config = dict(objective="grpo", kl_ref=0.001, prompts=6, mini_batches=3, warmup=4, lr=1e-3,
                  beta2=0.9, micro_batch_tokens=300, low_memory=low_memory)
    calls, results, update = [], [], real.update
    base, tokenizer, problems = tiny()
    if low_memory:
        round_weights(base)

    def spy(model, optimizer, batch, config):
        if len(calls) % 3 == 0:
            calls.append((batch, optimizer.param_groups[0] | {}, copy.deepcopy(model)))  # pi_old
        else:
            calls.append((batch, optimizer.param_groups[0] | {}, calls[-1][2]))
        results.append(update(model, optimizer, batch, config))
        return results[-1]

    monkeypatch.setattr(real, "update", spy)
    run(tmp_path / "run", **config)
    config = replace(QUICK, **config)
    rates = [group["lr"] for _, group, _ in calls]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    for _, group, _ in calls:
        assert group["weight_decay"] == 0.01 and group["betas"] == (0.9, 0.9)
    for step in (1, 2):
        mine = [batch for batch, *_ in calls[3 * step - 3 : 3 * step]]
        assert all(batch["mask"].shape[:2] == (2, 4) for batch in mine)
        drawn = real.draw(problems[:64], step, config)
        assert [p for batch in mine for p in batch["problems"]] == drawn
        assert [result["s_bar"].any().item() for result in results[3 * step - 3 :][:3]] == [
            False, True, True]  # exactly 0 before the first update of a step, then not
    with torch.no_grad():
        for number, (batch, _, old) in enumerate(calls):  # one old policy a step, one reference
            reference = real.all_logprobs(base, batch, config)
            assert torch.equal(batch["old_logp"], real.all_logprobs(old, batch, config))
            assert torch.equal(batch["ref_logp"], reference)
            assert torch.equal(batch["old_logp"], reference) == (number < 3)


def test_questions_of_a_step_are_a_new_order_each_pass():
    problems = list(range(10))
    config = replace(QUICK, prompts=4)
    drawn = [p for step in range(1, 6) for p in real.draw(problems, step, config)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == problems and drawn[:10] != drawn[10:]
    assert real.draw(problems, 1, config) != real.draw(problems, 1, replace(config, seed=1))


def test_a_label_of_ones_own_trains(tmp_path):
    """No answer has to be right for it: here long ones are."""
    seen = []

    def longest(problem, texts):
        seen.append((problem["problem"], len(texts)))
        return [len(text) == max(map(len, texts)) for text in texts]

    last = run(tmp_path / "run", longest)
    assert len(seen) == 8 and all(n == 4 for _, n in seen) and last["reward"] >= 0.25


def test_validation_sees_problems_that_training_does_not(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(real, "validate", lambda *args: seen.append(args[2][:100]) or 0.5)
    last = run(tmp_path / "run", eval_dataset=real.TINY, eval_every=1, steps=1)
    trained = {problem["problem"] for problem in embedded()[2]}
    held_out = {problem["problem"] for problem in seen[0]}
    assert len(seen) == 2 and len(held_out) == 100 and not held_out & trained
    assert last["pass@1"] == last["pass@1_before"] == 0.5


@BOTH
def test_a_run_that_goes_on_ends_where_a_whole_one_does(tmp_path, low_memory):
    run(tmp_path / "a", low_memory=low_memory)
    run(tmp_path / "b", low_memory=low_memory, steps=1)
    run(tmp_path / "b", low_memory=low_memory, resume=True)
    for name in ("model/model.safetensors", "samples.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    one, other = (real.read_checkpoint(tmp_path / x) for x in "ab")
    assert all(torch.equal(w, other["model"][k]) for k, w in one["model"].items())
    assert all(torch.equal(x, other["adam"][i][k]) for i, adam in one["adam"].items()
               for k, x in adam.items())
