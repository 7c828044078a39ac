"""Everything a checkpoint holds: tensors by name, and a small JSON value.

    tensors   model/<parameter or buffer>   ema/<track>/<parameter>   optimizer/<slot>/<parameter>
              (schedule-free: model/ has the average x, what is drawn with; optimizer/y/ where gradients are taken)
    meta      format version, step, images, seed, the open logging window, skip counters, run identity

There is no generator state: all randomness is keyed by (seed, sample id, epoch), so the seed is the whole of it;
the stream's position is a function of the step. There is no schedule state: the rate is a function of images.
"""

from __future__ import annotations

import math
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
def swapped(params: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters hold these values inside the block and their own after it."""
    kept = {k: p.detach().clone() for k, p in params.items()}
    _assign(params, values)
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
    stored = [(c, name, sigma) for c in kept for name, sigma in c.power_tracks]
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


# -- Optimisers: each keeps its slots in `state[parameter]`, there from the first, so that a checkpoint fits in ----


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled", algorithm 1).

    The parameters hold y, where gradients are taken; slots: x, the average that is the model; z; exp_avg_sq, which is
    v; step; weight_sum. beta1 interpolates between z and x, lr may only warm up, decay acts at y.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        for group in self.param_groups:
            for y in group["params"]:
                self.state[y] = {
                    # On the host: they are numbers of the formula, not of the device.
                    "step": torch.zeros(()),
                    "weight_sum": torch.zeros((), dtype=torch.float64),
                    "x": y.detach().clone(),
                    "z": y.detach().clone(),
                    "exp_avg_sq": torch.zeros_like(y),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step from the gradients at y; parameters without one are left as they are."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for y in group["params"]:
                if y.grad is None:
                    continue
                slots = self.state[y]
                x, z, v = slots["x"], slots["z"], slots["exp_avg_sq"]
                slots["step"] += 1
                rate = group["lr"] * math.sqrt(1.0 - beta2 ** int(slots["step"]))
                slots["weight_sum"] += rate**2
                v.mul_(beta2).addcmul_(y.grad, y.grad, value=1.0 - beta2)
                z.addcdiv_(y.grad, v.sqrt().add_(group["eps"]), value=-rate)
                z.add_(y, alpha=-rate * group["weight_decay"])
                x.lerp_(z, rate**2 / float(slots["weight_sum"]))
                y.copy_(z).lerp_(x, beta1)


class MuonAndAdamW:
    """torch's Muon for the matrices of hidden layers, AdamW for the rest; one rate and one decay for both.

    Muon's step is scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).
    """

    def __init__(self, matrices: list[Tensor], rest: torch.optim.AdamW, *, weight_decay: float) -> None:
        self.parts: list[torch.optim.Optimizer] = [rest]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            for matrix in matrices:
                muon.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix)}
            self.parts.append(muon)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both, by reference."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Slots of every parameter, by reference."""
        return {param: slots for part in self.parts for param, slots in part.state.items()}

    def step(self) -> None:
        """One step of each."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none)


def make_optimizer(
    kind: str, model: nn.Module, *, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.Optimizer | MuonAndAdamW:
    """adamw, muon or schedule_free, its slots in place; ValueError for another.

    Matrices are decayed, vectors (biases, norms, scales) are not. Fused AdamW: one kernel, same mathematics.
    """
    params = list(trainable(model).values())
    matrices: list[Tensor] = []
    if kind == "muon":
        # Rows of an embedding are looked up, not multiplied with: they are no matrix in Muon's sense (Jordan 2024).
        looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in params if p.ndim == 2 and id(p) not in looked_up]
        theirs = {id(p) for p in matrices}
        params = [p for p in params if id(p) not in theirs]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    if kind == "schedule_free":
        return ScheduleFreeAdamW(groups, lr=0.0, betas=betas, eps=eps)
    if kind not in ("adamw", "muon"):
        raise ValueError(f"optimizer {kind!r}: there are adamw, muon and schedule_free")
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    for param in params:
        adamw.state[param] = {
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param),
            "exp_avg_sq": torch.zeros_like(param),
        }
    return adamw if kind == "adamw" else MuonAndAdamW(matrices, adamw, weight_decay=weight_decay)


@dataclass
class TrainState:
    """The mutable whole of a run: weights, averages, optimiser, and where it stands."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | MuonAndAdamW
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

    @property
    def weights(self) -> dict[str, Tensor]:
        """What the parameters are as a model, by reference: themselves, schedule-free's averages in their place."""
        slots = self.optimizer.state
        return {name: slots[param].get("x", param) for name, param in self.params.items()}

    @contextmanager
    def swapped(self, track: str | None) -> Iterator[None]:
        """The model's parameters hold an average inside the block (None: `weights`) and their own after it."""
        if track is None and not isinstance(self.optimizer, ScheduleFreeAdamW):
            yield
            return
        with swapped(self.params, self.weights if track is None else self.ema.averages[track]):
            yield

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by its checkpoint name, by reference: loading fills them in place."""
        params, weights = self.params, self.model.state_dict()
        if len(params) < sum(1 for _ in self.model.parameters()):  # adapters: what is frozen lies elsewhere
            weights = params
        out = {f"model/{k}": v.detach() for k, v in weights.items()}
        out |= {f"ema/{k}": v for k, v in self.ema.tensors().items()}
        slots = self.optimizer.state
        for name, param in params.items():
            out |= {f"optimizer/{slot}/{name}": value for slot, value in slots[param].items()}
            if "x" in slots[param]:
                # Who draws from a checkpoint draws with the average: it lies where weights lie.
                out[f"model/{name}"] = out.pop(f"optimizer/x/{name}")
                out[f"optimizer/y/{name}"] = param.detach()
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
    optimizer: str = "adamw",
) -> TrainState:
    """A state at step 0, its optimiser slots in place so that a checkpoint can be loaded into them."""
    chosen = make_optimizer(optimizer, model, betas=betas, eps=eps, weight_decay=weight_decay)
    return TrainState(model, chosen, Ema(tracks, trainable(model)), seed, identity=dict(identity or {}))
