"""Why a row did not become latents: the closed list that reject files, metrics and budgets share."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """Every way in which a source row can end without pixels."""

    # Reading
    READ_FAILED = "read_failed"
    MISSING = "missing"
    URI_REFUSED = "uri_refused"
    CORRUPT_CONTAINER = "corrupt_container"
    UNSAFE_NAME = "unsafe_name"
    DUPLICATE_KEY = "duplicate_key"
    NO_IMAGE = "no_image"
    BAD_METADATA = "bad_metadata"
    TOO_MANY_BYTES = "too_many_bytes"

    # Decoding
    EMPTY = "empty"
    UNSUPPORTED_FORMAT = "unsupported_format"
    UNSUPPORTED_CODING = "unsupported_coding"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_PIXELS = "too_many_pixels"
    EXTREME_ASPECT = "extreme_aspect"
    VALUE_RANGE = "value_range"
    DECODE_TIMEOUT = "decode_timeout"
    DECODE_MEMORY = "decode_memory"
    DECODER_CRASHED = "decoder_crashed"

    # Encoding
    ENCODE_FAILED = "encode_failed"
    BAD_LATENT = "bad_latent"
    QUARANTINED = "quarantined"

    # Filters: the row is sound, the configuration does not want it
    ROW_FILTER = "row_filter"
    SOURCE_STATUS = "source_status"
    SECOND_IMAGE = "second_image"
    TOO_SMALL = "too_small"
    UPSCALE_LIMIT = "upscale_limit"
    DUPLICATE_CONTENT = "duplicate_content"
    WITHDRAWN = "withdrawn"  # see jobs.forget

    @property
    def status(self) -> str:
        """ "filtered" for a sound row that the configuration leaves out, "rejected" for everything else."""
        return "filtered" if self in _FILTERS else "rejected"

    @property
    def retryable(self) -> bool:
        """Whether the same bytes, or the same place, may well give pixels another time."""
        return self in _RETRYABLE


# Of decoded images, on which the codec failed or its process died: the source is rarely to blame.
ENCODING = frozenset((Reason.ENCODE_FAILED, Reason.BAD_LATENT, Reason.QUARANTINED))
_FILTERS = frozenset(
    (
        Reason.ROW_FILTER,
        Reason.SOURCE_STATUS,
        Reason.SECOND_IMAGE,
        Reason.TOO_SMALL,
        Reason.UPSCALE_LIMIT,
        Reason.DUPLICATE_CONTENT,
        Reason.WITHDRAWN,
    )
)
_RETRYABLE = frozenset(
    (Reason.READ_FAILED, Reason.MISSING, Reason.DECODE_TIMEOUT, Reason.DECODE_MEMORY, Reason.QUARANTINED)
)


class DecodeError(Exception):
    """These bytes give no pixels; says why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message
