"""Decoding beside the device: rows of compressed bytes to pixels, in order, on threads that run ahead."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa

from pipeline.encode.blocks import lines, raw_item
from pipeline.encode.items import Decoded, Item, Rejected, UnitEnd
from pipeline.source.config import ImageConfig
from pipeline.source.pixels.prepare import PreparedImage, Reject, prepare
from pipeline.source.reading.rows import EndOfUnit


class ImageDecoder:
    """Turns RAW tables into items; holds its threads until closed."""

    def __init__(self, image: ImageConfig, source_uri: str, threads: int, ahead: int) -> None:
        self._image, self._source_uri, self._ahead = image, source_uri, max(ahead, threads)
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
            rows, deque(self._pool.submit(self._timed, values) for values in islice(rows, self._ahead))
        )

    def _decoded(self, rows: Iterator[dict[str, Any]], waiting: deque[Future[list[Item]]]) -> Iterator[Item]:
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(self._pool.submit(self._timed, values) for values in islice(rows, 1))

    def unreported_s(self) -> float:
        """Seconds of work since this was asked last."""
        with self._lock:
            news, self._reported_s = self.busy_s - self._reported_s, self.busy_s
        return news

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _timed(self, values: dict[str, Any]) -> list[Item]:
        began = time.perf_counter()
        try:
            return self._decode(values)
        finally:
            with self._lock:
                self.busy_s += time.perf_counter() - began

    def _decode(self, values: dict[str, Any]) -> list[Item]:
        item = raw_item(values)
        if isinstance(item, EndOfUnit):
            return [UnitEnd(values["unit"], item.rows)]
        prepared = prepare(item, self._image)
        if isinstance(prepared, Reject):
            uri = f"{self._source_uri}/{item.key}"
            why = (prepared.status, str(prepared.reason), prepared.message)
            return [Rejected(values["unit"], item.row, item.key, uri, *why)]
        told = {name: values[name] for name in ("unit", "row", "key", "caption", "label", "extra")}
        return [Decoded({**told, **_described(p)}, len(prepared), p.pixels) for p in prepared]


def _described(p: PreparedImage) -> dict[str, Any]:
    top, left, height, width = p.crop
    return {
        "sample_id": p.sample_id,
        "variant": p.variant,
        "bucket": f"{p.bucket[0]}x{p.bucket[1]}",
        "original_height": p.original[0],
        "original_width": p.original[1],
        "crop_top": top,
        "crop_left": left,
        "crop_height": height,
        "crop_width": width,
        "flipped": p.flipped,
        "content_sha256": p.content_sha256,
        "phash": p.phash,
    }
