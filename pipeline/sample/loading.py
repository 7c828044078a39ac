"""A model ready to draw, whichever form it lies in: an export, a training checkpoint, a diffusers pipeline."""

from __future__ import annotations

from torch import nn

from pipeline.model.checkpoints import find_checkpoint
from pipeline.model.export import ExportInfo, load_export
from pipeline.model.foreign import load_pipeline_dir
from pipeline.model.foreign_info import is_pipeline_dir
from pipeline.model.from_checkpoint import load_checkpoint
from pipeline.sample.model import read_model
from pipeline.storage.root import Root


def load_model(uri: str, ema: str | None = None) -> tuple[nn.Module, ExportInfo]:
    """The model that `read_model(uri, ema)` describes, in evaluation mode, its files checked; InputError."""
    root = Root(uri)
    if is_pipeline_dir(root):
        return load_pipeline_dir(root)
    place = find_checkpoint(root)
    if place is None:
        return load_export(root)
    name = str(read_model(uri, ema).ema)
    return load_checkpoint(place.root, place.complete.name, place.complete.marker, name)
