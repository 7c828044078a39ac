"""The wheel in an environment of what pip installs with it and nothing else, run where its names are shadowed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.images import make_codec, make_images
from tests.support.index import needs_index
from tests.support.jobs import REPOSITORY

pytestmark = pytest.mark.ray

INPUTS = ("pyproject.toml", "README.md", "LICENSE", "pipeline", "jobs", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy: building leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in INPUTS:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(
                source, folder / "src" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            (folder / "src").mkdir(exist_ok=True)
            shutil.copy(source, folder / "src" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    done = subprocess.run([*command, str(folder), str(folder / "src")], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fresh environment in which pip has installed the wheel, as pinned; two gigabytes, removed again."""
    needs_index()
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    words = [
        folder / "bin" / "python",
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--constraint",
        REPOSITORY / "constraints.txt",
    ]
    done = subprocess.run(
        [*map(str, words), str(wheel)], env=bare(), text=True, capture_output=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    yield folder
    shutil.rmtree(folder)


def bare() -> dict[str, str]:
    """This process's variables, without what would bring other packages or another cluster."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder whose names shadow this project's wherever the current directory comes first."""
    (tmp_path / "jobs").mkdir()
    for name in ("jobs/__init__.py", "pipeline.py", "latentloom.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of the current directory was imported')\n")
    return tmp_path


def call(
    installed: Path, *words: object, cwd: Path, timeout_s: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, [installed / "bin" / "latentloom", *words])),
        cwd=cwd,
        env={**bare(), "PYTHONWARNINGS": "ignore", **(env or {})},
        text=True,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


def test_the_wheel_holds_all_that_the_package_reads_or_tells(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {
        "jobs",
        "pipeline",
        "latentloom",
    }
    wanted = {"latentloom/py.typed", "pipeline/py.typed", "jobs/py.typed", "pipeline/media/templates/report.html"}
    wanted |= {"pipeline/store/FORMAT.md", "pipeline/source/DECODE.md", "latentloom/__init__.py"}
    wanted |= {f"pipeline/{p.relative_to(REPOSITORY)}" for p in (REPOSITORY / "configs").rglob("*.yaml")}
    assert wanted - names == set()
    sources = [p for folder in ("pipeline", "jobs") for p in (REPOSITORY / folder).rglob("*.py")]
    ours = {str(p.relative_to(REPOSITORY)).replace("pipeline/latentloom/", "latentloom/") for p in sources}
    assert {name for name in names if name.endswith(".py")} == ours


def test_the_command_answers_from_a_folder_that_holds_its_names(installed: Path, elsewhere: Path) -> None:
    done = call(installed, "--version", cwd=elsewhere)
    assert done.stdout.startswith("latentloom 0."), done.stderr
    assert "encode/photos_256" in call(installed, "configs", "list", cwd=elsewhere).stdout
    assert call(installed, "configs", "copy", "encode/photos_256", cwd=elsewhere).returncode == 0
    assert (elsewhere / "photos_256.yaml").is_file()


def test_a_job_runs_on_ray_from_a_folder_that_holds_its_names(installed: Path, elsewhere: Path) -> None:
    make_images(elsewhere / "images", 6, broken=1)
    make_codec(elsewhere / "codec")
    settings = {
        "source.kind": "folder",
        "source.uri": "images",
        "image.resolution": 32,
        "image.multiple_of": 4,
        "codec.path": "codec",
        "output.uri": "out",
        "encode.reject_budget": 1,
        "tracking.enabled": "false",
        "cluster.num_cpus": 2,
        "cluster.dashboard": "false",
    }
    done = call(installed, "encode", *(f"{k}={v}" for k, v in settings.items()), cwd=elsewhere, timeout_s=300)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["job"], answer["status"]) == ("encode", "done")
    assert answer["counts"]["latents"] == 6
    (listed,) = call(installed, "files", "out", cwd=elsewhere).stdout.splitlines()
    assert json.loads(listed)["rows"] == 6
    code = (
        "import latentloom as ll; out = ll.open_latents('out'); print(ll.__file__, len(out), out[0]['latent'].shape)"
    )
    said = subprocess.run(  # -P: the folder is not looked through for modules
        [installed / "bin" / "python", "-P", "-c", code],
        cwd=elsewhere,
        env=bare(),
        text=True,
        capture_output=True,
        check=True,
    ).stdout
    assert said.startswith(str(installed))
    assert said.split(maxsplit=1)[1] == "6 (4, 8, 8)\n"


def test_the_environment_holds_what_the_package_asks_for_and_no_more(installed: Path, elsewhere: Path) -> None:
    code = "import importlib.metadata as m; print(*sorted({d.name.lower() for d in m.distributions()}))"
    words = [installed / "bin" / "python", "-P", "-c", code]
    done = subprocess.run(words, cwd=elsewhere, env=bare(), text=True, capture_output=True, check=True)
    names = set(done.stdout.split())
    assert {"latentloom", "torch", "ray", "mlflow", "pyarrow"} <= names
    # Of what only extras and developers have there is nothing.
    assert not {"transformers", "s3fs", "gcsfs", "adlfs", "peft", "pylance", "pytest", "duckdb"} & names
    done = call(installed, "export", "data.uri=nowhere", "output.uri=out", "format=lance", cwd=elsewhere)
    assert (done.returncode, json.loads(done.stdout.splitlines()[-1])["key"]) == (3, "data.uri"), done.stderr


@pytest.mark.parametrize(("name", "version"), [("torch", "2.1.0"), ("ray", "2.9.3")])
def test_older_packages_are_named_with_the_range_that_is_asked_for(
    name: str, version: str, installed: Path, elsewhere: Path
) -> None:
    older = elsewhere / "older" / f"{name}-{version}.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    words = ("encode", "source.kind=folder", "source.uri=x", "codec.path=x", "output.uri=out", "image.resolution=32")
    done = call(installed, *words, cwd=elsewhere, env={"PYTHONPATH": str(older.parent)})
    assert done.returncode == 2, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["key"], answer["value"]) == (name, version)
    assert answer["rule"].startswith(f"{name}")
    assert "pip install" in answer["next"]
