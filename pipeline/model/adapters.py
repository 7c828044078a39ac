"""diffusers' models behind the one calling convention of this package; diffusers is imported when one is built.

Each adapter holds the diffusers model as `inner`, unchanged, so that what is exported is what diffusers loads.
Times in [0, 1] become the 1000-step scale these classes embed. Label index num_classes is "no label". Text models
take the embeddings of the empty prompt as their unconditional text: they have no token of their own for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pipeline.errors import InputError

if TYPE_CHECKING:
    from pipeline.model.config import (
        DiTTransformer2DConfig,
        PublishedConfig,
        SD3Transformer2DConfig,
        Sides,
        UNet2DConditionConfig,
        UNet2DConfig,
    )

_TIME_SCALE = 1000.0


class DiffusersAdapter(nn.Module):
    """A diffusers model as forward(x, t, labels, text, mask) -> prediction; subclasses say how it is called."""

    def __init__(self, inner: nn.Module, *, sides: Sides, null_label: int | None) -> None:
        super().__init__()
        self.inner, self.sides = inner, sides
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
        arguments = self._arguments(x_BCHW.shape[0], x_BCHW.device, labels_B, text_BLD, text_mask_BL)
        return self._predict(x_BCHW, t_B, **arguments)

    def _predict(self, x_BCHW: Tensor, t_B: Tensor, **arguments: Any) -> Tensor:
        self._check_size(x_BCHW)
        prediction: Tensor = self.inner(x_BCHW, timestep=t_B * _TIME_SCALE, return_dict=False, **arguments)[0]
        # Published models with a learned variance predict it in a second set of channels; no solver here uses it.
        return prediction[:, : x_BCHW.shape[1]]

    def _check_size(self, x_BCHW: Tensor) -> None:
        height, width = x_BCHW.shape[-2:]
        if not self.sides.take(height, width):
            raise InputError(
                f"{type(self.inner).__name__} cannot take this latent size",
                key="latent size",
                value=f"{height}x{width}",
                rule=f"it takes {self.sides.rule()}",
                next_step="use image buckets that give such latents, or another model",
            )

    def _arguments(
        self, batch: int, device: torch.device, labels: Tensor | None, text: Tensor | None, mask: Tensor | None
    ) -> dict[str, Any]:
        raise NotImplementedError

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


class Published(DiffusersAdapter):
    """A class as published models have it: its text, pooled vectors and sizes are those that its pipeline gives it.

    forward(x, t, labels, text, mask, pooled, sizes, guidance): pooled [b, p]; sizes [b, 6], in pixels the original's
    height and width, top and left of the crop once it has the target's scale, and the target's height and width;
    guidance [b] of a distilled network, without it that of its configuration.
    """

    def __init__(self, inner: nn.Module, network: PublishedConfig) -> None:
        # Of these classes only DiT reserves a label for "no label"; a UNet's last class is a class.
        null_label = network.num_classes if network.class_name == "DiTTransformer2DModel" else None
        super().__init__(inner, sides=network.sides, null_label=null_label)
        self.network = network
        if network.activation_checkpointing:
            _checkpointing(inner, True)

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        labels_B: Tensor | None = None,
        text_BLD: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        pooled_BP: Tensor | None = None,
        sizes_B6: Tensor | None = None,
        guidance_B: Tensor | None = None,
    ) -> Tensor:
        name, network, batch = self.network.class_name, self.network, len(x_BCHW)
        flux = name in ("FluxTransformer2DModel", "Flux2Transformer2DModel")
        arguments: dict[str, Any] = {}
        if network.num_classes is not None:
            arguments["class_labels"] = self._labels(batch, x_BCHW.device, labels_B)
        if network.uses[1] == "required":
            arguments["encoder_hidden_states"] = self._need_text(text_BLD)
        if network.padding == "masked":
            arguments["encoder_attention_mask"] = text_mask_BL
        if network.arrangement in ("sdxl", "sd3", "flux"):
            pooled_BP = self._need(
                "a pooled text vector", pooled_BP, "it reads the pooled states of its CLIP encoders"
            )
        if name in ("SD3Transformer2DModel", "FluxTransformer2DModel"):
            arguments["pooled_projections"] = pooled_BP
        if network.micro_conditions:
            sizes = self._need("sizes", sizes_B6, "this model reads the sizes of original, crop and target").float()
            arguments["added_cond_kwargs"] = (
                {"text_embeds": pooled_BP, "time_ids": sizes}
                if name == "UNet2DConditionModel"
                else {"resolution": sizes[:, 4:], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:6]}
            )
        if network.distilled:
            scale = 1 if flux else float(network.arguments.get("guidance_embeds_scale", 0.1))
            told = x_BCHW.new_full((batch,), network.distilled_guidance) if guidance_B is None else guidance_B
            arguments["guidance"] = told * scale
        if flux:
            return self._flux(x_BCHW, t_B, **arguments)
        return self._predict(x_BCHW, t_B * float(network.arguments.get("timestep_scale", 1.0)), **arguments)

    def _flux(self, x_BCHW: Tensor, t_B: Tensor, **arguments: Any) -> Tensor:
        """Squares of latent pixels are its tokens, their places given beside them; its times are 0 to 1.

        A Flux 2 finds its squares in the channels (see `codec.info.SQUARES`), and its words have places, too.
        """
        self._check_size(x_BCHW)
        side, axes = (2, 3) if self.network.class_name == "FluxTransformer2DModel" else (1, 4)
        squares = pixel_unshuffle(x_BCHW, side)
        rows, columns = squares.shape[2:]
        places = torch.zeros(rows, columns, axes, device=x_BCHW.device)
        places[..., 1] += torch.arange(rows, device=x_BCHW.device)[:, None]
        places[..., 2] += torch.arange(columns, device=x_BCHW.device)
        words = arguments["encoder_hidden_states"].shape[1]
        text_places = torch.zeros(words, axes, device=x_BCHW.device)
        text_places[:, 3:] += torch.arange(words, device=x_BCHW.device)[:, None]
        out: Tensor = self.inner(
            squares.flatten(2).transpose(1, 2),
            timestep=t_B,
            img_ids=places.flatten(0, 1),
            txt_ids=text_places,
            return_dict=False,
            **arguments,
        )[0]
        return pixel_shuffle(out.transpose(1, 2).reshape(squares.shape), side)

    def _need(self, name: str, value: Tensor | None, rule: str) -> Tensor:
        if value is None:
            raise InputError(f"{type(self.inner).__name__} was called without {name}", key=name, rule=rule)
        return value


def build_published(network: PublishedConfig) -> DiffusersAdapter:
    """A published class from its own configuration, its weights unset."""
    return Published(_diffusers(str(network.class_name)).from_config(network.arguments), network)


def build_unet2d(
    config: UNet2DConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> DiffusersAdapter:
    """UNet2DModel with num_classes + 1 label embeddings, the last for "no label"."""
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
        sides=config.sides,
        null_label=num_classes,
    )


def build_unet2d_condition(
    config: UNet2DConditionConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> DiffusersAdapter:
    """UNet2DConditionModel with cross-attention to text of width text_dim."""
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
        cross_attention_dim=text_dim,
        num_class_embeds=None if num_classes is None else num_classes + 1,
    )
    inner = _checkpointing(inner, config.activation_checkpointing)
    return UNet2DCondition(inner, sides=config.sides, null_label=num_classes)


def build_dit_transformer2d(
    config: DiTTransformer2DConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> DiffusersAdapter:
    """DiTTransformer2DModel without its own label dropout, its gates and output starting at zero."""
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
    inner = _checkpointing(inner, config.activation_checkpointing)
    return DiTTransformer2D(inner, sides=config.sides, null_label=num_classes)


def build_sd3_transformer2d(
    config: SD3Transformer2DConfig, *, latent_channels: int, num_classes: int | None, text_dim: int | None
) -> DiffusersAdapter:
    """SD3Transformer2DModel on text of width text_dim."""
    inner = _diffusers("SD3Transformer2DModel")(
        sample_size=config.sample_size,
        patch_size=config.patch,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.heads,
        joint_attention_dim=text_dim,
        caption_projection_dim=config.heads * config.head_dim,
        pooled_projection_dim=text_dim,
        pos_embed_max_size=config.max_size,
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    nn.init.zeros_(inner.proj_out.weight)
    nn.init.zeros_(inner.proj_out.bias)
    inner = _checkpointing(inner, config.activation_checkpointing)
    return SD3Transformer2D(inner, sides=config.sides, null_label=None)


def _diffusers(class_name: str) -> Any:
    import diffusers

    return getattr(diffusers, class_name)


def _checkpointing(inner: Any, enabled: bool) -> nn.Module:
    if enabled:
        inner.enable_gradient_checkpointing()
    model: nn.Module = inner
    return model
