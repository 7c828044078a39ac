"""From a published pipeline through training to a pipeline that plain diffusers draws with, one of each family."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2Pipeline, SanaPipeline, UNet2DModel

from pipeline.codec.codec import codec_info
from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.model.config import InitConfig
from pipeline.model.load import load_model
from pipeline.model.read import read_init, read_model
from pipeline.text.config import EmbedTextJobConfig
from pipeline.text.dataset import TextEmbeddings
from pipeline.text.job import run as embed
from pipeline.train import job
from pipeline.train.config import TrainJobConfig
from pipeline.train.pipelines import pipeline_of
from tests.sample import pipelines
from tests.sample.test_models_in import assert_same_pictures, images_of, noise_of, ready
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process

pytestmark = [pytest.mark.integration, pytest.mark.slow]

# With capitals and spaces, which some pipelines do without before they encode a prompt.
CAPTIONS = ("A red circle", "a blue Square ", "the green sky of a picture")
PROMPTS = ["A Red circle on the sky ", "the Sky"]
SIGMAS = np.linspace(1, 1 / 4, 4)
SIZE = 2 * pipelines.SIDE

FAMILIES: dict[str, tuple[Callable[[Path], Any], dict[str, Any]]] = {
    "sd": (pipelines.make_sd_pipeline, {}),
    "sdxl": (pipelines.make_sdxl_pipeline, {"height": SIZE, "width": SIZE}),
    "sd3": (
        lambda folder: pipelines.make_sd3_pipeline(folder, with_t5=True),
        {"height": SIZE, "width": SIZE, "sigmas": SIGMAS},
    ),
    "sd3 without t5": (
        lambda folder: pipelines.make_sd3_pipeline(folder, with_t5=False),
        {"height": SIZE, "width": SIZE, "sigmas": SIGMAS},
    ),
    "flux": (pipelines.make_flux_pipeline, {"height": SIZE, "width": SIZE}),
    "flux2": (pipelines.make_flux2_pipeline, {"height": 2 * SIZE, "width": 2 * SIZE}),
    "pixart": (pipelines.make_pixart_pipeline, {"height": SIZE, "width": SIZE, "clean_caption": False}),
    "sana": (
        pipelines.make_sana_pipeline,
        {"height": 2 * SIZE, "width": 2 * SIZE, "sigmas": SIGMAS, "clean_caption": False},
    ),
}


def latents_of(folder: Path, **changes: Any) -> str:
    vae = str(folder / "pipe" / "vae")
    info = codec_info(vae)
    changes = {"channels": info.latent_channels, "codec": {**info.as_dict(), "path": vae}} | changes
    return make_dataset(folder / "latents", rows=48, classes=None, side=pipelines.SIDE, captions=CAPTIONS, **changes)


def embedded_by(folder: Path, latents: str) -> list[str]:
    """The captions, embedded by the encoders of the pipeline as its network reads them."""
    pipe = {"uri": str(folder / "pipe")}
    values = {"data": {"uri": latents}, "pipeline": pipe, "device": "cpu", "tracking": {"enabled": False}}
    return list(embed(validate(EmbedTextJobConfig, values)).outputs.values())


def config_of(folder: Path, latents: str, texts: list[str], changes: dict[str, Any] | None = None) -> TrainJobConfig:
    plain: dict[str, Any] = job_config(folder, latents).model_dump(mode="json")
    for name in ("objective", "timesteps"):  # which the weights say
        del plain[name]
    plain["data"] |= {"text": texts}
    plain["model"] = {"kind": "diffusers", "init": {"uri": str(folder / "pipe")}}
    plain["train"] |= {"images": 64, "text_dropout": 0.3, "learning_rate": 1e-3}
    plain["export"] = {"license": "mit"}
    for section, values in (changes or {}).items():
        plain[section] = {**plain[section], **values}
    return validate(TrainJobConfig, plain)


@pytest.mark.parametrize("normalise", [None, "dataset"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_pipeline_is_trained_and_comes_out_as_one(
    family: str,
    normalise: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make, call = FAMILIES[family]
    make(tmp_path)
    latents = latents_of(tmp_path)
    texts = embedded_by(tmp_path, latents)
    config = config_of(tmp_path, latents, texts, {"data": {"normalise": normalise}})
    in_one_process(monkeypatch, tmp_path)
    assert job.dry_run(config).counts["images"] == 64
    job.run(config)
    export = Path(config.output.uri) / "model" / "000000000064"
    stored = read_model(str(export))
    assert stored.info.init is not None
    assert stored.info.init.digest == read_init(InitConfig(uri=str(tmp_path / "pipe"))).digest
    assert stored.info.license == "mit"
    if family == "sana" and normalise == "dataset":
        # Its autoencoder has no place for another scale: the network alone, and the run is told why.
        assert {path.name for path in export.iterdir() if path.is_dir()} == {"model", "scheduler"}
        assert "cannot take another scale of its latents exactly" in caplog.text
        return
    # The pipeline alone, as it would come from a hub; its own codec and encoders.
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3 without t5" else {}
    pipe = DiffusionPipeline.from_pretrained(export, **absent)
    pipe.set_progress_bar_config(disable=True)
    requests: dict[str, Any] = {"prompts": PROMPTS, "negative_prompt": "Blue blue sky"}
    if family == "flux2":  # whose pipeline leads away from the empty prompt alone
        requests["negative_prompt"] = None
    solver = "euler" if stored.info.objective.kind == "flow" else "ddim"
    names, ours = images_of(ready(export, requests, sampler={"name": solver}))
    noise = noise_of(names, stored.info.latent_channels)
    if family == "flux":
        noise = pipe._pack_latents(noise, 2, 4, pipelines.SIDE, pipelines.SIDE)
        call = call | {"true_cfg_scale": 3.0}
    elif family == "sana" or family == "pixart":
        call = call | {"use_resolution_binning": False}
    away = {} if family == "flux2" else {"negative_prompt": ["Blue blue sky"] * 2}
    scale = {} if family == "flux" else {"guidance_scale": 3.0}
    theirs = pipe(
        prompt=PROMPTS, num_inference_steps=4, latents=noise, output_type="np", **away, **scale, **call
    ).images
    assert_same_pictures(ours, theirs)
    if family == "sdxl":  # whose missing prompt is zeros, not the empty one
        names, ours = images_of(ready(export, {"prompts": PROMPTS}, sampler={"name": solver}))
        call = call | {"latents": noise_of(names)}
        theirs = pipe(PROMPTS, num_inference_steps=4, output_type="np", **scale, **call).images
        assert_same_pictures(ours, theirs)


def test_sana_reads_captions_behind_its_instruction_and_the_empty_one_as_it_is(tmp_path: Path) -> None:
    pipe = pipelines.make_sana_pipeline(tmp_path)
    (uri,) = embedded_by(tmp_path, latents_of(tmp_path))
    told = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    states_NLD, mask_NL = TextEmbeddings.open(uri).lookup([*CAPTIONS, ""])
    for i, caption in enumerate([*CAPTIONS, ""]):
        with torch.no_grad():
            expected, mask, _, _ = pipe.encode_prompt(
                caption, do_classifier_free_guidance=False, complex_human_instruction=told if caption else None
            )
        count = int(mask.sum())
        assert mask_NL[i].tolist() == mask[0].bool().tolist()
        assert np.allclose(states_NLD[i, :count], expected[0, :count].numpy(), rtol=1e-3, atol=1e-3), caption
    alone, _ = pipe.encode_prompt(CAPTIONS[0], do_classifier_free_guidance=False, complex_human_instruction=None)[:2]
    assert not np.allclose(states_NLD[0, :3], alone[0, :3].detach().numpy(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dev", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_captions_become_what_the_pipeline_makes_of_prompts(side: str, dev: bool, tmp_path: Path) -> None:
    pipe = pipelines.make_flux2_pipeline(tmp_path, dev=dev)
    settings = tmp_path / "pipe" / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"padding_side": side}))
    pipe.tokenizer.padding_side = side
    (uri,) = embedded_by(tmp_path, latents_of(tmp_path))
    captions = [*CAPTIONS, ""]
    states_NLD, mask_NL = TextEmbeddings.open(uri).lookup(captions)
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(captions)
    assert states_NLD.shape == (4, 512, 48)
    assert np.allclose(states_NLD, expected.numpy(), rtol=1e-3, atol=1e-3)  # stored in float16
    assert mask_NL.all(), "padding is part of what it reads"


def test_a_step_distilled_network_is_asked_without_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines.make_flux2_pipeline(tmp_path, distilled=True)
    with pytest.raises(ConfigError, match=r"guidance 3\.0 leads away from neither label nor prompt"):
        ready(tmp_path / "pipe", {"prompts": PROMPTS, "height": 2 * SIZE, "width": 2 * SIZE})
    latents = latents_of(tmp_path)
    config = config_of(tmp_path, latents, embedded_by(tmp_path, latents), {"train": {"text_dropout": 0.0}})
    in_one_process(monkeypatch, tmp_path)
    job.run(config)
    export = Path(config.output.uri) / "model" / "000000000064"
    names, ours = images_of(ready(export, {"prompts": PROMPTS, "guidance": 1.0}))
    pipe = DiffusionPipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.config.is_distilled
    asked = {"height": 2 * SIZE, "width": 2 * SIZE, "latents": noise_of(names, 8), "num_inference_steps": 4}
    assert_same_pictures(ours, pipe(prompt=PROMPTS, guidance_scale=3.0, output_type="np", **asked).images)


def test_a_dit_pipeline_is_trained_and_comes_out_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines.make_dit_pipeline(tmp_path / "pipe")
    vae = str(tmp_path / "pipe" / "vae")
    codec = {**codec_info(vae).as_dict(), "path": vae}
    latents = make_dataset(tmp_path / "latents", rows=48, classes=3, side=pipelines.SIDE, codec=codec)
    config = config_of(tmp_path, latents, [])
    in_one_process(monkeypatch, tmp_path)
    job.run(config)
    export = Path(config.output.uri) / "model" / "000000000064"
    assert read_model(str(export)).info.num_classes == 1000, "as many as its network has, not as the rows have"
    names, ours = images_of(ready(export, {"classes": [0, 2]}, sampler={"name": "ddim"}))
    pipe = DiffusionPipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise_of(names))
    theirs = pipe([0, 2], guidance_scale=3.0, num_inference_steps=4, output_type="np").images
    assert_same_pictures(ours, theirs)


def test_a_network_alone_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(17)
    unet = UNet2DModel(
        sample_size=pipelines.SIDE, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4, attention_head_dim=8,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "pipe")
    latents = make_dataset(tmp_path / "latents", rows=48, classes=None, side=pipelines.SIDE)
    plain = config_of(tmp_path, latents, [], {"train": {"text_dropout": 0.0}}).model_dump(
        mode="json", exclude_unset=True
    )
    config = validate(TrainJobConfig, plain | {"objective": {"kind": "flow"}})
    in_one_process(monkeypatch, tmp_path)
    job.run(config)
    export = Path(config.output.uri) / "model" / "000000000064"
    trained = UNet2DModel.from_pretrained(export, subfolder="model")
    moved = [not torch.equal(a, b) for a, b in zip(unet.parameters(), trained.parameters(), strict=True)]
    assert all(moved)
    near = [torch.allclose(a, b, atol=0.2) for a, b in zip(unet.parameters(), trained.parameters(), strict=True)]
    assert all(near), "it went on from these weights"
    ours, info = load_model(str(export))
    assert info.init is not None
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), trained.parameters(), strict=True))


def test_a_distilled_network_is_told_its_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines.make_flux_pipeline(tmp_path, guidance=True)
    latents = latents_of(tmp_path)
    texts = embedded_by(tmp_path, latents)
    changes = {"model": {"distilled_guidance": 3.5}, "train": {"images": 32, "text_dropout": 0.0}}
    config = config_of(tmp_path, latents, texts, changes)
    in_one_process(monkeypatch, tmp_path)
    job.run(config)
    export = Path(config.output.uri) / "model" / "000000000032"
    pipe = DiffusionPipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    names, ours = images_of(ready(export, {"prompts": PROMPTS, "guidance": 3.5}))
    noise = pipe._pack_latents(noise_of(names), 2, 4, pipelines.SIDE, pipelines.SIDE)
    theirs = pipe(
        PROMPTS, num_inference_steps=4, latents=noise, output_type="np", guidance_scale=3.5, height=SIZE, width=SIZE
    ).images
    assert_same_pictures(ours, theirs)


def test_flux2_dev_is_trained_and_comes_out_as_its_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipelines.make_flux2_pipeline(tmp_path, dev=True)
    latents = latents_of(tmp_path)
    changes = {"model": {"distilled_guidance": 4.0}, "train": {"images": 32, "text_dropout": 0.0}}
    config = config_of(tmp_path, latents, embedded_by(tmp_path, latents), changes)
    in_one_process(monkeypatch, tmp_path)
    job.run(config)
    export = Path(config.output.uri) / "model" / "000000000032"
    index = json.loads((export / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PixtralProcessor"]
    # The processor needs torchvision; what the pipeline asks of it, its tokenizer answers alike.
    (export / "model_index.json").write_text(
        json.dumps(index | {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]})
    )
    pipe = Flux2Pipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    names, ours = images_of(ready(export, {"prompts": PROMPTS, "guidance": 4.0}))
    asked = {"height": 2 * SIZE, "width": 2 * SIZE, "latents": noise_of(names, 8), "num_inference_steps": 4}
    assert_same_pictures(ours, pipe(prompt=PROMPTS, guidance_scale=4.0, output_type="np", **asked).images)


def test_flux2_that_is_told_its_guidance_has_no_pipeline_with_kleins_encoder(tmp_path: Path) -> None:
    pipelines.make_flux2_pipeline(tmp_path, guidance=True)
    info = read_model(str(tmp_path / "pipe")).info
    assert info.model.distilled
    assert re.search("a pipeline with dev's text encoder alone", str(pipeline_of(info)))


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "flux2"])
def test_text_encoders_may_stay_where_they_are(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES[family][0](tmp_path)
    latents = latents_of(tmp_path)
    config = config_of(tmp_path, latents, embedded_by(tmp_path, latents), {"export": {"text_encoders": "reference"}})
    in_one_process(monkeypatch, tmp_path)
    job.run(config)
    export = Path(config.output.uri) / "model" / "000000000064"
    assert not (export / "text_encoder").exists()
    # The card's own words load it.
    card = (export / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("THIS_DIRECTORY", str(export))
    code = code.replace("num_inference_steps=25", "num_inference_steps=1").replace(
        "image.png", str(tmp_path / "image.png")
    )
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "image.png").stat().st_size > 100
