"""The encode job inside the test's own process: everything but Ray, which only carries blocks between these steps."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipeline.codec.codec import load_codec
from pipeline.config import load_config
from pipeline.encode import job
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.encoder import Encoder
from pipeline.encode.plan import largest_bucket
from pipeline.encode.rows import encoded_table
from pipeline.encode.stages import CommitRows, ImageDecoder, UnitReader
from pipeline.result import JobResult
from pipeline.storage.root import Root
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State, read_state
from pipeline.store.plan import work_of
from pipeline.store.writer import Committer


def encode_here(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> JobResult:
    """Run the encode job with `settings` (dots written as __), its passes replaced by a loop over the units."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    config = load_config(EncodeJobConfig, [], ["tracking.enabled=false", "encode.num_gpus=0", *overrides])
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.encode.passes.run_passes", _passes)
        patch.setattr("pipeline.encode.passes.check_cluster", lambda config: None)
        return job.run(config)


def _passes(config: EncodeJobConfig, root: Root, generation: Any, info: Any, tracker: Any, retry: RowSet) -> State:
    dtype = config.encode.latent_dtype
    codec = load_codec(config.codec.path, kind=config.codec.kind)
    encoder = Encoder(
        codec,
        config.codec.posterior,
        dtype,
        config.encode.batch_size,
        math.prod(largest_bucket(config.image)),
        config.source.uri,
    )
    commit = CommitRows(Committer(root, generation.number, config.encode.row_group_bytes, dtype, {}))
    state = read_state(root)
    decoder = ImageDecoder(config.image, config.source.uri, 1, 4)
    try:
        for work in (w for batch in work_of(state.gaps(retry), 1000) for w in batch):
            reader = UnitReader(root, config.source, {work.unit: state.plan.locate(work.unit)})
            for block in reader(work):
                commit(encoded_table(encoder.encode(decoder.items(block))))
    finally:
        decoder.close()
    return read_state(root)
