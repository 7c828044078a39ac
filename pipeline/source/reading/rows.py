"""What is listed and what the readers hand on: rows, and what of their fields is kept."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pipeline.errors import PipelineError
from pipeline.source.reasons import Reason
from pipeline.storage.errors import PlaceRefused, describe
from pipeline.storage.root import Root, Version
from pipeline.storage.stores import RangedFile

# What the exifread library, and with it img2dataset's `exif` column, prints for tag 0x0112.
_ORIENTATIONS = {
    "horizontal (normal)": 1,
    "mirrored horizontal": 2,
    "rotated 180": 3,
    "mirrored vertical": 4,
    "mirrored horizontal then rotated 90 ccw": 5,
    "rotated 90 cw": 6,
    "mirrored horizontal then rotated 90 cw": 7,
    "rotated 90 ccw": 8,
}
# img2dataset's words for an image that it did not get; any other status is somebody else's, and means nothing here.
FAILED_STATUSES = ("failed_to_download", "failed_to_resize")
MAX_TEXT_BYTES = 1 << 20  # of a text as it lies beside an image, before anything of it is chosen
MAX_STORED_BYTES = 128 << 10  # of a row's caption, and of its pass-through fields: a write holds thousands of them
_MAX_LABEL = 10**18 - 1
_INTEGER = re.compile(r"\s*[0-9]{1,18}(\.0*)?\s*")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; ValueError for anything else. NaN, infinities and numbers beyond a double are null.

    That is the one rule for them, in and out (`canonical`): JSON has none of them.
    """

    def finite(digits: str) -> float | None:
        number = float(digits)
        return number if math.isfinite(number) else None

    try:
        value = json.loads(text, parse_constant=lambda name: None, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not {type(value).__name__}")
    return value


def canonical(value: Any, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Foreign types become their text.

    NaN and infinities become null. ValueError for text that is no Unicode (a lone surrogate), over `max_bytes`, or
    nested without end.
    """
    options: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False, "default": str}
    try:
        try:
            text = json.dumps(value, allow_nan=False, **options)
        except ValueError:
            text = json.dumps(_finite(value), allow_nan=False, **options)
    except (RecursionError, TypeError) as error:  # TypeError: keys of several types cannot be sorted
        raise ValueError(f"the fields are no JSON: {error}") from None
    return _checked(text, "the fields", max_bytes)


def parse_caption(value: Any) -> str | None:
    """Text or nothing, of a list its first text; ValueError for any other type, a lone surrogate, or a text too long.

    Too long is more than MAX_STORED_BYTES. What `pick_extra` keeps of a list is all of it.
    """
    texts = [one for one in (value if isinstance(value, list | tuple) else [value]) if one is not None]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"the caption must be text, not {type(text).__name__}")
        _checked(text, "the caption", MAX_STORED_BYTES)
    return next(iter(texts), None)


def parse_label(value: Any, classes: Sequence[str]) -> int | None:
    """A class number: given as such, as digits, or as one of the class names; ValueError otherwise.

    A number without a fraction is one however it is written (3.0, as tables with gaps have it); NaN is no label.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float | Decimal) and value == value // 1:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return _known(value, classes)
    if isinstance(value, str):
        if value.strip() in classes:
            return classes.index(value.strip())
        if _INTEGER.fullmatch(value):
            return _known(int(value.partition(".")[0]), classes)
    known = f" or one of the {len(classes)} classes" if classes else ""
    raise ValueError(f"the label {value!r:.60} is no integer from 0 up{known}")


def pick_extra(
    record: Mapping[str, Any], names: Sequence[str], caption: str | None, taken: Sequence[str | None]
) -> dict[str, Any]:
    """The pass-through fields: those named, or with "*" all that are not used otherwise, and a list of captions.

    caption: the name of the caption, of which the row has the first text alone.
    """
    several = {caption: record[caption]} if caption and isinstance(record.get(caption), list | tuple) else {}
    if "*" in names:
        return {k: v for k, v in record.items() if k not in taken and k != caption} | several
    return {name: record[name] for name in names if name in record} | several


def orientation_of(exif: Any) -> int | None:
    """The orientation in img2dataset's exif text (a JSON object as exifread prints it), or None."""
    if isinstance(exif, str | bytes):
        try:
            exif = parse_object(exif)
        except ValueError:
            return None
    if not isinstance(exif, dict):
        return None
    value = exif.get("Image Orientation", exif.get("Orientation"))
    if isinstance(value, str):
        text = value.strip().lower()
        return int(text) if text in set("12345678") else _ORIENTATIONS.get(text)
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 8 else None


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _checked(text: str, what: str, max_bytes: int) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} cannot be written as UTF-8") from None
    if size > max_bytes:
        raise ValueError(f"{what} take {size} bytes, over {max_bytes}")
    return text


def _known(label: int, classes: Sequence[str]) -> int:
    if label > _MAX_LABEL:
        raise ValueError(f"the label is beyond {_MAX_LABEL}")
    if classes and label >= len(classes):
        raise ValueError(f"the label {label} is beyond the {len(classes)} classes")
    return label


# -- Fields of a row: which file or column gives what, and what may be kept of it ------------------------------


@dataclass(frozen=True)
class Entry:
    """One object of a source, or a range of rows of one: what a unit of work is made of.

    key: relative to `source_root(source).uri`; rows row_start..row_stop (None: unknown before reading);
    meta: for folder sources the canonical JSON of caption, label, extra and what the filter says, None without any.
    """

    key: str
    size_bytes: int
    etag: str | None
    mtime_ns: int | None
    row_start: int
    row_stop: int | None
    meta: str | None


@dataclass
class SourceRow:
    """One source row: compressed bytes and text, or a reason why there are none.

    row: index within the unit; source: the source's name; extra: pass-through fields as JSON;
    status: "ok" | "rejected" | "filtered".
    """

    row: int
    key: str
    image: bytes | None
    caption: str | None = None
    label: int | None = None
    extra: str | None = None
    exif_orientation: int | None = None
    status: str = "ok"
    reason: str | None = None
    message: str | None = None
    source: str = "source"

    @staticmethod
    def without_image(row: int, key: str, reason: Reason, message: str, source: str) -> SourceRow:
        """A row that ended while it was read."""
        message = message[:500].encode("utf-8", "backslashreplace").decode()  # names in it may be no Unicode
        return SourceRow(row, key, None, status=reason.status, reason=reason.value, message=message, source=source)


@dataclass(frozen=True)
class EndOfUnit:
    """The last item of a unit whose length was not known before: it has this many rows."""

    rows: int


def is_hidden(key: str) -> bool:
    """Whether any part of a key begins with a dot."""
    return key.startswith(".") or "/." in key


# -- Stable names of rows --------------------------------------------------------------------------------------


def sample_id(source_name: str, key: str, variant: int = 0) -> bytes:
    """16 bytes that name a row for ever: blake2b-128 of source name, key, and the variant where there are several."""
    text = f"{source_name}\0{key}" + (f"\0variant {variant}" if variant else "")
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# -- Half-open ranges of row numbers ---------------------------------------------------------------------------


class Ranges:
    """A set of rows given as half-open ranges; a stop of None reaches to the end."""

    def __init__(self, ranges: Sequence[tuple[int, int | None]]) -> None:
        for start, stop in ranges:
            if start < 0 or (stop is not None and stop < start):
                raise ValueError(f"range ({start}, {stop}) must have 0 <= start <= stop")
        self._ranges = tuple((start, stop) for start, stop in ranges)

    @property
    def pairs(self) -> tuple[tuple[int, int | None], ...]:
        """The ranges as they were given."""
        return self._ranges

    def __contains__(self, row: object) -> bool:
        return isinstance(row, int) and any(a <= row and (b is None or row < b) for a, b in self._ranges)

    @property
    def open_ended(self) -> bool:
        """Whether the end of the unit is asked for, wherever it is."""
        return any(stop is None for _, stop in self._ranges)

    @property
    def last_stop(self) -> int:
        """The first row after all closed ranges."""
        return max((stop for _, stop in self._ranges if stop is not None), default=0)

    def beyond(self, row: int) -> bool:
        """Whether neither this row nor any after it is wanted."""
        return not self.open_ended and row >= self.last_stop

    def rest(self, row: int) -> Iterator[int]:
        """The wanted rows from `row` on, as far as it is known that they exist, and the first of an open end."""
        for start, stop in sorted(self._ranges, key=lambda r: r[0]):
            if stop is None:
                yield max(row, start)
                return
            yield from range(max(row, start), stop)

    def meets(self, start: int, stop: int) -> bool:
        """Whether any row of start..stop is wanted."""
        return any(a < stop and (b is None or b > start) and a != b for a, b in self._ranges)


# -- Bytes of source objects: whole ones fetched ahead, large ones as files, and every failure as a reason -----


A = TypeVar("A")
B = TypeVar("B")
ReadRange = Callable[[int, int], bytes]  # (offset, length) -> bytes, fewer at the end
_READ_BYTES, _LOCAL_READ_BYTES = 8 << 20, 1 << 20


@dataclass(frozen=True)
class Failure:
    """Why there are no bytes."""

    reason: Reason
    message: str


_resolved = lru_cache(maxsize=64)(os.path.realpath)


def fetch(
    root: Root,
    key: str,
    max_bytes: int,
    known_size: int | None = None,
    version: Version | None = None,
    *,
    links: str = "inside",
) -> bytes | Failure:
    """A whole object of at most `max_bytes`; storage has retried what could be retried.

    version: the one that was listed, with its size; ObjectChanged when another one is there now. links: "any" follows
    those of a local root that lead out of it, too.
    """
    local = root.local_path()
    real = None if local is None or links == "any" else Path(os.path.realpath(local / key))
    if real is not None and not real.is_relative_to(_resolved(local)):
        rule = "links lead to files below the source (source.links=any follows all)"
        return Failure(Reason.URI_REFUSED, f"a link out of the source: {rule}")
    if known_size is not None and known_size > max_bytes:
        return Failure(Reason.TOO_MANY_BYTES, f"{known_size} bytes, over source.max_bytes {max_bytes}")
    try:
        # No more than that, whatever a server says of its size. Of nothing there is no range.
        length = None if known_size == 0 else max_bytes + 1
        if version is not None:
            data = root.read_version(key, version, 0, length)
        else:
            data = root.read_bytes(key) if length is None else root.read_range(key, 0, length)
    except PipelineError:
        raise
    except Exception as error:  # noqa: BLE001 - stores raise anything; each failure becomes a row
        return failure_of(error)
    if len(data) > max_bytes:
        return Failure(Reason.TOO_MANY_BYTES, f"more than source.max_bytes {max_bytes}")
    return data


def failure_of(error: Exception) -> Failure:
    """What a failed read means for the row."""
    if isinstance(error, PlaceRefused):
        return Failure(Reason.URI_REFUSED, str(error))
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
