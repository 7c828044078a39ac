"""Sources on an S3 API: the pixels are those of a local copy, outages are retried, losses become rejects."""

from __future__ import annotations

import io
import json
import tarfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_images import encode, gradient, write

from pipeline.errors import InputError
from pipeline.source.config import (
    FolderSource,
    ImageConfig,
    ManifestSource,
    ParquetSource,
    SourceConfig,
    WebDatasetSource,
)
from pipeline.source.pixels.prepare import PreparedImage, prepare
from pipeline.source.reading.listing import list_entries, read_unit
from pipeline.source.reading.rows import EndOfUnit, Entry, SourceRow
from pipeline.source.reasons import Reason
from pipeline.storage import root as storage
from pipeline.storage.root import Root

pytestmark = pytest.mark.integration

KINDS: dict[str, type[FolderSource | WebDatasetSource | ParquetSource]] = {
    "folder": FolderSource,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
}
IMAGE = ImageConfig(resolution=(16, 32), flip=True, crop="random", max_upscale=1e6, phash=True)


def pictures() -> list[tuple[str, bytes]]:
    """(name, bytes) of a few files of several formats, one of them larger than a buffer, one broken."""
    noise = np.random.default_rng(0).integers(0, 256, (1700, 1700, 3), np.uint8)
    return [
        ("0.jpg", encode(gradient(), "JPEG", quality=95)),
        ("1.png", encode(gradient(33, 47), "PNG")),
        ("2.webp", encode(gradient(50, 31), "WEBP")),
        ("3.png", encode(noise, "PNG", compress_level=0)),
        ("4.jpg", encode(gradient(90, 60), "JPEG")[:-200]),
    ]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pictures as a folder, as tar shards and as Parquet."""
    base = tmp_path_factory.mktemp("s3-source")
    files = pictures()
    for name, data in files:
        write(base / "folder" / name, data)
    lines = [{"file_name": name, "text": f"picture {i}", "label": i} for i, (name, _) in enumerate(files)]
    write(base / "folder" / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    (base / "webdataset").mkdir()
    for shard, part in enumerate((files[:2], files[2:])):
        with tarfile.open(base / "webdataset" / f"{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in part:
                stem = name.partition(".")[0]
                for member, body in (
                    (name, data),
                    (f"{stem}.txt", f"picture {stem}".encode()),
                    (f"{stem}.cls", stem.encode()),
                ):
                    info = tarfile.TarInfo(member)
                    info.size = len(body)
                    tar.addfile(info, io.BytesIO(body))
    (base / "parquet").mkdir()
    columns = {
        "image": [data for _, data in files],
        "text": [f"picture {i}" for i in range(len(files))],
        "label": list(range(len(files))),
    }
    pq.write_table(pa.table(columns), base / "parquet" / "a.parquet", row_group_size=2)
    return base


@contextmanager
def serving() -> Iterator[str]:
    """The endpoint of an S3 server of its own, until left."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as endpoint:
        yield endpoint


def connect(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Root:
    """A root in a new bucket; clients are kept by the process, so those of another endpoint go first."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(storage, "_BACKOFF_CAP_S", 0.0)
    bucket = f"b{uuid.uuid4().hex[:12]}"
    root = Root(f"s3://{bucket}/deep/prefix")
    root.fs.call_s3("create_bucket", Bucket=bucket)
    return root


@pytest.fixture
def remote(server: str, local: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """A bucket of its own with everything that is in `local`; retries do not wait."""
    root = connect(server, monkeypatch)
    root.upload_dir(local)
    return root


def source_of(kind: str, base: str, **fields: Any) -> SourceConfig:
    return KINDS[kind](uri=f"{base}/{kind}", **fields)


def rows_of(source: SourceConfig, entries: list[Entry] | None = None) -> list[SourceRow]:
    found = list(read_unit(source, list(list_entries(source)) if entries is None else entries, [(0, None)]))
    return [row for row in found if not isinstance(row, EndOfUnit)]


def told(row: SourceRow) -> dict[str, Any]:
    """A row and every variant of its pixels as plain values."""
    result = prepare(row, IMAGE)
    pixels = (
        [(p.pixels.tobytes(), p.bucket, p.crop, p.sample_id, p.content_sha256, p.phash) for p in result]
        if isinstance(result, list)
        else (result.reason, result.message)
    )
    return {"row": row.row, "key": row.key, "caption": row.caption, "label": row.label, "pixels": pixels}


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_and_texts_are_those_of_a_local_copy(kind: str, local: Path, remote: Root) -> None:
    here, there = rows_of(source_of(kind, str(local))), rows_of(source_of(kind, remote.uri))
    assert [told(row) for row in there] == [told(row) for row in here]
    assert [(row.caption, row.label) for row in there] == [(f"picture {i}", i) for i in range(5)]
    outcomes = [prepare(row, IMAGE) for row in there]
    assert [isinstance(o, list) and len(o) for o in outcomes] == [4, 4, 4, 4, False]


def test_objects_by_a_manifest_are_read_as_it_says(local: Path, remote: Root, tmp_path: Path) -> None:
    """The etags of a listing are those that S3 compares when an object is read."""
    infos = [info for info in remote.list("folder") if not info.key.endswith(".jsonl")]
    keys = [info.key.removeprefix("folder/") for info in infos]
    table = {"key": keys, "size": [i.size_bytes for i in infos], "etag": [i.etag for i in infos]}
    table |= {"text": [f"picture {n}" for n in range(5)], "label": list(range(5))}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    manifest = ManifestSource(uri=f"{remote.uri}/folder", manifest=str(tmp_path / "m.parquet"))
    entries, folder = list(list_entries(manifest)), source_of("folder", remote.uri)
    assert [told(row) for row in rows_of(manifest, entries)] == [told(row) for row in rows_of(folder)]
    remote.put("folder/1.png", b"another picture")
    assert [row.key for row in rows_of(manifest, entries)] == ["0.jpg", "2.webp", "3.png", "4.jpg"]


def test_all_kinds_give_the_same_pixels(remote: Root) -> None:
    """A key is part of a random crop's identity, so the crop is in the centre here."""
    centred = IMAGE.model_copy(update={"crop": "center"})
    found = []
    for kind in KINDS:
        prepared = [prepare(row, centred) for row in rows_of(source_of(kind, remote.uri))]
        found.append([[p.pixels.tobytes() for p in out] if isinstance(out, list) else out.reason for out in prepared])
    assert found[0] == found[1] == found[2]
    assert isinstance(prepared[0], list)
    assert isinstance(prepared[0][0], PreparedImage)


@pytest.mark.parametrize("kind", KINDS)
def test_listings_agree_and_carry_versions(kind: str, local: Path, remote: Root) -> None:
    here, there = (list(list_entries(source_of(kind, base))) for base in (str(local), remote.uri))
    assert [(e.key, e.size_bytes, e.row_start, e.row_stop, e.meta) for e in there] == [
        (e.key, e.size_bytes, e.row_start, e.row_stop, e.meta) for e in here
    ]
    assert all(e.etag for e in there)


def test_keys_with_empty_parts_are_rows_like_any_other(remote: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encode(gradient(), "JPEG")
    path = remote.fs._strip_protocol(remote.uri)
    for key in ("a/0.jpg", "a//1.jpg", "a//b//2.jpg", "a/c/3.jpg"):
        bucket, _, name = f"{path}/slashes/{key}".partition("/")
        remote.fs.call_s3("put_object", Bucket=bucket, Key=name, Body=jpeg)
    found = rows_of(FolderSource(uri=f"{remote.uri}/slashes"))
    assert [(row.key, row.image) for row in found] == [
        (key, jpeg) for key in ("a//1.jpg", "a//b//2.jpg", "a/0.jpg", "a/c/3.jpg")
    ]


def test_patterns_and_single_objects_are_found(remote: Root) -> None:
    for uri in ("webdataset/{000..001}.tar", "webdataset/*.tar", "webdataset"):
        assert len(rows_of(WebDatasetSource(uri=f"{remote.uri}/{uri}"))) == 5
    assert len(rows_of(WebDatasetSource(uri=f"{remote.uri}/webdataset/001.tar"))) == 3
    assert len(rows_of(ParquetSource(uri=f"{remote.uri}/parquet/a.parquet"))) == 5


def break_reads(
    monkeypatch: pytest.MonkeyPatch, root: Root, when: Callable[[str, int], bool], error: Callable[[], Exception]
) -> Counter[str]:
    """Make the S3 client's reads of some objects fail; `when(key, number of the read)` decides. Counts reads."""
    reads, real = Counter[str](), storage.read_if_match

    def read_if_match(fs: Any, path: str, *args: Any) -> bytes | None:
        name = path.rpartition("/")[2]
        reads[name] += 1
        if when(name, reads[name]):
            raise error()
        return real(fs, path, *args)

    monkeypatch.setattr(storage, "read_if_match", read_if_match)
    return reads


@pytest.mark.parametrize(("kind", "name"), [("folder", "1.png"), ("webdataset", "001.tar"), ("parquet", "a.parquet")])
def test_another_version_under_the_same_key_gives_no_row(kind: str, name: str, local: Path, remote: Root) -> None:
    """Not even when the listed one is put back afterwards, as its etag then comes back, too."""
    source = source_of(kind, remote.uri)
    entries = list(list_entries(source))
    listed = rows_of(source, entries)
    key = f"{kind}/{name}"
    original = remote.read_bytes(key)
    remote.put(key, original[:-1] + b"?")
    changed = rows_of(source, entries)
    assert {row.row for row in changed} < {row.row for row in listed}
    assert [told(row) for row in changed] == [told(row) for row in listed if row.row in {r.row for r in changed}]
    remote.put(key, original)
    assert [told(row) for row in rows_of(source, entries)] == [told(row) for row in listed]


@pytest.mark.parametrize(("kind", "name"), [("folder", "1.png"), ("webdataset", "001.tar"), ("parquet", "a.parquet")])
def test_reads_that_fail_for_a_while_are_repeated(
    kind: str, name: str, local: Path, remote: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(kind, remote.uri)
    entries = list(list_entries(source))
    reads = break_reads(
        monkeypatch, remote, lambda key, number: key == name and number <= 3, lambda: OSError(5, "Connection reset")
    )
    assert [told(row) for row in rows_of(source, entries)] == [
        told(row) for row in rows_of(source_of(kind, str(local)))
    ]
    assert reads[name] >= 4


@pytest.mark.parametrize(
    ("kind", "name", "lost"),
    [("folder", "1.png", [1]), ("webdataset", "001.tar", [2]), ("parquet", "a.parquet", range(5))],
)
def test_reads_that_fail_for_good_are_rejects_to_be_retried(
    kind: str, name: str, lost: list[int], remote: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tar of unknown length that cannot be read at all is one rejected row; Parquet's row count is planned."""
    source = source_of(kind, remote.uri)
    entries = list(list_entries(source))
    reads = break_reads(monkeypatch, remote, lambda key, _: key == name, lambda: OSError(5, "Connection reset"))
    rows = rows_of(source, entries)
    failed = {row.row: row for row in rows if row.status == "rejected"}
    assert sorted(failed) == list(lost)
    assert {row.reason for row in failed.values()} == {Reason.READ_FAILED}
    assert Reason.READ_FAILED.retryable
    assert all("Connection reset" in (row.message or "") and row.image is None for row in failed.values())
    assert reads[name] >= storage._ATTEMPTS
    assert all(row.image for row in rows if row.row not in failed)


class Overloaded:
    """The S3 server behind a door that answers reads of one object with 503 SlowDown, for a while or for good."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._application: Any = DomainDispatcherApplication(create_backend_app)
        self.name, self.left, self.refused = "", 0, 0
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> Overloaded:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        reads = environ["REQUEST_METHOD"] == "GET" and environ["PATH_INFO"].endswith(self.name)
        if self.name and reads and self.left > 0:
            self.left, self.refused = self.left - 1, self.refused + 1
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return self._application(environ, start_response)


@pytest.mark.parametrize(
    ("kind", "name", "lost"),
    [("folder", "1.png", [1]), ("webdataset", "001.tar", [2]), ("parquet", "a.parquet", [0, 1, 2, 3, 4])],
)
def test_a_server_that_asks_to_slow_down_is_asked_again_and_then_costs_its_rows(
    kind: str, name: str, lost: list[int], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the real client: answers over HTTP, not exceptions planted into it."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with Overloaded() as server:
        root = connect(server.endpoint, monkeypatch)
        root.upload_dir(local / kind, kind)
        source = source_of(kind, root.uri)
        entries = list(list_entries(source))
        server.name, server.left = name, 2
        again = rows_of(source, entries)
        assert [(r.row, r.image) for r in again] == [(r.row, r.image) for r in rows_of(source_of(kind, str(local)))]
        assert server.refused == 2
        server.left = 10**9
        rows = rows_of(source, entries)
        failed = [r for r in rows if r.status == "rejected"]
        assert ([r.row for r in failed], {r.reason for r in failed}) == (lost, {Reason.READ_FAILED})
        assert all(r.image for r in rows if r.row not in lost)
        assert server.refused >= 2 + storage._ATTEMPTS


def test_an_object_that_vanished_after_planning_is_missing(remote: Root) -> None:
    source = source_of("folder", remote.uri)
    entries = list(list_entries(source))
    remote.delete("folder/2.webp")
    rows = rows_of(source, entries)
    assert [row.reason for row in rows] == [None, None, "missing", None, None]
    assert Reason.MISSING.retryable


def test_a_server_that_went_away_rejects_every_row_with_its_reason(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection refused is no OSError in the S3 client, and still becomes a row."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(storage, "_ATTEMPTS", 2)
    with serving() as endpoint:
        root = connect(endpoint, monkeypatch)
        for name in ("0.jpg", "1.png"):
            root.put(f"folder/{name}", (local / "folder" / name).read_bytes())
        source = source_of("folder", root.uri, read_ahead=2)
        entries = list(list_entries(source))
        assert [row.status for row in rows_of(source, entries)] == ["ok", "ok"]
    rows = rows_of(source, entries)
    assert [(row.status, row.reason) for row in rows] == [("rejected", "read_failed")] * 2
    assert all("planted-secret" not in (row.message or "") for row in rows)
    with pytest.raises(InputError, match=r"cannot be (read|listed)"):
        list(list_entries(source))


def test_a_bucket_that_is_not_there_is_said_to_be_missing(remote: Root) -> None:
    with pytest.raises(InputError, match="There is no source at s3://no-such-bucket-here/x"):
        list(list_entries(FolderSource(uri="s3://no-such-bucket-here/x")))


def test_uris_of_a_table_are_followed_on_the_same_store(local: Path, remote: Root, tmp_path: Path) -> None:
    uris = [f"{remote.uri}/folder/0.jpg", "folder/1.png", "s3://elsewhere/secret.png"]
    pq.write_table(pa.table({"image": uris}), tmp_path / "uris.parquet")
    remote.put("uris.parquet", (tmp_path / "uris.parquet").read_bytes())
    source = ParquetSource(uri=f"{remote.uri}/uris.parquet", uri_prefixes=(f"{remote.uri}/folder",))
    rows = rows_of(source)
    assert [row.reason for row in rows] == [None, None, "uri_refused"]
    assert [row.image for row in rows[:2]] == [(local / "folder" / n).read_bytes() for n in ("0.jpg", "1.png")]
