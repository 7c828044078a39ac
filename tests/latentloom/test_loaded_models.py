"""Codecs and models by one call each: what jobs.sample would draw, and what is refused."""

from __future__ import annotations

from pathlib import Path

import latentloom as ll
import pytest
import torch

from pipeline.config import load_config
from pipeline.sample.config import SampleJobConfig
from pipeline.sample.denoise import Denoiser, LatentDecoder
from pipeline.sample.prepare import on_device, prepare
from tests.sample.conftest import Tiny, make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> ll.LoadedModel:
    return ll.load_model(tiny.model_uri, device="cpu")


def test_images_are_those_of_the_sample_job(tiny: Tiny, model: ll.LoadedModel) -> None:
    images = model.sample(labels=[2, 0], count=2, seed=1, steps=3, guidance=2.0)
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (4, 16, 16, 3))
    settings = [f"model.uri={tiny.model_uri}", "output.uri=x", "requests.kind=grid", "requests.classes=[2,0]"]
    settings += ["requests.count=2", "seed=1", "requests.steps=3", "requests.guidance=2", "batch_size=4"]
    inputs = prepare(load_config(SampleJobConfig, [], [*settings, f"threads={torch.get_num_threads()}"]))
    draw = on_device(inputs.draw, "cpu")
    latents = Denoiser.load(tiny.model_uri, draw)(inputs.requests.table)
    pixels = LatentDecoder(inputs.codec_path, batch_size=4)(latents)["pixels"].to_pylist()
    assert [image.numpy().tobytes() for image in images] == pixels


def test_an_image_is_a_function_of_what_is_asked(model: ll.LoadedModel) -> None:
    both = model.sample(labels=[2, 1], seed=1, steps=2, batch_size=2)
    assert torch.equal(both, model.sample(labels=[2, 1], seed=1, steps=2))
    assert torch.equal(both[1:], model.sample(labels=[1], seed=1, steps=2, batch_size=2))
    assert not torch.equal(both, model.sample(labels=[2, 1], seed=2, steps=2))
    assert tuple(model.sample(height=16, width=24, steps=1, count=3).shape) == (3, 16, 24, 3)


def test_a_model_tells_what_it_is(model: ll.LoadedModel) -> None:
    assert (model.info.num_classes, model.info.latent_channels) == (3, 4)
    with torch.no_grad():
        prediction = model.network(torch.zeros(2, 4, 8, 8), torch.ones(2), torch.tensor([0, 3]))
    assert prediction.shape == (2, 4, 8, 8)


def test_what_a_model_cannot_draw_is_refused(model: ll.LoadedModel) -> None:
    with pytest.raises(ll.ConfigError, match="label 9: the model has classes 0 to 2"):
        model.sample(labels=[9])
    with pytest.raises(ll.ConfigError, match="the model was trained without text"):
        model.sample(prompts=["a cat"])
    with pytest.raises(ll.ConfigError, match=r"requests\.steps"):
        model.sample(labels=[1], steps=0)


def test_numbers_that_are_none_are_refused(tiny: Tiny) -> None:
    model = ll.load_model(tiny.model_uri, device="cpu")
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ll.InputError, match="non_finite_latent") as caught:
        model.sample(labels=[1], steps=1)
    assert (caught.value.key, caught.value.value) == ("model.uri", tiny.model_uri)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ll.InputError) as caught:
        ll.load_model(str(tmp_path / "none"))
    assert caught.value.next_step
    assert str(tmp_path / "none") in str(caught.value)


def test_another_codec_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    from tests.support.images import make_codec

    other = make_codec(tmp_path / "other", seed=7)
    with pytest.raises(ll.ConflictError, match="not the one the model was trained with"):
        ll.load_model(tiny.model_uri, codec=str(other), device="cpu").sample(labels=[1], steps=1)


def test_a_codec_goes_there_and_back(tiny: Tiny) -> None:
    codec = ll.load_codec(tiny.codec_path)
    images = torch.randint(0, 256, (2, 16, 24, 3), dtype=torch.uint8)
    latents = codec.encode(images)
    assert tuple(latents.shape) == (2, 4, 8, 12)
    assert codec.decode(latents).shape == images.shape
