"""Provenance: complete enough to ask again, checked before it is believed, free of secrets."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pipeline.errors import ConflictError, InputError
from pipeline.sample.provenance import (
    Draw,
    Origin,
    check_origin,
    origin_of,
    provenance,
    request_of,
    without_credentials,
)
from pipeline.sample.regenerate import checked_story
from pipeline.sample.requests import Defaults, RequestLimits, validate_requests
from tests.support.draws import DRAW

ORIGIN = Origin(
    model_uri="s3://me:secret@bucket/model",
    model_digest="m",
    model_run_id="run",
    ema="ema",
    dataset_uri="https://u:pw@host/data?token=abc",
    dataset_digest="d",
    codec_path="/vae",
    codec_sha256="c",
)


def request() -> dict[str, Any]:
    limits = RequestLimits(num_classes=3, takes_text=False, multiple=4, sizes=((32, 32),))
    columns = {"label": [1], "seed": [2**63 - 1], "guidance": [2.5], "guidance_low": [0.1], "extra": ['{"a":1}']}
    row: dict[str, Any] = validate_requests(columns, limits=limits, defaults=Defaults()).table.to_pylist()[0]
    return row


def test_a_request_comes_back_whole() -> None:
    found = json.loads(json.dumps(provenance(request(), DRAW, ORIGIN)))
    assert request_of(found) == request()
    assert Draw(**found["draw"]) == DRAW
    check_origin(found, ORIGIN)


def test_compiled_arithmetic_is_told_and_its_absence_reads_as_before() -> None:
    plain = provenance(request(), DRAW, ORIGIN)
    assert "compile" not in plain["draw"]  # the bytes of older images stay what they were
    assert Draw(**plain["draw"]).compile is False
    compiled = dataclasses.replace(DRAW, compile=True)
    found = json.loads(json.dumps(provenance(request(), compiled, ORIGIN)))
    assert found["draw"]["compile"] is True
    assert Draw(**found["draw"]) == compiled


def test_every_dataset_of_a_mixture_is_named() -> None:
    mixture = (("s3://u:p@b/one", "d", 3.0), ("/two", "e", 0.5))
    found = json.loads(json.dumps(provenance(request(), DRAW, dataclasses.replace(ORIGIN, mixture=mixture))))
    assert origin_of(found).mixture == (("s3://b/one", "d", 3.0), ("/two", "e", 0.5))
    assert origin_of(found).datasets == (("s3://b/one", "d"), ("/two", "e"))
    assert "mixture" not in provenance(request(), DRAW, ORIGIN)
    assert ORIGIN.datasets == (("https://u:pw@host/data?token=abc", "d"),)
    assert dataclasses.replace(ORIGIN, dataset_uri=None).datasets == ()


def test_an_edited_request_is_noticed() -> None:
    found = provenance(request(), DRAW, ORIGIN)
    found["request"] = {**found["request"], "seed": 1}
    with pytest.raises(InputError, match="not the one it was drawn for"):
        request_of(found)
    with pytest.raises(InputError, match="has the format 'other'"):
        checked_story({**found, "format": "other"}, "this image")


@pytest.mark.parametrize("field", ["model_digest", "codec_sha256"])
def test_another_model_or_codec_is_a_conflict(field: str) -> None:
    found = provenance(request(), DRAW, ORIGIN)
    with pytest.raises(ConflictError, match="made by another model or codec"):
        check_origin(found, dataclasses.replace(ORIGIN, **{field: "other"}))


def test_no_credential_is_written() -> None:
    text = json.dumps(provenance(request(), DRAW, ORIGIN))
    assert "secret" not in text
    assert "pw" not in text
    assert "token" not in text
    assert "s3://bucket/model" in text
    assert without_credentials("/a/b?c@d") == "/a/b?c@d"
