"""The same graders for Gradescope.

    python tests/assignments/gradescope.py [autograder.zip]             # build the zip to upload
    python tests/assignments/gradescope.py grade SUBMISSION RESULTS     # what it runs for a student

Each test has its points in an entry that students see after publication, as its message may quote a
hidden test, and an entry without points, shown at once, of the part that they have themselves.
"""

import json
import os
import stat
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HIDDEN = "### BEGIN HIDDEN TESTS"
FILES = ("real.py", "requirements.txt", "tiny/*", "tests/assignments/graders.py",
         "tests/assignments/gradescope.py", "tests/assignments/source/real/real.ipynb")
SCRIPTS = {
    "setup.sh": """#!/usr/bin/env bash
# Runs once, when Gradescope builds its image: Python with a torch that needs no GPU.
set -e
apt-get update && apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install torch==TORCH --index-url https://download.pytorch.org/whl/cpu
/autograder/venv/bin/pip install -r /autograder/source/requirements.txt nbformat pytest
""",
    "run_autograder": """#!/usr/bin/env bash
# Runs for each submission; Gradescope reads results/results.json.
cd "${AUTOGRADER:=/autograder}/source"
export HF_HUB_OFFLINE=1
"${PYTHON:-$AUTOGRADER/venv/bin/python}" tests/assignments/gradescope.py grade \\
    "$AUTOGRADER/submission" "$AUTOGRADER/results/results.json"
"""}


def build(out):
    """Write the zip. Its files keep their places, so that the graders find real.py."""
    pins = (ROOT / "requirements.txt").read_text()
    torch = next(line for line in pins.splitlines() if line.startswith("torch==")).split("==")[1]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(file for pattern in FILES for file in ROOT.glob(pattern)):
            archive.write(file, file.relative_to(ROOT))
        for name, text in SCRIPTS.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (stat.S_IFREG | 0o755) << 16  # executable
            archive.writestr(info, text.replace("TORCH", torch))
    print(f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB")


def attempt(source, name, variables):
    """What a test says: nothing if it passed."""
    import graders

    try:
        graders.execute(source, name, dict(variables))
    except BaseException as e:  # a submission may raise anything, SystemExit too
        return f"{type(e).__name__}: {e}"


def grade(submission, results):
    """Grade the one notebook in a folder. If it stops the process, the file says so already."""
    def write(output, tests):
        total = sum(test.get("score", 0) for test in tests)
        Path(results).write_text(json.dumps({"output": output, "score": total, "tests": tests}))

    write("Grading did not finish: a cell of the notebook ran too long or ended the process.", [])
    notebooks = sorted(Path(submission).glob("*.ipynb"))
    if len(notebooks) != 1:
        write(f"Submit one notebook, real.ipynb; {len(notebooks)} were found.", [])
        return
    metadata = Path(results).parents[1] / "submission_metadata.json"
    if metadata.exists():  # whose numbers these are is Gradescope's to say
        os.environ["STUDENT"] = json.loads(metadata.read_text())["users"][0]["email"]
    import graders
    try:
        variables = graders.work(graders.cells(notebooks[0]))
    except Exception as e:  # not a notebook
        write(f"{notebooks[0].name} cannot be read: {e}", [])
        return
    tests = []
    for name, points in graders.POINTS.items():
        source = graders.REFERENCE[name][0]
        shown = attempt(source.split(HIDDEN)[0], name, variables)
        whole = attempt(source, name, variables)
        tests += [{"name": f"{name}, the test in the notebook", "visibility": "visible",
                   "status": "failed" if shown else "passed", "output": shown or "passed"},
                  {"name": name, "visibility": "after_published", "score": 0 if whole else points,
                   "max_score": points, "output": whole or "passed"}]
    write("Points appear once grades are published.", tests)


if __name__ == "__main__":
    if sys.argv[1:2] == ["grade"]:
        grade(*sys.argv[2:])
    else:
        build(*sys.argv[1:] or ["autograder.zip"])
