"""Parquet files of Delta and Iceberg tables by their snapshots, and sources that installed packages offer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_images import encode, gradient, write

from pipeline.errors import ConfigError, InputError
from pipeline.source.config import InstalledSource, ParquetSource, TableConfig
from pipeline.source.reading.listing import list_entries, listing_digest, read_unit
from pipeline.source.reading.rows import EndOfUnit, SourceRow
from tests.support.encode_here import encode_here
from tests.support.images import make_codec

JPEG = encode(gradient(), "JPEG")


def table(first: int, count: int) -> pa.Table:
    texts = [f"picture {n}" for n in range(first, first + count)]
    return pa.table({"image": [JPEG + bytes([n]) for n in range(count)], "text": texts})


def source(uri: str, kind: str, **of_table: Any) -> ParquetSource:
    return ParquetSource(uri=uri, table=TableConfig(format=kind, **of_table), isolate=False)


def captions(source: ParquetSource) -> list[str | None]:
    rows = read_unit(source, list(list_entries(source)), [(0, None)])
    return sorted(str(row.caption) for row in rows if isinstance(row, SourceRow))


def named(*numbers: int) -> list[str]:
    return sorted(f"picture {n}" for n in numbers)


def test_a_delta_table_is_read_as_of_a_version(tmp_path: Path) -> None:
    deltalake = pytest.importorskip("deltalake")
    uri = str(tmp_path / "table")
    deltalake.write_deltalake(uri, table(0, 3).append_column("at", pa.array(["a b"] * 3)), partition_by=["at"])
    deltalake.write_deltalake(uri, table(3, 2).append_column("at", pa.array(["c%d"] * 2)), mode="append")
    (tmp_path / "table" / "stray.parquet").write_bytes(b"of no snapshot")
    assert captions(source(uri, "delta")) == named(0, 1, 2, 3, 4)
    assert captions(source(uri, "delta", version=0)) == named(0, 1, 2)
    assert listing_digest(source(uri, "delta")) == "delta 1"
    found = deltalake.DeltaTable(uri)
    found.delete("text = 'picture 1'")  # the file is written again
    assert captions(source(uri, "delta")) == named(0, 2, 3, 4)
    with pytest.raises(InputError, match=r"The delta table .* cannot be read[\s\S]*table.version = 7"):
        list(list_entries(source(uri, "delta", version=7)))
    with pytest.raises(InputError, match="cannot be read"):
        list(list_entries(source(str(tmp_path), "delta")))


@pytest.fixture
def iceberg(tmp_path: Path) -> Any:
    memory = pytest.importorskip("pyiceberg.catalog.memory")
    catalog = memory.InMemoryCatalog("here", warehouse=f"file://{tmp_path}/warehouse")
    catalog.create_namespace("ns")
    made = catalog.create_table("ns.images", schema=table(0, 1).schema)
    made.append(table(0, 3))
    made.append(table(3, 2))
    return made


def test_an_iceberg_table_is_read_as_of_a_snapshot(iceberg: Any) -> None:
    uri = iceberg.location().removeprefix("file://")
    first, second = (snapshot.snapshot_id for snapshot in iceberg.metadata.snapshots)
    assert captions(source(uri, "iceberg")) == named(0, 1, 2, 3, 4)
    assert captions(source(uri, "iceberg", version=first)) == named(0, 1, 2)
    assert captions(source(uri, "iceberg", metadata=iceberg.metadata_location)) == named(0, 1, 2, 3, 4)
    assert listing_digest(source(uri, "iceberg")) == f"iceberg {second}"
    iceberg.delete("text = 'picture 4'")
    assert captions(source(uri, "iceberg")) == named(0, 1, 2, 3)
    with pytest.raises(InputError, match=r"has no snapshot 5 \(any more\)"):
        list(list_entries(source(uri, "iceberg", version=5)))
    with pytest.raises(InputError, match=r"which does not lie below source\.uri"):
        list(list_entries(source(f"{uri}/metadata", "iceberg", metadata=iceberg.metadata_location)))


def test_rows_that_are_only_marked_as_deleted_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deltalake = pytest.importorskip("deltalake")
    uri = str(tmp_path / "table")
    deltalake.write_deltalake(uri, table(0, 3))
    vectors = pa.table({"filepath": [uri], "selection_vector": [[True, False, True]]})
    monkeypatch.setattr(deltalake.DeltaTable, "deletion_vectors", lambda self: vectors)
    with pytest.raises(InputError, match="marks rows as deleted that its files still hold; rewrite"):
        list(list_entries(source(uri, "delta")))


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="catalog and name belong together"):
        TableConfig(format="iceberg", catalog="prod")
    with pytest.raises(ValueError, match="are Iceberg's"):
        TableConfig(format="delta", metadata="x.json")


@pytest.mark.integration
def test_an_encode_of_a_table_goes_on_from_snapshot_to_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltalake = pytest.importorskip("deltalake")
    uri, codec = str(tmp_path / "table"), make_codec(tmp_path / "codec")
    settings = {
        "source__kind": "parquet",
        "source__uri": uri,
        "source__table__format": "delta",
        "codec__path": str(codec),
        "image__resolution": 32,
        "image__multiple_of": 4,
        "output__uri": str(tmp_path / "latents"),
    }
    deltalake.write_deltalake(uri, table(0, 3))
    assert encode_here(monkeypatch, **settings).counts["latents"] == 3
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.encode.plan.diff", lambda *_, **__: pytest.fail("files are compared"))
        assert encode_here(monkeypatch, **settings).status == "unchanged"
    deltalake.write_deltalake(uri, table(3, 2), mode="append")
    result = encode_here(monkeypatch, **settings)
    assert (result.counts["source_new"], result.counts["source_changed"], result.counts["latents"]) == (1, 0, 5)


# -- a source of another package -------------------------------------------------------------------------------


PACKAGE = """
from pathlib import Path
from pipeline.source.reading.rows import EndOfUnit, Entry, Ranges, SourceRow

class Lines:
    \"\"\"Files of lines, each of which names an image beside it.\"\"\"

    def __init__(self, source):
        self.source, self.suffix = source, source.options["suffix"]

    def list_entries(self, known):
        for path in sorted(Path(self.source.uri).glob(f"*{self.suffix}")):
            yield Entry(path.name, path.stat().st_size, None, path.stat().st_mtime_ns, 0, None, None)

    def read_unit(self, entries, ranges):
        wanted, row = Ranges(ranges), 0
        for entry in entries:
            for line in Path(self.source.uri, entry.key).read_text().split():
                if row in wanted:
                    yield SourceRow(row, f"{entry.key}#{line}", Path(self.source.uri, line).read_bytes(), line)
                row += 1
        yield EndOfUnit(row)
"""


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    metadata = site / "lines_source-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "lines_source.py").write_text(PACKAGE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lines-source\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[latentloom.sources]\nlines = lines_source:Lines\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "lines_source", raising=False)


@pytest.mark.usefixtures("_installed")
def test_a_source_of_another_package_is_listed_and_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", JPEG)
    write(tmp_path / "b.jpg", JPEG)
    write(tmp_path / "one.list", "b.jpg a.jpg")
    given = InstalledSource(uri=str(tmp_path), plugin="lines", options={"suffix": ".list"})
    entries = list(list_entries(given))
    rows = list(read_unit(given, entries, [(1, None)]))
    assert [entry.key for entry in entries] == ["one.list"]
    assert rows == [SourceRow(1, "one.list#a.jpg", JPEG, "a.jpg"), EndOfUnit(2)]
    with pytest.raises(ConfigError, match=r"plugin = lnies[\s\S]*did you mean lines"):
        list(list_entries(given.model_copy(update={"plugin": "lnies"})))
    with pytest.raises(InputError, match="a source of kind installed holds at least one entry"):
        list(list_entries(given.model_copy(update={"options": {"suffix": ".none"}})))


@pytest.mark.integration
@pytest.mark.usefixtures("_installed")
def test_a_source_of_another_package_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        write(tmp_path / "in" / f"{n}.jpg", encode(gradient(40 + n, 40), "JPEG"))
    write(tmp_path / "in" / "one.list", "0.jpg 1.jpg 2.jpg")
    settings = {
        "source__kind": "installed",
        "source__uri": str(tmp_path / "in"),
        "source__plugin": "lines",
        "source__options__suffix": ".list",
        "codec__path": str(make_codec(tmp_path / "codec")),
        "image__resolution": 32,
        "image__multiple_of": 4,
        "output__uri": str(tmp_path / "latents"),
    }
    assert encode_here(monkeypatch, **settings).counts["latents"] == 3
    assert encode_here(monkeypatch, **settings).status == "unchanged"


def test_parquet_files_without_a_table_are_all_that_lie_there(tmp_path: Path) -> None:
    pq.write_table(table(0, 2), tmp_path / "a.parquet")
    assert captions(ParquetSource(uri=str(tmp_path), isolate=False)) == named(0, 1)
