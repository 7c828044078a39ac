"""The regenerate job: one image again from its own metadata, compared with the one it came from. No Ray."""

from __future__ import annotations

import hashlib
from typing import Any

from pipeline.errors import InputError
from pipeline.result import JobResult
from pipeline.sample.config import RegenerateJobConfig
from pipeline.storage import Root
from pipeline.storage_errors import describe, storage_errors


def run(config: RegenerateJobConfig) -> JobResult:
    """Draw the image again and put it at `output`; status "identical", or "differs" (on another device)."""
    data, _ = _read(config)
    from pipeline.sample.regenerate import regenerate

    again = regenerate(data, model_uri=config.model_uri, codec_path=config.codec)
    try:
        place, _, name = config.output.rpartition("/")
        Root(place or ".").put(name, again)
    except storage_errors() as error:
        raise InputError(
            f"The image cannot be written: {describe(error)}", key="output", value=config.output
        ) from None
    same = again == data
    outputs = {"image": config.output, "sha256": hashlib.sha256(again).hexdigest()}
    return JobResult("identical" if same else "differs", {"images": 1, "identical": int(same)}, outputs)


def dry_run(config: RegenerateJobConfig) -> JobResult:
    """What the image says about itself; writes nothing."""
    _, told = _read(config)
    outputs = {"model": str(told["model"]["uri"]), "codec": str(told["codec"]["path"])}
    return JobResult("dry-run", {"images": 1}, {"request": str(told["request_id"]), **outputs})


def _read(config: RegenerateJobConfig) -> tuple[bytes, dict[str, Any]]:
    """The image's bytes and its provenance."""
    from pipeline.sample.images import read_provenance

    place, _, name = config.image.rpartition("/")
    try:
        data = Root(place or ".").read_bytes(name)
    except _unreadable() as error:
        raise InputError(
            f"The image cannot be read: {describe(error)}",
            key="image",
            value=config.image,
            rule="a PNG, JPEG or WebP file that jobs.sample made",
            next_step="correct the path",
        ) from None
    return data, read_provenance(data)


def _unreadable() -> tuple[type[Exception], ...]:
    return (*storage_errors(), ValueError)
