"""What of its datasets a run began with: it goes on with these rows for as long as it lives.

Datasets grow while a training runs for weeks, and are compacted. The order of the stream is a function of the rows
and of where they lie, so the driver pins the states (see `store.pinned`) under `inputs/` of the run before its first
checkpoint; every rank of every start then opens these and no others. Until there is a checkpoint, a start takes what
is visible at that time.
"""

from __future__ import annotations

import logging

from pipeline.errors import InputError
from pipeline.model.checkpoints import list_complete
from pipeline.storage import Root
from pipeline.store.identity import read_identity
from pipeline.store.pinned import Pins, lost_files
from pipeline.store.state import State, read_state
from pipeline.train.config import TrainJobConfig

INPUTS = "inputs"  # below output.uri
_log = logging.getLogger(__name__)


def pins_of(root: Root) -> Pins:
    """The pins of the run whose output is at `root`."""
    return Pins(root, INPUTS)


def begin_or_go_on(config: TrainJobConfig, root: Root) -> None:
    """Pin the datasets of a run that has no checkpoint; say what is new in those of a run that has.

    Raises what opening a dataset raises, and InputError when files that the run began with have been removed.
    """
    pins, began = pins_of(root), bool(list_complete(root.child("checkpoints")))
    for key, uri in _uris(config):
        dataset = Root(uri)
        read_identity(dataset, key)  # InputError when there is none
        if not began:
            pins.pin(dataset)
            continue
        state = pins.state(dataset)
        if state is not None:
            _compare(key, dataset, state)


def _uris(config: TrainJobConfig) -> list[tuple[str, str]]:
    """(key of the configuration, URI) of every dataset that the run reads."""
    found = []
    for key, part in config.data.parts.items():
        found.append((f"{key}.uri", part.uri))
        if part.text_uri is not None:
            found.append((f"{key}.text_uri", part.text_uri))
    return found


def _compare(key: str, dataset: Root, state: State) -> None:
    now = read_state(dataset)
    lost = lost_files(dataset, state, now)
    if lost:
        raise InputError(
            f"{len(lost):,} files of {dataset.uri} that this run began with are gone, such as {lost[0]}",
            key=key,
            value=dataset.uri,
            rule="a run goes on with the rows it began with, in their order; garbage collection "
            "removes what a compaction replaced",
            next_step="restore the files, or start a new run with another output.uri",
        )
    then_stored, now_stored = state.stored, now.stored
    added, gone = (now_stored - then_stored).count(), (then_stored - now_stored).count()
    if added or gone:
        _log.warning(
            "%s has changed since this run began: %d rows are new, %d are no longer visible. The run goes on with "
            "the rows it began with; to train on the present ones, start a new run with another output.uri",
            dataset.uri,
            added,
            gone,
        )
