"""A cluster that is named and does not answer: said within seconds, where Ray would try for minutes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import validate
from pipeline.dataflow import cluster
from pipeline.dataflow.cluster import ClusterConfig, ensure_ray
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.job import dry_run
from pipeline.errors import InputError
from tests.support.images import make_codec, make_images


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize("listens", [True, False])
def test_an_address_without_a_cluster_is_an_input_error(
    silent: str, monkeypatch: pytest.MonkeyPatch, scheme: str, listens: bool
) -> None:
    address = scheme + (silent if listens else "127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(cluster, "_ANSWER_S", 0.5)
    began = time.monotonic()
    with pytest.raises(InputError, match="No Ray cluster answers") as refused:
        ensure_ray(ClusterConfig())
    assert time.monotonic() - began < 20
    assert (refused.value.key, refused.value.value) == ("RAY_ADDRESS", address)


@pytest.mark.parametrize("address", ["local", "http://127.0.0.1:8265"])
def test_what_is_no_address_of_a_cluster_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(InputError, match="is no address of a Ray cluster"):
        ensure_ray(ClusterConfig())


def test_a_dry_run_with_something_to_do_meets_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "images", 3)
    settings = {"kind": "folder", "uri": str(tmp_path / "images")}
    image = {"resolution": 32, "multiple_of": 4}
    values = {"source": settings, "codec": {"path": str(make_codec(tmp_path / "codec"))}, "image": image}
    config = validate(EncodeJobConfig, {**values, "output": {"uri": str(tmp_path / "latents")}})
    assert dry_run(config).counts["to_encode"] == 3
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "_ANSWER_S", 0.5)
    with pytest.raises(InputError, match="No Ray cluster answers"):
        dry_run(config)
