"""Parquet files parsed in a child process, so that no file can crash, hang or bloat the process that asks.

    parent  --task: file size, source, span-->  child
            <--"read" offset, length-- ... --bytes-->        every byte comes from the parent, with its retries
            <--"row" ... , "layout", "refused", "damaged", "failed", "end"--

The child has no store and no credentials of its own. It is ended by its alarm when no row comes after _CPU_S seconds
of CPU, and by the parent when it is silent for ten times as long. Its end becomes a TableError.
"""

from __future__ import annotations

import atexit
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.source.config import ParquetSource
from pipeline.source.pixels.child_process import Child, Pool, alarms, limited_pipes, read_exactly, read_header, send
from pipeline.source.reading import parquet_file
from pipeline.source.reading.parquet_file import Item, Span, TableError
from pipeline.source.reading.rows import ReadRange, SourceRow
from pipeline.source.reasons import Reason
from pipeline.storage.stores import RangedFile

Message = tuple[dict[str, Any], bytes | None]  # a header, and the image of a row

_CPU_S = 60.0
_SILENCE_S = 600.0
_REQUEST_BYTES = 8 << 20
_ROW_FIELDS = tuple(f.name for f in fields(SourceRow) if f.name != "image")


def layout(read: ReadRange, size_bytes: int, source: ParquetSource, where: str) -> list[tuple[int, int]]:
    """As `parquet_file.layout`, in a child; also raises TableError for a timeout, a crash or too much memory."""
    groups: list[tuple[int, int]] = []
    for message, _ in _run(read, source, {"size": size_bytes, "where": where, "span": None}):
        groups = [(rows, size) for rows, size in message["groups"]]
    return groups


def rows(read: ReadRange, size_bytes: int, source: ParquetSource, where: str, span: Span) -> Iterator[Item]:
    """As `parquet_file.rows`, in a child; also raises TableError for a timeout, a crash or too much memory."""
    for message, image in _run(read, source, {"size": size_bytes, "where": where, "span": asdict(span)}):
        row = SourceRow(image=image, **message["row"])
        yield row if message["uri"] is None else (row, message["uri"])


def _run(read: ReadRange, source: ParquetSource, task: dict[str, Any]) -> Iterator[Message]:
    child, finished = children.take(source.memory_mb), False
    broken: Exception | None = None
    try:
        child.send({**task, "source": source.model_dump_json(exclude_unset=True)}, [])
        while not finished:
            message = child.receive_header(time.monotonic() + _SILENCE_S)
            kind = message["kind"]
            if kind == "read":
                try:
                    data = read(message["start"], min(message["length"], _REQUEST_BYTES))
                except Exception as error:  # noqa: BLE001 - stores raise anything; raised when the child has ended its task
                    broken = error
                    child.send({"size": -1}, [])
                else:
                    child.send({"size": len(data)}, [data])
            elif kind in ("row", "layout"):
                size = message.get("size")
                yield message, None if size is None else child.receive(size, time.monotonic() + _SILENCE_S)
            else:
                finished = True
                if kind == "failed" and broken is not None:
                    raise broken
                if kind == "refused":
                    raise InputError(message["what"], **message["about"])
                if kind == "damaged":
                    raise TableError(Reason(message["reason"]), message["message"])
    except (EOFError, BrokenPipeError):
        code = child.exit_code()
        if code == -signal.SIGPROF:  # its own alarm
            raise TableError(Reason.DECODE_TIMEOUT, f"no row came in {_CPU_S:g} CPU seconds") from None
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise TableError(Reason.DECODER_CRASHED, f"the process that read the file ended by {end}") from None
    except (KeyError, TypeError, ValueError) as error:
        # No answer of ours: `finished` is not set, so whoever speaks there is not asked again.
        raise TableError(
            Reason.DECODER_CRASHED, f"the process that read the file gave no answer: {error!r}"
        ) from None
    finally:
        if finished:
            children.give_back(child)
        else:
            child.kill()


children: Pool[Child] = Pool(lambda memory_mb: Child("pipeline.source.reading.parquet_child", memory_mb))


@atexit.register
def close_children() -> None:
    """End every idle child; the next file starts a new one."""
    children.close()


# -- in the child --------------------------------------------------------------------------------------------


def _messages(task: dict[str, Any], read: ReadRange) -> Iterator[Message]:
    source = ParquetSource.model_validate_json(task["source"])
    with RangedFile(read, task["size"], whole=False) as file:
        try:
            if task["span"] is None:
                yield {"kind": "layout", "groups": parquet_file.layout(file, source, task["where"])}, None
            else:
                span = task["span"]
                span["ranges"] = tuple(tuple(pair) for pair in span["ranges"])
                for item in parquet_file.rows(file, source, task["where"], Span(**span)):
                    row, uri = item if isinstance(item, tuple) else (item, None)
                    size = None if row.image is None else len(row.image)
                    values = {name: getattr(row, name) for name in _ROW_FIELDS}
                    yield {"kind": "row", "row": values, "uri": uri, "size": size}, row.image
            yield {"kind": "end"}, None
        except InputError as error:
            about = {"key": error.key, "value": error.value, "rule": error.rule, "next_step": error.next_step}
            yield {"kind": "refused", "what": error.what, "about": about}, None
        except TableError as error:
            yield {"kind": "damaged", "reason": error.reason.value, "message": error.message}, None
        except MemoryError:
            yield {"kind": "damaged", "reason": Reason.DECODE_MEMORY.value, "message": "out of memory"}, None
        except OSError:
            yield {"kind": "failed"}, None


def _serve(memory_mb: int) -> None:
    """Answer tasks from standard input until it closes."""
    source, sink = limited_pipes(memory_mb)
    pa.set_memory_pool(pa.system_memory_pool())  # others reserve address space, which is limited here

    def read(start: int, length: int) -> bytes:
        out = bytearray()
        while length > len(out):
            send(sink, {"kind": "read", "start": start + len(out), "length": length - len(out)}, [])
            size = read_header(source)["size"]
            if size < 0:
                raise OSError("the parent could not read these bytes")
            if not size:
                break
            out += read_exactly(source, size)
        return bytes(out)

    while True:
        try:
            task = read_header(source)
            alarms(_CPU_S, 0)
            for message, image in _messages(task, read):
                send(sink, message, [] if image is None else [image])
                alarms(_CPU_S, 0)
            alarms(0, 0)
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
