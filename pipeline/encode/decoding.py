"""Decoding beside the device: rows of compressed bytes to pixels, in order, on threads that run ahead."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.encode.blocks import ENCODED, source_row
from pipeline.encode.items import Item, rejection
from pipeline.source.config import ImageConfig
from pipeline.source.pixels.prepare import PreparedImage, Reject, prepare

# Between decode tasks and encoders: everything an encoded row has, with pixels where the latent will be.
PIXELS = ENCODED.append(pa.field("pixels", pa.large_binary())).append(pa.field("size", pa.list_(pa.int32(), 2)))


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
        rows = _rows(raw)
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
        address = {"unit": values["unit"], "row": values["row"], "key": values["key"]}
        if values["status"] == "end":
            return [Item({**address, "outcome": "end", "variants": 0, "unit_rows": values["unit_rows"]}, None)]
        prepared = prepare(source_row(values), self._image)
        if isinstance(prepared, Reject):
            return [
                Item(
                    {
                        **address,
                        **rejection(prepared.status, prepared.reason, prepared.message),
                        "uri": f"{self._source_uri}/{values['key']}",
                    },
                    None,
                )
            ]
        text = {name: values[name] for name in ("caption", "label", "extra")}
        return [
            Item({**address, **text, **_described(p), "outcome": "stored", "variants": len(prepared)}, p.pixels)
            for p in prepared
        ]


def _rows(raw: pa.Table) -> Iterator[dict[str, Any]]:
    # One row at a time: `to_pylist` of a whole block would copy every image at once.
    for batch in raw.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


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


def pixels_table(items: Iterable[Item]) -> pa.Table:
    """Items as one table, for decode tasks that run apart from the device."""
    rows = [
        {**item.values}
        if item.pixels is None
        else {**item.values, "pixels": item.pixels.tobytes(), "size": item.pixels.shape[:2]}
        for item in items
    ]
    return pa.Table.from_pylist(rows, schema=PIXELS)


def items_of(table: pa.Table) -> Iterator[Item]:
    """The inverse of `pixels_table`."""
    for values in _rows(table):
        pixels, size = values.pop("pixels"), values.pop("size")
        shaped = None if pixels is None else np.frombuffer(pixels, np.uint8).reshape(size[0], size[1], 3)
        yield Item(values, shaped)
