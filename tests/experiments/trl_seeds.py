"""Does REAL inside TRL (tests/scale_out/trl_real.py) reach the Pass@1 of real.py? The tiny model.

    python tests/experiments/trl_seeds.py        # 5 seeds; runs that the log holds are not repeated

Both engines take 80 steps of 16 questions x 8 rollouts, 4 updates each; both final models are then
scored by `real.validate`, 16 samples of each held-out problem. Log: logs/trl_seeds.json, here.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

HERE = Path(__file__).resolve().parent
ROOT, LOG = HERE.parents[1], HERE / "logs" / "trl_seeds.json"
sys.path.insert(0, str(ROOT))
import real

COMMANDS = {
    "real.py": "real.py --steps 80 --prompts 16 --group_size 8 --mini_batches 4 --lr 5e-5 "
               "--warmup 20 --beta2 0.95 --weight_decay 0.01 --max_new_tokens 48 --eval_every 0 "
               "--save_every 80",
    "TRL": "tests/scale_out/trl_real.py --max_steps 320 --per_device_train_batch_size 32 "
           "--num_generations 8 --steps_per_generation 4 --gradient_accumulation_steps 1 "
           "--learning_rate 5e-5 --warmup_steps 20 --lr_scheduler_type constant_with_warmup "
           "--adam_beta2 0.95 --weight_decay 0.01 --max_completion_length 48 --use_cpu true "
           "--bf16 false --gradient_checkpointing false --report_to none --logging_steps 16",
}


def run(engine, seed):
    """Pass@1 on the held-out problems after training, and the seconds that training took."""
    with tempfile.TemporaryDirectory() as folder:
        began, where = time.time(), ["--seed", str(seed), "--output_dir", f"{folder}/run"]
        subprocess.run([sys.executable, *COMMANDS[engine].split(), *where], cwd=ROOT, check=True)
        seconds = time.time() - began
        model, tokenizer = real.load_model(Path(folder) / "run" / "model")
        config = real.Config(seed=seed)
        problems = real.load_problems(tokenizer, config, real.TINY, "test")
        score = round(real.validate(model, tokenizer, problems, config), 4)
        return {"engine": engine, "seed": seed, "pass@1": score, "seconds": round(seconds)}


def interval(values):
    """Mean and the half-width of its 95% interval, by Student's t."""
    half = t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    return f"mean {mean(values):.3f} +- {half:.3f}"


def main(seeds):
    rows = json.loads(LOG.read_text()) if LOG.exists() else []
    for seed in range(seeds):
        for engine in COMMANDS:
            if not any((row["engine"], row["seed"]) == (engine, seed) for row in rows):
                rows.append(run(engine, seed))
                LOG.parent.mkdir(exist_ok=True)
                LOG.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    score = {e: [row["pass@1"] for row in rows if row["engine"] == e] for e in COMMANDS}
    score["TRL - real.py"] = [round(b - a, 4) for a, b in zip(*score.values())]  # seed by seed
    for name, values in score.items():
        print(f"{name:14}", values, interval(values) if len(values) > 1 else "")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
