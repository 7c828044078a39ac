"""Half-open ranges of row numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


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
