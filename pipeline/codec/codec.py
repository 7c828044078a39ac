"""The codec protocol and the one function that opens a codec. Torch is imported when a codec is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from pipeline.codec.files import codec_files, codec_root, local_directory
from pipeline.codec.info import CodecInfo, diffusers_info, find_plugin, gpu_dtype
from pipeline.errors import InputError
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.storage.trust import only_these

if TYPE_CHECKING:
    import torch

_AMPERE = 8  # compute capability from which bfloat16 is native


class Codec(Protocol):
    """Pixels to raw latents and back, on one device.

    Each image is encoded on its own: in batches of one fixed shape its latent does not depend on its place
    or its batch-mates, bitwise on a CPU.
    """

    info: CodecInfo

    def encode(
        self, images_NHWC: torch.Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """uint8 [n,h,w,3] on any device -> raw latents float32 [n,c,h/f,w/f] on the codec's device.

        `posterior`: "mode"; "sample", which needs one seed per image (see `posterior_seed`); "moments",
        which returns 2c channels, the means and then the log-variances. ValueError for wrong input.
        """
        ...

    def decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        """Raw latents [n,c,h,w] of any float type -> uint8 [n,h*f,w*f,3] on the codec's device."""
        ...


def resolve_dtype(dtype: str, device: str, info: CodecInfo) -> str:
    """The arithmetic that `auto` stands for.

    float32 on a CPU, where bfloat16 is slower; on a GPU see `gpu_dtype`.
    """
    if dtype != "auto":
        return dtype
    if not device.startswith("cuda"):
        return "float32"
    import torch

    return gpu_dtype(info, bfloat16=torch.cuda.get_device_capability(device)[0] >= _AMPERE)


def posterior_seed(sample_id: bytes) -> int:
    """The seed of a sample's posterior draw: a function of the sample's identity alone."""
    digest = hashlib.blake2b(sample_id, digest_size=8, person=b"posterior").digest()
    return int.from_bytes(digest, "big") >> 1  # 63 bits: what every generator takes


def load_codec(
    path: str,
    *,
    revision: str | None = None,
    kind: str = "auto",
    device: str = "cpu",
    dtype: str = "float32",
    compile: bool = False,
    channels_last: bool = True,
) -> Codec:
    """Open the codec at `path` on `device`; InputError names what is missing, broken or refused."""
    options = {"compile": compile, "channels_last": channels_last}
    if kind != "auto":
        plugin = find_plugin(kind)
        info = plugin.read_info(path, revision)
        arithmetic = resolve_dtype(dtype, device, info)
        return plugin.load(path, revision, info, device=device, dtype=arithmetic, **options)
    from pipeline.codec.diffusers_codec import DiffusersCodec

    try:
        directory = local_directory(codec_root(path, revision))
    except storage_errors() as error:
        raise InputError(f"The codec cannot be read: {describe(error)}", key="path", value=path) from error
    # Hash what is loaded: not what the remote held a moment ago, nor another file of the directory.
    with only_these({name: directory / name for name in codec_files(Root(str(directory)), path)}) as files:
        info = diffusers_info(Root(str(files)), path)
        arithmetic = resolve_dtype(dtype, device, info)
        return DiffusersCodec.load(files, info, device=device, dtype=arithmetic, name=path, **options)
