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

from pipeline.diffusion.draw import Embedding
from pipeline.sample.text import TextSpec
from pipeline.store.schema import pack_latents, to_float32
from pipeline.text.encoder import Encoded, TextEncoder, load_encoder
from pipeline.text.files import encoder_files

BATCH = 8
CACHE_BYTES = 1 << 30
SD3_LENGTH = 256  # tokens that stand for a T5 which a pipeline leaves out


class PromptEmbedder:
    """The encoders of one model, loaded; `embedded` counts the prompts that went through them."""

    def __init__(self, spec: TextSpec, *, device: str = "cpu", cache_bytes: int = CACHE_BYTES) -> None:
        self._spec, self._cache_bytes, self.embedded = spec, cache_bytes, 0
        self._encoders: list[TextEncoder] = [
            load_encoder(
                encoder_files(encoder), encoder, batch_size=BATCH, device=device, attend_padding=not spec.masked
            )
            for encoder in spec.encoders
        ]
        self._cache: OrderedDict[str, Embedding] = OrderedDict()
        self._held_bytes = 0

    def __call__(self, prompts: Sequence[str]) -> dict[str, Embedding]:
        """Each of `prompts` with its embedding."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        found = {prompt: self._cache[prompt] for prompt in prompts if prompt in self._cache}
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            self.embedded += len(part)
            found |= zip(part, self._embed(part), strict=True)
        for prompt, embedding in found.items():
            self._keep(prompt, embedding)
        return found

    def _keep(self, prompt: str, embedding: Embedding) -> None:
        if prompt not in self._cache:
            self._cache[prompt] = embedding
            self._held_bytes += embedding.size_bytes
        self._cache.move_to_end(prompt)
        while self._held_bytes > self._cache_bytes and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._held_bytes -= oldest.size_bytes

    def _embed(self, prompts: Sequence[str]) -> list[Embedding]:
        outputs = [encoder.encode(prompts) for encoder in self._encoders]
        if self._spec.arrangement == "sd3":
            return [self._sd3([_row(o, i) for o in outputs]) for i in range(len(prompts))]
        stored = _as_stored(outputs[0].embeddings_NLD, self._spec)
        length = np.arange(stored.shape[1])
        return [
            Embedding(stored[i], (length < outputs[0].tokens[i]) if self._spec.masked else None, None)
            for i in range(len(prompts))
        ]

    def _sd3(self, rows: Sequence[Embedding]) -> Embedding:
        """Two CLIPs side by side, widened with zeros, then T5's tokens (zeros where there is no T5)."""
        clips = np.concatenate([row.text_LD for row in rows[:2]], axis=1)
        wide = np.pad(clips, ((0, 0), (0, self._spec.width - clips.shape[1])))
        third = rows[2].text_LD if len(rows) > 2 else np.zeros((SD3_LENGTH, self._spec.width), np.float32)
        pooled = np.concatenate([row.pooled_P for row in rows[:2] if row.pooled_P is not None])
        return Embedding(np.concatenate([wide, third]), None, pooled)


def _row(output: Encoded, index: int) -> Embedding:
    pooled = None if output.pooled_NP is None else output.pooled_NP[index]
    return Embedding(output.embeddings_NLD[index], None, pooled)


def _as_stored(embeddings_NLD: npt.NDArray[np.float32], spec: TextSpec) -> npt.NDArray[np.float32]:
    """Embeddings at the precision the model saw while it learned; a published model saw them as they are."""
    if not spec.masked:
        return embeddings_NLD
    dtype = spec.encoders[0].embedding_dtype
    packed = b"".join(pack_latents(embeddings_NLD, dtype))
    return to_float32(np.frombuffer(packed, np.uint8), dtype).reshape(embeddings_NLD.shape)
