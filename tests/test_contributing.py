"""CONTRIBUTING.md says what is so: its examples work, its boundaries and markers are those that are checked."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from pipeline.codec.codec import load_codec
from pipeline.model.config import InstalledConfig
from pipeline.model.load import build_model
from pipeline.source.config import InstalledSource
from pipeline.source.reading.listing import list_entries, read_unit
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
        "pyproject.toml",
        "zip_source.py",
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


@pytest.mark.usefixtures("packages")
def test_its_source_is_listed_and_read_in_parts(tmp_path: Path) -> None:
    folder = tmp_path / "zips"
    folder.mkdir()
    for at, names in enumerate((["a.png", "b.png"], ["c.png"])):
        with zipfile.ZipFile(folder / f"{at}.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"bytes of " + name.encode() + b"!" * (100 if name == "b.png" else 0))
    source = InstalledSource(uri=str(folder), plugin="zips", max_bytes=50)
    entries = list(list_entries(source))
    rows = list(read_unit(source, entries, [(0, None)]))
    assert [(row.row, row.key, row.image, row.reason) for row in rows] == [
        (0, "0.zip/a.png", b"bytes of a.png", None),
        (1, "0.zip/b.png", None, "too_many_bytes"),
        (2, "1.zip/c.png", b"bytes of c.png", None),
    ]
    assert list(read_unit(source, entries, [(2, 3)])) == rows[2:]


def test_what_its_steps_name_is_there() -> None:
    for path in re.findall(r"`((?:pipeline|tests|\.ci)/[\w/.-]+)`", PAGE):
        assert (REPOSITORY / path).exists(), path
    for name, file in {
        "SamplerName": "pipeline/diffusion/solvers.py",
        "SOLVERS": "pipeline/diffusion/solvers.py",
        "_RUNS": "pipeline/diffusion/samplers.py",
        "test_solvers_converge_to_the_exact_answer_with_their_order": "tests/diffusion/test_samplers.py",
        "ReadableSource": "pipeline/source/reading/listing.py",
        "DIFFUSERS_CLASSES": "pipeline/codec/codec.py",
        "CodecPlugin": "pipeline/codec/codec.py",
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
