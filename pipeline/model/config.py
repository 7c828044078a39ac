"""Which network is trained: one model per `kind`, each with the fields that kind has and no others.

Channels, classes and text width are not here: they come from the dataset and are checked against it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import StrictModel


class DiTConfig(StrictModel):
    """The reference diffusion transformer: class and text conditioning, any height and width."""

    kind: Literal["dit"] = Field("dit", description="The reference diffusion transformer.")
    hidden: int = Field(384, ge=8, description="Width of a token; a multiple of heads.")
    depth: int = Field(12, ge=1, description="Number of transformer blocks.")
    heads: int = Field(6, ge=1, description="Attention heads per block; hidden / heads must be a multiple of 4.")
    patch: int = Field(2, ge=1, description="Side of the square of latent pixels that makes one token.")
    mlp_ratio: float = Field(4.0, gt=0, description="Width of the feed-forward layer, as a multiple of hidden.")
    position: Literal["rope", "sincos"] = Field(
        "rope", description="2-D positions: rope (rotary, relative) or sincos (added to the tokens)."
    )
    qk_norm: bool = Field(True, description="RMS-normalise queries and keys per head (steadier at scale, in bf16).")
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, about a third more compute."
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> DiTConfig:
        if self.hidden % (4 * self.heads):
            raise ValueError(f"hidden {self.hidden} must be a multiple of 4 * heads = {4 * self.heads}")
        return self


class UNet2DConfig(StrictModel):
    """diffusers' UNet2DModel: convolutional, class conditioning."""

    kind: Literal["unet2d"] = Field("unet2d", description="diffusers UNet2DModel.")
    block_out_channels: tuple[int, ...] = Field(
        (64, 128), min_length=1, description="Channels of each level; each level after the first halves the latent."
    )
    layers_per_block: int = Field(1, ge=1, description="Residual layers per level.")
    attention: tuple[bool, ...] = Field(
        (False, True), description="Whether each level has self-attention; one entry per level."
    )
    attention_head_dim: int = Field(32, ge=1, description="Channels per attention head.")
    norm_num_groups: int = Field(32, ge=1, description="Groups of the group norms; divides every level's channels.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout inside the residual layers.")

    @model_validator(mode="after")
    def _levels_agree(self) -> UNet2DConfig:
        _check_levels(self.block_out_channels, self.attention, self.norm_num_groups)
        last = len(self.block_out_channels) - 1  # its middle block always attends
        attending = [c for at, c in enumerate(self.block_out_channels) if self.attention[at] or at == last]
        if min(attending) < self.attention_head_dim:
            raise ValueError(
                f"attention_head_dim {self.attention_head_dim} must not exceed the channels of a level that attends "
                f"(the last one always does): {min(attending)}"
            )
        return self


class UNet2DConditionConfig(StrictModel):
    """diffusers' UNet2DConditionModel: convolutional, cross-attention to text, optionally classes too."""

    kind: Literal["unet2d_condition"] = Field("unet2d_condition", description="diffusers UNet2DConditionModel.")
    block_out_channels: tuple[int, ...] = Field(
        (320, 640, 1280, 1280),
        min_length=1,
        description="Channels of each level; each after the first halves the latent.",
    )
    layers_per_block: int = Field(2, ge=1, description="Residual layers per level.")
    attention: tuple[bool, ...] = Field(
        (True, True, True, False), description="Whether each level attends to the text; one entry per level."
    )
    attention_heads: int = Field(
        8, ge=1, description="Attention heads of each level; divides every level's channels."
    )
    norm_num_groups: int = Field(32, ge=1, description="Groups of the group norms; divides every level's channels.")
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more compute."
    )

    @model_validator(mode="after")
    def _levels_agree(self) -> UNet2DConditionConfig:
        _check_levels(self.block_out_channels, self.attention, self.norm_num_groups)
        _check_levels(self.block_out_channels, self.attention, self.attention_heads, name="attention_heads")
        return self


class DiTTransformer2DConfig(StrictModel):
    """diffusers' DiTTransformer2DModel: square latents of one size, class conditioning only.

    Its per-block label dropout is switched off (labels are dropped once, outside) and adaLN-zero is initialised to
    zero; every block still holds its own label table. Prefer `dit` unless the published class is needed.
    """

    kind: Literal["dit_transformer2d"] = Field("dit_transformer2d", description="diffusers DiTTransformer2DModel.")
    sample_size: int = Field(..., ge=1, description="Side of the square latent; other sizes are refused.")
    heads: int = Field(6, ge=1, description="Attention heads per block.")
    head_dim: int = Field(64, ge=4, multiple_of=4, description="Channels per head.")
    depth: int = Field(12, ge=1, description="Number of transformer blocks.")
    patch: int = Field(2, ge=1, description="Side of the square of latent pixels that makes one token.")
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, more compute."
    )

    @model_validator(mode="after")
    def _in_patches(self) -> DiTTransformer2DConfig:
        if self.sample_size % self.patch:
            raise ValueError(f"sample_size {self.sample_size} must be a multiple of patch {self.patch}")
        return self


class SD3Transformer2DConfig(StrictModel):
    """diffusers' SD3Transformer2DModel: joint attention over text and latent, text conditioning only.

    It has no text mask: padded positions are zeroed and attended to. Its pooled text vector is the mean over the
    real tokens.
    """

    kind: Literal["sd3_transformer2d"] = Field("sd3_transformer2d", description="diffusers SD3Transformer2DModel.")
    sample_size: int = Field(64, ge=1, description="Side of the latent that positions are centred on.")
    max_size: int = Field(96, ge=1, description="Largest latent side, counted in patches.")
    heads: int = Field(12, ge=1, description="Attention heads per block.")
    head_dim: int = Field(64, ge=4, multiple_of=4, description="Channels per head.")
    depth: int = Field(12, ge=1, description="Number of joint blocks.")
    patch: int = Field(2, ge=1, description="Side of the square of latent pixels that makes one token.")
    qk_norm: bool = Field(True, description="RMS-normalise queries and keys, as SD 3.5 does.")
    activation_checkpointing: bool = Field(
        False, description="Recompute each block in the backward pass: less memory, more compute."
    )


ModelConfig = Annotated[
    DiTConfig | UNet2DConfig | UNet2DConditionConfig | DiTTransformer2DConfig | SD3Transformer2DConfig,
    Field(discriminator="kind"),
]


def _check_levels(
    channels: tuple[int, ...], attention: tuple[bool, ...], divisor: int, *, name: str = "norm_num_groups"
) -> None:
    if len(attention) != len(channels):
        raise ValueError(f"attention has {len(attention)} entries, block_out_channels has {len(channels)}: one each")
    wrong = [width for width in channels if width % divisor]
    if wrong:
        raise ValueError(f"{name} {divisor} must divide every entry of block_out_channels, not so {wrong}")
