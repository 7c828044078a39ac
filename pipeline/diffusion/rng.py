"""Random numbers keyed by what they are for: (run seed, row id, purpose, counter), never by who draws them.

The generator is Philox4x32-10, a keyed bijection of 128-bit counters (Salmon, Moraes, Dror and Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), written with 64-bit integer tensor operations. Two levels:

    run key    = blake2b-64(seed, purpose)
    row block  = Philox(counter=row id [128 bits], key=run key)             one per row, injective in the row id
    words      = Philox(counter=(block, counter, row block[2:4]), key=row block[0:2])

so distinct (row id, block, counter) never meet in the same (key, counter) pair, by construction and not by luck.
A row's numbers depend on that row's id only: not on the batch it is in, its place there, nor the device.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")

# Multipliers and Weyl constants of Philox4x32 (SC 2011, section 3.3).
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK32 = 0xFFFFFFFF
_ROUNDS = 10
_WORDS_PER_BLOCK = 4


def fused_on_gpu(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function of tensors that takes few kernels on CUDA, and on other devices stays as it is written.

    Only for exact arithmetic, which compiled is the same: where nothing can be compiled (no Triton, no C compiler),
    it stays as it is written, too. Compiled once for all sizes above one; call it with gradients off.
    """
    compiled: Callable[_P, _R] | None = None
    works = True

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        nonlocal compiled, works
        if not works or not any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves((args, kwargs))):
            return function(*args, **kwargs)
        try:
            compiled = compiled or torch.compile(function, dynamic=True)
            # Autocast has no part in it, but another state of it would be compiled anew.
            with torch.autocast("cuda", enabled=False):
                return compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            _log.warning(
                "%s runs uncompiled, many times slower: %s", function.__name__, " ".join(str(error).split())[:300]
            )
            works = False
            return function(*args, **kwargs)

    return call


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words (0 <= word < 2**32) and broadcast together."""
    k0, k1 = key
    shape = np.broadcast_shapes(*(word.shape for word in (*counter, *key)))
    c0, c1, c2, c3 = (word.expand(shape) for word in counter)
    for _ in range(_ROUNDS):
        # The wrapped signed product has the very bits of the unsigned one; the mask undoes the arithmetic shift and
        # takes off what the keys, which are sums here, have above their word.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0 = (product_1 >> 32).bitwise_xor_(k0).bitwise_xor_(c1).bitwise_and_(_MASK32)
        c2 = (product_0 >> 32).bitwise_xor_(k1).bitwise_xor_(c3).bitwise_and_(_MASK32)
        c1 = product_1.bitwise_and_(_MASK32)
        c3 = product_0.bitwise_and_(_MASK32)
        k0 = k0 + _WEYL_0
        k1 = k1 + _WEYL_1
    return c0, c1, c2, c3


def _words_of_blocks(
    ids_B2: Tensor, run_keys_2P: Tensor, counter: Tensor, purpose_K: Tensor, block_K: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words [b, k] of each row's blocks: k counts the blocks of all purposes, one after another."""
    low, high = ids_B2[:, 0, None], ids_B2[:, 1, None]
    row = philox4x32(
        (low & _MASK32, (low >> 32) & _MASK32, high & _MASK32, (high >> 32) & _MASK32),
        (run_keys_2P[0], run_keys_2P[1]),
    )
    k0, k1, c2, c3 = (word[:, purpose_K] for word in row)
    return philox4x32((block_K, counter, c2, c3), (k0, k1))


# Three hundred launches as it is written, which a GPU takes longer to be told than to do.
_fused_words_of_blocks = fused_on_gpu(_words_of_blocks)


def keyed_words_for(seed: int, ids: Tensor, counts: Mapping[str, int], *, counter: int) -> dict[str, Tensor]:
    """`keyed_words` for several purposes at once: how many of each, and by purpose what comes of it."""
    if ids.dtype != torch.int64 or ids.ndim != 2 or ids.shape[1] != 2:
        raise ValueError(f"ids must be int64 [b, 2] (see ids_from_bytes), got {ids.dtype} {tuple(ids.shape)}")
    if not 0 <= counter <= _MASK32:
        raise ValueError(f"counter must be in [0, 2**32), got {counter}")
    num_blocks = {purpose: -(-count // _WORDS_PER_BLOCK) for purpose, count in counts.items()}
    constants = _constants(seed, tuple(num_blocks.items()), ids.device)
    # Filled on the device: a tensor of a Python value would be copied there, and the host wait for it.
    counter_1 = torch.full((1,), counter, dtype=torch.int64, device=ids.device)
    with torch.no_grad():
        words = _fused_words_of_blocks(ids, constants.run_keys_2P, counter_1, constants.purpose_K, constants.block_K)
    out, start = {}, 0
    for purpose, count in counts.items():
        stop = start + num_blocks[purpose]
        needed = -(-count // max(1, num_blocks[purpose])) or 1  # of the four: one for a single number
        out[purpose] = torch.cat([word[:, start:stop] for word in words[:needed]], dim=1)[:, :count]
        start = stop
    return out


def keyed_words(seed: int, ids: Tensor, *, purpose: str, counter: int, count: int) -> Tensor:
    """`count` random 32-bit words for each row id: int64 [b, count], each in [0, 2**32).

    ids: int64 [b, 2]; counter: the epoch or draw number, 0 <= counter < 2**32.
    """
    return keyed_words_for(seed, ids, {purpose: count}, counter=counter)[purpose]


def uniform_of(words: Tensor) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float32 of the words' shape, exactly equal on every device."""
    # 23 bits and a half: exact in float32, never 0 and never 1.
    return ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23


def normal_of(words: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32 [b, *shape], of `num_words_of_normal(shape)` words a row.

    By the transform of Box and Muller (1958), computed in float64 and rounded once, so that devices differ at most in
    the last bit of a float32 (1e-6 absolute is a safe tolerance between CPU and GPU). |x| <= 6.67.
    """
    num_pairs = words.shape[1] // 2
    uniform = words.to(torch.float64).add_(0.5).mul_(2.0**-32)
    radius = uniform[:, :num_pairs].log().mul_(-2.0).sqrt_()
    angle = uniform[:, num_pairs:].mul_(2.0 * math.pi)
    normal = torch.cat([(radius * angle.cos()).float(), (radius * angle.sin()).float()], dim=1)
    return normal[:, : math.prod(shape)].reshape(words.shape[0], *shape)


def num_words_of_normal(shape: Sequence[int]) -> int:
    """How many words a row's normal numbers are made of: they come in pairs."""
    return 2 * -(-math.prod(shape) // 2)


def keyed_uniform(seed: int, ids: Tensor, *, purpose: str, counter: int = 0, shape: Sequence[int] = ()) -> Tensor:
    """`uniform_of` the words of one purpose, float32 [b, *shape]."""
    words = keyed_words(seed, ids, purpose=purpose, counter=counter, count=math.prod(shape))
    return uniform_of(words).reshape(ids.shape[0], *shape)


def keyed_normal(seed: int, ids: Tensor, *, purpose: str, counter: int = 0, shape: Sequence[int]) -> Tensor:
    """`normal_of` the words of one purpose, float32 [b, *shape]."""
    words = keyed_words(seed, ids, purpose=purpose, counter=counter, count=num_words_of_normal(shape))
    return normal_of(words, shape)


def ids_from_bytes(sample_ids: Sequence[bytes]) -> Tensor:
    """Row ids of 16 bytes each as int64 [b, 2], two little-endian words per id."""
    wrong = next((sample_id for sample_id in sample_ids if len(sample_id) != 16), None)
    if wrong is not None:
        raise ValueError(f"a row id is exactly 16 bytes, got {len(wrong)}: {wrong.hex()}")
    words = np.frombuffer(b"".join(sample_ids), dtype="<i8").astype(np.int64).reshape(-1, 2)
    return torch.from_numpy(words)


def ids_from_words(words_B2: np.ndarray) -> Tensor:
    """Row ids held as uint64 [b, 2] (two little-endian words, as the stream gives them) as int64 [b, 2]."""
    return torch.from_numpy(np.array(words_B2, dtype=np.uint64).view(np.int64))


def id_from_text(text: str) -> bytes:
    """The 16-byte id of any text (a request key, a fixed name): blake2b-128 of its UTF-8 bytes."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class _Constants:
    """What the draws of a run share: the run key of each purpose, and whose and which each block is."""

    run_keys_2P: Tensor
    purpose_K: Tensor
    block_K: Tensor


@lru_cache(maxsize=256)  # of few purposes, and of every size of latents that a run meets
def _constants(seed: int, num_blocks: tuple[tuple[str, int], ...], device: torch.device) -> _Constants:
    keys = [_run_key(seed, purpose) for purpose, _ in num_blocks]
    counts = [count for _, count in num_blocks]
    with torch.inference_mode(False):
        return _Constants(
            torch.tensor([[key & _MASK32 for key in keys], [key >> 32 for key in keys]], device=device),
            torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(device),
            torch.from_numpy(np.concatenate([np.arange(count) for count in counts])).to(device),
        )


def _run_key(seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{purpose}".encode(), digest_size=8, person=b"latentloom-rng-1")
    return int.from_bytes(digest.digest(), "little")
