"""Which text encoders a model reads, and how their outputs become its input. Imports no torch.

Prompts become what the model was trained on: for a model of this project the encoder that its training embedded
captions with, stored precision and mask included; for a published pipeline its own encoders, as its class calls them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ConflictError, InputError
from pipeline.model.published import INDEX, PublishedPipeline, refused
from pipeline.model.read import StoredModel
from pipeline.store.ledger.layout import canonical_json
from pipeline.text.config import TextEncoderConfig
from pipeline.text.files import encoder_files


@dataclass(frozen=True)
class TextSpec:
    """Encoders in order and their arrangement: "single", or "sd3" (two CLIPs and perhaps a T5).

    `masked`: padding is hidden from the model, which is trained so here; published pipelines show it. `width` is
    what one token's vector is widened to in the sd3 arrangement. `digest` covers every file that decides a number.
    """

    encoders: tuple[TextEncoderConfig, ...]
    arrangement: str
    masked: bool
    width: int
    digest: str


def text_of(model: StoredModel) -> TextSpec | None:
    """The text side of a model; None when it reads no text.

    InputError when its encoders cannot be used, ConflictError when they are others than the model learned from.
    """
    width = model.info.text_dim
    if width is None:
        return None
    if isinstance(model.place, PublishedPipeline):
        return _of_pipeline(model.place, width)
    reference = model.info.text
    if reference is None:
        return None
    try:
        encoder = TextEncoderConfig.model_validate(reference.encoder, strict=False)
    except ValidationError as error:
        raise InputError(f"The model does not describe its text encoder: {error}", key="model.uri") from None
    fingerprint = encoder_files(encoder).fingerprint(encoder)
    if reference.fingerprint not in (fingerprint, _digest(fingerprint)):
        raise ConflictError(
            f"The text encoder at {encoder.path} is not the one the model learned from",
            key="model.uri",
            value=encoder.path,
            rule="prompts are embedded by the encoder that embedded the captions",
            next_step="restore the encoder's files",
        )
    return TextSpec((encoder,), "single", True, width, _digest(fingerprint))


def _of_pipeline(pipeline: PublishedPipeline, width: int) -> TextSpec:
    if not pipeline.encoders:
        raise refused(
            pipeline.root,
            f"{INDEX}: its text encoders",
            "a UNet2DConditionModel reads text of one encoder, SD3Transformer2DModel of two or three",
        )
    local = pipeline.root.local_path()
    if local is None:
        raise InputError(
            "The text encoders of a pipeline are read from local disk",
            key="model.uri",
            value=pipeline.root.uri,
            next_step="copy the pipeline directory to every node, under one path",
        )
    encoders = tuple(
        TextEncoderConfig(
            name=e.name,
            path=str(local),
            subfolder=e.subfolder,
            tokenizer_subfolder=e.tokenizer_subfolder,
            layer=e.layer,
            pooled=e.pooled,
            max_length=e.max_length,
        )
        for e in pipeline.encoders
    )
    digest = _digest([encoder_files(e).fingerprint(e) for e in encoders])
    return TextSpec(encoders, pipeline.arrangement, False, width, digest)


def _digest(value: Any) -> str:
    return hashlib.blake2b(canonical_json(value), digest_size=16).hexdigest()
