"""Captions, labels, pass-through fields and EXIF orientations out of whatever a source stores beside its images."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

# What the exifread library, and with it img2dataset's `exif` column, prints for tag 0x0112.
_ORIENTATIONS = {
    "horizontal (normal)": 1,
    "mirrored horizontal": 2,
    "rotated 180": 3,
    "mirrored vertical": 4,
    "mirrored horizontal then rotated 90 ccw": 5,
    "rotated 90 cw": 6,
    "mirrored horizontal then rotated 90 cw": 7,
    "rotated 90 ccw": 8,
}
# img2dataset's words for an image that it did not get; any other status is somebody else's, and means nothing here.
FAILED_STATUSES = ("failed_to_download", "failed_to_resize")
MAX_TEXT_BYTES = 1 << 20  # of a text as it lies beside an image, before anything of it is chosen
MAX_STORED_BYTES = 128 << 10  # of a row's caption, and of its pass-through fields: a write holds thousands of them
_MAX_LABEL = 10**18 - 1
_INTEGER = re.compile(r"\s*[0-9]{1,18}(\.0*)?\s*")


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; ValueError for anything else. NaN, infinities and numbers beyond a double are null.

    That is the one rule for them, in and out (`canonical`): JSON has none of them.
    """

    def finite(digits: str) -> float | None:
        number = float(digits)
        return number if math.isfinite(number) else None

    try:
        value = json.loads(text, parse_constant=lambda name: None, parse_float=finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed, not {type(value).__name__}")
    return value


def canonical(value: Any, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. Foreign types become their text.

    NaN and infinities become null. ValueError for text that is no Unicode (a lone surrogate), over `max_bytes`, or
    nested without end.
    """
    options: dict[str, Any] = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False, "default": str}
    try:
        try:
            text = json.dumps(value, allow_nan=False, **options)
        except ValueError:
            text = json.dumps(_finite(value), allow_nan=False, **options)
    except (RecursionError, TypeError) as error:  # TypeError: keys of several types cannot be sorted
        raise ValueError(f"the fields are no JSON: {error}") from None
    return _checked(text, "the fields", max_bytes)


def parse_caption(value: Any) -> str | None:
    """Text or nothing; ValueError for any other type, a lone surrogate, or more than MAX_STORED_BYTES."""
    if value is None or isinstance(value, str):
        return None if value is None else _checked(value, "the caption", MAX_STORED_BYTES)
    raise ValueError(f"the caption must be text, not {type(value).__name__}")


def parse_label(value: Any, classes: Sequence[str]) -> int | None:
    """A class number: given as such, as digits, or as one of the class names; ValueError otherwise.

    A number without a fraction is one however it is written (3.0, as tables with gaps have it); NaN is no label.
    """
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float | Decimal) and value == value // 1:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return _known(value, classes)
    if isinstance(value, str):
        if value.strip() in classes:
            return classes.index(value.strip())
        if _INTEGER.fullmatch(value):
            return _known(int(value.partition(".")[0]), classes)
    known = f" or one of the {len(classes)} classes" if classes else ""
    raise ValueError(f"the label {value!r:.60} is no integer from 0 up{known}")


def pick_extra(record: Mapping[str, Any], names: Sequence[str], taken: Sequence[str | None]) -> dict[str, Any]:
    """The pass-through fields: those named, or with "*" all that are not used otherwise."""
    if "*" in names:
        return {k: v for k, v in record.items() if k not in taken}
    return {name: record[name] for name in names if name in record}


def orientation_of(exif: Any) -> int | None:
    """The orientation in img2dataset's exif text (a JSON object as exifread prints it), or None."""
    if isinstance(exif, str | bytes):
        try:
            exif = parse_object(exif)
        except ValueError:
            return None
    if not isinstance(exif, dict):
        return None
    value = exif.get("Image Orientation", exif.get("Orientation"))
    if isinstance(value, str):
        text = value.strip().lower()
        return int(text) if text in set("12345678") else _ORIENTATIONS.get(text)
    return value if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 8 else None


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _checked(text: str, what: str, max_bytes: int) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{what} cannot be written as UTF-8") from None
    if size > max_bytes:
        raise ValueError(f"{what} take {size} bytes, over {max_bytes}")
    return text


def _known(label: int, classes: Sequence[str]) -> int:
    if label > _MAX_LABEL:
        raise ValueError(f"the label is beyond {_MAX_LABEL}")
    if classes and label >= len(classes):
        raise ValueError(f"the label {label} is beyond the {len(classes)} classes")
    return label
