"""Fixtures of the tracking tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.tracking.journal import Header
from tests.tracking.fake_tracking_store import build_header


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials or defaults of the person who runs the tests, and none left behind by a store."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for name in ("USERNAME", "PASSWORD", "TOKEN", "AUTH", "AWS_SIGV4", "URI"):
        # setenv first, so that what the code under test sets is undone as well
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")


@pytest.fixture
def header() -> Callable[..., Header]:
    """Builds journal headers; a newer owner has a greater `number`."""
    return build_header
