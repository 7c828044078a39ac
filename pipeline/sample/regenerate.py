"""The regenerate job: one image again from its own metadata, compared with the one it came from. No Ray.

On the CPU that the image was drawn on, with the same versions, the bytes are the same. Elsewhere sums are taken in
another order: the pixels are compared, and count as the same up to `TOLERANCE_LEVELS` on average.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, cast

import pyarrow as pa
from pydantic import ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.codec.codec import codec_info
from pipeline.diffusion.solvers import SamplerName
from pipeline.errors import InputError, argument_keys
from pipeline.media import decode_image, read_provenance
from pipeline.model.read import read_model
from pipeline.result import JobResult
from pipeline.sample.config import MAX_BATCH_PIXELS, RegenerateJobConfig
from pipeline.sample.output import IMAGES, encode_rows
from pipeline.sample.plan import PLAN_SCHEMA, StoredRequest
from pipeline.sample.prepare import text_of
from pipeline.sample.provenance import FORMAT, TOLERANCE_LEVELS, Draw, check_origin, origin_of, request_of
from pipeline.sample.requests import untrained
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import place_of
from pipeline.storage.stored import OPEN, parse
from pipeline.storage.trust import follow

if TYPE_CHECKING:
    import numpy as np


# -- One image again from its own metadata: the proof that its provenance is complete --------------------------


_log = logging.getLogger(__name__)


_Place = Annotated[str, Field(min_length=1, max_length=4096)]


@with_config(OPEN)
class _Model(TypedDict):
    uri: _Place
    digest: str
    run_id: str | None
    ema: str | None


@with_config(OPEN)
class _Dataset(TypedDict):
    uri: str | None
    digest: str | None


@with_config(OPEN)
class _Codec(TypedDict):
    path: _Place
    weights_sha256: str


@with_config(ConfigDict(strict=True, extra="forbid"))
class _Drawn(TypedDict):
    """What a `Draw` may be."""

    device: Literal["auto", "cpu", "cuda"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    image: Literal["png", "jpeg", "webp"]
    quality: Annotated[int, Field(ge=1, le=100)]
    seed: Annotated[int, Field(ge=0, lt=1 << 64)]
    sampler: SamplerName
    shift: Annotated[float, Field(gt=0, le=1e6)]
    batch_size: Annotated[int, Field(ge=1, le=1 << 16)]
    threads: Annotated[int, Field(ge=1, le=1 << 12)]
    compile: NotRequired[bool]
    shift_by_size: NotRequired[bool]


@with_config(OPEN)
class _Story(TypedDict):
    format: str
    request_id: str
    request: StoredRequest
    draw: _Drawn
    model: _Model
    dataset: _Dataset
    mixture: NotRequired[list[tuple[str | None, str | None, float]]]
    codec: _Codec
    versions: dict[str, str]


_STORY = TypeAdapter(_Story)
_ORIGINAL = "use an unedited copy of the image"


def checked_story(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A provenance whose fields are what they must be; InputError names the image and every other one."""
    if found.get("format") != FORMAT:
        raise InputError(
            f"The provenance of {where} has the format {found.get('format')!r}",
            key="format",
            rule=f"known is {FORMAT!r}",
            next_step="upgrade latentloom",
        )
    data = json.dumps(found).encode()
    story = parse(_STORY, data, f"the provenance of {where}", next_step=_ORIGINAL)
    return cast(dict[str, Any], story)


def regenerate(
    image: bytes,
    *,
    model_uri: str | None = None,
    codec_path: str | None = None,
    places: Sequence[str] = (),
    max_pixels: int = MAX_BATCH_PIXELS,
) -> bytes:
    """The bytes of the image that `image` says it is, drawn anew; on a CPU they are the same bytes.

    Where there is no CUDA device, what was drawn on one is drawn on the CPU: its own provenance says so.
    `model_uri` and `codec_path` say where model and codec lie; what the image names instead is followed only below
    `places`. ConflictError when they are other ones; InputError when the image tells too little, names other places
    or a batch of more than `max_pixels`, or can no longer be drawn.
    """
    from pipeline.sample.denoise import Denoiser, LatentDecoder, use_threads
    from pipeline.text.encoder import PromptEmbedder

    story = checked_provenance(image, "this image", max_pixels)
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
    for _, fault in untrained(request, model.info.trained_on, distilled=model.info.model.distilled):
        raise InputError(
            f"The image {fault}",
            key="request",
            value=story["request_id"],
            rule="a model draws what a share of its training showed",
            next_step="draw with jobs.sample what the model was trained on",
        )
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


def checked_provenance(image: bytes, where: str, max_pixels: int = MAX_BATCH_PIXELS) -> dict[str, Any]:
    """The provenance inside an image, each field of its kind and within its bounds; InputError names what is not."""
    story = checked_story(read_provenance(image), where)
    pixels = story["draw"]["batch_size"] * story["request"]["height"] * story["request"]["width"]
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
    try:
        return data, checked_provenance(data, config.image, config.max_pixels)
    except InputError as error:
        raise error if error.key == "max_pixels" else error.but(key="image", value=config.image) from None


def _unreadable() -> tuple[type[Exception], ...]:
    return (*storage_errors(), ValueError)
