"""The stream on a real dataset on disk: real row groups, retired rows, compaction-safe identity."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from tests.support.rows import claim, committer, latent, latent_rows, planned_root, sample_id


def test_every_row_of_a_dataset_on_disk_comes_once_per_epoch_with_its_latent(tmp_path: Path) -> None:
    root = planned_root(str(tmp_path / "data"), units=6, rows=20)
    generation = claim(root)
    for unit in range(6):
        bucket = "24x32" if unit < 4 else "32x24"
        committer(root, generation, row_group_bytes=1500).commit(
            latent_rows([(unit, row) for row in range(20)], bucket, label=unit), None, {}
        )
    generation.abandon()
    dataset = LatentDataset.open(root.uri)
    assert len(dataset.row_groups) > 12
    stream = LatentStream(dataset, seed=1, batch_size=4, lanes=2, window_bytes=10**6)
    assert stream.steps_per_epoch == 30
    by_id = {sample_id(unit, row): (unit, row) for unit in range(6) for row in range(20)}
    seen = []
    for batch in islice(stream, 30):
        shape = {"24x32": (2, 3, 4), "32x24": (2, 4, 3)}[batch.bucket]
        for at, words in enumerate(batch.sample_ids):
            unit, row = by_id[words.tobytes()]
            seen.append((unit, row))
            expected = latent(unit, row, shape).astype(np.float16).astype(np.float32)
            assert np.array_equal(batch.latents[at], expected)
            assert batch.labels is not None
            assert batch.labels[at] == unit
            assert batch.captions is not None
            assert batch.captions[at] == f"row {row} of unit {unit}"
    assert sorted(seen) == sorted(by_id.values())
    stream.close()
