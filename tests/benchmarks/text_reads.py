"""What a text-conditioned stream reads of a remote store for the embeddings of an epoch, beside what they take.

    python -m tests.benchmarks.text_reads [--rows 32768] [--tokens 32] [--width 768] [--window-mb 64]
        [--cache-mb 1024] [--out DIR]

Captions of 8 to twice --tokens less 8 tokens, embedded in the order of their rows; latents of 8 KiB. The store is
fsspec's in this process's memory, so that bytes and requests are counted exactly and seconds mean little. Shuffled:
the latents were compacted in another order after their captions were embedded, so that a caption's neighbours in the
store are not those of its row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from pipeline.storage.root import Root
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.state import read_state
from pipeline.store.plan import append_version, read_plan
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from pipeline.text.dataset import PlannedCaption, TextEmbeddings, caption_hash, in_units
from pipeline.text.job import embed_gaps
from tests.benchmarks import report
from tests.support.maintain import compact
from tests.support.rows import claim, committer, latent_rows, planned_root

UNIT_ROWS, SHAPE = 2048, (4, 32, 32)


def make_latents(uri: str, rows: int) -> None:
    """Random latents, a caption each."""
    root = planned_root(uri, units=rows // UNIT_ROWS, rows=UNIT_ROWS)
    generation, chance = claim(root), np.random.default_rng(0)
    for unit in range(rows // UNIT_ROWS):
        table = latent_rows([(unit, row) for row in range(UNIT_ROWS)])
        latents = [row.tobytes() for row in chance.normal(size=(UNIT_ROWS, int(np.prod(SHAPE)))).astype(np.float16)]
        captions = [caption(unit * UNIT_ROWS + row) for row in range(UNIT_ROWS)]
        new = {
            "latent": pa.array(latents, pa.large_binary()),
            "latent_shape": pa.array([list(SHAPE)] * UNIT_ROWS, pa.list_(pa.int32(), 3)),
            "caption": pa.array(captions, pa.string()),
        }
        for name, values in new.items():
            table = table.set_column(table.column_names.index(name), table.schema.field(name), values)
        committer(root, generation, row_group_bytes=2 << 20).commit(table, None, {})
    generation.abandon()


def caption(number: int) -> str:
    """That of a row."""
    return f"picture {number}"


def embed(uri: str, rows: int, tokens: int, width: int) -> None:
    """Random embeddings of all captions and the empty prompt, in the job's row groups."""
    longest = 2 * tokens - 8

    def encode(captions: Sequence[str]) -> Any:
        chance = np.random.default_rng(len(captions))
        return SimpleNamespace(
            tokens=chance.integers(8, longest + 1, len(captions)).astype(np.int32),
            truncated=np.zeros(len(captions), np.bool_),
            embeddings_NLD=chance.normal(size=(len(captions), longest, width)).astype(np.float32),
            pooled_NP=None,
        )

    root = Root(uri)
    told = {"max_length": longest, "width": width, "embedding_dtype": "float16", "pooled": "none"}
    claim_identity(root, Identity("text", told, {}))
    generation = claim(root)
    texts = ["", *map(caption, range(rows))]
    planned = (PlannedCaption(caption_hash(text).hex(), len(text), text) for text in texts)
    append_version(read_plan(root), in_units(planned, 1024), source={}, generation=generation.number)
    settings: dict[str, Any] = {"embedding_dtype": "float16", "row_group_bytes": 4 << 20}
    embed_gaps(root, generation, read_state(root), lambda: encode, **settings)
    generation.close({"status": "done"})


def epoch(latents: str, text: str, window_bytes: int, cache_bytes: int) -> dict[str, float]:
    """What an epoch's embeddings cost, where so many bytes of them may be held."""
    embeddings = TextEmbeddings.open(text, cache_bytes=cache_bytes)
    asked: list[int] = []
    real = Root.read_range

    def count(root: Root, key: str, start: int, length: int) -> bytes:
        if root.uri == text:
            asked.append(length)
        return real(root, key, start, length)

    Root.read_range = count  # type: ignore[method-assign]
    rows = needed = 0
    began = time.perf_counter()
    try:
        dataset = LatentDataset.open(latents)
        settings: dict[str, Any] = {"batch_size": 64, "window_bytes": window_bytes, "sizes": False}
        with LatentStream(dataset, seed=1, text=embeddings, **settings) as stream:
            for batch in islice(stream, stream.steps_per_epoch):
                assert batch.text is not None
                rows += len(batch.sample_ids)
                needed += int(batch.text[1].sum()) * 2 * embeddings.width
            seconds = time.perf_counter() - began
            read, requests = sum(asked), len(asked)
    finally:
        Root.read_range = real  # type: ignore[method-assign]
    return {"of_needed": read / needed, "requests_a_row": requests / rows, "rows_per_s": rows / seconds}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_768, help=f"a multiple of {UNIT_ROWS}")
    parser.add_argument("--tokens", type=int, default=32, help="of a caption, on average")
    parser.add_argument("--width", type=int, default=768, help="of a token")
    parser.add_argument("--window-mb", type=int, default=64, help="stream.window_bytes, MiB")
    parser.add_argument("--cache-mb", type=int, default=1024, help="data.text_cache_bytes, MiB")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_latents(f"{folder}/latents", args.rows)
        embed(f"{folder}/text", args.rows, args.tokens, args.width)
        remote = fsspec.filesystem("memory")
        remote.put(f"{folder}/text/", "/text/", recursive=True)
        for name in ("as embedded", "shuffled"):
            if name == "shuffled":
                compact(f"{folder}/latents", seed=0, shard_bytes=64 << 20, row_group_bytes=2 << 20)
            window, cache = args.window_mb << 20, args.cache_mb << 20
            found[name] = epoch(f"{folder}/latents", "memory://text", window, cache)
    rows = [[name, one["of_needed"], one["requests_a_row"], one["rows_per_s"]] for name, one in found.items()]
    print(report.table(["rows lie", "bytes read, of those needed", "requests a row", "rows/s"], rows))
    report.write(args.out, "text_reads", {**vars(args), "out": str(args.out), "epochs": found})


if __name__ == "__main__":
    main()
