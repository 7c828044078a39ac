"""Latents, codecs and models for other programs: `import latentloom as ll`.

    latents = ll.open_latents("s3://bucket/latents")    # len, [i], iteration, .to_arrow(), .files(), .statistics
    for batch in latents.stream(batch_size=256):        # one epoch: torch tensors, normalised as in training
        ...
    codec = ll.load_codec("vae")                        # pixels to raw latents and back
    model = ll.load_model("runs/model/model")           # an export, a checkpoint or a published pipeline
    images = model.sample(labels=[3, 7], seed=1)        # uint8 [n, h, w, 3]

The jobs are the command `latentloom`. Nothing is imported before it is asked for, torch where a tensor is. Errors are
`PipelineError`s whose messages have the key, the value, the rule and the next step. What is not named here lies in
`pipeline`, whose names may change.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.codec.codec import load_codec
    from pipeline.errors import ConfigError, ConflictError, InputError, PipelineError

    from .latents import Latents, open_latents
    from .tensors import LatentBatches, LoadedModel, load_model

try:
    __version__ = metadata.version("latentloom")
except metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0+checkout"

__all__ = [
    "ConfigError",
    "ConflictError",
    "InputError",
    "LatentBatches",
    "Latents",
    "LoadedModel",
    "PipelineError",
    "load_codec",
    "load_model",
    "open_latents",
]

# Where a name lies: relative to this package, whatever it is called.
_PLACES = {
    **dict.fromkeys(("Latents", "open_latents"), ".latents"),
    **dict.fromkeys(("LatentBatches", "LoadedModel", "load_model"), ".tensors"),
    **dict.fromkeys(("ConfigError", "ConflictError", "InputError", "PipelineError"), "pipeline.errors"),
    "load_codec": "pipeline.codec.codec",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    from pipeline.config import check_installed

    check_installed()
    return getattr(importlib.import_module(_PLACES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
