"""The run's record: a plain list to who reads it, whatever was interrupted, at a price that does not grow."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.train.history import HISTORY, ONE_FILE, SEGMENT_RECORDS, Follower, Journal, read_records

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 2)),
        st.tuples(st.just("append late"), st.integers(0, 2)),
        st.tuples(st.just("restart"), st.integers(0, 30)),
        st.tuples(st.just("new generation"), st.integers(0, 30)),
        st.tuples(st.just("late restart"), st.integers(0, 30)),
    ),
    max_size=25,
)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path))


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Bytes of each object put and read."""
    seen: dict[str, list[int]] = {"put": [], "read": []}
    put, read = Root.put, Root.read_bytes

    def counted_put(self: Root, key: str, data: bytes) -> None:
        if key.startswith(f"{HISTORY}/"):  # a claim elsewhere in this process may still have its heartbeat
            seen["put"].append(len(data))
        put(self, key, data)

    def counted_read(self: Root, key: str) -> bytes:
        data = read(self, key)
        seen["read"].append(len(data))
        return data

    monkeypatch.setattr(Root, "put", counted_put)
    monkeypatch.setattr(Root, "read_bytes", counted_read)
    return seen


def begun(root: Root, generation: int = 1, segment_records: int = SEGMENT_RECORDS, step: int = 10**9) -> Journal:
    """A journal that goes on after what is there, up to a step."""
    journal = Journal(root, generation, segment_records=segment_records)
    journal.rewind(step)
    return journal


def report(step: int) -> dict[str, Any]:
    """A record of the size a run writes."""
    return {"step": step, "images": step * 256, **{f"loss_t{i}": 1 / (step + i + 3) for i in range(10)}}


@pytest.mark.integration
@settings(max_examples=50)
@given(old=st.lists(st.integers(0, 2), max_size=8), size=st.integers(1, 4), operations=OPERATIONS)
def test_any_appends_and_rewinds_read_like_a_plain_list(
    old: list[int], size: int, operations: list[tuple[str, int]]
) -> None:
    """Also from a run recorded in one file, and with writers of earlier starts that go on, or begin again, late."""
    root = Root(f"memory://history-{uuid.uuid4()}")
    expected: list[dict[str, int]] = []
    for number, gain in enumerate(old):
        expected.append({"step": (expected[-1]["step"] if expected else 0) + gain, "number": -number})
    if old:
        root.put(ONE_FILE, b"".join(json.dumps(r).encode() + b"\n" for r in expected))
    generation, current = 1, begun(root, 1, size)
    earlier: list[Journal] = []
    follower = Follower(root)
    for number, (what, value) in enumerate(operations):
        record = {"step": (expected[-1]["step"] if expected else 0) + value, "number": number}
        if what == "append":
            current.append(record)
            expected.append(record)
            assert follower.news()[-1] == record
        elif what == "append late" and earlier:
            earlier[-1].append({**record, "late": 1})
        elif what == "late restart" and generation > 1:
            late = begun(root, generation - 1, size, value)
            late.append({**record, "late": 2})
        elif what in ("restart", "new generation"):
            earlier.append(current)
            generation += what == "new generation"
            current = begun(root, generation, size + number % 2, value)
            expected = [r for r in expected if r["step"] <= value]
        assert read_records(root) == expected


def test_a_follower_gets_every_record_once(root: Root) -> None:
    journal, follower, got = begun(root, 1, 4), Follower(root), []
    assert follower.news() == []
    for step in range(40):
        journal.append({"step": step})
        if step % 7 == 0:
            got += follower.news()
    got += follower.news()
    assert [r["step"] for r in got] == list(range(40))
    assert follower.news() == []


def test_a_follower_that_comes_late_begins_with_the_newest_segment(root: Root) -> None:
    journal = begun(root, 1, 4)
    for step in range(10):
        journal.append({"step": step})
    assert [r["step"] for r in Follower(root).news()] == [8, 9]
    Journal(root, 2).rewind(5)
    assert [r["step"] for r in Follower(root).news()] == [4, 5]


@pytest.mark.integration
def test_a_report_costs_the_same_however_long_the_run(root: Root, traffic: dict[str, list[int]]) -> None:
    """Written by the run and read by who watches it, each second: less than a segment, and a listing of starts."""
    journal, follower = begun(root), Follower(root)
    record_bytes = len(json.dumps(report(10**6))) + 1
    for step in range(8 * SEGMENT_RECORDS):
        journal.append(report(step))
        if step % 50 == 0:
            traffic["read"].clear()
            assert follower.news()[-1]["step"] == step
            assert sum(traffic["read"]) <= 2 * SEGMENT_RECORDS * record_bytes
    assert max(traffic["put"]) <= SEGMENT_RECORDS * record_bytes
    assert len(traffic["put"]) == 8 * SEGMENT_RECORDS


def test_a_restart_reads_no_more_of_the_history_than_it_drops(root: Root, traffic: dict[str, list[int]]) -> None:
    journal = begun(root, 1, 8)
    for step in range(800):
        journal.append(report(step))
    traffic["read"].clear()
    resumed = Journal(root, 2, segment_records=8)
    resumed.rewind(795)
    assert len(traffic["read"]) <= 3  # the start, and the segment with step 795
    assert [r["step"] for r in read_records(root)] == list(range(796))


def test_a_damaged_history_is_refused(root: Root, tmp_path: Path) -> None:
    journal = begun(root, 1, 2)
    for step in range(5):
        journal.append({"step": step})
    (first, second, _) = sorted(tmp_path.glob("history/*/*.jsonl"))
    second.write_text('{"step": 2}\n')
    with pytest.raises(InputError, match=r"history is damaged: .*000001\.jsonl holds 1 of 2 records"):
        read_records(root)
    second.write_text('{"step": 2}\n{"step": 3}\n')
    Journal(root, 2).rewind(3)
    first.unlink()
    with pytest.raises(InputError, match=r"history is damaged: .*000000\.jsonl holds 0 of 2 records"):
        read_records(root)
