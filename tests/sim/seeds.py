"""Random worlds: who runs beside whom, for how long at a stretch, and what goes wrong, all from one seed.

`python -m tests.sim.seeds FIRST COUNT` tries many; a seed that breaks an invariant is to become a directed case.
"""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial

from pipeline.errors import ConflictError, InputError
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import latest_number
from pipeline.store.ledger.layout import IDENTITY
from pipeline.train.retention import read_records
from tests.sim import oracles
from tests.sim.samplers import Samplers
from tests.sim.scheduler import Actor
from tests.sim.trainers import STEPS, Trainers
from tests.sim.world import DAMAGED, Saved, World, world

_PATIENT_S = 1e7  # a grace period that no world outlives
Kind = Callable[[], object]


def run(seed: int) -> int:
    """One world to its end; returns its ticks. AssertionError when an invariant does not hold."""
    rng = random.Random(seed)
    with world() as made:
        for number in range(rng.randint(1, 5)):
            made.put_source(f"{number}.png", _image(rng))
        made.put_source("stays.png", b"stays")  # a source without any image is refused
        grace_s = rng.choice((0.0, _PATIENT_S))
        samplers, trainers = Samplers(made, Root("sim://drawn")), Trainers(made, keep_last=rng.randint(1, 2))
        kinds = _kinds(made, rng, grace_s) | rng.choice((_sampling(samplers), _training(trainers), {}))
        # Few kinds in one world, for they meet each other more often then.
        chosen = rng.sample(list(kinds), rng.randint(2, 3))
        crash, fault = rng.choice((0.0, 0.004, 0.02)), rng.choice((0.0, 0.02))
        for _ in range(rng.randint(0, 2)):
            made.sim.run("before", made.encode)
            made.change_source([(f"{rng.randrange(5)}.png", _image(rng)) for _ in range(rng.randint(0, 3))])
        left = rng.randint(2, 6)
        while True:
            alive = [a for a in made.sim.actors if not a.ended]
            if left and (not alive or (len(alive) < 5 and rng.random() < 0.3)):
                name = rng.choice(chosen)
                made.sim.actor(f"{name}-{left}", kinds[name], rng.choice((0.0, 0.0, -30.0, 30.0)))
                left -= 1
            elif not alive:
                break
            else:
                _stretch(made, rng, crash, fault)
        for actor in made.sim.actors:
            _ended_well(actor, grace_s)
        if samplers.drawn:
            samplers.check()
        if latest_number(trainers.root):
            trainers.check()
            made.sim.run("last trainer", trainers.train)
            trainers.check()
            assert len(read_records(trainers.root)) == STEPS, "I10: the history ends early"
        return _finish(made)


@cache
def base() -> Saved:
    """Four images, encoded; then one has changed, one is new, one is gone, and a run has died half-way."""
    with world() as made:
        for name, data in (("a", b"one"), ("b", b"one"), ("c", b"two"), ("d", DAMAGED)):
            made.put_source(f"{name}.png", data)
        made.sim.run("encode", made.encode)
        made.put_source("a.png", b"three")
        made.put_source("e.png", b"one")
        made.store.delete("images/c.png")
        dead = made.sim.actor("dead", lambda: made.encode(rows_per_commit=1))
        made.sim.until(dead, "create", "data/ledger/*")
        made.sim.kill(dead)
        return made.save()


def duel(seed: int) -> int:
    """From one base two processes come to some request each, a third one may run, then they end in some order."""
    rng, begun = random.Random(seed), base()
    with world() as made:
        made.restore(begun)
        made.sim.now += 100.0
        kinds = _kinds(made, rng, 0.0)
        names = list(kinds)
        for at in range(2):
            name = rng.choice(names)
            actor = made.sim.actor(f"{name}-{at}", kinds[name])
            steps, writes = rng.choice(((rng.randrange(40), 99), (99, rng.randrange(12))))
            while steps and writes >= 0 and not actor.ended:
                made.sim.step(actor)
                steps -= 1
                writes -= actor.pending is not None and actor.pending[0] in ("create", "put", "delete")
        if rng.random() < 0.5:
            made.sim.drain(made.sim.actor("third", kinds[rng.choice(names)]))
        order = list(made.sim.actors)
        if rng.random() < 0.5:
            order.reverse()
        for actor in order:
            if rng.random() < 0.1:
                made.sim.kill(actor)
            made.sim.drain(actor)
            _ended_well(actor, 0.0)
        return _finish(made)


def _finish(made: World) -> int:
    oracles.check(made)
    made.sim.run("last", lambda: made.encode(exact=True))
    oracles.check(made)
    oracles.settled(made)
    oracles.copies(made)
    return made.sim.tick


def _stretch(made: World, rng: random.Random, crash: float, fault: float) -> None:
    """One process goes on while all others stall: for some steps, up to a write, or to its end.

    What matters of two processes is mostly which write of one comes between which reads of the other.
    """
    actor = rng.choice([a for a in made.sim.actors if not a.ended])
    steps = rng.choice((1, 2, 4, 8, 16, 1000, 1000, 1000))
    writes = rng.choice((1, 1, 2, 4, 1000)) if steps == 1000 else 1000
    while steps and not actor.ended:
        steps -= 1
        draw = rng.random()
        if draw < crash:
            made.sim.kill(actor)
            return
        made.sim.step(actor, rng.choice(("fail", "lost", "twice")) if draw < crash + fault else None)
        if actor.pending is not None and actor.pending[0] in ("create", "put", "delete"):
            writes -= 1
            if not writes:
                return


def _kinds(made: World, rng: random.Random, grace_s: float) -> dict[str, Kind]:
    def changes() -> None:
        made.change_source(
            [(f"{rng.randrange(5)}.png", rng.choice((None, _image(rng), _image(rng)))) for _ in range(2)]
        )

    return {
        "encode": made.encode,
        "again": lambda: made.encode(rows_per_commit=1),
        "drop": lambda: made.encode(drop=True),
        "exact": lambda: made.encode(exact=True),
        "retry": lambda: made.encode(retry=("missing", "corrupt")),
        "dedup": made.dedup,
        "compact": made.compact,
        "gc": lambda: made.gc(grace_s),
        "late gc": lambda: made.gc(max(grace_s, 1.0)),
        "reader": made.read,
        "changes": changes,
    }


def _sampling(samplers: Samplers) -> dict[str, Kind]:
    return {
        f"draw {settings} on {device}": partial(samplers.sample, settings, device=device, tars=tars)
        for settings, device, tars in (
            ("two", "a", False),
            ("two", "b", False),
            ("three", "a", False),
            ("two", "c", True),
        )
    }


def _training(trainers: Trainers) -> dict[str, Kind]:
    def train(attempts: int) -> str:
        if not trainers.world.root.exists(IDENTITY):
            return "no data"
        return trainers.train(attempts)

    return {f"train {n}": partial(train, attempts) for n, attempts in enumerate((1, 1, 2, 2))}


def _image(rng: random.Random) -> bytes:
    return rng.choice((b"one", b"two", b"three", b"four", DAMAGED))


def _ended_well(actor: Actor, grace_s: float) -> None:
    """No process ends otherwise than by a conflict, for want of a dataset, or of files that gc may take at once."""
    expected: tuple[type[BaseException], ...] = (ConflictError,)
    if isinstance(actor.error, InputError) and "There is no dataset" in str(actor.error):
        return
    if grace_s == 0.0:
        expected = (ConflictError, FileNotFoundError)
    if actor.error is not None and not isinstance(actor.error, expected):
        raise AssertionError(f"{actor.name} ended by {actor.error!r}") from actor.error


def main(first: int, count: int) -> int:
    """Try some seeds; returns how many broke an invariant."""
    broken, ticks = [], 0
    for seed in range(first, first + count):
        try:
            ticks += run(seed) if seed % 2 else duel(seed)
        except Exception:
            broken.append(seed)
            print(f"seed {seed}:\n{traceback.format_exc()}", flush=True)
    print(f"{count} seeds from {first}, {ticks} steps after the last fault: {len(broken)} broken {broken[:50]}")
    return len(broken)


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]), int(sys.argv[2]))))
