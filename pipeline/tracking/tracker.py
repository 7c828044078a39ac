"""What jobs see of tracking: a handful of calls that write to the local journal and return.

    tracker = open_tracker(config.tracking, job="train", run_name="dit-s", resume_run_id=None, parents={"encode": id})
    tracker.log_metrics({"loss": 0.3}, step=4096)
    tracker.finish("FINISHED")

`run_id` is None until the store has answered (at once when resuming); `handle` names the run at any time and is what
`attach_tracker`, `resume_run_id` and `parents` accept. A metric point is (run, key, step): a step that an earlier
attempt of the same run has delivered is kept as it was, so a resumed job may log from its checkpoint on.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import logging
import math
import platform
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipeline.errors import ConfigError, InputError, escaped
from pipeline.tracking.config import Redactor, TrackingConfig, check_access, check_uri, resolve_paths, store_identity
from pipeline.tracking.delivery import Store
from pipeline.tracking.flusher import Flusher
from pipeline.tracking.journal import Header, JournalWriter, now_ms
from pipeline.tracking.store import MlflowStore, machine_monitor

# --------------------------------------------------------------------------------------------------------------
# What a run ran on: code version, Python and host, as run tags, and the packages as one artifact; never an
# environment variable.


PACKAGES = "requirements.txt"


def environment_tags() -> dict[str, str]:
    """Tags that describe code and machine; takes a few tens of milliseconds (git), so not for the caller's path."""
    tags = {
        "latentloom.python": platform.python_version(),
        "latentloom.platform": platform.platform(),
        "latentloom.host": platform.node(),
    }
    commit = git_commit(Path(__file__).parent)
    if commit is not None:
        tags["mlflow.source.git.commit"] = commit.removesuffix("-dirty")
        tags["latentloom.commit"] = commit
    return tags


def installed_packages() -> str:
    """Every installed distribution and its version, a line each, in the form that pip installs from."""
    found = {
        dist.name.lower(): f"{dist.name}=={dist.version}" for dist in importlib.metadata.distributions() if dist.name
    }
    return "".join(f"{found[name]}\n" for name in sorted(found))


def git_commit(folder: Path) -> str | None:
    """The commit of the repository that tracks `folder`'s `__init__.py`, `-dirty` when it has changes, else None.

    An installed copy inside somebody else's repository is not tracked by it, hence the question about the file.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_log = logging.getLogger(__name__)
HANDLE_PREFIX = "key:"
PARENT_TAG = "latentloom.parent."
PARENTS_TAG = "latentloom.parents"
JOB_TAG = "latentloom.job"
IMAGES_TAG = "mlflow.loggedImages"  # what makes MLflow's pages look for images by step
STATUSES = ("FINISHED", "FAILED", "KILLED")
FLUSH_PERIOD_S = 2.0
FIRST_REST_S = 2.5  # of what sends, at the start
_MAX_KEY, _MAX_PARAM, _MAX_TAG = 250, 6000, 8000
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. :/-]*")


class Tracker(Protocol):
    """One process's view of one run; every call returns at once and none raises for the store's sake."""

    @property
    def run_id(self) -> str | None:
        """The run's id at the store, None while the store has not answered."""
        ...

    @property
    def handle(self) -> str | None:
        """Names the run at any time: its id, or `key:...` before there is one; None for the no-op."""
        ...

    def wait_run_id(self, timeout_s: float) -> str | None:
        """`run_id`, waiting for it at most `timeout_s`."""
        ...

    def log_params(self, params: Mapping[str, object]) -> None:
        """Settings of the run; the first value of a key stays."""
        ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One point per key."""
        ...

    def log_text(self, text: str, artifact_path: str) -> None:
        """A text artifact; `artifact_path` includes the file name."""
        ...

    def log_file(self, local: str | Path, artifact_path: str) -> None:
        """A file as artifact, copied now; `artifact_path` includes the file name."""
        ...

    def log_image(self, image: bytes, preview: bytes, key: str, step: int) -> None:
        """One of a row of pictures of one key, which MLflow shows by step; PNG, and a small WebP that comes first."""
        ...

    def log_input(
        self, name: str, digest: str, source: str, context: str, tags: Mapping[str, str] | None = None
    ) -> None:
        """A dataset the run read (context "input") or made (context "output"); tags: of this use of it."""
        ...

    def register_model(self, name: str, uri: str, tags: Mapping[str, str]) -> None:
        """The model at `uri`, made by this run, as a version of a registered model."""
        ...

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags; the last value of a key stays."""
        ...

    def num_unsent_bytes(self) -> int:
        """Records that still wait on this machine for the store, bytes."""
        ...

    def finish(self, status: str) -> None:
        """End: FINISHED, FAILED or KILLED. Waits a bounded time for the store. An attached tracker only flushes."""
        ...


class NoopTracker:
    """Records nothing: `tracking.enabled=false`, and ranks other than 0."""

    run_id: str | None = None
    handle: str | None = None

    def wait_run_id(self, timeout_s: float) -> str | None:
        return None

    def log_params(self, params: Mapping[str, object]) -> None: ...
    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_text(self, text: str, artifact_path: str) -> None: ...
    def log_file(self, local: str | Path, artifact_path: str) -> None: ...
    def log_image(self, image: bytes, preview: bytes, key: str, step: int) -> None: ...
    def log_input(
        self, name: str, digest: str, source: str, context: str, tags: Mapping[str, str] | None = None
    ) -> None: ...
    def register_model(self, name: str, uri: str, tags: Mapping[str, str]) -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...
    def num_unsent_bytes(self) -> int:
        return 0

    def finish(self, status: str) -> None: ...


class JournalTracker:
    """Writes to the journal; its flusher thread does the rest."""

    def __init__(self, tracking: TrackingConfig, header: Header) -> None:
        self._header, self._close_timeout_s = header, tracking.close_timeout_s
        self._told = _telling(tracking.uri)
        self._known_keys: set[str] = set()
        self._finished = False
        uri = tracking.uri

        def make_store() -> Store:

            return MlflowStore(uri)

        try:
            self._journal = JournalWriter(Path(tracking.journal_dir), header)
        except OSError as error:
            raise ConfigError(
                f"The tracking journal cannot be written: {error.strerror}",
                key="tracking.journal_dir",
                value=tracking.journal_dir,
                rule="a folder on a local disk that this process may write to",
                next_step="name another folder, or set tracking.enabled=false",
            ) from None
        owner = header.role == "owner"
        self._flusher = Flusher(
            self._journal,
            make_store,
            period_s=FLUSH_PERIOD_S,
            prepare=self._tell_environment if owner else None,
            rest_s=FIRST_REST_S if owner else 0.0,
        )
        self._flusher.start()
        # A process that ends without finish() has failed; one that is killed is found by the next replay.
        atexit.register(self.finish, "FAILED")

    @property
    def run_id(self) -> str | None:
        return self._flusher.run_id or self._header.run_id

    @property
    def handle(self) -> str | None:
        return self.run_id or f"{HANDLE_PREFIX}{self._header.run_key}"

    def wait_run_id(self, timeout_s: float) -> str | None:
        self._flusher.wait_connected(timeout_s)
        return self.run_id

    def log_params(self, params: Mapping[str, object]) -> None:
        values = {self._checked(k): _clip(self._told(str(v)), _MAX_PARAM) for k, v in params.items()}
        self._journal.append({"kind": "params", "values": values})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        values: dict[str, float | str] = {}
        for key, value in metrics.items():
            name = self._checked(key)
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise InputError(
                    f"metric {key!r} is a {type(value).__name__}, not a number",
                    rule="a metric is one number",
                    next_step="log text with set_tags or log_text",
                ) from None
            # JSON has no name for those that are not finite; `float` reads them back.
            values[name] = number if math.isfinite(number) else repr(number)
        self._journal.append({"kind": "metrics", "t": now_ms(), "step": int(step), "values": values})

    def log_text(self, text: str, artifact_path: str) -> None:
        self._log_artifact(artifact_path, self._told(text).encode())

    def log_file(self, local: str | Path, artifact_path: str) -> None:
        path = Path(local)
        if not path.is_file():
            raise InputError(
                f"There is no file {path} to record as artifact {artifact_path}",
                rule="log_file takes one existing file",
                next_step="write the file first; log the files of a folder one by one",
            )
        self._log_artifact(artifact_path, path)

    def log_image(self, image: bytes, preview: bytes, key: str, step: int) -> None:
        # The names that MLflow's own client gives such files (3.17): its pages read key, step and time out of them.
        name = f"images/{self._checked(key)}+step+{int(step)}+timestamp+{now_ms()}+{uuid.uuid4()}"
        self._log_artifact(f"{name}.png", image)
        self._log_artifact(f"{name}+compressed.webp", preview)
        self.set_tags({IMAGES_TAG: "True"})

    def log_input(
        self, name: str, digest: str, source: str, context: str, tags: Mapping[str, str] | None = None
    ) -> None:
        record = {"name": name, "digest": digest, "source": self._told(source), "context": context}
        self._journal.append({"kind": "input", **record, **({"tags": self._clean_tags(tags)} if tags else {})})

    def register_model(self, name: str, uri: str, tags: Mapping[str, str]) -> None:
        record = {"kind": "model", "name": name, "uri": self._told(uri), "tags": self._clean_tags(tags)}
        self._journal.append(record)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._journal.append({"kind": "tags", "values": self._clean_tags(tags)})

    def num_unsent_bytes(self) -> int:
        return 0 if self._finished else self._flusher.num_unsent_bytes()

    def finish(self, status: str) -> None:
        if status not in STATUSES:
            raise ValueError(f"status {status!r} is none of {', '.join(STATUSES)}")
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self.finish)
        if self._header.role == "owner":
            self._journal.append({"kind": "status", "status": status, "t": now_ms()})
        unsent = self._flusher.close(self._close_timeout_s)
        if unsent:
            _log.warning(
                "%d bytes of tracking records stay in %s; the next job that uses this folder sends them, "
                "or run: python -m jobs.sync_tracking",
                unsent,
                self._journal.path,
            )
        if self._journal.num_lost:
            _log.error("%d tracking records could not be written and are lost", self._journal.num_lost)

    def _tell_environment(self) -> None:
        self.set_tags(environment_tags())
        self.log_text(installed_packages(), PACKAGES)

    def _log_artifact(self, artifact_path: str, data: bytes | Path) -> None:
        parts = PurePosixPath(artifact_path)
        if parts.is_absolute() or ".." in parts.parts or not parts.name or "\\" in artifact_path:
            raise ValueError(f"artifact path {artifact_path!r} must be relative, without '..', and name a file")
        spooled = self._journal.spool(parts.name, data)
        folder = "" if str(parts.parent) == "." else str(parts.parent)
        if spooled is not None:
            self._journal.append({"kind": "artifact", "file": spooled, "folder": folder})

    def _clean_tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {self._checked(k): _clip(self._told(str(v)), _MAX_TAG) for k, v in tags.items()}

    def _checked(self, key: str) -> str:
        if key not in self._known_keys:
            check_key(key)
            self._known_keys.add(key)
        return key


def open_tracker(
    tracking: TrackingConfig,
    *,
    job: str,
    run_name: str,
    resume_run_id: str | None = None,
    parents: Mapping[str, str] | None = None,
) -> Tracker:
    """The run of a job, new or resumed (`resume_run_id`: an id or a handle), seen by the process that owns it.

    `parents` maps a kind such as "encode" to the id or handle of the run that made this one's input. Raises
    ConfigError for a URI that can never work and for a server that refuses us; a server that does not answer is
    waited for in the background, and the run is made when it does.
    """
    if not tracking.enabled:
        return NoopTracker()
    tracking = resolve_paths(tracking)
    check_uri(tracking.uri)
    check_access(tracking.uri)
    told = _telling(tracking.uri)
    tags = {**tracking.tags, JOB_TAG: job}
    if parents:  # one tag per parent to read, and one with all of them to search by
        tags |= {f"{PARENT_TAG}{kind}": run for kind, run in parents.items()}
        tags[PARENTS_TAG] = json.dumps(sorted(set(parents.values())))
    for key in tags:
        check_key(key)
    run_id, run_key = _split_handle(resume_run_id)
    start_ms = now_ms()
    header = Header(
        server=store_identity(tracking.uri),
        experiment=tracking.experiment,
        run_key=run_key or uuid.uuid4().hex,
        run_id=run_id,
        run_name=told(run_name),
        role="owner",
        attempt=f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}",
        start_ms=start_ms,
        tags={k: _clip(told(v), _MAX_TAG) for k, v in tags.items()},
    )
    return JournalTracker(tracking, header)


def attach_tracker(tracking: TrackingConfig, run_id: str | None) -> Tracker:
    """The same run seen by another process, such as rank 0 of a training job; `run_id` may be a handle.

    Pass it a section that went through `config.resolve_paths` in the driver. It can neither make nor end the run.
    """
    if not tracking.enabled or run_id is None:
        return NoopTracker()
    tracking = resolve_paths(tracking)
    check_uri(tracking.uri)
    known_id, run_key = _split_handle(run_id)
    header = Header(
        server=store_identity(tracking.uri),
        experiment=tracking.experiment,
        run_key=run_key,
        run_id=known_id,
        run_name="",
        role="attached",
        attempt="",
        start_ms=now_ms(),
        tags={},
    )
    return JournalTracker(tracking, header)


def _telling(uri: str) -> Callable[[str], str]:
    """Makes of a text what the store may show: no secret in it, and nothing that acts where it is printed."""
    redact = Redactor.for_uri(uri)
    return lambda text: escaped(redact(text))


def check_key(key: str) -> None:
    """Raise InputError for a name that no tracking store takes: it would be refused hours later."""
    sound = isinstance(key, str) and len(key) <= _MAX_KEY and _KEY.fullmatch(key)
    if not sound or str(PurePosixPath(key)) != key or ".." in PurePosixPath(key).parts:
        raise InputError(
            f"{key!r} cannot be the name of a param, metric or tag",
            rule="letters, digits, _ - . : / and space, at most 250 characters, no empty or '..' path part",
            next_step="rename it",
        )


def _split_handle(handle: str | None) -> tuple[str | None, str | None]:
    if handle is not None and handle.startswith(HANDLE_PREFIX):
        key = handle.removeprefix(HANDLE_PREFIX)
        if not re.fullmatch(r"[0-9a-f]{32}", key):
            raise InputError(
                f"{handle!r} is no handle of a run",
                rule="a run id, or key: and 32 hexadecimal digits",
                next_step="take it from `tracker.handle`",
            )
        return None, key
    return handle, None


def _clip(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def system_metrics(tracker: Tracker, every_s: float | None, *, first: bool) -> Iterator[None]:
    """While the block lasts, this machine's figures with those of the run, under MLflow's names; none for None.

    first: whether this is the first machine of the run; the others' figures go below their names. Their step is the
    second of their time, so that what a start tells goes on behind the last one's.
    """
    if every_s is None:
        yield
        return
    told, ended = machine_monitor(), threading.Event()
    prefix = "system/" if first else f"system/{platform.node()}/"

    def watch() -> None:
        while not ended.wait(every_s):
            tracker.log_metrics({f"{prefix}{name}": value for name, value in told().items()}, step=int(time.time()))

    thread = threading.Thread(target=watch, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
