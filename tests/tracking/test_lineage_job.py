"""The lineage job, from every kind of start, over a real sqlite store, a real dataset and real image files."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.lineage import find_start, plan, run
from pipeline.media import encode_image
from pipeline.result import JobResult
from pipeline.sample.provenance import Draw, Origin, provenance
from pipeline.sample.requests import FIELDS, request_id
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import note_run, noted_runs
from pipeline.store.read.dataset import LatentDataset
from pipeline.tracking.config import LineageJobConfig, TrackingConfig
from pipeline.tracking.tracker import open_tracker
from tests.support.jobs import run as run_job
from tests.support.rows import claim, committer, latent_rows, planned_root

pytestmark = pytest.mark.integration

SOURCE, MODEL, IMAGES = ("a1" * 16, "c3" * 16, "d4" * 16)
DRAW = Draw(7, "euler", 1.0, 4, "cpu", 1, "float32", "png", 95)


@dataclass
class Chain:
    """encode (twice, incrementally) -> dataset -> train -> sample, and the image that came out."""

    tracking: TrackingConfig
    data: Root
    first: str = ""
    encode: str = ""
    train: str = ""
    sample: str = ""
    image: str = ""

    def ask(self, start: str) -> JobResult:
        return run(LineageJobConfig(start=start, tracking=self.tracking))

    def job(self, name: str, parents: dict[str, str], made_of: list[tuple[str, str]], made: tuple[str, str]) -> str:
        tracker = open_tracker(self.tracking, job=name, run_name=f"{name} it", resume_run_id=None, parents=parents)
        for digest, uri in made_of:
            tracker.log_input(uri, digest, uri, "input")
        tracker.log_input(made[1], made[0], made[1], "output")
        tracker.finish("FINISHED")
        return str(tracker.run_id)

    def draw(self, path: Path, kind: str, run_id: str | None, dataset_digest: str | None) -> str:
        request = dict.fromkeys((*FIELDS, "extra")) | {
            "label": 3,
            "seed": 5,
            "height": 8,
            "width": 8,
            "steps": 2,
            "guidance": 1.0,
        }
        origin = Origin("s3://m/model", MODEL, run_id, "ema", self.data.uri, dataset_digest, "codec", "ff" * 32)
        story = provenance({"request_id": request_id(request), **request}, DRAW, origin)
        path.write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8), story, kind=kind))
        return str(path)


@pytest.fixture
def chain(tracking: TrackingConfig, tmp_path: Path) -> Chain:
    data = planned_root(str(tmp_path / "latents"), units=1, rows=2)
    chain = Chain(tracking, data)
    for row, name in enumerate(("first", "encode")):
        generation = claim(data)
        committer(data, generation).commit(latent_rows([(0, row)]), None, {})
        digest = LatentDataset.open(data.uri).digest
        run_id = chain.job("encode", {}, [(SOURCE, "s3://photos")], (digest, data.uri))
        setattr(chain, name, run_id)
        note_run(data, generation.number, {"handle": run_id, "run_id": run_id})
        generation.close({"status": "done"})
    chain.train = chain.job("train", {"encode": chain.encode}, [(digest, data.uri)], (MODEL, "s3://m/model"))
    chain.sample = chain.job("sample", {"train": chain.train}, [(MODEL, "s3://m/model")], (IMAGES, "s3://images"))
    chain.image = chain.draw(tmp_path / "one.png", "png", chain.train, digest)
    return chain


def ids(result: JobResult, direction: str) -> list[str]:
    return [step["run_id"] for step in result.details[direction]]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_leads_to_its_source(chain: Chain, tmp_path: Path, kind: str) -> None:
    image = chain.draw(tmp_path / f"x.{kind}", kind, chain.train, None)
    result = chain.ask(image)
    assert (ids(result, "back"), ids(result, "forward")) == ([chain.train, chain.encode], [chain.sample])
    assert result.details["sources"] == [{"uri": "s3://photos", "digest": SOURCE, "context": "input"}]
    assert result.details["start"]["kind"] == "image"
    assert result.details["start"]["facts"]["request"]["label"] == 3
    assert result.counts == {"back": 2, "forward": 1, "missing": 0}
    assert json.loads(result.to_json("lineage"))["details"] == json.loads(json.dumps(result.details))


def test_it_reads_as_text(chain: Chain, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pipeline"):
        chain.ask(chain.image)
    lines = [r.getMessage() for r in caplog.records if r.name == "pipeline.lineage"]
    assert lines[0] == f"image {chain.image}"
    assert lines[1].split() == ["drawn", "by", "s3://m/model", MODEL[:12]]
    places = [
        next(i for i, line in enumerate(lines) if text in line) for text in (chain.train, chain.encode, "forward")
    ]
    assert places == sorted(places)
    assert lines[-1].split() == ["source:", "s3://photos", SOURCE[:12]]


def test_a_run_leads_both_ways(chain: Chain) -> None:
    middle = chain.ask(chain.train)
    assert (ids(middle, "back"), ids(middle, "forward")) == ([chain.train, chain.encode], [chain.sample])
    last = chain.ask(chain.sample)
    assert (ids(last, "back"), ids(last, "forward")) == ([chain.sample, chain.train, chain.encode], [])
    assert [s["uri"] for s in last.details["sources"]] == ["s3://photos"]


def test_a_model_of_several_datasets_leads_to_all_of_them(chain: Chain) -> None:
    other = chain.job("encode", {}, [("b2" * 16, "s3://drawings")], ("e5" * 16, "s3://latents"))
    made_of = [("f6" * 16, chain.data.uri), ("e5" * 16, "s3://latents")]
    parents = {"encode": chain.encode, "encode.mix0": other}
    result = chain.ask(chain.job("train", parents, made_of, ("a7" * 16, "s3://m/both")))
    assert set(ids(result, "back")[1:]) == {chain.encode, other}
    assert {"s3://photos", "s3://drawings"} <= {source["uri"] for source in result.details["sources"]}


def test_a_dataset_leads_to_all_runs_that_wrote_it_and_those_that_read_it(chain: Chain) -> None:
    assert noted_runs(chain.data) == [chain.encode, chain.first]
    result = chain.ask(chain.data.uri)
    assert set(ids(result, "back")) == {chain.first, chain.encode}
    assert ids(result, "forward") == [chain.train, chain.sample]
    assert result.details["start"]["facts"]["rows"] == 2


def test_a_reader_without_a_parent_is_found_by_digest(chain: Chain) -> None:
    digest = LatentDataset.open(chain.data.uri).digest
    other = chain.job("evaluate", {}, [(digest, chain.data.uri)], ("e5" * 16, "s3://report"))
    assert set(ids(chain.ask(chain.data.uri), "forward")) == {chain.train, chain.sample, other}


def test_an_image_without_a_run_is_traced_by_its_training_data(chain: Chain, tmp_path: Path) -> None:
    digest = LatentDataset.open(chain.data.uri).digest
    result = chain.ask(chain.draw(tmp_path / "x.png", "png", None, digest))
    assert ids(result, "back") == [chain.encode]
    with pytest.raises(InputError, match="Nothing recorded says where"):
        chain.ask(chain.draw(tmp_path / "y.png", "png", None, None))


def test_a_run_that_only_the_image_remembers_is_shown_as_gone(chain: Chain, tmp_path: Path) -> None:
    result = chain.ask(chain.draw(tmp_path / "x.png", "png", "0" * 32, None))
    assert [(s["run_id"], s["found"]) for s in result.details["back"]] == [("0" * 32, False)]
    assert result.counts == {"back": 1, "forward": 0, "missing": 1}
    with pytest.raises(InputError, match="There is no run"):
        chain.ask("0" * 32)


def test_starts_that_are_none(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "plain.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for start, message in (
        ("nowhere.png", "neither a run id nor an existing file or dataset"),
        (str(tmp_path / "empty"), "is no dataset"),
        (str(tmp_path / "plain.png"), "no readable PNG, JPEG or WebP"),
    ):
        with pytest.raises(InputError, match=message):
            find_start(start)
    (tmp_path / "x.png").write_bytes(encode_image(np.zeros((8, 8, 3), np.uint8), {"format": "latentloom image 9"}))
    with pytest.raises(InputError, match="has the format 'latentloom image 9'"):
        find_start(str(tmp_path / "x.png"))


def test_asking_makes_no_store(chain: Chain, tmp_path: Path) -> None:
    absent = chain.tracking.model_copy(update={"uri": f"sqlite:///{tmp_path}/none.db"})
    with pytest.raises(InputError, match="There is no tracking store"):
        run(LineageJobConfig(start=chain.image, tracking=absent))
    assert not (tmp_path / "none.db").exists()
    planned = plan(LineageJobConfig(start=chain.image, tracking=absent))
    assert (planned.status, planned.details["start"]["runs"]) == ("dry-run", (chain.train,))


@pytest.mark.slow
def test_the_command_answers_on_its_last_line(chain: Chain, tmp_path: Path) -> None:
    code, answer, errors = run_job(
        "lineage", f"start={chain.image}", f"tracking.uri={chain.tracking.uri}", cwd=tmp_path
    )
    assert code == 0, errors
    assert [s["run_id"] for s in answer["details"]["back"]] == [chain.train, chain.encode]
    assert "source: s3://photos" in errors
