"""Raw latents to pixels: the codec's half of sampling. Knows torch and no ray."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import torch

from pipeline.codec.codec import Codec, load_codec
from pipeline.dataflow.device_faults import DeviceFault, device_fault, out_of_memory
from pipeline.diffusion.draw import padded


class LatentDecoder:
    """A codec that turns tables with `latent` into tables with `pixels`, in batches of `batch_size` rows."""

    def __init__(
        self,
        codec_path: str,
        *,
        batch_size: int,
        device: str = "cpu",
        dtype: str = "float32",
        kind: str = "auto",
        revision: str | None = None,
    ) -> None:
        self.codec: Codec = load_codec(codec_path, revision=revision, kind=kind, device=device, dtype=dtype)
        self.batch_size = batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table with `latent` and `latent_shape` replaced by `pixels` (uint8 bytes [h, w, 3]; null: reject)
        and `reason` (null, or why there are no pixels). Order is kept.
        """
        latents = table["latent"].to_pylist()
        shapes = [tuple(shape) for shape in table["latent_shape"].to_pylist()]
        pixels: list[bytes | None] = [None] * table.num_rows
        reasons: list[str | None] = ["non_finite_latent" if latent is None else None for latent in latents]
        for shape in sorted(set(shapes)):
            rows = np.asarray([i for i, s in enumerate(shapes) if s == shape and latents[i] is not None], np.int64)
            for batch, num_real in padded(rows, self.batch_size):
                self._decode_rows(batch, num_real, latents, shape, pixels, reasons)
        table = table.drop_columns(["latent", "latent_shape"])
        table = table.append_column("pixels", pa.array(pixels, pa.large_binary()))
        return table.append_column("reason", pa.array(reasons, pa.string()))

    def _decode_rows(
        self,
        batch: np.ndarray,
        num_real: int,
        latents: list[bytes | None],
        shape: tuple[int, ...],
        pixels: list[bytes | None],
        reasons: list[str | None],
    ) -> None:
        """Fill in pixels or reasons for the first `num_real` rows of a batch; one bad row costs only itself.

        DeviceFault when the codec fails on known content, too: then no row is to blame.
        """
        try:
            decoded_NHWC = self.decode([latents[i] or b"" for i in batch], shape)
        except (RuntimeError, ValueError) as error:
            if out_of_memory(error) or device_fault(error) is not None:
                raise  # no fault of a row: a smaller batch_size helps, or a new process
            if num_real == 1:
                self._check_itself(len(batch), shape)
                reasons[batch[0]] = "decode_failed"
                return
            for index in batch[:num_real]:
                # Alone, yet in a batch of the same shape: its bits stay what they would have been.
                self._decode_rows(np.full_like(batch, index), 1, latents, shape, pixels, reasons)
            return
        for index, image_HWC in zip(batch[:num_real], decoded_NHWC, strict=False):
            pixels[index] = image_HWC.tobytes()

    def _check_itself(self, rows: int, shape: tuple[int, ...]) -> None:
        """DeviceFault unless latents of zeros, the mean of most codecs, can be decoded in this shape."""
        try:
            self.decode([bytes(4 * math.prod(shape))] * rows, shape)
        except Exception as error:
            raise DeviceFault(f"{type(error).__name__}: {' '.join(str(error).split())[:500]}") from error

    @torch.no_grad()
    def decode(self, latents: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
        """uint8 [n, h, w, 3] of n raw latents given as float32 bytes of one shape [c, h, w]."""
        flat = np.frombuffer(b"".join(latents), dtype=np.float32, count=len(latents) * math.prod(shape))
        raw = torch.from_numpy(flat.reshape(len(latents), *shape).copy())
        images: np.ndarray = self.codec.decode(raw).cpu().numpy()
        return images
