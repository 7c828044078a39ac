"""What an actor does whose device is lost: its process ends, and Ray starts another in its place.

Torch is imported where an error has to be judged: who reads and writes does without it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

DEVICE_GONE = 70  # exit status of a process whose device failed; EX_SOFTWARE


@contextmanager
def ends_with_its_device(who: str) -> Iterator[None]:
    """End this process when an error of its device passes, as a crash would; every other error passes.

    After an illegal access, an ECC error or a lost bus the device's context is gone, and only a new process gets a
    new one. An error that is raised does not end an actor, and would pass for a mistake in the code.
    """
    try:
        yield
    except Exception as error:
        if _is_lost(error):
            _end_process(who, error)
        raise


def _is_lost(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.AcceleratorError)


def _end_process(who: str, error: Exception) -> NoReturn:
    sys.stderr.write(f"latentloom: the device failed, this {who} ends and is replaced: {error}\n")
    sys.stderr.flush()
    os._exit(DEVICE_GONE)
