"""From a configuration to everything the driver knows before any device is used. Imports no torch and no ray."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.codec.codec import CodecInfo, codec_info
from pipeline.diffusion.solvers import solver_for
from pipeline.errors import ConfigError, ConflictError, InputError, argument_keys
from pipeline.model.config import PublishedConfig
from pipeline.model.info import INDEX, ModelInfo, PublishedPipeline, refused
from pipeline.model.read import StoredModel, read_model
from pipeline.sample.config import FileRequests, GridRequests, SampleJobConfig
from pipeline.sample.provenance import Draw, Origin
from pipeline.sample.requests import (
    FIELDS,
    Defaults,
    RequestLimits,
    Requests,
    grid_columns,
    refuse_broken,
    validate_requests,
)
from pipeline.source.reading.parquet import Cells, table_cells
from pipeline.source.reading.parquet_file import TableError
from pipeline.storage.errors import describe, storage_errors
from pipeline.storage.root import Root, place_of
from pipeline.store.ledger.identity import Identity
from pipeline.store.ledger.layout import canonical_json
from pipeline.text.config import TextEncoderConfig
from pipeline.text.dataset import ARRANGEMENTS
from pipeline.text.files import TextSpec, encoder_files
from pipeline.tracking.config import REGISTERED, resolve_paths
from pipeline.tracking.queries import resolve

# -- Which text encoders a model reads, and how their outputs become its input. Imports no torch ---------------
#
# Prompts become what the model was trained on: for a model of this project the encoder that its training embedded
# captions with, stored precision and mask included; for a published pipeline its own encoders, as its class does.


def text_of(model: StoredModel) -> TextSpec | None:
    """The text side of a model; None when it reads no text.

    InputError when its encoders cannot be used, ConflictError when they are others than the model learned from.
    """
    info, place = model.info, model.place
    if info.text_dim is None:
        return None
    published = info.model if isinstance(info.model, PublishedConfig) else None
    arrangement = "single" if published is None else published.arrangement
    masked = published is None or published.padding == "masked"
    if isinstance(place, PublishedPipeline):
        encoders = _of_pipeline(place)
        files = tuple(encoder_files(e) for e in encoders)
        fingerprints: list[Any] = [f.fingerprint(e) for f, e in zip(files, encoders, strict=True)]
        digest = _digest([*fingerprints, *(["zeros without a prompt"] if info.zero_empty_text else [])])
        return TextSpec(encoders, arrangement, masked, False, info.text_dim, digest, files, info.zero_empty_text)
    if not info.texts:
        return None
    encoders, files, fingerprints = (), (), []
    for reference in info.texts:
        try:
            encoder = TextEncoderConfig.model_validate(reference.encoder, strict=False)
        except ValidationError as error:
            raise InputError(f"The model does not describe its text encoder: {error}", key="model.uri") from None
        its_files = encoder_files(encoder)
        fingerprints.append(its_files.fingerprint(encoder))
        if reference.fingerprint not in (fingerprints[-1], _digest(fingerprints[-1])):
            raise ConflictError(
                f"The text encoder at {encoder.path} is not the one the model learned from",
                key="model.uri",
                value=encoder.path,
                rule="prompts are embedded by the encoder that embedded the captions",
                next_step="restore the encoder's files",
            )
        encoders, files = (*encoders, encoder), (*files, its_files)
    digest = _digest(fingerprints[0] if len(fingerprints) == 1 else fingerprints)
    return TextSpec(encoders, arrangement, masked, True, info.text_dim, digest, files, info.zero_empty_text)


def _of_pipeline(pipeline: PublishedPipeline) -> tuple[TextEncoderConfig, ...]:
    if not pipeline.encoders:
        fewest, most = ARRANGEMENTS[pipeline.model.arrangement]
        raise refused(
            pipeline.root,
            f"{INDEX}: its text encoders",
            f"{pipeline.model.class_name} reads the text of {fewest if fewest == most else f'{fewest} to {most}'}",
        )
    local = pipeline.root.local_path()
    if local is None:
        raise InputError(
            "The text encoders of a pipeline are read from local disk",
            key="model.uri",
            value=pipeline.root.uri,
            next_step="copy the pipeline directory to every node, under one path",
        )
    return tuple(TextEncoderConfig(path=str(local), **asdict(encoder)) for encoder in pipeline.encoders)


def _digest(value: Any) -> str:
    return hashlib.blake2b(canonical_json(value), digest_size=16).hexdigest()


@dataclass(frozen=True)
class SamplingInputs:
    """A validated job: what is asked, of which model and codec, and what all its images will share."""

    requests: Requests
    model: StoredModel
    text: TextSpec | None
    codec: CodecInfo
    codec_path: str
    codec_kind: str
    draw: Draw
    origin: Origin
    identity: Identity


def prepare(config: SampleJobConfig) -> SamplingInputs:
    """Read model, codec and requests; every problem is a PipelineError, and nothing has been written."""
    # The model; a name in the registry stands for the version it means now.
    model_uri = config.model.uri
    if model_uri.startswith(REGISTERED):
        model_uri = resolve(model_uri, resolve_paths(config.tracking).uri).uri
    model = read_model(model_uri, config.model.ema)
    info, text = model.info, text_of(model)
    # The codec; a local directory by its absolute path, for workers and for later readers.
    codec_path, codec_kind = config.model.codec or info.codec.path, info.codec.kind
    if not codec_path:
        raise InputError(
            "The model does not say where its codec lies",
            key="model.codec",
            rule="latents become pixels by the codec they were encoded with",
            next_step="set model.codec to the codec's directory",
        )
    if Path(codec_path).expanduser().is_dir():
        codec_path = Root(codec_path).uri
    with argument_keys("codec"):
        codec = codec_info(codec_path, info.codec.revision, codec_kind)
    _check_codec(info, codec, codec_path)
    limits = RequestLimits.of(info, takes_text=text is not None, any_size=config.requests.any_size)
    requests = load_requests(config.requests, limits)
    draw, origin = _draw(config, info), _origin(model, text, codec, codec_path)
    # The device is told by each image; what a dataset's images share is what the configuration decides.
    shared = {key: value for key, value in draw.as_dict().items() if key not in ("device", "dtype")}
    fingerprint = {
        "draw": {**shared, "dtype": config.model.dtype},
        "model_digest": origin.model_digest,
        "codec_sha256": origin.codec_sha256,
        "form": config.output.format,
    }
    known = {key: value for key, value in asdict(origin).items() if value != ()}
    about: dict[str, Any] = {"origin": {**known, "versions": dict(origin.versions)}}
    about |= {"classes": list(info.classes)} if info.classes else {}
    identity = Identity("images", fingerprint, about)
    return SamplingInputs(requests, model, text, codec, codec_path, codec_kind, draw, origin, identity)


def on_device(draw: Draw, device: str) -> Draw:
    """The draw on "cpu" or "cuda", with the arithmetic that `auto` stands for there."""
    automatic = "bfloat16" if device == "cuda" else "float32"
    return replace(draw, device=device, dtype=automatic if draw.dtype == "auto" else draw.dtype)


def load_requests(config: GridRequests | FileRequests, limits: RequestLimits) -> Requests:
    """The validated requests of a configuration; reads the request file where there is one."""
    keep_first = config.duplicates == "keep_first"
    defaults = Defaults(
        seed=config.default_seed if isinstance(config, FileRequests) else 0,
        height=config.height,
        width=config.width,
        steps=config.steps,
        guidance=config.guidance,
        guidance_interval=config.guidance_interval,
    )
    if isinstance(config, FileRequests):
        cells = read_columns(config.uri, file_format(config.uri, config.format), config.max_bytes)
        try:
            columns = map_columns(cells.columns, config.columns, config.other_columns, config.uri)
        except ConfigError:
            refuse_broken(cells.broken, config.uri)  # first: which columns there are depends on these lines
            raise
        return validate_requests(
            columns,
            limits=limits,
            defaults=defaults,
            keep_first=keep_first,
            origin=config.uri,
            broken=cells.broken,
        )
    labels = list(range(limits.num_classes or 0)) if config.classes == "all" else config.classes
    if config.classes == "all" and limits.num_classes is None:
        raise ConfigError(
            "The model was trained without classes",
            key="requests.classes",
            value="all",
            next_step="leave requests.classes out to draw unconditional images",
        )
    seeds = config.seeds or range(config.first_seed, config.first_seed + config.count)
    grid = grid_columns(
        labels=labels, prompts=config.prompts, negative_prompt=config.negative_prompt, seeds=list(seeds)
    )
    try:
        return validate_requests(grid, limits=limits, defaults=defaults, keep_first=keep_first, origin="the grid")
    except InputError as error:  # a grid is written in the configuration
        raise ConfigError(
            error.what, key=error.key, value=error.value, rule=error.rule, next_step=error.next_step
        ) from None


def _check_codec(info: ModelInfo, codec: CodecInfo, path: str) -> None:
    wanted = info.codec.weights_sha256
    if wanted is not None and wanted != codec.weights_sha256:
        raise ConflictError(
            "The codec is not the one the model was trained with",
            key="model.codec",
            value=path,
            rule=f"its weights must have the sha256 {wanted}, these have {codec.weights_sha256}",
            next_step="give the codec that encoded the training latents",
        )
    shape = (codec.latent_channels, codec.factor)
    if shape != (info.latent_channels, info.factor):
        raise ConflictError(
            "Model and codec do not fit",
            key="model.codec",
            value=path,
            rule=f"the model makes {info.latent_channels} channels at 1/{info.factor} of the size, "
            f"the codec reads {shape[0]} at 1/{shape[1]}",
            next_step="give the codec that encoded the training latents",
        )


def _draw(config: SampleJobConfig, info: ModelInfo) -> Draw:
    try:
        solver = solver_for(config.sampler.name, info.objective.kind)
    except ValueError as error:
        raise ConfigError(
            f"The sampler does not fit the model: {error}",
            key="sampler.name",
            value=config.sampler.name,
            rule="a solver serves the objective that the model was trained with",
            next_step="name one that does, or leave sampler.name at auto",
        ) from None
    return Draw(
        seed=config.seed,
        sampler=solver.name,
        shift=info.sampling_shift if config.sampler.shift is None else config.sampler.shift,
        shift_by_size=info.shift_by_size is not None and config.sampler.shift is None,
        batch_size=config.batch_size,
        device="auto",
        threads=config.threads,
        dtype=config.model.dtype,
        image=config.output.image,
        quality=config.output.quality,
        compile=config.model.compile,
    )


def _origin(model: StoredModel, text: TextSpec | None, codec: CodecInfo, codec_path: str) -> Origin:
    info, versions = model.info, {}
    for name in ("latentloom", "torch", "diffusers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return Origin(
        model_uri=model.uri,
        model_digest=model.digest(None if text is None else text.digest),
        model_run_id=info.run_id,
        ema=info.ema,
        dataset_uri=info.dataset.get("uri"),
        dataset_digest=info.dataset.get("digest"),
        codec_path=codec_path,
        codec_sha256=codec.weights_sha256,
        versions=tuple(versions.items()),
        mixture=tuple((share.uri, share.digest, share.weight) for share in info.mixture),
    )


# -- Request files: Parquet, CSV or JSON Lines bytes to columns of cells, with the columns renamed as configured --
#
# CSV cells are text until the request's own type reads them, so a prompt "007" stays "007"; an empty cell is unset.
# A broken line is a row without cells and with a reason, so that all are told at once with what else is wrong.


_MAX_ROWS = 20_000_000
SUFFIXES = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl"}


def file_format(uri: str, given: str) -> str:
    """parquet, csv or jsonl: as given, or for "auto" by the ending of the name."""
    if given != "auto":
        return given
    for suffix, name in SUFFIXES.items():
        if uri.lower().endswith(suffix):
            return name
    raise ConfigError(
        "The format of the request file cannot be told from its name",
        key="requests.uri",
        value=uri,
        rule=f"auto knows names that end in {', '.join(SUFFIXES)}",
        next_step="set requests.format to parquet, csv or jsonl",
    )


def read_columns(uri: str, kind: str, max_bytes: int) -> Cells:
    """All rows of a request file; InputError when it cannot be read at all, or is larger than it may be."""
    what = f"The request file {uri} cannot be read"
    stores: tuple[type[Exception], ...] = (*storage_errors(), ValueError)
    try:
        root, name = place_of(uri)
        size_bytes = root.info(name).size_bytes
    except stores as error:
        next_step = "correct the path, or write the requests as a grid"
        raise InputError(f"{what}: {describe(error)}", key="requests.uri", value=uri, next_step=next_step) from None
    if size_bytes > max_bytes:
        raise InputError(
            f"{what}: it has {size_bytes:,} bytes",
            key="requests.max_bytes",
            value=max_bytes,
            rule="requests are held in memory",
            next_step="divide the file, or raise the limit",
        )
    try:
        return table_cells(root, name, kind, max_rows=_MAX_ROWS, max_bytes=max_bytes)
    except storage_errors() as error:
        raise InputError(f"{what}: {describe(error)}", key="requests.uri", value=uri) from None
    except TableError as error:
        raise InputError(
            f"{what} as {kind}: {error} (requests.max_bytes is {max_bytes:,})",
            key="requests.uri",
            value=uri,
            rule="Parquet, CSV with a header line, or one JSON object a line; text is UTF-8",
            next_step="correct the file, or set requests.format",
        ) from None


def map_columns(
    columns: Mapping[str, Sequence[Any]], mapping: Mapping[str, str], other: str, origin: str
) -> dict[str, Sequence[Any]]:
    """Rename file columns to request fields; `mapping` is field -> file column, other names stand for themselves.

    What is left over goes by `other`: "refuse" (ConfigError), "keep" (into `extra` as JSON) or "drop".
    """
    unknown = [field for field in mapping if field not in FIELDS]
    missing = [column for column in mapping.values() if column not in columns]
    if unknown or missing:
        raise ConfigError(
            f"The column mapping does not fit {origin}",
            key="requests.columns",
            value=dict(mapping),
            rule=f"fields are {', '.join(FIELDS)}; the file has {', '.join(columns) or 'no column'}",
            next_step=f"correct {', '.join([*unknown, *missing])}",
        )
    mapped_columns = set(mapping.values())
    sources = {name: name for name in FIELDS if name in columns and name not in mapped_columns} | dict(mapping)
    left_over = [name for name in columns if name not in sources.values()]
    if left_over and other == "refuse":
        free = [field for field in FIELDS if field not in sources]
        near = difflib.get_close_matches(left_over[0].lower(), [*free, "class", "text", "caption"], n=1)
        meant = {"class": "label", "text": "prompt", "caption": "prompt"}.get(near[0], near[0]) if near else "prompt"
        raise ConfigError(
            f"The request file {origin} has columns that are no field of a request: {', '.join(left_over)}",
            key="requests.other_columns",
            value=other,
            rule=f"fields are {', '.join(FIELDS)}",
            next_step=f"map them (requests.columns.{meant}={left_over[0]}), "
            "or say requests.other_columns=keep or drop",
        )
    mapped: dict[str, Sequence[Any]] = {field: columns[source] for field, source in sources.items()}
    if left_over and other == "keep":
        # Canonical JSON; what JSON cannot hold becomes its text.
        extra: list[str | None] = []
        for cells in zip(*(columns[name] for name in left_over), strict=True):
            row = {name: cell for name, cell in zip(left_over, cells, strict=True) if cell is not None}
            text = json.dumps(row, sort_keys=True, separators=(",", ":"), default=str)
            extra.append(text if row else None)
        mapped["extra"] = extra
    return mapped
