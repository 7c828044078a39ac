"""What a cluster can never hold together is refused at the start: Ray would wait for ever."""

from __future__ import annotations

import pytest

from pipeline.dataflow.resources import Kind, check_gpus, check_nodes
from pipeline.errors import ConfigError


def test_processes_that_fit_no_node_are_refused() -> None:
    nodes = [{"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}]
    check_nodes([Kind("actor", 4.0, 1.0), Kind("decode", 64.0)], nodes, "encode")
    # Enough of both in the cluster, and on no node.
    with pytest.raises(ConfigError, match=r"No node has room for actor, which takes 6 CPUs and 1 GPUs") as caught:
        check_nodes([Kind("actor", 6.0, 1.0)], nodes, "encode")
    assert "64 CPUs and 0 GPUs" in str(caught.value)
    with pytest.raises(ConfigError, match="it would wait for ever"):
        check_nodes([Kind("actor", 1.0, 1.0)], [{"CPU": 64.0}], "encode")
    with pytest.raises(ConfigError, match="offer nothing"):
        check_nodes([Kind("read", 0.25)], [], "encode")


NODES = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 64.0}]


@pytest.mark.parametrize(
    "processes",
    [
        [(0.5, 4)],
        [(1.0, 2)],
        [(0.6, 2), (0.25, 2), (0.15, 1)],
        [(0.4, 2), (0.6, 2)],
        [(0.3, 6)],
    ],
)
def test_parts_that_fill_gpus_find_room(processes: list[tuple[float, int]]) -> None:
    check_gpus([(Kind(f"kind {i}", 1.0, part), count) for i, (part, count) in enumerate(processes)], NODES, "key")


@pytest.mark.parametrize(
    "processes",
    [
        [(0.6, 3)],  # 1.8 of 2 in sum, and no GPU holds two of them
        [(2.0, 1)],  # two GPUs, but on no one node
        [(0.3, 7)],
        [(0.5, 1), (0.8, 2)],
    ],
)
def test_parts_that_find_no_room_are_refused(processes: list[tuple[float, int]]) -> None:
    with pytest.raises(ConfigError, match="The GPUs cannot hold all at once") as caught:
        check_gpus([(Kind(f"kind {i}", 1.0, part), count) for i, (part, count) in enumerate(processes)], NODES, "key")
    assert "it would wait for ever" in str(caught.value)


def test_cpus_beside_the_gpus_count() -> None:
    """Enough CPUs in the cluster, but not where the GPUs are."""
    check_gpus([(Kind("actor", 8.0, 0.5), 2)], NODES, "key")
    with pytest.raises(ConfigError, match=r"takes 0\.5 of one and 8 CPUs beside it"):
        check_gpus([(Kind("actor", 8.0, 0.5), 3)], NODES, "key")
