"""The objectives against a plain-Python transcription of the paper, closed forms, and float64 gradcheck."""

import math
import random

import pytest
import torch

import real
from real import Config, OBJECTIVES, credit, s_bar

Q, G, T = 4, 5, 6


def case(seed, spread=0.3, labels=None):
    """Random (logp, old_logp, ref_logp, mask, labels) in float64, with ragged lengths."""
    torch.manual_seed(seed)
    old = -torch.rand(Q, G, T, dtype=torch.float64) * 3 - 0.1
    logp, ref = (old + spread * torch.randn_like(old) for _ in range(2))
    lengths = torch.randint(1, T + 1, (Q, G))
    mask = torch.arange(T) < lengths[..., None]
    if labels is None:
        labels = torch.rand(Q, G) < 0.5
        labels[0], labels[1] = True, False  # one group all right, one all wrong, two mixed
        labels[2:, 0], labels[2:, 1] = True, False
    return logp, old, ref, mask, labels


# ---- An independent transcription: lists and the math module, one rollout at a time. --------------------------------


def lists(logp, old, ref, mask, labels):
    """Per question: a list of (tokens, label), a token being (logp, old_logp, ref_logp)."""
    return [[([(logp[q, g, t].item(), old[q, g, t].item(), ref[q, g, t].item()) for t in range(T) if mask[q, g, t]],
              int(labels[q, g])) for g in range(G)] for q in range(Q)]


def score(tokens):
    return sum(p - o for p, o, _ in tokens) / len(tokens)


def mixed(group):
    return 0 < sum(r for _, r in group) < len(group)


def oracle_real(questions, tau=0.5, as_printed=False):
    total = 0.0
    for group in questions:
        if mixed(group) or as_printed:
            total += math.log(1 + sum(math.exp(-score(o) / tau) for o, r in group if r == 1))
            total += math.log(1 + sum(math.exp(score(o) / tau) for o, r in group if r == 0))
    return total / len(questions)


def oracle_real_no_anchor(questions, tau=0.5):
    total = 0.0
    for group in questions:
        if mixed(group):
            pairs = [math.exp((score(n) - score(p)) / tau) for p, r in group if r for n, u in group if not u]
            total += math.log(1 + sum(pairs))
    return total / len(questions)


def oracle_real_bce(questions, tau=0.5, as_printed=False):
    used = [group for group in questions if mixed(group) or as_printed]
    losses = [math.log(1 + math.exp((-1 if r else 1) * score(o) / tau)) for group in used for o, r in group]
    return sum(losses) / (len(questions) if as_printed else len(losses))


def group_advantages(group):
    rewards = [r for _, r in group]
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-6) for r in rewards]


def surrogate(ratio, advantage, low, high):
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def oracle_grpo(questions, low=0.2, high=0.2, beta=0.001, drop=False):
    losses = []
    for group in questions:
        for (tokens, _), a in zip(group, group_advantages(group)):
            loss = 0.0
            for p, o, ref in tokens:
                if not drop or 1 - low <= math.exp(p - o) <= 1 + high:
                    loss += surrogate(math.exp(p - o), a, low, high)
                loss += beta * (math.exp(ref - p) - (ref - p) - 1)
            losses.append(loss / len(tokens))
    return sum(losses) / len(losses)


def oracle_dapo(questions):
    losses = [surrogate(math.exp(p - o), a, 0.2, 0.28) for group in questions
              for (tokens, _), a in zip(group, group_advantages(group)) for p, o, _ in tokens]
    return sum(losses) / len(losses)


def oracle_gspo(questions):
    losses = [surrogate(math.exp(score(tokens)), a, 3e-4, 4e-4) for group in questions
              for (tokens, _), a in zip(group, group_advantages(group))]
    return sum(losses) / len(losses)


def oracle_trpa(questions, beta=0.1):
    total, kls = 0.0, []
    for group in questions:
        h = [sum(p - ref for p, _, ref in tokens) / len(tokens) for tokens, _ in group]
        pairs = [math.log(1 + math.exp(-2.5 * beta * (h[i] - h[j]))) for i in range(G) for j in range(G)
                 if group[i][1] == 1 and group[j][1] == 0]
        total += sum(pairs) / len(pairs) if pairs else 0.0
        kls += [math.exp(o - p) - (o - p) - 1 for tokens, _ in group for p, o, _ in tokens]
    return total / len(questions) + 0.001 * sum(kls) / len(kls)


ORACLES = {"real": oracle_real, "real_bce": oracle_real_bce, "real_no_anchor": oracle_real_no_anchor,
           "grpo": oracle_grpo, "grpo_bidirectional": lambda q: oracle_grpo(q, drop=True), "dapo": oracle_dapo,
           "gspo": oracle_gspo, "trpa": oracle_trpa}


def compare(objective, oracle, seed):
    """Assert that value and gradient are those of the transcription (its gradient by central differences)."""
    logp, old, ref, mask, labels = case(seed)
    logp.requires_grad_()
    loss = objective(logp, old, mask, labels, ref_logp=ref)
    assert loss.item() == pytest.approx(oracle(lists(logp.detach(), old, ref, mask, labels)), rel=1e-6)
    gradient = torch.autograd.grad(loss, logp)[0]
    assert gradient.abs().max() > 1e-4
    assert not gradient[~mask].any()
    for q, g, t in random.Random(seed).sample([tuple(i) for i in mask.nonzero().tolist()], 12):
        ends = []
        for h in (1e-5, -1e-5):
            moved = logp.detach().clone()
            moved[q, g, t] += h
            ends.append(oracle(lists(moved, old, ref, mask, labels)))
        assert gradient[q, g, t].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_match_the_transcription(name, seed):
    compare(OBJECTIVES[name], ORACLES[name], seed)


@pytest.mark.parametrize("mutant", ["zero loss", "flipped sign", "no anchor", "sum for mean", "uniform groups used",
                                    "divided by mixed groups only"])
def test_mutants_die(mutant, monkeypatch):
    objective = real.real
    if mutant == "zero loss":
        objective = lambda *a, **k: 0 * real.real(*a, **k)
    if mutant == "flipped sign":
        objective = lambda *a, **k: -real.real(*a, **k)
    if mutant == "no anchor":
        objective = OBJECTIVES["real_no_anchor"]
    if mutant == "sum for mean":
        monkeypatch.setattr(real, "token_mean", lambda x, mask: torch.where(mask, x, 0.0).sum(-1))
    if mutant == "uniform groups used":
        objective = lambda *a, **k: real.real(*a, **k, as_printed=True)
    if mutant == "divided by mixed groups only":
        objective = lambda *a, **k: real.real(*a, **k) * 2
    with pytest.raises(AssertionError):
        compare(objective, oracle_real, 0)


@pytest.mark.parametrize("name", ["real", "real_bce", "real_no_anchor", "grpo", "dapo", "trpa"])
def test_gradcheck(name):
    logp, old, ref, mask, labels = case(7, spread=0.05)
    f = lambda x: OBJECTIVES[name](x, old, mask, labels, ref_logp=ref)
    assert torch.autograd.gradcheck(f, logp.requires_grad_())


def test_as_printed_uses_uniform_groups():
    logp, old, ref, mask, labels = case(1)
    for name in ("real", "real_bce"):
        value = OBJECTIVES[name](logp, old, mask, labels, as_printed=True).item()
        assert value == pytest.approx(ORACLES[name](lists(logp, old, ref, mask, labels), as_printed=True), rel=1e-6)
        assert value != pytest.approx(OBJECTIVES[name](logp, old, mask, labels).item(), rel=1e-3)


# ---- Proposition 5.1 --------------------------------------------------------------------------------------------------


def weights(scores, labels, tau):
    """|W| of one group by autograd: rollouts of three tokens that share the given scores."""
    logp = torch.tensor(scores, dtype=torch.float64)[None, :, None].expand(1, -1, 3).clone().requires_grad_()
    loss = real.real(logp, torch.zeros_like(logp), torch.ones_like(logp, dtype=torch.bool), torch.tensor([labels]), tau=tau)
    return torch.autograd.grad(loss, logp)[0].sum(-1)[0]


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_credit_is_equation_9(tau):
    scores, labels = [-0.4, 0.0, 0.7, -0.2, 0.1, 1.3], [1, 1, 1, 0, 0, 0]
    found = weights(scores, labels, tau)
    for k, (s, r) in enumerate(zip(scores, labels)):
        sign = 1 if r else -1
        others = [x for i, (x, l) in enumerate(zip(scores, labels)) if l == r and i != k]
        C = 1 + sum(math.exp(-sign * x / tau) for x in others)  # Eq. 10
        W = 1 / tau / (1 + C * math.exp(sign * s / tau))  # Eq. 9
        assert found[k].item() == pytest.approx(-sign * W, rel=1e-9)
        assert abs(found[k].item()) < 1 / tau


def test_credit_is_bounded_and_monotonic():
    drift = torch.linspace(-30, 30, 121).tolist()
    positive = [-weights([s, 0.0, 0.0], [1, 1, 0], 0.5)[0].item() for s in drift]
    negative = [weights([0.0, s, 0.0], [1, 0, 0], 0.5)[1].item() for s in drift]
    assert all(a >= b for a, b in zip(positive, positive[1:])) and positive[0] > 1.99 and positive[-1] < 1e-6
    assert all(a <= b for a, b in zip(negative, negative[1:])) and negative[0] < 1e-6 and negative[-1] > 1.99
    assert max(positive + negative) <= 2.0


def test_anchor_fixes_the_direction():
    """Moving both scores down together lowers no loss without the anchor, and raises L_+ with it (Sec. 4.2)."""
    logp, old, ref, mask, labels = case(3)
    shift = lambda name, d: OBJECTIVES[name](old + d, old, mask, labels, tau=0.5).item()
    assert shift("real_no_anchor", -1.0) == pytest.approx(shift("real_no_anchor", 1.0), rel=1e-9)
    both_right = labels.clone()
    both_right[2:, 2:] = True
    assert real.real(old - 1.0, old, mask, both_right).item() > real.real(old + 1.0, old, mask, both_right).item()


# ---- Edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["far", "empty", "all right", "all wrong", "padding"])
def test_stable(name, kind):
    logp, old, ref, mask, labels = case(5)
    if kind == "far":
        logp = old + torch.where(torch.rand_like(old) < 0.5, -1.0, 1.0) * 1e4 * 0.5  # |s_bar / tau| up to 1e4
    if kind == "empty":
        mask = torch.zeros_like(mask)
    if kind == "all right":
        labels = torch.ones_like(labels)
    if kind == "all wrong":
        labels = torch.zeros_like(labels)
    if kind == "padding":
        logp, old, ref = (torch.where(mask, x, torch.nan) for x in (logp, old, ref))
    logp.requires_grad_()
    loss = OBJECTIVES[name](logp, old, mask, labels, ref_logp=ref)
    gradient = torch.autograd.grad(loss, logp)[0]
    assert loss.isfinite() and gradient.isfinite().all()
    if name == "real" and kind in ("all right", "all wrong", "empty"):
        assert not gradient.any()


def test_far_scores_keep_their_value():
    """At |s_bar / tau| = 1e4 REAL is linear: the worst rollout's score, exactly."""
    old = torch.zeros(1, 2, 1, dtype=torch.float64)
    loss = real.real(torch.tensor([[[-5e3], [5e3]]], dtype=torch.float64), old, old == 0, torch.tensor([[1, 0]]))
    assert loss.item() == pytest.approx(2e4, rel=1e-12)


def test_s_bar_is_a_mean_over_real_tokens():
    logp, old, _, mask, _ = case(2)
    doubled = [torch.cat([x, x], -1) for x in (logp, old, mask)]
    assert torch.allclose(s_bar(logp, old, mask), s_bar(*doubled), atol=1e-12)  # the mean, not the sum


def test_inputs_are_not_changed():
    logp, old, ref, mask, labels = case(4)
    copies = [x.clone() for x in (logp, old, ref, mask, labels)]
    for objective in OBJECTIVES.values():
        objective(logp, old, mask, labels, ref_logp=ref)
    assert all(torch.equal(a, b) for a, b in zip(copies, (logp, old, ref, mask, labels)))


@pytest.mark.parametrize("field", ["kl_ref", "kl_old"])
def test_kl_is_a_separate_term(field):
    logp, old, ref, mask, labels = case(6)
    batch = {"old_logp": old, "mask": mask, "labels": labels, "ref_logp": ref}
    plain, _ = credit(logp, batch, Config())
    with_kl, gradient = credit(logp, batch, Config(**{field: 0.3}))
    other = {"kl_ref": ref, "kl_old": old}[field]
    k3 = [[math.exp((o - p).item()) - (o - p).item() - 1 for p, o, m in zip(*row) if m]
          for row in zip(logp.flatten(0, 1), other.flatten(0, 1), mask.flatten(0, 1))]
    expected = sum(sum(row) / len(row) for row in k3) / len(k3)
    assert (with_kl - plain).item() == pytest.approx(0.3 * expected, rel=1e-6)
    assert gradient[0].any()  # a uniform group has no REAL credit, but the KL term still holds it
