"""The examples, run as their readers run them; and what `latentloom files` prints, by the readers it is for."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import latentloom as ll
import pytest

from tests.support.jobs import REPOSITORY
from tests.support.rows import claim, committer, latent_rows, planned_root, rejected_rows
from tests.train.dataset import make_dataset

pytestmark = pytest.mark.integration

EXAMPLES = REPOSITORY / "tests" / "examples"
NONE = rejected_rows([], "corrupt")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where `import latentloom` finds this checkout's package."""
    site = tmp_path_factory.mktemp("site")
    (site / "latentloom").symlink_to(REPOSITORY / "pipeline" / "latentloom")
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    path = [str(REPOSITORY), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def replaced(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten rows of which three were stored again, with label 1 instead of 0."""
    root = planned_root(str(tmp_path_factory.mktemp("replaced") / "lat'ents"), units=2, rows=5)
    committer(root, claim(root)).commit(latent_rows([(unit, row) for unit in range(2) for row in range(5)]), NONE, {})
    committer(root, claim(root)).commit(latent_rows([(0, 3), (0, 4), (1, 0)], label=1), NONE, {})
    return root.uri


def run_example(name: str, uri: str, environment: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), uri],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


@pytest.fixture(scope="module")
def plain_name(tmp_path_factory: pytest.TempPathFactory, replaced: str) -> str:
    """The same dataset under a name that needs no quoting."""
    link = tmp_path_factory.mktemp("link") / "latents"
    link.symlink_to(replaced)
    return str(link)


@pytest.mark.parametrize(
    ("name", "module"), [("duckdb", "duckdb"), ("polars", "polars"), ("huggingface", "datasets")]
)
def test_other_readers_see_the_visible_rows_alone(
    name: str, module: str, plain_name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    needs(module)
    assert run_example(f"read_with_{name}.py", plain_name, environment, tmp_path) == "[(0, 7), (1, 3)]"


@pytest.mark.ray
def test_ray_data_reads_the_visible_rows_alone(plain_name: str, environment: dict[str, str], tmp_path: Path) -> None:
    assert run_example("read_with_ray.py", plain_name, environment, tmp_path) == "[(0, 7), (1, 3)]"


def test_an_own_loop_learns_and_resumes_exactly(environment: dict[str, str], tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "latents", rows=100)
    said = run_example("own_training_loop.py", uri, environment, tmp_path)
    assert said.endswith("resumed exactly: True")
    first, last = (float(word) for word in said.removeprefix("loss ").partition(",")[0].split(" -> "))
    assert last < 0.9 * first


def test_the_notebook_runs_cell_by_cell(environment: dict[str, str], tmp_path: Path) -> None:
    uri = make_dataset(tmp_path / "latents")
    notebook = json.loads((EXAMPLES / "first_steps.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 4
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(cells) + "\nprint(len(latents), batch['latents'].shape, table.num_rows)\n")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment, "LATENTS": uri},
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.strip() == "96 torch.Size([16, 4, 8, 8]) 96"


def test_there_is_no_example_that_is_not_run() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.iterdir():
        if path.suffix in (".py", ".ipynb"):
            assert path.name in here or path.stem.removeprefix("read_with_") in here


# -- latentloom files ------------------------------------------------------------------------------------------


def printed(uri: str, environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "jobs._command", "files", uri, *words],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lines_tell_every_file_and_its_filter(replaced: str, environment: dict[str, str]) -> None:
    lines = [json.loads(line) for line in printed(replaced, environment).splitlines()]
    assert [(line["uri"], line["rows"], line["filter"]) for line in lines] == [
        (file.uri, file.num_rows, file.row_filter) for file in ll.open_latents(replaced).files()
    ]
    assert sorted(line["rows"] for line in lines) == [3, 7]


def test_duckdb_runs_the_query(replaced: str, environment: dict[str, str]) -> None:
    needs("duckdb")
    import duckdb

    query = printed(replaced, environment, "--format", "duckdb")
    keys = duckdb.sql(query).select("key").fetchall()
    assert sorted(key for (key,) in keys) == sorted(row["key"] for row in ll.open_latents(replaced))


def test_polars_runs_the_query(replaced: str, environment: dict[str, str]) -> None:
    needs("polars")
    names: dict[str, object] = {}
    exec(printed(replaced, environment, "--format", "polars"), names)
    keys = names["rows"].select("key").collect()["key"].to_list()  # type: ignore[attr-defined]
    assert sorted(keys) == sorted(row["key"] for row in ll.open_latents(replaced))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "There is no dataset"),
        (lambda path: planned_root(str(path), 1, 1), "no visible row"),
    ],
)
def test_what_is_no_dataset_or_an_empty_one_says_so(
    tmp_path: Path, environment: dict[str, str], make: object, message: str
) -> None:
    make(tmp_path / "it")  # type: ignore[operator]
    done = subprocess.run(
        [sys.executable, "-m", "jobs._command", "files", str(tmp_path / "it")],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3
    assert message in done.stderr
    assert f"URI = {tmp_path / 'it'}" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 3
