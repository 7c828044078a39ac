"""Values of one length are views of the file, the same as a decoder gives, and anything odd is refused."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pages import (
    PlainSpan,
    StoredParts,
    fixed_width_pages,
    fixed_width_values,
    gather,
    plain_span,
)
from tests.support.rows import claim, committer, latent_rows, may_be_null, planned_root


def column_chunk(
    values: Sequence[bytes | None], *, nullable: bool = False, **options: object
) -> tuple[np.ndarray, PlainSpan | None]:
    """A whole file of one column, and the place of its chunk in it."""
    schema = pa.schema([pa.field("blob", pa.large_binary(), nullable)])
    sink = io.BytesIO()
    given = {"compression": "NONE", "use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(pa.table({"blob": values}, schema=schema), sink, **{**given, **options})
    data = sink.getvalue()
    span = plain_span(pq.read_metadata(io.BytesIO(data)), 0, "blob")
    return np.frombuffer(data, np.uint8), span


def chunk_of(data: np.ndarray, span: PlainSpan) -> np.ndarray:
    return data[span.start : span.start + span.size_bytes]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 400),
    width=st.integers(1, 300),
    page=st.sampled_from([64, 1000, 1 << 20]),
    statistics=st.booleans(),
    nullable=st.booleans(),
)
def test_views_of_pages_are_the_values_a_decoder_gives(
    rows: int, width: int, page: int, statistics: bool, nullable: bool
) -> None:
    values = [np.random.default_rng(at).bytes(width) for at in range(rows)]
    data, span = column_chunk(
        values, nullable=nullable, data_page_size=page, write_statistics=statistics, write_batch_size=7
    )
    assert span is not None
    assert span.optional == nullable
    found = fixed_width_pages(chunk_of(data, span), rows, optional=nullable)
    assert found.values().tobytes() == b"".join(values)
    assert np.shares_memory(found.data, data)
    if page == 64 and rows * width > 2000:
        assert len(set(np.diff(found.starts).tolist())) > 1, "several pages, with headers between them"


@pytest.mark.parametrize("options", [{"compression": "ZSTD"}, {"use_dictionary": True}], ids=lambda o: next(iter(o)))
def test_what_is_stored_otherwise_must_be_decoded(options: dict[str, object]) -> None:
    assert column_chunk([b"same"] * 9, **options)[1] is None


def test_a_chunk_that_is_not_what_it_should_be_is_refused() -> None:
    data, span = column_chunk([b"abcd"] * 50)
    assert span is not None
    chunk = chunk_of(data, span).copy()
    with pytest.raises(ValueError, match="does not hold"):
        fixed_width_pages(chunk, 49, optional=False)
    with pytest.raises(ValueError, match="ends too early"):
        fixed_width_pages(chunk, 51, optional=False)
    with pytest.raises(ValueError, match="does not hold 50 values"):
        fixed_width_pages(chunk[:-3], 50, optional=False)
    for optional in (False, True):
        data, span = column_chunk([b"abcd"] * 50, nullable=optional)
        assert span is not None
        for at in range(24):  # whatever is in a header, it is refused or it is read, and nothing else happens
            for byte in (0, 21, 127, 255):
                broken = chunk_of(data, span).copy()
                broken[at] = byte
                try:
                    fixed_width_pages(broken, 50, optional=optional)
                except ValueError:
                    continue
    uneven, span = column_chunk([b"abcd", b"abc", b"abcde"])
    assert span is not None
    with pytest.raises(ValueError, match="a value is 3 bytes long, not 4"):
        fixed_width_pages(chunk_of(uneven, span), 3, optional=False)
    for values in ([b"abcd", None, b"abcd"], [None] * 3, [b"a" * 12, None, b"abcd"]):
        some, span = column_chunk(values, nullable=True)
        assert span is not None
        with pytest.raises(ValueError, match=r"does not hold 3 values|bytes long, not"):
            fixed_width_pages(chunk_of(some, span), 3, optional=True)


def test_decoded_columns_are_held_to_the_same_rule() -> None:
    column = pa.chunked_array([pa.array([b"ab", b"cd"]), pa.array([], pa.binary()), pa.array([b"ef"])])
    assert fixed_width_values(column).values().tobytes() == b"abcdef"
    with pytest.raises(ValueError, match="1 values are null"):
        fixed_width_values(pa.chunked_array([pa.array([b"ab", None])]))
    with pytest.raises(ValueError, match="3 bytes long, not 2"):
        fixed_width_values(pa.chunked_array([pa.array([b"ab"]), pa.array([b"abc"])]))


@pytest.fixture(params=["declared", "nullable"])
def uri(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Two units, the second written twice, so that some stored rows are dead."""
    root = planned_root(str(tmp_path / "data"), units=2, rows=30)
    written = may_be_null if request.param == "nullable" else (lambda rows: rows)
    generation = claim(root)
    committer(root, generation, 700).commit(written(latent_rows([(0, row) for row in range(30)])), None, {})
    committer(root, generation, 700).commit(written(latent_rows([(1, row) for row in range(30)])), None, {})
    generation.abandon()
    generation = claim(root)
    committer(root, generation, 700).commit(latent_rows([(1, row) for row in range(3, 25, 2)]), None, {})
    generation.abandon()
    return root.uri


@pytest.mark.parametrize("verify", [True, False])
def test_fixed_reads_of_a_dataset_are_its_visible_rows(uri: str, verify: bool) -> None:
    dataset = LatentDataset.open(uri)
    parts = StoredParts(dataset, "latent")
    assert dataset.row_groups.partial.any()
    assert not dataset.row_groups.partial.all()
    for group in range(len(dataset.row_groups)):
        decoded = dataset.read(group, ["latent"])["latent"].to_pylist()
        found = dataset.read_fixed(group, "latent", verify=verify)
        assert found.values().tobytes() == b"".join(decoded)
        assert len(found) == dataset.row_groups[group].num_rows
        places = parts.places(group)
        assert places is not None, "a part of a row group is read without the rest"
        assert parts.read([places[-1:]])[0].values().tobytes() == decoded[-1]
    assert sum(group.num_rows for group in dataset.row_groups) == dataset.num_rows == 60


def test_a_flipped_byte_is_noticed_where_checksums_are_asked_for(uri: str) -> None:
    dataset = LatentDataset.open(uri)
    path = Path(uri) / dataset.row_groups[0].file
    values = dataset.read_fixed(0, "latent", verify=False)[:1].values().tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(values)] ^= 1
    path.write_bytes(bytes(data))
    again = LatentDataset.open(uri)
    assert again.read_fixed(0, "latent", verify=False)[:1].values().tobytes() != values
    again.read(0, ["latent"], verify=False)
    for read in (again.read, again.read_fixed):
        with pytest.raises(InputError, match=r"(?i)crc|checksum"):
            read(0, ["latent"] if read == again.read else "latent", verify=True)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), width=st.sampled_from([1, 8, 12, 13, 16, 513]))
def test_values_are_gathered_in_any_order_from_any_memory(data: st.DataObject, width: int) -> None:
    sizes = data.draw(st.lists(st.integers(width, width + 900), min_size=1, max_size=4))
    parts = [np.random.default_rng(at).integers(0, 256, size, dtype=np.uint8) for at, size in enumerate(sizes)]
    places = data.draw(
        st.lists(
            st.integers(0, len(parts) - 1).flatmap(
                lambda at: st.tuples(st.just(at), st.integers(0, sizes[at] - width))
            )
        )
    )
    part_of = np.array([at for at, _ in places], np.int32)
    starts = np.array([start for _, start in places], np.int64)
    found = gather(parts, part_of, starts, width)
    assert found.shape == (len(places), width)
    assert found.flags.writeable
    assert found.tobytes() == b"".join(parts[at][start : start + width].tobytes() for at, start in places)


@pytest.mark.parametrize("start", [-1, 85])
def test_nothing_is_gathered_from_beside_the_memory(start: int) -> None:
    with pytest.raises(ValueError, match="outside its column"):
        gather([np.zeros(100, np.uint8)], np.zeros(1, np.int32), np.array([start], np.int64), 16)
