"""The sample job as a whole: every request once, resumed, added to, and nothing done twice."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from pipeline.config import dump_yaml, validate
from pipeline.dataflow.cluster import ClusterConfig, ensure_ray, shutdown_ray
from pipeline.errors import ConfigError, ConflictError, InputError, RejectBudgetError
from pipeline.media import read_provenance
from pipeline.sample import job as sample_job
from pipeline.sample.config import SampleJobConfig
from pipeline.sample.regenerate import regenerate
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import claim_next
from pipeline.store.ledger.ledger import collect, commit
from pipeline.store.ledger.record import CommitRecord
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import Dataset, read_outside
from tests.sample.conftest import Tiny


def config_of(tiny: Tiny, output: Path, form: dict[str, Any] | None = None, **changes: Any) -> SampleJobConfig:
    base: dict[str, Any] = {
        "model": {"uri": tiny.model_uri},
        "output": {"uri": str(output), **(form or {})},
        "requests": {"kind": "grid", "classes": "all", "count": 3, "steps": 2, "guidance": 2.0},
        "batch_size": 2,
        "unit_requests": 4,
        "tracking": {"enabled": False},
    }
    return validate(SampleJobConfig, {**base, **changes})


def images_at(uri: Path) -> dict[str, dict[str, Any]]:
    dataset: Dataset = Dataset.open_kind(str(uri), "images")
    rows: dict[str, dict[str, Any]] = {}
    for group in dataset.row_groups:
        for row in dataset.read(group.index, ["key", "image", "file", "content_sha256", "unit", "row"]).to_pylist():
            assert row["key"] not in rows
            rows[row["key"]] = row
    return rows


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for all jobs of this module: a start takes longer than a job."""
    ensure_ray(ClusterConfig(num_cpus=2, dashboard=False, object_store_bytes=200 << 20))
    yield
    shutdown_ray()


@pytest.fixture
def ray_here(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sample.passes.shutdown_ray", lambda: None)


@dataclass
class Recorder:
    """A tracker that keeps what it is told."""

    run_id: str | None = "run-1"
    handle: str | None = "run-1"
    opened: dict[str, Any] = field(default_factory=dict)
    inputs: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    statuses: list[str] = field(default_factory=list)
    params: dict[str, object] = field(default_factory=dict)

    def wait_run_id(self, timeout_s: float) -> str | None:
        return self.run_id

    def log_params(self, params: Mapping[str, object]) -> None:
        self.params.update(params)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...
    def log_text(self, text: str, artifact_path: str) -> None: ...
    def set_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_file(self, local: Path, artifact_path: str) -> None:
        self.files[artifact_path] = Path(local).read_bytes()

    def log_input(self, name: str, digest: str, source: str, context: str) -> None:
        self.inputs.append((context, digest))

    def finish(self, status: str) -> None:
        self.statuses.append(status)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    tracker = Recorder()

    def opening(tracking: Any, **options: Any) -> Recorder:
        tracker.opened = options
        return tracker

    monkeypatch.setattr("pipeline.runs.open_tracker", opening)
    return tracker


@pytest.mark.ray
@pytest.mark.slow
def test_every_request_becomes_one_image_and_added_ones_cost_themselves_only(
    tiny: Tiny, tmp_path: Path, recorder: Recorder, ray_here: None
) -> None:
    output = tmp_path / "out"
    first = sample_job.run(config_of(tiny, output))
    assert first.status == "done"
    assert first.counts["images"] == first.counts["drawn"] == 9
    before = images_at(output)
    assert len(before) == 9
    # The run is the training run's child, and says what it read and made.
    assert recorder.opened["parents"] == {"train": "0123456789abcdef0123456789abcdef"}
    assert [context for context, _ in recorder.inputs] == ["model", "training data", "input", "output"]
    assert recorder.statuses == ["FINISHED"]
    assert recorder.files["contact.png"] == (output / "contact.png").read_bytes()
    assert (output / "gallery.html").read_text().count("<figure>") == 9
    # Any image, alone and without Ray, comes out the same.
    some = next(iter(before.values()))["image"]
    assert regenerate(some, places=["/"]) == some

    # Nothing to do: neither Ray nor torch is even imported.
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config_of(tiny, output)))
    script = (
        "import sys, json\nfrom pipeline.config import load_config\n"
        "from pipeline.sample.config import SampleJobConfig\n"
        "from pipeline.sample.job import run\n"
        f"result = run(load_config(SampleJobConfig, [{str(path)!r}]))\n"
        "heavy = [m for m in ('torch', 'ray', 'mlflow', 'diffusers') if m in sys.modules]\n"
        "print(json.dumps([result.status, result.counts['images'], heavy, result.run_id, sorted(result.outputs)]))\n"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout) == ["unchanged", 9, [], "run-1", ["contact", "gallery", "images"]]

    # More requests, other numbers of actors and another unit size: old rows stay, only new ones are drawn.
    more = {"kind": "grid", "classes": "all", "count": 4, "steps": 2, "guidance": 2.0}
    actors = {"actors": 1, "num_cpus": 0.5}
    second = sample_job.run(config_of(tiny, output, requests=more, denoise=actors, unit_requests=2))
    assert (second.counts["images"], second.counts["drawn"], second.counts["no_longer_requested"]) == (12, 3, 0)
    after = images_at(output)
    assert {key: after[key] for key in before} == before

    # Fewer requests: nothing is drawn, nothing is lost.
    fewer = {**more, "classes": [1]}
    third = sample_job.run(config_of(tiny, output, requests=fewer))
    assert (third.status, third.counts["images"], third.counts["no_longer_requested"]) == ("unchanged", 4, 8)

    # Drawn all at once elsewhere, in files: the same images byte for byte.
    files = tmp_path / "files"
    sample_job.run(config_of(tiny, files, requests=more, form={"format": "files", "contact": 2}))
    for key, row in images_at(files).items():
        data = (files / row["file"]).read_bytes()
        assert data == after[key]["image"]
        assert read_provenance(data)["request_id"] == key
    assert (files / "gallery.html").read_text().count("<figure>") == 2


@pytest.mark.ray
@pytest.mark.slow
def test_rejects_are_counted_and_the_budget_ends_the_job_with_its_data_kept(
    tiny: Tiny, tmp_path: Path, recorder: Recorder, ray_here: None
) -> None:
    # A model with a poisoned embedding of one class, as a diverged training run leaves it.
    export = tmp_path / "export"
    shutil.copytree(tiny.model_uri, export)
    weights_path = export / "model" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(weights_path)
    name = next(n for n in weights if "label" in n and weights[n].shape[0] == 4)
    weights[name][1] = float("nan")
    safetensors.torch.save_file(weights, weights_path)
    _mend_hash(export)
    output = tmp_path / "out"
    config = config_of(tiny, output, model={"uri": str(export)})
    with pytest.raises(RejectBudgetError, match=r"3 of 9 requests were rejected \(non_finite_latent\)"):
        sample_job.run(config)
    assert len(images_at(output)) == 6
    # Nothing is tried again: the same model gives the same values.
    with pytest.raises(RejectBudgetError, match="3 of 9"):
        sample_job.run(config)
    tolerant = validate(SampleJobConfig, {**json.loads(config.model_dump_json()), "reject_budget": 0.5})
    result = sample_job.run(tolerant)
    assert (result.status, result.counts["rejected"], result.counts["rejected.non_finite_latent"]) == (
        "unchanged",
        3,
        3,
    )


@pytest.mark.ray
@pytest.mark.slow
def test_prompts_are_embedded_once_for_all_denoisers(
    tmp_path: Path, recorder: Recorder, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from pipeline.sample.passes import _Sampling
    from tests.sample.pipelines import make_sd_pipeline

    make_sd_pipeline(tmp_path)
    handles: list[Any] = []
    start_embedder = _Sampling._start_embedder

    def watched(self: _Sampling) -> Any:
        handles.append(start_embedder(self))
        return handles[-1]

    monkeypatch.setattr(_Sampling, "_start_embedder", watched)
    config = validate(
        SampleJobConfig,
        {
            "model": {"uri": str(tmp_path / "pipe")},
            "output": {"uri": str(tmp_path / "out"), "format": "webdataset"},
            "requests": {
                "kind": "grid",
                "prompts": ["red", "blue", "a sky"],
                "count": 4,
                "steps": 2,
                "guidance": 2.0,
            },
            "batch_size": 2,
            "unit_requests": 2,
            "denoise": {"actors": 2, "num_cpus": 0.3},
            "tracking": {"enabled": False},
        },
    )
    result = sample_job.run(config)
    assert result.counts["images"] == 12
    assert ray.get(handles[0].embedded.remote()) == 4  # three prompts and the empty one
    rows = images_at(tmp_path / "out")
    assert len(list((tmp_path / "out" / "shards").iterdir())) == 6
    image = read_outside(Root(str(tmp_path / "out")), next(iter(rows.values()))["file"])
    assert regenerate(image, places=["/"]) == image
    assert verify(str(tmp_path / "out"), "checksums").problems == []


def _mend_hash(export: Path) -> None:
    marker = json.loads((export / "latentloom.json").read_text())
    key = "model/diffusion_pytorch_model.safetensors"
    marker["files"][key]["sha256"] = hashlib.sha256((export / key).read_bytes()).hexdigest()
    (export / "latentloom.json").write_text(json.dumps(marker))


def test_a_dry_run_counts_and_writes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = sample_job.dry_run(config_of(tiny, output))
    assert result.status == "dry-run"
    assert result.counts["to_draw"] == 9
    assert result.counts["model_evaluations"] == 9 * 2 * 2
    assert not output.exists()
    # Heun asks twice a step, but for its last step, which is Euler's.
    heun = sample_job.dry_run(config_of(tiny, output, sampler={"name": "heun"}))
    assert heun.counts["model_evaluations"] == 9 * 3 * 2


def test_an_output_that_cannot_be_used_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="The output is a file"):
        sample_job.run(config_of(tiny, tmp_path / "file"))
    from pipeline.store.ledger.identity import Identity, claim_identity

    claim_identity(Root(str(tmp_path / "latents")), Identity("latents", {}, {}))
    with pytest.raises(ConflictError, match="holds latents, and this job writes images"):
        sample_job.run(config_of(tiny, tmp_path / "latents"))
    from pipeline.sample.prepare import prepare

    images = Root(str(tmp_path / "images"))
    claim_identity(images, prepare(config_of(tiny, tmp_path / "images")).identity)
    # As long as nothing is in it, an output takes other settings; its first row decides.
    assert sample_job.dry_run(config_of(tiny, tmp_path / "images", seed=5)).counts["to_draw"] == 9
    generation = claim_next(images, lambda number: collect(images, number), job="sample")
    commit(images, CommitRecord(generation.number, RowSet.from_triples([(0, 0, 1)])))
    generation.close({"status": "done"})
    with pytest.raises(ConflictError, match=r"draw\.seed: 0 there, 5 here"):
        sample_job.run(config_of(tiny, tmp_path / "images", seed=5))


def test_the_configuration_names_its_faults() -> None:
    minimal = {"model": {"uri": "m"}, "output": {"uri": "o"}}
    with pytest.raises(ConfigError, match="give either seeds or count and first_seed"):
        validate(SampleJobConfig, {**minimal, "requests": {"kind": "grid", "seeds": [1], "count": 2}})
    with pytest.raises(ConfigError, match=r"did you mean requests\.guidance"):
        validate(SampleJobConfig, {**minimal, "requests": {"kind": "grid", "guidence": 2}})
    with pytest.raises(ConfigError, match="this key is required"):
        validate(SampleJobConfig, minimal)


def test_the_configuration_imports_nothing_heavy() -> None:
    script = (
        "import sys, pipeline.sample.config\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'diffusers', 'PIL') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"
