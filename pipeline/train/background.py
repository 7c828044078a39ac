"""Work beside the step: what a run tells its store and its watchers, in order, on one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class BackgroundQueue:
    """Does pieces of work one after another; the first that raises is the last, and every call raises its error.

    max_waiting: whoever hands in another piece waits while so many are not done.
    """

    def __init__(self, name: str, *, max_waiting: int = 64) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._room = threading.Semaphore(max_waiting)
        self._failure: BaseException | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Have it done after what was handed in before."""
        self._check()
        self._room.acquire()
        self._thread.submit(self._do, work)

    def flush(self) -> None:
        """Return when all that was handed in is done; from any thread but its own."""
        self._thread.submit(lambda: None).result()
        self._check()

    def close(self) -> None:
        """Do what is left and end the thread; raises nothing, `flush` before does."""
        self._thread.shutdown()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _do(self, work: Callable[[], None]) -> None:
        try:
            if self._failure is None:
                work()
        except BaseException as error:  # noqa: BLE001 - raised where more is handed in, or where it is waited for
            self._failure = error
        finally:
            self._room.release()
