"""What is said when a stage of sampling runs out of memory: a wrong configuration, not a fault of the program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pipeline.errors import ConfigError
from pipeline.sample.provenance import Draw


def batch_fits(draw: Draw, doing: str) -> AbstractContextManager[None]:
    """ConfigError naming batch_size when memory runs out inside; every other error passes.

    Raised inside an actor's call it reaches the driver as what it is, and no task is tried again.
    """
    return _shortage_named(
        f"{doing} ran out of memory on the device {draw.device!r}",
        key="batch_size",
        value=draw.batch_size,
        rule="a batch of the largest size asked for fits the memory that the stages share",
        next_step="lower batch_size; an output that holds images already keeps the batch_size they were drawn "
        "with, so name a new output.uri in that case",
    )


def networks_fit(draw: Draw, doing: str) -> AbstractContextManager[None]:
    """ConfigError naming model.dtype when memory runs out inside, whatever the batch; every other error passes."""
    return _shortage_named(
        f"{doing} ran out of memory on the device {draw.device!r}",
        key="model.dtype",
        value=draw.dtype,
        rule="model, codec and text encoders fit the memory that the stages share",
        next_step="run fewer stages on one device (denoise, decode and prompts have actors and num_gpus; "
        "prompts.num_gpus=0 embeds on the CPU), or take a device with more memory",
    )


@contextmanager
def _shortage_named(what: str, **told: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_shortage(error):
            raise
        raise ConfigError(f"{what}: {_told(error)}", **told) from error


def _is_shortage(error: Exception) -> bool:
    from pipeline.dataflow.device_faults import out_of_memory  # needs torch, which the driver does without

    return out_of_memory(error)


def _told(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
