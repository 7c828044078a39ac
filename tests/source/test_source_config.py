"""Configurations that cannot work are refused with the key and the rule."""

from __future__ import annotations

import pytest

from pipeline.config import StrictModel, validate
from pipeline.errors import ConfigError
from pipeline.source.config import ImageConfig, ParquetSource, SourceConfig


class Holder(StrictModel):
    source: SourceConfig


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"resolution": 100}, "multiple of multiple_of = 8"),
        ({"resolution": []}, "at least one"),
        ({"resolution": [64, 64]}, "each once"),
        ({"resolution": [64, 128], "buckets": {"kind": "table", "sizes": [[64, 64]]}}, "only one resolution"),
        ({"buckets": {"kind": "table", "sizes": [[64, 65]]}}, "65 is not"),
        ({"resolution": 64, "buckets": {"kind": "budget", "step": 12}}, "buckets.step = 12"),
        ({"resolution": 64, "buckets": {"kind": "budget", "step": 128}}, "at most the smallest resolution"),
        ({"matte": [0, 0, 256]}, "matte"),
        ({"max_pixels": 10**10}, "max_pixels"),
        ({"formats": ["psd"]}, "formats"),
    ],
)
def test_wrong_image_settings_are_refused(fields, rule):
    with pytest.raises(ConfigError, match=rule):
        validate(ImageConfig, fields)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"kind": "parquet", "uri": "x", "filter": "a.b > 1"}, "may not contain Attribute"),
        ({"kind": "folder", "uri": "x", "label_from": "directory"}, "needs classes"),
        ({"kind": "folder", "uri": "x", "classes": ["a", "a"]}, "every name may appear once"),
        ({"kind": "zip", "uri": "x"}, "source"),
        ({"kind": "folder", "uri": ""}, "uri"),
    ],
)
def test_wrong_sources_are_refused(fields, rule):
    with pytest.raises(ConfigError, match=rule):
        validate(Holder, {"source": fields})


def test_the_kind_chooses_the_model():
    held = validate(Holder, {"source": {"kind": "parquet", "uri": "x", "filter": "a > 1"}})
    assert isinstance(held.source, ParquetSource)
