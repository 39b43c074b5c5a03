"""Pieces of kernels and of their launchers that two or more operators use."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_tile(ptr, rows, cols, stride, mask, ACC: tl.constexpr):
    """The (ROWS, BLOCK) tile at ``rows`` (int64) and ``cols`` of a matrix with unit column stride; 0 off the mask."""
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def store_tile(ptr, rows, cols, stride, mask, value):
    """``value`` into the (ROWS, BLOCK) tile at ``rows`` (int64) and ``cols``, rounded to what ``ptr`` points to."""
    tl.store(ptr + rows[:, None] * stride + cols[None, :], value.to(ptr.dtype.element_ty), mask=mask)


def accumulator(dtype: torch.dtype) -> tuple[torch.dtype, tl.dtype]:
    """The dtype of statistics and sums, for PyTorch and for Triton: fp32, and fp64 for fp64 (gradcheck needs it)."""
    return (torch.float64, tl.float64) if dtype == torch.float64 else (torch.float32, tl.float32)


def unit_columns(x: Tensor) -> Tensor:
    """``x`` (M, N) itself when its columns lie side by side, whatever the row stride; else a copy."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


@triton.jit
def dropout_factor(seed_ptr, rows, start, N, DROP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout factors (ROWS, BLOCK) of the elements at ``rows`` (int64) and columns from ``start``, in a matrix (M, N).

    0 for DROP (``dropout_draws``) of 2^32 draws, else the inverse of the share that stays. The factor of an element
    depends on the seed, its row and its column alone, so backward draws again what forward drew and no mask is stored.
    Four neighbours share one call of Philox, which is what keeps up with the memory: ``start`` and BLOCK are multiples
    of 4. Seven rounds pass every test of BigCrush. Source: Salmon et al. 2011, doi:10.1145/2063384.2063405.
    """
    seed = tl.load(seed_ptr)
    groups = rows[:, None] * tl.cdiv(N, 4) + (start // 4 + tl.arange(0, BLOCK // 4))[None, :]
    a, b, c, d = tl.randint4x(seed, groups, n_rounds=7)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, BLOCK))
    keep = words.to(tl.uint32, bitcast=True) >= DROP
    return tl.where(keep, 4294967296 / (4294967296 - DROP), 0.0)


def dropout_draws(p: float) -> int:
    """How many of the 2^32 draws of ``dropout_factor`` drop an element, for a probability ``p`` in [0, 1)."""
    return int(p * 2**32)


def philox_ref(seed: Tensor, groups: Tensor, rounds: int = 7) -> Tensor:
    """The words (..., 4) of Philox-4x32 under the 64-bit key ``seed`` for each counter of ``groups`` (...), both int64.

    In [0, 2^32), by 64-bit integers, whose products wrap but keep all their bits: what ``tl.randint4x`` draws.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = groups & low, (groups >> 32) & low, torch.zeros_like(groups), torch.zeros_like(groups)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(rounds):
        b, a = 0xCD9E8D57 * c2, 0xD2511F53 * c0
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack((c0, c1, c2, c3), -1)
