"""What must hold in every world, whoever did what in which order."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

from pipeline.store.ledger.ledger import visible_records
from pipeline.store.ledger.record import parse_record
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import read_entries, read_plan
from pipeline.store.read.dataset import LatentDataset
from tests.sim.world import DATA, Seen, World

_CLAIM = re.compile(r"^data/generations/(\d+)/open\.json$")
_LEDGER = re.compile(r"^data/ledger/(\d+)/[0-9a-f]+\.json$")


def check(world: World) -> None:
    """All of it, when everybody has ended; AssertionError says which invariant does not hold."""
    claims = one_claimer(world)
    for seen in world.seen:
        one_moment(world, seen)
    if not claims:
        return
    nothing_from_the_fenced(world, claims)
    acknowledged_is_visible(world)
    last = LatentDataset.open(DATA)
    one_moment(world, Seen("end", world.sim.tick, world.sim.tick, _rows(last), last))
    problems = [p for p in verify(DATA, "checksums").problems if p["kind"] != "unfinished"]
    assert not problems, f"I6: {problems}"


def one_claimer(world: World) -> dict[int, int]:
    """I1: each generation was claimed once; returns the tick of each claim."""
    found: dict[int, int] = {}
    for tick, _, key in world.store.created:
        match = _CLAIM.match(key)
        if match:
            assert int(match[1]) not in found, f"I1: generation {match[1]} was claimed twice"
            found[int(match[1])] = tick
    return found


def nothing_from_the_fenced(world: World, claims: dict[int, int]) -> None:
    """I2: no record that was created after a newer claim is visible."""
    born = {key: tick for tick, _, key in world.store.created if _LEDGER.match(key)}
    for name, record in visible_records(world.root):
        later = [tick for number, tick in claims.items() if number > record.generation]
        assert born[f"data/{name}"] <= min(later, default=world.sim.tick), f"I2: {name} came after a newer claim"


def acknowledged_is_visible(world: World) -> None:
    """I3: every commit that was acknowledged is visible, until its rows are retired or covered anew."""
    records = visible_records(world.root)
    visible, retired = {name for name, _ in records}, read_plan(world.root).retired
    for _, name in world.acknowledged:
        if name not in visible:
            record = parse_record(world.root.read_bytes(name), name)
            newer = [other.covered for _, other in records if other.generation > record.generation]
            lost = record.covered - RowSet.union_all(newer) - retired
            assert not lost, f"I3: {name} was acknowledged and {lost.triples()} of it are not visible"


def one_moment(world: World, seen: Seen) -> None:
    """I4, I5, I9: each row and each live key once, every settled row planned, every latent that of its etag."""
    state = seen.dataset.state
    addresses = Counter((row["unit"], row["row"]) for row in seen.rows)
    assert max(addresses.values(), default=1) == 1, f"I4: {seen.name} saw a row twice"
    keys = Counter(row["key"] for row in seen.rows)
    twice = [key for key, n in keys.items() if n > 1]
    assert not twice, f"I4: {seen.name} saw {twice} twice"
    planned = set(state.plan.units["unit"].to_pylist())
    unplanned = set(state.covered.units().tolist()) - planned
    assert not unplanned, f"I5: {seen.name} saw settled rows of units {unplanned}, which are in no plan"
    for row in seen.rows:
        entry = read_entries(seen.dataset.root, state.plan.locate(row["unit"]))[row["row"]]
        assert entry.key == row["key"], f"I5: {seen.name} saw {row['key']} at the address of {entry.key}"
        wanted = hashlib.sha256(world.contents[entry.etag or ""]).digest()
        assert row["content_sha256"] == wanted, f"I9: {seen.name} saw a latent of {row['key']} of another etag"


def settled(world: World) -> None:
    """When the last run has ended well and the source stands still: the dataset is the source, in full."""
    dataset = LatentDataset.open(DATA)
    assert not dataset.state.gaps(), f"I5: rows are left open: {dataset.state.gaps().triples()}"
    listed = {key.removeprefix("images/"): s for key, s in world.store.objects.items() if key.startswith("images/")}
    found = {row["key"]: row["content_sha256"] for row in _rows(dataset)}
    for key, digest in found.items():
        if key in listed:
            assert digest == hashlib.sha256(listed[key].data).digest(), f"I9: {key} is not what the source holds"


def copies(world: World) -> None:
    """I7: of each content of the source that can be stored a row is visible, and none twice."""
    rows = _rows(LatentDataset.open(DATA))
    times = Counter(row["content_sha256"] for row in rows)
    assert max(times.values(), default=1) == 1, f"I7: equal rows stay, {times.most_common(1)}"


def _rows(dataset: LatentDataset) -> list[dict[str, object]]:
    columns = ["unit", "row", "key", "content_sha256"]
    return [row for group in dataset.row_groups for row in dataset.read(group.index, columns).to_pylist()]
