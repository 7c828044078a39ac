"""The job from end to end on a small world: figures, report, skipping, and every refusal."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from evaluate_world import build_world, config_of, real_images, write_samples

from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.evaluate.figures import Record
from pipeline.evaluate.job import dry_run, run

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    return folder


@pytest.fixture
def world(built: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(built, tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture(scope="module")
def evaluated(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "world"
    shutil.copytree(built, folder)
    result = run(config_of(folder))
    assert result.status == "done"
    return folder


def record_of(folder: Path) -> Record:
    record = Record.from_bytes((folder / "report" / "evaluation.json").read_bytes())
    assert record is not None
    return record


@pytest.mark.slow
def test_figures_say_what_was_planted(evaluated: Path) -> None:
    record = record_of(evaluated)
    by_name = {f.name: f for f in record.figures}
    # an eighth of the samples asks for another class than it shows
    assert by_name["accuracy"].value == pytest.approx(7 / 8, abs=0.06)
    assert by_name["accuracy"].n == 96
    assert by_name["accuracy"].low is not None
    assert by_name["accuracy"].low < 7 / 8
    assert by_name["classifier_accuracy"].value > 0.9
    assert by_name["ssim"].n == 48
    assert by_name["psnr_db"].value < 20  # random weights
    assert by_name["precision"].value > 0.8  # the samples are fresh shapes of the same kind
    assert record.contract["sample_sampler"] == ["euler"]
    assert record.contract["sample_guidance"] == [2.0]
    assert len(record.contract["extractor_sha256"]) == 64
    assert record.inputs["samples"]["run_id"] == "sample-run"


@pytest.mark.slow
def test_report_is_self_contained_escaped_and_complete(evaluated: Path) -> None:
    page = (evaluated / "report" / "report.html").read_text()
    for name in ("Data", "Reconstructions", "Training", "Samples", "By class", "Figures", "Provenance"):
        assert f"<h2>{name}</h2>" in page
    targets = re.findall(r"""(?:src|href)\s*=\s*["']?([^"' >]*)""", page)
    assert len(targets) > 100
    assert all(target.startswith(("data:image/", "#")) for target in targets)
    assert not re.search(r"<script|<link|@import|url\(|https?://", page)
    assert "not Inception" in page
    assert page.count("green circle") > 3  # among real images, among samples, and by class
    assert "class 1" not in page
    assert record_of(evaluated).inputs["samples"]["digest"] in page
    assert len(page.encode()) < 4 << 20


@pytest.mark.slow
def test_second_run_changes_nothing_and_needs_no_torch(evaluated: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (evaluated / "report").rglob("*")}
    config = config_of(evaluated).model_dump_json()
    code = (
        "import sys, json; from pipeline.evaluate.config import EvaluateJobConfig as C; "
        "from pipeline.evaluate.job import run; r = run(C.model_validate_json(sys.argv[1])); "
        "print(json.dumps([r.status, r.figures['accuracy'], 'torch' in sys.modules, 'ray' in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code, config], capture_output=True, text=True, check=True)
    status, accuracy, torch_loaded, ray_loaded = json.loads(out.stdout.splitlines()[-1])
    assert (status, torch_loaded, ray_loaded) == ("unchanged", False, False)
    assert accuracy == record_of(evaluated).value("accuracy")
    assert {p: p.stat().st_mtime_ns for p in (evaluated / "report").rglob("*")} == before


@pytest.mark.slow
def test_other_samples_are_evaluated_again_with_the_kept_classifier(evaluated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(evaluated, folder, copy_function=shutil.copy2)
    shutil.rmtree(folder / "samples")
    images, labels = real_images(24, seed=9)
    write_samples(str(folder / "samples"), images, [int(label) for label in labels])
    before = record_of(folder)
    # The digest of the reference follows its files, which are where they were.
    config = config_of(folder).model_copy(update={"reference": config_of(evaluated).reference})
    result = run(config)
    assert result.status == "done"
    assert result.figures["accuracy"] > 0.9
    after = record_of(folder)
    assert after.contract["extractor_sha256"] == before.contract["extractor_sha256"]
    assert len(list((folder / "report" / "evaluations").iterdir())) == 2


@pytest.mark.slow
def test_a_damaged_report_is_written_again(evaluated: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    shutil.copytree(evaluated, folder)
    config = config_of(evaluated).model_copy(update={"output": config_of(folder).output})
    assert run(config).status == "unchanged"
    (folder / "report" / "report.html").write_text("torn")
    assert run(config).status == "done"
    assert "<h2>Figures</h2>" in (folder / "report" / "report.html").read_text()


@pytest.mark.slow
def test_missed_thresholds_fail_after_everything_is_written(world: Path) -> None:
    config = config_of(world, thresholds={"accuracy": 0.99, "frechet": 1e9, "psnr_db": 90})
    with pytest.raises(InputError, match=r"accuracy is 0\.\d+, asked is at least 0.99") as caught:
        run(config)
    assert caught.value.exit_code == 3
    assert "psnr_db" in str(caught.value)
    assert "frechet" not in str(caught.value)
    assert (world / "report" / "report.html").exists()
    assert len(record_of(world).missed) == 2
    with pytest.raises(InputError, match=r"asked is at least 0\.99"):
        run(config)


def test_without_labels_accuracy_is_absent_and_said_to_be(world: Path) -> None:
    reference = {"kind": "folder", "uri": str(world / "real"), "name": "shapes", "label": None}
    result = run(config_of(world, reference=reference, codec=None))
    assert "accuracy" not in result.figures
    record = record_of(world)
    assert "cannot be fitted" in record.absent["accuracy"]
    page = (world / "report" / "report.html").read_text()
    assert html.escape(record.absent["accuracy"]) in page


def test_codec_alone_can_be_evaluated(world: Path) -> None:
    result = run(config_of(world, samples=None, train=None, classifier={"enabled": False}))
    assert set(result.figures) >= {"psnr_db", "ssim", "psnr_db_low"}
    assert result.counts["round_trips"] == 48


def test_hostile_prompts_are_shown_and_never_markup(world: Path) -> None:
    shutil.rmtree(world / "samples")
    images, _ = real_images(2)
    write_samples(str(world / "samples"), images, [None, None], ["<script>alert(1)</script>", '"><img src=x>'])
    run(config_of(world, codec=None, classifier={"enabled": False}, title="<b>T</b>"))
    page = (world / "report" / "report.html").read_text()
    assert "<script>" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert "<b>T</b>" not in page


def test_dry_run_writes_nothing(world: Path) -> None:
    result = dry_run(config_of(world))
    assert result.counts == {"samples": 96, "reference": 480, "to_evaluate": 1}
    assert not (world / "report").exists()


def test_missing_reference_is_an_input_error_that_names_the_key(world: Path) -> None:
    with pytest.raises(InputError, match=r"key:   reference\.uri"):
        run(config_of(world, reference={"kind": "folder", "uri": str(world / "absent")}))
    assert not (world / "report").exists()


def test_reference_without_a_decodable_image_is_refused(world: Path) -> None:
    (world / "text").mkdir()
    (world / "text" / "readme").write_text("no image")
    with pytest.raises(InputError, match=r"No image of .* can be decoded"):
        run(config_of(world, reference={"kind": "folder", "uri": str(world / "text")}, classifier={"enabled": False}))


def test_missing_samples_are_refused(world: Path) -> None:
    with pytest.raises(InputError, match=r"key:   samples\.uri"):
        run(config_of(world, samples={"uri": str(world / "absent")}))


def test_samples_that_are_not_there_yet_are_refused(world: Path) -> None:
    from pipeline.storage.root import Root
    from pipeline.store.ledger.identity import Identity, claim_identity

    claim_identity(Root(str(world / "empty")), Identity("images", {}, {}))
    with pytest.raises(InputError, match=r"no images at .* yet"):
        run(config_of(world, samples={"uri": str(world / "empty")}))


def test_latents_are_no_samples(world: Path) -> None:
    from pipeline.storage.root import Root
    from pipeline.store.ledger.identity import Identity, claim_identity

    claim_identity(Root(str(world / "latents")), Identity("latents", {}, {}))
    with pytest.raises(InputError, match="a dataset of images is needed"):
        run(config_of(world, samples={"uri": str(world / "latents")}))


def test_output_that_is_a_file_is_refused(world: Path) -> None:
    (world / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        run(config_of(world, output={"uri": str(world / "file")}))


def test_output_that_is_a_dataset_is_refused(world: Path) -> None:
    with pytest.raises(ConflictError, match="holds a dataset"):
        run(config_of(world, output={"uri": str(world / "samples")}))


def test_missing_history_is_refused(world: Path) -> None:
    with pytest.raises(InputError, match="no training history"):
        run(config_of(world, train={"uri": str(world / "absent")}))


def test_broken_history_is_refused(world: Path) -> None:
    (world / "train" / "history.jsonl").write_text("{not json\n")
    with pytest.raises(InputError, match="history cannot be read"):
        run(config_of(world))


def test_sizes_that_the_codec_cannot_take_are_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="a multiple of the codec's factor 4"):
        run(config_of(world, image={"resolution": 32, "multiple_of": 2}))


def test_images_smaller_than_the_ssim_window_are_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match="too small for SSIM"):
        run(config_of(world, image={"resolution": 8, "multiple_of": 4}))


def test_nothing_to_judge_is_a_configuration_error(world: Path) -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        config_of(world, samples=None, codec=None)


def test_several_resolutions_are_a_configuration_error(world: Path) -> None:
    with pytest.raises(ValueError, match="takes one resolution"):
        config_of(world, image={"resolution": [32, 64], "multiple_of": 4})


def test_output_that_cannot_be_written_is_an_input_error(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.storage.errors import job_error
    from pipeline.storage.root import Root

    def full(self: Root, key: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Root, "put", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(config_of(world, samples=None, train=None, classifier={"enabled": False}))
    known = job_error(caught.value)
    assert known is not None
    assert known.exit_code == InputError.exit_code
