"""Parquet files of this project read back: what is wrong with one is an input error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from pipeline.storage.errors import job_error
from pipeline.storage.stored import unreadable

_REPAIR = "restore it from a backup; python -m jobs.verify shows all damage"


@contextmanager
def reading_table(where: str, next_step: str = _REPAIR) -> Iterator[None]:
    """InputError, naming `where`, for whatever a damaged, lost or foreign Parquet file makes of the block.

    The block opens and decodes that one file, and no more. What a store refuses, or its silence, stays what it is.
    """
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        lost = isinstance(error, FileNotFoundError)
        if not lost and job_error(error) is not None:
            raise
        detail = " ".join(str(error).split())[:300]
        raise unreadable(where, "it is gone" if lost else detail, next_step=next_step) from error
