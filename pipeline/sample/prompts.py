"""Prompts to what a text model reads, each distinct prompt once. Knows torch and no ray.

One embedder serves all denoisers of a job: it keeps what it has embedded, least recently used out first, so that a
prompt drawn with a thousand seeds is encoded once. Every forward pass has one shape, so that on a CPU an embedding
does not depend on what else was asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.diffusion.samplers import Embedding
from pipeline.sample.prepare import TextSpec
from pipeline.store.schema import pack_latents, to_float32
from pipeline.text.dataset import arrange
from pipeline.text.encoder import TextEncoder, load_encoder

BATCH = 8
CACHE_BYTES = 1 << 30


class PromptEmbedder:
    """The encoders of one model, loaded; `embedded` counts the prompts that went through them."""

    def __init__(self, spec: TextSpec, *, device: str = "cpu", cache_bytes: int = CACHE_BYTES) -> None:
        self._spec, self._cache_bytes, self.embedded = spec, cache_bytes, 0
        self._encoders: list[TextEncoder] = [
            load_encoder(files, encoder, batch_size=BATCH, device=device)
            for files, encoder in zip(spec.files, spec.encoders, strict=True)
        ]
        self._cache: OrderedDict[str, Embedding] = OrderedDict()
        self._held_bytes = 0

    def __call__(self, prompts: Sequence[str]) -> dict[str, Embedding]:
        """Each of `prompts` with its embedding."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        embeddings = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            self.embedded += len(part)
            embeddings |= zip(part, self._embed(part), strict=True)
        for prompt, embedding in embeddings.items():
            if prompt not in self._cache:
                self._cache[prompt] = embedding
                self._held_bytes += embedding.size_bytes
            self._cache.move_to_end(prompt)
            while self._held_bytes > self._cache_bytes and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._held_bytes -= oldest.size_bytes
        return embeddings

    def _embed(self, prompts: Sequence[str]) -> list[Embedding]:
        spec, parts = self._spec, []
        for encoder, loaded in zip(spec.encoders, self._encoders, strict=True):
            output = loaded.encode(prompts)
            values_NLD, pooled_NP = output.embeddings_NLD, output.pooled_NP
            if spec.stored:  # at the precision the model saw while it learned
                values_NLD, dtype = _as_stored(values_NLD, encoder.embedding_dtype), encoder.embedding_dtype
                pooled_NP = None if pooled_NP is None else _as_stored(pooled_NP, dtype)
            mask_NL = np.arange(values_NLD.shape[1]) < output.tokens[:, None]
            if encoder.padding == "masked":
                values_NLD = np.where(mask_NL[:, :, None], values_NLD, np.float32(0))
            parts.append((values_NLD, mask_NL, pooled_NP))
        states_NLD, mask_NL, *pooled = arrange(spec.arrangement, parts, spec.width)
        if spec.zero_empty:
            for values in (states_NLD, *pooled):
                values[[not prompt for prompt in prompts]] = 0
        return [
            Embedding(states_NLD[i], mask_NL[i] if spec.masked else None, pooled[0][i] if pooled else None)
            for i in range(len(prompts))
        ]


def _as_stored(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    packed = b"".join(pack_latents(values, dtype))
    return to_float32(np.frombuffer(packed, np.uint8), dtype).reshape(values.shape)
