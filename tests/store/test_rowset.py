from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.ledger.rowset import MAX_ROWS, RowSet

triples = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(0, 6)).map(lambda t: (t[0], t[1], t[1] + t[2])),
    max_size=12,
)


def members(rows: list[tuple[int, int, int]]) -> set[tuple[int, int]]:
    return {(u, r) for u, a, b in rows for r in range(a, b)}


def of(rows: RowSet) -> set[tuple[int, int]]:
    return {(u, r) for u, a, b in rows.triples() for r in range(a, b)}


@given(triples, triples)
def test_operations_are_those_of_sets(a: list[tuple[int, int, int]], b: list[tuple[int, int, int]]) -> None:
    x, y = RowSet.from_triples(a), RowSet.from_triples(b)
    p, q = members(a), members(b)
    assert of(x) == p
    assert of(x | y) == p | q
    assert of(x & y) == p & q
    assert of(x - y) == p - q
    assert (x | y).count() == len(p | q)
    assert RowSet.from_triples((x | y).triples()) == x | y


# Rows so many and so scattered that blocks of them become bitmaps, beside long runs and across the ends of blocks.
runs = st.tuples(st.integers(0, 1), st.integers(0, 1100), st.integers(1, 700), st.sampled_from((1, 2, 3, 7, 200)))
crowds = st.lists(runs, max_size=4).map(
    lambda runs: {(unit, row) for unit, first, length, step in runs for row in range(first, first + length, step)}
)


def crowd(rows: set[tuple[int, int]]) -> RowSet:
    both = np.array(sorted(rows), np.int64).reshape(-1, 2)
    return RowSet.from_rows(both[:, 0], both[:, 1])


@settings(deadline=None)
@given(crowds, crowds, st.integers(0, 1900), st.integers(0, 1900))
def test_of_scattered_rows_operations_are_those_of_sets_and_forms_follow_from_rows_alone(
    p: set[tuple[int, int]], q: set[tuple[int, int]], low: int, high: int
) -> None:
    x, y = crowd(p), crowd(q)
    assert of(x) == p
    for mine, wanted in ((x | y, p | q), (x & y, p & q), (x - y, p - q)):
        assert mine == crowd(wanted)
        assert of(mine) == wanted
        assert mine.count() == len(wanted)
        assert RowSet.from_triples(mine.triples()) == mine
        assert RowSet.from_parts(mine.starts, mine.stops, mine.blocks, mine.bits) == mine
        assert mine.num_spans() >= len(mine.triples())
    inside = {(u, r) for u, r in p if low <= (u << 32) + r < high + (1 << 32)}
    assert x.within(low, high + (1 << 32)) == crowd(inside)
    units, rows = np.repeat([0, 1], 2000), np.tile(np.arange(2000), 2)
    assert x.contains(units, rows).tolist() == [pair in p for pair in zip(units.tolist(), rows.tolist(), strict=True)]
    assert x.units().tolist() == sorted({u for u, _ in p})
    assert [t for u in x.units() for t in x.of_unit(int(u))] == [(t[1], t[2]) for t in x.triples()]


def test_scattered_rows_take_a_bit_each() -> None:
    rows = np.flatnonzero(np.random.default_rng(0).random(1 << 20) < 0.3)
    found = RowSet.from_rows(np.zeros_like(rows), rows)
    assert sum(column.nbytes for column in vars(found).values()) < 1.2 * (1 << 20) / 8
    whole = RowSet.from_triples([(0, 0, 1 << 20)])
    assert (whole - found).count() == (1 << 20) - len(rows)
    assert (whole - found) | found == whole
    starts, stops = (np.concatenate(side) for side in zip(*(whole - found).spans(), strict=True))
    assert (starts[1:] > stops[:-1]).all()
    assert int((stops - starts).sum()) == (1 << 20) - len(rows)


@given(triples)
def test_intervals_are_canonical(a: list[tuple[int, int, int]]) -> None:
    x = RowSet.from_triples(a)
    assert (x.starts < x.stops).all()
    assert (x.starts[1:] > x.stops[:-1]).all()
    units = np.array([u for u, _ in sorted(members(a))], np.int64)
    rows = np.array([r for _, r in sorted(members(a))], np.int64)
    assert RowSet.from_rows(units, rows) == x
    assert x.contains(units, rows).all()
    assert not x.contains(units, rows + 1000).any()
    assert x.units().tolist() == sorted(set(units.tolist()))
    assert [t for u in x.units() for t in x.of_unit(int(u))] == [(t[1], t[2]) for t in x.triples()]


def test_a_whole_unit_does_not_reach_into_the_next() -> None:
    whole = RowSet.from_triples([(0, 0, MAX_ROWS), (1, 0, MAX_ROWS)])
    assert len(whole.starts) == 2
    assert of(RowSet.from_triples([(1, 0, 3)]) - RowSet.from_triples([(0, 0, MAX_ROWS)])) == {(1, 0), (1, 1), (1, 2)}


def test_addresses_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="row addresses must have"):
        RowSet.from_triples([(-1, 0, 1)])
    with pytest.raises(ValueError, match="row addresses must have"):
        RowSet.from_triples([(0, 0, MAX_ROWS + 1)])
