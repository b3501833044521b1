"""trl_real.py on the CPU: losses and gradients of real.py, two processes like one, LoRA learns."""

import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import real

trl = pytest.importorskip("trl", reason="TRL is missing: pip install -r requirements-test.txt")
HERE = Path(__file__).parent / "scale_out"
sys.path.insert(0, str(HERE))
import trl_real

NAMES, FAST = list(real.OBJECTIVES), ("real", "dapo")
PARSER = partial(trl.TrlParser, (trl_real.Own, trl.GRPOConfig, trl.ModelConfig))
CPU = ("--use_cpu true --bf16 false --gradient_checkpointing false --report_to none "
       "--save_strategy no --disable_tqdm true ")


def trainer(folder, flags, kind=trl_real.Trainer):
    argv = f"{CPU} --output_dir {folder} {flags}".split()
    return kind(*PARSER().parse_args_and_config(argv))


def flat(tensors):
    return torch.cat([x.detach().flatten() for x in tensors])


def launched(*command, **more):
    """Run Python with these arguments; returns the exit code, output and errors."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | more
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, check=False,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


# ---- One batch through TRL and through real.py ---------------------------------------------------


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    """TRL's rollouts of 8 groups of 4 and their labels; then the weights change a little.

    Also gives the log-probabilities of real.py, a function, and what it gave before the change.
    """
    t = trainer(tmp_path_factory.mktemp("trl"), "--objective trpa --temperature 0.7 --seed 4 "
                "--max_completion_length 48 --num_generations 4 --per_device_train_batch_size 32 "
                "--num_iterations 2")
    t.model.train()
    x = t._prepare_inputs(next(iter(t.get_train_dataloader())))
    mask = x["completion_mask"].bool()
    prompts = [ids[0][m[0].bool()] for ids, m in zip(x["prompt_ids"], x["prompt_mask"])]
    batch = {"prompts": prompts, "completions": x["completion_ids"], "mask": mask}

    config, tokenizer = real.Config(temperature=0.7), t.processing_class
    problems = real.load_problems(tokenizer, config, config.dataset, "train")
    problems = {tuple(p["prompt_ids"]): p for p in problems}
    labels = torch.zeros(mask.shape[:2], dtype=torch.bool)
    for q, g in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        problem = problems[tuple(prompts[q].tolist())]  # KeyError: TRL reads prompts in its own way
        text = tokenizer.decode(x["completion_ids"][q, g][mask[q, g]], skip_special_tokens=True)
        labels[q, g] = real.is_correct(problem["opening"] + text, problem["answer"])

    def logprobs():
        rows = list(range(labels.numel()))
        return real.token_logprobs(t.model, batch, rows, config).view(mask.shape)

    old = logprobs().detach()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in t.model.parameters():
            p += 0.02 * p.std() * torch.randn_like(p)
    return t, x, labels, old, logprobs


def test_groups_stay_whole_and_get_our_labels(rolled):
    _, x, labels, *_ = rolled
    assert x["prompt_ids"].shape[:2] == (8, 4)
    assert (x["prompt_ids"] == x["prompt_ids"][:, :1]).all()
    mixed = labels.any(1) & ~labels.all(1)
    assert mixed.any() and labels.all(1).any() and not labels.any(1).all()  # all three kinds
    assert torch.equal((x["advantages"] > 0)[mixed], labels[mixed])


def test_prompt_and_label_are_those_of_real(rolled):
    """The ids that load_problems made, whatever TRL would make of the text; thinking must end."""
    t, *_ = rolled
    t.problems["?"] = {"prompt_ids": [0, 0, 7], "opening": "<think>", "answer": "2"}
    assert t._tokenize_prompts(["?"]) == ([[0, 0, 7]], None, {})
    assert t.label(["?", "?"], [r"\boxed{2}", r"</think> \boxed{2}"]) == [0.0, 1.0]


CASES = [(name, 0.0) for name in NAMES if name != "trpa"] + [("trpa", 1e-30), ("real", 0.1)]


@pytest.mark.parametrize("name, beta", CASES)
def test_loss_and_gradient_are_those_of_real(rolled, name, beta):
    t, x, labels, old, logprobs = rolled
    tau = {"tau": 0.3} if name in ("real", "real_bce", "real_no_anchor") else {}
    t.own, t.beta = real.Config(objective=name, **tau), beta
    t.current_gradient_accumulation_steps = 1
    if not beta:
        x = {k: v for k, v in x.items() if k != "ref_per_token_logps"}
    weights = list(t.model.parameters())
    loss = t._compute_loss(t.model, x)
    gradient = flat(torch.autograd.grad(loss, weights))
    logp, mask = logprobs(), x["completion_mask"].bool()
    ref = {"ref_logp": old} if name == "trpa" else {}
    expected = real.OBJECTIVES[name](logp, old, mask, labels, **ref, **tau)
    expected = expected + beta * real.kl(logp, old, mask)
    expected_gradient = flat(torch.autograd.grad(expected, weights))
    # Both engines compute in float32, whose rounding, 6e-8, some hundred roundings deep is 6e-6.
    size = (labels.any(1) & ~labels.all(1)).float().mean()  # terms of a mixed group: log 2 or |A|
    assert (loss - expected).abs() <= 1e-5 * size
    assert 0 < (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


# ---- An update by one process and by two, in float64 ---------------------------------------------


class Fixed(trl_real.Trainer):
    """Rollouts decided by prompt and place in the group alone, log-probabilities in float64."""

    def _generate_single_turn(self, prompt_ids, *_):
        made = []
        for i, prompt in enumerate(prompt_ids):
            rng = random.Random(str((prompt, i % self.num_generations)))
            tokens = [rng.randrange(32, 127) for _ in range(rng.randint(1, 9))]
            made.append(tokens + [self.processing_class.eos_token_id])
        return made, None

    def label(self, prompts, completions, **_):
        return [float(len(text) % 2) for text in completions]

    def _get_per_token_logps_and_entropies(self, model, ids, attend, length, **_):
        logits = model(input_ids=ids, attention_mask=attend).logits[:, -length - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, -length:, None])[..., 0], None, None


def updates(folder, name, micro_batch, parts):
    """How the weights change in two updates on each of two batches of 4 groups of 4 rollouts.

    An update takes `parts` micro-batches in each process; without clipping, which hides its scale.
    """
    t = trainer(folder, f"--objective {name} --num_generations 4 --max_steps 4 --num_iterations 2 "
                f"--per_device_train_batch_size {micro_batch} --max_grad_norm 0 --optim sgd "
                f"--learning_rate 0.01 --gradient_accumulation_steps {parts}", Fixed)
    t.model.double()
    before = flat(t.model.parameters())
    t.train()
    return flat(t.model.parameters()) - before


@pytest.fixture(scope="module")
def two(request, tmp_path_factory):
    """The change in each of two processes, by objective."""
    folder = tmp_path_factory.mktemp("two")
    names = NAMES if request.config.getoption("--slow") else FAST
    start = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    code, _, err = launched(*start, __file__, folder, *names, PYTHONPATH=str(HERE.parents[1]))
    assert code == 0, err[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in "01"]


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_two_processes_of_two_micro_batches_update_like_one_of_one(two, tmp_path, name):
    one = updates(tmp_path, name, 16, 1)
    assert one.norm() > 0 and torch.equal(two[0][name], two[1][name])
    # Rounded at 1e-16, a million terms are off by 1e-10 at worst. A mean over tokens (dapo, the KL
    # term of trpa) or mixed groups (real_bce) of unlike micro-batches is not the mean of theirs.
    apart = (one - two[0][name]).norm() / one.norm()
    assert (apart <= 1e-10) == (name not in ("real_bce", "dapo", "trpa")), apart


# ---- The command ---------------------------------------------------------------------------------


def test_a_group_cut_by_a_micro_batch_is_refused_in_one_line(tmp_path):
    flags = "--num_generations 8 --per_device_train_batch_size 12 --steps_per_generation 2"
    code, _, err = launched(HERE / "trl_real.py", *f"{CPU} {flags} --output_dir {tmp_path}".split())
    assert code == 2 and "Traceback" not in err
    assert err.splitlines()[-1] == ("trl_real.py: error: --num_generations must divide "
                                    "--per_device_train_batch_size (groups)")


@pytest.mark.parametrize("flags, said", [
    ("--objective reel", "--objective: one of real"), ("--tau 0", "--tau"),
    ("--dataset no/such.jsonl", "no/such.jsonl"), ("--answer_column solution", "answer_column"),
    ("--num_generations 1", "at least 2"), ("--rollouts 8", "--rollouts")])
def test_other_mistakes_are_refused_too(tmp_path, flags, said):
    with pytest.raises((ValueError, OSError), match=said):  # the command: one line, exit code 2
        trainer(tmp_path, flags)


@pytest.mark.parametrize("processes, parts", [(1, 32), (4, 8), (8, 4)])
def test_the_commands_of_the_readme_are_the_paper_s(monkeypatch, processes, parts):
    """128 questions of 8 rollouts in 4 updates on 1, 4 and 8 GPUs; settings of the paper preset."""
    monkeypatch.setattr(trl.GRPOConfig, "world_size", processes)
    argv = ["--config", str(HERE / "paper.yaml"), "--gradient_accumulation_steps", str(parts)]
    own, args, _ = PARSER().parse_args_and_config([*argv, *CPU.split()])
    assert args.per_device_train_batch_size * processes * parts == 128 * 8 / 4
    assert args.steps_per_generation == 4 * parts and args.num_generations == 8
    paper = real.Config(**real.PRESETS["paper"])
    assert own.model == paper.model and own.dataset == paper.dataset
    same = {"temperature": "temperature", "max_completion_length": "max_new_tokens",
            "learning_rate": "lr", "adam_beta2": "beta2", "max_grad_norm": "grad_clip",
            "warmup_steps": "warmup"}
    assert {a: getattr(args, a) for a in same} == {a: getattr(paper, b) for a, b in same.items()}
    assert args.weight_decay == 0.01 and args.max_steps == paper.steps * paper.mini_batches


@pytest.mark.slow
def test_lora_learns_in_two_processes_under_accelerate(tmp_path):
    """The first and the last 512 rollouts of 12 steps: 64 questions, a standard error below .06."""
    start = ("-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 "
             "--mixed_precision no --dynamo_backend no")
    flags = (f"{CPU} --output_dir {tmp_path} --use_peft true --lora_target_modules all-linear "
             "--lora_dropout 0 --learning_rate 1e-3 --warmup_steps 8 "
             "--lr_scheduler_type constant_with_warmup --max_steps 48 --logging_steps 16 "
             "--per_device_train_batch_size 16 --gradient_accumulation_steps 1 "
             "--steps_per_generation 4 --max_completion_length 48")
    code, out, err = launched(*start.split(), HERE / "trl_real.py", *flags.split())
    assert code == 0, err[-3000:]
    first, *_, last = [float(x) for x in re.findall(r"'reward': '([^']+)'", out)]
    assert last > first + 0.12


if __name__ == "__main__":  # in each of two processes
    folder, *names = sys.argv[1:]
    changes = {name: updates(folder, name, 4, 2) for name in names}
    torch.save(changes, Path(folder) / f"{os.environ['RANK']}.pt")
