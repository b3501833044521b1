"""The tables of the README files are what the committed logs say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("readme, folder, call", [
    ("README.md", "tests/experiments", "import five_seeds; five_seeds.table()"),
    ("tests/experiments/README.md", "tests/experiments", "import study; study.overview()"),
    ("tests/assignments/README.md", "tests/assignments", "import ideas; ideas.table()")])
def test_table_comes_from_the_logs(readme, folder, call):
    code = f"import sys; sys.path[:0] = [{str(ROOT / folder)!r}, {str(ROOT)!r}]; {call}"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             check=True).stdout.strip()
    assert printed.count("\n") >= 4 and printed in (ROOT / readme).read_text()
