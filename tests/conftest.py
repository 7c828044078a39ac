"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

from pipeline.store.ledger.ledger import claimed

# How long an example takes says nothing on a machine that does other things, too.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Real servers (S3, PostgreSQL, MLflow) as fixtures: started when the first test asks for them.
pytest_plugins = ("tests.support.servers",)

# Tests never talk to a hub and never oversubscribe the cores they share.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")


def _this_checkouts_package() -> None:
    """`import latentloom` is this checkout's pipeline/latentloom, whichever is installed, if any."""
    place = Path(__file__).parents[1] / "pipeline" / "latentloom" / "__init__.py"
    spec = importlib.util.spec_from_file_location("latentloom", place)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["latentloom"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["latentloom"])


_this_checkouts_package()


# Markers of what needs processes, servers, a cluster or patience: all that --quick leaves out.
HEAVY = ("integration", "ray", "slow", "s3", "soak")
# A test that asks for one of these talks to a server or a database, whether it is marked so or not.
SERVERS = frozenset(
    {"radosgw", "postgres", "mlflow_stack", "s3_proxy", "s3_environment", "s3_server", "tracking", "hub_server"}
)
_HEAVY_FILE = re.compile(rf"^pytestmark = .*\bpytest\.mark\.({'|'.join(HEAVY)})\b", re.MULTILINE)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs and odd files kept beside the repository; skips where they are absent."""
    path = Path(os.environ.get("LATENTLOOM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (path / "photos" / "metadata.jsonl").is_file():
        pytest.skip(f"no real images at {path} (set LATENTLOOM_TEST_DATA to a folder with photos/ and tricky/)")
    return path


@pytest.fixture(autouse=True)
def _no_ray_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A Ray that a job started in the tests' process ends with its test: the next one may ask for another."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and request.node.get_closest_marker("ray") is None and ray.is_initialized():
        ray.shutdown()


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that died in the tests' own process belongs to one that lives on: nobody waits for a sign of its life."""
    monkeypatch.setattr("pipeline.runs.claimed", partial(claimed, patience_s=0.0))


@pytest.fixture
def local_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's `get` for what answers at once (`tests.support.monitor`); processes that cannot start do not wait."""
    monkeypatch.setattr("ray.get", lambda answer, timeout=None: answer)
    monkeypatch.setattr("pipeline.dataflow.monitor._PAUSE_S", 0.0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=50, help="how many processes a soak test kills")
    parser.addoption("--update-golden", action="store_true", help="accept changed golden files")
    parser.addoption("--kill-seed", type=int, default=0, help="seed of a soak test")
    parser.addoption("--quick", action="store_true", help=f"leave out tests marked {', '.join(HEAVY)}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --quick, files of heavy tests are not even imported: their imports are half of what collecting costs."""
    if not config.getoption("--quick") or not collection_path.match("test_*.py"):
        return None
    return True if _HEAVY_FILE.search(collection_path.read_text(encoding="utf-8")) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if SERVERS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.integration)
    if not config.getoption("--quick"):
        return
    heavy: list[pytest.Item] = []
    light: list[pytest.Item] = []
    for item in items:
        (heavy if any(item.get_closest_marker(name) for name in HEAVY) else light).append(item)
    config.hook.pytest_deselected(items=heavy)
    items[:] = light
