"""Folder units: bytes, texts, sub-ranges and every failure of a read as a row."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import pytest
from source_images import write

from pipeline.errors import InputError
from pipeline.source.config import FolderSource
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import Ranges, map_ahead
from pipeline.source.reasons import Reason
from pipeline.storage.root import Root


def test_rows_carry_bytes_texts_and_their_place_in_the_unit(tmp_path):
    for index in range(5):
        write(tmp_path / f"{index}.jpg", f"bytes {index}")
    lines = [{"file_name": f"{i}.jpg", "text": f"t{i}", "label": i, "note": "n"} for i in range(4)]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    source = FolderSource(uri=str(tmp_path), name="here", extra=("note",))
    entries = list(list_entries(source))
    found = list(read_unit(source, entries, [(1, 2), (3, None)]))
    assert [(r.row, r.key, r.image, r.caption, r.label, r.extra) for r in found] == [
        (1, "1.jpg", b"bytes 1", "t1", 1, '{"note":"n"}'),
        (3, "3.jpg", b"bytes 3", "t3", 3, '{"note":"n"}'),
        (4, "4.jpg", b"bytes 4", None, None, None),
    ]
    assert {r.source for r in found} == {"here"}
    assert list(read_unit(source, entries, [])) == []


def test_failed_reads_are_rows(tmp_path, monkeypatch):
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        write(tmp_path / name, bytes(10 if name != "d.jpg" else 100))
    source = FolderSource(uri=str(tmp_path), max_bytes=50)
    entries = list(list_entries(source))
    (tmp_path / "a.jpg").unlink()
    entries[2] = replace(entries[2], mtime_ns=None)  # of no known version
    write(tmp_path / "c.jpg", bytes(60))  # grown since it was listed
    real = Root.read_version

    def read(self, key, version, *span):
        if key == "b.jpg":
            raise PermissionError(13, "Permission denied")
        assert key != "d.jpg", "an object known to be too large is not read"
        return real(self, key, version)

    monkeypatch.setattr(Root, "read_version", read)
    found = list(read_unit(source, entries, [(0, None)]))
    assert [r.reason for r in found] == ["missing", "read_failed", "too_many_bytes", "too_many_bytes"]
    assert all(r.status == "rejected" and r.image is None and r.message for r in found)


def test_a_filter_marks_entries_and_reads_none_of_their_bytes(tmp_path, monkeypatch):
    for name in ("a", "b", "c", "d"):
        write(tmp_path / f"{name}.png", name)
    lines = [{"file_name": f"{n}.png", "score": s, "text": n} for n, s in (("a", 1), ("b", 6), ("c", 9))]
    write(tmp_path / "metadata.jsonl", "\n".join(map(json.dumps, lines)))

    def metas(text):
        return {e.key: e.meta for e in list_entries(FolderSource(uri=str(tmp_path), filter=text))}

    # A changed filter changes the entries that it decides otherwise, and no others; without one nothing is marked.
    every, low, high = metas(None), metas("score > 5"), metas("score > 8")
    assert {k for k in every if every[k] != low[k]} == {"a.png", "d.png"}
    assert {k for k in every if high[k] != low[k]} == {"b.png"}
    read = []
    real = Root.read_version
    monkeypatch.setattr(Root, "read_version", lambda self, key, *at: (read.append(key), real(self, key, *at))[1])
    source = FolderSource(uri=str(tmp_path), filter="score > 5")
    entries = list(list_entries(source))
    found = list(read_unit(source, entries, [(0, None)]))
    assert [r.status for r in found] == ["filtered", "ok", "ok", "filtered"]
    assert [r.caption for r in found] == [None, "b", "c", None]
    assert [key for key in read if key.endswith(".png")] == ["b.png", "c.png"]


def test_a_filter_and_labels_from_directories_go_together(tmp_path):
    for name in ("cat/a.png", "dog/b.png"):
        write(tmp_path / name, name)
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "dog/b.png", "score": 9}))
    options = {"label_from": "directory", "classes": ("cat", "dog")}
    source = FolderSource(uri=str(tmp_path), filter="score > 5", **options)
    found = list(read_unit(source, list(list_entries(source)), [(0, None)]))
    assert [(r.status, r.label) for r in found] == [("filtered", None), ("ok", 1)]


def test_an_unusable_store_is_not_mistaken_for_bad_rows(tmp_path, monkeypatch):
    write(tmp_path / "a.jpg", "x")
    source = FolderSource(uri=str(tmp_path))
    entries = list(list_entries(source))

    def refuse(self, key, version, *span):
        raise InputError("no backend for this scheme")

    monkeypatch.setattr(Root, "read_version", refuse)
    with pytest.raises(InputError, match="no backend"):
        list(read_unit(source, entries, [(0, None)]))


@pytest.mark.parametrize("where", ["local", "memory"])
def test_what_has_changed_since_it_was_listed_gives_no_row(tmp_path, where):
    """The latent of another version would stand under the listed one's name for good; the next listing plans it."""
    root = Root(str(tmp_path) if where == "local" else f"memory://changed-{tmp_path.name}")
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        root.put(name, b"as listed")
    source = FolderSource(uri=root.uri)
    entries = list(list_entries(source))
    time.sleep(0.05)  # local files tell versions by their time alone
    root.put("b.jpg", b"no longer")
    found = list(read_unit(source, entries, [(0, None)]))
    assert [(r.row, r.image) for r in found] == [(0, b"as listed"), (2, b"as listed")]
    again = list(read_unit(source, list(list_entries(source)), [(1, 2)]))
    assert [(r.row, r.image) for r in again] == [(1, b"no longer")]


def test_remote_objects_are_fetched_ahead_in_order():
    root = Root("memory://folder-ahead")
    for index in range(30):
        root.put(f"{index:02d}.jpg", b"%d" % index)
    source = FolderSource(uri="memory://folder-ahead", read_ahead=4)
    entries = list(list_entries(source))
    assert [r.image for r in read_unit(source, entries, [(0, 30)])] == [b"%d" % i for i in range(30)]


def test_map_ahead_keeps_order_bounds_and_stops_when_left():
    running, most, lock = 0, 0, threading.Lock()

    def work(item):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with lock:
            running -= 1
        return item * 2

    taken = []
    source = (taken.append(i) or i for i in range(1000))
    results = map_ahead(work, source, 5)
    assert [next(results) for _ in range(10)] == [i * 2 for i in range(10)]
    results.close()
    assert len(taken) <= 16
    assert most <= 5
    assert list(map_ahead(work, range(3), 1)) == [0, 2, 4]


def test_ranges():
    ranges = Ranges([(2, 4), (7, None)])
    assert [r for r in range(10) if r in ranges] == [2, 3, 7, 8, 9]
    assert ranges.open_ended
    assert not ranges.beyond(100)
    closed = Ranges([(2, 4), (5, 5)])
    assert closed.beyond(5)
    assert not closed.beyond(3)
    assert closed.meets(3, 9)
    assert not closed.meets(4, 9)
    for wrong in ((-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="0 <= start <= stop"):
            Ranges([wrong])


def test_reasons_are_a_closed_list_with_a_status():
    assert {r.status for r in Reason} == {"rejected", "filtered"}
    assert Reason("read_failed").retryable
    assert not Reason.CORRUPT.retryable
    with pytest.raises(ValueError, match="nonsense"):
        Reason("nonsense")
