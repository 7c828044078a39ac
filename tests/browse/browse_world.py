"""Datasets of each kind to look at, made by hand, with texts that would act if they were not escaped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pyarrow as pa

from pipeline.browse import PageServer, open_server
from pipeline.browse.pages import Pages
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import note_run
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.plan import append_version, read_plan
from pipeline.store.writer import Committer
from pipeline.text.job import TEXT
from tests.evaluate.evaluate_world import write_samples
from tests.support.rows import Listed, claim, committer, latent_rows, planned_root, rejected_rows

HOSTILE = "\"'><script>document.title = 'run'</script><img src=x onerror=alert(1)>"
NO_STORE = "sqlite:////nowhere/mlflow.db"


def write_latents(path: Path) -> str:
    """Two buckets in two files; 5 visible rows of unit 0, 3 of unit 1, two rejected and one filtered."""
    root = planned_root(str(path), units=2, rows=6)
    generation = claim(root)
    first = latent_rows([(0, row) for row in range(5)], label=1)
    texts = pa.array([HOSTILE, "a cat", "a dog", None, "a CAT on a mat"], pa.string())
    first = first.set_column(first.schema.get_field_index("caption"), first.schema.field("caption"), texts)
    bad = rejected_rows([(0, 5)], "corrupt").set_column(6, "message", pa.array([HOSTILE]))
    committer(root, generation).commit(first, bad, {})
    second = latent_rows([(1, row) for row in range(3)], bucket="32x24", label=3)
    left_out = pa.concat_tables(
        [rejected_rows([(1, 3)], "truncated"), rejected_rows([(1, 4)], "too_small", "filtered")]
    )
    committer(root, generation).commit(second, left_out, {})
    recipe = {"source": {"kind": "folder", "uri": "mem", "classes": ["zero", HOSTILE, "two", "three"]}}
    note = {"job": "test", "handle": "key:" + "0" * 32, "recipe": recipe | {"image": {}, "batch_size": 1}}
    note_run(root, generation.number, note)
    return root.uri


def write_images(path: Path, *, shade: int = 0, count: int = 8, outside: bool = False) -> str:
    images = np.zeros((count, 16, 16, 3), np.uint8) + shade
    images[:, :, :, 0] = np.arange(count)[:, None, None] * 8
    prompts = [HOSTILE if at == 0 else f"prompt {at}" for at in range(count)]
    write_samples(str(path), images, [at % 4 for at in range(count)], prompts, outside=outside)
    return str(path)


def write_text(path: Path) -> str:
    root = Root(str(path))
    claim_identity(root, Identity("text", {"width": 4, "max_length": 2, "embedding_dtype": "float16"}, {}))
    generation = claim(root)
    append_version(read_plan(root), [[Listed("a"), Listed("b")]], source={}, generation=generation.number)
    rows = [
        {
            "sample_id": bytes([at]) * 16, "key": "0" * 32, "unit": 0, "row": at, "variant": 0, "bucket": "2x4",
            "caption": caption, "tokens": 2, "truncated": False, "embedding": bytes(16), "pooled": None,
        }
        for at, caption in enumerate(("", HOSTILE))
    ]  # fmt: skip
    Committer(root, generation.number, 1 << 20, None, {}).commit(pa.Table.from_pylist(rows, schema=TEXT), None, {})
    return root.uri


@contextmanager
def serving(
    uri: str, codec: str | None = None, beside: str | None = None, tracking: str = NO_STORE
) -> Iterator[PageServer]:
    """A server in a thread of this process."""
    with open_server(Pages(uri, codec, beside, tracking), None) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server: PageServer, page: str = "", method: str = "GET", **headers: str) -> tuple[int, str, Any]:
    """(status, text, headers) of a page below the address, or of another one; of a picture a letter a byte."""
    url = page if page.startswith("http") else server.address + page
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urlopen(Request(url, method=method, headers=named), timeout=30) as answer:
            return (
                answer.status,
                answer.read().decode(answer.headers.get_content_charset() or "latin-1"),
                answer.headers,
            )
    except HTTPError as error:
        return error.code, error.read().decode(error.headers.get_content_charset() or "latin-1"), error.headers
