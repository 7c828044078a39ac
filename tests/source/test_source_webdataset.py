"""Tar shards: grouping, texts, damage, hostile names, partial reads."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from source_images import encode, gradient, write
from test_source_fuzz import mutate

from pipeline.source.config import WebDatasetSource
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import EndOfUnit, SourceRow
from pipeline.source.reading.tar import Archive, TarError
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
    first, mask, second, third, end = one_tar(tmp_path, files, extra=("score",))
    assert (first.key, first.caption, first.label, first.extra) == (
        "s.tar/d/0001",
        "a ünïcode caption",
        7,
        '{"score":2}',
    )
    assert first.image == JPEG
    assert (second.key, second.caption, second.label, second.image) == ("s.tar/0002", "from json", 3, b"png bytes")
    assert (third.row, third.caption, third.label, third.extra) == (3, None, None, None)
    assert (mask.reason, mask.key) == ("second_image", "s.tar/d/0001.mask.png?1")
    assert end == EndOfUnit(4)


def test_of_a_list_of_captions_the_first_is_the_samples_and_all_are_kept(tmp_path):
    fields = json.dumps({"text": ["one", "two"], "score": 2}).encode()
    first, _ = one_tar(tmp_path, [("0001.jpg", JPEG), ("0001.json", fields)])
    assert (first.caption, json.loads(first.extra)) == ("one", {"text": ["one", "two"]})


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
    take = Archive.take
    monkeypatch.setattr(Archive, "take", lambda self, size: (sizes.append(size), take(self, size))[1])
    found = rows(tmp_path, ranges=[(2, 4), (7, 8)])
    assert [(r.row, r.image[0]) for r in found] == [(2, 2), (3, 3), (7, 7)]
    assert sizes.count(5000) == 3
    assert len(sizes) <= 3 + 9, "reading goes on behind the last wanted row"
    assert [r.row for r in rows(tmp_path, ranges=[(8, None)])[:-1]] == [8, 9]


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
    assert [r.reason for r in found] == ["unsafe_name"] * 3 + [None, "no_image", "missing", "missing"]
    assert "/etc/passwd" in found[-1].message
    assert end == EndOfUnit(7)
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


def test_names_may_hold_dots(tmp_path):
    names = [f"IMG.{n:04d}.v1" for n in range(5)]
    files = [(f"{name}.{kind}", f"{name} {kind}".encode()) for name in names for kind in ("jpg", "txt")]
    *found, _ = one_tar(tmp_path, files)
    assert [(r.key, r.caption, r.image) for r in found] == [
        (f"s.tar/{name}", f"{name} txt", f"{name} jpg".encode()) for name in names
    ]


def test_parts_of_a_sample_are_no_samples(tmp_path):
    names = ("a.features.npy", "a.jpg", "a.mask.npy", "a.meta.json", "a.txt", "b.json", "b.jpg")
    *found, _ = one_tar(tmp_path, [(name, b"{}") for name in names])
    assert [(r.key, r.status, r.caption) for r in found] == [("s.tar/a", "ok", "{}"), ("s.tar/b", "ok", None)]


def test_every_further_image_is_a_row_that_says_why_it_is_not_taken(tmp_path):
    files = [("a.png", b"png"), ("a.jpg", b"jpg"), ("a.jpg", b"again"), ("a.mask.png", b"mask"), ("a.txt", b"t")]
    first, *others, end = one_tar(tmp_path, [*files, ("b.jpg", b"b")])
    assert (first.key, first.image, first.caption, end) == ("s.tar/a", b"jpg", "t", EndOfUnit(5))
    assert [(r.row, r.reason, r.status) for r in others] == [
        (1, "second_image", "filtered"),
        (2, "duplicate_key", "rejected"),
        (3, "second_image", "filtered"),
        (4, None, "ok"),
    ]
    # Read in part, rows keep their numbers.
    again = one_tar(tmp_path, [*files, ("b.jpg", b"b")], ranges=[(2, 5)])
    assert [(r.row, r.reason) for r in again] == [(2, "duplicate_key"), (3, "second_image"), (4, None)]


def test_a_text_twice_counts_once_or_is_told(tmp_path):
    same, other, _ = one_tar(
        tmp_path,
        [("a.jpg", b"1"), ("a.txt", b"t"), ("a.txt", b"t"), ("b.jpg", b"1"), ("b.txt", b"t"), ("b.txt", b"u")],
    )
    assert (same.caption, other.reason) == ("t", "bad_metadata")
    assert "b.txt is there twice" in other.message


def test_texts_apart_from_their_images_are_told_as_lost(tmp_path):
    first, second, lost, _, _ = one_tar(
        tmp_path, [("a.jpg", b"1"), ("b.jpg", b"1"), ("a.txt", b"t"), ("b.txt", b"t")]
    )
    assert (first.status, second.status, lost.reason) == ("ok", "ok", "duplicate_key")
    assert "apart from this .txt, which is lost to it" in lost.message
    assert "tar --sort=name" in lost.message


def linked(*links: tuple[str, str, bytes], mode: str = "w") -> bytes:
    """A tar of a/1.jpg, its caption, and links (name, where it leads, type)."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as tar:
        for name, target, kind in [*links[:1], ("a/1.jpg", "", b""), ("a/1.txt", "", b""), *links[1:]]:
            info = tarfile.TarInfo(name)
            if not kind:
                info.size = len(name)
                tar.addfile(info, io.BytesIO(name.encode()))
                continue
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return sink.getvalue()


def test_links_within_a_tar_are_what_they_lead_to(tmp_path):
    long = "x" * 150
    data = linked(
        ("a/0.jpg", "1.jpg", tarfile.SYMTYPE),  # to what comes later
        ("b/2.jpg", "a/1.jpg", tarfile.LNKTYPE),
        ("b/2.txt", "../a/1.txt", tarfile.SYMTYPE),
        ("b/3.jpg", "2.jpg", tarfile.SYMTYPE),  # to a link
        ("b/4.jpg", "../../a/1.jpg", tarfile.SYMTYPE),
        (f"b/{long}.jpg", f"../b/{long}.gone", tarfile.SYMTYPE),
        ("b/loop.jpg", "loop.jpg", tarfile.SYMTYPE),
        ("c.jpg", "b", tarfile.SYMTYPE),
    )
    write(tmp_path / "in/s.tar", data)
    *found, _ = rows(tmp_path / "in")
    told = [(r.key.removeprefix("s.tar/"), r.image, r.caption, r.reason) for r in found]
    assert told == [
        ("a/0", b"a/1.jpg", None, None),
        ("a/1", b"a/1.jpg", "a/1.txt", None),
        ("b/2", b"a/1.jpg", "a/1.txt", None),
        ("b/3", b"a/1.jpg", None, None),
        ("b/4", None, None, "missing"),
        (f"b/{long}", None, None, "missing"),
        ("b/loop", None, None, "missing"),
        ("c", None, None, "missing"),
    ]
    assert "no member of this archive" in found[5].message
    limited, *_ = rows(tmp_path / "in", max_bytes=3)
    assert limited.reason == "too_many_bytes"


def test_links_in_a_compressed_tar_are_refused_by_name(tmp_path):
    data = linked(("a/0.jpg", "1.jpg", tarfile.SYMTYPE), mode="w:gz")
    write(tmp_path / "in/s.tar.gz", data)
    first, second, _ = rows(tmp_path / "in")
    assert (first.reason, second.image) == ("missing", b"a/1.jpg")
    assert "compressed archive" in first.message


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACK = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "txz": lzma.compress, "tar.zst": zstd}


@pytest.mark.parametrize("suffix", sorted(PACK.keys() - {"tar"}))
def test_compressed_tars_are_read_and_damage_in_them_is_told(tmp_path, suffix):
    pack = PACK[suffix]
    plain = tar_of([(f"{i}.jpg", np.random.default_rng(i).bytes(3000)) for i in range(4)])
    write(tmp_path / "in" / f"s.{suffix}", pack(plain))
    *found, end = rows(tmp_path / "in")
    assert (end, [r.image for r in found]) == (
        EndOfUnit(4),
        [np.random.default_rng(i).bytes(3000) for i in range(4)],
    )
    packed = bytearray(pack(plain))
    packed[len(packed) // 2 :] = bytes(len(packed) - len(packed) // 2)
    write(tmp_path / "in" / f"s.{suffix}", bytes(packed))
    *_, damaged, end = rows(tmp_path / "in")
    assert damaged.reason == "corrupt_container"
    # Nothing unpacks without end.
    bomb = pack(plain[:-1024] + bytes(80 << 20))
    write(tmp_path / "in" / f"s.{suffix}", bomb)
    *_, last, _ = rows(tmp_path / "in")
    assert "100 times its size" in last.message


def test_joined_tars_are_read_to_the_end_of_the_last(tmp_path):
    first, second = tar_of([("a.jpg", b"1")]), tar_of([("b.jpg", b"2"), ("a.jpg", b"3")])
    write(tmp_path / "in/s.tar", first + second)
    a, b, twice, end = rows(tmp_path / "in")
    assert ([a.image, b.image], twice.reason, end) == ([b"1", b"2"], "duplicate_key", EndOfUnit(3))
    write(tmp_path / "in/s.tar", first + second[:700])
    assert [r.reason for r in rows(tmp_path / "in")[:-1]] == [None, "corrupt_container"]
    write(tmp_path / "in/s.tar", first + b"signed by somebody" * 100)
    assert len(rows(tmp_path / "in")) == 2, "what follows the end and is no archive is no part of it"


def test_a_status_of_somebody_else_means_nothing(tmp_path):
    files = [("a.jpg", b"1"), ("a.json", b'{"status": "active"}')]
    assert one_tar(tmp_path, files)[0].status == "ok"
    failed = [("a.jpg", b"1"), ("a.json", b'{"status": "failed_to_resize"}')]
    assert one_tar(tmp_path, failed)[0].reason == "source_status"
    assert one_tar(tmp_path, failed, status=None)[0].status == "ok"


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
        list(Archive(io.BytesIO(data)).members())


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
            list(Archive(io.BytesIO(data[:600] if "inside" in problem else data)).members())


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("suffix", sorted(PACK))
def test_mutated_tars_never_raise(tmp_path, suffix, count):
    data = PACK[suffix](
        tar_of([(f"{i}.{e}", bytes(300)) for i in range(6) for e in ("jpg", "txt", "json")], tarfile.PAX_FORMAT)
        + linked(("a/0.jpg", "1.jpg", tarfile.SYMTYPE), ("b.jpg", "a/1.jpg", tarfile.LNKTYPE))
    )
    rng = np.random.default_rng(count)
    for _ in range(count):
        write(tmp_path / f"s.{suffix}", mutate(data, rng))
        *found, end = rows(tmp_path)
        assert end == EndOfUnit(len(found))
        assert [r.row for r in found] == list(range(len(found)))
