"""Bytes of source objects: whole ones fetched ahead, large ones as files, and every failure as a reason."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, TypeVar

from pipeline.errors import PipelineError
from pipeline.source.reasons import Reason
from pipeline.storage import Root
from pipeline.storage_errors import describe

A = TypeVar("A")
B = TypeVar("B")
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class Failure:
    """Why there are no bytes."""

    reason: Reason
    message: str


def fetch(root: Root, key: str, max_bytes: int, known_size: int | None = None) -> bytes | Failure:
    """A whole object of at most `max_bytes`; storage has retried what could be retried."""
    if known_size is not None and known_size > max_bytes:
        return Failure(Reason.TOO_MANY_BYTES, f"{known_size} bytes, over source.max_bytes {max_bytes}")
    try:
        data = root.read_bytes(key) if known_size is not None else root.read_range(key, 0, max_bytes + 1)
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


def open_file(root: Root, key: str, size_bytes: int) -> BinaryIO:
    """A buffered seekable file; on remote stores each read of the buffer is one ranged request with retries."""
    if root.local_path() is not None:
        return root.open(key)
    return io.BufferedReader(_RangedFile(root, key, size_bytes), _READ_BYTES)


class _RangedFile(io.RawIOBase):
    """Reads through `Root.read_range`, whose retries a long-lived HTTP body would not have."""

    def __init__(self, root: Root, key: str, size_bytes: int) -> None:
        self._root, self._key, self._size, self._at = root, key, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), max(0, self._size - self._at))
        data = self._root.read_range(self._key, self._at, length) if length else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


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
