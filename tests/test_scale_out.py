"""trl_real.py, on the CPU: its losses and gradients are real.py's, two processes equal one, LoRA learns."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import real

trl = pytest.importorskip("trl", reason="TRL is missing: pip install -r requirements-test.txt")
HERE = Path(__file__).parent / "scale_out"
sys.path.insert(0, str(HERE))
import trl_real  # noqa: E402

NAMES = list(real.OBJECTIVES)
CPU = "--use_cpu true --bf16 false --gradient_checkpointing false --report_to none --save_strategy no --disable_tqdm true"


def trainer(folder, flags, kind=trl_real.Trainer):
    argv = f"{CPU} --output_dir {folder} {flags}".split()
    return kind(*trl.TrlParser((trl_real.Flags, trl.GRPOConfig)).parse_args_and_config(argv))


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


# ---- One batch through TRL and through real.py ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    """TRL's rollouts of 8 groups of 4, and what real.py makes of them before and after a change of the weights."""
    t = trainer(tmp_path_factory.mktemp("trl"), "--objective trpa --temperature 0.7 --max_completion_length 48 --seed 1 "
                "--num_generations 4 --per_device_train_batch_size 32 --num_iterations 2")
    t.model.train()
    x = t._prepare_inputs(next(iter(t.get_train_dataloader())))
    mask = x["completion_mask"].bool()
    ids = [row[0][m[0].bool()] for row, m in zip(x["prompt_ids"], x["prompt_mask"])]
    lengths = mask.sum(-1) + torch.tensor([[len(p)] for p in ids])
    batch = {"prompts": ids, "completions": x["completion_ids"], "mask": mask, "lengths": lengths}
    config = real.Config(temperature=0.7)
    problems = {tuple(p["prompt_ids"]): p for p in real.load_problems(t.processing_class, config, config.dataset, "train")}
    texts = [[t.processing_class.decode(o[m], skip_special_tokens=True) for o, m in zip(*group)]
             for group in zip(x["completion_ids"], mask)]
    asked = [problems[tuple(p.tolist())] for p in ids]  # a KeyError here: TRL tokenized a prompt in its own way
    labels = torch.tensor([[real.is_correct(p["opening"] + o, p["answer"]) for o in group]
                           for p, group in zip(asked, texts)])

    def logprobs():
        return real.token_logprobs(t.model, batch, list(range(mask.numel() // mask.shape[-1])), config)[0].view(mask.shape)

    old = logprobs().detach()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in t.model.parameters():
            p += 0.02 * p.std() * torch.randn_like(p)
    return t, x, batch, labels, old, logprobs


def test_groups_stay_whole_and_some_are_uniform(rolled):
    t, x, batch, labels, *_ = rolled
    assert x["prompt_ids"].shape[:2] == (8, 4) and len({tuple(p.tolist()) for p in batch["prompts"]}) == 8
    assert (x["prompt_ids"] == x["prompt_ids"][:, :1]).all()
    mixed = labels.any(1) & ~labels.all(1)
    assert 0 < mixed.sum() < 8
    assert torch.equal((x["advantages"] > 0)[mixed], labels[mixed])


@pytest.mark.parametrize("name,beta", [(n, 0.0) for n in NAMES if n != "trpa"] + [("trpa", 1e-30), ("real", 0.1)])
def test_loss_and_gradient_are_those_of_real(rolled, name, beta):
    t, x, batch, labels, old, logprobs = rolled
    t.ours, t.beta = real.Config(objective=name), beta
    t.current_gradient_accumulation_steps = 1
    x = x if beta else {k: v for k, v in x.items() if k != "ref_per_token_logps"}
    loss = t._compute_loss(t.model, x)
    gradient = flat(torch.autograd.grad(loss, list(t.model.parameters())))
    logp = logprobs()
    expected = real.OBJECTIVES[name](logp, old, batch["mask"], labels, ref_logp=old if beta else None)
    if beta:
        expected = expected + beta * real.kl(logp, old, batch["mask"])
    other = flat(torch.autograd.grad(expected, list(t.model.parameters())))
    size = (labels.any(1) & ~labels.all(1)).float().mean()  # of the terms: log 2 or |A| in a mixed group, which may cancel
    assert (loss - expected).abs() <= 1e-5 * size
    assert 0 < (gradient - other).norm() <= 1e-5 * other.norm()


# ---- An update by one process and by two, in float64 ---------------------------------------------------------------


class Fixed(trl_real.Trainer):
    """Rollouts that only the prompt and their place in the group decide, and log-probabilities in float64."""

    def _generate_single_turn(self, prompt_ids, *_):
        made = []
        for i, prompt in enumerate(prompt_ids):
            rng = random.Random(str((prompt, i % self.num_generations)))
            made.append([rng.randrange(32, 127) for _ in range(rng.randint(1, 9))] + [self.processing_class.eos_token_id])
        return made, None

    def label(self, prompts, completions, **_):
        return [float(len(text) % 2) for text in completions]

    def _get_per_token_logps_and_entropies(self, model, ids, attend, length, **_):
        logits = model(input_ids=ids, attention_mask=attend).logits[:, -length - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0], None, None


def updates(folder, name, micro_batch, parts):
    """By how much four updates change the weights: two on each of two batches of 4 groups of 4, in `parts` micro-batches."""
    t = trainer(folder, f"--objective {name} --num_generations 4 --per_device_train_batch_size {micro_batch} --max_steps 4 "
                f"--num_iterations 2 --gradient_accumulation_steps {parts} --optim sgd --learning_rate 0.1", Fixed)
    t.model.double()
    before = flat(t.model.parameters())
    t.train()
    return flat(t.model.parameters()) - before


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(folder)]
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in "01"]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_of_two_micro_batches_update_like_one_of_one(two, tmp_path, name):
    one = updates(tmp_path, name, 16, 1)
    apart = [(one - change[name]).norm() / one.norm() for change in two]
    print(name, apart, one.norm())
    assert one.norm() > 0 and torch.equal(two[0][name], two[1][name])
    # Sums of 10^5 terms, each rounded at 1e-16. Means over tokens or mixed groups weigh micro-batches alike instead.
    assert (apart[0] <= 1e-10) == (name not in ("real_bce", "dapo", "trpa"))


if __name__ == "__main__":
    changes = {name: updates(sys.argv[1], name, 4, 2) for name in NAMES}
    torch.save(changes, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
