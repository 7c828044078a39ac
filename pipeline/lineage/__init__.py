"""From anything that a job has made back to where it came from: sample -> model -> latents -> source."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.errors import InputError
from pipeline.media import read_provenance
from pipeline.result import JobResult
from pipeline.sample.provenance import origin_of
from pipeline.sample.regenerate import checked_story
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import noted_runs
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.layout import IDENTITY
from pipeline.store.ledger.state import read_state
from pipeline.store.read.dataset import Dataset
from pipeline.tracking.config import LineageJobConfig
from pipeline.tracking.queries import LineageStep, NoSuchRun, descend, runs_of_dataset, walk

_log = logging.getLogger(__name__)
_RUN = re.compile(r"(key:)?[0-9a-f]{32}")
_MAX_IMAGE_BYTES = 256 << 20


@dataclass(frozen=True)
class LineageStart:
    """What the walk starts from: runs that made it, and the digest of a dataset where it is, or names, one."""

    kind: str
    name: str
    runs: tuple[str, ...]
    digest: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Chain:
    """A start, the runs that it came from and those that came of it, each once, nearest first."""

    start: LineageStart
    back: list[LineageStep]
    forward: list[LineageStep]


def run(config: LineageJobConfig) -> JobResult:
    """The chain as text (messages) and as JSON (`details`); InputError when there is nothing to start from."""
    chain = trace(find_start(config.start), config.tracking.uri)
    start, back, forward = chain.start, chain.back, chain.forward
    for line in _text(start, back, forward):
        _log.info(line)
    steps = [*back, *forward]
    return JobResult(
        "done",
        {"back": len(back), "forward": len(forward), "missing": sum(not s.found for s in steps)},
        details={
            "start": asdict(start),
            "sources": _sources(back),
            "back": [asdict(s) for s in back],
            "forward": [asdict(s) for s in forward],
        },
    )


def trace(start: LineageStart, uri: str) -> Chain:
    """Walk both ways from a start through the tracking store at `uri`; InputError when it knows nothing of it."""
    related = runs_of_dataset(start.digest, uri) if start.digest else []
    made = [s for s in related if any(d.digest == start.digest for d in s.outputs)]
    read = [s for s in related if s not in made]
    makers = list(dict.fromkeys([*start.runs, *(s.run_id for s in made)]))
    if not makers and not read:
        raise InputError(
            f"Nothing recorded says where {start.name} comes from",
            key="start",
            value=start.name,
            rule="it was made with tracking.enabled, by a run that this tracking store holds",
            next_step="name the tracking.uri of the job that made it",
        )
    back = _merged(_walk_each(walk, makers, uri, start))
    onward = makers if start.kind != "dataset" else [*makers, *(s.run_id for s in read)]
    known = {s.run_id for s in back}
    forward = [s for s in _merged(_walk_each(descend, onward, uri, start)) if s.run_id not in known]
    return Chain(start, back, forward)


def plan(config: LineageJobConfig) -> JobResult:
    """What the start is, without asking the tracking store."""
    start = find_start(config.start)
    return JobResult("dry-run", {"runs": len(start.runs)}, details={"start": asdict(start)})


def find_start(name: str) -> LineageStart:
    """A run id, the root of a dataset or an image file; InputError when it is none of them."""
    if _RUN.fullmatch(name):
        return LineageStart("run", name, (name,))
    root = Root(name)
    try:
        kind = root.kind()
        if kind == "directory" and root.exists(IDENTITY):
            identity = read_identity(root, "start")
            dataset = Dataset(root, identity, read_state(root))
            facts = {
                "kind": identity.kind,
                "fingerprint_digest": identity.fingerprint_digest,
                "rows": dataset.num_rows,
            }
            return LineageStart("dataset", root.uri, tuple(noted_runs(root)), dataset.digest, facts)
        if kind == "file":
            return _of_image(root)
    except storage_errors() as error:
        raise InputError(f"{name} cannot be read: {describe(error)}", key="start", value=name) from None
    what = "no dataset" if kind == "directory" else "neither a run id nor an existing file or dataset"
    raise InputError(
        f"{name} is {what}",
        key="start",
        value=name,
        rule="a generated image (png, jpeg, webp), a run id of 32 hex digits, or a root that holds dataset.json",
        next_step="take the id or the URI from the last line a job printed",
    )


def _of_image(root: Root) -> LineageStart:
    parent, _, name = root.uri.rpartition("/")
    image = Root(parent or "/").read_range(name, 0, _MAX_IMAGE_BYTES)
    try:
        recorded = checked_story(read_provenance(image), root.uri)
    except InputError as error:
        raise error.but(key="start", value=root.uri) from None
    origin = origin_of(recorded)
    facts = {"request_id": recorded["request_id"], "request": recorded["request"], **asdict(origin)}
    runs = (origin.model_run_id,) if origin.model_run_id else ()
    # Without the run of the model, whoever made its training data is the nearest that is known.
    return LineageStart("image", root.uri, runs, None if runs else origin.dataset_digest, facts)


def _walk_each(
    follow: Callable[[str, str], list[LineageStep]], runs: Iterable[str], uri: str, start: LineageStart
) -> Iterator[LineageStep]:
    """The steps from several runs; one that only the start names may be gone, one that a person names may not."""
    for run_id in runs:
        try:
            yield from follow(run_id, uri)
        except NoSuchRun:
            if start.kind == "run":
                raise
            yield LineageStep(run_id, found=False, depth=0)


def _merged(steps: Iterable[LineageStep]) -> list[LineageStep]:
    """Each run once, at its smallest distance from the start, nearest first."""
    nearest: dict[str, LineageStep] = {}
    for step in steps:
        known = nearest.get(step.run_id)
        if known is None or (step.found, -step.depth) > (known.found, -known.depth):
            nearest[step.run_id] = step
    return sorted(nearest.values(), key=lambda s: s.depth)


def _sources(back: list[LineageStep]) -> list[dict[str, str]]:
    """What nobody on the way made: inputs that are no run's output."""
    made = {d.digest for s in back for d in s.outputs}
    inputs = [d for s in back for d in s.inputs if d.digest not in made]
    return list({d.digest: {"uri": d.source, "digest": d.digest, "context": d.context} for d in inputs}.values())


def _text(start: LineageStart, back: list[LineageStep], forward: list[LineageStep]) -> Iterator[str]:
    yield f"{start.kind} {start.name}"
    if start.kind == "image":
        yield f"  drawn by  {start.facts['model_uri']}  {_short(start.facts['model_digest'])}"
        yield f"  request   {_short(start.facts['request_id'])}  {start.facts['request']}"
    for title, steps in (("back to the source", back), ("forward", forward)):
        yield f"{title}:" if steps else f"{title}: nothing"
        for step in steps:
            indent = "  " * (step.depth + 1)
            if not step.found:
                yield f"{indent}{step.run_id}  is not in this tracking store"
                continue
            yield f"{indent}{step.job}  {step.run_name!r}  {step.run_id}  {step.status}"
            for verb, links in (("read", step.inputs), ("made", step.outputs)):
                for link in links:
                    yield f"{indent}    {verb}  {link.source}  {_short(link.digest)}"
    for source in _sources(back):
        yield f"source: {source['uri']}  {_short(source['digest'])}"


def _short(digest: str) -> str:
    return digest[:12]


# -- A drawing of runs: columns from left to right, each run right of all that it came from ----------------------


@dataclass(frozen=True)
class Drawing:
    """Boxes (x, y, step) and lines (x1, y1, x2, y2) between them, in units of an SVG of width x height."""

    boxes: list[tuple[int, int, LineageStep]]
    lines: list[tuple[int, int, int, int]]
    width: int
    height: int


BOX = (190, 58)
_GAP = (60, 18)


def drawing_of(chain: Chain) -> Drawing:
    """Where each run of a chain lies: in the column after the last of its parents and of the makers of its inputs."""
    steps = {step.run_id: step for step in (*chain.back, *chain.forward)}
    makers: dict[str, list[str]] = {}
    for step in steps.values():
        for link in step.outputs:
            makers.setdefault(link.digest, []).append(step.run_id)
    behind = {
        run: list(
            dict.fromkeys(
                other
                for other in (
                    *(parent for _, parent in step.parents),
                    *(maker for link in step.inputs for maker in makers.get(link.digest, ())),
                )
                if other in steps and other != run
            )
        )
        for run, step in steps.items()
    }
    columns: dict[str, int] = {}

    def column(run: str, seen: tuple[str, ...] = ()) -> int:
        if run not in columns:
            before = [column(other, (*seen, run)) for other in behind[run] if other not in (*seen, run)]
            columns[run] = 1 + max(before, default=-1)
        return columns[run]

    filled: dict[int, int] = {}
    places: dict[str, tuple[int, int]] = {}
    for run in steps:
        at = column(run)
        places[run] = (at * (BOX[0] + _GAP[0]), filled.get(at, 0) * (BOX[1] + _GAP[1]))
        filled[at] = filled.get(at, 0) + 1
    lines = [
        (places[other][0] + BOX[0], places[other][1] + BOX[1] // 2, places[run][0], places[run][1] + BOX[1] // 2)
        for run, others in behind.items()
        for other in others
    ]
    boxes = [(*places[run], step) for run, step in steps.items()]
    width = max((x for x, _, _ in boxes), default=0) + BOX[0]
    return Drawing(boxes, lines, width, max((y for _, y, _ in boxes), default=0) + BOX[1])
