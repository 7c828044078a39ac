"""The embed_text job: captions of a latent dataset -> one dataset of embeddings for each encoder.

    check everything -> for each encoder: look -> claim -> plan new captions -> a unit at a time: embed and commit

Units are embedded in this process, or by workers of a cluster, each beside a GPU of its own where there are any; what
is embedded is committed where it was, and only how much it was comes back.

Nothing is written before every encoder has been found sound. An encoder whose plan has seen this very state of the
latents and has no gap costs a hash of its files and one look at its ledger: no torch, no caption read.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.dataflow.cluster import check_address
from pipeline.dataflow.workers import open_workers
from pipeline.errors import InputError, argument_keys
from pipeline.model.info import read_pipeline_encoders
from pipeline.model.read import weights_root
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.runs import Run, open_run
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation, check_newest, last_run
from pipeline.store.ledger.identity import Identity, check_same, read_identity
from pipeline.store.ledger.layout import IDENTITY
from pipeline.store.ledger.state import State, read_state
from pipeline.store.maintain import Spread, in_turn
from pipeline.store.plan import EntrySpan, Plan, PlannedEntry, Work, append_version, read_entries, read_plan, work_of
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.store.read.row_groups import reading_table
from pipeline.store.schema import ADDRESS, pack_latents
from pipeline.store.writer import Committer, file_meta
from pipeline.stream.data import Captions
from pipeline.text.config import EmbedTextJobConfig, PipelineConfig, TextEncoderConfig
from pipeline.text.dataset import (
    Hashes,
    HashSet,
    as_hashes,
    caption_hash,
    captions_seen,
    contains,
    in_units,
    new_captions,
)
from pipeline.text.files import EncoderFiles, encoder_files

# -- From the gaps of a plan to committed embeddings, one unit a commit ----------------------------------------


TEXT = pa.schema(
    [
        *ADDRESS,  # sample_id is the caption's hash, key its hex form
        pa.field("bucket", pa.string(), nullable=False),  # "LENGTHxWIDTH", one for all rows
        pa.field("caption", pa.string(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("embedding", pa.large_binary(), nullable=False),  # C-order [tokens, width]
        pa.field("pooled", pa.large_binary()),
    ]
)


def planned_hashes(plan: Plan) -> Hashes:
    """The hashes of all captions of all versions, whether embedded yet or not."""
    parts = []
    for name in [part for version in plan.versions for part in version.entry_parts]:
        with reading_table(plan.root.uri_of(name)), plan.root.open(name) as file:
            keys = pq.read_table(file, columns=["key"], page_checksum_verification=True)["key"]
            digests = bytes.fromhex("".join(keys.to_pylist()))
            if len(digests) != 16 * len(keys):
                raise ValueError("a key is no hash of a caption")
        parts.append(as_hashes([digests]))
    return np.concatenate(parts) if parts else as_hashes([])


class EncodedLike(Protocol):
    """What `encoder.TextEncoder` returns (see `encoder.Encoded`)."""

    @property
    def tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def truncated(self) -> npt.NDArray[np.bool_]: ...
    @property
    def embeddings_NLD(self) -> npt.NDArray[np.float32]: ...
    @property
    def pooled_NP(self) -> npt.NDArray[np.float32] | None: ...


Encode = Callable[[Sequence[str]], EncodedLike]
OnUnit = Callable[[int, int, int], None]


def embed_gaps(
    root: Root,
    generation: Generation,
    state: State,
    load: Callable[[], Encode],
    *,
    embedding_dtype: str,
    row_group_bytes: int,
    on_unit: OnUnit = lambda captions, tokens, truncated: None,
    spread: Spread = in_turn,
) -> None:
    """Embed and commit every planned caption without a row; `on_unit` hears (captions, tokens, truncated) of each.

    load: gives what encodes, where units are embedded. Raises ConflictError when a newer run takes over, InputError
    for numbers that cannot be stored.
    """
    meta = file_meta(read_identity(generation.root), generation.number)
    committer = Committer(root, generation.number, row_group_bytes, None, meta)
    works = (work for execution in work_of(state.gaps(), 1 << 16) for work in execution)
    units = ((state.plan.locate(work.unit), work) for work in works)
    for told in spread(partial(unit_embedder, committer, load, embedding_dtype), units):
        on_unit(*told)
        generation.check()


def unit_embedder(
    committer: Committer, load: Callable[[], Encode], embedding_dtype: str
) -> Callable[[tuple[EntrySpan, Work]], tuple[int, int, int]]:
    """What embeds and commits a unit, given where its entries lie and what of it is to be done."""
    encode = load()

    def embed(unit: tuple[EntrySpan, Work]) -> tuple[int, int, int]:
        planned = read_entries(committer.root, unit[0])
        entries = [
            e for e in planned if any(a <= e.first_row and (b is None or e.first_row < b) for a, b in unit[1].ranges)
        ]
        rows = embed_entries(entries, encode, embedding_dtype)
        # Embedding takes a while: a run that was fenced off meanwhile leaves no file behind.
        check_newest(committer.root, committer.generation)
        committer.commit(rows, None, {})
        return len(rows), int(np.sum(rows["tokens"].to_numpy())), int(np.sum(rows["truncated"].to_numpy()))

    return embed


def embed_entries(entries: Sequence[PlannedEntry], encode: Encode, embedding_dtype: str) -> pa.Table:
    """One TEXT row for each planned caption, in order; InputError when a value is not finite as stored."""
    captions = [entry.meta or "" for entry in entries]
    encoded = encode(captions)
    _, length, width = encoded.embeddings_NLD.shape
    inside_NL = np.arange(length) < encoded.tokens[:, None]
    embeddings_NLD = np.where(inside_NL[:, :, None], encoded.embeddings_NLD, np.float32(0))
    _check_finite(captions, embeddings_NLD, embedding_dtype)
    packed = pack_latents(embeddings_NLD, embedding_dtype)
    # Padding stands on the right: the true tokens are the first bytes.
    ends = (encoded.tokens.astype(np.int64) * width * 2).tolist()
    pooled: list[bytes] | list[None] = [None] * len(entries)
    if encoded.pooled_NP is not None:
        _check_finite(captions, encoded.pooled_NP, embedding_dtype)
        pooled = pack_latents(encoded.pooled_NP, embedding_dtype)
    columns = {
        "sample_id": [bytes.fromhex(e.key) for e in entries],
        "key": [e.key for e in entries],
        "unit": [e.unit for e in entries],
        "row": [e.first_row for e in entries],
        "variant": [0] * len(entries),
        "bucket": [f"{length}x{width}"] * len(entries),
        "caption": captions,
        "tokens": encoded.tokens,
        "truncated": encoded.truncated,
        "embedding": [data[:end] for data, end in zip(packed, ends, strict=True)],
        "pooled": pooled,
    }
    return pa.table(columns, schema=TEXT)


def _check_finite(captions: Sequence[str], values: npt.NDArray[np.float32], dtype: str) -> None:
    # bfloat16 reaches as far as float32, but for its very last value.
    largest = float(np.finfo(np.float16).max) if dtype == "float16" else 3.38e38
    flat = np.abs(values.reshape(len(values), -1)).max(axis=1)
    bad = np.flatnonzero(~(flat <= largest))
    if len(bad):
        raise InputError(
            f"The embedding of {captions[bad[0]][:80]!r} reaches {flat[bad[0]]:.3g}, which {dtype} cannot hold",
            key="encoders.embedding_dtype",
            value=dtype,
            rule="every stored value is finite",
            next_step="set embedding_dtype: bfloat16; where the encoder itself overflows, dtype: float32",
        )


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Task:
    """One encoder of the job: what it is, and where its embeddings go."""

    config: EmbedTextJobConfig
    encoder: TextEncoderConfig
    files: EncoderFiles
    root: Root
    latents: LatentDataset

    def identity(self) -> Identity:
        named = ("name", "path", "revision", "subfolder", "tokenizer_subfolder")
        where = self.encoder.model_dump(mode="json", include=set(named))
        return Identity("text", self.files.fingerprint(self.encoder), {"encoder": where})

    def source(self) -> dict[str, Any]:
        """What a plan version remembers of the latents it has read."""
        return {
            "uri": self.latents.uri,
            "digest": self.latents.digest,
            "fingerprint": self.latents.fingerprint_digest,
            **({"captions": list(self.config.captions)} if self.config.captions != ("caption",) else {}),
        }


def run(config: EmbedTextJobConfig) -> JobResult:
    """Embed what has no embedding yet; "unchanged", without torch, when nothing is left for any encoder."""
    tasks = _check(config)
    results = [_embed_one(task) for task in tasks]
    # One answer: each encoder's counts and rates under its name; the run is the last one that did work.
    named = list(zip((t.encoder.name for t in tasks), results, strict=True))
    worked = [r for r in results if r.status == "done"]
    return JobResult(
        "done" if worked else "unchanged",
        {f"{name}.{k}": v for name, r in named for k, v in r.counts.items()},
        dict(itertools.chain.from_iterable(r.outputs.items() for r in results)),
        (worked or results)[-1].run_id,
        {f"{name}.{k}": v for name, r in named for k, v in r.rates.items()},
    )


def dry_run(config: EmbedTextJobConfig) -> JobResult:
    """How many captions each encoder would embed, and the most their embeddings can take; writes nothing."""
    counts: dict[str, int] = {}
    figures: dict[str, float] = {}
    outputs: dict[str, str] = {}
    for task in _check(config):
        outputs[task.encoder.name] = task.root.uri
        known = HashSet(planned_hashes(read_plan(task.root)))
        gaps = read_state(task.root).gaps().count()
        todo = gaps + sum(1 for _ in new_captions(task.latents, known, Captions(config.captions), config.prompts))
        counts[f"{task.encoder.name}.new"] = todo
        figures[f"{task.encoder.name}.bytes_at_most"] = 2.0 * todo * task.files.max_length * task.files.width
    if any(counts.values()):
        check_address()
    return JobResult("dry-run", counts, outputs, None, {}, figures)


def _check(config: EmbedTextJobConfig) -> list[_Task]:
    """Everything that can be wrong before anything is written."""
    if config.pipeline is not None:
        config = config.model_copy(update={"encoders": _encoders_of(config.pipeline), "pipeline": None})
    latents = LatentDataset.open(config.data.uri, "data.uri")
    tasks = [_Task(config, e, encoder_files(e), Root(config.uri_of(e)), latents) for e in config.encoders]
    for task in tasks:
        if task.root.kind() == "directory" and task.root.exists(IDENTITY):
            with argument_keys({"root": "output.uri"}):
                check_same(task.root, read_identity(task.root), task.identity())
    return tasks


def _encoders_of(pipeline: PipelineConfig) -> tuple[TextEncoderConfig, ...]:
    with argument_keys({"uri": "pipeline.uri"}):
        root, _ = weights_root(pipeline.uri, pipeline.revision)
        encoders = read_pipeline_encoders(root)
    # A hub id stays one: every node has a copy of its own.
    path = pipeline.uri if pipeline.revision is not None else str(root.local_path() or root.uri)
    return tuple(TextEncoderConfig(path=path, revision=pipeline.revision, **asdict(encoder)) for encoder in encoders)


def _embed_one(task: _Task) -> JobResult:
    """One encoder, under a generation of its own dataset."""
    root = task.root
    state, earlier = read_state(root), last_run(root, job="embed_text").get("run_id")
    if _has_seen(state, task) and not state.gaps():
        return _result("unchanged", task, state, earlier)
    root.probe()
    with open_run(task.config, "embed_text", root, identity=task.identity()) as run:
        assert run.generation is not None
        state, new = read_state(root), 0
        # Nothing is read when some version has seen the latents as they are: plans only ever grow.
        if not _has_seen(state, task):
            known = HashSet(planned_hashes(state.plan))
            captions = new_captions(task.latents, known, Captions(task.config.captions), task.config.prompts)
            units = in_units(captions, task.config.embed.unit_captions)
            # A version without units remembers that these latents hold nothing new.
            number = run.generation.number
            plan = append_version(state.plan, units, source=task.source(), generation=number)
            new, state = plan.versions[-1].num_rows, read_state(root)
        gaps = state.gaps().count()
        _log.info("%s: %d new captions, %d to embed", task.encoder.name, new, gaps)
        if not gaps:
            run.generation.summary["status"] = "unchanged"
            return _result("unchanged", task, state, earlier)
        return _embed(task, run, run.generation, state)


def _has_seen(state: State, task: _Task) -> bool:
    """Whether versions of the plan have read the latents as they are now, and all prompts; plans only ever grow."""
    config = task.config
    if not captions_seen(state.plan, task.latents.digest) >= set(config.captions):
        return False
    prompts = as_hashes(map(caption_hash, config.prompts))
    return not config.prompts or bool(contains(np.sort(planned_hashes(state.plan)), prompts).all())


def _embed(task: _Task, run: Run, generation: Generation, state: State) -> JobResult:
    """Embed and commit the gaps, in the MLflow run of one encoder."""
    parent = task.latents.provenance.get("run_id")
    tracker = run.track(
        f"embed_text {task.encoder.name}",
        parents={"encode": parent} if parent else {},
        params={
            "data.uri": task.latents.uri,
            **{f"encoder.{k}": v for k, v in task.encoder.model_dump(mode="json").items()},
        },
        note={"source": task.source()},
    )
    tracker.log_input(name=task.latents.uri, digest=task.latents.digest, source=task.latents.uri, context="input")
    began, start = time.monotonic(), state.num_stored
    totals = dict.fromkeys(("embedded", "tokens", "truncated"), 0)
    progress = Progress(f"embed {task.encoder.name}", start + state.gaps().count(), "captions", start=start)
    config = task.config
    opened = open_workers(
        f"an encoder of {task.encoder.name}",
        config.cluster,
        config.workers,
        num_cpus=float(config.threads or 1),
        device=config.device,
    )
    with progress, opened as workers:

        def on_unit(captions: int, tokens: int, truncated: int) -> None:
            for name, value in zip(totals, (captions, tokens, truncated), strict=True):
                totals[name] += value
            progress.update(start + totals["embedded"], truncated=totals["truncated"])

        embed_gaps(
            task.root,
            generation,
            state,
            # What travels to other processes holds none of the task's datasets.
            partial(
                load_with_threads, task.files, task.encoder, config.embed.batch_size, config.threads, workers.device
            ),
            embedding_dtype=task.encoder.embedding_dtype,
            row_group_bytes=config.embed.row_group_bytes,
            on_unit=on_unit,
            spread=workers.spread,
        )
    seconds = time.monotonic() - began
    final = read_state(task.root)
    rates = {"captions_per_s": totals["embedded"] / seconds, "tokens_per_s": totals["tokens"] / seconds}
    result = _result("done", task, final, None, totals, rates)
    return run.done(
        result, step=final.num_stored, digest=Dataset.open_kind(task.root.uri, "text", "output.uri").digest
    )


def load_with_threads(
    files: EncoderFiles, encoder: TextEncoderConfig, batch_size: int, threads: int | None, device: str
) -> Encode:
    """What encodes on a device; None: by as many threads as torch takes."""
    import torch

    from pipeline.text.encoder import load_encoder

    if threads is not None:
        torch.set_num_threads(threads)
    return load_encoder(files, encoder, batch_size=batch_size, device=device).encode


def _result(
    status: str,
    task: _Task,
    state: State,
    run_id: str | None,
    totals: dict[str, int] | None = None,
    rates: dict[str, float] | None = None,
) -> JobResult:
    counts = {"captions": state.num_stored, **(totals or dict.fromkeys(("embedded", "tokens", "truncated"), 0))}
    return JobResult(status, counts, {task.encoder.name: task.root.uri}, run_id, rates or {})
