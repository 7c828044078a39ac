"""Which checkpoints count for a start of the workers, and which of them are kept.

    checkpoints/starts/<generation>-<attempt>.json   one per start: the complete checkpoints that it began with

For a start counts what it began with and what it has completed itself. A start that was superseded may still complete
one: it is in no list, so nobody goes on from it. The generation is that of the job's start (see `control`), whose
driver says what its first attempt begins with; each restart of the workers is a further attempt.

And what is made of those that were kept, after the run: an average of another length. Torch comes with its weights.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.errors import ConflictError, InputError
from pipeline.model.checkpoints import MARKER, Complete, list_complete, place_in_run
from pipeline.result import JobResult
from pipeline.runs import open_run
from pipeline.storage.errors import unreadable
from pipeline.storage.root import Root
from pipeline.storage.stored import OPEN, Count, Key, parse, read_stored
from pipeline.tracking.config import resolve_paths
from pipeline.train.config import EmaJobConfig

STARTS = "starts"
# In place of the marker of a checkpoint that was removed before it was complete: no late marker makes it so.
REMOVED = b'{"removed": true}'
_START = re.compile(rf"^{STARTS}/(\d{{6}})-(\d{{6}})\.json$")


@with_config(OPEN)
class _Begun(TypedDict):
    checkpoints: list[str]


_BEGUN = TypeAdapter(_Begun)


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
    return WorkerStart(*place, tuple(read_stored(_BEGUN, root, _key(place))["checkpoints"]))


# --------------------------------------------------------------------------------------------------------------
# The run's own record: one line of JSON per report, kept with the checkpoints and so without seam after a
# resume.
#
#     checkpoints/<name>/history.jsonl   what a checkpoint adds to the last full segment
#     history/<name>-<n>.jsonl           a full segment, closed by the checkpoint of that name
#
# The first line of each names the full segment before it. All are written once, before the marker of their
# checkpoint, which counts the records: the records of a run are those that its newest counting checkpoint leads to. A
# resume goes on from those of its checkpoint; what was reported after it is forgotten with the steps that are
# repeated. Less than a segment is written again with each checkpoint, on the last day of a run as on the first, and
# goes with it; what it shares with others, full segments, is never removed.


HISTORY = "history"
COUNT = "history_records"  # in a checkpoint's marker
SEGMENT_RECORDS = 256
_STARTS = f"{HISTORY}/starts"
_ONE_FILE = "history.jsonl"

Record = dict[str, Any]


@with_config(OPEN)
class _Head(TypedDict):
    before: Key | None


@with_config(OPEN)
class _Step(TypedDict, total=False):
    step: Count
    images: Count


@with_config(OPEN)
class _Earlier(TypedDict):
    kept: list[tuple[Key, Count | None]]
    segment_records: Count


_HEAD, _RECORD, _EARLIER = TypeAdapter(_Head), TypeAdapter(_Step), TypeAdapter(_Earlier)


class History:
    """The records of a run, as rank 0 adds to them: in memory is what no full segment holds."""

    def __init__(self, root: Root, *, segment_records: int = SEGMENT_RECORDS) -> None:
        self.root, self.segment_records = root, segment_records
        self._before: str | None = None  # the last full segment
        self._num_before = 0  # records up to its end
        self._lines: list[bytes] = []

    def go_on(self, checkpoint: str, marker: Mapping[str, Any]) -> None:
        """Take up the records of a checkpoint; InputError when they are damaged."""
        if COUNT in marker:
            self._before, self._lines = _read_history(self.root, _tail_key(checkpoint))
            self._num_before = int(marker[COUNT]) - len(self._lines)
            return
        for record in _of_earlier_releases(self.root):
            if int(record["step"]) <= int(marker["meta"]["step"]):
                self.append(record)

    def append(self, record: Record) -> None:
        """Add a record, for the next checkpoint to keep."""
        self._lines.append(json.dumps(record).encode() + b"\n")

    def cut(self, checkpoint: str) -> tuple[dict[str, bytes], int]:
        """What a checkpoint taken now has to `write`, and the count of all records for its marker."""
        objects: dict[str, bytes] = {}
        size = self.segment_records
        while len(self._lines) - len(objects) * size >= size:
            full = self._lines[len(objects) * size :][:size]
            key = f"{HISTORY}/{checkpoint}-{len(objects):06d}.jsonl"
            objects[key] = _segment(self._before, full)
            self._before, self._num_before = key, self._num_before + size
        self._lines = self._lines[len(objects) * size :]
        objects[_tail_key(checkpoint)] = _segment(self._before, self._lines)
        return objects, self._num_before + len(self._lines)

    def write(self, objects: Mapping[str, bytes]) -> None:
        """Write what was cut, each object once."""
        for key, data in objects.items():
            self.root.put_if_absent(key, data)


def read_records(root: Root) -> list[Record]:
    """All records of a run, none when there is no history; raises InputError where a part of it is missing."""
    checkpoints = root.child("checkpoints")
    complete = counting(checkpoints, newest_start(checkpoints))
    if not complete or COUNT not in complete[-1].marker:
        return _of_earlier_releases(root)
    key: str | None = _tail_key(complete[-1].name)
    segments: dict[str, list[bytes]] = {}
    while key is not None:
        if key in segments:
            raise unreadable(root.uri_of(key), "before: the history leads round in a circle")
        before, segments[key] = _read_history(root, key)
        key = before
    records = [_record(root, at, line) for at, lines in reversed(segments.items()) for line in lines]
    if len(records) != complete[-1].marker[COUNT]:
        raise _damaged(root, root.uri_of(_tail_key(complete[-1].name)), len(records), complete[-1].marker[COUNT])
    return records


def _tail_key(checkpoint: str) -> str:
    return f"checkpoints/{checkpoint}/history.jsonl"


def _segment(before: str | None, lines: list[bytes]) -> bytes:
    return json.dumps({"before": before}).encode() + b"\n" + b"".join(lines)


def _read_history(root: Root, key: str) -> tuple[str | None, list[bytes]]:
    """The key of the segment before one, and its lines."""
    try:
        head, *lines = root.read_bytes(key).splitlines(keepends=True) or [b""]
    except FileNotFoundError:
        raise _damaged(root, root.uri_of(key), 0, None) from None
    before = parse(_HEAD, head, root.uri_of(key))["before"]
    if before is not None and not before.startswith(f"{HISTORY}/"):
        raise unreadable(root.uri_of(key), "before: it names no segment of the history")
    return before, lines


def _record(root: Root, key: str, line: bytes) -> Record:
    return cast(Record, parse(_RECORD, line, f"a record in {root.uri_of(key)}"))


def _of_earlier_releases(root: Root) -> list[Record]:
    """Records kept beside the checkpoints: in one file, or in segments of which the newest start says what counts.

    history/starts/<start>.json: {"kept": [[key, records that count], ...], "segment_records"}, then
    history/<start>/<n>.jsonl, all but the last of them full.
    """
    starts = [match.group(1) for info in root.list(_STARTS) if (match := re.search(r"(\d+-\d+)\.json$", info.key))]
    pieces: list[tuple[str, int | None]] = [(_ONE_FILE, None)] if root.exists(_ONE_FILE) else []
    if starts:
        head = read_stored(_EARLIER, root, f"{_STARTS}/{max(starts)}.json")
        own: list[tuple[str, int | None]] = [
            (info.key, head["segment_records"]) for info in root.list(f"{HISTORY}/{max(starts)}")
        ]
        pieces = [*((key, count) for key, count in head["kept"]), *own[:-1], *((key, None) for key, _ in own[-1:])]
    records: list[Record] = []
    for key, count in pieces:
        lines = root.read_bytes(key).splitlines() if root.exists(key) else []
        if count is not None and len(lines) < count:
            raise _damaged(root, root.uri_of(key), len(lines), count)
        records += [_record(root, key, line) for line in lines[:count] if line]
    return records


def _damaged(root: Root, uri: str, found: int, wanted: int | None) -> InputError:
    return InputError(
        f"The training history is damaged: {uri} "
        + ("is gone" if wanted is None else f"holds {found} of {wanted} records"),
        key="output.uri",
        value=root.uri,
        rule="a segment of the history never loses a record while a checkpoint leads to it",
        next_step="restore the object, or train into another output.uri",
    )


# -- The job of after the run: an average of the weights of another length, from the checkpoints that were kept ----
#
# checkpoints  --power-function tracks, least squares-->  the average (see `state.rebuild`)  -->  an export


def plan_average(config: EmaJobConfig) -> JobResult:
    """What the average would be rebuilt from; InputError where there is nothing."""
    return JobResult("dry-run", _counts(_kept(config)))


def run_average(config: EmaJobConfig) -> JobResult:
    """Write the average as an export, `ema` in its description naming the width.

    InputError where the run has nothing to rebuild it from, ConflictError when another export is there.
    """
    kept = _kept(config)
    from pipeline.model.load import load_model
    from pipeline.train.export import save_best
    from pipeline.train.state import rebuild

    checkpoints, output = _checkpoints(config), Root(config.output)
    model, info = load_model(checkpoints.uri_of(kept[-1].name), "raw")
    if info.lora is not None:
        raise InputError(
            "The run trained adapters, whose averages are not rebuilt",
            key="run",
            value=config.run,
            rule="an average of another length is of whole weights",
            next_step="train with the train.ema tracks that are wanted; each is in every checkpoint",
        )
    with open_run(config.model_copy(update={"tracking": resolve_paths(config.tracking)}), "ema") as run:
        run.track(
            f"ema {config.sigma_rel:g}",
            parents={"train": info.run_id} if info.run_id else {},
            params={"run": config.run, "sigma_rel": config.sigma_rel, "images": kept[-1].images},
        )
        # What is not trained, buffers and frozen weights, is the checkpoint's.
        model.load_state_dict(model.state_dict() | rebuild(checkpoints, config.sigma_rel, kept[-1].images))
        license = config.export.license or info.license
        info = replace(info, ema=f"sigma_rel-{config.sigma_rel:g}", weights_sha256="", license=license)
        save_best(config.export, output, model, info)
        return run.done(JobResult("done", _counts(kept), {"model": output.uri}))


def _checkpoints(config: EmaJobConfig) -> Root:
    return Root(config.run).child("checkpoints")


def _counts(kept: list[Complete]) -> dict[str, int]:
    averages = sum(len(c.power_tracks) for c in kept)
    return {"images": kept[-1].images, "checkpoints": len(kept), "averages": averages}


def _kept(config: EmaJobConfig) -> list[Complete]:
    """The checkpoints up to the one asked for, which is the last; InputError where they are of no use."""
    there = list_complete(_checkpoints(config))
    if not there:
        raise InputError(
            "There is no training run with a checkpoint",
            key="run",
            value=config.run,
            next_step="name the output.uri of a run of jobs.train",
        )
    kept = [c for c in there if config.images is None or c.images <= config.images]
    if not kept or (config.images is not None and kept[-1].images != config.images):
        raise InputError(
            "The run keeps no checkpoint of so many images",
            key="images",
            value=config.images,
            rule=f"it has them at {', '.join(str(c.images) for c in there)}",
            next_step="name one of these, or leave images out for the newest",
        )
    if not any(c.power_tracks for c in kept):
        raise InputError(
            "The checkpoints hold no power-function average",
            key="run",
            value=config.run,
            rule="an average is rebuilt from tracks with sigma_rel",
            next_step="train with train.ema tracks of sigma_rel 0.05 and 0.10 and checkpoint.keep_every_images",
        )
    return kept
