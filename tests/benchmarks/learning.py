"""Proof on real pictures: does what the jobs train learn, as well as a plain loop, and without copying?

    python -m tests.benchmarks.learning [--data DIR] [--models unet2d dit] [--images N] [--samples 2000]
        [--quick] [--out DIR]

DIR holds train.parquet and heldout.parquet, {bytes, path} images of 32x32 with a label. The real jobs encode both
with a codec in closed form (`pca_codec`), train each model and draw from it; whatever is measured is measured here.

loss        flow loss of held-out latents at stratified uniform times, the same times and noise for all: of the job's
            export, of a plain torch loop with the same network, settings and count of images, and of the class-wise
            Gaussian denoiser, the best there is if every class is a Gaussian. Its covariances are as they are, or
            halfway to their mean over classes, whichever is better for the held-out pictures themselves. Bars: the
            job's below the Gaussian's; at most 1 % above the plain loop's.
frechet     of drawn pictures from held-out ones through the codec, in the features of a convolutional network with
            fixed random weights; of as many draws from the class Gaussians, and of training pictures. Bar: the
            model's below the Gaussians'.
neighbours  median distance to the nearest training picture in those features, and its ratio to the distance to the
            second nearest, which a copy makes small. Bar: drawn pictures no closer than held-out ones. The interval
            beside it tells what chance does: a perfect model, too, is a little closer half of the time.
spread      standard deviation of the latents of pictures, once more encoded. No bar: it explains the two others, for
            pictures of little contrast are near to all.

--quick, on a part of the data, shows that everything runs: no bar is to be met.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor, nn

from pipeline.codec.codec import Codec, load_codec
from pipeline.features.statistics import FeatureStats, Sums, frechet
from pipeline.latentloom.latents import open_latents
from pipeline.model.config import ModelConfig
from pipeline.model.load import build_model, load_model
from pipeline.store.read.dataset import Dataset
from pipeline.store.schema import latents_from
from pipeline.train.state import gamma_of
from tests.benchmarks import pca_codec
from tests.benchmarks.photographs import data_folder
from tests.benchmarks.report import table, write
from tests.support import jobs

CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Recipe:
    """A model's configuration and how it is trained; in small batches, for steps are what is short.

    sigma_rel: relative width of the average of weights (Karras et al. 2024); wide ones draw with less contrast after
    runs as short as these. shift: of the solver's times towards noise; below 1 its last steps are shorter. images:
    seen in training.
    """

    model: dict[str, Any]
    rate: float
    batch: int
    sigma_rel: float
    shift: float
    images: int


MODELS = {
    "unet2d": Recipe(
        {
            "kind": "unet2d",
            "block_out_channels": [64, 128],
            "layers_per_block": 1,
            "attention": [False, True],
        },
        rate=2e-3,
        batch=32,
        sigma_rel=0.02,
        shift=1.0,
        images=38_400,
    ),
    "dit": Recipe(
        {"kind": "dit", "hidden": 128, "depth": 6, "heads": 4, "patch": 1},
        rate=2e-3,
        batch=8,
        sigma_rel=0.003,
        shift=0.6,
        images=128_000,
    ),
}
WARMUP, DROPOUT, BETAS = 1600, 0.1, (0.9, 0.99)
STRATA = 4
# Of second order: 25 steps of euler keep 0.94 of the standard deviation even where model and data are the Gaussians.
SAMPLER, STEPS = "heun", 50
_MODEL: TypeAdapter[ModelConfig] = TypeAdapter(ModelConfig)

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LatentSet:
    """Normalised latents [n, c, h, w], their classes [n] and the pictures [n, h, w, 3] they decode to."""

    latents: Tensor
    labels: Tensor
    pictures: npt.NDArray[np.uint8]


class ClassGaussians:
    """A Gaussian for each class, over flat latents; shrink: how far covariances move to their mean over classes."""

    def __init__(self, data: LatentSet, shrink: float) -> None:
        flat = data.latents.double().flatten(1)
        classes = [flat[data.labels == k] for k in range(int(data.labels.max()) + 1)]
        covariances = torch.stack([rows.T.cov() for rows in classes])
        self.shape = data.latents.shape[1:]
        self.means_KD = torch.stack([rows.mean(0) for rows in classes])
        self.values_KD, self.vectors_KDD = torch.linalg.eigh(covariances.lerp(covariances.mean(0), shrink))
        self.values_KD.clamp_(min=0.0)

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """E[noise - x0 | x_t]: the least loss there is, if the classes are these Gaussians.

        With x_t = a x0 + t noise, a = 1 - t, and x0 ~ N(m, S): -m + (t - a S) (a^2 S + t^2)^-1 (x_t - a m).
        """
        t, a = t_B.double()[:, None], 1.0 - t_B.double()[:, None]
        out = torch.empty(x_BCHW.shape, dtype=torch.float64).flatten(1)
        for k in labels_B.unique().tolist():
            mine = labels_B == k
            s, basis = self.values_KD[k], self.vectors_KDD[k]
            y = (x_BCHW[mine].double().flatten(1) - a[mine] * self.means_KD[k]) @ basis
            gain = (t[mine] - a[mine] * s) / (a[mine].square() * s + t[mine].square())
            out[mine] = (gain * y) @ basis.T - self.means_KD[k]
        return out.reshape(x_BCHW.shape)

    def draw(self, labels_N: Tensor) -> Tensor:
        """A latent for each class asked, float32."""
        flat = torch.randn(len(labels_N), self.means_KD.shape[1], dtype=torch.float64)
        for k in labels_N.unique().tolist():
            mine = labels_N == k
            flat[mine] = self.means_KD[k] + (self.values_KD[k].sqrt() * flat[mine]) @ self.vectors_KDD[k].T
        return flat.float().reshape(-1, *self.shape)


@torch.no_grad()
def held_out_losses(predict: Predict, data: LatentSet) -> Tensor:
    """Flow loss of each latent [n], its mean over STRATA stratified uniform times; the same draws at every call."""
    draws, n = torch.Generator().manual_seed(1), len(data.latents)
    losses = torch.zeros(n, dtype=torch.float64)
    for j in range(STRATA):
        times = (j + torch.rand(n, generator=draws)) / STRATA
        noises = torch.randn(data.latents.shape, generator=draws)
        for rows in torch.arange(n).split(250):
            x0, noise, t = data.latents[rows], noises[rows], times[rows]
            at = t.view(-1, 1, 1, 1)
            error = predict((1 - at) * x0 + at * noise, t, data.labels[rows]) - (noise - x0)
            losses[rows] += error.double().square().mean(dim=(1, 2, 3)) / STRATA
    return losses


def plain_loop(model: nn.Module, data: LatentSet, images: int, recipe: Recipe) -> None:
    """Train as the job is told to, in thirty lines of torch; leaves the average in the model."""
    batch, gamma = recipe.batch, gamma_of(recipe.sigma_rel)
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=0.0)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    classes, order, decay = int(data.labels.max()) + 1, torch.randperm(len(data.latents)), images // 3
    for seen in range(batch, images + 1, batch):
        if len(order) < batch:
            order = torch.randperm(len(data.latents))
        rows, order = order[:batch], order[batch:]
        x0, noise, t = data.latents[rows], torch.randn_like(data.latents[rows]), torch.rand(batch)
        labels = torch.where(torch.rand(batch) < DROPOUT, classes, data.labels[rows])
        at = t.view(-1, 1, 1, 1)
        (model((1 - at) * x0 + at * noise, t, labels) - (noise - x0)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        into_decay = max(0.0, (seen - (images - decay)) / decay)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, seen / WARMUP) * 0.5 * (1 + math.cos(math.pi * into_decay))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, p in model.named_parameters():
                average[name].lerp_(p, 1 - (1 - batch / seen) ** (gamma + 1))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(average[name])


@torch.inference_mode()
def features(pictures_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """[n, 128]: channel means after three convolutions with weights drawn from seed 0 (He et al. 2015, eq. 10)."""
    draws, channels, layers = torch.Generator().manual_seed(0), 3, []
    for width in (64, 128, 128):
        weight = torch.randn(width, channels, 3, 3, generator=draws) * math.sqrt(2 / (9 * channels))
        layers.append(weight)
        channels = width
    parts = []
    for part in torch.from_numpy(pictures_NHWC).split(250):
        x = part.permute(0, 3, 1, 2).float() / 64 - 2
        for weight in layers:
            x = nn.functional.conv2d(x, weight, stride=2, padding=1).relu()
        parts.append(x.mean(dim=(2, 3)))
    return torch.cat(parts).numpy()


def distance(real: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> dict[str, float]:
    """Squared Frechet distance of two sets of features, with its 95 % interval."""
    sides = [FeatureStats.of(np.arange(len(side), dtype=np.uint64), side, 0) for side in (real, other)]
    found = frechet(*sides)
    return {"value": found.value, "low": found.low, "high": found.high}


def neighbours(asked: npt.NDArray[np.float32], training: npt.NDArray[np.float32]) -> dict[str, float]:
    """Median distance to the nearest training picture with its 95 % interval, and that over the second nearest."""
    near = torch.cdist(torch.from_numpy(asked), torch.from_numpy(training)).topk(2, largest=False).values.double()
    ratio = near[:, 0] / near[:, 1].clamp(min=1e-12)
    # By ranks: as many as lie below the median are n / 2, with a standard deviation of half the root of n.
    ordered, off = near[:, 0].sort().values, 1.96 * math.sqrt(len(near)) / 2
    low, high = (ordered[int(len(near) / 2 + sign * off)] for sign in (-1, 1))
    return {
        "distance": float(near[:, 0].median()),
        "low": float(low),
        "high": float(high),
        "ratio": float(ratio.median()),
        "ratio_1%": float(ratio.quantile(0.01)),
    }


class Bench:
    """The jobs on one folder of data, below one place."""

    def __init__(self, data: Path, place: Path, args: argparse.Namespace) -> None:
        self.place, self.args = place, args
        self.variables = {
            "PYTHONPATH": os.pathsep.join([str(jobs.REPOSITORY), str(pca_codec.install(place / "site"))])
        }
        self.files = {}
        for name in ("train", "heldout"):
            rows = pq.read_table(data / f"{name}.parquet")
            self.files[name] = place / f"{name}.parquet"
            # With --quick every tenth row, so that all classes stay.
            pq.write_table(rows.take(list(range(0, len(rows), 10))) if args.quick else rows, self.files[name])
        pca_codec.fit(place / "codec", pictures_in(self.files["train"]))
        sys.path.append(str(place / "site"))
        self.codec: Codec = load_codec(str(place / "codec"), kind=pca_codec.KIND)

    def job(self, name: str, settings: dict[str, Any]) -> float:
        """Run a job to its end; seconds."""
        file, began = self.place / f"{name}.yaml", time.monotonic()
        file.write_text(json.dumps({**settings, "tracking": {"enabled": False}, "cluster": {"dashboard": False}}))
        code, _, errors = jobs.run(name, file, cwd=self.place, timeout=7200, env=self.variables)
        if code:
            sys.exit(f"jobs.{name} ended with exit code {code}:\n{errors[-3000:]}")
        print(f"jobs.{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return time.monotonic() - began

    def encode(self, name: str) -> LatentSet:
        """The latents of a file, by the job; normalised by the training data's statistics."""
        self.job(
            "encode",
            {
                "source": {"kind": "parquet", "uri": str(self.files[name])},
                "image": {"resolution": 32, "multiple_of": pca_codec.PATCH},
                "codec": {"path": str(self.place / "codec"), "kind": pca_codec.KIND},
                "encode": {"batch_size": 256},
                "output": {"uri": str(self.place / name)},
            },
        )
        stored = open_latents(str(self.place / name))
        rows = stored.to_arrow(["latent", "label"])
        raw = torch.from_numpy(
            latents_from(rows["latent"], self.codec.info.latent_shape(32, 32), stored.latent_dtype)
        )
        dataset = open_latents(str(self.place / "train")).dataset
        mean, std = (torch.from_numpy(v).float().view(-1, 1, 1) for v in (dataset.channel_mean, dataset.channel_std))
        self.scale = mean, std
        latents = (raw - mean) / std
        return LatentSet(latents, torch.tensor(rows["label"].to_pylist()), self.pictures(latents))

    def pictures(self, latents: Tensor) -> npt.NDArray[np.uint8]:
        """Normalised latents through the codec."""
        mean, std = self.scale
        out: npt.NDArray[np.uint8] = self.codec.decode(latents * std + mean).numpy()
        return out

    def spread(self, pictures_NHWC: npt.NDArray[np.uint8]) -> float:
        """Standard deviation of the normalised latents of pictures, clipped to bytes: how much contrast they have."""
        mean, std = self.scale
        parts = torch.from_numpy(pictures_NHWC).split(1_000)
        return float(((torch.cat([self.codec.encode(part) for part in parts]) - mean) / std).std())

    def train(self, name: str, images: int) -> tuple[nn.Module, float]:
        """A model of the job's, as exported, and the job's seconds."""
        recipe = MODELS[name]
        seconds = self.job(
            "train",
            {
                "data": {"uri": str(self.place / "train")},
                "output": {"uri": str(self.place / name)},
                "model": recipe.model,
                "timesteps": {"density": "uniform"},
                "train": {
                    "images": images,
                    "batch_size": recipe.batch,
                    "device": "cpu",
                    "num_cpus": CORES,
                    "learning_rate": recipe.rate,
                    "warmup_images": WARMUP,
                    "decay_images": images // 3,
                    "betas": BETAS,
                    "label_dropout": DROPOUT,
                    "ema": [{"name": "ema", "sigma_rel": recipe.sigma_rel}],
                },
            },
        )
        return load_model(str(self.place / name / "model"))[0], seconds

    def sample(self, name: str, classes: int) -> tuple[npt.NDArray[np.uint8], Tensor]:
        """Pictures drawn by the job, without guidance, and their classes, in order of class."""
        place = self.place / f"{name}-samples"
        self.job(
            "sample",
            {
                "model": {"uri": str(self.place / name / "model")},
                "requests": {
                    "kind": "grid",
                    "classes": "all",
                    "count": self.args.samples // classes,
                    "steps": STEPS,
                },
                "sampler": {"name": SAMPLER, "shift": MODELS[name].shift},
                "batch_size": 100,
                "threads": CORES,
                "denoise": {"actors": 1, "num_gpus": 0},
                "decode": {"num_gpus": 0},
                "output": {"uri": str(place)},
            },
        )
        dataset: Dataset = Dataset.open_kind(str(place), "images")
        rows = [row for group in range(len(dataset.row_groups)) for row in dataset.read(group, None).to_pylist()]
        rows.sort(key=lambda row: (row["label"], row["seed"]))
        return np.stack([pixels(row["image"]) for row in rows]), torch.tensor([row["label"] for row in rows])


def pixels(data: bytes) -> npt.NDArray[np.uint8]:
    """An image file as uint8 [h, w, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def pictures_in(file: Path) -> npt.NDArray[np.uint8]:
    """All images of a Parquet file, uint8 [n, h, w, 3]."""
    return np.stack([pixels(image["bytes"]) for image in pq.read_table(file, columns=["image"])["image"].to_pylist()])


def sheet(columns: Sequence[tuple[npt.NDArray[np.uint8], Tensor]], per_class: int = 4) -> Image.Image:
    """A row a class; for each set of pictures some of that class, a white gap between sets."""
    rows = []
    for k in columns[0][1].unique().tolist():
        parts: list[npt.NDArray[np.uint8]] = []
        for images, labels in columns:
            chosen = images[labels.numpy() == k][:per_class]
            parts += [*chosen, np.full((chosen.shape[1], 8, 3), 255, np.uint8)]
        rows.append(np.concatenate(parts[:-1], axis=1))
    return Image.fromarray(np.concatenate(rows))


def measure(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """All figures; the sample sheet to args.out."""
    training, held = bench.encode("train"), bench.encode("heldout")
    originals = pictures_in(bench.files["heldout"])
    trip = bench.codec.decode(bench.codec.encode(torch.from_numpy(originals))).numpy()
    psnr = -10 * math.log10(np.square(trip / 255.0 - originals / 255.0).mean())
    classes = int(training.labels.max()) + 1

    # The Gaussians get the shrinkage that suits the very pictures they are asked about.
    by_shrink = {s: ClassGaussians(training, s) for s in (0.0, 0.5)}
    losses = {s: float(held_out_losses(one, held).mean()) for s, one in by_shrink.items()}
    shrink = min(losses, key=losses.__getitem__)
    torch.manual_seed(2)
    asked = torch.arange(args.samples // classes * classes) // (args.samples // classes)
    gaussian = bench.pictures(by_shrink[shrink].draw(asked))
    spread = torch.randperm(len(training.latents))[: len(asked)].numpy()
    real, known = features(held.pictures), features(training.pictures)
    figures: dict[str, Any] = {
        "data": {"train": len(training.latents), "heldout": len(held.latents), "codec_psnr_db": psnr},
        "gaussian": {
            "loss": losses[shrink],
            "loss_by_shrink": losses,
            "frechet": distance(real, features(gaussian)),
            "neighbours": neighbours(features(gaussian), known),
            "spread": bench.spread(gaussian),
        },
        "training_pictures": {"frechet": distance(real, known[spread])},
        "heldout_pictures": {"neighbours": neighbours(real, known), "spread": bench.spread(held.pictures)},
        "models": {},
    }
    shown = []
    for name in args.models:
        images = args.images or MODELS[name].images
        ours, seconds = bench.train(name, images)
        torch.manual_seed(0)  # as the job does: both begin with the same weights
        plain = build_model(
            _MODEL.validate_python(MODELS[name].model, strict=False),
            latent_channels=pca_codec.CHANNELS,
            num_classes=classes,
            text_dim=None,
        )
        began = time.monotonic()
        plain_loop(plain, training, images, MODELS[name])
        plain_s = time.monotonic() - began
        print(f"plain loop: {plain_s:.0f} s", file=sys.stderr, flush=True)
        of_ours, of_plain = held_out_losses(ours, held), held_out_losses(plain.eval(), held)
        gap = Sums.of((of_ours - of_plain).tolist()).mean()
        drawn, labels = bench.sample(name, classes)
        shown.append((drawn, labels))
        figures["models"][name] = {
            "images": images,
            "loss": float(of_ours.mean()),
            "plain_loss": float(of_plain.mean()),
            "gap": [gap.value, gap.low, gap.high],
            "frechet": distance(real, features(drawn)),
            "neighbours": neighbours(features(drawn), known),
            "spread": bench.spread(drawn),
            "job_s": seconds,
            "plain_s": plain_s,
        }
    figures["bars"] = bars(figures)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        sheet([*shown, (gaussian, asked), (held.pictures, held.labels)]).save(
            args.out / "learning.png", optimize=True
        )
    return figures


def bars(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to hold for every model: a value, the most or least it may be, whether it holds."""
    out = []
    gaussian, held = figures["gaussian"], figures["heldout_pictures"]["neighbours"]
    for name, model in figures["models"].items():
        for what, value, most in (
            ("held-out loss below the class Gaussians'", model["loss"], gaussian["loss"]),
            ("held-out loss within 1 % of a plain loop's", model["loss"], 1.01 * model["plain_loss"]),
            ("Frechet distance below the class Gaussians'", model["frechet"]["value"], gaussian["frechet"]["value"]),
            ("nearest training picture no closer than held-out's", held["distance"], model["neighbours"]["distance"]),
        ):
            out.append({"model": name, "bar": what, "value": value, "most": most, "holds": value <= most})
    return out


def show(figures: dict[str, Any]) -> None:
    """The tables."""
    rows: list[list[object]] = []
    for name, of in [*figures["models"].items(), ("class Gaussians", figures["gaussian"])]:
        rows.append([name, f"{of['loss']:.4f}", of["frechet"]["value"], *_near(of), of["spread"]])
        if "plain_loss" in of:
            rows.append([f"{name}, plain loop", f"{of['plain_loss']:.4f}", "", "", "", "", ""])
    held = figures["heldout_pictures"]
    rows.append(["held-out pictures", "", "", *_near(held), held["spread"]])
    rows.append(["training pictures", "", figures["training_pictures"]["frechet"]["value"], "", "", "", ""])
    print(table(["", "held-out loss", "Frechet", "nearest", "nearest/second", "1 %", "spread"], rows))
    print()
    told = [
        [f"{b['model']}: {b['bar']}", f"{b['value']:.4f}", f"{b['most']:.4f}", b["holds"]] for b in figures["bars"]
    ]
    print(table(["bar", "value", "at most", "holds"], told))


def _near(of: dict[str, Any]) -> list[object]:
    near = of["neighbours"]
    return [f"{near['distance']:.3f} [{near['low']:.3f}, {near['high']:.3f}]", near["ratio"], near["ratio_1%"]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, show, write; exit code 1 when a bar does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.parquet and heldout.parquet; the tests' without")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--images", type=int, help="seen by each model, in training; each its own count without")
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    base = data_folder()
    data = args.data or (base / "cifar10" if base else None)
    if data is None or not all((data / f"{name}.parquet").is_file() for name in ("train", "heldout")):
        parser.error(f"--data {data}: no folder with train.parquet and heldout.parquet in it")
    if args.quick:
        args.images, args.samples, args.models = 1_280, 100, args.models[:1]
    with tempfile.TemporaryDirectory() as place:
        figures = measure(Bench(data, Path(place), args), args)
    show(figures)
    write(args.out, "learning", figures)
    if not args.quick and not all(bar["holds"] for bar in figures["bars"]):
        sys.exit("A bar does not hold.")


if __name__ == "__main__":
    main()
