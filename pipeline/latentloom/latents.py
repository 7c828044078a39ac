"""A dataset of latents as a sequence of rows, a table, a list of files, and a stream of batches. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import ConfigError, ConflictError
from pipeline.store.read.dataset import DataFile, LatentDataset
from pipeline.store.schema import LATENTS, latents_from

if TYPE_CHECKING:
    from .tensors import LatentBatches


@dataclass(frozen=True)
class LatentStatistics:
    """What all visible rows are, exactly, out of the ledger alone.

    mean, std: float64 [c], of each stored channel of raw latents. num_classes: one more than the largest label, None
    where rows lack one. buckets: rows by image size, "HxW" in pixels.
    """

    num_rows: int
    mean: npt.NDArray[np.float64]
    std: npt.NDArray[np.float64]
    num_classes: int | None
    buckets: Mapping[str, int]


class Latents(Sequence[dict[str, Any]]):
    """The rows of a dataset of latents that were visible when it was opened; later commits do not change them.

    `latents[i]`, and each row of an iteration, is a dict of the columns: `latent` as raw float32 [c, h, w],
    `sample_id` (16 bytes), `key`, `label`, `caption`, `bucket` and so on. Rows come in the order of the files; a row
    group is read at a time, so that neighbours are cheap and jumps are not.
    """

    def __init__(self, dataset: LatentDataset) -> None:
        self.dataset = dataset
        self._ends = np.cumsum(dataset.row_groups.rows)
        self._last: tuple[int, list[dict[str, Any]]] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # For other processes, which open it anew: the locks and the memory maps stay here.
        return _opened_again, (self.uri, self.dataset.layout_digest)

    @property
    def uri(self) -> str:
        """Where the dataset lies."""
        return self.dataset.uri

    @property
    def schema(self) -> pa.Schema:
        """The columns as they are stored; `latent` is the bytes of `latent_shape` halves of `latent_dtype`."""
        return LATENTS

    @property
    def latent_dtype(self) -> str:
        """How latents are stored: float16 or bfloat16."""
        return self.dataset.latent_dtype

    @property
    def codec(self) -> dict[str, Any]:
        """What encoded them: path, class, weights' sha256, latent_channels, factor."""
        return self.dataset.codec

    @cached_property
    def statistics(self) -> LatentStatistics:
        """See `LatentStatistics`; InputError when there is no row."""
        return LatentStatistics(
            len(self),
            self.dataset.channel_mean,
            self.dataset.channel_std,
            self.dataset.num_classes,
            {bucket: rows for rows, bucket in self.dataset.bucket_counts()},
        )

    def __len__(self) -> int:
        return self.dataset.num_rows

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        group = int(np.searchsorted(self._ends, at, side="right"))
        kept = self._last
        if kept is None or kept[0] != group:
            kept = self._last = group, list(self._rows(group))
        return dict(kept[1][at - int(self._ends[group]) + len(kept[1])])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for group in range(len(self.dataset.row_groups)):
            yield from self._rows(group)

    def _rows(self, group: int) -> Iterator[dict[str, Any]]:
        table = self.dataset.read(group, None)
        if not table.num_rows:
            return
        shape = table["latent_shape"][0].as_py()  # all rows of a row group have one
        latents = latents_from(table["latent"], tuple(shape), self.dataset.latent_dtype)
        for row, latent in zip(table.drop_columns(["latent", "latent_shape"]).to_pylist(), latents, strict=True):
            yield {**row, "latent": latent}

    def to_arrow(self, columns: Sequence[str] | None = None, *, part: int = 0, parts: int = 1) -> pa.Table:
        """All rows as one table, as they are stored; columns: names out of `schema`, None for all of them.

        part, parts: one of so many parts alone, for processes that share the reading; some are empty where there are
        fewer row groups.
        Without `latent` it is small. ConfigError for a column there is not, InputError for a file that is damaged.
        """
        for name in columns or ():
            if name not in LATENTS.names:
                raise ConfigError("There is no such column", key="columns", value=name, rule=", ".join(LATENTS.names))
        schema = LATENTS if columns is None else pa.schema([LATENTS.field(name) for name in columns])
        if not 0 <= part < parts:
            raise ValueError(f"part is {part}; it is at least 0 and below parts={parts}")
        count = len(self.dataset.row_groups)
        groups = range(part * count // parts, (part + 1) * count // parts)
        # Rows that passed through Ray come back as ones that might be null: the schema says which never are.
        tables = [self.dataset.read(group, columns).cast(schema) for group in groups]
        return pa.concat_tables([schema.empty_table(), *tables])

    def files(self) -> list[DataFile]:
        """The files that hold them: URI, visible rows, and the SQL that is true for those where not all are."""
        return self.dataset.files()

    def stream(
        self,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        holdout: float = 0.0,
        split: str = "train",
        shuffle: bool = True,
        lanes: int = 8,
        window_bytes: int = 1 << 30,
        normalised: bool = True,
        captions: bool | Sequence[str] = False,
        where: str | None = None,
    ) -> LatentBatches:
        """Batches of torch tensors in the very order in which jobs.train serves them; see `LatentBatches`.

        batch_size: of all ranks together, a multiple of `lanes`, which is a multiple of `world`; this rank gets its
        share of each batch. holdout: the share of images that split="train" leaves out and split="holdout" serves.
        captions: serve their captions, too; of several texts that are named, as in data.captions, one in every epoch.
        where: serve only rows that meet a condition on stored columns, as data.where of a training.
        The other names are those of the training's `stream.` section. ConfigError for numbers that do not fit, also
        when no bucket fills a batch.
        """
        from .tensors import LatentBatches

        settings: dict[str, Any] = {
            "batch_size": batch_size,
            "seed": seed,
            "rank": rank,
            "world_size": world,
            "holdout": holdout,
        }
        settings |= {"split": split, "shuffle": shuffle, "lanes": lanes, "window_bytes": window_bytes}
        settings |= {"captions": bool(captions), "where": where}
        settings |= {} if isinstance(captions, bool) else {"captions_from": tuple(captions)}
        return LatentBatches(self.dataset, settings, normalised=normalised)


def open_latents(uri: str) -> Latents:
    """The dataset of latents at a path or fsspec URI, as it is visible now.

    Reads the ledger alone. InputError when there is no dataset, one of another kind or of a newer format, or a
    damaged one.
    """
    return Latents(LatentDataset.open(uri))


def _opened_again(uri: str, layout: str) -> Latents:
    latents = open_latents(uri)
    if latents.dataset.layout_digest != layout:
        raise ConflictError(
            "The dataset has changed since it was opened in another process",
            key="uri",
            value=uri,
            rule="all processes that share the reading read one state of it",
            next_step="begin again, and share what was opened once no job writes",
        )
    return latents
