"""The subset of the reference: fair to the whole listing, always the same, exactly as large as asked."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluate.inputs import Reference, ReferenceBatch, Selection, ranges_over, reference_batches, summarize
from pipeline.source.config import FolderSource, ImageConfig, SourceConfig, WebDatasetSource

CLASSES, PER_CLASS = 4, 30
IMAGE = ImageConfig(resolution=(8,), multiple_of=4)


def encoded(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def names() -> list[str]:
    return [f"class{c}/{i:03}.png" for c in range(CLASSES) for i in range(PER_CLASS)]


@pytest.fixture
def folder(tmp_path: Path) -> SourceConfig:
    """Classes one after the other, as a listing sorts them; every fifth file is broken."""
    for n, name in enumerate(names()):
        path = tmp_path / "real" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"broken" if n % 5 == 0 else encoded(n))
    return FolderSource(kind="folder", uri=str(tmp_path / "real"), name="real")


@pytest.fixture
def tar(tmp_path: Path) -> SourceConfig:
    """The same images, all whole, in one tar."""
    with tarfile.open(tmp_path / "real.tar", "w") as archive:
        for n, name in enumerate(names()):
            member = tarfile.TarInfo(name)
            data = encoded(n)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return WebDatasetSource(kind="webdataset", uri=str(tmp_path / "real.tar"), name="real")


def keys(source: SourceConfig, limit: int, batch_size: int = 7) -> list[str]:
    reference = Reference(source)
    selection = Selection(reference, limit, summarize(reference).rows)
    batches: list[ReferenceBatch] = list(reference_batches(selection, IMAGE, batch_size=batch_size, counts=Counter()))
    assert all(len(batch.keys) <= batch_size for batch in batches)
    return [key for batch in batches for key in batch.keys]


def by_class(found: list[str]) -> Counter[str]:
    return Counter(key.rpartition("/")[0].rpartition("/")[2] for key in found)


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_every_class_of_a_sorted_listing_has_its_share(source: str, request: pytest.FixtureRequest) -> None:
    found = keys(request.getfixturevalue(source), 60)
    assert len(found) == len(set(found)) == 60
    shares = by_class(found)
    # A hypergeometric draw of 60 from 4 x 24 or 4 x 30: 15 of each, give or take three sigma.
    assert len(shares) == CLASSES
    assert all(7 <= n <= 23 for n in shares.values()), shares


def test_the_subset_is_the_same_again_and_holds_the_smaller_ones(folder: SourceConfig) -> None:
    found = keys(folder, 40)
    assert found == keys(folder, 40)
    assert sorted(found) == sorted(keys(folder, 40, batch_size=64))
    assert set(keys(folder, 11)) < set(found)


def test_refused_images_are_replaced_until_there_are_no_more(folder: SourceConfig) -> None:
    assert len(keys(folder, 90)) == 90  # of 120 rows 96 can be decoded
    assert len(keys(folder, 100)) == 96
    assert len(keys(folder, 500)) == 96


def test_rows_are_read_in_few_ranges() -> None:
    assert ranges_over([]) == []
    assert ranges_over([3, 4, 5, 9]) == [(3, 6), (9, 10)]
    rows = list(range(0, 1000, 2))
    rows.remove(500)
    assert ranges_over(rows, most=2) == [(0, 499), (502, 999)]
