"""How a tracked run ends: by what happened to the work inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipeline.errors import StoppedError
from pipeline.tracking.tracker import Tracker


@contextlib.contextmanager
def ended_by_outcome(tracker: Tracker) -> Iterator[Tracker]:
    """The run ends FINISHED when the block ends, KILLED when it was stopped but can go on, FAILED on an error."""
    try:
        yield tracker
    except (StoppedError, KeyboardInterrupt):
        tracker.finish("KILLED")
        raise
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.finish("FINISHED")
