"""Two drivers of one training, step by step and all pairs of moments of small cases."""

from __future__ import annotations

import pytest

from pipeline.errors import ConflictError
from pipeline.model.checkpoints import list_complete
from tests.sim.trainers import Trainers
from tests.sim.world import World


@pytest.fixture
def trainers(world: World) -> Trainers:
    for name in ("a", "b"):
        world.put_source(f"{name}.png", name.encode())
    world.encode()
    return Trainers(world)


def test_a_superseded_start_prunes_nothing_of_its_successor(world: World, trainers: Trainers) -> None:
    """V12: it is further on, so by images alone what the newer start writes would be old, and torn."""
    first = world.sim.actor("first", trainers.train)
    world.sim.until(first, "create", "run/checkpoints/*-000000000000006-*/COMPLETE.json")
    second = world.sim.actor("second", trainers.train)
    world.sim.until(second, "create", "run/checkpoints/000002-*/COMPLETE.json")
    world.sim.drain(first)
    assert world.sim.finish(second) == "done"
    trainers.check()
    assert {c.start[0] for c in list_complete(trainers.checkpoints)} == {2}


def test_a_start_goes_on_with_the_inputs_that_it_has_looked_at(world: World, trainers: Trainers) -> None:
    """V12: the other driver's first checkpoint, of other inputs, lands between its look and its workers' start."""
    first = world.sim.actor("first", trainers.train)
    world.sim.until(first, "create", "run/checkpoints/*/COMPLETE.json")
    world.put_source("c.png", b"c")
    world.encode()
    second = world.sim.actor("second", trainers.train)
    world.sim.until(second, "create", "run/checkpoints/starts/000002-*")
    world.sim.drain(first)
    assert world.sim.finish(second) == "done"
    trainers.check()


def test_the_history_has_no_hole_where_a_late_checkpoint_is_not_gone_on_from(
    world: World, trainers: Trainers
) -> None:
    """V12: the newer start begins anew; after it, a checkpoint of the older one is no part of its run."""
    first = world.sim.actor("first", trainers.train)
    world.sim.until(first, "create", "run/checkpoints/*/COMPLETE.json")
    second = world.sim.actor("second", trainers.train)
    world.sim.until(second, "create", "run/checkpoints/000002-*/history.jsonl")
    world.sim.drain(first)
    world.sim.kill(second)
    assert world.sim.run("third", trainers.train) == "done"
    trainers.check()


def test_of_two_drivers_that_have_looked_one_goes_on(world: World, trainers: Trainers) -> None:
    first = world.sim.actor("first", trainers.train)
    second = world.sim.actor("second", trainers.train)
    world.sim.until(first, "list", "run/checkpoints/starts")
    world.sim.until(second, "list", "run/checkpoints/starts")
    assert world.sim.finish(first) == "done"
    assert isinstance(world.sim.drain(second), ConflictError)
    trainers.check()


@pytest.mark.parametrize("at", ["announced", "open"])
def test_what_a_start_begins_with_is_not_pruned_under_it(world: World, trainers: Trainers, at: str) -> None:
    """It lists checkpoints once the older start can see that it is superseded, and removes no more."""
    first = world.sim.actor("first", trainers.train)
    world.sim.until(first, "create", "run/checkpoints/*-000000000000004-*/COMPLETE.json")
    second = world.sim.actor("second", trainers.train)
    world.sim.until(second, "create", f"run/generations/*/{at}.json")
    if at == "announced":  # not yet
        world.sim.until(first, "create", "run/checkpoints/*-000000000000006-*/COMPLETE.json")
    world.sim.drain(first)
    assert world.sim.finish(second) == "done"
    trainers.check()
