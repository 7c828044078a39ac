"""What the readers hand on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.source.reasons import Reason


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
