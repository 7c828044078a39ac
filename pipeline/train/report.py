"""Rank 0's reports: to the run's own history, to the tracker and to whoever watches the job and the cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.storage.root import Root
from pipeline.tracking.tracker import Tracker
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.history import History
from pipeline.train.quarantine import Quarantine
from pipeline.train.state import TrainState

_log = logging.getLogger(__name__)


@dataclass
class Reporter:
    """What the loop tells, put where it can be found after a crash.

    datasets: their URIs, in the run's order; generation: of the start that reports.
    """

    root: Root
    history: History
    tracker: Tracker
    checkpoints: CheckpointStore
    publish: Callable[[Mapping[str, float]], None] = lambda figures: None
    datasets: tuple[str, ...] = ()
    generation: int = 0

    def __post_init__(self) -> None:
        self.quarantine = Quarantine(self.root, self.generation)

    def resume(self, state: TrainState) -> None:
        """Forget the steps after the checkpoint the run goes on from."""
        self.quarantine.rewind(state.step)

    def log(self, record: dict[str, Any]) -> None:
        """One report; its place on the tracker's axis is the count of images."""
        self.history.append(record)
        figures = {k: float(v) for k, v in record.items() if k not in ("step", "images")}
        if figures:
            self.tracker.log_metrics(figures, step=int(record["images"]))
        told = {
            "images": float(record["images"]),
            "checkpoint_time_s": self.checkpoints.completed_at,
            "tracking_unsent_bytes": float(self.tracker.num_unsent_bytes()),
        }
        self.publish({**figures, **told})

    def skip(self, record: dict[str, Any]) -> None:
        """A skipped step, with the ids of its samples and, of several datasets, the one they are of."""
        told, place = {key: value for key, value in record.items() if key != "dataset"}, ""
        if len(self.datasets) > 1:
            told["dataset"] = self.datasets[record["dataset"]]
            place = f" ({told['dataset']})"
        self.quarantine.add(told)
        _log.warning(
            "step %d%s is skipped: loss %s, gradient norm %s",
            record["step"],
            place,
            record["loss"],
            record["grad_norm"],
        )
