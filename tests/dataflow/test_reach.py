"""A cluster that is named and does not answer: said within seconds, where Ray would try for minutes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from pipeline.dataflow import cluster
from pipeline.dataflow.cluster import ClusterConfig, ensure_ray
from pipeline.errors import InputError


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
