"""Layer normalization over the last dimension.

    y = x_hat * w + b         x_hat = (x - mean) * rstd         rstd = 1 / sqrt(var(x) + eps), var over N, not N - 1

x (M, N)   w, b (N,)   mean, rstd (M,). Backward, with g = dy * w:

    dx = rstd * (g - mean(g) - x_hat * mean(g * x_hat))       dw = sum over M of dy * x_hat       db = sum over M of dy

Statistics in fp32 whatever the input (fp64 for fp64), the variance from differences to the mean. Bound by DRAM:
forward reads x and writes y (2MN elements), backward reads dy and x and writes dx (3MN). Rows wider than WIDEST are
read twice more forward, wider than WIDEST_BWD once more backward.
Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
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
# much backward would be all of the 256 KiB that a multiprocessor has, for dy, x, dw and db.
WIDEST = 16384
WIDEST_BWD = 8192


# Reference: what the kernels below must equal.
def layer_norm_ref(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), w, b, eps)


# Kernels: one program owns ROWS rows, whole (ONE_BLOCK) or block after block. The number of rows is not specialized,
# so that another batch size does not compile anew.
@triton.jit(do_not_specialize=["M"])
def layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, M, N, stride_xm, eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < M
    cols = tl.arange(0, BLOCK_N)
    mask = in_rows[:, None] & (cols < N)[None, :]
    x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)  # (ROWS, BLOCK_N)
    total = x
    if not ONE_BLOCK:
        for start in range(BLOCK_N, N, BLOCK_N):
            mask_i = in_rows[:, None] & (start + cols < N)[None, :]
            total += load_tile(x_ptr, rows, start + cols, stride_xm, mask_i, ACC)
    mean = tl.sum(total, axis=1) / N  # (ROWS,)
    x = tl.where(mask, x - mean[:, None], 0.0)
    squares = x * x
    if not ONE_BLOCK:
        for start in range(BLOCK_N, N, BLOCK_N):
            mask_i = in_rows[:, None] & (start + cols < N)[None, :]
            d = load_tile(x_ptr, rows, start + cols, stride_xm, mask_i, ACC) - mean[:, None]
            squares += tl.where(mask_i, d * d, 0.0)
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / N + eps)  # (ROWS,)
    tl.store(mean_ptr + rows, mean, mask=in_rows)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    if ONE_BLOCK:
        y = x * rstd[:, None] * tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
        if HAS_BIAS:
            y += tl.load(b_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
        store_tile(y_ptr, rows, cols, N, mask, y)
    else:
        for start in range(0, N, BLOCK_N):
            in_cols = start + cols < N
            mask_i = in_rows[:, None] & in_cols[None, :]
            d = load_tile(x_ptr, rows, start + cols, stride_xm, mask_i, ACC) - mean[:, None]
            y = d * rstd[:, None] * tl.load(w_ptr + start + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
            if HAS_BIAS:
                y += tl.load(b_ptr + start + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
            store_tile(y_ptr, rows, start + cols, N, mask_i, y)


@triton.jit(do_not_specialize=["M"])
def layer_norm_means_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr, M, N, stride_dym, stride_xm,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean(g) and mean(g * x_hat) of each row, for rows that the backward kernel cannot hold whole."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < M
    mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
    total_g = tl.zeros((ROWS, BLOCK_N), ACC)
    total_gx = tl.zeros((ROWS, BLOCK_N), ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_rows[:, None] & (cols < N)[None, :]
        w = tl.load(w_ptr + cols, mask=cols < N, other=0.0).to(ACC)[None, :]
        g = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC) * w
        total_g += g
        # Off the mask g is zero, so x - mean there adds nothing.
        total_gx += g * (load_tile(x_ptr, rows, cols, stride_xm, mask, ACC) - mean)
    rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)
    tl.store(mean_g_ptr + rows, tl.sum(total_g, axis=1) / N, mask=in_rows)
    tl.store(mean_gx_ptr + rows, tl.sum(total_gx, axis=1) * rstd / N, mask=in_rows)


@triton.jit(do_not_specialize=["M", "tiles"])
def layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr, dx_ptr, dw_ptr, db_ptr,
    M, N, stride_dym, stride_xm, tiles,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr, NEEDS_DW: tl.constexpr, NEEDS_DB: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """One program owns ``tiles`` tiles of rows, and with wide rows one block of columns of them."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    w = tl.load(w_ptr + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
    dw = tl.zeros((ROWS, BLOCK_N), ACC)
    db = tl.zeros((ROWS, BLOCK_N), ACC)
    for i in range(tiles):
        rows = (pid * tiles + i) * ROWS + tl.arange(0, ROWS)
        in_rows = rows < M
        mask = in_rows[:, None] & in_cols[None, :]
        dy = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC)
        x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)
        mean = tl.load(mean_ptr + rows, mask=in_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=in_rows, other=0.0)[:, None]
        # Off the mask dy is zero, so whatever x_hat is there reaches no sum.
        x_hat = (x - mean) * rstd
        g = dy * w
        if ONE_BLOCK:
            mean_g = (tl.sum(g, axis=1) / N)[:, None]
            mean_gx = (tl.sum(g * x_hat, axis=1) / N)[:, None]
        else:
            mean_g = tl.load(mean_g_ptr + rows, mask=in_rows, other=0.0)[:, None]
            mean_gx = tl.load(mean_gx_ptr + rows, mask=in_rows, other=0.0)[:, None]
        store_tile(dx_ptr, rows, cols, N, mask, rstd * (g - mean_g - x_hat * mean_gx))
        if NEEDS_DW:
            dw += dy * x_hat
        if NEEDS_DB:
            db += dy
    # The launcher sums these over programs in a fixed order; atomics would give other bits on each run.
    if NEEDS_DW:
        tl.store(dw_ptr + pid * N + cols, tl.sum(dw, axis=0), mask=in_cols)
    if NEEDS_DB:
        tl.store(db_ptr + pid * N + cols, tl.sum(db, axis=0), mask=in_cols)


def _fwd_fake(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stat = accumulator(x.dtype)[0]
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=stat), x.new_empty(x.shape[0], dtype=stat)


def _bwd_fake(dy, x, w, mean, rstd, needs_dw: bool, needs_db: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), w.new_empty(w.shape if needs_dw else 0), w.new_empty(w.shape if needs_db else 0)


# Operators: what every body returns (above), then the bodies.
fwd = Op(
    "layer_norm_fwd(Tensor x, Tensor w, Tensor? b, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_fwd_fake,
)
bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor w, Tensor mean, Tensor rstd, bool needs_dw, bool needs_db)"
    " -> (Tensor dx, Tensor dw, Tensor db)",
    fake=_bwd_fake,
)


@fwd.body("triton", accepts=lambda x, *rest: x.is_cuda)
def layer_norm_fwd_triton(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    (M, N), (stat, ACC) = x.shape, accumulator(x.dtype)
    x, w, b = unit_columns(x), w.contiguous(), b if b is None else b.contiguous()
    y, mean, rstd = x.new_empty(M, N), x.new_empty(M, dtype=stat), x.new_empty(M, dtype=stat)
    rows, block_n, warps = launch.row_tile(N, WIDEST)
    if M:
        layer_norm_fwd_kernel[(triton.cdiv(M, rows),)](
            x, w, w if b is None else b, y, mean, rstd, M, N, x.stride(0), eps,
            ROWS=rows, BLOCK_N=block_n, ONE_BLOCK=block_n >= N, HAS_BIAS=b is not None, ACC=ACC, num_warps=warps,
        )  # fmt: skip
    return y, mean, rstd


@bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)
def layer_norm_bwd_triton(dy, x, w, mean, rstd, needs_dw: bool, needs_db: bool) -> tuple[Tensor, Tensor, Tensor]:
    (M, N), (stat, ACC) = x.shape, accumulator(x.dtype)
    dy, x, w = unit_columns(dy), unit_columns(x), w.contiguous()
    rows, block_n, warps = launch.row_tile(N, WIDEST_BWD)
    tiles = triton.cdiv(M, rows)
    programs, each = launch.persistent(tiles, x.device, warps)
    dx = x.new_empty(M, N)
    dw, db = (x.new_empty(programs if needed else 0, N, dtype=stat) for needed in (needs_dw, needs_db))
    strides, sizes = (dy.stride(0), x.stride(0)), dict(ROWS=rows, BLOCK_N=block_n, ACC=ACC, num_warps=warps)
    means = mean, rstd
    if M and block_n < N:
        means = torch.empty_like(mean), torch.empty_like(mean)
        layer_norm_means_kernel[(tiles,)](dy, x, w, mean, rstd, *means, M, N, *strides, **sizes)
    if M:
        layer_norm_bwd_kernel[(programs, triton.cdiv(N, block_n))](
            dy, x, w, mean, rstd, *means, dx, dw, db, M, N, *strides, each,
            ONE_BLOCK=block_n >= N, NEEDS_DW=needs_dw, NEEDS_DB=needs_db, **sizes,
        )  # fmt: skip
    dw, db = (t.sum(0).to(w.dtype) if needed else w.new_empty(0) for t, needed in ((dw, needs_dw), (db, needs_db)))
    return dx, dw, db


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
        y, mean, rstd = fwd(x, w, b, eps)
        ctx.save_for_backward(x, w, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        _, needs_dw, needs_db, _ = ctx.needs_input_grad
        dx, dw, db = bwd(dy, *ctx.saved_tensors, needs_dw, needs_db)
        return dx, dw if needs_dw else None, db if needs_db else None, None


def layer_norm(x: Tensor, w: Tensor, b: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * w + b`` over the last dimension of ``x`` (..., N), with ``w`` and ``b`` (N,).

    All share device and floating dtype; mean and variance are taken in fp32. Raises ``ValueError`` on shapes and
    devices, ``TypeError`` on dtypes. Source: arXiv:1607.06450.
    """
    vectors = {"w": (w, "N")} if b is None else {"w": (w, "N"), "b": (b, "N")}
    N = check.shape("layer_norm", x=(x, "... N"), **vectors)["N"]
    check.dtype("layer_norm", x=x)
    check.same("layer_norm", x=x, w=w, b=b)
    if N == 0:
        raise ValueError(f"layer_norm: x must have at least one column, got {tuple(x.shape)}")
    if fwd.eager(x):
        return layer_norm_ref(x, w, b, eps)
    return LayerNorm.apply(x.reshape(-1, N), w, b, eps).view(x.shape)
