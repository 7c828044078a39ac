"""Reports beside the step: in order, bounded, and in the store before the checkpoint of their step counts."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.media import encode_image
from pipeline.model.checkpoints import list_complete
from pipeline.storage.root import Root
from pipeline.store.read.dataset import LatentDataset
from pipeline.tracking.tracker import NoopTracker
from pipeline.train import worker
from pipeline.train.checkpoint import CheckpointStore
from pipeline.train.checks import handshake
from pipeline.train.retention import History, read_records
from pipeline.train.start import Start
from pipeline.train.worker import BackgroundQueue, Reporter, WorkerContext, read_quarantine, run_worker
from tests.support.training import new_start
from tests.train.dataset import make_dataset
from tests.train.helpers import new_run
from tests.train.job_config import job_config


def test_pieces_are_done_in_order_while_others_are_handed_in() -> None:
    done: list[int] = []
    background = BackgroundQueue("test")
    for number in range(100):
        background.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    background.flush()
    assert done == list(range(100))
    background.submit(lambda: done.append(100))
    background.close()
    assert done[-1] == 100, "what is left is done when it is closed"


def test_handing_in_waits_for_nothing_but_a_full_queue() -> None:
    go_on, handed_in = threading.Event(), threading.Event()
    background = BackgroundQueue("test", max_waiting=2)
    for _ in range(2):
        background.submit(go_on.wait)  # type: ignore[arg-type]

    def one_more() -> None:
        background.submit(lambda: None)
        handed_in.set()

    thread = threading.Thread(target=one_more)
    thread.start()
    assert not handed_in.wait(0.2)
    go_on.set()
    assert handed_in.wait(10)
    thread.join()
    background.close()


def test_an_error_is_raised_at_the_next_piece_and_wherever_it_is_waited_for() -> None:
    done: list[str] = []
    background = BackgroundQueue("test")

    def fails() -> None:
        raise OSError("no space left")

    background.submit(fails)
    with pytest.raises(OSError, match="no space left"):
        background.flush()
    with pytest.raises(OSError, match="no space left"):
        background.submit(lambda: done.append("after"))
    background.close()
    assert not done


class Told:
    """A reporter whose way out is held up."""

    def __init__(self, path: Path) -> None:
        self.root, self.go_on = Root(str(path / "run")), threading.Event()
        self.background, self.history = BackgroundQueue("test"), History(self.root)
        self.state, _, _ = new_run(path / "model")
        self.store = CheckpointStore(
            self.root.child("checkpoints"),
            path / "staging",
            history=self.history,
            before_complete=self.background.flush,
        )
        self.reporter = Reporter(self.root, self.history, NoopTracker(), self.store, self.background, self._publish)
        self.published: list[float] = []

    def _publish(self, figures: Any) -> None:
        self.go_on.wait()
        self.published.append(figures["images"])

    def save(self) -> None:
        self.state.images += 64
        self.store.save(self.state.tensors(), self.state.meta())


def test_a_checkpoint_counts_when_all_that_was_told_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Told(tmp_path)
    run.reporter.log({"step": 1, "images": 64, "loss": 0.5})
    skipped = {"step": 1, "images": 64, "loss": 1.0, "grad_norm": 2.0, "sample_ids": ["00" * 16], "dataset": 0}
    run.reporter.skip(skipped)
    picture, told = encode_image(np.zeros((8, 8, 3), np.uint8), {}), []
    monkeypatch.setattr(NoopTracker, "log_image", lambda self, *given: told.append(given))
    run.reporter.show(run.state, picture)
    run.save()  # returns, though what was told is not out
    assert run.store._thread is not None
    run.store._thread.join(1.0)
    assert not read_records(run.root)
    assert len(read_quarantine(run.root)) == 0
    run.go_on.set()
    run.store.wait()
    assert [record["step"] for record in read_records(run.root)] == [1]
    assert read_quarantine(run.root)["step"].to_pylist() == [1]
    assert run.published == [64]
    assert run.root.read_bytes("grids/000000000000.png") == picture
    ((png, small, key, step),) = told
    assert (png, key, step) == (picture, "grid", 0)  # as it was when it was shown
    assert Image.open(io.BytesIO(small)).format == "WEBP"
    run.background.close()


def test_a_report_that_cannot_be_written_leaves_its_checkpoint_incomplete_and_ends_the_run(tmp_path: Path) -> None:
    run = Told(tmp_path)

    def fails(_figures: Any) -> None:
        raise OSError("no space left")

    run.reporter.publish = fails
    run.reporter.log({"step": 1, "images": 64})
    run.save()
    with pytest.raises(OSError, match="no space left"):
        run.store.wait()
    assert not list_complete(run.root.child("checkpoints"))
    run.background.close()


@pytest.mark.integration
def test_a_rank_tells_off_its_training_thread_and_everything_before_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, images = set(), []

    def publish(figures: Any) -> None:
        threads.add(threading.current_thread())
        images.append(figures["images"])

    closed = []
    monkeypatch.setattr(worker.BackgroundQueue, "close", lambda self: closed.append(self) or CLOSE(self))  # type: ignore[func-returns-value]
    config = job_config(tmp_path, make_dataset(tmp_path / "latents"), {"train": {"images": 256}})
    facts = handshake(Start(config), LatentDataset.open(config.data.uri))
    place = WorkerContext(
        "cpu", new_start(Root(config.output.uri)), None, facts, True, tmp_path / "scratch", publish=publish
    )
    run_worker(config, place)
    assert threading.main_thread() not in threads
    assert images == [record["images"] for record in read_records(Root(config.output.uri))]
    assert closed


CLOSE = BackgroundQueue.close
