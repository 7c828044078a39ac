"""What the passes of the encode job decide, without Ray: what is left, what fits, what travels, what is shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle

from pipeline.encode.passes import Shares, _Passes
from pipeline.encode.planning import known_entries, planned_rows
from pipeline.encode.stages import UnitReader
from pipeline.errors import ConfigError, StoppedError
from pipeline.graph import Kind, UnitSource, check_nodes
from pipeline.source.config import FolderSource
from pipeline.storage import Root
from pipeline.store.plan import EntrySpan, append_version, read_plan
from pipeline.store.plan_diff import DiffReport
from pipeline.store.rowset import MAX_ROWS, RowSet
from pipeline.store.state import State, read_state
from pipeline.store.work import Work
from tests.support.rows import Listed, claim, committer, latent_rows, planned_root, rejected_rows


class Passes(_Passes):
    """Passes whose executions commit what the test plans for each of them, and may die of it."""

    deaths = True

    def __init__(self, root: Root, generation: Any, executions: list[list[tuple[int, int]]]) -> None:
        self.root, self.generation, self.executions = root, generation, executions
        self.config: Any = SimpleNamespace(encode=SimpleNamespace(units_per_execution=100, crash_limit=2))
        self.asked: list[set[tuple[int, int]]] = []

    def _once(self, work: list[Work], state: State) -> Exception | None:
        asked = {(w.unit, row) for w in work for start, stop in w.ranges for row in range(start, stop or start)}
        self.asked.append(asked)
        rows = self.executions.pop(0) if self.executions else []
        if rows:
            committer(self.root, self.generation).commit(latent_rows(rows), None, {})
        return RuntimeError("planted: workers died") if self.deaths and not set(rows) >= asked else None

    def _judge(self, failures: list[Exception]) -> None:
        return None


def rejected_root(path: Path) -> tuple[Root, RowSet]:
    """Two units of three rows, three of which an earlier generation has rejected."""
    root = planned_root(str(path / "data"), units=2, rows=3)
    bad = [(0, 0), (0, 1), (1, 2)]
    writer = committer(root, claim(root))
    writer.commit(latent_rows([(0, 2), (1, 0), (1, 1)]), rejected_rows(bad, "truncated"), {})
    return root, read_state(root).retryable(["truncated"])


def test_rejects_to_retry_stay_open_until_this_run_has_settled_them(tmp_path: Path) -> None:
    root, retry = rejected_root(tmp_path)
    passes = Passes(root, claim(root), [[(0, 0)], [(0, 1), (1, 2)]])
    state = passes._settle(*passes._look(retry), retry)
    assert passes.asked == [{(0, 0), (0, 1), (1, 2)}, {(0, 1), (1, 2)}]
    assert (state.num_stored, state.num_rejected) == (6, 0)


def test_rejects_that_a_source_no_longer_yields_stay_what_they_were(tmp_path: Path) -> None:
    """A tar that is gone gives no row to try again: the run that has asked for it ends all the same."""
    root, retry = rejected_root(tmp_path)
    passes = Passes(root, claim(root), [[(0, 0)]])
    passes.deaths = False
    state = passes._settle(*passes._look(retry), retry)
    assert len(passes.asked) == 1
    assert (state.num_stored, state.num_rejected) == (4, 2)


def test_rejects_that_cannot_be_retried_stop_the_run(tmp_path: Path) -> None:
    root, retry = rejected_root(tmp_path)
    passes = Passes(root, claim(root), [[(0, 0)]])
    with pytest.raises(StoppedError, match="without progress; 2 rows are left"):
        passes._settle(*passes._look(retry), retry)
    assert read_state(root).num_rejected == 2


def test_rows_whose_source_has_changed_since_it_was_listed_stay_open(tmp_path: Path) -> None:
    """Nobody dies, and no row comes: the next run lists anew, so this one ends and says so."""
    root = planned_root(str(tmp_path / "data"), units=1, rows=2)
    passes = Passes(root, claim(root), [[(0, 0)]])
    passes.deaths = False
    with pytest.raises(StoppedError, match="The source has changed; 1 rows are left"):
        passes._settle(*passes._look(RowSet.empty()), RowSet.empty())
    assert read_state(root).gaps().triples() == [[0, 1, 2]]


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


def test_processes_that_fit_no_node_are_refused() -> None:
    nodes = [{"CPU": 64.0}, {"CPU": 4.0, "GPU": 1.0}]
    check_nodes([Kind("actor", 4.0, 1.0), Kind("decode", 64.0)], nodes, "encode")
    # Enough of both in the cluster, and on no node.
    with pytest.raises(ConfigError, match=r"No node has room for actor, which takes 6 CPUs and 1 GPUs") as caught:
        check_nodes([Kind("actor", 6.0, 1.0)], nodes, "encode")
    assert "64 CPUs and 0 GPUs" in str(caught.value)
    with pytest.raises(ConfigError, match="it would wait for ever"):
        check_nodes([Kind("actor", 1.0, 1.0)], [{"CPU": 64.0}], "encode")
    with pytest.raises(ConfigError, match="offer nothing"):
        check_nodes([Kind("read", 0.25)], [], "encode")


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
    assert shares({"read_s": 2.0}, 105.0) == {"rejected": 0}  # half a window
    totals = {"read_s": 10.0, "decode_s": 5.0, "device_s": 9.0, "write_s": 0.0}
    # 10 seconds, from nothing: 10 of 4x10 CPU seconds, 5 of 2x10, 9 of 10.
    assert shares(totals, 110.0) == {"rejected": 0, "busy": "read 25% decode 25% device 90% write 0%"}
    assert gauges == {"read": 0.25, "decode": 0.25, "device": 0.9, "write": 0.0}
    later = {**totals, "device_s": 10.0, "write_s": 100.0}
    # Since then: 1 device second of 10; more writing than there are writers is shown as all of them.
    assert shares(later, 120.0)["busy"] == "read 0% decode 0% device 10% write 100%"
