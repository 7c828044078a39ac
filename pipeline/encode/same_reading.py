"""Whether a run reads its source as the runs before it did: what the fingerprint cannot hold, as it may grow."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.summary import recipe
from pipeline.errors import ConflictError
from pipeline.storage.root import Root
from pipeline.store.ledger.runs import last_recipe

_log = logging.getLogger(__name__)


def check_same_reading(config: EncodeJobConfig, root: Root) -> None:
    """ConflictError where one label or variant number would stand for two things in one dataset.

    Classes may be added behind those there are. Of a folder a changed label is a changed file, which is encoded anew.
    """
    before, now = last_recipe(root), recipe(config)
    if not before:
        return
    changes = list(_changes(before, now))
    if changes:
        shown = "\n".join(f"    {name}: {old} there, {new} here" for name, old, new in changes)
        raise ConflictError(
            f"{root.uri} has rows that were read in another way; the differing settings are\n{shown}",
            key="output.uri",
            value=root.uri,
            rule="a label and a variant mean the same in all rows of a dataset; classes are only added at the end",
            next_step="restore the settings, or choose another output.uri",
        )
    if before["source"].get("uri") != now["source"]["uri"]:
        _log.warning(
            "the run before read %s: what has the same key there and in %s counts as one object, the newer one stays",
            before["source"].get("uri"),
            now["source"]["uri"],
        )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    old, new = (r if isinstance(r, list) else [r] for r in (i["image"]["resolution"] for i in (before, now)))
    if old != new:  # the fingerprint has the same sizes, yet not their order, which numbers the variants
        yield "image.resolution", old, new
    there, here = before["source"], now["source"]
    if there.get("kind") != here["kind"] or here["kind"] == "folder":
        return
    if there.get("label") != here["label"]:
        yield "source.label", there.get("label"), here["label"]
    known = there.get("classes", [])
    if here["classes"][: len(known)] != known:
        yield "source.classes", known[:20], here["classes"][:20]
