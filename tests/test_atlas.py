"""The atlas of objectives: each gradient against its closed form, in plain loops on floats."""

import importlib.util
import math
import statistics
from pathlib import Path

import pytest
import torch

import real

Q, G, T = 4, 5, 11

EXPERIMENTS = Path(__file__).parent / "experiments"
spec = importlib.util.spec_from_file_location("atlas", EXPERIMENTS / "atlas.py")
atlas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atlas)


def case(seed, spread):
    """A batch in float64 with ragged lengths: one group all right, one all wrong, two mixed."""
    torch.manual_seed(seed)
    old_logp = -torch.rand(Q, G, T, dtype=torch.float64) * 3 - 0.1
    logp, ref_logp = (old_logp + spread * torch.randn_like(old_logp) for _ in range(2))
    labels = torch.rand(Q, G) < 0.5
    labels[0], labels[1] = True, False
    labels[2:, 0], labels[2:, 1] = True, False
    return logp, {"old_logp": old_logp, "ref_logp": ref_logp, "labels": labels,
                  "mask": torch.arange(T) < torch.randint(1, T + 1, (Q, G, 1))}


class Oracle:
    """A batch as lists. Each method gives minus dL/dlogp of token t of rollout i of question q,
    worked out by hand from the paper's loss: the push on that token."""

    def __init__(self, logp, batch):
        self.logp, self.old = logp.tolist(), batch["old_logp"].tolist()
        self.ref, self.right = batch["ref_logp"].tolist(), batch["labels"].int().tolist()
        self.length = batch["mask"].sum(-1).tolist()
        self.tokens = [(q, i, t) for q in range(Q) for i in range(G)
                       for t in range(self.length[q][i])]

    def s(self, q, i, t):
        return self.logp[q][i][t] - self.old[q][i][t]

    def sum_s(self, q, i):
        return sum(self.s(q, i, t) for t in range(self.length[q][i]))

    def wins(self, q):
        return sum(self.right[q])

    def mixed(self, q):
        return 0 < self.wins(q) < G

    def advantage(self, q, i):
        """GRPO's, with the unbiased deviation."""
        r = self.right[q]
        return (r[i] - statistics.mean(r)) / (statistics.stdev(r) + 1e-6)

    def kept(self, s, A, low=0.2, high=0.2):
        """Whether PPO's clip leaves the token its gradient."""
        return s <= math.log(1 + high) if A > 0 else s >= math.log(1 - low)

    def clipped(self, q, i, t, A):
        s = self.s(q, i, t)
        return A * math.exp(s) if self.kept(s, A) else 0.0

    def pacs(self, q, i, t):
        """The logit of rollout j moves by 1 with its own reward, by -1/(G - 1) with another's."""
        rewards = [self.sum_s(q, j) for j in range(G)]
        push = 0.0
        for j in range(G):
            others = sum(rewards[k] for k in range(G) if k != j) / (G - 1)
            share = 1 / (1 + math.exp(-(rewards[j] - others)))
            same = self.wins(q) if self.right[q][j] else G - self.wins(q)
            weight = G / (2 * same) if self.mixed(q) else 1.0
            push += weight * (self.right[q][j] - share) * (1 if i == j else -1 / (G - 1))
        return push / (Q * G)

    def conspo(self, q, i, t):
        if not self.mixed(q):
            return 0.0
        e = [math.exp(sum(self.logp[q][j][: self.length[q][j]]) / self.length[q][j] / 0.5)
             for j in range(G)]
        wrong = sum(e[j] for j in range(G) if not self.right[q][j])
        if self.right[q][i]:
            push = wrong / (e[i] + wrong)
        else:
            push = -sum(e[i] / (e[j] + wrong) for j in range(G) if self.right[q][j])
        return push / self.wins(q) / (Q * 0.5 * self.length[q][i])

    def dr_grpo(self, q, i, t):
        return self.clipped(q, i, t, self.right[q][i] - self.wins(q) / G) / (Q * G * 48)

    def rloo(self, q, i, t):
        others = (self.wins(q) - self.right[q][i]) / (G - 1)
        return (self.right[q][i] - others) / (Q * G)

    def opo(self, q, i, t):
        of_right = sum(n for n, r in zip(self.length[q], self.right[q]) if r)
        return (self.right[q][i] - of_right / sum(self.length[q])) / (Q * G)

    def maxrl(self, q, i, t):
        mean = self.wins(q) / G
        A = (self.right[q][i] - mean) / (mean + 1e-6)
        return self.clipped(q, i, t, A) / (Q * G * self.length[q][i])

    def w_reinforce(self, q, i, t):
        return (0.1 if self.right[q][i] else -1.0) / len(self.tokens)

    def topr(self, q, i, t):
        if self.right[q][i]:
            return 1 / (Q * G)
        return -min(1.0, math.exp(self.sum_s(q, i))) / (Q * G)

    def cispo(self, q, i, t):
        weight = min(1.28, math.exp(self.s(q, i, t)))
        return weight * self.advantage(q, i) / len(self.tokens)

    def sapo(self, q, i, t):
        """The gate's derivative, 4 p (1 - p), is 1 where the ratio is 1."""
        A, rho = self.advantage(q, i), math.exp(self.s(q, i, t))
        p = 1 / (1 + math.exp(-(1.0 if A > 0 else 1.05) * (rho - 1)))
        return 4 * p * (1 - p) * rho * A / (Q * G * self.length[q][i])

    def gmpo(self, q, i, t):
        A, n, s = self.advantage(q, i), self.length[q][i], self.s(q, i, t)
        sign = 1 if A > 0 else -1
        if sign * s > 0.4:
            return 0.0
        ratio = math.prod(math.exp(sign * min(0.4, sign * self.s(q, i, k))) for k in range(n))
        return A * ratio ** (1 / n) / (Q * G * n)

    def sspo(self, q, i, t):
        n, A = self.length[q][i], self.advantage(q, i)
        sentence = range(t - t % 8, min(n, t - t % 8 + 8))
        s = sum(self.s(q, i, k) for k in sentence) / len(sentence)
        return A * math.exp(s) / (Q * G * n) if self.kept(s, A) else 0.0

    def earl(self, q, i, t):
        count = max(1, int(0.2 * len(self.tokens)))
        surprised = sorted(self.tokens, key=lambda x: self.old[x[0]][x[1]][x[2]])[:count]
        return self.clipped(q, i, t, self.advantage(q, i)) / count * ((q, i, t) in surprised)

    def kl_cov(self, q, i, t):
        n = len(self.tokens)
        a = {x: self.advantage(*x[:2]) for x in self.tokens}
        p = {x: self.logp[x[0]][x[1]][x[2]] for x in self.tokens}
        mean_a, mean_p = sum(a.values()) / n, sum(p.values()) / n
        paying = sorted(self.tokens, key=lambda x: -(a[x] - mean_a) * (p[x] - mean_p))
        s = self.s(q, i, t)
        pays = (q, i, t) in paying[: max(1, int(0.002 * n))]
        return (a[q, i, t] * math.exp(s) - pays * math.copysign(1, s)) / n

    def lp_reg(self, q, i, t):
        wrong = [x for x in self.tokens if self.advantage(*x[:2]) < 0]
        least = sorted(wrong, key=lambda x: self.logp[x[0]][x[1]][x[2]])[: int(0.1 * len(wrong))]
        s, A, n = self.s(q, i, t), self.advantage(q, i), len(self.tokens)
        if (q, i, t) in least and s < 0:  # the KL pulls back up by e^-s - 1
            return (A * math.exp(s) + math.exp(-s) - 1) / n
        return self.clipped(q, i, t, A) / n

    def dph(self, q, i, t):
        likelier = math.exp(self.ref[q][i][t] - self.old[q][i][t])
        push = self.clipped(q, i, t, self.advantage(q, i)) + 0.01 * likelier
        return push / (Q * G * self.length[q][i])


def gradient(name, logp, batch):
    """Minus the gradient of the loss, as real.credit calls the objective."""
    config = real.Config(objective=name)
    return -real.credit(logp, batch, config)[1]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(real, "OBJECTIVES", real.OBJECTIVES | atlas.OBJECTIVES)


@pytest.mark.parametrize("seed, spread", [(0, 0.3), (1, 0.3), (70, 1.0)])
@pytest.mark.parametrize("name", atlas.OBJECTIVES)
def test_each_gradient_is_its_closed_form(name, seed, spread):
    logp, batch = case(seed, spread)
    found, oracle = gradient(name, logp, batch), Oracle(logp, batch)
    expected = torch.zeros_like(logp)
    for q, i, t in oracle.tokens:
        expected[q, i, t] = getattr(oracle, name)(q, i, t)
    size = expected.abs().max()
    assert size > 1e-4 and (found - expected).abs().max() < 1e-12 * size  # float64


def test_the_case_clips_on_both_sides_and_pays_where_it_should():
    """The oracle above would not see a missing clip if no token were clipped."""
    logp, batch = case(70, 1.0)
    s = real.log_ratio(logp, batch["old_logp"], batch["mask"])
    for side in (s[batch["labels"]] > math.log(1.2), s[~batch["labels"]] < math.log(0.8)):
        assert side.any()
    wrong = batch["mask"] & ~batch["labels"][..., None]
    wrong[~real.is_mixed(batch["labels"])] = False
    low = atlas.lowest(logp, wrong, int(0.1 * wrong.sum()))
    assert (low & (s < 0)).any() and (low & (s > 0)).any()


def test_every_objective_has_a_citation_and_an_oracle():
    assert len(atlas.OBJECTIVES) >= 16 and not set(atlas.OBJECTIVES) & {"real", "grpo"}
    for name, objective in atlas.OBJECTIVES.items():
        assert "arXiv 2" in objective.__doc__ and hasattr(Oracle, name)


def test_the_picture_shows_eq_9_for_real_and_the_counts_of_grpo():
    for score in (-0.7, 0.0, 0.4):  # one right rollout of four moves: Eq. 9 with the others at 0
        push = atlas.pushes(real.OBJECTIVES["real"], score, 4, 0)[0].item()
        e = math.exp(-score / 0.5)
        assert push == pytest.approx(e / (1 + 3 + e) / 0.5, rel=1e-12)
    push = atlas.pushes(real.OBJECTIVES["grpo"], 0.0, 2, 0)
    assert push[:2].sum().item() == pytest.approx(-push[2:].sum().item(), rel=1e-12)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    atlas.draw(tmp_path / "atlas.png")
    assert (tmp_path / "atlas.png").stat().st_size > 10_000
