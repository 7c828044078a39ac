"""One run on several datasets: served by weight, normalised as served, resumed exactly, refused where they misfit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import runs as session
from pipeline.config import validate
from pipeline.errors import ConfigError, ConflictError, StoppedError
from pipeline.model.info import DatasetShare
from pipeline.model.load import load_model
from pipeline.model.read import read_model
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import note_run
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import SIDE_COLUMNS, held_out
from pipeline.stream.data import Batch, widened
from pipeline.tracking.tracker import NoopTracker
from pipeline.train import collectives, job
from pipeline.train.checks import Facts, check_same_encoders, handshake
from pipeline.train.config import TrainJobConfig
from pipeline.train.inputs import Served, make_task, open_served, open_stream, pooled_statistics, validation_chunks
from pipeline.train.pinned_inputs import Begun, look, pins_of
from pipeline.train.retention import read_records
from pipeline.train.start import Start
from pipeline.train.worker import WorkerContext, read_quarantine, run_worker
from tests.support.training import new_start
from tests.train.dataset import make_dataset
from tests.train.helpers import stopped_after
from tests.train.job_config import job_config

pytestmark = pytest.mark.integration

VALIDATED = {"stream": {"holdout": 0.25}, "validation": {"images": 16, "chunk": 4, "every_images": 128}}
Uris = tuple[str, str]


@pytest.fixture(scope="module")
def uris(tmp_path_factory: pytest.TempPathFactory) -> Uris:
    folder = tmp_path_factory.mktemp("latents")
    return make_dataset(folder / "one"), make_dataset(folder / "two", rows=80, classes=5, name="two")


def mixed(tmp_path: Path, uris: Uris, weight: float = 1.0, changes: dict[str, Any] | None = None) -> TrainJobConfig:
    """Three parts of the first dataset and `weight` of the second."""
    config = job_config(tmp_path, uris[0], changes)
    values = config.model_dump(mode="json")
    values["data"] |= {"weight": 3.0, "mix": [{"uri": uris[1], "weight": weight}]}
    return validate(TrainJobConfig, values)


def shake(config: TrainJobConfig) -> Facts:
    return handshake(Start(config), *(LatentDataset.open(part.uri) for part in config.data.parts.values()))


def start(config: TrainJobConfig, tmp_path: Path) -> dict[str, Any]:
    generation = new_start(Root(config.output.uri))
    return run_worker(config, WorkerContext("cpu", generation, None, shake(config), True, tmp_path / "scratch"))


def names_of(uri: str) -> set[bytes]:
    dataset = LatentDataset.open(uri)
    groups = range(len(dataset.row_groups))
    return {name for at in groups for name in dataset.read(at, ["sample_id"])["sample_id"].to_pylist()}


# -- training --------------------------------------------------------------------------------------------------


def test_a_stopped_and_resumed_run_on_a_mixture_is_the_undisturbed_one(
    uris: Uris, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(mixed(whole, uris, changes=VALIDATED), whole)
    with stopped_after(monkeypatch, 7):
        assert start(mixed(broken, uris, changes=VALIDATED), broken)["status"] == "stopped"
    assert start(mixed(broken, uris, changes=VALIDATED), broken) == {"status": "done", "step": 20, "images": 320}

    def timeless(path: Path) -> list[dict[str, Any]]:
        clock = ("images_per_s", "data_wait_share")
        return [{k: v for k, v in r.items() if k not in clock} for r in read_records(Root(str(path / "run")))]

    assert timeless(broken) == timeless(whole)
    assert {"epoch", "epoch_mix0"} <= {key for record in timeless(whole) for key in record}
    weights = [load_model(str(p / "run" / "model"))[0].state_dict() for p in (whole, broken)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.parametrize("stop", [7, 10, 14])
def test_small_images_are_followed_by_large_ones_and_a_resume_meets_the_same(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_dataset(tmp_path / "small", image="small")
    large = make_dataset(tmp_path / "large", rows=48, side=16, name="large", image="large")

    def config(path: Path) -> TrainJobConfig:
        values = mixed(path, (small, large)).model_dump(mode="json")
        values["data"] |= {"until_images": 192}
        values["data"]["mix"][0] |= {"from_images": 160}
        return validate(TrainJobConfig, values)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(config(whole), whole)
    with stopped_after(monkeypatch, stop):
        assert start(config(broken), broken)["status"] == "stopped"
    assert start(config(broken), broken)["status"] == "done"
    records = [read_records(Root(str(path / "run"))) for path in (whole, broken)]
    losses = [[(r["step"], r["loss"]) for r in one if "loss" in r] for one in records]
    assert losses[0] == losses[1]
    weights = [load_model(str(p / "run" / "model"))[0].state_dict() for p in (whole, broken)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_time_that_no_dataset_serves_is_refused_before_anything_starts(uris: Uris, tmp_path: Path) -> None:
    values = mixed(tmp_path, uris).model_dump(mode="json")
    values["data"] |= {"until_images": 160}
    values["data"]["mix"][0] |= {"from_images": 200}
    with pytest.raises(ConfigError, match=r"No dataset is served from step 10 up to step 13") as caught:
        shake(validate(TrainJobConfig, values))
    assert caught.value.key == "data.until_images"
    values["data"]["mix"][0] |= {"until_images": 200}
    with pytest.raises(ConfigError, match="until_images 200 must be above from_images 200"):
        validate(TrainJobConfig, values)


def test_the_export_names_every_dataset_and_normalises_as_they_are_served(uris: Uris, tmp_path: Path) -> None:
    config = mixed(tmp_path, uris, changes={"train": {"images": 64}})
    start(config, tmp_path)
    info = read_model(config.output.uri + "/model").info
    one, two = (LatentDataset.open(uri) for uri in uris)
    assert info.dataset == {"uri": one.uri, "digest": one.digest}
    assert info.mixture == (
        DatasetShare(one.uri, one.digest, 3.0),
        DatasetShare(two.uri, two.digest, 1.0),
    )
    assert info.num_classes == 5
    np.testing.assert_allclose(info.latent_mean, (3 * one.channel_mean + two.channel_mean) / 4, rtol=1e-6)
    (card,) = Path(config.output.uri).glob("model/*/README.md")
    for uri, weight in zip(uris, ("3", "1"), strict=True):
        assert f"| Dataset, weight {weight} | `{uri}`, digest" in card.read_text()


@pytest.mark.parametrize(
    ("weight", "other", "told"),
    [
        (1.5, 1, r"stream\.shares: checkpoint \[768, 256\], now \[683, 341\]"),
        (1.0, 2, r"stream\.datasets\[1\]\.data: checkpoint '\w+', now '\w+'"),
        (1.0, 0, r"stream\.data: checkpoint None, now '\w+'"),
    ],
    ids=["weights", "data", "no mixture"],
)
def test_a_resume_with_another_mixture_is_refused(
    uris: Uris, tmp_path: Path, weight: float, other: int, told: str
) -> None:
    short = {"train": {"images": 32}}
    start(mixed(tmp_path, uris, changes=short), tmp_path)
    if other == 2:
        third = make_dataset(tmp_path / "three", rows=80, classes=5, name="three")
        config = mixed(tmp_path, (uris[0], third), weight)
    else:
        config = mixed(tmp_path, uris, weight) if other else job_config(tmp_path, uris[0])
    with pytest.raises(ConflictError, match=told):
        start(config, tmp_path)


def test_skipped_samples_are_named_with_their_dataset(
    uris: Uris, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"train": {"images": 160, "guard_norm": 1e-9, "max_skipped_in_a_row": 100}}
    with caplog.at_level(logging.WARNING, logger="pipeline.train.worker"):
        start(mixed(tmp_path, uris, changes=changes), tmp_path)
    rows = read_quarantine(Root(str(tmp_path / "run"))).to_pylist()
    assert len(rows) == 160
    known = {uri: names_of(uri) for uri in uris}
    assert all(row["sample_id"] in known[row["dataset"]] for row in rows)
    assert {row["dataset"] for row in rows} == set(uris)
    assert f"({rows[0]['dataset']}) is skipped" in caplog.text


# -- what is served --------------------------------------------------------------------------------------------


@contextmanager
def batches_of(config: TrainJobConfig) -> Iterator[Iterator[Batch]]:
    stream = open_stream(config, open_served(config), Root(config.output.uri))
    yield iter(stream)
    stream.close()


def first_batches(config: TrainJobConfig, count: int) -> list[Batch]:
    with batches_of(config) as batches:
        return list(islice(batches, count))


def test_two_workers_are_served_the_batches_of_one(
    uris: Uris, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mixed(tmp_path, uris, changes=VALIDATED)
    alone = first_batches(config, 24)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        shares.append(first_batches(config, 24))
    for batch, *halves in zip(alone, *shares, strict=True):
        assert {(half.step, half.dataset, half.epoch) for half in halves} == {
            (batch.step, batch.dataset, batch.epoch)
        }
        for name in ("latents", "sample_ids", "labels"):
            assert np.array_equal(getattr(batch, name), np.concatenate([getattr(half, name) for half in halves]))
    assert sorted({batch.dataset for batch in alone}) == [0, 1]
    assert sum(batch.dataset for batch in alone) == pytest.approx(6, abs=2)


def test_one_dataset_is_served_and_resumed_as_if_there_were_no_mixtures(uris: Uris, tmp_path: Path) -> None:
    config = job_config(tmp_path, uris[0])
    stream = open_stream(config, open_served(config), Root(config.output.uri))
    assert stream.identity == {
        "data": LatentDataset.open(uris[0]).digest,
        "layout": LatentDataset.open(uris[0]).layout_digest,
        "split": "train",
        "holdout": 0.0,
        "seed": 3,
        "batch_size": 16,
        "lanes": 4,
        "window_bytes": 1 << 30,
        "shuffle": True,
        "order": "parts",
    }
    start(job_config(tmp_path, uris[0], {"train": {"images": 64}}), tmp_path)
    info = read_model(config.output.uri + "/model").info
    assert "mixture" not in info.to_json()
    (card,) = Path(config.output.uri).glob("model/*/README.md")
    assert f"| Dataset | `{uris[0]}`, digest `{info.dataset['digest']}` |" in card.read_text()


def test_normalisation_is_that_of_what_is_served(uris: Uris, tmp_path: Path) -> None:
    far = make_dataset(tmp_path / "far", rows=64, name="far", shift=4.0)
    config = mixed(tmp_path, (uris[0], far))
    task = make_task(config, open_served(config), shake(config))
    with batches_of(config) as batches:  # a block of steps, in which the shares are exact and all epochs whole
        seen = np.concatenate([widened(batch.latents) for batch in islice(batches, 1024)]).astype(np.float64)
    np.testing.assert_allclose(task.mean, seen.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(task.std, seen.std(axis=(0, 2, 3)), rtol=1e-6)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=4), st.floats(-1e6, 1e6))
def test_the_statistics_of_one_dataset_are_its_own_to_the_bit(stds: list[float], mean: float) -> None:
    latents: Any = SimpleNamespace(channel_mean=np.full(len(stds), mean), channel_std=np.array(stds))
    pooled_mean, pooled_std = pooled_statistics([Served(latents)])
    assert np.array_equal(pooled_mean, latents.channel_mean)
    assert np.array_equal(pooled_std, latents.channel_std)


def test_held_out_samples_are_asked_in_proportion(
    uris: Uris, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = mixed(tmp_path, uris, changes=VALIDATED)
    chunks = validation_chunks(config, open_served(config), Root(config.output.uri))
    known = [names_of(uri) for uri in uris]
    ids = [chunk.ids.numpy().view(np.uint64) for chunk in chunks]
    owners = [[at for at in (0, 1) if {row.tobytes() for row in words} <= known[at]] for words in ids]
    assert owners == [[0], [0], [0], [1]]
    assert all(held_out(words, 0.25).all() for words in ids)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    again = validation_chunks(config, open_served(config), Root(config.output.uri))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(chunks, again, strict=True))


def test_memory_that_does_not_hold_all_datasets_is_refused(uris: Uris, tmp_path: Path) -> None:
    config = mixed(tmp_path, uris, changes={"stream": {"window_bytes": 1000}})
    with pytest.raises(ConfigError, match=r"stream\.window_bytes = 1000[\s\S]*the 2 datasets need at least"):
        start(config, tmp_path)


# -- handshake -------------------------------------------------------------------------------------------------


def test_a_mixture_that_fits_is_described_as_a_whole(uris: Uris, tmp_path: Path) -> None:
    assert shake(mixed(tmp_path, uris)).num_classes == 5
    other = make_dataset(tmp_path / "wide", side=16, image="wide", name="wide")
    narrow = make_dataset(tmp_path / "narrow", image="narrow")
    assert shake(mixed(tmp_path, (narrow, other))).buckets == ("32x32", "64x64")
    often = shake(mixed(tmp_path, (narrow, other), weight=4.0))
    assert (often.buckets, often.latent_size) == (("64x64", "32x32"), (16, 16))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"weights_sha256": "f" * 64}, r"codec\.weights_sha256: 0+\.* in the first, f+\.* in the second"),
        ({"posterior": "moments"}, r"posterior: mode in the first, moments in the second"),
        ({"channels": 8}, r"latent_channels: 4 in the first, 8 in the second"),
    ],
)
def test_other_latents_are_refused(uris: Uris, tmp_path: Path, made: dict[str, Any], told: str) -> None:
    other = make_dataset(tmp_path / "other", name="other", **made)
    with pytest.raises(ConflictError, match=told) as caught:
        shake(mixed(tmp_path, (uris[0], other)))
    for part in (uris[0], f"data.mix.0.uri = {other}", "one codec and one posterior", "encode the images of one"):
        assert part in str(caught.value)


def test_a_dataset_that_comes_twice_is_refused(uris: Uris, tmp_path: Path) -> None:
    copy = shutil.copytree(uris[0], tmp_path / "copy")
    for other in (uris[0], str(copy)):
        with pytest.raises(ConfigError, match=r"data.mix.0 holds the same rows as data: [\s\S]*add its weight"):
            shake(mixed(tmp_path, (uris[0], other)))


def test_labels_of_some_datasets_only_are_refused_or_ignored(uris: Uris, tmp_path: Path) -> None:
    bare = make_dataset(tmp_path / "bare", classes=None, name="bare")
    with pytest.raises(ConfigError, match=r"data.mix.0.uri = [\s\S]*all have labels[\s\S]*train.conditional=false"):
        shake(mixed(tmp_path, (uris[0], bare)))
    with pytest.raises(ConfigError, match=r"rows of .*bare have none[\s\S]*key: +data.uri = "):
        shake(mixed(tmp_path, (bare, uris[0])))
    assert shake(mixed(tmp_path, (uris[0], bare), changes={"train": {"conditional": False}})).num_classes is None


def test_a_weight_too_small_to_be_served_is_refused_before_anything_starts(uris: Uris, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.mix = \[3.0, 0.0001\][\s\S]*at least 1/1024"):
        shake(mixed(tmp_path, uris, 0.0001))


def test_text_of_some_datasets_only_is_refused(uris: Uris, tmp_path: Path) -> None:
    config = mixed(tmp_path, uris)
    part = config.data.mix[0].model_copy(update={"text": ("s3://text",)})
    config = config.model_copy(update={"data": config.data.model_copy(update={"mix": (part,)})})
    with pytest.raises(ConfigError, match=r"captions of .*two are embedded, those of .*one are not") as caught:
        shake(config)
    assert "data.text" in str(caught.value)
    assert "data.mix.0.text=[]" in str(caught.value)


def test_another_text_encoder_is_refused() -> None:
    same = {"uri": "s3://a", "fingerprint": {"width": 8, "weights_sha256": "a"}}
    check_same_encoders({"data": [same], "data.mix.0": [{**same, "uri": "s3://b"}]})
    other = {"uri": "s3://b", "fingerprint": {"width": 16, "weights_sha256": "a"}}
    with pytest.raises(ConflictError, match=r"s3://a and s3://b[\s\S]*width: 8 in the first, 16 [\s\S]*mix.0.text"):
        check_same_encoders({"data": [same], "data.mix.0": [other]})


# -- driver ----------------------------------------------------------------------------------------------------


class Notes(NoopTracker):
    """What the driver says to tracking."""

    def __init__(self) -> None:
        self.inputs: list[tuple[Any, ...]] = []
        self.params: dict[str, Any] = {}
        self.opened: dict[str, Any] = {}

    def log_input(self, *told: Any) -> None:
        self.inputs.append(told)

    def log_params(self, params: Mapping[str, object]) -> None:
        self.params |= params


def noted(config: TrainJobConfig, monkeypatch: pytest.MonkeyPatch) -> Notes:
    notes = Notes()

    def open_tracker(*_: Any, **settings: Any) -> Notes:
        notes.opened = settings
        return notes

    monkeypatch.setattr(session, "open_tracker", open_tracker)
    root = Root(config.output.uri)
    with session.open_run(config, "train", root) as run:
        job._track(config, root, run, look(config, root))
    return notes


def test_every_dataset_is_an_input_with_its_weight_and_its_run_a_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris = (make_dataset(tmp_path / "one"), make_dataset(tmp_path / "two", name="two"))
    for uri, run in zip(uris, "ab", strict=True):
        note_run(Root(uri), 1, {"handle": run * 32})
    notes = noted(mixed(tmp_path, uris), monkeypatch)
    digests = [LatentDataset.open(uri).digest for uri in uris]
    assert notes.inputs == [
        ("latents", digests[0], uris[0], "input", {"latentloom.weight": "3"}),
        ("latents", digests[1], uris[1], "input", {"latentloom.weight": "1"}),
    ]
    assert notes.opened["parents"] == {"encode": "a" * 32, "encode.mix0": "b" * 32}
    assert notes.params["data.mix"] == f"3 x {uris[0]}, 1 x {uris[1]}"
    alone = noted(job_config(tmp_path, uris[0]), monkeypatch)
    assert alone.inputs == [("latents", digests[0], uris[0], "input", None)]
    assert (alone.opened["parents"], "data.mix" in alone.params) == ({"encode": "a" * 32}, False)


def test_a_dry_run_says_how_often_each_dataset_is_seen(uris: Uris, tmp_path: Path) -> None:
    result = job.dry_run(mixed(tmp_path, uris))
    assert result.counts["rows"] == 96 + 80
    assert result.figures == {"epochs": pytest.approx(240 / 96), "epochs_mix0": pytest.approx(80 / 80)}


def test_local_places_of_all_datasets_become_whole_paths(
    uris: Uris, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = mixed(tmp_path, ("one", "two"))
    part = config.data.mix[0].model_copy(update={"text": ("text",)})
    config = config.model_copy(update={"data": config.data.model_copy(update={"mix": (part,), "text": ("more",)})})
    data = job._absolute(config).data
    places = [data.uri, *data.text, data.mix[0].uri, *data.mix[0].text]
    assert places == [str(tmp_path / name) for name in ("one", "more", "two", "text")]


def test_what_is_held_out_is_counted_before_any_worker_starts(
    uris: Uris, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    real = LatentDataset.read

    def read(self: LatentDataset, group: int, columns: Any, **options: Any) -> Any:
        counted.append(tuple(columns or ()) == SIDE_COLUMNS)
        return real(self, group, columns, **options)

    def fit(config: TrainJobConfig, root: Root, generation: int, handle: str | None, begun: Begun) -> Any:
        # Whatever a rank asks is answered by what is kept.
        before = sum(counted)
        served = open_served(config, pins_of(root, begun.inputs))
        assert len(validation_chunks(config, served, root)) == 4
        open_stream(config, served, root).close()
        assert (before, sum(counted)) == (sum(len(LatentDataset.open(uri).row_groups) for uri in uris), before)
        raise StoppedError("seen")

    monkeypatch.setattr(LatentDataset, "read", read)
    monkeypatch.setattr(job, "_fit", fit)
    monkeypatch.setattr(job, "_check_cluster", lambda config: None)
    with pytest.raises(StoppedError, match="seen"):
        job.run(mixed(tmp_path, uris, changes=VALIDATED))
