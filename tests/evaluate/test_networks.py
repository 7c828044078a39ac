"""LPIPS against torchmetrics, CLIP score against transformers, with random weights in the real layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import safetensors.torch
import torch
from evaluate_networks import linear_weights, make_whole_clip, random_backbone
from torchmetrics.functional.image import lpips
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pipeline.errors import InputError
from pipeline.evaluate.metrics import ClipScorer, Lpips, backbone_of


def images(n: int = 2, h: int = 40, w: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, h, w, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_that_of_torchmetrics_with_the_published_linear_weights(
    net: Literal["alex", "vgg"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs takes its backbone from torchvision; it gets one of the same layers and weights."""
    weights = random_backbone(net)
    features = backbone_of(net)
    features.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if "features." in k})
    monkeypatch.setattr(lpips, "_get_tv_model_features", lambda *_: features)
    theirs = lpips._LPIPS(net=net)
    linear = {k: v for k, v in theirs.state_dict().items() if k.startswith("lin") and k[3].isdigit()}
    x, y = images(seed=1), images(seed=2)
    with torch.no_grad():
        expected = theirs(*(v.permute(0, 3, 1, 2).float() / 127.5 - 1 for v in (x, y))).flatten()
    distances = Lpips(net, weights, linear)(x, y)
    # They add 1e-8 inside the root of the norm, the release 1e-10 outside.
    np.testing.assert_allclose(distances, expected.numpy(), rtol=1e-4)
    assert (distances > 0.01).all()


def test_lpips_of_equal_images_is_nothing_and_grows_with_noise() -> None:
    metric = Lpips("alex", random_backbone("alex"), linear_weights("alex"))
    x = images(3)
    assert (metric(x, x.clone()) == 0).all()
    noise = torch.randint(-60, 61, x.shape, generator=torch.Generator().manual_seed(3))
    near, far = (x + noise // 6).clamp(0, 255).to(torch.uint8), (x + noise).clamp(0, 255).to(torch.uint8)
    assert (metric(x, near) < metric(x, far)).all()


def test_lpips_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lack 0\.weight of shape \[64, 3, 3, 3\]"):
        Lpips("vgg", random_backbone("alex"), linear_weights("vgg"))
    with pytest.raises(InputError, match=r"lack lin0\.model\.1\.weight"):
        Lpips("alex", random_backbone("alex"), {})
    safetensors.torch.save_file(random_backbone("alex"), tmp_path / "alex.safetensors")
    torch.save(linear_weights("alex"), tmp_path / "linear.pth")
    loaded = Lpips.load("alex", str(tmp_path / "alex.safetensors"), str(tmp_path / "linear.pth"))
    assert loaded.digest == Lpips("alex", random_backbone("alex"), linear_weights("alex")).digest
    assert loaded.digest != Lpips("alex", random_backbone("alex", seed=9), linear_weights("alex")).digest
    with pytest.raises(InputError, match=r"lpips\.linear"):
        Lpips.load("alex", str(tmp_path / "alex.safetensors"), str(tmp_path / "none.pth"))


PROMPTS = ["a red circle", "the sky"]


def test_clip_score_is_the_cosine_of_transformers_own_features(tmp_path: Path) -> None:
    model, tokenizer = make_whole_clip(tmp_path)
    pictures = images(2, 8, 8).numpy()
    scores = ClipScorer(str(tmp_path))(pictures, PROMPTS)
    assert (scores > 0).all()
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    # logits_per_image is cos times the model's own scale.
    cosine = (out.logits_per_image / model.logit_scale.detach().exp()).diagonal().double().numpy()
    np.testing.assert_allclose(scores, 100 * np.clip(cosine, 0, None), rtol=1e-4, atol=1e-4)
    # A prompt's score does not depend on what stands beside it, nor on padding.
    np.testing.assert_allclose(ClipScorer(str(tmp_path))(pictures[1:], PROMPTS[1:])[0], scores[1], rtol=1e-5)


def test_clip_images_are_prepared_as_its_directory_says(tmp_path: Path) -> None:
    make_whole_clip(tmp_path)
    wide, prompts = images(4, 24, 60).numpy(), PROMPTS * 2
    scores = ClipScorer(str(tmp_path))(wide, prompts)
    assert (scores > 0).all()
    # The short side becomes the model's, the middle is cut out: what lies left and right of it does not count.
    cut = wide.copy()
    cut[:, :, :12], cut[:, :, 48:] = 0, 255
    np.testing.assert_allclose(ClipScorer(str(tmp_path))(cut, prompts), scores)
    own = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "image_processor_type": "CLIPImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    assert abs(ClipScorer(str(tmp_path))(wide, prompts) - scores).max() > 1e-3


def test_a_directory_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"CLIP model cannot be loaded[\s\S]*clip\.path"):
        ClipScorer(str(tmp_path))
    make_whole_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"preprocessor_config\.json"):
        ClipScorer(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights.pop("visual_projection.weight")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its weights lack visual_projection\.weight"):
        ClipScorer(str(tmp_path))
