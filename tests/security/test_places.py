"""What an image or a dataset names is not gone to unasked, and what it asks for is bounded here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import validate
from pipeline.errors import InputError
from pipeline.media import encode_image
from pipeline.sample.config import RegenerateJobConfig
from pipeline.sample.provenance import Origin, provenance
from pipeline.sample.regenerate import dry_run, run
from pipeline.sample.requests import Defaults, RequestLimits, request_id, validate_requests
from pipeline.storage.trust import follow, key_below, only_these
from tests.support.draws import DRAW

LIMITS = RequestLimits(num_classes=3, takes_text=False, multiple=4, sizes=((32, 32),))


def image_that_says(path: Path, change: Callable[[dict[str, Any]], None]) -> str:
    """An image whose provenance was edited by somebody who knows the format."""
    request = validate_requests({"label": [1]}, limits=LIMITS, defaults=Defaults()).table.to_pylist()[0]
    origin = Origin("http://127.0.0.1:9/model", "m", None, None, None, None, "someone/vae", "c")
    story = provenance(request, DRAW, origin)
    change(story)
    if isinstance(story["request"], dict):
        story["request_id"] = request_id(story["request"]).hex()
    path.write_bytes(encode_image(np.zeros((4, 4, 3), np.uint8), story))
    return str(path)


def regenerate_config(image: str, tmp_path: Path, **more: Any) -> RegenerateJobConfig:
    return validate(RegenerateJobConfig, {"image": image, "output": str(tmp_path / "again.png"), **more})


def test_an_image_leads_nowhere_that_was_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("pipeline.sample.regenerate.read_model", opened.append)
    image = image_that_says(tmp_path / "one.png", lambda story: None)
    with pytest.raises(InputError) as both:
        run(regenerate_config(image, tmp_path))
    assert both.value.key == "model_uri, codec"
    assert "model_uri=http://127.0.0.1:9/model codec=someone/vae" in str(both.value)
    with pytest.raises(InputError, match="only named by the image") as codec:
        run(regenerate_config(image, tmp_path, model_uri="/mine"))
    assert codec.value.key == "codec"
    with pytest.raises(InputError, match="only named by the image"):
        run(regenerate_config(image, tmp_path, places=["http://127.0.0.1:9/mode", "someone/va"]))
    assert opened == []
    assert dry_run(regenerate_config(image, tmp_path)).outputs["model"] == "http://127.0.0.1:9/model"


EDITS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "steps": ("request.steps", lambda s: s["request"].update(steps=100_000_000)),
    "side": ("request.height", lambda s: s["request"].update(height=1 << 20)),
    "pixels": ("max_pixels", lambda s: s["request"].update(height=16_384, width=16_384)),
    "guidance": ("request.guidance", lambda s: s["request"].update(guidance=1e9)),
    "text": ("request.prompt", lambda s: s["request"].update(prompt="x" * 20_000)),
    "kind of a field": ("request.seed", lambda s: s["request"].update(seed="7")),
    "batch": ("draw.batch_size", lambda s: s["draw"].update(batch_size=10**9)),
    "threads": ("draw.threads", lambda s: s["draw"].update(threads=10**6)),
    "sampler": ("draw.sampler", lambda s: s["draw"].update(sampler="os.system")),
    "device": ("draw.device", lambda s: s["draw"].update(device="meta")),
    "unknown field": ("draw.more", lambda s: s["draw"].update(more=1)),
    "no model": ("model", lambda s: s.pop("model")),
    "no digest": ("model.digest", lambda s: s["model"].pop("digest")),
    "a list": ("request", lambda s: s.update(request=[1])),
    "a number": ("draw", lambda s: s.update(draw=1.5)),
    "a long place": ("codec.path", lambda s: s["codec"].update(path="x" * 5000)),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_an_image_asks_for_is_bounded(name: str, tmp_path: Path) -> None:
    key, edit = EDITS[name]
    image = image_that_says(tmp_path / "one.png", edit)
    for act in (run, dry_run):
        with pytest.raises(InputError) as refused:
            act(regenerate_config(image, tmp_path, places=["/", "http://127.0.0.1:9", "someone"]))
        named = refused.value.key if key == "max_pixels" else str(refused.value)
        assert key in str(named)


def test_a_place_is_allowed_by_its_whole_parts() -> None:
    def allowed(place: str, *prefixes: str) -> bool:
        try:
            follow({"x": place}, prefixes, written_in="it", allow_by="places")
        except InputError:
            return False
        return True

    assert allowed("s3://b/models/one", "s3://b/models")
    assert allowed("s3://b/models", "s3://b/models")
    assert allowed("/data/vae", "/data/")
    assert allowed("vae", str(Path.cwd()))
    assert allowed("org/vae", "org/vae")
    assert allowed("anything", "/")
    assert not allowed("s3://b/models-of-others/one", "s3://b/models")
    assert not allowed("s3://b/models/../secret", "s3://b/models")
    assert not allowed("s3://b/models/%252e%252e/secret", "s3://b/models")
    assert not allowed("/data/../etc", "/data")
    assert not allowed("/database", "/data")
    assert not allowed("http://h.evil/x", "http://h")
    assert not allowed("s3://b/x", "/")
    assert key_below("s3://b/a//./c", "s3://b") == "a/c"


def test_a_library_sees_the_files_that_were_looked_at_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("1")
    (tmp_path / "other").write_text("2")
    with only_these({"below/kept": tmp_path / "kept"}, {"config.json": "{}"}) as folder:
        assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == ["config.json", "kept"]
    assert not folder.exists()
    with pytest.raises(InputError, match="changed while it was read: below/kept"):
        with only_these({"below/kept": tmp_path / "kept"}):
            (tmp_path / "new").write_text("1")
            (tmp_path / "new").replace(tmp_path / "kept")
