"""Two nights as the base ships them, on a small Ray cluster of this machine: every entrypoint in its order."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.infra.infra_files import BASE, INFRA, ray_job_specs, render
from tests.infra.infra_night import launcher, settings, words_of
from tests.support.images import make_codec
from tests.support.jobs import environment
from tests.support.ray_nodes import ray_nodes
from tests.text.text_builders import make_clip

pytestmark = [pytest.mark.ray, pytest.mark.integration, pytest.mark.timeout(900)]

NIGHT = launcher().NIGHT
# Sizes alone: what is read, what is made and what is asked for stays as shipped.
SMALL = {
    "encode": "image.resolution=32 image.multiple_of=4 image.buckets.step=8 encode.batch_size=8 encode.actors=1 "
    "encode.num_gpus=0 encode.num_cpus=0.5 encode.decode_cpus=0.5 encode.writers=1 "
    "cluster.request_gpus=null cluster.request_cpus=null",
    "embed-text": "embed.batch_size=8 threads=1",
    "train": "model.hidden=32 model.depth=1 model.heads=2 train.images=64 train.batch_size=16 train.micro_batch=16 "
    "train.device=cpu train.num_workers=1 train.num_cpus=1 train.strategy=ddp train.precision=fp32 "
    "train.compile=false train.warmup_images=16 train.log_images=16 checkpoint.every_images=32 "
    "stream.holdout=0.1 validation.images=2 validation.chunk=1 validation.every_images=32 "
    "grid.images=2 grid.every_images=32",
    "sample": "requests.height=32 requests.width=32 requests.steps=2 batch_size=4 "
    "denoise.actors=1 decode.actors=1 denoise.num_cpus=0.5 decode.num_cpus=0.5",
    "evaluate": "image.resolution=32 image.multiple_of=4",
    # Weights that have learned nothing reach nothing.
    "promote": "at_most.frechet=1000000 at_least.precision=0 at_least.clip_score=-100",
}
PROMPTS = 8


class Site:
    """A store, a tracker, the settings of the base with them, and one cluster for every job."""

    def __init__(self, folder: Path, store: str, tracking: str, env: Mapping[str, str]) -> None:
        self.folder, self.store, self.env, self.small = folder, store, env, dict(SMALL)
        manifests = render(BASE)
        self.specs = ray_job_specs(manifests)
        self.settings = settings(manifests) | {"LATENTLOOM_STORE": store, "LATENTLOOM_TRACKING": tracking}

    def command(self, step: str, run: str) -> list[str]:
        """A step's entrypoint, the places of the image and its volumes being here."""
        words = words_of(self.specs[step]["entrypoint"], self.settings | {"LATENTLOOM_RUN": run})
        here = [w.replace("/var/lib/latentloom/", f"{self.folder}/") for w in words[1:]]
        return [sys.executable, *here, *self.small.get(step, "").split(), "tracking.close_timeout_s=60"]

    def run(self, step: str, run: str) -> tuple[int, dict[str, Any], str]:
        began = time.monotonic()
        done = subprocess.run(
            self.command(step, run),
            cwd=self.folder,
            env={**environment(), **self.env},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        lines = done.stdout.strip().splitlines()
        answer = json.loads(lines[-1]) if lines else {}
        said = json.dumps({k: answer[k] for k in ("status", "counts", "error") if k in answer})
        print(f"{run} {step}: exit code {done.returncode}, {time.monotonic() - began:.0f} s, {said}")
        return done.returncode, answer, done.stderr

    def night(self, run: str) -> dict[str, dict[str, Any]]:
        """Every step's answer; each must end with 0."""
        answers = {}
        for step in NIGHT:
            code, answers[step], errors = self.run(step, run)
            assert code == 0, f"{step}: {errors[-4000:]}"
        return answers


def add_images(folder: Path, first: int, count: int) -> None:
    """One more Parquet file as img2dataset writes them: JPEG, caption, size, and no label."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(first, first + count):
        data = io.BytesIO()
        coarse = np.random.default_rng(i).integers(0, 256, (5, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((400, 400), Image.Resampling.BICUBIC).save(data, "jpeg")
        rows.append({"key": f"{i:09d}", "jpg": data.getvalue(), "caption": f"picture {i}", "status": "success"})
    table = pa.Table.from_pylist([{**r, "width": 400, "height": 400} for r in rows])
    pq.write_table(table, folder / f"{first:05d}.parquet")


def make_judge(path: Path) -> None:
    """A feature network in TorchScript."""
    import torch

    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.adaptive_avg_pool2d(images.float(), 1).flatten(1)

    torch.jit.script(Means()).save(str(path))  # type: ignore[no-untyped-call]


def fill(store: Path) -> None:
    """What a night needs to be there: images, codec, networks and prompts."""
    add_images(store / "images", 0, 40)
    make_codec(store / "codecs" / "sd-vae")
    make_clip(store / "networks" / "clip-l", whole=True)
    make_judge(store / "networks" / "inception.pt")
    (store / "prompts").mkdir()
    prompts = [json.dumps({"prompt": f"picture {i}", "seed": i}) for i in range(PROMPTS)]
    (store / "prompts" / "night.jsonl").write_text("\n".join(prompts) + "\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("night")
    store = folder / "store"
    fill(store)
    fetch = [sys.executable, str(INFRA / "docker" / "fetch_networks.py"), f"{store}/networks", f"{folder}/networks"]
    subprocess.run(fetch, check=True, capture_output=True)
    with ray_nodes(1, 3) as nodes:
        tracking = f"sqlite:///{folder}/mlflow.db"
        yield Site(folder, str(store), tracking, {**nodes.env, "OMP_NUM_THREADS": "1"})


def test_two_nights(site: Site) -> None:
    first = site.night("nightly-1")
    assert first["encode"]["counts"]["latents"] == 40
    assert first["sample"]["counts"]["images"] == PROMPTS
    assert first["verify"]["counts"]["problems"] == 0

    add_images(Path(site.store) / "images", 40, 8)
    second = site.night("nightly-2")
    assert second["encode"]["counts"]["source_new"] == 1, "one file more"
    assert second["encode"]["counts"]["latents"] == 48
    assert second["embed-text"]["counts"]["clip-l.embedded"] == 8
    assert second["sample"]["counts"]["images"] == PROMPTS
    assert second["verify"]["counts"]["latents"] == 48
    assert second["verify"]["counts"]["problems"] == 0

    from pipeline.tracking.queries import resolve, walk

    tracking = site.settings["LATENTLOOM_TRACKING"]
    runs = [step.run_id for step in walk(second["train"]["mlflow_run_id"], tracking)]
    assert first["train"]["mlflow_run_id"] in runs, "the second night's model began as the first night's"
    assert resolve("models:/latentloom@production", tracking).version == 2

    code, cleaned, errors = site.run("gc", "weekly-1")
    assert code == 0, errors[-3000:]
    assert cleaned["counts"]["problems"] == 0


def test_every_step_says_that_its_store_is_away_as_the_launcher_looks_for_it(site: Site) -> None:
    """An endpoint at which nobody listens; all steps at once, for they do nothing but ask again."""
    away = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    started = {}
    for step in NIGHT:
        words = [w.replace(f"{site.store}/", "s3://nowhere/") for w in site.command(step, "away")]
        started[step] = subprocess.Popen(
            words,
            cwd=site.folder,
            env={**environment(), **site.env, **away, "AWS_DEFAULT_REGION": "us-east-1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    for step, process in started.items():
        answer = json.loads(process.communicate(timeout=300)[0].strip().splitlines()[-1])
        assert process.returncode == 3, step
        assert launcher().AWAY in answer["error"], step
