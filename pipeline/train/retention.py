"""Which checkpoints count for a start of the workers, and which of them are kept. No torch.

    checkpoints/starts/<generation>-<attempt>.json   one per start: the complete checkpoints that it began with

For a start counts what it began with and what it has completed itself. A start that was superseded may still complete
one: it is in no list, so nobody goes on from it. The generation is that of the job's start (see `control`), whose
driver says what its first attempt begins with; each restart of the workers is a further attempt.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipeline.errors import ConflictError
from pipeline.model.checkpoints import MARKER, Complete, list_complete, place_in_run
from pipeline.storage.root import Root

STARTS = "starts"
# In place of the marker of a checkpoint that was removed before it was complete: no late marker makes it so.
REMOVED = b'{"removed": true}'
_START = re.compile(rf"^{STARTS}/(\d{{6}})-(\d{{6}})\.json$")


@dataclass(frozen=True)
class WorkerStart:
    """One start of the workers, and the names of the complete checkpoints that it began with."""

    generation: int
    attempt: int
    began_with: tuple[str, ...]

    @property
    def place(self) -> tuple[int, int]:
        """What orders starts."""
        return self.generation, self.attempt

    def counts(self, complete: Complete) -> bool:
        """Whether a checkpoint counts for this start."""
        return complete.name in self.began_with or complete.start == self.place

    def name(self, images: int, token: str) -> str:
        """The directory of a checkpoint that this start writes."""
        return f"{self.generation:06d}-{self.attempt:06d}-{images:015d}-{token}"


def begin(root: Root, generation: int, listed: Iterable[str] | None = None) -> WorkerStart:
    """A further start of a generation, the first of which begins with what is `listed`, or with all there is."""
    while True:
        earlier = [place for place in _places(root) if place[0] == generation]
        if earlier:
            names = [c.name for c in counting(root, _read(root, max(earlier)))]
        else:
            names = [c.name for c in list_complete(root)] if listed is None else list(listed)
        start = WorkerStart(generation, max((attempt for _, attempt in earlier), default=0) + 1, tuple(names))
        body = json.dumps({"checkpoints": names, "writer": secrets.token_hex(8)}).encode()
        if root.put_if_absent(_key(start.place), body) or root.read_bytes(_key(start.place)) == body:
            return start


def newest_start(root: Root) -> WorkerStart | None:
    """The start that is current; None where there was none, or only those of releases that did not note them."""
    places = _places(root)
    return _read(root, max(places)) if places else None


def counting(root: Root, start: WorkerStart | None) -> list[Complete]:
    """The complete checkpoints that count for a start, the one to go on from last; all there are for None."""
    return [c for c in list_complete(root) if start is None or start.counts(c)]


def mark_complete(root: Root, name: str, marker: bytes) -> None:
    """Make a checkpoint count, whose files are all there; ConflictError when a newer start has removed them."""
    key = f"{name}/{MARKER}"
    if not root.put_if_absent(key, marker) and root.read_bytes(key) != marker:
        raise ConflictError(
            f"The checkpoint {root.uri_of(name)} was removed before it was complete",
            key="output.uri",
            rule="a start of the job removes what earlier ones have left torn",
            next_step="let the newer start go on, or give this one another output.uri",
        )


def branch(complete: list[Complete]) -> list[Complete]:
    """Those that the last one goes back to: of each start before it those up to where the next one went on."""
    line: list[Complete] = []
    for c in reversed(complete):
        after = line[-1] if line else None
        if after is None or c.start == after.start or c.images <= after.resumed:
            line.append(c)
    return line[::-1]


def prune(
    root: Root,
    start: WorkerStart,
    *,
    keep_last: int,
    keep_every_images: int | None,
    superseded: Callable[[], bool] = lambda: False,
) -> None:
    """Delete what retention does not keep, and what this and earlier starts left torn; nothing once superseded.

    What is deleted was chosen before the question whether a newer start is there, so what that one begins with, which
    holds the newest checkpoint of before, is not among it.
    """
    complete = list_complete(root)
    counted = [c for c in complete if start.counts(c)]
    if not counted:
        return
    line = branch(counted)
    milestones: dict[int, str] = {}  # the first checkpoint at or after each multiple
    for c in line:
        if keep_every_images is not None and c.images >= keep_every_images:
            milestones.setdefault(c.images // keep_every_images, c.name)
    keep = {c.name for c in line[-keep_last:]} | set(milestones.values())
    # While steps are skipped, checkpoints hold what may have to be given up: the way back is kept.
    keep |= {c.name for c in [c for c in line if not c.meta.get("skipped_in_a_row")][-1:]}
    known = {c.name for c in complete}
    for name in root.list_dirs():
        place = place_in_run(name)
        if place is None or place[:2] > start.place or name in keep:
            continue
        torn = name not in known
        if torn and place[:2] == start.place and place[2] >= counted[-1].images:
            continue  # still being written
        if superseded() or max(_places(root), default=start.place) > start.place:
            return
        _remove(root, name, torn)


def _remove(root: Root, name: str, torn: bool) -> None:
    marker = f"{name}/{MARKER}"
    if torn:
        # Who writes it may live: from here on it cannot become complete.
        if not root.put_if_absent(marker, REMOVED) and root.read_bytes(marker) != REMOVED:
            return  # it has, in time
    else:
        # The marker goes first: a deletion cut short leaves a torn checkpoint, never a corrupt one.
        root.delete(marker)
    for info in list(root.list(name)):
        if not torn or info.key != marker:
            root.delete(info.key)
    local = root.local_path(name)
    if local is not None and not torn:
        shutil.rmtree(local, ignore_errors=True)


def _places(root: Root) -> list[tuple[int, int]]:
    matches = [_START.match(info.key) for info in root.list(STARTS)]
    return [(int(m.group(1)), int(m.group(2))) for m in matches if m]


def _key(place: tuple[int, int]) -> str:
    return f"{STARTS}/{place[0]:06d}-{place[1]:06d}.json"


def _read(root: Root, place: tuple[int, int]) -> WorkerStart:
    return WorkerStart(*place, tuple(json.loads(root.read_bytes(_key(place)))["checkpoints"]))
