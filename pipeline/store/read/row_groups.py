"""The row groups of a file as columns: a ledger of a billion images holds millions of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

_WHOLE = ("rows", "bytes", "first_unit", "last_unit", "values", "label_max", "unlabelled")


@dataclass(frozen=True)
class RowGroupInfo:
    """One row group of a data file: its bucket, rows, stored bytes, the units it spans, and sums for statistics.

    `channel_sum` and `channel_sumsq` are over all values of each latent channel, `values` how many each channel
    has; they are empty for kinds without latents. `label_max` is -1 when no row has a label.
    """

    bucket: str
    rows: int
    size_bytes: int
    first_unit: int
    last_unit: int
    channel_sum: tuple[float, ...] = ()
    channel_sumsq: tuple[float, ...] = ()
    values: int = 0
    label_max: int = -1
    unlabelled: int = 0


class RowGroups(Sequence[RowGroupInfo]):
    """The row groups of one file, in file order; immutable.

    Kept as arrays, about a tenth of the memory of one object each: `whole` int64 [n, 7] (rows, bytes, first_unit,
    last_unit, values, label_max, unlabelled), `sums` and `sumsqs` float64 [n, channels].
    """

    __slots__ = ("buckets", "sums", "sumsqs", "whole")

    def __init__(
        self,
        buckets: tuple[str, ...],
        whole: npt.NDArray[np.int64],
        sums: npt.NDArray[np.float64],
        sumsqs: npt.NDArray[np.float64],
    ) -> None:
        self.buckets, self.whole, self.sums, self.sumsqs = buckets, whole, sums, sumsqs

    @classmethod
    def of(cls, infos: Sequence[RowGroupInfo]) -> RowGroups:
        """From one object each; ValueError when they do not have the same number of channels."""
        whole = [
            (i.rows, i.size_bytes, i.first_unit, i.last_unit, i.values, i.label_max, i.unlabelled) for i in infos
        ]
        return cls(
            tuple(i.bucket for i in infos),
            np.array(whole, np.int64).reshape(-1, len(_WHOLE)),
            _floats([i.channel_sum for i in infos]),
            _floats([i.channel_sumsq for i in infos]),
        )

    @classmethod
    def from_columns(cls, columns: Mapping[str, Any]) -> RowGroups:
        """From the lists of a commit record; ValueError or KeyError when they do not fit together."""
        buckets = columns["bucket"]
        names = {name: name for name in buckets}  # one string object per distinct bucket
        whole = np.array([columns[name] for name in _WHOLE], np.int64).reshape(len(_WHOLE), -1)
        sums, sumsqs = _floats(columns["sum"]), _floats(columns["sumsq"])
        if not len(buckets) == whole.shape[1] == len(sums) == len(sumsqs) or sums.shape != sumsqs.shape:
            raise ValueError("the columns of the row groups differ in length")
        return cls(tuple(names[b] for b in buckets), np.ascontiguousarray(whole.T), sums, sumsqs)

    def to_columns(self) -> dict[str, Any]:
        """The lists of a commit record."""
        whole = dict(zip(_WHOLE, self.whole.T.tolist(), strict=True))
        return {"bucket": list(self.buckets), "sum": self.sums.tolist(), "sumsq": self.sumsqs.tolist(), **whole}

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of each, int64 [n]."""
        return self.whole[:, 0]

    @property
    def size_bytes(self) -> npt.NDArray[np.int64]:
        """Stored bytes of each, int64 [n]."""
        return self.whole[:, 1]

    @property
    def first_unit(self) -> npt.NDArray[np.int64]:
        """The lowest unit in each, int64 [n]."""
        return self.whole[:, 2]

    @property
    def last_unit(self) -> npt.NDArray[np.int64]:
        """The highest unit in each, int64 [n]."""
        return self.whole[:, 3]

    def __len__(self) -> int:
        return len(self.buckets)

    @overload
    def __getitem__(self, index: int) -> RowGroupInfo: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[RowGroupInfo, ...]: ...
    def __getitem__(self, index: int | slice) -> RowGroupInfo | tuple[RowGroupInfo, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        rows, size, first, last, values, label_max, unlabelled = self.whole[index].tolist()
        sums, sumsqs = tuple(self.sums[index].tolist()), tuple(self.sumsqs[index].tolist())
        return RowGroupInfo(self.buckets[index], rows, size, first, last, sums, sumsqs, values, label_max, unlabelled)

    def __iter__(self) -> Iterator[RowGroupInfo]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowGroups) and self.to_columns() == other.to_columns()

    def __hash__(self) -> int:
        return hash((self.buckets, self.whole.tobytes()))

    def __repr__(self) -> str:
        return f"RowGroups({list(self)!r})"


def _floats(rows: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    return np.array(rows, np.float64).reshape(len(rows), -1) if len(rows) else np.zeros((0, 0))
