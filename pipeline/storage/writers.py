"""Stores that cannot create an object only if it is absent: refused, unless a person vouches for a single writer."""

from __future__ import annotations

import logging
import os

from pipeline.errors import InputError
from pipeline.storage.errors import without_user

VARIABLE = "LATENTLOOM_SINGLE_WRITER"
_WHAT = "has no atomic create-if-absent: two writes to one new key both succeeded, or it refuses such writes"
_log = logging.getLogger(__name__)


def single_writer() -> bool:
    """Whether a person vouches that only one job writes at a time; set for every process of the job."""
    return os.environ.get(VARIABLE, "") == "yes"


def refuse_or_warn(uri: str) -> None:
    """What happens to such a store: InputError, unless a single writer is vouched for, which is warned about."""
    if not single_writer():
        raise InputError(
            f"The store {without_user(uri)} {_WHAT}",
            rule="exactly-once commits need conditional writes",
            next_step="use a store with If-None-Match (S3, GCS, MinIO, Ceph) or a local file system; where no second "
            f"job ever writes to this output at the same time, {VARIABLE}=yes accepts it",
        )
    _log.warning(
        "WARNING: %s %s. %s is set: two jobs that write to this output at the same time WILL DAMAGE IT, and "
        "nothing will notice. See to it that there is only one.",
        without_user(uri),
        _WHAT,
        VARIABLE,
    )
