"""The run's record: what the newest checkpoint leads to, at a price that does not grow; also of earlier releases."""

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
from pipeline.train.retention import COUNT, HISTORY, SEGMENT_RECORDS, History, read_records
from tests.train.earlier_history import write_segments

OPERATIONS = st.lists(
    st.tuples(st.sampled_from(("append", "checkpoint", "resume", "lose")), st.integers(0, 5)), max_size=40
)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path))


class Run:
    """Checkpoints of a run without tensors: a marker each, once what it names is written."""

    def __init__(self, root: Root, segment_records: int = SEGMENT_RECORDS) -> None:
        self.root, self.segment_records = root, segment_records
        self.history, self.taken = History(root, segment_records=segment_records), list[str]()

    def checkpoint(self, step: int) -> str:
        name = f"{step:015d}-{len(self.taken):08x}"
        objects, count = self.history.cut(name)
        self.history.write(objects)
        marker = {"meta": {"images": step, "step": step}, "files": {}, COUNT: count}
        self.root.put(f"checkpoints/{name}/COMPLETE.json", json.dumps(marker).encode())
        self.taken.append(name)
        return name

    def resume(self, name: str) -> None:
        self.history = History(self.root, segment_records=self.segment_records)
        self.history.go_on(name, json.loads(self.root.read_bytes(f"checkpoints/{name}/COMPLETE.json")))

    def remove(self, name: str) -> None:
        """As retention does it."""
        for info in list(self.root.list(f"checkpoints/{name}")):
            self.root.delete(info.key)


def report(step: int) -> dict[str, Any]:
    """A record of the size a run writes."""
    return {"step": step, "images": step * 256, **{f"loss_t{i}": 1 / (step + i + 3) for i in range(10)}}


@pytest.mark.integration
@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 4), operations=OPERATIONS)
def test_what_a_checkpoint_leads_to_is_what_was_reported_before_it(
    size: int, operations: list[tuple[str, int]]
) -> None:
    """Whichever earlier checkpoint a start goes on from, and whichever others retention has removed."""
    run = Run(Root(f"memory://history-{uuid.uuid4()}"), size)
    reported: list[dict[str, Any]] = []
    kept: dict[str, list[dict[str, Any]]] = {}
    for step, (what, value) in enumerate(operations):
        if what == "append":
            for number in range(value):
                reported.append({"step": step, "number": number})
                run.history.append(reported[-1])
        elif what == "checkpoint":
            name = run.checkpoint(step)
            kept[name] = list(reported)
            assert read_records(run.root) == reported
        elif what == "resume" and kept:
            name = sorted(kept)[-1 - value % len(kept)]
            run.resume(name)
            reported = list(kept[name])
        elif what == "lose" and len(kept) > 1:
            name = sorted(kept)[value % (len(kept) - 1)]
            run.remove(name)
            del kept[name]
    for name, records in kept.items():
        run.resume(name)
        run.checkpoint(10**6 + len(run.taken))
        assert read_records(run.root) == records


def test_a_checkpoint_costs_the_same_however_long_the_run(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written with it, and read by who goes on from it: less than a segment, and what is new."""
    sizes: list[int] = []
    create, read = Root.put_if_absent, Root.read_bytes

    def counted_create(self: Root, key: str, data: bytes) -> bool:
        sizes.append(len(data))
        return create(self, key, data)

    def counted_read(self: Root, key: str) -> bytes:
        data = read(self, key)
        sizes.append(len(data))
        return data

    monkeypatch.setattr(Root, "put_if_absent", counted_create)
    monkeypatch.setattr(Root, "read_bytes", counted_read)
    record_bytes, run = len(json.dumps(report(10**6))) + 1, Run(root)
    for step in range(8 * SEGMENT_RECORDS):
        run.history.append(report(step))
        if step % 50 == 0:
            sizes.clear()
            run.resume(run.checkpoint(step))
            assert sum(sizes) <= (3 * SEGMENT_RECORDS + 50) * record_bytes
    assert len(list(root.list(HISTORY))) == 7
    assert [r["step"] for r in read_records(root)] == list(range(step // 50 * 50 + 1))


def test_a_damaged_history_is_refused(root: Root, tmp_path: Path) -> None:
    run = Run(root, 2)
    for step in range(5):
        run.history.append({"step": step})
    name = run.checkpoint(5)
    second = max(tmp_path.glob("history/*"))
    whole = second.read_text()
    second.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match=r"history is damaged: .*history.jsonl holds 4 of 5 records"):
        read_records(root)
    second.unlink()
    with pytest.raises(InputError, match=r"history is damaged: .*000001\.jsonl is gone"):
        read_records(root)
    second.write_text(whole)
    (tmp_path / "checkpoints" / name / "history.jsonl").unlink()
    with pytest.raises(InputError, match=r"history is damaged: .*history\.jsonl is gone"):
        run.resume(name)


OLD = [{"step": step, "images": step * 16} for step in range(12)]


@pytest.mark.parametrize("written", ["one file", "segments", "segments of a second start"])
def test_a_run_of_an_earlier_release_is_read_and_gone_on_with(root: Root, written: str) -> None:
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in OLD)
    if written == "one file":
        root.put("history.jsonl", lines)
    else:
        write_segments(root, OLD, starts=1 if written == "segments" else 2)
    run = Run(root, 4)
    name = "000000000000009-00000000"
    marker = {"meta": {"images": 9, "step": 9}, "files": {}}
    root.put(f"checkpoints/{name}/COMPLETE.json", json.dumps(marker).encode())
    assert read_records(root) == OLD  # nobody has gone on with it
    run.resume(name)
    run.history.append({"step": 10, "again": True})
    run.checkpoint(10)
    assert read_records(root) == [*OLD[:10], {"step": 10, "again": True}]


def test_a_damaged_history_of_an_earlier_release_is_refused(root: Root, tmp_path: Path) -> None:
    write_segments(root, OLD, starts=2)
    first = min(tmp_path.glob("history/000001-000001/*"))
    first.write_text(first.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match=r"history is damaged: .*000000\.jsonl holds 1 of 4 records"):
        read_records(root)
    first.unlink()
    with pytest.raises(InputError, match=r"history is damaged: .*000000\.jsonl holds 0 of 4 records"):
        read_records(root)
