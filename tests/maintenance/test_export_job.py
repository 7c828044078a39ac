"""The export job: each format by the readers it is for, what is refused, and what a second run finds.

Shards are written in this process; `tests/faults/test_export_kills.py` has them written by Ray's workers.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config import validate
from pipeline.errors import ConfigError, ConflictError, InputError, PipelineError
from pipeline.maintenance.config import ExportJobConfig
from pipeline.maintenance.export import _Export, plan_export, run_export
from pipeline.maintenance.shards import ShardWriter, cut
from pipeline.result import JobResult
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import claim_identity
from pipeline.store.maintain.compact import compact
from pipeline.store.plan import append_version, read_plan
from pipeline.store.schema import pack_latents
from pipeline.store.writer import Committer
from tests.evaluate.evaluate_world import real_images, write_samples
from tests.support.monitor import LocalMonitor
from tests.support.rows import (
    IDENTITY,
    SHAPE,
    Listed,
    claim,
    committer,
    latent,
    latent_rows,
    planned_root,
    rejected_rows,
    sample_id,
)

pytestmark = pytest.mark.integration

NONE = rejected_rows([], "corrupt")
ROWS = [(unit, row) for unit in range(2) for row in range(6)]
REPLACED = [(0, 3), (0, 4), (1, 0)]
FORMATS = ["parquet", "webdataset", "huggingface", "lance"]
Export = Callable[..., JobResult]


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


def write_here(export: _Export, missing: list[int]) -> None:
    """As `_Export.write`, without Ray."""
    writer = ShardWriter(
        export.dataset.root,
        export.dataset.identity,
        export.dataset.row_groups.to_arrow({}),
        export.form,
        export.output,
        LocalMonitor(),
    )
    for at in missing:
        list(writer.write(export.told["shards"][at], at, export.shards[at]))


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_ray: None) -> Export:
    """`export(uri, format, **settings)` runs the job into out/, with shards of a few rows."""
    monkeypatch.setattr(_Export, "write", write_here)
    if importlib.util.find_spec("datasets") is not None:  # without the hub it knows a folder by its name alone
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(uri: str, form: str, /, **settings: Any) -> JobResult:
        if form == "lance":
            needs("lance")
        return run_export(config(uri, form, tmp_path / "out", **settings))

    return run


def config(uri: str, form: str, output: Path, /, **settings: Any) -> ExportJobConfig:
    told = {"data": {"uri": uri}, "output": {"uri": str(output)}, "format": form, "tracking": {"enabled": False}}
    return validate(ExportJobConfig, {"shard_bytes": 1024, **told, **settings})


def make_latents(uri: str, *, buckets: bool = False) -> str:
    """Twelve rows of which three were stored again, with label 1 instead of 0; buckets: and six of another shape."""
    root = planned_root(uri, units=3, rows=6)
    small = committer(root, claim(root), row_group_bytes=700)
    small.commit(latent_rows(ROWS), NONE, {})
    if buckets:
        small.commit(latent_rows([(2, row) for row in range(6)], bucket="32x24"), NONE, {})
    committer(root, claim(root)).commit(latent_rows(REPLACED, label=1), NONE, {})
    return root.uri


@pytest.fixture
def latents(tmp_path: Path) -> str:
    return make_latents(str(tmp_path / "latents"))


@pytest.fixture
def buckets(tmp_path: Path) -> str:
    return make_latents(str(tmp_path / "latents"), buckets=True)


def opened(result: JobResult) -> Any:
    """What the line that the job says gives."""
    scope: dict[str, Any] = {}
    exec(result.details["open"], scope)
    return scope["rows"]


def label_of(address: tuple[int, int]) -> int:
    return int(address in REPLACED)


def halves(address: tuple[int, int], shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    return latent(*address, shape).astype(np.float16)


# -- What other readers find -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
def test_plain_parquet_is_read_by_anybody(dtype: str | None, latents: str, tmp_path: Path, export: Export) -> None:
    result = export(latents, "parquet", dtype=dtype)
    assert result.counts["rows"] == 12
    assert result.counts["shards"] == result.counts["written"] > 1
    rows = opened(result).to_table().to_pylist()
    assert sorted((row["unit"], row["row"]) for row in rows) == ROWS
    for row in rows:
        address = row["unit"], row["row"]
        assert row["label"] == label_of(address)
        assert row["sample_id"] == sample_id(*address)
        values = np.array(row["latent"], np.float32).reshape(row["latent_shape"])
        assert np.array_equal(values, halves(address).astype(np.float32))
    (first, *_) = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    schema = pq.read_schema(first)
    assert schema.field("latent").type.value_type == (pa.float32() if dtype == "float32" else pa.float16())
    meta = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert meta["latentloom.latent_dtype"] == (dtype or "float16")
    assert meta["latentloom.latent_layout"].startswith("the numbers of latent_shape [c, h, w] in C-order; raw")
    assert meta["latentloom.latent_shape"] == "[2, 3, 4]"
    assert "latentloom.generation" not in meta
    files = f"{tmp_path}/out/data/*.parquet"
    query = f"SELECT label, count(*), sum(len(latent)) FROM '{files}' GROUP BY label ORDER BY label"
    values = 2 * 3 * 4
    assert duckdb.sql(query).fetchall() == [(0, 9, 9 * values), (1, 3, 3 * values)]
    total = polars.scan_parquet(files).select(polars.col("latent").explode().cast(polars.Float64).sum()).collect()
    wanted = sum(halves(address).astype(np.float64).sum() for address in ROWS)
    assert total.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("form", ["parquet", "huggingface", "lance"])
def test_latents_of_several_shapes_are_lists_beside_their_shape(
    form: str, buckets: str, tmp_path: Path, export: Export
) -> None:
    rows = opened(export(buckets, form, columns=["unit", "row", "latent"]))
    found = rows.to_table().to_pylist() if form != "huggingface" else list(rows)
    shapes = {(row["unit"], row["row"]): row["latent_shape"] for row in found}
    assert len(found) == len(shapes) == 18
    assert "latentloom.latent_shape" not in json.loads((tmp_path / "out" / "export.json").read_text())["meta"]
    assert shapes[0, 0] == list(SHAPE)
    assert shapes[2, 0] == [2, 4, 3]
    for row in found:
        values = np.array(row["latent"], np.float32).reshape(row["latent_shape"])
        assert np.array_equal(values, halves((row["unit"], row["row"]), tuple(row["latent_shape"])))


def test_webdataset_reads_the_tars(buckets: str, tmp_path: Path, export: Export) -> None:
    needs("webdataset")
    samples = list(opened(export(buckets, "webdataset")))
    assert len(samples) == 18
    for sample in samples:
        told = sample["json"]
        address, shape = (told["unit"], told["row"]), tuple(told["latent_shape"])
        assert sample["__key__"] == told["sample_id"] == sample_id(*address).hex()
        assert sample["npy"].dtype == np.float16
        assert np.array_equal(sample["npy"], halves(address, shape))
        assert sample["txt"] == f"row {address[1]} of unit {address[0]}"
        assert sample["cls"] == label_of(address)
        assert not {"latent", "caption", "label"} & told.keys()


def test_tars_leave_out_what_a_row_has_not(tmp_path: Path, export: Export) -> None:
    root = planned_root(str(tmp_path / "latents"), units=1, rows=2)
    rows = latent_rows([(0, 0), (0, 1)], label=None)
    at = rows.schema.get_field_index("caption")
    rows = rows.set_column(at, rows.schema.field(at), pa.array(["Füße", None], pa.string()))
    committer(root, claim(root)).commit(rows, NONE, {})
    export(root.uri, "webdataset")
    names, texts = set(), []
    for path in (tmp_path / "out" / "data").iterdir():
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.mode) == (0, 0, 0o644)
                names.add(member.name.replace(sample_id(0, 0).hex(), "a").replace(sample_id(0, 1).hex(), "b"))
                content = tar.extractfile(member)
                texts += [content.read().decode()] if content and member.name.endswith(".txt") else []
    assert texts == ["Füße"]
    assert names == {"a.npy", "a.txt", "a.json", "b.npy", "b.json"}


def test_hugging_face_gives_typed_features(latents: str, tmp_path: Path, export: Export) -> None:
    datasets = pytest.importorskip("datasets")
    rows = opened(export(latents, "huggingface"))
    assert rows.features["latent"] == datasets.Array3D(SHAPE, "float16")
    assert rows.num_rows == 12
    for row in rows.with_format("numpy"):
        assert np.array_equal(row["latent"], halves((int(row["unit"]), int(row["row"]))))
    files = f"'{tmp_path}/out/data/*.parquet'"  # to whoever does not know the type they are lists of lists
    nested = duckdb.sql(f"SELECT DISTINCT len(latent), len(latent[1]), len(latent[1][1]) FROM {files}").fetchall()
    assert nested == [SHAPE]
    names = sorted(p.name for p in (tmp_path / "out" / "data").iterdir())
    assert names[0] == f"train-00000-of-{len(names):05d}.parquet"
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nconfigs:\n- config_name: default\n")


def test_lance_reads_one_version_of_all_shards(latents: str, export: Export) -> None:
    result = export(latents, "lance")
    rows = opened(result)
    assert (rows.version, rows.count_rows(), len(rows.get_fragments())) == (1, 12, result.counts["shards"])
    rows.validate()
    assert rows.schema.field("latent").type == pa.list_(pa.float16(), 24)
    assert rows.schema.metadata[b"latentloom.latent_dtype"] == b"float16"
    found = rows.to_table(columns=["latent", "unit", "row"], filter="label = 1").to_pylist()
    assert sorted((row["unit"], row["row"]) for row in found) == REPLACED
    assert np.array_equal(found[0]["latent"], halves((found[0]["unit"], found[0]["row"])).reshape(-1))


def make_samples(uri: str, *, outside: bool) -> dict[bytes, np.ndarray]:
    """Twelve images with labels and prompts; their pixels."""
    pixels, labels = real_images(12, seed=1)
    write_samples(uri, pixels, [int(n) for n in labels], [f"a shape of {n}" for n in labels], outside=outside)
    rows = pq.read_table(f"{uri}/data", columns=["sample_id", "label"])
    return {row["sample_id"]: pixels[row["label"]] for row in rows.to_pylist()}


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_samples_are_exported_with_their_images(form: str, outside: bool, tmp_path: Path, export: Export) -> None:
    uri = str(tmp_path / "samples")
    pixels = make_samples(uri, outside=outside)
    if form == "webdataset":
        needs("webdataset")
    result = export(uri, form)
    assert result.counts["rows"] == 12
    assert result.counts["shards"] > 1
    rows = opened(result)
    if form == "webdataset":
        samples = list(rows)
        found = [(bytes.fromhex(s["__key__"]), decoded(s["png"]), s["txt"], s["cls"]) for s in samples]
        assert not {"image", "prompt", "label", "file"} & samples[0]["json"].keys()
    elif form == "huggingface":
        assert type(rows.features["image"]).__name__ == "Image"
        found = [(r["sample_id"], np.asarray(r["image"]), r["prompt"], r["label"]) for r in rows]
    else:
        table = rows.to_table()
        assert "file" not in table.column_names
        found = [(r["sample_id"], decoded(r["image"]), r["prompt"], r["label"]) for r in table.to_pylist()]
    assert len(found) == 12
    for identity, image, text, label in found:
        assert np.array_equal(image, pixels[identity])
        assert text == f"a shape of {label}"


def test_an_image_that_was_altered_is_not_exported(tmp_path: Path, export: Export) -> None:
    uri = str(tmp_path / "samples")
    make_samples(uri, outside=True)
    victim = next(p for p in Path(uri, "images").rglob("*.png"))
    victim.write_bytes(victim.read_bytes() + b"x")
    with pytest.raises(
        InputError, match=f"{victim.name} cannot be read: its bytes are not those that were committed"
    ):
        export(uri, "parquet")


def test_some_columns_and_no_latent_among_them(latents: str, tmp_path: Path, export: Export) -> None:
    rows = opened(export(latents, "parquet", columns=["caption", "label"]))
    assert rows.schema.names == ["caption", "label"]
    assert rows.count_rows() == 12
    export_of = export(latents, "webdataset", columns=["label"], output={"uri": str(tmp_path / "tars")})
    with tarfile.open(next((tmp_path / "tars" / "data").iterdir())) as tar:
        assert {name.partition(".")[2] for name in tar.getnames()} == {"cls", "json"}
    assert export_of.counts["shards"] >= 1


@pytest.mark.parametrize("form", FORMATS)
def test_a_store_that_is_no_disk_receives_the_same_objects(
    form: str, latents: str, tmp_path: Path, export: Export
) -> None:
    export(latents, form)
    uri = f"memory://{tmp_path.name}-{form}"
    there = export(latents, form, output={"uri": uri})
    assert (there.status, there.details) == ("done", {})
    assert export(latents, form, output={"uri": uri}).status == "unchanged"
    chance = ("data.lance/_versions/", "data.lance/_transactions/")
    wanted = {name: data for name, data in contents(tmp_path / "out").items() if not name.startswith(chance)}
    names = [info.key for info in Root(uri).list()]
    assert {name: Root(uri).read_bytes(name) for name in names if not name.startswith(chance)} == wanted
    if form == "lance":
        assert any(name.endswith(".manifest") for name in names)


# -- bfloat16 --------------------------------------------------------------------------------------------------


def make_bfloat16(uri: str, largest: float) -> str:
    root = Root(uri)
    identity = replace(IDENTITY, fingerprint={**IDENTITY.fingerprint, "latent_dtype": "bfloat16"})
    claim_identity(root, identity)
    append_version(read_plan(root), [[Listed("0"), Listed("1")]], source={"uri": "mem"}, generation=0)
    values = np.stack([latent(0, 0), latent(0, 1)])
    values[1, 0, 0, 0] = largest
    rows = latent_rows([(0, 0), (0, 1)])
    at = rows.schema.get_field_index("latent")
    packed = pa.array(pack_latents(values, "bfloat16"), pa.large_binary())
    rows = rows.set_column(at, rows.schema.field(at), packed)
    Committer(root, claim(root).number, 1 << 20, "bfloat16", {}).commit(rows, NONE, {})
    return root.uri


def test_bfloat16_becomes_float32_which_holds_all_of_it(tmp_path: Path, export: Export) -> None:
    rows = opened(export(make_bfloat16(str(tmp_path / "latents"), 1e30), "parquet")).to_table()
    assert rows["latent"].type == pa.list_(pa.float32(), 24)
    assert max(rows["latent"][1].as_py()) == pytest.approx(1e30, rel=0.01)


def test_bfloat16_becomes_float16_where_all_of_it_fits(tmp_path: Path, export: Export) -> None:
    uri = make_bfloat16(str(tmp_path / "latents"), 60_000.0)
    rows = opened(export(uri, "parquet", dtype="float16")).to_table()
    assert rows["latent"].type == pa.list_(pa.float16(), 24)
    uri = make_bfloat16(str(tmp_path / "larger"), 1e5)
    with pytest.raises(InputError, match=r"u0/r1.png' reaches 9.98e\+04, which float16 cannot hold") as caught:
        export(uri, "parquet", dtype="float16", output={"uri": str(tmp_path / "other")})
    assert (caught.value.key, caught.value.value) == ("dtype", "float16")


# -- What a second run finds -----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("form", FORMATS)
def test_a_second_run_writes_what_is_missing_alone_and_the_same_bytes(
    form: str, latents: str, tmp_path: Path, export: Export
) -> None:
    assert export(latents, form).status == "done"
    whole = contents(tmp_path / "out")
    again = export(latents, form)
    assert (again.status, again.counts["written"]) == ("unchanged", 0)
    assert contents(tmp_path / "out") == whole
    shards = json.loads(whole["export.json"])["shards"]
    kept = (tmp_path / "out" / shards[0]).stat().st_mtime_ns
    (tmp_path / "out" / shards[1]).unlink()
    again = export(latents, form)
    assert (again.status, again.counts["written"]) == ("done", 1)
    assert contents(tmp_path / "out") == whole
    assert (tmp_path / "out" / shards[0]).stat().st_mtime_ns == kept


@pytest.mark.parametrize(("form", "last"), [("huggingface", "README.md"), ("lance", "data.lance/_versions")])
def test_a_run_that_died_at_the_very_end_is_finished(
    form: str, last: str, latents: str, tmp_path: Path, export: Export
) -> None:
    export(latents, form)
    path = tmp_path / "out" / last
    for file in [path] if path.is_file() else list(path.iterdir()):
        file.unlink()
    again = export(latents, form)
    assert (again.status, again.counts["written"]) == ("done", 0)
    assert len(opened(again).to_table() if form == "lance" else opened(again)) == 12


def test_what_is_whole_stays_so_however_the_dataset_was_compacted(
    latents: str, tmp_path: Path, export: Export
) -> None:
    export(latents, "parquet")
    root = Root(latents)
    compact(claim(root), shard_bytes=1 << 20, row_group_bytes=1 << 20, on_shard=lambda done, total: None)
    assert export(latents, "parquet").status == "unchanged"
    next((tmp_path / "out" / "data").iterdir()).unlink()
    with pytest.raises(
        ConflictError, match=r"another export, which is not whole: files: \w{32} there, \w{32} asked for"
    ):
        export(latents, "parquet")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float32"}, "dtype: float16 there, float32 asked for"),
        ({"shard_bytes": 2048}, "shard_bytes: 1024 there, 2048 asked for"),
        ({"columns": ["key"]}, "columns: .*'latent'.* there, .'key'. asked for"),
        ({"format": "huggingface"}, "format: parquet there, huggingface asked for"),
    ],
)
def test_other_settings_are_refused_and_both_sides_named(
    change: dict[str, Any], said: str, latents: str, tmp_path: Path, export: Export
) -> None:
    export(latents, "parquet")
    before = contents(tmp_path / "out")
    with pytest.raises(ConflictError, match=said) as caught:
        export(latents, change.pop("format", "parquet"), **change)
    assert caught.value.key == "output.uri"
    assert caught.value.next_step
    assert contents(tmp_path / "out") == before


def test_another_state_and_another_dataset_are_refused(latents: str, tmp_path: Path, export: Export) -> None:
    export(latents, "parquet")
    other = make_latents(str(tmp_path / "other"), buckets=True)
    with pytest.raises(ConflictError, match=rf"dataset: {latents} \(\w+\) there, {other} \(\w+\) asked for"):
        export(other, "parquet")
    root = Root(latents)
    committer(root, claim(root)).commit(latent_rows([(2, 0)]), NONE, {})
    with pytest.raises(ConflictError, match=rf"dataset: {latents} \(\w+\) there, {latents} \(\w+\) asked for"):
        export(latents, "parquet")


# -- What is refused before Ray --------------------------------------------------------------------------------


def broken(**change: Any) -> Any:
    return pytest.param(change, id=next(iter(change)))


@pytest.mark.parametrize(
    ("settings", "error", "said", "key"),
    [
        ({"columns": ["latent", "capshun"]}, ConfigError, "There is no such column", "columns"),
        ({"output": {"uri": "latents/export"}}, ConfigError, "The output lies in the dataset", "output.uri"),
        ({"output": {"uri": "latents"}}, ConfigError, "The output lies in the dataset", "output.uri"),
        ({"output": {"uri": "mine"}}, ConflictError, "it has notes.txt and no export.json", "output.uri"),
        ({"output": {"uri": "mine/notes.txt"}}, ConflictError, "something else: it is a file", "output.uri"),
        ({"output": {"uri": "alike"}}, ConflictError, "its export.json is none of this job's", "output.uri"),
        ({"data": {"uri": "empty"}}, InputError, "The dataset has no visible row", "data.uri"),
        ({"data": {"uri": "nowhere"}}, InputError, "nowhere", "data.uri"),
        ({"data": {"uri": "text"}}, InputError, "is a dataset of text", "data.uri"),
        ({"data": {"uri": "samples"}, "dtype": "float16"}, ConfigError, "Images have no dtype", "dtype"),
    ],
)
@pytest.mark.parametrize("run", [run_export, plan_export])
def test_what_cannot_be_is_said_before_anything_is_written(
    run: Callable[[ExportJobConfig], JobResult],
    settings: dict[str, Any],
    error: type[PipelineError],
    said: str,
    key: str,
    latents: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.dataflow.cluster.ensure_ray", lambda cluster: pytest.fail("Ray was started"))
    planned_root(str(tmp_path / "empty"), units=1, rows=1)
    claim_identity(Root(str(tmp_path / "text")), replace(IDENTITY, kind="text"))
    for name, text in (("mine/notes.txt", "mine"), ("alike/export.json", '{"dataset": 1}')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    if "samples" in str(settings):
        make_samples(str(tmp_path / "samples"), outside=False)
    before = contents(tmp_path)
    with pytest.raises(error, match=said) as caught:
        run(config("latents", "parquet", tmp_path / "out", **settings))
    assert caught.value.key == key
    assert caught.value.rule
    assert caught.value.next_step or key == "columns"
    assert contents(tmp_path) == before


def test_what_is_not_installed_is_named_with_its_extra(
    latents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'latentloom\[lance\]'"):
        plan_export(config(latents, "lance", tmp_path / "out"))


def test_a_dry_run_tells_rows_shards_and_bytes_and_writes_nothing(
    latents: str, tmp_path: Path, export: Export
) -> None:
    told = plan_export(config(latents, "parquet", tmp_path / "out"))
    assert told.status == "dry-run"
    assert not (tmp_path / "out").exists()
    done = export(latents, "parquet")
    assert (told.counts["rows"], told.counts["shards"]) == (12, done.counts["shards"])
    assert told.counts["missing"] == done.counts["shards"]
    assert told.counts["bytes_about"] == 12 * (2 * 2 * 3 * 4 + 256)
    assert plan_export(config(latents, "parquet", tmp_path / "out")).counts["missing"] == 0


# -- The cut ---------------------------------------------------------------------------------------------------


def test_shards_hold_every_row_once_in_order_and_are_as_large_as_asked() -> None:
    chance = np.random.default_rng(0)
    for shard_bytes in (1, 100, 5_000, 1 << 30):
        rows, sizes = chance.integers(1, 50, 40), chance.uniform(1, 100, 40)
        shards = cut(rows, sizes, shard_bytes)
        found = [(p.group, row) for shard in shards for p in shard for row in range(p.start, p.stop)]
        assert found == [(group, row) for group, count in enumerate(rows.tolist()) for row in range(count)]
        for shard in shards:
            size = sum((p.stop - p.start) * sizes[p.group] for p in shard)
            # A row group that is larger than a shard is cut evenly, at rows.
            assert size <= shard_bytes or (len(shard) == 1 and size <= shard_bytes + sizes[shard[0].group])


def test_images_outside_their_rows_count_by_their_pixels(tmp_path: Path) -> None:
    outside = str(tmp_path / "outside")
    make_samples(outside, outside=True)
    told = plan_export(config(outside, "parquet", tmp_path / "out")).counts
    assert told["bytes_about"] == 12 * (32 * 32 * 2 + 256)
    assert told["shards"] > 1
