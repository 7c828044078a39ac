"""Figures of single images: PSNR, SSIM and LPIPS of an image against its round trip, CLIP score against its prompt.

At the end stand the networks of one evaluation together, and the sums of what they say of many images.

PSNR and SSIM are torchmetrics'. LPIPS and CLIP score are written out here: torchmetrics' LPIPS is built from
torchvision's networks with downloaded weights, here both state dicts are local files and torchvision is not needed
(test_networks compares the two); its CLIP score reads features in a form that transformers 5 no longer gives.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from pipeline.codec.codec import Codec, load_codec, read_codec_info
from pipeline.codec.config import CodecConfig
from pipeline.errors import InputError, PipelineError, argument_keys
from pipeline.evaluate.classifier import Classifier, from_bytes
from pipeline.evaluate.config import ClipConfig, LpipsConfig
from pipeline.evaluate.figures import NetworkFacts
from pipeline.evaluate.inputs import SSIM_WINDOW, network_files
from pipeline.features import ExtractorConfig
from pipeline.features.networks import Extractor, load_extractor, load_state_dict
from pipeline.features.statistics import ClassSums, Features, FeatureStats, Sums

Images = npt.NDArray[np.uint8]
PAIRS_SHOWN = 24
SETTINGS_SHOWN = 20
PEAK = 255.0
PSNR_CEILING_DB = 100.0  # an identical pair has no finite PSNR; in the mean of images it counts as this


@dataclass(frozen=True)
class FidelitySums:
    """Sufficient statistics of a set of image pairs; `a + b` is the statistics of both sets."""

    values: int = 0
    squared_error: float = 0.0
    psnr_db: Sums = field(default_factory=Sums)
    ssim: Sums = field(default_factory=Sums)

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(
            self.values + other.values,
            self.squared_error + other.squared_error,
            self.psnr_db + other.psnr_db,
            self.ssim + other.ssim,
        )

    @property
    def n(self) -> int:
        """Number of pairs."""
        return self.psnr_db.n

    def pooled_psnr_db(self) -> float | None:
        """10 log10(255^2 / mean squared error over every value of every image); None for a perfect codec."""
        if self.values == 0:
            raise ValueError("there is no PSNR of no images")
        if self.squared_error == 0.0:
            return None
        return 10 * math.log10(PEAK**2 * self.values / self.squared_error)


def compare(images_NHWC: Tensor, decoded_NHWC: Tensor) -> FidelitySums:
    """The sums of one batch of pairs, uint8 [n,h,w,3] each; h and w at least 11."""
    if images_NHWC.shape != decoded_NHWC.shape or images_NHWC.ndim != 4:
        raise ValueError(
            f"pairs need one shape [n,h,w,c], got {list(images_NHWC.shape)} and {list(decoded_NHWC.shape)}"
        )
    if images_NHWC.dtype != torch.uint8 or decoded_NHWC.dtype != torch.uint8:
        raise ValueError(f"pairs are uint8, got {images_NHWC.dtype} and {decoded_NHWC.dtype}")
    if len(images_NHWC) == 0:
        return FidelitySums()
    x, y = images_NHWC.double(), decoded_NHWC.double()
    psnr_N = peak_signal_noise_ratio(y, x, data_range=PEAK, reduction="none", dim=(1, 2, 3))
    return FidelitySums(
        values=x.numel(),
        squared_error=float((x - y).square().sum()),
        psnr_db=Sums.of(psnr_N.clamp_max(PSNR_CEILING_DB).tolist()),
        ssim=Sums.of(ssim(images_NHWC, decoded_NHWC).tolist()),
    )


def ssim(images_NHWC: Tensor, decoded_NHWC: Tensor) -> Tensor:
    """Structural similarity of each pair, float32 [n]: mean over colour channels and over whole windows.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
    TIP 13 (2004), equation 13, with an 11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, L = 255. Windows
    that would leave the image do not count, as in the paper: torchmetrics' own mean has them, filled by reflection.
    Raises ValueError for images under 11 pixels.
    """
    height, width = images_NHWC.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, got {height}x{width}")
    x_NCHW, y_NCHW = (t.permute(0, 3, 1, 2).float() for t in (images_NHWC, decoded_NHWC))
    _, windows = structural_similarity_index_measure(
        y_NCHW, x_NCHW, data_range=PEAK, reduction="none", return_full_image=True
    )
    margin = SSIM_WINDOW // 2
    means: Tensor = windows[:, :, margin : height - margin, margin : width - margin].mean(dim=(1, 2, 3))
    return means


# Of LPIPS: how its release shifts and scales images in [-1, 1], the layers it taps (after the last ReLU of each
# convolutional stage) and their widths.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
EPS = 1e-10
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}


class Lpips:
    """How different two images look to a network; `digest` names backbone and linear weights together.

        d(x, y) = sum over layers l of  mean over places h, w of  || w_l * (fx_hw / |fx_hw| - fy_hw / |fy_hw|) ||^2

    Zhang, Isola, Efros, Shechtman, Wang 2018, equation 1, with the published linear weights w_l squared already (they
    are 1x1 convolutions on the squared differences).
    """

    def __init__(
        self, net: str, backbone: Mapping[str, Tensor], linear: Mapping[str, Tensor], *, device: str = "cpu"
    ) -> None:
        self.net, self.device = net, device
        self._features = backbone_of(net)
        own = {k.removeprefix("features."): v for k, v in backbone.items() if k.startswith("features.")}
        wanted = self._features.state_dict()
        self._features.load_state_dict({key: _fitting(own, key, wanted[key].shape) for key in wanted})
        self._features.requires_grad_(False).eval().to(device)
        self._linear = [
            _fitting(linear, f"lin{i}.model.1.weight", torch.Size([1, width, 1, 1])).float().to(device)
            for i, width in enumerate(WIDTHS[net])
        ]
        self._shift, self._scale = (torch.tensor(v, device=device).reshape(1, 3, 1, 1) for v in (SHIFT, SCALE))
        state = hashlib.sha256(net.encode())
        for tensor in (*self._features.state_dict().values(), *self._linear):
            state.update(tensor.cpu().contiguous().numpy().tobytes())
        self.digest = state.hexdigest()

    @classmethod
    def load(cls, net: str, backbone: str, linear: str, *, device: str = "cpu") -> Lpips:
        """From two files; InputError when one cannot be read or holds other tensors."""
        parts = (load_state_dict(backbone, "lpips.backbone"), load_state_dict(linear, "lpips.linear"))
        return cls(net, *parts, device=device)

    @torch.inference_mode()
    def __call__(self, images_NHWC: Tensor, decoded_NHWC: Tensor) -> npt.NDArray[np.float64]:
        """Distance of each pair of uint8 images [n, h, w, 3], float64 [n]."""
        total_N = torch.zeros(len(images_NHWC), device=self.device, dtype=torch.float64)
        x, y = (
            (v.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1 - self._shift) / self._scale
            for v in (images_NHWC, decoded_NHWC)
        )
        taps = iter(self._linear)
        for index, layer in enumerate(self._features):
            x, y = layer(x), layer(y)
            if index in TAPS[self.net]:
                unit_x, unit_y = (v / (v.square().sum(dim=1, keepdim=True).sqrt() + EPS) for v in (x, y))
                distance_NHW = ((unit_x - unit_y).square() * next(taps)).sum(dim=1)
                total_N += distance_NHW.mean(dim=(1, 2)).double()
        distances: npt.NDArray[np.float64] = total_N.cpu().numpy()
        return distances


def backbone_of(net: str) -> nn.Sequential:
    """The convolutional part of torchvision's AlexNet or VGG16 by its layers' places, so that its state dict fits."""
    layers: list[nn.Module] = []
    if net == "alex":
        for width, out, kernel, stride, padding in ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1)):
            layers += [nn.Conv2d(width, out, kernel, stride, padding), nn.ReLU(), nn.MaxPool2d(3, 2)]
        layers[-1:] = [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*layers)
    width = 3
    for out, count in zip(WIDTHS[net], (2, 2, 3, 3, 3), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(width, out, 3, padding=1), nn.ReLU()]
            width = out
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers[:-1])


def _fitting(tensors: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape:
        raise InputError(
            f"The LPIPS weights lack {name} of shape {list(shape)}",
            key="lpips",
            value=None if tensor is None else list(tensor.shape),
            rule="backbone: torchvision's AlexNet or VGG16; linear: the release's lin0.model.1.weight to lin4",
            next_step="give the files of the network that lpips.net names",
        )
    return tensor


class ClipScorer:
    """How well images fit their prompts, 100 max(cos(image, text), 0), by a CLIPModel of a local directory.

    Hessel, Holtzman, Forbes, Le Bras, Choi, "CLIPScore", 2021, equation 1, with the weight 100 that is usual for
    generated images in place of their 2.5. Images are brought into CLIP's form by its own processor: the short side
    resized (bicubic), the middle square cut out, the values normalised as preprocessor_config.json says, else as
    OpenAI's CLIP. InputError when the directory does not hold a whole model in safetensors and its tokenizer.
    """

    def __init__(self, path: str, *, device: str = "cpu") -> None:
        import transformers  # of an extra: only here is it needed

        verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            model, report = transformers.CLIPModel.from_pretrained(
                path, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
            if report["missing_keys"]:
                raise ValueError(f"its weights lack {sorted(report['missing_keys'])[0]}")
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            side = int(model.config.vision_config.image_size)
            sizes: dict[str, Any] = {
                "size": {"shortest_edge": side},
                "crop_size": {"height": side, "width": side},
            }
            processor = transformers.CLIPImageProcessorPil  # of two equal ones that which does not need torchvision
            own = Path(path, "preprocessor_config.json").exists()
            self._processor = (
                processor.from_pretrained(path, local_files_only=True, **sizes) if own else processor(**sizes)
            )
        except PipelineError:  # SIGTERM arrives as one
            raise
        except Exception as error:  # noqa: BLE001 - the library raises kinds of its own, undocumented, for damaged files
            raise InputError(
                f"The CLIP model cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
                key="clip.path",
                value=path,
                rule="a directory with a whole CLIPModel in safetensors and its tokenizer",
                next_step="copy the files again, or leave clip out",
            ) from None
        finally:
            transformers.logging.set_verbosity(verbosity)
        self._model = model.requires_grad_(False).eval().to(device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, images_NHWC: npt.NDArray[np.uint8], prompts: Sequence[str]) -> npt.NDArray[np.float64]:
        """The score of each image with its prompt, float64 [n]; prompts are cut to what the model can hold."""
        length = int(self._model.config.text_config.max_position_embeddings)
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        text_ND = self._model.get_text_features(
            input_ids=tokens["input_ids"].to(self._device), attention_mask=tokens["attention_mask"].to(self._device)
        ).pooler_output
        pixels = self._processor(images=list(images_NHWC), return_tensors="pt")["pixel_values"].to(self._device)
        image_ND = self._model.get_image_features(pixel_values=pixels).pooler_output
        cosine_N = functional.cosine_similarity(image_ND.double(), text_ND.double(), dim=1)
        scores: npt.NDArray[np.float64] = (100 * cosine_N.clamp_min(0)).cpu().numpy()
        return scores


# -- All networks that look at the images of one evaluation -----------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """What the networks say of a batch: labels [n], features [n, d], class probabilities [n, k]; None without one."""

    labels_N: npt.NDArray[np.int64] | None = None
    features_ND: Features | None = None
    probabilities_NK: Features | None = None


@dataclass(frozen=True)
class NetworkSpec:
    """Which networks look at images; a process that is asked several times loads them once.

    classifier: as `to_bytes` wrote it for `classifier_key`; digests: of the others' files, by configuration key.
    """

    extractor: ExtractorConfig
    clip: ClipConfig | None
    lpips: LpipsConfig | None
    codec: CodecConfig | None
    digests: tuple[tuple[str, str], ...]
    classifier_key: str
    device: str
    classifier: bytes | None = None


@dataclass(frozen=True)
class Networks:
    """The classifier fitted here sees classes; features come from `extractor` where one is given, else from it."""

    classifier: Classifier | None = None
    extractor: Extractor | None = None
    clip: ClipScorer | None = None
    lpips: Lpips | None = None
    codec: Codec | None = None

    def predict(self, images_NHWC: Images) -> Predictions:
        """Everything about a batch of uint8 images [n, h, w, 3], each network asked once."""
        labels = features = probabilities = None
        if self.classifier is not None:
            labels, features, probabilities = self.classifier.predict(images_NHWC)
        if self.extractor is not None:
            features, probabilities = self.extractor(images_NHWC)
        return Predictions(labels, features, probabilities)

    @property
    def facts(self) -> NetworkFacts:
        """What figures and report tell of them."""
        classifier, extractor, lpips = self.classifier, self.extractor, self.lpips
        space = extractor or classifier
        name = "in the feature space of the classifier fitted here (not Inception)"
        if extractor is not None:
            name = f"in the feature space of {extractor.name} (sha256 {extractor.digest[:12]})"
        return NetworkFacts(
            space_digest=space.digest if space else None,
            space_name=name,
            extractor=extractor.name if extractor else None,
            extractor_contract=extractor.contract if extractor else {},
            published=extractor is not None and extractor.published,
            classifier_digest=classifier.digest if classifier else None,
            fitted_on=classifier.fitted_on if classifier else 0,
            holdout=classifier.holdout if classifier else None,
            lpips=(lpips.net, lpips.digest) if lpips else None,
            clip=self.clip is not None,
        )


@lru_cache(maxsize=1)
def load_networks(spec: NetworkSpec) -> Networks:
    """The networks, on their device; InputError when a file is another one here than where the evaluation began."""
    here = network_files(spec.extractor, spec.lpips, spec.clip)
    if spec.codec is not None:
        with argument_keys("codec"):
            here["codec.path"] = read_codec_info(spec.codec).weights_sha256
    changed = sorted(key for key, digest in here.items() if dict(spec.digests)[key] != digest)
    if changed:
        raise InputError(
            "A network is another one than when the evaluation began",
            key=", ".join(changed),
            rule="networks stay as they are while they are used; all nodes of a cluster have the same files",
            next_step="copy the same files to every node, then run the same command again",
        )
    classifier = None if spec.classifier is None else from_bytes(spec.classifier, spec.classifier_key)
    if classifier is not None:
        classifier.net.to(spec.device)
    lpips, codec = spec.lpips, None
    if spec.codec is not None:
        settings = spec.codec.model_dump(include={"revision", "kind", "dtype", "compile", "channels_last"})
        codec = load_codec(spec.codec.path, **settings, device=spec.device)
    return Networks(
        classifier,
        load_extractor(spec.extractor, device=spec.device),
        ClipScorer(spec.clip.path, device=spec.device) if spec.clip else None,
        Lpips.load(lpips.net, lpips.backbone, lpips.linear, device=spec.device) if lpips else None,
        codec,
    )


# -- What they have found, as sums that merge by addition -------------------------------------------------------


@dataclass(frozen=True)
class RoundTrip:
    """What the codec does to real images; `pairs` are the first few (real, decoded), uint8 [h,w,3] each.

    `a + b` is that of both, but for the statistics of features, which are added up beside it.
    """

    sums: FidelitySums = field(default_factory=FidelitySums)
    real: FeatureStats | None = None
    decoded: FeatureStats | None = None
    lpips: Sums = field(default_factory=Sums)
    hits: int = 0
    judged: int = 0
    pairs: tuple[tuple[Images, Images], ...] = ()

    def __add__(self, other: RoundTrip) -> RoundTrip:
        return RoundTrip(
            self.sums + other.sums,
            lpips=self.lpips + other.lpips,
            hits=self.hits + other.hits,
            judged=self.judged + other.judged,
            pairs=(self.pairs + other.pairs)[:PAIRS_SHOWN],
        )


@dataclass(frozen=True)
class ShownSample:
    """A sample for the report: encoded bytes, caption, whether its class is the one asked for ("": not judged)."""

    encoded: bytes
    caption: str
    mark: Literal["", "right", "wrong"]


@dataclass(frozen=True)
class SampleResults:
    """What the networks say of the samples: features, and how often each class was seen where each was asked for.

    `a + b` is that of both, but for the statistics of features, which are added up beside it.
    """

    stats: FeatureStats | None = None
    classes: ClassSums | None = None
    clip: Sums = field(default_factory=Sums)
    seen: Counter[tuple[int, int]] = field(default_factory=Counter)  # (asked, seen) -> images
    unjudged: int = 0
    settings: dict[str, list[Any]] = field(default_factory=dict)  # of each the first SETTINGS_SHOWN values
    shown: dict[bytes, ShownSample] = field(default_factory=dict)

    def __add__(self, other: SampleResults) -> SampleResults:
        both = [classes for classes in (self.classes, other.classes) if classes is not None]
        settings = {
            name: sorted({*self.settings.get(name, ()), *other.settings.get(name, ())})[:SETTINGS_SHOWN]
            for name in sorted({*self.settings, *other.settings})
        }
        return SampleResults(
            classes=both[0] + both[1] if len(both) == 2 else next(iter(both), None),
            clip=self.clip + other.clip,
            seen=self.seen + other.seen,
            unjudged=self.unjudged + other.unjudged,
            settings=settings,
            shown=self.shown | other.shown,
        )

    @property
    def hits(self) -> int:
        return sum(count for (asked, seen), count in self.seen.items() if asked == seen)

    @property
    def judged(self) -> int:
        return sum(self.seen.values())
