"""Tests never look for a hub; long tests run with --slow, the notebook with --notebook."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two threads on a busy machine wait for each other far longer


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long tests: 20 kills, soak")
    parser.addoption(
        "--notebook", action="store_true", help="also execute the notebook, some minutes"
    )


def pytest_collection_modifyitems(config, items):
    for name in ("slow", "notebook"):
        for item in items:
            if item.get_closest_marker(name) and not config.getoption(f"--{name}"):
                item.add_marker(pytest.mark.skip(reason=f"needs --{name}"))
