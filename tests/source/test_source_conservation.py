"""Whatever a source is made of: every picture put in comes out as a row, with its bytes, or with its name and why."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.source.config import FolderSource, ParquetSource, SourceConfig, WebDatasetSource
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import EndOfUnit, SourceRow

pytestmark = pytest.mark.integration

PARTS = ("a", "b", "IMG", "IMG.0001", "v1.2", "ä", "x y", "0", "1.5", "#", "%41")
names = st.builds(
    lambda directory, stem, ending: f"{directory}{stem}.{ending}",
    st.sampled_from(["", "d/", "d/e/", "d.x/"]),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(".".join),
    st.sampled_from(["jpg", "png", "JPG", "webp"]),
)
PACKED = {"tar": bytes, "tar.gz": gzip.compress, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
texts = st.sampled_from(["txt", "json", "caption", "cls", "npy", None])


def rows(source: SourceConfig) -> list[SourceRow]:
    return [r for r in read_unit(source, list(list_entries(source)), [(0, None)]) if not isinstance(r, EndOfUnit)]


def accounted(found: Iterable[SourceRow], put_in: list[tuple[str, bytes]]) -> None:
    """Each picture is a row by its bytes, or a row that is none and says its name; no row is of no picture."""
    found = list(found)
    assert len({row.key for row in found}) == len(found)
    assert [row.row for row in found] == list(range(len(found)))
    taken = {row.image for row in found if row.status == "ok"}
    others = [row for row in found if row.status != "ok"]
    assert all(row.reason and row.message for row in others)
    missing = [name for name, data in put_in if data not in taken]
    for name in missing:
        stem = name.rpartition(".")[0]
        # The longest key that could be meant: "a.jpg" is not accounted for by what happened to "a.b.jpg".
        about = [row for row in others if row.key.rpartition("?")[0].endswith(name) or stem in row.key]
        assert about, f"{name} is neither a row nor a reason: {[(r.key, r.status) for r in found]}"
    assert len(found) >= len(put_in)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(names, texts), min_size=1, max_size=8, unique_by=lambda pair: pair[0]))
def test_folders(pictures: list[tuple[str, str | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        put_in = []
        for number, (name, text) in enumerate(pictures):
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            put_in.append((name, b"picture %d" % number))
            path.write_bytes(put_in[-1][1])
            if text in ("txt", "json", "caption"):
                path.with_name(f"{path.name.rpartition('.')[0]}.{text}").write_text('{"text": "t"}')
        found = rows(FolderSource(uri=folder))
        accounted(found, put_in)
        assert len(found) == len(put_in), "texts beside pictures are no rows"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(names, texts, st.sampled_from(["file", "file", "file", "link"])), min_size=1, max_size=8),
    st.sampled_from(sorted(PACKED)),
    st.booleans(),
    st.booleans(),
)
def test_tars(pictures: list[tuple[str, str | None, str]], suffix: str, order: bool, joined: bool) -> None:
    members: list[tuple[str, bytes | None]] = []
    put_in: list[tuple[str, bytes]] = []
    for number, (name, text, kind) in enumerate(sorted(pictures, key=str) if order else pictures):
        data = b"picture %d" % number
        # A link leads to the first picture; as the first of all it leads to itself, which is nowhere.
        members.append((name, data if kind == "file" else None))
        put_in.append((name, data if kind == "file" else b"a link"))
        if text:
            members.append((f"{name.rpartition('.')[0]}.{text}", b'{"text": "t"}' if text == "json" else b"1"))
    half = len(members) // 2 if joined else 0
    plain = (
        tar_of(members[:half], members[0][0]) + tar_of(members[half:], members[0][0])
        if half
        else tar_of(members, members[0][0])
    )
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"s.{suffix}").write_bytes(PACKED[suffix](plain))
        found = rows(WebDatasetSource(uri=folder))
    links = sum(data == b"a link" for _, data in put_in)
    accounted(found, [pair for pair in put_in if pair[1] != b"a link"])
    assert len(found) >= len(put_in), f"{links} of them links"


def tar_of(members: list[tuple[str, bytes | None]], first: str) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.LNKTYPE, first
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.binary(min_size=1, max_size=20)),
            st.one_of(st.none(), st.text(max_size=5)),
            st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True)),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_tables(lines: list[tuple[bytes | None, str | None, float | None]], group: int) -> None:
    images, captions, labels = (list(column) for column in zip(*lines, strict=True))
    table = pa.table(
        {
            "image": pa.array(images, pa.binary()),
            "text": pa.array(captions, pa.string()),
            "label": pa.array(labels, pa.float64()),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(table, Path(folder, "a.parquet"), row_group_size=group)
        found = rows(ParquetSource(uri=folder, isolate=False))
    assert [row.row for row in found] == list(range(len(lines)))
    for row, (image, caption, label) in zip(found, lines, strict=True):
        if row.status == "ok":
            assert (row.image, row.caption) == (image, caption)
            assert row.label == (None if label is None or label != label else int(label))
        else:
            assert image is None or label is None or label < 0 or label != label // 1 or label > 10**18 - 1
            assert row.message
