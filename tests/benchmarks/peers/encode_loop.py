"""A torch DataLoader, a diffusers VAE, one .npy file an image: `python -m ... IMAGES CODEC OUT RESOLUTION BATCH`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader, Dataset


class Folder(Dataset[tuple[torch.Tensor, str]]):
    """Centre crops of a folder's images, float32 in [-1, 1]."""

    def __init__(self, folder: Path, resolution: int) -> None:
        self.paths, self.resolution = sorted(folder.iterdir()), resolution

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        image = Image.open(self.paths[index]).convert("RGB")
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        left, top = (width - self.resolution) // 2, (height - self.resolution) // 2
        image = image.crop((left, top, left + self.resolution, top + self.resolution))
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
        return pixels, self.paths[index].stem


def main() -> None:
    images, codec, out = (Path(a) for a in sys.argv[1:4])
    resolution, batch = int(sys.argv[4]), int(sys.argv[5])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKL.from_pretrained(codec).to(device).eval()
    loader = DataLoader(Folder(images, resolution), batch_size=batch, num_workers=2)
    out.mkdir(parents=True)
    began, done = time.perf_counter(), 0
    with torch.inference_mode():
        for pixels, names in loader:
            latents = vae.encode(pixels.to(device)).latent_dist.mode().half().cpu().numpy()
            for latent, name in zip(latents, names, strict=True):
                np.save(out / f"{name}.npy", latent)
            done += len(names)
    print(json.dumps({"images": done, "work_s": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
