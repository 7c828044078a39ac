"""A codec: its protocol, what is known of one without loading it, and the one function that opens one.

Torch is imported when a codec is loaded.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from pipeline.codec.files import codec_files, codec_root, local_directory, weight_files
from pipeline.errors import ConfigError, InputError
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root
from pipeline.storage.trust import batch_norm_scale, check_sizes, only_these

if TYPE_CHECKING:
    import torch

    from pipeline.codec.config import CodecConfig


_AMPERE = 8  # compute capability from which bfloat16 is native
# diffusers class -> (module that defines it, config key whose length gives the factor, has a posterior)
DIFFUSERS_CLASSES = {
    "AutoencoderKL": ("autoencoder_kl", "block_out_channels", True),
    "AutoencoderKLFlux2": ("autoencoder_kl_flux2", "block_out_channels", True),
    "AutoencoderTiny": ("autoencoder_tiny", "encoder_block_out_channels", False),
    "AutoencoderDC": ("autoencoder_dc", "encoder_block_out_channels", False),
}
# Classes whose models read squares of so many latent pixels to a side as the channels of one, as `pixel_unshuffle`
# orders them; their latents are stored in that form, for it is the one that is normalised channel by channel.
SQUARES = {"AutoencoderKLFlux2": 2}
_MAX_CHANNELS, _MAX_DEPTH = 1 << 12, 16  # of latents; levels of halved sides
FITTED = (
    "fit_codec.complete.json"  # in a codec that jobs.fit_codec made: which weights those are, which run made them
)


@dataclass(frozen=True)
class CodecInfo:
    """Identity and shape of a codec.

    `config` is what the codec's own file says (without its private keys); `weights_sha256` is the hash of
    the weight file, or of the list of hashes when there are several. `latents_mean`/`latents_std` are per
    channel of the *raw* latent, when the codec declares them. A model trains on
    `(latent - shift_factor) * scaling_factor`.
    """

    class_name: str
    config: dict[str, Any]
    weights_sha256: str
    latent_channels: int
    factor: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    has_posterior: bool = True

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[c, h, w] of the latent of a height x width image; ValueError unless the factor divides both."""
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise ValueError(f"{height}x{width} pixels are no multiple of the codec's factor {self.factor}")
        return self.latent_channels, height // self.factor, width // self.factor

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-ready data, read back by `from_dict`."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CodecInfo:
        """The inverse of `as_dict`; other keys (a path, a note) are left aside."""
        known = {k: data[k] for k in cls.__dataclass_fields__ if k in data}
        for key in ("latents_mean", "latents_std"):
            if known.get(key) is not None:
                known[key] = tuple(known[key])
        return cls(**known)

    def resolved_config(self) -> dict[str, Any]:
        """`config` completed by the defaults of the installed diffusers class, and by squares that are stored."""
        defaults = class_defaults(self.class_name) if self.class_name in DIFFUSERS_CLASSES else {}
        # Part of a dataset's fingerprint: rows of another form than those that are there are not added to them.
        squares = {"squares": SQUARES[self.class_name]} if self.class_name in SQUARES else {}
        return {**defaults, **self.config, **squares}


def read_codec_info(codec: CodecConfig) -> CodecInfo:
    """The information of the configured codec; InputError names what is missing, broken or refused."""
    return codec_info(codec.path, codec.revision, codec.kind)


def gpu_dtype(info: CodecInfo, *, bfloat16: bool) -> str:
    """What `codec.dtype=auto` stands for on a GPU: bfloat16 where it computes in that (Ampere and later).

    On an older one float16, unless the codec says that it overflows in it (`force_upcast`), else float32.
    """
    if bfloat16:
        return "bfloat16"
    return "float32" if info.config.get("force_upcast") else "float16"


def codec_info(path: str, revision: str | None = None, kind: str = "auto") -> CodecInfo:
    """Like `read_codec_info`, from plain values. Reads every weight byte once, in chunks."""
    if kind != "auto":
        return find_plugin(kind).read_info(path, revision)
    try:
        return diffusers_info(codec_root(path, revision), path)
    except storage_errors() as error:
        raise InputError(
            f"The codec cannot be read: {describe(error)}",
            key="path",
            value=path,
            next_step="check the URI, the permissions and the credentials",
        ) from error


def diffusers_info(root: Root, path: str) -> CodecInfo:
    """The information of a codec in diffusers layout at `root`; `path` is what the user wrote."""
    raw = _read_config(root, path)
    class_name = raw.get("_class_name")
    if not isinstance(class_name, str) or class_name not in DIFFUSERS_CLASSES:
        raise InputError(
            f"The codec's config.json declares the class {class_name!r}",
            key="path",
            value=path,
            rule=f"known classes are {', '.join(DIFFUSERS_CLASSES)}",
            next_step="use one of these, or plug the codec in through the entry point group latentloom.codecs",
        )
    files = weight_files(root, path)
    config = {k: v for k, v in raw.items() if not k.startswith("_")}
    resolved = {**class_defaults(class_name), **config}
    _, factor_key, has_posterior = DIFFUSERS_CLASSES[class_name]
    # Of several files the hash is that of the list that sha256sum prints.
    listing = "".join(f"{f.sha256}  {f.name}\n" for f in files)
    sha256 = files[0].sha256 if len(files) == 1 else hashlib.sha256(listing.encode()).hexdigest()
    mean, std = resolved.get("latents_mean"), resolved.get("latents_std")
    try:
        check_sizes(config)
        side = SQUARES.get(class_name, 1)
        channels, levels = int(resolved["latent_channels"]) * side**2, len(resolved[factor_key])
        if not 0 < channels <= _MAX_CHANNELS or not 0 < levels <= _MAX_DEPTH:
            raise ValueError(f"latent_channels or {factor_key} are out of all bounds")
        if class_name == "AutoencoderKLFlux2":
            names, eps = [f.name for f in files], float(resolved["batch_norm_eps"])
            mean, std = batch_norm_scale(root, names, eps, path)
            if len(mean) != channels:
                raise ValueError(f"its batch norm is none of {channels} channels")
        return CodecInfo(
            class_name=class_name,
            config=config,
            weights_sha256=sha256,
            latent_channels=channels,
            factor=int(2 ** (levels - 1)) * side,
            scaling_factor=float(resolved.get("scaling_factor") or 1.0),
            shift_factor=float(resolved.get("shift_factor") or 0.0),
            latents_mean=None if mean is None else tuple(float(v) for v in mean),
            latents_std=None if std is None else tuple(float(v) for v in std),
            has_posterior=has_posterior,
        )
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"The codec's config.json cannot be understood: {error!r}"[:500],
            key="path",
            value=path,
            rule="the fields that a diffusers autoencoder is saved with",
            next_step="save the codec again with save_pretrained",
        ) from error


def fitted_by(path: str, weights_sha256: str) -> str | None:
    """The MLflow run that fitted the codec in a directory of jobs.fit_codec, if these are the weights it made."""
    root = Root(path) if "://" in path or Path(path).is_dir() else None
    if root is None or not root.exists(FITTED):
        return None
    try:
        record = json.loads(root.read_bytes(FITTED))
        return str(record["run_id"]) if record["weights_sha256"] == weights_sha256 and record["run_id"] else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # no record of ours: then nothing is known about the codec's origin


def check_posterior(info: CodecInfo, posterior: str) -> None:
    """ConfigError when the codec cannot give this posterior; ValueError when nobody can."""
    if posterior not in ("mode", "sample", "moments"):
        raise ValueError(f"posterior must be mode, sample or moments, not {posterior!r}")
    if posterior != "mode" and not info.has_posterior:
        raise ConfigError(
            f"{info.class_name} has no posterior: one image has one latent",
            key="posterior",
            value=posterior,
            next_step="set posterior=mode",
        )


def check_dtype(info: CodecInfo, dtype: str) -> None:
    """ConfigError for float16 where the codec's own config.json says that it overflows in it.

    Only what the file says counts: the class default is true, but codecs that leave the key out (SD 1.x) are sound.
    """
    if dtype == "float16" and info.config.get("force_upcast"):
        raise ConfigError(
            "The codec may overflow in float16: its config.json says force_upcast",
            key="dtype",
            value=dtype,
            rule="such a codec is computed in bfloat16 or float32",
            next_step="set dtype=auto, bfloat16 or float32; diffusers writes the key for every AutoencoderKL "
            'that does not deny it, so a codec known to be sound may say "force_upcast": false in its config.json',
        )


def _read_config(root: Root, path: str) -> dict[str, Any]:
    try:
        data = json.loads(root.read_bytes("config.json"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The codec's config.json is no valid JSON: {error}",
            key="path",
            value=path,
            rule="a JSON object",
            next_step="save the codec again with save_pretrained",
        ) from error
    if not isinstance(data, dict):
        raise InputError(
            "The codec's config.json holds no JSON object",
            key="path",
            value=path,
            rule="a JSON object",
            next_step="save the codec again with save_pretrained",
        )
    return data


@cache
def class_defaults(class_name: str) -> dict[str, Any]:
    """Constructor defaults of a diffusers class, read from its source so that torch is not imported.

    Old config.json files leave out keys that came later (SD 1.x has no scaling_factor); diffusers fills
    them from here, and so do we.
    """
    module, _, _ = DIFFUSERS_CLASSES[class_name]
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("The package diffusers is not installed", next_step="pip install diffusers")
    source = Path(spec.submodule_search_locations[0]) / "models" / "autoencoders" / f"{module}.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    init = next(n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    names = [a.arg for a in init.args.args]
    with_default = zip(names[len(names) - len(init.args.defaults) :], init.args.defaults, strict=True)
    return {name: ast.literal_eval(default) for name, default in with_default}


# -- Third-party codecs: a Python entry point of the group `latentloom.codecs`, chosen by `codec.kind` ---------
#
# A package offers its codec in its own metadata:
#
#     [project.entry-points."latentloom.codecs"]
#     mycodec = "mypackage.codec:plugin"
#
# where `plugin` is any object with the two methods of `CodecPlugin`: `read_info`, which should import no torch
# so that a dry run stays quick, and `load`, which returns a `pipeline.codec.codec.Codec`. Nothing in the
# pipeline changes: `codec.kind=mycodec` selects it, `codec.path` and `codec.revision` are handed to it as
# written. `weights_sha256` of its info must change when its weights do: the fingerprint rests on it.


GROUP = "latentloom.codecs"


class CodecPlugin(Protocol):
    """What an entry point of the group must provide."""

    def read_info(self, path: str, revision: str | None) -> CodecInfo:
        """Identity and shape of the codec at `path`; InputError when it cannot be read."""
        ...

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
    ) -> Codec:
        """The codec on `device`, in arithmetic `dtype` ("float32", "bfloat16" or "float16")."""
        ...


def find_plugin(kind: str) -> CodecPlugin:
    """The plug-in called `kind`; ConfigError when there is none, InputError when it cannot be imported."""
    from pipeline.config import (
        installed_plugin,  # where diffusers' own codecs are used, nothing of pydantic is needed
    )

    point = installed_plugin(GROUP, kind, key="kind", others=("auto",))
    try:
        plugin = point.load()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"The codec plug-in cannot be imported: {error}",
            key="kind",
            value=kind,
            next_step=f"repair {point.value}",
        ) from error
    missing = [name for name in ("read_info", "load") if not callable(getattr(plugin, name, None))]
    if missing:
        raise InputError(
            f"The codec plug-in {point.value} lacks the method {' and '.join(missing)}",
            key="kind",
            value=kind,
            rule="a plug-in has read_info(path, revision) and load(path, revision, info, ...)",
        )
    return cast(CodecPlugin, plugin)


# -- Floating-point operations of encoding and decoding one image, counted by running the codec on shapes alone
#
# Convolutions, linear layers and attention products count, two per multiply-add; norms, activations and resizing do
# not (well under 1 %). The model lives on torch's meta device: no weights, no memory, no time.


def encode_flops(info: CodecInfo, height: int, width: int) -> int | None:
    """FLOPs to encode one height x width image; None for a plug-in's class, which is not built here."""
    info.latent_shape(height, width)
    return _count(info, "encode", (3, height, width))


def decode_flops(info: CodecInfo, height: int, width: int) -> int | None:
    """FLOPs to decode one latent to height x width pixels; None for a plug-in's class."""
    return _count(info, "decode", info.latent_shape(height, width))


def _count(info: CodecInfo, method: str, shape_CHW: tuple[int, int, int]) -> int | None:
    if info.class_name not in DIFFUSERS_CLASSES:
        return None
    # Only a dry run counts: the jobs that import this module answer --help and unchanged re-runs without torch.
    import diffusers
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    side = SQUARES.get(info.class_name, 1)
    with torch.device("meta"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        vae = getattr(diffusers, info.class_name).from_config(info.config).eval()
        given = torch.empty(1, *shape_CHW)
        if method == "decode":
            given = torch.nn.functional.pixel_shuffle(given, side)
        with FlopCounterMode(display=False) as counter:
            getattr(vae, method)(given)
    return int(counter.get_total_flops())


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
