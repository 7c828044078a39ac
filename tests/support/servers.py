"""Fixtures: real servers, one of each for all tests of a process; a test that needs one that is absent is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.tracking.config import TrackingConfig
from tests.support.fault_proxy import FaultProxy
from tests.support.hub import Hub, served_hub
from tests.support.mlflow_server import BasicAuth, MlflowServer
from tests.support.postgres import Postgres, bin_dir
from tests.support.radosgw import Radosgw, missing_programs


@pytest.fixture(scope="session")
def radosgw() -> Iterator[Radosgw]:
    """A Ceph object gateway; tests make buckets of their own (`make_bucket`)."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (.ci/install-debian installs them)")
    server = Radosgw()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server; tests make databases of their own (`database`)."""
    if bin_dir() is None:
        pytest.skip("PostgreSQL is not installed (.ci/install-debian installs it)")
    server = Postgres()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def mlflow_stack(
    radosgw: Radosgw, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """MLflow as it is run in earnest: PostgreSQL, users and passwords, artifacts in S3. It is up at the start.

    A test that kills or freezes it leaves it up again (`server.start()`, `server.thaw()`).
    """
    pytest.importorskip("flask_wtf", reason="mlflow's user management is not installed: pip install 'mlflow[auth]'")
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed: pip install 'psycopg[binary]'")
    server = MlflowServer(
        tmp_path_factory.mktemp("mlflow-stack"),
        backend_uri=postgres.database("mlflow"),
        artifacts_uri=f"s3://{radosgw.make_bucket()}/mlflow",
        auth=BasicAuth(postgres.database("mlflow_auth")),
        environment={
            **radosgw.environment(),
            "MLFLOW_S3_ENDPOINT_URL": radosgw.endpoint,
            # Ceph does not know the checksums that AWS asks for.
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        },
    )
    server.start()
    yield server
    server.kill()


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
def s3_proxy(radosgw: Radosgw) -> Iterator[FaultProxy]:
    """A connection to the store that can be made bad; without rules it is a good one."""
    with FaultProxy("127.0.0.1", radosgw.port) as proxy:
        yield proxy


@pytest.fixture
def s3_environment(radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch) -> Iterator[Radosgw]:
    """This process and those it starts use the store; the clients they keep are those of this store."""
    use_store(monkeypatch, radosgw.environment())
    yield radosgw
    forget_clients()


def use_store(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Point this process at a store, and forget clients of another: a client keeps the endpoint it was made with."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(Path("/nonexistent/config")))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(Path("/nonexistent/credentials")))
    forget_clients()


def forget_clients() -> None:
    """Make the next use of S3 in this process connect anew."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub of models and datasets, which takes the place of the public one, with an empty cache."""
    from huggingface_hub import HfFileSystem, constants

    with served_hub() as hub:
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        HfFileSystem.clear_instance_cache()
        yield hub
        HfFileSystem.clear_instance_cache()
