"""The real jobs with the GPU: killed and finished, with a device that fails, and through to pictures."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from pipeline.storage.root import Root
from pipeline.store.ledger.state import read_state
from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import Dataset
from tests.gpu.ground import Ground, Lines
from tests.support.jobs import REPOSITORY, start
from tests.support.plugins import install_codec_plugin

# Encodes like the codec in the directory; the call of one number, of all processes' calls together, meets an
# assertion on the device, after which that process can compute nothing more.
ASSERTING = """
import os
from pathlib import Path
import torch
from pipeline.codec.codec import load_codec
from pipeline.codec.codec import codec_info

CALLS = 3

def number():
    for n in range(1000):
        try:
            Path(os.environ["LATENTLOOM_TEST_CALLS"], str(n)).touch(exist_ok=False)
            return n
        except FileExistsError:
            continue
    return 1000

class Plugin:
    def read_info(self, path, revision):
        return codec_info(path)
    def load(self, path, revision, info, *, device, dtype, compile, channels_last):
        inner = load_codec(path, device=device, dtype=dtype)
        class Codec:
            info = inner.info
            def encode(self, images_NHWC, *, posterior="mode", seeds=None):
                if number() == CALLS:
                    if device == "cpu":
                        raise RuntimeError("CUDA error: device-side assert triggered")
                    table = torch.zeros(4, device=device)
                    table[torch.full((4,), 1 << 20, device=device)].sum()
                return inner.encode(images_NHWC, posterior=posterior, seeds=seeds)
        return Codec()

plugin = Plugin()
"""


def sound(ground: Ground, output: str, images: int, level: str = "checksums") -> None:
    """Every image is there once, and the ledger is whole."""
    report = verify(str(ground.place / output), level)
    stored = report.problems, report.stored_rows, report.rejected_rows
    assert stored == ([], images, 0), f"{output}: {stored} instead of {images} rows without problems"


def encode_killed(ground: Ground) -> Lines:
    """The encode job, killed whole after its first commit and run again: every row once, and as decoding says."""
    images = 600 if ground.rehearsal else 4096
    ground.images(images)
    ground.codec()
    small = {"encode.unit_rows": 64, "encode.fragment_rows": 64, "encode.batch_size": 16}
    settings = ground.encode_settings("latents", **small)
    process = start("encode", *ground.arguments("encode", settings), cwd=ground.place, env=ground.env)
    ledger = ground.place / "latents" / "ledger"
    while process.poll() is None and not any(ledger.glob("*/*.json")):
        time.sleep(0.02)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert running, f"the job ended before it could be killed: {errors[-2000:]}"
    left = read_state(Root(str(ground.place / "latents"))).covered.count()
    assert 0 < left < images, f"the killed run left {left} of {images} rows: it must be some and not all"
    ground.job("encode", **settings)
    sound(ground, "latents", images)
    asked = {"data.uri": ground.place / "latents", "level": "decode", "decode.places": f"[{ground.place}]"}
    found = ground.job("verify", **asked, **{"decode.sample": 32})
    return {"": {"images": float(images), "left by the killed run": float(left), **found["figures"]}}


def device_assert(ground: Ground) -> Lines:
    """An assertion on the device in the middle of a job: the actor is replaced, no image is to blame."""
    images = 96
    ground.images(images)
    ground.codec()
    site = install_codec_plugin(ground.place / "site", "asserting", ASSERTING)
    (ground.place / "calls").mkdir()
    # The repository, too: where the package is not installed, nothing else says where it is.
    paths = [str(site), str(REPOSITORY), ground.env.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    ground.env.update(PYTHONPATH=os.pathsep.join(paths), LATENTLOOM_TEST_CALLS=str(ground.place / "calls"))
    answer = ground.job(
        "encode",
        **ground.encode_settings("latents", **{"codec.kind": "asserting", "encode.batch_size": 8}),
        **{"encode.unit_rows": 16, "encode.fragment_rows": 16, "encode.actors": 1},
    )
    calls = len(list((ground.place / "calls").iterdir()))
    assert calls > 4, f"only {calls} batches: the assertion was never met"
    assert answer["counts"]["rejected"] == 0, answer
    sound(ground, "latents", images)
    return {"": {"images": float(images), "rejected": 0.0, "batches": float(calls)}}


def chain(ground: Ground) -> Lines:
    """Encode, train with a GPU worker, sample from the export: the three real jobs, one after the other."""
    images = 64 if ground.rehearsal else 1024
    ground.images(images)
    ground.codec()
    encoded = ground.job("encode", **ground.encode_settings("latents"))
    model: dict[str, Any] = {"hidden": 32, "depth": 1, "heads": 2} if ground.rehearsal else {}
    precision = {} if ground.rehearsal else {"train.precision": "bf16", "train.compile": "true"}
    steps, batch = (4, 16) if ground.rehearsal else (60, 256)
    trained = ground.job(
        "train",
        **{"data.uri": ground.place / "latents", "output.uri": ground.place / "model", "model.kind": "dit"},
        **{f"model.{key}": value for key, value in model.items()},
        **{"train.images": steps * batch, "train.batch_size": batch, "train.num_workers": 1, **precision},
        **{"train.log_images": batch, "checkpoint.every_images": steps * batch, "grid.every_images": "null"},
    )
    count = 4 if ground.rehearsal else 256
    drawn = ground.job(
        "sample",
        **{"model.uri": trained["outputs"]["model"], "output.uri": ground.place / "samples"},
        **{"requests.kind": "grid", "requests.count": count, "requests.steps": 4 if ground.rehearsal else 25},
    )
    dataset: Dataset = Dataset.open_kind(str(ground.place / "samples"), "images")
    assert dataset.num_rows == count, f"{dataset.num_rows} pictures instead of {count}"
    rates = {"encode": encoded, "train": trained, "sample": drawn}
    return {name: dict(told["rates"]) for name, told in rates.items()}
