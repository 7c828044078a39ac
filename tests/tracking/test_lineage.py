"""From a sample run back to the source, over a real sqlite store."""

from __future__ import annotations

import pytest

from pipeline.errors import InputError
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.queries import descend, runs_of_dataset, walk
from pipeline.tracking.tracker import open_tracker

pytestmark = pytest.mark.integration

SOURCE, LATENTS, MODEL, IMAGES = ("a1" * 32, "b2" * 32, "c3" * 32, "d4" * 32)


def job(tracking: TrackingConfig, name: str, parents: dict[str, str], made_of: str, made: str) -> tuple[str, str]:
    """Run a job that reads one dataset and makes another; returns (run id, the handle it had before)."""
    tracker = open_tracker(tracking, job=name, run_name=f"{name} run", resume_run_id=None, parents=parents)
    handle = str(tracker.handle)
    tracker.log_input(f"{name} in", made_of, f"/data/{made_of[:2]}", "input")
    tracker.log_input(f"{name} out", made, f"/data/{made[:2]}", "output")
    tracker.finish("FINISHED")
    return str(tracker.run_id), handle


@pytest.fixture
def chain(tracking: TrackingConfig) -> dict[str, str]:
    """encode -> train -> two sample runs; the train run was named by handle when its first sample run began."""
    encode, _ = job(tracking, "encode", {}, SOURCE, LATENTS)
    train, handle = job(tracking, "train", {"encode": encode}, LATENTS, MODEL)
    first, _ = job(tracking, "sample", {"train": handle if handle.startswith("key:") else train}, MODEL, IMAGES)
    second, _ = job(tracking, "sample", {"train": train, "encode": encode}, MODEL, "e5" * 32)
    return {"encode": encode, "train": train, "first": first, "second": second}


def test_a_sample_run_leads_back_to_its_source(tracking: TrackingConfig, chain: dict[str, str]) -> None:
    steps = walk(chain["first"], tracking.uri)
    assert [(s.job, s.run_id, s.depth) for s in steps] == [
        ("sample", chain["first"], 0),
        ("train", chain["train"], 1),
        ("encode", chain["encode"], 2),
    ]
    assert [(s.inputs[0].digest, s.outputs[0].digest) for s in steps] == [
        (MODEL, IMAGES),
        (LATENTS, MODEL),
        (SOURCE, LATENTS),
    ]
    assert steps[-1].inputs[0].source == "/data/a1"
    assert {(s.status, s.found) for s in steps} == {("FINISHED", True)}
    assert steps[0].run_name == "sample run"


def test_a_run_reached_twice_is_listed_once(tracking: TrackingConfig, chain: dict[str, str]) -> None:
    steps = walk(chain["second"], tracking.uri)
    assert sorted(s.run_id for s in steps) == sorted([chain["second"], chain["train"], chain["encode"]])


def test_the_walk_goes_forward_again(tracking: TrackingConfig, chain: dict[str, str]) -> None:
    steps = descend(chain["encode"], tracking.uri)
    assert {s.run_id for s in steps} == set(chain.values())
    assert steps[0].run_id == chain["encode"]


def test_a_dataset_leads_to_the_runs_that_made_and_read_it(tracking: TrackingConfig, chain: dict[str, str]) -> None:
    assert [s.run_id for s in runs_of_dataset(LATENTS, tracking.uri)] == [chain["encode"], chain["train"]]
    assert runs_of_dataset(LATENTS[:36] + "0" * 28, tracking.uri) == []


def test_a_parent_that_is_gone_is_shown_as_gone(tracking: TrackingConfig) -> None:
    run, _ = job(tracking, "train", {"encode": "0" * 32}, LATENTS, MODEL)
    steps = walk(run, tracking.uri)
    assert [(s.run_id, s.found) for s in steps] == [(run, True), ("0" * 32, False)]


def test_questions_that_have_no_answer(tracking: TrackingConfig) -> None:
    with pytest.raises(InputError, match="There is no run"):
        walk("0" * 32, tracking.uri)
    with pytest.raises(InputError, match="There is no run key:"):
        descend("key:" + "0" * 32, tracking.uri)
    with pytest.raises(InputError, match="no run id and no digest"):
        runs_of_dataset("x' OR '1'='1", tracking.uri)
    with pytest.raises(InputError, match="cannot be read"):
        walk("0" * 32, "http://127.0.0.1:9")
