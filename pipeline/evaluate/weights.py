"""State dicts from files, without running anything in them: safetensors, or torch's own with weights only."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import InputError


def load_state_dict(path: str, key: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by name; InputError, naming the configuration `key`."""
    try:
        if path.endswith(".safetensors"):
            loaded = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
            raise ValueError("it holds something else than named tensors")
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(
            f"The weights {Path(path).name} cannot be read: {' '.join(str(error).split())[:200]}",
            key=key,
            value=path,
            rule="a state dict as .safetensors, or as .pth that holds tensors only",
            next_step="correct the path; convert other files with safetensors.torch.save_file",
        ) from None
    return dict(loaded)
