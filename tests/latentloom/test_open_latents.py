"""A dataset as rows, a table and files: what is visible, and nothing else, whoever reads it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import latentloom as ll
import numpy as np
import pyarrow as pa
import pytest

from pipeline.storage.root import Root
from pipeline.store.schema import LATENTS
from tests.support.jobs import REPOSITORY
from tests.support.rows import claim, committer, latent, latent_rows, planned_root, rejected_rows, sample_id
from tests.train.dataset import make_dataset

NONE = rejected_rows([], "corrupt")


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """Two files, one of which holds two rows that were replaced."""
    made = planned_root(str(tmp_path / "latents"), units=2, rows=4)
    generation = claim(made)
    committer(made, generation).commit(latent_rows([(0, row) for row in range(4)]), NONE, {})
    committer(made, generation).commit(latent_rows([(1, row) for row in range(4)], bucket="32x24"), NONE, {})
    return made


def test_rows_are_those_of_the_files_in_order(root: Root) -> None:
    latents = ll.open_latents(root.uri)
    assert len(latents) == 8
    assert [row["key"] for row in latents] == [f"u{u}/r{r}.png" for u in range(2) for r in range(4)]
    assert [latents[at]["sample_id"] for at in range(8)] == [sample_id(u, r) for u in range(2) for r in range(4)]
    assert latents[-1]["key"] == "u1/r3.png"
    assert [row["key"] for row in latents[3:5]] == ["u0/r3.png", "u1/r0.png"]
    np.testing.assert_array_equal(latents[1]["latent"], latent(0, 1).astype(np.float16).astype(np.float32))
    assert latents[5]["latent"].shape == (2, 4, 3)
    with pytest.raises(IndexError):
        latents[8]


def test_a_row_that_is_changed_stays_as_it_is_in_the_dataset(root: Root) -> None:
    latents = ll.open_latents(root.uri)
    latents[0]["caption"] = "mine"
    assert latents[0]["caption"] != "mine"


def test_the_table_has_the_schema_it_tells(root: Root) -> None:
    latents = ll.open_latents(root.uri)
    table = latents.to_arrow()
    assert table.schema == latents.schema == LATENTS
    assert table["sample_id"].to_pylist() == [row["sample_id"] for row in latents]
    assert latents.to_arrow(["label", "key"]).column_names == ["label", "key"]
    with pytest.raises(ll.ConfigError, match="no such column") as caught:
        latents.to_arrow(["lable"])
    assert caught.value.value == "lable"


def test_rows_that_the_encode_job_wrote_have_that_schema_too(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    """On their way through Ray they lose the note that some columns are never null."""
    latents = ll.open_latents(root.uri)
    read = latents.dataset.read

    def through_ray(group: int, columns: list[str] | None) -> pa.Table:
        table = read(group, columns)
        return table.cast(pa.schema([field.with_nullable(True) for field in table.schema]))

    monkeypatch.setattr(latents.dataset, "read", through_ray)
    assert latents.to_arrow().schema == LATENTS
    assert latents.to_arrow(["latent", "label"]).schema == pa.schema([LATENTS.field(n) for n in ("latent", "label")])


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_are_the_whole(root: Root, parts: int) -> None:
    latents = pickle.loads(pickle.dumps(ll.open_latents(root.uri)))
    tables = [latents.to_arrow(["key"], part=part, parts=parts) for part in range(parts)]
    assert [key for table in tables for key in table["key"].to_pylist()] == latents.to_arrow()["key"].to_pylist()
    with pytest.raises(ValueError, match="below parts"):
        latents.to_arrow(part=parts, parts=parts)


def test_statistics_are_exact(root: Root) -> None:
    latents = ll.open_latents(root.uri)
    told = latents.statistics
    values = [np.moveaxis(row["latent"], 0, -1).reshape(-1, 2) for row in latents]
    np.testing.assert_allclose(told.mean, np.concatenate(values).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(told.std, np.concatenate(values).std(axis=0), atol=1e-6)
    assert (told.num_rows, told.num_classes) == (8, 1)
    assert dict(told.buckets) == {"24x32": 4, "32x24": 4}
    assert (latents.latent_dtype, latents.codec["factor"]) == ("float16", 8)


def replaced(root: Root) -> ll.Latents:
    """The dataset after the rows 1 and 2 of unit 0 were stored again."""
    committer(root, claim(root)).commit(latent_rows([(0, 1), (0, 2)]), NONE, {})
    return ll.open_latents(root.uri)


def test_files_tell_which_rows_are_visible(root: Root) -> None:
    latents = replaced(root)
    assert len(latents) == 8
    whole = [file for file in latents.files() if file.row_filter is None]
    (part,) = [file for file in latents.files() if file.row_filter is not None]
    assert (part.num_rows, sorted(file.num_rows for file in whole)) == (2, [2, 4])
    assert part.row_filter == 'NOT (("unit" = 0 AND "row" >= 1 AND "row" < 3))'
    for file in latents.files():
        assert Path(file.uri).stat().st_size == file.size_bytes


def test_what_was_opened_stays_as_it_was(root: Root) -> None:
    before = ll.open_latents(root.uri)
    files = before.files()
    replaced(root)
    assert before.files() == files


def test_nothing_stored_yet_is_an_empty_dataset(tmp_path: Path) -> None:
    planned_root(str(tmp_path / "latents"), units=1, rows=2)
    latents = ll.open_latents(str(tmp_path / "latents"))
    assert (len(latents), list(latents), latents.files(), latents.to_arrow().num_rows) == (0, [], [], 0)
    with pytest.raises(ll.InputError, match="no visible row"):
        _ = latents.statistics
    with pytest.raises(ll.ConfigError, match="do not fill a single batch"):
        latents.stream(batch_size=8)


# -- Bad input -------------------------------------------------------------------------------------------------


def parts_of(error: ll.PipelineError) -> tuple[object, object]:
    assert error.next_step
    return error.key, error.value


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()  # half of one: files without what says what they are
    with pytest.raises(ll.InputError, match="There is no dataset") as caught:
        ll.open_latents(str(tmp_path))
    assert parts_of(caught.value) == ("uri", str(tmp_path))


def test_a_newer_format_is_refused(root: Root, tmp_path: Path) -> None:
    header = tmp_path / "latents" / "dataset.json"
    header.chmod(0o644)
    header.write_text(json.dumps({**json.loads(header.read_text()), "format_version": 99}))
    with pytest.raises(ll.InputError, match="has format version 99") as caught:
        ll.open_latents(root.uri)
    assert caught.value.rule is not None
    assert caught.value.next_step == "upgrade latentloom"


def test_a_lost_file_is_named(root: Root) -> None:
    latents = ll.open_latents(root.uri)
    lost = latents.files()[0].uri
    Path(lost).unlink()
    with pytest.raises(ll.InputError) as caught:
        list(latents)
    assert lost in str(caught.value)


def test_another_kind_of_dataset_is_refused(root: Root, tmp_path: Path) -> None:
    from pipeline.store.ledger.identity import Identity, claim_identity

    claim_identity(Root(str(tmp_path / "texts")), Identity("text", {"encoder": "t5"}, {}))
    with pytest.raises(ll.InputError, match="is a dataset of text"):
        ll.open_latents(str(tmp_path / "texts"))


def test_unknown_names_name_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="open_latents"):
        ll.open_dataset  # noqa: B018
    assert set(ll.__all__) <= set(dir(ll))
    for name in ll.__all__:
        assert getattr(ll, name).__doc__


# -- What it costs ---------------------------------------------------------------------------------------------

LIGHT = """
import sys, time
began = time.perf_counter()
import latentloom as ll
imported = time.perf_counter() - began
assert not {"numpy", "pyarrow", "pydantic", "torch"} & set(sys.modules)
latents = ll.open_latents(sys.argv[1])
table, files = latents.to_arrow(["key"]), latents.files()
print(imported, len(latents), sorted({"torch", "ray", "mlflow", "PIL", "diffusers"} & set(sys.modules)))
"""


@pytest.mark.integration
def test_reading_rows_imports_no_torch_and_importing_nothing_at_all(tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "latents")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "latentloom").symlink_to(REPOSITORY / "pipeline" / "latentloom")
    path = os.pathsep.join([str(REPOSITORY), str(tmp_path / "site")])
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, uri],
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
        check=True,
    )
    seconds, rows, heavy = done.stdout.split(maxsplit=2)
    assert float(seconds) < 0.5
    assert (rows, heavy.strip()) == ("96", "[]")
