"""diffusers' autoencoders as codecs: AutoencoderKL (SD, SDXL, SD3, FLUX), FLUX.2, Tiny and DC."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.codec.info import CodecInfo, check_dtype, check_posterior
from pipeline.diffusion.compiled import compile_for_shapes
from pipeline.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the constructor of an autoencoder makes of a configuration that is not its own.
_UNFIT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError)
_COMPILED_SHAPES = 64  # aspect-ratio buckets; beyond torch's own limit of eight the rest would not be compiled


class DiffusersCodec:
    """A frozen diffusers autoencoder on one device; see `pipeline.codec.codec.Codec` for the contract."""

    def __init__(
        self,
        vae: torch.nn.Module,
        info: CodecInfo,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        compile: bool = False,
        channels_last: bool = True,
    ) -> None:
        check_dtype(info, dtype)
        # `vae` holds weights of `dtype` already.
        self.info = info
        self.device, self.dtype = torch.device(device), DTYPES[dtype]
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._vae: Any = vae.requires_grad_(False).eval().to(self.device, memory_format=self._layout)  # type: ignore[call-overload]
        if compile:
            for part in (self._vae.encoder, self._vae.decoder):
                compile_for_shapes(part, _COMPILED_SHAPES)

    @classmethod
    def load(
        cls, directory: Path, info: CodecInfo, *, dtype: str = "float32", name: str | None = None, **options: Any
    ) -> DiffusersCodec:
        """Read config and safetensors from a directory; every weight must be there, none may be left over.

        `name`: what errors call the directory.
        """
        import diffusers

        vae_class = getattr(diffusers, info.class_name)
        try:
            vae, report = vae_class.from_pretrained(
                str(directory),
                torch_dtype=DTYPES[dtype],
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, *_UNFIT) as error:
            raise InputError(
                f"The codec cannot be loaded: {(str(error).strip() or repr(error)).splitlines()[0]}",
                key="path",
                value=name or directory,
                rule=f"config.json and weights must belong to one {info.class_name}",
                next_step="save the codec again with save_pretrained",
            ) from error
        odd = [*report["missing_keys"], *report["unexpected_keys"]]
        if odd:
            # diffusers would go on with random values for what is missing.
            raise InputError(
                f"The codec's weights do not fit its config.json: {len(odd)} tensors differ, such as {odd[0]}",
                key="path",
                value=name or directory,
                rule=f"config.json and weights must belong to one {info.class_name}",
                next_step="copy both files from the same codec",
            )
        return cls(vae, info, dtype=dtype, **options)

    @torch.inference_mode()
    def encode(
        self, images_NHWC: torch.Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        """uint8 [n,h,w,3] -> raw latents float32 [n,c,h/f,w/f]; see the protocol."""
        if images_NHWC.dtype != torch.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
            raise ValueError(f"images must be uint8 [n,h,w,3], not {images_NHWC.dtype} {list(images_NHWC.shape)}")
        self.info.latent_shape(images_NHWC.shape[1], images_NHWC.shape[2])
        check_posterior(self.info, posterior)
        if posterior == "sample" and (seeds is None or len(seeds) != len(images_NHWC)):
            raise ValueError(f"posterior=sample needs one seed for each of the {len(images_NHWC)} images")

        # Bytes cross to the device; there they become [-1, 1]. NHWC seen as NCHW *is* channels-last.
        pixels = images_NHWC.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        # In float32: bfloat16 would round twice, and half a grey level is lost near white and black already.
        pixels = pixels.to(torch.float32, memory_format=self._layout).div_(127.5).sub_(1).to(self.dtype)
        encoded = self._vae.encode(pixels, return_dict=False)[0]
        if not self.info.has_posterior:
            return _dense(encoded)
        if posterior == "mode":
            return _dense(encoded.mode())
        mean, logvar = _dense(encoded.mean), _dense(encoded.logvar)
        if posterior == "moments":
            return torch.cat([mean, logvar], dim=1)
        # One standard normal draw per seed, made on the CPU so that a GPU stores the same sample.
        assert seeds is not None
        draws = [torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return mean + torch.exp(0.5 * logvar) * torch.stack(draws).to(mean.device, non_blocking=True)

    @torch.inference_mode()
    def decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        """Raw latents [n,c,h,w] -> uint8 [n,h*f,w*f,3]; see the protocol."""
        if latents_NCHW.ndim != 4 or latents_NCHW.shape[1] != self.info.latent_channels:
            raise ValueError(f"latents must be [n,{self.info.latent_channels},h,w], not {list(latents_NCHW.shape)}")
        latents = latents_NCHW.to(self.device, self.dtype, non_blocking=True, memory_format=self._layout)
        pixels: torch.Tensor = self._vae.decode(latents, return_dict=False)[0].float()
        return pixels.add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().contiguous()
