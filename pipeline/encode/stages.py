"""What runs on the workers: reading a unit, encoding a block, committing rows. Plain classes that pickle.

Torch is imported by the encoder alone: the processes that read and write start without it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.codec.codec import Codec, load_codec
from pipeline.codec.config import CodecConfig
from pipeline.dataflow.cluster import is_worker
from pipeline.dataflow.device_faults import out_of_memory
from pipeline.encode.rows import (
    Decoded,
    EncodedImage,
    Item,
    Rejected,
    UnitEnd,
    encoded_table,
    items_of,
    lines,
    pixels_table,
    raw_item,
    raw_table,
    split_outcomes,
)
from pipeline.errors import ConfigError, argument_keys, keyed
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.pixels.prepare import Reject, prepare, thumbnail_of
from pipeline.source.reading.listing import read_unit
from pipeline.source.reading.rows import EndOfUnit, Entry, SourceRow, sample_id
from pipeline.source.reasons import ENCODING, Reason
from pipeline.storage.root import Root
from pipeline.store.maintain.forget import Withdrawals
from pipeline.store.plan import EntrySpan, Work, read_entries
from pipeline.store.schema import to_float32
from pipeline.store.writer import Committer

_log = logging.getLogger(__name__)
EXAMPLES = 3  # of each reason why rows are left out, that one process shows
_shown: Counter[tuple[str, str]] = Counter()  # by source and reason: how many this process has
_PICTURE_SIDE = 256  # of an image that is shown: what decoding a part of it takes is little anywhere

# -- Decoding beside the device: rows of compressed bytes to pixels, in order, on threads that run ahead -------


class ImageDecoder:
    """Turns RAW tables into items; holds its threads until closed."""

    def __init__(
        self, image: ImageConfig, source_uri: str, threads: int, ahead: int, monitor: Any = None, examples: int = 0
    ) -> None:
        """monitor: is shown the first `examples` rows that are left out for each reason."""
        self._image, self._source_uri, self._ahead = image, source_uri, max(ahead, threads)
        self._monitor, self._examples = monitor, examples
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._lock = threading.Lock()
        self.busy_s = 0.0  # seconds of work of all threads together
        self._reported_s = 0.0

    def items(self, raw: pa.Table) -> Iterator[Item]:
        """The items of a table in row order; at most `ahead` rows are decoded before they are asked for.

        The first of them at once, not when the first item is asked for.
        """
        rows = lines(raw)
        return self._decoded(
            rows, deque(self._pool.submit(self._decode, values) for values in islice(rows, self._ahead))
        )

    def _decoded(self, rows: Iterator[dict[str, Any]], waiting: deque[Future[list[Item]]]) -> Iterator[Item]:
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(self._pool.submit(self._decode, values) for values in islice(rows, 1))

    def unreported_s(self) -> float:
        """Seconds of work since this was asked last."""
        with self._lock:
            news, self._reported_s = self.busy_s - self._reported_s, self.busy_s
        return news

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, values: dict[str, Any]) -> list[Item]:
        began = time.perf_counter()
        try:
            item = raw_item(values)
            if isinstance(item, EndOfUnit):
                return [UnitEnd(values["unit"], item.rows)]
            prepared = prepare(item, self._image)
            if isinstance(prepared, Reject):
                uri = f"{self._source_uri}/{item.key}"
                cause = (prepared.status, str(prepared.reason), prepared.message)
                self._show(item, prepared)
                return [Rejected(values["unit"], item.row, item.key, uri, *cause)]
            kept = {name: values[name] for name in ("unit", "row", "key", "caption", "label", "extra")}
            items: list[Item] = []
            for image in prepared:
                top, left, height, width = image.crop
                described = {
                    "sample_id": image.sample_id,
                    "variant": image.variant,
                    "bucket": f"{image.bucket[0]}x{image.bucket[1]}",
                    "original_height": image.original[0],
                    "original_width": image.original[1],
                    "crop_top": top,
                    "crop_left": left,
                    "crop_height": height,
                    "crop_width": width,
                    "flipped": image.flipped,
                    "content_sha256": image.content_sha256,
                    "phash": image.phash,
                }
                items.append(Decoded({**kept, **described}, len(prepared), image.pixels))
            return items
        finally:
            with self._lock:
                self.busy_s += time.perf_counter() - began

    def _show(self, row: SourceRow, why: Reject) -> None:
        """What was left out, for people, and what it looks like where that can be seen."""
        with self._lock:
            _shown[self._source_uri, why.reason] += 1
            enough = _shown[self._source_uri, why.reason] > self._examples
        if not enough:
            from pipeline.media import inline_bytes

            pixels = thumbnail_of(row, self._image, why.reason)
            data = None if pixels is None else inline_bytes(np.ascontiguousarray(pixels))[0]
            self._monitor.leave_out.remote(str(why.reason), row.key, why.message, data)


BLOCK_BYTES = 32 << 20  # of compressed images, that travel from a read task to an encoder
BLOCK_ROWS = 1024


def blocks_at_most(work: Sequence[Work], size_bytes: int) -> float:
    """How many blocks read tasks make of some units, of so many bytes at most; infinite where one has an open end."""
    rows = [math.inf if stop is None else stop - start for w in work for start, stop in w.ranges]
    return len(work) + sum(rows) / BLOCK_ROWS + size_bytes / BLOCK_BYTES


# Blocks an actor has at a time: one whose images it takes, and others whose last batches wait for company. Beside a
# GPU, whose queue holds three batches of up to hundreds of images, as many images must be on their way, and a block
# holds few large ones.
_CALLS, _CALLS_BESIDE_A_GPU, _BATCHES_ON_THEIR_WAY = 3, (16, 64), 4


def calls_of(num_gpus: float, batch_size: int, image_bytes: float) -> int:
    """How many blocks an actor has at a time, of images of so many compressed bytes each, 0 where that is unknown."""
    if not num_gpus:
        return _CALLS
    block_rows = min(BLOCK_ROWS, max(1.0, BLOCK_BYTES / max(1.0, image_bytes)))
    least, most = _CALLS_BESIDE_A_GPU
    return min(most, max(least, math.ceil(_BATCHES_ON_THEIR_WAY * batch_size / block_rows)))


ENCODER = "encoder"  # the stage, as the monitor knows it


@dataclass(frozen=True)
class UnitReader:
    """Reads the wanted rows of a unit as RAW blocks; knows where the entries of some units lie."""

    root: Root
    source: SourceConfig
    spans: dict[int, EntrySpan]
    block_rows: int = BLOCK_ROWS
    monitor: Any = None
    any_version: bool = False  # what the source holds now, not what was listed
    withdrawn: tuple[str, ...] = ()  # the lists of what is never stored again: see `store.maintain.forget`

    def of(self, work: Work) -> Callable[[], Iterator[pa.Table]]:
        """What reads one unit and knows of no other: it travels with every task."""
        return partial(replace(self, spans={work.unit: self.spans[work.unit]}), work)

    def __call__(self, work: Work) -> Iterator[pa.Table]:
        if self.monitor is None:
            yield from self._blocks(work)
            return
        from pipeline.dataflow.monitor import Amounts

        amounts, began = Amounts(self.monitor.add.remote), time.perf_counter()
        try:
            for table in self._blocks(work):
                amounts.add({"read_s": time.perf_counter() - began})
                yield table
                began = time.perf_counter()
        finally:
            amounts.add({"read_s": time.perf_counter() - began})
            amounts.flush()

    def _blocks(self, work: Work) -> Iterator[pa.Table]:
        entries = [
            Entry(e.key, e.size_bytes, e.etag, e.mtime_ns, e.row_start, e.row_stop, e.meta)
            for e in read_entries(self.root, self.spans[work.unit])
        ]
        if self.any_version:
            entries = [replace(e, etag=None, mtime_ns=None) for e in entries]
        block: list[SourceRow | EndOfUnit] = []
        size = 0
        withdrawals = Withdrawals.read(self.root, self.withdrawn) if self.withdrawn else None
        for item in keyed(read_unit(self.source, entries, work.ranges), "source"):
            if withdrawals is not None and isinstance(item, SourceRow):
                item = _unless_withdrawn(item, withdrawals)
            block.append(item)
            if isinstance(item, SourceRow):  # texts may be longer than their image
                size += sum(len(part or "") for part in (item.image, item.caption, item.extra))
            if len(block) >= self.block_rows or size >= BLOCK_BYTES:
                yield raw_table(work.unit, block)
                block, size = [], 0
        if block:
            yield raw_table(work.unit, block)


def _unless_withdrawn(row: SourceRow, withdrawals: Withdrawals) -> SourceRow:
    """The row; filtered, without its bytes and texts, where it or its content was withdrawn."""
    if row.status != "ok" or not withdrawals.holds(sample_id(row.source, row.key), row.image):
        return row
    return SourceRow.without_image(row.row, row.key, Reason.WITHDRAWN, "withdrawn from this dataset", row.source)


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
    execution: int = 0  # the number of the one that it starts for
    pictures: int = 0  # images of its first block that an actor shows beside their round trips
    examples: int = 0  # rows that an actor shows of those left out for one reason


class EncodeBlocks:
    """An actor: a RAW (or PIXELS) block in, an ENCODED block out. Reports to `monitor` on the way.

    Called from `spec.calls` threads, so that the device goes on between blocks and batches fill up across them.
    """

    def __init__(self, spec: EncoderSpec, monitor: Any) -> None:
        from pipeline.dataflow.monitor import Reports

        self._spec, self._monitor, self._pictures = spec, monitor, spec.pictures
        self._reports = Reports(monitor, ENCODER, spec.execution)

        def load() -> Any:
            import torch

            from pipeline.codec.diffusers_codec import import_networks

            torch.set_num_threads(spec.threads)
            if spec.codec.kind == "auto" and is_worker():
                import_networks(compiled=spec.codec.compile)
            return load_encoder(spec)

        self._encoder = self._reports.load(load)
        ahead = -(-2 * spec.batch_size // spec.calls)  # by each call; together they hold two batches of pixels
        self._decoder = (
            None
            if spec.decoded
            else ImageDecoder(spec.image, spec.source_uri, spec.decode_threads, ahead, monitor, spec.examples)
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        if not len(block):
            return block
        encoder, reports = self._encoder(), self._reports
        with reports.busy(block):
            items = items_of(block) if self._decoder is None else self._decoder.items(block)
            outcomes = encoder.encode(items, on_batch=lambda stored: reports.add(self._news(encoder, stored)))
            reports.add(self._news(encoder, 0))
        for outcome in outcomes if self._spec.examples else ():
            if isinstance(outcome, Rejected) and outcome.reason in ENCODING:
                self._monitor.leave_out.remote(outcome.reason, outcome.key, outcome.message, None)
        shown, self._pictures = [o for o in outcomes if isinstance(o, EncodedImage)][: self._pictures], 0
        if shown:
            self._show(encoder.codec, shown)
        return encoded_table(outcomes)

    def _show(self, codec: Codec, images: Sequence[EncodedImage]) -> None:
        """Images beside what their latents decode to, for people: of large ones a part, and none is worth a run."""
        import torch

        from pipeline.media import inline_bytes

        side = _PICTURE_SIDE // codec.info.factor
        try:
            for image in images:
                latent = to_float32(np.frombuffer(image.latent, np.uint8), self._spec.latent_dtype)
                latent = latent.reshape(image.shape)[: codec.info.latent_channels, :side, :side]
                pixels = codec.decode(torch.from_numpy(latent.copy())[None].to(self._spec.device)).cpu().numpy()[0]
                height, width = pixels.shape[:2]
                for what, part in (("", image.decoded.pixels[:height, :width]), (", decoded", pixels)):
                    caption = f"{image.decoded.values['key']}{what}"
                    self._monitor.picture.remote(caption, inline_bytes(np.ascontiguousarray(part))[0])
        except Exception as error:  # noqa: BLE001 - a plug-in's codec raises what it likes; encoding goes on
            _log.warning("no picture of a round trip: %s", " ".join(str(error).split())[:300])

    def _news(self, encoder: Any, stored: int) -> dict[str, float]:
        """What came since the last time: with every batch, so that the busy shares are those of any few seconds."""
        usage = encoder.unreported()
        decode_s = self._decoder.unreported_s() if self._decoder else 0.0
        left_out = {"rejected": usage.rejected, "filtered": usage.filtered}
        amounts = {"rows": stored + sum(left_out.values()), **left_out}
        return amounts | {"wait_s": usage.wait_s, "device_s": usage.device_s, "decode_s": decode_s}


def try_encoder(spec: EncoderSpec) -> None:
    """Load the codec and encode one batch of the largest bucket; raises what an actor would meet at its start."""
    import torch

    torch.set_num_threads(spec.threads)
    load_encoder(spec).check_itself(spec.largest)


def load_encoder(spec: EncoderSpec) -> Any:
    """The `Encoder` that a spec describes; ConfigError when the codec does not fit its device."""
    from pipeline.encode.encoder import Encoder

    try:
        with argument_keys("codec"):
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
            next_step="run fewer actors on a device (encode.actors, encode.num_gpus), or use one with more memory",
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
    examples: int = 0

    def __call__(self, block: pa.Table) -> pa.Table:
        from pipeline.dataflow.monitor import Reports

        ahead = 2 * self.threads
        decoder = ImageDecoder(self.image, self.source_uri, self.threads, ahead, self.monitor, self.examples)
        reports = Reports(self.monitor, "decode task")
        # As encoders do: an image that kills its process leaves its rows open.
        with reports.busy(block):
            try:
                table = pixels_table(_reporting(decoder, block, reports))
            finally:
                decoder.close()
                reports.add({"decode_s": decoder.unreported_s()})
        return table


def _reporting(decoder: ImageDecoder, block: pa.Table, reports: Any) -> Iterator[Item]:
    """The items of a block, and what was spent with each: told at the end alone it would look like nothing."""
    for item in decoder.items(block):
        yield item
        reports.add({"decode_s": decoder.unreported_s()})


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
