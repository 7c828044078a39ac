"""Which text encoders a model reads, and how their outputs become its input. Imports no torch.

Prompts become what the model was trained on: for a model of this project the encoder that its training embedded
captions with, stored precision and mask included; for a published pipeline its own encoders, as its class calls them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ConflictError, InputError
from pipeline.model.foreign_info import PipelineDir
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


def text_of_export(info: Mapping[str, Any]) -> TextSpec | None:
    """The text side of an export (`info` as stored); None when the model takes no text.

    InputError when its encoder is not there, ConflictError when it is another one than the model learned from.
    """
    told = info.get("text")
    if info.get("text_dim") is None or not told:
        return None
    try:
        encoder = TextEncoderConfig.model_validate(told["encoder"], strict=False)
        wanted = told["fingerprint"]
    except (ValidationError, KeyError, TypeError) as error:
        raise InputError(f"The export does not describe its text encoder: {error}", key="model.uri") from None
    found = encoder_files(encoder).fingerprint(encoder)
    if wanted not in (found, _digest(found)):
        raise ConflictError(
            f"The text encoder at {encoder.path} is not the one the model learned from",
            key="model.uri",
            value=encoder.path,
            rule="prompts are embedded by the encoder that embedded the captions",
            next_step="restore the encoder's files",
        )
    return TextSpec((encoder,), "single", True, int(info["text_dim"]), _digest(found))


def text_of_pipeline(found: PipelineDir) -> TextSpec | None:
    """The text side of a pipeline directory; None when it has none. InputError when its encoders cannot be used."""
    if not found.encoders:
        return None
    local = found.root.local_path()
    if local is None:
        raise InputError(
            "The text encoders of a pipeline are read from local disk",
            key="model.uri",
            value=found.root.uri,
            next_step="copy the pipeline directory to every node, under one path",
        )
    encoders = tuple(
        TextEncoderConfig(
            name=e.name,
            path=str(local),
            subfolder=e.subfolder,
            tokenizer_subfolder=e.tokenizer_subfolder,
            layer="penultimate" if e.layer == "penultimate" else "last",
            pooled="projection" if e.pooled == "projection" else "none",
            max_length=e.max_length,
        )
        for e in found.encoders
    )
    digest = _digest([encoder_files(e).fingerprint(e) for e in encoders])
    return TextSpec(encoders, found.arrangement, False, int(found.info["text_dim"]), digest)


def _digest(value: Any) -> str:
    return hashlib.blake2b(canonical_json(value), digest_size=16).hexdigest()
