"""Requests: what is to be drawn, one validated row each, named by its content.

A request is everything that decides one image apart from the run (model, sampler, run seed): label or prompt,
negative prompt, its own seed, size, steps, guidance. Two requests with the same content are the same request;
columns that are only carried along (`extra`) do not change the image and hence not the name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipeline.diffusion.solvers import COMBINATIONS, Combination, combination
from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.model.info import ModelInfo

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.binary(16), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("prompt", pa.string()),
        pa.field("negative_prompt", pa.string()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("steps", pa.int32(), nullable=False),
        pa.field("guidance", pa.float64(), nullable=False),
        pa.field("guidance_low", pa.float64()),
        pa.field("guidance_high", pa.float64()),
        pa.field("extra", pa.string()),
    ]
)
FIELDS = tuple(name for name in REQUEST_SCHEMA.names if name not in ("request_id", "extra"))
MAX_TEXT_BYTES = 16_384  # prompt, negative prompt and extra each, as ASCII JSON: EXIF holds 64 KiB in all
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_SIDE = 16_384
SHOWN_PROBLEMS = 40

SHAPE_KEY = ("height", "width", "steps", "guidance", "guidance_low", "guidance_high")
Columns = Mapping[str, Sequence[Any]]


def shape_groups(requests: pa.Table) -> Iterator[np.ndarray]:
    """Row indices (int64 [n]) of each group that shares size, steps and guidance, in a fixed order of groups.

    Within a group the order of the table is kept. The batches of one group have one shape and one schedule.
    """
    if requests.num_rows == 0:
        return
    keys = [requests[name].to_pylist() for name in SHAPE_KEY]
    groups: dict[tuple[float | None, ...], list[int]] = {}
    for i, key in enumerate(zip(*keys, strict=True)):
        groups.setdefault(key, []).append(i)
    for key in sorted(groups, key=lambda k: [(v is None, v or 0.0) for v in k]):
        yield np.asarray(groups[key], dtype=np.int64)


@dataclass(frozen=True)
class RequestLimits:
    """What one model can be asked for.

    `multiple` is the side in pixels that every height and width must be a multiple of. `sizes` are the (height,
    width) the model was trained on; with `any_size` others are accepted too. `combinations` of conditions
    are those it was trained on: what is asked for, and what guidance leads away from, is one of them, unless guidance
    is an input (`distilled`).
    """

    num_classes: int | None
    takes_text: bool
    multiple: int
    sizes: tuple[tuple[int, int], ...]
    any_size: bool = False
    combinations: tuple[Combination, ...] = COMBINATIONS
    distilled: bool = False

    @classmethod
    def of(cls, info: ModelInfo, *, takes_text: bool, any_size: bool) -> RequestLimits:
        """Those of a model, whose text encoders may be unknown."""
        return cls(
            num_classes=info.num_classes,
            takes_text=takes_text,
            multiple=info.factor * info.model.sides.multiple,
            sizes=info.sizes,
            any_size=any_size,
            combinations=info.trained_on,
            distilled=info.model.distilled,
        )


@dataclass(frozen=True)
class Defaults:
    """What fills a cell that a request leaves empty; a size of None is the model's first trained size."""

    seed: int = 0
    height: int | None = None
    width: int | None = None
    steps: int = 25
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Requests:
    """Validated requests in the order given (REQUEST_SCHEMA), and how many repeated ones were left out."""

    table: pa.Table
    duplicates: int = 0


def grid_columns(
    *,
    labels: Sequence[int] | None,
    prompts: Sequence[str],
    negative_prompt: str | None,
    seeds: Sequence[int],
) -> dict[str, list[Any]]:
    """Every label with every prompt, each with every seed; of no labels or no prompts, every one of the others."""
    asked = list(product(labels or (None,), prompts or (None,), seeds))
    columns: dict[str, list[Any]] = {
        "label": [label for label, _, _ in asked],
        "prompt": [prompt for _, prompt, _ in asked],
        "seed": [seed for _, _, seed in asked],
    }
    if negative_prompt is not None:
        columns["negative_prompt"] = [negative_prompt if prompt is not None else None for _, prompt, _ in asked]
    return columns


def request_id(content: Mapping[str, Any]) -> bytes:
    """16 bytes that name a request: blake2b-128 of the canonical JSON of its set fields.

    Unset fields are left out, so a field added to the format one day does not rename older requests.
    """
    named = {key: content[key] for key in FIELDS if content.get(key) is not None}
    text = json.dumps(named, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.blake2b(b"latentloom request 1\0" + text.encode("ascii"), digest_size=16).digest()


def validate_requests(
    columns: Columns,
    *,
    limits: RequestLimits,
    defaults: Defaults,
    keep_first: bool = False,
    origin: str = "requests",
    broken: Mapping[int, str] = {},
) -> Requests:
    """Check and complete every request; InputError lists all problems by row (row 1 is the first request).

    `columns` maps names out of FIELDS plus `extra` to equally long sequences; cells may be None. A repeated
    request is a problem, or with `keep_first` left out and counted. `broken`: rows that could not be read, and why.
    """
    num_rows = max(len(next(iter(columns.values()))) if columns else 0, *broken, 0)
    if num_rows == 0:
        raise InputError(f"There are no requests in {origin}", key="requests", next_step="ask for an image")
    problems = _Problems.of(broken)
    empty: list[Any] = [None] * num_rows
    typed = {name: _typed(name, columns.get(name, empty), problems) for name in (*FIELDS, "extra")}
    rows: dict[str, list[Any]] = {name: [] for name in REQUEST_SCHEMA.names}
    first_row: dict[bytes, int] = {}
    duplicates = 0
    for i in range(num_rows):
        if i + 1 in broken:
            continue
        unread = problems.unread.get(i + 1, set())
        request = _complete({name: column[i] for name, column in typed.items()}, limits, defaults)
        # A rule about a cell that could not be read would speak of the value that stands in for it.
        faults = [text for about, text in _faults(request, limits) if unread.isdisjoint(about)]
        for fault in faults:
            problems.add(i + 1, fault)
        if faults or unread:
            continue
        request["request_id"] = name = request_id(request)
        earlier = first_row.setdefault(name, i + 1)
        if earlier != i + 1:
            duplicates += 1
            if not keep_first:
                problems.add(i + 1, f"asks for the same image as row {earlier}")
            continue
        for key, value in request.items():
            rows[key].append(value)
    problems.check(origin)
    return Requests(pa.table(rows, schema=REQUEST_SCHEMA), duplicates)


def refuse_broken(broken: Mapping[int, str], origin: str) -> None:
    """InputError with every row that could not be read, if there is any."""
    _Problems.of(broken).check(origin)


def _complete(request: dict[str, Any], limits: RequestLimits, defaults: Defaults) -> dict[str, Any]:
    """Fill what is unset, and bring what means the same into one form."""
    height, width = limits.sizes[0] if limits.sizes else (None, None)
    fallback = {
        "seed": defaults.seed,
        "height": defaults.height if defaults.height is not None else height,
        "width": defaults.width if defaults.width is not None else width,
        "steps": defaults.steps,
        "guidance": defaults.guidance,
    }
    for key, value in fallback.items():
        if request[key] is None:
            request[key] = value
    if request["guidance_low"] is None and request["guidance_high"] is None and defaults.guidance_interval:
        request["guidance_low"], request["guidance_high"] = defaults.guidance_interval
    if (request["guidance_low"], request["guidance_high"]) == (None, None):
        return request
    low = 0.0 if request["guidance_low"] is None else request["guidance_low"]
    high = 1.0 if request["guidance_high"] is None else request["guidance_high"]
    # Without guidance the interval changes nothing, and the whole interval is no interval.
    unused = request["guidance"] == 1.0 or (low, high) == (0.0, 1.0)
    request["guidance_low"], request["guidance_high"] = (None, None) if unused else (low, high)
    return request


# The fields that a rule looks at, and what it says.
_Fault = tuple[tuple[str, ...], str]


def _faults(request: Mapping[str, Any], limits: RequestLimits) -> Iterator[_Fault]:
    """Every rule that one completed request breaks."""
    yield from _condition_faults(request, limits)
    size, sound = (request["height"], request["width"]), True
    for key, side in zip(("height", "width"), size, strict=True):
        if side is None:
            sound = False
            yield (key,), f"{key} is not set and the model names no size"
        elif not 0 < side <= MAX_SIDE or side % limits.multiple:
            sound = False
            yield (key,), f"{key} {side}: a multiple of {limits.multiple} up to {MAX_SIDE}"
    if sound and limits.sizes and size not in limits.sizes and not limits.any_size:
        trained = ", ".join(f"{h}x{w}" for h, w in limits.sizes[:8])
        yield (
            ("height", "width"),
            f"size {size[0]}x{size[1]}: the model was trained on {trained} (requests.any_size allows it)",
        )
    if not 0 <= request["seed"] < 2**63:
        yield ("seed",), f"seed {request['seed']}: a seed is from 0 to 2^63 - 1"
    if not 1 <= request["steps"] <= MAX_STEPS:
        yield ("steps",), f"steps {request['steps']}: from 1 to {MAX_STEPS}"
    if not 0.0 <= request["guidance"] <= MAX_GUIDANCE:
        yield ("guidance",), f"guidance {request['guidance']}: from 0 to {MAX_GUIDANCE:g}; 1 is none"
    low, high = request["guidance_low"], request["guidance_high"]
    if low is not None and not 0.0 <= low < high <= 1.0:
        about = ("guidance_low", "guidance_high", "guidance")
        yield about, f"guidance interval [{low}, {high}]: 0 <= low < high <= 1 (1 is pure noise)"
    for key in ("prompt", "negative_prompt", "extra"):
        size_bytes = len(json.dumps(request[key])) if request[key] is not None else 0
        if size_bytes > MAX_TEXT_BYTES:
            yield (key,), f"{key} takes {size_bytes} bytes as JSON: at most {MAX_TEXT_BYTES}"


def _condition_faults(request: Mapping[str, Any], limits: RequestLimits) -> Iterator[_Fault]:
    label, prompt, guidance = request["label"], request["prompt"], request["guidance"]
    if label is not None and limits.num_classes is None:
        yield ("label",), f"label {label}: the model was trained without classes"
    elif label is not None and not 0 <= label < (limits.num_classes or 0):
        yield ("label",), f"label {label}: the model has classes 0 to {(limits.num_classes or 0) - 1}"
    if prompt is not None and not limits.takes_text:
        yield ("prompt",), f"prompt {_clip(prompt)}: the model was trained without text"
    if request["negative_prompt"] is not None and prompt is None:
        yield ("negative_prompt", "prompt"), "negative_prompt without a prompt"
    if guidance != 1.0 and label is None and prompt is None:
        about = ("label", "prompt", "guidance")
        yield about, f"guidance {guidance} without a label or prompt: there is nothing to guide towards"
    known = (label is None or limits.num_classes is not None) and (prompt is None or limits.takes_text)
    if known:
        yield from untrained(request, limits.combinations, distilled=limits.distilled)


def untrained(
    request: Mapping[str, Any], combinations: Sequence[Combination], *, distilled: bool = False
) -> Iterator[_Fault]:
    """What a completed request asks a model that was trained on these combinations of conditions in vain.

    An empty prompt is none: it is what texts are dropped for. distilled: guidance is an input of the network, and
    leads away from nothing.
    """
    guidance, told = request["guidance"], ", ".join(_WORDS[one] for one in combinations)
    asked = combination(labelled=request["label"] is not None, prompted=bool(request["prompt"]))
    away = combination(labelled=False, prompted=bool(request["negative_prompt"]))
    if asked not in combinations:
        yield ("label", "prompt"), f"asks for {_WORDS[asked]}: the model was trained on {told}, and draws no other"
    elif guidance != 1.0 and not distilled and asked != "none" and away not in combinations:
        about = ("label", "prompt", "negative_prompt", "guidance")
        yield about, f"guidance {guidance} leads away from {_WORDS[away]}: the model was trained on {told}, so 1 only"


_WORDS: dict[Combination, str] = {
    "class+text": "label with prompt",
    "class": "label without prompt",
    "text": "prompt without label",
    "none": "neither label nor prompt",
}


def _typed(name: str, values: Sequence[Any], problems: _Problems) -> list[Any]:
    """One column as Python values of its type; a cell that cannot be one is a problem and becomes None."""
    kind = pa.string() if name == "extra" else REQUEST_SCHEMA.field(name).type
    convert = _text if pa.types.is_string(kind) else _whole if pa.types.is_integer(kind) else _number
    out = []
    for i, value in enumerate(values):
        try:
            out.append(None if value is None else convert(value))
        except ValueError as error:
            problems.add(i + 1, f"{name} {_clip(value)}: {error}", unread=name)
            out.append(None)
    return out


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode") from None
    return value


def _whole(value: Any) -> int:
    number = _number(value)
    if number != math.floor(number):
        raise ValueError("not a whole number")
    # A float cannot hold every seed, so what is written as whole digits is read as such.
    digits = value.strip().lstrip("+-").isdigit() if isinstance(value, str) else isinstance(value, int)
    return int(value) if digits else int(number)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("not a number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError("not a number") from None
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number


def _clip(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass
class _Problems:
    """Problems by row; keeps the first SHOWN_PROBLEMS as text and counts the rest."""

    rows: set[int] = field(default_factory=set)
    shown: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0
    unread: dict[int, set[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, broken: Mapping[int, str]) -> _Problems:
        """Those of the rows that could not be read."""
        problems = cls()
        for row, reason in broken.items():
            problems.add(row, reason)
        return problems

    def add(self, row: int, text: str, unread: str | None = None) -> None:
        """Note one problem; `unread` is the field whose cell could not be read."""
        self.rows.add(row)
        if unread:
            self.unread.setdefault(row, set()).add(unread)
        self.count += 1
        if self.count <= SHOWN_PROBLEMS:
            self.shown.append((row, text))

    def check(self, origin: str) -> None:
        """Raise InputError when there is any problem."""
        if not self.count:
            return
        lines = [f"  - row {row}: {text}" for row, text in sorted(self.shown)]
        more = self.count - len(self.shown)
        if more:
            lines.append(f"  - and {more} more")
        raise InputError(
            f"{self.count} problem(s) in {len(self.rows)} row(s) of {origin}:\n" + "\n".join(lines),
            key="requests",
            rule="row 1 is the first request; nothing is drawn until every request is valid",
            next_step="correct these rows; requests.duplicates=keep_first leaves repeated requests out",
        )
