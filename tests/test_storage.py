"""Storage on the local disk, in memory and on an S3 API: one behaviour."""

from __future__ import annotations

import io
import logging
import os
import pickle
import sys
import threading
import time
import tracemalloc
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import s3fs
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.storage import root as storage
from pipeline.storage.errors import (
    ObjectChanged,
    StoreUnavailable,
    describe,
    job_error,
    note_answer,
    plain_error,
    storage_errors,
)
from pipeline.storage.root import KeyRefused, Root, check_key
from pipeline.storage.stores import RangedFile, put_whole


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.integration)])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    if request.param == "local":
        return Root(str(tmp_path / "root"))
    if request.param == "memory":
        return Root(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # A client keeps the endpoint it was made with, and fsspec keeps the client.
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"b{uuid.uuid4().hex[:12]}"
    root = Root(f"s3://{bucket}/prefix")
    root.fs.call_s3("create_bucket", Bucket=bucket)
    return root


def test_a_client_that_is_just_being_imported_has_no_errors_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's sign of life asks from a thread of its own, at any moment, and must not end for that."""
    monkeypatch.setitem(sys.modules, "httpx2", ModuleType("httpx2"))
    monkeypatch.setitem(sys.modules, "aiohttp", ModuleType("aiohttp"))
    assert OSError in storage_errors()


def test_objects_come_back_whole_and_in_ranges(root: Root) -> None:
    root.put("a/b.bin", b"0123456789")
    assert root.read_bytes("a/b.bin") == b"0123456789"
    assert root.read_range("a/b.bin", 3, 4) == b"3456"
    with root.open("a/b.bin") as file:
        file.seek(8)
        assert file.read() == b"89"
    assert root.info("a/b.bin").size_bytes == 10
    root.put("a/b.bin", b"new")
    assert root.read_bytes("a/b.bin") == b"new"


def test_a_version_is_read_whole_or_not_at_all(root: Root) -> None:
    root.put("k", b"0123456789")
    (listed,) = root.list()
    assert root.read_version("k", listed) == b"0123456789"
    assert root.read_version("k", listed, 3, 4) == b"3456"
    time.sleep(0.05)  # local files tell versions by their time alone
    root.put("k", b"9876543210")
    for span in ((0, None), (3, 4)):
        with pytest.raises(ObjectChanged, match="k has changed since it was listed"):
            root.read_version("k", listed, *span)
    assert root.read_version("k", replace(listed, etag=None, mtime_ns=None), 3, 4) == b"6543"
    root.delete("k")
    with pytest.raises(FileNotFoundError):
        root.read_version("k", listed)


def test_absent_objects_are_file_not_found(root: Root) -> None:
    root.put("a/b", b"x")
    for call in (root.read_bytes, root.info, root.open):
        with pytest.raises(FileNotFoundError):
            call("a/none")
    assert not root.exists("a/none")
    assert not root.exists("a")
    assert list(root.list("nothing/here")) == []
    root.delete("a/none")


def test_create_if_absent_has_one_winner(root: Root) -> None:
    barrier, won = threading.Barrier(12), []

    def contend(number: int) -> None:
        mine = pickle.loads(pickle.dumps(root))
        barrier.wait()
        if mine.put_if_absent("claim", f"writer {number}".encode()):
            won.append(number)

    threads = [threading.Thread(target=contend, args=(i,)) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if root.uri.startswith(("s3", "memory")):
        # The emulations check, then write: what must hold is that a winner's bytes are never reported lost.
        assert won
    else:
        assert len(won) == 1
    assert root.read_bytes("claim") in {f"writer {n}".encode() for n in won}
    assert root.put_if_absent("claim", b"late") is False


def test_listing_is_sorted_by_full_key_and_complete(root: Root) -> None:
    keys = ["b", "a/z", "a/b/c", "a.txt", "a-1", "a/b.d", "a0"]
    for key in keys:
        root.put(key, key.encode())
    assert [i.key for i in root.list()] == sorted(keys)
    assert [i.key for i in root.list("a")] == ["a/b.d", "a/b/c", "a/z"]
    assert root.list_dirs() == ["a"]
    assert all(i.size_bytes == len(i.key) for i in root.list())


def test_directories_travel_both_ways(root: Root, tmp_path: Path) -> None:
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / "x" / "1").write_bytes(b"one")
    (tmp_path / "in" / "2").write_bytes(b"two")
    root.upload_dir(tmp_path / "in", "up")
    root.download_dir("up", tmp_path / "out")
    assert (tmp_path / "out" / "x" / "1").read_bytes() == b"one"
    assert (tmp_path / "out" / "2").read_bytes() == b"two"


def test_the_probe_leaves_nothing_behind(root: Root) -> None:
    root.probe()
    assert list(root.list()) == []


@pytest.mark.parametrize("key", ["", "/a", "a//b", "../a", "a/../b", "a/.", "a\\b", "a\0b"])
def test_keys_cannot_leave_their_root(key: str) -> None:
    with pytest.raises(ValueError, match="must be relative"):
        check_key(key)


@given(st.text(min_size=1, max_size=20))
def test_accepted_keys_stay_below_the_root(key: str) -> None:
    try:
        check_key(key)
    except ValueError:
        return
    assert os.path.normpath(f"/root/{key}").startswith("/root/")


def test_a_full_disk_leaves_nothing_half_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(str(tmp_path))
    root.put("kept", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for write in (root.put, root.put_if_absent):
        with pytest.raises(OSError, match="No space left"):
            write("kept" if write == root.put else "new", b"half")
    monkeypatch.undo()
    assert [i.key for i in root.list()] == ["kept"]
    assert root.read_bytes("kept") == b"old"
    assert os.listdir(tmp_path) == ["kept"]


def test_links_that_lead_nowhere_or_round_in_a_circle_are_no_objects(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Root(str(tmp_path))
    root.put("real/file", b"x")
    (tmp_path / "real" / "circle").symlink_to(tmp_path)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    assert [i.key for i in root.list()] == ["link", "real/file"]
    assert "what lies behind circle in" in caplog.text
    assert "behind nowhere" not in caplog.text


def test_listing_a_large_directory_holds_little_more_than_its_names(tmp_path: Path) -> None:
    files = 3_000
    for number in range(files):
        (tmp_path / f"{number:07d}_photo.jpg").touch()
    tracemalloc.start()
    try:
        assert sum(1 for _ in Root(str(tmp_path)).list()) == files
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 250 * files  # bytes; a name is 70 of them, its entry with what stat says of it over a thousand


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written: NotADirectoryError") as caught:
        Root(str(tmp_path / "file")).probe()
    assert (caught.value.key, caught.value.value) == ("output.uri", str(tmp_path / "file"))


def test_an_unknown_scheme_names_the_remedy() -> None:
    with pytest.raises(InputError, match="installed fsspec backend"):
        Root("nosuch://x").exists("a")
    with pytest.raises(InputError, match="empty URI"):
        Root("")


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> Root:
    """A store that takes a conditional write for a plain one."""
    monkeypatch.setattr("pipeline.storage.root.create_whole", lambda fs, path, data, mark: put_whole(fs, path, data))
    return Root(f"memory://{uuid.uuid4().hex}")


def test_a_store_without_conditional_writes_is_refused(careless: Root) -> None:
    with pytest.raises(InputError, match="no atomic create-if-absent") as caught:
        careless.probe()
    assert "LATENTLOOM_SINGLE_WRITER=yes" in str(caught.value)


def test_a_single_writer_may_use_it_after_a_loud_warning(
    careless: Root, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LATENTLOOM_SINGLE_WRITER", "yes")
    with caplog.at_level(logging.WARNING):
        careless.probe()
    assert "WILL DAMAGE IT" in caplog.text
    assert careless.put_if_absent("a", b"first") is True
    assert careless.put_if_absent("a", b"second") is False
    assert careless.read_bytes("a") == b"first"


def test_a_lost_answer_is_resolved_by_reading_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store took the object, the connection broke before it said so: the retry must not report a loss."""
    root = Root(f"memory://{uuid.uuid4().hex}")
    real, calls = Root._create_remote, []

    def lossy(self: Root, key: str, data: bytes, mark: str) -> None:
        calls.append(key)
        real(self, key, data, mark)
        if len(calls) == 1:
            raise ConnectionResetError("the answer got lost")

    monkeypatch.setattr(Root, "_create_remote", lossy)
    assert root.put_if_absent("claim", b"mine") is True
    assert len(calls) == 2
    assert root.put_if_absent("claim", b"mine") is False


def test_a_link_that_is_repeated_unasked_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS sends LINK again when the answer got lost, and reports that the name is taken: by us."""
    root = Root(str(tmp_path))
    link = os.link

    def twice(source: str, target: str) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    assert root.put_if_absent("claim", b"mine") is True
    monkeypatch.setattr(os, "link", link)
    assert root.put_if_absent("claim", b"mine") is False


class RepeatingGcs:
    """gcsfs as far as an object's creation goes: its own repeat of a call finds what the call has made."""

    protocol = ("gs", "gcs")

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}

    def _strip_protocol(self, path: str) -> str:
        return path.partition("://")[2]

    def pipe_file(self, path: str, data: bytes, mode: str, metadata: dict[str, str]) -> None:
        self.objects.setdefault(path, {"metadata": metadata, "data": data})
        raise FileExistsError(path)

    def info(self, path: str) -> dict[str, Any]:
        return self.objects[path]


def test_a_creation_that_gcsfs_repeats_unasked_is_ours() -> None:
    root = Root("gs://bucket/prefix")
    root._fs = RepeatingGcs()
    assert root.put_if_absent("claim", b"mine") is True
    assert root.put_if_absent("claim", b"mine") is False


def test_a_file_that_goes_while_its_directory_is_listed_is_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Root(str(tmp_path))
    root.put("d/here", b"1")
    monkeypatch.setattr(storage, "scanned", lambda directory: ["gone", "here"])
    assert [info.key for info in root.list("d")] == ["d/here"]


@pytest.mark.integration
def test_keys_with_an_empty_part_are_objects_like_any_other(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    root = Root("s3://empty-parts/prefix")
    root.fs.call_s3("create_bucket", Bucket="empty-parts")
    for key in ("prefix/b/", "prefix/b/1", "prefix/c/1"):  # the first is a marker, as consoles make for folders
        root.fs.call_s3("put_object", Bucket="empty-parts", Key=key, Body=b"1")
    assert [info.key for info in root.list()] == ["b/1", "c/1"]
    root.fs.call_s3("put_object", Bucket="empty-parts", Key="prefix/c//2", Body=b"1")
    assert [info.key for info in root.list()] == ["b/1", "c//2", "c/1"]
    assert root.read_bytes("c//2") == b"1"
    root.fs.call_s3("put_object", Bucket="empty-parts", Key="prefix//3", Body=b"1")
    with pytest.raises(KeyRefused, match="below s3://empty-parts/prefix are keys that begin with /"):
        list(root.list())


def test_new_directories_are_durable_in_those_that_hold_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    Root(str(tmp_path)).put("a/b/c", b"1")
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")} <= set(synced)


def test_transient_errors_are_retried_and_final_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(f"memory://{uuid.uuid4().hex}")
    root.put("a", b"x")
    failures = [TimeoutError("slow"), ConnectionResetError("reset")]
    real = type(root.fs).cat_file

    def flaky(self: object, path: str, **options: object) -> bytes:
        if failures:
            raise failures.pop()
        return real(self, path, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(root.fs), "cat_file", flaky)
    assert root.read_bytes("a") == b"x"
    failures[:] = [PermissionError("no")]
    with pytest.raises(PermissionError):
        root.read_bytes("a")
    assert failures == []


def test_what_does_not_pass_in_time_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root(f"memory://{uuid.uuid4().hex}")
    monkeypatch.setattr(storage, "_BACKOFF_CAP_S", 0.0)

    def broken(self: object, path: str, **options: object) -> bytes:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(type(root.fs), "cat_file", broken)
    with pytest.raises(StoreUnavailable, match="reset by peer") as caught:
        root.read_bytes("a")
    assert pickle.loads(pickle.dumps(caught.value)).strerror == caught.value.strerror
    assert root.uri in describe(caught.value)


def test_errors_of_a_configuration_are_not_retried_and_say_what_to_do() -> None:
    from botocore.exceptions import NoCredentialsError

    plain = plain_error(NoCredentialsError(), "s3://user:planted@b/x")
    assert type(plain) is OSError
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in describe(plain)
    assert "planted" not in describe(plain)
    bug = KeyError("no store's fault")
    assert plain_error(bug, "s3://b") is bug


def test_a_ranged_file_reads_what_a_file_reads() -> None:
    data = bytes(range(256)) * 40
    file = io.BufferedReader(RangedFile(lambda start, n: data[start : start + n], len(data)), 1000)
    assert file.read(10) == data[:10]
    assert file.seek(-300, io.SEEK_END) == len(data) - 300
    assert file.read() == data[-300:]
    assert file.seek(5) == 5
    assert file.read(5000) == data[5:5005]
    assert file.read(0) == b""
    short = RangedFile(lambda start, n: b"x", 100)
    with pytest.raises(OSError, match="100 bytes were asked for at offset 0, 1 came"):
        short.read(100)


def test_what_a_stores_failure_means_for_a_job() -> None:
    from pipeline.errors import ConflictError

    conflict = ConflictError("held")
    note_answer("s3://b/some/prefix")
    outcomes = [
        (StoreUnavailable(5, "the store does not answer", "s3://b/x"), 75),
        (StoreUnavailable(5, "the store does not answer", "s3://never-heard-of/x"), 3),
        (OSError(28, "No space left on device"), 3),
        (PermissionError(13, "not allowed", "s3://b/x"), 3),
        (conflict, 4),
        (PermissionError(13, "Permission denied", "/here/file"), 3),
        (OSError(30, "Read-only file system", "/here/file"), 3),
        (PermissionError(13, "Permission denied"), None),
        (FileNotFoundError(2, "No such file or directory", "/here/file"), None),
        (KeyError("a bug"), None),
    ]
    for error, code in outcomes:
        meant = job_error(error)
        assert (meant.exit_code if meant else None) == code
    assert job_error(conflict) is conflict
    assert "the store does not answer: s3://b/x" in str(job_error(outcomes[0][0]))


def test_the_clients_errors_come_out_as_plain_ones_with_the_stores_own_code() -> None:
    from botocore.exceptions import ClientError

    def answer(status: int, code: str) -> Exception:
        response = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        return ClientError(response, "PutObject")  # type: ignore[arg-type]

    kinds = [
        (503, "SlowDown", StoreUnavailable, "SlowDown"),
        (400, "RequestTimeout", StoreUnavailable, "RequestTimeout"),
        (501, "NotImplemented", OSError, "NotImplemented"),
        (301, "PermanentRedirect", OSError, "set AWS_DEFAULT_REGION"),
        (403, "RequestTimeTooSkewed", OSError, "this machine's clock differs"),
    ]
    for status, code, kind, said in kinds:
        plain = plain_error(answer(status, code), "s3://b/x")
        assert type(plain) is kind
        assert said in describe(plain)
        assert pickle.loads(pickle.dumps(plain)).args == plain.args
