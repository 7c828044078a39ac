"""The export job: what is visible in a dataset, as files that others read; the dataset itself is only read.

    visible rows --cut, by the dataset's state alone--> shards --a task each: read, convert, put--> output/data/

`export.json` is put first and says what the output is an export of, how, and the names of its shards: another state
or other settings are refused. A shard appears whole under its name or not at all, and nobody replaces one. So the
same command goes on where a run was killed: it writes the shards that are missing, with the bytes that they would
have had. What makes shards one thing (a dataset card, a version of Lance's) comes last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from pipeline.config import need_package
from pipeline.dataflow.cluster import check_address
from pipeline.errors import ConfigError, ConflictError, InputError, StoppedError
from pipeline.maintenance.config import ExportJobConfig
from pipeline.maintenance.job import track
from pipeline.maintenance.shards import BLOBS, LANCE, Form, RowSpan, ShardWriter, cut, row_bytes
from pipeline.progress import Progress
from pipeline.result import JobResult
from pipeline.runs import open_run
from pipeline.storage.root import Root
from pipeline.storage.stored import OPEN, Count, Key, read_stored
from pipeline.store.ledger.identity import read_identity
from pipeline.store.ledger.layout import canonical_json
from pipeline.store.plan import Work
from pipeline.store.read.dataset import Dataset
from pipeline.store.writer import file_meta

EXPORT = "export.json"
_CARD = "README.md"
_SHARDS = {
    "parquet": "data/part-{at}-of-{count}.parquet",
    "webdataset": "data/{at}.tar",
    "huggingface": "data/train-{at}-of-{count}.parquet",
    "lance": "fragments/{at}.json",  # which names a file of data.lance/data/, put before it
}
_OPENED = {  # from a disk, by the libraries that people read the format with
    "parquet": "import pyarrow.dataset; rows = pyarrow.dataset.dataset({uri!r} + '/data')",
    "webdataset": "import webdataset; rows = webdataset.WebDataset({uri!r} + '/data/{{{first}..{last}}}.tar', "
    "shardshuffle=False).decode()",
    "huggingface": "import datasets; rows = datasets.load_dataset({uri!r}, split='train')",
    "lance": "import lance; rows = lance.dataset({uri!r} + '/data.lance')",
}
_EXECUTION_SHARDS = 10_000
_TASK_RETRIES = 3
_FRUITLESS = 2  # executions that may end without one more shard
_READERS = 16
_log = logging.getLogger(__name__)


@with_config(OPEN)
class _Exported(TypedDict):
    uri: str
    digest: str
    layout_digest: str


@with_config(OPEN)
class _Told(TypedDict):
    dataset: _Exported
    settings: dict[str, Any]
    rows: Count
    meta: dict[str, str]
    shards: list[Key]


_TOLD = TypeAdapter(_Told)


def run_export(config: ExportJobConfig) -> JobResult:
    """Write the shards that are missing; "unchanged", without Ray, where all is there."""
    export = _Export.of(config)
    missing = export.missing()
    if not missing and export.is_finished():
        return export.result("unchanged", 0)
    export.output.probe()
    with open_run(config, "export", key="data.uri") as run:
        settings = {**export.told["settings"], "output.uri": export.output.uri, "shards": len(export.shards)}
        track(run, export.dataset.root, settings)
        run.tracker.log_input(
            name=export.dataset.uri, digest=export.dataset.digest, source=export.dataset.uri, context="input"
        )
        began, rows = time.monotonic(), export.rows_of(missing)
        if not export.output.put_if_absent(EXPORT, json.dumps(export.told, indent=1).encode()):
            missing = export.missing()  # of an earlier run, or of one that has begun meanwhile
        if missing:
            export.write(missing)
        export.finish()
        rates = {"rows_per_s": rows / max(time.monotonic() - began, 1e-9)}
        digest = hashlib.blake2b(canonical_json(export.told), digest_size=16).hexdigest()
        run.tracker.log_input(name=export.output.uri, digest=digest, source=export.output.uri, context="output")
        return run.done(export.result("done", len(missing), rates))


def plan_export(config: ExportJobConfig) -> JobResult:
    """How many rows, shards and bytes, and of these shards how many are missing; writes nothing."""
    export = _Export.of(config)
    if missing := export.missing():
        check_address()
    counts = {
        "rows": export.dataset.num_rows,
        "shards": len(export.shards),
        "missing": len(missing),
        "bytes_about": int((export.dataset.row_groups.rows * row_bytes(export.dataset, export.form)).sum()),
    }
    return JobResult("dry-run", counts, {"export": export.output.uri})


@dataclass(frozen=True)
class _Export:
    """A dataset as it was when it was opened, its cut into shards, and what `export.json` says of both."""

    config: ExportJobConfig
    dataset: Dataset
    output: Root
    form: Form
    shards: Sequence[Sequence[RowSpan]]
    told: _Told

    @classmethod
    def of(cls, config: ExportJobConfig) -> _Export:
        """Everything that can be wrong before anything is written; nothing of the rows but a shape is read."""
        dataset, output = _opened(config), Root(config.output.uri)
        data, place = (os.path.realpath(r.uri) if r.local_path() else r.uri for r in (dataset.root, output))
        if f"{place}/".startswith(f"{data}/"):
            raise ConfigError(
                "The output lies in the dataset",
                key="output.uri",
                value=output.uri,
                rule=f"a dataset holds what its jobs write; this one is {data}",
                next_step="name a folder beside it",
            )
        if config.format == "lance":
            need_package("lance", "lance")
        form = _form(config, dataset)
        shards = cut(dataset.row_groups.rows, row_bytes(dataset, form), config.shard_bytes)
        digits = max(5, len(str(len(shards) - 1)))
        count = f"{len(shards):0{digits}}"
        told: _Told = {
            "dataset": {"uri": dataset.uri, "digest": dataset.digest, "layout_digest": dataset.layout_digest},
            "settings": {
                "format": config.format,
                "shard_bytes": config.shard_bytes,
                "columns": form.stored.names,
                "dtype": form.dtype,
            },
            "rows": dataset.num_rows,
            "meta": dict(form.meta),
            "shards": [_SHARDS[config.format].format(at=f"{at:0{digits}}", count=count) for at in range(len(shards))],
        }
        return cls(config, dataset, output, form, shards, told)

    def missing(self) -> list[int]:
        """The shards that are not there yet; ConflictError where the output is not this export's."""
        there = self._there()
        if there is None:
            return list(range(len(self.shards)))
        present = {info.key for info in self.output.list()}
        missing = [at for at, name in enumerate(there["shards"]) if name not in present]
        sides: dict[str, list[Any]] = {}
        ours, theirs = self.told["dataset"], there["dataset"]
        if theirs["digest"] != ours["digest"]:  # wherever it lies
            sides["dataset"] = [f"{one['uri']} ({one['digest']})" for one in (theirs, ours)]
        elif missing and theirs["layout_digest"] != ours["layout_digest"]:
            # What is whole holds the same rows, however the dataset's files were compacted since.
            sides["files"] = [theirs["layout_digest"], ours["layout_digest"]]
        for name in sorted({*there["settings"], *self.told["settings"]}):
            pair = [told["settings"].get(name) for told in (there, self.told)]
            if pair[0] != pair[1]:
                sides[name] = pair
        if sides:
            listed = "; ".join(f"{name}: {a} there, {b} asked for" for name, (a, b) in sides.items())
            raise ConflictError(
                f"The output holds another export{', which is not whole' if missing else ''}: {listed}",
                key="output.uri",
                value=self.output.uri,
                rule="one output holds one export, with one set of settings, of one state of a dataset (and until it "
                "is whole of the same files: none that were compacted meanwhile)",
                next_step="name another output.uri, or move that export away",
            )
        return missing

    def _there(self) -> _Told | None:
        """What the output says of itself; None where it is empty."""
        problem, found = None, None
        if self.output.kind() == "file":
            problem = "it is a file"
        else:
            try:
                return read_stored(_TOLD, self.output, EXPORT)
            except InputError:
                problem = f"its {EXPORT} is none of this job's"
            except (FileNotFoundError, NotADirectoryError):
                found = next(iter(self.output.list()), None)
                problem = f"it has {found.key} and no {EXPORT}" if found else None
        if problem is None:
            return None
        raise ConflictError(
            f"The output holds something else: {problem}",
            key="output.uri",
            value=self.output.uri,
            rule="an export goes into a folder of its own: what is there may be somebody's own",
            next_step="name an empty or a new folder",
        )

    def rows_of(self, shards: Sequence[int]) -> int:
        """How many rows some shards have."""
        return sum(span.stop - span.start for at in shards for span in self.shards[at])

    def write(self, missing: list[int]) -> None:
        """All these shards, on Ray; StoppedError when its workers die and no shard is added any more."""
        from pipeline.dataflow.cluster import ensure_ray, shutdown_ray
        from pipeline.dataflow.monitor import Watch, start_monitor
        from pipeline.dataflow.passes import configure_ray_data, run_execution
        from pipeline.dataflow.resources import Kind, check_nodes, node_offers

        ray = ensure_ray(self.config.cluster)
        try:
            check_nodes([Kind("a task that writes a shard", 1.0)], node_offers(), "cluster.num_cpus")
            configure_ray_data()
            total, monitor = self.dataset.num_rows, start_monitor("export")
            groups = ray.put(self.dataset.row_groups.to_arrow({}))
            writer = ShardWriter(self.dataset.root, self.dataset.identity, groups, self.form, self.output, monitor)
            done, fruitless = total - self.rows_of(missing), 0
            progress = Progress("export", total, "rows", start=done)
            with Watch(monitor, progress, done, lambda totals, seconds: {}, total=total) as watch:
                while missing:
                    error = None
                    for first in range(0, len(missing), _EXECUTION_SHARDS):
                        part = missing[first : first + _EXECUTION_SHARDS]
                        error = run_execution(partial(self._execute, writer, part)) or error
                    left = self.missing()
                    fruitless = fruitless + 1 if left == missing else 0
                    if fruitless > _FRUITLESS:
                        raise StoppedError(
                            f"Workers died {fruitless} times without one more shard; {len(left):,} are missing; the "
                            f"last time: {' '.join(str(error).split())[:800]}",
                            rule="shards that are there are kept",
                            next_step="mend what ends the workers (memory: lower shard_bytes or workers; the disk), "
                            "then run the same command again",
                        )
                    if left and error is not None:
                        _log.warning("workers died, going on with what is left: %s", str(error).splitlines()[0])
                    missing = left
                watch.finish(total)
        finally:
            shutdown_ray()

    def _execute(self, writer: ShardWriter, shards: Sequence[int]) -> None:
        import ray.data

        from pipeline.dataflow.passes import UnitSource

        def reader_of(work: Work) -> Callable[[], Iterable[pa.Table]]:
            return partial(writer.write, self.told["shards"][work.unit], work.unit, self.shards[work.unit])

        source = UnitSource("WriteShards", [Work(at, ()) for at in shards], reader_of, len(shards))
        ray.data.read_datasource(
            source,
            num_cpus=1,
            override_num_blocks=len(shards),
            concurrency=self.config.workers,
            ray_remote_args={"max_retries": _TASK_RETRIES},
        ).materialize()

    def is_finished(self) -> bool:
        """Whether what makes the shards one thing is there, where the format has such a thing."""
        if self.config.format == "huggingface":
            return self.output.exists(_CARD)
        return self.config.format != "lance" or any(self.output.list(f"{LANCE}/_versions"))

    def finish(self) -> None:
        """Put it."""
        if self.config.format == "huggingface":
            self.output.put_if_absent(_CARD, self._card().encode())
        if self.config.format != "lance" or self.is_finished():
            return
        import lance

        sizes = {info.key.rpartition("/")[2]: info.size_bytes for info in self.output.list(f"{LANCE}/data")}
        with ThreadPoolExecutor(_READERS) as pool:
            told = [json.loads(content) for content in pool.map(self.output.read_bytes, self.told["shards"])]
        for fragment in told:
            fragment["files"][0]["file_size_bytes"] = sizes[fragment["files"][0]["path"]]
        fragments = [lance.FragmentMetadata.from_json(json.dumps(fragment)) for fragment in told]
        with tempfile.TemporaryDirectory(prefix="latentloom-lance-") as folder:
            lance.LanceDataset.commit(folder, lance.LanceOperation.Overwrite(self.form.schema(), fragments))
            # In the order of their names the version comes after the transaction that it names.
            for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                key = f"{LANCE}/{path.relative_to(folder).as_posix()}"
                self.output.put_if_absent(key, path.read_bytes())

    def _card(self) -> str:
        """What the Hugging Face hub shows of the folder, and `datasets` reads."""
        facts = "\n".join(f"- `{name}`: {value}" for name, value in self.form.meta.items())
        files = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n"
        return (
            f"---\n{files}---\n\n# {self.dataset.num_rows:,} {self.form.kind}\n\n"
            f"Written by `latentloom export`.\n\n{facts}\n"
        )

    def result(self, status: str, written: int, rates: dict[str, float] | None = None) -> JobResult:
        """The answer; how to open an export on a disk is said to people, too."""
        there = self._there()
        assert there is not None
        size = sum(info.size_bytes for info in self.output.list() if info.key != EXPORT)
        first, last = (Path(there["shards"][at]).stem for at in (0, -1))
        opened = {}
        if self.output.local_path() is not None:  # elsewhere each library has its own word for a store
            opened = {"open": _OPENED[self.config.format].format(uri=self.output.uri, first=first, last=last)}
            _log.info("to open it in Python: %s", opened["open"])
        counts = {"rows": self.dataset.num_rows, "shards": len(there["shards"]), "written": written, "bytes": size}
        return JobResult(status, counts, {"export": self.output.uri}, None, rates or {}, {}, opened)


def _opened(config: ExportJobConfig) -> Dataset:
    kind = read_identity(Root(config.data.uri), "data.uri").kind
    if kind not in BLOBS:
        raise InputError(
            f"{config.data.uri} is a dataset of {kind}",
            key="data.uri",
            value=config.data.uri,
            rule="latents and images are exported",
            next_step="read it with `latentloom files`, which names its files and the rows that are visible",
        )
    dataset: Dataset = Dataset.open_kind(config.data.uri, kind, "data.uri")
    if not dataset.num_rows:
        raise InputError(
            "The dataset has no visible row",
            key="data.uri",
            value=config.data.uri,
            rule="what no commit has made visible is not there for others",
            next_step="run the job that writes it to its end",
        )
    return dataset


def _form(config: ExportJobConfig, dataset: Dataset) -> Form:
    """What its rows become; ConfigError for a column or dtype that does not fit."""
    groups, kind = dataset.row_groups, dataset.identity.kind
    stored = dataset.footer(groups.place(0)[0]).schema.to_arrow_schema()
    known = [name for name in stored.names if name != "file"]  # a place in the dataset: the bytes are exported
    for name in config.columns or ():
        if name not in known:
            raise ConfigError("There is no such column", key="columns", value=name, rule=", ".join(known))
    if config.dtype is not None and kind != "latents":
        raise ConfigError(
            "Images have no dtype: their bytes are exported as they are",
            key="dtype",
            value=config.dtype,
            rule="dtype is that of latents",
            next_step="leave it at null",
        )
    names = list(dict.fromkeys(config.columns or known))
    meta, stored_dtype, dtype, shape = file_meta(dataset.identity, 0), None, None, None
    del meta["latentloom.generation"]
    if kind == "latents":
        stored_dtype = str(dataset.fingerprint.get("latent_dtype"))
        dtype = config.dtype or ("float16" if stored_dtype == "float16" else "float32")
        if "latent" in names and len(groups.buckets) == 1:
            shape = tuple(dataset.read(0, ["latent_shape"])["latent_shape"][0].as_py())
            meta["latentloom.latent_shape"] = str(list(shape))
        elif "latent" in names and "latent_shape" not in names:
            names.append("latent_shape")  # without which nobody could tell what each is
        meta["latentloom.latent_dtype"] = dtype
        told = meta["latentloom.latent_layout"].partition("; ")[2]
        meta["latentloom.latent_layout"] = f"the numbers of latent_shape [c, h, w] in C-order; {told}"
    return Form(config.format, kind, pa.schema([stored.field(n) for n in names]), stored_dtype, dtype, shape, meta)
