"""A text encoder in use: captions in, hidden states out. The only door to transformers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.diffusion.samplers import Embedding
from pipeline.errors import InputError, PipelineError
from pipeline.storage.trust import only_these
from pipeline.store.schema import pack_latents, to_float32
from pipeline.text.config import TextEncoderConfig
from pipeline.text.dataset import arrange
from pipeline.text.files import SPOKEN, EncoderFiles, TextSpec


@dataclass(frozen=True)
class Encoded:
    """What some captions became: the first `tokens[i]` rows of `embeddings[i]` count, the rest is padding."""

    tokens: npt.NDArray[np.int32]  # [n], special tokens included, and padding where it is attended to
    truncated: npt.NDArray[np.bool_]  # [n]
    embeddings_NLD: npt.NDArray[np.float32]
    pooled_NP: npt.NDArray[np.float32] | None


class TextEncoder:
    """A loaded encoder with its tokenizer; every forward pass has the shape [batch_size, max_length].

    Behind an instruction it is longer by what that takes, and no caption without one is in the same pass. The shape
    is fixed so that no kernel is chosen by what else is in a batch: on a CPU a caption's bytes do not depend on its
    neighbours. Padding that is masked stands on the right, so it reaches no true token.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int,
        batch_size: int,
        device: str,
        layer: str | tuple[int, ...],
        pooled: str,
        padding: str,
        prompt: str,
        system: str | None,
        letters: str,
        instruction: str | None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._max_length, self._batch_size, self._device = max_length, batch_size, device
        self._layer, self._pooled, self._padding = layer, pooled, padding
        self._prompt, self._system = prompt, system
        self._letters, self._instruction = letters, instruction

    def encode(self, captions: Sequence[str], *, instructed: bool = True) -> Encoded:
        """Any number of captions, in batches of one shape; the last one is filled with the empty prompt.

        instructed: behind the instruction, where the encoder has one; the empty caption never is.
        """
        if self._letters == "lowered":
            captions = [caption.lower().strip() for caption in captions]
        behind = np.array([instructed and self._instruction is not None and bool(caption) for caption in captions])
        order = np.argsort(behind, kind="stable")
        parts = []
        for mine in np.split(order, [np.count_nonzero(~behind)]):
            for at in np.split(mine, range(self._batch_size, len(mine), self._batch_size)) if len(mine) else ():
                told = self._instruction if behind[at[0]] else None
                parts.append(self._batch([captions[i] for i in at.tolist()], told))
        back, pooled = np.argsort(order), [p.pooled_NP for p in parts if p.pooled_NP is not None]
        return Encoded(
            np.concatenate([p.tokens for p in parts])[back],
            np.concatenate([p.truncated for p in parts])[back],
            np.concatenate([p.embeddings_NLD for p in parts])[back],
            np.concatenate(pooled)[back] if pooled else None,
        )

    @torch.inference_mode()
    def _batch(self, captions: Sequence[str], instruction: str | None = None) -> Encoded:
        count, length = len(captions), self._max_length
        filled = [*captions, *[""] * (self._batch_size - count)]
        if instruction is not None:
            # Its own first and last token count among those of the caption, as in diffusers' pipeline.
            length += max(0, len(self._tokenizer.encode(instruction)) - 2)
            filled = [instruction + caption for caption in filled]
        if self._prompt == "chat":
            filled = [self._in_chat(caption) for caption in filled]
        # A template may have said already where a text begins.
        first = self._tokenizer.bos_token
        marks = {"add_special_tokens": self._prompt != "chat" or first is None or not filled[0].startswith(first)}
        batch = self._tokenizer(
            filled, padding="max_length", truncation=True, max_length=length, return_tensors="pt", **marks
        )
        mask_NL = batch["attention_mask"]
        states = self._model(
            input_ids=batch["input_ids"].to(self._device),
            attention_mask=None if self._padding == "attended" else mask_NL.to(self._device),
            output_hidden_states=self._layer != "last",
        )
        if self._layer == "last":
            hidden_NLD = states.last_hidden_state
        else:
            layers = (-2,) if isinstance(self._layer, str) else self._layer
            hidden_NLD = torch.cat([states.hidden_states[at] for at in layers], dim=-1)
        tokens = mask_NL[:count].sum(dim=1).to(torch.int32).numpy()
        # Only captions that fill the length can have been cut: these are counted again, whole.
        truncated = np.zeros(count, np.bool_)
        full: list[int] = np.flatnonzero(tokens == length).tolist()
        if full:
            longer = self._tokenizer([filled[i] for i in full], truncation=False, verbose=False, **marks)["input_ids"]
            truncated[full] = [len(ids) > length for ids in longer]
        if instruction is not None:
            kept = [0, *range(1 - self._max_length, 0)]
            hidden_NLD, tokens = hidden_NLD[:, kept], mask_NL[:count, kept].sum(dim=1).to(torch.int32).numpy()
        if self._padding != "masked":
            tokens = np.full_like(tokens, self._max_length)
        pooled_NP: npt.NDArray[np.float32] | None = None
        if self._pooled != "none":
            pooled = states.text_embeds if self._pooled == "projection" else states.pooler_output
            pooled_NP = pooled[:count].float().cpu().numpy()
        return Encoded(tokens, truncated, hidden_NLD[:count].float().cpu().numpy(), pooled_NP)

    def _in_chat(self, caption: str) -> str:
        if self._system is None:
            turn = [{"role": "user", "content": caption}]
            talk = self._tokenizer.apply_chat_template(
                turn, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        else:
            parts = {"system": self._system, "user": caption.replace("[IMG]", "")}  # which stands for a picture
            turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in parts.items()]
            talk = self._tokenizer.apply_chat_template(turns, tokenize=False)
        return str(talk)


def load_encoder(
    files: EncoderFiles,
    encoder: TextEncoderConfig,
    *,
    batch_size: int,
    device: str = "cpu",
) -> TextEncoder:
    """The encoder that `files` describe, ready to use; InputError when its files do not fit together.

    Weights come from safetensors, nothing is downloaded, and no code in the directory is run. ConflictError when the
    files are no longer those that were hashed.
    """
    import transformers

    # Named classes, never what the directory asks for.
    model_class = getattr(transformers, files.class_name)
    verbosity = transformers.logging.get_verbosity()
    try:
        # A whole CLIP holds an image tower as well: its tensors are no news. What is missing is looked at below.
        transformers.logging.set_verbosity_error()
        # The library would also read adapters, other weights and other attention that a directory names.
        config = files.model_config()
        with only_these(files.paths(), {"model/config.json": config, "tokenizer/config.json": config}) as folder:
            files.check()
            model, report = model_class.from_pretrained(
                folder / "model",
                use_safetensors=True,
                local_files_only=True,
                dtype=getattr(torch, encoder.dtype),
                output_loading_info=True,
            )
            # Where the padding is part of the text it stands where the tokenizer's maker put it.
            side = {} if encoder.padding == "shown" else {"padding_side": "right"}
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder / "tokenizer", local_files_only=True, trust_remote_code=False, **side
            )
    except PipelineError:  # SIGTERM arrives as one
        raise
    except Exception as error:  # the libraries raise kinds of their own, undocumented, for damaged files
        raise _unusable(encoder, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    if report["missing_keys"]:
        # transformers would fill them with random numbers.
        names = sorted(report["missing_keys"])
        raise _unusable(encoder, f"its weights lack {len(names)} tensors, such as {names[0]}")
    for what, there in (("padding token", tokenizer.pad_token), ("chat template", tokenizer.chat_template)):
        if there is None and (what == "padding token" or encoder.prompt == "chat"):
            raise _unusable(encoder, f"its tokenizer has no {what}")
    if files.class_name.endswith("ForCausalLM"):
        model = model.model  # its states are read, no next token is asked for
        model.config.use_cache = False
    elif files.class_name == "Mistral3ForConditionalGeneration":  # no picture is shown to it
        model = model.model.language_model
        model.config.use_cache = False
    return TextEncoder(
        model.eval().to(device),
        tokenizer,
        max_length=files.max_length,
        batch_size=batch_size,
        device=device,
        **encoder.model_dump(include={"layer", "pooled", *SPOKEN}),
    )


def _unusable(encoder: TextEncoderConfig, why: str) -> InputError:
    return InputError(
        f"The encoder {encoder.name} cannot be loaded: {why}",
        key="encoders.path",
        value=encoder.path,
        rule="model and tokenizer are whole, of one class, and in transformers layout",
        next_step="copy or download the files again",
    )


# -- Prompts to what a text model reads, each distinct prompt once -----------------------------------------------
#
# One embedder serves all denoisers of a job: it keeps what it has embedded, least recently used out first, so that a
# prompt drawn with a thousand seeds is encoded once. Every forward pass has one shape, so that on a CPU an embedding
# does not depend on what else was asked.


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
        self._cache: OrderedDict[tuple[str, bool], Embedding] = OrderedDict()
        self._held_bytes = 0
        self._instructs = any(encoder.instruction is not None for encoder in spec.encoders)

    def __call__(self, prompts: Sequence[str], *, away: bool = False) -> dict[str, Embedding]:
        """Each of `prompts` with its embedding; away: as what is led away from, so without an instruction."""
        instructed = self._instructs and not away
        cached = {prompt: self._cache.get((prompt, instructed)) for prompt in prompts}
        embeddings = {prompt: embedding for prompt, embedding in cached.items() if embedding is not None}
        new = [prompt for prompt in cached if prompt not in embeddings]
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            self.embedded += len(part)
            embeddings |= zip(part, self._embed(part, instructed), strict=True)
        for prompt, embedding in embeddings.items():
            if (prompt, instructed) not in self._cache:
                self._cache[prompt, instructed] = embedding
                self._held_bytes += embedding.size_bytes
            self._cache.move_to_end((prompt, instructed))
            while self._held_bytes > self._cache_bytes and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._held_bytes -= oldest.size_bytes
        return embeddings

    def _embed(self, prompts: Sequence[str], instructed: bool) -> list[Embedding]:
        spec, parts = self._spec, []
        for encoder, loaded in zip(spec.encoders, self._encoders, strict=True):
            output = loaded.encode(prompts, instructed=instructed)
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
