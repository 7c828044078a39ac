"""Configuration of text encoders and of the job that embeds captions with them. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import StrictModel
from pipeline.dataflow.cluster import ClusterConfig
from pipeline.store.read.dataset import DatasetConfig
from pipeline.tracking.config import TrackingConfig

# No part may begin with a dot: a subfolder cannot lead out of its directory.
_SUBFOLDER = r"^([A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*)?$"


class TextEncoderConfig(StrictModel):
    """One encoder: which files, which of its outputs, in which arithmetic."""

    name: str = Field(
        ..., pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="Names the embeddings: the folder below output.uri."
    )
    path: str = Field(
        ...,
        min_length=1,
        description="Directory in transformers layout (CLIP, OpenCLIP, T5, Gemma 2, Qwen 3 or Mistral 3), or hub id.",
    )
    revision: str | None = Field(
        None, description="Commit or tag that pins a hub id; required for one, without meaning for a directory."
    )
    subfolder: str = Field(
        "", pattern=_SUBFOLDER, description="Where the model lies in path, such as text_encoder_2."
    )
    tokenizer_subfolder: str = Field(
        "", pattern=_SUBFOLDER, description="Where the tokenizer lies in path, such as tokenizer_2."
    )
    max_length: int | None = Field(
        None, ge=1, description="Tokens a caption is cut to; default what a CLIP model can hold, required for T5."
    )
    layer: (
        Literal["last", "penultimate"] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    ) = Field(
        "last",
        description="last: the final hidden state, normed; penultimate: the one before, as SDXL uses it; a list "
        "such as [9, 18, 27]: the states behind so many layers side by side, as FLUX.2 uses them.",
    )
    prompt: Literal["plain", "chat"] = Field(
        "plain",
        description="chat: a caption is a user's turn in the tokenizer's chat template, before an answer without "
        "thinking, as FLUX.2 klein reads it.",
    )
    system: str | None = Field(
        None,
        description="With prompt: chat, what the system says before the caption; no answer is begun then, as "
        "FLUX.2 dev reads it.",
    )
    letters: Literal["kept", "lowered"] = Field(
        "kept",
        description="lowered: small letters, and no space at either end, as PixArt and Sana read a caption.",
    )
    instruction: str | None = Field(
        None,
        min_length=1,
        description="With prompt: plain, a text before every caption but the empty one, of whose states the first "
        "alone is kept, as Sana reads a caption; what sampling leads away from is read without it.",
    )
    pooled: Literal["none", "pooler", "projection"] = Field(
        "none", description="CLIP only, stored as well: the pooled state as it is, or through the text projection."
    )
    padding: Literal["masked", "attended", "shown"] = Field(
        "masked",
        description="masked: padding is hidden from encoder and model; attended: its states are part of the text, as "
        "Stable Diffusion, SDXL, SD3 and FLUX read them; shown: so they are, yet no token of the encoder attends to "
        "padding, as FLUX.2 reads it.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Arithmetic of the encoder.")
    embedding_dtype: Literal["float16", "bfloat16"] = Field("float16", description="How embeddings are stored.")

    @model_validator(mode="after")
    def _words_have_their_place(self) -> TextEncoderConfig:
        if self.system is not None and self.prompt != "chat":
            raise ValueError("system: it speaks with prompt: chat alone")
        if self.instruction is not None and (self.prompt == "chat" or self.pooled != "none"):
            raise ValueError("instruction: it stands before a plain prompt, and of an encoder that pools nothing")
        return self


class TextOutputConfig(StrictModel):
    """Where embeddings go."""

    uri: str | None = Field(
        None, min_length=1, description="Each encoder writes <uri>/<name>; default the folder text below data.uri."
    )


class EmbedConfig(StrictModel):
    """How the work is cut; nothing here changes which rows there are."""

    batch_size: int = Field(32, ge=1, description="Captions per forward pass; the last one is filled up.")
    unit_captions: int = Field(1024, ge=1, description="Captions per commit: what a killed run loses at most.")
    row_group_bytes: int = Field(4 << 20, ge=1024, le=1 << 30, description="Embedding bytes of a row group.")


class PipelineConfig(StrictModel):
    """Where a pipeline lies whose text encoders are used."""

    uri: str = Field(..., min_length=1, description="A local pipeline directory, or a hub id with its revision.")
    revision: str | None = Field(None, description="Commit or tag that pins a hub id.")


class EmbedTextJobConfig(StrictModel):
    """Everything the embed_text job reads."""

    data: DatasetConfig = Field(..., description="The latent dataset whose captions are embedded.")
    captions: tuple[str, ...] = Field(
        ("caption",),
        description="The texts of a row that are its captions: caption, or extra.NAME, a field that source.extra "
        "kept: a text or a list of them.",
    )
    prompts: tuple[str, ...] = Field((), description="Further texts that are embedded, such as grid.prompts.")
    encoders: tuple[TextEncoderConfig, ...] = Field(
        (), description="The encoders, side by side; none: those of `pipeline`."
    )
    pipeline: PipelineConfig | None = Field(
        None, description="A diffusers pipeline: its text encoders, as its network reads them."
    )
    output: TextOutputConfig = Field(TextOutputConfig(), description="Where embeddings go.")
    embed: EmbedConfig = Field(EmbedConfig(), description="How the work is cut.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="auto takes a GPU when there is one: of the cluster at RAY_ADDRESS, else of this machine.",
    )
    workers: int | None = Field(
        None,
        ge=1,
        description="Encoders that work at a time on the cluster at RAY_ADDRESS; null: one beside each GPU, or where "
        "there are none as many as there are CPUs. Without a cluster it is one, in this process.",
    )
    cluster: ClusterConfig = Field(ClusterConfig(), description="The Ray cluster, where RAY_ADDRESS names one.")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of an encoder; null: all cores of this machine, one on a cluster. Not part of the "
        "identity.",
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow tracking.")

    @model_validator(mode="after")
    def _names_differ(self) -> EmbedTextJobConfig:
        if bool(self.encoders) == bool(self.pipeline):
            raise ValueError("name either encoders or a pipeline that has them")
        names = [e.name for e in self.encoders]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"encoders: each needs a name of its own, and {', '.join(twice)} is used twice")
        return self

    def uri_of(self, encoder: TextEncoderConfig) -> str:
        """The root of one encoder's embeddings."""
        return f"{(self.output.uri or self.data.uri.rstrip('/') + '/text').rstrip('/')}/{encoder.name}"
