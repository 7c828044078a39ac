"""The promote job over a real sqlite store and a real record of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import validate
from pipeline.errors import ConfigError, InputError
from pipeline.evaluate.figures import Figure, Record
from pipeline.evaluate.job import RECORD, plan_promote, read_evaluation, run_promote
from pipeline.tracking.config import PromoteJobConfig, TrackingConfig
from pipeline.tracking.queries import resolve, walk
from pipeline.tracking.store import MlflowStore
from pipeline.tracking.tracker import open_tracker

pytestmark = pytest.mark.integration

FIGURES = (
    Figure("accuracy", 0.95, 0.91, 0.98, 100, "", "by the judge"),
    Figure("frechet", 12.0, 10.0, 15.0, 100, "", "distance"),
    Figure("psnr_pooled_db", 26.0, None, None, 100, "dB", "no interval"),
)


class World:
    """A training run with a registered model, a sample run of it, and an evaluation of those samples."""

    def __init__(self, tracking: TrackingConfig, base: Path) -> None:
        self.tracking, self.base = tracking, base
        self.first = self.chain("s3://b/one")
        self.second = self.chain("s3://b/two")

    def chain(self, uri: str) -> str:
        """The id of the sample run at its end."""
        train = open_tracker(self.tracking, job="train", run_name="t")
        train.register_model("flowers", uri, {})
        train.finish("FINISHED")
        sample = open_tracker(self.tracking, job="sample", run_name="s", parents={"train": str(train.run_id)})
        sample.finish("FINISHED")
        return str(sample.run_id)

    def evaluate(self, sample: str | None, name: str = "report") -> str:
        """An output of the evaluate job."""
        folder = self.base / name
        folder.mkdir(exist_ok=True)
        samples: dict[str, Any] = {"samples": {"uri": "s3://b/samples", "run_id": sample}}
        record = Record("k" * 32, FIGURES, {}, samples if sample else {}, {"kid": "too few images"}, (), {}, None)
        (folder / RECORD).write_bytes(record.to_bytes())
        return str(folder)

    def config(self, evaluation: str, **changes: Any) -> PromoteJobConfig:
        settings = {
            "evaluation": {"uri": evaluation},
            "model": {"name": "flowers"},
            "tracking": self.tracking.model_dump(),
            **changes,
        }
        return validate(PromoteJobConfig, settings)

    def alias(self) -> int:
        return resolve("models:/flowers@production", self.tracking.uri).version


@pytest.fixture
def world(tracking: TrackingConfig, tmp_path: Path) -> World:
    return World(tracking, tmp_path)


def test_an_alias_moves_to_the_version_that_was_judged(world: World) -> None:
    asked = {"at_least": {"accuracy": 0.9, "psnr_pooled_db": 25.0}, "at_most": {"frechet": 15.0}}
    result = run_promote(world.config(world.evaluate(world.first), **asked))
    assert (result.status, world.alias()) == ("done", 1)
    assert result.outputs == {"model": "models:/flowers@production", "export": "s3://b/one"}
    assert result.details["previous_version"] is None
    assert [s.job for s in walk(str(result.run_id), world.tracking.uri)] == ["promote", "train"]
    later = run_promote(world.config(world.evaluate(world.second), **asked))
    assert (world.alias(), later.details["previous_version"]) == (2, 1)
    again = run_promote(world.config(world.evaluate(world.second), **asked))
    assert (again.status, world.alias()) == ("unchanged", 2)
    tags = resolve("models:/flowers@production", world.tracking.uri).tags
    assert tags["latentloom.evaluation"] == "k" * 32


def test_every_missed_threshold_is_named_and_nothing_moves(world: World) -> None:
    run_promote(world.config(world.evaluate(world.first), at_least={"accuracy": 0.9}))
    asked = {"at_least": {"accuracy": 0.92, "recall": 0.1, "kid": 0.0}, "at_most": {"frechet": 14.0}}
    config = world.config(world.evaluate(world.second), **asked)
    with pytest.raises(InputError, match="Version 2 of flowers is not promoted") as caught:
        run_promote(config)
    assert caught.value.exit_code == 3
    for part in (
        "accuracy is 0.95 (interval 0.91 to 0.98), asked is at least 0.92",
        "frechet is 12 (interval 10 to 15), asked is at most 14",
        "recall was not taken (known are accuracy, frechet, psnr_pooled_db)",
        "kid was not taken (too few images)",
    ):
        assert part in str(caught.value)
    assert world.alias() == 1
    assert plan_promote(config).counts == {"thresholds": 4, "missed": 4}
    refused = MlflowStore(world.tracking.uri).search(None, "tags.`latentloom.promoted` = 'no'")
    assert [r.status for r in refused] == ["FAILED"]


def test_values_instead_of_bounds_are_judged_when_asked(world: World) -> None:
    config = world.config(world.evaluate(world.first), at_least={"accuracy": 0.94}, cautious=False)
    assert run_promote(config).status == "done"
    with pytest.raises(InputError, match="not promoted"):
        run_promote(config.model_copy(update={"cautious": True}))


def test_an_evaluation_of_another_model_promotes_nothing(world: World) -> None:
    stray = open_tracker(world.tracking, job="sample", run_name="s")
    stray.finish("FINISHED")
    wanted = {"at_least": {"accuracy": 0.1}}
    with pytest.raises(InputError, match="about no such version"):
        run_promote(world.config(world.evaluate(str(stray.run_id)), **wanted))
    with pytest.raises(InputError, match="about no such version"):
        run_promote(world.config(world.evaluate(world.first), **wanted, model={"name": "flowers", "version": 2}))
    with pytest.raises(InputError, match="does not say which model"):
        run_promote(world.config(world.evaluate(None), **wanted))
    with pytest.raises(InputError, match=r"The registry has no"):
        world.alias()


def test_what_is_no_evaluation_is_an_input_error(tmp_path: Path, world: World) -> None:
    with pytest.raises(InputError, match="no readable evaluation"):
        read_evaluation(str(tmp_path / "none"))
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(InputError, match=r"evaluation.json cannot be read: format"):
        read_evaluation(str(tmp_path))


def test_a_promotion_asks_for_something_and_never_for_latest(world: World) -> None:
    with pytest.raises(ConfigError, match="without thresholds checks nothing"):
        world.config("x")
    with pytest.raises(ConfigError, match="another than latest"):
        world.config("x", model={"name": "flowers", "alias": "latest"}, at_least={"accuracy": 0.5})


def test_a_figure_without_a_value_reaches_nothing() -> None:
    from pipeline.evaluate.job import missed_figures

    record = Record("k", (replace(FIGURES[2], value=float("nan")),), {}, {}, {}, (), {})
    settings = {"evaluation": {"uri": "x"}, "model": {"name": "m"}, "at_least": {"psnr_pooled_db": 1.0}}
    assert len(missed_figures(record, validate(PromoteJobConfig, settings))) == 1
