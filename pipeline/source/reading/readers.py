"""The rows of a unit: its entries one after the other, only the rows asked for, each as bytes or as a reason.

No damaged or missing object raises: it ends as rejected rows. Where a unit's length was unknown and its end was
reached, `EndOfUnit` comes last and says how many rows there were. Of an object that is no longer the listed version
no row comes, and no end: what another version holds must not count as the listed one's; the next listing plans it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache

from pipeline.source.config import FolderSource, ParquetSource, SourceConfig, WebDatasetSource
from pipeline.source.reading.folder import read_folder
from pipeline.source.reading.listing import source_root
from pipeline.source.reading.parquet import read_parquets
from pipeline.source.reading.rows import EndOfUnit, Entry, Ranges, SourceRow
from pipeline.source.reading.webdataset import read_tars

_log = logging.getLogger(__name__)


_root = lru_cache(maxsize=16)(source_root)  # asks the store once per process, not once per unit


def read_unit(
    source: SourceConfig, entries: Sequence[Entry], ranges: Sequence[tuple[int, int | None]]
) -> Iterator[SourceRow | EndOfUnit]:
    """Rows of the concatenated entries inside the half-open ranges (a stop of None is the unit's end), in order."""
    wanted, root = Ranges(ranges), _root(source)
    if isinstance(source, FolderSource):
        yield from read_folder(root, source, entries, wanted)
    elif isinstance(source, WebDatasetSource):
        yield from read_tars(root, source, entries, wanted)
    else:
        assert isinstance(source, ParquetSource)

        yield from read_parquets(root, source, entries, wanted)
