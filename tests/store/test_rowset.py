from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
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
