"""One image again from its own metadata: the proof that its provenance is complete."""

from __future__ import annotations

import logging
from dataclasses import replace

import pyarrow as pa
import torch

from pipeline.codec.info import codec_info
from pipeline.errors import InputError, argument_keys
from pipeline.media.images import read_provenance
from pipeline.model.read import read_model
from pipeline.sample.denoise import Denoiser, LatentDecoder, use_threads
from pipeline.sample.output import IMAGES, encode_rows
from pipeline.sample.plan import PLAN_SCHEMA
from pipeline.sample.prompts import PromptEmbedder
from pipeline.sample.provenance import Draw, check_origin, origin_of, request_of
from pipeline.sample.text import text_of

_log = logging.getLogger(__name__)


def regenerate(image: bytes, *, model_uri: str | None = None, codec_path: str | None = None) -> bytes:
    """The bytes of the image that `image` says it is, drawn anew; on a CPU they are the same bytes.

    Where there is no CUDA device, what was drawn on one is drawn on the CPU: its own provenance says so.
    `model_uri` and `codec_path` say where model and codec lie now, if no longer where the image names them.
    ConflictError when they are other ones; InputError when the image tells too little or can no longer be drawn.
    """
    story = read_provenance(image)
    request, draw, origin = request_of(story), draw_here(Draw(**story["draw"])), origin_of(story)
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


def draw_here(draw: Draw) -> Draw:
    """The draw as this machine can do it: without CUDA on the CPU, in its exact arithmetic."""
    if draw.device == "cpu" or torch.cuda.is_available():
        return draw
    _log.warning("the image was drawn on %s, which is not here: it is drawn on the CPU in float32", draw.device)
    return replace(draw, device="cpu", dtype="float32", compile=False)
