"""Distinct captions, by hash, in order of first occurrence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_builders import make_latents

from pipeline.errors import InputError
from pipeline.storage.root import Root
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.data import Captions
from pipeline.text import dataset as captions
from pipeline.text.dataset import HashSet, as_hashes, caption_hash, contains, in_units, new_captions

# Zero bytes at either end are what a careless comparison of byte strings loses.
DIGESTS = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 5).map(lambda n: bytes(15) + bytes([n])),
    st.integers(0, 5).map(lambda n: bytes([n]) + bytes(15)),
)


def test_the_hash_is_what_the_format_says() -> None:
    assert caption_hash("blåbær") == hashlib.blake2b("blåbær".encode(), digest_size=16).digest()


@given(known=st.lists(DIGESTS), batches=st.lists(st.lists(DIGESTS)), fold=st.integers(1, 4))
def test_a_hash_set_finds_the_first_of_each(known: list[bytes], batches: list[list[bytes]], fold: int) -> None:
    reference = set(known)
    old, captions._FOLD = captions._FOLD, fold
    try:
        found = HashSet(as_hashes(known))
        for batch in batches:
            fresh = []
            for i, digest in enumerate(batch):
                if digest not in reference:
                    reference.add(digest)
                    fresh.append(i)
            assert found.add_new(batch) == fresh
    finally:
        captions._FOLD = old


@given(st.lists(DIGESTS), st.lists(DIGESTS))
def test_contains_is_membership(ordered: list[bytes], asked: list[bytes]) -> None:
    assert contains(as_hashes(sorted(ordered)), as_hashes(asked)).tolist() == [a in ordered for a in asked]


@given(st.lists(st.text(max_size=4)), st.integers(1, 5))
def test_units_keep_order_and_size(texts: list[str], size: int) -> None:
    units = list(in_units((captions.PlannedCaption(caption_hash(t).hex(), len(t.encode()), t) for t in texts), size))
    assert [c.meta for unit in units for c in unit] == texts
    assert all(len(unit) == size for unit in units[:-1])
    assert all(units)


def test_captions_come_once_in_order_with_the_empty_prompt_first(tmp_path: Path) -> None:
    uri = make_latents(tmp_path / "latents", [["b", None, "a", "b"], ["c", "", "a", "ü"]])
    known = HashSet(as_hashes([caption_hash("c")]))
    latents = LatentDataset.open(uri)
    assert [c.meta for c in new_captions(latents, known, Captions())] == ["", "b", "a", "ü"]
    assert [c.size_bytes for c in new_captions(latents, HashSet(as_hashes([])), Captions())] == [0, 1, 1, 1, 2]
    assert list(new_captions(latents, known, Captions())) == []
    assert [c.meta for c in new_captions(latents, known, Captions(), ["new", "a"])] == ["new"]


def test_captions_that_cannot_be_read_are_an_input_error(tmp_path: Path) -> None:
    uri = make_latents(tmp_path / "latents", [["a"]])
    latents = LatentDataset.open(uri)
    data = next(Root(uri).list("data"))
    Root(uri).put(data.key, b"no parquet at all, by far")
    with pytest.raises(InputError, match=r"(?s)cannot be read.*data.uri"):
        list(new_captions(latents, HashSet(as_hashes([])), Captions()))
