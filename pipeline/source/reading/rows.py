"""What the readers hand on."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.source.reasons import Reason


@dataclass
class SourceRow:
    """One source row: compressed bytes and text, or a reason why there are none.

    row: index within the unit; source: the source's name; extra: pass-through fields as JSON;
    status: "ok" | "rejected" | "filtered".
    """

    row: int
    key: str
    image: bytes | None
    caption: str | None = None
    label: int | None = None
    extra: str | None = None
    exif_orientation: int | None = None
    status: str = "ok"
    reason: str | None = None
    message: str | None = None
    source: str = "source"

    @staticmethod
    def without_image(row: int, key: str, reason: Reason, message: str, source: str) -> SourceRow:
        """A row that ended while it was read."""
        message = message[:500].encode("utf-8", "backslashreplace").decode()  # names in it may be no Unicode
        return SourceRow(row, key, None, status=reason.status, reason=reason.value, message=message, source=source)


@dataclass(frozen=True)
class EndOfUnit:
    """The last item of a unit whose length was not known before: it has this many rows."""

    rows: int
