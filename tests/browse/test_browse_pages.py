"""What pages say of each kind of dataset, how far one page reads, and who is answered at all."""

from __future__ import annotations

import html
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.browse import FIRST_PORT, PageServer, open_server
from pipeline.browse import pages as pages_module
from pipeline.browse.pages import Asked, Pages
from pipeline.codec.codec import load_codec
from pipeline.errors import ConfigError, ConflictError, InputError
from pipeline.lineage import drawing_of, find_start, trace
from pipeline.media import decode_image, false_colours
from pipeline.storage.root import Root
from pipeline.store.ledger.identity import Identity, claim_identity
from pipeline.store.read.dataset import LatentDataset
from pipeline.store.schema import latents_from
from pipeline.tracking.config import TrackingConfig
from pipeline.tracking.tracker import open_tracker
from tests.browse.browse_world import HOSTILE, NO_STORE, get, serving, write_images, write_latents, write_text
from tests.evaluate.evaluate_world import write_codec
from tests.train.dataset import make_dataset


@pytest.fixture
def latents(tmp_path: Path) -> str:
    return write_latents(tmp_path / "latents")


def keys(page: str) -> list[str]:
    """The rows that a page shows, by the last part of their key."""
    return re.findall(r"u\d/r\d\.png", re.sub(r'alt="[^"]*"', "", page))


def walk(server: PageServer, page: str) -> list[str]:
    """All rows of a page and of those behind it, by the links that it offers."""
    shown: list[str] = []
    while page:
        status, text, _ = get(server, page)
        assert status == 200
        shown += keys(text)
        (page,) = re.findall(r'<a href="([^"]+)">on →', text) or [""]
        page = html.unescape(page)
    return shown


def test_the_overview_counts_by_the_ledger(latents: str) -> None:
    with serving(latents) as server:
        _, page, _ = get(server)
    text = " ".join(re.sub(r"<[^>]+>", " ", page.split("<body>")[1]).split())
    for told in (
        "8 visible rows", "11 source rows settled of 12 planned", "2 rejected", "1 filtered",
        "24x32 5", "32x24 3", "corrupt rejected 1", "truncated rejected 1", "too_small filtered 1",
        "1 to 63 8", "codec.class Toy", "1 test",
    ):  # fmt: skip
        assert told in text, told


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", [f"u0/r{r}.png" for r in range(5)] + [f"u1/r{r}.png" for r in range(3)]),
        ("bucket=32x24", [f"u1/r{r}.png" for r in range(3)]),
        ("label=1", [f"u0/r{r}.png" for r in range(5)]),
        ("text=cat", ["u0/r1.png", "u0/r4.png"]),
        ("text=U1%2FR2", ["u1/r2.png"]),
        ("label=3&text=row", ["u1/r0.png", "u1/r1.png", "u1/r2.png"]),
        ("label=2", []),
    ],
)
@pytest.mark.parametrize(("rows", "groups"), [(60, 64), (2, 64), (1, 1), (3, 1)])
def test_every_row_is_met_once_in_order_whatever_a_page_holds(
    latents: str, query: str, expected: list[str], rows: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages_module, "ROWS", rows)
    monkeypatch.setattr(pages_module, "SCANNED_GROUPS", groups)
    with serving(latents) as server:
        assert walk(server, f"rows?{query}") == expected


def test_a_page_reads_the_row_groups_that_it_shows_and_no_others(
    latents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Pages(latents, None, None, NO_STORE)
    read: list[tuple[int, bool]] = []
    whole = shown.opened.data.read

    def reading(group: int, columns: Any, **options: Any) -> Any:
        read.append((group, "latent" in columns))
        return whole(group, columns, **options)

    monkeypatch.setattr(shown.opened.data, "read", reading)
    monkeypatch.setattr(pages_module, "ROWS", 2)
    assert [card["key"] for card in shown.rows(Asked(start=5))["cards"]] == ["u1/r0.png", "u1/r1.png"]
    assert read == [(1, False)]  # neither the other group nor any latent
    read.clear()
    assert [row["key"] for row in shown.opened.find(Asked(label=3)).rows] == ["u1/r0.png", "u1/r1.png"]
    assert {group for group, _ in read} == {1}  # the file's statistics say that the first one has no such label
    read.clear()
    shown.picture(6)
    shown.picture(7)
    assert read == [(1, True)]


def test_what_was_left_out_is_told_with_its_reason(latents: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(latents) as server:
        page = get(server, "left-out")[1]
        assert re.findall(r"<td class=\"method\">(u\d/r\d)</td><td>(\w+)", page) == [
            ("u0/r5", "corrupt"), ("u1/r3", "truncated"), ("u1/r4", "too_small"),
        ]  # fmt: skip
        assert html.escape(HOSTILE, quote=False).split("&lt;img")[0].split("&gt;")[1] in page
        page = get(server, "left-out?outcome=filtered&reason=too_small")[1]
        assert re.findall(r"u\d/r\d", page) == ["u1/r4"]
        monkeypatch.setattr(pages_module, "ROWS", 1)
        monkeypatch.setattr(pages_module, "REJECT_FILES", 1)
        shown, page = [], "left-out"
        while page:
            text = get(server, page)[1]
            shown += re.findall(r"u\d/r\d", text)
            page = html.unescape((re.findall(r'<a href="([^"]+)">on →', text) or [""])[0])
        assert shown == ["u0/r5", "u1/r3", "u1/r4"]


def test_a_row_tells_what_is_stored_and_what_made_it(latents: str) -> None:
    with serving(latents) as server:
        page = get(server, "row?row=7")[1]
    for told in (
        "u1/r2.png",
        "<dt>class</dt><dd>three</dd>",
        "row 2 of unit 1",
        "key:" + "0" * 32,
        ".parquet",
        "32x24",
        "row 8 of 8",
    ):
        assert told in page, told


@pytest.mark.parametrize("page", ["", "rows", "row?row=0", "left-out", "lineage", "rows?text=%22%3E%3Cscript%3E"])
@pytest.mark.parametrize("kind", ["latents", "images", "text", "compare"])
def test_no_text_of_a_dataset_becomes_markup(kind: str, page: str, tmp_path: Path) -> None:
    write = {"latents": write_latents, "text": write_text}.get(kind, write_images)
    beside = write_images(tmp_path / "beside", shade=9) if kind == "compare" else None
    with serving(write(tmp_path / kind), beside=beside) as server:
        for shown in (page, "compare") if beside else (page,):
            status, text, _ = get(server, shown)
            assert status == 200
            assert "<script" not in text
            assert "onerror=alert(1)>" not in text
            assert text.count("<img") == text.count('alt="')


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(latents of a codec, the codec)."""
    folder = tmp_path_factory.mktemp("encoded")
    write_codec(folder / "codec")
    made = load_codec(str(folder / "codec")).info.as_dict() | {"path": str(folder / "codec")}
    return make_dataset(folder / "latents", rows=8, codec=made), str(folder / "codec")


def test_latents_are_false_colours_until_their_codec_is_named(encoded: tuple[str, str]) -> None:
    uri, path = encoded
    data = LatentDataset.open(uri)
    rows = data.read(0, ["latent", "latent_shape"])
    latents = latents_from(rows["latent"], tuple(rows["latent_shape"][0].as_py()), data.latent_dtype)
    with serving(uri) as server:
        page = get(server, "rows")[1]
        assert "--codec PATH" in page
        assert path in page  # said, not opened
        status, stored, headers = get(server, "picture?row=1")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        expected = false_colours(latents[1], data.channel_mean, data.channel_std)
        np.testing.assert_array_equal(decode_image(stored.encode("latin-1")), expected)
    decoded = load_codec(path).decode(torch.from_numpy(latents[1:2].copy())).numpy()[0]
    with serving(uri, codec=path) as server:
        assert "False colours" not in get(server, "rows")[1]
        for page in ("picture?row=1", "picture?row=1&large=1"):
            np.testing.assert_array_equal(decode_image(get(server, page)[1].encode("latin-1")), decoded)


def test_false_colours_show_any_latent() -> None:
    mean, std = np.zeros(1), np.ones(1)
    latent = np.array([[[0.0, np.nan, np.inf, -np.inf]]], np.float32)
    assert false_colours(latent, mean, std)[0, :, 0].tolist() == [128, 128, 255, 0]


def test_a_codec_that_is_not_the_datasets_is_refused(encoded: tuple[str, str], tmp_path: Path, latents: str) -> None:
    with pytest.raises(ConflictError, match="other weights") as caught:
        Pages(latents, encoded[1], None, NO_STORE)
    assert caught.value.key == "--codec"
    with pytest.raises(ConfigError, match="has no latents"):
        Pages(write_images(tmp_path / "images"), encoded[1], None, NO_STORE)
    with pytest.raises(InputError) as missing:
        Pages(encoded[0], str(tmp_path / "nothing"), None, NO_STORE)
    assert missing.value.key == "--codec"


def test_a_picture_without_measure_is_not_decoded(encoded: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "MAX_PIXELS", 1000)
    with serving(encoded[0], codec=encoded[1]) as server:
        status, text, _ = get(server, "picture?row=1")
        assert (status, "would have 1,024 pixels" in text) == (400, True)
        row = {"latent": b"short", "latent_shape": [4, 8, 8]}
        monkeypatch.setattr(server.pages.opened, "row", lambda number, columns: row)
        assert get(server, "picture?row=1")[0] == 400  # the data are damaged: no bug


@pytest.mark.parametrize("outside", [False, True])
def test_a_sample_is_shown_as_it_is_stored(outside: bool, tmp_path: Path) -> None:
    with serving(write_images(tmp_path / "images", outside=outside)) as server:
        status, stored, headers = get(server, "picture?row=3")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert decode_image(stored.encode("latin-1"))[0, 0].tolist() == [24, 0, 0]
        page = get(server, "row?row=3")[1]
        for told in ("prompt 3", "request.seed", "draw.sampler", "train-run"):
            assert told in page, told
        assert "seed 3 · 25 steps · guidance 2" in get(server, "rows")[1]


def test_what_is_no_picture_is_never_served_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(write_text(tmp_path / "text")) as server:
        assert get(server, "picture?row=0")[0] == 400
        assert "(the empty prompt)" in get(server, "rows")[1]
    with serving(write_images(tmp_path / "images")) as server:
        row = {"media_type": "text/html", "image": b"<script>", "file": None}
        monkeypatch.setattr(server.pages.opened, "row", lambda number, columns: row)
        status, text, headers = get(server, "picture?row=0")
        assert (status, headers["Content-Type"]) == (400, "text/html; charset=utf-8")
        assert "<script" not in text
        (tmp_path / "secret").write_text("planted")
        row |= {"media_type": "image/png", "image": b"", "file": "../secret"}
        status, text, _ = get(server, "picture?row=0")
        assert (status, "planted" in text) == (400, False)


# -- Who is answered --------------------------------------------------------------------------------------------


def test_only_the_printed_address_is_answered(latents: str) -> None:
    with serving(latents) as server:
        port, outside = server.server_port, f"http://127.0.0.1:{server.server_port}"
        assert server.server_address[0] == "127.0.0.1"
        for page in (
            "/",
            "/rows",
            "/wrong/rows",
            f"/{server.secret}",
            f"/x/../{server.secret}/",
        ):
            assert get(server, outside + page)[0] == 403, page
        for name in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "localhost.evil:80"):
            assert get(server, Host=name)[0] == 403, name
        for name in (f"localhost:{port}", "localhost:9", "127.0.0.1", f"[::1]:{port}"):
            assert get(server, Host=name)[0] == 200, name
        for site, mode, status in (
            ("cross-site", "no-cors", 403), ("same-site", "cors", 403), ("cross-site", "navigate", 200),
            ("same-origin", "no-cors", 200), ("none", "navigate", 200),
        ):  # fmt: skip
            assert get(server, "picture?row=0", Sec_Fetch_Site=site, Sec_Fetch_Mode=mode)[0] == status, site


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_only_get_is_answered(latents: str, method: str) -> None:
    with serving(latents) as server:
        status, _, headers = get(server, method=method)
        assert (status, headers["Allow"]) == (405, "GET")


@pytest.mark.parametrize(
    ("page", "status"),
    [
        ("nothing", 404), ("../../etc/passwd", 404), ("%2e%2e%2fdata", 404), ("compare", 404),
        ("row", 400), ("row?row=8", 400),
        ("row?row=-1", 400), ("row?row=1e9", 400), ("picture?row=" + "9" * 30, 400), ("rows?bucket=9x9", 400),
        ("rows?label=x", 400), ("rows?from=99999", 200), ("left-out?reason=none", 200),
    ],
)  # fmt: skip
def test_an_address_that_means_nothing_is_said_to(latents: str, page: str, status: int) -> None:
    with serving(latents) as server:
        found, text, headers = get(server, page)
        assert found == status
        assert "Traceback" not in text
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert "script-src" not in headers["Content-Security-Policy"]


def test_a_bug_is_one_page_and_not_the_end(
    latents: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(latents) as server:
        monkeypatch.setattr(server.pages, "overview", lambda: 1 / 0)
        status, text, _ = get(server)
        assert status == 500
        assert "ZeroDivisionError" not in text
        assert "ZeroDivisionError" in caplog.text
        assert get(server, "rows")[0] == 200


def test_a_taken_port_is_an_error_and_by_itself_the_next_is_taken(latents: str, tmp_path: Path) -> None:
    pages = Pages(latents, None, None, NO_STORE)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="in use") as caught:
            open_server(pages, port)
        assert (caught.value.key, caught.value.value) == ("--port", port)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_server(pages, 99_999)
    with open_server(pages, None) as first, open_server(pages, None) as second:
        assert FIRST_PORT <= first.server_port < second.server_port


def test_what_holds_no_rows_is_refused(tmp_path: Path) -> None:
    claim_identity(Root(str(tmp_path / "codec")), Identity("codec", {}, {}))
    with pytest.raises(InputError, match="no rows to look at"):
        Pages(str(tmp_path / "codec"), None, None, NO_STORE)
    with pytest.raises(InputError, match="no dataset") as caught:
        Pages(str(tmp_path), None, None, NO_STORE)
    assert caught.value.key == "URI"


# -- Lineage, and two runs beside each other --------------------------------------------------------------------


def test_a_store_that_is_not_there_is_said(latents: str) -> None:
    with serving(latents) as server:
        page = get(server, "lineage")[1]
    assert "There is no tracking store" in page
    assert "--tracking URI" in page


def test_lineage_is_drawn_from_left_to_right(latents: str, tmp_path: Path) -> None:
    store = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", journal_dir=str(tmp_path / "journal"))
    ids: dict[str, str] = {}
    for job, parent, read, made in (
        ("fit_codec", None, "p" * 32, "c" * 32),
        ("encode", "fit_codec", "p" * 32, LatentDataset.open(latents).digest),
        ("train", "encode", LatentDataset.open(latents).digest, "m" * 32),
    ):
        parents = {parent: ids[parent]} if parent else {}
        tracker = open_tracker(store, job=job, run_name=f"{job} <b>it</b>", resume_run_id=None, parents=parents)
        for digest, context in ((read, "input"), (made, "output")):
            tracker.log_input(name="data", digest=digest, source="s3://data", context=context)
        tracker.finish("FINISHED")
        ids[job] = str(tracker.run_id)
    drawing = drawing_of(trace(find_start(latents), store.uri))
    columns = {step.job: x for x, _, step in drawing.boxes}
    assert columns["fit_codec"] < columns["encode"] < columns["train"]
    assert len(drawing.lines) == 2
    assert all(x1 < x2 for x1, _, x2, _ in drawing.lines)
    with serving(latents, tracking=store.uri) as server:
        page = get(server, "lineage")[1]
    assert page.count("<rect") == len(drawing.boxes) == 4  # one that only the dataset names is in no store
    assert "not in this store" in page
    assert "&lt;b&gt;it&lt;/b&gt;" in page


def test_two_runs_stand_beside_each_other_by_their_requests(tmp_path: Path) -> None:
    left = write_images(tmp_path / "left", count=8)
    right = write_images(tmp_path / "right", count=6, shade=40)
    with serving(left, beside=right) as server:
        page = get(server, "compare")[1]
        pairs = re.findall(r'src="picture\?row=(\d+)"[^>]*></a>\s*<img src="picture\?row=(\d+)&amp;beside=1"', page)
        assert pairs == [(str(at), str(at)) for at in range(6)]
        assert "2 only on the left" in page
        assert page.count("the same bytes") == 0
        one, other = (get(server, f"picture?row=5{beside}")[1].encode("latin-1") for beside in ("", "&beside=1"))
        assert decode_image(one)[0, 0].tolist() == [40, 0, 0]
        assert decode_image(other)[0, 0].tolist() == [40, 40, 40]
        assert "Compare</a>" in get(server)[1]
    with serving(left, beside=left) as server:
        page = get(server, "compare?label=1")[1]
        assert page.count("the same bytes") == 2
        assert "Nothing that the datasets tell" in page


def test_only_images_are_compared(latents: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="of latents and of images") as caught:
        Pages(latents, None, write_images(tmp_path / "images"), NO_STORE)
    assert caught.value.key == "--with"
