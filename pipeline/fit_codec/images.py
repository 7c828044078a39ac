"""A keyed choice of images of a source, as one uint8 array to fit on."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.errors import InputError
from pipeline.source.config import ImageConfig, SourceConfig
from pipeline.source.pixels.prepare import Reject, prepare
from pipeline.source.reading.listing import Entry, list_entries
from pipeline.source.reading.readers import read_unit
from pipeline.source.reading.rows import EndOfUnit

_ENTRIES_PER_READ = 64
_MIN_IMAGES = 5


@dataclass(frozen=True)
class FitImages:
    """uint8 [n,h,w,3] to fit on and held out, rejects by reason, and a digest of what was chosen."""

    train: npt.NDArray[np.uint8]
    holdout: npt.NDArray[np.uint8]
    rejects: dict[str, int]
    digest: str


def collect_images(source: SourceConfig, image: ImageConfig, count: int, holdout: int, seed: int) -> FitImages:
    """Up to `count` images to fit on and `holdout` (at most a fifth) kept aside, as the hash of (seed, key) says.

    So neither the order of the listing nor a directory per class decides. Memory holds the chosen images and
    as many entries. InputError when fewer than five images can be decoded.
    """
    wanted, side = count + holdout, image.resolutions[0]
    pixels = np.empty((wanted, side, side, 3), np.uint8)
    rejects: Counter[str] = Counter()
    # Twice as many entries as images: some may be rejected.
    entries = heapq.nsmallest(2 * wanted, list_entries(source), key=lambda e: _rank(seed, e))
    found = 0
    for array in _decoded(source, image, entries, rejects):
        pixels[found] = array
        found += 1
        if found == wanted:
            break
    if found < _MIN_IMAGES:
        reasons = ", ".join(f"{n} {reason}" for reason, n in rejects.most_common()) or "nothing rejected"
        raise InputError(
            f"The source gives {found} usable images ({reasons})",
            key="source.uri",
            value=source.uri,
            rule=f"fitting a codec needs at least {_MIN_IMAGES}",
            next_step="name a source with more images, or relax the limits under image",
        )
    aside = min(holdout, found // _MIN_IMAGES)
    digest = hashlib.blake2b(pixels[:found].data, digest_size=16).hexdigest()
    return FitImages(pixels[aside:found], pixels[:aside], dict(rejects), digest)


def _rank(seed: int, entry: Entry) -> bytes:
    text = f"{seed}\0{entry.key}\0{entry.row_start}"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _decoded(
    source: SourceConfig, image: ImageConfig, entries: Sequence[Entry], rejects: Counter[str]
) -> Iterator[npt.NDArray[np.uint8]]:
    for start in range(0, len(entries), _ENTRIES_PER_READ):
        for row in read_unit(source, entries[start : start + _ENTRIES_PER_READ], [(0, None)]):
            if isinstance(row, EndOfUnit):
                continue
            prepared = prepare(row, image)
            if isinstance(prepared, Reject):
                rejects[prepared.reason.value] += 1
            else:
                yield prepared[0].pixels
