"""RMS normalization over the last dimension.

    y = x * rstd * w          rstd = 1 / sqrt(mean(x^2) + eps)          x (M, N)   w (N,)   rstd (M,)

Backward, with x_hat = x * rstd and g = dy * w:

    dx = rstd * (g - x_hat * mean(g * x_hat))          dw = sum over M of dy * x_hat

Statistics in fp32 whatever the input (fp64 for fp64). Bound by DRAM: forward reads x and writes y (2MN elements),
backward reads dy and x and writes dx (3MN). Rows wider than WIDEST (WIDEST_BWD) are read once more.
Source: Zhang & Sennrich 2019, arXiv:1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.blocks import accumulator, load_tile, store_tile, unit_columns
from fmcore.op import Op

# Widest row that one program holds in registers without spills (tests/resources.json), forward and backward. Twice as
# much backward would be 192 KiB for dy, x and dw of the 256 KiB that a multiprocessor has, and it spills.
WIDEST = 16384
WIDEST_BWD = 8192

# Elements that the CPU body takes at a time: some MB with its temporaries, which stay in the cache.
CPU_TILE = 2**19


# Reference: what the kernels below must equal.
def rms_norm_ref(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    x32 = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * rstd * w).to(x.dtype)


# Kernels: one program owns ROWS rows, whole (ONE_BLOCK) or block after block. The number of rows is not specialized,
# so that another batch size does not compile anew.
@triton.jit(do_not_specialize=["M"])
def rms_norm_fwd_kernel(
    x_ptr, w_ptr, y_ptr, rstd_ptr, M, N, stride_xm, eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    in_rows = rows < M
    mask = in_rows[:, None] & (cols < N)[None, :]
    x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)  # (ROWS, BLOCK_N)
    squares = x * x
    if not ONE_BLOCK:
        for start in range(BLOCK_N, N, BLOCK_N):
            mask = in_rows[:, None] & (start + cols < N)[None, :]
            x = load_tile(x_ptr, rows, start + cols, stride_xm, mask, ACC)
            squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / N + eps)  # (ROWS,)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    if ONE_BLOCK:
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(ACC)
        store_tile(y_ptr, rows, cols, N, mask, x * rstd[:, None] * w[None, :])
    else:
        for start in range(0, N, BLOCK_N):
            mask = in_rows[:, None] & (start + cols < N)[None, :]
            x = load_tile(x_ptr, rows, start + cols, stride_xm, mask, ACC)
            w = tl.load(w_ptr + start + cols, mask=start + cols < N, other=0.0).to(ACC)
            store_tile(y_ptr, rows, start + cols, N, mask, x * rstd[:, None] * w[None, :])


@triton.jit(do_not_specialize=["M"])
def rms_norm_mean_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, mean_ptr, M, N, stride_dym, stride_xm,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean(g * x_hat) of each row, for rows that the backward kernel cannot hold whole."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < M
    products = tl.zeros((ROWS, BLOCK_N), ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_rows[:, None] & (cols < N)[None, :]
        dy = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC)
        x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(ACC)
        products += dy * w[None, :] * x
    rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
    tl.store(mean_ptr + rows, tl.sum(products, axis=1) * rstd / N, mask=in_rows)


@triton.jit(do_not_specialize=["M", "tiles"])
def rms_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, rstd_ptr, mean_ptr, dx_ptr, dw_ptr, M, N, stride_dym, stride_xm, tiles,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr, NEEDS_DW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program owns ``tiles`` tiles of rows, and with wide rows one block of columns of them."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    w = tl.load(w_ptr + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
    dw = tl.zeros((ROWS, BLOCK_N), ACC)
    for i in range(tiles):
        rows = (pid * tiles + i) * ROWS + tl.arange(0, ROWS)
        in_rows = rows < M
        mask = in_rows[:, None] & in_cols[None, :]
        dy = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC)
        x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]
        x_hat = x * rstd
        g = dy * w
        if ONE_BLOCK:
            mean = (tl.sum(g * x_hat, axis=1) / N)[:, None]
        else:
            mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
        store_tile(dx_ptr, rows, cols, N, mask, rstd * (g - x_hat * mean))
        if NEEDS_DW:
            dw += dy * x_hat
    if NEEDS_DW:
        # The launcher sums these over programs in a fixed order; atomics would give other bits on each run.
        tl.store(dw_ptr + pid * N + cols, tl.sum(dw, axis=0), mask=in_cols)


# Operators: what every body returns, then the bodies.
fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor w, float eps) -> (Tensor y, Tensor rstd)",
    fake=lambda x, w, eps: (x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=accumulator(x.dtype)[0])),
)
bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor w, Tensor rstd, bool needs_dw) -> (Tensor dx, Tensor dw)",
    fake=lambda dy, x, w, rstd, needs_dw: (x.new_empty(x.shape), w.new_empty(w.shape if needs_dw else 0)),
)


@fwd.body("cpu", accepts=lambda x, *rest: x.device.type == "cpu")
def rms_norm_fwd_cpu(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x32 = x.to(accumulator(x.dtype)[0])
    rstd = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(x32, rstd, out=x32.new_empty(x.shape))
    return y.mul_(w).to(x.dtype), rstd.squeeze(-1)


@bwd.body("cpu", accepts=lambda dy, *rest: dy.device.type == "cpu")
def rms_norm_bwd_cpu(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, needs_dw: bool) -> tuple[Tensor, Tensor]:
    """By PyTorch's layer norm with a mean of zero: it subtracts mean(g) from each row, which is added back."""
    (M, N), stat = x.shape, accumulator(x.dtype)[0]
    dx, w32, step = x.new_empty(M, N), w.to(stat), max(1, CPU_TILE // N)
    mean = rstd.new_zeros(min(M, step), 1)
    dws = x.new_zeros(triton.cdiv(M, step), N if needs_dw else 0, dtype=stat)
    for i, start in enumerate(range(0, M, step)):
        dy_i, x_i, rstd_i, dx_i = (t[start : start + step] for t in (dy, x, rstd.unsqueeze(-1), dx))
        dy_i, x_i = dy_i.to(stat).contiguous(), x_i.to(stat).contiguous()
        part, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy_i, x_i, [N], mean[: len(x_i)], rstd_i, w32, None, [True, False, False]
        )
        dx_i.copy_(part.add_(torch.mv(dy_i, w32).unsqueeze(-1).mul_(rstd_i).div_(N)))
        if needs_dw:
            # Not by the operator above: its sums over rows are three times as far from fp64 as eager's.
            torch.sum(dy_i.mul(x_i).mul_(rstd_i), 0, out=dws[i])
    return dx, dws.sum(0).to(w.dtype)


@fwd.body("triton", accepts=lambda x, *rest: x.is_cuda)
def rms_norm_fwd_triton(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    (M, N), (stat, ACC) = x.shape, accumulator(x.dtype)
    x, w = unit_columns(x), w.contiguous()
    y, rstd = x.new_empty(M, N), x.new_empty(M, dtype=stat)
    rows, block_n, warps = launch.row_tile(N, WIDEST)
    if M:
        rms_norm_fwd_kernel[(triton.cdiv(M, rows),)](
            x, w, y, rstd, M, N, x.stride(0), eps,
            ROWS=rows, BLOCK_N=block_n, ONE_BLOCK=block_n >= N, ACC=ACC, num_warps=warps,
        )  # fmt: skip
    return y, rstd


@bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)
def rms_norm_bwd_triton(dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, needs_dw: bool) -> tuple[Tensor, Tensor]:
    (M, N), (stat, ACC) = x.shape, accumulator(x.dtype)
    dy, x, w = unit_columns(dy), unit_columns(x), w.contiguous()
    rows, block_n, warps = launch.row_tile(N, WIDEST_BWD)
    tiles = triton.cdiv(M, rows)
    programs, each = launch.persistent(tiles, x.device, warps)
    dx, dw = x.new_empty(M, N), x.new_empty(programs if needs_dw else 0, N, dtype=stat)
    strides, sizes = (dy.stride(0), x.stride(0)), dict(ROWS=rows, BLOCK_N=block_n, ACC=ACC, num_warps=warps)
    mean = rstd
    if M and block_n < N:
        mean = torch.empty_like(rstd)
        rms_norm_mean_kernel[(tiles,)](dy, x, w, rstd, mean, M, N, *strides, **sizes)
    if M:
        rms_norm_bwd_kernel[(programs, triton.cdiv(N, block_n))](
            dy, x, w, rstd, mean, dx, dw, M, N, *strides, each, ONE_BLOCK=block_n >= N, NEEDS_DW=needs_dw, **sizes
        )
    return dx, dw.sum(0).to(w.dtype) if needs_dw else w.new_empty(0)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        y, rstd = fwd(x, w, eps)
        ctx.save_for_backward(x, w, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        needs_dw = ctx.needs_input_grad[1]
        dx, dw = bwd(dy, *ctx.saved_tensors, needs_dw)
        return dx, dw if needs_dw else None, None


def rms_norm(x: Tensor, w: Tensor, eps: float = 1e-6) -> Tensor:
    """``x * w / sqrt(mean(x^2) + eps)`` over the last dimension of ``x`` (..., N), with ``w`` (N,).

    ``x`` and ``w`` share device and floating dtype; the mean is taken in fp32. Raises ``ValueError`` on shapes and
    devices, ``TypeError`` on dtypes. Source: arXiv:1910.07467.
    """
    N = check.shape("rms_norm", x=(x, "... N"), w=(w, "N"))["N"]
    check.dtype("rms_norm", x=x)
    check.same("rms_norm", x=x, w=w)
    if N == 0:
        raise ValueError(f"rms_norm: x must have at least one column, got {tuple(x.shape)}")
    if fwd.eager(x):
        return rms_norm_ref(x, w, eps)
    return RMSNorm.apply(x.reshape(-1, N), w, eps).view(x.shape)
