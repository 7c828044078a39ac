"""What runs on the workers: reading a unit, encoding a block, committing rows. Plain classes that pickle.

Torch is imported by the encoder alone: the processes that read and write start without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from pipeline.codec.config import CodecConfig
from pipeline.encode.blocks import encoded_table, items_of, pixels_table, raw_table, split_outcomes
from pipeline.encode.decoding import ImageDecoder
from pipeline.errors import ConfigError
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.reading.listing import Entry
from pipeline.source.reading.readers import read_unit
from pipeline.source.reading.rows import EndOfUnit, SourceRow
from pipeline.storage.root import Root
from pipeline.store.plan.plan import EntrySpan, read_entries
from pipeline.store.plan.work import Work
from pipeline.store.write.writer import Committer

_BLOCK_BYTES = 32 << 20
ENCODER = "encoder"  # the stage, as the monitor knows it


@dataclass(frozen=True)
class UnitReader:
    """Reads the wanted rows of a unit as RAW blocks; knows where the entries of some units lie."""

    root: Root
    source: SourceConfig
    spans: dict[int, EntrySpan]
    block_rows: int = 1024
    monitor: Any = None
    any_version: bool = False  # what the source holds now, not what was listed

    def of(self, work: Work) -> Callable[[], Iterator[pa.Table]]:
        """What reads one unit and knows of no other: it travels with every task."""
        return partial(replace(self, spans={work.unit: self.spans[work.unit]}), work)

    def __call__(self, work: Work) -> Iterator[pa.Table]:
        spent, began = 0.0, time.perf_counter()
        for table in self._blocks(work):
            spent += time.perf_counter() - began
            yield table
            began = time.perf_counter()
        if self.monitor is not None:
            self.monitor.add.remote({"read_s": spent + time.perf_counter() - began})

    def _blocks(self, work: Work) -> Iterator[pa.Table]:
        entries = [
            Entry(e.key, e.size_bytes, e.etag, e.mtime_ns, e.row_start, e.row_stop, e.meta)
            for e in read_entries(self.root, self.spans[work.unit])
        ]
        if self.any_version:
            entries = [replace(e, etag=None, mtime_ns=None) for e in entries]
        block: list[SourceRow | EndOfUnit] = []
        size = 0
        for item in read_unit(self.source, entries, work.ranges):
            block.append(item)
            size += len(item.image or b"") if isinstance(item, SourceRow) else 0
            if len(block) >= self.block_rows or size >= _BLOCK_BYTES:
                yield raw_table(work.unit, block)
                block, size = [], 0
        if block:
            yield raw_table(work.unit, block)


@dataclass(frozen=True)
class EncoderSpec:
    """Everything an encoder actor needs to start."""

    codec: CodecConfig
    image: ImageConfig
    source_uri: str
    latent_dtype: str
    batch_size: int
    decode_threads: int
    threads: int
    device: str
    largest: tuple[int, int]  # height and width of the bucket with most pixels
    decoded: bool  # blocks come with pixels, from decode tasks
    calls: int  # blocks an actor has at a time


class EncodeBlocks:
    """An actor: a RAW (or PIXELS) block in, an ENCODED block out. Reports to `monitor` on the way.

    Called from `spec.calls` threads, so that the device goes on between blocks and batches fill up across them.
    """

    def __init__(self, spec: EncoderSpec, monitor: Any) -> None:
        import torch

        from pipeline.dataflow.stage import Reports

        torch.set_num_threads(spec.threads)
        self._reports = Reports(monitor, ENCODER)
        self._encoder = self._reports.load(partial(load_encoder, spec))
        ahead = -(-2 * spec.batch_size // spec.calls)  # by each call; together they hold two batches of pixels
        self._decoder = (
            None if spec.decoded else ImageDecoder(spec.image, spec.source_uri, spec.decode_threads, ahead)
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        if not len(block):
            return block
        encoder, reports = self._encoder(), self._reports
        with reports.busy(block):
            items = items_of(block) if self._decoder is None else self._decoder.items(block)
            outcomes = encoder.encode(items, on_batch=lambda stored: reports.add(self._news(encoder, stored)))
            reports.add(self._news(encoder, 0))
        return encoded_table(outcomes)

    def _news(self, encoder: Any, stored: int) -> dict[str, float]:
        """What came since the last report: with every batch, so that the busy shares are those of any few seconds."""
        usage = encoder.unreported()
        decode_s = self._decoder.unreported_s() if self._decoder else 0.0
        amounts = {"rows": stored + usage.rejected, "rejected": usage.rejected}
        return amounts | {"wait_s": usage.wait_s, "device_s": usage.device_s, "decode_s": decode_s}


def try_encoder(spec: EncoderSpec) -> None:
    """Load the codec and encode one batch of the largest bucket; raises what an actor would meet at its start."""
    import torch

    torch.set_num_threads(spec.threads)
    load_encoder(spec).check_itself(spec.largest)


def load_encoder(spec: EncoderSpec) -> Any:
    """The `Encoder` that a spec describes; ConfigError when the codec does not fit its device."""
    from pipeline.codec.codec import load_codec
    from pipeline.dataflow.out_of_memory import out_of_memory
    from pipeline.encode.encoder import Encoder

    try:
        codec = load_codec(
            spec.codec.path,
            revision=spec.codec.revision,
            kind=spec.codec.kind,
            device=spec.device,
            dtype=spec.codec.dtype,
            compile=spec.codec.compile,
            channels_last=spec.codec.channels_last,
        )
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(
            f"The codec does not fit the memory that an encoder has on its {spec.device} device",
            key="codec.path",
            value=spec.codec.path,
            rule="every encoder actor loads the codec",
            next_step="run fewer actors on a device (encode.actors, encode.actor_gpus), or use one with more memory",
        ) from error
    return Encoder(
        codec,
        spec.codec.posterior,
        spec.latent_dtype,
        spec.batch_size,
        spec.largest[0] * spec.largest[1],
        spec.source_uri,
        device=spec.device,
        calls=spec.calls,
    )


@dataclass(frozen=True)
class DecodeImages:
    """A task: a RAW block in, a PIXELS block out; for decoding on nodes without a device."""

    image: ImageConfig
    source_uri: str
    threads: int
    monitor: Any

    def __call__(self, block: pa.Table) -> pa.Table:
        from pipeline.dataflow.stage import Reports

        decoder = ImageDecoder(self.image, self.source_uri, self.threads, 2 * self.threads)
        reports = Reports(self.monitor, "decode task")
        # As encoders do: an image that kills its process leaves its rows open.
        with reports.busy(block):
            try:
                table = pixels_table(decoder.items(block))
            finally:
                decoder.close()
                reports.add({"decode_s": decoder.busy_s})
        return table


@dataclass(frozen=True)
class CommitRows:
    """A write task's work: ENCODED rows to one commit."""

    committer: Committer
    monitor: Any = None

    def __call__(self, table: pa.Table) -> None:
        began = time.perf_counter()
        stored, outcomes, unit_rows = split_outcomes(table)
        self.committer.commit(stored, outcomes, unit_rows)
        if self.monitor is not None:
            self.monitor.add.remote({"write_s": time.perf_counter() - began})
