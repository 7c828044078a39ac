"""Adapters: what a run keeps of them, what comes out, and that diffusers draws with it what we draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

from pipeline.config import validate
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.model.checkpoints import list_complete
from pipeline.model.load import load_model
from pipeline.model.read import read_model
from pipeline.storage.root import Root
from pipeline.train import job
from pipeline.train.config import TrainJobConfig
from tests.sample import pipelines
from tests.sample.test_models_in import assert_same_pictures, images_of, noise_of, ready
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process
from tests.train.test_pipelines import PROMPTS, SIGMAS, SIZE, config_of, embedded_by, latents_of
from tests.train.test_start import SMALL

pytestmark = pytest.mark.integration


def with_lora(config: TrainJobConfig, **lora: Any) -> TrainJobConfig:
    return validate(TrainJobConfig, config.model_dump(mode="json", exclude_unset=True) | {"lora": lora})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrainJobConfig:
    """A finished run of a small DiT, and a run of adapters to it."""
    folder = tmp_path_factory.mktemp("small")
    uri = make_dataset(folder / "latents")
    config = job_config(folder, uri, {"train": {"images": 96}, "export": {"license": "mit"}})
    with pytest.MonkeyPatch.context() as patch:
        in_one_process(patch, folder)
        job.run(config)
        init = {"uri": f"{config.output.uri}/model"}
        output = {"uri": str(folder / "lora")}
        plain = config.model_dump(mode="json", exclude_unset=True) | {
            "output": output,
            "model": {**SMALL, "init": init},
        }
        tuned = with_lora(validate(TrainJobConfig, plain), rank=3, alpha=6)
        job.run(tuned)
    return tuned


def test_a_run_keeps_its_adapters_alone(small: TrainJobConfig, tmp_path: Path) -> None:
    (*_, newest) = list_complete(Root(f"{small.output.uri}/checkpoints"))
    shard = next(Path(small.output.uri, "checkpoints", newest.name).glob("*.safetensors"))
    with safe_open(str(shard), framework="pt") as file:
        names = set(file.keys())
    assert len(names) > 20
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    export = Path(small.output.uri, "model", "000000000096")
    assert sorted(path.name for path in export.iterdir()) == [
        "README.md", "latentloom.json", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    # What is drawn with is the base and alpha / rank of their product.
    assert small.model.init is not None
    base, _ = load_model(small.model.init.uri)
    tuned, info = load_model(str(export))
    assert info.lora is not None
    assert (info.lora.rank, info.lora.alpha) == (3, 6)
    with safe_open(str(export / "pytorch_lora_weights.safetensors"), framework="pt") as file:
        key = next(name for name in file.keys() if name.endswith("blocks.0.attention.qkv.lora_A.weight"))  # noqa: SIM118
        down, up = file.get_tensor(key), file.get_tensor(key.replace("lora_A", "lora_B"))
    name = key.partition(".")[2].replace("lora_A.weight", "weight")
    expected = base.state_dict()[name] + 2.0 * up @ down
    assert torch.allclose(tuned.state_dict()[name], expected, atol=1e-6)
    assert not torch.equal(tuned.state_dict()[name], base.state_dict()[name])
    # The newest checkpoint draws with the same average of the same adapters.
    ema = small.train.ema[0].name
    there, _ = load_model(f"{small.output.uri}/checkpoints", ema)
    for one, other in zip(there.parameters(), tuned.parameters(), strict=True):
        assert torch.equal(one, other)


def test_adapters_go_on_bitwise_and_stay_with_their_base(
    small: TrainJobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_one_process(monkeypatch, tmp_path)

    def run(name: str, *lengths: int) -> dict[str, torch.Tensor]:
        for images in lengths:
            train = small.train.model_copy(update={"images": images, "decay_images": 0})
            output = small.output.model_copy(update={"uri": str(tmp_path / name)})
            job.run(small.model_copy(update={"train": train, "output": output}))
        return dict(load_model(str(tmp_path / name / "model"))[0].state_dict())

    whole, halves = run("whole", 96), run("halves", 48, 96)
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    # Adapters are no weights to start from, and not those of another rank.
    init = {"uri": str(tmp_path / "whole" / "model")}
    plain = small.model_dump(mode="json") | {"model": {**SMALL, "init": init}}
    with pytest.raises(InputError, match=r"These are adapters, not weights to start from[\s\S]*lora\.merge=true"):
        job.dry_run(validate(TrainJobConfig, plain))
    other = with_lora(small.model_copy(update={"train": small.train.model_copy(update={"images": 128})}), rank=2)
    with pytest.raises(ConflictError, match=r"lora: checkpoint .*'rank': 3.* now .*'rank': 2"):
        job.run(other)


def test_what_adapters_cannot_be_put_into_is_refused(small: TrainJobConfig) -> None:
    with pytest.raises(ConfigError, match=r"No layer[\s\S]*lora\.targets = to_nowhere[\s\S]*qkv"):
        job.dry_run(with_lora(small, targets=["qkv", "to_nowhere"]))
    plain = small.model_dump(mode="json")
    plain["model"]["init"] = None
    with pytest.raises(ConfigError, match=r"it needs model\.init"):
        validate(TrainJobConfig, plain)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "flux2", "sana"])
def test_diffusers_draws_with_the_adapters_what_we_draw(
    family: str, merge: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if family == "sd3":
        pipelines.make_sd3_pipeline(tmp_path, with_t5=True)
    else:
        getattr(pipelines, f"make_{family}_pipeline")(tmp_path)
    latents = latents_of(tmp_path)
    config = config_of(tmp_path, latents, embedded_by(tmp_path, latents), {"train": {"learning_rate": 0.005}})
    in_one_process(monkeypatch, tmp_path)
    job.run(with_lora(config, rank=4, alpha=8, merge=merge))
    export = Path(config.output.uri) / "model" / "000000000064"
    pipe = DiffusionPipeline.from_pretrained(export if merge else tmp_path / "pipe")
    if not merge:
        pipe.load_lora_weights(export)
        if family == "flux2":  # most of whose blocks have all projections in one layer
            with safe_open(str(export / "pytorch_lora_weights.safetensors"), framework="pt") as file:
                assert any("single_transformer_blocks.0.attn.to_qkv_mlp_proj" in key for key in file.keys())  # noqa: SIM118
    pipe.set_progress_bar_config(disable=True)
    info = read_model(str(export)).info
    solver = "euler" if info.objective.kind == "flow" else "ddim"
    negative = {} if family == "flux2" else {"negative_prompt": "blue blue sky"}
    requests = {"prompts": PROMPTS} | negative
    names, ours = images_of(ready(export, requests, sampler={"name": solver}))
    side = 2 * SIZE if family in ("flux2", "sana") else SIZE
    plain = requests | {"height": side, "width": side}
    _, untuned = images_of(ready(tmp_path / "pipe", plain, sampler={"name": solver}))
    assert ours != untuned
    noise = noise_of(names, info.latent_channels)
    asked: dict[str, Any] = {"guidance_scale": 3.0, "latents": noise}
    if family == "flux":
        asked = {"true_cfg_scale": 3.0, "latents": pipe._pack_latents(noise, 2, 4, pipelines.SIDE, pipelines.SIDE)}
    if family != "sd":
        asked |= {"height": side, "width": side}
    if family in ("sd3", "sana"):
        asked |= {"sigmas": SIGMAS}
    if family == "sana":
        asked |= {"clean_caption": False, "complex_human_instruction": None, "use_resolution_binning": False}
    asked |= {name: [text] * 2 for name, text in negative.items()}
    theirs = pipe(prompt=PROMPTS, num_inference_steps=4, output_type="np", **asked)
    assert_same_pictures(ours, np.asarray(theirs.images))
