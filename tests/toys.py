"""What the tests of the algorithm share: the embedded model, and toys in float64.

A toy's numbers are rounded in one place only: `token_logprobs` gives log-probabilities in fp32. So
whatever is compared with a float64 formula may be off by a few times 2^-24 of its terms: ROUNDING.
"""

import copy
from functools import lru_cache

import torch
import transformers
from transformers import AutoModelForCausalLM

import real
from real import Config

ROUNDING = 2**-24 * 64  # fp32 has 24 bits; room for the 64 roundings of a sum or a softmax
QUICK = Config(eval_every=0, steps=2, prompts=4, mini_batches=2, group_size=4)
SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.5,
             max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=None)


def round_weights(model):
    """Weights to bf16, buffers as they are."""
    for p in model.parameters():
        p.data = p.data.bfloat16()


@lru_cache
def embedded():
    model, tokenizer = real.load_model(real.TINY)
    return model, tokenizer, real.load_problems(tokenizer, Config(), real.TINY, "train")


def tiny():
    """The embedded model, ours alone to change; its tokenizer; its training problems."""
    model, tokenizer, problems = embedded()
    return copy.deepcopy(model), tokenizer, problems


@lru_cache
def sampled():
    """Four groups of four rollouts of the embedded model."""
    torch.manual_seed(0)
    model, tokenizer, problems = tiny()
    batch = real.rollouts(model, tokenizer, problems[:4], 4, QUICK)
    with torch.no_grad():
        batch["old_logp"] = real.all_logprobs(model, batch, QUICK)
    return batch


def toy(architecture=transformers.Qwen2Config, seed=0, dtype=torch.float64, **more):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(architecture(**SIZES | more), dtype=dtype).eval()


def made_up(model, seed=0, lengths=(5, 9, 3), G=4, T=7):
    """A batch of random tokens: the first group all right, the others mixed; old_logp near logp."""
    torch.manual_seed(seed)
    Q, vocabulary = len(lengths), model.config.vocab_size
    prompts = [torch.randint(2, vocabulary, (n,)) for n in lengths]
    mask = torch.arange(T) < torch.randint(1, T + 1, (Q, G, 1))
    mask[0, 0] = True
    labels = torch.rand(Q, G) < 0.5
    labels[0], labels[1:, 0], labels[1:, 1] = True, True, False
    batch = {"prompts": prompts, "completions": torch.randint(2, vocabulary, (Q, G, T)) * mask,
             "mask": mask, "labels": labels}
    with torch.no_grad():
        logp = plain_logprobs(model, batch, 1.0)
    shift = torch.sin(torch.arange(logp.numel())).view(logp.shape) * mask
    return batch | {"old_logp": (logp + 0.3 * shift).float(),
                    "ref_logp": (logp - 0.2 * shift.roll(1)).float()}


def plain_logprobs(model, batch, temperature):
    """log pi(o_t | q, o_<t) by the book: a rollout alone, all logits, log_softmax: (Q, G, T)."""
    rows = []
    for prompt, group, masks in zip(batch["prompts"], batch["completions"], batch["mask"]):
        for o, mask in zip(group, masks):
            logits = model(input_ids=torch.cat([prompt, o[mask]])[None]).logits[0]
            logp = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
            chosen = logp.gather(-1, o[mask][:, None])[:, 0]
            rows.append(torch.zeros_like(mask, dtype=logp.dtype).masked_scatter(mask, chosen))
    return torch.stack(rows).view(batch["mask"].shape)


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])
