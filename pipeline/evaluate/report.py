"""The report: one HTML file that needs no network and no script, readable in light and dark, bounded in size.

Pictures are inlined until the size budget is used up; what is left out is said. Charts are matplotlib's, as inline
SVG in the page's own text colour and font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure as Canvas
from matplotlib.rcsetup import cycler
from matplotlib.ticker import EngFormatter, PercentFormatter, StrMethodFormatter

from pipeline.evaluate.config import EvaluateJobConfig
from pipeline.evaluate.figures import Figure, contract_of, number
from pipeline.evaluate.inputs import Inputs, ReferenceBatch
from pipeline.media import PagePicture, class_text, decode_image, render_page

if TYPE_CHECKING:
    from pipeline.evaluate.passes import Measured

HEADLINE = {
    "accuracy": "samples right",
    "psnr_db": "codec PSNR",
    "ssim": "codec SSIM",
    "frechet": "Frechet distance",
    "fid": "FID (published)",
    "clip_score": "CLIP score",
}
CODEC_NOTE = (
    "Left of each pair a real image, right the same image decoded from its latent. "
    "The codec may have been fitted on some of these images."
)
CLASSIFIER_NOTE = (
    "Classifier and feature space were fitted here, on the reference images only. Their figures compare runs over "
    "the same reference; they are not the Inception-based FID or KID of the literature, and real images the "
    "classifier was fitted on may look a little more typical to it than unseen ones."
)
GONE_NOTE = "{:,} real images have changed or gone since they were listed, and are left out of every figure."
BARS_LABEL = "share of samples in which the classifier sees the class asked for"
_Item = TypeVar("_Item")
Image = npt.NDArray[np.uint8]  # [h, w, 3]
MAX_POINTS = 400
MAX_CURVES = 4
MAX_BARS = 64
_INK = "#010203"  # drawn in the page's own text colour, light or dark
_CHART_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "latentloom",  # the same figures give the same bytes
    "text.parse_math": False,  # names come from data: a dollar sign in one is a dollar sign
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=["#3d7be0", "#d0672b", "#8a5fd0", "#2f9e5c"]),
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}


class Tile(NamedTuple):
    """A figure on top of the report: one of those a reader looks for first."""

    value: str
    name: str
    note: str

    @classmethod
    def of(cls, figure: Figure) -> Tile:
        """With an accuracy in percent."""
        text: Callable[[float], str] = "{:.1%}".format if figure.name == "accuracy" else number
        note = f"n = {figure.n:,}"
        if figure.low is not None and figure.high is not None:
            note = f"{text(figure.low)} to {text(figure.high)}, {note}"
        return cls(f"{text(figure.value)} {figure.unit}".strip(), HEADLINE[figure.name], note)


@dataclass(frozen=True)
class ReportContent:
    """Everything a report shows; empty parts leave their section out."""

    title: str
    headline: Sequence[Tile] = ()
    data_facts: Mapping[str, Any] = field(default_factory=dict)
    real: Sequence[PagePicture] = ()
    pairs: Sequence[tuple[PagePicture, PagePicture]] = ()
    codec_note: str = CODEC_NOTE
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)  # name -> (images, loss)
    samples: Sequence[PagePicture] = ()
    sample_facts: Mapping[str, Any] = field(default_factory=dict)
    by_class: Sequence[tuple[str, int, int]] = ()  # (class, right, asked)
    figures: Sequence[Figure] = ()
    absent: Mapping[str, str] = field(default_factory=dict)
    contract: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render_report(content: ReportContent, max_bytes: int) -> str:
    """The page; never more than `max_bytes` of UTF-8 as long as the texts alone fit."""
    charts = {
        "loss_chart": line_chart(content.curves, x_name="images", y_name="loss"),
        "class_chart": share_bars(content.by_class, label=BARS_LABEL),
    }
    offered = len(content.real) + len(content.samples) + len(content.pairs)
    # Pictures are nearly all of a page's bytes; texts and charts are never cut.
    for share in (1.0, 0.5, 0.25, 0.1, 0.0):
        part = replace(
            content,
            real=_spread(content.real, share),
            samples=_spread(content.samples, share),
            pairs=_spread(content.pairs, share),
        )
        left_out = offered - len(part.real) - len(part.samples) - len(part.pairs)
        cut = [f"{left_out} of {offered} pictures were left out to bound this file's size."] if left_out else []
        page = render_page("report.html", title=part.title, report=part, notes=[*part.notes, *cut], **charts)
        if len(page.encode()) <= max_bytes:
            break
    return page


def _spread(items: Sequence[_Item], share: float) -> list[_Item]:
    """An evenly spaced share of a sequence."""
    count = int(len(items) * share)
    return [items[i * len(items) // count] for i in range(count)]


def report_content(
    config: EvaluateJobConfig,
    inputs: Inputs,
    measured: Measured,
    figures: Sequence[Figure],
    absent: Mapping[str, str],
) -> ReportContent:
    """The report of one evaluation, but for its provenance."""
    samples, latents = measured.samples, inputs.latents
    objects = "listed objects" if inputs.images.plan is None else "objects of the latents"
    data_facts: dict[str, Any] = {"real images": inputs.reference.rows, objects: inputs.reference.entries}
    if latents is not None:
        data_facts |= {
            "latents": latents.num_rows,
            "latent dtype": latents.latent_dtype,
            "buckets (HxW pixels)": sorted({group.bucket for group in latents.row_groups}),
            "classes": latents.num_classes,
            "channel mean": [round(float(v), 4) for v in latents.channel_mean],
            "channel std": [round(float(v), 4) for v in latents.channel_std],
        }
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in inputs.history:
        for name, value in record.items():
            if name.endswith("loss") and isinstance(value, int | float) and "images" in record:
                curves.setdefault(name, []).append((float(record["images"]), float(value)))
    sample_facts: dict[str, Any] = {}
    by_class: list[tuple[str, int, int]] = []
    if samples is not None and inputs.samples is not None:
        sample_facts = {"samples": inputs.samples.num_rows}
        sample_facts |= {name.replace("_", " "): values for name, values in samples.settings.items()}
        for label in sorted({asked for asked, _ in samples.seen}):
            of_class = sum(n for (asked, _), n in samples.seen.items() if asked == label)
            by_class.append((class_text(label, inputs.class_names), samples.seen[label, label], of_class))
    own_space = measured.networks.holdout is not None and measured.networks.extractor is None
    return ReportContent(
        title=config.title,
        headline=[Tile.of(figure) for figure in figures if figure.name in HEADLINE],
        data_facts=data_facts,
        real=measured.real_shown,
        pairs=[(PagePicture.of(a), PagePicture.of(b)) for a, b in measured.trip.pairs] if measured.trip else (),
        curves=curves,
        samples=[
            PagePicture.of(decode_image(shown.encoded), shown.caption, shown.mark)
            for shown in (samples.shown.values() if samples else ())
        ],
        sample_facts=sample_facts,
        by_class=by_class,
        figures=figures,
        absent=absent,
        contract=contract_of(config, inputs, measured),
        notes=[
            *([CLASSIFIER_NOTE] if own_space else []),
            *([GONE_NOTE.format(measured.gone)] if measured.gone else []),
            *(f"{name}: {reason}." for name, reason in measured.absent.items()),
        ],
    )


def first_of_each_label(batches: Iterable[ReferenceBatch], limit: int) -> Iterator[tuple[Image, int | None]]:
    """The first image of every label, then second ones, ... of the given batches, at most `limit`."""
    by_label: dict[int | None, list[Image]] = {}
    for batch in batches:
        for pixels, label in zip(batch.images_NHWC, batch.labels, strict=True):
            kept = by_label.setdefault(label, [])
            if len(kept) < limit:
                kept.append(pixels)
    labels = sorted(by_label, key=lambda label: (label is None, label or 0))
    rounds = (
        (by_label[label][place], label) for place in range(limit) for label in labels if place < len(by_label[label])
    )
    return islice(rounds, limit)


def line_chart(curves: Mapping[str, Sequence[tuple[float, float]]], *, x_name: str, y_name: str) -> Markup:
    """Up to MAX_CURVES curves over one pair of axes as SVG; nothing when none has two points.

    Points that are not finite are left out; a long curve is averaged in MAX_POINTS bins, in order of x.
    """
    drawn: dict[str, np.ndarray] = {}
    for name, points in curves.items():
        finite = np.array(sorted(p for p in points if np.isfinite(p).all()), np.float64).reshape(-1, 2)
        if len(finite) > 1 and len(drawn) < MAX_CURVES:
            drawn[name] = np.stack(
                [part.mean(axis=0) for part in np.array_split(finite, min(len(finite), MAX_POINTS))]
            )
    if not drawn:
        return Markup()
    with _chart(2.6) as canvas:
        axes = canvas.add_subplot(xlabel=x_name, ylabel=y_name)
        lines = [axes.plot(*curve.T)[0] for curve in drawn.values()]
        axes.legend(lines, list(drawn), ncols=MAX_CURVES, loc="lower left", bbox_to_anchor=(0, 1))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.4g}"))
        return _svg(canvas, f"{y_name} over {x_name}: {', '.join(drawn)}")


def share_bars(rows: Sequence[tuple[str, int, int]], *, label: str) -> Markup:
    """One bar per (name, hits, n) with n > 0 as SVG, the lowest shares alone when there are more than MAX_BARS."""
    asked = [row for row in rows if row[2] > 0]
    shown = asked if len(asked) <= MAX_BARS else sorted(asked, key=lambda row: row[1] / row[2])[:MAX_BARS]
    if not shown:
        return Markup()
    names, shares = [name for name, _, _ in shown], [hits / n for _, hits, n in shown]
    with _chart(0.5 + 0.21 * len(shown)) as canvas:
        axes = canvas.add_subplot(xlim=(0, 1))
        axes.barh(range(len(shown)), 1, height=0.55, color=_INK, alpha=0.08)
        bars = axes.barh(range(len(shown)), shares, height=0.55)
        for bar, (_, hits, n) in zip(bars, shown, strict=True):
            axes.text(1.01, bar.get_y() + 0.275, f"{hits / n:.0%} of {n}", va="center", transform=axes.transData)
        axes.set_yticks(range(len(shown)), names)
        axes.invert_yaxis()
        axes.margins(y=0)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        if len(shown) < len(asked):
            axes.set_title(f"The {MAX_BARS} lowest of {len(asked)}", loc="left")
        return _svg(canvas, label)


@contextmanager
def _chart(height: float) -> Iterator[Canvas]:
    """A figure of the page's width in the pages' style; inches of 72 points, which are the SVG's units."""
    with matplotlib.rc_context(_CHART_STYLE), warnings.catch_warnings():
        # Letters that matplotlib's own font lacks are drawn by the browser; denormal numbers have no round ticks.
        warnings.simplefilter("ignore")
        yield Canvas(figsize=(8.6, height), layout="constrained")


def _svg(canvas: Canvas, label: str) -> Markup:
    """The drawing as an element of an HTML page: without XML's header and without ids that two charts share."""
    out = io.StringIO()
    canvas.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    drawing = out.getvalue()
    # What is drawn lies inside the axes, so nothing has to be clipped; other ids are no use to a page.
    drawing = re.sub(
        r'(?<=<g) id="[^"]*"| clip-path="[^"]*"', "", drawing[drawing.index(">", drawing.index("<svg")) + 1 :]
    )
    width, height = (side * 72 for side in canvas.get_size_inches())
    head = Markup('<svg class="chart" viewBox="0 0 {:.1f} {:.1f}" role="img" aria-label="{}">').format(
        width, height, label
    )
    return head + Markup(drawing.replace(_INK, "currentColor"))  # matplotlib has escaped its texts
