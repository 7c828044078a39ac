"""Carries one journal to the store: finds or makes its run, then sends batches and confirms offsets.

Everything here may be repeated: params, tags, inputs, artifacts and equal points are idempotent at the store, and a
confirmation that was lost only means that a batch is sent again.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from pipeline.errors import InputError
from pipeline.result import JobResult
from pipeline.tracking.config import (
    SyncTrackingJobConfig,
    check_access,
    check_uri,
    masked_uri,
    sqlite_path,
    store_identity,
    without_credentials,
)
from pipeline.tracking.journal import Header, JournalReader, Record, adopt, gate, journals
from pipeline.tracking.store import (
    ATTEMPT_TAG,
    MAX_PAIRS_PER_CALL,
    MAX_POINTS_PER_CALL,
    MlflowStore,
    Point,
    RunMissing,
    RunState,
    StoreRefused,
    TrackingUnavailable,
)

_log = logging.getLogger(__name__)
_BATCHED = frozenset({"metrics", "params", "tags"})
T = TypeVar("T")


class Store(Protocol):
    """What a delivery needs of a tracking store; `store.MlflowStore` is the real one."""

    def find_run(self, header: Header, known_id: str | None) -> RunState | None: ...
    def create_run(self, header: Header) -> RunState: ...
    def run_state(self, run_id: str) -> RunState | None: ...
    def steps_of(self, run_id: str, key: str) -> set[int]: ...
    def log_batch(
        self, run_id: str, points: Sequence[Point], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None: ...
    def log_artifact(self, run_id: str, local: Path, folder: str) -> None: ...
    def log_input(
        self, run_id: str, name: str, digest: str, source: str, context: str, tags: Mapping[str, str] | None = None
    ) -> None: ...
    def register_model(self, run_id: str, name: str, uri: str, tags: Mapping[str, str]) -> None: ...
    def set_status(self, run_id: str, status: str, end_ms: int | None = None) -> None: ...


@dataclass
class _Batch:
    """Consecutive records that fit one call."""

    points: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def full(self) -> bool:
        return len(self.points) >= MAX_POINTS_PER_CALL or max(len(self.params), len(self.tags)) >= MAX_PAIRS_PER_CALL

    def add(self, record: Record) -> None:
        if record["kind"] == "metrics":
            time_ms, step = int(record["t"]), int(record["step"])
            self.points += [Point(k, float(v), time_ms, step) for k, v in dict(record["values"]).items()]
        else:
            target = self.params if record["kind"] == "params" else self.tags
            target.update({str(k): str(v) for k, v in dict(record["values"]).items()})


class Delivery:
    """Sends one journal; `connect` once, then `send_next` until it says that nothing is left for now."""

    def __init__(self, store: Store, journal: JournalReader, *, live: bool) -> None:
        header = journal.header()
        if header is None:
            raise ValueError(f"{journal.path} is no journal of this version")
        self.header: Header = header
        self.num_skipped = 0
        self._store, self._journal, self._live = store, journal, live
        self._run: RunState | None = None
        self._ended = False
        self._delivered_steps: dict[str, set[int]] = {}

    @property
    def run_id(self) -> str:
        """The run's id at the store, known after `connect`."""
        if self._run is None:
            raise ValueError("not connected")
        return self._run.run_id

    def connect(self) -> None:
        """Find the run, or make it when this journal is its owner's; raises RunMissing for an attached one."""
        run = self._store.find_run(self.header, self._journal.confirmed.run_id)
        if run is None:
            if self.header.role != "owner":
                raise RunMissing("the run to attach to has not been made yet")
            run = self._store.create_run(self.header)
        elif self.header.role == "owner":
            # The newest attempt decides a run's status; a live one is the newest, whatever the clocks say.
            holder, attempt = run.tags.get(ATTEMPT_TAG, ""), self.header.attempt
            if holder != attempt and (self._live or attempt >= holder):
                self._store.log_batch(run.run_id, [], {}, {ATTEMPT_TAG: attempt, **self.header.tags})
            if self._live and run.status != "RUNNING":
                self._store.set_status(run.run_id, "RUNNING")
        self._run = run
        self._journal.confirm(self._journal.confirmed.offset, run_id=run.run_id)

    def send_next(self) -> bool:
        """Send what fits one round; False when the journal holds no further complete record."""
        batch, end = _Batch(), self._journal.confirmed.offset
        for end_of_line, record in self._journal.pending():
            if record is not None and record["kind"] in _BATCHED:
                try:
                    batch.add(record)
                except (KeyError, TypeError, ValueError) as error:
                    _log.warning("a tracking record of kind %s is unusable: %s", record["kind"], error)
                end = end_of_line
                if batch.full():
                    break
            elif record is None or record["kind"] == "open":
                end = end_of_line
            elif end > self._journal.confirmed.offset:
                break  # what came before it goes first
            else:
                refused = self._send_single(record)
                self._journal.confirm(end_of_line, refused=refused)
                return True
        if end == self._journal.confirmed.offset:
            return False
        self._journal.confirm(end, refused=self._send_batch(batch))
        return True

    def close_orphan(self) -> None:
        """End the run of a dead process that did not do so itself, unless a newer attempt has taken it over."""
        if self.header.role == "owner" and not self._ended and self._still_ours():
            state = self._store.run_state(self.run_id)
            if state is not None and state.status == "RUNNING":
                self._store.set_status(self.run_id, "KILLED", self._journal.last_time_ms())

    def _still_ours(self) -> bool:
        state = self._store.run_state(self.run_id)
        return state is not None and state.tags.get(ATTEMPT_TAG) == self.header.attempt

    def _send_batch(self, batch: _Batch) -> int:
        assert self._run is not None
        points = [p for p in batch.points if not self._is_delivered(p)]
        self.num_skipped += len(batch.points) - len(points)
        params = {k: v for k, v in batch.params.items() if k not in self._run.params}
        for key in batch.params.keys() & self._run.params.keys():
            if batch.params[key] != self._run.params[key]:
                _log.warning("param %s of run %s stays as it was first logged", key, self.run_id)
        refused = 0
        for some in _chunks(points, MAX_POINTS_PER_CALL):
            refused += self._bisect(some, lambda part: self._store.log_batch(self.run_id, part, {}, {}))
        for pairs in _chunks(params.items(), MAX_PAIRS_PER_CALL):
            refused += self._bisect(pairs, lambda part: self._store.log_batch(self.run_id, [], dict(part), {}))
        for pairs in _chunks(batch.tags.items(), MAX_PAIRS_PER_CALL):
            refused += self._bisect(pairs, lambda part: self._store.log_batch(self.run_id, [], {}, dict(part)))
        return refused

    def _bisect(self, items: list[T], send: Callable[[list[T]], None]) -> int:
        """Send all; what the store refuses is narrowed down to single items, so one bad value costs only itself."""
        try:
            send(items)
        except StoreRefused as error:
            if len(items) > 1:
                middle = len(items) // 2
                return self._bisect(items[:middle], send) + self._bisect(items[middle:], send)
            _log.warning("the tracking store refuses %s: %s", items[0], error)
            return 1
        return 0

    def _is_delivered(self, point: Point) -> bool:
        """True when the run had a point of this metric at this step before this journal was connected."""
        assert self._run is not None
        last = self._run.last_steps.get(point.key)
        if last is None or point.step > last:
            return False
        if point.key not in self._delivered_steps:
            self._delivered_steps[point.key] = self._store.steps_of(self.run_id, point.key)
        return point.step in self._delivered_steps[point.key]

    def _send_single(self, record: Record) -> int:
        kind = record["kind"]
        try:
            if kind == "artifact":
                local = self._journal.local_file(record["file"])
                if not local.is_file():
                    raise FileNotFoundError(f"{record['file']} is gone from the journal's folder")
                self._store.log_artifact(self.run_id, local, record["folder"])
            elif kind == "input":
                name, digest, source, context = (str(record[k]) for k in ("name", "digest", "source", "context"))
                self._store.log_input(self.run_id, name, digest, source, context, record.get("tags"))
            elif kind == "model":
                self._store.register_model(self.run_id, str(record["name"]), str(record["uri"]), dict(record["tags"]))
            elif kind == "status":
                self._ended = True
                if self._still_ours():
                    self._store.set_status(self.run_id, record["status"], int(record["t"]))
            else:
                raise ValueError(f"unknown kind {kind!r}")
        except StoreRefused as error:
            _log.warning("the tracking store refuses a record of kind %s: %s", kind, error)
            return 1
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            _log.warning("a tracking record of kind %s is unusable: %s", kind, error)
            return 1
        return 0


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


# -- Sends the journals that dead processes left behind --------------------------------------------------------


@dataclass
class ReplayReport:
    """What a replay did; `runs` are the ids of the runs that received something."""

    sent: int = 0
    in_use: int = 0
    other_server: int = 0
    waiting: int = 0
    refused: int = 0
    unreadable: int = 0
    runs: tuple[str, ...] = ()

    def add(self, other: ReplayReport) -> None:
        """Sum of both."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


def replay(journal_dir: str | Path, uri: str, *, any_server: bool = False) -> ReplayReport:
    """Send everything that waits in `journal_dir` for the store `uri`; raises InputError when it does not answer.

    Journals of running processes are left alone. `any_server` also takes journals written for another address: for
    a server that has moved.
    """

    check_uri(uri)
    check_access(uri)
    folder = Path(journal_dir)
    if not folder.is_dir():
        raise no_folder(folder)
    try:
        with gate(folder) as mine:
            if not mine:
                raise InputError(
                    f"Another process is sending the journals of {folder}", next_step="wait until it has finished"
                )
            return replay_orphans(folder, MlflowStore(uri), None if any_server else store_identity(uri))
    except TrackingUnavailable as error:
        raise InputError(
            f"The tracking store does not take the journals: {error}",
            key="tracking.uri",
            value=masked_uri(uri),
            next_step="run this again when the store answers; nothing was lost",
        ) from None


def no_folder(folder: Path) -> InputError:
    """The error of a journal folder that is not there."""
    return InputError(
        f"There is no journal folder {folder}",
        key="tracking.journal_dir",
        value=str(folder),
        rule="the folder that a job with this configuration wrote to",
        next_step="run it on the machine and in the working directory of that job, or name the folder",
    )


def replay_orphans(
    folder: Path, store: Store, server: str | None, wanted: Callable[[Header, str | None], bool] | None = None
) -> ReplayReport:
    """Send the orphans for `server` (None: for any) that `wanted` picks, oldest first; the caller holds the gate."""
    report = ReplayReport()
    # An owner's journal may have to make the run that the attached ones wait for.
    for path in sorted(journals(folder), key=lambda path: "-owner-" not in path.name):
        with adopt(path) as mine:
            report.add(_replay_one(path, store, server, wanted) if mine else ReplayReport(in_use=1))
    return report


def is_held(folder: Path, mine: Path, wanted: Callable[[Header, str | None], bool]) -> bool:
    """Whether another owner of a run that `wanted` picks has not let go of its journal: it may be sending still."""
    for path in journals(folder):
        if path == mine or "-owner-" not in path.name:
            continue
        with adopt(path) as free:
            if free or not path.exists():
                continue
            journal = JournalReader(path)
            header = journal.header()
            if header is not None and wanted(header, journal.confirmed.run_id):
                return True
    return False


def _replay_one(
    path: Path, store: Store, server: str | None, wanted: Callable[[Header, str | None], bool] | None
) -> ReplayReport:

    journal = JournalReader(path)
    header = journal.header()
    if header is None:
        _log.warning("%s is no journal this version can read: left alone", path)
        return ReplayReport(unreadable=1)
    if server is not None and header.server != server:
        return ReplayReport(other_server=1)
    if wanted is not None and not wanted(header, journal.confirmed.run_id):
        return ReplayReport()
    delivery = Delivery(store, journal, live=False)
    try:
        delivery.connect()
    except RunMissing:
        return ReplayReport(waiting=1)
    while delivery.send_next():
        pass
    delivery.close_orphan()
    refused = journal.confirmed.refused
    journal.discard()
    return ReplayReport(sent=1, refused=refused, runs=(delivery.run_id,))


# -- The sync_tracking job: sends what dead processes left in the journal folder of this machine ---------------


def run_sync(config: SyncTrackingJobConfig) -> JobResult:
    """Send every journal that waits for the store; "unchanged" when none did.

    InputError when the store does not answer (nothing is lost) or another process is sending; ConfigError when it
    refuses the credentials.
    """
    tracking = config.tracking
    report = replay(tracking.journal_dir, tracking.uri, any_server=config.any_server)
    # What a person should know about the journals that stay.
    remarks = (
        (report.in_use, "belong to running processes, which send them themselves"),
        (report.other_server, "were written for another tracking.uri; any_server=true sends them here all the same"),
        (report.waiting, "wait for a run that no journal here makes: sync the machine of that job's driver first"),
        (report.unreadable, "cannot be read by this version and were left alone"),
        (report.refused, "records were refused by the store; their journals are kept as *.refused"),
    )
    for number, remark in remarks:
        if number:
            _log.warning(f"{tracking.journal_dir}: {number:,} {remark}")
    return JobResult(
        "done" if report.sent else "unchanged",
        {
            "journals_sent": report.sent,
            "journals_in_use": report.in_use,
            "journals_for_other_servers": report.other_server,
            "journals_waiting": report.waiting,
            "journals_unreadable": report.unreadable,
            "records_refused": report.refused,
        },
        details={"runs": list(dict.fromkeys(report.runs))},
    )


def plan_sync(config: SyncTrackingJobConfig) -> JobResult:
    """How much waits, without asking the store."""
    tracking = config.tracking
    check_uri(tracking.uri)
    folder = Path(tracking.journal_dir)
    if not folder.is_dir():
        raise no_folder(folder)
    server = None if config.any_server else store_identity(tracking.uri)
    counts = {"journals": 0, "journals_in_use": 0, "journals_for_other_servers": 0, "bytes": 0}
    for path in journals(folder):
        with adopt(path) as orphan:
            if not orphan:
                counts["journals_in_use"] += 1
                continue
            journal = JournalReader(path)
            header = journal.header()
            if header is not None and server in (None, header.server):
                counts["journals"] += 1
                counts["bytes"] += journal.num_unsent_bytes()
            elif header is not None:
                counts["journals_for_other_servers"] += 1
    return JobResult("dry-run", counts)


# -- The command that shows a tracking store to a person -------------------------------------------------------


def mlflow_ui_command(uri: str) -> str:
    """The exact shell command that opens MLflow's UI on this store; a database password is masked."""
    if urlsplit(uri).scheme in ("http", "https"):
        return f"{shlex.quote(sys.executable)} -m webbrowser {shlex.quote(without_credentials(uri))}"
    path = sqlite_path(uri)
    store = f"sqlite:///{path}" if path is not None else masked_uri(uri)
    # Without the variable the UI starts seven job processes and takes another gigabyte.
    start = f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shlex.quote(sys.executable)} -m mlflow ui"
    return f"{start} --backend-store-uri {shlex.quote(store)} --port 5000"
