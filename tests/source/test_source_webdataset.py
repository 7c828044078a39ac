"""Tar shards: grouping, texts, damage, hostile names, partial reads."""

from __future__ import annotations

import errno
import gzip
import io
import json
import tarfile

import numpy as np
import pytest
from source_images import encode, gradient, write

from pipeline.source.config import WebDatasetSource
from pipeline.source.reading.listing import list_entries
from pipeline.source.reading.readers import read_unit
from pipeline.source.reading.rows import EndOfUnit, SourceRow
from pipeline.source.reading.webdataset import TarError, members
from pipeline.storage.root import Root

JPEG = encode(gradient(), "JPEG")


def tar_of(files: list[tuple[str, bytes]], fmt: int = tarfile.USTAR_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=fmt) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def rows(folder, ranges=((0, None),), **fields) -> list[SourceRow | EndOfUnit]:
    source = WebDatasetSource(uri=str(folder), **fields)
    return list(read_unit(source, list(list_entries(source)), list(ranges)))


def one_tar(tmp_path, files, **fields) -> list[SourceRow | EndOfUnit]:
    write(tmp_path / "s.tar", tar_of(files))
    return rows(tmp_path, **fields)


def test_members_of_one_basename_form_a_sample(tmp_path):
    files = [
        ("d/0001.jpg", JPEG),
        ("d/0001.txt", "a ünïcode caption".encode()),
        ("d/0001.cls", b"7\n"),
        ("d/0001.json", json.dumps({"text": "unused", "score": 2, "label": 9}).encode()),
        ("d/0001.mask.png", b"no image of this sample"),
        ("./0002.JSON", json.dumps({"text": "from json", "label": 3}).encode()),
        ("./0002.png", b"png bytes"),
        ("0003.webp", b"w"),
    ]
    first, second, third, end = one_tar(tmp_path, files, extra=("score",))
    assert (first.key, first.caption, first.label, first.extra) == (
        "s.tar/d/0001",
        "a ünïcode caption",
        7,
        '{"score":2}',
    )
    assert first.image == JPEG
    assert (second.key, second.caption, second.label, second.image) == ("s.tar/0002", "from json", 3, b"png bytes")
    assert (third.row, third.caption, third.label, third.extra) == (2, None, None, None)
    assert end == EndOfUnit(3)


def test_shards_follow_each_other_in_one_unit(tmp_path):
    write(tmp_path / "a.tar", tar_of([("1.jpg", b"1"), ("2.jpg", b"2")]))
    write(tmp_path / "b.tar", tar_of([("1.jpg", b"3")]))
    write(tmp_path / "c.tar", tar_of([]))
    found = rows(tmp_path)
    assert [(r.row, r.key, r.image) for r in found[:-1]] == [
        (0, "a.tar/1", b"1"),
        (1, "a.tar/2", b"2"),
        (2, "b.tar/1", b"3"),
    ]
    assert found[-1] == EndOfUnit(3)


def test_gzip_and_remote_shards_read_alike(tmp_path):
    data = tar_of([(f"{i:03d}.{e}", JPEG if e == "jpg" else b"t") for i in range(20) for e in ("jpg", "txt")])
    write(tmp_path / "x/s.tar", data)
    write(tmp_path / "y/s.tar.gz", gzip.compress(data))
    Root("memory://wds-store").put("s.tar", data)
    plain, packed, remote = rows(tmp_path / "x"), rows(tmp_path / "y"), rows("memory://wds-store")
    assert len(plain) == 21
    for other in (packed, remote):
        assert [(r.row, r.image, r.caption) for r in other[:-1]] == [(r.row, r.image, r.caption) for r in plain[:-1]]


def test_only_wanted_rows_are_read_and_the_rest_is_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "s.tar", tar_of([(f"{i}.jpg", bytes([i]) * 5000) for i in range(10)]))
    sizes = []
    real = tarfile.TarInfo.frombuf
    from pipeline.source.reading import webdataset as tar

    monkeypatch.setattr(tar, "_read", lambda f, n, real=tar._read: (sizes.append(n), real(f, n))[1])
    found = rows(tmp_path, ranges=[(2, 4), (7, 8)])
    assert [(r.row, r.image[0]) for r in found] == [(2, 2), (3, 3), (7, 7)]
    assert sizes.count(5000) == 3
    assert len(sizes) <= 3 + 9, "reading goes on behind the last wanted row"
    assert [r.row for r in rows(tmp_path, ranges=[(8, None)])[:-1]] == [8, 9]
    assert real is not None


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_tail_is_one_rejected_row_and_then_the_end(tmp_path, packed):
    data = tar_of([(f"{i}.jpg", bytes(2000)) for i in range(5)])
    for cut in (3 * 2560 + 100, 3 * 2560 + 700, 3 * 2560, 5 * 2560):
        body = gzip.compress(data)[: len(gzip.compress(data)) * 2 // 3] if packed else data[:cut]
        write(tmp_path / ("s.tar.gz" if packed else "s.tar"), body)
        *good, lost, end = rows(tmp_path)
        assert all(r.status == "ok" for r in good)
        assert (lost.status, lost.reason, lost.row) == ("rejected", "corrupt_container", len(good))
        assert end == EndOfUnit(len(good) + 1)
        if packed:
            break


def test_a_flipped_header_byte_ends_the_shard_there(tmp_path):
    data = bytearray(tar_of([(f"{i}.jpg", bytes(2000)) for i in range(5)]))
    data[2 * 2560 + 3] ^= 0xFF
    write(tmp_path / "s.tar", bytes(data))
    found = rows(tmp_path)
    # Row 1 may have had more members behind the damage, so it goes with the rest.
    assert [(r.row, r.reason) for r in found[:-1]] == [(0, None), (1, "corrupt_container")]


def test_files_that_are_no_tar_and_vanished_ones_are_rows(tmp_path):
    write(tmp_path / "a.tar", b"not a tar at all" * 100)
    write(tmp_path / "b.tar", b"")
    write(tmp_path / "c.tar", tar_of([("1.jpg", b"1")]))
    source = WebDatasetSource(uri=str(tmp_path))
    entries = list(list_entries(source))
    (tmp_path / "c.tar").unlink()
    *found, end = read_unit(source, entries, [(0, None)])
    assert [(r.row, r.reason) for r in found] == [(0, "corrupt_container"), (1, "corrupt_container"), (2, "missing")]
    assert end == EndOfUnit(3)
    assert len({r.key for r in found}) == 3


def test_a_read_that_fails_on_the_way_is_a_retryable_row(tmp_path, monkeypatch):
    root = Root("memory://wds-broken")
    root.put("s.tar", tar_of([(f"{i}.jpg", bytes(9 << 20)) for i in range(3)]))
    real = Root.read_range

    def fail_late(self, key, start, length):
        if start > 12 << 20:
            raise ConnectionResetError("reset by peer")
        return real(self, key, start, length)

    source = WebDatasetSource(uri="memory://wds-broken")
    entries = list(list_entries(source))
    monkeypatch.setattr(Root, "read_range", fail_late)
    *found, end = read_unit(source, entries, [(0, None)])
    assert [r.reason for r in found] == [None, "read_failed"]
    assert end == EndOfUnit(2)


@pytest.mark.parametrize(
    ("wanted", "lost", "end"),
    [
        ([(0, None)], [0], EndOfUnit(1)),
        ([(40, None)], [40], EndOfUnit(41)),  # rows before were read by an earlier run
        ([(3, 5), (40, None)], [3, 4, 40], EndOfUnit(41)),
        ([(3, 5), (7, 8)], [3, 4, 7], None),
    ],
)
def test_a_tar_that_cannot_be_opened_loses_every_wanted_row_and_no_other(tmp_path, monkeypatch, wanted, lost, end):
    write(tmp_path / "s.tar", tar_of([(f"{i}.jpg", b"1") for i in range(60)]))
    source = WebDatasetSource(uri=str(tmp_path))
    entries = list(list_entries(source))

    def stale(root, key, size_bytes):
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr("pipeline.source.reading.webdataset.open_file", stale)
    found = list(read_unit(source, entries, wanted))
    assert [r.row for r in found if isinstance(r, SourceRow)] == lost
    assert {r.reason for r in found if isinstance(r, SourceRow)} == {"read_failed"}
    assert [r for r in found if isinstance(r, EndOfUnit)] == ([end] if end else [])


def test_a_tar_cut_inside_a_member_whose_name_is_no_text_says_so(tmp_path):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        info = tarfile.TarInfo("caf\xe9.jpg")
        info.size = 2000
        tar.addfile(info, io.BytesIO(bytes(2000)))
    write(tmp_path / "s.tar", sink.getvalue()[:1000])
    lost, end = rows(tmp_path)
    assert (lost.reason, end) == ("corrupt_container", EndOfUnit(1))
    assert "caf\\udce9.jpg" in lost.message
    lost.message.encode()


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, fmt):
    name = "d/" * 80 + "é" * 60
    write(tmp_path / "s.tar", tar_of([(name + ".jpg", b"1"), (name + ".txt", b"t"), ("z.jpg", b"2")], fmt))
    first, second, _ = rows(tmp_path)
    assert (first.key, first.caption) == (f"s.tar/{name}", "t")
    assert second.key == "s.tar/z"


def test_hostile_names_links_and_directories(tmp_path):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in ("../../etc/evil.jpg", "/abs.jpg", "a/../b.jpg", "ok.jpg", "._ok.jpg", "README"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"1"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link{kind!r}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    write(tmp_path / "in/s.tar", sink.getvalue())
    *found, end = rows(tmp_path / "in")
    assert [r.reason for r in found] == ["unsafe_name", "unsafe_name", "unsafe_name", None, "no_image"]
    assert end == EndOfUnit(5)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "s.tar"], "nothing is unpacked"


def test_samples_that_give_no_row(tmp_path):
    files = [
        ("a.txt", b"alone"),
        ("b.jpg", b"1"),
        ("b.cls", b"seven"),
        ("c.jpg", b"1"),
        ("c.json", b"{broken"),
        ("d.jpg", bytes(200)),
        ("e.jpg", b"1"),
        ("e.txt", b"\xff\xfe"),
        ("f.jpg", b"1"),
        ("f.json", b'{"status": "failed_to_download"}'),
        ("b.jpg", b"again"),
        ("g.jpg", b"1"),
        ("g.json", b" " * (2 << 20)),
    ]
    *found, _ = one_tar(tmp_path, files, max_bytes=100)
    assert [r.reason for r in found] == [
        "no_image",
        "bad_metadata",
        "bad_metadata",
        "too_many_bytes",
        "bad_metadata",
        "source_status",
        "duplicate_key",
        "bad_metadata",
    ]
    assert [r.status for r in found].count("filtered") == 1
    assert len({r.key for r in found}) == len(found)
    assert [r.row for r in found] == list(range(len(found)))


def test_img2dataset_json_gives_the_orientation(tmp_path):
    record = {"caption": "c", "status": "success", "exif": json.dumps({"Image Orientation": "Rotated 90 CW"})}
    row, _ = one_tar(tmp_path, [("1.jpg", JPEG), ("1.json", json.dumps(record).encode())], caption="caption")
    assert (row.caption, row.exif_orientation) == ("c", 6)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "no end-of-archive block"),
        (b"x" * 512, "no valid header"),
        (b"x" * 100, "no valid header"),
        (b"\x1f\x8b" + b"rubbish" * 100, "compressed archive is damaged"),
    ],
)
def test_tar_errors_say_what_is_wrong(data, problem):
    with pytest.raises(TarError, match=problem):
        list(members(io.BytesIO(data)))


def test_extended_headers_are_bounded_and_checked():
    def header(kind: bytes, size: int, body: bytes) -> bytes:
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, size
        return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)

    cases = [
        (header(tarfile.XHDTYPE, 1 << 30, b""), "extended header of 1073741824 bytes"),
        (header(tarfile.XHDTYPE, 500, b"1"), "ends inside an extended header"),
        (header(tarfile.XHDTYPE, 5, b"abcde"), "extended header cannot be read"),
        (header(tarfile.XHDTYPE, 2, b"0 "), "extended header cannot be read"),
        (header(tarfile.XHDTYPE, 10, b"10 size=x\n"), "no valid size"),
        (header(tarfile.REGTYPE, -5, b""), "negative size"),
    ]
    for data, problem in cases:
        # "ends inside" needs the data to stop there
        with pytest.raises(TarError, match=problem):
            list(members(io.BytesIO(data[:600] if "inside" in problem else data)))


def test_mutated_tars_never_raise(tmp_path):
    data = tar_of([(f"{i}.{e}", bytes(300)) for i in range(6) for e in ("jpg", "txt", "json")], tarfile.PAX_FORMAT)
    rng = np.random.default_rng(0)
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(int(rng.integers(1, 6))):
            broken[int(rng.integers(len(broken)))] = int(rng.integers(256))
        write(tmp_path / "s.tar", bytes(broken[: int(rng.integers(len(broken)))]))
        *found, end = rows(tmp_path)
        assert end == EndOfUnit(len(found))
        assert [r.row for r in found] == list(range(len(found)))
