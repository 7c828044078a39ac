"""The embed_text job: captions of a latent dataset -> one dataset of embeddings for each encoder. A plain process.

    check everything -> for each encoder: look -> claim -> plan new captions -> load -> embed and commit the gaps

Nothing is written before every encoder has been found sound. An encoder whose plan has seen this very state of the
latents and has no gap costs a hash of its files and one look at its ledger: no torch, no caption read.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline.dataflow.beside_gpu import own_device, reserved_function, reserved_gpu
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.runs.session import Run, open_run
from pipeline.storage.root import Root
from pipeline.store.ledger.generation import Generation
from pipeline.store.ledger.identity import Identity, check_same, read_identity
from pipeline.store.ledger.layout import IDENTITY
from pipeline.store.ledger.runs import last_run
from pipeline.store.ledger.state import State, read_state
from pipeline.store.plan.plan import append_version, read_plan
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.text.captions import HashSet, in_units, new_captions, planned_hashes
from pipeline.text.config import EmbedTextJobConfig, TextEncoderConfig
from pipeline.text.files import EncoderFiles, encoder_files

if TYPE_CHECKING:
    from pipeline.text.embed import Encode

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
        }


def run(config: EmbedTextJobConfig) -> JobResult:
    """Embed what has no embedding yet; "unchanged", without torch, when nothing is left for any encoder."""
    tasks = _check(config)
    results = [_embed_one(task) for task in tasks]
    return _combine(tasks, results)


def dry_run(config: EmbedTextJobConfig) -> JobResult:
    """How many captions each encoder would embed, and the most their embeddings can take; writes nothing."""
    counts: dict[str, int] = {}
    figures: dict[str, float] = {}
    for task in _check(config):
        known = HashSet(planned_hashes(read_plan(task.root)))
        gaps = read_state(task.root).gaps().count()
        todo = gaps + sum(1 for _ in new_captions(task.latents, known))
        counts[f"{task.encoder.name}.new"] = todo
        figures[f"{task.encoder.name}.bytes_at_most"] = 2.0 * todo * task.files.max_length * task.files.width
    return JobResult("dry-run", counts, {e.name: config.uri_of(e) for e in config.encoders}, None, {}, figures)


def _check(config: EmbedTextJobConfig) -> list[_Task]:
    """Everything that can be wrong before anything is written."""
    latents = LatentDataset.open(config.data.uri)
    tasks = [_Task(config, e, encoder_files(e), Root(config.uri_of(e)), latents) for e in config.encoders]
    for task in tasks:
        if task.root.kind() == "directory" and task.root.exists(IDENTITY):
            check_same(task.root, read_identity(task.root, "output.uri"), task.identity())
    return tasks


def _embed_one(task: _Task) -> JobResult:
    """One encoder, under a generation of its own dataset."""
    root = task.root
    state, earlier = read_state(root), last_run(root, job="embed_text").get("run_id")
    if _has_seen(state, task) and not state.gaps():
        return _result("unchanged", task, state, earlier)
    root.probe()
    with open_run(task.config, "embed_text", root, identity=task.identity()) as run:
        assert run.generation is not None
        new = _plan(task, run.generation)
        state = read_state(root)
        gaps = state.gaps().count()
        _log.info("%s: %d new captions, %d to embed", task.encoder.name, new, gaps)
        if not gaps:
            run.generation.summary["status"] = "unchanged"
            return _result("unchanged", task, state, earlier)
        return _embed(task, run, run.generation, state)


def _has_seen(state: State, task: _Task) -> bool:
    """Whether some version of the plan has read the latents as they are now; plans only ever grow."""
    return any(v.source.get("digest") == task.latents.digest for v in state.plan.versions)


def _plan(task: _Task, generation: Generation) -> int:
    """Freeze the captions that no version holds; returns how many. Nothing is read when this state was seen."""
    state = read_state(task.root)
    if _has_seen(state, task):
        return 0
    known = HashSet(planned_hashes(state.plan))
    units = in_units(new_captions(task.latents, known), task.config.embed.unit_captions)
    # A version without units remembers that these latents hold nothing new.
    plan = append_version(state.plan, units, source=task.source(), generation=generation.number)
    return plan.versions[-1].num_rows


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
    began = time.monotonic()
    totals = _fill_gaps(task, generation, state)
    seconds = time.monotonic() - began
    final = read_state(task.root)
    rates = {"captions_per_s": totals["embedded"] / seconds, "tokens_per_s": totals["tokens"] / seconds}
    result = _result("done", task, final, None, totals, rates)
    return run.done(
        result, step=final.num_stored, digest=Dataset.open_kind(task.root.uri, "text", "output.uri").digest
    )


def _fill_gaps(task: _Task, generation: Generation, state: State) -> dict[str, int]:
    from pipeline.text.embed import embed_gaps

    encoder = task.encoder
    totals = dict.fromkeys(("embedded", "tokens", "truncated"), 0)
    start = state.num_stored
    with (
        Progress(f"embed {encoder.name}", start + state.gaps().count(), "captions", start=start) as progress,
        _loaded(task) as encode,
    ):

        def on_unit(captions: int, tokens: int, truncated: int) -> None:
            for name, value in zip(totals, (captions, tokens, truncated), strict=True):
                totals[name] += value
            progress.update(start + totals["embedded"], truncated=totals["truncated"])

        embed_gaps(
            task.root,
            generation,
            state,
            encode,
            embedding_dtype=encoder.embedding_dtype,
            row_group_bytes=task.config.embed.row_group_bytes,
            on_unit=on_unit,
        )
    return totals


@contextmanager
def _loaded(task: _Task) -> Iterator[Encode]:
    """What encodes captions: in this process, or in one beside a GPU of the cluster, where it has any."""
    config = task.config
    with reserved_gpu(config.device, config.cluster) as device:
        make = partial(_load, task.files, task.encoder, config.embed.batch_size, config.threads)
        if device is None:
            yield make(own_device(config.device, config.cluster))
        else:
            yield reserved_function(partial(make, device))


def _load(
    files: EncoderFiles, encoder: TextEncoderConfig, batch_size: int, threads: int | None, device: str
) -> Encode:
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


def _combine(tasks: list[_Task], results: list[JobResult]) -> JobResult:
    """One answer: each encoder's counts and rates under its name; the run is the last one that did work."""
    named = list(zip((t.encoder.name for t in tasks), results, strict=True))
    worked = [r for r in results if r.status == "done"]
    return JobResult(
        "done" if worked else "unchanged",
        {f"{name}.{k}": v for name, r in named for k, v in r.counts.items()},
        dict(itertools.chain.from_iterable(r.outputs.items() for r in results)),
        (worked or results)[-1].run_id,
        {f"{name}.{k}": v for name, r in named for k, v in r.rates.items()},
    )
