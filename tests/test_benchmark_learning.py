"""The proof on real pictures: what it measures with is right, and all of it runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.codec.codec import load_codec
from tests.benchmarks import learning, pca_codec
from tests.benchmarks.learning import ClassGaussians, LatentSet, features, held_out_losses, neighbours


@pytest.fixture
def data() -> LatentSet:
    """Two classes of correlated latents 2x1x2."""
    draws = torch.Generator().manual_seed(0)
    mix = torch.randn(2, 4, 4, generator=draws)
    labels = torch.arange(400) % 2
    flat = (mix[labels] @ torch.randn(400, 4, 1, generator=draws))[:, :, 0] + 3.0 * labels[:, None]
    return LatentSet(flat.reshape(-1, 2, 1, 2), labels, np.zeros((400, 8, 8, 3), np.uint8))


def test_the_gaussian_denoiser_is_the_conditional_expectation(data: LatentSet) -> None:
    """E[u | x_t] = E u + Cov(u, x_t) Var(x_t)^-1 (x_t - E x_t) of jointly normal u = noise - x0 and x_t."""
    gaussians = ClassGaussians(data, shrink=0.0)
    x, t = torch.randn(6, 2, 1, 2), torch.linspace(0.1, 0.9, 6)
    found = gaussians(x, t, torch.tensor([0, 1, 0, 1, 0, 1]))
    for i in range(6):
        rows, at = data.latents[data.labels == i % 2].flatten(1).double().numpy(), float(t[i])
        mean, s = rows.mean(0), np.cov(rows.T)
        covariance, variance = at * np.eye(4) - (1 - at) * s, (1 - at) ** 2 * s + at**2 * np.eye(4)
        expected = -mean + covariance @ np.linalg.solve(variance, x[i].flatten().double().numpy() - (1 - at) * mean)
        np.testing.assert_allclose(found[i].flatten().numpy(), expected, rtol=1e-6)


def test_draws_of_the_gaussians_have_their_moments_and_shrinking_mixes_covariances(data: LatentSet) -> None:
    torch.manual_seed(0)
    of = [torch.from_numpy(np.cov(data.latents[data.labels == k].flatten(1).numpy().T)) for k in range(2)]
    for shrink, covariance in ((0.0, of[1]), (0.5, 0.75 * of[1] + 0.25 * of[0])):
        drawn = ClassGaussians(data, shrink).draw(torch.ones(20_000, dtype=torch.long)).flatten(1)
        expected = data.latents[data.labels == 1].flatten(1).mean(0)
        torch.testing.assert_close(drawn.mean(0), expected, atol=0.1, rtol=0.0)
        torch.testing.assert_close(drawn.T.cov().double(), covariance, atol=0.3, rtol=0.05)


def test_no_denoiser_of_these_latents_is_better_than_that_of_their_gaussians(data: LatentSet) -> None:
    best = ClassGaussians(data, shrink=0.0)
    least = held_out_losses(best, data).mean()
    assert held_out_losses(ClassGaussians(data, shrink=1.0), data).mean() > least
    assert held_out_losses(lambda x, t, y: 0.9 * best(x, t, y), data).mean() > least
    assert held_out_losses(best, data).mean() == least  # the same question at every call


def test_a_copied_picture_is_near_its_original_and_far_from_the_next() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    training, others = features(pictures[:30]), features(pictures[30:])
    copies = features(np.clip(pictures[:10].astype(int) + 1, 0, 255).astype(np.uint8))
    assert neighbours(copies, training)["ratio"] < 0.2
    found = neighbours(others, training)
    assert found["ratio"] > 0.8
    assert found["low"] < found["distance"] < found["high"]


def test_the_codec_is_found_as_a_plug_in_and_keeps_what_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(pca_codec.install(tmp_path / "site")))
    smooth = np.linspace(0, 255, 4 * 16 * 24 * 3).reshape(4, 16, 24, 3).astype(np.uint8)
    pca_codec.fit(tmp_path / "codec", smooth)
    codec = load_codec(str(tmp_path / "codec"), kind=pca_codec.KIND)
    assert codec.info.latent_shape(16, 24) == (8, 4, 6)
    images = torch.from_numpy(smooth)
    latents = codec.encode(images)
    assert latents.shape == (4, 8, 4, 6)
    decoded = codec.decode(latents)
    assert (decoded.int() - images.int()).abs().max() <= 1
    # The kept directions are orthonormal: encoding what was decoded changes nothing but rounding.
    torch.testing.assert_close(codec.encode(decoded), latents, atol=0.02, rtol=0.0)


def test_a_folder_without_the_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        learning.main(["--data", str(tmp_path)])
    assert ended.value.code == 2
    assert f"--data {tmp_path}: no folder with train.parquet and heldout.parquet" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
def test_all_of_it_runs(shared_data: Path, tmp_path: Path) -> None:
    if not (shared_data / "cifar10").is_dir():
        pytest.skip(f"no cifar10/ in {shared_data}")
    learning.main(["--quick", "--data", str(shared_data / "cifar10"), "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "learning.json").read_text())
    assert figures["data"]["train"] == 2_000
    assert figures["data"]["codec_psnr_db"] > 20
    model = figures["models"]["unet2d"]
    # 40 steps teach little, but the job and the plain loop the same.
    assert model["loss"] == pytest.approx(model["plain_loss"], rel=0.05)
    assert figures["gaussian"]["frechet"]["value"] > figures["training_pictures"]["frechet"]["value"] > 0
    assert len(figures["bars"]) == 4
    with Image.open(tmp_path / "learning.png") as sheet:
        assert sheet.height == 10 * 32
