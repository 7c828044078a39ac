"""CLIP score and LPIPS against their definitions, with random weights in the real layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from evaluate_networks import linear_weights, make_whole_clip, random_backbone
from torch import nn

from pipeline.errors import InputError
from pipeline.evaluate.clip import MEAN, STD, ClipScorer
from pipeline.evaluate.lpips import SCALE, SHIFT, TAPS, Lpips


def images(n: int = 2, h: int = 40, w: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, h, w, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_the_papers_sum_over_layers_and_places(net: str) -> None:
    backbone, linear = random_backbone(net), linear_weights(net)
    x, y = images(seed=1), images(seed=2)
    got = Lpips(net, backbone, linear)(x, y)
    # Equation 1 written out: one layer, one place at a time, from features computed without our network.
    expected = np.zeros(2)
    for layer, (fx, fy) in enumerate(zip(features_of(net, backbone, x), features_of(net, backbone, y), strict=True)):
        w_C = linear[f"lin{layer}.model.1.weight"].flatten().numpy().astype(np.float64)
        for image in range(2):
            _, height, width = fx[image].shape
            places = []
            for row in range(height):
                for column in range(width):
                    a, b = fx[image][:, row, column], fy[image][:, row, column]
                    a, b = a / (np.sqrt((a**2).sum()) + 1e-10), b / (np.sqrt((b**2).sum()) + 1e-10)
                    places.append((w_C * (a - b) ** 2).sum())
            expected[image] += np.mean(places)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert (got > 0).all()


def features_of(net: str, backbone: dict[str, torch.Tensor], images_NHWC: torch.Tensor) -> list[np.ndarray]:
    """Taps of torchvision's layout walked by the names in its state dict."""
    pools = {"alex": {2: (3, 2), 5: (3, 2)}, "vgg": {4: (2, 2), 9: (2, 2), 16: (2, 2), 23: (2, 2)}}[net]
    x = images_NHWC.permute(0, 3, 1, 2).double() / 127.5 - 1
    x = (x - torch.tensor(SHIFT).view(1, 3, 1, 1)) / torch.tensor(SCALE).view(1, 3, 1, 1)
    out = []
    for index in range(TAPS[net][-1] + 1):
        name = f"features.{index}"
        if f"{name}.weight" in backbone:
            stride = 4 if (net, index) == ("alex", 0) else 1
            padding = {("alex", 0): 2, ("alex", 3): 2}.get((net, index), 1)
            weight, bias = backbone[f"{name}.weight"].double(), backbone[f"{name}.bias"].double()
            x = nn.functional.conv2d(x, weight, bias, stride=stride, padding=padding)
        elif index in pools:
            x = nn.functional.max_pool2d(x, *pools[index])
        else:
            x = x.clamp_min(0)
        if index in TAPS[net]:
            out.append(x.numpy())
    return out


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
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    with torch.no_grad():
        out = model(**tokens, pixel_values=pixels)
    # logits_per_image is cos times the model's own scale.
    cosine = (out.logits_per_image / model.logit_scale.detach().exp()).diagonal().double().numpy()
    np.testing.assert_allclose(scores, 100 * np.clip(cosine, 0, None), rtol=1e-4, atol=1e-4)
    # A prompt's score does not depend on what stands beside it, nor on padding.
    np.testing.assert_allclose(ClipScorer(str(tmp_path))(pictures[1:], PROMPTS[1:])[0], scores[1], rtol=1e-5)


@pytest.mark.parametrize(("size", "box"), [((24, 36), (2, 0, 10, 8)), ((36, 24), (0, 2, 8, 10))])
def test_clip_images_are_resized_and_cropped_as_its_processor_does(
    tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    from PIL import Image

    make_whole_clip(tmp_path)
    scorer = ClipScorer(str(tmp_path))
    coarse = images(1, size[0] // 4, size[1] // 4).permute(0, 3, 1, 2).float()
    picture = nn.functional.interpolate(coarse, size, mode="bilinear").round().to(torch.uint8).permute(0, 2, 3, 1)
    mine = scorer._pixels(picture)[0]
    small = (12, 8) if size[1] > size[0] else (8, 12)
    theirs = Image.fromarray(picture[0].numpy()).resize(small, Image.Resampling.BICUBIC).crop(box)
    values = torch.from_numpy(np.asarray(theirs).copy()).permute(2, 0, 1).float() / 255
    expected = (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert mine.shape == (3, 8, 8)
    assert (mine - expected).abs().max() < 2 / 255 / min(STD)


def test_a_directory_that_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"CLIP model cannot be loaded[\s\S]*clip\.path"):
        ClipScorer(str(tmp_path))
    make_whole_clip(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        ClipScorer(str(tmp_path))
    (tmp_path / "preprocessor_config.json").write_text("[]")
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    weights.pop("visual_projection.weight")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"its weights lack visual_projection\.weight"):
        ClipScorer(str(tmp_path))
