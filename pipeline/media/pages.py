"""HTML pages for people, by jinja2 templates that escape every text.

A page is one file without script or network, readable in light and dark; its content policy forbids what is not in
the file, so that a prompt which contains markup is shown and never run. The templates and their style sheet lie
beside this module.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.errors import escaped
from pipeline.media.images import inline_bytes


@dataclass(frozen=True)
class PagePicture:
    """An encoded image of a page with its caption; `mark` is "right", "wrong" or nothing, `details` are folded."""

    data: bytes
    media_type: str
    caption: str
    mark: Literal["", "right", "wrong"] = ""
    details: str = ""

    @classmethod
    def of(cls, pixels_HWC: np.ndarray, caption: str = "", mark: Literal["", "right", "wrong"] = "") -> PagePicture:
        """From pixels uint8 [h, w, 3]: PNG when they are few, else shrunk and JPEG."""
        data, media_type = inline_bytes(pixels_HWC)
        return cls(data, media_type, caption, mark)

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return f"data:{self.media_type};base64,{base64.b64encode(self.data).decode('ascii')}"


def render_page(template: str, **values: Any) -> str:
    """A template of this package with its values; jinja2's UndefinedError when one is missing."""
    return _environment.get_template(template).render(values)


def fact_text(value: Any) -> str:
    """A value of a table of facts as people read it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(fact_text(v) for v in value)
    return "not known" if value is None else str(value)


_environment = Environment(
    loader=PackageLoader("pipeline.media"),
    autoescape=True,
    # Names and prompts come from data: what is not seen in them is written as its number.
    finalize=lambda value: escaped(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters["fact_text"] = fact_text
