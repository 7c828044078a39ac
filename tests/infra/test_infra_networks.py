"""Networks that are not in the store: the init container lets the job say so; a store that is away fails it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.features import networks
from pipeline.text.files import encoder_files
from tests.infra.infra_files import BASE, INFRA, ray_job_specs, render
from tests.infra.infra_night import configurations

pytestmark = pytest.mark.integration


def fetch(source: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(INFRA / "docker" / "fetch_networks.py"), source, str(folder)]
    environ = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=120)


def test_what_is_there_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "store" / "clip-l").mkdir(parents=True)
    (tmp_path / "store" / "clip-l" / "config.json").write_text("{}")
    assert fetch(f"{tmp_path}/store", tmp_path / "here").returncode == 0
    assert (tmp_path / "here" / "clip-l" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("made", [False, True])
def test_networks_that_are_not_there_do_not_keep_a_pod_from_starting(tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "store").mkdir()
    done = fetch(f"{tmp_path}/store", tmp_path / "here")
    assert done.returncode == 0
    assert f"{tmp_path}/store" in done.stderr


def test_a_store_that_is_away_does(tmp_path: Path) -> None:
    done = fetch(
        "s3://bucket/networks",
        tmp_path / "here",
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="nobody",
        AWS_SECRET_ACCESS_KEY="nothing",
        AWS_MAX_ATTEMPTS="1",
    )
    assert done.returncode not in (0, 3), done.stderr


def test_the_job_then_says_which_one_it_misses() -> None:
    """Exit code 3, by which the launcher stops and names the step."""
    jobs = configurations(render(BASE))
    (encoder,) = jobs["embed-text"].encoders
    with pytest.raises(InputError, match=f"no directory of the encoder {encoder.name}") as text:
        encoder_files(encoder)
    with pytest.raises(InputError, match="cannot be loaded") as judge:
        networks._torchscript(jobs["evaluate"].extractor, "cpu")
    for raised in (text, judge):
        assert raised.value.exit_code == 3
        assert "/var/lib/latentloom/networks/" in str(raised.value)


def test_pods_that_never_come_up_are_given_up() -> None:
    for name, spec in ray_job_specs(render(BASE)).items():
        assert spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"], name
