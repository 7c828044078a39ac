"""Workers, as threads and on a cluster of two nodes: every item once, whatever dies, and what goes wrong is told."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from ray._private.authentication_test_utils import reset_auth_token_state
from ray.exceptions import ActorDiedError

from pipeline.dataflow import cluster as cluster_module
from pipeline.dataflow.cluster import ClusterConfig, check_address
from pipeline.dataflow.passes import run_elsewhere
from pipeline.dataflow.workers import open_workers
from pipeline.encode.reading import Directories
from pipeline.errors import ConfigError, ConflictError, InputError, StoppedError
from pipeline.storage.root import Root
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain import in_turn
from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream import data as stream
from tests.support.jobs import REPOSITORY, run, start
from tests.support.kills import victims
from tests.support.maintain import compact, deduplicate
from tests.support.ray_nodes import RayNodes, ray_nodes
from tests.support.rows import claim, committer, latent_rows, planned_root, rejected_rows
from tests.support.site import site_environment, slow_disk

CLUSTER = ClusterConfig()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    slow = site_environment(tmp_path_factory.mktemp("site"), slow_disk("/slow-"))  # on all nodes
    with pytest.MonkeyPatch.context() as patch:
        for name, value in slow.items():
            patch.setenv(name, value)  # what the nodes' workers inherit
        with ray_nodes(1, 2) as started:
            yield started


@pytest.fixture
def named(nodes: RayNodes) -> Iterator[RayNodes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in nodes.env.items():
            patch.setenv(name, value)
        # Ray reads how it shows itself once a process: here it may have been for another cluster, or for none.
        reset_auth_token_state()
        yield nodes
    reset_auth_token_state()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def squaring(met: Path, processes: int = 1) -> Callable[[], Callable[[int], tuple[int, int, float]]]:
    """What loads what squares, tells where, and when that was loaded, and begins when so many processes are there."""

    def load() -> Callable[[int], tuple[int, int, float]]:
        loaded = time.monotonic()
        (met / str(os.getpid())).touch()

        def work(item: int) -> tuple[int, int, float]:
            while len(list(met.iterdir())) < processes and time.monotonic() < loaded + 60:
                time.sleep(0.02)
            return item * item, os.getpid(), loaded

        return work

    return load


def counted(count: int, taken: list[int]) -> Iterator[int]:
    """Numbers, each noted when it is taken."""
    for number in range(count):
        taken.append(number)
        yield number


def test_threads_do_every_item_and_take_few_ahead(here: None, tmp_path: Path) -> None:
    taken: list[int] = []
    with open_workers("a thread that squares", CLUSTER, 3) as workers:
        assert (workers.count, workers.on_cluster) == (3, False)
        results = []
        for result in workers.spread(squaring(tmp_path), counted(40, taken)):
            results.append(result)
            assert len(taken) <= len(results) + 2 * workers.count
    assert sorted(value for value, _, _ in results) == [n * n for n in range(40)]
    assert len({loaded for _, _, loaded in results}) == 1, "made once for all threads"


def test_threads_are_as_many_as_fit_into_memory(here: None) -> None:
    free = psutil.virtual_memory().available
    with open_workers("one that takes half", CLUSTER, memory_bytes=free * 2) as workers:
        assert workers.count == 1
    with open_workers("one that takes little", CLUSTER, memory_bytes=1) as workers:
        assert workers.count == os.cpu_count()


def fail_at(number: int, error: Exception) -> Callable[[], Callable[[int], int]]:
    def work(item: int) -> int:
        if item == number:
            raise error
        return item

    return lambda: work


def test_an_error_in_a_thread_arrives_as_what_it_is(here: None) -> None:
    with open_workers("a thread that fails", CLUSTER, 2) as workers, pytest.raises(InputError, match="that one"):
        list(workers.spread(fail_at(3, InputError("that one")), range(100)))


@pytest.mark.ray
def test_actors_on_all_nodes_do_every_item_and_load_once_each(named: RayNodes, tmp_path: Path) -> None:
    taken: list[int] = []
    with open_workers("an actor that squares", CLUSTER) as workers:
        assert (workers.count, workers.on_cluster, workers.num_gpus) == (3, True, 0.0)
        results = []
        for result in workers.spread(squaring(tmp_path, 3), counted(60, taken)):
            results.append(result)
            assert len(taken) <= len(results) + workers.count + 2
        assert sorted(value for value, _, _ in results) == [n * n for n in range(60)]
        processes = {process for _, process, _ in results}
        assert len({(process, loaded) for _, process, loaded in results}) == len(processes)
        assert len(processes) == 3
        assert list(workers.spread(squaring(tmp_path), [])) == []
    with open_workers("an actor that squares", CLUSTER, 1) as workers:
        assert len({process for _, process, _ in workers.spread(squaring(tmp_path), range(10))}) == 1


def die(folder: Path, number: int, times: int) -> Callable[[], Callable[[int], int]]:
    """What kills its process at an item, so many times."""

    def work(item: int) -> int:
        if item == number:
            deaths = len(list(folder.glob("died-*")))
            if deaths < times:
                (folder / f"died-{deaths}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return item

    return lambda: work


@pytest.mark.ray
def test_a_worker_that_dies_is_replaced_and_one_item_that_kills_all_ends_it(
    named: RayNodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_workers("an actor", CLUSTER, 2) as workers:
        assert sorted(workers.spread(die(tmp_path, 5, times=2), range(12))) == list(range(12))
        assert caplog.text.count("a worker died and is replaced (an actor)") == 2
        with pytest.raises(StoppedError, match="died 3 times on one piece of work") as stopped:
            list(workers.spread(die(tmp_path, 5, times=99), range(12)))
    assert "run the same command again" in str(stopped.value)
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.ray
def test_directories_are_listed_by_the_cluster(named: RayNodes, tmp_path: Path) -> None:
    source, kept = Root(str(tmp_path / "source")), Root(str(tmp_path / "kept"))
    for number in range(90):
        source.put(f"{number % 9}/{number % 3}/{number:03d}.jpg", bytes(number))
    with open_workers("a process that lists", CLUSTER) as workers:
        listing = Directories(source, kept, "listing", workers.spread)
        assert list(source.list(entries=listing)) == list(source.list())
    assert len(list(kept.list("listing"))) == 1 + 9 + 9


@pytest.mark.ray
def test_rows_that_are_served_are_counted_by_the_cluster(
    named: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_AT_ONCE", 2)
    root = planned_root(str(tmp_path / "data"), 9, 7)
    generation = claim(root)
    for unit in range(9):
        committer(root, generation).commit(latent_rows([(unit, row) for row in range(7)], label=unit), None, {})
    generation.close({"status": "done"})
    dataset = LatentDataset.open(root.uri)
    with open_workers("a process that counts rows", CLUSTER) as workers:
        for asked in ((0.3, "holdout", None), (0.3, "train", "label != 4")):
            choice = stream.choice_of(*asked)
            ours, alone = (stream.chosen_rows(dataset, choice, spread=s) for s in (workers.spread, in_turn))
            assert ours is not None
            assert alone is not None
            assert ours.tolist() == alone.tolist()
            assert 0 < ours.sum() < 63


@pytest.mark.ray
def test_what_a_worker_raises_arrives_as_what_it_is(named: RayNodes) -> None:
    def refuse() -> Callable[[int], int]:
        raise ConflictError("taken over", key="root", value="here")

    with open_workers("an actor", CLUSTER, 2) as workers:
        with pytest.raises(ConflictError, match="taken over") as conflict:
            list(workers.spread(refuse, range(4)))
        assert (conflict.value.key, conflict.value.value) == ("root", "here")
        with pytest.raises(InputError, match="The store refused an operation"):
            list(workers.spread(fail_at(2, PermissionError("not yours")), range(4)))


@pytest.mark.ray
def test_what_no_node_can_hold_is_refused(named: RayNodes) -> None:
    with pytest.raises(ConfigError, match=r"takes 3 CPUs and 0 GPUs: it would wait for ever") as refused:
        with open_workers("a wide actor", CLUSTER, num_cpus=3.0):
            pass
    assert refused.value.key == "workers"
    with pytest.raises(ConfigError, match=r"and 1048576\.0 GiB: it would wait"):
        with open_workers("a large actor", CLUSTER, memory_bytes=1 << 50):
            pass
    with pytest.raises(ConfigError, match="The cluster has no GPUs"):
        with open_workers("an encoder", CLUSTER, device="cuda"):
            pass


def test_a_cluster_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster_module, "_ANSWER_S", 0.2)
    with pytest.raises(InputError, match="No Ray cluster answers"), open_workers("an actor", CLUSTER):
        pass


@pytest.mark.ray
def test_a_cluster_that_asks_for_a_token_is_given_it_or_told_of_at_once(
    named: RayNodes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check_address()  # as its operator says: the mode and the token
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    with pytest.raises(InputError, match="does not take this process's token") as refused:
        check_address()
    assert refused.value.value == "***"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match="asks for a token, and this process sends none") as asked:
        check_address()
    assert asked.value.key == "RAY_AUTH_MODE"
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(InputError, match="asks for a token"):
        check_address()
    # On this machine the token that Ray keeps for this user is sent, as if Ray had found the cluster by itself.
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(named.token)
    check_address()
    assert os.environ["RAY_AUTH_MODE"] == "token"


# -- Jobs whose work is spread so ------------------------------------------------------------------------------


def kill_one(nodes: RayNodes, condition: Callable[[], Any]) -> None:
    """Kill a worker of the cluster that writes, once a condition holds."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for daemon in nodes.daemons if condition() else ():
            assert daemon.process is not None
            for process in psutil.Process(daemon.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any("/slow-" in file.path for file in process.open_files()):
                        process.kill()
                        return
        time.sleep(0.02)
    pytest.fail("it never came to that")


def contents(folder: Path) -> dict[str, bytes]:
    """The data files of a dataset."""
    return {file.name: file.read_bytes() for file in (folder / "data").glob("*.parquet")}


@pytest.mark.ray
@pytest.mark.slow
def test_captions_embedded_by_several_workers_of_which_one_is_killed(nodes: RayNodes, tmp_path: Path) -> None:
    from tests.text.text_builders import make_clip, make_latents

    make_clip(tmp_path / "clip")
    latents = make_latents(tmp_path / "latents", [[f"picture {a} {b}" for a in range(8)] for b in range(12)])

    def arguments(output: str) -> list[str]:
        fixed = ["encoders=[{name: clip, path: clip}]", "embed.unit_captions=4", "embed.batch_size=4", "threads=1"]
        return [f"data.uri={latents}", f"output.uri={output}", "device=cpu", "tracking.enabled=false", *fixed]

    code, alone, errors = run("embed_text", *arguments("alone"), cwd=tmp_path)
    assert code == 0, errors
    process = start("embed_text", *arguments("slow-output"), cwd=tmp_path, env=nodes.env)
    kill_one(nodes, lambda: len(list((tmp_path / "slow-output/clip/ledger").rglob("*.json"))) > 2)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "a worker died and is replaced (an encoder of clip)" in errors
    assert f'"clip.captions": {alone["counts"]["clip.captions"]}' in out
    assert contents(tmp_path / "slow-output" / "clip") == contents(tmp_path / "alone" / "clip")


def dataset_of(folder: Path) -> Root:
    """Fragments in an order of chance, and one reject."""
    root = planned_root(str(folder), units=40, rows=50)
    addresses = [(unit, row) for unit in range(40) for row in range(50)]
    random.Random(1).shuffle(addresses)
    generation = claim(root)
    for first in range(0, len(addresses), 50):
        part = sorted(addresses[first : first + 50])
        stored = [address for address in part if address != (3, 3)]
        rejects = rejected_rows([(3, 3)], "truncated") if len(stored) < len(part) else None
        committer(root, generation).commit(latent_rows(stored), rejects, {})
    generation.close({"status": "done"})
    return root


@pytest.mark.ray
def test_a_verification_on_a_cluster_finds_what_one_process_finds(nodes: RayNodes, tmp_path: Path) -> None:
    root = dataset_of(tmp_path / "data")
    for file in [file.info.path for file in read_state(root).files][::9]:
        data = bytearray(root.read_bytes(file))
        data[len(data) // 2] ^= 1
        root.put(file, bytes(data))
    here = verify(root.uri, "checksums")
    arguments = [f"data.uri={root.uri}", "tracking.enabled=false", f"report={tmp_path / 'report.json'}"]
    code, answer, errors = run("verify", *arguments, cwd=tmp_path, env=nodes.env)
    assert code == 3, errors
    there = json.loads((tmp_path / "report.json").read_bytes())
    assert answer["counts"]["files_checked"] == there["files_checked"] == here.files_checked == 41
    assert there["bytes_read"] == here.bytes_read > 0
    assert [p["kind"] for p in here.problems] == ["checksum"] * 5
    assert sorted(p["where"] for p in there["problems"]) == sorted(p["where"] for p in here.problems)


SIZES = {"shard_bytes": 65536, "row_group_bytes": 1024, "seed": 5}


def compaction(root: Root) -> list[str]:
    return [f"data.uri={root.uri}", "tracking.enabled=false", *(f"{key}={value}" for key, value in SIZES.items())]


@pytest.mark.ray
def test_shards_written_by_several_workers_of_which_one_is_killed(nodes: RayNodes, tmp_path: Path) -> None:
    """Byte for byte those of one process."""
    alone = dataset_of(tmp_path / "alone")
    spread = Root(shutil.copytree(tmp_path / "alone", tmp_path / "slow-data").as_posix())
    whole = compact(alone.uri, **SIZES)
    assert whole.shards_written > 8
    fragments = len(list(spread.list("data")))
    process = start("compact", *compaction(spread), cwd=tmp_path, env=nodes.env)
    kill_one(nodes, lambda: len(list(spread.list("data"))) > fragments)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "a worker died and is replaced (a process that writes shards)" in errors
    answer = json.loads(out.splitlines()[-1])
    assert (answer["counts"]["shards_written"], answer["counts"]["bytes"]) == (
        whole.shards_written,
        whole.bytes_written,
    )
    assert contents(tmp_path / "slow-data") == contents(tmp_path / "alone")
    assert verify(spread.uri, "checksums").problems == []


@pytest.mark.ray
@pytest.mark.slow
def test_a_compaction_on_a_cluster_whose_driver_is_killed_goes_on(nodes: RayNodes, tmp_path: Path) -> None:
    root = dataset_of(tmp_path / "slow-data")
    fragments = len(list(root.list("data")))
    process = start("compact", *compaction(root), cwd=tmp_path, env=nodes.env)
    until = time.monotonic() + 120
    while time.monotonic() < until and len(list(root.list("data"))) < fragments + 4:
        time.sleep(0.02)
    (driver,) = victims(psutil.Process(process.pid), "driver")
    os.kill(driver.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 75
    code, answer, errors = run("compact", *compaction(root), cwd=tmp_path, env=nodes.env)
    assert code == 0, errors
    assert answer["counts"]["shards_kept"] >= 1
    assert answer["counts"]["shards_written"] > 0
    report = verify(root.uri, "checksums")
    assert (report.problems, report.stored_rows, report.rejected_rows) == ([], 1999, 1)


@pytest.mark.ray
@pytest.mark.slow
def test_hashes_compared_by_several_workers_of_which_one_is_killed(
    named: RayNodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The records of a deduplication do not depend on who has compared, or how often."""
    chance = random.Random(2)
    roots = [planned_root(str(tmp_path / name), units=20, rows=50) for name in ("alone", "slow-spread")]
    hashes = [chance.randbytes(32) if chance.random() < 0.7 else b"same" * 8 for _ in range(1000)]
    for root in roots:
        generation = claim(root)
        for unit in range(20):
            rows = latent_rows([(unit, row) for row in range(50)])
            at = rows.schema.get_field_index("content_sha256")
            mine = pa.array(hashes[50 * unit : 50 * unit + 50], pa.binary(32))
            committer(root, generation).commit(rows.set_column(at, rows.schema.field(at), mine), None, {})
        generation.close({"status": "done"})
    memory = {"source_uri": "mem", "memory_bytes": 200 * 320}
    alone = deduplicate(roots[0].uri, **memory)
    assert alone.shares == 5
    assert alone.duplicates == hashes.count(b"same" * 8) - 1
    scratch = tmp_path / "slow-spread" / "scratch"
    killer = threading.Thread(target=kill_one, args=(named, lambda: scratch.exists() and any(scratch.iterdir())))
    killer.start()
    with open_workers("a process that compares hashes", CLUSTER) as workers:
        assert deduplicate(roots[1].uri, **memory, spread=workers.spread) == alone
    killer.join()
    assert "a worker died and is replaced (a process that compares hashes)" in caplog.text
    for place in ("rejects", "ledger", "scratch"):
        first, second = ({i.key: root.read_bytes(i.key) for i in root.list(place)} for root in roots)
        assert first == second
        assert first


def test_ray_is_not_started_by_whoever_asks_it_for_something() -> None:
    """As a thread with an execution does, once its job has disconnected."""
    program = "import pipeline.dataflow.passes, ray\nray.put(1)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", program]
    asked = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert asked.returncode == 1
    assert "Ray has not been started yet" in asked.stderr


@pytest.mark.ray
def test_an_execution_elsewhere_ends_as_it_would_here(named: RayNodes, tmp_path: Path) -> None:
    def refuse() -> None:
        raise ConfigError("no such codec", key="codec.path")

    def worker_dies() -> None:
        raise ActorDiedError

    def die() -> None:
        os._exit(1)

    with open_workers("a worker", CLUSTER):
        assert run_elsewhere(lambda: (tmp_path / "ran").touch(), 2) is None
        assert (tmp_path / "ran").exists()
        with pytest.raises(ConfigError) as caught:
            run_elsewhere(refuse, 2)
        assert (caught.value.what, caught.value.key) == ("no such codec", "codec.path")
        for execute in (worker_dies, die):
            assert "died" in str(run_elsewhere(execute, 2))
