"""The state of a stream: a step number, and what must be unchanged for that number to mean the same rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.errors import ConflictError

VERSION = 2  # changes whenever the same settings give another order

_NEXT = "resume with the data and settings the state was made with, or start a new run"


def make_state(step: int, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The state from which a stream goes on at `step`, the number of global batches already consumed."""
    return {"version": VERSION, "step": int(step), **identity}


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any]) -> int:
    """The step to go on from; raises ConflictError that names every field that differs."""
    version = state.get("version")
    if version != VERSION:
        raise ConflictError(
            "the stream's state has another version",
            key="stream.version",
            value=version,
            rule=f"this release reads version {VERSION}",
            next_step="resume with the release that wrote it, or start a new run",
        )
    differing = [
        f"{key}: {state.get(key, '(absent)')} in the state, {identity.get(key, '(absent)')} now"
        for key in sorted({*state, *identity} - {"version", "step"})
        if key not in state or key not in identity or state[key] != identity[key]
    ]
    if differing:
        raise ConflictError(
            "the state belongs to another sequence of batches", rule="; ".join(differing), next_step=_NEXT
        )
    step = state.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConflictError(
            "the stream's state has no usable step",
            key="stream.step",
            value=step,
            rule="a whole number from 0 on",
            next_step=_NEXT,
        )
    return step
