"""Layer normalization over the last dimension, with the residual sum and the dropout that stand before it in a model.

    sum = residual + dropout(x)         x_hat = (sum - mean(sum)) * rstd         rstd = 1 / sqrt(var(sum) + eps)
    y = x_hat * (offset + w) + b        var over N, not N - 1

x, residual, sum, y (M, H, N)   w, b (N,)   mean, rstd (M, H); H heads of one norm, else 1. Backward, with the mask f of
dropout and g = dy * (offset + w):

    dresidual = dsum + rstd * (g - mean(g) - x_hat * mean(g * x_hat))       dx = dresidual * f
    dw = total of dy * x_hat       db = total of dy

Statistics in fp32 whatever the input (fp64 for fp64), the variance from differences to the mean; sum is rounded once,
and y comes from the rounded one. Bound by DRAM: forward reads x and writes y (2MHN elements), backward reads dy and x
and writes dx (3MHN); residual and dropout add as in rms_norm.py. Rows wider than WIDEST are read twice more forward,
wider than WIDEST_BWD once more backward.
Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.blocks import (
    accumulator,
    as_rows,
    dropout_draws,
    dropout_factor,
    load_sum,
    load_tile,
    load_weight,
    store_tile,
)
from fmcore.kernels.rms_norm import check_norm, mask_ref, sum_ref
from fmcore.op import Op

# Widest row that one program holds in registers without spills (tests/resources.json), forward and backward. Twice as
# much backward would be all of the 256 KiB that a multiprocessor has, for dy, x, dw and db.
WIDEST = 16384
WIDEST_BWD = 8192


# Reference: what the kernels below must equal.
def layer_norm_ref(
    x: Tensor, w: Tensor | None = None, b: Tensor | None = None, eps: float = 1e-5, *,
    residual: Tensor | None = None, offset: float = 0.0, dropout: float = 0.0, seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    total = sum_ref(x, residual, mask_ref(x, seed, dropout))
    if offset == 0 or w is None:
        y = F.layer_norm(total, x.shape[-1:], w, b, eps)
    else:
        wide = torch.promote_types(x.dtype, torch.float32)
        b = b if b is None else b.to(wide)
        y = F.layer_norm(total.to(wide), x.shape[-1:], offset + w.to(wide), b, eps).to(x.dtype)
    return y if residual is None else (y, total)


# Kernels: one program owns ROWS rows of one head, whole (ONE_BLOCK) or block after block. ``rows`` are indices along M,
# ``flat`` those of the same rows in a contiguous (M * H, N). Heads vary fastest, so that neighbours in memory are read
# together. The number of rows is not specialized, so that another batch size does not compile anew.
@triton.jit(do_not_specialize=["M"])
def layer_norm_fwd_kernel(
    x_ptr, residual_ptr, seed_ptr, w_ptr, b_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr,
    M, H, N, stride_xm, stride_xh, stride_rm, stride_rh,
    EPS: tl.constexpr, OFFSET: tl.constexpr, DROP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = (tile % H).to(tl.int64)
    rows = (tile // H).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    flat = rows * H + head
    in_rows = rows < M
    x_ptr += head * stride_xh
    if residual_ptr is not None:
        residual_ptr += head * stride_rh
    cols = tl.arange(0, BLOCK_N)
    mask = in_rows[:, None] & (cols < N)[None, :]
    x = load_sum(
        x_ptr, residual_ptr, sum_ptr, seed_ptr, rows, flat, 0, stride_xm, stride_rm, mask, N, DROP, ROWS, BLOCK_N, ACC
    )  # (ROWS, BLOCK_N)
    total = x
    if not ONE_BLOCK:
        for start in range(BLOCK_N, N, BLOCK_N):
            mask_i = in_rows[:, None] & (start + cols < N)[None, :]
            total += load_sum(
                x_ptr, residual_ptr, sum_ptr, seed_ptr, rows, flat, start, stride_xm, stride_rm, mask_i, N,
                DROP, ROWS, BLOCK_N, ACC,
            )  # fmt: skip
    mean = tl.sum(total, axis=1) / N  # (ROWS,)
    x = tl.where(mask, x - mean[:, None], 0.0)
    squares = x * x
    if not ONE_BLOCK:
        # The sum twice more from its parts: what this program has stored, other threads of it may not see yet.
        for start in range(BLOCK_N, N, BLOCK_N):
            mask_i = in_rows[:, None] & (start + cols < N)[None, :]
            x_i = load_sum(
                x_ptr, residual_ptr, None, seed_ptr, rows, flat, start, stride_xm, stride_rm, mask_i, N,
                DROP, ROWS, BLOCK_N, ACC,
            )  # fmt: skip
            x_i = tl.where(mask_i, x_i - mean[:, None], 0.0)
            squares += x_i * x_i
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / N + EPS)  # (ROWS,)
    tl.store(mean_ptr + flat, mean, mask=in_rows)
    tl.store(rstd_ptr + flat, rstd, mask=in_rows)
    if ONE_BLOCK:
        y = x * rstd[:, None] * load_weight(w_ptr, cols, N, OFFSET, ACC)
        if b_ptr is not None:
            y += load_weight(b_ptr, cols, N, 0, ACC)
        store_tile(y_ptr, flat, cols, N, mask, y)
    else:
        for start in range(0, N, BLOCK_N):
            mask_i = in_rows[:, None] & (start + cols < N)[None, :]
            x_i = load_sum(
                x_ptr, residual_ptr, None, seed_ptr, rows, flat, start, stride_xm, stride_rm, mask_i, N,
                DROP, ROWS, BLOCK_N, ACC,
            )  # fmt: skip
            y = (x_i - mean[:, None]) * rstd[:, None] * load_weight(w_ptr, start + cols, N, OFFSET, ACC)
            if b_ptr is not None:
                y += load_weight(b_ptr, start + cols, N, 0, ACC)
            store_tile(y_ptr, flat, start + cols, N, mask_i, y)


@triton.jit(do_not_specialize=["M"])
def layer_norm_means_kernel(
    dy_ptr, x_ptr, seed_ptr, w_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr,
    M, H, N, stride_dym, stride_dyh, stride_xm, stride_xh,
    OFFSET: tl.constexpr, DROP_X: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean(g) and mean(g * x_hat) of each row, for rows that the backward kernel cannot hold whole."""
    tile = tl.program_id(0)
    head = (tile % H).to(tl.int64)
    rows = (tile // H).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    flat = rows * H + head
    in_rows = rows < M
    dy_ptr += head * stride_dyh
    x_ptr += head * stride_xh
    mean = tl.load(mean_ptr + flat, mask=in_rows, other=0.0)[:, None]
    total_g = tl.zeros((ROWS, BLOCK_N), ACC)
    total_gx = tl.zeros((ROWS, BLOCK_N), ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_rows[:, None] & (cols < N)[None, :]
        g = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC) * load_weight(w_ptr, cols, N, OFFSET, ACC)
        x = load_sum(x_ptr, None, None, seed_ptr, rows, flat, start, stride_xm, 0, mask, N, DROP_X, ROWS, BLOCK_N, ACC)
        total_g += g
        # Off the mask g is zero, so x - mean there adds nothing.
        total_gx += g * (x - mean)
    rstd = tl.load(rstd_ptr + flat, mask=in_rows, other=0.0)
    tl.store(mean_g_ptr + flat, tl.sum(total_g, axis=1) / N, mask=in_rows)
    tl.store(mean_gx_ptr + flat, tl.sum(total_gx, axis=1) * rstd / N, mask=in_rows)


@triton.jit(do_not_specialize=["M", "tiles"])
def layer_norm_bwd_kernel(
    dy_ptr, dsum_ptr, x_ptr, seed_ptr, w_ptr, mean_ptr, rstd_ptr, mean_g_ptr, mean_gx_ptr,
    dx_ptr, dresidual_ptr, dw_ptr, db_ptr,
    M, H, N, stride_dym, stride_dyh, stride_dsm, stride_dsh, stride_xm, stride_xh, tiles,
    OFFSET: tl.constexpr, DROP: tl.constexpr, DROP_X: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program owns ``tiles`` tiles of rows, and with wide rows one block of columns of them.

    ``x`` is the sum, or what it is made of by dropout (DROP_X). The two means of g are read unless a row is one block.
    """
    pid = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    w = load_weight(w_ptr, cols, N, OFFSET, ACC)
    dw = tl.zeros((ROWS, BLOCK_N), ACC)
    db = tl.zeros((ROWS, BLOCK_N), ACC)
    for i in range(tiles):
        tile = tl.program_id(0) * tiles + i
        head = (tile % H).to(tl.int64)
        rows = (tile // H).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        flat = rows * H + head
        in_rows = rows < M
        mask = in_rows[:, None] & in_cols[None, :]
        dy = load_tile(dy_ptr + head * stride_dyh, rows, cols, stride_dym, mask, ACC)
        x = load_sum(
            x_ptr + head * stride_xh, None, None, seed_ptr, rows, flat, first, stride_xm, 0, mask, N,
            DROP_X, ROWS, BLOCK_N, ACC,
        )  # fmt: skip
        mean = tl.load(mean_ptr + flat, mask=in_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + flat, mask=in_rows, other=0.0)[:, None]
        # Off the mask dy is zero, so whatever x_hat is there reaches no sum.
        x_hat = (x - mean) * rstd
        g = dy * w
        if ONE_BLOCK:
            mean_g = (tl.sum(g, axis=1) / N)[:, None]
            mean_gx = (tl.sum(g * x_hat, axis=1) / N)[:, None]
        else:
            mean_g = tl.load(mean_g_ptr + flat, mask=in_rows, other=0.0)[:, None]
            mean_gx = tl.load(mean_gx_ptr + flat, mask=in_rows, other=0.0)[:, None]
        dx = rstd * (g - mean_g - x_hat * mean_gx)
        if dsum_ptr is not None:
            dx += load_tile(dsum_ptr + head * stride_dsh, rows, cols, stride_dsm, mask, ACC)
        if dresidual_ptr is not None:
            store_tile(dresidual_ptr, flat, cols, N, mask, dx)
        if DROP > 0:
            dx *= dropout_factor(seed_ptr, flat, first, N, DROP, ROWS, BLOCK_N)
        store_tile(dx_ptr, flat, cols, N, mask, dx)
        if dw_ptr is not None:
            dw += dy * x_hat
        if db_ptr is not None:
            db += dy
    # The launcher sums these over programs in a fixed order; atomics would give other bits on each run.
    if dw_ptr is not None:
        tl.store(dw_ptr + pid * N + cols, tl.sum(dw, axis=0), mask=in_cols)
    if db_ptr is not None:
        tl.store(db_ptr + pid * N + cols, tl.sum(db, axis=0), mask=in_cols)


def _fwd_fake(x, residual, seed, w, b, eps: float, offset: float, dropout: float):
    y, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=accumulator(x.dtype)[0]) for _ in range(2))
    return y, total, mean, rstd


def _bwd_fake(
    dy, dsum, x, seed, w, mean, rstd, offset: float, dropout: float, summed: bool, needs_dw: bool, needs_db: bool
):
    dw, db = (x.new_empty(x.shape[-1] if needed else 0) for needed in (needs_dw, needs_db))
    return x.new_empty(x.shape), x.new_empty(x.shape if summed and dropout > 0 else 0), dw, db


# Operators: what every body returns (above), then the bodies. Forward returns no sum without a residual. Backward is
# given that sum as ``x`` (``summed``), and returns a dresidual only where it is not dx.
fwd = Op(
    "layer_norm_fwd(Tensor x, Tensor? residual, Tensor? seed, Tensor? w, Tensor? b, float eps, float offset,"
    " float dropout) -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    fake=_fwd_fake,
)
bwd = Op(
    "layer_norm_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor? seed, Tensor? w, Tensor mean, Tensor rstd, float offset,"
    " float dropout, bool summed, bool needs_dw, bool needs_db)"
    " -> (Tensor dx, Tensor dresidual, Tensor dw, Tensor db)",
    fake=_bwd_fake,
)


@fwd.body("triton", accepts=lambda x, *rest: x.is_cuda)
def layer_norm_fwd_triton(
    x, residual, seed, w, b, eps: float, offset: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, total, mean, rstd = _fwd_fake(x, residual, seed, w, b, eps, offset, dropout)
    if y.numel():
        x, residual = as_rows(x, residual)
        r, (w, b) = x if residual is None else residual, (t if t is None else t.contiguous() for t in (w, b))
        M, H, N = x.shape
        # Blocks of a wider row leave registers for the sums over blocks.
        rows, block_n, warps = launch.row_tile(N, WIDEST if N <= WIDEST else WIDEST // 2)
        layer_norm_fwd_kernel[(triton.cdiv(M, rows) * H,)](
            x, residual, seed, w, b, y, None if residual is None else total, mean, rstd,
            M, H, N, x.stride(0), x.stride(1), r.stride(0), r.stride(1),
            EPS=eps, OFFSET=offset, DROP=dropout_draws(dropout),
            ROWS=rows, BLOCK_N=block_n, ONE_BLOCK=block_n >= N, ACC=accumulator(x.dtype)[1], num_warps=warps,
        )  # fmt: skip
    return y, total, mean, rstd


@bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)
def layer_norm_bwd_triton(
    dy, dsum, x, seed, w, mean, rstd, offset: float, dropout: float, summed: bool, needs_dw: bool, needs_db: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    args = dy, dsum, x, seed, w, mean, rstd, offset, dropout, summed, needs_dw, needs_db
    dx, dresidual, dw, db = _bwd_fake(*args)
    if dx.numel() == 0:
        return dx, dresidual, dw.zero_(), db.zero_()
    dy, dsum, x = as_rows(dy, dsum, x)
    d, w, draws = dy if dsum is None else dsum, w if w is None else w.contiguous(), dropout_draws(dropout)
    (M, H, N), (stat, ACC) = x.shape, accumulator(x.dtype)
    # With a gradient of the sum as well, rows of 8192 in fp32 spill.
    rows, block_n, warps = launch.row_tile(N, WIDEST_BWD // (2 if dsum is not None and x.element_size() > 2 else 1))
    tiles = triton.cdiv(M, rows) * H
    # Without a sum over rows nothing is kept from tile to tile, and as many programs run as the machine holds.
    programs, each = launch.persistent(tiles, x.device, warps) if needs_dw or needs_db else (tiles, 1)
    dws, dbs = (x.new_empty(programs, N, dtype=stat) if needed else None for needed in (needs_dw, needs_db))
    sizes = dict(OFFSET=offset, DROP_X=0 if summed else draws, ROWS=rows, BLOCK_N=block_n, ACC=ACC, num_warps=warps)
    means = mean, rstd
    if block_n < N:
        means = torch.empty_like(mean), torch.empty_like(mean)
        layer_norm_means_kernel[(tiles,)](
            dy, x, seed, w, mean, rstd, *means,
            M, H, N, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), **sizes,
        )  # fmt: skip
    layer_norm_bwd_kernel[(programs, triton.cdiv(N, block_n))](
        dy, dsum, x, seed, w, mean, rstd, *means, dx, dresidual if dresidual.numel() else None, dws, dbs,
        M, H, N, dy.stride(0), dy.stride(1), d.stride(0), d.stride(1), x.stride(0), x.stride(1), each,
        DROP=draws, ONE_BLOCK=block_n >= N, **sizes,
    )  # fmt: skip
    dw, db = (t if parts is None else parts.sum(0).to(t.dtype) for t, parts in ((dw, dws), (db, dbs)))
    return dx, dresidual, dw, db


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, seed, w, b, eps: float, offset: float, dropout: float):
        y, total, mean, rstd = fwd(x, residual, seed, w, b, eps, offset, dropout)
        ctx.save_for_backward(x if residual is None else total, seed, w, mean, rstd)
        ctx.offset, ctx.dropout, ctx.summed = offset, dropout, residual is not None
        ctx.set_materialize_grads(False)
        return y, total if ctx.summed else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor | None, dsum: Tensor | None):
        x, seed, w, mean, rstd = ctx.saved_tensors
        needs_dw, needs_db = ctx.needs_input_grad[3:5]
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dresidual, dw, db = bwd(
            dy, dsum, x, seed, w, mean, rstd, ctx.offset, ctx.dropout, ctx.summed, needs_dw, needs_db
        )
        dresidual = None if not ctx.summed else dresidual if ctx.dropout > 0 else dx
        return dx, dresidual, None, dw if needs_dw else None, db if needs_db else None, None, None, None


def layer_norm(
    x: Tensor, w: Tensor | None = None, b: Tensor | None = None, eps: float = 1e-5, *,
    residual: Tensor | None = None, offset: float = 0.0, dropout: float = 0.0, seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``(x - mean) / sqrt(var + eps) * (offset + w) + b`` over the last dimension of ``x`` (..., N).

    ``w`` and ``b`` are (N,), each optional. With a ``residual`` of the shape of ``x`` the sum ``residual + dropout(x)``
    is normed instead of ``x``, and returned beside the result: (y, sum). Dropout is drawn from ``seed``, an int64
    tensor (1,), or from PyTorch's generator; it may come without a residual. ``offset`` is added to ``w`` in fp32.

    Rows may be views with two strides, as the heads (M, H, N) of a fused projection are. All tensors but ``seed`` share
    device and floating dtype; mean and variance are taken in fp32. Raises ``ValueError`` on shapes, devices and
    options, ``TypeError`` on dtypes. Source: arXiv:1607.06450.
    """
    check_norm("layer_norm", x, residual, w, b, eps, offset)
    seed = check.dropout("layer_norm", dropout, seed, x)
    if fwd.eager(x):
        return layer_norm_ref(x, w, b, eps, residual=residual, offset=offset, dropout=dropout, seed=seed)
    y, total = LayerNorm.apply(x, residual, seed, w, b, eps, offset, dropout)
    return y if residual is None else (y, total)
