"""Parquet tables: bytes, structs, URIs, filters, img2dataset's columns, damage, partial reads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_images import encode, gradient, write

from pipeline.errors import InputError
from pipeline.source.config import FolderSource, ImageConfig, ParquetSource, WebDatasetSource
from pipeline.source.pixels.prepare import prepare
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import EndOfUnit
from pipeline.storage.root import Root

JPEG = encode(gradient(), "JPEG")


def table(count: int = 10, **columns) -> pa.Table:
    base = {"image": [JPEG + bytes([i]) for i in range(count)], "text": [f"caption {i}" for i in range(count)]}
    return pa.table({**base, **columns})


def rows(uri, ranges=((0, None),), **fields):
    source = ParquetSource(uri=str(uri), **fields)
    return list(read_unit(source, list(list_entries(source)), list(ranges)))


def test_bytes_captions_labels_and_extra_columns(tmp_path):
    pq.write_table(table(3, label=[2, None, 1], score=[0.5, 1.5, None]), tmp_path / "a.parquet")
    found = rows(tmp_path, extra=("score",))
    assert [(r.row, r.key, r.caption, r.label, r.extra) for r in found] == [
        (0, "a.parquet#0", "caption 0", 2, '{"score":0.5}'),
        (1, "a.parquet#1", "caption 1", None, '{"score":1.5}'),
        (2, "a.parquet#2", "caption 2", 1, '{"score":null}'),
    ]
    assert found[1].image == JPEG + b"\1"
    assert json.loads(rows(tmp_path, extra=("*",), label=None)[0].extra) == {"label": 2, "score": 0.5}


def test_of_a_list_of_captions_the_first_is_the_rows_and_all_are_kept(tmp_path):
    captions = [["one", "two"], [None, "three"], [], None]
    pq.write_table(table(4, text=captions, score=[1, 2, 3, 4]), tmp_path / "a.parquet")
    found = rows(tmp_path, extra=("score",))
    assert [r.caption for r in found] == ["one", "three", None, None]
    assert json.loads(found[0].extra) == {"score": 1, "text": ["one", "two"]}
    assert [json.loads(r.extra).get("text") for r in found[1:]] == [[None, "three"], [], None]
    assert json.loads(rows(tmp_path, extra=("*",))[0].extra) == {"score": 1, "text": ["one", "two"]}
    pq.write_table(table(1, text=[[5]]), tmp_path / "a.parquet")
    assert rows(tmp_path)[0].reason == "bad_metadata"


def test_the_struct_of_hugging_face_datasets(tmp_path):
    write(tmp_path / "there.jpg", b"by path")
    images = [
        {"bytes": JPEG, "path": "x.jpg"},
        {"bytes": None, "path": "there.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    found = rows(tmp_path)
    assert [r.image for r in found] == [JPEG, b"by path", None, None]
    assert [r.reason for r in found] == [None, None, "no_image", "no_image"]


def test_uris_are_followed_only_where_allowed(tmp_path):
    write(tmp_path / "in/ok.jpg", b"relative")
    write(tmp_path / "allowed/ok.jpg", b"absolute")
    write(tmp_path / "allowed/large.jpg", bytes(500))
    write(tmp_path / "secret", b"secret")
    uris = [
        "ok.jpg",
        f"{tmp_path}/allowed/ok.jpg",
        f"{tmp_path}/secret",
        "../secret",
        f"{tmp_path}/allowed/../secret",
        "file:///etc/passwd",
        "~/x",
        "gone.jpg",
        f"{tmp_path}/allowed/large.jpg",
        None,
        f"{tmp_path}/allowedX/ok.jpg",
    ]
    pq.write_table(pa.table({"url": uris}), tmp_path / "in/a.parquet")
    found = rows(tmp_path / "in", image="url", uri_prefixes=(f"{tmp_path}/allowed",), max_bytes=100)
    refused = "uri_refused"
    assert [r.reason for r in found] == [
        None,
        None,
        refused,
        refused,
        refused,
        refused,
        refused,
        "missing",
        "too_many_bytes",
        "no_image",
        refused,
    ]
    assert [r.image for r in found[:2]] == [b"relative", b"absolute"]
    assert [r.row for r in found] == list(range(len(uris)))


def test_a_remote_read_that_fails_is_a_retryable_reject(monkeypatch):
    root = Root("memory://uri-store")
    root.put("a.jpg", b"1")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"image": ["a.jpg", "b.jpg"]}), sink)
    root.put("t.parquet", sink.getvalue().to_pybytes())
    real = Root.read_range

    def fail(self, key, start, length):
        if key == "a.jpg":
            raise TimeoutError("the store did not answer")
        return real(self, key, start, length)

    monkeypatch.setattr(Root, "read_range", fail)
    found = rows("memory://uri-store")
    assert [(r.reason, r.status) for r in found] == [("read_failed", "rejected"), ("missing", "rejected")]
    assert "did not answer" in found[0].message


def test_img2dataset_output_as_it_comes(tmp_path):
    columns = {
        "jpg": [JPEG, None, JPEG],
        "caption": ["a", "b", "c"],
        "status": ["success", "failed_to_download", "success"],
        "width": [60, None, 60],
        "exif": [json.dumps({"Image Orientation": "Rotated 90 CCW"}), None, "{broken"],
        "sha256": ["aa", None, "cc"],
    }
    pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
    found = rows(tmp_path, image="jpg", caption="caption", extra=("sha256",), filter="width > 1")
    assert [(r.status, r.reason) for r in found] == [("ok", None), ("filtered", "source_status"), ("ok", None)]
    assert [r.exif_orientation for r in found] == [8, None, None]
    assert prepare(found[0], ImageConfig(resolution=16))[0].original == (60, 40)


def test_filtered_rows_are_counted_as_such(tmp_path):
    pq.write_table(table(5, aesthetic=[1.0, 6.0, None, 7.0, 5.0]), tmp_path / "a.parquet")
    found = rows(tmp_path, filter="aesthetic > 5")
    assert [r.status for r in found] == ["filtered", "ok", "filtered", "ok", "filtered"]
    assert found[0].reason == "row_filter"
    assert found[0].image is None


def test_wrong_labels_and_large_images_are_rejects(tmp_path):
    pq.write_table(table(2, label=["cat", "dog"]), tmp_path / "a.parquet")
    assert [r.reason for r in rows(tmp_path, classes=("dog",))] == ["bad_metadata", None]
    assert [r.reason for r in rows(tmp_path, label=None, max_bytes=10)] == ["too_many_bytes"] * 2


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"image": "img"}, "has no column 'img'"),
        ({"caption": "titel"}, "has no column 'titel'"),
        ({"filter": "size > 1"}, "has no column 'size'"),
        ({"extra": ("nothing",)}, "has no column 'nothing'"),
        ({"image": "number"}, "holds int64, which is no image"),
        ({"filter": "text > 5"}, "The filter does not fit the columns"),
        ({"filter": "number"}, "The filter does not fit the columns"),
    ],
)
def test_columns_that_are_not_there_stop_the_listing(tmp_path, fields, problem):
    pq.write_table(table(2, number=[1, 2]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=problem):
        list(list_entries(ParquetSource(uri=str(tmp_path), **fields)))


def test_large_files_become_several_entries_of_whole_row_groups(tmp_path, monkeypatch):
    from pipeline.source.reading import parquet

    monkeypatch.setattr(parquet, "_SPAN_ROWS", 7)
    pq.write_table(table(20), tmp_path / "a.parquet", row_group_size=3)
    pq.write_table(table(0), tmp_path / "empty.parquet")
    source = ParquetSource(uri=str(tmp_path))
    entries = list(list_entries(source))
    assert [(e.row_start, e.row_stop) for e in entries] == [(0, 6), (6, 12), (12, 18), (18, 20)]
    whole = list(read_unit(source, entries, [(0, None)]))
    assert [(r.row, r.key) for r in whole] == [(i, f"a.parquet#{i}") for i in range(20)]
    # A unit of the middle entries counts its rows from 0 and keeps the keys.
    part = list(read_unit(source, entries[1:3], [(0, 2), (5, 8)]))
    assert [(r.row, r.key) for r in part] == [(i, f"a.parquet#{i + 6}") for i in (0, 1, 5, 6, 7)]
    assert part[0].image == JPEG + b"\6"


def test_unwanted_row_groups_are_not_read(tmp_path, monkeypatch):
    pq.write_table(table(20), tmp_path / "a.parquet", row_group_size=5)
    groups = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, *a, row_groups, **k: (groups.extend(row_groups), real(self, *a, row_groups=row_groups, **k))[1],
    )
    assert [r.row for r in rows(tmp_path, ranges=[(6, 8), (15, 16)], isolate=False)] == [6, 7, 15]
    assert groups == [1, 3]


def test_damage_is_rejected_rows_and_nothing_raises(tmp_path):
    plain = {"compression": "none", "use_dictionary": False}
    pq.write_table(table(20), tmp_path / "a.parquet", row_group_size=5, write_page_checksum=True, **plain)
    source = ParquetSource(uri=str(tmp_path))
    entries = list(list_entries(source))
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    where = bytes(data).find(JPEG + b"\7")
    data[where + 20] ^= 0xFF
    write(tmp_path / "a.parquet", bytes(data))
    assert list(read_unit(source, entries, [(0, None)])) == []  # not what was listed
    entries = list(list_entries(source))
    found = list(read_unit(source, entries, [(0, None)]))
    assert [r.row for r in found] == list(range(20))
    assert [r.reason for r in found] == [None] * 5 + ["corrupt_container"] * 5 + [None] * 10
    (tmp_path / "a.parquet").unlink()
    assert {r.reason for r in read_unit(source, entries, [(3, 5)])} == {"missing"}


def test_a_file_that_was_damaged_when_listed_is_one_row(tmp_path):
    write(tmp_path / "a.parquet", b"PAR1 is not enough")
    pq.write_table(table(2), tmp_path / "b.parquet")
    *found, end = rows(tmp_path)
    assert [(r.row, r.reason) for r in found] == [(0, "corrupt_container"), (1, None), (2, None)]
    assert end == EndOfUnit(3)
    pq.write_table(table(4), tmp_path / "ok.parquet")
    source = ParquetSource(uri=str(tmp_path / "a.parquet"))
    entries = list(list_entries(source))
    (tmp_path / "ok.parquet").rename(tmp_path / "a.parquet")
    assert list(read_unit(source, entries, [(0, None)])) == []
    late, end = read_unit(source, [replace(e, mtime_ns=None) for e in entries], [(0, None)])
    assert (late.reason, end) == ("corrupt_container", EndOfUnit(1))
    assert "list the source again" in late.message


def test_remote_tables_read_like_local_ones(tmp_path):
    pq.write_table(table(12), tmp_path / "a.parquet", row_group_size=5)
    Root("memory://parquet-store").put("a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert rows(tmp_path) == rows("memory://parquet-store")


def test_folder_webdataset_and_parquet_of_the_same_photos_give_the_same_pixels(shared_data, tmp_path):
    from test_source_webdataset import tar_of

    names = sorted(p.name for p in (shared_data / "photos").glob("*.jpg"))[:12]
    lines = (shared_data / "photos/metadata.jsonl").read_text().splitlines()
    records = {r["file_name"]: r for r in map(json.loads, lines) if r["file_name"] in names}
    data = {name: (shared_data / "photos" / name).read_bytes() for name in names}
    for name in names:
        write(tmp_path / "folder" / name, data[name])
    write(tmp_path / "folder/metadata.jsonl", "\n".join(json.dumps(records[n]) for n in names))
    files = []
    for name in names:
        base = name.removesuffix(".jpg")
        record = records[name]
        files += [(f"{base}.jpg", data[name]), (f"{base}.txt", record["text"].encode())]
        files += [(f"{base}.cls", str(record["label"]).encode())]
    write(tmp_path / "tars/0.tar", tar_of(files))
    columns = {"image": [data[n] for n in names], "text": [records[n]["text"] for n in names]}
    (tmp_path / "tables").mkdir()
    pq.write_table(
        pa.table({**columns, "label": [records[n]["label"] for n in names]}), tmp_path / "tables/0.parquet"
    )
    outcomes = []
    for source in (
        FolderSource(uri=str(tmp_path / "folder")),
        WebDatasetSource(uri=str(tmp_path / "tars/{0..0}.tar")),
        ParquetSource(uri=str(tmp_path / "tables/*.parquet")),
    ):
        found = [
            r for r in read_unit(source, list(list_entries(source)), [(0, None)]) if not isinstance(r, EndOfUnit)
        ]
        outcomes.append(
            [(r.caption, r.label, prepare(r, ImageConfig(resolution=64, max_upscale=9.0))) for r in found]
        )
    for a, b, c in zip(*outcomes, strict=True):
        assert a[:2] == b[:2] == c[:2]
        assert np.array_equal(a[2][0].pixels, b[2][0].pixels)
        assert np.array_equal(a[2][0].pixels, c[2][0].pixels)
        assert a[2][0].content_sha256 == b[2][0].content_sha256 == c[2][0].content_sha256
