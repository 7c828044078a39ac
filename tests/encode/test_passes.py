"""What the passes of the encode job decide, without Ray: what is left, what fits, what travels, what is shown."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray
from ray import cloudpickle

from pipeline.config import load_config
from pipeline.dataflow.passes import UnitSource
from pipeline.encode import passes
from pipeline.encode.config import EncodeJobConfig
from pipeline.encode.passes import ProgressPoints, Shares, left_out_page
from pipeline.encode.plan import known_entries, planned_rows
from pipeline.encode.stages import UnitReader
from pipeline.media import inline_bytes
from pipeline.source.config import FolderSource
from pipeline.storage.root import Root
from pipeline.store.ledger.rowset import MAX_ROWS, RowSet
from pipeline.store.ledger.state import State, read_state
from pipeline.store.plan import DiffReport, EntrySpan, Work, append_version, read_plan
from pipeline.tracking.tracker import Tracker
from tests.support.rows import Listed, planned_root


def test_rows_planned_leave_out_those_whose_source_changed(tmp_path: Path) -> None:
    root = planned_root(str(tmp_path / "data"), units=2, rows=3)
    assert planned_rows(read_state(root)) == 6
    changed = DiffReport(retired=[(0, 1, 2)])
    append_version(read_plan(root), [[Listed("0000/0001")]], report=changed, source={}, generation=0)
    assert planned_rows(read_state(root)) == 6
    tar = [Listed("a.tar", row_stop=None)]
    append_version(read_plan(root), [tar], source={}, generation=0)
    assert planned_rows(read_state(root)) is None
    append_version(read_plan(root), [], report=DiffReport(retired=[(3, 0, MAX_ROWS)]), source={}, generation=0)
    assert planned_rows(read_state(root)) == 6


def test_a_plan_helps_to_list_sources_of_its_own_kind_alone(tmp_path: Path) -> None:
    root = Root(str(tmp_path / "data"))
    first = [[Listed("a.parquet", row_stop=9)], [Listed("b.parquet", row_stop=9)]]
    append_version(read_plan(root), first, source={"kind": "parquet"}, generation=0)
    again = DiffReport(retired=[(0, 0, 9)])
    append_version(read_plan(root), [[Listed("c.parquet")]], report=again, source={"kind": "parquet"}, generation=0)
    assert [e.key for e in known_entries(root, "parquet")] == ["b.parquet", "c.parquet"]
    # Files that were taken for images by mistake have one row each: they are looked into when the mistake is mended.
    assert list(known_entries(root, "folder")) == []


def test_a_read_task_carries_its_own_unit_alone() -> None:
    def size(units: int) -> int:
        spans = {u: EntrySpan(f"plan/parts/{u:064x}.parquet", u, 1) for u in range(units)}
        work = [Work(u, ((0, 5),)) for u in range(units)]
        reader = UnitReader(Root("memory://anywhere"), FolderSource(uri="x"), spans)
        tasks = UnitSource("Read", work, reader.of, 1000).get_read_tasks(1)
        assert len(tasks) == units
        return len(cloudpickle.dumps(tasks[-1]))

    assert size(2000) < size(1) + 100


def test_the_busiest_stage_is_the_one_with_the_largest_share(monkeypatch: pytest.MonkeyPatch) -> None:
    gauges: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, **options: Any) -> None:
            assert name == "latentloom_encode_busy_share"

        def set(self, value: float, tags: dict[str, str]) -> None:
            gauges[tags["stage"]] = value

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    shares = Shares({"read": 4.0, "decode": 2.0, "device": 1.0, "write": 4.0})
    assert shares({}, 5.0) == {"rejected": 0}  # nothing has begun
    assert shares({"rejected": 1.0, "read_s": 1.0}, 100.0) == {"rejected": 1}
    assert shares({"rejected": 1.0, "filtered": 6.0, "read_s": 1.0}, 101.0) == {"rejected": 1, "filtered": 6}
    assert shares({"read_s": 2.0}, 105.0) == {"rejected": 0}  # half a window
    totals = {"read_s": 10.0, "decode_s": 5.0, "device_s": 9.0, "write_s": 0.0}
    # 10 seconds, from nothing: 10 of 4x10 CPU seconds, 5 of 2x10, 9 of 10.
    assert shares(totals, 110.0) == {"rejected": 0, "busy": "read 25% decode 25% device 90% write 0%"}
    assert gauges == {"read": 0.25, "decode": 0.25, "device": 0.9, "write": 0.0}
    later = {**totals, "device_s": 10.0, "write_s": 100.0}
    # Since then: 1 device second of 10; more writing than there are writers is shown as all of them.
    assert shares(later, 120.0)["busy"] == "read 0% decode 0% device 10% write 100%"


def test_progress_has_many_points_however_short_or_long_a_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(passes.time, "monotonic", lambda: now[0])
    told: list[tuple[int, float]] = []
    tracker = SimpleNamespace(log_metrics=lambda figures, step: told.append((step, figures["progress/images_per_s"])))

    def run(seconds: float) -> list[tuple[int, float]]:
        told.clear()
        points, began = ProgressPoints(cast(Tracker, tracker), 500), now[0]
        while now[0] < began + seconds:
            now[0] += 0.5
            points({"rows": 10 * (now[0] - began)})
        points({"rows": 10 * seconds}, last=True)
        return list(told)

    short = run(20)
    assert len(short) == 20
    assert [step for step, _ in short] == [500 + 10 * at for at in range(1, 21)]  # with those of earlier runs
    assert {rate for _, rate in short} == {10.0}
    assert 200 < len(run(12 * 3600)) < 1200
    assert run(0.4) == [(504, 8.0)]  # the end is told, however soon it comes
    points = ProgressPoints(cast(Tracker, tracker), 0)
    told.clear()
    points({}, last=True)
    assert told == []


def test_what_was_left_out_is_shown_by_reason_with_its_pictures() -> None:
    picture = inline_bytes(np.full((8, 16, 3), 200, np.uint8))[0]
    state = SimpleNamespace(
        rejects={"corrupt": RowSet.from_triples([(0, 0, 7)])},
        filtered={"too_small": RowSet.from_triples([(1, 0, 9)])},
    )
    examples = {
        "too_small": [("<b>small</b>.png", "8 pixels", picture)],
        "corrupt": [("bad.png", "the png header cannot be read", None)],
    }
    page = left_out_page("s3://bucket/latents", cast(State, state), examples)
    assert page.index("too_small") < page.index("corrupt")
    for told in ("9 source rows, filtered", "7 source rows, rejected", "&lt;b&gt;small", "the png header"):
        assert told in page, told
    assert page.count("<img") == 1
    assert base64.b64encode(picture).decode() in page


Nodes = tuple[dict[str, float], ...]
BIG: Nodes = ({"CPU": 64.0, "GPU": 8.0},) * 2


@pytest.mark.parametrize(
    ("nodes", "overrides", "actors", "num_cpus", "threads", "decode_threads"),
    [
        (({"CPU": 2.0},), (), 2, 0.75, 1, 2),
        (({"CPU": 4.0},), ("encode.actors=1",), 1, 1.0, 1, 2),
        (BIG, (), 16, 7.2, 1, 7),  # nine tenths of a node, for each of its eight GPUs
        (BIG, ("encode.num_gpus=0.5",), 32, 3.6, 1, 4),
        (BIG, ("encode.actors=2",), 2, 28.8, 1, 29),  # both may be on one node
        (BIG, ("encode.num_gpus=2",), 8, 14.4, 1, 14),
        (BIG, ("encode.decode=tasks",), 16, 1.0, 1, 2),
        (({"CPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}), (), 1, 14.4, 1, 14),  # nothing of the node without a GPU
        (BIG, ("encode.num_cpus=3", "encode.decode_threads=5", "encode.threads_per_actor=2"), 16, 3.0, 2, 5),
    ],
)
def test_an_actor_takes_its_share_of_its_nodes_cpus(
    monkeypatch: pytest.MonkeyPatch,
    nodes: Nodes,
    overrides: tuple[str, ...],
    actors: int,
    num_cpus: float,
    threads: int,
    decode_threads: int,
) -> None:
    together = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    monkeypatch.setattr(ray, "cluster_resources", lambda: together)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": node, "Alive": True} for node in nodes])
    required = ["source.kind=folder", "source.uri=i", "codec.path=c", "output.uri=o"]
    found = passes._resources(load_config(EncodeJobConfig, [], [*required, *overrides]))
    assert (found.actors, found.threads, found.decode_threads) == (actors, threads, decode_threads)
    assert found.num_cpus == pytest.approx(num_cpus, abs=1e-3)
