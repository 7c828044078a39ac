"""The decode benchmark runs, and its figures keep the bound that the policy states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import decode

pytestmark = pytest.mark.integration


def test_the_benchmark_of_decoding(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(decode, "SIZES", {"0.2 MP": (384, 512), "1 MP": (900, 1200)})
    arguments = ["--resolution", "128", "--rounds", "1", "--repeats", "1", "--out", str(tmp_path)]
    result = decode.main(arguments)
    written = json.loads((tmp_path / "decode.json").read_text())
    assert {"cpu", "commit"} <= written.pop("machine").keys()
    assert written == result
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    assert "draft/plain" in capsys.readouterr().out
    (policy,) = [line for line in result["front"] if line["chosen"]]
    assert policy["psnr_db"] >= 45
    assert result["front"][0]["psnr_db"] < policy["psnr_db"], "a smaller margin costs quality"
    for line in result["sizes"]:
        assert line["mosaic_draft_psnr_db"] >= 45  # as DECODE.md promises
        assert line["mosaic_full_psnr_db"] >= 45
        assert min(line[f"{way}_images_per_s"] for way in ("draft", "full", "plain")) > 0


def test_every_real_file_has_one_outcome(shared_data: Path) -> None:
    found = decode.outcomes(shared_data)
    files = [p for part in ("photos", "tricky") for p in (shared_data / part).iterdir() if p.is_file()]
    assert found.total() == len(files)
    assert found["jpeg", "ok"] >= 220
