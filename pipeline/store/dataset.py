"""The read side: open a dataset once, then read row groups of visible rows from any thread."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError
from pipeline.storage import Root
from pipeline.store import layout
from pipeline.store.identity import Identity, read_identity
from pipeline.store.row_groups import RowGroupInfo
from pipeline.store.rowset import RowSet
from pipeline.store.runs import last_run
from pipeline.store.shard import channel_totals
from pipeline.store.state import State, VisibleFile, read_state


@dataclass(frozen=True)
class RowGroup:
    """One readable row group: its place, its bucket ("HxW" pixels) and its visible rows."""

    index: int
    file: str
    group: int
    bucket: str
    num_rows: int
    size_bytes: int


class Dataset:
    """A dataset of any kind as it was visible when opened; later commits do not change it."""

    def __init__(self, root: Root, identity: Identity, state: State) -> None:
        self.root, self.identity, self.state = root, identity, state
        self._footers: dict[str, pq.FileMetaData] = {}
        self._lock = threading.Lock()
        self._groups: list[tuple[VisibleFile, int, RowGroupInfo]] = []
        row_groups: list[RowGroup] = []
        for file in state.files:
            for number, info in enumerate(file.info.row_groups):
                visible = info.rows if not _touches(file.dead, info) else self._count_visible(file, number)
                if visible:
                    row_groups.append(
                        RowGroup(len(row_groups), file.info.path, number, info.bucket, visible, info.size_bytes)
                    )
                    self._groups.append((file, number, info))
        self.row_groups: Sequence[RowGroup] = tuple(row_groups)
        self.num_rows = sum(g.num_rows for g in row_groups)

    @classmethod
    def open_kind(cls, uri: str, kind: str, key: str = "data.uri") -> Any:
        """Open the dataset at `uri`; InputError when there is none or it holds rows of another kind."""
        root = Root(uri)
        identity = read_identity(root, key)
        if identity.kind != kind:
            raise InputError(
                f"{uri} is a dataset of {identity.kind}", key=key, value=uri, rule=f"a dataset of {kind} is needed"
            )
        return cls(root, identity, read_state(root))

    @property
    def uri(self) -> str:
        """Where the dataset lies."""
        return self.root.uri

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What all rows share: see DESIGN and FORMAT.md."""
        return self.identity.fingerprint

    @property
    def fingerprint_digest(self) -> str:
        """Hex digest of the fingerprint."""
        return self.identity.fingerprint_digest

    @cached_property
    def digest(self) -> str:
        """Hex digest of the logical content: the same rows made in the same way, however they are laid out."""
        state = self.state
        settled = RowSet.union_all([*state.rejects.values(), *state.filtered.values()])
        entries = [[*v.entry_parts, v.units_part, list(v.retired)] for v in state.plan.versions]
        body = [self.fingerprint_digest, entries, (state.covered - settled).triples()]
        return hashlib.blake2b(layout.canonical_json(body), digest_size=16).hexdigest()

    @cached_property
    def layout_digest(self) -> str:
        """Hex digest of the physical row groups in order: what the order of a stream depends on."""
        body = [self.digest, [[g.file, g.group, g.num_rows] for g in self.row_groups]]
        return hashlib.blake2b(layout.canonical_json(body), digest_size=16).hexdigest()

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """`run_id` (or handle) of the tracking run that wrote last, and the `source` it read; {} when unknown."""
        note = last_run(self.root)
        return {"run_id": note.get("run_id") or note.get("handle"), "source": note.get("source")} if note else {}

    def groups_within(self, first_unit: int, stop_unit: int) -> Iterator[tuple[int, RowGroupInfo]]:
        """(index, info) of the readable row groups that may hold rows of units [first_unit, stop_unit)."""
        for index, (_, _, info) in enumerate(self._groups):
            if info.first_unit < stop_unit and info.last_unit >= first_unit:
                yield index, info

    def read(self, row_group: int, columns: Sequence[str] | None) -> pa.Table:
        """The visible rows of one row group, in (unit, row, variant) order; None reads all columns.

        Page checksums are verified.

        OSError or ArrowInvalid when the file is damaged or gone. Safe to call from several threads.
        """
        file, number, info = self._groups[row_group]
        if not _touches(file.dead, info):
            return self._read_group(file.info.path, number, columns)
        extra = [] if columns is None else [c for c in ("unit", "row") if c not in columns]
        table = self._read_group(file.info.path, number, None if columns is None else [*columns, *extra])
        dead = file.dead.contains(table["unit"].to_numpy(), table["row"].to_numpy())
        table = table.filter(pa.array(~dead))
        return table if columns is None else table.select(list(columns))

    def _count_visible(self, file: VisibleFile, number: int) -> int:
        table = self._read_group(file.info.path, number, ["unit", "row"])
        return int((~file.dead.contains(table["unit"].to_numpy(), table["row"].to_numpy())).sum())

    def _read_group(self, path: str, number: int, columns: Sequence[str] | None) -> pa.Table:
        local = self.root.local_path(path)
        source = pa.memory_map(str(local)) if local is not None else self.root.open(path)
        with source:
            footer = self._footers.get(path)
            reader = pq.ParquetFile(
                source, metadata=footer, pre_buffer=local is None, page_checksum_verification=True
            )
            if footer is None:
                with self._lock:
                    self._footers[path] = reader.metadata
            names = None if columns is None else list(columns)
            return reader.read_row_group(number, columns=names, use_threads=False)


class LatentDataset(Dataset):
    """A dataset of latents."""

    @classmethod
    def open(cls, uri: str, key: str = "data.uri") -> LatentDataset:
        """Open the latents at `uri`; InputError, naming `key`, when there are none."""
        dataset: LatentDataset = cls.open_kind(uri, "latents", key)
        return dataset

    @property
    def codec(self) -> dict[str, Any]:
        """The encoder, as `CodecInfo.as_dict()` gave it."""
        return dict(self.identity.about["codec"])

    @property
    def latent_dtype(self) -> str:
        """How latents are stored: float16 or bfloat16."""
        return str(self.fingerprint["latent_dtype"])

    @property
    def posterior(self) -> str:
        """What a stored latent is: "mode", "sample" or "moments" (mean and log-variance, twice the channels)."""
        return str(self.fingerprint["posterior"])

    @cached_property
    def num_classes(self) -> int | None:
        """One more than the largest label; None when any row group holds a row without a label."""
        infos = [info for _, _, info in self._groups]
        if not infos or any(i.unlabelled for i in infos):
            return None
        return 1 + max(i.label_max for i in infos)

    @cached_property
    def _channel_moments(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        total: npt.NDArray[np.float64] | float = 0.0
        squares: npt.NDArray[np.float64] | float = 0.0
        values = 0
        for index, (file, _, info) in enumerate(self._groups):
            sums: dict[str, Any] = {
                "channel_sum": info.channel_sum,
                "channel_sumsq": info.channel_sumsq,
                "values": info.values,
            }
            if _touches(file.dead, info):
                # Some stored rows do not count: their sums must not either.
                sums = channel_totals(self.read(index, ["latent", "latent_shape"]), self.latent_dtype)
            total = total + np.array(sums["channel_sum"])
            squares = squares + np.array(sums["channel_sumsq"])
            values += sums["values"]
        if not values:
            raise InputError(f"The dataset {self.uri} has no visible row", next_step="run jobs.encode to its end")
        mean = np.asarray(total) / values
        return mean, np.sqrt(np.maximum(np.asarray(squares) / values - mean**2, 0.0))

    @property
    def channel_mean(self) -> npt.NDArray[np.float64]:
        """Exact mean of every stored channel over all visible rows, float64 [c]."""
        return self._channel_moments[0]

    @property
    def channel_std(self) -> npt.NDArray[np.float64]:
        """Exact standard deviation of every stored channel over all visible rows, float64 [c]."""
        return self._channel_moments[1]


def _touches(dead: RowSet, info: RowGroupInfo) -> bool:
    if not dead:
        return False
    span = RowSet.from_triples([(u, 0, 1 << 31) for u in range(info.first_unit, info.last_unit + 1)])
    return bool(span & dead)
