"""Feature spaces: how sets of images are compared, by whoever judges them and while a model is trained.

    images uint8 [n, h, w, 3]  --networks-->  features [n, d]  --statistics-->  sums that merge  -->  distances

This module is their configuration and imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config import StrictModel

# The Inception of published FIDs: NVIDIA's TorchScript of the network of 2015-12-05, by the hash that k-diffusion's
# evaluation.py pins. It resizes images itself, as TensorFlow 1 did.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION = f"inception-2015-12-05.pt (SHA-256 {INCEPTION_SHA256})"
# What `fid: published` makes of the extractor: pixels go into that network as they are.
PUBLISHED_EXTRACTOR: dict[str, str | None] = {"kind": "torchscript", "resolution": None, "values": "uint8"}


class ExtractorConfig(StrictModel):
    """The feature space in which sets of images are compared."""

    kind: Literal["classifier", "torchscript", "torchvision", "timm"] = Field(
        "classifier",
        description="classifier: the one fitted here; torchscript: a file; torchvision, timm: a network by name "
        "(optional packages).",
    )
    path: str | None = Field(
        None,
        description="torchscript: the file; images NCHW in, features [n, d] or (features, logits) out. Where its "
        "forward takes return_features, as the usual Inception's, features are asked for by it.",
    )
    name: str | None = Field(None, description="torchvision or timm: the network's name, such as inception_v3.")
    weights: str | None = Field(
        None, description="Its state dict (.safetensors, or .pth of tensors); null: what the package downloads."
    )
    resolution: int | None = Field(
        None,
        ge=8,
        le=2048,
        description="Side that images are resized to; null: the network's own, torchscript: none.",
    )
    values: Literal["imagenet", "minus_one_one", "zero_one", "uint8"] = Field(
        "imagenet", description="How pixel values go in: ImageNet's mean and deviation, [-1, 1], [0, 1], or 0..255."
    )

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        if self.kind == "torchscript" and self.path is None:
            raise ValueError("extractor.kind=torchscript needs extractor.path")
        if self.kind in ("torchvision", "timm") and self.name is None:
            raise ValueError(f"extractor.kind={self.kind} needs extractor.name")
        return self
