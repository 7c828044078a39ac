"""Plans: stable units, streaming diffs, frozen versions."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.encode.plan import group_units, update_plan
from pipeline.errors import ConflictError
from pipeline.storage.root import Root
from pipeline.store.ledger.rowset import MAX_ROWS, RowSet
from pipeline.store.ledger.state import fold
from pipeline.store.plan import (
    DiffReport,
    Plan,
    append_version,
    diff,
    read_entries,
    read_plan,
    work_of,
)
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


def test_changed_neighbours_are_retired_as_one_interval(tmp_path: Path) -> None:
    report = DiffReport()
    for rows in ((0, 0, 1), (0, 1, 2), (0, 3, 4), (1, 4, 5), (1, 5, MAX_ROWS)):
        report.retire(*rows)
    assert report.retired == [(0, 0, 2), (0, 3, 4), (1, 4, MAX_ROWS)]


def test_dropped_sources_are_retired_on_request(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    update(root, [Listed("a"), Listed("b.tar", row_stop=None)])
    plan, report = update(root, [Listed("c")], drop=True)
    assert report.removed == 2
    assert plan.retired.triples() == [[0, 0, 1], [1, 0, MAX_ROWS]]
    assert set(live(plan)) == {"c"}


@pytest.mark.integration
@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 14), st.integers(0, 2), max_size=12), min_size=1, max_size=5))
def test_after_any_history_the_live_plan_is_the_source(history: list[dict[int, int]]) -> None:
    """Files come, change, go and come back; unit numbers never move; each live key is planned exactly once."""
    root = Root(f"memory://plan-{uuid.uuid4().hex}")
    units: list[dict[str, object]] = []
    for state in history:
        listing = [Listed(f"{key:02d}", etag=str(version)) for key, version in state.items()]
        plan, _ = update(root, listing, drop=True)
        assert live(plan) == {e.key: e.etag for e in listing}
        assert plan.units.to_pylist()[: len(units)] == units
        units = plan.units.to_pylist()


def live_spans(plan: Plan) -> dict[str, list[tuple[int, int | None, str | None]]]:
    """Key -> (row_start, row_stop, etag) of every span that is still to be had, in order."""
    alive = fold(plan, []).gaps()
    found: dict[str, list[tuple[int, int | None, str | None]]] = {}
    for unit in range(plan.next_unit):
        for entry in read_entries(plan.root, plan.locate(unit)):
            if any(a <= entry.first_row < b for a, b in alive.of_unit(unit)):
                found.setdefault(entry.key, []).append((entry.row_start, entry.row_stop, entry.etag))
    return {key: sorted(spans, key=lambda s: s[0]) for key, spans in found.items()}


def spans_of(key: str, etag: str, cuts: list[int]) -> list[Listed]:
    """A file of the source as the spans between some rows."""
    return [Listed(key, etag=etag, row_start=a, row_stop=b) for a, b in itertools.pairwise(cuts)]


def test_a_file_rewritten_in_other_spans_leaves_no_old_span_visible(tmp_path: Path) -> None:
    """Whatever becomes of removed sources: a file that is still there has the rows it has now and no others."""
    root = Root(str(tmp_path))
    update(root, [*spans_of("a", "1", [0, 10, 20]), *spans_of("b", "1", [0, 10, 20]), Listed("c")])
    listing = [*spans_of("a", "2", [0, 7, 14, 20]), *spans_of("b", "2", [5, 20])]
    plan, report = update(root, listing)
    assert (report.new, report.changed, report.removed) == (3, 4, 1)
    assert report.removed_examples == ["c"]
    assert live_spans(plan) == {
        "a": [(0, 7, "2"), (7, 14, "2"), (14, 20, "2")],
        "b": [(5, 20, "2")],
        "c": [(0, 1, None)],
    }
    again, report = update(root, listing)
    assert (again.number, report.unchanged, report.anything) == (plan.number, 4, False)
    # A file that only lost its last span is the same case, also when it is the last one listed.
    plan, report = update(root, spans_of("a", "2", [0, 7, 14]))
    assert (report.changed, report.removed) == (1, 2)
    assert live_spans(plan)["a"] == [(0, 7, "2"), (7, 14, "2")]


files = st.tuples(st.integers(0, 2), st.sets(st.integers(0, 9), min_size=2, max_size=5))


@pytest.mark.integration
@settings(max_examples=80, deadline=None)
@given(st.lists(st.dictionaries(st.integers(0, 5), files, max_size=5), min_size=1, max_size=5), st.booleans())
def test_after_any_history_of_spans_the_live_plan_is_the_source(
    history: list[dict[int, tuple[int, set[int]]]], drop: bool
) -> None:
    """Files of several spans come, change, are cut anew, go and come back: no span of a file outlives its listing."""
    root = Root(f"memory://plan-{uuid.uuid4().hex}")
    wanted: dict[str, list[tuple[int, int | None, str | None]]] = {}
    for state in history:
        listing = [e for k, (etag, cuts) in state.items() for e in spans_of(f"{k:02d}", str(etag), sorted(cuts))]
        plan, report = update(root, listing, drop=drop)
        listed: dict[str, list[tuple[int, int | None, str | None]]] = {}
        for entry in listing:
            listed.setdefault(entry.key, []).append((entry.row_start, entry.row_stop, entry.etag))
        gone = [spans for key, spans in wanted.items() if key not in listed]
        assert report.removed == sum(map(len, gone))
        wanted = listed if drop else wanted | listed
        assert live_spans(plan) == wanted


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


@pytest.mark.parametrize(("images", "rows"), [(3, 64), (200, 64), (1_600, 100), (32_768, 2_048), (100_000, 2_048)])
def test_units_are_large_where_there_are_enough_of_them(images: int, rows: int) -> None:
    units = [len(unit) for unit in group_units((Listed(f"{at}") for at in range(images)), None, 1 << 40)]
    assert sum(units) == images
    assert set(units[:-1]) <= {rows}
    assert units[-1] <= rows


def test_work_follows_the_gaps() -> None:
    gaps = RowSet.from_triples([(0, 2, 3), (0, 5, 9), (3, 0, MAX_ROWS), (4, 0, 1)])
    batches = list(work_of(gaps, units_per_execution=2))
    assert [[(w.unit, w.ranges) for w in batch] for batch in batches] == [
        [(0, ((2, 3), (5, 9))), (3, ((0, None),))],
        [(4, ((0, 1),))],
    ]
