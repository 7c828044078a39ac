"""Contact sheet and gallery of a finished output: a bounded choice of its images, read back from the store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa

from pipeline.media.images import FORMATS, caption_of, choose, contact_sheet, thumbnail
from pipeline.media.pages import PagePicture, render_page
from pipeline.storage.stored import OBJECT, parse
from pipeline.store.read.dataset import Dataset, read_outside

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
    captions = [caption_of(row) for row in rows]
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
