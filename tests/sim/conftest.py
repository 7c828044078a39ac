"""A world for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sim.world import World, world


@pytest.fixture(name="world")
def _world() -> Iterator[World]:
    with world() as made:
        yield made
