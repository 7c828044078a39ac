"""Which samples a person is shown, and the contact sheet of them.

The choice is bounded and depends only on the requests: every condition gets its share, within a condition the
first by request id. A run of a million images reads some dozens of them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.media.images import draw_grid

MAX_SHOWN = 64
TILE = 128


def choose(requests: pa.Table, count: int = MAX_SHOWN) -> list[bytes]:
    """At most `count` request ids, spread evenly over the conditions (labels or prompts), condition by condition.

    With more conditions than `count`, an evenly spaced part of them is shown with one image each.
    """
    if count < 1:
        raise ValueError(f"count {count}: at least one image is shown")
    by_condition: dict[tuple[bool, int, str], list[bytes]] = {}
    columns = (requests[name].to_pylist() for name in ("request_id", "label", "prompt"))
    for name, label, prompt in zip(*columns, strict=True):
        key = (label is None, -1 if label is None else label, prompt or "")
        by_condition.setdefault(key, []).append(name)
    keys = sorted(by_condition)
    if len(keys) > count:
        keys = [keys[i * len(keys) // count] for i in range(count)]
    queues = {key: sorted(by_condition[key]) for key in keys}
    taken: dict[tuple[bool, int, str], int] = dict.fromkeys(keys, 0)
    left = min(count, sum(len(queue) for queue in queues.values()))
    while left:
        for key in keys:
            if left and taken[key] < len(queues[key]):
                taken[key] += 1
                left -= 1
    return [name for key in keys for name in queues[key][: taken[key]]]


def caption(request: Mapping[str, Any]) -> str:
    """One line that tells a sample from its neighbours."""
    if request["prompt"] is not None:
        what = str(request["prompt"])
    else:
        what = "unconditional" if request["label"] is None else f"class {request['label']}"
    return f"{what} · seed {request['seed']}"


def contact_sheet(images: Sequence[bytes], captions: Sequence[str], *, tile: int = TILE) -> bytes:
    """PNG bytes of a nearly square grid of encoded images with their captions."""
    columns = max(1, math.ceil(math.sqrt(len(images))))
    return draw_grid(images, captions, columns=columns, tile=tile)
