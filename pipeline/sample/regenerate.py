"""The regenerate job: one image again from its own metadata, compared with the one it came from. No Ray.

On the CPU that the image was drawn on, with the same versions, the bytes are the same. Elsewhere sums are taken in
another order: the pixels are compared, and count as the same up to `TOLERANCE_LEVELS` on average.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, Field, ValidationError

from pipeline.codec.info import codec_info
from pipeline.diffusion.solvers import SamplerName
from pipeline.errors import InputError, argument_keys
from pipeline.media.images import decode_image, read_provenance
from pipeline.model.read import read_model
from pipeline.result import JobResult
from pipeline.sample.config import RegenerateJobConfig
from pipeline.sample.output import IMAGES, encode_rows
from pipeline.sample.plan import PLAN_SCHEMA
from pipeline.sample.prepare import text_of
from pipeline.sample.provenance import TOLERANCE_LEVELS, Draw, check_origin, origin_of, request_of
from pipeline.sample.requests import MAX_GUIDANCE, MAX_SIDE, MAX_STEPS, MAX_TEXT_BYTES
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import place_of
from pipeline.storage.trust import follow

if TYPE_CHECKING:
    import numpy as np


# -- One image again from its own metadata: the proof that its provenance is complete --------------------------


_log = logging.getLogger(__name__)
_MAX_PIXELS = 1 << 27
_Text = Field(None, max_length=MAX_TEXT_BYTES)
_Place = Field(..., min_length=1, max_length=4096)


class _Asked(BaseModel, strict=True):
    """What a request may be, wherever it comes from: the limits of `requests`."""

    label: int | None = None
    prompt: str | None = _Text
    negative_prompt: str | None = _Text
    extra: str | None = _Text
    seed: int = Field(..., ge=0, lt=2**63)
    height: int = Field(..., ge=1, le=MAX_SIDE)
    width: int = Field(..., ge=1, le=MAX_SIDE)
    steps: int = Field(..., ge=1, le=MAX_STEPS)
    guidance: float = Field(..., ge=0, le=MAX_GUIDANCE)
    guidance_low: float | None = None
    guidance_high: float | None = None


class _Drawn(BaseModel, strict=True, extra="forbid"):
    """What a `Draw` may be."""

    seed: int = Field(..., ge=0, lt=2**63)
    sampler: SamplerName
    shift: float = Field(..., gt=0, allow_inf_nan=False)
    batch_size: int = Field(..., ge=1, le=4096)
    device: Literal["cpu", "cuda"]
    threads: int = Field(..., ge=1, le=1024)
    dtype: Literal["float32", "bfloat16", "float16"]
    image: Literal["png", "jpeg", "webp"]
    quality: int = Field(..., ge=1, le=100)
    compile: bool = False


class _Model(BaseModel, strict=True):
    uri: str = _Place
    digest: str
    run_id: str | None
    ema: str | None


class _Dataset(BaseModel, strict=True):
    uri: str | None
    digest: str | None


class _Codec(BaseModel, strict=True):
    path: str = _Place
    weights_sha256: str


class _Story(BaseModel, strict=True):
    """A provenance whose every field is of its kind and within its bounds: an image may say anything."""

    format: str
    request_id: str
    request: _Asked
    draw: _Drawn
    model: _Model
    dataset: _Dataset
    codec: _Codec
    versions: dict[str, str]
    mixture: list[tuple[str, str, float]] = []


def regenerate(
    image: bytes,
    *,
    model_uri: str | None = None,
    codec_path: str | None = None,
    places: Sequence[str] = (),
    max_pixels: int = _MAX_PIXELS,
) -> bytes:
    """The bytes of the image that `image` says it is, drawn anew; on a CPU they are the same bytes.

    Where there is no CUDA device, what was drawn on one is drawn on the CPU: its own provenance says so.
    `model_uri` and `codec_path` say where model and codec lie; what the image names instead is followed only below
    `places`. ConflictError when they are other ones; InputError when the image tells too little, names other places
    or a batch of more than `max_pixels`, or can no longer be drawn.
    """
    from pipeline.sample.denoise import Denoiser, LatentDecoder, use_threads
    from pipeline.sample.prompts import PromptEmbedder

    story = checked_provenance(image, max_pixels)
    request, draw, origin = request_of(story), draw_here(Draw(**story["draw"])), origin_of(story)
    named = {"model_uri": origin.model_uri} if model_uri is None else {}
    named |= {"codec": origin.codec_path} if codec_path is None else {}
    follow(named, places, written_in="the image", allow_by="places")
    model_uri, codec_path = model_uri or origin.model_uri, codec_path or origin.codec_path
    model = read_model(model_uri, origin.ema)
    text, reference = text_of(model), model.info.codec
    with argument_keys({"path": "codec"}):
        codec = codec_info(codec_path, reference.revision, reference.kind)
    here = replace(
        origin, model_digest=model.digest(None if text is None else text.digest), codec_sha256=codec.weights_sha256
    )
    check_origin(story, here)
    use_threads(draw.threads)
    plan_row = pa.Table.from_pylist([{**request, "unit": 0, "row": 0}], schema=PLAN_SCHEMA)
    embed = None if text is None else PromptEmbedder(text, device=draw.device)
    latents = Denoiser.load(model.uri, draw, ema=model.info.ema, embed=embed)(plan_row)
    decoder = LatentDecoder(
        codec_path,
        kind=reference.kind,
        revision=reference.revision,
        batch_size=draw.batch_size,
        device=draw.device,
        dtype=draw.dtype,
    )
    rows, rejects = encode_rows(decoder(latents), draw, origin)
    if rejects.num_rows:
        raise InputError(
            f"The image cannot be drawn again: {rejects['message'][0].as_py()}",
            key="request_id",
            value=story["request_id"],
        )
    assert rows.schema == IMAGES
    data: bytes = rows["image"][0].as_py()
    return data


def checked_provenance(image: bytes, max_pixels: int = _MAX_PIXELS) -> dict[str, Any]:
    """The provenance inside an image, each field of its kind and within its bounds; InputError names the first."""
    story = read_provenance(image)
    try:
        checked = _Story.model_validate(story)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(
            f"The provenance of the image cannot be used: {first['msg']}",
            key=".".join(str(part) for part in first["loc"]),
            value=str(first["input"])[:200],
            rule="an image is drawn again from what this project wrote into it, within the limits of a request",
            next_step="use an unedited copy of the image",
        ) from None
    pixels = checked.draw.batch_size * checked.request.height * checked.request.width
    if pixels > max_pixels:
        raise InputError(
            f"The image says it was drawn in batches of {pixels:,} pixels",
            key="max_pixels",
            value=max_pixels,
            rule="what an image asks for is bounded here, not there",
            next_step=f"where you trust the image and have the memory, set max_pixels={pixels}",
        )
    return story


def draw_here(draw: Draw) -> Draw:
    """The draw as this machine can do it: without CUDA on the CPU, in its exact arithmetic."""
    import torch

    if draw.device == "cpu" or torch.cuda.is_available():
        return draw
    _log.warning("the image was drawn on %s, which is not here: it is drawn on the CPU in float32", draw.device)
    return replace(draw, device="cpu", dtype="float32", compile=False)


@dataclass(frozen=True)
class Difference:
    """How far two images of one size are apart, in levels of 0..255; `psnr_db` is None where they are equal."""

    largest: int
    mean: float
    psnr_db: float | None

    @property
    def tolerable(self) -> bool:
        """Whether the two count as one image drawn on two machines."""
        return self.mean <= TOLERANCE_LEVELS

    def figures(self) -> dict[str, float]:
        """As a job's answer tells it."""
        figures = {"largest_difference": float(self.largest), "mean_difference": self.mean}
        return figures if self.psnr_db is None else {**figures, "psnr_db": self.psnr_db}


def difference(one_HWC: np.ndarray, other_HWC: np.ndarray) -> Difference:
    """The difference of two uint8 images [h, w, 3] of one size."""
    gaps = abs(one_HWC.astype(int) - other_HWC.astype(int))
    mean_square = float((gaps**2).mean())
    psnr_db = 10 * math.log10(255**2 / mean_square) if mean_square else None
    return Difference(int(gaps.max()), float(gaps.mean()), psnr_db)


def run(config: RegenerateJobConfig) -> JobResult:
    """Draw the image again and put it at `output`; the status says how it came out.

    "identical": the same bytes; "within tolerance": pixels as near as another device or version brings them;
    "differs": neither. The figures tell the difference, the details which device drew then and now.
    """
    data, provenance = _read(config)

    again = regenerate(
        data,
        model_uri=config.model_uri,
        codec_path=config.codec,
        places=config.places,
        max_pixels=config.max_pixels,
    )
    try:
        root, name = place_of(config.output)
        root.put(name, again)
    except _unreadable() as error:
        raise InputError(
            f"The image cannot be written: {describe(error)}", key="output", value=config.output
        ) from None
    same, apart = again == data, difference(decode_image(data), decode_image(again))
    status = "identical" if same else "within tolerance" if apart.tolerable else "differs"
    counts = {"images": 1, "identical": int(same), "within_tolerance": int(same or apart.tolerable)}
    devices = {"device_then": provenance["draw"]["device"], "device_now": read_provenance(again)["draw"]["device"]}
    outputs = {"image": config.output, "sha256": hashlib.sha256(again).hexdigest()}
    return JobResult(status, counts, outputs, figures=apart.figures(), details=devices)


def dry_run(config: RegenerateJobConfig) -> JobResult:
    """What the image says about itself; writes nothing."""
    _, provenance = _read(config)
    outputs = {"model": str(provenance["model"]["uri"]), "codec": str(provenance["codec"]["path"])}
    return JobResult("dry-run", {"images": 1}, {"request": str(provenance["request_id"]), **outputs})


def _read(config: RegenerateJobConfig) -> tuple[bytes, dict[str, Any]]:
    """The image's bytes and its provenance."""

    try:
        root, name = place_of(config.image)
        data = root.read_bytes(name)
    except _unreadable() as error:
        raise InputError(
            f"The image cannot be read: {describe(error)}",
            key="image",
            value=config.image,
            rule="a PNG, JPEG or WebP file that jobs.sample made",
            next_step="correct the path",
        ) from None
    return data, checked_provenance(data, config.max_pixels)


def _unreadable() -> tuple[type[Exception], ...]:
    return (*storage_errors(), ValueError)
