"""Benchmarks of encoding run where there are no photographs, and name a folder or a contender that is not there."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks import encode, photographs


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without the tests' images."""
    monkeypatch.setenv("LATENTLOOM_TEST_DATA", str(tmp_path / "absent"))
    return tmp_path


def test_without_photographs_they_are_made_up(nowhere: Path) -> None:
    folder, kind = photographs.folder_of(None, argparse.ArgumentParser(), nowhere / "place")
    assert kind == photographs.MADE_UP
    files = photographs.image_files(folder)
    assert len({path.read_bytes() for path in files}) == len(files) == 24
    with Image.open(files[0]) as image:
        assert (image.format, image.size) == ("JPEG", (512, 384))


def test_photographs_at_hand_are_taken(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nowhere / "data" / "photos").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(nowhere / "data" / "photos" / "one.png")
    monkeypatch.setenv("LATENTLOOM_TEST_DATA", str(nowhere / "data"))
    parser = argparse.ArgumentParser()
    taken = photographs.folder_of(None, parser, nowhere / "place")
    assert taken == photographs.folder_of(nowhere / "data" / "photos", parser, nowhere / "place")
    assert taken == (nowhere / "data" / "photos", photographs.REAL)


@pytest.mark.parametrize("made", [False, True], ids=["absent", "empty"])
def test_a_folder_without_photographs_is_named(nowhere: Path, made: bool, capsys: pytest.CaptureFixture[str]) -> None:
    folder = nowhere / "mine"
    if made:
        folder.mkdir()
    with pytest.raises(SystemExit) as ended:
        encode.main(["--photos", str(folder)])
    assert ended.value.code == 2
    assert f"--photos {folder}" in capsys.readouterr().err


def test_a_contender_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        encode.main(["--only", "ours", "theirs"])
    assert ended.value.code == 2
    assert "no such contender: theirs; choose from ours," in capsys.readouterr().err
