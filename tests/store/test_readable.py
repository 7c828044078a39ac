"""Row groups as columns are the row groups one by one, whatever part of a file is dead."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.ledger.record import CommitRecord, FileInfo, Records
from pipeline.store.ledger.rowset import RowSet, address
from pipeline.store.ledger.state import VisibleFiles
from pipeline.store.read.row_groups import ReadableGroups, RowGroup, RowGroupInfo, RowGroups

triples = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9), st.integers(0, 9)), max_size=8)


@settings(deadline=None)
@given(dead=triples, spans=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=9))
def test_touching_is_sharing_a_unit_with_a_row_of_the_set(
    dead: list[tuple[int, int, int]], spans: list[tuple[int, int]]
) -> None:
    rows = RowSet.from_triples([t for t in dead if t[1] < t[2]])
    first = np.array([a for a, _ in spans], np.int64)
    last = np.array([a + n for a, n in spans], np.int64)
    units = set(rows.units().tolist())
    assert rows.touches(address(first), address(last + 1)).tolist() == [
        bool(units & set(range(a, a + n + 1))) for a, n in spans
    ]


def visible(files: dict[str, list[RowGroupInfo]], dead: dict[int, RowSet]) -> ReadableGroups:
    """The row groups of files by name; dead: the dead rows of some, by number."""
    infos = [
        FileInfo(n, 1000, "00", sum(g.rows for g in groups), RowGroups.of(groups)) for n, groups in files.items()
    ]
    records = Records.of((info.path, CommitRecord(1, RowSet.empty(), files=(info,))) for info in infos)
    return VisibleFiles(records, np.arange(len(files)), dead).readable()


@pytest.fixture
def groups() -> ReadableGroups:
    files = {
        "a": [
            RowGroupInfo("8x8", 5, 50, 0, 0, (1.0,), (2.0,), 5, 3),
            RowGroupInfo("8x16", 4, 80, 0, 1, (3.0,), (4.0,), 4, 7),
        ],
        "b": [],
        "c": [
            RowGroupInfo("16x8", 6, 60, 2, 2, (5.0,), (6.0,), 6),
            RowGroupInfo("8x8", 7, 70, 3, 4, (7.0,), (8.0,), 7, 9, 1),
        ],
    }
    found = visible(files, {2: RowSet.from_triples([(2, 0, 100), (3, 1, 2)])})
    assert found.partial.tolist() == [False, False, True, True]
    found.keep({2: 0, 3: 6})
    return found


def test_a_group_without_a_visible_row_is_not_there_and_one_with_some_counts_them(groups: ReadableGroups) -> None:
    assert list(groups) == [
        RowGroup(0, "a", 0, "8x8", 5, 50),
        RowGroup(1, "a", 1, "8x16", 4, 80),
        RowGroup(2, "c", 1, "8x8", 6, 70),
    ]
    assert groups[-1] == groups[2] == groups[2:][0]
    with pytest.raises(IndexError):
        groups[3]
    assert groups.partial.tolist() == [False, False, True]
    assert groups.buckets == ("8x8", "8x16"), "the bucket whose rows are all dead is none to choose from"


def test_what_the_ledger_tells_belongs_to_the_groups_that_are_left(groups: ReadableGroups) -> None:
    assert groups.stored("label_max").tolist() == [3, 7, 9]
    assert groups.stored("unlabelled").tolist() == [0, 0, 1]
    assert groups.channel_sums()[0].tolist() == [[1.0], [3.0], [7.0]]
    assert [index for index, _ in groups.within(1, 4)] == [1, 2]
    assert [info.rows for _, info in groups.within(3, 9)] == [7]
    assert groups.place(2)[1] == 1


def test_no_file_is_no_group() -> None:
    none = visible({}, {})
    assert len(none) == 0
    assert list(none.within(0, 9)) == []
    assert none.buckets == ()
