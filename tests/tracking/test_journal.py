from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.tracking.journal import Header, JournalReader, JournalWriter, adopt, gate, journals

Build = Callable[..., Header]


def metric(step: int) -> dict[str, object]:
    return {"kind": "metrics", "t": 1, "step": step, "values": {"loss": 0.5}}


def steps(reader: JournalReader) -> list[int]:
    return [r["step"] for _, r in reader.pending() if r is not None and r["kind"] == "metrics"]


def test_what_is_written_is_read_back_while_it_is_being_written(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    reader = JournalReader(writer.path)
    assert reader.header() == header()
    for step in range(3):
        writer.append(metric(step))
    assert steps(reader) == [0, 1, 2]
    writer.close()


def test_confirmed_records_are_not_read_again_even_by_another_reader(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    for step in range(4):
        writer.append(metric(step))
    reader = JournalReader(writer.path)
    ends = [end for end, _ in reader.pending()]
    reader.confirm(ends[2], run_id="abc", refused=1)  # header, 0, 1
    again = JournalReader(writer.path)
    assert steps(reader) == steps(again) == [2, 3]
    assert (again.confirmed.run_id, again.confirmed.refused) == ("abc", 1)
    again.confirm(ends[-1])
    assert again.num_unsent_bytes() == 0
    assert again.confirmed.run_id == "abc"
    writer.close()


def test_a_torn_last_line_is_ignored_wherever_it_was_torn(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    for step in range(2):
        writer.append(metric(step))
    writer.close()
    whole = writer.path.read_bytes()
    last_line = whole[whole.rstrip(b"\n").rindex(b"\n") + 1 :]
    for kept in range(len(last_line)):
        writer.path.write_bytes(whole[: len(whole) - len(last_line) + kept])
        assert steps(JournalReader(writer.path)) == [0]


def test_a_damaged_line_costs_only_itself(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    for step in range(3):
        writer.append(metric(step))
    writer.close()
    lines = writer.path.read_bytes().split(b"\n")
    lines[2] = b"\x00\xff" + lines[2][5:]
    writer.path.write_bytes(b"\n".join(lines))
    reader = JournalReader(writer.path)
    assert steps(reader) == [0, 2]
    assert [r for _, r in reader.pending()][2] is None


def test_a_line_longer_than_a_block_is_read_whole(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    writer.append({"kind": "tags", "values": {"a": "x" * 5000}})
    reader = JournalReader(writer.path)
    reader.confirm(next(end for end, _ in reader.pending()))
    assert [r["values"]["a"] for _, r in reader.pending(max_bytes=100) if r] == ["x" * 5000]
    writer.append(metric(1))
    torn = writer.path.read_bytes() + b"y" * 300
    writer.path.write_bytes(torn)
    reader.confirm(len(torn) - 300)
    assert list(reader.pending(max_bytes=100)) == []
    writer.close()


def test_a_file_that_is_no_journal_of_this_version_has_no_header(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    writer.close()
    text = writer.path.read_text()
    for other in ("", "garbage\n", text.replace('"version":1', '"version":2'), text.replace('"role"', '"rule"')):
        writer.path.write_text(other)
        assert JournalReader(writer.path).header() is None


def test_a_lost_or_torn_state_file_means_sending_again(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    writer.append(metric(7))
    reader = JournalReader(writer.path)
    reader.confirm(writer.path.stat().st_size)
    writer.path.with_suffix(".state").write_text('{"offset": 12')
    assert steps(JournalReader(writer.path)) == [7]
    writer.close()


def test_only_the_journal_of_a_dead_process_can_be_adopted(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    assert journals(tmp_path) == [writer.path]
    with adopt(writer.path) as mine:
        assert not mine
    writer.close()
    with adopt(writer.path) as mine, adopt(writer.path) as twice:
        assert mine
        assert not twice
    with adopt(tmp_path / "0-gone.jsonl") as mine:
        assert not mine


def test_one_process_at_a_time_passes_the_gate(tmp_path: Path) -> None:
    with gate(tmp_path) as first, gate(tmp_path) as second:
        assert first
        assert not second
    with gate(tmp_path) as third:
        assert third


def test_a_full_disk_is_reported_once_and_counted(
    tmp_path: Path, header: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = JournalWriter(tmp_path, header())

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        writer.append(metric(0))
        writer.append(metric(1))
    writer.append(metric(2))
    assert writer.num_lost == 2
    assert caplog.text.count("records are being lost") == 1
    assert steps(JournalReader(writer.path)) == [2]
    writer.close()
    writer.append(metric(3))
    assert writer.num_lost == 3
    assert steps(JournalReader(writer.path)) == [2]


def test_the_record_after_a_half_written_one_is_whole(
    tmp_path: Path, header: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = JournalWriter(tmp_path, header())
    real = os.write
    with monkeypatch.context() as broken:
        broken.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:9]))
        writer.append(metric(0))
    writer.append(metric(1))
    assert steps(JournalReader(writer.path)) == [1]
    writer.close()


def test_artifact_bytes_are_copied_at_once(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path / "j", header())
    source = tmp_path / "sheet.png"
    source.write_bytes(b"first")
    names = [writer.spool("sheet.png", source), writer.spool("a.txt", b"text")]
    source.write_bytes(b"second")
    reader = JournalReader(writer.path)
    assert [reader.local_file(str(name)).read_bytes() for name in names] == [b"first", b"text"]
    assert writer.spool("x", tmp_path / "absent") is None
    writer.close()
    reader.discard()
    assert list((tmp_path / "j").iterdir()) == []


def test_a_journal_with_refused_records_is_kept_but_not_offered_again(tmp_path: Path, header: Build) -> None:
    writer = JournalWriter(tmp_path, header())
    writer.close()
    reader = JournalReader(writer.path)
    reader.confirm(5, refused=1)
    reader.discard()
    assert journals(tmp_path) == []
    assert writer.path.with_suffix(".refused").is_file()


def test_what_waits_for_the_store_is_private_whatever_the_umask(tmp_path: Path, header: Build) -> None:
    (tmp_path / "figure.png").write_bytes(b"png")
    before = os.umask(0)
    try:
        writer = JournalWriter(tmp_path / "deep" / "journal", header())
        writer.spool("text.txt", b"a prompt")
        writer.spool("figure.png", tmp_path / "figure.png")
        writer.close()
        JournalReader(writer.path).confirm(1)
    finally:
        os.umask(before)
    below = [tmp_path / "deep" / "journal", *(tmp_path / "deep" / "journal").rglob("*")]
    assert len(below) >= 7
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in below if path.stat().st_mode & 0o077} == {}
