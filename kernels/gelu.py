"""GELU, the activation of GPT-2, exact and in the tanh approximation that GPT-2 was trained with.

    none:   y = x * Phi(x)                                          Phi(x) = (1 + erf(x / sqrt(2))) / 2
    tanh:   y = x * (1 + tanh(u)) / 2 = x * sigmoid(2u)             u = sqrt(2 / pi) * (x + 0.044715 x^3)

Backward, which recomputes both from x, the only tensor saved:

    none:   dx = dy * (Phi(x) + x * exp(-x^2 / 2) / sqrt(2 pi))
    tanh:   dx = dy * (s + x * s * (1 - s) * 2u')                   s = sigmoid(2u)   u' = du / dx

Computed in fp32 whatever the input (fp64 for fp64). Bound by DRAM: forward reads x and writes y (2MN elements),
backward reads dy and x and writes dx (3MN). x, y (M, N).
Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.blocks import accumulator, load_tile, store_tile, unit_columns
from fmcore.op import Op

SQRT_HALF = tl.constexpr(math.sqrt(1 / 2))
# 1 / sqrt(2 pi), the normal density at 0
DENSITY = tl.constexpr(1 / math.sqrt(2 * math.pi))
# 2u = TWICE * (x + CUBIC x^3)
TWICE = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


# Reference: what the kernels below must equal.
def gelu_ref(x: Tensor, approximate: str = "tanh") -> Tensor:
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    if approximate == "tanh":
        cdf = (1 + torch.tanh(math.sqrt(2 / math.pi) * (x32 + 0.044715 * x32**3))) / 2
    else:
        cdf = (1 + torch.erf(x32 * math.sqrt(1 / 2))) / 2
    return (x32 * cdf).to(x.dtype)


# Kernels: one program owns a (ROWS, BLOCK_N) tile.
@triton.jit
def gelu_fwd_kernel(
    x_ptr, y_ptr, M, N, stride_xm,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)  # (ROWS, BLOCK_N)
    cdf = 1 / (1 + tl.exp(-TWICE * x * (1 + CUBIC * x * x))) if TANH else 0.5 * (1 + tl.erf(x * SQRT_HALF))
    store_tile(y_ptr, rows, cols, N, mask, x * cdf)


@triton.jit
def gelu_bwd_kernel(
    dy_ptr, x_ptr, dx_ptr, M, N, stride_dym, stride_xm,
    TANH: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    dy = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC)
    x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)
    if TANH:
        # s (1 - s) = e / (1 + e)^2 on either side of 0. Taken from 1 - s, what is left of it for x > 3 is rounding.
        e = tl.exp(-TWICE * tl.abs(x) * (1 + CUBIC * x * x))
        larger = 1 / (1 + e)
        s = tl.where(x < 0, e * larger, larger)
        slope = s + x * (e * larger * larger) * TWICE * (1 + 3 * CUBIC * x * x)
    else:
        slope = 0.5 * (1 + tl.erf(x * SQRT_HALF)) + x * DENSITY * tl.exp(-0.5 * x * x)
    store_tile(dx_ptr, rows, cols, N, mask, dy * slope)


# Operators: what every body returns, then the bodies.
fwd = Op("gelu_fwd(Tensor x, bool tanh) -> Tensor", fake=lambda x, tanh: x.new_empty(x.shape))
bwd = Op("gelu_bwd(Tensor dy, Tensor x, bool tanh) -> Tensor", fake=lambda dy, x, tanh: x.new_empty(x.shape))


@fwd.body("triton", accepts=lambda x, *rest: x.is_cuda)
def gelu_fwd_triton(x: Tensor, tanh: bool) -> Tensor:
    (M, N), x = x.shape, unit_columns(x)
    y = x.new_empty(M, N)
    rows, block_n, warps = launch.element_tile(N)
    if y.numel():
        gelu_fwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, block_n),)](
            x, y, M, N, x.stride(0),
            TANH=tanh, ROWS=rows, BLOCK_N=block_n, ACC=accumulator(x.dtype)[1], num_warps=warps,
        )  # fmt: skip
    return y


@bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)
def gelu_bwd_triton(dy: Tensor, x: Tensor, tanh: bool) -> Tensor:
    (M, N), dy, x = x.shape, unit_columns(dy), unit_columns(x)
    dx = x.new_empty(M, N)
    rows, block_n, warps = launch.element_tile(N)
    if dx.numel():
        gelu_bwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, block_n),)](
            dy, x, dx, M, N, dy.stride(0), x.stride(0),
            TANH=tanh, ROWS=rows, BLOCK_N=block_n, ACC=accumulator(x.dtype)[1], num_warps=warps,
        )  # fmt: skip
    return dx


class GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, tanh: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tanh = tanh
        return fwd(x, tanh)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        return bwd(dy, *ctx.saved_tensors, ctx.tanh), None


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """``x * Phi(x)`` elementwise, for ``x`` (..., N) of a floating dtype; Phi is the normal distribution function.

    ``approximate="tanh"`` is the formula of GPT-2, ``"none"`` the exact one through erf. Raises ``ValueError`` on
    another ``approximate``, ``TypeError`` on dtypes. Source: arXiv:1606.08415.
    """
    check.dtype("gelu", x=x)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"gelu: approximate must be 'tanh' or 'none', got {approximate!r}")
    if fwd.eager(x):
        # One pass each way, and it saves x alone: nothing of ours is faster on a CPU.
        return F.gelu(x, approximate=approximate)
    N = x.shape[-1] if x.ndim else 1
    return GELU.apply(x.reshape(math.prod(x.shape[:-1]), N), approximate == "tanh").view(x.shape)
