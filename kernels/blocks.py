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
