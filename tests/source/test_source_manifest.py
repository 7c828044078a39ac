"""Objects by a manifest: own tables, S3 Inventories as they come, in order or not, and what is wrong with them."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_images import encode, gradient, write

from pipeline.errors import InputError
from pipeline.source.config import FolderSource, ManifestSource
from pipeline.source.reading import manifest as module
from pipeline.source.reading.listing import list_entries, listing_digest, read_unit
from pipeline.source.reading.rows import EndOfUnit, SourceRow
from pipeline.store.read.dataset import LatentDataset
from tests.support.encode_here import encode_here
from tests.support.images import make_codec

JPEG = encode(gradient(), "JPEG")
NAMES = ["a.jpg", "d/b.png", "d/c.jpg", "e.webp", "\u00fc.jpg"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in (*NAMES, "d/notes.txt", "not-named.jpg"):
        write(tmp_path / "images" / name, JPEG if name.endswith("jpg") else b"of " + name.encode())
    return tmp_path / "images"


def columns(images: Path, names: list[str], **more: list[Any]) -> dict[str, list[Any]]:
    sizes = [(images / name).stat().st_size for name in names]
    return {"key": names, "size": sizes, "etag": [f'"{n:032x}"' for n in range(len(names))], **more}


def source(images: Path, manifest: Path, **fields: Any) -> ManifestSource:
    return ManifestSource(uri=str(images), manifest=str(manifest), **fields)


def rows(source: ManifestSource) -> list[SourceRow]:
    found = list(read_unit(source, list(list_entries(source)), [(0, None)]))
    return [row for row in found if not isinstance(row, EndOfUnit)]


def as_parquet(path: Path, table: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(table), path, row_group_size=2)
    return path


def as_csv(path: Path, table: dict[str, list[Any]]) -> Path:
    values = zip(*table.values(), strict=True)
    lines = [",".join(table), *(",".join(str(v).replace('"', "") for v in row) for row in values)]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["m.parquet", "m.csv", "m.csv.gz"])
def test_the_rows_are_those_of_the_objects_that_it_names(name: str, images: Path, tmp_path: Path) -> None:
    named = [*NAMES[:3], "d/notes.txt", *NAMES[3:]]
    given = columns(images, named, text=[f"picture {i}" for i in range(6)], label=list(range(6)), score=[0.5] * 6)
    write_it = as_parquet if name.endswith("parquet") else as_csv
    of_manifest = source(images, write_it(tmp_path / name, given), extra=("score",))
    found = rows(of_manifest)
    assert [row.key for row in found] == NAMES
    assert [row.image for row in found] == [(images / key).read_bytes() for key in NAMES]
    assert [(row.caption, row.label) for row in found] == [(f"picture {i}", i) for i in (0, 1, 2, 4, 5)]
    assert {row.extra for row in found} == {'{"score":0.5}' if write_it is as_parquet else '{"score":"0.5"}'}
    entries = list(list_entries(of_manifest))
    assert [entry.etag for entry in entries] == [f"{n:032x}" for n in (0, 1, 2, 4, 5)]
    assert [e.size_bytes for e in entries] == [(images / key).stat().st_size for key in NAMES]


def test_rows_out_of_order_are_sorted_however_many_they_are(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RUN_ROWS", 700)
    monkeypatch.setattr(module, "_BATCH_ROWS", 64)
    names = sorted(f"{n % 13:02d}/{n:05d}.jpg" for n in range(3000))
    table = {"key": names, "size": list(range(3000)), "etag": [f"e{n}" for n in range(3000)], "text": names}
    ordered = list(list_entries(source(images, as_parquet(tmp_path / "ordered.parquet", table))))
    mixed = random.Random(3).sample(range(3000), 3000)
    parts = tmp_path / "parts"
    parts.mkdir()
    for at in range(3):
        own = {name: [values[i] for i in mixed[at * 1000 : at * 1000 + 1000]] for name, values in table.items()}
        as_parquet(parts / f"{at}.parquet", own)
    assert list(list_entries(source(images, parts))) == ordered
    assert [entry.key for entry in ordered] == names


def inventory(folder: Path, kind: str, table: dict[str, list[Any]]) -> Path:
    """An inventory of a bucket as S3 writes it."""
    schema = ["Bucket", "Key", "VersionId", "IsLatest", "IsDeleteMarker", "Size", "LastModifiedDate", "ETag"]
    day, data = folder / "bucket" / "all" / "2026-11-29T01-00Z", folder / "bucket" / "all" / "data"
    day.mkdir(parents=True)
    data.mkdir()
    if kind == "Parquet":
        names = [
            "bucket",
            "key",
            "version_id",
            "is_latest",
            "is_delete_marker",
            "size",
            "last_modified_date",
            "e_tag",
        ]
        file = as_parquet(data / "0f.parquet", dict(zip(names, table.values(), strict=True)))
    else:
        file = data / "0f.csv.gz"
        quoted = [",".join(f'"{v}"' for v in row) for row in zip(*table.values(), strict=True)]
        file.write_bytes(gzip.compress("\n".join(quoted).replace(" ", "%20").encode()))
    files = [{"key": f"inv/bucket/all/data/{file.name}", "size": file.stat().st_size, "MD5checksum": "00"}]
    told = {"sourceBucket": "bucket", "fileFormat": kind, "fileSchema": ", ".join(schema), "files": files}
    (day / "manifest.json").write_text(json.dumps(told))
    digest = hashlib.md5((day / "manifest.json").read_bytes()).hexdigest()
    (day / "manifest.checksum").write_text(f"{digest}\n")
    return day / "manifest.json"


def bucket_table() -> dict[str, list[Any]]:
    keys = ["deep/a b.jpg", "deep/a b.jpg", "deep/gone.jpg", "deep/d/", "deep/d/c.png", "deep/x.json", "else/z.jpg"]
    latest = [True, False, True, True, True, True, True]
    return {
        "bucket": ["bucket"] * 7,
        "key": keys,
        "version": [f"v{n}" for n in range(7)],
        "latest": latest,
        "deleted": [False, False, True, False, False, False, False],
        "size": [10, 9, None, 0, 12, 3, 4],
        "modified": ["2026-11-28T10:00:00.000Z"] * 7,
        "etag": [f"{n:032x}" for n in range(7)],
    }


@pytest.mark.parametrize("kind", ["Parquet", "CSV"])
def test_an_inventory_as_s3_writes_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = bucket_table()
    if kind == "CSV":
        table["size"][2] = ""
    given = ManifestSource(uri="s3://bucket/deep", manifest=str(inventory(tmp_path, kind, table)))
    found = list(module.list_manifest(module.Root("s3://bucket/deep"), given))
    assert [(e.key, e.size_bytes, e.etag) for e in found] == [
        ("a b.jpg", 10, f"{0:032x}"),
        ("d/c.png", 12, f"{4:032x}"),
    ]
    assert {entry.mtime_ns for entry in found} == {1_795_860_000_000_000_000}


def test_an_inventory_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = inventory(tmp_path, "Parquet", bucket_table())
    given = ManifestSource(uri=str(tmp_path), manifest=str(path))
    (path.parent / "manifest.checksum").rename(path.parent / "later")
    with pytest.raises(InputError, match=r"still being written: manifest.checksum is not there"):
        list(list_entries(given))
    (path.parent / "manifest.checksum").write_text("0" * 32)
    with pytest.raises(InputError, match=r"is not the one of its manifest.checksum"):
        list(list_entries(given))
    (path.parent / "later").rename(path.parent / "manifest.checksum")
    (file,) = (path.parent.parent / "data").iterdir()
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"0f.parquet has [\d,]+ bytes, not"):
        list(list_entries(given))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"size": None}, "has no column size; there are key, etag"),
        ({"etag": None}, r"has no column etag \(or last_modified\); there are key, size"),
        ({"key": ["a.jpg", "a.jpg"]}, "names 'a.jpg' twice"),
        ({"key": ["a.jpg", None]}, "has a row without a key"),
        ({"size": [1, None]}, "has a row without a size"),
        ({"size": ["1", "many"]}, "cannot be read: .*many"),
        ({"key": ["/elsewhere/a.jpg", "s3://other/b.jpg"]}, "is empty"),
    ],
)
def test_what_is_wrong_is_told(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    table = {"key": ["a.jpg", "b.jpg"], "size": [1, 2], "etag": ["x", "y"], **change}
    path = as_parquet(tmp_path / "m.parquet", {k: v for k, v in table.items() if v is not None})
    with pytest.raises(InputError, match=told):
        list(list_entries(ManifestSource(uri=str(tmp_path), manifest=str(path))))


def test_manifests_that_are_none_are_told(tmp_path: Path) -> None:
    def listed(manifest: Path, **fields: Any) -> None:
        list(list_entries(ManifestSource(uri=str(tmp_path), manifest=str(manifest), **fields)))

    with pytest.raises(InputError, match="is not there"):
        listed(tmp_path / "nothing.parquet")
    (tmp_path / "m.parquet").write_bytes(b"no table")
    with pytest.raises(InputError, match="cannot be read"):
        listed(tmp_path / "m.parquet")
    (tmp_path / "half" / "_temporary").mkdir(parents=True)
    with pytest.raises(InputError, match=r"holds no .parquet, .csv or .csv.gz file"):
        listed(tmp_path / "half")
    (tmp_path / "half" / "_temporary" / "0").write_bytes(b"")
    with pytest.raises(InputError, match="still being written: it holds _temporary/0"):
        listed(tmp_path / "half")
    path = as_parquet(tmp_path / "n.parquet", {"key": ["a.jpg"], "size": [1], "etag": ["x"], "prompt": ["p"]})
    with pytest.raises(InputError, match="has no column captoin; there are key, size, etag, prompt"):
        listed(path, caption="captoin")


def test_a_row_with_a_wrong_field_is_rejected_alone_and_filters_hold(images: Path, tmp_path: Path) -> None:
    given = columns(images, NAMES, label=["0", "x", "2", "3", "4"], score=[1, 2, 3, 4, 5])
    found = rows(source(images, as_parquet(tmp_path / "m.parquet", given), filter="score > 2"))
    assert [(row.reason, row.label) for row in found] == [
        ("row_filter", None),
        ("bad_metadata", None),
        (None, 2),
        (None, 3),
        (None, 4),
    ]


def test_the_digest_is_of_what_is_named_and_not_of_how_it_is_written(images: Path, tmp_path: Path) -> None:
    given = columns(images, NAMES, text=["one", None, "three", "", "five"])
    whole = listing_digest(source(images, as_parquet(tmp_path / "m.parquet", given)))
    parts = tmp_path / "parts"
    parts.mkdir()
    for at, cut in enumerate((slice(0, 1), slice(1, 5))):
        pq.write_table(pa.table({name: values[cut] for name, values in given.items()}), parts / f"{at}.parquet")
    assert listing_digest(source(images, parts)) == whole
    assert len(whole) == 32
    for name, at, value in (
        ("etag", 2, "z"),
        ("size", 0, 7),
        ("text", 1, ""),
        ("key", 4, "v.jpg"),
        ("text", 0, None),
    ):
        changed = {n: [value if (n, i) == (name, at) else v for i, v in enumerate(vs)] for n, vs in given.items()}
        assert listing_digest(source(images, as_parquet(tmp_path / "c.parquet", changed))) != whole
    assert listing_digest(source(images, tmp_path / "m.parquet", caption=None)) != whole
    assert listing_digest(FolderSource(uri=str(images))) == ""
    lists = {**given, "text": [["one", "two"], None, [], ["three"], ["four"]]}
    of_lists = listing_digest(source(images, as_parquet(tmp_path / "l.parquet", lists)))
    lists["text"][3] = ["three", None]
    assert listing_digest(source(images, as_parquet(tmp_path / "l.parquet", lists))) != of_lists
    backwards = {name: values[::-1] for name, values in given.items()}
    assert listing_digest(source(images, as_parquet(tmp_path / "b.parquet", backwards))) == ""


@pytest.mark.integration
def test_an_encode_by_manifest_and_the_nights_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, codec = tmp_path / "images", make_codec(tmp_path / "codec")
    names = [f"{n:02d}.jpg" for n in range(6)]
    for n, name in enumerate(names):
        write(images / name, encode(gradient(40 + n, 40), "JPEG"))
    settings = {
        "source__kind": "manifest",
        "source__uri": str(images),
        "source__manifest": str(tmp_path / "m.parquet"),
        "codec__path": str(codec),
        "image__resolution": 32,
        "image__multiple_of": 4,
        "output__uri": str(tmp_path / "latents"),
    }
    as_parquet(tmp_path / "m.parquet", columns(images, names[:5], text=[f"picture {n}" for n in range(5)]))
    assert encode_here(monkeypatch, **settings).counts["latents"] == 5
    # The same objects in another file: nothing is compared, row by row.
    pq.write_table(pq.read_table(tmp_path / "m.parquet"), tmp_path / "m.parquet", row_group_size=1)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.encode.plan.diff", lambda *_, **__: pytest.fail("rows are compared"))
        assert encode_here(monkeypatch, **settings).status == "unchanged"
    # One changed, one new.
    changed = columns(images, names, text=[f"picture {n}" for n in range(6)])
    changed["etag"] = [e.replace("0", "1", 1) if at == 2 else e for at, e in enumerate(changed["etag"])]
    as_parquet(tmp_path / "m.parquet", changed)
    result = encode_here(monkeypatch, **settings)
    assert (result.counts["source_new"], result.counts["source_changed"], result.counts["latents"]) == (1, 1, 6)
    table = LatentDataset.open(str(tmp_path / "latents"))
    captions = [c for g in range(len(table.row_groups)) for c in table.read(g, ["caption"])["caption"].to_pylist()]
    assert sorted(captions) == [f"picture {n}" for n in range(6)]
    (tmp_path / "m.parquet").unlink()
    with pytest.raises(InputError, match=r"is not there[\s\S]*source\.manifest = "):
        encode_here(monkeypatch, **settings)
