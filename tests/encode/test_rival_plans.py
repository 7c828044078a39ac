"""What a run plans is what the source holds while it has the claim, whoever ran between its start and its claim."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, claim_next, latest_number
from pipeline.store.ledger.state import read_state
from tests.support.encode_here import encode_here
from tests.support.images import make_codec, make_images


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    return {
        "source__kind": "folder",
        "source__uri": make_images(tmp_path / "images", 4),
        "image__resolution": 32,
        "image__multiple_of": 4,
        "codec__path": make_codec(tmp_path / "codec"),
        "output__uri": tmp_path / "latents",
    }


def test_a_listing_of_before_the_claim_retires_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_here(monkeypatch, **settings)
    first = sorted(Path(settings["source__uri"]).glob("*.png"))[0]
    rivals = []

    def plain(*args: Any, **settings: Any) -> Generation:
        return claim_next(*args, **{**settings, "patience_s": 0.0})

    def overtaken(*args: Any, **kwargs: Any) -> Generation:
        monkeypatch.setattr("pipeline.store.ledger.ledger.claim_next", plain)
        Image.new("RGB", (40, 40), "red").save(first)  # what the rival finds, and this run must find, too
        rivals.append(encode_here(monkeypatch, **settings).status)
        return plain(*args, **kwargs)

    monkeypatch.setattr("pipeline.store.ledger.ledger.claim_next", overtaken)
    assert encode_here(monkeypatch, **settings).status == "unchanged"
    assert rivals == ["done"]
    state = read_state(Root(str(settings["output__uri"])))
    assert (state.plan.number, state.num_stored) == (2, 4)


def test_a_source_that_is_empty_or_missing_leaves_no_trace(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for place, told in (("empty", "is empty"), ("nowhere", "There is no source")):
        with pytest.raises(InputError, match=told):
            encode_here(monkeypatch, **settings | {"source__uri": tmp_path / place})
    assert latest_number(Root(str(settings["output__uri"]))) == 0
    assert not Path(settings["output__uri"]).exists()
