"""Two gloo processes on the CPU against one: the same updates from the same rollouts, and whole runs under torchrun."""

import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import real

ROOT = Path(real.__file__).parent
CONFIG = real.Config(eval_every=0, steps=2, prompts=4, mini_batches=2, group_size=4, micro_batch_tokens=300, lr=1e-3)
OBJECTIVES = "real real_bce dapo trpa grpo".split()  # means over questions, mixed groups, tokens, pairs; a KL term


def torchrun(*command, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, **more)


def finished(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@contextlib.contextmanager
def float64():
    """Everything in float64: what is created, and what would be cast to fp32."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def doubled(batch):
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}


def five_updates(batch, objective):
    """Losses and weights of five updates on one batch, in float64."""
    with float64():
        model = real.load_model(CONFIG.model)[0].double()
        batch = doubled(batch)
        optimizer = torch.optim.AdamW(model.parameters(), CONFIG.lr)
        config = replace(CONFIG, objective=objective)
        losses = [real.update(model, model, optimizer, batch, config)["loss"].item() for _ in range(5)]
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def child(folder):
    """Runs in each of two processes."""
    seen, update, draw = [], real.update, real.draw

    def spy(model, master, optimizer, batch, *rest):
        seen.append(batch["completions"])
        return update(model, master, optimizer, batch, *rest)

    real.update, real.draw = spy, lambda problems, *rest: problems[:1] * 4  # every question is the same
    real.train(replace(CONFIG, steps=1, output_dir=str(Path(folder) / "run")))
    real.update, real.draw = update, draw
    batch = torch.load(Path(folder) / "batch.pt")
    found = {name: five_updates(batch, name) for name in OBJECTIVES}
    found["logp"] = real.all_logprobs(real.load_model(CONFIG.model)[0], batch, CONFIG)[0]
    found["rollouts"] = torch.cat([real.F.pad(x, (0, 48 - x.shape[-1])) for x in seen])
    torch.save(found, Path(folder) / f"{real.RANK}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    model, tokenizer = real.load_model(CONFIG.model)
    problems = real.load_problems(tokenizer, CONFIG, CONFIG.dataset, "train")
    torch.manual_seed(0)
    batch = real.rollouts(model, tokenizer, problems[:4], 4, 48, 1.0)
    batch["old_logp"], _ = real.all_logprobs(model, batch, CONFIG)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data += 0.01 * torch.randn_like(p)
    batch["ref_logp"], _ = real.all_logprobs(other, batch, CONFIG)
    torch.save({k: v for k, v in batch.items() if k not in ("problems", "texts")}, folder / "batch.pt")
    code, out, err = finished(torchrun(__file__, folder))
    assert code == 0, err
    return batch, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_update_like_one(both, objective):
    """The order of summation is all that differs, in float64 some 1e-16 of the terms: of GRPO's loss, too, whose terms of size
    1 cancel. The RMSNorms alone round to fp32, so at worst that tips one of their results by 6e-8, on any CPU."""
    batch, (first, second) = both
    losses, weights = five_updates(batch, objective)
    start, _ = real.load_model(CONFIG.model)
    start = torch.cat([p.detach().flatten() for p in start.parameters()])
    assert first[objective][0] == pytest.approx(losses, rel=1e-7, abs=1e-7) and abs(losses[0] - losses[-1]) > 1e-6
    assert torch.equal(first[objective][1], second[objective][1])
    assert (first[objective][1] - weights).norm() <= 1e-7 * weights.norm()
    assert (first[objective][1] - weights).norm() <= 1e-4 * (weights - start).norm()


def test_two_processes_agree_on_log_probabilities_and_draw_their_own_rollouts(both):
    batch, (first, second) = both
    assert torch.equal(first["logp"], second["logp"])
    assert torch.allclose(first["logp"], batch["old_logp"], atol=1e-5)
    assert torch.equal(first["rollouts"], second["rollouts"])  # all have the batch of all
    groups = first["rollouts"]  # four groups of the same question, two from each process
    assert not any(torch.equal(groups[i], groups[j]) for i in range(4) for j in range(i))


RUN = (ROOT / "real.py", "--eval_every", 2, "--eval_samples", 1, "--eval_limit", 8, "--prompts", 4, "--group_size", 4)


def test_a_run_under_torchrun_is_logged_once_stopped_and_resumed(tmp_path):
    whole = finished(torchrun(*RUN, "--steps", 3, "--output_dir", tmp_path / "whole"))
    assert whole[0] == 0, whole[2]
    assert whole[1].count("Pass@1 before training") == 1
    process = torchrun(*RUN, "--steps", 3, "--output_dir", tmp_path / "run")
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    code, out, err = finished(process)
    assert code != 0 and len(list((tmp_path / "run").glob("checkpoint-*"))) == 1, err
    code, out, err = finished(torchrun(*RUN, "--steps", 3, "--output_dir", tmp_path / "run", "--resume"))
    assert code == 0, err
    ends = []
    for name in ("whole", "run"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        assert [r["step"] for r in rows] == [1, 2, 3]
        ends.append({k: v for k, v in rows[-1].items() if k != "seconds"})
    assert ends[0] == ends[1]


if __name__ == "__main__":
    child(sys.argv[1])
