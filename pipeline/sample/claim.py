"""The identity of an image output: fixed by the first image that is committed, not by the first attempt."""

from __future__ import annotations

import logging

from pipeline.storage import Root
from pipeline.store.generation import Generation, check_newest, has_ended, newest_of
from pipeline.store.identity import Identity, check_same, read_identity
from pipeline.store.layout import IDENTITY
from pipeline.store.ledger import visible_records

_log = logging.getLogger(__name__)


def check_identity(root: Root, wanted: Identity) -> None:
    """ConflictError, field by field, when rows were committed to `root` under another identity; writes nothing."""
    _replaceable(root, wanted)


def settle_identity(root: Root, wanted: Identity, generation: Generation) -> None:
    """Make `wanted` the root's identity if nothing was committed under another one; ConflictError otherwise.

    To be called by the holder of the newest generation: what older runs commit from now on stays invisible, so an
    empty ledger stays empty. A run that was fenced off leaves the identity alone, and so does one whose predecessor
    may still live: its workers write images as files before they commit, under names that other settings share.
    """
    if not _replaceable(root, wanted):
        return
    previous = newest_of(root, "sample", before=generation.number)
    if previous and not has_ended(root, previous):
        check_same(root, read_identity(root, "output.uri"), wanted)
    check_newest(root, generation.number)
    root.put(IDENTITY, wanted.to_bytes())
    _log.info("nothing was committed to %s yet: it takes this run's settings", root.uri)


def _replaceable(root: Root, wanted: Identity) -> bool:
    """Whether another identity is there and no row under it; ConflictError when there are rows, or of other kind."""
    found = read_identity(root, "output.uri")
    wanted = _as_recorded(found, wanted)
    if found.kind == wanted.kind and found.fingerprint_digest == wanted.fingerprint_digest:
        return False
    if found.kind != wanted.kind or visible_records(root):
        check_same(root, found, wanted)
    return True


def _as_recorded(found: Identity, wanted: Identity) -> Identity:
    """The identity as it was told when `found` was written: compilation was no part of it at first."""
    draw = wanted.fingerprint.get("draw", {})
    if "compile" not in draw or "compile" in found.fingerprint.get("draw", {}):
        return wanted
    told = {key: value for key, value in draw.items() if key != "compile"}
    return Identity(wanted.kind, {**wanted.fingerprint, "draw": told}, wanted.about)
