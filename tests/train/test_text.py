"""Captions embedded by a real (tiny) encoder, learned from, and described to whoever samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.codec.codec import codec_info
from pipeline.config import validate
from pipeline.diffusion.rng import keyed_uniform
from pipeline.errors import ConfigError, ConflictError, InputError, StoppedError
from pipeline.model.load import load_model
from pipeline.model.read import read_model
from pipeline.sample.prepare import text_of
from pipeline.storage.root import Root
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from pipeline.text.config import EmbedTextJobConfig
from pipeline.text.dataset import TextEmbeddings
from pipeline.text.job import run as embed
from pipeline.train import job
from pipeline.train.checks import handshake
from pipeline.train.config import TrainJobConfig
from pipeline.train.inputs import embedded, grid_prompts, make_task, open_served, open_stream, validation_chunks
from pipeline.train.start import Start
from pipeline.train.worker import WorkerContext, run_worker
from tests.support.images import make_codec
from tests.support.training import new_start
from tests.text.text_builders import CLIP_LENGTH, WIDTH, make_clip
from tests.train.dataset import grow_dataset, make_dataset
from tests.train.helpers import stopped_after
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process

pytestmark = pytest.mark.integration

CAPTIONS = ("a red circle", "a blue square", "the green sky of a picture")
UNET = {
    "kind": "unet2d_condition",
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention": (True, False),
    "attention_heads": 2,
    "norm_num_groups": 4,
}


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Latents with captions (one in four has none), and their embeddings."""
    folder = tmp_path_factory.mktemp("text")
    latents = make_dataset(folder / "latents", rows=64, captions=(*CAPTIONS, ""))
    return latents, embed_captions(latents, make_clip(folder / "clip"))


def embed_captions(latents: str, clip: Path, job: dict[str, Any] | None = None, **settings: Any) -> str:
    encoder = {"name": "clip", "path": str(clip), **settings}
    values = {"data": {"uri": latents}, "encoders": [encoder], "device": "cpu", "tracking": {"enabled": False}}
    values |= job or {}
    return embed(validate(EmbedTextJobConfig, values)).outputs[encoder["name"]]


def config_of(tmp_path: Path, uris: tuple[str, str], changes: dict[str, Any] | None = None) -> TrainJobConfig:
    base = {"data": {"text": uris[1], "uri": uris[0]}, "train": {"images": 96, "text_dropout": 0.5}}
    return job_config(tmp_path, uris[0], {**base, **(changes or {})})


def start(config: TrainJobConfig, tmp_path: Path) -> None:
    facts = handshake(Start(config), *(LatentDataset.open(part.uri) for part in config.data.parts.values()))
    generation = new_start(Root(config.output.uri))
    run_worker(config, WorkerContext("cpu", generation, None, facts, True, tmp_path / "scratch"))


def test_batches_carry_the_embeddings_of_their_captions(uris: tuple[str, str]) -> None:
    text = TextEmbeddings.open(uris[1])
    with LatentStream(LatentDataset.open(uris[0]), seed=1, batch_size=16, lanes=4, text=text, sizes=False) as stream:
        for batch, _ in zip(stream, range(5), strict=False):
            assert batch.captions is not None
            assert batch.text is not None
            wanted, mask = text.lookup(batch.captions)
            assert np.array_equal(batch.text[0].astype(np.float32), wanted)
            assert np.array_equal(batch.text[1], mask)
    assert stream.identity["text"] == text.digest


@pytest.mark.parametrize("model", [{"kind": "dit", "hidden": 16, "depth": 2, "heads": 2}, UNET], ids=["dit", "unet"])
def test_a_text_model_learns_validates_and_says_what_sampling_needs(
    uris: tuple[str, str], tmp_path: Path, model: dict[str, Any]
) -> None:
    held = {"stream": {"lanes": 4, "holdout": 0.25}, "validation": {"images": 4, "chunk": 4, "every_images": 96}}
    plain = config_of(tmp_path, uris, held).model_dump(mode="json")
    config = validate(TrainJobConfig, {**plain, "model": model})
    start(config, tmp_path)
    trained, info = load_model(config.output.uri + "/model")
    assert info.text_dim == WIDTH
    (text,) = info.texts
    assert (text.width, text.max_length) == (WIDTH, CLIP_LENGTH)
    spec = text_of(read_model(config.output.uri + "/model"))
    assert spec is not None
    assert spec.encoders[0].path == text.encoder["path"]
    # What is asked matters to what is answered.
    embeddings = TextEmbeddings.open(uris[1])
    values, mask = embedded(embeddings, [CAPTIONS[0], CAPTIONS[1]])
    x = torch.randn(1, 4, 8, 8).expand(2, -1, -1, -1)
    with torch.no_grad():
        one, other = trained(x, torch.full((2,), 0.5), torch.tensor([0, 0]), values, mask)
    assert not torch.equal(one, other)


def test_dropped_captions_are_the_empty_prompt(uris: tuple[str, str], tmp_path: Path) -> None:
    text = TextEmbeddings.open(uris[1])
    config = config_of(tmp_path, uris, {"train": {"text_dropout": 0.5, "label_dropout": 0.5, "conditional": False}})
    task = make_task(config, open_served(config), handshake(Start(config), LatentDataset.open(uris[0])))
    ids = torch.randint(1 << 62, (200, 2), generator=torch.Generator().manual_seed(0))
    given = embedded(text, [CAPTIONS[0]] * 200)
    # Texts alone go by the draw that labels alone go by, as they always did: begun runs go on bit for bit.
    assert task.dropout_draws == ("label",)
    uniform = keyed_uniform(task.seed, ids, purpose="label", shape=(1,))
    labels, kept = task.dropped(torch.zeros(200, dtype=torch.int64), given, uniform)
    assert labels is None
    assert kept is not None
    (empty, empty_mask), dropped = embedded(text, [""]), uniform[:, 0] < 0.5
    assert 60 < int(dropped.sum()) < 140
    for row in range(200):
        want = (empty[0], empty_mask[0]) if dropped[row] else (given[0][row], given[1][row])
        assert torch.equal(kept[0][row], want[0])
        assert torch.equal(kept[1][row], want[1])
    assert task.dropped(None, None, uniform) == (None, None)


def test_a_model_of_labels_and_texts_tells_what_it_was_trained_on(uris: tuple[str, str], tmp_path: Path) -> None:
    config = config_of(tmp_path, uris)
    start(config, tmp_path)
    model = read_model(config.output.uri + "/model")
    assert model.info.trained_on == ("class+text", "class", "text", "none")
    assert read_model(config.output.uri + "/checkpoints").info.trained_on == model.info.trained_on
    shares = {"label_dropout": 0.0, "text_dropout": 0.2, "joint_dropout": 0.0, "images": 32}
    never = config_of(tmp_path / "never", uris, {"train": shares})
    start(never, tmp_path)
    info = read_model(never.output.uri + "/model").info
    assert (info.trained_on, info.always_labelled, info.guidable) == (("class+text", "class"), True, False)


def test_a_run_of_two_conditions_goes_on_with_its_own_scheme_of_dropout(
    uris: tuple[str, str], tmp_path: Path
) -> None:
    config = config_of(tmp_path, uris)
    start(config, tmp_path)
    other = config_of(tmp_path, uris, {"train": {"images": 128, "text_dropout": 0.5, "joint_dropout": 0.2}})
    with pytest.raises(ConflictError, match=r"train.joint_dropout: checkpoint 0.1, now 0.2"):
        start(other, tmp_path)
    # Earlier releases dropped both by one draw, and told no share of its own.
    for place in Root(config.output.uri).list("checkpoints"):
        if place.key.endswith("COMPLETE.json"):
            marker = json.loads(Root(config.output.uri).read_bytes(place.key))
            del marker["meta"]["identity"]["train.joint_dropout"]
            Root(config.output.uri).put(place.key, json.dumps(marker).encode())
    with pytest.raises(ConflictError, match=r"train.joint_dropout: checkpoint None, now 0.1"):
        start(config_of(tmp_path, uris, {"train": {"images": 128, "text_dropout": 0.5}}), tmp_path)


@pytest.mark.parametrize(
    ("shares", "guidance", "message"),
    [
        (
            {"label_dropout": 0.0, "joint_dropout": 0.0},
            2.0,
            r"class\+text, class only[\s\S]*grid.sampler.guidance = 2.0",
        ),
        (
            {"joint_dropout": 1.0},
            1.0,
            r"Pictures are drawn of class\+text, and .* on none only[\s\S]*train.joint_dropout = 1.0",
        ),
        ({"text_dropout": 1.0}, 1.0, r"on class, none only[\s\S]*train.text_dropout = 1.0"),
    ],
)
def test_grids_of_what_is_never_trained_are_refused(
    uris: tuple[str, str], tmp_path: Path, shares: dict[str, float], guidance: float, message: str
) -> None:
    grid = {"every_images": 64, "sampler": {"guidance": guidance}}
    config = config_of(tmp_path, uris, {"train": {"images": 96, **shares}, "grid": grid, "codec": {"path": "x"}})
    dataset = LatentDataset.open(uris[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.train.checks.locate_codec", lambda *_: {"path": "x"})
        with pytest.raises(ConfigError, match=message):
            handshake(Start(config), dataset)
        fine = config.model_copy(
            update={
                "train": config.train.model_copy(
                    update={"joint_dropout": 0.1, **dict.fromkeys(("label_dropout", "text_dropout"), 0.1)}
                )
            }
        )
        assert handshake(Start(fine), dataset).texts


def test_validation_and_grids_ask_with_text(uris: tuple[str, str], tmp_path: Path) -> None:
    held = {"stream": {"lanes": 4, "holdout": 0.25}, "validation": {"images": 8, "chunk": 4}}
    config = config_of(tmp_path, uris, held)
    root = Root(config.output.uri)
    chunks = validation_chunks(config, open_served(config), root)
    assert all(c.text is not None and c.text[0].shape == (4, CLIP_LENGTH, WIDTH) for c in chunks)
    assert list(root.child("cache").list()), "what was counted about the split is kept"
    config = config_of(tmp_path, uris, {**held, "grid": {"images": 6}})
    prompts, (values, mask) = grid_prompts(config, open_served(config)[0], zero_empty=False)
    assert prompts == (*CAPTIONS, "", *CAPTIONS[:2])
    assert torch.equal(values[0], values[4])
    assert values.shape == (6, *mask.shape[1:], WIDTH)


def test_grids_show_prompts_that_were_embedded_for_them(tmp_path: Path) -> None:
    codec, clip = make_codec(tmp_path / "codec"), make_clip(tmp_path / "clip")
    made_by = {**codec_info(str(codec)).as_dict(), "path": str(codec)}
    latents = make_dataset(tmp_path / "latents", rows=48, captions=CAPTIONS, codec=made_by)
    text = embed_captions(latents, clip)
    grid = {"grid": {"images": 3, "prompts": ["a prompt of my own", CAPTIONS[1]], "every_images": 48}}
    config = config_of(tmp_path, (latents, text), grid)
    with pytest.raises(ConfigError, match=r"1 of 2 prompts have no embedding.*\n.*grid.prompts = a prompt of my own"):
        handshake(Start(config), LatentDataset.open(latents))
    assert embed_captions(latents, clip, job={"prompts": ["a prompt of my own"]}) == text
    assert handshake(Start(config), LatentDataset.open(latents)).texts
    prompts, (values, _) = grid_prompts(config, open_served(config)[0], zero_empty=False)
    assert prompts == ("a prompt of my own", CAPTIONS[1], "a prompt of my own")
    assert torch.equal(values[0], values[2])
    alone = TextEmbeddings.open(text).lookup(["a prompt of my own"])[0][0]
    np.testing.assert_array_equal(values[0].float().numpy(), alone)


def test_a_run_draws_among_several_captions_and_a_resume_draws_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    further = [json.dumps({"short": "a shape", "long": [f"a long text {i}", "another"]}) for i in range(3)]
    latents = make_dataset(tmp_path / "latents", rows=64, captions=CAPTIONS, extra=further)
    clip = make_clip(tmp_path / "clip")
    text, names = embed_captions(latents, clip), ["caption", "extra.short", "extra.long"]
    changes = {"data": {"uri": latents, "text": text, "captions": names}}
    with pytest.raises(ConflictError, match=r"are of caption alone[\s\S]*data.captions = extra.short, extra.long"):
        start(config_of(tmp_path / "none", (latents, text), changes), tmp_path / "none")
    assert embed_captions(latents, clip, job={"captions": names}) == text
    served = open_served(config_of(tmp_path, (latents, text), changes))
    asked: list[str] = []
    with open_stream(config_of(tmp_path, (latents, text), changes), served, Root(str(tmp_path))) as stream:
        for batch, _ in zip(stream, range(12), strict=False):
            asked += batch.captions or []
    assert set(asked) == {*CAPTIONS, "a shape", "another", *(f"a long text {i}" for i in range(3))}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(config_of(whole, (latents, text), changes), whole)
    with stopped_after(monkeypatch, 3):
        start(config_of(broken, (latents, text), changes), broken)
    start(config_of(broken, (latents, text), changes), broken)
    weights = [load_model(str(p / "run" / "model"))[0].state_dict() for p in (whole, broken)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    with pytest.raises(ConfigError, match="they need text"):
        config_of(tmp_path, (latents, text), {"data": {"uri": latents, "captions": names}})


def test_text_that_does_not_fit_is_refused(uris: tuple[str, str], tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", rows=48, captions=CAPTIONS)
    with pytest.raises(ConflictError, match=r"embeddings at .* were made from .*; the latents are .*other"):
        handshake(Start(config_of(tmp_path, (other, uris[1]))), LatentDataset.open(other))
    with pytest.raises(InputError, match=r"is a dataset of latents"):
        handshake(Start(config_of(tmp_path, (uris[0], uris[0]))), LatentDataset.open(uris[0]))
    plain = config_of(tmp_path, uris).model_dump(mode="json")
    small = {"kind": "unet2d", "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
    config = validate(TrainJobConfig, {**plain, "model": small})
    with pytest.raises(ConfigError, match=r"unet2d cannot read text embeddings"):
        handshake(Start(config), LatentDataset.open(uris[0]))
    config = validate(TrainJobConfig, {**plain, "model": {"kind": "sd3_transformer2d"}})
    with pytest.raises(ConfigError, match=r"sd3_transformer2d cannot read classes"):
        handshake(Start(config), LatentDataset.open(uris[0]))


def test_a_mixture_learns_from_the_text_of_each_dataset(uris: tuple[str, str], tmp_path: Path) -> None:
    clip = Path(uris[0]).parent / "clip"
    latents = make_dataset(tmp_path / "more", rows=48, captions=("seen here only", CAPTIONS[0]), name="more")
    more = {"uri": latents, "text": embed_captions(latents, clip)}

    def mixed(part: dict[str, str]) -> TrainJobConfig:
        return config_of(tmp_path, uris, {"data": {"uri": uris[0], "text": uris[1], "mix": [part]}})

    config = mixed(more)
    start(config, tmp_path)
    info = read_model(config.output.uri + "/model").info
    assert (info.text_dim, len(info.mixture)) == (WIDTH, 2)
    served = open_served(config)
    stream = open_stream(config, served, Root(config.output.uri))
    for batch, _ in zip(stream, range(6), strict=False):
        text = served[batch.dataset].text
        assert text is not None
        assert batch.captions is not None
        assert batch.text is not None
        assert np.array_equal(batch.text[0].astype(np.float32), text.lookup(batch.captions)[0])
        assert ("seen here only" in batch.captions) == (batch.dataset == 1)
    stream.close()
    other = {"uri": latents, "text": embed_captions(latents, clip, name="short", max_length=8)}
    with pytest.raises(ConflictError, match=r"max_length: \d+ in the first, 8 in the second[\s\S]*mix.0.text"):
        start(mixed(other), tmp_path)
    with pytest.raises(ConflictError, match=r"the latents are .*more[\s\S]*data.mix.0.text"):
        start(mixed({**more, "text": uris[1]}), tmp_path)


def test_a_run_goes_on_with_the_embeddings_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    latents = make_dataset(tmp_path / "latents", rows=64, captions=CAPTIONS)
    clip = make_clip(tmp_path / "clip")
    text = embed_captions(latents, clip)
    config = config_of(tmp_path, (latents, text))
    in_one_process(monkeypatch, tmp_path)
    with stopped_after(monkeypatch, 3), pytest.raises(StoppedError):
        job.run(config)
    grow_dataset(latents, caption="a caption of its own")
    embed_captions(latents, clip)
    assert TextEmbeddings.open(text).num_captions == len(CAPTIONS) + 2
    assert job.run(config).status == "done"
    assert caplog.text.count("has changed since this run began") == 2
