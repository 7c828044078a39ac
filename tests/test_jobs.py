"""The command line of every job: frozen flags, quick answers, messages and exit codes a scheduler can act on."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.config import dump_yaml, load_config
from pipeline.result import JobResult
from pipeline.tracking.config import TrackingConfig
from tests.support.images import make_images
from tests.support.jobs import REPOSITORY, command, completed, environment, run

pytestmark = pytest.mark.integration

JOBS = sorted(
    p.stem for p in (REPOSITORY / "jobs").glob("*.py") if not p.stem.startswith("_") and p.stem != "quickstart"
)
CONFIGS = sorted(p.relative_to(REPOSITORY) for p in (REPOSITORY / "configs").rglob("*.yaml"))
GOLDEN = REPOSITORY / "tests" / "golden" / "configs"
# Overlays are no whole configuration: each is resolved on top of the one it is meant for.
BASES = {
    "cluster/encode_gpu": ("encode", "encode/sd15_512"),
    "cluster/encode_cpu_decode": ("encode", "encode/sd15_512"),
    "cluster/train_8gpu": ("train", "train/dit_b2_512"),
    "train/lora": ("train", "train/finetune"),
}
FOLDERS = {"encode": "encode", "train": "train", "sample": "sample", "text": "embed_text"}
# Jobs that the quickstart does not run, and a configuration to ask for their flags with.
OTHERS = {"embed_text": "text/clip_l_t5.yaml"}

# Jobs about other things than a dataset, and an input that is not there.
ABSENT = {
    "ema": ["run=nowhere", "sigma_rel=0.1", "output=again"],
    "export": ["data.uri=nowhere", "output.uri=out", "format=parquet"],
    "forget": ["data.uri=nowhere", "list.uri=nowhere.csv"],
    "lineage": ["start=nowhere.png"],
    "promote": ["evaluation.uri=nowhere", "model.name=m", "at_least.accuracy=0.5"],
    "regenerate": ["image=nowhere.png", "output=again.png"],
    "sync_tracking": ["tracking.journal_dir=nowhere"],
}


def job_of(config: Path) -> tuple[str, list[str]]:
    """(job, files in order) for a shipped configuration."""
    name = config.relative_to("configs").with_suffix("").as_posix()
    folder, _, stem = name.partition("/")
    if name in BASES:
        job, base = BASES[name]
        return job, [f"configs/{base}.yaml", str(config)]
    if folder == "quickstart":
        return stem, [str(config)]
    return ("fit_codec" if stem.startswith("codec_") else FOLDERS[folder]), [str(config)]


def test_there_is_something_to_test() -> None:
    assert {"fit_codec", "encode", "train", "sample", "evaluate", "verify", "compact"} <= set(JOBS)
    assert set(ABSENT) <= set(JOBS)
    assert len(CONFIGS) >= 13


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.relative_to("configs").as_posix())
def test_shipped_configurations_resolve_to_their_golden_copies(
    config: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default that moves shows up here: `pytest tests/test_jobs.py --update-golden` accepts it on purpose."""
    import importlib

    monkeypatch.chdir(REPOSITORY)
    job, files = job_of(config)
    module, _, name = importlib.import_module(f"jobs.{job}").JOB.config.partition(":")
    text = dump_yaml(load_config(getattr(importlib.import_module(module), name), files))
    golden = GOLDEN / config.relative_to("configs")
    if request.config.getoption("--update-golden"):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.read_text() == text


def test_no_golden_copy_is_left_over() -> None:
    assert {p.relative_to(GOLDEN) for p in GOLDEN.rglob("*.yaml")} == {c.relative_to("configs") for c in CONFIGS}


LIGHT = """
import sys, runpy
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit as e:
    code = e.code
heavy = sorted({m.partition(".")[0] for m in sys.modules} & {"ray", "torch", "mlflow"})
print("HEAVY", heavy, "CODE", code or 0, file=sys.stderr)
"""


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("flag", ["--help", "--print-config", "--dry-run"])
def test_flags_answer_without_ray_torch_or_mlflow(job: str, flag: str, tmp_path: Path) -> None:
    """The flags are a contract: their names, and that they are quick whatever is installed."""
    config = REPOSITORY / "configs" / OTHERS.get(job, f"quickstart/{job}.yaml")
    arguments = [str(config)] if config.exists() else ABSENT.get(job, ["data.uri=nowhere"])
    done = completed([sys.executable, "-c", LIGHT, f"jobs.{job}", *arguments, flag], tmp_path)
    assert "HEAVY []" in done.stderr, done.stderr
    if flag == "--dry-run":
        # There is no input here: the dry run must say so like the job itself.
        assert "CODE 3" in done.stderr, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["status"] == "failed"
    else:
        assert "CODE 0" in done.stderr, done.stderr
        assert done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("job", JOBS)
def test_the_example_of_a_job_names_files_that_are_there(job: str) -> None:
    example = importlib.import_module(f"jobs.{job}").JOB.example
    named = [word for word in example.split() if word.endswith(".yaml")]
    assert [word for word in named if not (REPOSITORY / word).is_file()] == []


def test_the_answer_of_a_refusal_carries_all_that_a_person_is_told(tmp_path: Path) -> None:
    code, answer, errors = run("verify", "data.uri=nowhere", "tracking.enabled=false", cwd=tmp_path)
    assert (code, answer["exit_code"], answer["key"], Path(answer["value"]).name) == (3, 3, "data.uri", "nowhere")
    for name in ("error", "rule", "next"):
        assert answer[name] in " ".join(errors.split())
    code, answer, _ = run("verify", "data.uri=x", "levle=ledger", cwd=tmp_path)
    assert code == 2
    assert "levle = ledger: there is no such key; did you mean level?" in answer["error"]


def test_last_words_say_what_came_out_and_what_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.dataflow.cluster._dashboard", "http://head:8265")
    from jobs._main import _last_words
    from jobs.encode import JOB as ENCODE

    tracked = SimpleNamespace(tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/db"))
    result = JobResult("done", {"latents": 1234, "rejected": 0, "rejected.corrupt": 5}, {"dataset": "place"}, "r1")
    told = _last_words(ENCODE, tracked, result)
    assert "  dashboard http://head:8265" in told
    assert "encode: done: 1,234 latents\n" in told
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/db" in told
    assert "data.uri=place" in told.splitlines()[-1]
    assert "next" not in _last_words(ENCODE, tracked, JobResult("done"))


def test_logs_are_json_where_that_is_asked_for(tmp_path: Path) -> None:
    arguments = ("data.uri=nowhere", "tracking.enabled=false")
    code, answer, errors = run("verify", *arguments, cwd=tmp_path, env={"LATENTLOOM_LOG": "json"})
    lines = [json.loads(line) for line in errors.splitlines()]
    assert (code, lines[-1]["level"]) == (3, "error")
    assert answer["error"] in lines[-1]["message"]


def test_help_names_flags_keys_and_exit_codes() -> None:
    done = subprocess.run(
        command("encode", "--help"), cwd=REPOSITORY, env=environment(), text=True, capture_output=True, check=True
    )
    for part in (
        "--dry-run",
        "--print-config",
        "--help",
        "source.uri",
        "output.uri",
        "codec.path",
        "image.resolution",
    ):
        assert part in done.stdout
    for code in ("0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "75 "):
        assert f"  {code}" in done.stdout


# Names that others script against.
CONTRACT = {
    "encode": ["source.kind", "source.uri", "output.uri", "codec.path", "image.resolution", "tracking.uri"],
    "train": [
        "data.uri",
        "output.uri",
        "train.images",
        "train.batch_size",
        "train.seed",
        "train.num_workers",
        "tracking.uri",
    ],
    "sample": ["model.uri", "output.uri", "requests.kind", "tracking.uri"],
    "fit_codec": ["source.uri", "output.uri", "tracking.uri"],
    "ema": ["run", "sigma_rel", "images", "output"],
    "evaluate": ["output.uri", "tracking.uri"],
    "lineage": ["start", "tracking.uri"],
    "promote": ["evaluation.uri", "model.name", "model.alias", "at_least", "at_most", "tracking.uri"],
    "sync_tracking": ["tracking.uri", "tracking.journal_dir"],
}


@pytest.mark.parametrize("job", sorted(CONTRACT))
def test_contract_names_exist(job: str) -> None:
    import importlib

    from pipeline.config import field_tree

    module, _, name = importlib.import_module(f"jobs.{job}").JOB.config.partition(":")
    keys = {key for key, _, _ in field_tree(getattr(importlib.import_module(module), name))}
    assert set(CONTRACT[job]) <= keys


def encode_arguments(tmp_path: Path, **changes: object) -> list[str]:
    settings = {
        "source.kind": "folder",
        "source.uri": tmp_path / "images",
        "image.resolution": 32,
        "image.multiple_of": 4,
        "codec.path": tmp_path / "codec",
        "output.uri": tmp_path / "out",
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "tracking.journal_dir": tmp_path / "journal",
        **changes,
    }
    return [f"{k}={v}" for k, v in settings.items()]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.images import make_codec

    return make_codec(tmp_path_factory.mktemp("codec") / "vae")


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"source.uri": "no/such/folder"}, 3, "source.uri"),
        ({"source.uri": "EMPTY"}, 3, "is empty"),
        ({"codec.path": "no/such/codec"}, 3, "codec.path"),
        ({"codec.path": "EMPTY"}, 3, "codec.path"),
        ({"output.uri": "FILE"}, 3, "output"),
        ({"image.resolutoin": 64}, 2, "did you mean image.resolution?"),
        ({"image.resolution": "big"}, 2, "image.resolution = big"),
        ({"image.multiple_of": 2}, 2, "image.multiple_of"),
        ({"codec.posterior": "mean"}, 2, "codec.posterior"),
        ({"source.kind": "foldr"}, 2, "did you mean folder?"),
    ],
)
def test_bad_input_gets_one_clear_message_and_writes_nothing(
    tmp_path: Path, codec: Path, change: dict[str, object], code: int, message: str
) -> None:
    make_images(tmp_path / "images", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a directory")
    before = sorted(p for p in tmp_path.rglob("*"))
    special = {"EMPTY": tmp_path / "empty", "FILE": tmp_path / "file"}
    changes = {k: special.get(str(v), v) for k, v in change.items()}
    got, answer, errors = run(
        "encode", *encode_arguments(tmp_path, **{"codec.path": codec, **changes}), cwd=tmp_path, timeout=120
    )
    assert got == code, errors
    assert (answer["job"], answer["status"], answer["exit_code"]) == ("encode", "failed", code)
    assert {"counts", "outputs", "mlflow_run_id", "rates", "error"} <= set(answer)
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 25
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_bug_is_called_a_bug(tmp_path: Path) -> None:
    code = (
        "from jobs._main import Job, main\n"
        "import jobs._main as m\n"
        "main(Job('verify', 's', 'pipeline.maintenance.config:VerifyJobConfig', 'json:loads', 'json:loads', 'e'),"
        " ['data.uri=x'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), text=True, capture_output=True, check=False
    )
    assert done.returncode == 1
    assert "this is a bug in latentloom" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exit_code"] == 1


def test_help_may_be_cut_short() -> None:
    command = f"{sys.executable} -m jobs.train --help | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m jobs.train")
