"""How units of work enter Ray Data, and how rows leave it: one read task a unit, one commit a write task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask

from pipeline.dataflow.executions import refused
from pipeline.storage.errors import storage_errors
from pipeline.store.plan.work import Work


class UnitSource(Datasource):  # type: ignore[misc]
    """One read task per unit of work; `reader_of` gives what runs on a worker, for one unit, and yields blocks."""

    def __init__(
        self,
        name: str,
        work: list[Work],
        reader_of: Callable[[Work], Callable[[], Iterable[pa.Table]]],
        size_bytes: int,
    ) -> None:
        super().__init__()
        self._name, self._work, self._reader_of, self._size_bytes = name, work, reader_of, size_bytes

    def get_name(self) -> str:
        """The name in Ray's displays."""
        return self._name

    def estimate_inmemory_data_size(self) -> int:
        """Source bytes of all units."""
        return self._size_bytes

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task per unit, whatever Ray suggests: a unit is what a crash costs."""
        size = self._size_bytes // max(len(self._work), 1)
        return [
            ReadTask(
                self._reader_of(work),
                BlockMetadata(num_rows=None, size_bytes=size, exec_stats=None, input_files=None),
            )
            for work in self._work
        ]


class LedgerSink(Datasink[int]):  # type: ignore[misc]
    """Hands each write task's rows to `write`, which commits them; returns only their number."""

    def __init__(self, name: str, write: Callable[[pa.Table], None], min_rows: int) -> None:
        self._name, self._write, self._min_rows = name, write, min_rows

    def get_name(self) -> str:
        """The name in Ray's displays."""
        return self._name

    @property
    def min_rows_per_write(self) -> int:
        """Rows a write waits for, so that fragments have a useful size."""
        return self._min_rows

    def write(self, blocks: Iterable[Any], ctx: Any) -> int:
        """Commit all rows of this task at once."""
        tables = [b if isinstance(b, pa.Table) else pa.Table.from_pandas(b) for b in blocks]
        tables = [t for t in tables if t.num_rows]
        if not tables:
            return 0
        table = pa.concat_tables(tables)
        try:
            self._write(table)
        except storage_errors() as error:
            # Told here, where the error is whole: Ray adds advice about its retries to what it carries.
            raise refused(error) from error
        return int(table.num_rows)
