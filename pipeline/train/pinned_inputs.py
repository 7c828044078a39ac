"""What of its datasets a run began with: it goes on with these rows for as long as it lives.

Datasets grow while a training runs for weeks, and are compacted. The order of the stream is a function of the rows
and of where they lie, so a start that finds no checkpoint pins the states (see `store.read.pins`) in a place of its
own, `inputs/<16 hex digits>` of the run. Its ranks open these and no others, and every checkpoint names the place:
whoever resumes from it opens them again. No start changes what another has pinned: not one that is refused later, nor
one that takes over.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.errors import InputError
from pipeline.model.checkpoints import Complete
from pipeline.storage.root import Root
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.ledger.state import State, read_state
from pipeline.store.maintain.forget import WITHDRAWN
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pins import Pins, lost_files
from pipeline.stream.order import PARTS, rule_in
from pipeline.text.dataset import TextEmbeddings
from pipeline.train.checks import Facts, handshake
from pipeline.train.config import TrainJobConfig
from pipeline.train.retention import counting, newest_start
from pipeline.train.start import Start, start_of

INPUTS = "inputs"  # below output.uri
_NAME = re.compile(r"[0-9a-f]{16}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """The datasets of a run, the first one first, what they are, and the name under which their states are kept.

    start: the weights that it starts from, and the configuration as they complete it. checkpoints: the names of
    those that count. order: the rule of the stream's order, that of the newest of them.
    """

    datasets: tuple[LatentDataset, ...]
    facts: Facts
    inputs: str | None
    start: Start
    checkpoints: tuple[str, ...] = ()
    order: str = PARTS
    withdrawn: Mapping[str, RowSet] = field(default_factory=dict)


def pinned(config: TrainJobConfig, root: Root, begun: Begun) -> Begun:
    """What `look` saw, kept: the datasets as the newest checkpoint of the run knows them, else as they are now."""
    name = begun.inputs or secrets.token_hex(8)
    pins = _pins(root, name)
    new = [uri for _, uri in _uris(config) if not pins.holds(Root(uri))]
    for uri in new:  # all of them, or what has come to lie elsewhere
        pins.pin(Root(uri))
    # What was pinned may be newer than what was looked at.
    if new:
        again = _open(begun.start, root, name)
        begun = replace(again, checkpoints=begun.checkpoints, order=begun.order, withdrawn=begun.withdrawn)
    for dataset in begun.datasets:
        dataset.publish(pins)
    for key, part in config.data.parts.items():
        for uri in part.text:
            TextEmbeddings.open(uri, cache_bytes=1, key=f"{key}.text", pins=pins).publish(pins)
    for uri, rows in begun.withdrawn.items():
        if rows - pins.withdrawn(Root(uri)):
            pins.withdraw(Root(uri), rows)
    return begun


def look(config: TrainJobConfig, root: Root) -> Begun:
    """The datasets of a run that goes on, as its newest checkpoint knows them; of a new one, what is visible now.

    Writes nothing. Says what is new. Raises what opening and the handshake raise, and InputError when files that the
    run began with have been removed.
    """
    complete = _counting(root)
    # A run without a checkpoint has no inputs of its own yet, nor has one of before there were pins.
    name = complete[-1].meta.get("inputs") if complete else None
    if name is not None and (not isinstance(name, str) or not _NAME.fullmatch(name)):
        raise InputError(
            f"The checkpoint {complete[-1].name} of {root.uri} names no inputs: {name!r}",
            key="output.uri",
            value=root.uri,
            rule="a checkpoint is written by latentloom and not changed",
            next_step="remove this checkpoint, or start anew with another output.uri",
        )
    pins, withdrawn = pins_of(root, name), dict[str, RowSet]()
    if pins is not None:
        for key, uri in _uris(config):
            state = pins.state(Root(uri))
            if state is not None:
                withdrawn[uri] = _compare(key, Root(uri), state)
    # An alias may mean other weights by now: the run goes on with those that it began with.
    start = start_of(config, ((complete[-1].meta.get("model") or {}).get("init") or {}) if complete else None)
    order = PARTS
    if complete and isinstance(made := complete[-1].meta.get("identity"), dict):
        order = rule_in(made, "stream." if len(config.data.parts) == 1 else "stream.datasets[0].")
    names = tuple(c.name for c in complete)
    return replace(_open(start, root, name), checkpoints=names, order=order, withdrawn=withdrawn)


def counting_names(root: Root) -> tuple[str, ...]:
    """The names of the checkpoints that count for a start that begins now, the newest last."""
    return tuple(c.name for c in _counting(root))


def _counting(root: Root) -> list[Complete]:
    checkpoints = root.child("checkpoints")
    return counting(checkpoints, newest_start(checkpoints))


def pins_of(root: Root, name: str | None) -> Pins | None:
    """The pins of a start of the run whose output is at `root`; None where it has none."""
    return None if name is None else _pins(root, name)


def _pins(root: Root, name: str) -> Pins:
    return Pins(root, f"{INPUTS}/{name}")


def _open(start: Start, root: Root, name: str | None) -> Begun:
    pins = pins_of(root, name)
    parts = start.config.data.parts.items()
    datasets = tuple(LatentDataset.open(part.uri, f"{key}.uri", pins) for key, part in parts)
    return Begun(datasets, handshake(start, *datasets, pins=pins), name, start)


def _uris(config: TrainJobConfig) -> list[tuple[str, str]]:
    """(key of the configuration, URI) of every dataset that the run reads."""
    uris = []
    for key, part in config.data.parts.items():
        uris.append((f"{key}.uri", part.uri))
        uris += [(f"{key}.text", uri) for uri in part.text]
    return uris


def _compare(key: str, dataset: Root, state: State) -> RowSet:
    """Say what is new since a state was kept; returns the rows of it that were withdrawn since."""
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
    withdrawn = then_stored & now.filtered.get(WITHDRAWN, RowSet.empty())
    if withdrawn:
        _log.warning(
            "%d rows of %s were withdrawn since this run began: it goes on in its order, and serves another row of "
            "their row group for each of them",
            withdrawn.count(),
            dataset.uri,
        )
    added, gone = (now_stored - then_stored).count(), (then_stored - now_stored - withdrawn).count()
    if added or gone:
        _log.warning(
            "%s has changed since this run began: %d rows are new, %d are no longer visible. The run goes on with "
            "the rows it began with; to train on the present ones, start a new run with another output.uri",
            dataset.uri,
            added,
            gone,
        )
    return withdrawn
