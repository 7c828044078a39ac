"""A dataset written by format version 1 is kept in the repository: every later release must read it the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.storage.root import Root
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import latents_from
from tests.support.rows import claim, committer, latent_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "dataset_v1"


@pytest.fixture
def dataset(tmp_path: Path) -> LatentDataset:
    shutil.copytree(GOLDEN / "root", tmp_path / "root")
    return LatentDataset.open(str(tmp_path / "root"))


def test_the_golden_dataset_reads_as_it_was_written(dataset: LatentDataset) -> None:
    wanted = json.loads((GOLDEN / "expected.json").read_text())
    found = {}
    for group in dataset.row_groups:
        table = dataset.read(group.index, ["sample_id", "latent", "latent_shape", "unit", "row", "caption"])
        for values in table.to_pylist():
            found[values["sample_id"].hex()] = [
                values["unit"],
                values["row"],
                group.bucket,
                values["caption"],
                hashlib.sha256(values["latent"]).hexdigest(),
            ]
        shape = tuple(table["latent_shape"][0].as_py())
        assert latents_from(table["latent"], shape, dataset.latent_dtype).shape == (len(table), *shape)
    assert found == wanted["rows"]
    assert dataset.digest == wanted["digest"]
    np.testing.assert_allclose(dataset.channel_mean, wanted["channel_mean"], rtol=1e-12)
    np.testing.assert_allclose(dataset.channel_std, wanted["channel_std"], rtol=1e-12)
    state = dataset.state
    assert {r: s.triples() for r, s in state.rejects.items()} == wanted["rejects"]
    assert state.gaps().triples() == wanted["gaps"]


def test_the_golden_dataset_verifies_and_can_be_continued(dataset: LatentDataset) -> None:
    assert [p["kind"] for p in verify(dataset.uri, "checksums").problems] == ["unfinished"]
    root = Root(dataset.uri)
    gaps = read_state(root).gaps()
    committer(root, claim(root)).commit(
        latent_rows([(u, r) for u, start, stop in gaps.triples() for r in range(start, stop)]), None, {}
    )
    assert verify(dataset.uri, "checksums").problems == []


def test_any_parquet_reader_opens_the_data(dataset: LatentDataset) -> None:
    tables = [pq.read_table(p) for p in sorted(Path(dataset.uri, "data").glob("*.parquet"))]
    assert all(t.num_rows for t in tables)
    assert all(t.schema.field("latent").type in ("binary", "large_binary") for t in tables)
