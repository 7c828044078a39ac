"""A codec in closed form, plugged in as any third party's: the first principal components of 4x4 patches.

An image of h x w pixels is h/4 x w/4 patches of 48 numbers, of which the coordinates along the 8 directions of most
variance are kept (Pearson 1901): the best linear codec of its size, with nothing trained and nothing drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.codec.codec import CodecInfo

if TYPE_CHECKING:
    import torch

PATCH, CHANNELS, KIND = 4, 8, "pca"
_FILE = "pca.npy"  # float32 [1 + CHANNELS, 48]: the mean patch and the directions


def fit(folder: Path, images_NHWC: npt.NDArray[np.uint8]) -> None:
    """Write the codec of these images to `folder`."""
    patches_MD = patches_of(images_NHWC).reshape(-1, 3 * PATCH * PATCH)
    _, directions_DD = np.linalg.eigh(np.cov(patches_MD.T))
    kept_CD = directions_DD[:, ::-1][:, :CHANNELS].T
    folder.mkdir(parents=True)
    np.save(folder / _FILE, np.concatenate([patches_MD.mean(0)[None], kept_CD]).astype(np.float32))


def patches_of(images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Patches [n, h/4, w/4, 48] in [0, 1]."""
    n, height, width, _ = images_NHWC.shape
    cut = images_NHWC.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(n, height // PATCH, width // PATCH, -1) / 255.0


def install(site: Path) -> Path:
    """Write to `site` what an installed package would say of its codec; returns it, for PYTHONPATH."""
    metadata = site / "pca_codec-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pca-codec\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[latentloom.codecs]\n{KIND} = {__name__}:plugin\n")
    return site


class PcaCodec:
    """Patches to their coordinates along the kept directions and back; see `pipeline.codec.codec.Codec`."""

    def __init__(self, info: CodecInfo, path: str, device: str) -> None:
        import torch

        self.info = info
        stored = torch.from_numpy(np.load(Path(path, _FILE))).to(device)
        self.mean_D, self.directions_CD = stored[0], stored[1:]

    def encode(
        self, images_NHWC: torch.Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """uint8 [n,h,w,3] -> float32 [n,8,h/4,w/4]."""
        pixels = images_NHWC.to(self.mean_D.device).float() / 255
        n, height, width, _ = pixels.shape
        cut = pixels.reshape(n, height // PATCH, PATCH, width // PATCH, PATCH, 3).transpose(2, 3)
        patches = cut.reshape(n, height // PATCH, width // PATCH, -1)
        return ((patches - self.mean_D) @ self.directions_CD.T).permute(0, 3, 1, 2).contiguous()

    def decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        """Latents -> uint8 [n,h,w,3]."""
        patches = latents_NCHW.to(self.mean_D).permute(0, 2, 3, 1) @ self.directions_CD + self.mean_D
        n, rows, columns, _ = patches.shape
        cut = patches.reshape(n, rows, columns, PATCH, PATCH, 3).transpose(2, 3)
        return (cut.reshape(n, rows * PATCH, columns * PATCH, 3) * 255).round().clamp(0, 255).byte()


class PcaPlugin:
    """What the entry point gives; `path` is a folder that `fit` wrote."""

    def read_info(self, path: str, revision: str | None) -> CodecInfo:
        digest = hashlib.sha256(Path(path, _FILE).read_bytes()).hexdigest()
        return CodecInfo("PatchPca", {"patch": PATCH}, digest, CHANNELS, PATCH, has_posterior=False)

    def load(
        self,
        path: str,
        revision: str | None,
        info: CodecInfo,
        *,
        device: str,
        dtype: str,
        compile: bool,
        channels_last: bool,
    ) -> PcaCodec:
        return PcaCodec(info, path, device)


plugin = PcaPlugin()
