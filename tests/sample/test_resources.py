"""Stages of a sampling job that a cluster can never hold together are told before they wait for ever."""

from __future__ import annotations

import pytest
import ray

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.sample import passes
from pipeline.sample.config import SampleJobConfig


def offer(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> None:
    """A cluster of these nodes."""
    together = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "cluster_resources", lambda: together)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": node, "Alive": True} for node in nodes])


def resources(*overrides: str, with_text: bool = False) -> passes.SampleResources:
    required = ["model.uri=m", "output.uri=o", "requests.kind=grid", "requests.count=1"]
    config = load_config(SampleJobConfig, [], [*required, *overrides])
    return passes._resources(config, with_text=with_text)


def test_what_is_left_open_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, {"CPU": 2.0})
    assert resources().denoise_gpus == 0
    offer(monkeypatch, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0})
    found = resources(with_text=True)
    assert (found.denoise_actors, found.decode_actors, found.encoders) == (2, 2, 4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["denoise.num_gpus=1"], r"needs 1.25 GPUs at once and the cluster has 1"),
        (["denoise.actors=3", "denoise.num_gpus=0.3"], r"needs 1.15 GPUs at once"),
        (["denoise.num_gpus=2", "decode.num_gpus=0"], r"No node has room for a denoise actor"),
        (["denoise.num_gpus=0.6", "decode.num_gpus=0.4", "denoise.actors=2"], r"needs 1.6 GPUs at once"),
        (["denoise.num_gpus=0", "denoise.actors=4", "denoise.num_cpus=2"], r"CPUs at once and the cluster has 4"),
        (["denoise.num_cpus=5"], r"No node has room for a denoise actor .* which takes 5 CPUs"),
        (["decode.num_cpus=5"], r"No node has room for a decode actor"),
    ],
)
def test_what_cannot_fit_is_refused(monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str) -> None:
    offer(monkeypatch, {"CPU": 4.0, "GPU": 1.0})
    with pytest.raises(ConfigError, match=message) as caught:
        resources(*overrides)
    assert "it would wait for ever" in str(caught.value)


def test_stages_that_fill_no_single_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, {"CPU": 4.0, "GPU": 2.0})
    assert resources("denoise.num_gpus=0.6", "decode.num_gpus=0.4").denoise_actors == 2
    with pytest.raises(ConfigError, match=r"no room for a denoise actor .* which takes 0\.6 of one"):
        resources("denoise.num_gpus=0.6", "denoise.actors=2", "decode.num_gpus=0.7", "decode.actors=1")


def test_a_part_of_more_than_one_gpu_is_no_number_of_gpus() -> None:
    with pytest.raises(ConfigError, match=r"denoise\.num_gpus = 1\.5: a process reserves a part of one GPU"):
        resources("denoise.num_gpus=1.5")


def test_gpus_that_are_asked_for_and_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, {"CPU": 4.0})
    with pytest.raises(ConfigError, match="The cluster has no GPUs"):
        resources("cluster.device=cuda")
