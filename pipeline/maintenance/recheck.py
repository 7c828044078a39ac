"""Whether stored latents are what their images encode to: a seeded sample, read, decoded and encoded again.

Checksums prove that bytes are what was committed; only this proves that they belong to their images.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pydantic import PositiveInt, TypeAdapter, ValidationError

from pipeline.codec.codec import Codec, load_codec
from pipeline.encode.encoder import Encoder
from pipeline.encode.plan import largest_bucket
from pipeline.encode.rows import Decoded, EncodedImage
from pipeline.encode.stages import ImageDecoder, UnitReader
from pipeline.errors import InputError, argument_keys
from pipeline.maintenance.config import DecodeCheckConfig, RecheckLimits
from pipeline.progress import Progress
from pipeline.source.config import FolderSource, ImageConfig, ManifestSource, ParquetSource, SourceConfig
from pipeline.source.reading.listing import source_root
from pipeline.storage.trust import follow
from pipeline.store.ledger.generation import last_recipe
from pipeline.store.ledger.rowset import RowSet
from pipeline.store.plan import Work, read_entries
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import latents_from

_COLUMNS = ["sample_id", "unit", "row", "variant", "key", "bucket", "latent", "latent_shape", "content_sha256"]
_PIXEL_MAX = 255.0


@dataclass
class Recheck:
    """What a recheck found; `psnr_db` is of decoded latents against exact crops, `error` relative to the latent."""

    compared: int = 0
    source_gone: int = 0
    source_changed: int = 0
    identical: int = 0
    psnr_db: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    problems: list[dict[str, Any]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """Mean and worst of both measures; nothing when no row was compared."""
        if not self.compared:
            return {}
        return {
            "psnr_db_mean": float(np.mean(self.psnr_db)),
            "psnr_db_min": float(np.min(self.psnr_db)),
            "reencode_error_max": float(np.max(self.error)),
        }


@dataclass(frozen=True)
class _Recipe:
    source: SourceConfig
    image: ImageConfig
    batch_size: int


def recheck(uri: str, config: DecodeCheckConfig) -> Recheck:
    """Compare `config.sample` rows, chosen by `config.seed`, with their images.

    A row whose image is gone or was replaced is counted, not judged, as long as the next listing sees that.
    InputError when the dataset does not say how it was made, or the codec is another one.
    """
    dataset = LatentDataset.open(uri, "data.uri")
    recipe = _recipe(dataset, config)
    codec = _codec(dataset, config)
    result = Recheck()
    rows = _sampled(dataset, config.sample, config.seed)
    items = _items(dataset, recipe, rows)
    encoder = Encoder(
        codec,
        dataset.posterior,
        dataset.latent_dtype,
        recipe.batch_size,
        math.prod(largest_bucket(recipe.image)),
        recipe.source.uri,
        device=_device(config),
    )
    wanted: dict[bytes, Decoded] = {}
    for row in rows:
        item = items.get(row["sample_id"])
        if item is None:
            result.source_gone += 1
        elif item.values["content_sha256"] != row["content_sha256"]:
            result.source_changed += 1
            _judge_change(result, dataset, recipe.source, row)
        else:
            wanted[row["sample_id"]] = item
    done = 0
    with Progress("encode again", len(wanted), "rows") as progress:

        def on_batch(stored: int) -> None:
            nonlocal done
            progress.update(done := done + stored)

        outcomes = encoder.encode(wanted.values(), on_batch=on_batch)
    again = {o.decoded.values["sample_id"]: o for o in outcomes if isinstance(o, EncodedImage)}
    for row in rows:
        if row["sample_id"] in wanted:
            _compare(result, dataset, config, codec, row, wanted[row["sample_id"]], again.get(row["sample_id"]))
    return result


def _judge_change(result: Recheck, dataset: LatentDataset, source: SourceConfig, row: dict[str, Any]) -> None:
    """An image that changed while its object looks as it was listed is a problem: no listing will see it."""
    entries = read_entries(dataset.root, dataset.state.plan.locate(row["unit"]))
    entry = next(e for e in reversed(entries) if e.first_row <= row["row"])
    now = source_root(source).info(entry.key)
    if now.size_bytes == entry.size_bytes and (now.etag or now.mtime_ns) == (
        entry.etag if now.etag else entry.mtime_ns
    ):
        where = f"{row['key']} (unit {row['unit']}, row {row['row']})"
        detail = (
            "its image has other bytes now, though its size and version are those that were listed: encode with "
            "source.detect=content"
        )
        result.problems.append({"kind": "source", "where": where, "detail": detail})


def _recipe(dataset: LatentDataset, config: DecodeCheckConfig) -> _Recipe:
    note = last_recipe(dataset.root)
    if not note:
        raise InputError(
            f"{dataset.uri} does not say how it was made",
            key="level",
            value="decode",
            rule="the decode level reads the images again as the encode job did; its note was not found",
            next_step="use level=checksums; datasets written by this version hold the note",
        )
    try:
        source = {**note["source"], **({"uri": config.source_uri} if config.source_uri else {})}
        checked: SourceConfig = TypeAdapter(SourceConfig).validate_json(json.dumps(source))
        image = ImageConfig.model_validate_json(json.dumps(note["image"]))
        batch_size = TypeAdapter(PositiveInt).validate_python(note["batch_size"], strict=True)
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        problems = f"{error.error_count()} problem(s)" if isinstance(error, ValidationError) else repr(error)
        raise InputError(
            f"The note of how {dataset.uri} was made cannot be read: {problems}",
            rule="the note was written by another version of this program",
            next_step="use level=checksums, or the version that wrote the dataset",
        ) from None
    places = {} if config.source_uri else {"decode.source_uri": checked.uri}
    places |= {} if config.codec_path else {"decode.codec_path": str(dataset.codec["path"])}
    follow(places, config.places, written_in="the dataset", allow_by="decode.places")
    for prefix in checked.uri_prefixes if isinstance(checked, ParquetSource) else ():
        follow({"decode.places": prefix}, config.places, written_in="the dataset", allow_by="decode.places")
    return _limited(_Recipe(checked, image, batch_size), config.limits)


def _limited(recipe: _Recipe, limits: RecheckLimits) -> _Recipe:
    """The recipe under our own limits and isolation; InputError where it needs more, for rows would be missed."""
    source, image = recipe.source, recipe.image
    needed = {
        "max_bytes": (source.max_bytes, limits.max_bytes),
        "max_pixels": (image.max_pixels, limits.max_pixels),
        "batch_pixels": (recipe.batch_size * math.prod(largest_bucket(image)), limits.batch_pixels),
    }
    over: dict[str, Any] = {name: here for name, (recorded, here) in needed.items() if recorded > here}
    ours: dict[str, Any] = {}
    if isinstance(source, FolderSource | ManifestSource):
        over |= {"links": limits.links} if source.links == "any" != limits.links else {}
        ours |= {"links": limits.links}
    elif isinstance(source, ParquetSource):
        ours |= {"isolate": True, "memory_mb": limits.memory_mb}
    if over:
        recorded_as = {**{name: recorded for name, (recorded, _) in needed.items()}, "links": "any"}
        asked = " ".join(f"decode.limits.{name}={recorded_as[name]}" for name in over)
        raise InputError(
            "The dataset was made with wider limits than hold here",
            key=", ".join(f"decode.limits.{name}" for name in over),
            value=", ".join(str(value) for value in over.values()),
            rule="a dataset does not decide what reading it may cost",
            next_step=f"where you trust it, set {asked}",
        )
    small = {"decode_cpu_s": limits.decode_cpu_s, "decode_memory_mb": limits.decode_memory_mb, "isolate": "all"}
    return _Recipe(source.model_copy(update=ours), image.model_copy(update=small), recipe.batch_size)


def _device(config: DecodeCheckConfig) -> str:
    if config.device != "auto":
        return config.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _codec(dataset: LatentDataset, config: DecodeCheckConfig) -> Codec:
    about, made = dataset.codec, dataset.fingerprint["codec"]
    with argument_keys({"path": "decode.codec_path"}):
        codec = load_codec(
            config.codec_path or about["path"],
            revision=None if config.codec_path else about["revision"],
            kind=about["kind"],
            device=_device(config),
            dtype=dataset.fingerprint["codec_dtype"],
        )
    if codec.info.weights_sha256 != made["weights_sha256"]:
        raise InputError(
            f"The codec has other weights ({str(codec.info.weights_sha256)[:12]}…) than the dataset's "
            f"({str(made['weights_sha256'])[:12]}…)",
            key="decode.codec_path",
            value=config.codec_path or about["path"],
            rule="latents are compared with the codec that made them",
            next_step="name the directory that holds the dataset's codec",
        )
    return codec


def _sampled(dataset: LatentDataset, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` distinct visible rows, uniformly; reads only the row groups they lie in."""
    stops = np.cumsum([g.num_rows for g in dataset.row_groups])
    total = int(stops[-1]) if len(stops) else 0
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    rows: list[dict[str, Any]] = []
    for group, places in itertools.groupby(chosen, key=lambda place: int(np.searchsorted(stops, place, "right"))):
        start = int(stops[group - 1]) if group else 0
        table = dataset.read(dataset.row_groups[group].index, _COLUMNS)
        rows += table.take([int(place) - start for place in places]).to_pylist()
    return rows


def _items(dataset: LatentDataset, recipe: _Recipe, rows: list[dict[str, Any]]) -> dict[bytes, Decoded]:
    """The images of the rows as the encode job would see them now, by sample id."""
    by_unit: dict[int, list[int]] = {}
    for row in rows:
        by_unit.setdefault(row["unit"], []).append(row["row"])
    plan = dataset.state.plan
    reader = UnitReader(dataset.root, recipe.source, {unit: plan.locate(unit) for unit in by_unit}, any_version=True)
    decoder = ImageDecoder(recipe.image, recipe.source.uri, threads=2, ahead=4)
    ids = {row["sample_id"] for row in rows}
    items: dict[bytes, Decoded] = {}
    try:
        for unit, numbers in by_unit.items():
            places = np.unique(np.array(numbers, np.int64))
            wanted = RowSet.from_rows(np.full_like(places, unit), places)
            work = Work(unit, tuple((start, stop) for _, start, stop in wanted.triples()))
            for item in (item for block in reader(work) for item in decoder.items(block)):
                # A unit's rows have other variants, too.
                if isinstance(item, Decoded) and item.values["sample_id"] in ids:
                    items[item.values["sample_id"]] = item
    finally:
        decoder.close()
    return items


def _compare(
    result: Recheck,
    dataset: LatentDataset,
    config: DecodeCheckConfig,
    codec: Codec,
    row: dict[str, Any],
    item: Decoded,
    again: EncodedImage | None,
) -> None:
    where = f"{row['key']} (unit {row['unit']}, row {row['row']})"
    stored = _latent(row["latent"], row["latent_shape"], dataset.latent_dtype)
    result.compared += 1
    # Decoded, against the exact crop.
    channels = stored.shape[0] // 2 if dataset.posterior == "moments" else stored.shape[0]
    decoded = codec.decode(torch.from_numpy(stored[None, :channels].copy()))[0].cpu().numpy()
    mean_square = float(np.mean((decoded.astype(np.float64) - item.pixels) ** 2))
    psnr = float(10 * np.log10(_PIXEL_MAX**2 / mean_square)) if mean_square else float("inf")
    result.psnr_db.append(psnr)
    if config.min_psnr_db is not None and psnr < config.min_psnr_db:
        detail = f"decodes to {psnr:.2f} dB of its image, at least {config.min_psnr_db:g} is asked for"
        result.problems.append({"kind": "fidelity", "where": where, "detail": detail})
    # Encoded again, against the stored one.
    if again is None:
        result.problems.append({"kind": "re-encode", "where": where, "detail": "the codec refuses the image now"})
        result.error.append(float("inf"))
        return
    fresh = _latent(again.latent, again.shape, dataset.latent_dtype)
    error = _relative_error(stored, fresh)
    result.error.append(error)
    result.identical += int(row["latent"] == again.latent)
    if not error <= config.tolerance:
        detail = f"differs by {error:.2g} of its own size from encoding its image again; {config.tolerance:g} allowed"
        result.problems.append({"kind": "re-encode", "where": where, "detail": detail})


def _latent(data: bytes, shape: Sequence[int], dtype: str) -> npt.NDArray[np.float32]:
    channels, height, width = shape
    latent: npt.NDArray[np.float32] = latents_from(pa.array([data], pa.binary()), (channels, height, width), dtype)[0]
    return latent


def _relative_error(stored: npt.NDArray[np.float32], fresh: npt.NDArray[np.float32]) -> float:
    """Root mean square of the difference over that of the fresh latent's deviation from its mean."""
    if stored.shape != fresh.shape:
        return float("inf")
    size = float(np.std(fresh))
    gap = float(np.sqrt(np.mean((stored - fresh) ** 2)))
    return gap / size if size else (0.0 if gap == 0 else float("inf"))
