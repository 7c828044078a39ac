"""Runs that start from weights: what they go on with, and what is refused before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import validate
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.model.load import load_model
from pipeline.model.read import read_model
from pipeline.tracking.config import RegistryConfig
from pipeline.train import job
from pipeline.train.config import TrainJobConfig
from tests.sample import pipelines
from tests.text.text_builders import make_clip
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process
from tests.train.test_pipelines import config_of, embedded_by, latents_of
from tests.train.test_text import embed_captions

pytestmark = pytest.mark.integration

SMALL = {"kind": "dit", "hidden": 16, "depth": 2, "heads": 2, "patch": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TrainJobConfig:
    """A finished run of a small DiT."""
    folder = tmp_path_factory.mktemp("first")
    config = job_config(
        folder, make_dataset(folder / "latents"), {"train": {"images": 96}, "export": {"license": "mit"}}
    )
    with pytest.MonkeyPatch.context() as patch:
        in_one_process(patch, folder)
        job.run(config)
    return config


def going_on(first: TrainJobConfig, folder: Path, uri: str, **changes: Any) -> TrainJobConfig:
    """A run from its newest export, on the dataset at `uri`."""
    init = {"uri": f"{first.output.uri}/model"}
    given = {"data": {"uri": uri}, "model": {**SMALL, "init": init}, "train": {"images": 32, "learning_rate": 1e-6}}
    for section, values in changes.items():
        given[section] = {**given.get(section, {}), **values}
    plain = job_config(folder, uri).model_dump(mode="json")
    for name in ("objective", "timesteps"):
        del plain[name]
    return validate(TrainJobConfig, {**plain, **{k: {**plain.get(k, {}), **v} for k, v in given.items()}})


def test_a_run_goes_on_from_anothers_model_on_other_latents(
    first: TrainJobConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another dataset, another size, another batch, other times: what may change.
    other = make_dataset(tmp_path / "larger", rows=48, side=12, name="other", shift=2.0)
    config = going_on(first, tmp_path, other, train={"batch_size": 8}, timesteps={"shift": 2.0})
    in_one_process(monkeypatch, tmp_path)
    job.run(config)
    before, its_info = load_model(f"{first.output.uri}/model")
    after, info = load_model(f"{config.output.uri}/model")
    # Next to nothing was learned, so next to nothing has moved, and latents are seen as they were learned.
    moved = [
        float((a - b).detach().abs().max()) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert max(moved) < 1e-3
    assert max(moved) > 0
    assert info.latent_mean == its_info.latent_mean
    assert info.license == "mit"
    assert info.init is not None
    assert info.init.digest == read_model(f"{first.output.uri}/model").digest()
    assert info.sampling_shift == 2.0
    # The same command again has nothing to do, and other weights are another run.
    assert job.run(config).status == "unchanged"
    longer = config.model_copy(update={"train": config.train.model_copy(update={"images": 64})})
    assert job.run(longer).status == "done"
    fresh = longer.model_copy(
        update={
            "model": longer.model.model_copy(update={"init": None}),
            "train": longer.train.model_copy(update={"images": 96}),
        }
    )
    with pytest.raises(ConflictError, match=r"model\.init: checkpoint '[0-9a-f]{32}', now None"):
        job.run(fresh)


def test_a_checkpoint_and_each_of_its_averages_can_be_started_from(first: TrainJobConfig, tmp_path: Path) -> None:
    checkpoint = f"{first.output.uri}/checkpoints"
    digests = set()
    for ema in (None, "raw"):
        init = {"uri": checkpoint, "ema": ema}
        config = going_on(first, tmp_path, first.data.uri, model={"init": init}, export={"license": "mit"})
        facts = job.look(config, job.root_of(config)).facts
        assert facts.init is not None
        digests.add(facts.init["digest"])
    assert len(digests) == 2
    config = going_on(first, tmp_path, first.data.uri, model={"init": {"uri": checkpoint, "ema": "nobody"}})
    with pytest.raises(ConfigError, match=r"no such average[\s\S]*model\.init\.ema = nobody"):
        job.dry_run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**SMALL, "depth": 3}}, r"another network[\s\S]*depth: 2 there, 3 in model[\s\S]*model\.depth"),
        (
            {"model": {"init": {"uri": "nobody/here"}}},
            r"hub id without its revision[\s\S]*init\.uri[\s\S]*revision=",
        ),
        ({"model": {"init": {"uri": "/nobody/here"}}}, r"no readable model at /nobody/here[\s\S]*model\.init\.uri"),
    ],
)
def test_weights_of_something_else_are_refused(
    first: TrainJobConfig, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, ConflictError, InputError), match=message):
        job.dry_run(going_on(first, tmp_path, first.data.uri, **changes))


def test_weights_of_another_kind_are_refused(first: TrainJobConfig, tmp_path: Path) -> None:
    plain = going_on(first, tmp_path, first.data.uri).model_dump(mode="json")
    plain["model"] = {"kind": "unet2d", "init": plain["model"]["init"]}
    with pytest.raises(ConflictError, match=r"of the kind dit[\s\S]*model\.kind = unet2d"):
        job.dry_run(validate(TrainJobConfig, plain))


def test_latents_of_another_codec_and_more_classes_are_refused(first: TrainJobConfig, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", weights_sha256="1" * 64)
    with pytest.raises(ConflictError, match=r"codec 0000[\s\S]*holds those of 1111[\s\S]*model\.init\.codec=any"):
        job.dry_run(going_on(first, tmp_path, other))
    init = {"uri": f"{first.output.uri}/model", "codec": "any"}
    assert job.dry_run(going_on(first, tmp_path, other, model={"init": init})).counts["images"] == 32
    many = make_dataset(tmp_path / "many", classes=5)
    with pytest.raises(ConflictError, match=r"The rows have 5 classes, the network was made for 3"):
        job.dry_run(going_on(first, tmp_path, many))
    wide = make_dataset(tmp_path / "wide", channels=6)
    with pytest.raises(ConflictError, match=r"learned latents of 4 channels, .* holds those of 6 channels"):
        job.dry_run(going_on(first, tmp_path, wide))


# -- of diffusers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A Stable Diffusion pipeline, latents of its autoencoder, and their text by its encoder."""
    folder = tmp_path_factory.mktemp("published")
    pipelines.make_sd_pipeline(folder)
    latents = latents_of(folder)
    return folder, latents, embedded_by(folder, latents)


def test_the_weights_say_objective_times_and_scale(published: tuple[Path, str, list[str]]) -> None:
    begun = job.look(config_of(*published), job.root_of(config_of(*published)))
    resolved = begun.start.config
    assert (resolved.objective.kind, resolved.objective.schedule) == ("epsilon", "scaled_linear")
    assert resolved.timesteps.density == "uniform"
    assert begun.facts.scale == {"mean": [0.0] * 4, "std": [2.5] * 4}
    # What is said otherwise is as it is said.
    folder, latents, texts = published
    plain = config_of(folder, latents, texts).model_dump(mode="json") | {"objective": {"kind": "v"}}
    config = validate(TrainJobConfig, plain)
    with pytest.raises(
        ConflictError, match=r"learned to predict epsilon[\s\S]*objective\.kind = v[\s\S]*objective=any"
    ):
        job.dry_run(config)
    plain["model"]["init"]["objective"] = "any"
    config = validate(TrainJobConfig, plain)
    assert job.look(config, job.root_of(config)).start.config.objective.kind == "v"


def test_text_of_another_encoder_is_refused(published: tuple[Path, str, list[str]], tmp_path: Path) -> None:
    folder, latents, texts = published
    other = embed_captions(latents, make_clip(tmp_path / "clip", seed=77), name="other", padding="attended")
    with pytest.raises(ConflictError, match=r"another text encoder[\s\S]*weights_sha256[\s\S]*data\.text\.0"):
        job.dry_run(config_of(folder, latents, [other]))
    with pytest.raises(ConfigError, match=r"reads 1 text encoders, data\.text names 2"):
        job.dry_run(config_of(folder, latents, [*texts, other]))
    with pytest.raises(ConfigError, match=r"diffusers needs text embeddings, and data\.text names none"):
        job.dry_run(config_of(folder, latents, []))


def test_text_that_is_read_otherwise_than_the_network_does_is_refused(tmp_path: Path) -> None:
    pipelines.make_flux2_pipeline(tmp_path)
    latents = latents_of(tmp_path)
    folders = {"subfolder": "text_encoder", "tokenizer_subfolder": "tokenizer"}
    talk: dict[str, Any] = {"layer": [9, 18, 27], "prompt": "chat", "padding": "shown", "max_length": 40, **folders}
    for changes, message in (
        ({"padding": "attended"}, r"its padding is shown: embed with padding: shown"),
        ({"layer": [9, 18]}, r"it reads states of width 48, these are 32 wide"),
        ({"layer": [9, 18, 26]}, r"another text encoder[^\n]*\n    layer[^\n]*27\D* there"),
        ({"prompt": "plain"}, r"another text encoder[\s\S]*\n    prompt: chat there"),
    ):
        name = f"read{len(list((tmp_path / 'latents').rglob('dataset.json')))}"
        text = embed_captions(latents, tmp_path / "pipe", name=name, **(talk | changes))
        with pytest.raises((ConfigError, ConflictError), match=message):
            job.dry_run(config_of(tmp_path, latents, [text]))
    text = embed_captions(latents, tmp_path / "pipe", name="same", **talk)
    assert job.dry_run(config_of(tmp_path, latents, [text])).counts["images"] == 64


def test_weights_that_do_not_fit_and_lack_a_licence_are_refused(
    published: tuple[Path, str, list[str]], tmp_path: Path
) -> None:
    folder, latents, texts = published
    with pytest.raises(ConfigError, match=r"state no licence[\s\S]*export\.license"):
        job.dry_run(config_of(folder, latents, texts, {"export": {"license": None}}))
    card = folder / "pipe" / "README.md"
    card.write_text("---\nlicense: openrail++\n---\n# A model\n")
    config = config_of(folder, latents, texts, {"export": {"license": None}})
    assert job.look(config, job.root_of(config)).facts.license == "openrail++"
    card.unlink()
    # The network alone, with two tensors of another shape and one too many.
    network = tmp_path / "network"
    network.mkdir()
    (network / "config.json").write_bytes((folder / "pipe" / "unet" / "config.json").read_bytes())
    weights = load_file(folder / "pipe" / "unet" / "diffusion_pytorch_model.safetensors")
    weights |= {"conv_in.bias": torch.zeros(3), "conv_out.bias": torch.zeros(7), "a.stranger": torch.zeros(1)}
    save_file(weights, network / "diffusion_pytorch_model.safetensors")
    bare = config_of(folder, latents, texts, {"model": {"init": {"uri": str(network)}}})
    with pytest.raises(ConfigError, match=r"does not say what it learned to predict[\s\S]*objective\.kind"):
        job.dry_run(bare)
    plain = bare.model_dump(mode="json", exclude_unset=True) | {"objective": {"kind": "epsilon"}}
    bare = validate(TrainJobConfig, plain)
    with pytest.raises(
        InputError, match=r"3 of \d+ tensors[\s\S]*a\.stranger: \[1\] there, none[\s\S]*conv_in\.bias"
    ):
        job.dry_run(bare)
    config_json = network / "config.json"
    honest = config_json.read_text()
    config_json.write_text(json.dumps(json.loads(honest) | {"cross_attention_dim": 10**12}))
    with pytest.raises(InputError, match=r"cross_attention_dim 1000000000000 is more than any network has"):
        job.dry_run(bare)
    config_json.write_text(json.dumps(json.loads(config_json.read_text()) | {"_class_name": "EvilModel"}))
    with pytest.raises(InputError, match=r"EvilModel is not one of UNet2DModel"):
        job.dry_run(bare)


def test_a_chain_begins_with_random_weights_and_goes_on_from_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make_dataset(tmp_path / "latents")
    tracking = {"enabled": True, "uri": f"sqlite:///{tmp_path}/mlflow.db", "journal_dir": str(tmp_path / "journal")}

    def night(name: str, absent: str = "random") -> TrainJobConfig:
        plain = job_config(tmp_path, uri).model_dump(mode="json", exclude_unset=True)
        plain |= {"output": {"uri": str(tmp_path / name)}, "export": {"license": "other"}, "tracking": tracking}
        plain |= {"registry": {"name": "chain"}}
        plain["model"]["init"] = {"uri": "models:/chain@latest", "absent": absent}
        plain["train"] |= {"images": 32}
        return validate(TrainJobConfig, plain)

    in_one_process(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=r"There is no tracking store"):  # which is no first night
        job.dry_run(night("none"))
    alone = night("alone")
    network = alone.model.model_copy(update={"init": None})
    job.run(alone.model_copy(update={"model": network, "registry": RegistryConfig()}))
    with pytest.raises(InputError, match=r"The registry has no models:/chain@latest[\s\S]*model\.init\.uri"):
        job.dry_run(night("none", "refused"))
    first, second = night("first"), night("second")
    job.run(first)
    assert read_model(f"{first.output.uri}/model").info.init is None
    job.run(second)
    init = read_model(f"{second.output.uri}/model").info.init
    assert init is not None
    assert init.uri == read_model(f"{first.output.uri}/model").uri
    assert init.run_id is not None
    # The first night's run goes on as it began, though the registry has a model by now.
    longer = first.model_copy(update={"train": first.train.model_copy(update={"images": 64})})
    job.run(longer)
    assert read_model(f"{first.output.uri}/model").info.init is None
    # And the second's from what it began with, though that is no longer the newest.
    longer = second.model_copy(update={"train": second.train.model_copy(update={"images": 64})})
    job.run(longer)
    assert read_model(f"{second.output.uri}/model").info.init == init


def test_a_condition_is_part_of_the_run_and_refused_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make_dataset(tmp_path / "latents")
    in_one_process(monkeypatch, tmp_path)
    some = job_config(tmp_path, uri, {"data": {"where": "label != 1"}, "train": {"images": 32}})
    job.run(some)
    more = some.model_copy(update={"train": some.train.model_copy(update={"images": 64})})
    everything = more.model_copy(update={"data": more.data.model_copy(update={"where": None})})
    with pytest.raises(ConflictError, match=r"stream\.where: checkpoint 'label != 1', now None"):
        job.run(everything)
    assert job.run(more).status == "done"
    with pytest.raises(ConfigError, match=r"no column labels[\s\S]*data\.where = labels == 1"):
        job.dry_run(job_config(tmp_path, uri, {"data": {"where": "labels == 1"}}))
