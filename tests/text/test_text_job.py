"""The job: every distinct caption once, whatever dies on the way, without touching the latents."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from text_builders import job_config, make_clip, make_latents, make_t5

import pipeline.text.encoder as encoder_module
from pipeline.errors import ConflictError, InputError, StoppedError
from pipeline.storage.root import Root
from pipeline.store.maintain.verify import verify
from pipeline.store.read.dataset import Dataset, LatentDataset
from pipeline.text import job
from pipeline.text.config import EmbedTextJobConfig
from pipeline.text.dataset import TextEmbeddings, caption_hash
from pipeline.text.encoder import TextEncoder
from tests.support.jobs import REPOSITORY, environment
from tests.support.jobs import run as run_job
from tests.support.maintain import compact
from tests.support.rows import claim

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_patience")]

UNITS: list[list[str | None]] = [
    ["a red circle", "the blue sky", None, "a red circle", "picture 1"],
    ["a red circle", "", "red " * 40, "picture 2", "a green square", "grün"],
    [f"picture {a} {b}" for a in range(4) for b in range(4)],
]
DISTINCT = {"", *(c for unit in UNITS for c in unit if c is not None)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    make_clip(folder / "clip")
    make_clip(folder / "other", seed=1)
    make_t5(folder / "t5")
    return folder


@pytest.fixture
def latents(tmp_path: Path) -> str:
    return make_latents(tmp_path / "latents", UNITS)


@pytest.fixture
def config(folder: Path, latents: str) -> EmbedTextJobConfig:
    return job_config(latents, [{"name": "clip", "path": folder / "clip"}])


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every caption that an encoder was asked for, in order."""
    seen: list[str] = []
    real = TextEncoder.encode

    def spy(self: TextEncoder, captions: Sequence[str]) -> Any:
        seen.extend(captions)
        return real(self, captions)

    monkeypatch.setattr(TextEncoder, "encode", spy)
    return seen


def rows_of(uri: str) -> pa.Table:
    dataset: Dataset = Dataset.open_kind(uri, "text")
    return pa.concat_tables(dataset.read(i, None) for i in range(len(dataset.row_groups)))


def objects(uri: str, *, below: str = "") -> dict[str, bytes]:
    root = Root(uri)
    return {o.key: root.read_bytes(o.key) for o in root.list(below)}


def assert_whole(uri: str, captions: set[str]) -> None:
    """Sound to the last byte, and every caption there once."""
    report = verify(uri, "checksums")
    assert report.sound, report.problems
    rows = rows_of(uri)
    assert sorted(rows["caption"].to_pylist()) == sorted(captions)
    assert rows["sample_id"].to_pylist() == [caption_hash(c) for c in rows["caption"].to_pylist()]


def test_each_distinct_caption_is_stored_once_and_the_empty_prompt_too(
    config: EmbedTextJobConfig, latents: str
) -> None:
    result = job.run(config)
    uri = f"{latents}/text/clip"
    assert (result.status, result.outputs) == ("done", {"clip": uri})
    assert result.counts["clip.captions"] == result.counts["clip.embedded"] == len(DISTINCT)
    assert result.counts["clip.truncated"] == 1
    assert_whole(uri, DISTINCT)
    rows = rows_of(uri)
    assert result.counts["clip.tokens"] == sum(rows["tokens"].to_pylist())
    # Only true tokens are stored: two bytes a value, no padding.
    assert [len(e) for e in rows["embedding"].to_pylist()] == [2 * 32 * n for n in rows["tokens"].to_pylist()]
    assert rows.filter(rows["truncated"])["caption"].to_pylist() == ["red " * 40]


def test_every_latent_row_finds_the_embedding_of_its_own_caption(
    folder: Path, config: EmbedTextJobConfig, latents: str
) -> None:
    job.run(config)
    text, data = TextEmbeddings.open(f"{latents}/text/clip"), LatentDataset.open(latents)
    files = job._check(config)[0].files
    direct = encoder_module.load_encoder(files, config.encoders[0], batch_size=4)
    seen = 0
    for i in range(len(data.row_groups)):
        captions = data.read(i, ["caption"])["caption"].to_pylist()
        embeddings_NLD, mask_NL = text.lookup(captions)
        want = direct.encode([c or "" for c in captions])
        for j in range(len(captions)):
            n = want.tokens[j]
            assert mask_NL[j].tolist() == [True] * n + [False] * (16 - n)
            np.testing.assert_array_equal(
                embeddings_NLD[j, :n], want.embeddings_NLD[j, :n].astype(np.float16).astype(np.float32)
            )
            assert not embeddings_NLD[j, n:].any()
        seen += len(captions)
    assert seen == data.num_rows == sum(map(len, UNITS))


def test_the_latents_are_not_touched(config: EmbedTextJobConfig, latents: str) -> None:
    before, digest = objects(latents), LatentDataset.open(latents).digest
    job.run(config)
    after = {k: v for k, v in objects(latents).items() if not k.startswith("text/")}
    assert after == before
    assert LatentDataset.open(latents).digest == digest
    assert verify(latents, "checksums").sound


def test_encoders_stand_side_by_side_and_one_more_can_come_later(
    folder: Path, latents: str, encoded: list[str]
) -> None:
    clip = {"name": "clip", "path": folder / "clip"}
    t5 = {"name": "t5", "path": folder / "t5", "max_length": 12, "embedding_dtype": "bfloat16"}
    job.run(job_config(latents, [clip]))
    before = objects(latents, below="text/clip")
    encoded.clear()
    result = job.run(job_config(latents, [clip, t5]))
    assert objects(latents, below="text/clip") == before
    assert len(encoded) == len(DISTINCT)
    assert (result.counts["clip.embedded"], result.counts["t5.embedded"]) == (0, len(DISTINCT))
    both = [TextEmbeddings.open(f"{latents}/text/{name}") for name in ("clip", "t5")]
    assert both[0].fingerprint_digest != both[1].fingerprint_digest
    assert [t.lookup(["a red circle"])[0].shape for t in both] == [(1, 16, 32), (1, 12, 32)]
    assert_whole(f"{latents}/text/t5", DISTINCT)


def test_a_second_run_reads_no_caption_and_loads_no_encoder(
    config: EmbedTextJobConfig, latents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.run(config)
    before = objects(latents)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("nothing is to be done")

    monkeypatch.setattr(LatentDataset, "read", never)
    monkeypatch.setattr(encoder_module, "load_encoder", never)
    result = job.run(config)
    assert (result.status, result.counts["clip.embedded"]) == ("unchanged", 0)
    assert objects(latents) == before


def test_only_new_captions_cost_anything(config: EmbedTextJobConfig, latents: str, encoded: list[str]) -> None:
    job.run(config)
    before = objects(latents, below="text/clip/data")
    make_latents(Path(latents), [["a red circle", "picture 9", "", "picture 9", "picture 8"]])
    encoded.clear()
    result = job.run(config)
    assert encoded == ["picture 9", "picture 8"]
    assert (result.counts["clip.embedded"], result.counts["clip.captions"]) == (2, len(DISTINCT) + 2)
    assert before.items() <= objects(latents, below="text/clip/data").items()
    assert_whole(f"{latents}/text/clip", DISTINCT | {"picture 9", "picture 8"})


def test_new_latents_without_new_captions_are_read_once(
    config: EmbedTextJobConfig, latents: str, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job.run(config)
    make_latents(Path(latents), [["a red circle", ""]])
    encoded.clear()
    assert job.run(config).status == "unchanged"
    monkeypatch.setattr(LatentDataset, "read", None)
    assert job.run(config).status == "unchanged"
    assert encoded == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoppedError("stopped"), RuntimeError("a bug")])
def test_a_run_that_stops_loses_one_unit_at_most_and_reads_no_caption_again(
    config: EmbedTextJobConfig,
    latents: str,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    real = TextEncoder.encode
    calls = Counter[str]()

    def stop_at_third(self: TextEncoder, captions: Sequence[str]) -> Any:
        calls["encode"] += 1
        if calls["encode"] == 3:
            raise error
        return real(self, captions)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", stop_at_third)
        with pytest.raises(type(error)):
            job.run(config)
    assert len(encoded) == 16  # two units of 8
    done = set(encoded)
    encoded.clear()
    monkeypatch.setattr(LatentDataset, "read", None)
    job.run(config)
    assert done.isdisjoint(encoded)
    assert len(encoded) == len(DISTINCT) - 16
    assert_whole(f"{latents}/text/clip", DISTINCT)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_commit_that_breaks_off_is_repeated_or_found(
    config: EmbedTextJobConfig, latents: str, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whether or not the record landed, nobody was told; the next run sees what is there."""
    import pipeline.store.writer as writer

    real = writer.commit

    def broken(root: Root, record: Any) -> bool:
        if moment == "after":
            real(root, record)
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "commit", broken)
        with pytest.raises(OSError, match="connection lost"):
            job.run(config)
    result = job.run(config)
    assert result.counts["clip.embedded"] == len(DISTINCT) - (8 if moment == "after" else 0)
    assert_whole(f"{latents}/text/clip", DISTINCT)


KILLED = """
import os, sys
from pipeline.config import load_config
from pipeline.text.config import EmbedTextJobConfig
from pipeline.text.encoder import TextEncoder
from pipeline.text.job import run
real, calls = TextEncoder.encode, []
def encode(self, captions):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)
    return real(self, captions)
TextEncoder.encode = encode
run(load_config(EmbedTextJobConfig, [sys.argv[1]]))
"""


@pytest.mark.slow
def test_a_killed_process_is_succeeded_at_once(config: EmbedTextJobConfig, latents: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config.model_dump_json())
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.json")]
    killed = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, check=False, timeout=300)
    assert killed.returncode == -9, killed.stderr
    assert job.run(config).counts["clip.embedded"] == len(DISTINCT) - 16
    assert_whole(f"{latents}/text/clip", DISTINCT)


def test_a_caption_gets_the_same_bytes_in_whatever_order_it_comes(folder: Path, tmp_path: Path) -> None:
    captions = sorted(DISTINCT)
    uris = [
        make_latents(tmp_path / "forward", [captions]),
        make_latents(tmp_path / "backward", [captions[9::-1], captions[:8:-1]]),
    ]
    for uri, unit in zip(uris, (8, 5), strict=True):
        job.run(job_config(uri, [{"name": "clip", "path": folder / "clip"}], unit_captions=unit))
    forward, backward = (
        dict(zip(r["caption"].to_pylist(), r["embedding"].to_pylist(), strict=True))
        for r in (rows_of(f"{uri}/text/clip") for uri in uris)
    )
    assert forward == backward


def test_compaction_moves_rows_and_changes_no_answer(config: EmbedTextJobConfig, latents: str) -> None:
    job.run(config)
    uri = f"{latents}/text/clip"
    captions = sorted(DISTINCT)
    before = TextEmbeddings.open(uri)
    want = before.lookup(captions)
    assert compact(uri, shard_bytes=1 << 20, row_group_bytes=2048).shards_written == 1
    after = TextEmbeddings.open(uri)
    for got in (before.lookup(captions), after.lookup(captions)):
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    assert after.digest == before.digest
    assert_whole(uri, DISTINCT)
    assert job.run(config).status == "unchanged"


@pytest.mark.parametrize(
    ("change", "field"), [({"path": "other"}, "encoder.weights_sha256"), ({"max_length": 8}, "max_length")]
)
def test_another_encoder_under_the_same_name_is_refused(
    folder: Path, config: EmbedTextJobConfig, latents: str, change: dict[str, Any], field: str
) -> None:
    job.run(config)
    before = objects(latents)
    setting = {"name": "clip", "path": folder / "clip", **change}
    if "path" in change:
        setting["path"] = folder / change["path"]
    second = job_config(latents, [{"name": "new", "path": folder / "clip"}, setting])
    for call in (job.run, job.dry_run):
        with pytest.raises(ConflictError, match=field):
            call(second)
    # Not even the first of the two has left anything.
    assert objects(latents) == before


def test_a_run_that_was_taken_over_stops(config: EmbedTextJobConfig, latents: str, monkeypatch: Any) -> None:
    real = TextEncoder.encode

    def overtaken(self: TextEncoder, captions: Sequence[str]) -> Any:
        monkeypatch.setattr(TextEncoder, "encode", real)
        claim(Root(f"{latents}/text/clip")).close({"status": "done"})
        return real(self, captions)

    monkeypatch.setattr(TextEncoder, "encode", overtaken)
    with pytest.raises(ConflictError, match="Another run has taken over"):
        job.run(config)
    job.run(config)
    assert_whole(f"{latents}/text/clip", DISTINCT)


def test_a_dry_run_counts_and_writes_nothing(config: EmbedTextJobConfig, latents: str) -> None:
    before = objects(latents)
    result = job.dry_run(config)
    assert (result.status, result.counts) == ("dry-run", {"clip.new": len(DISTINCT)})
    assert result.figures == {"clip.bytes_at_most": 2.0 * len(DISTINCT) * 16 * 32}
    assert objects(latents) == before
    job.run(config)
    assert job.dry_run(config).counts == {"clip.new": 0}


def test_there_must_be_latents_and_a_place_to_write(config: EmbedTextJobConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no dataset"):
        job.run(config.model_copy(update={"data": config.data.model_copy(update={"uri": str(tmp_path / "no")})}))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="output"):
        job.run(
            config.model_copy(update={"output": config.output.model_copy(update={"uri": str(tmp_path / "file")})})
        )


@pytest.mark.slow
def test_the_command_line_records_a_run_with_its_parents(folder: Path, latents: str, tmp_path: Path) -> None:
    arguments = [
        f"data.uri={latents}",
        f"encoders=[{{name: clip, path: {folder / 'clip'}}}]",
        f"output.uri={tmp_path / 'elsewhere'}",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        f"tracking.journal_dir={tmp_path}/journal",
        "device=cpu",
    ]
    code, answer, errors = run_job("embed_text", *arguments, cwd=tmp_path)
    assert (code, answer.get("status")) == (0, "done"), errors
    assert answer["outputs"] == {"clip": str(tmp_path / "elsewhere" / "clip")}
    assert answer["mlflow_run_id"]
    assert_whole(str(tmp_path / "elsewhere" / "clip"), DISTINCT)
    code, again, errors = run_job("embed_text", *arguments, cwd=tmp_path)
    assert (code, again["status"], again["mlflow_run_id"]) == (0, "unchanged", answer["mlflow_run_id"]), errors
