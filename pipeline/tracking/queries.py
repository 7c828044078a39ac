"""What the tracking store is asked: how runs and data descend from each other, and which models are registered."""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.errors import InputError
from pipeline.tracking.config import check_readable, masked_uri
from pipeline.tracking.store import (
    RUN_KEY_TAG,
    URI_TAG,
    DatasetLink,
    MlflowStore,
    RunState,
    StoreRefused,
    TrackingUnavailable,
)
from pipeline.tracking.tracker import HANDLE_PREFIX, JOB_TAG, PARENT_TAG, PARENTS_TAG

# -- Walks from a run to the runs and datasets it came from, and on to what was made of it ---------------------
#
# A run names its parents in tags (`latentloom.parent.<kind>`) and its datasets as MLflow inputs with the context
# "input" or "output"; nothing else is stored, so the walk works on any store that holds the runs.


@dataclass(frozen=True)
class LineageStep:
    """One run of a chain; `found` is False when the store does not hold it, `depth` counts from the start.

    ended_s: seconds since 1970; None while it runs, or where it died without a word.
    """

    run_id: str
    found: bool
    depth: int
    job: str = ""
    run_name: str = ""
    status: str = ""
    parents: tuple[tuple[str, str], ...] = ()
    inputs: tuple[DatasetLink, ...] = ()
    outputs: tuple[DatasetLink, ...] = ()
    ended_s: float | None = None


class NoSuchRun(InputError):
    """The tracking store was asked and holds no such run."""


def walk(run_id: str, uri: str) -> list[LineageStep]:
    """A run (id or handle) and all it came from, nearest first, each once; InputError when there is no such run."""
    return _breadth_first(run_id, uri, lambda store, step: [parent for _, parent in step.parents])


def descend(run_id: str, uri: str) -> list[LineageStep]:
    """A run (id or handle) and all that was made of it, nearest first, each once; InputError when there is none."""

    def children(store: MlflowStore, step: LineageStep) -> list[str]:
        # They name a parent by its id, or by the handle that it had before it got one.
        run = store.run_state(step.run_id)
        key = run.tags.get(RUN_KEY_TAG) if run else None
        names = [_plain(step.run_id)] + ([f"{HANDLE_PREFIX}{_plain(key)}"] if key else [])
        return [r.run_id for name in names for r in store.search(None, f"tags.`{PARENTS_TAG}` LIKE '%\"{name}\"%'")]

    return _breadth_first(run_id, uri, children)


def runs_of_dataset(digest: str, uri: str) -> list[LineageStep]:
    """The runs that read or made the dataset with this digest, oldest first."""
    with _opened(uri) as store:
        steps = [_step(run, 0) for run in store.search(None, f"dataset.digest = '{_plain(digest)[:36]}'")]
    return [s for s in steps if any(d.digest.startswith(digest) for d in s.inputs + s.outputs)]


def _breadth_first(
    start: str, uri: str, following: Callable[[MlflowStore, LineageStep], list[str]]
) -> list[LineageStep]:
    steps: dict[str, LineageStep] = {}
    queue = deque([(start, 0)])
    with _opened(uri) as store:
        while queue:
            reference, depth = queue.popleft()
            if reference.startswith(HANDLE_PREFIX):
                key = _plain(reference.removeprefix(HANDLE_PREFIX))
                run = next(iter(store.search(None, f"tags.`{RUN_KEY_TAG}` = '{key}'")), None)
            else:
                run = store.run_state(reference)
            if run is None and depth == 0:
                raise NoSuchRun(
                    f"There is no run {reference} in {masked_uri(uri)}",
                    rule="a run id or handle of this tracking store",
                    next_step="take the id from the last line a job printed, and the uri from its tracking section",
                )
            step = _step(run, depth) if run else LineageStep(reference, found=False, depth=depth)
            if step.run_id not in steps:
                steps[step.run_id] = step
                queue.extend((other, depth + 1) for other in (following(store, step) if step.found else []))
    return list(steps.values())


def _step(run: RunState, depth: int) -> LineageStep:
    parents = {k.removeprefix(PARENT_TAG): v for k, v in run.tags.items() if k.startswith(PARENT_TAG)}
    return LineageStep(
        run_id=run.run_id,
        found=True,
        depth=depth,
        job=run.tags.get(JOB_TAG, ""),
        run_name=run.tags.get("mlflow.runName", ""),
        status=run.status,
        parents=tuple(sorted(parents.items())),
        inputs=tuple(d for d in run.datasets if d.context != "output"),
        outputs=tuple(d for d in run.datasets if d.context == "output"),
        ended_s=run.ended_s,
    )


def _plain(text: str) -> str:
    """Only what ids and digests consist of: the text goes into a filter expression."""
    if not text or not text.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"{text!r} is no run id and no digest", rule="letters, digits, - and _ only")
    return text


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[MlflowStore]:
    check_readable(uri)
    try:
        yield MlflowStore(uri)
    except TrackingUnavailable as error:
        raise InputError(
            f"The tracking store cannot be read: {error}",
            key="tracking.uri",
            value=masked_uri(uri),
            next_step="check that it runs, then try again",
        ) from None


# -- MLflow's model registry: versions that trainings register, and aliases that people and jobs rely on -------
#
# A version belongs to the run that trained it and names the exported model by URI in the tag `latentloom.uri`: the
# store keeps the model, the registry says which one is meant. `models:/NAME@ALIAS` is how others ask for it.


LATEST = "latest"
_REFERENCE = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[A-Za-z0-9_-]+)|/(?P<version>\d+|latest))")


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model: where the export is, which run made it, its aliases and tags."""

    name: str
    version: int
    uri: str
    run_id: str
    aliases: tuple[str, ...]
    tags: dict[str, str]


class NotRegisteredError(InputError):
    """The registry answers, and has no such model."""


def resolve(reference: str, tracking_uri: str) -> ModelVersion:
    """The version that `models:/NAME@ALIAS`, `models:/NAME/3` or `models:/NAME@latest` means now.

    NotRegisteredError when the registry has none, InputError when it cannot be asked.
    """
    parsed = _REFERENCE.fullmatch(reference)
    if parsed is None:
        raise InputError(
            f"{reference!r} names no registered model",
            key="model.uri",
            value=reference,
            rule="models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME@latest",
            next_step="name an alias of the model, such as models:/NAME@production",
        )
    name, wanted = parsed["name"], parsed["alias"] or parsed["version"]
    with opened(tracking_uri) as registry:
        versions = registry.versions(name)
        if wanted == LATEST:
            chosen = versions[-1:]
        else:
            chosen = [v for v in versions if wanted in v.aliases or wanted == str(v.version)]
    if not chosen:
        known = sorted({alias for v in versions for alias in v.aliases} | {str(v.version) for v in versions})
        raise NotRegisteredError(
            f"The registry has no {reference}",
            key="model.uri",
            value=reference,
            rule=f"known of {name}: {', '.join(known)}" if known else f"there is no registered model {name!r}",
            next_step=f"train with registry.name={name}, promote a version to this alias, or name another; the "
            f"registry asked is {masked_uri(tracking_uri)}",
        )
    return chosen[0]


class Registry:
    """The registry beside a tracking store."""

    def __init__(self, store: MlflowStore) -> None:
        self._client: Any = store.client

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a model, oldest first; none when nothing is registered under the name."""
        from mlflow.exceptions import MlflowException

        try:
            aliases: dict[int, list[str]] = {}
            for alias, version in self._client.get_registered_model(name).aliases.items():
                aliases.setdefault(int(version), []).append(alias)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return []
            raise
        entities, token = [], None
        while True:
            quoted = name.replace("'", "\\'")
            page = self._client.search_model_versions(f"name = '{quoted}'", page_token=token)
            entities += page
            token = page.token
            if not token:
                break
        versions = []
        for each in entities:
            number, tags = int(each.version), dict(each.tags)
            uri, run_id = tags.get(URI_TAG, each.source), each.run_id or ""
            versions.append(
                ModelVersion(each.name, number, uri, run_id, tuple(sorted(aliases.get(number, ()))), tags)
            )
        return sorted(versions, key=lambda v: v.version)

    def point(self, version: ModelVersion, alias: str, tags: dict[str, str]) -> None:
        """Make the alias mean this version, and note why; the alias moves last."""
        for key, value in tags.items():
            self._client.set_model_version_tag(version.name, str(version.version), key, value)
        self._client.set_registered_model_alias(version.name, alias, str(version.version))


@contextlib.contextmanager
def opened(uri: str) -> Iterator[Registry]:
    """The registry of a tracking URI; InputError when it is not there or does not answer."""
    from mlflow.exceptions import MlflowException

    check_readable(uri)
    try:
        yield Registry(MlflowStore(uri))
    except (MlflowException, TrackingUnavailable, StoreRefused, OSError) as error:
        raise InputError(
            f"The model registry cannot be used: {masked_uri(' '.join(str(error).split())[:300])}",
            key="tracking.uri",
            value=masked_uri(uri),
            next_step="check that it runs and lets this user in, then try again",
        ) from None
