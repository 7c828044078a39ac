"""Prompts to what a text model reads, each distinct prompt once. Knows torch and no ray.

One embedder serves all denoisers of a job: it keeps what it has embedded, least recently used out first, so that a
prompt drawn with a thousand seeds is encoded once. Every forward pass has one shape, so that on a CPU an embedding
does not depend on what else was asked.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from pipeline.diffusion.draw import Embedding
from pipeline.sample.prepare import TextSpec
from pipeline.store.schema import pack_latents, to_float32
from pipeline.text.encoder import TextEncoder, load_encoder

BATCH = 8
CACHE_BYTES = 1 << 30
SD3_LENGTH = 256  # tokens that stand for a T5 which a pipeline leaves out


class PromptEmbedder:
    """The encoders of one model, loaded; `embedded` counts the prompts that went through them."""

    def __init__(self, spec: TextSpec, *, device: str = "cpu", cache_bytes: int = CACHE_BYTES) -> None:
        self._spec, self._cache_bytes, self.embedded = spec, cache_bytes, 0
        self._encoders: list[TextEncoder] = [
            load_encoder(files, encoder, batch_size=BATCH, device=device, attend_padding=not spec.masked)
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
        spec, outputs = self._spec, [encoder.encode(prompts) for encoder in self._encoders]
        if spec.arrangement == "sd3":
            # Two CLIPs side by side, widened with zeros, then T5's tokens (zeros where there is no T5).
            clips = np.concatenate([output.embeddings_NLD for output in outputs[:2]], axis=2)
            wide = np.pad(clips, ((0, 0), (0, 0), (0, spec.width - clips.shape[2])))
            third = np.zeros((len(prompts), SD3_LENGTH, spec.width), np.float32)
            if len(outputs) > 2:
                third = outputs[2].embeddings_NLD
            pooled = np.concatenate([o.pooled_NP for o in outputs[:2] if o.pooled_NP is not None], axis=1)
            return [Embedding(np.concatenate([w, t]), None, p) for w, t, p in zip(wide, third, pooled, strict=True)]
        values_NLD = outputs[0].embeddings_NLD
        if not spec.masked:  # a published model saw them as they are
            return [Embedding(values, None, None) for values in values_NLD]
        # At the precision the model saw while it learned.
        dtype = spec.encoders[0].embedding_dtype
        packed = b"".join(pack_latents(values_NLD, dtype))
        stored_NLD = to_float32(np.frombuffer(packed, np.uint8), dtype).reshape(values_NLD.shape)
        length = np.arange(values_NLD.shape[1])
        return [Embedding(stored_NLD[i], length < outputs[0].tokens[i], None) for i in range(len(prompts))]
