"""level=decode: stored latents are compared with their images, and a latent of another image is found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import load_config
from pipeline.errors import InputError
from pipeline.maintenance import recheck as recheck_module
from pipeline.maintenance.config import VerifyJobConfig
from pipeline.maintenance.job import run_verify
from pipeline.result import JobResult
from pipeline.source.config import ImageConfig
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import last_recipe, note_run
from pipeline.store.read.dataset import LatentDataset
from tests.support.encode_here import encode_here
from tests.support.images import make_codec, make_images
from tests.support.rows import claim, committer

IMAGES = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recheck")
    make_images(path / "images", IMAGES, broken=1)
    make_codec(path / "codec")
    with pytest.MonkeyPatch.context() as patch:
        result = encode_here(
            patch,
            source__kind="folder",
            source__uri=path / "images",
            image__resolution=32,
            image__multiple_of=4,
            codec__path=path / "codec",
            output__uri=path / "latents",
            encode__batch_size=4,
        )
    assert result.counts["latents"] == IMAGES
    return path


@pytest.fixture
def copy(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "copy")
    return tmp_path / "copy"


def check(base: Path, **settings: object) -> JobResult:
    fixed = [f"data.uri={base / 'latents'}", "level=decode", "tracking.enabled=false"]
    settings = {"places": f"[{base}]", **settings}
    overrides = [f"decode.{key}={value}" for key, value in settings.items()]
    return run_verify(load_config(VerifyJobConfig, [], [*fixed, *overrides]))


def test_sound_latents_encode_to_the_same_bytes(base: Path) -> None:
    figures = check(base, tolerance=0).figures
    assert (figures["compared"], figures["identical"]) == (IMAGES, IMAGES)
    assert figures["reencode_error_max"] == 0
    assert 5 < figures["psnr_db_min"] <= figures["psnr_db_mean"] < 60


def test_the_sample_is_a_function_of_its_seed(base: Path) -> None:
    one, same, other = (check(base, sample=5, seed=seed).figures["psnr_db_mean"] for seed in (1, 1, 2))
    assert one == same != other


def test_a_latent_of_another_image_is_found_though_all_checksums_fit(copy: Path) -> None:
    root = Root(str(copy / "latents"))
    dataset = LatentDataset.open(root.uri)
    rows = pa.concat_tables([dataset.read(g.index, None) for g in dataset.row_groups])
    latents = rows["latent"].to_pylist()
    latents[3], latents[4] = latents[4], latents[3]
    place = rows.schema.get_field_index("latent")
    swapped = rows.set_column(place, rows.schema.field(place), pa.array(latents, rows.schema.field(place).type))
    recipe = last_recipe(root)
    generation = claim(root)
    committer(root, generation).commit(swapped, None, {})
    note_run(root, generation.number, {"handle": "test", "recipe": recipe})
    generation.close({})
    with pytest.raises(InputError, match="2 problem") as caught:
        check(copy, places="[/]")
    keys = rows["key"].to_pylist()
    assert f"re-encode: {keys[3]}" in str(caught.value)
    assert f"re-encode: {keys[4]}" in str(caught.value)


def test_fidelity_is_judged_only_where_a_bound_is_set(base: Path) -> None:
    with pytest.raises(InputError, match=r"fidelity: .* dB of its image, at least 90 is asked for"):
        check(base, min_psnr_db=90)


def test_images_that_are_gone_or_changed_are_counted_and_not_judged(copy: Path) -> None:
    (copy / "images" / "00002.png").unlink()
    shutil.copy(copy / "images" / "00007.png", copy / "images" / "00005.png")
    figures = check(copy, source_uri=copy / "images", codec_path=copy / "codec").figures
    assert (figures["compared"], figures["source_gone"], figures["source_changed"]) == (IMAGES - 2, 1, 1)


def test_another_codec_is_refused(base: Path, tmp_path: Path) -> None:
    make_codec(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"(?s)other weights .*decode.codec_path"):
        check(base, codec_path=tmp_path / "other")


@pytest.mark.parametrize(("recipe", "message"), [(None, "does not say how"), ({"source": {}}, "cannot be read")])
def test_a_dataset_without_a_readable_note_says_so(copy: Path, recipe: object, message: str) -> None:
    root = Root(str(copy / "latents"))
    for info in list(root.list("generations")):
        if info.key.endswith("run.json"):
            root.delete(info.key)
    if recipe is not None:
        note_run(root, 1, {"handle": "test", "recipe": {"image": {}, "batch_size": 4, "source": {}}})
    with pytest.raises(InputError, match=message):
        check(copy)


def edited(copy: Path, **changes: object) -> None:
    """The dataset with another note of how it was made, as somebody could send it."""
    root = Root(str(copy / "latents"))
    recipe = last_recipe(root)
    source, image = recipe["source"], recipe["image"]
    for key, value in changes.items():
        (source if key in source else image if key in image else recipe)[key] = value
    for info in list(root.list("generations")):
        if info.key.endswith("run.json"):
            root.delete(info.key)
    note_run(root, 1, {"handle": "test", "recipe": recipe})


def test_a_dataset_leads_nowhere_that_was_not_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr("pipeline.maintenance.recheck.load_codec", lambda path, **_: opened.append(path))
    monkeypatch.setattr("pipeline.maintenance.recheck.UnitReader", lambda *_, **__: opened.append("source"))
    edited(copy, uri="http://127.0.0.1:9/images")
    with pytest.raises(InputError, match="only named by the dataset") as both:
        check(copy, places="[]")
    assert both.value.key == "decode.source_uri, decode.codec_path"
    with pytest.raises(InputError, match=r"decode.source_uri=http://127.0.0.1:9/images"):
        check(copy, codec_path=copy / "codec")
    with pytest.raises(InputError) as codec:
        check(copy, source_uri=copy / "images", places="[]")
    assert codec.value.key == "decode.codec_path"
    assert opened == []


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"max_bytes": 1 << 40}, "decode.limits.max_bytes=1099511627776"),
        ({"max_pixels": 178_956_970}, "decode.limits.max_pixels=178956970"),
        ({"batch_size": 10**9}, "decode.limits.batch_pixels=1024000000000"),
        ({"resolution": 16_384}, "decode.limits.batch_pixels=1073741824"),
        ({"links": "any"}, "decode.limits.links=any"),
    ],
)
def test_a_dataset_does_not_widen_our_limits(copy: Path, changes: dict[str, object], asked: str) -> None:
    edited(copy, **changes)
    with pytest.raises(InputError, match="wider limits") as refused:
        check(copy, places="[/]")
    assert refused.value.next_step is not None
    assert refused.value.next_step.endswith(asked)


def test_isolation_is_ours(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[object] = []

    class Watched(recheck_module.ImageDecoder):
        def __init__(self, image: ImageConfig, *rest: Any, **more: Any) -> None:
            used.append((image.isolate, image.decode_cpu_s))
            super().__init__(image, *rest, **more)

    monkeypatch.setattr(recheck_module, "ImageDecoder", Watched)
    edited(copy, isolate="never", decode_cpu_s=1e9)
    figures = check(copy, places="[/]", tolerance=0).figures
    assert (figures["compared"], used) == (IMAGES, [("all", 20.0)])


def test_latents_that_do_not_vary_are_compared_all_the_same() -> None:
    from pipeline.maintenance.recheck import _relative_error

    flat = np.zeros((1, 2, 2), np.float32)
    assert _relative_error(flat, flat) == 0
    assert _relative_error(flat + 1, flat) == float("inf")
    assert _relative_error(np.zeros((2, 2, 2), np.float32), flat) == float("inf")
