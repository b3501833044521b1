"""The objectives: a transcription of the paper in plain Python, closed forms, float64 gradcheck."""

import math
import random
from dataclasses import dataclass, fields

import pytest
import torch

import real
from real import OBJECTIVES, Config, UserError, credit, s_bar

Q, G, T = 4, 5, 6


def case(seed, spread=0.3):
    """A batch in float64 with ragged lengths: one group all right, one all wrong, two mixed."""
    torch.manual_seed(seed)
    old_logp = -torch.rand(Q, G, T, dtype=torch.float64) * 3 - 0.1
    logp, ref_logp = (old_logp + spread * torch.randn_like(old_logp) for _ in range(2))
    mask = torch.arange(T) < torch.randint(1, T + 1, (Q, G, 1))
    labels = torch.rand(Q, G) < 0.5
    labels[0], labels[1] = True, False
    labels[2:, 0], labels[2:, 1] = True, False
    return logp, {"old_logp": old_logp, "ref_logp": ref_logp, "mask": mask, "labels": labels}


def loss_of(name, logp, batch, **settings):
    """An objective, called as it is written: the reference goes to TRPA alone."""
    reference = {"ref_logp": batch["ref_logp"]} if name == "trpa" else {}
    return OBJECTIVES[name](logp, batch["old_logp"], batch["mask"], batch["labels"],
                            **reference, **settings)


# ---- The transcription: lists and the math module, one rollout at a time -------------------------


def lists(logp, batch):
    """Of each question a list of (tokens, label); a token is (logp, old_logp, ref_logp)."""
    tokens = torch.stack([logp, batch["old_logp"], batch["ref_logp"]], -1).detach()
    return [[([tuple(token.tolist()) for token in tokens[q, g][batch["mask"][q, g]]],
              int(batch["labels"][q, g])) for g in range(G)] for q in range(Q)]


def score(tokens):
    return sum(logp - old for logp, old, _ in tokens) / len(tokens)


def mixed(group):
    return 0 < sum(label for _, label in group) < len(group)


def oracle_real(questions, tau=0.5, as_printed=False):
    total = 0.0
    for group in questions:
        if mixed(group) or as_printed:
            for sign, kind in ((-1, 1), (1, 0)):  # Eq. 6, then Eq. 7
                others = [math.exp(sign * score(o) / tau) for o, label in group if label == kind]
                total += math.log(1 + sum(others))
    return total / len(questions)


def oracle_real_no_anchor(questions, tau=0.5):
    total = 0.0
    for group in filter(mixed, questions):
        total += math.log(1 + sum(math.exp((score(wrong) - score(right)) / tau)
                                  for right, r in group if r for wrong, w in group if not w))
    return total / len(questions)


def oracle_real_bce(questions, tau=0.5):
    losses = [math.log(1 + math.exp((-1 if label else 1) * score(o) / tau))
              for group in filter(mixed, questions) for o, label in group]
    return sum(losses) / len(losses)


def advantages(group):
    rewards = [label for _, label in group]
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-6) for r in rewards]


def surrogate(rho, advantage, low, high):
    return -min(rho * advantage, min(max(rho, 1 - low), 1 + high) * advantage)


def k3(tokens, other):
    """Estimates of KL(pi || pi_other); other 1: the old policy, 2: the reference."""
    return [math.exp(t[other] - t[0]) - (t[other] - t[0]) - 1 for t in tokens]


def oracle_kl(questions, other):
    means = [sum(k3(tokens, other)) / len(tokens) for group in questions for tokens, _ in group]
    return sum(means) / len(means)


def oracle_grpo(questions, low=0.2, high=0.2, drop=False):
    losses = []
    for group in questions:
        for (tokens, _), advantage in zip(group, advantages(group)):
            ratios = [math.exp(logp - old) for logp, old, _ in tokens]
            kept = [rho for rho in ratios if not drop or 1 - low <= rho <= 1 + high]
            losses.append(sum(surrogate(rho, advantage, low, high) for rho in kept) / len(tokens))
    return sum(losses) / len(losses)


def oracle_dapo(questions, low=0.2, high=0.28):
    losses = [surrogate(math.exp(logp - old), advantage, low, high)
              for group in questions for (tokens, _), advantage in zip(group, advantages(group))
              for logp, old, _ in tokens]
    return sum(losses) / len(losses)


def oracle_gspo(questions, low=3e-4, high=4e-4):
    losses = [surrogate(math.exp(score(tokens)), advantage, low, high) for group in questions
              for (tokens, _), advantage in zip(group, advantages(group))]
    return sum(losses) / len(losses)


def oracle_trpa(questions, beta=0.1):
    total = 0.0
    for group in questions:
        h = [sum(logp - ref for logp, _, ref in tokens) / len(tokens) for tokens, _ in group]
        pairs = [math.log(1 + math.exp(-2.5 * beta * (h[i] - h[j])))
                 for i in range(G) for j in range(G) if group[i][1] and not group[j][1]]
        total += sum(pairs) / len(pairs) if pairs else 0.0
    kls = [x for group in questions for tokens, _ in group for x in k3(tokens, 1)]
    return total / len(questions) + 0.001 * sum(kls) / len(kls)


ORACLES = {"real": oracle_real, "real_bce": oracle_real_bce, "grpo": oracle_grpo,
           "real_no_anchor": oracle_real_no_anchor, "dapo": oracle_dapo, "gspo": oracle_gspo,
           "trpa": oracle_trpa, "grpo_bidirectional": lambda *a: oracle_grpo(*a, drop=True)}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_match_the_transcription(name, seed):
    """The gradient: by central differences, whose own error is h^2 of the third derivative."""
    logp, batch = case(seed)
    loss = loss_of(name, logp.requires_grad_(), batch)
    assert loss.item() == pytest.approx(ORACLES[name](lists(logp, batch)), rel=1e-12)
    gradient = torch.autograd.grad(loss, logp)[0]
    assert gradient.abs().max() > 1e-4 and not gradient[~batch["mask"]].any()
    places = [tuple(place) for place in batch["mask"].nonzero().tolist()]
    for place in random.Random(seed).sample(places, 12):
        ends = []
        for h in (1e-5, -1e-5):
            moved = logp.detach().clone()
            moved[place] += h
            ends.append(ORACLES[name](lists(moved, batch)))
        slope = (ends[0] - ends[1]) / 2e-5
        assert gradient[place].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", ["real", "real_bce", "real_no_anchor", "grpo", "dapo", "trpa"])
def test_gradcheck(name):
    """Not GSPO, whose gradient is by design not the derivative of its value token by token."""
    logp, batch = case(7, spread=0.05)
    assert torch.autograd.gradcheck(lambda x: loss_of(name, x, batch), logp.requires_grad_())


# ---- Settings, the KL, objectives of one's own ---------------------------------------------------


@pytest.mark.parametrize("name, settings", [
    ("real", {"tau": 0.1}), ("real", {"as_printed": True}), ("real_bce", {"tau": 1.0}),
    ("real_no_anchor", {"tau": 0.2}),
    ("grpo", {"eps_low": 0.05}), ("grpo_bidirectional", {"eps_low": 0.4, "eps_high": 0.5}),
    ("dapo", {"eps_high": 0.05}), ("gspo", {"eps_low": 0.01, "eps_high": 0.3}),
    ("trpa", {"beta": 2.0})], ids=str)
def test_settings_of_the_command_line_reach_the_objective(name, settings):
    """By name, through `credit`; what is not set keeps the objective's own default."""
    logp, batch = case(1)
    batch["labels"][0, 0], batch["labels"][1, 0] = False, True  # to be clipped, in all groups
    if "as_printed" in settings:
        batch["labels"][0], batch["labels"][1] = True, False
    flags = [word for k, v in settings.items()
             for word in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
    found = credit(logp, batch, real.parse(["--objective", name, *flags]))[0].item()
    short = {k.removeprefix("eps_"): v for k, v in settings.items()}
    if name == "grpo_bidirectional":
        expected = oracle_grpo(lists(logp, batch), **short, drop=True)
    else:
        expected = ORACLES[name](lists(logp, batch), **short)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found != pytest.approx(credit(logp, batch, Config(objective=name))[0].item(), rel=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_kl_serves_every_objective(name):
    """Eq. 1 is grpo with kl_ref 0.001. The KL is a term of its own, value and gradient."""
    logp, batch = case(6)
    plain, push = credit(logp, batch, Config(objective=name))
    questions = lists(logp, batch)
    for field, other, key in (("kl_old", 1, "old_logp"), ("kl_ref", 2, "ref_logp")):
        loss, pushed = credit(logp, batch, Config(objective=name, **{field: 0.3}))
        assert (loss - plain).item() == pytest.approx(0.3 * oracle_kl(questions, other), rel=1e-9)
        d = batch[key] - logp  # d/dlogp of e^d - d - 1 is 1 - e^d
        slope = 0.3 * (1 - d.exp()) / batch["mask"].sum(-1, keepdim=True) / (Q * G)
        assert torch.allclose(pushed - push, slope * batch["mask"], rtol=1e-9, atol=1e-14)


def test_an_objective_of_ones_own_needs_no_edit_of_credit(monkeypatch):
    """Its arguments are found by name: its own settings in Config, anything else in the batch."""

    @dataclass(frozen=True)
    class Mine(Config):
        margin: float = 0.25
        bonus: float | None = None

    def hinge(logp, mask, labels, lengths, *, margin, bonus=2.0):
        return bonus * torch.where(mask, margin * lengths[..., None] * logp, 0.0).sum()

    monkeypatch.setitem(OBJECTIVES, "hinge", hinge)
    logp, batch = case(0)
    batch["lengths"] = torch.arange(1, Q * G + 1).view(Q, G)
    for config, factor in ((Mine(objective="hinge"), 0.5),
                           (Mine(objective="hinge", margin=1.5, bonus=1.0), 1.5)):
        push = credit(logp, batch, config)[1]
        assert torch.equal(push, factor * batch["lengths"][..., None] * batch["mask"])
    assert "hinge" in str(pytest.raises(UserError, Config, objective="nothing").value)


def test_settings_may_be_whole_numbers():
    for field in fields(Config):
        if field.type in (float, float | None) and field.name not in ("beta2",):
            Config(**{field.name: 1})


# ---- Proposition 5.1 -----------------------------------------------------------------------------


def weights(scores, labels, tau):
    """-W of one group by `credit`: rollouts of three tokens that share the given scores."""
    logp = torch.tensor(scores, dtype=torch.float64)[None, :, None].expand(1, -1, 3)
    batch = {"old_logp": torch.zeros_like(logp), "mask": torch.ones_like(logp, dtype=torch.bool),
             "labels": torch.tensor([labels])}
    return credit(logp, batch, Config(tau=tau))[1].sum(-1)[0]


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_credit_is_equation_9(tau):
    scores, labels = [-0.4, 0.0, 0.7, -0.2, 0.1, 1.3], [1, 1, 1, 0, 0, 0]
    found = weights(scores, labels, tau)
    for k, (s, label) in enumerate(zip(scores, labels)):
        sign = 1 if label else -1
        C = 1 + sum(math.exp(-sign * other / tau) for i, other in enumerate(scores)
                    if labels[i] == label and i != k)  # Eq. 10
        W = 1 / tau / (1 + C * math.exp(sign * s / tau))  # Eq. 9
        assert found[k].item() == pytest.approx(-sign * W, rel=1e-9)
        assert abs(found[k].item()) < 1 / tau


def test_credit_is_bounded_and_monotonic():
    drift = torch.linspace(-30, 30, 121).tolist()
    positive = [-weights([s, 0.0, 0.0], [1, 1, 0], 0.5)[0].item() for s in drift]
    negative = [weights([0.0, s, 0.0], [1, 0, 0], 0.5)[1].item() for s in drift]
    assert all(a >= b for a, b in zip(positive, positive[1:]))
    assert all(a <= b for a, b in zip(negative, negative[1:]))
    assert positive[0] > 1.99 and positive[-1] < 1e-6 and negative[0] < 1e-6 and negative[-1] > 1.99
    assert max(positive + negative) <= 2.0


def test_anchor_fixes_the_direction():
    """Moving all scores alike changes nothing without the anchor (Sec. 4.2); with it, moving them
    down is the dearer the more rollouts are right."""
    logp, batch = case(3)
    free, tied = ([loss_of(name, batch["old_logp"] + d, batch).item() for d in (-1.0, 1.0)]
                  for name in ("real_no_anchor", "real"))
    assert free[0] == pytest.approx(free[1], rel=1e-12)
    batch["labels"][2:, 2:] = True
    tied = [loss_of("real", batch["old_logp"] + d, batch).item() for d in (-1.0, 1.0)]
    assert tied[0] > tied[1] + 0.1


# ---- Edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["far", "empty", "all right", "all wrong", "padding"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_stable(name, kind, dtype):
    logp, batch = case(5)
    if kind == "far":  # |s_bar| / tau up to 1e4
        logp = batch["old_logp"] + torch.where(torch.rand_like(logp) < 0.5, -5e3, 5e3)
    if kind == "empty":
        batch["mask"] = torch.zeros_like(batch["mask"])
    if kind.startswith("all"):
        batch["labels"] = torch.full_like(batch["labels"], kind == "all right")
    if kind == "padding":  # anything may stand there
        for x in (logp, batch["old_logp"], batch["ref_logp"]):
            x[~batch["mask"]] = 1e30
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    loss, push = credit(logp.to(dtype), batch, Config(objective=name))
    assert loss.isfinite() and push.isfinite().all() and not push[~batch["mask"]].any()
    if name.startswith("real") and kind in ("all right", "all wrong", "empty"):
        assert not push.any()


def test_far_scores_keep_their_value():
    """At |s_bar| / tau = 1e4 REAL is linear in the scores, exactly."""
    old_logp = torch.zeros(1, 2, 1, dtype=torch.float64)
    logp = torch.tensor([[[-5e3], [5e3]]], dtype=torch.float64)
    loss = real.real(logp, old_logp, old_logp == 0, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(2e4, rel=1e-12)


def test_s_bar_is_a_mean_over_real_tokens():
    """A rollout said twice has the same score: the mean, not the sum (length normalisation)."""
    logp, batch = case(2)
    once = logp, batch["old_logp"], batch["mask"]
    twice = [torch.cat([x, x], -1) for x in once]
    assert torch.allclose(s_bar(*once), s_bar(*twice), rtol=0, atol=1e-14)
    assert not torch.allclose(s_bar(*once), torch.zeros(Q, G, dtype=torch.float64))


def test_inputs_are_not_changed():
    logp, batch = case(4)
    copies = {k: v.clone() for k, v in (batch | {"logp": logp}).items()}
    for name in OBJECTIVES:
        credit(logp, batch, Config(objective=name, kl_ref=0.1, kl_old=0.1))
    assert all(torch.equal(copies[k], v) for k, v in (batch | {"logp": logp}).items())
    assert not logp.requires_grad
