"""One run protocol: who may write, which MLflow run goes on, and what a run leaves however it ends."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from pipeline import runs as session
from pipeline.config import StrictModel, load_config
from pipeline.errors import ConfigError, ConflictError, InputError, PipelineError, StoppedError
from pipeline.maintenance.config import CompactJobConfig, VerifyJobConfig
from pipeline.maintenance.job import run_compact, run_verify
from pipeline.result import JobResult
from pipeline.runs import open_run
from pipeline.storage.root import Root
from pipeline.store.ledger import generation as generations
from pipeline.store.ledger.generation import claim_next, last_run, latest_number, read_closing
from pipeline.store.ledger.ledger import claimed
from pipeline.tracking.config import LineageJobConfig, TrackingConfig
from pipeline.tracking.tracker import NoopTracker
from pipeline.train import job as train_job
from tests.support.encode_here import encode_here
from tests.support.images import make_images
from tests.support.maintain import compact
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config


class Config(StrictModel):
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where.")


class Recorder(NoopTracker):
    """A run that remembers what it was told."""

    def __init__(self, number: int, resumed: str | None) -> None:
        self.run_id = self.handle = resumed or f"run-{number}"
        self.metrics: dict[str, float] = {}
        self.ended: list[str] = []

    def wait_run_id(self, timeout_s: float) -> str | None:
        return self.run_id

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.metrics |= metrics

    def finish(self, status: str) -> None:
        self.ended.append(status)


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    opened: list[Recorder] = []

    def open_tracker(*_: Any, resume_run_id: str | None, **__: Any) -> Recorder:
        opened.append(Recorder(len(opened), resume_run_id))
        return opened[-1]

    monkeypatch.setattr(session, "open_tracker", open_tracker)
    return opened


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(str(tmp_path / "out"))


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is silent for a second is dead."""
    monkeypatch.setattr(generations, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(session, "claimed", partial(claimed, patience_s=1.0))


def test_a_run_that_ends_is_closed_and_told(root: Root, trackers: list[Recorder]) -> None:
    with open_run(Config(), "encode", root) as run:
        run.track("n", params={}, note={"source": "s"})
        result = run.done(JobResult("done", {"rows": 3}, figures={"loss": 0.5}), step=3)
    assert result.run_id == "run-0"
    assert trackers[0].metrics == {"rows": 3.0, "loss": 0.5}
    assert trackers[0].ended == ["FINISHED"]
    assert read_closing(root, 1) == {"status": "done"}
    note = last_run(root)
    assert (note["job"], note["run_id"], note["source"], note["unfinished"]) == ("encode", "run-0", "s", False)


@pytest.mark.parametrize(
    ("error", "ended", "closed"),
    [
        (StoppedError("stopped"), "KILLED", "StoppedError"),
        (InputError("bad"), "FAILED", "InputError"),
        (KeyboardInterrupt(), "KILLED", None),
        (ZeroDivisionError(), "FAILED", None),
    ],
)
def test_the_next_run_goes_on_with_the_mlflow_run_of_one_that_did_not_end(
    root: Root, trackers: list[Recorder], error: BaseException, ended: str, closed: str | None
) -> None:
    with pytest.raises(type(error)), open_run(Config(), "encode", root) as run:
        run.track("n", params={})
        raise error
    assert trackers[0].ended == [ended]
    assert (read_closing(root, 1) or {}).get("status") == closed
    # Another job in between goes on with nothing of it, and is not in its way.
    with open_run(Config(), "compact", root) as run:
        assert run.track("n", params={}).run_id == "run-1"
    with open_run(Config(), "encode", root) as run:
        assert run.track("n", params={}).run_id == "run-0"
    with open_run(Config(), "encode", root) as run:
        assert run.track("n", params={}).run_id == "run-3"


def test_a_run_about_something_else_is_not_gone_on_with(root: Root, trackers: list[Recorder]) -> None:
    for about, expected in (("a", "run-0"), ("b", "run-1"), ("b", "run-1")):
        with pytest.raises(StoppedError), open_run(Config(), "evaluate", root) as run:
            assert run.track("n", params={}, about=about).run_id == expected
            raise StoppedError("stopped")


def test_what_a_failure_tells_as_its_result_is_recorded(root: Root, trackers: list[Recorder]) -> None:
    with pytest.raises(PipelineError) as caught, open_run(Config(), "encode", root) as run:
        run.track("n", params={})
        raise PipelineError("over budget").with_result(JobResult("done", {"rejected": 7}))
    assert trackers[0].metrics == {"rejected": 7.0}
    assert caught.value.result is not None
    assert caught.value.result.run_id == "run-0"


def test_a_store_that_fails_meanwhile_does_not_hide_why_a_job_ended(
    root: Root, trackers: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(PipelineError, match="over budget"), open_run(Config(), "encode", root) as run:
        run.track("n", params={})
        monkeypatch.setattr(Root, "put", full)
        raise PipelineError("over budget").with_result(JobResult("done", {"rejected": 7}))
    assert trackers[0].ended == ["FAILED"]


def test_rows_are_not_the_work_of_who_only_moved_them(root: Root, trackers: list[Recorder]) -> None:
    for job in ("encode", "compact"):
        with open_run(Config(), job, root) as run:
            run.track("n", params={})
    assert last_run(root)["run_id"] == "run-0"
    assert last_run(root, job="compact")["run_id"] == "run-1"


def test_every_job_steps_back_from_a_living_run(tmp_path: Path) -> None:
    """The training job, too: it superseded a living run while every other one stepped back."""
    data = make_dataset(tmp_path / "data")
    config = job_config(tmp_path, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_job, "_check_cluster", lambda config: None)
        patch.setattr(train_job, "_fit", lambda *_: pytest.fail("it trains beside a living run"))
        living = claim_next(Root(config.output.uri), lambda _: [], job="train")
        try:
            with pytest.raises(ConflictError, match="Another run is writing"):
                train_job.run(config)
            assert latest_number(Root(config.output.uri)) == living.number
        finally:
            living.abandon()


@pytest.mark.integration
def test_a_codec_its_latents_and_their_upkeep_are_one_chain(
    tmp_path: Path, tracking: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a real store: fit_codec is the parent of encode, and verify and compact are runs under it."""
    from pipeline.codec.config import FitCodecJobConfig
    from pipeline.fit_codec import job as fit_job
    from pipeline.lineage import run as lineage

    images = make_images(tmp_path / "images", 24)
    recorded = [
        f"tracking.{name}={value}" for name, value in tracking.model_dump(include={"uri", "journal_dir"}).items()
    ]
    fit = ["fit.steps=2", "fit.images=8", "fit.holdout=2", "fit.batch_size=2", "fit.block_out_channels=[8,16]"]
    fit += ["fit.norm_groups=4", "image.resolution=32", "image.multiple_of=4", f"output.uri={tmp_path / 'codec'}"]
    source = ["source.kind=folder", f"source.uri={images}"]
    fitted = fit_job.run(load_config(FitCodecJobConfig, [], [*source, *fit, *recorded]))
    encoded = encode_here(
        monkeypatch,
        source__kind="folder",
        source__uri=images,
        image__resolution=32,
        image__multiple_of=4,
        codec__path=tmp_path / "codec",
        output__uri=tmp_path / "latents",
        encode__unit_rows=4,
        tracking__enabled=True,
        tracking__uri=tracking.uri,
        tracking__journal_dir=tracking.journal_dir,
    )
    data = [f"data.uri={tmp_path / 'latents'}", *recorded]
    verified = run_verify(load_config(VerifyJobConfig, [], data))
    compacted = run_compact(load_config(CompactJobConfig, [], [*data, "shard_bytes=65536"]))
    assert (verified.status, compacted.status) == ("done", "done")
    again = run_compact(load_config(CompactJobConfig, [], [*data, "shard_bytes=65536"]))
    assert (again.status, again.run_id) == ("unchanged", compacted.run_id)

    story = lineage(LineageJobConfig(start=str(tmp_path / "latents"), tracking=tracking)).details
    assert {step["run_id"] for step in story["back"]} >= {fitted.run_id, encoded.run_id, compacted.run_id}
    later = lineage(LineageJobConfig(start=str(fitted.run_id), tracking=tracking)).details
    assert {step["run_id"] for step in later["forward"]} >= {encoded.run_id, verified.run_id, compacted.run_id}


def test_compaction_that_finds_nothing_to_do_claims_nothing(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    settings = {"shard_bytes": 1 << 20, "row_group_bytes": 1 << 20}
    compact(data, seed=0, **settings)
    claims = latest_number(Root(data))
    given = [f"data.uri={data}", "tracking.enabled=false", *(f"{key}={value}" for key, value in settings.items())]
    config = load_config(CompactJobConfig, [], given)
    assert run_compact(config).status == "unchanged"
    assert latest_number(Root(data)) == claims
    assert json.loads(Root(data).read_bytes(f"generations/{claims:08d}/closed.json"))["status"] == "done"


def test_a_leaf_names_its_own_argument_and_a_job_its_key(tmp_path: Path) -> None:
    """In a notebook there is no train.batch_size; on a command line there is no batch_size."""
    from pipeline.store.read.dataset import LatentDataset
    from pipeline.stream.loader import LatentStream
    from pipeline.train.inputs import open_served, open_stream

    data = make_dataset(tmp_path / "data")
    with pytest.raises(ConfigError, match=r"key:   batch_size = 4096") as caught:
        LatentStream(LatentDataset.open(data), seed=0, batch_size=4096, lanes=1, window_bytes=1 << 30)
    assert "train." not in str(caught.value)
    config = job_config(tmp_path, data, {"train": {"batch_size": 4096}})
    with pytest.raises(ConfigError, match=r"key:   train\.batch_size = 4096"):
        open_stream(config, open_served(config), Root(config.output.uri))
    with pytest.raises(InputError, match=r"key:   uri = "):
        LatentDataset.open(str(tmp_path / "nowhere"))
