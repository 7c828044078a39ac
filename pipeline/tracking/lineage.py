"""Walks from a run to the runs and datasets it came from, and on to what was made of it.

A run names its parents in tags (`latentloom.parent.<kind>`) and its datasets as MLflow inputs with the context
"input" or "output"; nothing else is stored, so the walk works on any store that holds the runs.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.errors import InputError
from pipeline.tracking.store import RUN_KEY_TAG, DatasetLink, MlflowStore, RunState, TrackingUnavailable
from pipeline.tracking.tracker import HANDLE_PREFIX, JOB_TAG, PARENT_TAG, PARENTS_TAG
from pipeline.tracking.uris import check_readable, masked_uri


@dataclass(frozen=True)
class LineageStep:
    """One run of a chain; `found` is False when the store does not hold it, `depth` counts from the start."""

    run_id: str
    found: bool
    depth: int
    job: str = ""
    run_name: str = ""
    status: str = ""
    parents: tuple[tuple[str, str], ...] = ()
    inputs: tuple[DatasetLink, ...] = ()
    outputs: tuple[DatasetLink, ...] = ()


class NoSuchRun(InputError):
    """The tracking store was asked and holds no such run."""


def walk(run_id: str, uri: str) -> list[LineageStep]:
    """A run (id or handle) and all it came from, nearest first, each once; InputError when there is no such run."""
    return _breadth_first(run_id, uri, lambda store, step: [parent for _, parent in step.parents])


def descend(run_id: str, uri: str) -> list[LineageStep]:
    """A run (id or handle) and all that was made of it, nearest first, each once; InputError when there is none."""
    return _breadth_first(run_id, uri, lambda store, step: _children(store, step.run_id))


def runs_of_dataset(digest: str, uri: str) -> list[LineageStep]:
    """The runs that read or made the dataset with this digest, oldest first."""
    with _opened(uri) as store:
        found = [_step(run, 0) for run in store.search(None, f"dataset.digest = '{_plain(digest)[:36]}'")]
    return [s for s in found if any(d.digest.startswith(digest) for d in s.inputs + s.outputs)]


def _breadth_first(
    start: str, uri: str, following: Callable[[MlflowStore, LineageStep], list[str]]
) -> list[LineageStep]:
    steps: dict[str, LineageStep] = {}
    queue = deque([(start, 0)])
    with _opened(uri) as store:
        while queue:
            reference, depth = queue.popleft()
            run = _find(store, reference)
            if run is None and depth == 0:
                raise _no_run(reference, uri)
            step = _step(run, depth) if run else LineageStep(reference, found=False, depth=depth)
            if step.run_id not in steps:
                steps[step.run_id] = step
                queue.extend((other, depth + 1) for other in (following(store, step) if step.found else []))
    return list(steps.values())


def _no_run(reference: str, uri: str) -> NoSuchRun:
    return NoSuchRun(
        f"There is no run {reference} in {masked_uri(uri)}",
        rule="a run id or handle of this tracking store",
        next_step="take the id from the last line a job printed, and the uri from its tracking section",
    )


def _find(store: MlflowStore, reference: str) -> RunState | None:
    if not reference.startswith(HANDLE_PREFIX):
        return store.run_state(reference)
    key = _plain(reference.removeprefix(HANDLE_PREFIX))
    found = store.search(None, f"tags.`{RUN_KEY_TAG}` = '{key}'")
    return found[0] if found else None


def _children(store: MlflowStore, run_id: str) -> list[str]:
    """Runs that name this one as a parent, by its id or by the handle it had before it got one."""
    run = store.run_state(run_id)
    key = run.tags.get(RUN_KEY_TAG) if run else None
    names = [_plain(run_id)] + ([f"{HANDLE_PREFIX}{_plain(key)}"] if key else [])
    return [r.run_id for name in names for r in store.search(None, f"tags.`{PARENTS_TAG}` LIKE '%\"{name}\"%'")]


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
