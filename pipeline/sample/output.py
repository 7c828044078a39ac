"""Pixels to stored rows: the schema of an image dataset, and its second form, one file per image.

Rows follow the store's address columns, so ledger, verification and reading are those of every dataset. With
`files` the row names the image's file, which is put before the row is committed: a file that no row names is
what a crash left. Its name tells its content: a run that was fenced off, or has other settings, changes no file of
another's, and the same bytes are put there but once. Contact sheet and gallery are made of what is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.media import (
    FORMATS,
    SUFFIXES,
    PagePicture,
    caption_of,
    choose,
    contact_sheet,
    encode_image,
    render_page,
    thumbnail,
)
from pipeline.sample.provenance import Draw, Origin, provenance
from pipeline.sample.requests import FIELDS, REQUEST_SCHEMA
from pipeline.storage.stored import OBJECT, parse
from pipeline.store.read.dataset import Dataset, read_outside
from pipeline.store.schema import ADDRESS, REJECTS

IMAGES = pa.schema(
    [
        *ADDRESS,  # sample_id is the request id, key its hex form
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("image", pa.large_binary(), nullable=False),  # empty when `file` names it
        pa.field("file", pa.string()),  # an object's key, or key#offset+length of a tar
        pa.field("media_type", pa.string(), nullable=False),
        pa.field("content_sha256", pa.binary(32), nullable=False),
        *[REQUEST_SCHEMA.field(name) for name in (*FIELDS, "extra")],
        pa.field("run_seed", pa.int64(), nullable=False),
        pa.field("sampler", pa.string(), nullable=False),
        pa.field("model_digest", pa.string(), nullable=False),
        pa.field("model_run_id", pa.string()),
        pa.field("dataset_digest", pa.string()),
        pa.field("codec_sha256", pa.string(), nullable=False),
        pa.field("provenance", pa.string(), nullable=False),
    ]
)
REASONS = {
    "non_finite_latent": "the model returned values that are not finite",
    "decode_failed": "the codec failed on this latent",
    "image_encoding": "the pixels could not be encoded as an image",
}
IMAGES_DIR = "images"

PutFile = Callable[[str, bytes], object]


def encode_rows(
    drawn: pa.Table, draw: Draw, origin: Origin, put_file: PutFile | None = None
) -> tuple[pa.Table, pa.Table]:
    """(rows in IMAGES, outcomes in the store's REJECTS) of a table with plan columns, `pixels` and `reason`.

    With `put_file`, which replaces nothing, each image is put under its own key and the row holds that key in place
    of the bytes.
    """
    rows: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    for request in drawn.to_pylist():
        pixels, reason = request.pop("pixels"), request.pop("reason")
        if reason is not None:
            rejects.append(_reject(request, reason, REASONS[reason]))
            continue
        pixels_HWC = np.frombuffer(pixels, np.uint8).reshape(request["height"], request["width"], 3)
        story = provenance(request, draw, origin)
        try:
            data = encode_image(pixels_HWC, story, kind=draw.image, quality=draw.quality)
        except (ValueError, OSError) as error:
            rejects.append(_reject(request, "image_encoding", f"{REASONS['image_encoding']}: {error}"))
            continue
        name, file = request["request_id"].hex(), None
        if put_file is not None:
            file = file_key(name, draw.image, data)
            put_file(file, data)
        rows.append(
            {
                **{key: request[key] for key in ("unit", "row", *FIELDS, "extra")},
                "sample_id": request["request_id"],
                "key": name,
                "variant": 0,
                "bucket": f"{request['height']}x{request['width']}",
                "image": b"" if file else data,
                "file": file,
                "media_type": FORMATS[draw.image],
                "content_sha256": hashlib.sha256(data).digest(),
                "run_seed": draw.seed,
                "sampler": draw.sampler,
                "model_digest": origin.model_digest,
                "model_run_id": origin.model_run_id,
                "dataset_digest": origin.dataset_digest,
                "codec_sha256": origin.codec_sha256,
                "provenance": json.dumps(story, sort_keys=True, separators=(",", ":")),
            }
        )
    return pa.Table.from_pylist(rows, schema=IMAGES), pa.Table.from_pylist(rejects, schema=REJECTS)


def _reject(request: Mapping[str, Any], reason: str, message: str) -> dict[str, Any]:
    return {
        "unit": request["unit"],
        "row": request["row"],
        "uri": "",
        "key": request["request_id"].hex(),
        "outcome": "rejected",
        "reason": reason,
        "message": message,
    }


def file_key(name: str, kind: str, data: bytes) -> str:
    """Where the image of a request (its id in hex) lies: 256 folders keep listings short."""
    return f"{IMAGES_DIR}/{name[:2]}/{name}-{hashlib.sha256(data).hexdigest()[:16]}{SUFFIXES[kind]}"


# -- What people look at: contact sheet and gallery ------------------------------------------------------------


CONTACT_KEY = "contact.png"
GALLERY_KEY = "gallery.html"
THUMBNAIL = 256
_COLUMNS = ("sample_id", "image", "file", "label", "prompt", "seed", "provenance")


def show(uri: str, plan: pa.Table, wanted: Iterable[bytes], count: int, facts: dict[str, object]) -> dict[str, str]:
    """Write the two files into the dataset's root; {name: URI}, empty when no image is there to be shown.

    `plan` are the planned requests with their addresses, `wanted` the ids to choose from.
    """
    dataset: Dataset = Dataset.open_kind(uri, "images", "output.uri")
    names = set(wanted)
    written = dataset.state.covered
    for rejected in dataset.state.rejects.values():
        written = written - rejected
    candidates = plan.filter(pa.array(written.contains(plan["unit"].to_numpy(), plan["row"].to_numpy())))
    candidates = candidates.filter(pa.array([n in names for n in candidates["request_id"].to_pylist()], pa.bool_()))
    if candidates.num_rows == 0 or count == 0:
        return {}
    rows = _read(dataset, candidates, choose(candidates, count))
    images = [row["image"] or read_outside(dataset.root, row["file"]) for row in rows]
    captions = [caption_of(row, dataset.class_names) for row in rows]
    pictures = [
        PagePicture(
            thumbnail(image, THUMBNAIL),
            FORMATS["png"],
            caption,
            details=json.dumps(parse(OBJECT, row["provenance"].encode(), f"a provenance in {dataset.uri}"), indent=1),
        )
        for image, caption, row in zip(images, captions, rows, strict=True)
    ]
    note = f"{len(pictures)} of {candidates.num_rows:,} images, chosen by request id."
    page = render_page("gallery.html", title="Samples", facts=facts, pictures=pictures, note=note)
    dataset.root.put(CONTACT_KEY, contact_sheet(images, captions))
    dataset.root.put(GALLERY_KEY, page.encode())
    return {"contact": dataset.root.uri_of(CONTACT_KEY), "gallery": dataset.root.uri_of(GALLERY_KEY)}


def _read(dataset: Dataset, plan: pa.Table, chosen: Sequence[bytes]) -> list[dict[str, Any]]:
    """The rows of the chosen requests, in their order; reads only row groups that span one of their units."""
    place = {name: i for i, name in enumerate(chosen)}
    named = zip(plan["request_id"].to_pylist(), plan["unit"].to_pylist(), strict=True)
    units = sorted({unit for name, unit in named if name in place})
    spans = {
        (file.info.path, number): (info.first_unit, info.last_unit)
        for file in dataset.state.files
        for number, info in enumerate(file.info.row_groups)
    }
    rows: dict[bytes, dict[str, Any]] = {}
    for group in dataset.row_groups:
        first, last = spans[group.file, group.group]
        if any(first <= unit <= last for unit in units):
            table = dataset.read(group.index, _COLUMNS)
            mine = [i for i, name in enumerate(table["sample_id"].to_pylist()) if name in place]
            rows |= {row["sample_id"]: row for row in table.take(pa.array(mine, pa.int64())).to_pylist()}
    return [rows[name] for name in chosen]
