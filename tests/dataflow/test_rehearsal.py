"""Jobs on a Ray that declares GPUs on one of two nodes: all is placed and shared as on GPUs, and computed on CPUs.

Reservation, parts of a GPU, pools, several calls an actor and Ray Train's workers with GPUs are those of a cluster
with real ones; what only CUDA can show is in tests/gpu.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config import dump_yaml
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import read_identity
from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import Dataset, LatentDataset
from tests.sample.conftest import make_tiny
from tests.support.images import make_codec, make_images
from tests.support.jobs import REPOSITORY, run, start
from tests.support.plugins import FAULTY, install_codec_plugin
from tests.support.ray_nodes import ray_nodes
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config

pytestmark = pytest.mark.ray

IMAGES = 24


@dataclass(frozen=True)
class World:
    """The cluster's environment, a folder with images, a codec and what plug-ins are asked to do wrong."""

    env: dict[str, str]
    base: Path

    @property
    def faults(self) -> Path:
        return self.base / "faults"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("rehearsal")
    make_images(base / "images", IMAGES)
    make_codec(base / "codec")
    (base / "faults").mkdir()
    site = install_codec_plugin(base / "site", "faulty", FAULTY)
    found = {"PYTHONPATH": f"{REPOSITORY}:{site}", "LATENTLOOM_TEST_FAULTS": str(base / "faults")}
    before = dict(os.environ)
    os.environ |= found  # what the nodes' workers inherit
    try:
        with ray_nodes(2, 4, gpus=(0, 2)) as nodes:
            yield World({**nodes.env, **found}, base)
    finally:
        os.environ.clear()
        os.environ |= before


@pytest.fixture(autouse=True)
def _no_faults(world: World) -> None:
    for file in world.faults.iterdir():
        file.unlink()


def settings(output: str, **changes: Any) -> list[str]:
    fixed = {
        "source.kind": "folder",
        "source.uri": "images",  # where workers run, this is no place
        "image.resolution": 32,
        "image.multiple_of": 4,
        "codec.path": "codec",
        "output.uri": output,
        "encode.unit_rows": 4,
        "encode.fragment_rows": 4,
        "encode.batch_size": 4,
        "cluster.device": "cpu",
        "tracking.enabled": "false",
        **changes,
    }
    return [f"{k}={v}" for k, v in fixed.items()]


def encode(world: World, output: str, **changes: Any) -> tuple[int, dict[str, Any], str]:
    return run("encode", *settings(output, **changes), cwd=world.base, env=world.env)


def check(world: World, output: str) -> None:
    """Every image once."""
    report = verify(str(world.base / output), "checksums")
    assert (report.problems, report.stored_rows, report.rejected_rows) == ([], IMAGES, 0)


def test_encode_with_whole_gpus_says_that_it_is_a_rehearsal(world: World) -> None:
    code, answer, errors = encode(world, "whole")
    assert (code, answer["counts"]["latents"]) == (0, IMAGES), errors
    check(world, "whole")
    assert f"encode  {IMAGES}/{IMAGES} images 100%  in" in errors  # the last line knows all that was committed
    assert "REHEARSAL: cluster.device=cpu" in errors
    fingerprint = read_identity(Root(str(world.base / "whole"))).fingerprint
    # What a GPU would have been asked for, and what really computed.
    assert (fingerprint["codec_dtype"], fingerprint["computed_on"]) == ("bfloat16", "cpu, in a rehearsal of GPUs")
    # The same command again is no work, and as a real run it is another dataset.
    assert encode(world, "whole")[1]["status"] == "unchanged"
    code, _, errors = encode(world, "whole", **{"cluster.device": "auto"})
    assert code == 4
    assert "computed_on" in errors


def test_encode_with_two_actors_a_gpu_decoding_in_tasks(world: World) -> None:
    changes = {"encode.num_gpus": 0.5, "encode.decode": "tasks", "encode.num_cpus": 0.5}
    code, _, errors = encode(world, "halves", **changes)
    assert code == 0, errors
    check(world, "halves")


def test_gpus_that_do_not_compute_are_told_before_anything_is_written(world: World) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("CUDA works here")
    code, answer, errors = encode(world, "real", **{"cluster.device": "auto"})
    assert code == 2, errors
    assert f"torch.version.cuda {torch.version.cuda}" in answer["error"]
    assert "driver " in answer["error"]
    assert "cluster.device=cpu rehearses" in errors
    assert not (world.base / "real").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode.actors": 3}, "The job needs 3 GPUs at once and the cluster has 2"),
        ({"encode.num_gpus": 0.7, "encode.actors": 3, "encode.num_cpus": 0.1}, "needs 2.1 GPUs at once"),
        ({"encode.num_gpus": 0.6, "encode.actors": 3, "encode.num_cpus": 0.1}, "no room for an encoder actor"),
        ({"encode.num_gpus": 1.5}, "a part of one GPU, at most 1, or whole ones"),
        ({"encode.num_gpus": 4}, "No node has room for an encoder actor"),
        ({"encode.drivers": 3}, "3 drivers share 2 encoder actors"),
    ],
)
def test_gpus_that_do_not_suffice_are_refused(world: World, changes: dict[str, Any], message: str) -> None:
    code, _, errors = encode(world, "refused", **changes)
    assert code == 2, errors
    assert message in errors
    assert not (world.base / "refused").exists()


def test_a_gpu_that_cannot_start_ends_nothing_for_the_other(world: World) -> None:
    (world.faults / "no_gpu").write_text("1")
    code, _, errors = encode(world, "one", **{"codec.kind": "faulty", "encode.actors": 2})
    assert code == 0, errors
    check(world, "one")


def test_where_no_gpu_can_start_the_cause_is_told_before_anything_is_written(world: World) -> None:
    (world.faults / "no_gpu").write_text("*")
    code, answer, errors = encode(world, "none", **{"codec.kind": "faulty"})
    assert code == 75, errors
    assert "No CUDA GPUs are available" in answer["error"]
    assert not (world.base / "none").exists()


@pytest.mark.slow
def test_where_no_actor_can_start_the_cause_is_told(world: World) -> None:
    """The try before anything is written succeeds, the actors' own starts do not."""
    (world.faults / "no_load").write_text("1 99")
    code, answer, errors = encode(world, "late", **{"codec.kind": "faulty", "encode.actors": 1})
    assert code == 75, errors
    assert "Starting the encoder failed on its device: RuntimeError: No CUDA GPUs are available" in answer["error"]
    (world.faults / "no_load").unlink()
    code, _, errors = encode(world, "late", **{"codec.kind": "faulty", "encode.actors": 1})
    assert code == 0, errors
    check(world, "late")


def test_a_device_that_fails_now_and_then_rejects_nothing(world: World) -> None:
    (world.faults / "cublas").write_text("2 4")  # the first is the try before anything is written
    code, answer, errors = encode(world, "flaky", **{"codec.kind": "faulty", "encode.actors": 1})
    assert (code, answer["counts"]["rejected"]) == (0, 0), errors
    check(world, "flaky")
    assert len(list(world.faults.glob("cublas-*"))) == 4
    assert errors.count("the device failed, this encoder ends and is replaced") >= 2  # by each of its threads


def test_software_that_always_fails_rejects_nothing_and_stops_with_its_words(world: World) -> None:
    (world.faults / "broken").write_text("yes")
    code, answer, errors = encode(world, "broken", **{"codec.kind": "faulty", "encode.actors": 1})
    assert code == 75, errors
    assert "planted: nobody has ever seen this" in answer["error"]
    (world.faults / "broken").unlink()
    code, _, errors = encode(world, "broken", **{"codec.kind": "faulty", "encode.actors": 1})
    assert code == 0, errors
    check(world, "broken")


def test_encode_by_several_drivers_of_which_one_is_killed(world: World) -> None:
    """Two executions at a time, under one generation; the rows of the one whose process dies are another's."""
    several = {"encode.drivers": 2, "encode.units_per_execution": 2, "tracking.enabled": "false"}
    job = start("encode", *settings("drivers", **several), cwd=world.base, env=world.env)
    try:
        until, drivers = time.monotonic() + 120, set[int]()
        while len(drivers) < 2:
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < until
            drivers |= {p.pid for p in psutil.process_iter(["name"]) if "ExecutionDriver" in (p.info["name"] or "")}
        with contextlib.suppress(ProcessLookupError):
            os.kill(max(drivers), signal.SIGKILL)
        _, errors = job.communicate(timeout=300)
    finally:
        job.kill()
    assert job.returncode == 0, errors
    assert "workers died, going on with what is left" in errors
    check(world, "drivers")


def test_sample_with_its_default_shares(world: World) -> None:
    tiny = make_tiny(world.base / "tiny")
    arguments = [
        f"model.uri={tiny.model_uri}",
        "requests.kind=grid",
        "requests.classes=all",
        "requests.count=2",
        "requests.steps=2",
        "batch_size=2",
        f"output.uri={world.base / 'samples'}",
        "cluster.device=cpu",
        "tracking.enabled=false",
    ]
    code, answer, errors = run("sample", *arguments, cwd=world.base, env=world.env)
    assert (code, answer["counts"]["images"]) == (0, 6), errors
    assert "REHEARSAL" in errors
    dataset: Dataset = Dataset.open_kind(str(world.base / "samples"), "images")
    told = dataset.read(dataset.row_groups[0].index, ["provenance"])["provenance"].to_pylist()
    assert all('"device":"cpu"' in story and '"dtype":"bfloat16"' in story for story in told)


def test_train_with_two_gpu_workers(world: World) -> None:
    data = make_dataset(world.base / "latents")
    changes = {"train": {"device": "auto", "num_workers": 2, "images": 64}, "cluster": {"device": "cpu"}}
    file = world.base / "train.yaml"
    file.write_text(dump_yaml(job_config(world.base, data, changes)))
    code, answer, errors = run("train", file, cwd=world.base, env=world.env)
    assert (code, answer["counts"]["images"]) == (0, 64), errors
    assert "REHEARSAL" in errors
    # More workers than GPUs: no silent training on CPUs.
    more = ["train.num_workers=4", f"output.uri={world.base / 'more'}"]
    code, answer, errors = run("train", file, *more, cwd=world.base, env=world.env)
    assert code == 2, errors
    assert "The job needs 4 GPUs at once and the cluster has 2" in answer["error"]
    assert not (world.base / "more").exists()


def test_captions_are_embedded_beside_a_gpu(world: World) -> None:
    from tests.text.text_builders import make_clip, make_latents

    make_clip(world.base / "clip")
    latents = make_latents(world.base / "captioned", [["a red circle", None], ["a blue square", "the sky"]])
    arguments = [
        f"data.uri={latents}",
        "encoders=[{name: clip, path: clip}]",
        "cluster.device=cpu",
        "tracking.enabled=false",
    ]
    code, answer, errors = run("embed_text", *arguments, cwd=world.base, env=world.env)
    assert (code, answer["counts"]["clip.captions"]) == (0, 4), errors  # and the empty prompt
    assert "REHEARSAL" in errors
    assert LatentDataset.open(latents).num_rows == 4


def test_evaluation_runs_beside_a_gpu(world: World) -> None:
    from tests.evaluate.evaluate_world import build_world, config_of

    folder = world.base / "evaluated"
    build_world(folder, count=120, samples=24)
    config = config_of(folder, classifier={"steps": 20, "width": 8}, cluster={"device": "cpu"})
    file = world.base / "evaluate.yaml"
    file.write_text(dump_yaml(config).replace(f"{folder}/", "evaluated/"))  # places as the driver sees them
    code, answer, errors = run("evaluate", file, cwd=world.base, env=world.env)
    assert code == 0, errors
    assert "REHEARSAL" in errors
    assert {"psnr_db", "accuracy"} <= set(answer["figures"])


def test_an_encode_grows_with_its_cluster(world: World, tmp_path: Path) -> None:
    """It began on one GPU of two: from the execution after the second came on it uses both."""
    with ray_nodes(2, gpus=(1,)) as nodes:
        here = World({**nodes.env, **{k: world.env[k] for k in ("PYTHONPATH", "LATENTLOOM_TEST_FAULTS")}}, world.base)
        arguments = settings(f"{tmp_path}/grown", **{"encode.units_per_execution": 1})
        job = start("encode", *arguments, cwd=here.base, env=here.env)
        try:
            while not list((tmp_path / "grown" / "ledger").rglob("*.json")):
                assert job.poll() is None, job.communicate()
                time.sleep(0.2)
            nodes.add(2, 1)
            _, errors = job.communicate(timeout=300)
        finally:
            job.kill()
        assert job.returncode == 0, errors
        assert "the cluster has changed: 2 encoder actors, 1 before" in errors
    check(world, f"{tmp_path}/grown")
