"""Fixtures of the tracking tests."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.tracking.config import TrackingConfig
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


@pytest.fixture(scope="session")
def _empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipeline.tracking.store import MlflowStore

    path = tmp_path_factory.mktemp("sqlite") / "mlflow.db"
    MlflowStore(f"sqlite:///{path}").search(None, "")
    return path


@pytest.fixture
def tracking(_empty_sqlite: Path, tmp_path: Path) -> TrackingConfig:
    """A real sqlite store of its own (a copy of one with its tables made) and a journal folder."""
    folder = tmp_path / "tracking"
    folder.mkdir()
    shutil.copyfile(_empty_sqlite, folder / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{folder / 'mlflow.db'}", journal_dir=str(folder / "journal"))


@pytest.fixture
def header() -> Callable[..., Header]:
    """Builds journal headers; a newer owner has a greater `number`."""
    return build_header
