"""The scripts of tests/experiments run: what they print needs time, a card or other packages."""

import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXPERIMENTS = Path(__file__).parent / "experiments"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXPERIMENTS))
    sys.modules.pop("runlog", None)  # the assignments point theirs at logs of their own
    spec.loader.exec_module(module)
    sys.path.remove(str(EXPERIMENTS))
    return module


def test_the_questions_to_a_card_end_in_one_line_of_json():
    command = [sys.executable, EXPERIMENTS / "card.py", "--dry"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads(out.splitlines()[-1])
    assert {"limits", "embedded", "0.5b_step", "speed", "memory_0.5b", "memory_1.5b",
            "memory_paper"} <= found.keys()
    assert all(row["sample"] > 0 and row["generate"] > 0 for row in found["speed"].values())
    assert found["0.5b_step"]["tokens"] == 4 * 8 * (200 + 12) and found["memory_paper"]["card"]


def test_the_benchmark_runs_a_step():
    (seconds, tokens), = load("benchmark").ours(1)
    assert seconds > 0 and 16 * 8 < tokens <= 16 * 8 * 48


@pytest.fixture
def study(tmp_path, monkeypatch):
    study = load("study")
    monkeypatch.setattr(study.runlog, "LOGS", tmp_path)
    monkeypatch.setattr(study.real, "OBJECTIVES", study.real.OBJECTIVES)
    return study


def test_a_study_run_becomes_a_line_of_its_log_and_is_read_again(study, monkeypatch):
    monkeypatch.setattr(study, "BUDGET", dict(steps=2, eval_every=1, eval_samples=1, eval_limit=4,
                                              prompts=4, mini_batches=2, warmup=0))
    monkeypatch.setattr(study, "OUTCOME", (2,))
    settings = study.TAUS["frozen credit"] | {"lr": 1e-4, "flip": 0.2}
    rows, seconds = study.execute(("sweep16", "frozen credit", 0, settings))
    assert study.execute(("sweep16", "frozen credit", 0, settings), until=0) is None
    study.runlog.append("study", rows, study.KEYS, experiment="sweep16", arm="frozen credit",
                        seed=0, config=settings, seconds=seconds)
    (read,), = study.read("sweep16").values()
    assert [row["step"] for row in read] == [1, 2] and "pass@1" not in read[0]
    assert study.outcome(read) == read[1]["pass@1"] == pytest.approx(rows[1]["pass@1"], rel=5e-5)
    for row in rows:  # AdamW's first step moves every weight by the rate
        assert len(row["update_norms"]) == 2 and all(x > 0 for x in row["update_norms"] if x)
    moved = next(x for row in rows for x in row["update_norms"] if x)
    size = sum(p.numel() for p in study.real.load_model(study.real.TINY)[0].parameters())
    assert moved == pytest.approx(1e-4 * size**0.5, rel=0.1)
    assert study.real.update.__module__ == study.real.Run.log.__module__ == "real"


def test_the_plan_is_made_of_settings_that_exist(study, monkeypatch):
    monkeypatch.setattr(study, "swept", lambda updates, method: {1e-5: 0.1, 5e-5: 0.3, 1e-4: 0.2})
    groups = list(study.plan())
    runs = [run for group in groups for run in group]
    assert len({run[:3] for run in runs}) == len(runs)
    for *_, settings in runs:
        study.real.Config(**{k: v for k, v in settings.items()
                             if k not in ("flip", "epochs", "age")})
    monkeypatch.setattr(study, "swept", lambda updates, method: {1e-5: 0.1, 5e-5: 0.2, 1e-4: 0.3})
    (_, arm, *_), = study.at_an_end(16, {"GSPO": {}})
    assert arm == "GSPO at 0.0002"


def test_what_the_study_skips_gives_no_credit(study):
    """A group that is all right or all wrong, under the objectives of SILENT: no push at all."""
    torch.manual_seed(0)
    old_logp = -torch.rand(2, 4, 5)
    batch = {"old_logp": old_logp, "ref_logp": old_logp + 0.1,
             "mask": torch.ones_like(old_logp) > 0,
             "labels": torch.tensor([[True] * 4, [False] * 4])}
    for name in study.SILENT:
        config = study.real.Config(objective=name)
        assert not study.real.credit(old_logp + 0.3, batch, config)[1].any()


def test_kl_on_mixed_groups_is_eq_1_there_and_nothing_elsewhere(study):
    torch.manual_seed(0)
    old_logp = -torch.rand(3, 4, 5, dtype=torch.float64)
    logp, mask = old_logp + 0.2 * torch.randn_like(old_logp), torch.ones_like(old_logp) > 0
    labels = torch.tensor([[True] * 4, [False] * 4, [True, False, False, True]])
    given = dict(logp=logp, old_logp=old_logp, mask=mask, labels=labels)
    added = (study.real.OBJECTIVES["grpo_kl_mixed"](**given, ref_logp=old_logp)
             - study.real.grpo(**given))
    d = (old_logp - logp)[2]
    assert added.item() == pytest.approx(0.001 * (d.exp() - d - 1).mean().item() / 3, rel=1e-9)


def test_frozen_credit_is_that_of_a_policy_that_did_not_move(study):
    torch.manual_seed(0)
    old_logp = -torch.rand(1, 4, 5, dtype=torch.float64)
    batch = {"old_logp": old_logp, "mask": torch.ones_like(old_logp) > 0,
             "labels": torch.tensor([[True, False, False, True]])}
    push = [study.real.credit(logp, batch, study.real.Config(objective=name))[1] for logp, name in (
        (old_logp, "real"), (old_logp - 1, "real_frozen"), (old_logp - 1, "real"))]
    assert torch.allclose(push[0], push[1], rtol=1e-12)  # one more rounding of the sum
    assert not torch.allclose(push[0], push[2], rtol=0.01)


def test_the_sum_as_logit_is_the_mean_times_the_length(study):
    torch.manual_seed(0)
    old_logp = -torch.rand(1, 4, 5, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    s = torch.where(mask, 0.2 * torch.randn(4, 5, dtype=torch.float64), 0.0)
    z = s.sum(-1) / 0.5
    expected = torch.log1p((-z[:2]).exp().sum()) + torch.log1p(z[2:].exp().sum())
    loss = study.real.OBJECTIVES["real_sum"](
        old_logp + s, old_logp, mask[None], torch.tensor([[True, True, False, False]]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_regimes_repeat_updates_and_use_the_policy_of_steps_before(study, monkeypatch):
    """Two epochs: twice the updates of the same mini-batches. Age 1: rollouts and log pi_old of a
    step are those of the weights before the last step."""
    seen, real = [], study.real
    update = real.update

    def look(model, optimizer, batch, config):
        done = update(model, optimizer, batch, config)
        seen.append((batch["completions"], done["s_bar"].abs().max().item()))
        return done
    monkeypatch.setattr(real, "update", look)
    monkeypatch.setattr(study, "SILENT", ())
    monkeypatch.setattr(study, "BUDGET", dict(steps=3, eval_every=0, prompts=4, mini_batches=2))
    rows, _ = study.execute(("eq9", "two", 0, {"objective": "real", "lr": 1e-3, "epochs": 2}))
    assert [len(row["update_norms"]) for row in rows] == [4, 4, 4]
    assert all(torch.equal(seen[i][0], seen[i + 2][0]) for i in (0, 1, 4, 5, 8, 9))
    assert all(seen[i][1] == 0 for i in (0, 4, 8)) and seen[2][1] > 0
    for tokens in (4096, 100):  # a mini-batch in one micro-batch, and in several
        seen.clear()
        study.execute(("eq9", "old", 0, {"objective": "real", "lr": 1e-3, "age": 1,
                                         "micro_batch_tokens": tokens}))
        assert seen[0][1] == 0 and seen[2][1] > 0 and seen[4][1] > 0 and seen[1][1] > 0


@pytest.mark.parametrize("age", [0, 1])
def test_the_reference_is_the_starting_model_in_every_regime(study, monkeypatch, age):
    """Not the policy that sampled, which is another one from the second step on."""
    refs, olds, real = [], [], study.real
    plain = real.load_model(real.TINY)[0]
    update = real.update

    def look(model, optimizer, batch, config):
        with torch.no_grad():
            expected = all_logprobs(plain, batch, config)
        refs.append((batch["ref_logp"] - expected).abs().max().item())
        olds.append((batch["old_logp"] - expected).abs().max().item())
        return update(model, optimizer, batch, config)
    all_logprobs = real.all_logprobs
    monkeypatch.setattr(real, "update", look)
    monkeypatch.setattr(study, "BUDGET", dict(steps=3, eval_every=0, prompts=4, mini_batches=2))
    study.execute(("eq9", "kl", 0, {"objective": "real", "lr": 1e-3, "kl_ref": 0.1, "age": age}))
    assert max(refs) == 0 and olds[0] == 0 and olds[-1] > 0


def test_other_problems_are_in_neither_file_and_flipped_labels_are_every_objective_s(study):
    study.other_problems(study.runlog.LOGS / "other.jsonl")
    other = [json.loads(line) for line in (study.runlog.LOGS / "other.jsonl").open()]
    known = {json.loads(line)["problem"] for name in ("train", "test")
             for line in (study.ROOT / "tiny" / f"{name}.jsonl").open()}
    assert len({row["problem"] for row in other} - known) == len(other) == 256
    texts = [f"</think> \\boxed{{{row['answer']}}}" for row in other]
    label = study.flipping(0.2, seed=0)
    labels = [label(row, [text] * 8) for row, text in zip(other, texts)]
    assert labels == [label(row, [text] * 8) for row, text in zip(other, texts)]
    assert 0.17 < sum(not x for group in labels for x in group) / 2048 < 0.23  # 3.4 deviations


def test_verdicts_by_hand(study):
    """Holm: the smallest of four p times 4, the next times 3, and never less than one before."""
    spread = [-0.02, -0.01, 0.0, 0.01, 0.02]
    family = {"far": [0.2 + x for x in spread], "near": [x / 10 for x in spread],
              "vague": [0.012 + x for x in spread], "small": [0.005 + x / 50 for x in spread]}
    found = {name: rest for name, *rest in study.judge(family)}
    assert {name: verdict for name, (*_, verdict) in found.items()} == {
        "far": "different", "near": "equal", "vague": "undecided",
        "small": "different, within the band"}
    t = 0.2 / (statistics.stdev(spread) / 5**0.5)  # 4 degrees of freedom: p in closed form
    p = 1 - t * (t * t + 6) / (t * t + 4) ** 1.5
    assert found["far"][2] == pytest.approx(3 * p, rel=1e-6)  # after "small"


@pytest.mark.parametrize("table", ["overview", "verdicts", "atlas_table", "lengths", "first"])
def test_the_studys_tables_in_the_readme_come_from_the_logs(table, capsys):
    getattr(load("study"), table)()
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") > 2 and printed in (EXPERIMENTS / "README.md").read_text()


def test_random_labels_are_shuffled_within_a_mini_batch(tmp_path, monkeypatch):
    """The control of five_seeds: as many right ones, in other places."""
    five, seen = load("five_seeds"), []
    monkeypatch.setattr(five.runlog, "LOGS", tmp_path / "logs")
    import real

    update, config = real.update, real.Config

    def look(model, optimizer, batch, settings):
        seen.append(batch["labels"])
        return update(model, optimizer, batch, settings)
    monkeypatch.setattr(real, "update", look)
    monkeypatch.setattr(real, "Config", lambda **more: config(
        steps=1, eval_every=0, prompts=4, mini_batches=2, **more))
    five.child("random labels", 0, str(tmp_path / "run"), 0)
    run, = five.runlog.read("five_seeds")
    assert run["arm"] == "random labels" and run["rows"][0]["step"] == 1
    right = sum(int(labels.sum()) for labels in seen)
    assert right == round(run["rows"][0]["reward"] * 32)


def test_a_run_is_drawn_while_it_grows(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"step": 1, "pass@1_before": 0.3, "reward": 0.2, "s_positive": None, "max_weight": 1.0},
            {"step": 2, "pass@1": 0.4, "reward": 0.3, "s_positive": 0.1, "max_weight": 1.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Path(__file__).parent / "experiments" / "draw_run.py"
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "metrics.png").stat().st_size > 10_000
