"""The identity of an image output: fixed by the first image that is committed, not by the first attempt."""

from __future__ import annotations

import logging

from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, at_one_generation, check_newest
from pipeline.store.ledger.identity import Identity, check_same, identity_at
from pipeline.store.ledger.layout import settled_identity
from pipeline.store.ledger.ledger import visible_records

_log = logging.getLogger(__name__)


def check_identity(root: Root, wanted: Identity) -> None:
    """ConflictError, field by field, when rows were committed to `root` under another identity; writes nothing."""
    at_one_generation(root, lambda number: _replaceable(root, wanted, number))


def settle_identity(root: Root, wanted: Identity, generation: Generation) -> None:
    """Make `wanted` the root's identity if nothing was committed under another one; ConflictError otherwise.

    To be called by the holder of the newest generation, before it commits. What older runs commit or settle from now
    on stays invisible, and what is settled here lies beside this claim: a run that was fenced off settles nothing.
    """
    if not _replaceable(root, wanted, generation.number):
        return
    if not root.put_if_absent(settled_identity(generation.number), wanted.to_bytes()):
        check_same(root, identity_at(root, generation.number, "output.uri"), wanted)
    check_newest(root, generation.number)
    _log.info("nothing was committed to %s yet: it takes this run's settings", root.uri)


def _replaceable(root: Root, wanted: Identity, number: int) -> bool:
    """Whether a generation sees another identity and no row; ConflictError when there are rows, or of other kind."""
    records = visible_records(root, number)
    found = identity_at(root, number, "output.uri")
    wanted = _as_recorded(found, wanted)
    if found.kind == wanted.kind and found.fingerprint_digest == wanted.fingerprint_digest:
        return False
    if found.kind != wanted.kind or records:
        check_same(root, found, wanted)
    return True


def _as_recorded(found: Identity, wanted: Identity) -> Identity:
    """The identity as it was told when `found` was written: compilation was no part of it at first."""
    draw = wanted.fingerprint.get("draw", {})
    if "compile" not in draw or "compile" in found.fingerprint.get("draw", {}):
        return wanted
    told = {key: value for key, value in draw.items() if key != "compile"}
    return Identity(wanted.kind, {**wanted.fingerprint, "draw": told}, wanted.about)
