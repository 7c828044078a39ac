"""CONTRIBUTING.md says what is so: its examples work, its boundaries and markers are those that are checked."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from pipeline.codec.codec import load_codec
from pipeline.model.build import build_model
from pipeline.model.config import InstalledConfig
from tests.support.jobs import REPOSITORY

PAGE = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of the page as an installer leaves them: modules, and entry points in their metadata."""
    blocks = re.findall(r"^```(?:toml|python)\n# (\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in blocks] == [
        "pyproject.toml",
        "unshuffle_codec.py",
        "pyproject.toml",
        "mixer_network.py",
    ]
    for (_, project), (name, code) in zip(blocks[::2], blocks[1::2], strict=True):
        told = tomllib.loads(project)["project"]
        (tmp_path / name).write_text(code)
        metadata = tmp_path / f"{told['name'].replace('-', '_')}-{told['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: {told['version']}\n"
        )
        groups = [
            f"[{group}]\n" + "".join(f"{point} = {value}\n" for point, value in points.items())
            for group, points in told["entry-points"].items()
        ]
        (metadata / "entry_points.txt").write_text("\n".join(groups))
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("packages")
def test_its_codec_is_found_and_exact() -> None:
    codec = load_codec("any", kind="unshuffle")
    images_NHWC = torch.randint(0, 256, (3, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = codec.encode(images_NHWC)
    assert tuple(latents.shape[1:]) == codec.info.latent_shape(16, 24) == (48, 4, 6)
    assert torch.equal(codec.decode(latents), images_NHWC)


@pytest.mark.usefixtures("packages")
def test_its_network_is_found_and_answers() -> None:
    network = InstalledConfig(name="mixer", options={"width": 8})
    model = build_model(network, latent_channels=4, num_classes=3, text_dim=None)
    x_BCHW, t_B = torch.zeros(2, 4, 8, 8), torch.ones(2)
    labelled, free = model(x_BCHW, t_B, torch.tensor([0, 3])), model(x_BCHW, t_B)
    assert labelled.shape == free.shape == x_BCHW.shape
    assert not torch.equal(labelled, free)


def test_what_its_steps_name_is_there() -> None:
    for path in re.findall(r"`((?:pipeline|tests|\.ci)/[\w/.-]+)`", PAGE):
        assert path.endswith("/zip.py") or (REPOSITORY / path).exists(), path
    for name, file in {
        "SamplerName": "pipeline/diffusion/solvers.py",
        "SOLVERS": "pipeline/diffusion/solvers.py",
        "_RUNS": "pipeline/diffusion/samplers.py",
        "test_solvers_converge_to_the_exact_answer_with_their_order": "tests/diffusion/test_samplers.py",
        "list_entries": "pipeline/source/reading/listing.py",
        "read_unit": "pipeline/source/reading/listing.py",
        "check_apart": "pipeline/source/reading/listing.py",
        "SourceConfig": "pipeline/source/config.py",
        "DIFFUSERS_CLASSES": "pipeline/codec/info.py",
        "CodecPlugin": "pipeline/codec/info.py",
    }.items():
        assert f"`{name}`" in PAGE
        assert re.search(rf"^(def |class )?{name}\b", (REPOSITORY / file).read_text(), re.MULTILINE), name


def test_its_boundaries_are_those_that_are_checked() -> None:
    (contract,) = [
        c for c in SETTINGS["tool"]["importlinter"]["contracts"] if c["type"] == "layers" and "way" in c["name"]
    ]
    layers = [{part.strip().removeprefix("pipeline.") for part in layer.split("|")} for layer in contract["layers"]]
    (block,) = re.findall(r"^```\n(jobs, latentloom.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    told = [{part.strip() for part in re.sub(r"\(.*\)", "", line).split(",")} for line in block.splitlines()]
    assert told == layers


def test_its_markers_are_those_there_are() -> None:
    markers = {line.partition(":")[0] for line in SETTINGS["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == markers


@pytest.mark.integration
def test_readme_links_it_and_make_help_names_every_target() -> None:
    assert "(CONTRIBUTING.md)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    (targets,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    done = subprocess.run(["make", "help"], cwd=REPOSITORY, text=True, capture_output=True, check=True)
    assert {name for name in targets.split() if not re.search(rf"\bmake {name}\b", done.stdout)} == {"help"}
