"""A run goes on with the rows it began with, whatever has become of its dataset; without Ray, in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError, ConflictError, InputError, StoppedError
from pipeline.model.load import load_model
from pipeline.result import JobResult
from pipeline.storage.root import Root
from pipeline.store.ledger.ledger import claimed
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.forget import Listed, forget
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from pipeline.stream.order import ROW_GROUPS
from pipeline.train import job
from pipeline.train.checks import handshake
from pipeline.train.config import TrainJobConfig
from pipeline.train.pinned_inputs import Begun, look, pinned, pins_of
from pipeline.train.start import Start
from pipeline.train.worker import WorkerContext, run_worker
from tests.support.maintain import compact
from tests.support.training import new_start
from tests.train.dataset import grow_dataset, make_dataset
from tests.train.helpers import stopped_after
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    in_one_process(monkeypatch, tmp_path)


def stopped_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainJobConfig:
    """A run over a dataset of its own that was stopped after seven steps."""
    config = job_config(tmp_path / "broken", make_dataset(tmp_path / "latents"))
    with stopped_after(monkeypatch, 7), pytest.raises(StoppedError, match="stopped at 112 of 320 images"):
        job.run(config)
    return config


def weights(result: JobResult) -> dict[str, torch.Tensor]:
    return load_model(result.outputs["model"])[0].state_dict()


def test_a_dataset_that_grows_and_is_compacted_changes_nothing_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = job_config(tmp_path / "whole", make_dataset(tmp_path / "a"))
    undisturbed = weights(job.run(whole))
    config = stopped_run(tmp_path, monkeypatch)
    uri = config.data.uri
    grow_dataset(uri)
    compact(uri, shard_bytes=1 << 30, row_group_bytes=1 << 20)
    assert LatentDataset.open(uri).num_rows == 144
    result = job.run(config)
    assert result.status == "done"
    assert "48 rows are new, 0 are no longer visible" in caplog.text
    resumed = weights(result)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)


def test_a_run_of_before_windows_were_made_of_parts_goes_on_in_its_own_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = job_config(tmp_path / "new", make_dataset(tmp_path / "a"))
    new = weights(job.run(config))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.train.pinned_inputs.PARTS", ROW_GROUPS)  # as a release of before starts a run
        undisturbed = weights(job.run(job_config(tmp_path / "old", config.data.uri)))
        config = stopped_run(tmp_path, monkeypatch)
    told = [json.loads(m.read_text())["meta"] for m in Path(config.output.uri).glob("checkpoints/*/COMPLETE.json")]
    assert told
    assert all("stream.order" not in meta["identity"] for meta in told)
    resumed = weights(job.run(config))
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert not all(torch.equal(undisturbed[name], new[name]) for name in undisturbed)


def test_a_run_serves_no_row_that_was_withdrawn_since_it_began_and_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = job_config(tmp_path / "whole", make_dataset(tmp_path / "a"))
    undisturbed = weights(job.run(whole))
    config = stopped_run(tmp_path, monkeypatch)
    uri, root = config.data.uri, Root(config.output.uri)
    latents = LatentDataset.open(uri)
    ids = [i for group in range(6) for i in latents.read(group, ["sample_id"])["sample_id"].to_pylist()[3:]]
    with claimed(Root(uri), "forget", patience_s=0.0) as generation:
        assert forget(generation, Listed(ids=frozenset(ids)), source_uri="mem").rows == len(ids)
    assert LatentDataset.open(uri).num_rows == latents.num_rows - len(ids)
    result = job.run(config)
    assert result.status == "done"
    assert f"{len(ids)} rows of" in caplog.text
    assert "were withdrawn since this run began" in caplog.text
    # As its ranks see it: the rows and the order that it began with, but for those.
    pins = pins_of(root, look(config, root).inputs)
    dataset = LatentDataset.open(uri, pins=pins)
    assert (dataset.num_rows, dataset.layout_digest) == (latents.num_rows, latents.layout_digest)
    assert dataset.withdrawn.count() == len(ids) > 5

    def served(of: LatentDataset) -> list[bytes]:
        with LatentStream(of, rank=0, world_size=1, batch_size=8, seed=0) as stream:
            batches = [batch for _, batch in zip(range(stream.steps_per_epoch), stream, strict=False)]
        return [word.tobytes() for batch in batches for word in batch.sample_ids]

    before, now = served(latents), served(dataset)
    assert set(ids) & set(before)
    assert not set(ids) & set(now)
    changed = [a for a, b in zip(before, now, strict=True) if a != b]
    assert set(changed) <= set(ids)
    assert not all(torch.equal(undisturbed[name], weights(result)[name]) for name in undisturbed)
    dataset.withdrawn = dataset.state.covered
    with pytest.raises(InputError, match="were withdrawn"):
        served(dataset)


def begin(config: TrainJobConfig, root: Root) -> Begun:
    return pinned(config, root, look(config, root))


def test_until_there_is_a_checkpoint_a_start_takes_what_is_visible(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "a")
    config = job_config(tmp_path, uri)
    root = Root(config.output.uri)
    first = begin(config, root)
    grow_dataset(uri)
    second = begin(config, root)
    rows = [begun.datasets[0].num_rows for begun in (first, second)]
    assert rows == [96, 144]
    # The first may still be at work: what it reads stays what it was.
    assert LatentDataset.open(uri, pins=pins_of(root, first.inputs)).num_rows == 96


@pytest.mark.usefixtures("no_patience")
def test_a_start_that_is_refused_changes_nothing_for_the_one_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make_dataset(tmp_path / "a")
    config = job_config(tmp_path, uri)
    at_work = begin(config, Root(config.output.uri))
    grow_dataset(uri)
    wrong = job_config(tmp_path, uri, {"grid": {"every_images": 64}})
    with pytest.raises(ConfigError, match="does not say where its codec lies"):
        job.run(wrong)
    generation = new_start(Root(config.output.uri))
    place = WorkerContext("cpu", generation, None, at_work.facts, True, tmp_path / "scratch", inputs=at_work.inputs)
    with stopped_after(monkeypatch, 7):
        assert run_worker(config, place)["status"] == "stopped"
    assert job.run(config).status == "done"


def test_a_run_of_before_states_were_kept_has_them_kept_from_now_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped_run(tmp_path, monkeypatch)
    for marker in Path(config.output.uri).glob("checkpoints/*/COMPLETE.json"):
        old = json.loads(marker.read_text())
        del old["meta"]["inputs"]
        marker.write_text(json.dumps(old))
    with stopped_after(monkeypatch, 3), pytest.raises(StoppedError):
        job.run(config)
    grow_dataset(config.data.uri)
    assert job.run(config).status == "done"


@pytest.mark.parametrize("name", ["../../elsewhere", "0123", 7])
def test_a_checkpoint_that_names_another_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: object
) -> None:
    config = stopped_run(tmp_path, monkeypatch)
    marker = max(Path(config.output.uri).glob("checkpoints/*/COMPLETE.json"))
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"meta": {"images": 112, "inputs": name}}))
    with pytest.raises(InputError, match="names no inputs"):
        job.run(config)


def test_a_run_whose_files_are_gone_says_which_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped_run(tmp_path, monkeypatch)
    uri = config.data.uri
    fragments = {file.info.path for file in read_state(Root(uri)).files}
    grow_dataset(uri)
    compact(uri, shard_bytes=1 << 30, row_group_bytes=1 << 20)
    for path in fragments:
        Root(uri).delete(path)
    with pytest.raises(InputError, match=r"1 files of .* that this run began with are gone, such as data/") as caught:
        job.run(config)
    assert caught.value.key == "data.uri"
    assert "another output.uri" in str(caught.value)


def test_a_dry_run_counts_the_rows_that_the_run_would_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stopped_run(tmp_path, monkeypatch)
    uri = config.data.uri
    grow_dataset(uri)
    assert job.dry_run(config).counts["rows"] == 96
    assert job.dry_run(job_config(tmp_path / "new", uri)).counts["rows"] == 144


def test_a_rank_that_sees_other_rows_than_the_driver_ends(tmp_path: Path) -> None:
    config = job_config(tmp_path, make_dataset(tmp_path / "a"))
    facts = handshake(Start(config), LatentDataset.open(config.data.uri))
    generation = new_start(Root(config.output.uri))
    other = replace(facts, layouts=("0" * 32,))
    with pytest.raises(ConflictError, match="are not those that this start of the job began with"):
        run_worker(config, WorkerContext("cpu", generation, None, other, True, tmp_path / "scratch"))
