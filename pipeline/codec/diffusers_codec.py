"""diffusers' autoencoders as codecs: AutoencoderKL (SD, SDXL, SD3, FLUX), FLUX.2, Tiny and DC."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pipeline.codec.codec import SQUARES, CodecInfo, check_dtype, check_posterior, diffusers_info
from pipeline.codec.files import codec_root, local_directory
from pipeline.diffusion.samplers import compile_for_shapes
from pipeline.errors import InputError
from pipeline.storage.root import Root

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What the constructor of an autoencoder makes of a configuration that is not its own.
_UNFIT = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, MemoryError)
_COMPILED_SHAPES = 64  # aspect-ratio buckets; beyond torch's own limit of eight the rest would not be compiled


def import_networks(*, compiled: bool) -> None:
    """Import what diffusers' networks need, in a process that runs one of them and nothing else of diffusers.

    Where transformers, peft, accelerate or scipy are installed, diffusers takes them along, which is a third of the
    seconds that its import takes, and a network needs none of them. In this process diffusers takes them for absent
    from now on; whoever else imports them gets them. torch's compiler, which takes as long, is imported only for what
    is `compiled`. No effect where diffusers is imported already.
    """
    if "diffusers" in sys.modules:
        return
    packages = ("transformers", "peft", "accelerate", "scipy", *(() if compiled else ("torch._dynamo",)))
    hidden = [name for name in packages if name not in sys.modules]
    disable = torch.compiler.disable
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(hidden))  # None: as if it were not installed
    if not compiled:
        torch.compiler.disable = _as_it_is  # torch's own imports the compiler, to say what is never to be compiled
    try:
        import diffusers.models.autoencoders  # noqa: F401
    finally:
        torch.compiler.disable = disable
        for name in hidden:
            del sys.modules[name]


def _as_it_is(fn: Any = None, *_: Any, **__: Any) -> Any:
    return fn if fn is not None else _as_it_is


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
        self._square = SQUARES.get(info.class_name, 1)
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
            return self._stored(encoded)
        if posterior == "mode":
            return self._stored(encoded.mode())
        mean, logvar = self._stored(encoded.mean), self._stored(encoded.logvar)
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
        latents = pixel_shuffle(latents_NCHW.to(self.device, self.dtype, non_blocking=True), self._square)
        latents = latents.contiguous(memory_format=self._layout)
        pixels: torch.Tensor = self._vae.decode(latents, return_dict=False)[0].float()
        return pixels.add(1).mul(127.5).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _stored(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        return pixel_unshuffle(latents_NCHW.float(), self._square).contiguous()


def write_scaled(path: str, revision: str | None, mean: Sequence[float], std: Sequence[float], folder: Path) -> str:
    """Write the codec at `path` so that diffusers' pipelines decode latents normalised as (raw - mean) / std.

    Its own scale and shift stay where they say just that. Else they become 1 and 0, and the affine map goes exactly
    into the 1x1 convolutions behind the encoder and before the decoder, which are made where the codec has none; of
    FLUX.2's it is the statistics of the batch norm. Returns the class; InputError for a codec without such a place.
    """
    directory = local_directory(codec_root(path, revision))
    codec = DiffusersCodec.load(directory, diffusers_info(Root(str(directory)), path), name=path)
    vae, info = codec._vae, codec.info
    own_mean = info.latents_mean or (info.shift_factor,) * info.latent_channels
    own_std = [value / info.scaling_factor for value in info.latents_std or (1.0,) * info.latent_channels]
    if not (np.allclose(own_mean, mean, rtol=1e-6, atol=1e-9) and np.allclose(own_std, std, rtol=1e-6)):
        if info.class_name == "AutoencoderKLFlux2":
            vae.register_to_config(batch_norm_eps=0.0)  # which is added to a variance, however small
            vae.bn.running_mean.copy_(torch.tensor(mean, dtype=torch.float64))
            vae.bn.running_var.copy_(torch.tensor(std, dtype=torch.float64).square())
        elif info.class_name == "AutoencoderKL":
            vae = _rescaled(vae, mean, std)
        else:
            raise InputError(
                "This codec cannot take another scale of its latents exactly",
                key="codec.path",
                value=path,
                rule="an AutoencoderKL takes one in 1x1 convolutions at its latents, FLUX.2's in its batch norm",
                next_step="train with data.normalise=codec for a pipeline that diffusers loads",
            )
    vae.save_pretrained(folder, safe_serialization=True, max_shard_size="100TB")
    return info.class_name


@torch.no_grad()
def _rescaled(vae: Any, mean: Sequence[float], std: Sequence[float]) -> Any:
    channels = len(mean)
    config = {**vae.config, "scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
    out = type(vae).from_config({**config, "use_quant_conv": True, "use_post_quant_conv": True})
    for name, size in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if getattr(vae, name, None) is None:  # the identity
            convolution = getattr(out, name)
            convolution.weight.copy_(torch.eye(size)[:, :, None, None])
            convolution.bias.zero_()
    out.load_state_dict(vae.state_dict(), strict=False)
    shift, scale = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    # Encoder: mean' = (mean - shift) / scale, log variance' = log variance - 2 log scale.
    weight, bias = out.quant_conv.weight.double(), out.quant_conv.bias.double()
    weight[:channels] /= scale[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) / scale
    bias[channels:] -= 2 * scale.log()
    out.quant_conv.weight.copy_(weight)
    out.quant_conv.bias.copy_(bias)
    # Decoder: what it sees is latent * scale + shift.
    weight, bias = out.post_quant_conv.weight.double(), out.post_quant_conv.bias.double()
    out.post_quant_conv.bias.copy_(bias + (weight[:, :, 0, 0] @ shift))
    out.post_quant_conv.weight.copy_(weight * scale[None, :, None, None])
    return out.eval()
