"""The listing of a store by many hands: what it gives is what the store's own gives, and it goes on where it was."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataflow.workers import in_threads
from pipeline.encode import reading as module
from pipeline.encode.reading import KEPT, REUSED_S, Directories, _folder
from pipeline.errors import InputError
from pipeline.storage.root import Entries, Page, Root
from pipeline.store.plan import read_plan
from tests.support.encode_here import encode_here
from tests.support.images import make_codec, make_images

ONE = partial(in_threads, 1)
NAMES = st.text("ab-.é0", min_size=1, max_size=3).filter(lambda name: set(name) != {"."})


def store(keys: Iterable[str]) -> Root:
    root = Root(f"memory://{uuid.uuid4().hex}")
    for key in keys:
        root.put(key, key.encode())
    return root


def without_conflicts(paths: Iterable[tuple[str, ...]]) -> list[str]:
    """Keys of which none is a directory of another."""
    keys = {"/".join(path) for path in paths}
    return sorted(key for key in keys if not any(other.startswith(f"{key}/") for other in keys))


@given(st.sets(st.lists(NAMES, min_size=1, max_size=4).map(tuple), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_it_lists_what_the_store_lists(paths: set[tuple[str, ...]]) -> None:
    root, kept = store(without_conflicts(paths)), store([])
    listed = list(root.list(entries=Directories(root, kept, "kept", partial(in_threads, 4))))
    assert listed == list(root.list())


class Cutting:
    """Makes a store answer for parts of directories as S3 does, from what it lists; counts how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
        self.pages = 0
        monkeypatch.setattr(module, "_WIDE", wide)
        monkeypatch.setattr(Root, "page", self._page_of())

    def _page_of(self) -> Callable[..., Page]:
        def page(
            root: Root, prefix: str, begins: str = "", *, after: str = "", token: str | None = None, most: int = 3
        ) -> Page:
            self.pages += 1
            left = [
                (name, None if name.endswith("/") else version_of(name))
                for name, version_of in root.entries(prefix)
                if name.startswith(begins) and name > after
            ]
            first = int(token or 0)
            return left[first : first + most], str(first + most) if len(left) > first + most else None

        return page


@given(st.sets(st.lists(NAMES, min_size=1, max_size=3).map(tuple), min_size=1, max_size=60), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_wide_directories_are_cut_and_give_the_same(paths: set[tuple[str, ...]], wide: int) -> None:
    root, kept = store(without_conflicts(paths)), store([])
    expected = list(root.list())
    with pytest.MonkeyPatch.context() as patch:
        Cutting(patch, wide)
        listing = Directories(root, kept, "kept", partial(in_threads, 4))
        assert list(root.list(entries=listing)) == expected
        assert listing._level_of == {}
        # What is kept is enough.
        patch.setattr(Root, "page", None)
        assert list(root.list(entries=Directories(root, kept, "kept", ONE))) == expected


def test_no_part_of_a_wide_directory_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers behind a long name: cut where they differ, and nobody lists the many again and again."""
    keys = [f"all/photograph-{number:06d}.jpg" for number in range(0, 5000, 7)] + [
        "all/photograph",
        "all/other/a.jpg",
    ]
    root, kept = store(keys), store([])
    cutting = Cutting(monkeypatch, 40)
    assert [info.key for info in root.list(entries=Directories(root, kept, "kept", ONE))] == sorted(keys)
    assert max(Counter(row for at in kept.list("kept") for row in parts_of(kept, at.key)).values()) < 70
    assert cutting.pages < len(keys)  # pages of three: three times as many as without a cut


def parts_of(kept: Root, key: str) -> list[tuple[str, int]]:
    rows = pq.read_table(pa.BufferReader(kept.read_bytes(key)))
    return [(key, at) for at in rows["directory"].to_pylist()]


def test_a_store_that_does_not_pass_what_it_is_told_to_is_listed_in_one_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root, kept = store([f"{number:03d}.jpg" for number in range(30)]), store([])
    expected = list(root.list())
    Cutting(monkeypatch, 4)
    page = Root.page
    monkeypatch.setattr(Root, "page", lambda *arguments, after="", **more: page(*arguments, **more))
    assert list(root.list(entries=Directories(root, kept, "kept", ONE))) == expected


def test_many_directories_share_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEW_BATCHES", 3)
    root, kept = store(f"{a:02d}/{b}/{c}.jpg" for a in range(10) for b in range(3) for c in range(2)), store([])
    assert list(root.list(entries=Directories(root, kept, "kept", ONE))) == list(root.list())
    assert len(list(kept.list("kept"))) == 1 + 3 + 3


class Counted:
    """A source whose directories are counted as they are listed; after `limit` of them the run is killed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, source: Root) -> None:
        self.asked: list[str] = []
        self.limit = 10**6
        entries = Root.entries

        def counted(root: Root, prefix: str) -> Entries:
            if root == source:
                if len(self.asked) == self.limit:
                    raise KeyboardInterrupt
                self.asked.append(prefix)
            return entries(root, prefix)

        monkeypatch.setattr(Root, "entries", counted)


def images(uri: str, local: Path, count: int = 6) -> Root:
    source = Root(uri)
    if not local.exists():
        make_images(local, count)
    for number, path in enumerate(sorted(local.glob("*.png"))):
        source.put(f"{number % 3}/{path.name}", path.read_bytes())
    return source


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Root]:
    yield images(f"memory://{uuid.uuid4().hex}/source", tmp_path / "images")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def encode(source: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    made = {"source__uri": source.uri, "source__kind": "folder", "codec__path": make_codec(tmp_path / "codec")}
    shape = {"image__resolution": 32, "image__multiple_of": 4, "output__uri": tmp_path / "out"}
    return lambda **changes: encode_here(monkeypatch, **(made | shape | changes))


def test_a_run_that_was_killed_while_it_listed_is_gone_on_with(
    encode: Callable[..., Any], source: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_THREADS", 1)
    counted, out = Counted(monkeypatch, source), Root(str(tmp_path / "out"))
    counted.limit = 4  # the check that there is anything asks for two: "" and "0"
    with pytest.raises(KeyboardInterrupt):
        encode()
    assert counted.asked == ["", "0", "", "0"]
    assert len(list(out.list(KEPT))) == 2
    counted.limit, counted.asked = 10**6, []
    assert encode().counts["latents"] == 6
    assert counted.asked == ["1", "2"]
    assert list(out.list(KEPT)) == []
    source.put("0/new.png", source.read_bytes("0/00000.png"))
    assert encode().counts["source_new"] == 1


def test_a_source_that_was_wrong_is_listed_anew_once_it_is_mended(
    encode: Callable[..., Any], source: Root, tmp_path: Path
) -> None:
    source.put("9/strange.png", b"a label of no class")
    labelled = {"source__label_from": "directory", "source__classes": "['0','1','2']"}
    with pytest.raises(InputError, match="no class"):
        encode(**labelled)
    source.delete("9/strange.png")
    assert encode(**labelled).counts["latents"] == 6


def test_an_old_listing_is_not_gone_on_with_nor_one_for_another_plan(tmp_path: Path) -> None:
    out, source, now_s = Root(str(tmp_path)), Root("memory://somewhere"), time.time()
    first = _folder(out, source, 0, now_s - 100)
    assert _folder(out, source, 0, now_s) != first
    out.put(f"{first}/a.parquet", b"")
    assert _folder(out, source, 0, now_s) == first
    assert _folder(out, source, 1, now_s) != first
    assert _folder(out, Root("memory://elsewhere"), 0, now_s) != first
    assert _folder(out, source, 0, now_s + REUSED_S) != first


def test_what_was_kept_and_is_damaged_is_told_with_its_name(source: Root, tmp_path: Path) -> None:
    out = Root(str(tmp_path / "out"))
    list(source.list(entries=Directories(source, out, "kept", ONE)))
    (first, *_) = out.list("kept")
    out.put(first.key, b"PAR1 is what it begins with")
    with pytest.raises(InputError, match=first.key) as told:
        list(source.list(entries=Directories(source, out, "kept", ONE)))
    assert "lists anew" in str(told.value)


def test_of_two_runs_that_list_at_once_the_first_is_right_for_both(
    source: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, create = store([]), Root.put_if_absent

    def late(root: Root, key: str, data: bytes) -> bool:
        monkeypatch.setattr(Root, "put_if_absent", create)  # the rival's own
        first.extend(source.list(entries=Directories(source, kept, "kept", ONE)))
        source.put("0/later.png", b"which the rival has not seen, and this run does not know")
        return create(root, key, data)

    first: list[Any] = []
    monkeypatch.setattr(Root, "put_if_absent", late)
    assert list(source.list(entries=Directories(source, kept, "kept", ONE))) == first
    assert len(list(source.list())) == len(first) + 1


def test_a_local_source_keeps_nothing(encode: Callable[..., Any], tmp_path: Path) -> None:
    encode(source__uri=tmp_path / "images")
    assert not (tmp_path / "out" / "scratch").exists()
    assert read_plan(Root(str(tmp_path / "out"))).number == 1
