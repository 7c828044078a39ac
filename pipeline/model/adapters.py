"""diffusers' models behind the one calling convention of this package; diffusers is imported when one is built.

Each adapter holds the diffusers model as `inner`, unchanged, so that what is exported is what diffusers loads.
Times in [0, 1] become the 1000-step scale these classes embed. Label index num_classes is "no label". Text models
take the embeddings of the empty prompt as their unconditional text: they have no token of their own for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError, InputError

if TYPE_CHECKING:
    from pipeline.model.config import (
        DiTTransformer2DConfig,
        SD3Transformer2DConfig,
        UNet2DConditionConfig,
        UNet2DConfig,
    )

TIME_SCALE = 1000.0
DIFFUSERS_CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "SD3Transformer2DModel")


class DiffusersAdapter(nn.Module):
    """A diffusers model as forward(x, t, labels, text, mask) -> prediction; subclasses say how it is called."""

    def __init__(self, inner: nn.Module, *, null_label: int | None) -> None:
        super().__init__()
        self.inner = inner
        self.null_label = null_label  # the label index that means "no label", where the model has one

    @property
    def config(self) -> Any:
        """The diffusers configuration of the model."""
        return getattr(self.inner, "config")  # noqa: B009 - diffusers is untyped

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        labels_B: Tensor | None = None,
        text_BLD: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
    ) -> Tensor:
        self._check_size(*x_BCHW.shape[-2:])
        arguments = self._arguments(x_BCHW.shape[0], x_BCHW.device, labels_B, text_BLD, text_mask_BL)
        prediction: Tensor = self.inner(x_BCHW, timestep=t_B * TIME_SCALE, return_dict=False, **arguments)[0]
        # Published models with a learned variance predict it in a second set of channels; no solver here uses it.
        return prediction[:, : x_BCHW.shape[1]]

    def _arguments(
        self, batch: int, device: torch.device, labels: Tensor | None, text: Tensor | None, mask: Tensor | None
    ) -> dict[str, Any]:
        raise NotImplementedError

    def _size_multiple(self) -> int:
        levels: int = len(self.config.block_out_channels)
        return 1 << (levels - 1)

    def _check_size(self, height: int, width: int) -> None:
        multiple = self._size_multiple()
        if height % multiple or width % multiple:
            raise InputError(
                f"{type(self.inner).__name__} cannot take this latent size",
                key="latent size",
                value=f"{height}x{width}",
                rule=f"height and width must be multiples of {multiple}",
                next_step="use fewer levels, or image buckets of a larger multiple",
            )

    def _labels(self, batch: int, device: torch.device, labels: Tensor | None) -> Tensor:
        if labels is not None:
            return labels
        if self.null_label is None:
            raise InputError(
                f"{type(self.inner).__name__} was called without labels",
                key="labels",
                rule="this model was trained without an unconditional label: every row needs a class",
                next_step="give every request a class, and guidance 1",
            )
        return torch.full((batch,), self.null_label, device=device)

    def _need_text(self, text: Tensor | None) -> Tensor:
        if text is None:
            raise InputError(
                f"{type(self.inner).__name__} was called without text",
                key="text",
                rule="every call needs text embeddings [b, l, d]",
                next_step="pass the embeddings of the empty prompt for unconditional rows",
            )
        return text


class UNet2D(DiffusersAdapter):
    """UNet2DModel: classes or nothing."""

    def _arguments(
        self, batch: int, device: torch.device, labels: Tensor | None, text: Tensor | None, mask: Tensor | None
    ) -> dict[str, Any]:
        if self.config.num_class_embeds is None:
            return {}
        return {"class_labels": self._labels(batch, device, labels)}


class UNet2DCondition(DiffusersAdapter):
    """UNet2DConditionModel: text by masked cross-attention, classes where it was built with them."""

    def _arguments(
        self, batch: int, device: torch.device, labels: Tensor | None, text: Tensor | None, mask: Tensor | None
    ) -> dict[str, Any]:
        arguments = {"encoder_hidden_states": self._need_text(text), "encoder_attention_mask": mask}
        if self.config.num_class_embeds is not None:
            arguments["class_labels"] = self._labels(batch, device, labels)
        return arguments


class DiTTransformer2D(DiffusersAdapter):
    """DiTTransformer2DModel: classes, square latents of its own size."""

    def _arguments(
        self, batch: int, device: torch.device, labels: Tensor | None, text: Tensor | None, mask: Tensor | None
    ) -> dict[str, Any]:
        return {"class_labels": self._labels(batch, device, labels)}

    def _check_size(self, height: int, width: int) -> None:
        side = self.config.sample_size
        if (height, width) != (side, side):
            raise InputError(
                "DiTTransformer2DModel takes latents of one square size",
                key="model.sample_size",
                value=side,
                rule=f"the latent is {height}x{width}",
                next_step="set model.sample_size, or use kind: dit for other shapes",
            )


class SD3Transformer2D(DiffusersAdapter):
    """SD3Transformer2DModel: text by joint attention, its pooled vector the mean of the real tokens."""

    def _arguments(
        self, batch: int, device: torch.device, labels: Tensor | None, text: Tensor | None, mask: Tensor | None
    ) -> dict[str, Any]:
        text = self._need_text(text)
        weight = torch.ones(text.shape[:2], device=device) if mask is None else mask.float()
        text = torch.where(weight[..., None] > 0, text, 0.0)
        pooled = text.sum(1) / weight.sum(1, keepdim=True).clamp(min=1.0).to(text.dtype)
        return {"encoder_hidden_states": text, "pooled_projections": pooled}

    def _size_multiple(self) -> int:
        return int(self.config.patch_size)


ADAPTERS: dict[str, type[DiffusersAdapter]] = {
    "UNet2DModel": UNet2D,
    "UNet2DConditionModel": UNet2DCondition,
    "DiTTransformer2DModel": DiTTransformer2D,
    "SD3Transformer2DModel": SD3Transformer2D,
}


def build_unet2d(
    config: UNet2DConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> DiffusersAdapter:
    """UNet2DModel with num_classes + 1 label embeddings, the last for "no label"."""
    _refuse_text(config.kind, text_dim)
    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    return UNet2D(
        _diffusers("UNet2DModel")(
            in_channels=latent_channels,
            out_channels=latent_channels,
            block_out_channels=list(config.block_out_channels),
            layers_per_block=config.layers_per_block,
            down_block_types=down,
            up_block_types=up,
            attention_head_dim=config.attention_head_dim,
            norm_num_groups=config.norm_num_groups,
            dropout=config.dropout,
            num_class_embeds=None if num_classes is None else num_classes + 1,
        ),
        null_label=num_classes,
    )


def build_unet2d_condition(
    config: UNet2DConditionConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> DiffusersAdapter:
    """UNet2DConditionModel with cross-attention to text of width text_dim."""
    width = _require_text(config.kind, text_dim)
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention)]
    inner = _diffusers("UNet2DConditionModel")(
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=list(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        down_block_types=down,
        up_block_types=up,
        # diffusers reads this field as the number of heads in this class.
        attention_head_dim=config.attention_heads,
        norm_num_groups=config.norm_num_groups,
        cross_attention_dim=width,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
    return UNet2DCondition(_checkpointing(inner, config.activation_checkpointing), null_label=num_classes)


def build_dit_transformer2d(
    config: DiTTransformer2DConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> DiffusersAdapter:
    """DiTTransformer2DModel without its own label dropout, its gates and output starting at zero."""
    _refuse_text(config.kind, text_dim)
    if num_classes is None:
        raise _conditioning_error(config.kind, "num_classes", "needs class labels in the dataset")
    inner = _diffusers("DiTTransformer2DModel")(
        in_channels=latent_channels,
        sample_size=config.sample_size,
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_dim,
        num_layers=config.depth,
        num_embeds_ada_norm=num_classes,
    )
    for block in inner.transformer_blocks:
        # Each block would draw its own mask, so that no image is ever unconditional in all of them.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
    nn.init.zeros_(inner.proj_out_2.weight)
    nn.init.zeros_(inner.proj_out_2.bias)
    return DiTTransformer2D(_checkpointing(inner, config.activation_checkpointing), null_label=num_classes)


def build_sd3_transformer2d(
    config: SD3Transformer2DConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> DiffusersAdapter:
    """SD3Transformer2DModel on text of width text_dim."""
    width = _require_text(config.kind, text_dim)
    if num_classes is not None:
        raise _conditioning_error(config.kind, "num_classes", "takes text only, the dataset gives class labels")
    inner = _diffusers("SD3Transformer2DModel")(
        sample_size=config.sample_size,
        patch_size=config.patch,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=width,
        caption_projection_dim=config.heads * config.head_dim,
        pooled_projection_dim=width,
        pos_embed_max_size=config.max_size,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    nn.init.zeros_(inner.proj_out.weight)
    nn.init.zeros_(inner.proj_out.bias)
    return SD3Transformer2D(_checkpointing(inner, config.activation_checkpointing), null_label=None)


def _diffusers(class_name: str) -> Any:
    import diffusers

    return getattr(diffusers, class_name)


def _checkpointing(inner: Any, enabled: bool) -> nn.Module:
    if enabled:
        inner.enable_gradient_checkpointing()
    model: nn.Module = inner
    return model


def _refuse_text(kind: str, text_dim: int | None) -> None:
    if text_dim is not None:
        raise _conditioning_error(kind, "text_dim", "cannot take text, the dataset gives text embeddings")


def _require_text(kind: str, text_dim: int | None) -> int:
    if text_dim is None:
        raise _conditioning_error(kind, "text_dim", "needs text embeddings in the dataset")
    return text_dim


def _conditioning_error(kind: str, what: str, why: str) -> ConfigError:
    return ConfigError(
        "the model and the dataset's conditioning do not fit",
        key="model.kind",
        value=kind,
        rule=f"{kind} {why} ({what})",
        next_step="choose another model.kind, or a dataset with the conditioning it needs; dit takes any",
    )
