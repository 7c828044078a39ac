"""The model registry on a real sqlite store: registered by runs, resolved by name, alias or version."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.delivery import replay
from pipeline.tracking.journal import Header, journals
from pipeline.tracking.queries import opened, resolve
from pipeline.tracking.store import MlflowStore
from pipeline.tracking.tracker import open_tracker
from tests.support.processes import free_port

pytestmark = pytest.mark.integration


def train(tracking: TrackingConfig, uri: str, loss: float, name: str = "flowers") -> str:
    """A training run that registers its model; its id."""
    tracker = open_tracker(tracking, job="train", run_name="n")
    tracker.register_model(name, uri, {"latentloom.figure.loss": str(loss)})
    tracker.finish("FINISHED")
    return str(tracker.run_id)


def test_versions_belong_to_their_runs_and_are_found_by_every_name(tracking: TrackingConfig) -> None:
    first, second = train(tracking, "s3://b/one", 0.5), train(tracking, "/disk/two", 0.25)
    newest = resolve("models:/flowers@latest", tracking.uri)
    assert (newest.version, newest.uri, newest.run_id) == (2, "/disk/two", second)
    assert newest.tags["latentloom.figure.loss"] == "0.25"
    assert resolve("models:/flowers/1", tracking.uri).uri == "s3://b/one"
    assert resolve("models:/flowers/latest", tracking.uri) == newest
    with opened(tracking.uri) as registry:
        versions = registry.versions("flowers")
        assert [(v.version, v.run_id) for v in versions] == [(1, first), (2, second)]
        registry.point(versions[0], "production", {"why": "good"})
    found = resolve("models:/flowers@production", tracking.uri)
    assert (found.version, found.aliases, found.tags["why"]) == (1, ("production",), "good")


def test_a_version_is_registered_once_per_run_and_model(
    tracking: TrackingConfig, header: Callable[..., Header]
) -> None:
    store = MlflowStore(tracking.uri)
    run_id = store.create_run(header()).run_id
    for uri in ("s3://b/x", "s3://b/x", "s3://b/y", "s3://b/x"):
        store.register_model(run_id, "m", uri, {})
    with opened(tracking.uri) as registry:
        assert [v.uri for v in registry.versions("m")] == ["s3://b/x", "s3://b/y"]


def test_a_registration_waits_for_a_store_that_is_down(tracking: TrackingConfig) -> None:
    down = tracking.model_copy(
        update={"uri": f"http://127.0.0.1:{free_port()}", "close_timeout_s": 5.0},
    )
    tracker = open_tracker(down, job="train", run_name="n")
    tracker.register_model("late", "s3://b/late", {})
    tracker.finish("FINISHED")
    assert len(journals(Path(tracking.journal_dir))) == 1
    (run_id,) = replay(tracking.journal_dir, tracking.uri, any_server=True).runs
    assert resolve("models:/late@latest", tracking.uri).run_id == run_id


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        ("models:/flowers@absent", "known of flowers: 1"),
        ("models:/flowers/7", "known of flowers: 1"),
        ("models:/none@latest", "there is no registered model 'none'"),
        ("models:/flowers", "names no registered model"),
        ("models:/a@b@c", "names no registered model"),
    ],
)
def test_what_is_not_registered_is_named_with_what_is(tracking: TrackingConfig, reference: str, why: str) -> None:
    train(tracking, "s3://b/one", 0.5)
    with pytest.raises(InputError, match=r"model\.uri") as caught:
        resolve(reference, tracking.uri)
    assert why in str(caught.value)


def test_a_registry_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no tracking store"):
        resolve("models:/a@b", f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(InputError, match="registry cannot be used"):
        resolve("models:/a@b", f"http://127.0.0.1:{free_port()}")
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]
