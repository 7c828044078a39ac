"""What runs on the workers: reading requests, denoising, decoding, encoding, committing. All of it pickles."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dataflow.cluster import is_worker
from pipeline.dataflow.device_faults import ends_with_its_device, out_of_memory
from pipeline.dataflow.monitor import Reports, answer, held, one_by_one
from pipeline.errors import ConfigError
from pipeline.sample.output import IMAGES, encode_rows
from pipeline.sample.plan import PLAN_SCHEMA, request_row
from pipeline.sample.provenance import Draw, Origin
from pipeline.storage.root import Root
from pipeline.store.plan import EntrySpan, Work, read_entries
from pipeline.store.read.dataset import place_in
from pipeline.store.schema import REJECTS
from pipeline.store.writer import Committer
from pipeline.text.files import TextSpec

# --------------------------------------------------------------------------------------------------------------
# What is said when a stage of sampling runs out of memory: a wrong configuration, not a fault of the program.


def batch_fits(draw: Draw, doing: str) -> AbstractContextManager[None]:
    """ConfigError naming batch_size when memory runs out inside; every other error passes.

    Raised inside an actor's call it reaches the driver as what it is, and no task is tried again.
    """
    return _shortage_named(
        f"{doing} ran out of memory on the device {draw.device!r}",
        key="batch_size",
        value=draw.batch_size,
        rule="a batch of the largest size asked for fits the memory that the stages share",
        next_step="lower batch_size; an output that holds images already keeps the batch_size they were drawn "
        "with, so name a new output.uri in that case",
    )


def networks_fit(draw: Draw, doing: str) -> AbstractContextManager[None]:
    """ConfigError naming model.dtype when memory runs out inside, whatever the batch; every other error passes."""
    return _shortage_named(
        f"{doing} ran out of memory on the device {draw.device!r}",
        key="model.dtype",
        value=draw.dtype,
        rule="model, codec and text encoders fit the memory that the stages share",
        next_step="run fewer stages on one device (denoise, decode and prompts have actors and num_gpus; "
        "prompts.num_gpus=0 embeds on the CPU), or take a device with more memory",
    )


@contextmanager
def _shortage_named(what: str, **remedy: Any) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(f"{what}: {cause}", **remedy) from error


# -- Images as WebDataset shards: one tar per unit of requests, its name and bytes a function of its rows alone
#
# Members follow WebDataset's convention, one key per sample: <request id>.png (or .jpg, .webp), .json with the
# provenance, .txt with the prompt and .cls with the label where there are any. Times and owners are zero: equal rows
# give an equal tar whoever wrote it, and putting it again changes nothing.


SHARDS_DIR = "shards"
_SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp"}

PutIfAbsent = Callable[[str, bytes], bool]


def pack_units(rows: pa.Table, put: PutIfAbsent) -> pa.Table:
    """Put the images of `rows` (the schema IMAGES) as one tar per unit; the rows with their places for the bytes."""
    at_image, at_file = (rows.schema.get_field_index(name) for name in ("image", "file"))
    packed = []
    for unit in sorted(set(rows["unit"].to_pylist())):
        mine = rows.filter(pc.equal(rows["unit"], unit)).sort_by("row")
        out = io.BytesIO()
        spans: list[tuple[int, int]] = []
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row in mine.select(["key", "image", "media_type", "label", "prompt", "provenance"]).to_pylist():
                _add(tar, f"{row['key']}.{_SUFFIXES[row['media_type']]}", row["image"])
                size_bytes = len(row["image"])
                in_blocks = -(-size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                spans.append((out.tell() - in_blocks, size_bytes))
                _add(tar, f"{row['key']}.json", row["provenance"].encode())
                if row["prompt"] is not None:
                    _add(tar, f"{row['key']}.txt", row["prompt"].encode())
                if row["label"] is not None:
                    _add(tar, f"{row['key']}.cls", str(row["label"]).encode())
        data = out.getvalue()
        key = f"{SHARDS_DIR}/{unit:08d}-{hashlib.sha256(data).hexdigest()[:16]}.tar"
        put(key, data)
        places = [place_in(key, start, length) for start, length in spans]
        no_bytes = pa.array([b""] * len(mine), pa.large_binary())
        mine = mine.set_column(at_image, mine.schema.field(at_image), no_bytes)
        packed.append(mine.set_column(at_file, mine.schema.field(at_file), pa.array(places, pa.string())))
    return pa.concat_tables(packed) if packed else rows


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


# The stages, as the monitor knows them.
DENOISER, DECODER, EMBEDDER = "denoiser", "decoder", "embedder of prompts"
_OUTCOME = [field for field in REJECTS if field.name not in IMAGES.names]

# What encoding tasks yield: an image where `outcome` is "stored", else a reject.
FINISHED = pa.schema([field.with_nullable(True) for field in [*IMAGES, *_OUTCOME]])


@dataclass(frozen=True)
class RequestReader:
    """Reads the wanted requests of a unit as one block, so that a unit's rows share their batches."""

    root: Root
    spans: dict[int, EntrySpan]

    def of(self, work: Work) -> Callable[[], Iterator[pa.Table]]:
        """What reads one unit and knows of no other: it travels with every task."""
        return partial(replace(self, spans={work.unit: self.spans[work.unit]}), work)

    def __call__(self, work: Work) -> Iterator[pa.Table]:
        rows = [
            request_row(entry)
            for entry in read_entries(self.root, self.spans[work.unit])
            if any(
                start <= entry.first_row and (stop is None or entry.first_row < stop) for start, stop in work.ranges
            )
        ]
        yield pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


class EmbedPrompts:
    """An actor that all denoisers ask: prompts in, their embeddings out, each distinct one computed once."""

    def __init__(self, spec: TextSpec, draw: Draw, cache_bytes: int, monitor: Any) -> None:
        from pipeline.sample.denoise import use_threads
        from pipeline.text.encoder import PromptEmbedder

        use_threads(draw.threads)
        self._draw, self._reports = draw, Reports(monitor, EMBEDDER)

        def load() -> Any:
            with networks_fit(draw, "Loading text encoders"):
                return PromptEmbedder(spec, device=draw.device, cache_bytes=cache_bytes)

        self._embedder = held(load, EMBEDDER)

    def embed(self, prompts: list[str], away: bool = False) -> Any:
        """{prompt: Embedding}; see `denoise.Embed`."""
        fits = networks_fit(self._draw, "Embedding prompts")
        with ends_with_its_device(EMBEDDER, self._reports.fault), fits:
            return self._embedder()(prompts, away=away)

    def embedded(self) -> int:
        """How many prompts went through the encoders so far."""
        return int(self._embedder().embedded)


@dataclass(frozen=True)
class DenoiserSpec:
    """Everything a denoising actor needs to start; `embedder` is the EmbedPrompts of a text model.

    alone: requests are drawn one by one, for units under suspicion; blocks stay whole, since a unit is one tar.
    execution: the number of the one that it starts for.
    """

    model_uri: str
    ema: str | None
    draw: Draw
    embedder: Any = None
    alone: bool = False
    execution: int = 0


class DenoiseBlocks:
    """An actor: a block of requests in, the same with raw latents out. Reports finished rows to `monitor`."""

    def __init__(self, spec: DenoiserSpec, monitor: Any) -> None:
        self._reports = Reports(monitor, DENOISER, spec.execution)
        self._draw, self._alone = spec.draw, spec.alone

        def embed(prompts: Sequence[str], *, away: bool = False) -> Any:
            return answer(spec.embedder.embed.remote(list(prompts), away))

        def load() -> Any:
            from pipeline.codec.diffusers_codec import import_networks
            from pipeline.sample.denoise import Denoiser, use_threads

            use_threads(spec.draw.threads)
            if is_worker():
                import_networks(compiled=spec.draw.compile)
            with networks_fit(spec.draw, "Loading the model"):
                ask = None if spec.embedder is None else embed
                return Denoiser.load(spec.model_uri, spec.draw, ema=spec.ema, embed=ask)

        self._denoiser = self._reports.load(load)

    def __call__(self, block: pa.Table) -> pa.Table:
        denoiser = self._denoiser()

        def denoise(part: pa.Table) -> pa.Table:
            with self._reports.busy(part), batch_fits(self._draw, "Denoising"):
                return denoiser(part, on_batch=lambda rows: self._reports.add({"rows": rows}))

        return one_by_one(denoise, block) if self._alone else denoise(block)


@dataclass(frozen=True)
class DecoderSpec:
    """Everything a decoding actor needs to start; `alone` and `execution` as for denoisers."""

    codec_path: str
    codec_kind: str
    codec_revision: str | None
    draw: Draw
    alone: bool = False
    execution: int = 0


class DecodeLatents:
    """An actor: a block with raw latents in, the same with pixels (or a reason) out."""

    def __init__(self, spec: DecoderSpec, monitor: Any) -> None:
        self._reports = Reports(monitor, DECODER, spec.execution)
        self._draw, self._alone = spec.draw, spec.alone

        def load() -> Any:
            from pipeline.codec.diffusers_codec import import_networks
            from pipeline.sample.denoise import LatentDecoder, use_threads

            use_threads(spec.draw.threads)
            if is_worker():
                import_networks(compiled=False)
            with networks_fit(spec.draw, "Loading the codec"):
                return LatentDecoder(
                    spec.codec_path,
                    kind=spec.codec_kind,
                    revision=spec.codec_revision,
                    batch_size=spec.draw.batch_size,
                    device=spec.draw.device,
                    dtype=spec.draw.dtype,
                )

        self._decoder = self._reports.load(load)

    def __call__(self, block: pa.Table) -> pa.Table:
        decoder = self._decoder()

        def decode(part: pa.Table) -> pa.Table:
            with self._reports.busy(part), batch_fits(self._draw, "Decoding"):
                return decoder(part)

        return one_by_one(decode, block) if self._alone else decode(block)


@dataclass(frozen=True)
class EncodeImages:
    """A task: a block with pixels in, FINISHED rows out; with `root` each image also becomes a file of its own."""

    draw: Draw
    origin: Origin
    root: Root | None

    def __call__(self, block: pa.Table) -> pa.Table:
        rows, rejects = encode_rows(block, self.draw, self.origin, self.root.put_if_absent if self.root else None)
        rows = rows.append_column("outcome", pa.array(["stored"] * rows.num_rows, pa.string()))
        return pa.concat_tables([_widened(rows), _widened(rejects)])


def _widened(table: pa.Table) -> pa.Table:
    """A table with all FINISHED columns, null where it has none."""
    columns = [
        table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        for field in FINISHED
    ]
    return pa.table(columns, schema=FINISHED)


@dataclass(frozen=True)
class CommitImages:
    """A write task's work: FINISHED rows to one commit; with `tars` their images go into shards there first."""

    committer: Committer
    tars: Root | None = None

    def __call__(self, table: pa.Table) -> None:
        stored = table.filter(pc.equal(table["outcome"], "stored")).select(IMAGES.names).cast(IMAGES)
        if self.tars is not None:
            stored = pack_units(stored, self.tars.put_if_absent)
        rejects = table.filter(pc.equal(table["outcome"], "rejected")).select(REJECTS.names).cast(REJECTS)
        self.committer.commit(stored, rejects, {})
