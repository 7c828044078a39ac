"""One job's run of its output, the same for every job: who writes, what MLflow shows, how it ends.

    with open_run(config, "encode", root, identity=identity) as run:
        ...                      what there is to do is looked up under the claim; nothing? the block just ends
        run.track("encode photos", params={...})       the MLflow run, made or gone on with
        ...                      the work
        return run.done(result, digest=...)            its counts, and what it made

    identity of the root --claim--> a generation, whose heartbeat shows that its owner lives --> the work --> closed

A run finds another *living* run on its root: it steps back (exit code 4), in every job alike. It finds a dead one, or
a compaction, which a job that writes rows need not wait for: it fences it off and goes on, also in its MLflow run.
How a run ends is said twice, to the next run (the closing note of the generation) and to people (FINISHED, KILLED
where the same command goes on, FAILED). A crash says nothing: the next run sees that the owner is dead, or silent for
too long. A job that only reads has no root: an MLflow run alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pipeline.config import StrictModel, config_digest, dump_yaml
from pipeline.errors import PipelineError, StoppedError, argument_keys
from pipeline.result import JobResult
from pipeline.storage.errors import storage_errors
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, last_run, note_run
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.ledger import claimed
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.tracker import NoopTracker, Tracker, open_tracker

RUN_ID_WAIT_S = 20.0


class TrackedConfig(Protocol):
    """The configuration of a job that is recorded."""

    @property
    def tracking(self) -> TrackingConfig:
        """Where."""
        ...


@dataclass
class Run:
    """A job's run: its claim on the output, where it has one, and its MLflow run, once there is work to record."""

    config: TrackedConfig
    job: str
    generation: Generation | None = None
    tracker: Tracker = field(default_factory=NoopTracker)
    _note: dict[str, Any] = field(default_factory=dict)

    def track(
        self,
        name: str,
        *,
        params: Mapping[str, object],
        parents: Mapping[str, str] | None = None,
        note: Mapping[str, Any] | None = None,
        about: str | None = None,
        resume: str | None = None,
    ) -> Tracker:
        """Open the MLflow run: that of a run which stopped or died half-way goes on, else a new one is made.

        note: what else the root remembers of this run. about: names what it is about where one root sees several
        things; a run about another is not gone on with. resume: the handle of the run to go on with in any case.
        """
        claim: dict[str, object] = {}
        if self.generation is not None:
            root = self.generation.root
            earlier = last_run(root, job=self.job)
            if resume is None and earlier.get("unfinished") and earlier.get("about") == about:
                resume = earlier.get("handle")
            claim = {"output.uri": root.uri, "generation": self.generation.number}
        self.tracker = open_tracker(
            self.config.tracking, job=self.job, run_name=name, resume_run_id=resume, parents=parents
        )
        self._note = {**(note or {}), **({"about": about} if about else {})}
        if self.generation is not None:
            self.note(self.generation)
        assert isinstance(self.config, StrictModel)
        self.tracker.log_params({**claim, **params, "config_digest": config_digest(self.config)})
        self.tracker.log_text(dump_yaml(self.config), "config.yaml")
        return self.tracker

    def note(self, generation: Generation, **changed: Any) -> None:
        """Remember in a root which MLflow run a generation of this run belongs to; changed: of what `track` noted."""
        self._note |= changed
        ids = {"job": self.job, "handle": self.tracker.handle, "run_id": self.tracker.run_id}
        note_run(generation.root, generation.number, {**self._note, **ids})

    def done(self, result: JobResult, *, step: int | None = 0, digest: str | None = None) -> JobResult:
        """The answer with the run's id, after its figures and what it made were recorded.

        step: of its figures; None where they were recorded on the way. digest: of the content of the root as it is.
        """
        result = replace(result, run_id=self.tracker.wait_run_id(RUN_ID_WAIT_S))
        if step is not None:
            counts = {name: float(count) for name, count in result.counts.items()}
            self.tracker.log_metrics({**result.rates, **result.figures, **counts}, step=step)
        if self.generation is not None:
            self.note(self.generation)
            if digest is not None:
                uri = self.generation.root.uri
                self.tracker.log_input(name=uri, digest=digest, source=uri, context="output")
        return result


@contextlib.contextmanager
def open_run(
    config: TrackedConfig,
    job: str,
    root: Root | None = None,
    *,
    identity: Identity | None = None,
    note: Callable[[], Mapping[str, Any]] = dict,
    after: int = 0,
    key: str = "output.uri",
) -> Iterator[Run]:
    """A run of a job on its root, whose generation it claims; without one, of a job that only reads.

    identity: what the root is, claimed first. note, after: see `claim_next`. key: the root's in the configuration.
    ConflictError when the root is something else, or another run is alive there or takes over. What a PipelineError
    tells as its result is recorded, too.
    """
    with argument_keys({"root": key}), contextlib.ExitStack() as stack:
        if root is not None and identity is not None:
            claim_identity(root, identity)
        generation = None if root is None else stack.enter_context(claimed(root, job, note=note, after=after))
        run = Run(config, job, generation)
        try:
            yield run
        except BaseException as error:
            if isinstance(error, PipelineError) and error.result is not None:
                # The job's own error counts, also where the store has failed, too.
                with contextlib.suppress(*storage_errors()):
                    error.with_result(run.done(error.result))
            run.tracker.finish("KILLED" if isinstance(error, StoppedError | KeyboardInterrupt) else "FAILED")
            raise
        run.tracker.finish("FINISHED")
