"""The only module that imports mlflow: what this package needs of a tracking store, and nothing more.

Importing mlflow takes seconds and making a sqlite store a few more: the flusher's thread builds `MlflowStore`.
Errors come out as two kinds: `TrackingUnavailable` (try again later) and `StoreRefused` (this data, never).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pipeline.tracking.config import Redactor, sqlite_path, without_credentials
from pipeline.tracking.journal import Header

_log = logging.getLogger(__name__)
RUN_KEY_TAG = "latentloom.run_key"
ATTEMPT_TAG = "latentloom.attempt"
DIGEST_TAG = "latentloom.digest"
URI_TAG = "latentloom.uri"
NOTE_TAG = "mlflow.note.content"  # what MLflow's pages show as a run's description, in Markdown
MAX_POINTS_PER_CALL = 1000
MAX_PAIRS_PER_CALL = 100
_MAX_DIGEST = 36  # mlflow's column; the whole digest travels as an input tag
_MAX_TAG = 8000
_RUN_LINK = re.compile(r"\[([^\[\]]*)\]\(run:([\w:]+)\)")
_REFUSED_STATUS = frozenset({400, 413, 422})
_REQUEST_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the flusher retries
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class TrackingUnavailable(Exception):
    """The store did not answer, or not usably: the same call may succeed later."""


class RunMissing(TrackingUnavailable):
    """The run to attach to is not there (yet)."""


class StoreRefused(Exception):
    """The store will never take this data."""


@dataclass(frozen=True)
class Point:
    """One metric value; `time_ms` is when it was logged, which makes sending it twice harmless."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class DatasetLink:
    """A dataset that a run read (context "input") or made (context "output")."""

    name: str
    digest: str
    source: str
    context: str


@dataclass(frozen=True)
class RunState:
    """What the store knows of a run: params, the last step of each metric, tags, datasets; its end, if it has one."""

    run_id: str
    params: Mapping[str, str]
    last_steps: Mapping[str, int]
    tags: Mapping[str, str]
    status: str
    datasets: tuple[DatasetLink, ...] = ()
    ended_s: float | None = None


class MlflowStore:
    """A tracking store by URI: local sqlite (made when absent), another database, or a server."""

    def __init__(self, uri: str) -> None:
        self._redact = Redactor.for_uri(uri)
        self._uri, parts = uri, urlsplit(uri)
        if parts.scheme in ("http", "https") and parts.username:
            # A server's credentials go to the environment, where mlflow looks for them, out of its errors.
            os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
            os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
            self._uri = without_credentials(uri)
        self._sqlite = sqlite_path(uri)
        self._experiments: dict[str, str] = {}
        with self._translated():
            for name, value in _REQUEST_DEFAULTS.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            # The first use of a sqlite file announces each step of making the tables; failures are reported by us.
            logging.getLogger("mlflow").setLevel(logging.WARNING)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
            self.client: Any = MlflowClient(tracking_uri=self._uri)

    def find_run(self, header: Header, known_id: str | None) -> RunState | None:
        """The run of a journal: by id where that still leads to an active run, else by its key."""
        run_id = known_id or header.run_id
        state = self.run_state(run_id) if run_id else None
        if state is not None or header.run_key is None:
            return state
        runs = self.search(header.experiment, f"tags.`{RUN_KEY_TAG}` = '{header.run_key}'")
        return runs[0] if runs else None

    def create_run(self, header: Header) -> RunState:
        """Make the run of an owner's journal; the caller has looked for it before."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # a numeric user without an entry, as in many containers
            user = str(os.getuid())
        tags = {**header.tags, ATTEMPT_TAG: header.attempt, "mlflow.user": user}
        if header.run_key:
            tags[RUN_KEY_TAG] = header.run_key
        if header.run_id:
            tags["latentloom.resumes"] = header.run_id
        with self._translated():
            run = self.client.create_run(
                self._experiment_id(header.experiment),
                start_time=header.start_ms,
                tags={k: v[:_MAX_TAG] for k, v in tags.items()},
                run_name=header.run_name,
            )
        return _state(run)

    def run_state(self, run_id: str) -> RunState | None:
        """A run by id; None when there is none or it was deleted."""
        try:
            with self._translated():
                run = self.client.get_run(run_id)
        except RunMissing:
            return None
        except StoreRefused:  # not even the form of an id
            return None
        return _state(run) if run.info.lifecycle_stage == "active" else None

    def search(self, experiment: str | None, condition: str) -> list[RunState]:
        """Runs that meet an MLflow filter, oldest first; over all experiments when None is given."""
        with self._translated():
            if experiment is None:
                ids = [e.experiment_id for e in self.client.search_experiments()]
            else:
                ids = [self._experiment_id(experiment)]
            runs, token = [], None
            while True:
                page = self.client.search_runs(
                    ids, condition, order_by=["attributes.start_time ASC"], page_token=token
                )
                runs.extend(page)
                token = page.token
                if not token:
                    return [_state(run) for run in runs]

    def steps_of(self, run_id: str, key: str) -> set[int]:
        """Every step at which the store holds a point of this metric."""
        with self._translated():
            return {metric.step for metric in self.client.get_metric_history(run_id, key)}

    def log_batch(
        self, run_id: str, points: Sequence[Point], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """One call: at most 1,000 points and 100 params and tags each; repeating it changes nothing."""
        from mlflow.entities import Metric, Param, RunTag

        tags = {key: self.linked(text) if key == NOTE_TAG else text for key, text in tags.items()}
        with self._translated():
            self.client.log_batch(
                run_id,
                metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in points],
                params=[Param(k, v) for k, v in params.items()],
                tags=[RunTag(k, v[:_MAX_TAG]) for k, v in tags.items()],
                synchronous=True,
            )

    def linked(self, note: str) -> str:
        """A description whose `[words](run:ID)` lead to that run's page; of one that is not there, the words."""

        def link(found: re.Match[str]) -> str:
            try:
                with self._translated():
                    run = self.client.get_run(found[2])
            except (RunMissing, StoreRefused):
                return found[1]
            return f"[{found[1]}](#/experiments/{run.info.experiment_id}/runs/{found[2]})"

        return _RUN_LINK.sub(link, note)

    def log_artifact(self, run_id: str, local: Path, folder: str) -> None:
        """Upload one file into a folder of the run's artifacts ("" is the top)."""
        with self._translated():
            self.client.log_artifact(run_id, str(local), folder or None)

    def log_input(
        self, run_id: str, name: str, digest: str, source: str, context: str, tags: Mapping[str, str] | None = None
    ) -> None:
        """Attach a dataset to a run by name, digest and source; repeating it changes nothing."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=name[:500],
            digest=digest[:_MAX_DIGEST],
            source_type=urlsplit(source).scheme or "local",
            source=json.dumps({"uri": source}),
        )
        whole = {"mlflow.data.context": context, DIGEST_TAG: digest, **(tags or {})}
        with self._translated():
            self.client.log_inputs(run_id, [DatasetInput(dataset, [InputTag(k, v) for k, v in whole.items()])])

    def register_model(self, run_id: str, name: str, uri: str, tags: Mapping[str, str]) -> None:
        """Make the model at `uri` a version of a registered model, made when absent; once per run and URI."""
        from mlflow.exceptions import MlflowException

        with self._translated():
            try:
                self.client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            for known in self.client.search_model_versions(f"run_id = '{run_id}'"):
                if known.name == name and known.tags.get(URI_TAG) == uri:
                    return
            # A server takes no path of another machine's disk for a source; the tag holds the truth.
            source = uri if self._sqlite is not None or "://" in uri else f"runs:/{run_id}/model"
            marked = {k: str(v)[:_MAX_TAG] for k, v in {**tags, URI_TAG: uri}.items()}
            self.client.create_model_version(name, source, run_id=run_id, tags=marked, await_creation_for=0)

    def set_status(self, run_id: str, status: str, end_ms: int | None = None) -> None:
        """RUNNING reopens a run, FINISHED, FAILED and KILLED end it."""
        with self._translated():
            if status == "RUNNING":
                self.client.update_run(run_id, status)
            else:
                self.client.set_terminated(run_id, status, end_ms)

    def _experiment_id(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if name in self._experiments:
            return self._experiments[name]
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # Beside a sqlite file (mlflow's own default depends on the working directory); a server knows its own.
            location = None
            if self._sqlite is not None:
                folder = re.sub(r"[^A-Za-z0-9._-]", "_", name).strip(".") or "experiment"
                location = (self._sqlite.parent / "mlartifacts" / folder).as_uri()
            try:
                self._experiments[name] = str(self.client.create_experiment(name, artifact_location=location))
                return self._experiments[name]
            except MlflowException:
                experiment = self.client.get_experiment_by_name(name)  # another process may have been quicker
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise TrackingUnavailable(f"experiment {name!r} was deleted: restore it, or name another")
        self._experiments[name] = str(experiment.experiment_id)
        return self._experiments[name]

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            text = self._redact(str(error))[:500]
            status = error.get_http_status_code()
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RunMissing(text) from None
            if status in _REFUSED_STATUS:
                raise StoreRefused(text) from None
            raise TrackingUnavailable(text) from None
        except OSError as error:  # requests' errors are among them
            raise TrackingUnavailable(self._redact(f"{type(error).__name__}: {error}")[:500]) from None


def _state(run: Any) -> RunState:
    links: list[DatasetLink] = []
    for each in run.inputs.dataset_inputs if run.inputs else ():
        dataset, tags = each.dataset, {tag.key: tag.value for tag in each.tags}
        try:
            source = str(json.loads(dataset.source)["uri"])
        except (ValueError, KeyError, TypeError):
            source = str(dataset.source)
        digest = tags.get(DIGEST_TAG, dataset.digest)
        links.append(DatasetLink(dataset.name, digest, source, tags.get("mlflow.data.context", "")))
    # `run.data.metrics` has the values only; the last steps are in the entities behind it.
    return RunState(
        run_id=run.info.run_id,
        params=dict(run.data.params),
        last_steps={metric.key: metric.step for metric in run.data._metric_objs},
        tags=dict(run.data.tags),
        status=run.info.status,
        datasets=tuple(links),
        ended_s=run.info.end_time / 1000 if run.info.end_time else None,
    )


def machine_monitor() -> Callable[[], dict[str, float]]:
    """What MLflow's own monitors tell of this machine at each call: processor, memory, disk, network, NVIDIA GPUs.

    Without nvidia-ml-py or without such GPUs nothing is told of them.
    """
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:
        _log.info("no figures of GPUs: %s", error)

    def told() -> dict[str, float]:
        figures: dict[str, float] = {}
        for monitor in monitors:
            monitor.collect_metrics()
            figures |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return figures

    return told
