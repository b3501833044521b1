"""The logs of the experiments: one file an experiment, one JSON line a run."""

import json
from pathlib import Path

LOGS = Path(__file__).resolve().parent / "logs"


def read(name):
    """The runs in logs/NAME.jsonl: dicts with experiment, arm, seed, config, seconds and rows."""
    file = LOGS / f"{name}.jsonl"
    runs = [json.loads(line) for line in file.open()] if file.exists() else []
    for run in runs:
        columns = run.pop("columns")
        run["rows"] = [{k: v for k, v in zip(columns, values) if v is not None}
                       for values in zip(*columns.values())]
    return runs


def append(name, rows, keys, **run):
    """Add a run with these keys of its rows, numbers rounded to 5 digits."""
    columns = {k: [rounded(row.get(k)) for row in rows] for k in keys}
    LOGS.mkdir(exist_ok=True)
    with (LOGS / f"{name}.jsonl").open("a") as out:
        out.write(json.dumps(rounded(run) | {"columns": columns}) + "\n")


def rounded(x):
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x
