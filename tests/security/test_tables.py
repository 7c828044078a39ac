"""Texts of tables: a file of a few kilobytes does not fill the object store with captions."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.encode.stages import BLOCK_BYTES, UnitReader
from pipeline.source.config import ParquetSource
from pipeline.source.reading.rows import MAX_STORED_BYTES
from pipeline.storage.root import Root
from pipeline.store.plan import PlannedEntry, Work

ROWS = 2048


def blocks_of(folder: Path, caption: str, monkeypatch: pytest.MonkeyPatch) -> list[pa.Table]:
    """What a read task gives for a table whose every row has that caption, written once in its dictionary."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    table = pa.table({"image": [out.getvalue()] * ROWS, "text": [caption] * ROWS})
    pq.write_table(table, folder / "a.parquet", compression="zstd", dictionary_pagesize_limit=8 << 20)
    assert (folder / "a.parquet").stat().st_size < 8 << 10
    info = Root(str(folder)).info("a.parquet")
    entry = PlannedEntry(0, 0, info.key, info.size_bytes, info.etag, info.mtime_ns, 0, ROWS, None)
    monkeypatch.setattr("pipeline.encode.stages.read_entries", lambda *_: [entry])
    spans = {0: "all"}
    reader = UnitReader(Root(str(folder)), ParquetSource(uri=str(folder)), spans)  # type: ignore[arg-type]
    return list(reader(Work(0, ((0, ROWS),))))


def test_captions_that_no_model_reads_are_rejected_where_they_are_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A megabyte in each of 2,048 rows, of a file of three kilobytes: two gigabytes that nobody wanted to store."""
    blocks = blocks_of(tmp_path, "x" * (1 << 20), monkeypatch)
    assert sum(block.nbytes for block in blocks) < 2 << 20
    reasons = pa.concat_tables(blocks)["reason"].to_pylist()
    assert reasons.count("bad_metadata") == ROWS


def test_a_block_ends_by_its_texts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(tmp_path, "x" * MAX_STORED_BYTES, monkeypatch)
    rows = pa.concat_tables(blocks)
    assert rows["caption"].to_pylist().count("x" * MAX_STORED_BYTES) == ROWS
    assert max(block.nbytes for block in blocks) < BLOCK_BYTES + (1 << 20)
