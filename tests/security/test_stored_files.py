"""What the project reads back may have been changed: that is an input error which names the file, never a bug.

Each kind of file is mutated (see `mutations`) and read as jobs read it. A reader may pass over a change that does not
concern it; what it raises must have a meaning for the command line.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from pipeline.codec.codec import load_codec
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.evaluate import job as evaluate_job
from pipeline.evaluate.classifier import Classifier, ConvNet, _digest, from_bytes, to_bytes
from pipeline.evaluate.figures import Figure, Record
from pipeline.evaluate.inputs import open_samples
from pipeline.evaluate.passes import sample_batches
from pipeline.features.statistics import wilson
from pipeline.lineage import find_start
from pipeline.media import KEYWORD, encode_image
from pipeline.model.load import load_model
from pipeline.model.read import read_model
from pipeline.result import JobResult
from pipeline.sample import regenerate as regenerate_job
from pipeline.sample.config import RegenerateJobConfig
from pipeline.sample.plan import RequestEntry, planned_requests
from pipeline.sample.provenance import Origin, provenance
from pipeline.sample.requests import request_id
from pipeline.storage.errors import job_error
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import last_recipe, last_run, note_run, noted_runs
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.dedup import is_due
from pipeline.store.maintain.verify import verify
from pipeline.store.plan import Plan, append_version, live_entries, read_entries
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.read.pins import Pins
from pipeline.text.dataset import TextEmbeddings
from pipeline.text.job import planned_hashes
from pipeline.tracking.config import PromoteJobConfig
from pipeline.tracking.journal import Header, JournalReader, JournalWriter
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.control import listed_checkpoints, record_failure, recorded_failure
from pipeline.train.job import finished
from pipeline.train.retention import History, read_records
from pipeline.train.worker import Quarantine
from tests.evaluate.evaluate_world import real_images, write_samples
from tests.sample.conftest import Tiny, make_tiny
from tests.security.mutations import mutations
from tests.support import draws
from tests.support.rows import claim, committer, latent_rows, planned_root, rejected_rows
from tests.support.training import new_start
from tests.text.test_text_dataset import write as write_text
from tests.train.helpers import new_run

Read = Callable[[], Any]


def _tells(error: InputError, names: set[str]) -> bool:
    return error.rule is not None and error.next_step is not None and any(name in str(error) for name in names)


def wrongly_ended(path: Path, read: Read, names: tuple[str, ...] = (), place: Path | None = None) -> list[str]:
    """The mutations of a file whose reading ended as a bug would, or in an error that does not name the file.

    Nor one beside it that disagrees (in `place`, the file's folder by default), or the record in it; nor misses all
    rows.
    """
    data, wrong = path.read_bytes(), []
    beside = {other.name for other in (place or path.parent).rglob("*.*")}
    telling = {path.name, "The commit record", "has no visible row", *beside, *names}
    try:
        for what, changed in mutations(path, data):
            path.unlink() if changed is None else path.write_bytes(changed)
            try:
                read()
            except Exception as error:
                known = job_error(error)
                if known is None:
                    wrong.append(f"{what}: {type(error).__name__}: {error}"[:300])
                elif not isinstance(known, InputError | ConflictError):
                    wrong.append(f"{what}: exit code {known.exit_code}: {known}"[:300])
                elif isinstance(known, InputError) and not _tells(known, telling):
                    wrong.append(f"{what}: says too little: {known}"[:300])
            path.write_bytes(data)
    finally:
        path.write_bytes(data)
    return wrong


# -- Datasets: the ledger, the plan, the rows ------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of two generations: a bundle, a plan of two units, rejects, notes of runs, a pin."""
    place = tmp_path_factory.mktemp("latents")
    root = planned_root(str(place), 2, 4)
    for unit in range(2):
        generation = claim(root)
        stored, rejected = latent_rows([(unit, r) for r in range(3)]), rejected_rows([(unit, 3)], "truncated")
        committer(root, generation).commit(stored, rejected, {})
        recipe = {"source": {"kind": "folder", "uri": "mem", "name": "mem"}, "image": {}, "batch_size": 4}
        note_run(root, generation.number, {"job": "encode", "handle": "key:" + "0" * 32, "recipe": recipe})
        generation.close(sealed=False)
        generation.seal()
    Pins(root, "inputs/0123456789abcdef").pin(root)
    return place


def read_dataset(place: Path) -> None:
    """What the jobs that read a dataset do, without their work."""
    root = Root(str(place))
    for pins in (None, Pins(root, "inputs/0123456789abcdef")):
        opened = LatentDataset.open(str(place), "data.uri", pins)
        _ = opened.codec, opened.latent_dtype, opened.posterior, opened.num_classes, opened.digest, opened.provenance
        _ = opened.layout_digest, opened.channel_mean, opened.has_any("caption")
        for group in opened.row_groups:
            opened.read(group.index, None)
            opened.read_fixed(group.index, "latent", verify=False)
    state = read_state(root)
    state.gaps()
    list(live_entries(state.plan))
    for unit in range(state.plan.next_unit):
        read_entries(root, state.plan.locate(unit))
    last_run(root), last_recipe(root), noted_runs(root), is_due(root, state)


DATASET_FILES = (
    "dataset.json",
    "plan/v*.json",
    "plan/parts/*.parquet",
    "generations/00000002/open.json",
    "generations/00000002/closed.json",
    "generations/00000002/run.json",
    "generations/00000002/heartbeat.json",
    "ledger/00000002/*.json",
    "snapshots/*.parquet",
    "data/*.parquet",
    "rejects/*.parquet",
    "inputs/*/*.json",
    "inputs/*/*.parquet",
)


@pytest.mark.parametrize("pattern", DATASET_FILES)
def test_a_dataset(dataset: Path, pattern: str) -> None:
    paths = sorted(dataset.glob(pattern))
    assert paths
    for path in paths[-2:]:
        ended = wrongly_ended(path, lambda: (read_dataset(dataset), verify(str(dataset), "checksums")), place=dataset)
        assert ended == []


# -- Models, checkpoints and what a training keeps -------------------------------------------------------------


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"))


def read_export(tiny: Tiny) -> None:
    stored = read_model(tiny.model_uri)
    stored.digest()
    _ = stored.info.sizes
    load_model(tiny.model_uri)


@pytest.mark.parametrize("name", ["latentloom.json", "model/diffusion_pytorch_model.safetensors"])
def test_an_export(export: Tiny, name: str) -> None:
    assert wrongly_ended(Path(export.model_uri, name), lambda: read_export(export)) == []


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_codec(export: Tiny, name: str) -> None:
    path = Path(export.codec_path, name)
    assert wrongly_ended(path, lambda: load_codec(export.codec_path)) == []


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training with one checkpoint, its history, a failure and the note that it is done."""
    place = tmp_path_factory.mktemp("training")
    root = Root(str(place))
    new_start(root, checkpoints=[])
    state, _, _ = new_run(place)
    history = History(root, segment_records=2)
    store = CheckpointStore(root.child("checkpoints"), place / "staging", generation=1, listed=[], history=history)
    for step in range(5):
        history.append({"step": step, "images": 6 * step, "loss": 0.5})
    store.save(state.tensors(), state.meta())
    store.wait()
    record_failure(root, 1, ConfigError("no room", key="train.micro_batch"))
    return place


def read_training(place: Path) -> None:
    root = Root(str(place))
    read_records(root)
    recorded_failure(root, 1)
    listed_checkpoints(root, 1)
    state, _, _ = new_run(place / "again")
    store = CheckpointStore(root.child("checkpoints"), place / "staging", generation=1, history=History(root))
    meta = store.load_newest(state.tensors(), state.check)
    if meta is not None:
        state.restore_meta(meta)
    for starts in (place / "checkpoints" / "starts").glob("*.json"):
        if starts.name > "000001-000001.json":
            starts.unlink()


TRAINING_FILES = (
    "checkpoints/0*/COMPLETE.json",
    "checkpoints/0*/history.jsonl",
    "checkpoints/0*/*.safetensors",
    "checkpoints/starts/000001-000001.json",
    "history/*.jsonl",
    "control/failure-000001.json",
)


@pytest.mark.parametrize("pattern", TRAINING_FILES)
def test_a_training(training: Path, pattern: str) -> None:
    paths = sorted(training.glob(pattern))
    assert paths
    assert wrongly_ended(paths[0], lambda: read_training(training), place=training) == []


def test_what_a_finished_training_noted(tmp_path: Path) -> None:
    path = tmp_path / "done.json"
    result = vars(JobResult("done", {"images": 1}, {"model": "m"}, figures={"loss": 0.5}))
    path.write_text(json.dumps({"config": "digest", "result": result}))
    assert wrongly_ended(path, lambda: finished(Root(str(tmp_path)), "digest")) == []


# -- Images, requests, evaluations, journals -------------------------------------------------------------------


SIZE = {"height": 16, "width": 16, "steps": 2, "guidance": 2.0}


def with_text(pixels_HWC: np.ndarray, text: str, kind: str) -> bytes:
    """An image with some text where its provenance belongs."""
    sink, image = io.BytesIO(), Image.fromarray(pixels_HWC)
    if kind == "png":
        info = PngImagePlugin.PngInfo()
        info.add_text(KEYWORD, text)
        image.save(sink, "PNG", pnginfo=info)
    else:
        exif = Image.Exif()
        comment = b"ASCII\0\0\0" + text.encode("latin-1")[:60_000]
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        image.save(sink, "WEBP", lossless=True, exif=exif.tobytes())
    return sink.getvalue()


STORY = provenance(
    {"request_id": request_id({"seed": 3, "label": 1, **SIZE}), "seed": 3, "label": 1, **SIZE},
    draws.DRAW,
    Origin(
        "model", "m" * 32, "run", "ema", "data", "d" * 32, "codec", "c" * 64, (("torch", "2"),), (("u", "d", 1.0),)
    ),
)


@pytest.mark.parametrize("kind", ["png", "webp"])
def test_the_provenance_of_an_image(tmp_path: Path, kind: str) -> None:
    path, image = tmp_path / "story.json", tmp_path / f"image.{kind}"
    path.write_text(json.dumps(STORY))
    pixels = np.zeros((16, 16, 3), np.uint8)
    uri, output = str(image), str(tmp_path / "again.png")

    def regenerate() -> None:
        text = path.read_bytes().decode("latin-1") if path.exists() else ""
        image.write_bytes(with_text(pixels, text, kind))
        story_config = RegenerateJobConfig(image=uri, output=output, places=("/",))
        regenerate_job.dry_run(story_config)
        find_start(uri)
        regenerate_job.run(story_config)

    assert (
        wrongly_ended(
            path, regenerate, names=(image.name, "There is no readable model", "named by the image", "request_id")
        )
        == []
    )


def test_the_file_of_an_image(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode_image(np.zeros((16, 16, 3), np.uint8), STORY))
    config = RegenerateJobConfig(image=str(path), output=str(tmp_path / "again.png"))
    assert wrongly_ended(path, lambda: regenerate_job.dry_run(config)) == []


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("samples")
    images, labels = real_images(4)
    write_samples(str(place), images, labels.tolist())
    return place


def read_samples(place: Path) -> None:
    opened = open_samples(str(place))
    for group in opened.row_groups:
        list(sample_batches(opened, group.index, 2))


@pytest.mark.parametrize("pattern", ["data/*.parquet", "dataset.json"])
def test_samples(samples: Path, pattern: str) -> None:
    paths = sorted(samples.glob(pattern))
    assert paths
    assert wrongly_ended(paths[0], lambda: read_samples(samples)) == []


def test_an_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    figure = Figure("accuracy", 0.9, 0.8, 1.0, 96, "", "counted")
    record = Record("k" * 32, (figure,), {}, {"samples": {"run_id": "r"}}, {"fid": "no"}, (), {"images": 1}, "run")
    path.write_bytes(record.to_bytes())
    config = PromoteJobConfig.model_validate(
        {"evaluation": {"uri": str(tmp_path)}, "model": {"name": "m"}, "at_least": {"accuracy": 0.5}}, strict=False
    )
    assert wrongly_ended(path, lambda: evaluate_job.plan_promote(config)) == []


def test_the_quarantine_of_a_training(tmp_path: Path) -> None:
    quarantine = Quarantine(Root(str(tmp_path)), 1)
    quarantine.add({"step": 3, "images": 16, "loss": 1.0, "grad_norm": 2.0, "sample_ids": ["00" * 16]})
    path = tmp_path / "quarantine" / "000001.parquet"

    def read() -> None:
        again = Quarantine(Root(str(tmp_path)), 1)
        again.root = Root(str(tmp_path / "elsewhere"))
        again.rewind(2)

    assert wrongly_ended(path, read) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".state"])
def test_a_journal(tmp_path: Path, suffix: str) -> None:
    header = Header("server", "exp", "k" * 32, None, "run", "owner", "1", 0, {})
    writer = JournalWriter(tmp_path, header)
    writer.append({"kind": "metrics", "t": 0, "step": 1, "values": {"loss": 0.5}})
    writer.append({"kind": "status", "t": 0, "status": "FINISHED"})
    writer.close()
    JournalReader(writer.path).confirm(0, run_id="r")

    def read() -> None:
        if writer.path.exists():
            reader = JournalReader(writer.path)
            _ = reader.header(), list(reader.pending()), reader.num_unsent_bytes(), int(reader.confirmed.offset)

    assert wrongly_ended(writer.path.with_suffix(suffix), read) == []


def test_the_classifier_of_an_evaluation(tmp_path: Path) -> None:
    net = ConvNet(2, resolution=8, width=8)
    path, digest = tmp_path / "classifier.safetensors", _digest(net, (0, 1), 8)
    path.write_bytes(to_bytes(Classifier(net, (0, 1), wilson(3, 4), 8, digest), "key"))

    def read() -> None:
        if path.exists():
            from_bytes(path.read_bytes(), "key")

    read()
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    assert from_bytes(path.read_bytes(), "key") is not None
    assert wrongly_ended(path, read) == []
    about = json.loads(header["__metadata__"]["about"])
    for name in about:
        for value in (None, [], {}, "text", 10**30, -1):
            header["__metadata__"]["about"] = json.dumps({**about, name: value})
            text = json.dumps(header).encode()
            assert from_bytes(len(text).to_bytes(8, "little") + text, "key") is None


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_text(tmp_path_factory.mktemp("text") / "toy", ["", "a", "a red circle"]))


@pytest.mark.parametrize("pattern", ["dataset.json", "data/*.parquet", "plan/parts/*.parquet"])
def test_embeddings(text: Path, pattern: str) -> None:
    def read() -> None:
        TextEmbeddings.open(str(text)).lookup_pooled(["a", None])
        TextEmbeddings.open(str(text)).lookup(["a", None])
        planned_hashes(read_state(Root(str(text))).plan)

    for path in sorted(text.glob(pattern)):
        assert wrongly_ended(path, read, place=text) == []


def test_the_requests_of_a_plan(tmp_path: Path) -> None:
    meta, root = tmp_path / "meta.json", Root(str(tmp_path / "plan"))
    request = {"seed": 3, "label": 1, **SIZE}
    meta.write_text(json.dumps(request))
    key = request_id(request).hex()

    def read() -> None:
        text = meta.read_bytes().decode("latin-1") if meta.exists() else None
        plan = append_version(Plan(root), [[RequestEntry(key, text or "")]], source={}, generation=0)
        try:
            planned_requests(plan)
        finally:
            for info in list(root.list()):
                root.delete(info.key)

    assert wrongly_ended(meta, read, names=(key,)) == []
