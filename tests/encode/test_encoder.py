"""The encoder by itself: batches of one shape, memory that runs out, images nobody can encode."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.codec.codec import CodecInfo
from pipeline.dataflow.device_faults import DeviceFault, device_fault
from pipeline.encode.encoder import DeviceQueue, Encoder, Fetch, Latents, Usage
from pipeline.encode.rows import Decoded, Item, Rejected, UnitEnd, encoded_table, items_of, pixels_table
from pipeline.encode.stages import ImageDecoder
from pipeline.errors import ConfigError
from pipeline.source.config import ImageConfig
from pipeline.store.schema import latents_from

POISON, HUGE, NAN = 251, 252, 253


class Blocks(torch.nn.Module):
    """A codec of factor 4: means of 4x4 blocks through one fixed convolution; some colours are special."""

    info = CodecInfo("Blocks", {}, "00", latent_channels=4, factor=4)

    def __init__(self, capacity: int = 10**9) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Conv2d(3, 4, 4, stride=4)
        self.capacity, self.shapes = capacity, []

    def encode(
        self, images_NHWC: torch.Tensor, *, posterior: str = "mode", seeds: Sequence[int] | None = None
    ) -> torch.Tensor:
        self.shapes.append(tuple(images_NHWC.shape))
        if images_NHWC.shape[0] * images_NHWC.shape[1] * images_NHWC.shape[2] > self.capacity:
            raise torch.OutOfMemoryError("planted: out of memory")
        first = images_NHWC[:, 0, 0, 0]
        if (first == POISON).any():
            raise RuntimeError("planted: this image cannot be encoded")
        with torch.no_grad():
            latents = self.mix(images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1)
        latents[first == HUGE] = 1e6
        latents[first == NAN] = float("nan")
        if seeds is not None:
            latents = latents + torch.tensor(seeds, dtype=torch.float64).remainder(7).float()[:, None, None, None]
        return latents

    def decode(self, latents_NCHW: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("these tests only encode")


def item(row: int, size: tuple[int, int] = (8, 8), first: int = 0, variant: int = 0, variants: int = 1) -> Decoded:
    pixels = np.random.default_rng(row).integers(0, 250, (*size, 3), np.uint8)
    pixels[0, 0, 0] = first
    values: dict[str, Any] = {
        "unit": 0,
        "row": row,
        "key": f"{row}.png",
        "variant": variant,
        "bucket": f"{size[0]}x{size[1]}",
        "sample_id": bytes([row, variant] * 8),
    }
    return Decoded(values, variants, pixels)


class TableEncoder(Encoder):
    """The encoder, whose answer is the table that travels on."""

    def encode(self, *args: Any, **settings: Any) -> pa.Table:  # type: ignore[override]
        return encoded_table(super().encode(*args, **settings))


def encoder(codec: Blocks, batch_size: int = 4, dtype: str = "float16", posterior: str = "mode") -> Encoder:
    return TableEncoder(codec, posterior, dtype, batch_size, 64, "mem")  # type: ignore[arg-type]


def stored(table: pa.Table) -> dict[int, bytes]:
    return {r["row"]: r["latent"] for r in table.to_pylist() if r["outcome"] == "stored"}


def test_every_batch_of_a_bucket_has_one_shape_and_rows_come_back_in_order() -> None:
    codec = Blocks()
    items = [item(r, (8, 8) if r % 3 else (4, 8)) for r in range(11)]
    table = encoder(codec).encode(items)
    assert table["row"].to_pylist() == list(range(11))
    assert set(codec.shapes) == {(4, 8, 8, 3), (8, 4, 8, 3)}
    shapes = {tuple(s) for s in table["latent_shape"].to_pylist()}
    assert shapes == {(4, 2, 2), (4, 1, 2)}


@pytest.mark.parametrize("order", [1, -1])
def test_a_latent_depends_on_its_image_alone(order: int) -> None:
    items = [item(r) for r in range(9)]
    alone = {r: stored(encoder(Blocks()).encode([items[r]]))[r] for r in range(9)}
    assert stored(encoder(Blocks()).encode(items[::order])) == alone


def test_latents_are_what_the_codec_said() -> None:
    codec = Blocks()
    items = [item(r) for r in range(4)]
    table = encoder(codec).encode(items)
    pixels = torch.from_numpy(np.stack([i.pixels for i in items]))
    wanted = codec.encode(pixels).numpy().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(latents_from(table["latent"], (4, 2, 2), "float16"), wanted)


def test_a_poison_image_is_rejected_and_its_batch_mates_are_kept() -> None:
    items = [item(r, first=POISON if r == 2 else 0) for r in range(4)]
    table = encoder(Blocks()).encode(items)
    clean = stored(encoder(Blocks()).encode([i for i in items if i.values["row"] != 2]))
    assert stored(table) == clean
    (bad,) = [r for r in table.to_pylist() if r["outcome"] == "rejected"]
    assert (bad["row"], bad["reason"], bad["uri"]) == (2, "encode_failed", "mem/2.png")
    assert "planted" in bad["message"]


class Failing(Blocks):
    """A codec that works for so many calls, and fails in some way on every image from then on."""

    def __init__(self, error: Exception | None, calls: int = 0) -> None:
        super().__init__()
        self.error, self.calls = error, calls

    def encode(self, images_NHWC: torch.Tensor, **options: Any) -> torch.Tensor:
        self.calls -= 1
        if self.calls >= 0:
            return super().encode(images_NHWC, **options)
        if self.error is not None:
            raise self.error
        return torch.full_like(super().encode(images_NHWC, **options), float("nan"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("planted: nobody has ever seen this wording"),
        ValueError("planted: of no kind that is known"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        None,  # no error, and nothing but NaN
    ],
)
def test_a_codec_that_fails_on_known_content_blames_no_image(error: Exception | None) -> None:
    machine = encoder(Failing(error, calls=1))
    assert len(stored(machine.encode([item(r) for r in range(4)]))) == 4
    with pytest.raises(Exception) as caught:
        machine.encode([item(r) for r in range(4)])
    assert device_fault(caught.value) is not None
    assert machine.usage.rejected == 0


def test_latents_that_no_image_can_have_in_the_stored_type_are_a_wrong_configuration() -> None:
    class Wide(Blocks):
        def encode(self, images_NHWC: torch.Tensor, **options: Any) -> torch.Tensor:
            return super().encode(images_NHWC, **options) * 0 + 1e6

    with pytest.raises(ConfigError, match=r"float16 cannot hold[\s\S]*encode\.latent_dtype=bfloat16"):
        encoder(Wide()).encode([item(0)])
    assert len(stored(encoder(Wide(), dtype="bfloat16").encode([item(0)]))) == 1


def test_memory_that_runs_out_halves_the_batch_and_goes_on() -> None:
    codec = Blocks(capacity=2 * 64)
    machine = encoder(codec, batch_size=8)
    table = machine.encode([item(r) for r in range(8)])
    assert stored(table) == stored(encoder(Blocks(), batch_size=2).encode([item(r) for r in range(8)]))
    assert machine.usage.halvings == 2
    assert codec.shapes[-1] == (2, 8, 8, 3)
    machine.encode([item(r) for r in range(8)])
    assert machine.usage.halvings == 2  # what fits is remembered


def test_a_batch_that_did_not_fit_is_gone_before_a_smaller_one_is_tried() -> None:
    class Counting(Blocks):
        attempts: ClassVar[list[weakref.ref[torch.Tensor]]] = []

        def encode(self, images_NHWC: torch.Tensor, **options: Any) -> torch.Tensor:
            assert not [attempt for attempt in self.attempts if attempt() is not None]
            self.attempts.append(weakref.ref(images_NHWC))
            return super().encode(images_NHWC, **options)

    assert len(stored(encoder(Counting(capacity=64)).encode([item(r) for r in range(4)]))) == 4


def test_memory_that_does_not_hold_one_image_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"One image of 8x8 pixels .*[\s\S]*image.resolution") as caught:
        encoder(Blocks(capacity=10)).encode([item(0)])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("first", "dtype", "rejected"), [(NAN, "float16", True), (HUGE, "float16", True), (HUGE, "bfloat16", False)]
)
def test_latents_that_the_stored_type_cannot_hold_are_rejected(first: int, dtype: str, rejected: bool) -> None:
    table = encoder(Blocks(), dtype=dtype).encode([item(0), item(1, first=first)])
    outcomes = dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))
    assert outcomes == {0: None, 1: "bad_latent" if rejected else None}


def test_posterior_draws_are_keyed_by_sample_not_by_place() -> None:
    items = [item(r) for r in range(6)]
    forwards = stored(encoder(Blocks(), posterior="sample").encode(items))
    backwards = stored(encoder(Blocks(), posterior="sample").encode(items[::-1]))
    assert forwards == backwards
    assert forwards != stored(encoder(Blocks()).encode(items))


def test_a_row_with_a_failed_variant_has_one_outcome() -> None:
    items = [item(0), item(1, variants=2), item(1, first=POISON, variant=1, variants=2), item(2)]
    table = encoder(Blocks()).encode(items)
    assert [(r["row"], r["outcome"]) for r in table.to_pylist()] == [(0, "stored"), (1, "rejected"), (2, "stored")]


def test_outcomes_known_before_pass_through_in_their_place() -> None:
    known = Rejected(0, 1, "1", "mem/1", "rejected", "truncated", "short")
    end = UnitEnd(0, 3)
    table = encoder(Blocks()).encode([item(0), known, item(2), end])
    assert table["outcome"].to_pylist() == ["end", "stored", "rejected", "stored"]


def test_pixels_survive_the_way_between_decode_tasks_and_encoders() -> None:
    others = [Rejected(0, 2, "2", "mem/2", "filtered", "too_small", "small"), UnitEnd(0, 3)]
    items = [item(0, variants=2), item(1, (4, 8))]
    back = list(items_of(pixels_table([*items, *others])))
    assert back[2:] == others
    for a, b in zip(items, back, strict=False):
        assert isinstance(b, Decoded)
        np.testing.assert_array_equal(a.pixels, b.pixels)
        assert ({k: v for k, v in b.values.items() if v is not None}, b.variants) == (a.values, a.variants)


def test_decoding_runs_ahead_but_keeps_the_order() -> None:
    import io

    from PIL import Image

    from pipeline.encode.rows import RAW

    rows = []
    for r in range(30):
        sink = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), r, np.uint8)).save(sink, "PNG")
        image = sink.getvalue() if r % 7 else b"no image"
        rows.append({"unit": 3, "row": r, "source": "s", "key": f"{r}", "image": image, "status": "ok"})
    decoder = ImageDecoder(ImageConfig(resolution=16, multiple_of=4), "mem", threads=3, ahead=8)
    items = list(decoder.items(pa.Table.from_pylist(rows, schema=RAW)))
    decoder.close()
    assert [i.place[1] for i in items] == list(range(30))
    assert [i.row for i in items if isinstance(i, Rejected)] == [0, 7, 14, 21, 28]
    assert all((i.pixels == i.values["row"]).all() for i in items if isinstance(i, Decoded))


def handed_in(machine: Encoder, tables: Sequence[Sequence[Item]]) -> list[pa.Table]:
    """Every table encoded by a thread of its own, all at once."""
    with ThreadPoolExecutor(len(tables)) as pool:
        return [f.result(timeout=60) for f in [pool.submit(machine.encode, items) for items in tables]]


def test_tables_encoded_at_a_time_share_batches_and_get_what_each_would_have_got_alone() -> None:
    tables = [[item(10 * t + r, (8, 8) if r % 2 else (4, 8)) for r in range(7)] for t in range(6)]
    tables[3][2] = item(32, (4, 8), first=POISON)
    alone = [encoder(Blocks()).encode(table) for table in tables]
    codec = Blocks()
    machine = TableEncoder(codec, "mode", "float16", 4, 64, "mem", calls=3)  # type: ignore[arg-type]
    for found, wanted in zip(handed_in(machine, tables), alone, strict=True):
        assert found.equals(wanted)
    assert machine.usage.stored == 41
    assert machine.usage.rejected == 1
    assert set(codec.shapes) == {(4, 8, 8, 3), (8, 4, 8, 3)}
    # 18 of one size by 4 and 24 of the other by 8: alone they would have taken 6 x 2 calls at the least.
    separate = Blocks()
    for table in tables:
        encoder(separate).encode(table)
    assert len(codec.shapes) < len(separate.shapes)


def test_a_device_that_fails_ends_every_table_on_it() -> None:
    codec = Blocks(capacity=10)
    machine = TableEncoder(codec, "mode", "float16", 4, 64, "mem", calls=2)  # type: ignore[arg-type]
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(machine.encode, [item(r) for r in range(3)]) for _ in range(2)]:
            with pytest.raises(ConfigError, match="does not fit the device's memory"):
                future.result(timeout=60)


class LosesResults(DeviceQueue):
    """A device that takes batches, and fails when the first of them is fetched."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.depth = 2

    def submit(self, batch: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> Fetch:
        def fetch() -> tuple[Latents, float]:
            raise RuntimeError("planted: the device is gone")

        return fetch


@pytest.mark.parametrize("attempt", range(40))
def test_a_table_that_waits_for_company_hears_of_a_failed_device(
    monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    # Which thread comes first after the last item is up to the system: hence some attempts.
    monkeypatch.setattr("pipeline.encode.encoder.DeviceQueue", LosesResults)
    monkeypatch.setattr("pipeline.encode.encoder._GRACE_S", 3600.0)
    machine = TableEncoder(Blocks(), "mode", "float16", 4, 64, "mem", calls=3)  # type: ignore[arg-type]
    errors: list[BaseException] = []
    alone = threading.Event()

    def few() -> Iterator[Item]:
        yield item(0, (4, 8))
        alone.set()

    def encode(items: Iterable[Item]) -> None:
        try:
            machine.encode(items)
        except DeviceFault as error:
            errors.append(error)

    waiting = threading.Thread(target=encode, args=[few()], daemon=True)
    waiting.start()
    assert alone.wait(10)
    other = threading.Thread(target=encode, args=[[item(r) for r in range(1, 5)]], daemon=True)
    other.start()
    waiting.join(10)
    other.join(10)
    assert [str(error) for error in errors] == ["RuntimeError: planted: the device is gone"] * 2


def test_items_that_cannot_be_read_end_their_own_table_alone() -> None:
    def unreadable() -> Iterator[Item]:
        yield item(0)
        raise ValueError("planted")

    machine = TableEncoder(Blocks(), "mode", "float16", 4, 64, "mem", calls=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="planted"):
        machine.encode(unreadable())
    assert stored(machine.encode([item(1)])) == stored(encoder(Blocks()).encode([item(1)]))


class Slow(DeviceQueue):
    """A device that is busy for a tenth of a second with each batch, while the host goes on."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.depth = 2

    def submit(self, batch: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor]) -> Fetch:
        latents = encode(batch).float().numpy()
        return lambda: (latents, 0.1)


def test_a_device_is_busy_while_nobody_waits_for_it() -> None:
    """Where decoding is slower than the device no fetch ever waits: what it did must count even so."""
    codec = Blocks()
    codec.queue = Slow()  # type: ignore[attr-defined]
    machine = encoder(codec)
    machine.encode([item(r) for r in range(8)])
    assert machine.usage.device_s == pytest.approx(0.1 * -(-8 // machine.batch_size))


def test_usage_is_told_once() -> None:
    machine = encoder(Blocks())
    machine.encode([item(r, first=POISON if r == 1 else 0) for r in range(3)])
    first = machine.unreported()
    assert (first.stored, first.rejected) == (2, 1)
    assert first.device_s > 0
    assert machine.unreported() == Usage()


@pytest.mark.integration
def test_a_rare_size_is_not_kept_waiting_as_long_as_others_come() -> None:
    machine = TableEncoder(Blocks(), "mode", "float16", 4, 64, "mem", calls=2)  # type: ignore[arg-type]
    answered = threading.Event()
    taken = itertools.count()

    def common() -> Iterator[Item]:
        while not answered.is_set() and next(taken) < 100_000:
            yield item(1)

    with ThreadPoolExecutor(2) as pool:
        rare = pool.submit(machine.encode, [item(0, (4, 8))])
        other = pool.submit(machine.encode, common())
        assert len(rare.result(timeout=60)) == 1
        answered.set()
        other.result(timeout=60)
    assert next(taken) < 100_000
