"""What each page shows, as plain values for its template; knows no HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.codec.codec import Codec, load_codec
from pipeline.encode.plan import planned_rows, short_sides
from pipeline.errors import ConfigError, ConflictError, InputError, PipelineError, argument_keys
from pipeline.lineage import BOX, drawing_of, find_start, trace
from pipeline.media import FORMATS, class_text, encode_image, false_colours, flat, inline_bytes
from pipeline.storage.root import Root
from pipeline.storage.stored import OBJECT, parse
from pipeline.store.ledger.generation import last_run, latest_number, read_claim, read_closing, read_note
from pipeline.store.ledger.identity import differences, read_identity
from pipeline.store.read.dataset import Dataset, LatentDataset, read_outside
from pipeline.store.read.row_groups import reading_table
from pipeline.store.schema import latents_from

ROWS = 60  # on a page
SCANNED_ROWS, SCANNED_GROUPS = 100_000, 64  # looked through for one page, before it says how far it came
SCANNED_FILES = 64  # whose statistics are looked at for it
REJECT_FILES = 32  # read for one page
SMALL, MAX_PIXELS = 64, 1 << 24  # a side's, of a picture that shows its real pixels; a picture's, that is decoded
GENERATIONS = 20  # told, the newest first
COMPARED = 2_000_000  # images of the other run that are known by their request
# Of each kind: what a page of rows reads, and in which of these texts are searched.
LISTED = {
    "latents": ("key", "caption", "label", "original_height", "original_width"),
    "images": ("key", "label", "prompt", "seed", "height", "width", "steps", "guidance", "content_sha256"),
    "text": ("key", "caption", "tokens", "truncated"),
}
SEARCHED = {"latents": ("key", "caption"), "images": ("key", "prompt"), "text": ("caption",)}
BLOBS = {"latents": ("latent", "latent_shape"), "images": ("image", "file", "media_type")}


@dataclass(frozen=True)
class Asked:
    """Which rows a page is to show: of a bucket and a label, with a text in one of them, from a place on."""

    bucket: str = ""
    label: int | None = None
    text: str = ""
    start: int = 0

    def at(self, start: int) -> dict[str, Any]:
        """The same from another place, as the parts of an address."""
        parts = {"bucket": self.bucket, "label": self.label, "text": self.text, "from": start}
        return {name: value for name, value in parts.items() if value not in ("", None)}


class OpenedDataset:
    """A dataset as it was visible when it was opened, and what is read of it for pages: row groups, one at a time.

    A row is known by its number among all visible rows, in the order of the files.
    """

    def __init__(self, uri: str, key: str) -> None:
        root = Root(uri)
        self.kind = read_identity(root, key).kind
        if self.kind not in LISTED:
            raise InputError(
                f"{uri} holds no rows to look at but {self.kind}",
                key=key,
                value=uri,
                rule=f"a dataset of {', '.join(LISTED)}",
                next_step="name the output of encode, embed_text or sample",
            )
        opener = LatentDataset if self.kind == "latents" else Dataset
        self.data: Any = opener.open_kind(uri, self.kind, key)
        self.opened_s = time.time()
        self.groups, self.class_names = self.data.row_groups, tuple[str, ...](self.data.class_names)
        self.ends: npt.NDArray[np.int64] = np.cumsum(self.groups.rows)
        self._kept: tuple[tuple[int, tuple[str, ...]], pa.Table] | None = None
        self._lock = threading.Lock()

    def label_text(self, label: int | None) -> str:
        """A label as it is told to people: with its name, where it has one."""
        if label is None:
            return ""
        return class_text(label, self.class_names)

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of a row group; what was read last is kept: the pictures of a page are asked for one by one."""
        wanted = (group, tuple(columns))
        with self._lock:
            if self._kept is None or self._kept[0] != wanted:
                self._kept = wanted, self.data.read(group, columns)
            return self._kept[1]

    def place(self, number: int) -> tuple[int, int]:
        """(row group, row in it) of a row; InputError when there is no such row."""
        if not 0 <= number < self.data.num_rows:
            raise InputError(f"There is no row {number}", rule=f"rows are 0 to {self.data.num_rows - 1}")
        group = int(np.searchsorted(self.ends, number, side="right"))
        return group, number - int(self.ends[group] - self.groups.rows[group])

    def row(self, number: int, columns: Sequence[str]) -> dict[str, Any]:
        """Columns of one row."""
        group, at = self.place(number)
        values: dict[str, Any] = self.read(group, columns).slice(at, 1).to_pylist()[0]
        return values

    def find(self, asked: Asked) -> Found:
        """The rows that a page shows; see `Found`. InputError for a bucket that there is not."""
        chosen = np.arange(len(self.groups))
        if asked.bucket:
            if asked.bucket not in self.groups.buckets:
                raise InputError(f"There is no bucket {asked.bucket}", rule=", ".join(self.groups.buckets))
            chosen = np.flatnonzero(self.groups.bucket_of == self.groups.buckets.index(asked.bucket))
        ends = np.cumsum(self.groups.rows[chosen])
        total = int(ends[-1]) if len(ends) else 0
        rows: list[dict[str, Any]] = []
        place, scanned, read = min(asked.start, total), 0, 0
        files: set[int] = set()
        for at in range(int(np.searchsorted(ends, place, side="right")), len(chosen)):
            group = int(chosen[at])
            files.add(int(self.groups.file_of[group]))
            if len(rows) == ROWS or scanned >= SCANNED_ROWS or read == SCANNED_GROUPS or len(files) > SCANNED_FILES:
                break
            before = int(ends[at] - self.groups.rows[group])
            number, bucket = int(self.ends[group]) - int(self.groups.rows[group]), self.groups.bucket_of[group]
            if asked.label is None or self.may_hold(group, asked.label):
                scanned, read = scanned + int(ends[at]) - place, read + 1
                for one in self.matching(group, place - before, asked):
                    if len(rows) == ROWS:
                        return Found(rows, asked.start, place, total)
                    rows.append({**one, "number": number + one["at"], "bucket": self.groups.buckets[bucket]})
                    place = before + one["at"] + 1
            place = int(ends[at])
        return Found(rows, asked.start, place, total)

    def matching(self, group: int, skip: int, asked: Asked) -> Iterator[dict[str, Any]]:
        """Rows of a group from one on that are asked for; `at` is their place in it."""
        names = [name for name in SEARCHED[self.kind] if asked.text] + (["label"] if asked.label is not None else [])
        if names:
            table = self.data.read(group, names)
            keep = pa.array(np.ones(len(table), np.bool_))
            if asked.text:
                hits = (pc.match_substring(table[name], asked.text, ignore_case=True) for name in SEARCHED[self.kind])
                keep = pa.array(np.any([pc.fill_null(hit, False).to_numpy() for hit in hits], axis=0))
            if asked.label is not None:
                keep = pc.and_(keep, pc.fill_null(pc.equal(table["label"], asked.label), False).combine_chunks())
            places = np.flatnonzero(keep.to_numpy(zero_copy_only=False))
        else:
            places = np.arange(int(self.groups.rows[group]))
        places = places[places >= skip][: ROWS + 1]
        if len(places):
            shown = self.data.read(group, LISTED[self.kind]).take(pa.array(places)).to_pylist()
            yield from ({**row, "at": at} for row, at in zip(shown, places.tolist(), strict=True))

    def may_hold(self, group: int, label: int) -> bool:
        """Whether a label lies between the least and the largest of a group, by the file's own statistics."""
        file, number = self.groups.place(group)
        described = self.data.footer(file).row_group(number)
        leaves = (described.column(at) for at in range(described.num_columns))
        told = next((leaf.statistics for leaf in leaves if leaf.path_in_schema == "label"), None)
        return told is None or not told.has_min_max or told.min <= label <= told.max


@dataclass(frozen=True)
class Found:
    """Rows of a page; start, stop: which places of the `total` that the bucket has were looked through."""

    rows: list[dict[str, Any]]
    start: int
    stop: int
    total: int


class Pages:
    """The pages of a dataset, and of one beside another; each method gives a template's values."""

    def __init__(self, uri: str, codec: str | None, beside: str | None, tracking: str) -> None:
        self.opened, self.tracking = OpenedDataset(uri, "URI"), tracking
        self.beside = None if beside is None else OpenedDataset(beside, "--with")
        if self.beside is not None and {self.opened.kind, self.beside.kind} != {"images"}:
            raise ConfigError(
                f"These are datasets of {self.opened.kind} and of {self.beside.kind}",
                key="--with",
                value=beside,
                rule="two outputs of the sample job are compared, by their requests",
                next_step="leave --with out, or name two datasets of images",
            )
        self._codec = None if codec is None else open_codec(self.opened, codec)
        self._decoding = threading.Lock()

    @cached_property
    def tabs(self) -> dict[str, str]:
        """The pages that there are, by address: their names."""
        several = {"compare": "Compare"} if self.beside else {}
        return {".": "Overview", "rows": "Rows", "left-out": "Left out", **several, "lineage": "Lineage"}

    # -- Overview ----------------------------------------------------------------------------------------------

    def overview(self) -> dict[str, Any]:
        """Counts out of the ledger, and what the dataset says of itself."""
        data, state = self.opened.data, self.opened.data.state
        groups = self.opened.groups
        planned = planned_rows(state)
        of = "" if planned is None else f" of {planned:,} planned"
        tiles = {"visible rows": data.num_rows, f"source rows settled{of}": state.covered.count()}
        tiles |= {"rejected": state.num_rejected, "filtered": state.num_filtered}
        facts: dict[str, Any] = {"files": len(groups.paths), "row groups": len(groups)}
        facts |= {"bytes": int(groups.size_bytes.sum()), "digest of the content": data.digest}
        if self.opened.kind == "latents":
            facts |= {"codec": data.codec.get("path"), "stored as": f"{data.posterior}, {data.latent_dtype}"}
        if self.opened.class_names:
            facts["classes"] = self.opened.class_names
        newest = latest_number(data.root)
        runs = [self.generation(number) for number in range(newest, max(0, newest - GENERATIONS), -1)]
        return {
            "tiles": tiles,
            "facts": facts,
            "buckets": [(bucket, count) for count, bucket in data.bucket_counts()[:40]],
            "more_buckets": max(0, len(groups.buckets) - 40),
            "left_out": self.reasons(),
            "sizes": short_sides(data) if self.opened.kind == "latents" else ([], 0),
            "generations": runs,
            "older": max(0, newest - GENERATIONS),
            "plan": state.plan.versions[:-21:-1],
            "fingerprint": dict(flat(data.fingerprint)),
        }

    def generation(self, number: int) -> dict[str, Any]:
        """Which job claimed a generation, when, how that ended, and its MLflow run."""
        root, claim = self.opened.data.root, read_claim(self.opened.data.root, number)
        closing = read_closing(root, number)
        note = read_note(root, number)
        return {
            "number": number,
            "job": claim["job"],
            "began": claim.get("at"),
            "status": "open, or its run died" if closing is None else closing.get("status", "closed"),
            "run": note.get("run_id") or note.get("handle"),
        }

    def reasons(self) -> list[tuple[str, str, int]]:
        """(outcome, reason, source rows) of what was left out, the most frequent first."""
        state = self.opened.data.state
        counts = [
            (outcome, reason, rows.count())
            for outcome, sets in (("rejected", state.rejects), ("filtered", state.filtered))
            for reason, rows in sets.items()
        ]
        return sorted(counts, key=lambda one: -one[2])

    # -- Rows --------------------------------------------------------------------------------------------------

    def rows(self, asked: Asked) -> dict[str, Any]:
        """A page of rows."""
        found = self.opened.find(asked)
        plain = asked.label is None and not asked.text
        return {
            "asked": asked,
            "found": found,
            "plain": plain,
            "buckets": self.opened.groups.buckets,
            "names": self.opened.class_names,
            "pixels": self.pixelated(found.rows),
            "cards": [self.card(row) for row in found.rows],
            "first": asked.at(0) if asked.start else None,
            "previous": asked.at(max(0, asked.start - ROWS)) if plain and asked.start else None,
            "next": asked.at(found.stop) if found.stop < found.total else None,
            "note": self.picture_note(),
        }

    def card(self, row: Mapping[str, Any], label_of: Callable[[int | None], str] | None = None) -> dict[str, Any]:
        """What is told of a row below its picture."""
        label = (label_of or self.opened.label_text)(row.get("label"))
        text = row.get("caption") if self.opened.kind != "images" else row.get("prompt")
        if self.opened.kind == "latents":
            size = f"{row['original_height']}x{row['original_width']} → {row['bucket']}"
        elif self.opened.kind == "images":
            size = f"seed {row['seed']} · {row['steps']} steps · guidance {row['guidance']:g}"
        else:
            size = f"{row['tokens']} tokens" + (", cut short" if row["truncated"] else "")
        return {"number": row["number"], "key": row["key"], "label": label, "text": text, "size": size}

    def pixelated(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether pictures of some rows are so small that they show their real pixels when they grow."""
        small = (max(map(int, row["bucket"].split("x"))) <= SMALL for row in rows)
        return (self.opened.kind == "latents" and self._codec is None) or all(small)

    def picture_note(self) -> str:
        """How the pictures came about, where they are not simply what is stored."""
        if self.opened.kind != "latents":
            return ""
        if self._codec is not None:
            return "Pictures are decoded from their latents when they are asked for."
        path = self.opened.data.codec.get("path")
        named = f" The dataset names {path}: it is not opened unasked." if path else ""
        return (
            "False colours: the first three channels of each latent, not its picture. Start with --codec PATH to see "
            f"pictures.{named}"
        )

    def row(self, number: int) -> dict[str, Any]:
        """Everything that is stored of one row, and where it came from."""
        data, (group, at) = self.opened.data, self.opened.place(number)
        blobs = ("latent", "image", "embedding", "pooled")
        file, inner = self.opened.groups.place(group)
        footer = data.footer(file)
        names = [name for name in footer.schema.to_arrow_schema().names if name not in blobs]
        values = self.opened.read(group, names).slice(at, 1).to_pylist()[0]
        story = values.pop("provenance", None)
        if story is not None:
            told: dict[str, Any] = parse(OBJECT, story.encode(), f"a provenance in {data.uri}")
            story = dict(flat(told))
        crop = None
        if self.opened.kind == "latents":
            crop = {name: values[f"crop_{name}"] for name in ("top", "left", "height", "width")}
            crop |= {"of_height": values["original_height"], "of_width": values["original_width"]}
            if (crop["height"], crop["width"]) == (crop["of_height"], crop["of_width"]):
                crop = None  # all of it
        generation = int(data.state.files.generations[file])
        note = last_run(data.root, generation)
        made = {
            "file": data.root.uri_of(self.opened.groups.path(file)),
            "row group": inner,
            "written by generation": generation,
            "job": note.get("job"),
            "run": note.get("run_id") or note.get("handle"),
        }
        shown = {name: value.hex() if isinstance(value, bytes) else value for name, value in values.items()}
        shown |= {"class": self.opened.label_text(values.get("label")) or None}
        return {
            "number": number,
            "values": {name: value for name, value in shown.items() if value is not None},
            "story": story,
            "crop": crop,
            "made": made,
            "pictured": self.opened.kind in BLOBS,
            "pixels": self.pixelated([values]),
            "last": data.num_rows - 1,
            "note": self.picture_note(),
        }

    def picture(self, number: int, *, large: bool = False, beside: bool = False) -> tuple[bytes, str]:
        """(bytes, media type) of a row's picture; large: at its own size."""
        opened = self.beside if beside and self.beside is not None else self.opened
        if opened.kind not in BLOBS:
            raise InputError(f"Rows of {opened.kind} have no picture")
        row = opened.row(number, BLOBS[opened.kind])
        if opened.kind == "images":
            kind = row["media_type"]
            if kind not in FORMATS.values():  # what a browser would make of it is not for the data to say
                raise InputError(f"The row says that its image is {kind!r:.60}", rule=", ".join(FORMATS.values()))
            with reading_table(f"{opened.data.uri}, row {number}"):
                return row["image"] or read_outside(opened.data.root, row["file"]), kind
        shape = tuple(row["latent_shape"])
        with reading_table(f"{opened.data.uri}, row {number}"):
            latent = latents_from(pa.array([row["latent"]], pa.large_binary()), shape, opened.data.latent_dtype)[0]
        if self._codec is None:
            return inline_bytes(false_colours(latent, *self.scale))
        if (pixels := self._codec.info.factor**2 * shape[1] * shape[2]) > MAX_PIXELS:
            raise InputError(
                f"The picture would have {pixels:,} pixels", rule=f"at most {MAX_PIXELS:,} are decoded here"
            )
        with self._decoding:  # one at a time: each has all cores
            import torch

            mean = torch.from_numpy(latent[None, : self._codec.info.latent_channels].copy())  # of stored moments
            decoded = self._codec.decode(mean)[0].cpu().numpy()
        return (encode_image(decoded, {}), FORMATS["png"]) if large else inline_bytes(decoded)

    @cached_property
    def scale(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Mean and deviation of each channel by the ledger alone: rows that were replaced since count, too."""
        sums, squares = self.opened.groups.channel_sums()
        count = max(1, int(self.opened.groups.stored("values").sum()))
        mean = sums.sum(axis=0) / count
        return mean, np.sqrt(np.maximum(squares.sum(axis=0) / count - mean**2, 1e-12))

    # -- What was left out ---------------------------------------------------------------------------------------

    def left_out(self, outcome: str, reason: str, file: int, skip: int) -> dict[str, Any]:
        """Rows that became nothing, with their reasons, out of the reject files from one on."""
        rows: list[dict[str, Any]] = []
        files, after = self.opened.data.state.reject_files, None
        for at in range(file, len(files)):
            visible = files[at]
            told = {**visible.record.rejects, **visible.record.filtered}
            if reason and reason not in told:
                continue
            if at >= file + REJECT_FILES:
                after = {"file": at}
                break
            root, path = self.opened.data.root, visible.info.path
            with reading_table(root.uri_of(path)), root.open(path) as source:
                table = pq.read_table(source, page_checksum_verification=True)
                keep = ~visible.dead.contains(table["unit"].to_numpy(), table["row"].to_numpy())
                for name, wanted in (("reason", reason), ("outcome", outcome)):
                    keep &= pc.equal(table[name], wanted).to_numpy() if wanted else True
            places = np.flatnonzero(keep)
            places = places[places >= (skip if at == file else 0)]
            room = ROWS - len(rows)
            rows += table.take(pa.array(places[:room])).to_pylist()
            if len(places) > room:
                after = {"file": at, "skip": int(places[room])}
                break
        asked = {"outcome": outcome, "reason": reason}
        return {
            "counts": self.reasons(),
            "rows": rows,
            "outcome": outcome,
            "reason": reason,
            "next": None if after is None else {name: value for name, value in {**asked, **after}.items() if value},
        }

    # -- Lineage -------------------------------------------------------------------------------------------------

    def lineage(self) -> dict[str, Any]:
        """The runs behind and beyond the dataset as a drawing and a table, or why there is none."""
        try:
            chain = trace(find_start(self.opened.data.uri), self.tracking)
        except PipelineError as error:
            trouble = [error.what, error.rule, error.next_step]
            return {"chain": None, "trouble": [part for part in trouble if part], "graph": None}
        return {"chain": chain, "trouble": [], "graph": drawing_of(chain), "box": BOX}

    # -- Two runs beside each other ------------------------------------------------------------------------------

    @cached_property
    def beside_by_request(self) -> dict[bytes, int]:
        """The other run's rows by their requests: the first `COMPARED`, or so."""
        assert self.beside is not None
        groups = range(int(np.searchsorted(self.beside.ends, COMPARED, side="right")) + 1)
        tables = (self.beside.data.read(group, ["sample_id"]) for group in groups if group < len(self.beside.groups))
        return {name: number for number, name in enumerate(n for t in tables for n in t["sample_id"].to_pylist())}

    def compare(self, asked: Asked) -> dict[str, Any]:
        """A page of requests that both runs have drawn, in the order of the first."""
        assert self.beside is not None
        found, other = self.opened.find(asked), self.beside
        numbers = self.beside_by_request
        pairs = []
        for row in found.rows:
            number = numbers.get(bytes.fromhex(row["key"]))
            if number is None:
                continue
            digest = other.row(number, ("content_sha256",))["content_sha256"]
            label_of = self.opened.label_text if self.opened.class_names else other.label_text
            pairs.append(self.card(row, label_of) | {"other": number, "same": digest == row["content_sha256"]})
        plain = asked.label is None and not asked.text
        here, there = (
            {**o.data.fingerprint, "origin": o.data.identity.about.get("origin")} for o in (self.opened, other)
        )
        return {
            "pairs": pairs,
            "buckets": self.opened.groups.buckets,
            "names": self.opened.class_names or other.class_names,
            "pixels": self.pixelated(found.rows),
            "alone": len(found.rows) - len(pairs),
            "found": found,
            "asked": asked,
            "uris": (self.opened.data.uri, other.data.uri),
            "counts": (self.opened.data.num_rows, other.data.num_rows),
            "differences": list(differences(here, there)),
            "previous": asked.at(max(0, asked.start - ROWS)) if plain and asked.start else None,
            "next": asked.at(found.stop) if found.stop < found.total else None,
        }


def open_codec(opened: OpenedDataset, path: str) -> Codec:
    """The codec at a place that the user named; ConflictError when it is not the one the latents are of."""
    if opened.kind != "latents":
        raise ConfigError(
            f"A dataset of {opened.kind} has no latents",
            key="--codec",
            value=path,
            rule="a codec decodes the latents of an encode job",
            next_step="leave --codec out",
        )
    with argument_keys({"path": "--codec", "revision": "--codec"}):
        codec = load_codec(path, kind=opened.data.codec.get("kind", "auto"))
    made = opened.data.fingerprint.get("codec", {}).get("weights_sha256")
    if codec.info.weights_sha256 != made:
        raise ConflictError(
            f"The codec has other weights ({str(codec.info.weights_sha256)[:12]}…) than that of the latents "
            f"({str(made)[:12]}…)",
            key="--codec",
            value=path,
            rule="latents become pictures by the codec that made them",
            next_step="name the directory that holds the dataset's codec, or leave --codec out",
        )
    return codec
