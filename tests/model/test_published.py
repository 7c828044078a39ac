"""Plain diffusers pipeline directories: the same numbers as diffusers, and clear refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from pipeline.codec.codec import codec_info
from pipeline.diffusion.objectives import Objective
from pipeline.diffusion.samplers import sample
from pipeline.errors import InputError
from pipeline.model.config import InitConfig
from pipeline.model.info import SizeShift, is_pipeline_dir
from pipeline.model.load import load_model
from pipeline.model.read import read_init
from pipeline.storage.root import Root
from tests.support.hub import Hub


def a_vae(**changes: Any) -> AutoencoderKL:
    arguments: dict[str, Any] = {
        "block_out_channels": (8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**(arguments | changes))


def write(directory: Path, part: str, model: Any, scheduler: Any, vae: Any) -> Path:
    model.save_pretrained(directory / part, safe_serialization=True)
    scheduler.save_pretrained(directory / "scheduler")
    vae.save_pretrained(directory / "vae", safe_serialization=True)
    index = {
        "_class_name": "SomePipeline",
        part: ["diffusers", type(model).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


def a_dit(seed: int = 0) -> DiTTransformer2DModel:
    torch.manual_seed(seed)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=5,
    ).eval()  # fmt: skip


def test_dit_pipeline_gives_our_latents(tmp_path: Path) -> None:
    # All of DiT's habits: linear betas, learned variance in the second half of the channels, a null label.
    transformer, vae = a_dit(), a_vae(scaling_factor=0.18215)
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = DiTPipeline(transformer, vae, scheduler, id2label={i: str(i) for i in range(5)})
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    assert is_pipeline_dir(Root(str(tmp_path)))
    model, info = load_model(str(tmp_path))
    assert Objective(**info.objective.model_dump()) == Objective("epsilon", "linear", 0.0001, 0.02)
    assert (info.num_classes, info.text_dim, info.latent_channels, info.factor) == (5, None, 4, 4)
    assert info.latent_std == pytest.approx((1 / 0.18215,) * 4)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([1, 3])
    scheduler.set_timesteps(5)
    theirs = x
    for timestep in scheduler.timesteps:
        twice = torch.cat([theirs, theirs])
        both = torch.cat([labels, torch.full((2,), 5)])
        with torch.no_grad():
            eps = transformer(twice, timestep.expand(4), class_labels=both).sample[:, :4]
        conditional, unconditional = eps.chunk(2)
        guided = unconditional + 3.0 * (conditional - unconditional)
        theirs = scheduler.step(guided, timestep, theirs).prev_sample
    ours = sample(
        model, x, objective=Objective(**info.objective.model_dump()), sampler="ddim", steps=5, guidance=3.0,
        cond={"labels_B": labels}, uncond={"labels_B": torch.full((2,), 5)},
    )  # fmt: skip
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_a_text_unet_with_dpmsolver(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=6,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing",
    )  # fmt: skip
    model, info = load_model(str(write(tmp_path, "unet", unet, scheduler, a_vae(shift_factor=0.3))))
    assert Objective(**info.objective.model_dump()) == Objective("v")
    assert info.text_dim == 6
    assert info.latent_mean == pytest.approx((0.3,) * 4)
    assert info.latent_std == pytest.approx((2.0,) * 4)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 6)
    scheduler.set_timesteps(6)
    theirs = x
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            theirs = scheduler.step(unet(theirs, timestep, text).sample, timestep, theirs).prev_sample
    ours = sample(model, x, objective=Objective("v"), steps=6, cond={"text_BLD": text})
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)


def test_channel_statistics_and_shards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = a_dit()
    vae = a_vae(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    write(tmp_path, "transformer", transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae)
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        file.unlink()
    transformer.save_pretrained(tmp_path / "transformer", safe_serialization=True, max_shard_size="20KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    model, info = load_model(str(tmp_path))
    assert info.sampling_shift == 3.0
    assert Objective(**info.objective.model_dump()) == Objective("flow")
    assert info.latent_std == pytest.approx((2.0, 4.0, 6.0, 8.0))
    assert info.latent_mean == pytest.approx((0.1, 0.2, 0.3, 0.4))
    x, t, labels = torch.randn(1, 4, 8, 8), torch.tensor([0.5]), torch.tensor([2])
    with torch.no_grad():
        assert torch.equal(model(x, t, labels), transformer(x, torch.tensor([500.0]), labels).sample[:, :4])


@pytest.mark.parametrize("steps", [1, 4, 10, 28, 50, 200, 1000])
def test_the_shift_of_flux2_falls_with_steps_as_its_pipeline_computes_it(steps: int) -> None:
    by_size = SizeShift("empirical", base=4300)
    for height, width in ((16, 16), (48, 80), (64, 64), (50, 86), (51, 86), (128, 96)):
        assert math.log(by_size.at(height, width, steps)) == pytest.approx(
            compute_empirical_mu(height * width, steps)
        )


def test_a_foreign_unet_has_no_null_label(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        in_channels=4, out_channels=4, block_out_channels=(8, 8), norm_num_groups=4, num_class_embeds=3,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    model, info = load_model(str(write(tmp_path, "unet", unet, DDIMScheduler(), a_vae())))
    assert info.num_classes == 3
    with pytest.raises(InputError, match="called without labels"):
        model(torch.randn(1, 4, 8, 8), torch.tensor([0.5]))


def broken(directory: Path, file: str, **changes: Any) -> str:
    write(directory, "transformer", a_dit(), DDIMScheduler(), a_vae())
    path = directory / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(directory)


SCHEDULER = "scheduler/scheduler_config.json"


def test_betas_rescaled_to_zero_terminal_snr_are_read_where_v_is_predicted(tmp_path: Path) -> None:
    changes = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    info = load_model(broken(tmp_path, SCHEDULER, **changes))[1]
    assert Objective(**info.objective.model_dump()) == Objective("v", "linear", 0.0001, 0.02, zero_terminal_snr=True)
    assert type(info).from_json(info.to_json()) == info
    plain = replace(info, objective=info.objective.model_copy(update={"zero_terminal_snr": False}))
    assert "zero_terminal_snr" not in plain.to_json()["objective"]  # which earlier releases would refuse


def test_a_vae_that_leaves_its_scale_to_its_class_has_that_of_its_class(tmp_path: Path) -> None:
    write(tmp_path, "transformer", a_dit(), FlowMatchEulerDiscreteScheduler(), a_vae(scaling_factor=0.5))
    path = tmp_path / "vae/config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]  # as in Stable Diffusion 1 and 2
    path.write_text(json.dumps(config))
    theirs = AutoencoderKL.from_pretrained(tmp_path / "vae").config.scaling_factor
    assert load_model(str(tmp_path))[1].latent_std == pytest.approx((1 / theirs,) * 4)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (SCHEDULER, {"num_train_timesteps": 500}, "num_train_timesteps must be 1000"),
        (SCHEDULER, {"prediction_type": "sample"}, "prediction_type must be one of"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr without v_prediction, are not"),
        ("model_index.json", {"transformer": ["evil", "os.system"]}, "os.system is not one of UNet2DModel"),
        ("model_index.json", {"transformer": None}, "neither a unet nor a transformer"),
        ("transformer/config.json", {"num_layers": 3}, "Missing key"),
        ("transformer/config.json", {"addition_embed_type": "image"}, "addition_embed_type image"),
        ("transformer/config.json", {"class_embed_type": "projection"}, "class_embed_type projection"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, file: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(broken(tmp_path, file, **changes))


@pytest.mark.parametrize("name", ["../../weights.safetensors", "weights.bin"])
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path, "transformer", a_dit(), DDIMScheduler(), a_vae())
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    with pytest.raises(InputError, match=r"index.json[\s\S]*the file is missing"):
        load_model(str(tmp_path))
    index = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match="must be safetensors files beside their index"):
        load_model(str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(InputError, match=r"gone.safetensors[\s\S]*the file is missing"):
        load_model(str(tmp_path))


def test_files_that_are_no_json_objects_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "transformer", a_dit(), DDIMScheduler(), a_vae())
    (tmp_path / "vae" / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="not a JSON object"):
        load_model(str(tmp_path))
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load_model(str(tmp_path))


def test_weights_of_a_hub_are_those_of_the_directory_and_no_other_file_is_fetched(
    hub_server: Hub, tmp_path: Path
) -> None:
    folder = write(tmp_path / "pipe", "transformer", a_dit(), DDIMScheduler(), a_vae())
    for left in ("net.safetensors", "transformer/pytorch_model.bin", "transformer/weights.fp16.safetensors"):
        (folder / left).write_bytes(b"another layout of the same weights, or a pickle")
    commit = hub_server.add("models/you/net", folder)
    here, there = read_init(InitConfig(uri=str(folder))), read_init(InitConfig(uri="you/net", revision=commit))
    assert there.digest == here.digest
    assert codec_info("you/net", commit) == codec_info(str(folder))
    fetched = {line.rpartition("/resolve/")[2].partition("/")[2] for line in hub_server.asked if "/resolve/" in line}
    assert {"model_index.json", "transformer/diffusion_pytorch_model.safetensors"} < fetched
    assert not [name for name in fetched if name.endswith(".bin") or "fp16" in name or name == "net.safetensors"]
    for repo, revision in (("you/net", "0" * 40), ("you/nothing", commit)):
        with pytest.raises(InputError, match="The hub does not give these weights"):
            read_init(InitConfig(uri=repo, revision=revision))
