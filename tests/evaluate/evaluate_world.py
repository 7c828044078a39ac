"""A small world to evaluate: real shapes on disk, samples as the sample job writes them, a codec, a history."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from jobs.quickstart import CLASS_NAMES, draw_shape, write_shapes
from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.sample.output import IMAGES, encode_rows
from pipeline.sample.provenance import Origin
from pipeline.sample.requests import request_id
from pipeline.source.reading.rows import Entry
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import claim_next, note_run
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.ledger import collect
from pipeline.store.plan import append_version, read_plan
from pipeline.store.schema import REJECTS
from pipeline.store.writer import Committer
from tests.support import draws

NUM_CLASSES = 12
DRAW = replace(draws.DRAW, seed=0, batch_size=8)
ORIGIN = Origin("model", "m" * 32, "train-run", "ema", None, None, "codec", "c" * 64)


def real_images(n: int, seed: int = 0, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """images_NHWC uint8 and labels 0..11, every class equally often."""
    images = np.stack([draw_shape(seed, i, size) for i in range(n)])
    return images, np.arange(n, dtype=np.int64) % NUM_CLASSES


def write_samples(
    uri: str,
    images: np.ndarray,
    labels: list[int | None],
    prompts: list[str] | None = None,
    run: str = "sample-run",
    outside: bool = False,
    classes: Sequence[str] = (),
) -> None:
    """Image rows with a plan and one commit, as the sample job leaves them; outside: each image in a file."""
    root = Root(uri)
    claim_identity(root, Identity("images", {"draw": "test"}, {"classes": list(classes)} if classes else {}))
    generation = claim_next(root, lambda number: collect(root, number), job="sample")
    entries = [[Entry("requests", 0, None, None, 0, len(images), None)]]
    append_version(read_plan(root), entries, source={}, generation=generation.number)
    rows = []
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        request: dict[str, Any] = {
            "label": label,
            "prompt": prompts[i] if prompts else None,
            "negative_prompt": None,
            "seed": i,
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "steps": 25,
            "guidance": 2.0,
            "guidance_low": None,
            "guidance_high": None,
        }
        rows.append({**request, "request_id": request_id(request), "extra": None, "unit": 0, "row": i})
        rows[-1] |= {"pixels": pixels.tobytes(), "reason": None}
    table, rejects = encode_rows(pa.Table.from_pylist(rows), DRAW, ORIGIN, root.put_if_absent if outside else None)
    assert table.schema == IMAGES
    assert rejects.schema == REJECTS
    committer = Committer(root, generation.number, row_group_bytes=40_000, latent_dtype=None, meta={})
    committer.commit(table, rejects, {})
    note_run(root, generation.number, {"handle": run, "run_id": run})
    generation.close({"status": "done"})


def write_codec(path: Path) -> None:
    """A tiny random AutoencoderKL of factor 4, saved by diffusers."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    ).save_pretrained(path)


def write_history(path: Path) -> None:
    """What a training run records."""
    path.mkdir(parents=True, exist_ok=True)
    lines = [{"step": s, "images": 32 * s, "loss": 1 / s, "learning_rate": 1e-3} for s in range(1, 40)]
    (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def build_world(folder: Path, *, count: int = 480, samples: int = 96) -> None:
    """real/, samples/ (every eighth of another class than asked), codec/ and train/ below `folder`."""
    write_shapes(str(folder / "real"), count=count, seed=0, size=32)
    images, labels = real_images(samples, seed=5)
    asked = [int(label) if i % 8 else int(label + 1) % NUM_CLASSES for i, label in enumerate(labels)]
    write_samples(str(folder / "samples"), images, list(asked), classes=CLASS_NAMES)
    write_codec(folder / "codec")
    write_history(folder / "train")


def config_of(folder: Path, **changes: Any) -> EvaluateJobConfig:
    """A configuration over the world, with a classifier small enough for a test."""
    data: dict[str, Any] = {
        "reference": {"kind": "folder", "uri": str(folder / "real"), "name": "shapes"},
        "image": {"resolution": 32, "multiple_of": 4},
        "output": {"uri": str(folder / "report")},
        "samples": {"uri": str(folder / "samples")},
        "codec": {"path": str(folder / "codec")},
        "train": {"uri": str(folder / "train")},
        "classifier": {"steps": 200, "width": 16, "batch_size": 48, "learning_rate": 5e-3},
        "fidelity": {"images": 48, "batch_size": 16},
        "tracking": {"enabled": False},
    }
    data |= changes
    return EvaluateJobConfig.model_validate_json(json.dumps(data))
