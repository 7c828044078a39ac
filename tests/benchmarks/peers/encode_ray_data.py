"""Ray Data as its public templates use it: float32 tensors between stages, list columns in Parquet.

`python -m ... IMAGES CODEC OUT RESOLUTION BATCH ACTORS`: on a GPU machine one actor a GPU; else ACTORS, which reserve
half of the CPUs together, so that reading and writing find theirs: with all of them reserved it would wait for ever.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
from PIL import Image


def transform(row: dict[str, Any], resolution: int) -> dict[str, Any]:
    """Bytes to a float32 image in [-1, 1], channels first."""
    image = Image.open(io.BytesIO(row["bytes"])).convert("RGB")
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    pixels = np.asarray(image.crop((left, top, left + resolution, top + resolution)), np.float32) / 127.5 - 1
    return {"path": row["path"], "image": pixels.transpose(2, 0, 1)}


class Encode:
    """An actor with the VAE."""

    def __init__(self, codec: str, threads: int) -> None:
        import torch
        from diffusers import AutoencoderKL

        torch.set_num_threads(threads)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.vae = AutoencoderKL.from_pretrained(codec).to(self.device).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack(batch["image"])).to(self.device)
            latents = self.vae.encode(pixels).latent_dist.mode().float().cpu().numpy()
        return {"path": batch["path"], "latent": [latent.ravel().tolist() for latent in latents]}


def main() -> None:
    images, codec, out = sys.argv[1:4]
    resolution, batch, actors = (int(a) for a in sys.argv[4:7])
    ray.init(include_dashboard=False, log_to_driver=False)
    gpus = ray.cluster_resources().get("GPU", 0)
    count = len(list(Path(images).iterdir()))
    began = time.perf_counter()
    dataset = ray.data.read_binary_files(images, include_paths=True)
    dataset = dataset.map(transform, fn_kwargs={"resolution": resolution})
    dataset = dataset.map_batches(
        Encode,
        fn_constructor_args=(codec, max(1, (os.cpu_count() or 1) // actors)),
        batch_size=batch,
        num_gpus=1 if gpus else None,
        num_cpus=None if gpus else ray.cluster_resources()["CPU"] / 2 / actors,
        compute=ray.data.ActorPoolStrategy(size=int(gpus) or actors),
    )
    dataset.write_parquet(out)
    print(json.dumps({"images": count, "work_s": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
