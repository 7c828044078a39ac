"""From files to latents without Ray: the kind of source does not matter, and every variant is what it says it is."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.codec.codec import load_codec
from pipeline.encode.encoder import Encoder
from pipeline.encode.rows import encoded_table, raw_table
from pipeline.encode.stages import ImageDecoder
from pipeline.source.config import FolderSource, ImageConfig, ParquetSource, SourceConfig, WebDatasetSource
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import SourceRow
from tests.support.images import make_codec, make_images

IMAGE = ImageConfig(resolution=(64, 32), flip=True, multiple_of=4, max_upscale=9.0)


def as_tars(folder: Path, names: list[str], texts: dict[str, str], target: Path) -> None:
    target.mkdir()
    for shard in range(2):
        with tarfile.open(target / f"{shard:03d}.tar", "w") as tar:
            for name in names[shard::2]:
                stem, _, extension = name.rpartition(".")
                for member, data in (
                    (f"{stem}.{extension}", (folder / name).read_bytes()),
                    (f"{stem}.txt", texts[name].encode()),
                ):
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def as_parquet(folder: Path, names: list[str], texts: dict[str, str], target: Path) -> None:
    target.mkdir()
    columns = {
        "image": [{"bytes": (folder / n).read_bytes(), "path": n} for n in names],
        "text": [texts[n] for n in names],
    }
    pq.write_table(pa.table(columns), target / "0.parquet", row_group_size=5)


def encoded(source: SourceConfig, codec_path: Path, image: ImageConfig, order: int = 1) -> list[dict[str, Any]]:
    """The stored rows of a source through reader, decoder and encoder."""
    items = [r for e in list_entries(source) for r in read_unit(source, [e], [(0, None)])]
    for number, item in enumerate(items):  # the entries of a unit follow each other
        if isinstance(item, SourceRow):
            item.row = number
    decoder = ImageDecoder(image, source.uri, threads=2, ahead=4)
    encoder = Encoder(load_codec(str(codec_path)), "mode", "float16", 3, 64 * 64, source.uri)
    table = encoded_table(encoder.encode(list(decoder.items(raw_table(0, items)))[::order]))
    decoder.close()
    rows = [r for r in table.to_pylist() if r["outcome"] != "end"]
    assert {r["outcome"] for r in rows} == {"stored"}
    return rows


def latents(
    source: SourceConfig, codec_path: Path, order: int = 1
) -> dict[tuple[str, int], tuple[bytes, bytes, str]]:
    """{(caption, variant): (hash of the file, latent, bucket)}."""
    rows = encoded(source, codec_path, IMAGE, order)
    return {(r["caption"], r["variant"]): (r["content_sha256"], r["latent"], r["bucket"]) for r in rows}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in an encoder actor on a CPU: with several, the last bits depend on a row's place in its batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.integration
@pytest.mark.parametrize("real", [False, True])
def test_folder_tars_and_parquet_give_identical_latents(
    real: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "folder"
    if real:
        shared: Path = request.getfixturevalue("shared_data")
        folder.mkdir()
        for path in sorted((shared / "photos").glob("*.jpg"))[:10]:
            (folder / path.name).write_bytes(path.read_bytes())
    else:
        make_images(folder, 10)
    names = sorted(p.name for p in folder.iterdir() if p.name != "metadata.jsonl")
    texts = {name: f"caption of {name}" for name in names}
    lines = [json.dumps({"file_name": n, "text": texts[n]}) for n in names]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    as_tars(folder, names, texts, tmp_path / "tars")
    as_parquet(folder, names, texts, tmp_path / "tables")
    codec = make_codec(tmp_path / "codec")
    files = latents(FolderSource(uri=str(folder)), codec)
    assert len(files) == 10 * 2 * 2
    assert len({latent for _, latent, _ in files.values()}) == len(files)
    # Tars hold the files in another order: batches have other mates, and the latents stay.
    assert latents(WebDatasetSource(uri=str(tmp_path / "tars")), codec) == files
    assert latents(ParquetSource(uri=str(tmp_path / "tables")), codec, order=-1) == files


TABLE = ((32, 48), (48, 32), (32, 32))


@pytest.mark.parametrize(
    ("image", "variants", "buckets"),
    [
        (ImageConfig(resolution=(64, 32), flip=True, crop="random", multiple_of=4, max_upscale=9.0), 4, None),
        (ImageConfig(buckets={"kind": "table", "sizes": TABLE}, crop="random", flip=True, multiple_of=4), 2, TABLE),
        (ImageConfig(resolution=(32, 64), buckets={"kind": "budget"}, multiple_of=4, max_upscale=9.0), 2, None),
    ],
)
def test_every_variant_is_the_crop_that_it_says(
    image: ImageConfig, variants: int, buckets: tuple[tuple[int, int], ...] | None, tmp_path: Path
) -> None:
    """Each latent is that of the stated crop of the file, cut, resized and mirrored here by other means."""
    sizes = [(90, 60), (60, 90), (70, 70)]
    for number, (height, width) in enumerate(sizes):
        chance = np.random.default_rng(number)
        coarse = Image.fromarray(chance.integers(0, 256, (6, 6, 3), np.uint8))
        (tmp_path / "images").mkdir(exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"images/{number}.png")
    path = make_codec(tmp_path / "codec")
    codec = load_codec(str(path))
    rows = encoded(FolderSource(uri=str(tmp_path / "images")), path, image)
    assert len(rows) == 3 * variants
    for row in rows:
        assert (row["original_height"], row["original_width"]) == sizes[int(row["key"][0])]
        height, width = map(int, row["bucket"].split("x"))
        box = (row["crop_left"], row["crop_top"])
        box += (row["crop_left"] + row["crop_width"], row["crop_top"] + row["crop_height"])
        assert min(box) >= 0
        assert box[2] <= row["original_width"]
        assert box[3] <= row["original_height"]
        with Image.open(tmp_path / "images" / row["key"]) as picture:
            pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS, box=box))
        pixels = pixels[:, ::-1].copy() if row["flipped"] else pixels
        wanted = codec.encode(torch.from_numpy(pixels[None].copy()))[0].numpy()
        found = np.frombuffer(row["latent"], np.float16).reshape(row["latent_shape"])
        np.testing.assert_allclose(found, wanted, atol=0.02 * float(wanted.std()) + 1e-3)
        if buckets is not None:
            ratio = row["original_width"] / row["original_height"]
            nearest = min(buckets, key=lambda b: abs(np.log(b[1] / b[0] / ratio)))
            assert (height, width) == nearest
    random = image.crop == "random"
    crops = {(r["crop_top"], r["crop_left"]) for r in rows}
    centred = all(
        (r["crop_top"], r["crop_left"])
        == ((r["original_height"] - r["crop_height"]) // 2, (r["original_width"] - r["crop_width"]) // 2)
        for r in rows
    )
    assert centred != random or len(crops) == 1
    # Flipped and plain, large and small come from one crop box fraction of the sample, now and in another run.
    again = encoded(FolderSource(uri=str(tmp_path / "images")), path, image, order=-1)
    assert again == rows
