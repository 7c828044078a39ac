"""Storage on a real S3 server, over a good connection and over bad ones."""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from pipeline.dataflow.workers import in_threads
from pipeline.encode import reading
from pipeline.errors import InputError
from pipeline.storage import root as storage
from pipeline.storage import stores
from pipeline.storage.errors import StoreUnavailable, describe
from pipeline.storage.root import Root
from tests.support.fault_proxy import FaultProxy, Kind
from tests.support.processes import free_port
from tests.support.radosgw import Keys, Radosgw
from tests.support.servers import forget_clients, use_store

pytestmark = [pytest.mark.s3, pytest.mark.slow]


@pytest.fixture
def root(s3_environment: Radosgw) -> Root:
    return Root(f"s3://{s3_environment.make_bucket()}/deep/prefix")


@pytest.fixture
def far(s3_environment: Radosgw, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Root]:
    """A root behind the proxy; retries do not wait, and nobody waits long for an answer."""
    bucket = s3_environment.make_bucket()
    monkeypatch.setattr(storage, "_BACKOFF_CAP_S", 0.0)
    monkeypatch.setattr(stores, "READ_TIMEOUT_S", 1.0)
    use_store(monkeypatch, s3_environment.environment(endpoint=s3_proxy.url))
    yield Root(f"s3://{bucket}/far")
    forget_clients()


def test_create_if_absent_has_one_winner_of_sixteen(root: Root) -> None:
    for round_number in range(10):
        key, barrier = f"claims/{round_number}", threading.Barrier(16)

        def contend(number: int, key: str = key, barrier: threading.Barrier = barrier) -> int | None:
            mine = pickle.loads(pickle.dumps(root))
            barrier.wait()
            return number if mine.put_if_absent(key, f"writer {number}".encode()) else None

        with ThreadPoolExecutor(16) as pool:
            won = [n for n in pool.map(contend, range(16)) if n is not None]
        assert len(won) == 1
        assert root.read_bytes(key) == f"writer {won[0]}".encode()


@pytest.mark.parametrize("deep", [True, False], ids=["below a prefix", "a whole bucket"])
def test_wide_directories_are_cut_where_names_differ(
    s3_environment: Radosgw, deep: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = s3_environment.make_bucket()
    source = Root(f"s3://{bucket}/deep/prefix" if deep else f"s3://{bucket}")
    keys = [f"{number * 7919 % 4096:03x}.jpg" for number in range(700)] + ["a", "a-b", "a/b", "é.png", "éa/c", "ab/x"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: source.put(key, key.encode()), [*keys, *(["a//x"] if deep else [])]))
    expected, kept = list(source.list()), Root(str(tmp_path))
    assert len(expected) == len(keys) + deep
    monkeypatch.setattr(reading, "_WIDE", 30)
    page = Root.page
    monkeypatch.setattr(Root, "page", lambda *given, **more: page(*given, **({"most": 20} | more)))
    listing = reading.Directories(source, kept, "kept", partial(in_threads, 4))
    assert list(source.list(entries=listing)) == expected
    assert listing._level_of == {}
    assert len(list(kept.list("kept"))) > 3  # cut and cut again: "", "0", "00"


def test_listings_are_sorted_and_longer_than_a_page(root: Root) -> None:
    keys = [f"a/{i:04d}" for i in range(1005)] + ["a.txt", "a-1", "b/c/d"]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: root.put(key, key.encode()), keys))
    assert [i.key for i in root.list()] == sorted(keys)
    assert root.list_dirs() == ["a", "b"]
    assert all(i.size_bytes == len(i.key) and i.etag and i.mtime_ns for i in root.list("b"))


def test_large_objects_come_back_in_ranges_and_as_files(root: Root) -> None:
    data = bytes(range(256)) * (12 << 12)
    root.put("large", data)
    assert root.info("large").size_bytes == len(data)
    assert root.read_range("large", 5_000_000, 17) == data[5_000_000:5_000_017]
    assert root.read_bytes("large") == data
    with root.open("large") as file:
        file.seek(-1000, 2)
        assert file.read() == data[-1000:]
        file.seek(3)
        assert file.read(3_000_000) == data[3:3_000_003]


def test_a_good_store_passes_the_probe_and_keeps_nothing_of_it(root: Root) -> None:
    root.probe()
    assert list(root.list()) == []


# -- bad connections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["status", "reset", "lost_answer", "stall", "truncate"])
def test_every_operation_outlives_a_fault(far: Root, s3_proxy: FaultProxy, kind: Kind) -> None:
    body = bytes(range(256)) * 2000
    for name, call in {
        "put": lambda: far.put("a/object", body),
        "create": lambda: far.put_if_absent("a/created", body),
        "read": lambda: far.read_bytes("a/object"),
        "range": lambda: far.read_range("a/object", 100_000, 300_000),
        "info": lambda: far.info("a/object").size_bytes,
        "list": lambda: [i.key for i in far.list()],
        "missing": lambda: far.exists("a/none"),
        "delete": lambda: far.delete("a/object"),
    }.items():
        s3_proxy.fail(kind, times=2)
        before = s3_proxy.requests
        got = call()
        s3_proxy.heal()
        if kind != "truncate":  # an answer without a body cannot break off in it
            assert s3_proxy.requests >= before + 3, name
        wanted = {
            "create": True,
            "read": body,
            "range": body[100_000:400_000],
            "info": len(body),
            "list": ["a/created", "a/object"],
            "missing": False,
        }
        assert got == wanted.get(name), name
    assert far.put_if_absent("a/created", body) is False
    assert [i.key for i in far.list()] == ["a/created"]


@pytest.mark.parametrize("times", [1, 2])
def test_who_created_an_object_is_known_although_the_answers_got_lost(
    far: Root, s3_proxy: FaultProxy, times: int
) -> None:
    """A client that repeats by itself would be told that its own object is another's."""
    s3_proxy.fail("lost_answer", method="PUT", times=times)
    assert far.put_if_absent("claim", b"mine") is True
    assert s3_proxy.struck["lost_answer"] == times
    assert far.put_if_absent("claim", b"theirs") is False


def test_half_of_the_requests_failing_is_survived(far: Root, s3_proxy: FaultProxy) -> None:
    s3_proxy.fail("status", share=0.25)
    s3_proxy.fail("reset", share=0.15)
    s3_proxy.fail("truncate", method="GET", share=0.15)
    for number in range(40):
        assert far.put_if_absent(f"n/{number:02d}", bytes([number]) * 3000)
    assert [far.read_bytes(i.key) for i in far.list()] == [bytes([n]) * 3000 for n in range(40)]
    assert sum(s3_proxy.struck.values()) > 30


def test_a_store_that_stays_away_is_unavailable_in_bounded_tries(far: Root, s3_proxy: FaultProxy) -> None:
    far.put("a", b"x")
    s3_proxy.fail("status", code=503)
    before = s3_proxy.requests
    with pytest.raises(StoreUnavailable, match="SlowDown"):
        far.read_bytes("a")
    assert s3_proxy.requests - before == storage._ATTEMPTS


def test_a_frozen_server_takes_a_large_body_once_it_thaws(
    s3_environment: Radosgw, far: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the sockets' buffers hold: the client is stuck while it sends, where it has no limit of its own."""
    monkeypatch.setattr(storage, "_ATTEMPTS", 50)
    monkeypatch.setattr(stores, "SLOWEST_BYTES_PER_S", 64 << 20)
    body = bytes(32 << 20)
    far.put("before", b"x")
    s3_environment.freeze_gateway()
    try:
        writing = threading.Thread(target=lambda: far.put("large", body))
        writing.start()
        time.sleep(3)
        assert writing.is_alive()
    finally:
        s3_environment.thaw_gateway()
    writing.join(timeout=120)
    assert not writing.is_alive()
    assert far.info("large").size_bytes == len(body)


def test_a_killed_server_is_waited_for(s3_environment: Radosgw, far: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_BACKOFF_CAP_S", 0.5)
    monkeypatch.setattr(storage, "_ATTEMPTS", 60)
    far.put("a", b"x")
    s3_environment.kill_gateway()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(far.read_bytes, "a")
        time.sleep(1.0)
        assert not reading.done()
        s3_environment.start_gateway()
        assert reading.result(timeout=60) == b"x"


# -- stores that cannot be used --------------------------------------------------------------------------------


def test_a_store_that_refuses_conditional_writes_is_refused(
    far: Root, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s3_proxy.fail("status", method="PUT", header="if-none-match", code=501)
    with pytest.raises(InputError, match="refuses such writes"):
        far.probe()
    monkeypatch.setenv("LATENTLOOM_SINGLE_WRITER", "yes")
    with caplog.at_level(logging.WARNING):
        far.probe()
    assert "WILL DAMAGE IT" in caplog.text
    assert far.put_if_absent("a", b"first") is True
    assert far.put_if_absent("a", b"second") is False
    assert far.read_bytes("a") == b"first"


def test_what_cannot_be_used_says_why_and_shows_no_secret(
    s3_environment: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3_environment
    reader, bucket = store.add_user("reader-of-one"), store.make_bucket()
    store.forbid_writes(bucket, "reader-of-one")
    monkeypatch.setattr(storage, "_BACKOFF_CAP_S", 0.0)
    places: dict[str, tuple[Keys, str, str, str]] = {
        "unknown key": (Keys("AKNOBODY", store.keys.secret), store.endpoint, bucket, "does not know this access key"),
        "wrong secret": (Keys(store.keys.access, "planted"), store.endpoint, bucket, "does not belong to the access"),
        "no bucket": (store.keys, store.endpoint, "no-such-bucket-here", "the bucket does not exist"),
        "not allowed": (reader, store.endpoint, bucket, "does not let this access key do this"),
        "nobody there": (store.keys, f"http://127.0.0.1:{free_port()}", bucket, "the endpoint cannot be reached"),
        "bad name": (store.keys, store.endpoint, "Bad_Bucket!", "a form that S3 does not allow"),
    }
    for name, (keys, endpoint, place, why) in places.items():
        use_store(monkeypatch, store.environment(keys=keys, endpoint=endpoint))
        with pytest.raises(InputError, match="cannot be written") as caught:
            Root(f"s3://{place}/out").probe()
        text = str(caught.value)
        assert why in text, (name, text)
        assert place in text
        assert not [s for s in (keys.secret, store.keys.secret) if s in text]
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    forget_clients()
    with pytest.raises(InputError, match="no credentials were found"):
        Root(f"s3://{bucket}/out").probe()


def test_reading_without_permission_is_told_from_absence(
    s3_environment: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_environment.make_bucket()
    Root(f"s3://{bucket}").put("a", b"x")
    stranger = s3_environment.add_user("stranger")
    use_store(monkeypatch, s3_environment.environment(keys=stranger))
    root = Root(f"s3://{bucket}")
    for call in (lambda: root.read_bytes("a"), lambda: root.exists("a"), lambda: list(root.list())):
        with pytest.raises(PermissionError) as caught:
            call()
        assert "does not let this access key" in describe(caught.value)
