"""Plans: stable units, streaming diffs, frozen versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.encode.planning import update_plan
from pipeline.errors import ConflictError
from pipeline.storage import Root
from pipeline.store.plan import Plan, append_version, read_entries, read_plan
from pipeline.store.plan_diff import DiffReport, diff, group_units
from pipeline.store.rowset import MAX_ROWS, RowSet
from pipeline.store.state import fold
from pipeline.store.work import work_of
from tests.support.rows import Listed


def update(root: Root, listing: list[Listed], *, drop: bool = False, unit_rows: int = 3) -> tuple[Plan, DiffReport]:
    return update_plan(
        root,
        sorted(listing, key=lambda e: (e.key, e.row_start)),
        source={"uri": "mem"},
        generation=1,
        unit_rows=unit_rows,
        unit_bytes=1 << 30,
        drop_removed=drop,
    )


def live(plan: Plan) -> dict[str, str | None]:
    """Key -> etag of every row that is still to be had."""
    alive = fold(plan, []).gaps()
    found: dict[str, str | None] = {}
    for unit in range(plan.next_unit):
        for entry in read_entries(plan.root, plan.locate(unit)):
            if any(a <= entry.first_row < b for a, b in alive.of_unit(unit)):
                assert entry.key not in found
                found[entry.key] = entry.etag
    return found


def test_nothing_new_freezes_nothing(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    listing = [Listed(f"{i:03d}") for i in range(10)]
    plan, report = update(root, listing)
    assert (plan.number, plan.next_unit, report.new) == (1, 4, 10)
    plan, report = update(root, listing)
    assert (plan.number, report.unchanged, report.anything) == (1, 10, False)


def test_changes_are_planned_in_new_units_and_the_old_rows_are_retired(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    listing = [Listed(f"{i:03d}", etag="a") for i in range(7)]
    first, _ = update(root, listing)
    listing[4] = replace(listing[4], etag="b")
    listing.append(Listed("0025", etag="a"))
    del listing[0]
    second, report = update(root, listing)
    assert (report.new, report.changed, report.removed) == (1, 1, 1)
    assert report.removed_examples == ["000"]
    assert second.units.slice(0, 3).to_pylist() == first.units.to_pylist()
    assert second.retired.triples() == [[1, 1, 2]]
    assert live(second) == {**{e.key: e.etag for e in listing}, "000": "a"}


def test_dropped_sources_are_retired_on_request(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    update(root, [Listed("a"), Listed("b.tar", row_stop=None)])
    plan, report = update(root, [Listed("c")], drop=True)
    assert report.removed == 2
    assert plan.retired.triples() == [[0, 0, 1], [1, 0, MAX_ROWS]]
    assert set(live(plan)) == {"c"}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 14), st.integers(0, 2), max_size=12), min_size=1, max_size=5))
def test_after_any_history_the_live_plan_is_the_source(history: list[dict[int, int]]) -> None:
    """Files come, change, go and come back; unit numbers never move; each live key is planned exactly once."""
    import uuid

    root = Root(f"memory://plan-{uuid.uuid4().hex}")
    units: list[dict[str, object]] = []
    for state in history:
        listing = [Listed(f"{key:02d}", etag=str(version)) for key, version in state.items()]
        plan, _ = update(root, listing, drop=True)
        assert live(plan) == {e.key: e.etag for e in listing}
        assert plan.units.to_pylist()[: len(units)] == units
        units = plan.units.to_pylist()


def test_mtime_decides_where_there_is_no_etag(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    update(root, [Listed("a", mtime_ns=1), Listed("b", mtime_ns=1)])
    _, report = update(root, [Listed("a", mtime_ns=2), Listed("b", mtime_ns=1)])
    assert (report.changed, report.unchanged) == (1, 1)
    _, report = update(root, [Listed("a", mtime_ns=2), Listed("b", mtime_ns=1, meta='{"caption":"new"}')])
    assert (report.changed, report.unchanged) == (1, 1)


def test_two_planners_cannot_freeze_the_same_version(tmp_path: Path) -> None:
    plan = read_plan(Root(str(tmp_path)))
    append_version(plan, [[Listed("a")]], source={}, generation=1)
    with pytest.raises(ConflictError, match="Another run froze version 1"):
        append_version(plan, [[Listed("b")]], source={}, generation=1)


def test_planning_streams(tmp_path: Path) -> None:
    """Neither the listing nor the older plan is ever held in memory: the diff asks for one entry at a time."""
    root = Root(str(tmp_path))
    update(root, [Listed(f"{i:05d}") for i in range(3000)])
    pulled = 0

    def listing() -> Iterator[Listed]:
        nonlocal pulled
        for i in range(3000):
            pulled += 1
            yield Listed(f"{i:05d}", etag="changed" if i % 2 else None)

    changed = diff(read_plan(root), listing(), DiffReport())
    for expected in range(1, 50):
        next(changed)
        assert pulled <= 2 * expected


def test_units_respect_rows_bytes_and_entries_of_many_rows() -> None:
    entries = [Listed("a"), Listed("b"), Listed("c", 100), Listed("d"), Listed("e", row_stop=9), Listed("f")]
    units = [[e.key for e in unit] for unit in group_units(entries, max_rows=3, max_bytes=105)]
    assert units == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


def test_work_follows_the_gaps() -> None:
    gaps = RowSet.from_triples([(0, 2, 3), (0, 5, 9), (3, 0, MAX_ROWS), (4, 0, 1)])
    batches = list(work_of(gaps, units_per_execution=2))
    assert [[(w.unit, w.ranges) for w in batch] for batch in batches] == [
        [(0, ((2, 3), (5, 9))), (3, ((0, None),))],
        [(4, ((0, 1),))],
    ]
