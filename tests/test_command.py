"""The console command: every job by one name, quick answers, configurations, completion, and bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from PIL import Image

from jobs import _command
from pipeline.config import check_installed, load_config, need_package
from pipeline.encode.config import EncodeJobConfig
from pipeline.errors import ConfigError
from pipeline.source.config import FolderSource
from tests.support.jobs import REPOSITORY, completed, environment
from tests.test_jobs import CONFIGS, JOBS

pytestmark = pytest.mark.integration

LIGHT = """
import sys
from jobs._command import run
try:
    run(sys.argv[1:])
finally:
    heavy = {m.partition(".")[0] for m in sys.modules} & {"ray", "torch", "mlflow", "PIL"}
    print("HEAVY", sorted(heavy), file=sys.stderr)
"""


def call(*words: object, cwd: Path = REPOSITORY) -> tuple[int, str, str]:
    """(exit code, standard output, standard error)."""
    done = completed([sys.executable, "-c", LIGHT, *map(str, words)], cwd)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--help",),
        ("--version",),
        ("configs", "list"),
        ("configs", "--help"),
        ("configs", "show", "train/photos_256"),
    ]
    + [("completion", shell) for shell in ("bash", "zsh", "fish")]
    + [("encode", "--help"), ("train", str(REPOSITORY / "configs/train/photos_256.yaml"), "--print-config")],
    ids=" ".join,
)
def test_answers_come_without_ray_torch_mlflow_or_pillow(words: tuple[str, ...], tmp_path: Path) -> None:
    code, out, errors = call(*words, cwd=tmp_path)
    assert code == 0, errors
    assert "HEAVY []" in errors
    assert out
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_job_in_a_stage_of_the_journey() -> None:
    out = call("--help")[1]
    assert {"fit_codec", "encode", "train", "sample", "quickstart"} <= set(_command.job_names())
    assert set(_command.job_names()) == {*JOBS, "quickstart"}
    for name in _command.job_names():
        assert f"\n  {name} " in out
    assert "\nother:" not in out, "a job has no stage: give it one in jobs/_command.STAGES"
    assert out.index("fit_codec") < out.index("\ntrain:") < out.index("\nuse:") < out.index("\nlook after:")


def test_a_job_is_the_same_by_both_names(tmp_path: Path) -> None:
    arguments = ["data.uri=nowhere"]
    one = call("verify", *arguments, cwd=tmp_path)
    other = completed([sys.executable, "-m", "jobs.verify", *arguments], tmp_path)
    assert one[0] == other.returncode == 3
    assert json.loads(one[1]) == json.loads(other.stdout)


def test_the_help_of_a_job_tells_it_as_it_was_called() -> None:
    out = call("encode", "--help")[1]
    assert out.startswith("usage: latentloom encode CONFIG.yaml...")
    assert "  latentloom encode configs/" in out
    assert "python -m" not in out


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        (["encod"], 2, ["There is no such command; did you mean encode?", "command = encod", "latentloom --help"]),
        (["configs"], 2, ["the following arguments are required", "latentloom configs --help"]),
        (["configs", "show", "train/fotos_256"], 2, ["did you mean train/photos_256?", "latentloom configs list"]),
        (["completion", "tcsh"], 2, ["invalid choice: 'tcsh'", "latentloom completion --help"]),
        (["encode", "--fast"], 2, ["unrecognized arguments: --fast", "latentloom encode --help"]),
        (["encode", "encode/fotos.yaml"], 2, ["There is no configuration file", "latentloom configs"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_words_end_with_code_2_a_remedy_and_an_answer(
    words: list[str], code: int, parts: list[str], tmp_path: Path
) -> None:
    got, out, errors = call(*words, cwd=tmp_path)
    assert got == code
    answer = json.loads(out.splitlines()[-1])
    assert (answer["status"], answer["exit_code"]) == ("failed", code)
    assert answer["error"]
    for part in parts:
        assert part in errors
    assert "Traceback" not in errors
    assert len(errors.splitlines()) <= 12


@pytest.mark.parametrize("job", JOBS)
def test_a_flag_that_no_job_has_is_an_error_of_the_configuration(job: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", "--dry_run"],
        cwd=tmp_path,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["job"], answer["status"], answer["exit_code"]) == (job, "failed", 2)
    assert "unrecognized arguments: --dry_run" in answer["error"]


# -- A configuration that fits -----------------------------------------------------------------------------------


def fitted(place: Path, *words: str) -> tuple[EncodeJobConfig, str]:
    """What `latentloom init` writes about some images, validated as encode does, and what it prints."""
    code, out, errors = call("init", "my pictures", *words, cwd=place)
    assert code == 0, errors
    text = (place / "encode.yaml").read_text()
    (place / "encode.yaml").unlink()
    return load_config(EncodeJobConfig, [], [f"{k}={json.dumps(v)}" for k, v in yaml.safe_load(text).items()]), out


def test_init_fits_a_folder_by_what_is_there(tmp_path: Path) -> None:
    images = tmp_path / "my pictures"
    for folder, size in (("cat", (400, 300)), ("dog", (200, 300))):
        (images / folder).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", size).save(images / folder / f"{number}.png")
    config, out = fitted(tmp_path)
    assert isinstance(config.source, FolderSource)
    assert (config.source.label_from, config.source.classes) == ("directory", ("cat", "dog"))
    assert (config.source.caption, config.source.name) == (None, "my_pictures")
    assert (config.image.resolution, config.image.buckets.kind) == (128, "budget")
    assert "latentloom fit_codec source.kind=folder source.uri='my pictures'" in out
    # With captions, and images of which none could be read.
    (images / "cat" / "0.txt").write_text("a cat")
    (images / "dog" / "0.png").write_bytes(b"none")
    config, out = fitted(tmp_path, "--codec", "vae")
    assert (config.source.caption, config.codec.path) == ("text", "vae")
    assert "fit_codec" not in out
    (tmp_path / "encode.yaml").write_text("mine")
    code, _, errors = call("init", "my pictures", cwd=tmp_path)
    assert (code, (tmp_path / "encode.yaml").read_text()) == (4, "mine")
    assert "--out = encode.yaml" in errors


@pytest.mark.parametrize(("name", "kind"), [("00.tar", "webdataset"), ("part-0.parquet", "parquet")])
def test_init_knows_tars_and_parquet_by_their_names(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / name).write_bytes(b"")
    config, _ = fitted(tmp_path)
    assert config.source.kind == kind


def test_init_of_nothing_says_so(tmp_path: Path) -> None:
    code, _, errors = call("init", "nowhere", cwd=tmp_path)
    assert code == 3
    assert "There is no source at" in errors


# -- Configurations --------------------------------------------------------------------------------------------


def test_every_shipped_configuration_is_listed_with_its_purpose() -> None:
    lines = call("configs", "list")[1].splitlines()
    assert len(lines) == len(CONFIGS) >= 13
    for line, config in zip(lines, CONFIGS, strict=True):
        name, _, purpose = line.partition(" ")
        assert f"configs/{name}.yaml" == config.as_posix()
        assert len(purpose.strip()) > 20


def test_show_prints_the_very_file() -> None:
    assert (
        call("configs", "show", "configs/encode/sd15_512.yaml")[1]
        == (REPOSITORY / "configs/encode/sd15_512.yaml").read_text().rstrip("\n") + "\n"
    )


def test_copy_makes_a_file_and_replaces_none(tmp_path: Path) -> None:
    assert call("configs", "copy", "encode/photos_256", cwd=tmp_path)[0] == 0
    copy = tmp_path / "photos_256.yaml"
    assert copy.read_bytes() == (REPOSITORY / "configs/encode/photos_256.yaml").read_bytes()
    copy.write_text("mine")
    code, out, errors = call("configs", "copy", "train/photos_256", cwd=tmp_path)
    assert (code, json.loads(out)["status"]) == (4, "conflict")
    assert "DEST = photos_256.yaml" in errors
    assert copy.read_text() == "mine"
    assert call("configs", "copy", "train/photos_256", "mine.yaml", cwd=tmp_path)[:2] == (0, "mine.yaml\n")


def test_copy_into_no_folder_says_so(tmp_path: Path) -> None:
    code, _, errors = call("configs", "copy", "train/photos_256", "no/such.yaml", cwd=tmp_path)
    assert code == 2
    assert "The configuration cannot be written" in errors
    assert "DEST = no/such.yaml" in errors


# -- Completion ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        (["latentloom", ""], ["encode ", "train ", "configs "], ["--dry-run "]),
        (["latentloom", "enc"], ["encode "], ["train "]),
        (["latentloom", "encode", "output.u"], ["output.uri="], ["output.kind="]),
        (["latentloom", "train", "--d"], ["--dry-run "], ["train.seed="]),
        (["latentloom", "configs", "show", "train/"], ["train/photos_256 "], ["encode/photos_256 "]),
        (["latentloom", "encode", "output.uri", "="], [], ["output.uri="]),
    ],
)
def test_bash_completes_jobs_flags_keys_and_configurations(
    words: list[str], some: list[str], none: list[str]
) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    quoted = " ".join(f"'{word}'" for word in words)
    script = (
        f"COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _latentloom; printf '%s\\n' \"${{COMPREPLY[@]}}\"\n"
    )
    done = subprocess.run(
        [bash, "--norc", "-c", f"{_command.for_bash()}\n{script}"], text=True, capture_output=True, check=True
    )
    offered = done.stdout.splitlines()
    assert set(some) <= set(offered), done.stderr
    assert not set(none) & set(offered)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_told_every_job_and_its_keys(shell: str) -> None:
    text = _command._SHELLS[shell]()
    for name in (*JOBS, "configs", "completion", "output.uri=", "train.seed=", "encode/photos_256"):
        assert name in text
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed: its script was looked at, not run")
    subprocess.run([program, "-n", "-c", text], check=True)


@pytest.mark.parametrize(
    ("words", "some", "none"),
    [
        (["latentloom", ""], ["encode", "train", "configs"], ["--dry-run"]),
        (["latentloom", "encode", ""], ["output.uri=", "--dry-run"], ["train.seed="]),
        (["latentloom", "configs", ""], ["train/photos_256", "show"], ["output.uri="]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_complete_jobs_flags_keys_and_configurations(
    shell: str, words: list[str], some: list[str], none: list[str]
) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    text = _command._SHELLS[shell]()
    if shell == "fish":
        script = f"{text}\ncomplete -C '{' '.join(words)}'"
    else:  # what the line editor would define
        given = " ".join(f"'{word}'" for word in words)
        script = (
            f"compdef() {{ }}; compadd() {{ print -rl -- $@ }}; _files() {{ }}\n{text}\n"
            f"words=({given}); CURRENT={len(words)}; _latentloom"
        )
    options = ["--no-config"] if shell == "fish" else ["-f"]
    done = subprocess.run([program, *options, "-c", script], text=True, capture_output=True, check=True)
    offered = {line.partition("\t")[0] for line in done.stdout.splitlines()}
    assert set(some) <= offered, done.stderr
    assert not set(none) & offered


def test_a_reader_that_has_read_enough_ends_nothing_in_a_traceback() -> None:
    code = "from jobs._command import run; run(['--help'])"
    command = f'{sys.executable} -c "{code}" 2>&1 >&3 3>&- | cat'
    done = subprocess.run(
        ["bash", "-c", f"exec 3> >(true); sleep 0.3; {command}"],
        cwd=REPOSITORY,
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout == ""


# -- What is installed -----------------------------------------------------------------------------------------


def test_a_package_out_of_range_is_named_with_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch==2.13.0", "ray[data]==2.60.0", "numpy>=1", "not-here>=1", 'timm>=99; extra == "evaluate"']
    versions = {"torch": "2.1.0+cpu", "ray": "2.9.3", "numpy": "2.4.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ConfigError, match="versions that were never tried") as caught:
        check_installed()
    assert (caught.value.key, caught.value.value) == ("torch, ray", "2.1.0+cpu, 2.9.3")
    assert caught.value.rule == "torch==2.13.0, ray==2.60.0"
    assert "'torch==2.13.0'" in str(caught.value.next_step)
    versions |= {"torch": "2.13.0+cu130", "ray": "2.60.0"}
    check_installed()


def test_a_checkout_that_is_not_installed_has_no_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    check_installed()


def test_a_job_refuses_packages_out_of_range(tmp_path: Path) -> None:
    info = tmp_path / "site" / "latentloom-9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: latentloom\nVersion: 9\nRequires-Dist: ray<1\n")
    here = environment()
    path = os.pathsep.join([str(tmp_path / "site"), here["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "jobs.verify", "data.uri=x"],
        cwd=tmp_path,
        env={**here, "PYTHONPATH": path},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "rule:  ray<1" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 2


def test_what_only_an_extra_brings_is_named_with_it() -> None:
    need_package("json", "text")
    with pytest.raises(ConfigError, match="not_there is not installed") as caught:
        need_package("not_there", "text")
    assert caught.value.next_step == "pip install 'latentloom[text]', on every node"


def test_every_extra_that_is_named_exists() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [path.read_text() for path in (REPOSITORY / "pipeline").rglob("*.py")]
    needed = {found for text in sources for found in re.findall(r'need_package\("([\w]+)", "(\w+)"\)', text)}
    assert len(needed) >= 2
    distributions = {"lance": "pylance"}
    for package, extra in needed:
        assert any(line.startswith(distributions.get(package, package)) for line in extras[extra])


def test_browse_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    from tests.support.rows import claim, committer, latent_rows, planned_root

    root = planned_root(str(tmp_path / "latents"), units=1, rows=2)
    committer(root, claim(root)).commit(latent_rows([(0, 0)]), None, {})
    command = [sys.executable, "-c", LIGHT, "browse", root.uri]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        first, address = process.stdout.readline(), process.stdout.readline().strip()
        assert "Ctrl-C" in first
        with urlopen(f"{address}rows", timeout=30) as page:
            assert b"u0/r0.png" in page.read()
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (0, "")
    assert errors.splitlines() == ["HEAVY ['PIL']"]  # neither Ray nor torch nor MLflow, and no traceback
