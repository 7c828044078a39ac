"""Models from elsewhere: checkpoints with a named average, and diffusers pipelines, whose images ours must be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from pipeline.config import validate
from pipeline.diffusion.rng import ids_from_bytes, keyed_normal
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.media import decode_image
from pipeline.model import load
from pipeline.model.info import PublishedPipeline, read_pipeline_encoders
from pipeline.model.load import load_model
from pipeline.model.read import read_model
from pipeline.sample.config import SampleJobConfig
from pipeline.sample.denoise import NOISE, Denoiser, LatentDecoder
from pipeline.sample.output import encode_rows
from pipeline.sample.plan import extend_plan
from pipeline.sample.prepare import SamplingInputs, on_device, prepare, text_of
from pipeline.sample.regenerate import regenerate
from pipeline.storage.root import Root
from pipeline.text.encoder import PromptEmbedder
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.export import save_export
from pipeline.train.state import Track, make_state
from tests.sample.conftest import Tiny
from tests.sample.pipelines import SIDE, make_dit_pipeline, make_flux2_pipeline, make_sd3_pipeline, make_sd_pipeline

pytestmark = pytest.mark.integration


def ready(uri: Path | str, requests: dict[str, Any], **changes: Any) -> SamplingInputs:
    config = validate(
        SampleJobConfig,
        {
            "model": {"uri": str(uri)},
            "output": {"uri": "/nowhere/else"},
            "requests": {"kind": "grid", "steps": 4, "guidance": 3.0, **requests},
            "batch_size": 2,
            **changes,
        },
    )
    prepared = prepare(config)
    return replace(prepared, draw=on_device(prepared.draw, "cpu"))


def images_of(prepared: SamplingInputs) -> tuple[list[bytes], list[bytes]]:
    """(request ids, encoded images) of all requests, in their order."""
    torch.set_num_threads(1)
    model = prepared.model
    embed = PromptEmbedder(prepared.text) if prepared.text else None
    denoiser = Denoiser.load(model.uri, prepared.draw, ema=model.info.ema, embed=embed)
    plan = extend_plan(None, prepared.requests.table, 64)
    decoder = LatentDecoder(prepared.codec_path, batch_size=prepared.draw.batch_size)
    rows, rejects = encode_rows(decoder(denoiser(plan)), prepared.draw, prepared.origin)
    assert rejects.num_rows == 0
    return rows["sample_id"].to_pylist(), rows["image"].to_pylist()


def noise_of(names: list[bytes], channels: int = 4) -> torch.Tensor:
    """The noise our requests start from, to start theirs from it too."""
    return keyed_normal(0, ids_from_bytes(names), purpose=NOISE, shape=(channels, SIDE, SIDE))


def assert_same_pictures(ours: list[bytes], theirs: np.ndarray) -> None:
    mine = np.stack([decode_image(image) for image in ours]).astype(int)
    wanted = np.round(theirs * 255).astype(int)
    assert mine.shape == wanted.shape
    assert mine.std() > 5  # there is something to see
    assert np.abs(mine - wanted).max() <= 1


@pytest.mark.slow
def test_a_dit_pipeline_draws_its_own_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_dit_pipeline(tmp_path)
    prepared = ready(tmp_path, {"classes": [3, 977]}, sampler={"name": "ddim"})
    assert (prepared.model.kind, prepared.model.info.num_classes) == ("pipeline", 1000)
    names, ours = images_of(prepared)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise_of(names))
    theirs = pipe([3, 977], guidance_scale=3.0, num_inference_steps=4, output_type="np").images
    assert_same_pictures(ours, theirs)
    # Its label for "none" is not one that can be asked for, and its size is the only one.
    with pytest.raises(ConfigError, match="label 1000: the model has classes 0 to 999"):
        ready(tmp_path, {"classes": [1000]})
    with pytest.raises(ConfigError, match="size 32x32: the model was trained on 16x16"):
        ready(tmp_path, {"classes": [1], "height": 32, "width": 32})
    assert regenerate(ours[0], places=["/"]) == ours[0]


PROMPTS = ["a red circle on the sky", "the sky"]


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_a_stable_diffusion_pipeline_draws_its_own_pictures(tmp_path: Path, solver: str) -> None:
    scheduler = None
    if solver == "dpmpp":
        scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        )  # fmt: skip
    pipe = make_sd_pipeline(tmp_path, scheduler)
    asked = {"prompts": PROMPTS, "negative_prompt": "blue blue sky"}
    prepared = ready(tmp_path / "pipe", asked, sampler={"name": solver})
    names, ours = images_of(prepared)
    theirs = pipe(
        PROMPTS, negative_prompt=["blue blue sky"] * 2, guidance_scale=3.0, num_inference_steps=4,
        latents=noise_of(names), output_type="np",
    ).images  # fmt: skip
    assert_same_pictures(ours, theirs)
    if solver == "ddim":
        # Without a negative prompt guidance leads away from the empty one.
        names, plain = images_of(ready(tmp_path / "pipe", {"prompts": PROMPTS}, sampler={"name": "ddim"}))
        theirs = pipe(PROMPTS, guidance_scale=3.0, num_inference_steps=4, latents=noise_of(names), output_type="np")
        assert_same_pictures(plain, theirs.images)
        assert regenerate(ours[1], places=["/"]) == ours[1]


@pytest.mark.slow
@pytest.mark.parametrize("with_t5", [True, False])
def test_a_stable_diffusion_3_pipeline_draws_its_own_pictures(tmp_path: Path, with_t5: bool) -> None:
    pipe = make_sd3_pipeline(tmp_path, with_t5=with_t5)
    names, ours = images_of(ready(tmp_path / "pipe", {"prompts": PROMPTS, "negative_prompt": "blue"}))
    theirs = pipe(
        PROMPTS, negative_prompt=["blue"] * 2, guidance_scale=3.0, num_inference_steps=4,
        sigmas=np.linspace(1, 1 / 4, 4), latents=noise_of(names), output_type="np", height=16, width=16,
    ).images  # fmt: skip
    assert_same_pictures(ours, theirs)


def test_a_pipeline_that_does_not_fit_together_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    make_sd_pipeline(tmp_path)
    with pytest.raises(ConflictError, match="Model and codec do not fit"):
        from tests.sample.pipelines import a_vae

        other = a_vae(block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",),
                      up_block_types=("UpDecoderBlock2D",))  # fmt: skip
        other.save_pretrained(tmp_path / "other")
        ready(tmp_path / "pipe", {"prompts": PROMPTS}, model={"uri": str(tmp_path / "pipe"),
                                                             "codec": str(tmp_path / "other")})  # fmt: skip
    before = text_of(read_model(str(tmp_path / "pipe")))
    config = tmp_path / "pipe" / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": "changed"}))
    assert text_of(read_model(str(tmp_path / "pipe"))) != before
    (tmp_path / "pipe" / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        text_of(read_model(str(tmp_path / "pipe")))
    with pytest.raises(ConfigError, match="prompt 'a'"):
        ready(tiny.model_uri, {"prompts": ["a"]})


def test_a_text_pipeline_whose_encoders_are_not_known_is_refused(tmp_path: Path) -> None:
    make_sd_pipeline(tmp_path)
    index = tmp_path / "pipe" / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"text_encoder_2": ["transformers", "CLIPTextModel"]})
    )
    with pytest.raises(InputError, match=r"its text encoders[\s\S]*UNet2DConditionModel reads the text of 1"):
        text_of(read_model(str(tmp_path / "pipe")))


def test_flux2_with_another_text_encoder_is_refused_by_its_name(tmp_path: Path) -> None:
    make_flux2_pipeline(tmp_path)
    index = tmp_path / "pipe" / "model_index.json"
    other = {"text_encoder": ["transformers", "Gemma3ForCausalLM"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | other))
    for read in (lambda uri: read_model(str(uri)), lambda uri: read_pipeline_encoders(Root(str(uri)))):
        with pytest.raises(InputError, match=r"text_encoder Gemma3For[\s\S]*klein has it, or from Mistral 3"):
            read(tmp_path / "pipe")


def test_an_export_that_was_never_trained_without_a_class_is_not_guided(tiny: Tiny, tmp_path: Path) -> None:
    model, info = load_model(tiny.model_uri)
    save_export(str(tmp_path / "model"), model, replace(info, always_labelled=True, guidable=False))
    assert ready(tmp_path / "model", {"classes": [0], "guidance": 1.0}).requests.table.num_rows == 1
    with pytest.raises(ConfigError, match=r"guidance 2\.0 leads away from neither label nor prompt: [^\n]*so 1 only"):
        ready(tmp_path / "model", {"classes": [0], "guidance": 2.0})


def write_checkpoints(tiny: Tiny, folder: Path) -> None:
    """Two checkpoints of a run whose model is the export's, its averages differing from it."""
    model, info = load_model(tiny.model_uri)
    tracks = (Track("power", sigma_rel=0.1), Track("half", half_life_images=30.0))
    state = make_state(model, tracks=tracks, seed=1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    state.about = info.to_json()
    for value in state.ema.averages["half"].values():
        value.mul_(0.9)
    store = CheckpointStore(Root(str(folder / "checkpoints")), folder / "staging", keep_last=5)
    for images in (100, 200):
        state.images = images
        store.save(state.tensors(), state.meta())
        store.wait()
        for value in state.ema.averages["half"].values():
            value.mul_(0.9)


def test_a_checkpoint_is_drawn_from_with_the_average_named(tiny: Tiny, tmp_path: Path) -> None:
    write_checkpoints(tiny, tmp_path)
    place = tmp_path / "checkpoints"
    asked = {"classes": [0, 1], "guidance": 2.0}
    # The raw weights and the power track (never moved from them) are those of the export: so are its images.
    names, exported = images_of(ready(tiny.model_uri, asked))
    raw = ready(place, asked, model={"uri": str(place), "ema": "raw"})
    assert raw.model.kind == "checkpoint"
    assert "-000000000000200-" in raw.model.uri.rpartition("/")[2]
    raw_names, drawn = images_of(raw)
    assert (raw_names, pixels(drawn)) == (names, pixels(exported))
    half = ready(place, asked, model={"uri": str(place), "ema": "half"})
    again = images_of(half)[1]
    assert pixels(again) != pixels(exported)
    assert half.origin.ema == "half"
    assert len({raw.model.digest(), half.model.digest(), read_model(tiny.model_uri).digest()}) == 3
    # Its first track is what an export of the run would hold.
    assert read_model(str(place)).info.ema == "power"
    older = next(p for p in place.iterdir() if "-000000000000100-" in p.name)
    assert pixels(images_of(ready(older, asked, model={"uri": str(older), "ema": "half"}))[1]) != pixels(again)
    assert regenerate(again[0], places=["/"]) == again[0]
    with pytest.raises(ConfigError, match="it holds power, half, raw"):
        read_model(str(place), "ema_0.05")


def pixels(images: list[bytes]) -> list[bytes]:
    return [decode_image(image).tobytes() for image in images]


def test_a_damaged_checkpoint_is_named(tiny: Tiny, tmp_path: Path) -> None:
    write_checkpoints(tiny, tmp_path)
    newest = max(p for p in (tmp_path / "checkpoints").iterdir() if p.name != "starts")
    marker = newest / "COMPLETE.json"
    document = json.loads(marker.read_text())
    shard = next(newest.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    prepared = ready(newest, {"classes": [0], "guidance": 1.0})
    with pytest.raises(InputError, match="does not have the recorded size and sha256"):
        Denoiser.load(prepared.model.uri, prepared.draw, ema=prepared.model.info.ema)
    document["meta"]["model"] = {}
    marker.write_text(json.dumps(document))
    with pytest.raises(InputError, match="does not say what its model is"):
        read_model(str(newest))
    shutil.rmtree(newest)
    assert "000000000000100-" in read_model(str(tmp_path / "checkpoints")).uri


def test_a_checkpoint_whose_tensors_do_not_fit_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    write_checkpoints(tiny, tmp_path)
    newest = max(p for p in (tmp_path / "checkpoints").iterdir() if p.name != "starts")
    marker = newest / "COMPLETE.json"
    document = json.loads(marker.read_text())
    document["meta"]["model"]["model"]["depth"] = 3
    marker.write_text(json.dumps(document))
    prepared = ready(newest, {"classes": [0], "guidance": 1.0})
    with pytest.raises(InputError, match="do not fit the model they are described as"):
        Denoiser.load(prepared.model.uri, prepared.draw, ema=prepared.model.info.ema)


def test_what_a_published_text_model_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_sd3_pipeline(tmp_path, with_t5=False)
    stored = read_model(str(tmp_path / "pipe"))
    model, _ = load_model(stored.uri)
    with pytest.raises(InputError, match="without a pooled text vector"):
        model(torch.zeros(1, 4, SIDE, SIDE), torch.ones(1), text_BLD=torch.zeros(1, 3, 80))
    with monkeypatch.context() as patch:  # they change while they are read
        place = stored.place
        assert isinstance(place, PublishedPipeline)
        changed = replace(place, weights=dict.fromkeys(place.weights, "0" * 64))
        patch.setattr(load, "read_model", lambda *_: replace(stored, place=changed))
        with pytest.raises(InputError, match="not those that the model is described with"):
            load_model(stored.uri)
    remote = Root("memory://pipelines/sd3")
    remote.upload_dir(tmp_path / "pipe")
    with pytest.raises(InputError, match="read from local disk"):
        text_of(read_model(remote.uri))
    # The denoiser itself may lie anywhere.
    loaded, _ = load_model(remote.uri)
    assert same_weights(loaded, model)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)
