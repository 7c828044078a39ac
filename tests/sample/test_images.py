"""Images carry their provenance in every format; contact sheet and gallery are bounded and safe."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import InputError
from pipeline.media import (
    PagePicture,
    caption_of,
    choose,
    contact_sheet,
    decode_image,
    encode_image,
    read_provenance,
    render_page,
    thumbnail,
)

KINDS = ("png", "jpeg", "webp")
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
texts = st.text(max_size=50)


@given(
    st.dictionaries(
        texts, st.one_of(texts, st.integers(), st.none(), st.floats(allow_nan=False, allow_infinity=False))
    )
)
@settings(max_examples=40, deadline=None)
def test_provenance_survives_every_format(provenance: dict[str, Any]) -> None:
    for kind in KINDS:
        data = encode_image(PIXELS, provenance, kind=kind)
        assert read_provenance(data) == provenance
        assert data == encode_image(PIXELS, provenance, kind=kind)


def test_pixels_survive_what_is_lossless() -> None:
    assert np.array_equal(decode_image(encode_image(PIXELS, {}, kind="png")), PIXELS)
    assert np.array_equal(decode_image(encode_image(PIXELS, {}, kind="webp", quality=100)), PIXELS)
    smooth = np.full((16, 16, 3), 90, np.uint8)
    assert np.abs(decode_image(encode_image(smooth, {}, kind="jpeg")).astype(int) - 90).max() <= 2


def test_images_without_provenance_are_told_apart() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        out = io.BytesIO()
        Image.fromarray(PIXELS).save(out, kind)
        with pytest.raises(InputError, match="carries no provenance"):
            read_provenance(out.getvalue())
    with pytest.raises(InputError, match="no readable PNG, JPEG or WebP"):
        read_provenance(b"nonsense")


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_image(PIXELS.astype(np.float32), {})
    with pytest.raises(ValueError, match="image kind 'gif'"):
        encode_image(PIXELS, {}, kind="gif")
    with pytest.raises(ValueError, match="EXIF holds"):
        encode_image(PIXELS, {"x": "y" * 70_000}, kind="jpeg")
    assert read_provenance(encode_image(PIXELS, {"x": "y" * 70_000}, kind="png"))["x"] == "y" * 70_000


def requests(labels: list[int | None]) -> pa.Table:
    names = [i.to_bytes(16, "big") for i in range(len(labels))]
    return pa.table({"request_id": names, "label": labels, "prompt": pa.array([None] * len(labels), pa.string())})


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 20), st.randoms())
@settings(max_examples=80, deadline=None)
def test_the_choice_is_bounded_fair_and_blind_to_order(labels: list[int], count: int, random: Any) -> None:
    table = requests(list(labels))
    chosen = choose(table, count)
    assert len(chosen) == len(set(chosen))
    shown = [labels[int.from_bytes(name, "big")] for name in chosen]
    classes = len(set(labels))
    assert len(chosen) == (min(count, len(labels)) if classes <= count else count)
    shares = {c: shown.count(c) for c in set(shown)}
    for c, share in shares.items():
        assert share >= min(labels.count(c), max(shares.values()) - 1)
    order = list(range(len(labels)))
    random.shuffle(order)
    assert choose(table.take(order), count) == chosen


def test_no_image_is_no_choice() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        choose(requests([1]), 0)


def test_a_sheet_has_a_tile_for_each_image() -> None:
    image = encode_image(PIXELS, {})
    sheet = decode_image(contact_sheet([image] * 5, ["class 1", "日本語", "x" * 500, "", "<b>"], tile=48))
    assert sheet.shape == (2 * (48 + 18 + 6) + 6, 3 * (48 + 6) + 6, 3)
    assert decode_image(thumbnail(image, 100)).shape == (64, 96, 3)
    assert decode_image(thumbnail(image, 12)).shape == (8, 12, 3)
    with pytest.raises(ValueError, match="one caption an image"):
        contact_sheet([image], [])


def test_a_caption_tells_what_was_asked() -> None:
    base = {"label": None, "prompt": None, "seed": 4}
    assert caption_of(base) == "unconditional · seed 4"
    assert caption_of({**base, "label": 2}) == "class 2 · seed 4"
    assert caption_of({**base, "prompt": "a cat"}) == "a cat · seed 4"
    assert caption_of({**base, "label": 2, "prompt": "a cat"}) == "class 2 · a cat · seed 4"


class Tags(HTMLParser):
    """Collects every tag and attribute that a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def gallery(title: str, facts: dict[str, str], picture: PagePicture, note: str) -> str:
    return render_page("gallery.html", title=title, facts=facts, pictures=[picture], note=note)


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_no_text_becomes_markup(text: str) -> None:
    hostile = f"{text}\"'><script src=//x></script><img src=x onerror=y>"
    picture = PagePicture(b"png", "image/png", hostile, details=hostile)
    page = gallery(hostile, {hostile: hostile}, picture, hostile)
    tags = Tags()
    tags.feed(page)
    assert {t for t, _ in tags.seen}.isdisjoint({"script", "link", "iframe", "object"})
    images = [a for t, a in tags.seen if t == "img"]
    assert len(images) == 1
    assert set(images[0]) == {"src", "alt"}
    assert images[0]["src"] == "data:image/png;base64,cG5n"


def test_the_page_needs_no_network() -> None:
    page = gallery("t", {}, PagePicture(b"x", "image/png", "c"), "")
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page)
    assert "url(" not in page
    assert "default-src 'none'" in page
