"""CLIP score: how well an image fits its prompt, 100 max(cos(image, text), 0).

Hessel, Holtzman, Forbes, Le Bras, Choi, "CLIPScore", 2021, equation 1, with the weight 100 that is usual for
generated images in place of their 2.5. Images are brought into CLIP's form as its own processor does: the short side
resized (bicubic), the middle square cut out, the values normalised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor

from pipeline.errors import InputError, PipelineError

# OpenAI's CLIP, where a directory says nothing else (preprocessor_config.json).
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """A CLIP model of a local directory in transformers layout (config, safetensors, tokenizer files)."""

    def __init__(self, path: str, *, device: str = "cpu") -> None:
        self._model, self._tokenizer = _load(path)
        self._model.requires_grad_(False).eval().to(device)
        self._device = device
        self._side = int(self._model.config.vision_config.image_size)
        self._length = int(self._model.config.text_config.max_position_embeddings)
        told = _preprocessor(Path(path))
        self._mean, self._std = (
            torch.tensor(told.get(name, default), device=device).reshape(1, 3, 1, 1)
            for name, default in (("image_mean", MEAN), ("image_std", STD))
        )

    @torch.inference_mode()
    def __call__(self, images_NHWC: npt.NDArray[np.uint8], prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        """The score of each image with its prompt, float64 [n]; prompts are cut to what the model can hold."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        text = self._model.text_projection(
            self._model.text_model(
                input_ids=tokens["input_ids"].to(self._device),
                attention_mask=tokens["attention_mask"].to(self._device),
            ).pooler_output
        )
        pixels = self._pixels(torch.from_numpy(np.ascontiguousarray(images_NHWC)))
        image = self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)
        cosine = functional.cosine_similarity(image.double(), text.double(), dim=1)
        scores: npt.NDArray[np.float64] = (100 * cosine.clamp_min(0)).cpu().numpy()
        return scores

    def _pixels(self, images_NHWC: Tensor) -> Tensor:
        x = images_NHWC.to(self._device).permute(0, 3, 1, 2).float()
        height, width = x.shape[2:]
        short = min(height, width)
        size = (round(self._side * height / short), round(self._side * width / short))
        if size != (height, width):
            x = functional.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
        top, left = (size[0] - self._side) // 2, (size[1] - self._side) // 2
        x = x[:, :, top : top + self._side, left : left + self._side]
        return (x / 255 - self._mean) / self._std


def _load(path: str) -> tuple[Any, Any]:
    import transformers

    verbosity = transformers.logging.get_verbosity()
    try:
        transformers.logging.set_verbosity_error()
        model, report = transformers.CLIPModel.from_pretrained(
            path, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except PipelineError:  # SIGTERM arrives as one
        raise
    except Exception as error:  # noqa: BLE001 - the library raises kinds of its own, undocumented, for damaged files
        raise _unusable(path, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        raise _unusable(path, f"its weights lack {sorted(report['missing_keys'])[0]}")
    return model, tokenizer


def _preprocessor(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / "preprocessor_config.json").read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise _unusable(str(folder), f"preprocessor_config.json is no JSON: {error}") from None
    return told if isinstance(told, dict) else {}


def _unusable(path: str, why: str) -> InputError:
    return InputError(
        f"The CLIP model cannot be loaded: {why}",
        key="clip.path",
        value=path,
        rule="a directory with a whole CLIPModel in safetensors and its tokenizer",
        next_step="copy the files again, or leave clip out",
    )
