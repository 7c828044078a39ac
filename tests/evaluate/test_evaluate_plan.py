"""The real images of a dataset are known by its plan: nothing is listed, and what has changed since gives no row."""

from __future__ import annotations

import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from evaluate_world import build_world, config_of

from pipeline.errors import InputError
from pipeline.evaluate.figures import Record
from pipeline.evaluate.inputs import Reference, Selection, inspect, reference_of, row_hash
from pipeline.evaluate.job import dry_run, run
from pipeline.source.config import FolderSource
from pipeline.source.reading.rows import sample_id
from pipeline.storage.root import Root
from pipeline.store.ledger.ledger import claimed
from pipeline.store.maintain.forget import Listed, forget
from pipeline.store.read.dataset import LatentDataset
from tests.support.encode_here import encode_here

pytestmark = pytest.mark.integration
COUNT = 96


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "world"
    folder.mkdir()
    build_world(folder, count=COUNT, samples=48)
    return folder


@pytest.fixture
def world(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real images that a test may change, and latents of them."""
    shutil.copytree(built, tmp_path / "world")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    encode(tmp_path / "world", monkeypatch)
    return tmp_path / "world"


def encode(world: Path, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    settings = {
        "source__kind": "folder",
        "source__uri": world / "real",
        "source__name": "shapes",
        "codec__path": world / "codec",
        "output__uri": world / "latents",
        "image__resolution": 32,
        "image__multiple_of": 4,
        "encode__unit_rows": 20,
    }
    return encode_here(monkeypatch, **settings | more)


def config(world: Path, report: str = "report", **more: Any) -> Any:
    few = {"classifier": {"steps": 20, "width": 16}, "fidelity": {"images": 64}, "train": None}
    places = {"data": {"uri": str(world / "latents")}, "output": {"uri": str(world / report)}}
    return config_of(world, **few | places | more)


def images(world: Path) -> list[Path]:
    return sorted((world / "real").rglob("*.png"))


def record_of(world: Path, report: str = "report") -> Record:
    record = Record.from_bytes((world / report / "evaluation.json").read_bytes())
    assert record is not None
    return record


@pytest.fixture
def unlisted(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source gives its objects and no listing."""
    listed = Root.list

    def refuse(root: Root, *args: Any, **settings: Any) -> Any:
        if Path(root.uri).is_relative_to(world / "real"):
            raise PermissionError("nobody may list here")
        return listed(root, *args, **settings)

    monkeypatch.setattr(Root, "list", refuse)


def test_a_source_that_cannot_be_listed_is_evaluated_by_the_plan_of_its_latents(world: Path, unlisted: None) -> None:
    with pytest.raises(InputError, match=r"cannot be listed[\s\S]*reference\.uri"):
        run(config(world, data=None))
    assert dry_run(config(world)).counts == {"samples": 48, "reference": COUNT, "to_evaluate": 1}
    result = run(config(world))
    assert (result.status, result.counts["reference"], result.counts["source_changed"]) == ("done", COUNT, 0)
    assert record_of(world).inputs["reference"]["known_by"] == f"the plan of {world / 'latents'}"
    assert "objects of the latents" in (world / "report" / "report.html").read_text()
    assert run(config(world)).status == "unchanged"


def test_a_plan_of_all_that_is_listed_gives_the_figures_of_the_listing(world: Path) -> None:
    planned, listed = run(config(world)), run(config(world, "listed", data=None))
    assert planned.figures == listed.figures
    a, b = record_of(world), record_of(world, "listed")
    assert a.contract == b.contract  # the digest of the reference among it
    assert b.inputs["reference"]["known_by"] == "a listing"
    assert "source_changed" not in listed.counts


def keys(reference: Reference) -> set[str]:
    return {entry.key for entry, _ in reference.rows()}


def test_rows_that_were_rejected_filtered_or_withdrawn_are_no_reference(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [path.relative_to(world / "real").as_posix() for path in images(world)]
    images(world)[0].write_bytes(b"broken")  # is planned anew, and rejected
    images(world)[1].write_bytes(images(world)[2].read_bytes())  # another picture now, its old row retired
    encode(world, monkeypatch, encode__reject_budget=0.5)
    root = Root(str(world / "latents"))
    with claimed(root, "forget", patience_s=0.0) as generation:
        forget(generation, Listed(ids=frozenset({sample_id("shapes", names[3])})), source_uri="mem")
    images(world)[5].unlink()
    inputs = inspect(config(world))
    assert keys(inputs.images) == set(names) - {names[0], names[3]}
    assert inputs.reference.rows == COUNT - 2
    # Whoever fits the classifier, perhaps elsewhere, knows the same rows.
    assert list(pickle.loads(pickle.dumps(inputs.images)).rows()) == list(inputs.images.rows())
    # A choice of few is one of the stored rows, those whose addresses hash lowest.
    selection = Selection(inputs.images, 10, inputs.reference.rows)
    pieces = selection.next_round(4)
    assert pieces is not None
    chosen = list(pieces)
    assert [len(piece) for piece in chosen] == [4, 4, 2]
    every = sorted(row_hash(entry, row) for entry, row in inputs.images.rows())
    assert sorted(row_hash(entry, row) for piece in chosen for entry, row in piece) == every[:10]


def test_what_has_changed_or_gone_since_it_was_planned_gives_no_row_and_is_counted(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(config(world, "whole", reference_cache=str(world / "cache")))
    (kept,) = (world / "cache" / "reference").iterdir()
    kept.unlink()
    changed, gone, *_ = images(world)
    changed.write_bytes(images(world)[-1].read_bytes() + b"\0")  # a sound image, yet another one
    gone.unlink()
    result = run(config(world, reference_cache=str(world / "cache")))
    assert result.counts["source_changed"] == 2
    assert result.counts["reference"] == whole.counts["reference"] - 2 == COUNT - 2
    assert "2 real images have changed or gone" in (world / "report" / "report.html").read_text()
    assert "2 real images have changed or gone" in caplog.text
    # The plan is what it was, and so is its digest: what lacks two images is not kept under it.
    assert record_of(world).inputs["reference"] == record_of(world, "whole").inputs["reference"]
    assert list((world / "cache" / "reference").iterdir()) == []
    assert (world / "whole" / "classifier.safetensors").exists()
    assert not (world / "report" / "classifier.safetensors").exists()


def test_another_source_than_that_of_the_latents_is_listed(world: Path) -> None:
    latents = LatentDataset.open(str(world / "latents"), "data.uri")
    same = {"kind": "folder", "uri": str(world / "real")}
    assert reference_of(FolderSource.model_validate(same), latents).plan is not None
    (world / "link").symlink_to(world / "real")
    assert reference_of(FolderSource.model_validate(same | {"uri": str(world / "link")}), latents).plan is not None
    shutil.copytree(world / "real", world / "other")
    for other in ({"uri": str(world / "other")}, {"label": None}, {"filter": "label > 3"}, {"classes": ("a", "b")}):
        assert reference_of(FolderSource.model_validate(same | other), latents).plan is None
    assert reference_of(FolderSource.model_validate(same), None).plan is None
    shutil.rmtree(world / "real")
    with pytest.raises(InputError, match=r"There is no source at[\s\S]*reference\.uri"):
        reference_of(FolderSource.model_validate(same), latents)


def test_rows_of_a_tar_are_those_that_were_stored_of_it(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rows a tar has the plan does not tell: the ledger does."""
    images(world)[3].write_bytes(b"broken")
    lines = (world / "real" / "metadata.jsonl").read_text().splitlines()
    labels = {line["file_name"]: line["label"] for line in map(json.loads, lines)}
    (world / "tars").mkdir()
    for number in range(3):
        with tarfile.open(world / "tars" / f"{number}.tar", "w") as archive:
            for path in images(world)[32 * number : 32 * number + 32]:
                name = path.relative_to(world / "real").as_posix()
                text = world / "label.cls"
                text.write_text(str(labels[name]))
                archive.add(path, path.name)
                archive.add(text, path.with_suffix(".cls").name)
    tars = {"source__kind": "webdataset", "source__uri": world / "tars", "source__label": "cls"}
    encode(world, monkeypatch, output__uri=world / "tar latents", encode__reject_budget=0.5, **tars)
    reference = {"kind": "webdataset", "uri": str(world / "tars"), "name": "shapes", "label": "cls"}
    data = {"uri": str(world / "tar latents")}
    inputs = inspect(config(world, reference=reference, data=data))
    assert (inputs.reference.entries, inputs.reference.rows) == (3, COUNT - 1)
    result = run(config(world, reference=reference, data=data))
    assert (result.counts["reference"], result.counts["source_changed"]) == (COUNT - 1, 0)
    assert "accuracy" in result.figures
    # Of a tar that was replaced all rows are gone, and no others.
    shutil.copy(world / "tars" / "1.tar", world / "tars" / "0.tar")
    result = run(config(world, "again", reference=reference, data=data))
    assert (result.counts["reference"], result.counts["source_changed"]) == (COUNT - 32, 31)
