"""jobs.ema: an average that no track of the run has, as an export that is drawn from like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import validate
from pipeline.errors import ConflictError, InputError
from pipeline.model.checkpoints import list_complete
from pipeline.model.load import load_model
from pipeline.storage.root import Root
from pipeline.train import job, retention
from pipeline.train.config import EmaJobConfig
from tests.train.dataset import make_dataset
from tests.train.job_config import job_config
from tests.train.one_process import in_one_process

pytestmark = pytest.mark.integration
OFF = {"tracking": {"enabled": False}}
TRACKS = [{"name": name, "sigma_rel": sigma} for name, sigma in (("a", 0.05), ("b", 0.1), ("wanted", 0.07))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three averages and a checkpoint at every step of a fifth of it."""
    base = tmp_path_factory.mktemp("run")
    changes = {"train": {"ema": TRACKS}, "checkpoint": {"every_images": 16, "keep_last": 100}}
    with pytest.MonkeyPatch.context() as patch:
        in_one_process(patch, base)
        job.run(job_config(base, make_dataset(base / "data"), changes))
    return base / "run"


def asked(trained: Path, output: Path, **changes: Any) -> EmaJobConfig:
    return validate(EmaJobConfig, {"run": str(trained), "sigma_rel": 0.07, "output": str(output), **OFF, **changes})


def test_the_export_is_the_average_that_was_asked_for(trained: Path, tmp_path: Path) -> None:
    newest = list_complete(Root(str(trained / "checkpoints")))[-1]
    truth, _ = load_model(str(trained / "checkpoints" / newest.name), "wanted")
    hidden = json.loads((trained / "checkpoints" / newest.name / "COMPLETE.json").read_text())
    assert [track["name"] for track in hidden["meta"]["ema_tracks"]] == ["a", "b", "wanted"]
    for marker in (trained / "checkpoints").glob("*/COMPLETE.json"):
        marker.write_text(marker.read_text().replace('"sigma_rel": 0.07', '"sigma_rel": null'))
    planned = retention.plan_average(asked(trained, tmp_path / "out"))
    done = retention.run_average(asked(trained, tmp_path / "out"))
    assert done.counts == planned.counts == {"images": 320, "checkpoints": 20, "averages": 40}
    model, info = load_model(done.outputs["model"])
    assert (info.ema, info.images_seen) == ("sigma_rel-0.07", 320)

    def distance(other: torch.nn.Module) -> float:
        ours, theirs = (torch.cat([p.flatten() for p in m.state_dict().values()]) for m in (model, other))
        return float((ours - theirs).norm() / theirs.norm())

    assert distance(truth) < 1e-3
    assert distance(load_model(str(trained / "checkpoints" / newest.name), "a")[0]) > 5 * distance(truth)
    retention.run_average(asked(trained, tmp_path / "out"))  # as it is there already
    with pytest.raises(ConflictError, match="another exported model is already there"):
        retention.run_average(asked(trained, tmp_path / "out", sigma_rel=0.2))


def test_an_earlier_count_of_images_uses_the_checkpoints_up_to_it(trained: Path, tmp_path: Path) -> None:
    done = retention.run_average(asked(trained, tmp_path / "out", images=160))
    assert done.counts["checkpoints"] == 10
    assert load_model(done.outputs["model"])[1].images_seen == 160


def test_what_cannot_be_rebuilt_is_said(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"keeps no checkpoint of so many images[\s\S]*at 16, 32, "):
        retention.plan_average(asked(trained, tmp_path, images=17))
    with pytest.raises(InputError, match="no training run with a checkpoint"):
        retention.plan_average(asked(tmp_path, tmp_path))
    for marker in (trained / "checkpoints").glob("*/COMPLETE.json"):
        values = json.loads(marker.read_text())
        values["meta"]["ema_tracks"] = [{"name": "h", "sigma_rel": None}]
        marker.write_text(json.dumps(values))
    with pytest.raises(InputError, match="hold no power-function average"):
        retention.plan_average(asked(trained, tmp_path))
