"""A gallery of samples as one HTML file: no script, no network, every text escaped.

Images are inlined; a content policy in the page forbids everything that is not, so that a prompt that
contains markup is shown and never run.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;
color:#222;background:#fafafa}
h1{font-size:1.4rem} table{border-collapse:collapse;margin:0 0 1.5rem}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}
th{font-weight:600;white-space:nowrap}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(9rem,1fr));gap:1rem}
figure{margin:0} img{width:100%;height:auto;background:#eee} figcaption{font-size:.8rem;overflow-wrap:anywhere}
details{font-size:.75rem;color:#555} pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0}
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class GalleryPicture:
    """One image of the gallery: its bytes and media type, a caption, and details shown on demand."""

    data: bytes
    media_type: str
    caption: str
    details: str = ""


def gallery_html(title: str, facts: Mapping[str, object], pictures: Sequence[GalleryPicture], note: str = "") -> str:
    """The whole page: a title, a table of facts, the pictures in the order given."""
    safe_title = html.escape(title)
    rows = "\n".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    figures = "\n".join(_figure(picture) for picture in pictures)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{safe_title}</title><style>{_STYLE}</style></head><body>
<h1>{safe_title}</h1>
<table>{rows}</table>
<p>{html.escape(note)}</p>
<div class="grid">
{figures}
</div></body></html>
"""


def _figure(picture: GalleryPicture) -> str:
    source = f"data:{html.escape(picture.media_type)};base64,{base64.b64encode(picture.data).decode('ascii')}"
    caption = html.escape(picture.caption)
    details = (
        f"<details><summary>provenance</summary><pre>{html.escape(picture.details)}</pre></details>"
        if picture.details
        else ""
    )
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption>{details}</figure>'
