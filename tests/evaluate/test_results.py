"""Which figures there are, each by its own need, and why the others are not."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.figures import NetworkFacts, Record, figures_of
from pipeline.evaluate.job import accepted
from pipeline.evaluate.metrics import SampleResults
from pipeline.evaluate.passes import Measured
from pipeline.features.statistics import FeatureStats
from pipeline.result import JobResult


def stats_of(n: int, dims: int, seed: int) -> FeatureStats:
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 2**63, n, dtype=np.uint64)
    return FeatureStats.of(keys, rng.normal(size=(n, dims)).astype(np.float32), 100)


def figures(n: int, dims: int, neighbours: int = 3) -> tuple[set[str], dict[str, str]]:
    networks = NetworkFacts(space_digest="d" * 64, extractor="timm dino")
    measured = Measured(networks, stats_of(n, dims, 1), samples=SampleResults(stats_of(n, dims, 2)))
    found, absent = figures_of(measured, neighbours)
    return {figure.name for figure in found}, absent


def test_only_the_covariance_needs_more_images_than_features() -> None:
    found, absent = figures(40, 64)
    assert found == {"kid", "precision", "recall"}
    assert absent["frechet"] == "40 images are too few for a covariance of 64 features"
    assert figures(65, 64)[0] == {"frechet", "kid", "precision", "recall"}


def test_manifolds_need_more_images_than_neighbours() -> None:
    found, absent = figures(3, 8)
    assert found == {"kid"}
    assert absent["precision"] == absent["recall"] == "3 images are too few for manifolds of 3 neighbours"
    found, absent = figures(1, 8)
    assert found == set()
    assert absent["kid"] == "a kernel distance needs two images on each side"


def test_a_network_without_classes_gives_no_inception_score_and_says_so() -> None:
    _, absent = figures(40, 8)
    assert absent["inception_score"] == "timm dino gives no classes beside its features"


def test_a_missed_threshold_is_exit_code_3_and_names_what_was_asked() -> None:
    config = EvaluateJobConfig.model_validate(
        {
            "reference": {"kind": "folder", "uri": "real", "name": "r"},
            "image": {"resolution": 32},
            "output": {"uri": "/report"},
            "samples": {"uri": "samples"},
            "thresholds": {"accuracy": 0.99, "kid": 0.5},
        },
        strict=False,
    )
    missed = ("accuracy is 0.5, asked is at least 0.99", "kid is absent, asked is at most 0.5")
    record = Record("k", (), {}, {}, {}, missed, {"samples": 3}, "run", {})
    with pytest.raises(InputError, match=r"accuracy is 0\.5, asked is at least 0\.99\n  - kid is absent") as caught:
        accepted(config, record, JobResult("done", record.counts))
    error = caught.value
    assert error.exit_code == 3
    assert (error.key, error.value) == ("thresholds.accuracy, thresholds.kid", "0.99, 0.5")
    assert error.rule is not None
    assert "/report/report.html" in str(error.next_step)
    assert cast(Any, error.result).counts == {"samples": 3}
