"""Kill anything at any moment: the finished dataset holds every row once, byte for byte as if nothing had happened.

`pytest tests/faults -m soak --kills 200 --kill-seed 7` makes a longer run of it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.storage import Root
from pipeline.store.dataset import LatentDataset
from pipeline.store.verify import verify
from tests.support.images import make_codec, make_images
from tests.support.jobs import run, start

pytestmark = pytest.mark.ray

IMAGES, BROKEN = 96, 6


def arguments(base: Path, output: str, **extra: Any) -> list[str]:
    settings = {
        "source.kind": "folder",
        "source.uri": base / "images",
        "image.resolution": 32,
        "image.multiple_of": 4,
        "codec.path": base / "codec",
        "output.uri": base / output,
        "encode.unit_rows": 8,
        "encode.fragment_rows": 8,
        "encode.batch_size": 4,
        "encode.crash_limit": 20,
        "cluster.num_cpus": 4,
        "cluster.dashboard": "false",
        "tracking.enabled": "false",
        **extra,
    }
    return [f"{k}={v}" for k, v in settings.items()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kills")
    make_images(path / "images", IMAGES, broken=BROKEN)
    make_codec(path / "codec")
    code, answer, errors = run("encode", *arguments(path, "calm", **{"encode.actors": 1}), cwd=path)
    assert code == 0, errors
    assert answer["counts"]["latents"] == IMAGES
    return path


def content(uri: Path) -> dict[bytes, tuple[Any, ...]]:
    """Every visible row by sample id; fails on a repeated one."""
    dataset = LatentDataset.open(str(uri))
    rows: dict[bytes, tuple[Any, ...]] = {}
    for group in dataset.row_groups:
        table = dataset.read(group.index, None)
        for values in table.drop_columns(["unit", "row"]).to_pylist():
            assert values["sample_id"] not in rows
            rows[values["sample_id"]] = tuple(sorted(values.items(), key=lambda kv: kv[0]))
    return rows


def victims(driver: psutil.Process, kind: str) -> list[psutil.Process]:
    """Processes of a job: its driver, its encoder actors, any Ray worker, or its raylet."""
    if kind == "driver":
        return [driver]
    found = []
    try:
        children = driver.children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for child in children:
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:
            continue
        actor = "MapWorker" in line
        if (
            (kind == "actor" and actor)
            or (kind == "worker" and "ray::" in line)
            or (kind == "raylet" and "/raylet " in line)
        ):
            found.append(child)
    return found


def disturb(base: Path, output: str, kills: int, seed: int) -> dict[str, int]:
    """Run the job again and again, killing something random inside, until it finishes by itself."""
    chance = random.Random(seed)
    struck: dict[str, int] = {}
    for _ in range(4 * kills + 4):
        process = start("encode", *arguments(base, output, **{"encode.actors": 2}), cwd=base)
        driver = psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(chance.uniform(0.3, 2.5))
            if sum(struck.values()) >= kills:
                break
            kind = chance.choices(("actor", "worker", "driver", "raylet"), (6, 4, 2, 1))[0]
            alive = victims(driver, kind) if process.poll() is None else []
            # Something must be under way to be disturbed: a run that is only starting proves nothing.
            if kind in ("driver", "raylet") and not victims(driver, "actor"):
                continue
            if alive:
                victim = chance.choice(alive)
                try:
                    os.kill(victim.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                struck[kind] = struck.get(kind, 0) + 1
        _, errors = process.communicate(timeout=600)
        assert process.returncode in (0, 75, -signal.SIGKILL), errors
        if process.returncode == 0 and sum(struck.values()) >= kills:
            return struck
        if process.returncode == 0:
            output = f"{output}+"  # finished before the quota was used up: go on with a fresh root
    pytest.fail(f"the job never finished: {struck}")


def check(base: Path, output: Path) -> None:
    assert content(output) == content(base / "calm")
    report = verify(str(output), "checksums")
    assert report.problems == []
    assert (report.stored_rows, report.rejected_rows) == (IMAGES, BROKEN)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_kills_lose_and_repeat_nothing(base: Path, seed: int) -> None:
    struck = disturb(base, f"killed-{seed}", kills=10, seed=seed)
    assert sum(struck.values()) >= 10
    for output in sorted(base.glob(f"killed-{seed}*")):
        if verify(str(output), "ledger").sound:
            check(base, output)


@pytest.mark.soak
def test_soak(base: Path, request: pytest.FixtureRequest) -> None:
    seed, kills = request.config.getoption("--kill-seed"), request.config.getoption("--kills")
    print(disturb(base, f"soak-{seed}", kills=kills, seed=seed))
    for output in sorted(base.glob(f"soak-{seed}*")):
        if verify(str(output), "ledger").sound:
            check(base, output)


def test_two_drivers_at_once(base: Path) -> None:
    """One goes on, the other stops with exit code 4, and nothing is lost."""
    both = [start("encode", *arguments(base, "two"), cwd=base) for _ in range(2)]
    outcomes = [p.communicate(timeout=600) for p in both]
    codes = sorted(p.returncode for p in both)
    assert codes == [0, 4], outcomes
    check(base, base / "two")


def test_sigterm_stops_with_75_and_the_same_command_goes_on(base: Path) -> None:
    process = start("encode", *arguments(base, "spot"), cwd=base)
    root = Root(str(base / "spot"))
    while process.poll() is None and not list(root.list("ledger")):
        time.sleep(0.1)
    process.terminate()
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert '"status": "stopped"' in out.strip().splitlines()[-1]
    code, answer, errors = run("encode", *arguments(base, "spot"), cwd=base)
    assert code == 0, errors
    assert answer["counts"]["latents"] == IMAGES
    check(base, base / "spot")


def test_finished_units_read_no_source_bytes(base: Path) -> None:
    """After the first commits the finished sources are made unreadable: a second run must not miss them."""
    code, _, errors = run("encode", *arguments(base, "calm"), cwd=base)
    assert code == 0, errors
    hidden = {p: p.read_bytes() for p in sorted((base / "images").glob("000*.png"))[:20]}
    try:
        for path, data in hidden.items():
            stat = path.stat()
            path.write_bytes(bytes(len(data)))
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        make_images(base / "images2", 3)
        for i, extra in enumerate(sorted((base / "images2").glob("*.png"))):
            (base / "images" / f"zz{i}.png").write_bytes(extra.read_bytes())
        code, answer, errors = run("encode", *arguments(base, "calm"), cwd=base)
        assert code == 0, errors
        assert answer["counts"]["latents"] == IMAGES + 3
        assert answer["counts"]["rejected"] == BROKEN
    finally:
        for path, data in hidden.items():
            path.write_bytes(data)
        for extra in (base / "images").glob("zz*.png"):
            extra.unlink()
