"""Random worlds of fixed seeds; `make sim SEEDS=10000 FIRST=1000` tries as many others."""

from __future__ import annotations

import pytest

from tests.sim.seeds import duel, run

pytestmark = pytest.mark.integration

SEEDS, PER_TEST = 200, 10


@pytest.mark.parametrize("first", range(0, SEEDS, PER_TEST))
def test_no_invariant_breaks(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        run(seed) if seed % 2 else duel(seed)
