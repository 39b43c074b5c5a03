"""Pieces of kernels and of their launchers that two or more operators use."""

import math

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
    """``x`` (..., N) itself when its columns lie side by side, whatever its other strides; else a copy."""
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


def as_rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors of one shape (..., N) as views (M, H, N) with unit columns: row m * H + h of the whole is [m, h].

    The leading dimensions are cut into two groups where most tensors fit without a copy, the others are copied. H is 1
    where the rows of each lie evenly; the heads that norms of q and k get from a fused projection need both strides.
    """
    given = [t for t in tensors if t is not None]
    *lead, N = given[0].shape
    if all([t.is_contiguous() for t in given]):
        # What the next lines would find, without the time they take.
        return [t if t is None else t.view(math.prod(lead), 1, N) for t in tensors]
    # The first of the best, and so H = 1 if that will do.
    cut = max(range(len(lead), 0, -1), key=lambda i: sum(_fits(t, i) for t in given), default=0)
    shape = math.prod(lead[:cut]), math.prod(lead[cut:]), N
    return [t if t is None else (t if _fits(t, cut) else t.contiguous()).view(shape) for t in tensors]


def _fits(t: Tensor, cut: int) -> bool:
    """Whether ``t`` has unit columns, and even steps along its leading dimensions, up to ``cut`` and from there on."""
    if t.is_contiguous():
        return True
    size, stride = t.shape, t.stride()
    groups = [[i for i in dims if size[i] != 1] for dims in (range(cut), range(cut, t.ndim - 1))]
    return (size[-1] == 1 or stride[-1] == 1) and all(
        stride[i] == size[j] * stride[j] for dims in groups for i, j in zip(dims, dims[1:], strict=False)
    )


@triton.jit
def load_weight(w_ptr, cols, N, OFFSET: tl.constexpr, ACC: tl.constexpr):
    """OFFSET + w (1, BLOCK) at ``cols``, added in ACC: Gemma's 1 + w loses bits in bf16. Ones where there is no w."""
    if w_ptr is None:
        w = tl.full(cols.shape, 1.0, ACC)
    else:
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(ACC) + OFFSET
    return w[None, :]


@triton.jit
def load_sum(
    x_ptr, residual_ptr, sum_ptr, seed_ptr, rows, flat, start, stride_x, stride_r, mask, N,
    DROP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The tile of residual + dropout(x) from column ``start``, rounded to the dtype of x; 0 off the mask.

    Without a ``residual_ptr`` or without DROP that part is left out. With a ``sum_ptr`` the tile is stored there, at
    the rows ``flat`` of a contiguous matrix, which also say what dropout draws.
    """
    cols = start + tl.arange(0, BLOCK)
    s = load_tile(x_ptr, rows, cols, stride_x, mask, ACC)
    if DROP > 0:
        s *= dropout_factor(seed_ptr, flat, start, N, DROP, ROWS, BLOCK)
    if residual_ptr is not None:
        s += load_tile(residual_ptr, rows, cols, stride_r, mask, ACC)
    if DROP > 0 or residual_ptr is not None:
        s = s.to(x_ptr.dtype.element_ty).to(ACC)
    if sum_ptr is not None:
        store_tile(sum_ptr, flat, cols, N, mask, s)
    return s
