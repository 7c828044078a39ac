"""The read side: the right vectors in the right places, within its memory, or a clear refusal."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ConflictError, InputError
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.ledger.state import read_state
from pipeline.store.plan import append_version, read_plan
from pipeline.store.read.dataset import Dataset
from pipeline.store.read.pages import StoredParts
from pipeline.store.read.pins import Pins
from pipeline.text.dataset import ArrangedText, PlannedCaption, TextEmbeddings, caption_hash, in_units
from pipeline.text.job import embed_gaps
from tests.support.rows import claim, planned_root

pytestmark = pytest.mark.integration

LENGTH, WIDTH = 6, 8
CAPTIONS = ["", *(f"caption {i}" for i in range(40))]


@dataclass
class Toy:
    """What an encoder returns."""

    tokens: Any
    truncated: Any
    embeddings_NLD: Any
    pooled_NP: Any


def toy_encode(captions: Sequence[str]) -> Toy:
    """Numbers that are a function of the caption; padding is not zero on purpose."""
    chance = [np.random.default_rng(list(caption_hash(c))) for c in captions]
    return Toy(
        np.array([1 + len(c) % LENGTH for c in captions], np.int32),
        np.zeros(len(captions), np.bool_),
        np.stack([g.normal(size=(LENGTH, WIDTH)).astype(np.float32) for g in chance]),
        np.stack([g.normal(size=3).astype(np.float32) for g in chance]),
    )


def write(uri: Path, captions: Sequence[str], encode: Any = toy_encode, dtype: str = "float16") -> str:
    root = Root(str(uri))
    pooled = "none" if encode(["x"]).pooled_NP is None else "pooler"
    fingerprint = {"max_length": LENGTH, "width": WIDTH, "embedding_dtype": dtype, "pooled": pooled}
    claim_identity(root, Identity("text", fingerprint, {}))
    generation = claim(root)
    planned = (PlannedCaption(caption_hash(c).hex(), len(c.encode()), c) for c in captions)
    append_version(read_plan(root), in_units(planned, 8), source={}, generation=generation.number)
    embed_gaps(root, generation, read_state(root), lambda: encode, embedding_dtype=dtype, row_group_bytes=1024)
    generation.close({"status": "done"})
    return str(uri)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("text") / "toy", CAPTIONS)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(captions=st.lists(st.one_of(st.none(), st.sampled_from(CAPTIONS)), max_size=12), cache=st.integers(0, 4000))
def test_lookup_gives_each_caption_its_own_tokens(uri: str, captions: list[str | None], cache: int) -> None:
    text = TextEmbeddings.open(uri, cache_bytes=cache)
    embeddings_NLD, mask_NL = text.lookup(captions)
    assert embeddings_NLD.shape == (len(captions), LENGTH, WIDTH)
    assert embeddings_NLD.dtype == np.float32
    for i, caption in enumerate(captions):
        want = toy_encode([caption or ""])
        n = int(want.tokens[0])
        assert mask_NL[i].tolist() == [True] * n + [False] * (LENGTH - n)
        np.testing.assert_array_equal(embeddings_NLD[i, :n], want.embeddings_NLD[0, :n].astype(np.float16))
        assert not embeddings_NLD[i, n:].any()
    if captions:
        want_NP = toy_encode([c or "" for c in captions]).pooled_NP.astype(np.float16)
        np.testing.assert_array_equal(text.lookup_pooled(captions), want_NP)


def test_bfloat16_is_read_as_it_was_stored(tmp_path: Path) -> None:
    text = TextEmbeddings.open(write(tmp_path / "b", CAPTIONS[:3], dtype="bfloat16"))
    got = text.lookup(["caption 1"])[0][0]
    want = toy_encode(["caption 1"])
    n = int(want.tokens[0])
    np.testing.assert_allclose(got[:n], want.embeddings_NLD[0, :n], rtol=2**-8)


@pytest.fixture(scope="module", params=["disk", "remote"])
def stored(request: pytest.FixtureRequest, uri: str) -> str:
    if request.param == "disk":
        return uri
    fsspec.filesystem("memory").put(f"{uri}/", "/fetched/", recursive=True)
    return "memory://fetched"


@pytest.mark.parametrize("cache", [0, 1 << 20])
def test_what_is_fetched_unchecked_or_by_threads_is_the_same(stored: str, cache: int) -> None:
    text, asked = TextEmbeddings.open(stored, cache_bytes=cache), [*CAPTIONS[::-3], None, *CAPTIONS[:5], CAPTIONS[-1]]
    want = text.encoding(text.fetch(asked))
    with ThreadPoolExecutor(4) as requests:
        for got in (text.fetch(asked, verify=False), text.fetch(asked, requests, verify=False)):
            for ours, theirs in zip(text.encoding(got), want, strict=True):
                assert ours is not None
                np.testing.assert_array_equal(ours, theirs)
    assert text.fetch([], verify=False) == []


@pytest.mark.parametrize("gap", [0, 1 << 20])
def test_few_captions_cost_few_bytes(stored: str, gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where requests cost bytes alone, those of what was asked; where they cost more than that, few requests."""
    text = TextEmbeddings.open(stored, cache_bytes=1 << 20)
    text.fetch(CAPTIONS, verify=False)  # footers and the like
    asked: list[int] = []
    real = StoredParts._bytes

    def count(self: StoredParts, path: str, begin: int, length: int) -> Any:
        asked.append(length)
        return real(self, path, begin, length)

    monkeypatch.setattr(StoredParts, "_bytes", count)
    monkeypatch.setattr("pipeline.store.read.pages._GAP_BYTES", gap)
    monkeypatch.setattr(Dataset, "read", None)
    some = CAPTIONS[1::2]
    fetched = text.fetch(some, verify=False)
    needed = sum(len(values) + len(pooled or b"") + 8 for values, pooled in ((v, bytes(p)) for v, p in fetched))
    assert sum(asked) == needed if gap == 0 else sum(asked) > needed
    assert len(asked) == 2 * len(some) if gap == 0 else len(asked) < 2 * len(some)


def test_row_groups_of_several_pages_are_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paged = partial(pq.ParquetWriter, data_page_size=100, write_batch_size=2)
    monkeypatch.setattr("pipeline.store.writer.pq.ParquetWriter", paged)
    text = TextEmbeddings.open(write(tmp_path / "pages", CAPTIONS))
    assert all(text._stored[0].values(group, np.array([0]), text._sizes(slice(0, 1))) is None for group in (0, 1))
    want = text.encoding(text.fetch(CAPTIONS))
    for ours, theirs in zip(text.encoding(text.fetch(CAPTIONS, verify=False)), want, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_more_is_held_ahead_than_there_is_room_for(stored: str) -> None:
    text = TextEmbeddings.open(stored, cache_bytes=3000)
    first = text.fetch(CAPTIONS[:10], ahead=True)
    assert first is not None
    held = text._held_bytes
    assert held == sum(len(values) for values, _ in first)
    assert text.fetch(CAPTIONS, ahead=True) is None
    rest = text.fetch(CAPTIONS)
    assert rest is not None
    assert text._held_bytes == held
    np.testing.assert_array_equal(text.padded(rest)[0][:10], text.padded(first)[0])
    both = ArrangedText([text, TextEmbeddings.open(stored, cache_bytes=1)], "sdxl", 2 * WIDTH)
    assert both.fetch(CAPTIONS[:3], ahead=True) is None
    assert text._held_bytes == held, "what one encoder's fitted in is let go where the other's do not"
    first.clear()
    assert text._held_bytes == 0


def test_a_published_index_spares_its_readers_all_rows(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    texts, root = TextEmbeddings.open(uri), Root(uri)
    pins = Pins(Root(f"memory://published/{tmp_path.name}"), "inputs")
    pins.pin(root)
    texts.publish(pins)
    texts.publish(pins)  # once is enough
    read = list[int]()
    real = Dataset.read
    monkeypatch.setattr(Dataset, "read", lambda self, at, columns: (read.append(at), real(self, at, columns))[1])
    for _ in range(2):
        reader = TextEmbeddings.open(uri, pins=pins)
        assert (reader.num_captions, read) == (texts.num_captions, [])
    asked = [*CAPTIONS[::-1], None]
    for ours, theirs in zip(reader.lookup_stored(asked), texts.lookup_stored(asked), strict=True):
        assert np.array_equal(ours, theirs)
    assert reader.missing(["never seen", CAPTIONS[0]]) == ["never seen"]
    (key,) = (info.key for info in pins._root.list("inputs") if info.key.endswith("-captions2.arrow"))
    pins._root.put(key, b"ARROW1 and no more")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))  # a machine that has no copy yet
    with pytest.raises(InputError, match=r"captions2\.arrow"):
        TextEmbeddings.open(uri, pins=pins)


def test_threads_share_one_reader(uri: str) -> None:
    text = TextEmbeddings.open(uri, cache_bytes=3000)
    want = text.lookup(CAPTIONS)[0]

    def ask(seed: int) -> bool:
        order = np.random.default_rng(seed).permutation(len(CAPTIONS))
        return np.array_equal(text.lookup([CAPTIONS[i] for i in order])[0], want[order])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(24)))
    assert text._held_bytes == 0


def test_a_caption_that_was_never_embedded_is_an_error(uri: str) -> None:
    text = TextEmbeddings.open(uri)
    assert text.num_captions == len(CAPTIONS)
    assert text.missing(["caption 1", None, "new", "new", "newer"]) == ["new", "newer"]
    with pytest.raises(InputError, match=r"(?s)2 of 3 captions have no embedding.*'new'.*jobs.embed_text"):
        text.lookup(["caption 1", "new", "newer", "new"])


def test_a_dataset_without_any_row_has_no_answer(tmp_path: Path) -> None:
    text = TextEmbeddings.open(write(tmp_path / "empty", []))
    assert text.num_captions == 0
    assert text.lookup([])[0].shape == (0, LENGTH, WIDTH)
    with pytest.raises(InputError, match="1 of 1 captions have no embedding"):
        text.lookup([None])


def test_pooled_states_that_were_not_stored_are_an_error(tmp_path: Path) -> None:
    def unpooled(captions: Sequence[str]) -> Toy:
        toy = toy_encode(captions)
        return Toy(toy.tokens, toy.truncated, toy.embeddings_NLD, None)

    text = TextEmbeddings.open(write(tmp_path / "u", ["a"], unpooled))
    with pytest.raises(InputError, match="hold no pooled states"):
        text.lookup_pooled(["a"])


def test_only_text_datasets_are_opened(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)There is no dataset.*text.uri"):
        TextEmbeddings.open(str(tmp_path / "nothing"))
    planned_root(str(tmp_path / "latents"), 1, 1)
    with pytest.raises(InputError, match="is a dataset of latents"):
        TextEmbeddings.open(str(tmp_path / "latents"))


def test_damage_is_named(tmp_path: Path) -> None:
    uri = write(tmp_path / "d", CAPTIONS[:8])
    text = TextEmbeddings.open(uri)
    root = Root(uri)
    name = next(root.list("data")).key
    data = bytearray(root.read_bytes(name))
    at = data.find(toy_encode([CAPTIONS[0]]).embeddings_NLD[0, :1].astype("<f2").tobytes())
    data[at] ^= 1
    root.put(name, bytes(data))
    with pytest.raises(InputError, match=r"(?s)cannot be read.*jobs.verify"):
        text.lookup([CAPTIONS[0]])
    assert text.fetch([CAPTIONS[0]], verify=False)  # its checksum alone would tell
    data[at - 4] ^= 1
    root.put(name, bytes(data))
    with pytest.raises(InputError, match=r"(?s)cannot be read.*jobs.verify"):
        TextEmbeddings(text._dataset, 0).fetch([CAPTIONS[0]], verify=False)
    root.delete(name)
    with pytest.raises(InputError, match="cannot be read"):
        TextEmbeddings.open(uri)


@pytest.mark.parametrize(("value", "dtype"), [(7e4, "float16"), (np.nan, "float16"), (np.inf, "bfloat16")])
@pytest.mark.parametrize("where", ["embeddings_NLD", "pooled_NP"])
def test_a_number_that_cannot_be_stored_is_refused(tmp_path: Path, value: float, dtype: str, where: str) -> None:
    def spoiled(captions: Sequence[str]) -> Toy:
        toy = toy_encode(captions)
        getattr(toy, where)[-1].flat[0] = value
        return toy

    with pytest.raises(InputError, match=r"(?s)The embedding of 'bad' .*encoders.embedding_dtype"):
        write(tmp_path / "x", ["good", "bad"], spoiled, dtype)


def test_a_writer_that_was_taken_over_encodes_nothing_more(tmp_path: Path) -> None:
    uri = str(tmp_path / "f")
    calls = []

    def overtaken(captions: Sequence[str]) -> Toy:
        calls.append(len(captions))
        generation._fenced.set()  # what the heartbeat does when it sees a newer claim
        return toy_encode(captions)

    write(Path(uri), [])
    root = Root(uri)
    generation = claim(root)
    planned = [PlannedCaption(caption_hash(c).hex(), len(c), c) for c in CAPTIONS]
    append_version(read_plan(root), in_units(planned, 8), source={}, generation=generation.number)
    with pytest.raises(ConflictError, match="Another run has taken over"):
        embed_gaps(
            root, generation, read_state(root), lambda: overtaken, embedding_dtype="float16", row_group_bytes=1024
        )
    assert calls == [8]
    generation.abandon()


def test_what_lies_in_the_padding_is_nobodys_business(tmp_path: Path) -> None:
    def noisy(captions: Sequence[str]) -> Toy:
        toy = toy_encode(captions)
        for tokens, embedding in zip(toy.tokens, toy.embeddings_NLD, strict=True):
            embedding[tokens:] = np.nan
        return toy

    got, _ = TextEmbeddings.open(write(tmp_path / "n", ["a"], noisy)).lookup(["a"])
    np.testing.assert_array_equal(got[0, :2], toy_encode(["a"]).embeddings_NLD[0, :2].astype(np.float16))
    assert not got[0, 2:].any()
