"""Tests never look for a hub; long tests run with --slow."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on a busy machine wait for each other far longer


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long tests: 20 kills, soak")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))
