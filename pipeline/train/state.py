"""Everything a checkpoint holds: tensors by name, and a small JSON value.

    tensors   model/<parameter or buffer>   ema/<track>/<parameter>   optimizer/<slot>/<parameter>
    meta      format version, step, images, seed, the open logging window, skip counters, run identity

There is no generator state: all randomness is keyed by (seed, sample id, epoch), so the seed is the whole of it;
the stream's position is a function of the step. There is no schedule state: the rate is a function of images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConflictError
from pipeline.train.ema import Ema, Track

FORMAT_VERSION = 1
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
        out = {f"model/{k}": v.detach() for k, v in self.model.state_dict().items()}
        out |= {f"ema/{k}": v for k, v in self.ema.tensors().items()}
        for name, param in trainable(self.model).items():
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
        """Refuse a checkpoint of another run: raises ConflictError that lists every differing field."""
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
