"""Kill anything at any moment: the finished dataset holds every row once, byte for byte as if nothing had happened.

`pytest tests/faults -m soak --kills 200 --kill-seed 7` makes a longer run of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.encode_world import arguments, check
from tests.support.kills import Struck, disturb

pytestmark = pytest.mark.ray


def disturbed(base: Path, place: Path, kills: int, seed: int) -> Struck:
    """Kill inside encode jobs until so many kills are dealt; every dataset that was finished on the way is judged.

    Executions of three units, of which by even seeds one is in its tail when the next begins, and by odd seeds two
    drivers have one each.
    """
    shape = {"encode.actors": 2, "encode.units_per_execution": 3, "encode.drivers": 1 + seed % 2}
    struck = disturb(
        "encode",
        lambda output: arguments(base, output, **shape),
        str(place / "killed"),
        kills=kills,
        seed=seed,
        cwd=base,
    )
    print("killed:", struck.kills, "in", len(struck.outputs), "finished runs")
    for output in struck.outputs:
        check(base, Path(output))
    return struck


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_random_kills_lose_and_repeat_nothing(base: Path, tmp_path: Path, seed: int) -> None:
    assert disturbed(base, tmp_path, kills=10, seed=seed).total >= 10


@pytest.mark.soak
def test_soak(base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seed, kills = request.config.getoption("--kill-seed"), request.config.getoption("--kills")
    assert disturbed(base, tmp_path, kills=kills, seed=seed).total >= kills
