"""What can be asked for: solvers, what they serve and cost, and combinations of conditions. No torch; `samplers` does
the arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

ObjectiveKind = Literal["flow", "epsilon", "v"]
SamplerName = Literal["auto", "euler", "heun", "ddim", "dpmpp"]  # auto, or a key of SOLVERS
KINDS: tuple[str, ...] = get_args(ObjectiveKind)
NUM_TRAIN_STEPS = 1000  # of the discrete schedules of epsilon and v


@dataclass(frozen=True)
class Solver:
    """One way from noise to latents. evaluations_per_step: of the model, but for the last step, which has one."""

    name: str
    objectives: tuple[str, ...] = KINDS
    evaluations_per_step: int = 1

    def evaluations(self, steps: int) -> int:
        """How often a run of so many steps asks the model."""
        return self.evaluations_per_step * (steps - 1) + 1


SOLVERS = {
    solver.name: solver
    for solver in (
        Solver("euler", ("flow",)),
        Solver("heun", ("flow",), evaluations_per_step=2),
        Solver("ddim"),
        Solver("dpmpp"),
    )
}


def solver_for(sampler: str, objective: str) -> Solver:
    """The solver of a name for a kind of objective; auto is euler for flows, else dpmpp. ValueError for none."""
    if sampler == "auto":
        sampler = "euler" if objective == "flow" else "dpmpp"
    if sampler not in SOLVERS:
        raise ValueError(f"sampler must be one of {get_args(SamplerName)}, got {sampler!r}")
    solver = SOLVERS[sampler]
    if objective not in solver.objectives:
        fitting = " or ".join(s.name for s in SOLVERS.values() if objective in s.objectives)
        raise ValueError(
            f"{sampler} serves the objective {', '.join(solver.objectives)}; for {objective} use {fitting}"
        )
    return solver


# -- Conditions ------------------------------------------------------------------------------------------------

# What a sample was shown, or a request asks for: its class, its text, both or neither.
Combination = Literal["class+text", "class", "text", "none"]
COMBINATIONS: tuple[Combination, ...] = get_args(Combination)


def combination(*, labelled: bool, prompted: bool) -> Combination:
    """The combination of a row that has a label, a text that is not empty, or neither."""
    return "class+text" if labelled and prompted else "class" if labelled else "text" if prompted else "none"


def combination_shares(
    label_dropout: float | None, text_dropout: float | None, joint_dropout: float
) -> dict[Combination, float]:
    """The share of samples that each combination is trained on; a dropout is None where there is no such condition.

    Of two conditions both are dropped together from a share, and from the rest each by a draw of its own.
    """
    labels, texts = (1.0 if dropout is None else dropout for dropout in (label_dropout, text_dropout))
    joint = 0.0 if label_dropout is None or text_dropout is None else joint_dropout
    rest = 1.0 - joint
    return {
        "class+text": rest * (1.0 - labels) * (1.0 - texts),
        "class": rest * (1.0 - labels) * texts,
        "text": rest * labels * (1.0 - texts),
        "none": joint + rest * labels * texts,
    }
