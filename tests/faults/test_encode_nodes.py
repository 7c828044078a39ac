"""A cluster of two nodes loses one in the middle of a run: the run ends by itself, with every row once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.storage import Root
from tests.faults.encode_world import IMAGES, arguments, check
from tests.support.jobs import run, start
from tests.support.ray_nodes import ray_nodes

pytestmark = pytest.mark.ray


def test_the_loss_of_a_node_is_survived(base: Path, tmp_path: Path) -> None:
    """Encoders on both nodes, as many as fit; the survivor alone has no room for them all, and still finishes."""
    output = tmp_path / "latents"
    with ray_nodes(2, 2) as cluster:
        env = {"RAY_ADDRESS": cluster.address}
        process = start("encode", *arguments(base, output, **{"encode.actors": 3}), cwd=base, env=env)
        root = Root(str(output))
        while process.poll() is None and not list(root.list("ledger")):
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()
        cluster.raylet(1).kill()
        _, errors = process.communicate(timeout=300)
        if process.returncode == 75:  # it may give up, but only in good order
            code, _, errors = run("encode", *arguments(base, output, **{"encode.actors": 1}), cwd=base, env=env)
            assert code == 0, errors
        else:
            assert process.returncode == 0, errors
    check(base, output)
    assert IMAGES
