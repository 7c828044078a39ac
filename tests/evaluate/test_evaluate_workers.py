"""Who looks at images changes no figure: one worker, several in any order, those of a cluster, one of them killed."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import torch
from evaluate_world import build_world, config_of

from pipeline.dataflow.workers import Workers
from pipeline.errors import InputError
from pipeline.evaluate import inputs as inputs_module
from pipeline.evaluate.figures import Figure, Record, figures_of
from pipeline.evaluate.inputs import inspect, network_files, row_hash
from pipeline.evaluate.metrics import NetworkSpec, load_networks
from pipeline.evaluate.passes import Evaluation, Measured
from pipeline.features import ExtractorConfig
from pipeline.source.reading.listing import list_entries
from pipeline.storage.root import Root
from tests.support.jobs import run, start
from tests.support.ray_nodes import RayNodes, ray_nodes

pytestmark = pytest.mark.integration
T = TypeVar("T")
R = TypeVar("R")
SMALL = {
    "classifier": {"steps": 30, "width": 16, "batch_size": 32},
    "quality": {"batch_size": 6},  # twenty pieces of the reference
    "fidelity": {"images": 90, "batch_size": 5},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every ninth real image is broken."""
    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    for path in sorted((folder / "real").rglob("*.png"))[::9]:
        path.write_bytes(b"broken")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums inside the networks have one order, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class AnyOrder(Workers):
    """Threads of this process whose results come in an order of chance."""

    def spread(self, make: Callable[[], Callable[[T], R]], items: Iterable[T]) -> Iterator[R]:
        results = list(super().spread(make, items))
        random.Random(len(results)).shuffle(results)
        yield from results


def judged(config: Any, workers: Workers) -> tuple[Measured, tuple[Figure, ...]]:
    """An evaluation without a record of an earlier one: everything is taken anew."""
    measured = Evaluation(config, inspect(config), Root(config.output.uri), workers).measure()
    return measured, figures_of(measured, 3)[0]


def test_figures_are_the_same_bits_for_any_number_of_workers_and_any_order(world: Path, tmp_path: Path) -> None:
    found = []
    for number, workers in enumerate((Workers("one", 1), AnyOrder("two", 2), AnyOrder("four", 4))):
        report = {"uri": str(tmp_path / str(number))}
        found.append(judged(config_of(world, output=report, **SMALL), workers))
    (measured, figures), *others = found
    names = {figure.name for figure in figures}
    assert {"accuracy", "frechet", "kid", "precision", "recall", "rfid", "psnr_db", "ssim"} <= names
    assert measured.real is not None
    assert measured.trip is not None
    # Of 480 real images 426 are whole; the round trip takes others for those of its 90 that are broken.
    assert (measured.real.n, measured.trip.sums.n, len(measured.trip.pairs)) == (426, 90, 24)
    for other, theirs in others:
        assert theirs == figures
        assert other.samples is not None
        assert measured.samples is not None
        assert list(other.samples.shown.items()) == list(measured.samples.shown.items())
        assert other.samples.settings == measured.samples.settings


def test_a_pass_that_finds_no_image_is_an_input_error(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(world, samples=None, classifier={"enabled": False}, fidelity={"images": 1})
    monkeypatch.setattr(inputs_module, "ROUNDS", 1)
    entries = list(list_entries(config.reference))
    lowest = Path(config.reference.uri, min(entries, key=lambda entry: row_hash(entry, 0)).key)
    before = lowest.read_bytes()
    lowest.write_bytes(b"broken")
    try:
        with pytest.raises(InputError, match=r"No image of .* can be decoded"):
            judged(config, Workers("one", 1))
    finally:
        lowest.write_bytes(before)


def test_a_network_that_is_another_file_where_it_is_loaded_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "eye.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    extractor = ExtractorConfig(kind="torchscript", path=str(path))
    digests = tuple(network_files(extractor, None, None).items())
    spec = NetworkSpec(extractor, None, None, None, digests, "", "cpu")
    assert load_networks(spec).extractor is not None
    load_networks.cache_clear()
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="another one than when the evaluation began") as refused:
        load_networks(spec)
    assert refused.value.key == "extractor.path"


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with ray_nodes(2, 2) as started:
        yield started


def working(nodes: RayNodes) -> list[psutil.Process]:
    """Workers of the cluster that are at a task."""
    found = []
    for daemon in nodes.daemons:
        assert daemon.process is not None
        for process in psutil.Process(daemon.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "ray::_Worker.call" in " ".join(process.cmdline()):
                    found.append(process)
    return found


def record_of(folder: Path) -> Record:
    record = Record.from_bytes((folder / "evaluation.json").read_bytes())
    assert record is not None
    return record


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_of_which_a_worker_is_killed_finds_what_one_process_finds(
    world: Path, nodes: RayNodes, tmp_path: Path
) -> None:
    def arguments(report: str, **more: Any) -> str:
        config = config_of(world, output={"uri": str(tmp_path / report)}, device="cpu", **SMALL, **more)
        (tmp_path / f"{report}.yaml").write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
        return f"{report}.yaml"

    one = {"OMP_NUM_THREADS": "1"}
    code, alone, errors = run("evaluate", arguments("alone"), cwd=tmp_path, env=one)
    assert code == 0, errors
    process = start("evaluate", arguments("spread", workers=3), cwd=tmp_path, env={**one, **nodes.env})
    until = time.monotonic() + 180
    while len(busy := working(nodes)) < 2:  # one alone prepares
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    busy[-1].kill()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "a worker died and is replaced (a process that judges images)" in errors
    there, here = record_of(tmp_path / "spread"), record_of(tmp_path / "alone")
    assert json.loads(out.splitlines()[-1])["counts"] == alone["counts"]
    assert there.figures == here.figures
    assert (there.key, there.contract, there.absent) == (here.key, here.contract, here.absent)
