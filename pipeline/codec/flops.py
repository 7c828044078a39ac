"""Floating-point operations of encoding and decoding one image, from the configuration alone. No torch.

Counted as profilers count them: two per multiply-add of convolutions, linear layers and attention products;
norms, activations and resizing are left out (well under 1 %).
"""

from __future__ import annotations

from typing import Any

from pipeline.codec.info import CodecInfo

Config = dict[str, Any]


def encode_flops(info: CodecInfo, height: int, width: int) -> int | None:
    """FLOPs to encode one height x width image; None for a class whose arithmetic is not known here."""
    info.latent_shape(height, width)
    return _count(info, height, width, 0)


def decode_flops(info: CodecInfo, height: int, width: int) -> int | None:
    """FLOPs to decode one latent to height x width pixels; None for a class not known here."""
    info.latent_shape(height, width)
    return _count(info, height, width, 1)


def _count(info: CodecInfo, height: int, width: int, direction: int) -> int | None:
    counters = {
        "AutoencoderKL": (_kl_encode, _kl_decode),
        "AutoencoderKLFlux2": (_kl_encode, _kl_decode),
        "AutoencoderTiny": (_tiny_encode, _tiny_decode),
        "AutoencoderDC": (_dc_encode, _dc_decode),
    }.get(info.class_name)
    return None if counters is None else counters[direction](info.resolved_config(), height, width)


def _conv(c_in: int, c_out: int, cells: int, kernel: int = 3, groups: int = 1) -> int:
    return 2 * c_in // groups * c_out * kernel * kernel * cells


def _resnet(c_in: int, c_out: int, cells: int) -> int:
    """Two 3x3 convolutions, and a 1x1 shortcut where the width changes."""
    shortcut = _conv(c_in, c_out, cells, 1) if c_in != c_out else 0
    return _conv(c_in, c_out, cells) + _conv(c_out, c_out, cells) + shortcut


def _kl_mid(channels: int, cells: int, attention: bool) -> int:
    """Two residual layers around one single-head attention over all cells."""
    projections = 4 * _conv(channels, channels, cells, 1)
    products = 2 * 2 * cells * cells * channels
    return 2 * _resnet(channels, channels, cells) + (projections + products if attention else 0)


def _kl_encode(c: Config, height: int, width: int) -> int:
    blocks, latent, cells = c["block_out_channels"], c["latent_channels"], height * width
    total, previous = _conv(c["in_channels"], blocks[0], cells), blocks[0]
    for i, channels in enumerate(blocks):
        total += _resnet(previous, channels, cells)
        total += (c["layers_per_block"] - 1) * _resnet(channels, channels, cells)
        if i < len(blocks) - 1:
            cells //= 4
            total += _conv(channels, channels, cells)
        previous = channels
    total += _kl_mid(previous, cells, c["mid_block_add_attention"]) + _conv(previous, 2 * latent, cells)
    return total + (_conv(2 * latent, 2 * latent, cells, 1) if c["use_quant_conv"] else 0)


def _kl_decode(c: Config, height: int, width: int) -> int:
    blocks = list(reversed(c.get("decoder_block_out_channels") or c["block_out_channels"]))
    cells = height * width // 4 ** (len(blocks) - 1)
    latent, previous = c["latent_channels"], blocks[0]
    total = _conv(latent, latent, cells, 1) if c["use_post_quant_conv"] else 0
    total += _conv(latent, previous, cells) + _kl_mid(previous, cells, c["mid_block_add_attention"])
    for i, channels in enumerate(blocks):
        total += _resnet(previous, channels, cells)
        total += c["layers_per_block"] * _resnet(channels, channels, cells)
        if i < len(blocks) - 1:
            cells *= 4
            total += _conv(channels, channels, cells)
        previous = channels
    return total + _conv(previous, c["out_channels"], cells)


def _tiny_encode(c: Config, height: int, width: int) -> int:
    cells, blocks = height * width, c["encoder_block_out_channels"]
    total = _conv(c["in_channels"], blocks[0], cells)
    for i, (channels, count) in enumerate(zip(blocks, c["num_encoder_blocks"], strict=True)):
        if i > 0:
            cells //= 4
            total += _conv(channels, channels, cells)
        total += count * 3 * _conv(channels, channels, cells)
    return total + _conv(blocks[-1], c["latent_channels"], cells)


def _tiny_decode(c: Config, height: int, width: int) -> int:
    blocks = c["decoder_block_out_channels"]
    cells = height * width // 4 ** (len(c["encoder_block_out_channels"]) - 1)
    total = _conv(c["latent_channels"], blocks[0], cells)
    for i, (channels, count) in enumerate(zip(blocks, c["num_decoder_blocks"], strict=True)):
        total += count * 3 * _conv(channels, channels, cells)
        final = i == len(blocks) - 1
        cells *= 1 if final else c["upsampling_scaling_factor"] ** 2
        total += _conv(channels, c["out_channels"] if final else channels, cells)
    return total


def _dc_stage(c: Config, side: str, i: int, cells: int) -> int:
    kinds = c[f"{side}_block_types"]
    kind = kinds if isinstance(kinds, str) else kinds[i]
    channels, count = c[f"{side}_block_out_channels"][i], c[f"{side}_layers_per_block"][i]
    kernels, head_dim = c[f"{side}_qkv_multiscales"][i], c["attention_head_dim"]
    if kind == "ResBlock":
        return int(count * 2 * _conv(channels, channels, cells))
    heads = channels // head_dim
    inner, scales = heads * head_dim, 1 + len(kernels)
    total = 3 * _conv(channels, inner, cells, 1) + _conv(inner * scales, channels, cells, 1)
    for kernel in kernels:
        total += _conv(3 * inner, 3 * inner, cells, kernel, groups=3 * inner)
        total += _conv(3 * inner, 3 * inner, cells, 1, groups=3 * heads)
    if cells > head_dim:  # linear attention: (v k^T) q, v with one row of ones
        total += scales * heads * 2 * 2 * (head_dim + 1) * head_dim * cells
    else:
        total += scales * heads * 2 * 2 * head_dim * cells * cells
    hidden = 4 * channels  # the gated convolutional feed-forward
    total += _conv(channels, 2 * hidden, cells, 1) + _conv(2 * hidden, 2 * hidden, cells, 3, groups=2 * hidden)
    return int(count * (total + _conv(hidden, channels, cells, 1)))


def _dc_resample(c_in: int, c_out: int, cells_in: int, cells_out: int, *, shuffled: bool) -> int:
    """A 3x3 convolution on the finer grid of the two, or with 4x the channels on the coarser one."""
    fine, coarse = max(cells_in, cells_out), min(cells_in, cells_out)
    if cells_in > cells_out:  # down: unshuffle convolves before, a strided convolution counts the output cells
        return _conv(c_in, c_out // 4, fine) if shuffled else _conv(c_in, c_out, coarse)
    return _conv(c_in, 4 * c_out, coarse) if shuffled else _conv(c_in, c_out, fine)


def _dc_encode(c: Config, height: int, width: int) -> int:
    blocks, layers, cells = c["encoder_block_out_channels"], c["encoder_layers_per_block"], height * width
    shuffled = c["downsample_block_type"] == "pixel_unshuffle"
    if layers[0] > 0:
        total = _conv(c["in_channels"], blocks[0], cells)
    else:
        total = _dc_resample(c["in_channels"], blocks[1], cells, cells // 4, shuffled=shuffled)
        cells //= 4
    for i in range(len(blocks)):
        total += _dc_stage(c, "encoder", i, cells)
        if i < len(blocks) - 1 and layers[i] > 0:
            total += _dc_resample(blocks[i], blocks[i + 1], cells, cells // 4, shuffled=shuffled)
            cells //= 4
    return total + _conv(blocks[-1], c["latent_channels"], cells)


def _dc_decode(c: Config, height: int, width: int) -> int:
    blocks, layers = c["decoder_block_out_channels"], c["decoder_layers_per_block"]
    cells = height * width // 4 ** (len(blocks) - 1)
    shuffled = c["upsample_block_type"] == "pixel_shuffle"
    total = _conv(c["latent_channels"], blocks[-1], cells)
    for i in reversed(range(len(blocks))):
        if i < len(blocks) - 1 and layers[i] > 0:
            total += _dc_resample(blocks[i + 1], blocks[i], cells, cells * 4, shuffled=shuffled)
            cells *= 4
        total += _dc_stage(c, "decoder", i, cells)
    if layers[0] > 0:
        return total + _conv(blocks[0], c["in_channels"], cells)
    return total + _dc_resample(blocks[1], c["in_channels"], cells, cells * 4, shuffled=shuffled)
