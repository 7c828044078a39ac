"""An in-memory tracking store with MLflow's semantics of repetition, and faults on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.tracking.journal import Header
from pipeline.tracking.store import ATTEMPT_TAG, RUN_KEY_TAG, Point, RunMissing, RunState, StoreRefused


@dataclass
class FakeRun:
    run_id: str
    header: Header
    points: set[Point] = field(default_factory=set)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: dict[str, bytes] = field(default_factory=dict)
    inputs: set[tuple[str, str, str, str]] = field(default_factory=set)
    input_tags: dict[str, dict[str, str]] = field(default_factory=dict)
    status: str = "RUNNING"


class FakeStore:
    """`fault(call)` runs before and after each effect and may raise; `refused` names keys it never takes."""

    def __init__(self, fault: Callable[[str], None] | None = None, refused: frozenset[str] = frozenset()) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.calls: list[str] = []
        self.num_points_received = 0
        self._fault = fault or (lambda call: None)
        self._refused = refused

    def find_run(self, header: Header, known_id: str | None) -> RunState | None:
        self._enter("find_run")
        for run in self.runs.values():
            if run.run_id in (known_id, header.run_id):
                return self._state(run)
            if header.run_key is not None and run.tags.get(RUN_KEY_TAG) == header.run_key:
                return self._state(run)
        return None

    def create_run(self, header: Header) -> RunState:
        self._enter("create_run")
        tags = {**header.tags, ATTEMPT_TAG: header.attempt, RUN_KEY_TAG: header.run_key or ""}
        run = FakeRun(f"run{len(self.runs)}", header, tags=tags)
        self.runs[run.run_id] = run
        self._fault("create_run: answer")
        return self._state(run)

    def run_state(self, run_id: str) -> RunState | None:
        self._enter("run_state")
        return self._state(self.runs[run_id]) if run_id in self.runs else None

    def steps_of(self, run_id: str, key: str) -> set[int]:
        self._enter("steps_of")
        return {p.step for p in self.runs[run_id].points if p.key == key}

    def log_batch(
        self, run_id: str, points: Sequence[Point], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        self._enter("log_batch")
        assert len(points) <= 1000
        assert len(params) <= 100
        assert len(tags) <= 100
        run = self._run(run_id)
        if self._refused & ({p.key for p in points} | set(params) | set(tags)):
            raise StoreRefused("INVALID_PARAMETER_VALUE")
        for key, value in params.items():
            if run.params.get(key, value) != value:
                raise StoreRefused(f"param {key} was already logged")
        run.points.update(points)
        run.params.update(params)
        run.tags.update(tags)
        self.num_points_received += len(points)
        self._fault("log_batch: answer")

    def log_artifact(self, run_id: str, local: Path, folder: str) -> None:
        self._enter("log_artifact")
        self._run(run_id).artifacts[f"{folder}/{local.name}".lstrip("/")] = local.read_bytes()
        self._fault("log_artifact: answer")

    def log_input(
        self, run_id: str, name: str, digest: str, source: str, context: str, tags: Mapping[str, str] | None = None
    ) -> None:
        self._enter("log_input")
        self._run(run_id).inputs.add((name, digest, source, context))
        self._run(run_id).input_tags[digest] = dict(tags or {})

    def set_status(self, run_id: str, status: str, end_ms: int | None = None) -> None:
        self._enter("set_status")
        self._run(run_id).status = status

    def only_run(self) -> FakeRun:
        (run,) = self.runs.values()
        return run

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        self._fault(call)

    def _run(self, run_id: str) -> FakeRun:
        if run_id not in self.runs:
            raise RunMissing(run_id)
        return self.runs[run_id]

    @staticmethod
    def _state(run: FakeRun) -> RunState:
        last: dict[str, int] = {}
        for point in run.points:
            last[point.key] = max(point.step, last.get(point.key, point.step))
        return RunState(run.run_id, dict(run.params), last, dict(run.tags), run.status)


def build_header(
    number: int = 1, *, role: str = "owner", run_key: str | None = "k1", run_id: str | None = None
) -> Header:
    """A journal header; a newer owner has a greater `number`."""
    return Header(
        server="http://server",
        experiment="latentloom",
        run_key=run_key,
        run_id=run_id,
        run_name="name",
        role=role,
        attempt=f"{number:020d}-x" if role == "owner" else "",
        start_ms=1_700_000_000_000 + number,
        tags={"latentloom.job": "test"},
    )
