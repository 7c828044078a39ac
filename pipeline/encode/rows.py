"""The Arrow tables that travel between the stages of the encode job, and the ways between rows and tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.source.reading.rows import EndOfUnit, SourceRow
from pipeline.store.schema import LATENTS, REJECTS

# -- What becomes of a source row: pixels that will be a latent, the latent, or the reason why there is none ---


@dataclass(frozen=True)
class Decoded:
    """One variant of a source row, ready for the device: its columns but for the latent, and uint8 pixels [h, w, 3].

    variants: how many the source row has become.
    """

    values: dict[str, Any]
    variants: int
    pixels: npt.NDArray[np.uint8]

    @property
    def place(self) -> tuple[int, int, int]:
        """(unit, row, variant)."""
        return self.values["unit"], self.values["row"], self.values["variant"]


@dataclass(frozen=True)
class EncodedImage:
    """A variant with its latent: little-endian bytes, C order, and their shape [c, h, w]."""

    decoded: Decoded
    latent: bytes
    shape: tuple[int, ...]

    @property
    def place(self) -> tuple[int, int, int]:
        """(unit, row, variant)."""
        return self.decoded.place


@dataclass(frozen=True)
class Rejected:
    """A source row that becomes no latent; status: "rejected", or "filtered" where a rule of the user says so."""

    unit: int
    row: int
    key: str
    uri: str
    status: str
    reason: str
    message: str

    @property
    def place(self) -> tuple[int, int, int]:
        """(unit, row, variant)."""
        return self.unit, self.row, 0


@dataclass(frozen=True)
class UnitEnd:
    """The end of a unit whose number of rows was unknown until it was read."""

    unit: int
    rows: int

    @property
    def place(self) -> tuple[int, int, int]:
        """Before all rows of its unit."""
        return self.unit, -1, 0


Item = Decoded | Rejected | UnitEnd  # to the encoder
Outcome = EncodedImage | Rejected | UnitEnd  # from it


# What read tasks yield: compressed bytes, never pixels. `unit_rows` is set on the marker that ends a unit
# whose length was unknown; such a marker has row -1 and no image.
RAW = pa.schema(
    [
        pa.field("unit", pa.int64(), False),
        pa.field("row", pa.int64(), False),
        pa.field("source", pa.string(), False),
        pa.field("key", pa.string(), False),
        pa.field("image", pa.large_binary()),
        pa.field("caption", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("extra", pa.string()),
        pa.field("exif_orientation", pa.int32()),
        pa.field("status", pa.string(), False),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("unit_rows", pa.int64()),
    ]
)

# What encoders yield: latents where outcome is "stored"; else why there are none. `variants` is how many rows
# the source row has become. The outcome "end" marks the end of a unit.
ENCODED = pa.schema(
    [f.with_nullable(True) for f in LATENTS]
    + [
        pa.field("outcome", pa.string(), False),
        pa.field("variants", pa.int32(), False),
        pa.field("uri", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("message", pa.string()),
        pa.field("unit_rows", pa.int64()),
    ]
)
# Between decode tasks and encoders: everything an encoded row has, with pixels where the latent will be.
PIXELS = ENCODED.append(pa.field("pixels", pa.large_binary())).append(pa.field("size", pa.list_(pa.int32(), 2)))

_ROW_FIELDS = ("row", "source", "key", "image", "caption", "label", "extra", "exif_orientation", "status")
_MESSAGE_CHARS = 500


def raw_table(unit: int, items: Sequence[SourceRow | EndOfUnit]) -> pa.Table:
    """One block of what a reader yielded for a unit."""
    rows: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, EndOfUnit):
            values = {"row": -1, "source": "", "key": "", "status": "end", "unit_rows": item.rows}
        else:
            values = {name: getattr(item, name) for name in _ROW_FIELDS}
            values |= {"reason": item.reason and str(item.reason), "message": item.message}
        rows.append({"unit": unit, **values})
    return pa.Table.from_pylist(rows, schema=RAW)


def raw_item(values: dict[str, Any]) -> SourceRow | EndOfUnit:
    """What a reader yielded, from one line of a RAW table."""
    if values["status"] == "end":
        return EndOfUnit(values["unit_rows"])
    return SourceRow(**{name: values[name] for name in (*_ROW_FIELDS, "reason", "message")})


def encoded_table(outcomes: Iterable[Outcome]) -> pa.Table:
    """An ENCODED block."""
    return pa.Table.from_pylist([_line(outcome) for outcome in outcomes], schema=ENCODED)


def pixels_table(items: Iterable[Item]) -> pa.Table:
    """A PIXELS block: items as one table, for decode tasks that run apart from the device."""
    return pa.Table.from_pylist([_line(item) for item in items], schema=PIXELS)


def items_of(table: pa.Table) -> Iterator[Item]:
    """The inverse of `pixels_table`."""
    for values in lines(table):
        pixels, size = values.pop("pixels"), values.pop("size")
        outcome, variants = values.pop("outcome"), values.pop("variants")
        if outcome == "end":
            yield UnitEnd(values["unit"], values["unit_rows"])
        elif outcome == "stored":
            shaped = np.frombuffer(pixels, np.uint8).reshape(size[0], size[1], 3)
            yield Decoded({name: values[name] for name in LATENTS.names}, variants, shaped)
        else:
            fields = {name: values[name] for name in ("unit", "row", "key", "uri", "reason", "message")}
            yield Rejected(**fields, status=outcome)


def lines(table: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows of a table one after the other: `to_pylist` of a whole block would copy every image at once."""
    for batch in table.to_batches(max_chunksize=64):
        yield from batch.to_pylist()


def _line(item: Item | Outcome) -> dict[str, Any]:
    if isinstance(item, UnitEnd):
        return {"unit": item.unit, "row": -1, "key": "", "outcome": "end", "variants": 0, "unit_rows": item.rows}
    if isinstance(item, Rejected):
        fields = {name: getattr(item, name) for name in ("unit", "row", "key", "uri", "reason")}
        return {**fields, "message": item.message[:_MESSAGE_CHARS], "outcome": item.status, "variants": 0}
    if isinstance(item, EncodedImage):
        latent = {"latent": item.latent, "latent_shape": list(item.shape)}
        return {**item.decoded.values, **latent, "outcome": "stored", "variants": item.decoded.variants}
    pixels = {"pixels": item.pixels.tobytes(), "size": item.pixels.shape[:2]}
    return {**item.values, **pixels, "outcome": "stored", "variants": item.variants}


def split_outcomes(table: pa.Table) -> tuple[pa.Table, pa.Table, dict[int, int]]:
    """(LATENTS rows with their `variants`, REJECTS rows, rows of units that ended) of an ENCODED table."""
    stored = table.filter(pc.equal(table["outcome"], "stored"))
    others = table.filter(pc.is_in(table["outcome"], pa.array(["rejected", "filtered"])))
    ends = table.filter(pc.equal(table["outcome"], "end"))
    unit_rows = dict(zip(ends["unit"].to_pylist(), ends["unit_rows"].to_pylist(), strict=True))
    # As declared: what must not be null is so in the file, too.
    latents = stored.select(LATENTS.names).cast(LATENTS).append_column("variants", stored["variants"])
    return latents, others.select(REJECTS.names).cast(REJECTS), unit_rows
