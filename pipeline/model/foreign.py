"""The denoising model of a plain diffusers pipeline directory, ready to be sampled from.

Only JSON and safetensors are read; the class must be one this package has an adapter for.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import InputError
from pipeline.model.adapters import ADAPTERS, TIME_SCALE, SD3Transformer2D
from pipeline.model.export import ExportInfo, file_sha256, load_weights
from pipeline.model.foreign_info import PipelineDir, read_pipeline_dir, refused
from pipeline.storage.root import Root


class PublishedSD3(SD3Transformer2D):
    """SD3Transformer2DModel as published: its pooled vector comes from the encoders, and no text is masked."""

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        labels_B: Tensor | None = None,
        text_BLD: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        pooled_BP: Tensor | None = None,
    ) -> Tensor:
        if pooled_BP is None:
            raise InputError(
                "SD3Transformer2DModel was called without a pooled text vector",
                key="text",
                rule="a published model reads the pooled states of its CLIP encoders",
            )
        self._check_size(*x_BCHW.shape[-2:])
        prediction: Tensor = self.inner(
            x_BCHW,
            timestep=t_B * TIME_SCALE,
            encoder_hidden_states=self._need_text(text_BLD),
            pooled_projections=pooled_BP,
            return_dict=False,
        )[0]
        return prediction[:, : x_BCHW.shape[1]]


def load_pipeline_dir(
    place: str | Root | PipelineDir, *, device: str | torch.device = "cpu"
) -> tuple[nn.Module, ExportInfo]:
    """The denoising model of a diffusers pipeline directory and what its files say about it; InputError."""
    found = (
        place
        if isinstance(place, PipelineDir)
        else read_pipeline_dir(place if isinstance(place, Root) else Root(place))
    )
    inner = _instantiate(found.class_name, found.config)
    with tempfile.TemporaryDirectory(prefix="latentloom-load-") as scratch:
        weights = _weights(found, Path(scratch))
    try:
        inner.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise refused(found.root, f"{found.component}: weights", str(error)) from error
    published = found.class_name == "SD3Transformer2DModel"
    adapter = PublishedSD3 if published else ADAPTERS[found.class_name]
    info = ExportInfo(**found.info)
    return adapter(inner, null_label=found.null_label).to(device).eval(), info


def _instantiate(class_name: str, config: dict[str, Any]) -> Any:
    import diffusers

    return getattr(diffusers, class_name).from_config(config)


def _weights(found: PipelineDir, scratch: Path) -> dict[str, Tensor]:
    component = found.root.child(found.component)
    weights: dict[str, Tensor] = {}
    digests = []
    for number, name in enumerate(found.weight_names):
        path = component.local_path(name)
        if path is None:
            path = scratch / f"{number}.safetensors"
            with component.open(name) as source, open(path, "wb") as sink:
                while chunk := source.read(8 << 20):
                    sink.write(chunk)
        digests.append(file_sha256(path))
        weights |= load_weights(path, component.uri_of(name))
    if ",".join(digests) != found.info["weights_sha256"]:
        raise refused(found.root, found.component, "its weights changed while they were read")
    return weights
