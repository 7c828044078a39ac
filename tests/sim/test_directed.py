"""The schedules that once broke an invariant, each told step by step."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipeline.errors import ConflictError
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import latest_number
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.state import read_state
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import LATENTS, REJECTS
from pipeline.store.writer import Committer
from tests.sim import oracles
from tests.sim.samplers import Samplers
from tests.sim.world import DATA, World


def three_images(world: World) -> None:
    for name in ("a", "b", "c"):
        world.put_source(f"{name}.png", name.encode())


def test_a_reader_that_an_encode_overtakes_sees_one_moment(world: World) -> None:
    """V1: the plan of before a change and the records of after it show the changed image twice."""
    three_images(world)
    world.sim.run("first", world.encode)
    world.put_source("a.png", b"changed")
    for stop in (("list", "data/plan"), ("read", "data/plan/*"), ("list", "data/ledger/*")):
        reader = world.sim.actor("reader", world.read)
        while not (reader.ended or reader.about_to(*stop)):
            world.sim.step(reader)
        if not reader.ended:
            world.sim.step(reader)
        world.sim.run("second", world.encode)
        world.sim.finish(reader)
        world.put_source("a.png", b"changed again")
    oracles.check(world)


def test_a_zombies_plan_retires_nothing(world: World) -> None:
    """V2: it had passed its fence check when a newer run came and went; on_removed=drop would be for good."""
    three_images(world)
    world.sim.run("first", world.encode)
    taken = world.store.objects.pop("images/a.png")
    zombie = world.sim.actor("zombie", lambda: world.encode(drop=True))
    world.sim.until(zombie, "create", "data/plan/v*")
    world.store.objects["images/a.png"] = taken
    world.sim.run("second", world.encode)
    assert isinstance(world.sim.drain(zombie), ConflictError)
    assert len(world.read().rows) == 3
    world.sim.run("third", world.encode)
    oracles.check(world)
    oracles.settled(world)


def test_a_zombies_plan_that_comes_after_its_parts_went_is_not_seen(world: World) -> None:
    """V4: the header lands when gc has removed the parts that it names."""
    three_images(world)
    world.sim.run("first", world.encode)
    world.put_source("d.png", b"d")
    zombie = world.sim.actor("zombie", world.encode)
    world.sim.until(zombie, "create", "data/plan/v*")
    del world.store.objects["images/d.png"]
    world.sim.run("second", world.encode)
    world.sim.run("gc", world.gc)
    assert isinstance(world.sim.drain(zombie), ConflictError)
    assert len(world.read().rows) == 3
    oracles.check(world)


@pytest.mark.parametrize("kind", ["plan/parts", "rejects"])
def test_gc_removes_nothing_that_a_new_run_finds_in_place(world: World, kind: str) -> None:
    """V3: a dead run's plan part or reject file has the content, and once had the name, of a new run's."""
    three_images(world)
    world.put_source("b.png", b"damaged")
    dead = world.sim.actor("dead", world.encode)
    world.sim.until(dead, "create", "data/plan/v*" if kind == "plan/parts" else "data/ledger/*.json")
    world.sim.kill(dead)
    gc = world.sim.actor("gc", world.gc)
    world.sim.until(gc, "delete", f"data/{kind}/*")
    world.sim.run("new", world.encode)
    world.sim.drain(gc)
    oracles.check(world)
    oracles.settled(world)


def test_a_superseded_deduplication_leaves_no_mark(world: World) -> None:
    """V7: it found nothing equal and never came to a fence; what it marks is what another run has made visible."""
    world.put_source("a.png", b"same")
    world.sim.run("first", world.encode)
    slow = world.sim.actor("slow", world.dedup)
    world.sim.until(slow, "read", "data/data/*")
    world.put_source("b.png", b"same")
    world.sim.run("second", world.encode)
    assert isinstance(world.sim.drain(slow), ConflictError)
    world.sim.run("last", lambda: world.encode(exact=True))
    oracles.check(world)
    oracles.copies(world)


def test_a_listing_is_made_under_the_claim(world: World) -> None:
    """V9: one of before it would retire a row of the run that came in between."""
    three_images(world)
    world.sim.run("first", world.encode)
    late = world.sim.actor("late", world.encode)
    world.sim.until(late, "create", "data/generations/*/open.json")
    assert ("list", "images") not in late.done


def test_an_acknowledged_commit_outlives_a_claim_that_did_not_list_it(world: World) -> None:
    """V10: the newer run has listed the ledger, the owner commits and checks, the claim lands."""
    three_images(world)
    owner = world.sim.actor("owner", lambda: world.encode(rows_per_commit=1))
    world.sim.until(owner, "create", "data/ledger/*")
    rival = world.sim.actor("rival", world.encode)
    world.sim.until(rival, "create", "data/generations/00000002/open.json")
    world.sim.drain(owner)
    world.sim.drain(rival)
    oracles.acknowledged_is_visible(world)
    world.sim.run("last", world.encode)
    oracles.check(world)
    oracles.settled(world)


def test_a_reader_looks_at_the_number_again(world: World) -> None:
    """V11: it found generation 1 the newest, then 2 was claimed and a zombie committed to 1."""
    three_images(world)
    zombie = world.sim.actor("zombie", lambda: world.encode(rows_per_commit=1))
    world.sim.until(zombie, "create", "data/ledger/*")
    reader = world.sim.actor("reader", world.read)
    world.sim.until(reader, "list", "data/ledger/00000001")
    with claimed(world.root, "other", patience_s=0.0):
        assert isinstance(world.sim.drain(zombie), ConflictError)
        world.sim.finish(reader)
    assert world.seen[0].rows == []


def test_an_answer_that_got_lost_is_no_rival(world: World) -> None:
    """V13: the client below repeats the creation of the claim by itself and is told that there is one."""
    three_images(world)
    encode = world.sim.actor("encode", world.encode)
    for pattern in ("data/generations/*/open.json", "data/plan/v*.json"):
        world.sim.until(encode, "create", pattern)
        world.sim.step(encode, "twice")
    assert world.sim.finish(encode) == "done"


def test_opening_beside_gc_asks_for_nothing_that_gc_may_take(world: World) -> None:
    """V14: a part that nothing names vanishes between listing and looking."""
    three_images(world)
    world.sim.run("first", world.encode)
    reader = world.sim.actor("reader", world.read)
    world.sim.finish(reader)
    touched = {key for op, key in reader.done if "plan/parts" in key}
    named = {f"data/{p}" for v in read_state(world.root).plan.versions for p in (*v.entry_parts, v.units_part)}
    assert touched <= named


def test_an_identity_is_settled_under_one_claim(world: World) -> None:
    """V5: a sampler stalls before it gives an empty dataset its settings; another one draws with its own."""
    root = Root("sim://drawn")
    samplers = Samplers(world, root)
    world.sim.run("first", lambda: samplers.claim_only("four"))
    slow = world.sim.actor("slow", lambda: samplers.sample("two"))
    world.sim.until(slow, "create", "drawn/generations/*/identity.json")
    world.sim.run("other", lambda: samplers.sample("three"))
    assert isinstance(world.sim.drain(slow), ConflictError)
    samplers.check()
    with pytest.raises(ConflictError, match="draw: three there, two here"):
        world.sim.run("again", lambda: samplers.sample("two"))


def test_a_superseded_sampler_replaces_no_image(world: World) -> None:
    """V6: its workers put a file under the name of a request that the newer run has drawn, too."""
    samplers = Samplers(world, Root("sim://drawn"))
    slow = world.sim.actor("slow", lambda: samplers.sample("two", device="old"))
    world.sim.until(slow, "create", "drawn/images/*")
    world.sim.run("newer", lambda: samplers.sample("two", device="new"))
    assert isinstance(world.sim.drain(slow), ConflictError)
    samplers.check()


def test_a_reader_keeps_its_files_for_the_grace_period(world: World) -> None:
    """V15: it opened seconds before a compaction, and the bytes of what that replaced are old."""
    three_images(world)
    world.sim.run("first", lambda: world.encode(rows_per_commit=1))
    world.sim.now += 100_000
    dataset = LatentDataset.open(DATA)
    world.sim.run("compact", world.compact)
    world.sim.now += 10
    world.sim.run("gc", lambda: world.gc(grace_s=3600.0))
    assert sum(len(dataset.read(g.index, ["key"])) for g in dataset.row_groups) == 3
    world.sim.now += 4000
    world.sim.run("second", world.encode)
    removed, _ = world.sim.run("gc", lambda: world.gc(grace_s=3600.0))
    assert removed >= 3
    oracles.check(world)


def test_a_long_grace_period_after_a_short_one_finds_bundles_gone(world: World) -> None:
    for at in range(10):  # so many claims that their bundles are merged
        world.put_source(f"{at}.png", b"%d" % at)
        world.sim.run(f"encode-{at}", world.encode)
    world.sim.run("short", lambda: world.gc(grace_s=0.0))
    world.sim.run("long", lambda: world.gc(grace_s=1e6))
    oracles.check(world)


def test_the_digest_does_not_tell_how_a_dataset_came_about(world: World) -> None:
    """I8: neither what died before it was planned, nor how rows were cut into writes and shards."""
    digests = set()
    three_images(world)
    source = dict(world.store.objects)
    for deaths in range(3):
        world.store.objects = dict(source)
        for _ in range(deaths):
            dead = world.sim.actor("dead", world.encode)
            world.sim.until(dead, "create", "data/plan/v*")
            world.sim.kill(dead)
        world.sim.run("encode", lambda n=deaths: world.encode(rows_per_commit=1 + n))
        digests.add(LatentDataset.open(DATA).digest)
        world.sim.run("compact", world.compact)
        digests.add(LatentDataset.open(DATA).digest)
    assert len(digests) == 1


def test_a_repeated_write_turns_no_stored_row_into_a_reject(world: World) -> None:
    """V17: within a generation a row that one record stores and another rejects is stored, whatever their names."""
    for number in range(8):
        world.put_source(f"{number}.png", f"{number}".encode())
    world.sim.run("first", lambda: world.encode(rows_per_commit=1))
    committer = Committer(world.root, latest_number(world.root), 1 << 20, "float16", {})
    state = read_state(world.root)
    for unit, start, stop in state.covered.triples():
        for row in range(start, stop):
            committer.commit(LATENTS.empty_table(), _reject(unit, row), {})
    assert read_state(world.root).num_rejected == 0
    assert len(world.read().rows) == 8


def _reject(unit: int, row: int) -> pa.Table:
    told = {"uri": "", "key": "", "outcome": "rejected", "reason": "read_failed", "message": None}
    return pa.Table.from_pylist([{"unit": unit, "row": row, **told}], schema=REJECTS)
