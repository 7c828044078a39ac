"""One Ray Data execution: how it is set up, and what an error that ends it means."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasink, Datasource, ReadTask
from ray.exceptions import RayError

from pipeline.errors import InputError, PipelineError
from pipeline.storage.errors import describe, job_error, storage_errors
from pipeline.store.plan.plan import Work


def configure_ray_data() -> None:
    """Ray Data as this project needs it: no dropped blocks, no bars of its own."""
    # What goes wrong is told by the job itself; Ray's own account, with its tracebacks, goes to its log files.
    for handler in logging.getLogger("ray.data").handlers:
        if not hasattr(handler, "baseFilename") and type(handler).__name__ != "SessionFileHandler":
            handler.setLevel(logging.CRITICAL)
    # Bounded repeats of a task can be asked for in this way only.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.* is deprecated")
    context = DataContext.get_current()
    context.max_errored_blocks = 0
    # An actor that cannot start is replaced, without end: the monitor knows when none can (`_Starts`).
    context.max_consecutive_actor_init_deaths = -1
    # Else a UDF's own error arrives as text inside another one, and what it means is lost.
    context.raise_original_map_exception = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False


def whole_blocks() -> None:
    """Blocks stay what the stages made them: none is split for its size."""
    DataContext.get_current().target_max_block_size = None


def run_execution(execute: Callable[[], None]) -> RayError | None:
    """Run one Ray Data execution: None when it finished, the error when workers died in it.

    Errors with a meaning of their own (a conflict, a full disk, a bad configuration) are raised as what they are.
    """
    try:
        execute()
    except RayError as error:
        known = known_cause(error)
        if known is not None:
            raise known from None
        if _is_user_error(error):
            raise
        return error
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    queue: list[BaseException | None] = [error]
    seen: set[int] = set()
    while queue:
        e = queue.pop(0)
        if e is None or id(e) in seen:
            continue
        seen.add(id(e))
        yield e
        queue += [getattr(e, "cause", None), e.__cause__, e.__context__]


def known_cause(error: BaseException) -> PipelineError | None:
    """The error with a meaning of its own that an error of Ray carries; None when there is none."""
    causes = [cause for cause in _causes(error) if not isinstance(cause, RayError)]
    for cause in causes:
        if isinstance(cause, PipelineError):
            return cause
    # The last is the first that was raised: what wraps it has Ray's advice about retries in its text.
    for cause in reversed([cause for cause in causes if isinstance(cause, storage_errors())]):
        return refused(cause)
    return None


def refused(error: BaseException) -> PipelineError:
    return job_error(error) or InputError(
        f"The store refused an operation: {describe(error)}",
        rule="what was committed before stays; nothing half-written is visible",
        next_step="see to the store, then run the same command again",
    )


def _is_user_error(error: RayError) -> bool:
    """Whether code raised, rather than a process dying, be it one that the code asked: repeating it cannot help."""
    asked_in_vain = any(isinstance(cause, ray.exceptions.RayActorError) for cause in _causes(error))
    return isinstance(error, ray.exceptions.RayTaskError) and not asked_in_vain


# -- How units of work enter Ray Data, and how rows leave it: one read task a unit, one commit a write task ----


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
