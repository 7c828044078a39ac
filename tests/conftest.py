"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says nothing on a machine that does other things, too.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Real servers (S3, PostgreSQL, MLflow) as fixtures: started when the first test asks for them.
pytest_plugins = ("tests.support.servers",)

# Tests never talk to a hub and never oversubscribe the cores they share.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs and odd files kept beside the repository; skips where they are absent."""
    path = Path(os.environ.get("LATENTLOOM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (path / "photos" / "metadata.jsonl").is_file():
        pytest.skip(f"no real images at {path} (set LATENTLOOM_TEST_DATA to a folder with photos/ and tricky/)")
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=50, help="how many processes a soak test kills")
    parser.addoption("--update-golden", action="store_true", help="accept changed golden files")
    parser.addoption("--kill-seed", type=int, default=0, help="seed of a soak test")
