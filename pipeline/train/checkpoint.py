"""Sharded checkpoints on any store, complete only when their marker is there, and safe to read.

    tensors --DCP--> <staging>/<name>/rank-k/*.safetensors --upload--> checkpoints/<name>/*.safetensors
            --> receipt-k.json (sha256, size of each file)  --all ranks--> COMPLETE.json (meta, all receipts)
    reports --rank 0--> history.jsonl, before the marker (see `retention`), as is whatever else was told till then

torch.distributed.checkpoint decides which rank writes what and re-cuts shards for another world size; its
usual `.metadata` file is a pickle, so its safetensors storage is used, whose index is the files' own headers.
Meta and marker are JSON. Nothing read here can execute code, and only files named by the marker, of the size
and sha256 it records, are read. A name tells the start that writes it (see `retention`), images and a random token:
no start writes over another's files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from pipeline.errors import ConflictError, InputError
from pipeline.model.checkpoints import MARKER as MARKER
from pipeline.model.checkpoints import fetch_checked, list_complete, local_copy
from pipeline.storage.root import Root
from pipeline.train import collectives
from pipeline.train.retention import COUNT, History, WorkerStart, begin, counting, mark_complete, prune

_FILE_BYTES = 1 << 30
_log = logging.getLogger(__name__)


class CheckpointStore:
    """Saves and loads the checkpoints below one root; every method is called by all ranks together.

    staging: a local directory, one per node. keep_last: newest checkpoints kept; keep_every_images: besides
    those, the first checkpoint at or after each multiple is kept for good. generation, listed: of the job's start,
    and the checkpoints that it began with; superseded: whether a newer one is there. history: of which rank 0 keeps
    the records with each checkpoint, and which it takes up again with the one that the run goes on from.
    before_complete: called by rank 0, off its training thread, before a checkpoint counts: returns when all that was
    told up to its step is written elsewhere, too.
    """

    def __init__(
        self,
        root: Root,
        staging: Path,
        *,
        keep_last: int = 2,
        keep_every_images: int | None = None,
        node_leader: bool = True,
        receipts_timeout_s: float = 1800.0,
        generation: int = 0,
        listed: Sequence[str] | None = None,
        superseded: Callable[[], bool] = lambda: False,
        history: History | None = None,
        before_complete: Callable[[], None] = lambda: None,
    ) -> None:
        self.root, self.staging, self.history = root, staging, history
        self.before_complete = before_complete
        self.keep_last, self.keep_every_images = keep_last, keep_every_images
        self.node_leader, self.receipts_timeout_s = node_leader, receipts_timeout_s
        self.superseded = superseded
        mine = asdict(begin(root, generation, listed)) if collectives.rank() == 0 else None
        start, self.token = collectives.broadcast_json([mine, secrets.token_hex(4)])
        self.start = WorkerStart(start["generation"], start["attempt"], tuple(start["began_with"]))
        self.resumed: int | None = None  # at how many images this start began
        # When the newest checkpoint of this start was complete (rank 0 only); until there is one, when it started.
        self.completed_at = time.time()
        self._thread: threading.Thread | None = None
        self._failure: list[BaseException] = []

    # -- saving --------------------------------------------------------------------------------------------

    def save(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Write the tensors to local staging now; hash, upload and mark complete behind the caller's back.

        The caller may change tensors and meta once this returns. An error of the save before is raised here.
        """
        self.wait()
        name = self.start.name(int(meta["images"]), self.token)
        mine = self.staging / name / f"rank-{collectives.rank():05d}"
        # The number, from 1, of each tensor's file: files of about a GiB, which a store takes in one put.
        number, used, file_of = 1, 0, {}
        for tensor_name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            if used and used + size > _FILE_BYTES:
                number, used = number + 1, 0
            file_of[tensor_name], used = number, used + size
        writer = HuggingFaceStorageWriter(str(mine), fqn_to_index_mapping=file_of, save_distributed=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp_save(dict(tensors), storage_writer=writer, no_dist=not collectives.is_distributed())
        # As it is now: the caller goes on changing it while the thread below works.
        frozen = json.loads(json.dumps(meta))
        records = self.history.cut(name) if self.history is not None and collectives.rank() == 0 else None
        args = (name, mine, frozen, records, collectives.rank(), collectives.world_size())
        self._thread = threading.Thread(target=self._publish, args=args, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the save in flight, if any, is finished on this rank; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure:
            raise self._failure.pop()

    def _publish(
        self,
        name: str,
        mine: Path,
        meta: Mapping[str, Any],
        records: tuple[dict[str, bytes], int] | None,
        rank: int,
        world_size: int,
    ) -> None:
        try:
            files = {}
            for path in sorted(mine.glob("*.safetensors")):
                data = path.read_bytes()
                files[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                self.root.put(f"{name}/{path.name}", data)
            self.root.put(f"{name}/receipt-{rank:05d}.json", _to_json({"files": files}))
            shutil.rmtree(mine, ignore_errors=True)
            if rank == 0:
                everything = self._collect_receipts(name, world_size)
                marker = {"meta": meta, "files": everything, "world_size": world_size, "resumed": self.resumed}
                if self.history is not None and records is not None:
                    objects, marker[COUNT] = records
                    self.history.write(objects)
                self.before_complete()
                mark_complete(self.root, name, _to_json(marker))
                self.completed_at = time.time()
                shutil.rmtree(mine.parent, ignore_errors=True)
                self.prune()
        except BaseException as error:  # noqa: BLE001 - handed to the training thread by wait()
            self._failure.append(error)

    def _collect_receipts(self, name: str, world_size: int) -> dict[str, Any]:
        files: dict[str, Any] = {}
        deadline = time.monotonic() + self.receipts_timeout_s
        for rank in range(world_size):
            key, pause_s = f"{name}/receipt-{rank:05d}.json", 0.02
            while not self.root.exists(key):
                if time.monotonic() > deadline:
                    raise InputError(
                        f"The checkpoint {self.root.uri_of(name)} stays incomplete: rank {rank} has not "
                        f"uploaded its part within {self.receipts_timeout_s:g} s",
                        key="checkpoint",
                        rule="every rank uploads its shards to output.uri",
                        next_step="see that every node reaches the store, then run the same command again",
                    )
                time.sleep(pause_s)
                pause_s = min(1.0, pause_s * 1.5)
            files |= json.loads(self.root.read_bytes(key))["files"]
        return files

    # -- retention -----------------------------------------------------------------------------------------

    def prune(self) -> None:
        """Delete what retention no longer keeps, and torn checkpoints older than the newest complete one."""
        prune(
            self.root,
            self.start,
            keep_last=self.keep_last,
            keep_every_images=self.keep_every_images,
            superseded=self.superseded,
        )

    # -- loading -------------------------------------------------------------------------------------------

    def load_newest(
        self,
        tensors: Mapping[str, Tensor],
        check: Callable[[Mapping[str, Any]], None],
        *,
        not_after: int | None = None,
    ) -> Mapping[str, Any] | None:
        """Fill `tensors` in place from the newest intact checkpoint; returns its meta, None when there is none.

        not_after: of those at this count of images or before it. `check` sees the meta first and may refuse it by
        raising. A corrupt checkpoint (a missing, foreign, short or altered file) is skipped with a warning for the
        one before it. Any world size may load.
        """
        candidates: list[dict[str, Any]] = collectives.broadcast_json(
            [
                {"name": c.name, "marker": dict(c.marker)}
                for c in reversed(counting(self.root, self.start))
                if not_after is None or c.images <= not_after
            ]
            if collectives.rank() == 0
            else None
        )
        for candidate in candidates:
            name, marker = candidate["name"], candidate["marker"]
            check(marker["meta"])
            # One rank of each node fetches, for all of them.
            staged, problem = self.staging / "restore", None
            if self.node_leader:
                local, problem = fetch_checked(self.root, name, marker["files"], staged)
            else:
                local = local_copy(self.root, name, staged)
            problems = [p for p in collectives.gather_json(problem) if p is not None]
            if problems:
                if collectives.rank() == 0:
                    _log.warning("checkpoint %s is corrupt and skipped: %s", self.root.uri_of(name), problems[0])
                continue
            self._read(tensors, local)
            meta: Mapping[str, Any] = marker["meta"]
            if self.resumed is None:  # going back in a run that diverges takes nothing out of its history
                self.resumed = int(meta["images"])
                if self.history is not None and collectives.rank() == 0:
                    self.history.go_on(name, marker)
            return meta
        # No checkpoint at all: a first start, or one whose checkpoints were removed while it began.
        lost = None
        if self.resumed is None and collectives.rank() == 0:
            lost = bool(set(self.start.began_with) - {c.name for c in list_complete(self.root)})
        if self.resumed is None and collectives.broadcast_json(lost):
            raise ConflictError(
                f"The checkpoints that this start began with are gone from {self.root.uri}",
                key="output.uri",
                value=self.root.uri,
                rule="an earlier start may remove checkpoints until it finds that it was superseded",
                next_step="run the same command again: it looks for the newest one anew",
            )
        self.resumed = 0 if self.resumed is None else self.resumed
        return None

    def _read(self, tensors: Mapping[str, Tensor], local: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp_load(
                dict(tensors),
                storage_reader=HuggingFaceStorageReader(str(local)),
                no_dist=not collectives.is_distributed(),
            )
        collectives.barrier()
        if self.node_leader and local.is_relative_to(self.staging):
            shutil.rmtree(local)


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()
