"""The report: one HTML file that needs no network and no script, readable in light and dark, bounded in size.

Every text is escaped and a content policy forbids whatever is not in the file. Pictures are inlined until the
size budget is used up; what is left out is said.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.evaluate.figures import Figure
from pipeline.media.charts import line_chart, share_bars
from pipeline.media.images import decode_image
from pipeline.media.style import CSS

Pixels = npt.NDArray[np.uint8]
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LARGEST_SIDE = 192  # pixels of an inlined picture; smaller ones keep their size and are scaled by the page


@dataclass(frozen=True)
class ReportPicture:
    """An image uint8 [h,w,3] with a caption; `mark` is "right", "wrong" or nothing."""

    pixels: Pixels
    caption: str
    mark: str = ""


@dataclass(frozen=True)
class ReportContent:
    """Everything a report shows; empty parts leave their section out."""

    title: str
    headline: Sequence[tuple[str, str, str]]  # (value, name, note) of each tile
    data_facts: Mapping[str, Any]
    real: Sequence[ReportPicture]
    pairs: Sequence[tuple[Pixels, Pixels]]
    codec_note: str
    curves: Mapping[str, Sequence[tuple[float, float]]]  # name -> (images, loss)
    samples: Sequence[ReportPicture]
    sample_facts: Mapping[str, Any]
    by_class: Sequence[tuple[str, int, int]]  # (class, right, asked)
    figures: Sequence[Figure]
    absent: Mapping[str, str]
    contract: Mapping[str, Any]
    provenance: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str] = field(default_factory=tuple)


def render_report(content: ReportContent, max_bytes: int) -> str:
    """The page; never more than `max_bytes` of UTF-8 as long as the texts alone fit."""
    for share in (1.0, 0.5, 0.25, 0.1, 0.0):
        page = _page(content, share)
        if len(page.encode()) <= max_bytes:
            return page
    return page


def _page(content: ReportContent, share: float) -> str:
    real, samples, pairs = (_part(x, share) for x in (content.real, content.samples, content.pairs))
    offered = len(content.real) + len(content.samples) + len(content.pairs)
    left_out = offered - len(real) - len(samples) - len(pairs)
    notes = list(content.notes)
    if left_out:
        notes.append(f"{left_out} of {offered} pictures were left out to bound this file's size.")
    title = html.escape(content.title)
    sections = [
        _section("Data", _facts(content.data_facts) + _grid(real)),
        _section("Reconstructions", _pairs(pairs, content.codec_note)),
        _section("Training", line_chart(content.curves, x_name="images", y_name="loss")),
        _section("Samples", _grid(samples) + _facts(content.sample_facts)),
        _section("By class", share_bars(content.by_class)),
        _section("Figures", _figures(content.figures, content.absent)),
        _section("What the figures depend on", _facts(content.contract)),
        _section("Provenance", "".join(_origin(k, v) for k, v in content.provenance.items())),
        _section("Notes", "".join(f"<p>{html.escape(note)}</p>" for note in notes)),
    ]
    body = "\n".join(section for section in sections if section)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title><style>{CSS}</style></head><body><main>
<header><h1>{title}</h1>{_tiles(content.headline)}</header>
{body}
</main></body></html>
"""


def _part(things: Sequence[Any], share: float) -> Sequence[Any]:
    """An evenly spaced share of a sequence."""
    count = int(len(things) * share)
    return [things[i * len(things) // count] for i in range(count)] if count else []


def _section(name: str, inside: str) -> str:
    return (
        f'<section aria-label="{html.escape(name)}"><h2>{html.escape(name)}</h2>\n{inside}</section>'
        if inside
        else ""
    )


def _tiles(headline: Sequence[tuple[str, str, str]]) -> str:
    tiles = "".join(
        f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span>'
        f"<small>{html.escape(note)}</small></div>"
        for value, name, note in headline
    )
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _facts(facts: Mapping[str, Any]) -> str:
    rows = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(_text(v))}</dd>" for k, v in facts.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _origin(name: str, facts: Mapping[str, Any]) -> str:
    return f"<h3>{html.escape(name)}</h3>{_facts(facts)}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return "not known" if value is None else str(value)


def _grid(pictures: Sequence[ReportPicture]) -> str:
    cells = "".join(_figure(p) for p in pictures)
    return f'<div class="grid">{cells}</div>' if cells else ""


def _figure(picture: ReportPicture) -> str:
    caption = html.escape(picture.caption)
    mark = {"right": ' class="right"', "wrong": ' class="wrong"'}.get(picture.mark, "")
    sign = {"right": "✓ ", "wrong": "✗ "}.get(picture.mark, "")
    image = f'<img src="{data_uri(picture.pixels)}" alt="{caption}">'
    return f"<figure{mark}>{image}<figcaption>{sign}{caption}</figcaption></figure>"


def _pairs(pairs: Sequence[tuple[Pixels, Pixels]], note: str) -> str:
    if not pairs:
        return ""
    cells = "".join(
        f'<figure class="pair"><img src="{data_uri(real)}" alt="real image {i}">'
        f'<img src="{data_uri(decoded)}" alt="image {i} decoded from its latent"></figure>'
        for i, (real, decoded) in enumerate(pairs, 1)
    )
    return f'<p>{html.escape(note)}</p><div class="grid pairs">{cells}</div>'


def _figures(figures: Sequence[Figure], absent: Mapping[str, str]) -> str:
    if not figures and not absent:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{html.escape(f.name)}</th><td>{number(f.value)} {html.escape(f.unit)}</td>"
        f"<td>{_interval(f)}</td><td>{f.n:,}</td><td class=how>{html.escape(f.method)}</td></tr>"
        for f in figures
    )
    rows += "".join(
        f"<tr class=absent><th scope=row>{html.escape(name)}</th><td>absent</td><td></td><td></td>"
        f"<td class=how>{html.escape(reason)}</td></tr>"
        for name, reason in absent.items()
    )
    head = "<tr><th>figure<th>value<th>95 % interval<th>n<th>how it was taken</tr>"
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"{number(figure.low)} to {number(figure.high)}"


def number(value: float) -> str:
    """Four significant digits without an exponent where that is readable."""
    return f"{value:.4f}" if 0.001 <= abs(value) < 1 else f"{value:.4g}"


def data_uri(pixels_HWC: Pixels) -> str:
    """A picture as PNG when it is small, else shrunk to LARGEST_SIDE as JPEG."""
    image = Image.fromarray(pixels_HWC)
    out = io.BytesIO()
    if max(image.size) <= 64:
        image.save(out, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(out, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode('ascii')}"


def sample_picture(encoded: bytes, caption: str, right: bool | None) -> ReportPicture:
    """A picture of the report from a sample's own bytes."""
    mark = "" if right is None else "right" if right else "wrong"
    return ReportPicture(decode_image(encoded), caption, mark)
