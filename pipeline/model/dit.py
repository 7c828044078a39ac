"""The reference diffusion transformer (Peebles and Xie 2023, adaLN-zero), for latents of any height and width.

Token sequence x_BLD over patches in row-major order. Every block is modulated by one vector per image (time, class,
pooled text); text is also attended to by cross-attention under its mask. Differences from the paper, each for a
reason: queries and keys are RMS-normalised (Dehghani et al. 2023, section 2, against logit growth), positions are 2-D
rotary by default (Su et al. 2021, one half of each head per axis: no size is built in), and labels are never dropped
inside, so that one row's condition is the same in every block and on every rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.errors import InputError

_TIME_FREQUENCIES = 256
_TIME_SCALE = 1000.0
_ROPE_BASE = 100.0
_SINCOS_BASE = 10_000.0


class DiT(nn.Module):
    """Noisy latents [b, c, h, w] and times [b] in [0, 1] to a prediction of the same shape.

    labels: index num_classes means "no label". Text: embeddings [b, l, d] and a boolean mask [b, l], true where there
    is a token; a row whose mask is all false, or text=None, is unconditional (a learned null token is always there).
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        hidden: int,
        depth: int,
        heads: int,
        patch: int = 2,
        mlp_ratio: float = 4.0,
        position: str = "rope",
        qk_norm: bool = True,
        num_classes: int | None = None,
        text_dim: int | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.latent_channels, self.patch, self.position = latent_channels, patch, position
        self.head_dim = hidden // heads
        self.null_label, self.activation_checkpointing = num_classes, activation_checkpointing
        self.embed_patch = nn.Linear(latent_channels * patch * patch, hidden)
        self.embed_time = nn.Sequential(nn.Linear(_TIME_FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.embed_label = nn.Embedding(num_classes + 1, hidden) if num_classes is not None else None
        self.embed_text = TextEmbedding(text_dim, hidden) if text_dim is not None else None
        mlp_hidden = int(mlp_ratio * hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, heads, mlp_hidden, qk_norm=qk_norm, cross=text_dim is not None) for _ in range(depth)
        )
        self.final_norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Linear(hidden, 2 * hidden)
        self.final = nn.Linear(hidden, latent_channels * patch * patch)
        self._initialise()

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        labels_B: Tensor | None = None,
        text_BLD: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
    ) -> Tensor:
        batch, _, height, width = x_BCHW.shape
        if height % self.patch or width % self.patch:
            raise InputError(
                "the latent cannot be cut into whole patches",
                key="model.patch",
                value=self.patch,
                rule=f"patch must divide the latent's height and width, {height}x{width}",
                next_step="choose another patch, or image buckets that are multiples of codec factor x patch",
            )
        rows, columns = height // self.patch, width // self.patch
        x_BLD = self.embed_patch(_patchify(x_BCHW, self.patch))
        rotary = None
        if self.position == "rope":
            rotary = rope_2d(rows, columns, self.head_dim, x_BCHW.device)
        else:
            x_BLD = x_BLD + sincos_2d(rows, columns, x_BLD.shape[-1], x_BCHW.device).to(x_BLD.dtype)
        condition_BD = self.embed_time(time_features(t_B).to(self.final.weight.dtype))
        if self.embed_label is not None:
            if labels_B is None:
                labels_B = torch.full((batch,), self.embed_label.num_embeddings - 1, device=x_BCHW.device)
            condition_BD = condition_BD + self.embed_label(labels_B)
        context_BLD, mask_BL = None, None
        if self.embed_text is not None:
            context_BLD, mask_BL, pooled_BD = self.embed_text(text_BLD, text_mask_BL, batch)
            condition_BD = condition_BD + pooled_BD
        condition_BD = F.silu(condition_BD)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, condition_BD, rotary, context_BLD, mask_BL, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, condition_BD, rotary, context_BLD, mask_BL)
        shift, scale = self.final_modulation(condition_BD)[:, None].chunk(2, dim=-1)
        x_BLD = self.final(_modulate(self.final_norm(x_BLD), shift, scale))
        return _unpatchify(x_BLD, rows, columns, self.patch)

    def _initialise(self) -> None:
        # Peebles and Xie 2023: Xavier everywhere, then zero where a block or the output must start as the identity.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for layer in self.embed_time.children():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.modulation.weight)
            if block.cross is not None:
                nn.init.zeros_(block.cross.out.weight)
        for layer in (self.final_modulation, self.final):
            nn.init.zeros_(layer.weight)


class Block(nn.Module):
    """Self-attention, cross-attention where there is text, feed-forward; the first and last gated from zero."""

    def __init__(self, hidden: int, heads: int, mlp_hidden: int, *, qk_norm: bool, cross: bool) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.attention = SelfAttention(hidden, heads, qk_norm=qk_norm)
        self.norm_cross = nn.LayerNorm(hidden, eps=1e-6) if cross else None
        self.cross = CrossAttention(hidden, heads, qk_norm=qk_norm) if cross else None
        self.norm_2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, mlp_hidden), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden, hidden)
        )
        self.modulation = nn.Linear(hidden, 6 * hidden)

    def forward(
        self,
        x_BLD: Tensor,
        condition_BD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        context_BLD: Tensor | None,
        mask_BL: Tensor | None,
    ) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition_BD)[:, None].chunk(6, dim=-1)
        x_BLD = torch.addcmul(x_BLD, gate_1, self.attention(_modulate(self.norm_1(x_BLD), shift_1, scale_1), rotary))
        if self.cross is not None and self.norm_cross is not None and context_BLD is not None:
            x_BLD = x_BLD + self.cross(self.norm_cross(x_BLD), context_BLD, mask_BL)
        return torch.addcmul(x_BLD, gate_2, self.mlp(_modulate(self.norm_2(x_BLD), shift_2, scale_2)))


class HeadNorm(nn.RMSNorm):
    """RMS norm in the precision of its weight, which autocast leaves at float32 (it has no rule for this norm)."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x.to(self.weight.dtype))
        return result


class SelfAttention(nn.Module):
    """Multi-head attention of the tokens to each other."""

    def __init__(self, hidden: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm_q = HeadNorm(hidden // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = HeadNorm(hidden // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x_BLD: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.norm_q(q), self.norm_k(k)
        if rotary is not None:
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


class CrossAttention(nn.Module):
    """Attention of the tokens to the text, under its mask."""

    def __init__(self, hidden: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(hidden, hidden)
        self.key_value = nn.Linear(hidden, 2 * hidden)
        self.norm_q = HeadNorm(hidden // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = HeadNorm(hidden // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x_BLD: Tensor, context_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        q = self.query(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(context_BLD).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        result: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return result


class TextEmbedding(nn.Module):
    """Text embeddings to context tokens (a learned null token first) and one pooled vector per row."""

    def __init__(self, text_dim: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, hidden))
        self.pool = nn.Linear(hidden, hidden)
        self.null_D = nn.Parameter(torch.randn(hidden) * 0.02)

    def forward(
        self, text_BLD: Tensor | None, mask_BL: Tensor | None, batch: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        null_B1D = self.null_D.expand(batch, 1, -1)
        if text_BLD is None:
            return null_B1D, None, self.pool(null_B1D[:, 0])
        # Sharded weights may be bfloat16, and a norm on a CPU takes no wider input than its weights.
        tokens_BLD = self.project(text_BLD.to(self.pool.weight.dtype))
        if mask_BL is None:
            mask_BL = torch.ones(tokens_BLD.shape[:2], dtype=torch.bool, device=tokens_BLD.device)
        # The null token is always attended to, so no row of the softmax is empty.
        mask_BL = F.pad(mask_BL.bool(), (1, 0), value=True)
        context_BLD = torch.cat([null_B1D.to(tokens_BLD.dtype), tokens_BLD], dim=1)
        weight_BL1 = mask_BL[..., None].to(context_BLD.dtype)
        # Not multiplied by zero but replaced: a padded position may hold anything, even NaN.
        context_BLD = torch.where(mask_BL[..., None], context_BLD, 0.0)
        pooled_BD = context_BLD.sum(1) / weight_BL1.sum(1)
        return context_BLD, mask_BL, self.pool(pooled_BD)


def time_features(t_B: Tensor) -> Tensor:
    """Sines and cosines of 1000 t at 128 geometric frequencies (Vaswani et al. 2017, 3.5), float32 [b, 256]."""
    half = _TIME_FREQUENCIES // 2
    exponent = torch.arange(half, device=t_B.device, dtype=torch.float32) / half
    angle = _TIME_SCALE * t_B.float()[:, None] * torch.exp(-math.log(10_000.0) * exponent)[None, :]
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope_2d(rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [l, head_dim / 2] of the rotation at each patch: a quarter of head_dim turns with each axis.

    Attention then depends on row and column differences only (Su et al. 2021, eq. 16, applied to each axis).
    """
    quarter = head_dim // 4
    frequency = _ROPE_BASE ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    y = torch.arange(rows, device=device, dtype=torch.float32)[:, None, None] * frequency
    x = torch.arange(columns, device=device, dtype=torch.float32)[None, :, None] * frequency
    shape = (rows, columns, quarter)
    angle = torch.cat([y.expand(shape), x.expand(shape)], dim=-1).flatten(0, 1)
    return angle.cos(), angle.sin()


def sincos_2d(rows: int, columns: int, hidden: int, device: torch.device) -> Tensor:
    """Fixed positions [l, hidden]: sines and cosines of the row, then of the column, a quarter of hidden each."""
    quarter = hidden // 4
    frequency = _SINCOS_BASE ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    y = torch.arange(rows, device=device, dtype=torch.float32)[:, None, None] * frequency
    x = torch.arange(columns, device=device, dtype=torch.float32)[None, :, None] * frequency
    shape = (rows, columns, quarter)
    parts = [part.expand(shape) for part in (y.sin(), y.cos(), x.sin(), x.cos())]
    return torch.cat(parts, dim=-1).flatten(0, 1)


def _rotate(x_BHLD: Tensor, cos_LE: Tensor, sin_LE: Tensor) -> Tensor:
    first, second = x_BHLD.float().chunk(2, dim=-1)
    return torch.cat([first * cos_LE - second * sin_LE, second * cos_LE + first * sin_LE], dim=-1)


def _modulate(x_BLD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    # Here and at the gates one pass over the tokens instead of two (the backward pass is no shorter).
    return torch.addcmul(shift_B1D, x_BLD, 1.0 + scale_B1D)


def _patchify(x_BCHW: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = x_BCHW.shape
    x = x_BCHW.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * patch * patch)


def _unpatchify(x_BLD: Tensor, rows: int, columns: int, patch: int) -> Tensor:
    x = x_BLD.reshape(x_BLD.shape[0], rows, columns, -1, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
