"""Everything a checkpoint holds: tensors by name, and a small JSON value.

    tensors   model/<parameter or buffer>   ema/<track>/<parameter>   optimizer/<slot>/<parameter>
    meta      format version, step, images, seed, the open logging window, skip counters, run identity

There is no generator state: all randomness is keyed by (seed, sample id, epoch), so the seed is the whole of it;
the stream's position is a function of the step. There is no schedule state: the rate is a function of images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ConflictError, InputError
from pipeline.storage.root import Root

if TYPE_CHECKING:
    from pipeline.model.checkpoints import Complete

# -- Averages of the weights: named tracks, each one dict of float32 tensors under the parameters' own names ---
#
# Two kinds of track. *Power function* (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
# Diffusion Models", section 3.1): weight proportional to t^gamma for the weights of time t, so the average's
# length is a fixed share `sigma_rel` of the training so far; and because such profiles span a space, tracks of
# any other length can be rebuilt after the run from stored snapshots (`reconstruction`). *Half-life*:
# exponential, its half-life in images, shortened early on to a share of the images seen.


@dataclass(frozen=True)
class Track:
    """One average: exactly one of `sigma_rel` (0 to 0.28, relative) and `half_life_images` is set."""

    name: str
    sigma_rel: float | None = None
    half_life_images: float | None = None
    ramp_ratio: float = 0.05

    def __post_init__(self) -> None:
        if (self.sigma_rel is None) == (self.half_life_images is None):
            raise ValueError(f"EMA track {self.name!r} needs exactly one of sigma_rel and half_life_images")

    def decay(self, images: int, batch: int) -> float:
        """Share of the old average that survives the step which brought the count to `images`."""
        if self.sigma_rel is not None:
            return float((1.0 - batch / images) ** (gamma_of(self.sigma_rel) + 1.0))
        assert self.half_life_images is not None
        # At the very start the half-life is a share of what was seen: the average forgets the random weights.
        half_life = min(self.half_life_images, images * self.ramp_ratio)
        return float(0.5 ** (batch / max(half_life, 1e-8)))


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma whose profile t^gamma has relative width `sigma_rel`.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)); the largest real root of that cubic in gamma.
    Raises ValueError outside (0, 0.2886): at gamma = 0, a flat average, the width is 12 ** -0.5.
    """
    if not 0.0 < sigma_rel < 12**-0.5:
        raise ValueError(f"sigma_rel {sigma_rel} is outside (0, 0.2886)")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(r.real for r in roots if abs(r.imag) < 1e-6 * max(1.0, abs(r.real))))


def sigma_of(gamma: float) -> float:
    """Relative width of the profile t^gamma; the inverse of `gamma_of`."""
    return float(((gamma + 1.0) / ((gamma + 2.0) ** 2 * (gamma + 3.0))) ** 0.5)


class Ema:
    """Tracks over one set of named parameters; under FSDP2 the averages are DTensors sharded alike."""

    def __init__(self, tracks: Sequence[Track], params: Mapping[str, Tensor]) -> None:
        self.tracks = tuple(tracks)
        if len({t.name for t in self.tracks}) != len(self.tracks):
            raise ValueError(f"two EMA tracks share a name: {[t.name for t in self.tracks]}")
        # The average of nothing is the first weights; both kinds of track forget them at their own pace.
        self.averages: dict[str, dict[str, Tensor]] = {
            t.name: {k: p.detach().to(torch.float32, copy=True) for k, p in params.items()} for t in self.tracks
        }

    @torch.no_grad()
    def update(self, params: Mapping[str, Tensor], images: int, batch: int) -> None:
        """Move every track towards `params` after the step that brought the count to `images`."""
        for track in self.tracks:
            average = self.averages[track.name]
            now = [params[k].detach().to(torch.float32) for k in average]
            torch._foreach_lerp_(list(average.values()), now, 1.0 - track.decay(images, batch))

    def tensors(self) -> dict[str, Tensor]:
        """Every average as "track/parameter": what a checkpoint holds, by reference."""
        return {f"{t}/{k}": v for t, average in self.averages.items() for k, v in average.items()}

    @contextmanager
    def swapped(self, params: Mapping[str, Tensor], name: str | None) -> Iterator[None]:
        """The parameters hold the named average inside the block (None: themselves) and their own after it."""
        if name is None:
            yield
            return
        kept = {k: p.detach().clone() for k, p in params.items()}
        _assign(params, self.averages[name])
        try:
            yield
        finally:
            _assign(params, kept)


@torch.no_grad()
def _assign(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for key, param in params.items():
        param.copy_(values[key])


def reconstruction(snapshots: Sequence[tuple[float, int]], sigma_rel: float, images: int) -> np.ndarray:
    """Weights [n] whose sum over stored snapshots best equals the average of width `sigma_rel` at `images`.

    snapshots: (sigma_rel, images) of each stored power-function average. Least squares between profiles
    p(t) = (gamma + 1) t^gamma / T^(gamma + 1) on [0, T] (Karras et al. 2024, section 3.2), whose inner products
    are closed forms. Snapshots later than `images` are refused with ValueError: they saw other weights.
    """
    if not snapshots or max(t for _, t in snapshots) > images:
        raise ValueError(f"an average at {images} images needs snapshots at or before it, got {list(snapshots)}")
    # Times are taken relative to the target's, so that t^gamma never overflows.
    gammas = np.array([gamma_of(s) for s, _ in snapshots] + [gamma_of(sigma_rel)])
    ends = np.array([t for _, t in snapshots] + [images], dtype=np.float64) / images
    gi, gj, ti, tj = gammas[:, None], gammas[None, :], ends[:, None], ends[None, :]
    first = np.minimum(ti, tj)
    # (first / ti)^gi * (first / tj)^gj * first / (ti * tj): every base is at most 1.
    products = (gi + 1) * (gj + 1) / (gi + gj + 1) * (first / ti) ** gi * (first / tj) ** gj * first / (ti * tj)
    n = len(snapshots)
    weights: np.ndarray = np.linalg.lstsq(products[:n, :n], products[:n, n], rcond=1e-14)[0]
    return weights


@torch.no_grad()
def combine(snapshots: Sequence[Mapping[str, Tensor]], weights: np.ndarray) -> dict[str, Tensor]:
    """The weighted sum of snapshots, summed in float64 and returned as float32."""
    out: dict[str, Tensor] = {}
    for key in snapshots[0]:
        terms = [s[key].double() * float(w) for s, w in zip(snapshots, weights, strict=True)]
        out[key] = torch.stack(terms).sum(0).float()
    return out


# -- Averages of any length after the run: from the tracks that kept checkpoints hold --------------------------
#
# Reads safetensors shards alone, in one process, whatever number of ranks wrote them.


def rebuild(checkpoints: Root, sigma_rel: float, images: int | None = None) -> dict[str, Tensor]:
    """The power-function average of relative width `sigma_rel` as of `images` seen (default: the newest).

    checkpoints: the `checkpoints` directory of a run. Uses every power-function track of every kept checkpoint up to
    then; the more were kept, the nearer (see `ema.reconstruction`). InputError when there is none.
    """
    from pipeline.model.checkpoints import list_complete  # what is stored is checked by what a step does without

    kept = [c for c in list_complete(checkpoints) if images is None or c.images <= images]
    stored = [
        (c, track["name"], float(track["sigma_rel"]))
        for c in kept
        for track in c.meta.get("ema_tracks", ())
        if track["sigma_rel"] is not None
    ]
    if not stored:
        raise InputError(
            f"No checkpoint in {checkpoints.uri} holds a power-function average",
            rule="an average is rebuilt from tracks with sigma_rel, at or before the wanted count of images",
            next_step="train with train.ema tracks of sigma_rel 0.05 and 0.10 and checkpoint.keep_every_images",
        )
    target = images if images is not None else kept[-1].images
    weights = reconstruction([(sigma, c.images) for c, _, sigma in stored], sigma_rel, target)
    return combine([read_track(checkpoints, c, name) for c, name, _ in stored], weights)


def read_track(checkpoints: Root, complete: Complete, track: str) -> dict[str, Tensor]:
    """One EMA track of a checkpoint, whole tensors by parameter name; InputError when a file is damaged."""
    from pipeline.model.checkpoints import fetch_checked
    from pipeline.model.load import read_tensors  # safetensors, which a training step does without

    with tempfile.TemporaryDirectory(prefix="latentloom-") as scratch:
        local, problem = fetch_checked(checkpoints, complete.name, complete.marker["files"], Path(scratch))
        if problem is not None:
            raise InputError(f"The checkpoint {checkpoints.uri_of(complete.name)} is corrupt: {problem}")
        return read_tensors([local / name for name in sorted(complete.marker["files"])], f"ema/{track}/")


FORMAT_VERSION = 1
_REQUIRED = {"format_version", "step", "images", "seed", "skipped_steps", "skipped_in_a_row", "window", "identity"}
_SLOTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """The mutable whole of a run: weights, averages, optimiser, and where it stands."""

    model: nn.Module
    optimizer: torch.optim.AdamW
    ema: Ema
    seed: int
    step: int = 0
    images: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    identity: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # what a sampler must know, for those who draw from here
    inputs: str | None = None  # where the states of the datasets are kept, see `pinned_inputs`

    @property
    def params(self) -> dict[str, Tensor]:
        """The trainable parameters by name, by reference."""
        return trainable(self.model)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by its checkpoint name, by reference: loading fills them in place."""
        params, weights = self.params, self.model.state_dict()
        if len(params) < sum(1 for _ in self.model.parameters()):  # adapters: what is frozen lies elsewhere
            weights = params
        out = {f"model/{k}": v.detach() for k, v in weights.items()}
        out |= {f"ema/{k}": v for k, v in self.ema.tensors().items()}
        for name, param in params.items():
            slots = self.optimizer.state[param]
            out |= {f"optimizer/{slot}/{name}": slots[slot] for slot in _SLOTS}
        return out

    def meta(self) -> dict[str, Any]:
        """The JSON part of a checkpoint."""
        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "images": self.images,
            "seed": self.seed,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "rollbacks": self.rollbacks,
            "window": self.window,
            "identity": self.identity,
            "model": self.about,
            "inputs": self.inputs,
            "ema_tracks": [{"name": t.name, "sigma_rel": t.sigma_rel} for t in self.ema.tracks],
        }

    def restore_meta(self, meta: Mapping[str, Any]) -> None:
        """Take over the JSON part; `check` must have passed."""
        self.step, self.images = int(meta["step"]), int(meta["images"])
        self.skipped_steps, self.skipped_in_a_row = int(meta["skipped_steps"]), int(meta["skipped_in_a_row"])
        self.rollbacks = int(meta.get("rollbacks", 0))  # checkpoints of older releases have none
        self.window = {k: list(v) for k, v in meta["window"].items()}

    def check(self, meta: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another run: ConflictError lists what differs, InputError what is missing."""
        lacking = sorted(_REQUIRED - meta.keys())
        if lacking:
            raise InputError(
                f"The state of a checkpoint, meta in its COMPLETE.json, lacks {', '.join(lacking)}",
                key="output.uri",
                rule="a checkpoint is written by latentloom and not changed",
                next_step="remove this checkpoint, or start anew with another output.uri",
            )
        ours: dict[str, Any] = {"format_version": FORMAT_VERSION, "seed": self.seed, **self.identity}
        theirs = {"format_version": meta["format_version"], "seed": meta["seed"], **meta["identity"]}
        differences = [
            f"{key}: checkpoint {theirs.get(key)!r}, now {ours.get(key)!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if differences:
            raise ConflictError(
                "The checkpoint belongs to another run: " + "; ".join(differences),
                key="output.uri",
                rule="a run resumes only with the dataset, model, objective and seed it started with",
                next_step="choose another output.uri, or restore the settings that differ",
            )


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that receive gradients, by name."""
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def make_state(
    model: nn.Module,
    *,
    tracks: tuple[Track, ...],
    seed: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    identity: Mapping[str, Any] | None = None,
) -> TrainState:
    """A state at step 0, its optimiser slots in place so that a checkpoint can be loaded into them.

    Matrices are decayed, vectors (biases, norms, scales) are not. Fused AdamW: one kernel, same mathematics.
    """
    params = trainable(model)
    groups = [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, eps=eps, fused=True)
    for param in params.values():
        optimizer.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    return TrainState(model, optimizer, Ema(tracks, params), seed, identity=dict(identity or {}))
