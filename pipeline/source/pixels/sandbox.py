"""Decoding in a child process that may be slow, crash or eat memory without harm to anybody.

A child takes one image at a time (see `child_process`), under CPU seconds, ten times as many seconds of wall clock,
and a limit on its address space. The parent turns a dead child into a reason and starts another with the next image.
"""

from __future__ import annotations

import atexit
import signal
import sys
import time
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.source.config import ImageConfig
from pipeline.source.pixels.child_process import Child, Pool, alarms, limited_pipes, read_exactly, read_header, send
from pipeline.source.pixels.render import Placement, Rendered, Rendering, bucket_sizes, render
from pipeline.source.reasons import DecodeError, Reason

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


children: Pool[_Decoder] = Pool(lambda memory_mb: _Decoder("pipeline.source.pixels.sandbox", memory_mb))


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
