"""An atlas: sixteen objectives beside those of real.py, as plug-ins, and one picture of them all.

    pip install matplotlib
    python tests/experiments/atlas.py            # writes logs/atlas.png

Each has the signature of real.py's and can be trained: `real.OBJECTIVES |= atlas.OBJECTIVES`. What
is simplified follows "Here:". "Code" says that the formula was read in public code, the authors' or
that of the library named; "abstract", that only the abstract was at hand; neither, from memory.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import real  # noqa: E402
from real import log_ratio, token_mean  # noqa: E402


def rewards(labels, like):
    """r of 0 or 1, and its mean over the group: (Q, G) and (Q, 1)."""
    r = labels.to(like.dtype)
    return r, r.mean(1, keepdim=True)


def standardized(labels, like):
    """GRPO's advantage of each rollout: (Q, G)."""
    r, mean = rewards(labels, like)
    return (r - mean) / (r.std(1, keepdim=True) + 1e-6)


def surrogate(s, advantage, low=0.2, high=0.2):
    """PPO's clipped loss of each token, for any advantage (Q, G)."""
    rho, A = s.clamp(-20, 20).exp(), advantage[..., None]
    return -torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)


def rollout_sum(x, mask):
    return torch.where(mask, x, 0.0).sum(-1)


def all_tokens(x, mask):
    """One mean over the tokens of a mini-batch."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def lowest(x, among, count):
    """Mask of the `count` tokens with the lowest x among those given."""
    order = x.masked_fill(~among, torch.inf).flatten().argsort(stable=True)[:count]
    chosen = torch.zeros_like(among).flatten()
    chosen[order] = True
    return chosen.view_as(among) & among


# ---- Classification and contrast ----------------------------------------------------------------

def pacs(logp, old_logp, mask, labels, *, scale=1.0):
    """PACS, arXiv 2509.02522 (code): cross-entropy of the label with a logit that is the rollout's
    sum of log-ratios, less the mean of the other rollouts; both classes weigh alike in a group."""
    r, mean = rewards(labels, logp)
    reward = scale * rollout_sum(log_ratio(logp, old_logp, mask), mask)
    G = labels.shape[1]
    logit = (reward - reward.mean(1, keepdim=True)) * G / (G - 1)
    weight = torch.where(labels, 0.5 / mean.clamp(min=1e-9), 0.5 / (1 - mean).clamp(min=1e-9))
    weight = torch.where(real.is_mixed(labels)[:, None], weight, 1.0)
    return F.binary_cross_entropy_with_logits(logit, r, weight)


def conspo(logp, old_logp, mask, labels, *, tau=0.5):
    """ConSPO, arXiv 2605.12969 (abstract): InfoNCE of each right rollout against the wrong ones of
    its group; a score is the mean log-probability itself. Here: no margin (theirs grows by a
    schedule); tau and the mean over right rollouts are ours."""
    score = token_mean(logp, mask) / tau
    wrong = score.masked_fill(labels.bool(), -1e30).logsumexp(1, keepdim=True)
    loss = torch.where(labels.bool(), F.softplus(wrong - score), 0.0).sum(1)
    loss = loss / labels.sum(1).clamp(min=1)
    return torch.where(real.is_mixed(labels), loss, 0.0).mean()


# ---- Policy gradients: other advantages ---------------------------------------------------------

def dr_grpo(logp, old_logp, mask, labels, *, max_new_tokens=48):
    """Dr. GRPO, arXiv 2503.20783 (code, TRL): no division by the standard deviation, and one
    constant in place of the rollout's length."""
    r, mean = rewards(labels, logp)
    loss = surrogate(log_ratio(logp, old_logp, mask), r - mean)
    return rollout_sum(loss, mask).mean() / max_new_tokens


def rloo(logp, old_logp, mask, labels):
    """RLOO, arXiv 2402.14740: the baseline is the mean reward of the other rollouts; REINFORCE on
    whole rollouts, no ratio and no clip, although rollouts grow old within a step."""
    r, mean = rewards(labels, logp)
    G = labels.shape[1]
    return -((r - mean) * G / (G - 1) * rollout_sum(logp, mask)).mean()


def opo(logp, old_logp, mask, labels):
    """OPO, arXiv 2505.23585 (code, verl): the baseline of least variance if gradients grow with
    length, a mean of rewards weighted by length. Here: REINFORCE on whole rollouts."""
    r, _ = rewards(labels, logp)
    length = mask.sum(-1).to(logp.dtype)
    baseline = (length * r).sum(1, keepdim=True) / length.sum(1, keepdim=True).clamp(min=1)
    return -((r - baseline) * rollout_sum(logp, mask)).mean()


def maxrl(logp, old_logp, mask, labels):
    """MaxRL, arXiv 2602.02710 (code): the gradient of log pass rate in place of pass rate, so the
    advantage is over the mean. Here: GRPO's clip and its means over tokens and rollouts."""
    r, mean = rewards(labels, logp)
    loss = surrogate(log_ratio(logp, old_logp, mask), (r - mean) / (mean + 1e-6))
    return token_mean(loss, mask).mean()


def w_reinforce(logp, old_logp, mask, labels, *, right=0.1):
    """W-REINFORCE, arXiv 2506.01347: wrong rollouts teach, right ones with a tenth of the weight;
    no baseline, so groups all right or all wrong count too. Here: no ratio; over all tokens."""
    r, _ = rewards(labels, logp)
    A = right * r - (1 - r)
    return -all_tokens(A[..., None] * logp, mask)


def topr(logp, old_logp, mask, labels):
    """TOPR, arXiv 2503.14286: REINFORCE with rewards +1 and -1; a wrong rollout counts by its
    importance weight, at most 1, so it is let go once unlikely. Right ones count in full."""
    ratio = rollout_sum(log_ratio(logp, old_logp, mask), mask).detach().clamp(max=0).exp()
    A = torch.where(labels.bool(), 1.0, -ratio)
    return -(A * rollout_sum(logp, mask)).mean()


# ---- Policy gradients: other ratios and clips ---------------------------------------------------

def cispo(logp, old_logp, mask, labels, *, highest=1.28):
    """CISPO, arXiv 2506.13585 (code, TRL): the ratio is a weight without gradient, capped at
    `highest`, so that every token keeps its gradient. The cap is ours: DAPO's."""
    weight = log_ratio(logp, old_logp, mask).detach().clamp(-20, 20).exp().clamp(max=highest)
    return -all_tokens(weight * standardized(labels, logp)[..., None] * logp, mask)


def sapo(logp, old_logp, mask, labels, *, hot=1.0, hot_wrong=1.05):
    """SAPO, arXiv 2511.20347 (code, TRL): a sigmoid gate in place of the clip, steeper for tokens
    with a negative advantage."""
    A = standardized(labels, logp)[..., None]
    rho = log_ratio(logp, old_logp, mask).clamp(-20, 20).exp()
    steep = hot_wrong + (hot - hot_wrong) * (A > 0).to(A.dtype)
    return -token_mean(torch.sigmoid(steep * (rho - 1)) * 4 / steep * A, mask).mean()


def gmpo(logp, old_logp, mask, labels, *, clip=0.4):
    """GMPO, arXiv 2507.20673 (code, verl): the ratio of a rollout is the geometric mean of its
    tokens' ratios, each clipped on the side that its advantage pushes it to."""
    A = standardized(labels, logp)  # (Q, G)
    s = log_ratio(logp, old_logp, mask)
    s = torch.where(A[..., None] > 0, s.clamp(max=clip), s.clamp(min=-clip))
    return -(A * token_mean(s, mask).exp()).mean()


def sspo(logp, old_logp, mask, labels, *, segment=8):
    """SSPO, arXiv 2511.04256 (abstract): a ratio per sentence, between GRPO's tokens and GSPO's
    whole rollout. Here: a "sentence" is `segment` tokens; the clip is GRPO's, not by entropy."""
    s = F.pad(log_ratio(logp, old_logp, mask), (0, -logp.shape[-1] % segment))
    tokens = F.pad(mask, (0, -logp.shape[-1] % segment)).unflatten(-1, (-1, segment))
    mean = token_mean(s.unflatten(-1, (-1, segment)), tokens)  # (Q, G, segments)
    spread = mean.repeat_interleave(segment, -1)[..., : logp.shape[-1]]
    return token_mean(surrogate(spread, standardized(labels, logp)), mask).mean()


# ---- Which tokens -------------------------------------------------------------------------------

def earl(logp, old_logp, mask, labels, *, share=0.2):
    """EARL, arXiv 2511.12033 (abstract), and "Beyond the 80/20 rule", arXiv 2506.01939 (code): a
    gradient for the fifth of tokens where the policy is least sure. Here: surprise -log pi_old of
    the token drawn stands in for the entropy, which no objective is given."""
    keep = lowest(old_logp, mask, max(1, int(share * mask.sum())))
    loss = surrogate(log_ratio(logp, old_logp, mask), standardized(labels, logp))
    return all_tokens(loss, keep)


def kl_cov(logp, old_logp, mask, labels, *, share=0.002):
    """KL-Cov, arXiv 2505.22617 (code): the tokens whose advantage and log-probability vary together
    most, which cost most entropy, pay |log-ratio|; no clip."""
    A = standardized(labels, logp)[..., None].expand_as(logp)
    a, p = A - all_tokens(A, mask), logp.detach() - all_tokens(logp.detach(), mask)
    paying = lowest(-a * p, mask, max(1, int(share * mask.sum())))
    s = log_ratio(logp, old_logp, mask)
    return all_tokens(-A * s.clamp(-20, 20).exp() + torch.where(paying, s.abs(), 0.0), mask)


def lp_reg(logp, old_logp, mask, labels, *, share=0.1):
    """Lp-Reg, arXiv 2510.03222 (code): of the tokens of wrong rollouts the least likely pay a KL to
    a target once they fall below it. Here: the target is the old policy, not that policy without
    its noise tokens, which takes all logits; a tenth of them pay, not a hundredth: ours are few."""
    s, A = log_ratio(logp, old_logp, mask), standardized(labels, logp)
    wrong = mask & (A < 0)[..., None]
    low = lowest(logp.detach(), wrong, int(share * wrong.sum())) & (s < 0)
    d = -s.clamp(-20, 20)
    kl = (d.exp() - d - 1).clamp(max=10)
    regular = -A[..., None] * s.clamp(-20, 20).exp() + kl
    return all_tokens(torch.where(low, regular, surrogate(s, A)), mask)


# ---- Rehearsal ----------------------------------------------------------------------------------

def dph(logp, old_logp, mask, labels, *, ref_logp, weight=0.01):
    """DPH-RL, arXiv 2509.07430 (abstract), with the forward KL: GRPO, and -log pi of what the
    starting model would say. Here: on our own rollouts by importance weights, not on samples of the
    starting model's right answers; the weight is ours."""
    loss = surrogate(log_ratio(logp, old_logp, mask), standardized(labels, logp))
    rehearsal = -log_ratio(ref_logp, old_logp, mask).clamp(-5, 5).exp() * logp
    return token_mean(loss + weight * rehearsal, mask).mean()


OBJECTIVES = {f.__name__: f for f in (pacs, conspo, dr_grpo, rloo, opo, maxrl, w_reinforce, topr,
                                      cispo, sapo, gmpo, sspo, earl, kl_cov, lp_reg, dph)}


# ---- The picture --------------------------------------------------------------------------------

def pushes(objective, score, right, moved):
    """How hard each of 8 rollouts is pushed, -Q dL/ds_bar, if all stand at 0 but `moved`.

    The first `right` are right; a rollout has 20 tokens of probabilities from .05 to .999.
    """
    chance = torch.logspace(-1.3, -0.0005, 20, dtype=torch.float64)
    logp = chance.log().expand(1, 8, 20).clone()
    old_logp, mask = logp.clone(), torch.ones(1, 8, 20, dtype=torch.bool)
    logp[0, moved] += score
    given = {"logp": logp.requires_grad_(), "old_logp": old_logp, "mask": mask,
             "labels": (torch.arange(8) < right)[None]}
    reference = {"ref_logp": old_logp} if "ref_logp" in real.inspect.signature(
        objective).parameters else {}
    gradient, = torch.autograd.grad(objective(**given, **reference), logp)
    return -gradient[0].sum(-1)


def draw(path):
    """The picture: a pair of panels an objective."""
    from matplotlib.figure import Figure

    everyone = {k: f for k, f in real.OBJECTIVES.items() if k not in OBJECTIVES} | OBJECTIVES
    scores, blue, orange = torch.linspace(-1, 1, 161), "#0072B2", "#D55E00"  # Okabe and Ito
    rows = -(-len(everyone) // 3)
    figure = Figure(figsize=(9, 1.28 * rows + 0.7), dpi=100, layout="constrained")
    axes = figure.subplots(rows, 6).reshape(-1, 2)
    for axis in axes[len(everyone):].flat:
        axis.axis("off")
    for (left, counts), (name, objective) in zip(axes, everyone.items()):
        unit = pushes(objective, 0.0, 4, 0).abs().max()
        for moved, colour, style in ((0, blue, "-"), (7, orange, "--")):
            credit = [pushes(objective, s, 4, moved)[moved] / unit for s in scores.tolist()]
            left.plot(scores, credit, style, color=colour, lw=1.4)
        sides = [(x[:k].sum(), -x[k:].sum()) for k, x in enumerate(
            pushes(objective, 0.0, k, 0) / unit for k in range(9))]
        for side, colour, style in zip(zip(*sides), (blue, orange), ("o-", "s--")):
            counts.plot(range(9), side, style, color=colour, ms=5.5 - 3 * (style == "s--"), lw=1,
                        markerfacecolor="white" if style == "o-" else colour)
        left.set_title(name, fontsize=9, loc="left", pad=3)
        left.axhline(0, color="0.8", lw=0.6, zorder=0)
        left.set(xlim=(-1, 1), ylim=(-2.6, 2.6), xticks=(-1, 0, 1))
        counts.set(ylim=(-0.5, 8.5), xticks=range(0, 9, 2), yticks=(0, 4, 8))
        for axis in (left, counts):
            axis.tick_params(labelsize=7, length=2, pad=1)
            axis.spines[["top", "right"]].set_visible(False)
    for left, counts in axes[len(everyone) - 3 : len(everyone)]:
        left.set_xlabel("score $\\bar s$", fontsize=8)
        counts.set_xlabel("right rollouts of 8", fontsize=8)
    figure.suptitle("Left: credit of one rollout with score $\\bar s$, the others at 0, 4 of 8 "
                    "right (above 0: made likelier).  Right: all the push on a side.\n"
                    "Blue, solid, circles: right rollouts.  Orange, dashed, squares: wrong ones.  "
                    "Unit: the larger credit at $\\bar s$ = 0, 4 of 8 right.", fontsize=9)
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(__file__).parent / "logs" / "atlas.png")
