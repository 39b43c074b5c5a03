"""Activations: gelu, exact and in the tanh approximation, quick_gelu and relu_squared, each with an optional bias.

    y = f(x + bias)             x, y (M, N)   bias (N,)

    gelu_tanh      x * sigmoid(z), z = 2 * sqrt(2 / pi) * (x + 0.044715 x^3), which is x * (1 + tanh(z / 2)) / 2
    gelu           x * Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2
    quick_gelu     x * sigmoid(1.702 x)
    relu_squared   max(x, 0)^2

``value_and_slope`` holds each f with its slope f', also silu and relu, which kernels/glu.py gates with. Backward
recomputes both from x and bias, the only tensors saved:

    dx = dy * f'(x + bias)      dbias = sum over M of dx

Computed in fp32 whatever the input, the sum x + bias too (fp64 for fp64). Bound by DRAM: forward reads x and writes y
(2MN elements), backward reads dy and x and writes dx (3MN); dbias is summed in the same pass.
Source: Hendrycks & Gimpel 2016, arXiv:1606.08415 (gelu, quick_gelu); So et al. 2021, arXiv:2109.08668 (relu_squared).
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
# z = TWICE * (x + CUBIC x^3)
TWICE = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)
# exp(-FAR) is 0 in fp64 too, so beyond it every sigmoid is 0 or 1; and FAR^3 overflows nowhere.
FAR = tl.constexpr(1000.0)


# References: what the kernels below must equal.
def gelu_ref(x: Tensor, approximate: str = "tanh", bias: Tensor | None = None) -> Tensor:
    return F.gelu(_biased(x, bias), approximate=approximate).to(x.dtype)


def quick_gelu_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    x32 = _biased(x, bias).to(torch.promote_types(x.dtype, torch.float32))
    return (x32 * torch.sigmoid(1.702 * x32)).to(x.dtype)


def relu_squared_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.relu(_biased(x, bias)).square().to(x.dtype)


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """``x + bias`` in fp32 or fp64; ``x`` itself without a bias, for the formulas that round once in 16 bits too."""
    return x if bias is None else x + bias.to(torch.promote_types(x.dtype, torch.float32))


# Functions of one element, chosen by KIND; what a kernel does not use of a pair is not compiled into it.
@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """f(x) and f'(x), NaN for NaN and for nothing finite."""
    if KIND == "relu":
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif KIND == "relu_squared":
        value = tl.where(x < 0, 0.0, x * x)
        slope = tl.where(x <= 0, 0.0, 2 * x)
    elif KIND == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * SQRT_HALF))
        value = x * cdf
        slope = cdf + x * (DENSITY * tl.exp(-0.5 * x * x))
    else:
        # x * sigmoid(z). s (1 - s) = e / (1 + e)^2 on either side of 0: from 1 - s, what is left of it for large z is
        # rounding. ``tail`` is that times x dz/dx, which is odd in x as z is.
        a = tl.abs(x)
        a = tl.where(a > FAR, FAR, a)
        if KIND == "gelu_tanh":
            z = TWICE * a * (1 + CUBIC * a * a)
            x_dz = TWICE * a * (1 + 3 * CUBIC * a * a)
        elif KIND == "quick_gelu":
            z = QUICK * a
            x_dz = z
        else:
            tl.static_assert(KIND == "silu")
            z = a
            x_dz = z
        e = tl.exp(-z)
        larger = 1 / (1 + e)
        s = tl.where(x < 0, e * larger, larger)
        tail = x_dz * (e * larger * larger)
        value = x * s
        slope = tl.where(x < 0, s - tail, s + tail)
    return value, slope


@triton.jit
def chain(d, slope, KIND: tl.constexpr):
    """d * slope; as in PyTorch a closed relu passes nothing on, not even the NaN that inf * 0 is."""
    if KIND == "relu" or KIND == "relu_squared":
        d = tl.where(slope == 0, 0.0, d)
    return d * slope


# Kernels: one program owns a (ROWS, BLOCK_N) tile; blocks of one row are neighbours, so that lines are read once. The
# number of rows is not specialized, so that another batch size does not compile anew.
@triton.jit(do_not_specialize=["M"])
def activation_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, M, N, stride_xm,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)  # (ROWS, BLOCK_N)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
    y, _ = value_and_slope(x, KIND)
    store_tile(y_ptr, rows, cols, N, mask, y)


@triton.jit(do_not_specialize=["M", "tiles"])
def activation_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, M, N, stride_dym, stride_xm, tiles,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """With dbias a program goes down ``tiles`` tiles of rows and keeps a running sum; without, it owns one tile."""
    pid, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    part = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
    if dbias_ptr is not None:
        dbias = tl.zeros((ROWS, BLOCK_N), ACC)
    for i in range(tiles if dbias_ptr is not None else 1):
        rows = (part * tiles + i) * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & in_cols[None, :]
        dy = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC)
        x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)
        if bias_ptr is not None:
            x += bias
        _, slope = value_and_slope(x, KIND)
        dx = chain(dy, slope, KIND)
        if dx_ptr is not None:
            store_tile(dx_ptr, rows, cols, N, mask, dx)
        if dbias_ptr is not None:
            dbias += dx
    if dbias_ptr is not None:
        # The launcher sums these over programs in a fixed order; atomics would give other bits on each run.
        tl.store(dbias_ptr + part * N + cols, tl.sum(dbias, axis=0), mask=in_cols)


# Bodies and operators: one pair of bodies, a pair of operators for each public function.
def activation_fwd_triton(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    (M, N), x = x.shape, unit_columns(x)
    y = x.new_empty(M, N)
    rows, block_n, warps = launch.element_tile(N)
    if y.numel():
        activation_fwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(N, block_n),)](
            x, None if bias is None else bias.contiguous(), y, M, N, x.stride(0),
            KIND=kind, ROWS=rows, BLOCK_N=block_n, ACC=accumulator(x.dtype)[1], num_warps=warps,
        )  # fmt: skip
    return y


def activation_bwd_triton(
    dy: Tensor, x: Tensor, bias: Tensor | None, kind: str, needs_dx: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor]:
    (M, N), dy, x, (stat, ACC) = x.shape, unit_columns(dy), unit_columns(x), accumulator(x.dtype)
    dx = x.new_empty(M, N) if needs_dx else None
    (rows, block_n, warps), programs, tiles, blocks = launch.column_sums(M, N, int(needs_dbias), x.device)
    dbias = x.new_empty(programs, N, dtype=stat) if needs_dbias else None
    if x.numel():
        activation_bwd_kernel[(programs * blocks,)](
            dy, x, None if bias is None else bias.contiguous(), dx, dbias, M, N, dy.stride(0), x.stride(0), tiles,
            KIND=kind, ROWS=rows, BLOCK_N=block_n, ACC=ACC, num_warps=warps,
        )  # fmt: skip
    return x.new_empty(0) if dx is None else dx, x.new_empty(0) if dbias is None else dbias.sum(0).to(x.dtype)


def _operator(name: str) -> tuple[Op, Op]:
    """Forward and backward of the public function ``name``."""
    fwd = Op(f"{name}_fwd(Tensor x, Tensor? bias, str kind) -> Tensor", fake=lambda x, *rest: x.new_empty(x.shape))
    bwd = Op(
        f"{name}_bwd(Tensor dy, Tensor x, Tensor? bias, str kind, bool needs_dx, bool needs_dbias) -> (Tensor, Tensor)",
        fake=lambda dy, x, bias, kind, needs_dx, needs_dbias: (
            x.new_empty(x.shape if needs_dx else 0),
            x.new_empty(x.shape[1] if needs_dbias else 0),
        ),
    )
    fwd.body("triton", accepts=lambda x, *rest: x.is_cuda)(activation_fwd_triton)
    bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)(activation_bwd_triton)
    return fwd, bwd


OPERATORS = {name: _operator(name) for name in ("gelu", "quick_gelu", "relu_squared")}


class Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, name: str, kind: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.name, ctx.kind = name, kind
        return OPERATORS[name][0](x, bias, kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        needs_dx, needs_dbias = ctx.needs_input_grad[:2]
        dx, dbias = OPERATORS[ctx.name][1](dy, *ctx.saved_tensors, ctx.kind, needs_dx, needs_dbias)
        return dx if needs_dx else None, dbias if needs_dbias else None, None, None


def _takes_plain_path(name: str, x: Tensor, bias: Tensor | None) -> bool:
    """Check the arguments; whether PyTorch computes. One or two passes each way: nothing of ours is faster on a CPU."""
    check.dtype(name, x=x)
    if bias is not None:
        check.shape(name, x=(x, "... N"), bias=(bias, "N"))
        check.same(name, x=x, bias=bias)
    return OPERATORS[name][0].eager(x)


def _apply(name: str, kind: str, x: Tensor, bias: Tensor | None) -> Tensor:
    N = x.shape[-1] if x.ndim else 1
    return Activation.apply(x.reshape(math.prod(x.shape[:-1]), N), bias, name, kind).view(x.shape)


def gelu(x: Tensor, approximate: str = "tanh", *, bias: Tensor | None = None) -> Tensor:
    """``h * Phi(h)`` elementwise with ``h = x + bias``, for ``x`` (..., N) and ``bias`` (N,); Phi is the normal
    distribution function.

    ``approximate="tanh"`` is the formula of GPT-2, ``"none"`` the exact one through erf. ``x`` and ``bias`` share
    device and floating dtype; their sum is taken in fp32. Raises ``ValueError`` on shapes, devices and another
    ``approximate``, ``TypeError`` on dtypes. Source: arXiv:1606.08415.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"gelu: approximate must be 'tanh' or 'none', got {approximate!r}")
    if _takes_plain_path("gelu", x, bias):
        return gelu_ref(x, approximate, bias)
    return _apply("gelu", "gelu_tanh" if approximate == "tanh" else "gelu", x, bias)


def quick_gelu(x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``h * sigmoid(1.702 * h)`` elementwise with ``h = x + bias``, for ``x`` (..., N) and ``bias`` (N,).

    The activation of CLIP. ``x`` and ``bias`` share device and floating dtype; their sum is taken in fp32. Raises
    ``ValueError`` on shapes and devices, ``TypeError`` on dtypes. Source: arXiv:1606.08415.
    """
    if _takes_plain_path("quick_gelu", x, bias):
        return quick_gelu_ref(x, bias)
    return _apply("quick_gelu", "quick_gelu", x, bias)


def relu_squared(x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``max(h, 0)^2`` elementwise with ``h = x + bias``, for ``x`` (..., N) and ``bias`` (N,).

    ``x`` and ``bias`` share device and floating dtype; their sum is taken in fp32. Raises ``ValueError`` on shapes and
    devices, ``TypeError`` on dtypes. Source: arXiv:2109.08668.
    """
    if _takes_plain_path("relu_squared", x, bias):
        return relu_squared_ref(x, bias)
    return _apply("relu_squared", "relu_squared", x, bias)
