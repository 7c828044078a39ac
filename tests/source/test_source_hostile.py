"""Containers and metadata made to harm: nothing grows, hangs or crashes, and every row is accounted for."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import signal
import tarfile
import threading
import time
import tracemalloc
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_images import encode, gradient, write
from test_source_webdataset import tar_of

from pipeline.errors import InputError
from pipeline.source.config import FolderSource, ParquetSource, WebDatasetSource
from pipeline.source.pixels.child_process import Child, Pool
from pipeline.source.reading import folder, webdataset
from pipeline.source.reading import parquet as table_child
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import MAX_STORED_BYTES, EndOfUnit
from pipeline.source.reading.tar import Archive, TarError
from pipeline.source.reasons import Reason
from pipeline.storage.root import Root

pytestmark = pytest.mark.integration

PNG = encode(gradient(), "PNG")


def rows(kind, folder, **fields):
    source = kind(uri=str(folder), **fields)
    return list(read_unit(source, list(list_entries(source)), [(0, None)]))


def grown(since: int) -> int:
    """MiB by which this process's largest size has grown."""
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - since) >> 10


def size_now() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@dataclass
class ObjectsBytes:
    """Of Python's objects: the most of a block, and what its end holds."""

    most: int = 0
    held: int = 0


@contextmanager
def objects_bytes():
    tracemalloc.start()
    size = ObjectsBytes()
    try:
        yield size
        size.held, size.most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()


# -- Parquet -----------------------------------------------------------------------------------------------------


def dictionary_bomb(path, value_bytes=40 << 20, count=4000):
    """Few bytes that stand for very many: one large value in the dictionary, and an index to it in every row."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([bytes(value_bytes)]))
    table = pa.table({"image": column, "text": ["t"] * count})
    pq.write_table(table, path, compression="zstd", store_schema=False, row_group_size=count // 2)
    assert path.stat().st_size < 1 << 20


def page_bomb(path):
    """One page of a few kilobytes that unpacks to 400 MiB."""
    pq.write_table(
        pa.table({"image": pa.array([bytes(400 << 20)], pa.large_binary())}),
        path,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
    )
    assert path.stat().st_size < 1 << 20


@pytest.mark.parametrize("bomb", [dictionary_bomb, page_bomb])
def test_pages_that_unpack_to_gigabytes_end_in_the_child(tmp_path, bomb):
    bomb(tmp_path / "a.parquet")
    source = ParquetSource(uri=str(tmp_path), memory_mb=512, max_bytes=1 << 30)
    before = size_now()
    (entry,) = list_entries(source)
    found = list(read_unit(source, [entry], [(0, None)]))
    assert [r.row for r in found] == list(range(entry.row_stop))
    assert {r.reason for r in found} == {"decode_memory"}
    assert Reason.DECODE_MEMORY.retryable, "a larger source.memory_mb may read it"
    assert grown(before) < 100
    # The child is sound, and another file is read by it.
    pq.write_table(pa.table({"image": [PNG]}), tmp_path / "a.parquet")
    assert [r.image for r in rows(ParquetSource, tmp_path, memory_mb=512)] == [PNG]


def varint(value: int) -> bytes:
    """A zigzag varint, as Thrift's compact protocol writes numbers."""
    value = value << 1 if value >= 0 else (-value << 1) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def with_footer(data: bytes, change) -> bytes:
    """A Parquet file with another footer."""
    length = int.from_bytes(data[-8:-4], "little")
    footer = change(data[-8 - length : -8])
    return data[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize("claim", [2**40, 2**62, -5, 1_200_000])
def test_footers_that_claim_more_rows_than_there_can_be(tmp_path, claim):
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.nulls(77_777, pa.binary())}), sink)
    data = sink.getvalue()
    assert data.count(varint(77_777)) >= 2
    write(tmp_path / "a.parquet", with_footer(data, lambda f: f.replace(varint(77_777), varint(claim))))
    row, end = rows(ParquetSource, tmp_path)
    assert (row.reason, end) == ("corrupt_container", EndOfUnit(1))
    assert "claims" in row.message


def test_footers_that_claim_a_few_rows_more_than_there_are(tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [PNG] * 500}), sink)
    lie = with_footer(sink.getvalue(), lambda f: f.replace(varint(500), varint(900)))
    write(tmp_path / "a.parquet", lie)
    found = rows(ParquetSource, tmp_path)
    assert [r.row for r in found] == list(range(900))
    assert [r.reason for r in found].count("corrupt_container") >= 400


def test_a_footer_that_aborts_its_reader_costs_only_the_child(tmp_path):
    """Arrow 25 ends the whole process over these two bytes: columns declared required with counts of their nulls."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [PNG], "text": ["t"]}), sink)
    assert b"\x25\x02" in sink.getvalue()
    write(tmp_path / "a.parquet", with_footer(sink.getvalue(), lambda f: f.replace(b"\x25\x02", b"\x25\x00")))
    pq.write_table(pa.table({"image": [PNG]}), tmp_path / "b.parquet")
    lost, good, end = rows(ParquetSource, tmp_path)
    assert lost.reason in ("decoder_crashed", "corrupt_container")
    assert (good.image, end) == (PNG, EndOfUnit(2))


def test_footers_without_end_or_sense(tmp_path):
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": [PNG]}), sink)
    good = sink.getvalue()
    bad = [
        good[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1",
        good[:-8] + b"\0\0\0\0PAR1",
        b"PAR1" * 3,
        with_footer(good, lambda f: f[:20] + b"\xfc\xff\xff\xff\x0f" + f[20:]),  # a list of 2^32 elements
        with_footer(good, lambda f: b"\x1c" * 100_000),  # structures in structures
        good[: len(good) // 2],
    ]
    for index, data in enumerate(bad):
        write(tmp_path / f"{index}.parquet", data)
    *found, end = rows(ParquetSource, tmp_path)
    assert [r.reason for r in found] == ["corrupt_container"] * len(bad)
    assert end == EndOfUnit(len(bad))


def fuzz_tables(folder, count: int, seed: int):
    """Outcomes of mutated Parquet files, one child for all; every planned row ends in exactly one way."""
    sink = io.BytesIO()
    images = [encode(gradient(20 + i, 30), "PNG") for i in range(12)]
    columns = {"image": images, "text": [f"caption {i}" for i in range(12)], "label": list(range(12))}
    pq.write_table(pa.table(columns), sink, row_group_size=4, compression="zstd", write_page_checksum=False)
    data = sink.getvalue()
    outcomes: dict[str, int] = {}
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        broken = bytearray(data)
        low = 0 if index % 2 else len(data) - 8 - int.from_bytes(data[-8:-4], "little")  # every other in the footer
        for _ in range(int(rng.integers(1, 6))):
            broken[int(rng.integers(low, len(broken)))] = int(rng.integers(256))
        write(folder / "a.parquet", bytes(broken[: int(rng.integers(len(broken)))] if index % 7 == 0 else broken))
        source = ParquetSource(uri=str(folder), label=None, memory_mb=1024)
        try:
            entries = list(list_entries(source))
        except InputError as error:  # a column's name is gone, or no row is left
            outcomes[str(error).split()[0]] = outcomes.get(str(error).split()[0], 0) + 1
            continue
        found = [r for r in read_unit(source, entries, [(0, None)]) if not isinstance(r, EndOfUnit)]
        planned = sum(1 if e.row_stop is None else e.row_stop - e.row_start for e in entries)
        assert [r.row for r in found] == list(range(planned))
        for row in found:
            outcomes[row.reason or "ok"] = outcomes.get(row.reason or "ok", 0) + 1
    return outcomes


def test_mutated_tables_never_raise(tmp_path):
    outcomes = fuzz_tables(tmp_path, 120, seed=3)
    assert outcomes["corrupt_container"] > 20
    assert outcomes["ok"] > 20


@pytest.mark.slow
def test_many_mutated_tables_never_raise(tmp_path):
    """Size by LATENTLOOM_FUZZ_COUNT; prints the outcomes."""
    for outcome, number in sorted(
        fuzz_tables(tmp_path, int(os.environ.get("LATENTLOOM_FUZZ_COUNT", "3000")), 11).items()
    ):
        print(f"{outcome:20} {number}")


def test_a_crash_of_the_child_is_a_reason(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [PNG] * 3}), tmp_path / "a.parquet")
    source = ParquetSource(uri=str(tmp_path))
    entries = list(list_entries(source))
    # A module that ends as soon as it is run.
    monkeypatch.setattr(table_child, "children", Pool(lambda memory_mb: Child("pipeline.errors", memory_mb)))
    found = list(read_unit(source, entries, [(0, None)]))
    assert [(r.row, r.reason) for r in found] == [(i, "decoder_crashed") for i in range(3)]
    (listed,) = list_entries(source)
    assert listed.row_stop is None, "the listing goes on, too"


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGPROF, "decode_timeout"), (signal.SIGSEGV, "decoder_crashed")]
)
def test_a_child_that_ends_midway_costs_only_the_rest(tmp_path, number, reason):
    noise = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
    pq.write_table(pa.table({"image": [noise] * 90}), tmp_path / "a.parquet", compression="none")
    source = ParquetSource(uri=str(tmp_path))
    entries = list(list_entries(source))
    child = table_child.children.idle.queue[-1]
    found = read_unit(source, entries, [(0, None)])
    first = next(found)
    os.kill(child._process.pid, number)
    rest = [first, *found]
    assert [r.row for r in rest] == list(range(90))
    good = [r.reason for r in rest].index(reason)
    assert good >= 1
    assert {r.reason for r in rest[good:]} == {reason}
    assert all(r.image == noise for r in rest[:good])
    assert rows(ParquetSource, tmp_path)[-1].image == noise, "the next file gets a new child"


def test_a_stopped_child_does_not_hang_the_reader(tmp_path, monkeypatch):
    pq.write_table(pa.table({"image": [PNG]}), tmp_path / "a.parquet")
    source = ParquetSource(uri=str(tmp_path))
    entries = list(list_entries(source))
    monkeypatch.setattr(table_child, "_SILENCE_S", 0.5)
    os.kill(table_child.children.idle.queue[-1]._process.pid, signal.SIGSTOP)
    assert [r.reason for r in read_unit(source, entries, [(0, None)])] == ["decoder_crashed"]


def test_a_reader_that_is_left_early_leaves_no_child_behind(tmp_path):
    pq.write_table(pa.table({"image": [PNG] * 500}), tmp_path / "a.parquet")
    source = ParquetSource(uri=str(tmp_path))
    found = read_unit(source, list(list_entries(source)), [(0, None)])
    child = table_child.children.idle.queue[-1]
    assert next(found).image == PNG
    found.close()
    assert not child.alive()


def test_threads_have_children_of_their_own(tmp_path):
    pq.write_table(pa.table({"image": [PNG] * 50}), tmp_path / "a.parquet")
    results: list[int] = []

    def work():
        results.append(sum(r.image == PNG for r in rows(ParquetSource, tmp_path)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [50, 50, 50]


def test_a_file_that_shrank_since_it_was_listed_loses_no_row(tmp_path):
    pq.write_table(pa.table({"image": [PNG] * 9}), tmp_path / "a.parquet")
    source = ParquetSource(uri=str(tmp_path))
    entries = list(list_entries(source))
    listed = entries
    entries = [replace(entry, mtime_ns=None) for entry in entries]  # of no known version
    pq.write_table(pa.table({"image": [PNG] * 4}), tmp_path / "a.parquet")
    assert list(read_unit(source, listed, [(0, None)])) == []
    found = list(read_unit(source, entries, [(0, None)]))
    assert [r.reason for r in found] == [None] * 4 + ["corrupt_container"] * 5
    assert "fewer rows than when it was listed" in found[-1].message
    pq.write_table(pa.table({"image": [PNG] * 30}), tmp_path / "a.parquet")
    assert [r.row for r in read_unit(source, entries, [(0, None)])] == list(range(9))


def test_texts_of_a_table_that_cannot_be_kept(tmp_path):
    broken = pa.array([b"\xff\xfe", b"fine"]).view(pa.string())
    long = pa.array(["fine", "x" * (MAX_STORED_BYTES + 1)])
    columns = {"image": [PNG] * 2, "text": broken, "long": long, "uri": ["x" * 9000, None]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    for fields, reasons in (
        ({}, ["bad_metadata", None]),
        ({"caption": "long"}, [None, "bad_metadata"]),
        ({"caption": None, "extra": ("long",)}, [None, "bad_metadata"]),
        ({"caption": None, "image": "uri"}, ["uri_refused", "no_image"]),
    ):
        assert [r.reason for r in rows(ParquetSource, tmp_path, **fields)] == reasons
    pq.write_table(pa.table({"image": [PNG] * 2, "label": pa.array([2**63, 5], pa.uint64())}), tmp_path / "a.parquet")
    assert [r.reason for r in rows(ParquetSource, tmp_path)] == ["bad_metadata", None]


# -- tar shards --------------------------------------------------------------------------------------------------


def test_a_packed_tar_may_not_unpack_to_any_size(tmp_path):
    before = size_now()
    padding = io.BytesIO()
    with gzip.open(padding, "wb", compresslevel=9) as packed:
        info = tarfile.TarInfo("huge.bin")
        info.size = 300 << 20
        packed.write(info.tobuf())
        for _ in range(300):
            packed.write(bytes(1 << 20))
    assert padding.tell() < 1 << 20
    write(tmp_path / "s.tar.gz", padding.getvalue())
    lost, end = rows(WebDatasetSource, tmp_path)
    assert (lost.reason, end) == ("corrupt_container", EndOfUnit(1))
    assert "100 times its size" in lost.message
    assert grown(before) < 200


def test_endless_headers_in_a_packed_tar_end_too(tmp_path):
    sink = io.BytesIO()
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 20
    with gzip.open(sink, "wb", compresslevel=1) as packed:
        body = b"11 path=ab\n" * ((1 << 20) // 11)
        for _ in range(200):
            packed.write(info.tobuf(tarfile.GNU_FORMAT) + body + bytes((1 << 20) - len(body)))
    with pytest.raises(TarError, match=r"100 times its size|cannot be read"):
        list(Archive(io.BytesIO(sink.getvalue())).members())


@pytest.mark.parametrize("size", [8 << 30, 10**17, 2**70])
def test_members_that_claim_more_than_the_file_has(tmp_path, size):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
        ok = tarfile.TarInfo("a.jpg")
        ok.size = 3
        tar.addfile(ok, io.BytesIO(b"abc"))
    claim = tarfile.TarInfo("b.bin")
    claim.size = size
    write(tmp_path / "s.tar", sink.getvalue()[:1024] + claim.tobuf(tarfile.GNU_FORMAT) + b"few")
    first, lost, end = rows(WebDatasetSource, tmp_path)
    assert (first.image, lost.reason, end) == (b"abc", "corrupt_container", EndOfUnit(2))


def test_holes_of_sparse_members_are_never_filled(tmp_path):
    before = size_now()
    # GNU's old format: a stored size of 512 bytes that stand for a terabyte.
    info = tarfile.TarInfo("old.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 512
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    header[483:495] = b"\x80" + bytes(6) + (1 << 39).to_bytes(5, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    # POSIX's: the same said in an extended header.
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n35 GNU.sparse.realsize=99999999999\n"
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, len(records)
    posix = tarfile.TarInfo("new.jpg")
    posix.size = 512
    body = extended.tobuf(tarfile.GNU_FORMAT) + records + bytes(512 - len(records))
    body += posix.tobuf(tarfile.GNU_FORMAT) + b"1\n0\n1\n".ljust(512, b"\0")
    write(tmp_path / "s.tar", bytes(header) + bytes(512) + body + bytes(1024))
    *found, end = rows(WebDatasetSource, tmp_path)
    assert all(r.image is None or len(r.image) <= 512 for r in found)
    assert end == EndOfUnit(len(found))
    assert grown(before) < 100


def test_a_tar_of_ever_more_samples_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "_MAX_SAMPLES", 10)
    write(tmp_path / "s.tar", tar_of([(f"{i}.jpg", b"1") for i in range(30)]))
    *found, lost, end = rows(WebDatasetSource, tmp_path)
    assert [r.status for r in found] == ["ok"] * 10
    assert (lost.row, lost.reason) == (10, "corrupt_container")
    assert "more than 10 samples" in lost.message
    assert end == EndOfUnit(11)


def test_of_many_images_of_a_sample_one_is_held(tmp_path, monkeypatch):
    held = []
    real = webdataset._take

    def take(sample, *rest):
        real(sample, *rest)
        held.append(sum(map(len, sample.parts.values())))

    monkeypatch.setattr(webdataset, "_take", take)
    extensions = ("image", "tiff", "png", "webp", "jpg", "bmp")
    write(tmp_path / "s.tar", tar_of([(f"a.{e}", e.encode() + bytes(100)) for e in extensions]))
    row, *others, _ = rows(WebDatasetSource, tmp_path)
    assert row.image.startswith(b"jpg")
    assert [other.reason for other in others] == ["second_image"] * 5
    assert max(held) <= 105


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.json", '{"label": 1' + "0" * 30 + "}", "bad_metadata"),
        ("a.json", '{"label": ' + "9" * 5000 + "}", "bad_metadata"),
        ("a.json", r'{"text": "\ud800"}', "bad_metadata"),
        ("a.json", r'{"note": "\ud800"}', "bad_metadata"),
        ("a.json", '{"note": ' + "[" * 5000 + "]" * 5000 + "}", "bad_metadata"),
        ("a.json", '{"note": "' + "\u00fc" * 600_000 + '"}', "bad_metadata"),
        ("a.txt", "x" * (MAX_STORED_BYTES + 1), "bad_metadata"),
        ("a.cls", "9" * 30, "bad_metadata"),
        ("a.json", '{"score": "high"}', "bad_metadata"),
        ("a.json", '{"score": 4}', "row_filter"),
        ("a.json", '{"score": 6}', None),
    ],
)
def test_texts_of_a_sample_that_cannot_be_kept(tmp_path, name, text, reason):
    write(tmp_path / "s.tar", tar_of([("a.jpg", PNG), (name, text.encode()), ("b.jpg", PNG)]))
    first, second, _ = rows(WebDatasetSource, tmp_path, extra=("*",), filter="score > 5 or score is None")
    assert (first.reason, second.reason) == (reason, None)
    pa.Table.from_pylist([{"text": first.caption, "label": first.label, "extra": first.extra}])


def test_names_without_end(tmp_path):
    names = [("d/" * 3000 + "a.jpg", b"1"), ("b.jpg", b"1")]
    write(tmp_path / "s.tar", tar_of(names, tarfile.PAX_FORMAT))
    first, second, _ = rows(WebDatasetSource, tmp_path)
    assert (first.reason, second.reason) == ("unsafe_name", None)
    assert len(first.key) < 200


# -- metadata of a folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "label": 1' + "0" * 30 + "}", "line 1: the label is beyond"),
        ("metadata.jsonl", r'{"file_name": "a.png", "text": "\ud800"}', "line 1: the caption cannot be written"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "' + "x" * 1_100_000 + '"}', "line 1: the caption take"),
        ("metadata.jsonl", '{"file_name": "a.png", "score": "high"}', "line 1: the filter compares 'high'"),
        ("metadata.csv", "file_name,score\na.png,high\n", "line 2: the filter needs a number where it finds 'high'"),
        ("metadata.csv", "file_name,text\na.png,b\n", "line 1: there is no column score, which source.filter names"),
        ("metadata.csv", "file_name,score\na.png," + "9" * 2_000_000, "line 2: field larger than field limit"),
        ("metadata.csv", "file_name," + "s" * 2_000_000 + "\na.png,1", "field larger than field limit"),
    ],
)
def test_lines_that_cannot_be_kept_stop_the_listing(tmp_path, name, text, problem):
    write(tmp_path / "a.png", PNG)
    write(tmp_path / name, text)
    with pytest.raises(InputError, match=problem):
        rows(FolderSource, tmp_path, filter="score > 5", strict=True)


def test_a_line_that_would_become_gigabytes_is_not_parsed(tmp_path):
    write(tmp_path / "a.png", PNG)
    write(tmp_path / "metadata.jsonl", '{"a": [' + "{}," * (6 << 20) + '{}]}\n{"file_name": "a.png", "text": "t"}')
    good, bad = sorted(rows(FolderSource, tmp_path), key=lambda row: row.key)
    assert (good.key, good.caption) == ("a.png", "t")
    assert (bad.reason, "bytes, at most 16,777,216" in bad.message) == ("bad_metadata", True)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_what_a_line_becomes_while_it_is_parsed_is_the_childs(tmp_path, name):
    write(tmp_path / "a.png", PNG)
    # Twenty times its size as objects, and a row of as many cells.
    odd = '{"a": [' + "[]," * (5 << 20) + "[]]}" if name.endswith("jsonl") else "," * (15 << 20)
    good = '{"file_name": "a.png", "text": "t"}' if name.endswith("jsonl") else "file_name,text\na.png,t"
    write(tmp_path / name, f"{good}\n{odd}\n")
    source = FolderSource(uri=str(tmp_path))
    list(list_entries(source))  # what is imported meanwhile counts, too
    with objects_bytes() as size:
        entries = list(list_entries(source))
    assert size.most < 16 << 20  # the parts of the file on their way to the child
    a, bad = read_unit(source, entries, [(0, None)])
    assert (a.key, a.caption, bad.reason) == ("a.png", "t", "bad_metadata")


def test_a_line_of_csv_without_end_is_one_row(tmp_path):
    for name in ("a.png", "b.png"):
        write(tmp_path / name, PNG)
    write(tmp_path / "metadata.csv", "file_name,text\na.png,t" + "x" * (40 << 20) + "\nb.png,t\n")
    a, b, bad = sorted(rows(FolderSource, tmp_path), key=lambda row: row.key)
    assert (a.caption, b.key, b.caption) == (None, "b.png", "t")
    assert (bad.reason, "field larger than field limit" in bad.message) == ("bad_metadata", True)


def test_a_metadata_file_that_ends_its_process_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(table_child, "_WHOLE_MEMORY_MB", 1)  # less than it has when it starts
    write(tmp_path / "a.png", PNG)
    write(tmp_path / "metadata.csv", "file_name,text\na.png," + "x" * (1 << 20) + "\n")
    with pytest.raises(InputError, match=r"metadata\.csv cannot be read: .*(memory|ended by)"):
        rows(FolderSource, tmp_path)


def test_metadata_are_held_as_columns(tmp_path):
    count = 200_000
    lines = (
        f'{{"file_name": "{n:09}.png", "text": "a photograph of some kind", "label": {n}}}\n' for n in range(count)
    )
    write(tmp_path / "metadata.jsonl", "".join(lines))
    metadata = folder.FolderMetadata(Root(str(tmp_path)), FolderSource(uri=str(tmp_path), label="label"))
    columns = pa.total_allocated_bytes()
    with objects_bytes() as size:
        assert next(metadata.enter("a.png"))[0] == "000000000.png"
    assert json.loads(metadata.record_of("000199999.png"))["label"] == 199_999
    assert size.held < 1 << 20
    assert pa.total_allocated_bytes() - columns < 1.5 * (tmp_path / "metadata.jsonl").stat().st_size


def test_metadata_of_absurd_size_are_not_read(tmp_path):
    write(tmp_path / "a.png", PNG)
    with open(tmp_path / "metadata.jsonl", "wb") as file:
        file.truncate(40 << 30)  # a hole: it takes no disk
    before, began = size_now(), time.process_time()
    with pytest.raises(InputError, match="has 42949672960 bytes"):
        rows(FolderSource, tmp_path)
    assert grown(before) < 50
    assert time.process_time() - began < 60
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.png", "text": "x" * 100}))
    with pytest.raises(InputError, match="max_metadata_bytes = 50"):
        rows(FolderSource, tmp_path, max_metadata_bytes=50)
