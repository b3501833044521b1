"""Sampling: the distribution that it draws from, refilled slots, masks, labels, validation."""

import importlib.util
import math
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from toys import QUICK, sampled, tiny, toy

import real
from real import Config

spec = importlib.util.spec_from_file_location("ev", Path(real.__file__).with_name("eval.py"))
ev = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ev)

RARE = 1e-6  # a right sampler is called wrong once in so many seeds, and the seed is fixed


def softmax(model, ids, temperature, top_p=1.0):
    """By the book: the fewest most probable tokens that hold top_p, in float64."""
    p = (model(input_ids=torch.tensor(ids)[None]).logits[0, -1].detach() / temperature).softmax(-1)
    kept, total = [], 0.0
    for token in p.argsort(descending=True).tolist():
        if total < top_p:
            kept.append(token)
            total += p[token].item()
    return {token: p[token].item() / total for token in kept}


def answers(model, prompt, length, end, temperature, top_p):
    """Every answer of at most `length` tokens and its probability."""
    found = {(): 1.0}
    for _ in range(length):
        longer = {}
        for o, p in found.items():
            if o and o[-1] == end:
                longer[o] = p
                continue
            for token, q in softmax(model, [*prompt, *o], temperature, top_p).items():
                longer[(*o, token)] = p * q
        found = longer
    return found


@pytest.mark.parametrize("drawn, expected", [(0.0, 2), (1 - 2**-24, 1)])
def test_an_impossible_token_is_never_drawn(drawn, expected, monkeypatch):
    """Not even at the smallest and the largest number that torch.rand can return."""
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, drawn))
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf, -math.inf]] * 3)
    assert real.next_token(logits, 1.0).tolist() == [expected] * 3


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.9)])
@pytest.mark.parametrize("slots", [8000, 400])
def test_samples_follow_the_model(temperature, top_p, slots):
    """All answers of three tokens out of six, counted, by chi-square: all rollouts at once, and in
    slots that are refilled while others are at work, prompts of two lengths in turn."""
    model = toy(vocab_size=6, initializer_range=0.12)
    choose = partial(ev.nucleus, top_p=top_p) if top_p < 1 else None
    prompts = [[3, 2, 5, 4], [2, 3]]
    torch.manual_seed(3)
    ids, mask = real.sample(model, [torch.tensor(q) for q in prompts] * 1000, 4, [1], 3,
                            temperature, slots, choose)
    for i, prompt in enumerate(prompts):
        expected = answers(model, prompt, 3, 1, temperature, top_p)
        counts = dict.fromkeys(expected, 0)
        for o, m in zip(ids[i::2].reshape(-1, 3), mask[i::2].reshape(-1, 3)):
            counts[tuple(o[m].tolist())] += 1  # a KeyError: an answer that cannot be
        often = [o for o, p in expected.items() if p * 4000 >= 5]
        table = [[counts[o] for o in often], [expected[o] * 4000 for o in often]]
        for row in table:
            row.append(4000 - sum(row))  # all others together
        assert len(often) > 6 and chisquare(*table).pvalue > RARE


@pytest.mark.parametrize("slots", [2, 6, 2048])
def test_greedy_is_generate_whatever_the_slots(slots):
    """Prompts of many lengths, rollouts that end early, slots refilled or not: the same tokens."""
    model, tokenizer, problems = tiny()
    model, end = model.double(), tokenizer.eos_token_id  # no near ties
    prompts = [torch.tensor(problems[i]["prompt_ids"][i:]) for i in (0, 3, 9, 1, 5, 2, 12)]
    ids, mask = real.sample(model, prompts, 2, [end], 40, 1e-9, slots=slots)
    assert len(set(map(len, prompts))) > 2 and len(set(mask[:, 0].sum(-1).tolist())) > 2
    for prompt, group, masks in zip(prompts, ids, mask):
        alone = model.generate(prompt[None], do_sample=False, max_new_tokens=40, pad_token_id=1)
        for o, m in zip(group, masks):
            assert torch.equal(o[m], alone[0, len(prompt):])


def test_masks_end_at_the_first_end_token():
    """Any of several; it belongs to the answer, what comes after it does not."""
    model = toy(vocab_size=6, initializer_range=0.1)
    torch.manual_seed(0)
    ids, mask = real.sample(model, [torch.tensor([2, 3, 4])] * 20, 8, [1, 5], 5, 1.0, slots=16)
    lengths = []
    for o, m in zip(ids.view(-1, ids.shape[-1]).tolist(), mask.view(-1, ids.shape[-1]).tolist()):
        n = next((i + 1 for i, token in enumerate(o) if token in (1, 5)), len(o))
        assert m == [i < n for i in range(len(o))] and not any(o[n:])
        lengths.append(n)
    assert min(lengths) == 1 and max(lengths) == 5 and ids.dtype == torch.long


def test_the_longest_answer_decides_the_width():
    model = toy(vocab_size=6)
    ids, mask = real.sample(model, [torch.tensor([2, 3])], 4, range(6), 9, 1.0)
    assert ids.shape == mask.shape == (1, 4, 1) and mask.all()


def test_refilled_slots_change_neither_lengths_nor_rewards():
    """The embedded model, 16 questions by 16 rollouts, all side by side and in 48 slots."""
    model, tokenizer, problems = tiny()
    means = []
    for slots in (2048, 48):
        torch.manual_seed(1)
        batch = real.rollouts(model, tokenizer, problems[:16], 16, replace(QUICK, slots=slots))
        means.append([(x.mean(-1), x.var(-1) / 16) for x in (batch["labels"].float(),
                                                             batch["mask"].sum(-1).float())])
    for (one, noise), (other, more) in zip(*means):  # sum over questions; its standard error
        assert (one - other).sum().abs() < 5 * (noise + more).sum().sqrt()
        assert one.std() > 0.1


# ---- What makes a batch --------------------------------------------------------------------------


def test_a_batch_is_what_its_docstring_says():
    model, tokenizer, problems = tiny()
    batch = sampled()
    ends = (batch["completions"] == tokenizer.eos_token_id) & batch["mask"]
    for q, problem in enumerate(problems[:4]):
        assert batch["problems"][q] is problem
        assert batch["prompts"][q].tolist() == problem["prompt_ids"]
        for g in range(4):
            o = batch["completions"][q, g][batch["mask"][q, g]]
            assert batch["texts"][q][g] == tokenizer.decode(o, skip_special_tokens=True)
            right = real.is_correct(problem["opening"] + batch["texts"][q][g], problem["answer"])
            assert batch["labels"][q, g] == right and batch["ended"][q, g] == ends[q, g].any()
    assert 0 < batch["labels"].float().mean() < 1
    assert {k: batch[k].dtype for k in ("completions", "mask", "labels", "ended")} == {
        "completions": torch.long, "mask": torch.bool, "labels": torch.bool, "ended": torch.bool}


def test_an_answer_that_is_cut_off_did_not_end():
    model, tokenizer, problems = tiny()
    torch.manual_seed(0)
    batch = real.rollouts(model, tokenizer, problems[:4], 8, replace(QUICK, max_new_tokens=14))
    full = batch["mask"].all(-1)
    last = batch["completions"][..., -1] == tokenizer.eos_token_id
    assert full.any() and not full.all() and torch.equal(batch["ended"], ~full | last)


def test_temperature_slots_and_choice_reach_the_sampler():
    model, tokenizer, problems = tiny()
    choose = partial(ev.nucleus, top_p=0.5)
    config = replace(QUICK, temperature=1.5, max_new_tokens=5, slots=7)
    expected = []
    for f in (lambda: real.rollouts(model, tokenizer, problems[:3], 4, config, choose=choose),
              lambda: dict(zip(("completions", "mask"), real.sample(
                  model, [torch.tensor(p["prompt_ids"]) for p in problems[:3]], 4,
                  [tokenizer.eos_token_id], 5, 1.5, 7, choose)))):
        torch.manual_seed(0)
        expected.append(f())
    assert torch.equal(expected[0]["completions"], expected[1]["completions"])


def test_a_label_sees_a_whole_group():
    """A majority vote: a label that no single answer decides."""
    model, tokenizer, problems = tiny()
    seen = []

    def vote(problem, texts):
        seen.append((problem, list(texts)))
        boxes = [real.extract_answer(text) for text in texts]
        return [box == max(boxes, key=boxes.count) for box in boxes]

    torch.manual_seed(0)
    batch = real.rollouts(model, tokenizer, problems[:3], 4, QUICK, vote)
    assert [problem for problem, _ in seen] == problems[:3]
    assert [texts for _, texts in seen] == [["<think>" + text for text in group]
                                            for group in batch["texts"]]  # as the prompt opens it
    assert batch["labels"].tolist() == [vote(*call) for call in seen[:3]]


def test_an_answer_without_the_end_of_thinking_is_wrong(monkeypatch):
    """The prompt opens <think>, so what is boxed before </think> is not graded as an answer."""
    model, tokenizer, problems = tiny()
    problem = problems[0] | {"opening": "<think>"}
    box = rf"\boxed{{{problem['answer']}}}"
    for text, right in ((box, False), (f"</think>{box}", True)):
        monkeypatch.setattr(type(tokenizer), "decode", lambda self, *a, text=text, **k: text)
        batch = real.rollouts(model, tokenizer, [problem], 2, QUICK)
        assert batch["labels"].tolist() == [[right, right]]


def test_ruined_weights_are_said():
    model, tokenizer, problems = tiny()
    next(model.parameters()).data.fill_(math.nan)
    with pytest.raises(real.UserError, match="not finite"):
        real.rollouts(model, tokenizer, problems[:2], 2, QUICK)


# ---- Validation ----------------------------------------------------------------------------------


def test_validation_samples_as_training_does():
    """Not greedy, at the run's temperature, eval_samples of each of the first eval_limit problems,
    the same draws each time."""
    model, tokenizer, problems = tiny()
    config = Config(eval_samples=20, eval_limit=3, temperature=0.7, seed=5)
    found = [real.validate(model, tokenizer, problems[:9], config) for _ in range(2)]
    torch.manual_seed(5)
    expected = real.rollouts(model, tokenizer, problems[:3], 20, config)["labels"].float()
    assert found[0] == found[1] == expected.mean().item()
    assert (expected.mean(-1) % 1 > 0).any()  # greedy: 0 or 1 for each problem
    assert expected[:, 0].mean() != expected.mean()


def test_all_sequences_of_the_toy_are_counted():
    """`answers`, the judge above, is itself a distribution."""
    model = toy(vocab_size=6, initializer_range=0.12)
    found = answers(model, [2, 3], 3, 1, 1.0, 1.0)
    possible = [o for n in (1, 2, 3) for o in product(range(6), repeat=n)
                if 1 not in o[:-1] and (n == 3 or o[-1] == 1)]
    assert set(found) == set(possible) and sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("slots", [4, 2048])
def test_eager_attention_samples_what_sdpa_does(slots):
    """It adds its mask, so a boolean one would hide nothing. Prompts of many lengths, greedily: the
    two best logits are nowhere nearer than .009, which no rounding of another CPU bridges."""
    model, _, problems = tiny()
    prompts = [torch.tensor((2 * p["prompt_ids"])[:n])
               for p, n in zip(problems, (40, 10, 30, 7, 22, 50))]
    ids, mask = real.sample(model, prompts, 2, [1], 20, 1e-9, slots=slots)
    model.set_attn_implementation("eager")
    again, also = real.sample(model, prompts, 2, [1], 20, 1e-9, slots=slots)
    assert torch.equal(ids, again) and torch.equal(mask, also)


@pytest.mark.parametrize("label", [0.3, -1, float("nan"), 2])
def test_a_label_that_is_none_is_refused(label):
    model, tokenizer, problems = tiny()
    with pytest.raises(real.UserError, match="0 or 1"):
        real.rollouts(model, tokenizer, problems[:1], 2, QUICK, lambda problem, texts: [1, label])
