"""Bytes of source objects: whole ones fetched ahead, large ones as files, and every failure as a reason."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from pipeline.errors import PipelineError
from pipeline.source.reasons import Reason
from pipeline.storage.errors import describe
from pipeline.storage.remote import RangedFile
from pipeline.storage.root import Root, Version

A = TypeVar("A")
B = TypeVar("B")
ReadRange = Callable[[int, int], bytes]  # (offset, length) -> bytes, fewer at the end
_READ_BYTES, _LOCAL_READ_BYTES = 8 << 20, 1 << 20


@dataclass(frozen=True)
class Failure:
    """Why there are no bytes."""

    reason: Reason
    message: str


def fetch(
    root: Root, key: str, max_bytes: int, known_size: int | None = None, version: Version | None = None
) -> bytes | Failure:
    """A whole object of at most `max_bytes`; storage has retried what could be retried.

    version: the one that was listed, with its size; ObjectChanged when another one is there now.
    """
    if known_size is not None and known_size > max_bytes:
        return Failure(Reason.TOO_MANY_BYTES, f"{known_size} bytes, over source.max_bytes {max_bytes}")
    try:
        if known_size is None:
            data = root.read_range(key, 0, max_bytes + 1)
        else:
            data = root.read_bytes(key) if version is None else root.read_version(key, version)
    except PipelineError:
        raise
    except Exception as error:  # noqa: BLE001 - stores raise anything; each failure becomes a row
        return failure_of(error)
    if len(data) > max_bytes:
        return Failure(Reason.TOO_MANY_BYTES, f"more than source.max_bytes {max_bytes}")
    return data


def failure_of(error: Exception) -> Failure:
    """What a failed read means for the row."""
    return Failure(Reason.MISSING if isinstance(error, FileNotFoundError) else Reason.READ_FAILED, describe(error))


def open_file(root: Root, key: str, size_bytes: int, version: Version) -> BinaryIO:
    """A buffered seekable file of a listed version; each read of the buffer is one ranged request with retries."""
    ranged = RangedFile(lambda start, length: root.read_version(key, version, start, length), size_bytes, whole=False)
    return io.BufferedReader(ranged, _READ_BYTES if root.local_path() is None else _LOCAL_READ_BYTES)


@contextmanager
def open_ranges(
    root: Root, key: str, version: Version, known_size: int | None = None
) -> Iterator[tuple[ReadRange, int]]:
    """(a function that reads length bytes from an offset, the object's size); errors of the store pass through."""
    size = root.info(key).size_bytes if known_size is None else known_size
    yield lambda start, length: root.read_version(key, version, start, length), size


def map_ahead(function: Callable[[A], B], items: Iterable[A], window: int) -> Iterator[B]:
    """`map` in order, with up to `window` calls running ahead in threads; at most `window` results wait."""
    if window <= 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(window, thread_name_prefix="read-ahead") as pool:
        waiting: deque[Future[B]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= window:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
