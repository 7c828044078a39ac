"""One rank on a real dataset, without Ray: train, stop, resume, validate, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ConfigError, ConflictError
from pipeline.model.load import load_model
from pipeline.model.read import read_model
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import latest_number, note_run
from pipeline.store.read.dataset import LatentDataset
from pipeline.train.checks import handshake
from pipeline.train.config import TrainJobConfig
from pipeline.train.control import request_stop
from pipeline.train.retention import COUNT, read_records
from pipeline.train.start import Start
from pipeline.train.worker import WorkerContext, run_worker, set_matmul_precision
from tests.support.training import new_start
from tests.train.dataset import make_dataset
from tests.train.earlier_history import write_segments
from tests.train.helpers import stopped_after
from tests.train.job_config import job_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_dataset(tmp_path_factory.mktemp("latents"))


def start(config: TrainJobConfig, tmp_path: Path) -> dict[str, Any]:
    facts = handshake(Start(config), LatentDataset.open(config.data.uri))
    generation = new_start(Root(config.output.uri))
    return run_worker(config, WorkerContext("cpu", generation, None, facts, True, tmp_path / "scratch"))


VALIDATED = {"stream": {"holdout": 0.25}, "validation": {"images": 16, "chunk": 4, "every_images": 128}}


def test_a_run_learns_validates_and_exports_its_average(data_uri: str, tmp_path: Path) -> None:
    config = job_config(tmp_path, data_uri, VALIDATED | {"train": {"images": 960}})
    outcome = start(config, tmp_path)
    assert outcome == {"status": "done", "step": 60, "images": 960}
    records = read_records(Root(config.output.uri))
    checks = [r for r in records if "val/loss" in r]
    assert [r["images"] for r in checks] == [128, 256, 384, 512, 640, 768, 896, 960]
    assert checks[-1]["val/loss"] < checks[0]["val/loss"]
    assert checks[-1]["val/ema/loss"] != checks[-1]["val/loss"]
    model, info = load_model(config.output.uri + "/model")
    assert (info.images_seen, info.ema, info.num_classes, info.latent_channels) == (960, "ema", 3, 4)
    assert info.dataset["digest"] == LatentDataset.open(data_uri).digest
    assert model(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.tensor([3])).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("recorded", ["with its checkpoint", "in segments", "in one file"])
def test_stop_and_resume_leave_the_history_and_export_of_an_undisturbed_run(
    data_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: str
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(job_config(whole, data_uri, VALIDATED), whole)
    config = job_config(broken, data_uri, VALIDATED)
    with stopped_after(monkeypatch, 7):
        assert start(config, broken) == {"status": "stopped", "step": 7, "images": 112}
    if recorded != "with its checkpoint":
        as_of_an_earlier_release(Root(config.output.uri), recorded)
    assert start(config, broken)["status"] == "done"

    def timeless(path: Path) -> list[dict[str, Any]]:
        clock = ("images_per_s", "data_wait_share")
        return [{k: v for k, v in r.items() if k not in clock} for r in read_records(Root(str(path / "run")))]

    assert timeless(broken) == timeless(whole)
    weights = [load_model(str(p / "run" / "model"))[0].state_dict() for p in (whole, broken)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def as_of_an_earlier_release(root: Root, recorded: str) -> None:
    """A run whose worker had gone on for a while after its last checkpoint, and was then killed."""
    records = [*read_records(root), {"step": 9, "images": 144, "loss": 1.0}]
    for info in list(root.list("checkpoints")):
        if info.key.endswith("COMPLETE.json"):
            marker = json.loads(root.read_bytes(info.key))
            del marker[COUNT]
            root.put(info.key, json.dumps(marker).encode())
        elif info.key.endswith("history.jsonl"):
            root.delete(info.key)
    if recorded == "in segments":
        write_segments(root, records, starts=1)
    else:
        root.put("history.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())


def test_an_export_says_how_it_is_to_be_sampled(data_uri: str, tmp_path: Path) -> None:
    source = {"kind": "folder", "uri": "x", "classes": ["owl", "fox"]}
    note = {"handle": "h", "recipe": {"source": source, "image": {}, "batch_size": 1}}
    note_run(Root(data_uri), latest_number(Root(data_uri)), note)
    changes = {"train": {"images": 32, "label_dropout": 0.0}, "timesteps": {"shift": 2.0, "shift_base_pixels": 16}}
    start(job_config(tmp_path / "a", data_uri, changes), tmp_path)
    info = read_model(str(tmp_path / "a" / "run" / "model")).info
    assert (info.always_labelled, info.guidable) == (True, False)
    assert info.classes == ("owl", "fox")
    assert (info.sampling_shift, info.buckets) == (4.0, ("32x32",))
    # Another size is drawn with the shift that it was trained with, or would have been.
    assert [info.shift_at(*size, 25) for size in ((8, 8), (16, 16), (4, 16))] == [4.0, 8.0, 4.0]
    start(job_config(tmp_path / "b", data_uri, {"train": {"images": 32}, "objective": {"kind": "v"}}), tmp_path)
    info = read_model(str(tmp_path / "b" / "run" / "model")).info
    assert (info.always_labelled, info.guidable, info.sampling_shift) == (False, True, 1.0)


def test_a_validation_larger_than_what_is_held_out_names_its_own_keys(data_uri: str, tmp_path: Path) -> None:
    changes = {"stream": {"holdout": 0.05}, "validation": {"images": 64, "chunk": 64}}
    with pytest.raises(ConfigError, match=r"validation\.chunk = 64[\s\S]*stream\.holdout=0\.05"):
        start(job_config(tmp_path, data_uri, changes), tmp_path)


def test_a_newer_start_takes_over(data_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.train import control

    monkeypatch.setattr(control, "POLL_S", 0.01)
    config = job_config(tmp_path, data_uri, {"train": {"images": 100_000_000}, "checkpoint": {"every_images": 10**9}})
    root = Root(config.output.uri)
    facts = handshake(Start(config), LatentDataset.open(data_uri))
    old = new_start(root)
    new_start(root)
    with pytest.raises(ConflictError, match="Another run has taken over"):
        run_worker(config, WorkerContext("cpu", old, None, facts, True, tmp_path / "scratch"))


def test_a_stop_request_of_the_driver_reaches_the_loop(
    data_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.train import control

    monkeypatch.setattr(control, "POLL_S", 0.01)
    config = job_config(tmp_path, data_uri, {"train": {"images": 100_000_000}, "checkpoint": {"every_images": 10**9}})
    root = Root(config.output.uri)
    facts = handshake(Start(config), LatentDataset.open(data_uri))
    generation = new_start(root)
    request_stop(root, generation)
    outcome = run_worker(config, WorkerContext("cpu", generation, None, facts, True, tmp_path / "scratch"))
    assert outcome["status"] == "stopped"
    assert any(i.key.endswith("COMPLETE.json") for i in root.list("checkpoints"))


def test_a_resume_on_other_settings_is_refused_field_by_field(data_uri: str, tmp_path: Path) -> None:
    start(job_config(tmp_path, data_uri, {"train": {"images": 64}}), tmp_path)
    other = job_config(tmp_path, data_uri, {"train": {"images": 128, "seed": 4}, "model": {"hidden": 32}})
    with pytest.raises(ConflictError, match=r"model.hidden: checkpoint 16, now 32.*seed: checkpoint 3, now 4"):
        start(other, tmp_path)


def test_stored_posteriors_and_unconditional_models_train(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "moments", classes=None, posterior="moments")
    config = job_config(tmp_path, uri, {"train": {"images": 64}})
    assert start(config, tmp_path)["status"] == "done"
    _, info = load_model(config.output.uri + "/model")
    assert (info.num_classes, info.latent_channels, info.guidable) == (None, 4, True)


@pytest.mark.parametrize(
    ("device", "tf32", "told"), [("cuda:1", True, ["high"]), ("cuda", False, ["highest"]), ("cpu", True, [])]
)
def test_products_of_fp32_are_in_tf32_on_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, device: str, tf32: bool, told: list[str]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    set_matmul_precision(device, tf32)
    assert calls == told
