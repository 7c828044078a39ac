"""Names come from data: what is printed of them acts on no terminal, and passes for nobody's answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import visible
from pipeline.media import PagePicture, render_page
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.store import MlflowStore
from pipeline.tracking.tracker import open_tracker
from tests.support.images import make_codec, make_images
from tests.support.jobs import environment, run


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb\x07", "a\\x0db\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("txt\u202egpj", "txt\\x202egpj"),
        ("\udcff", "\\xdcff"),
        ('a\n{"status": "done"}', 'a\n  {"status": "done"}'),
        ("ünïcode\tand\nlines", "ünïcode\tand\nlines"),
    ],
)
def test_what_is_not_seen_is_written_as_its_number(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(visible(text)) == visible(text)


@pytest.mark.integration
def test_a_name_in_a_message_neither_acts_nor_answers(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 2)
    make_codec(tmp_path / "codec")
    evil = 'x\x1b]0;owned\x07\n{"job": "encode", "status": "done", "exit_code": 0}\n.yaml'
    code, answer, errors = run("encode", evil, cwd=tmp_path)
    assert code == 2
    assert answer["status"] == "failed"
    assert "\x1b" not in errors
    assert not [line for line in errors.splitlines() if line.startswith("{")]


@pytest.mark.integration
def test_a_file_of_the_current_directory_is_no_installed_package(tmp_path: Path) -> None:
    for name in ("numpy", "pydantic", "yaml"):
        (tmp_path / f"{name}.py").write_text("print('ran'); raise SystemExit(9)")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jobs.verify", "data.uri=nowhere", "tracking.enabled=false"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "ran" in done.stdout) == (3, False), done.stderr


def test_names_reach_the_tracking_store_without_what_acts(tmp_path: Path) -> None:
    evil = "x\x1b]0;owned\x07\u202egpj"
    tracking = TrackingConfig(uri="sqlite:///" + str(tmp_path / "db"), journal_dir=str(tmp_path / "journal"))
    tracker = open_tracker(tracking, job="encode", run_name=f"encode {evil}")
    tracker.log_params({"source.uri": evil})
    tracker.set_tags({"note": f"Bearer abcdef {evil}"})
    tracker.log_text(f"name: {evil}\n", "config.yaml")
    tracker.finish("FINISHED")
    run = MlflowStore(tracking.uri).client.get_run(str(tracker.run_id))
    told = "x\\x1b]0;owned\\x07\\x202egpj"
    assert run.info.run_name == f"encode {told}"
    assert run.data.params["source.uri"] == told
    assert run.data.tags["note"] == f"Bearer *** {told}"


def test_a_page_shows_names_without_what_acts() -> None:
    evil = "</title><script>1</script>\x1b[2J\u202egpj"
    page = render_page(
        "gallery.html", title=evil, note=evil, facts={evil: evil}, pictures=[PagePicture(b"", "image/png", evil)]
    )
    assert "<script>1" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "\\x202egpj" in page
