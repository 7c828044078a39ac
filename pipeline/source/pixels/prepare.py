"""A source row becomes rows of pixels, or one reject: the last step before the device.

SourceRow --render (here or in a child)--> one output per resolution --flip--> list[PreparedImage]
"""

from __future__ import annotations

import atexit
import hashlib
import signal
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

import numpy as np
from PIL import features

from pipeline.source.config import BudgetBuckets, ImageConfig
from pipeline.source.pixels.child_process import Child, Pool, alarms, limited_pipes, read_exactly, read_header, send
from pipeline.source.pixels.decode import EXTRAS, is_risky, sniff
from pipeline.source.pixels.render import DRAFT_MARGIN, Placement, Rendered, Rendering, Size, bucket_sizes, render
from pipeline.source.reading.rows import SourceRow, sample_id
from pipeline.source.reasons import DecodeError, Reason

# Raised by hand whenever a change of the decode policy changes pixels; part of every dataset's fingerprint.
POLICY_VERSION = 2


@dataclass(frozen=True)
class PreparedImage:
    """One row for the codec: pixels uint8 [h, w, 3] sRGB and where they come from.

    original: (height, width) after EXIF orientation; crop: (top, left, height, width) in those pixels, before
    any flip; sample_id: 16 bytes; content_sha256: 32 bytes, of the stored file; phash: 64 bits or None.
    """

    pixels: np.ndarray
    bucket: Size
    variant: int
    flipped: bool
    original: Size
    crop: tuple[int, int, int, int]
    sample_id: bytes
    content_sha256: bytes
    phash: int | None


@dataclass(frozen=True)
class Reject:
    """A row without pixels: status "rejected" or "filtered", a reason of the closed list, and the particulars."""

    status: str
    reason: Reason
    message: str

    @staticmethod
    def of(reason: Reason, message: str) -> Reject:
        """A reject whose status follows from its reason."""
        return Reject(reason.status, reason, message)


def prepare(row: SourceRow, image: ImageConfig) -> list[PreparedImage] | Reject:
    """Every variant of a row, or why there is none; never raises for any bytes.

    Variant numbers are fixed by the configuration: resolution index, times two with flips (the odd ones flipped);
    a resolution that is filtered by the upscale limit leaves its numbers out.
    """
    if row.reason is not None:
        return Reject.of(Reason(row.reason), row.message or "")
    if row.image is None:
        return Reject.of(Reason.NO_IMAGE, "the row holds no image")
    identity = sample_id(row.source, row.key)
    kind = sniff(row.image)
    risky = image.isolate == "risky" and kind in image.formats and kind is not None and is_risky(row.image, kind)
    draw = render_isolated if risky or image.isolate == "all" else render
    try:
        rendering = draw(row.image, identity, row.exif_orientation, image)
    except DecodeError as error:
        return Reject.of(error.reason, error.message)
    digest = hashlib.sha256(row.image).digest()
    out = []
    for flipped in (False, True) if image.flip else (False,):
        for output in rendering.outputs:
            at = output.placement
            variant = output.resolution_index * (2 if image.flip else 1) + flipped
            out.append(
                PreparedImage(
                    pixels=np.ascontiguousarray(output.pixels[:, ::-1]) if flipped else output.pixels,
                    bucket=at.bucket,
                    variant=variant,
                    flipped=flipped,
                    original=output.original,
                    crop=(at.top, at.left, at.height, at.width),
                    sample_id=sample_id(row.source, row.key, variant),
                    content_sha256=digest,
                    phash=rendering.phash,
                )
            )
    return out


_THUMBNAIL = 96  # pixels of a side, by area
# Left out for what the configuration wants: the bytes themselves may well be a picture.
_SOUND = frozenset((Reason.TOO_SMALL, Reason.UPSCALE_LIMIT, Reason.EXTREME_ASPECT))


def thumbnail_of(row: SourceRow, image: ImageConfig, reason: Reason) -> np.ndarray | None:
    """A small picture, uint8 [h, w, 3], of a row that was left out for its shape; None where there is nothing to see.

    Decoded in a killable child whatever `image.isolate` says, under the same limits of bytes, pixels and seconds.
    """
    if row.image is None or reason not in _SOUND:
        return None
    shape = {"resolution": _THUMBNAIL, "buckets": BudgetBuckets(kind="budget", step=8, max_aspect=4.0)}
    wide = {"multiple_of": 1, "min_side": 1, "max_upscale": 1e6, "max_aspect": 1e6, "crop": "center", "phash": False}
    try:
        drawn = render_isolated(
            row.image, bytes(16), row.exif_orientation, image.model_copy(update={**shape, **wide})
        )
    except DecodeError:
        return None
    return drawn.outputs[0].pixels


def policy_fingerprint(image: ImageConfig) -> dict[str, Any]:
    """Everything in preprocessing that changes pixels or which crop they are of; limits and filters are not in it.

    Limits decide only whether a row exists, so raising one and retrying its rejects extends a dataset.
    Versions are those of the libraries whose arithmetic reaches the pixels.
    """
    return {
        "policy_version": POLICY_VERSION,
        "resize": "lanczos, reducing_gap 3",
        "draft_margin": DRAFT_MARGIN if image.draft else None,
        "buckets": {str(r): [list(b) for b in bucket_sizes(image, r)] for r in image.resolutions},
        "crop": image.crop,
        "flip": image.flip,
        "matte": list(image.matte),
        "icc": "to sRGB, relative colorimetric, black point compensation",
        "pillow": metadata.version("pillow"),
        "libraries": {
            **{name: features.version(name) for name in ("jpg", "littlecms2", "jpg_2000", "webp", "avif", "libtiff")},
            **{name: _installed(name) for name in ("tifffile", "imagecodecs", *EXTRAS.values())},
        },
    }


def _installed(module: str) -> str | None:
    """The version of the distribution that provides a module, None without it."""
    try:
        return metadata.version({"pillow_jxl": "pillow-jxl-plugin"}.get(module, module))
    except metadata.PackageNotFoundError:
        return None


# -- Decoding in a child process that may be slow, crash or eat memory without harm to anybody ---------------------
#
# A child takes one image at a time (see `child_process`), under CPU seconds, ten times as many seconds of wall clock,
# and a limit on its address space. The parent turns a dead child into a reason and starts another with the next
# image.


_WALL_PER_CPU = 10.0
_GRACE_S = 10.0


def render_isolated(data: bytes, sample_id: bytes, orientation_hint: int | None, image: ImageConfig) -> Rendering:
    """As `render`, in a child process; also raises DecodeError for a timeout, a crash or too much memory."""
    child = children.take(image.decode_memory_mb)
    try:
        rendering = child.render(data, sample_id, orientation_hint, image)
    except DecodeError:
        children.give_back(child)
        raise
    except BaseException:
        child.kill()
        raise
    children.give_back(child)
    return rendering


class _Decoder(Child):
    """A child that decodes."""

    def render(self, data: bytes, sample_id: bytes, hint: int | None, image: ImageConfig) -> Rendering:
        """Send one image and wait for its pixels, its reason, or the child's end."""
        header = {
            "size": len(data),
            "sample_id": sample_id.hex(),
            "hint": hint,
            "image": image.model_dump_json(),
        }
        deadline = time.monotonic() + image.decode_cpu_s * _WALL_PER_CPU + _GRACE_S
        try:
            self.send(header, [data])
            answer = self.receive_header(deadline)
            if "reason" in answer:
                raise DecodeError(Reason(answer["reason"]), str(answer["message"])[:500])
            return self._rendering(answer, image, deadline)
        except (EOFError, BrokenPipeError):
            code, cpu_s = self.exit_code(), image.decode_cpu_s
            if code in (-signal.SIGPROF, -signal.SIGALRM):  # its own alarms
                limit = f"{cpu_s:g} CPU seconds" if code == -signal.SIGPROF else f"{cpu_s * _WALL_PER_CPU:g} seconds"
                raise DecodeError(Reason.DECODE_TIMEOUT, f"decoding took more than {limit}") from None
            end = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise DecodeError(Reason.DECODER_CRASHED, f"the decoding process ended by {end}") from None
        except (KeyError, TypeError, ValueError, IndexError) as error:
            self.kill()  # no answer of ours: whoever speaks there is not to be asked again
            raise DecodeError(
                Reason.DECODER_CRASHED, f"the decoding process gave no answer: {error!r}"[:200]
            ) from None

    def _rendering(self, answer: dict[str, Any], image: ImageConfig, deadline: float) -> Rendering:
        """The pixels that an answer announces, each of the size of a bucket."""
        outputs = []
        for output in answer["outputs"]:
            index, (bucket, top, left, height, width) = int(output["index"]), output["placement"]
            size = (int(bucket[0]), int(bucket[1]))
            if size not in bucket_sizes(image, image.resolutions[index]):
                raise ValueError(f"pixels of {size}")
            array = np.frombuffer(self.receive(3 * size[0] * size[1], deadline), np.uint8).reshape(*size, 3)
            placement = Placement(size, int(top), int(left), int(height), int(width))
            original = (int(output["original"][0]), int(output["original"][1]))
            outputs.append(Rendered(index, array, placement, original))
        return Rendering(tuple(outputs), None if answer["phash"] is None else int(answer["phash"]))


children: Pool[_Decoder] = Pool(lambda memory_mb: _Decoder("pipeline.source.pixels.prepare", memory_mb))


@atexit.register
def close_children() -> None:
    """End every idle child; the next isolated image starts a new one."""
    children.close()


# -- in the child --------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _config(text: str) -> ImageConfig:
    return ImageConfig.model_validate_json(text)


def _answer(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    try:
        rendering = render(data, bytes.fromhex(header["sample_id"]), header["hint"], _config(header["image"]))
    except DecodeError as error:
        return {"reason": error.reason.value, "message": error.message}, []
    except MemoryError:
        return {"reason": Reason.DECODE_MEMORY.value, "message": "out of memory"}, []
    blobs = [o.pixels.tobytes() for o in rendering.outputs]
    outputs = [
        {
            "index": o.resolution_index,
            "placement": [
                o.placement.bucket,
                o.placement.top,
                o.placement.left,
                o.placement.height,
                o.placement.width,
            ],
            "original": o.original,
        }
        for o in rendering.outputs
    ]
    return {"outputs": outputs, "phash": rendering.phash}, blobs


def _serve(memory_mb: int) -> None:
    """Answer images from standard input until it closes."""
    source, sink = limited_pipes(memory_mb)
    while True:
        try:
            header = read_header(source)
            data = read_exactly(source, header["size"])
        except EOFError:
            return
        cpu_s = _config(header["image"]).decode_cpu_s
        alarms(cpu_s, cpu_s * _WALL_PER_CPU)
        answer, blobs = _answer(header, data)
        alarms(0, 0)
        send(sink, answer, blobs)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
