"""Draw a run's log, also while it is at work: FOLDER/metrics.jsonl -> FOLDER/metrics.png.

    python tests/experiments/draw_run.py runs/real      # needs matplotlib
"""

import json
import math
import sys
from pathlib import Path

PANELS = [  # title, unit, {key of metrics.jsonl: its name in the legend}
    ("Pass@1 on held-out problems", "share", {"pass@1": "Pass@1"}),
    ("A step's rollouts and groups", "share", {
        "reward": "right rollouts", "mixed": "mixed groups", "cut_off": "cut-off rollouts"}),
    ("Length of a rollout", "tokens", {"response_length": "mean"}),
    ("Entropy of the policy", "nats", {"entropy": "estimate"}),
    (r"Score $\bar s$ before an update", "nats a token", {
        "s_positive": "right rollouts", "s_negative": "wrong rollouts"}),
    ("Largest push on a rollout, $|W|$", "", {"max_weight": "largest"}),
    ("Gradient norm before clipping", "", {"grad_norm": "largest of the updates"}),
    ("Duration of a step", "s", {"seconds": "with its validation"})]
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":")]  # told apart without colour too


def draw(folder):
    from matplotlib.figure import Figure
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    figure = Figure((14, 6), layout="constrained")
    for axes, (title, unit, keys) in zip(figure.subplots(2, 4).flat, PANELS):
        for (color, style), (key, name) in zip(STYLES, keys.items()):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if key == "pass@1" and rows:
                points.insert(0, (0, rows[0].get("pass@1_before", math.nan)))
            if points:
                marker = "o" if len(points) < 20 else None
                axes.plot(*zip(*points), style, color=color, marker=marker, label=name)
        axes.set(title=title, ylabel=unit, xlabel="training step", xlim=(0, None))
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend()
        if unit == "share":
            axes.set_ylim(-0.03, 1.03)
    figure.savefig(folder / "metrics.png", dpi=100)
    print(folder / "metrics.png")


if __name__ == "__main__":
    draw(Path(sys.argv[1] if sys.argv[1:] else "runs/real"))
