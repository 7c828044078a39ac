"""Where tensors begin: latents as batches for a training loop, models that draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.config import validate
from pipeline.diffusion.objectives import Objective, TimestepDensity
from pipeline.diffusion.rng import ids_from_words
from pipeline.errors import ConflictError, InputError, argument_keys
from pipeline.model.info import ModelInfo
from pipeline.model.load import load_model as load_network
from pipeline.sample.config import SampleJobConfig
from pipeline.sample.denoise import Denoiser, LatentDecoder
from pipeline.sample.prepare import SamplingInputs, on_device, prepare
from pipeline.store.read.dataset import LatentDataset
from pipeline.stream.loader import LatentStream
from pipeline.text.encoder import PromptEmbedder
from pipeline.train.inputs import Served, latent_scale
from pipeline.train.task import Task, stored_values

from .latents import Latents

# -- Batches ---------------------------------------------------------------------------------------------------


class LatentBatches(IterableDataset[dict[str, Any]]):
    """A rank's share of each batch, epoch after epoch, in an order that is a function of seed and position alone.

    A batch is a dict: latents float32 [b, c, h, w], normalised per channel as in training (of stored posteriors one
    draw per sample and epoch), or raw; labels int64 [b], -1 for none; ids int64 [b, 2], the samples'; step and epoch,
    ints; bucket, "HxW" in pixels; captions, b strings, where asked for. All of a batch have one bucket.

    An iteration is one epoch: the rest of the one it stands in; the next iteration is the next epoch. A row comes at
    most once an epoch: the rows of a bucket that do not fill its last batch are left out, other ones in each epoch.
    `len` is the number of batches of an epoch.

    It reads ahead on threads of its own, so a DataLoader needs no worker: DataLoader(batches, batch_size=None). With
    workers each reads all of the rank's rows and gives every n-th batch: the loader's order is the same. Workers that
    live for one epoch begin where this object stands, which does not see theirs: call `set_epoch` before each, or
    use persistent_workers. `state_dict` tells the batches given so far, in a worker (StatefulDataLoader) its own.
    """

    def __init__(self, dataset: LatentDataset, settings: Mapping[str, Any], *, normalised: bool = True) -> None:
        self._dataset, self._settings, self._normalised = dataset, dict(settings), normalised
        with argument_keys({"world_size": "world"}):
            self._stream = LatentStream(dataset, sizes=False, **settings)
        moments = dataset.posterior == "moments"
        mean, std = latent_scale([Served(dataset)], len(dataset.channel_mean) // (2 if moments else 1))
        # Of a training's problem what concerns clean latents; the rest is the caller's.
        self._task = Task(Objective(), TimestepDensity(), mean, std, None, 0.0, int(settings["seed"]), moments)
        self._start = self._step = 0  # where the epoch's iteration began; batches given
        self._worker: tuple[int, int] | None = None  # (number, workers) of the state that was loaded

    @property
    def left_out(self) -> dict[str, int]:
        """By bucket, how many rows of each epoch do not fill a batch."""
        return self._stream.left_out

    def __len__(self) -> int:
        return self._stream.steps_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin the next iteration at the beginning of an epoch, counted from 0."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; it is at least 0")
        self._start = self._step = epoch * len(self)
        self._worker = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if self._worker not in (None, (number, workers)):
            raise ConflictError(
                "The state belongs to another number of DataLoader workers",
                key="num_workers",
                value=workers,
                rule=f"it is that of worker {self._worker[0]} of {self._worker[1]}",
                next_step="resume with the same num_workers",
            )
        if self._worker is None:
            self._start = self._step
        self._worker = None
        end = (self._start // len(self) + 1) * len(self)
        # Every n-th batch, counted from where the epoch began for all workers.
        first = self._step + (self._start + number - self._step) % workers
        batches = self._stream.batches_from(first)
        try:
            for batch in islice(batches, 0, max(0, end - first), workers):
                self._step = batch.step + 1
                ids = ids_from_words(batch.sample_ids)
                raw = stored_values(batch.latents).float()
                labels = torch.full((len(raw),), -1) if batch.labels is None else torch.from_numpy(batch.labels)
                out: dict[str, Any] = {
                    "latents": self._task.clean(raw, ids, batch.epoch) if self._normalised else raw
                }
                out |= {
                    "labels": labels,
                    "ids": ids,
                    "step": batch.step,
                    "epoch": batch.epoch,
                    "bucket": batch.bucket,
                }
                if self._settings["captions"]:
                    out["captions"] = batch.captions or [""] * len(raw)
                yield out
        finally:
            batches.close()  # type: ignore[attr-defined]
        self._step = end

    def state_dict(self) -> dict[str, Any]:
        """From where to go on: JSON values. In a DataLoader's worker it is the worker's own."""
        state = self._stream.state(self._step)
        worker = get_worker_info()
        return state if worker is None else state | {"worker": [worker.id, worker.num_workers, self._start]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: the next iteration gives the rest of its epoch.

        It serves every rank and number of ranks. ConflictError, naming every difference, when it is of other data or
        another seed, batch size or split.
        """
        own = dict(state)
        worker = own.pop("worker", None)
        self._step = self._stream.resume(own)
        self._start, self._worker = self._step, None
        if worker is not None:
            self._worker, self._start = (worker[0], worker[1]), worker[2]

    def __getstate__(self) -> dict[str, Any]:
        # For processes that are not forked: threads and locks stay here, the data are opened again there.
        kept = {name: value for name, value in vars(self).items() if name not in ("_stream", "_dataset", "_task")}
        return kept | {"latents": Latents(self._dataset)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = dict(state)
        dataset = kept.pop("latents").dataset
        self.__init__(dataset, kept["_settings"], normalised=kept["_normalised"])  # type: ignore[misc]
        vars(self).update(kept)


# -- Models ----------------------------------------------------------------------------------------------------


class LoadedModel:
    """A model that draws. info: what is known of it; network: the module, in evaluation mode.

    network(x_BCHW, t_B, labels_B=None, text_BLD=None, text_mask_BL=None) is its prediction: see `pipeline.model`.
    """

    def __init__(self, uri: str, network: nn.Module, info: ModelInfo, *, codec: str | None, device: str) -> None:
        self.uri, self.network, self.info, self.device = uri, network, info, device
        self._codec = codec
        self._decoder: LatentDecoder | None = None

    def sample(
        self,
        *,
        labels: Sequence[int] | None = None,
        prompts: Sequence[str] = (),
        count: int = 1,
        seed: int = 0,
        steps: int = 25,
        guidance: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Images, uint8 [n, h, w, 3] on the CPU: `count` of each label, each prompt or each label with each
        prompt; of neither, `count`.

        They are those that jobs.sample draws with these settings: requests.classes, requests.prompts, requests.count,
        seed, requests.steps, requests.guidance, requests.height and requests.width; on a CPU bit for bit with its
        threads and batch_size, which is here the number of images up to 16. InputError for what the model cannot
        draw, ConflictError for a codec that is another than it was trained with.
        """
        asked = max(1, len(labels or ())) * max(1, len(prompts)) * count
        grid = {"classes": None if labels is None else list(labels), "prompts": list(prompts), "count": count}
        sizes = {"steps": steps, "guidance": guidance, "height": height, "width": width}
        inputs = prepare(
            validate(
                SampleJobConfig,
                {
                    "model": {"uri": self.uri, "ema": self.info.ema, "codec": self._codec},
                    "output": {"uri": "nowhere"},  # nothing is written
                    "requests": {"kind": "grid", **grid, **sizes},
                    "seed": seed,
                    "batch_size": batch_size or min(16, asked),
                    "threads": torch.get_num_threads(),
                },
            )
        )
        return self._drawn(inputs)

    def _drawn(self, inputs: SamplingInputs) -> Tensor:
        draw = on_device(inputs.draw, self.device)
        embed = None if inputs.text is None else PromptEmbedder(inputs.text, device=draw.device)
        requests = inputs.requests.table
        latents = Denoiser(self.network, self.info, draw, embed=embed)(requests)
        if self._decoder is None:
            self._decoder = LatentDecoder(
                inputs.codec_path,
                kind=inputs.codec_kind,
                revision=self.info.codec.revision,
                batch_size=draw.batch_size,
                device=draw.device,
                dtype=draw.dtype,
            )
        self._decoder.batch_size = draw.batch_size
        table = self._decoder(latents)
        reasons = sorted({reason for reason in table["reason"].to_pylist() if reason is not None})
        if reasons:
            raise InputError(
                f"Some images could not be drawn: {', '.join(reasons)}",
                key="model.uri",
                value=self.uri,
                rule="latents are finite numbers that the codec decodes",
                next_step="draw with other settings (guidance, steps), or from another checkpoint",
            )
        height, width = requests["height"][0].as_py(), requests["width"][0].as_py()
        pixels = np.stack([np.frombuffer(one.as_py(), np.uint8) for one in table["pixels"]])
        return torch.from_numpy(pixels.reshape(-1, height, width, 3))


def load_model(uri: str, *, ema: str | None = None, codec: str | None = None, device: str = "auto") -> LoadedModel:
    """The model at `uri`: an export, a checkpoint (or a directory of either: the newest) or a diffusers pipeline.

    ema: which average of a checkpoint's, "raw" for none. codec: where its codec lies now, None where the model says.
    device: cpu, cuda, or auto, which is CUDA where there is some. InputError for what is missing, broken or refused.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    network, info = load_network(uri, ema, device=device)
    return LoadedModel(uri, network, info, codec=codec, device=device)
