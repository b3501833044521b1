"""Wrong solutions that a grader must refuse, and right ones that it must accept: per exercise, a
change to the reference solution."""

CREDIT = "    W, anchor = torch.zeros_like(s), torch.zeros_like(s[:1])\n"  # its first line
DRAW = "torch.multinomial(p, G, replacement=True, generator=torch.Generator().manual_seed(seed))"
NUMBERS = "mine = own_numbers()"

WRONG = [  # exercise, misconception, what the reference says, what it becomes
    (1, "no anchor", "F.pad(s / tau, (1, 0))", "s / tau"),
    (1, "sign flipped", "F.pad(s / tau, (1, 0))", "F.pad(-s / tau, (1, 0))"),
    (1, "overflows", "torch.logsumexp(F.pad(s / tau, (1, 0)), -1)",
     "torch.log(1 + (s / tau).exp().sum(-1))"),
    (1, "mean for sum", "F.pad(s / tau, (1, 0)), -1)",
     "F.pad(s / tau - math.log(max(s.shape[-1], 1)), (1, 0)), -1)"),
    (1, "the anchor not counted", "1 / (tau * (1 + N))", "1 / (tau * N)"),
    (1, "bound forgets tau", "1 / (tau * (1 + N)), 1 / tau", "1 / (tau * (1 + N)), 1.0"),
    (2, "no 1 in Eq. 2", "F.softplus(torch.logsumexp(z_n, -1) + torch.logsumexp(-z_p, -1))",
     "torch.logsumexp(z_n, -1) + torch.logsumexp(-z_p, -1)"),
    (2, "right against wrong, no anchor",
     "softmax_ce(s[r] / tau, anchor) + softmax_ce(anchor, s[~r] / tau)",
     "softmax_ce(s[r] / tau, s[~r] / tau)"),
    (2, "anchor on the wrong side", "softmax_ce(s[r] / tau, anchor)",
     "softmax_ce(anchor, s[r] / tau)"),
    (2, "sign flipped", "W[r] = -torch.cat", "W[r] = torch.cat"),
    (2, "each rollout by itself, C = 1", "torch.cat([anchor, s[~r] / tau]).softmax(-1)[1:]",
     "(s[~r] / tau).sigmoid()"),
    (2, "tau forgotten outside", ".softmax(-1)[1:] / tau\n    W[~r]",
     ".softmax(-1)[1:]\n    W[~r]"),
    (2, "autograd for the closed form", CREDIT,
     "    with torch.enable_grad():\n"
     "        s = s.detach().requires_grad_()\n"
     "        return torch.autograd.grad(real_loss(s, r, tau), s)[0]\n"),
    (2, "backward for the closed form", CREDIT,
     "    with torch.enable_grad():\n"
     "        s = s.detach().requires_grad_()\n"
     "        real_loss(s, r, tau).backward()\n"
     "        return s.grad\n"),
    (2, "real.softmax_ce called",
     "F.softplus(torch.logsumexp(z_n, -1) + torch.logsumexp(-z_p, -1))",
     "real.softmax_ce(z_p, z_n)"),
    (2, "differences for the closed form", CREDIT,
     "    h = 1e-6 * torch.eye(len(s), dtype=s.dtype)\n"
     "    return torch.stack([(real_loss(s + x, r, tau) - real_loss(s - x, r, tau)) / 2e-6 "
     "for x in h])\n"),
    (2, "real.credit called by a name of one's own", "def credit(s, r, tau):",
     "from real import credit as ready\n\n\n"
     "def credit(s, r, tau):\n"
     "    zero = torch.zeros(1, len(s), 1, dtype=s.dtype)\n"
     "    batch = {'old_logp': zero, 'mask': zero == 0, 'labels': r[None]}\n"
     "    return ready(s[None, :, None], batch, real.Config(tau=tau))[1][0, :, 0]\n"),
    (2, "torch.func for the closed form", "def credit(s, r, tau):",
     "from torch.func import jacfwd\n\n\n"
     "def credit(s, r, tau):\n"
     "    return jacfwd(lambda x: real_loss(x, r, tau))(s)\n"),
    (3, "a plus in front", r"\s*(-?)\s*", r"\s*\+?(-?)\s*"),
    (3, "a minus inside", r"(?:(\d+)\s+)?", r"(?:(\d+)\s+-?)?"),
    (3, "decimals in a fraction", r"(\d+)/(\d+))\s*", r"\d*\.?(\d+)/(\d+))\s*"),
    (3, "float", "return -size if sign else size", "return -float(size) if sign else float(size)"),
    (3, "Fraction() parses it", "    if not match or",
     "    try:\n"
     "        return Fraction(text)\n"
     "    except ValueError:\n"
     "        pass\n"
     "    if not match or"),
    (3, "the start is enough", "re.fullmatch", "re.match"),
    (3, "minus on the whole part alone", "return -size if sign else size",
     "return (size - 2 * int(whole) if whole else -size) if sign else size"),
    (3, "eval", "    text = re.sub",
     "    try:\n"
     "        return Fraction(eval(text))\n"
     "    except Exception:\n"
     "        pass\n"
     "    text = re.sub"),
    (3, "close enough", "value(a) == value(b)",
     "value(b) is not None and abs(value(a) - value(b)) < 1e-6"),
    (4, "each rollout its own group", "objective(logp, old_logp, mask, labels), logp",
     "sum(objective(*(x[:, g : g + 1] for x in (logp, old_logp, mask, labels))) for g in "
     "range(len(ids[0]))), logp"),
    (4, "averaged over micro-batches", "backward(weight[None])",
     "backward(weight[None] / len(flat))"),
    (4, "zeroed in the loop", "        model(row[None])",
     "        model.zero_grad()\n        model(row[None])"),
    (4, "whole batch in one graph",
     "for row, weight in zip(flat, weights):\n        model(row[None]).backward(weight[None])",
     "model(flat).backward(weights)"),
    (4, "one credit per rollout", "backward(weight[None])",
     "backward(weight.mean().expand(weight[None].shape))"),
    (5, "the bug itself", "is_end.cumsum(-1) - is_end.long() == 0", "~is_end"),
    (5, "one token too many", "is_end.cumsum(-1) - is_end.long() == 0",
     "is_end.cumsum(-1) - is_end.long() <= 1"),
    (5, "everything", "is_end.cumsum(-1) - is_end.long() == 0", "torch.ones_like(is_end)"),
    (5, "counts what is not padding", "is_end.cumsum(-1) - is_end.long() == 0",
     "torch.arange(ids.shape[-1]) <= (ids != ends[0]).sum(-1, keepdim=True)"),
    (6, "not registered", 'real.OBJECTIVES["dhpo"] = dhpo', "pass"),
    (6, "sum of log-ratios", "real.s_bar(logp, old_logp, mask)",
     "real.log_ratio(logp, old_logp, mask).sum(-1)"),
    (6, "always clipped", "torch.minimum(rho * A, clipped * A)", "clipped * A"),
    (6, "clipped after mixing",
     "mix * token.clamp(1 - eps, 1 + eps) + (1 - mix) * sequence.clamp(1 - eps_low, 1 + eps_high)",
     "rho.clamp(1 - eps, 1 + eps)"),
    (6, "one mean over all tokens",
     "real.token_mean(-torch.minimum(rho * A, clipped * A), mask).mean()",
     "-torch.minimum(rho * A, clipped * A)[mask].mean()"),
    (6, "sign flipped", "real.token_mean(-torch", "real.token_mean(torch"),
    (6, "sequence ratio without gradient", "mask).exp()[..., None]",
     "mask).detach().exp()[..., None]"),
    (7, "text for value", r'real.is_correct(f"\\boxed{{{a}}}", b)', "a == b"),
    (7, "no answer may win", "a is not None and b is not None and real.is_correct",
     "a == b or bool(a and b) and real.is_correct"),
    (7, "more than half instead of the most", "if max(votes, default=0) == 0:",
     "if 2 * max(votes, default=0) <= sum(a is not None for a in answers):"),
    (7, "first of a tie", "and not tie for", "for"),
    (7, "patches the label function, which train no longer looks up",
     "return real.train(config, label=lambda problem, texts: majority_labels(texts))",
     "real.label_group = lambda problem, texts: majority_labels(texts)\n"
     "    return real.train(config)"),
    (7, "all groups at once", "label=lambda problem, texts: majority_labels(texts)",
     "label=lambda problem, texts: [majority_labels(group) for group in texts]"),
    (7, "gold answers", "label=lambda problem, texts: majority_labels(texts)",
     "label=real.label_group"),
    (8, "unpaired", "2.776 * d.std().item()",
     "2.776 * math.sqrt(sum(torch.tensor(x, dtype=torch.float64).var().item() for x in (a, b)))"),
    (8, "std with n", "d.std()", "d.std(correction=0)"),
    (8, "spread of a run for that of the mean", " / math.sqrt(len(d))", ""),
    (8, "the best of one", "** k for m", "for m"),
    (8, "below in place of at most", "chance[: m + 1]", "chance[:m]"),
    (8, "at least one", "1 - min(sum(chance[: m + 1]), 1) ** k",
     "(1 - min(sum(chance[: m + 1]), 1)) ** k"),
    (9, "the bug itself", DRAW,
     "suspect_group(p, G, seed)"),
    (9, "neighbours share a seed", DRAW,
     "torch.cat([torch.multinomial(p, 1, generator=torch.Generator().manual_seed(seed + g "
     "// 2)) for g in range(G)])"),
    (9, "global seed", DRAW,
     "(torch.manual_seed(seed), torch.multinomial(p, G, replacement=True))[1]"),
    (9, "no seed", ", generator=torch.Generator().manual_seed(seed)", ""),
    (9, "uniform tokens", "torch.multinomial(p, G", "torch.multinomial(torch.ones_like(p), G"),
    (9, "padding compared", 'batch["completions"].masked_fill(~batch["mask"], -1)',
     'batch["completions"]'),
    (9, "any group", "(ids == ids[:, :1]).all())", "(ids == ids[:, :1]).flatten(1).all(1).any())"),
    (9, "neighbours of the first alone", "(ids == ids[:, :1])", "(ids[:, 1] == ids[:, 0])"),
    (10, "keys without values", "return weights, 2 * c", "return weights, c"),
    (10, "all heads", " // c.num_attention_heads * c.num_key_value_heads", ""),
    (10, "a tied matrix twice", "model.parameters()", "model.state_dict().values()"),
    (10, "a cache in fp32", "model.dtype.itemsize", "4"),
    (10, "weights in fp32", "p.element_size()", "4"),
    (10, "GiB for GB", "return cache / 1e9", "return cache / 2**30"),
    (10, "no room for weights", '(mine["memory"] * 1e9 - weights) //', 'mine["memory"] * 1e9 //'),
    (10, "one reading for all tokens", 'mine["columns"] * weights', "weights"),
    (10, "a reading for each slot", 'mine["columns"] * weights',
     'mine["slots"] * mine["columns"] * weights'),
    (10, "somebody else's card", NUMBERS,
     "mine = {'memory': 9, 'bandwidth': 640, 'slots': 104, 'columns': 1024}"),
    (10, "with the validation's seconds", "plain = [row for row in rows if \"pass@1\" not in row]",
     "plain = rows"),
    (10, "a mean of rates", 'tokens / sum(row["seconds"] for row in plain)',
     'sum(row["response_length"] * rollouts / row["seconds"] for row in plain) / len(plain)'),
    (10, "the share that was mixed", "sum(1 - row", "sum(row"),
    (10, "tokens of one rollout", "for row in plain) * rollouts", "for row in plain)"),
]

RIGHT = [  # exercise, alternative, what the reference says, what it becomes
    (1, "softplus", "torch.logsumexp(F.pad(s / tau, (1, 0)), -1)",
     "F.softplus(torch.logsumexp(s / tau, -1))"),
    (2, "logsumexp for softmax", "-torch.cat([anchor, -s[r] / tau]).softmax(-1)[1:] / tau",
     "-(-s[r] / tau - torch.cat([anchor, -s[r] / tau]).logsumexp(-1)).exp() / tau"),
    (3, "one fraction", "int(whole or 0) + Fraction(int(a), int(b))",
     "Fraction(int(whole or 0) * int(b) + int(a), int(b))"),
    (4, "a weighted sum", "model(row[None]).backward(weight[None])",
     "(model(row[None]) * weight).sum().backward()"),
    (5, "ends before this one", "is_end.cumsum(-1) - is_end.long() == 0",
     "F.pad(is_end, (1, 0))[..., :-1].cumsum(-1) == 0"),
    (6, "root of the variance", "r.std(-1, keepdim=True)", "r.var(-1, keepdim=True).sqrt()"),
    (7, "by position", "label=lambda problem, texts:", "lambda problem, texts:"),
    (8, "one subtraction", "sum(1 - min(sum(chance[: m + 1]), 1) ** k for m in range(n)) / n",
     "1 - sum(min(sum(chance[: m + 1]), 1) ** k for m in range(n)) / n"),
    (9, "one by one", DRAW,
     "(lambda rng: torch.cat([torch.multinomial(p, 1, generator=rng) for _ in range(G)]))("
     "torch.Generator().manual_seed(seed))"),
    (10, "rounded", NUMBERS, "return tuple(float(f'{x:.3g}') for x in precise())\n\n\n"
     "def precise():\n    mine = own_numbers()"),
]
