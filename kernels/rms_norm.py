"""RMS normalization over the last dimension, with the residual sum and the dropout that stand before it in a model.

    sum = residual + dropout(x)         rstd = 1 / sqrt(mean(sum^2) + eps)         y = sum * rstd * (offset + w)

x, residual, sum, y (M, H, N)   w (N,)   rstd (M, H); H heads of one norm, else 1. Backward, with x_hat = sum * rstd,
g = dy * (offset + w) and the mask f of dropout:

    dresidual = dsum + rstd * (g - x_hat * mean(g * x_hat))       dx = dresidual * f       dw = total of dy * x_hat

Statistics in fp32 whatever the input (fp64 for fp64); sum is rounded once, and y comes from the rounded one. Bound by
DRAM: forward reads x and writes y (2MHN elements), backward reads dy and x and writes dx (3MHN); a residual adds its
reads and writes and no pass. Dropout without a residual stores no sum: backward draws the mask for dx in any case, and
with it makes the sum again from x. Rows wider than WIDEST (WIDEST_BWD) are read once more.
Source: Zhang & Sennrich 2019, arXiv:1910.07467.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from fmcore.kernels.dropout import dropout_factor_ref
from fmcore.op import Op

# Widest row that one program holds in registers without spills (tests/resources.json), forward and backward. Twice as
# much backward would be 192 KiB for dy, x and dw of the 256 KiB that a multiprocessor has, and it spills.
WIDEST = 16384
WIDEST_BWD = 8192

# Elements that the CPU body takes at a time: some MB with its temporaries, which stay in the cache. And the fewest for
# which it wins: below, the plain path takes less time because it takes less to call (LOG.md).
CPU_TILE = 2**19
CPU_FEWEST = 2**17


# Reference: what the kernels below must equal. Its first two pieces are those of layer_norm too.
def mask_ref(x: Tensor, seed: Tensor | None, dropout: float) -> Tensor | None:
    """0 or 1 / (1 - dropout) for each element of ``x``; ``None`` without dropout."""
    if seed is None or dropout == 0:
        return None
    N = x.shape[-1]
    return dropout_factor_ref(seed, x.numel() // N, N, dropout).view(x.shape).to(accumulator(x.dtype)[0])


def sum_ref(x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
    """residual + x * mask, rounded once."""
    if mask is None:
        return x if residual is None else residual + x
    dropped = x.to(mask.dtype) * mask
    return (dropped if residual is None else residual.to(mask.dtype) + dropped).to(x.dtype)


def rms_norm_ref(
    x: Tensor, w: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None,
    offset: float = 0.0, dropout: float = 0.0, seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    total = sum_ref(x, residual, mask_ref(x, seed, dropout))
    s = total.to(torch.promote_types(x.dtype, torch.float32))
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    if w is not None:
        y = y * (offset + w.to(s.dtype) if offset else w)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), total)


# Kernels: one program owns ROWS rows of one head, whole (ONE_BLOCK) or block after block. ``rows`` are indices along M,
# ``flat`` those of the same rows in a contiguous (M * H, N). Heads vary fastest, so that neighbours in memory are read
# together. The number of rows is not specialized, so that another batch size does not compile anew.
@triton.jit(do_not_specialize=["M"])
def rms_norm_fwd_kernel(
    x_ptr, residual_ptr, seed_ptr, w_ptr, y_ptr, sum_ptr, rstd_ptr,
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
    squares = x * x
    if not ONE_BLOCK:
        for start in range(BLOCK_N, N, BLOCK_N):
            mask = in_rows[:, None] & (start + cols < N)[None, :]
            x = load_sum(
                x_ptr, residual_ptr, sum_ptr, seed_ptr, rows, flat, start, stride_xm, stride_rm, mask, N,
                DROP, ROWS, BLOCK_N, ACC,
            )  # fmt: skip
            squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / N + EPS)  # (ROWS,)
    tl.store(rstd_ptr + flat, rstd, mask=in_rows)
    if ONE_BLOCK:
        w = load_weight(w_ptr, cols, N, OFFSET, ACC)
        store_tile(y_ptr, flat, cols, N, mask, x * rstd[:, None] * w)
    else:
        for start in range(0, N, BLOCK_N):
            mask = in_rows[:, None] & (start + cols < N)[None, :]
            # The sum once more from its parts: what this program has stored, other threads of it may not see yet.
            x = load_sum(
                x_ptr, residual_ptr, None, seed_ptr, rows, flat, start, stride_xm, stride_rm, mask, N,
                DROP, ROWS, BLOCK_N, ACC,
            )  # fmt: skip
            w = load_weight(w_ptr, start + cols, N, OFFSET, ACC)
            store_tile(y_ptr, flat, start + cols, N, mask, x * rstd[:, None] * w)


@triton.jit(do_not_specialize=["M"])
def rms_norm_mean_kernel(
    dy_ptr, x_ptr, seed_ptr, w_ptr, rstd_ptr, mean_ptr, M, H, N, stride_dym, stride_dyh, stride_xm, stride_xh,
    OFFSET: tl.constexpr, DROP_X: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean(g * x_hat) of each row, for rows that the backward kernel cannot hold whole."""
    tile = tl.program_id(0)
    head = (tile % H).to(tl.int64)
    rows = (tile // H).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    flat = rows * H + head
    in_rows = rows < M
    dy_ptr += head * stride_dyh
    x_ptr += head * stride_xh
    products = tl.zeros((ROWS, BLOCK_N), ACC)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        mask = in_rows[:, None] & (cols < N)[None, :]
        dy = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC)
        x = load_sum(x_ptr, None, None, seed_ptr, rows, flat, start, stride_xm, 0, mask, N, DROP_X, ROWS, BLOCK_N, ACC)
        products += dy * load_weight(w_ptr, cols, N, OFFSET, ACC) * x
    rstd = tl.load(rstd_ptr + flat, mask=in_rows, other=0.0)
    tl.store(mean_ptr + flat, tl.sum(products, axis=1) * rstd / N, mask=in_rows)


@triton.jit(do_not_specialize=["M", "tiles"])
def rms_norm_bwd_kernel(
    dy_ptr, dsum_ptr, x_ptr, seed_ptr, w_ptr, rstd_ptr, mean_ptr, dx_ptr, dresidual_ptr, dw_ptr,
    M, H, N, stride_dym, stride_dyh, stride_dsm, stride_dsh, stride_xm, stride_xh, tiles,
    OFFSET: tl.constexpr, DROP: tl.constexpr, DROP_X: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, ONE_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program owns ``tiles`` tiles of rows, and with wide rows one block of columns of them.

    ``x`` is the sum, or what it is made of by dropout (DROP_X). ``mean_ptr`` is read unless a row is one block.
    """
    pid = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * BLOCK_N
    cols = first + tl.arange(0, BLOCK_N)
    in_cols = cols < N
    w = load_weight(w_ptr, cols, N, OFFSET, ACC)
    dw = tl.zeros((ROWS, BLOCK_N), ACC)
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
        rstd = tl.load(rstd_ptr + flat, mask=in_rows, other=0.0)[:, None]
        x_hat = x * rstd
        g = dy * w
        if ONE_BLOCK:
            mean = (tl.sum(g * x_hat, axis=1) / N)[:, None]
        else:
            mean = tl.load(mean_ptr + flat, mask=in_rows, other=0.0)[:, None]
        dx = rstd * (g - x_hat * mean)
        if dsum_ptr is not None:
            dx += load_tile(dsum_ptr + head * stride_dsh, rows, cols, stride_dsm, mask, ACC)
        if dresidual_ptr is not None:
            store_tile(dresidual_ptr, flat, cols, N, mask, dx)
        if DROP > 0:
            dx *= dropout_factor(seed_ptr, flat, first, N, DROP, ROWS, BLOCK_N)
        store_tile(dx_ptr, flat, cols, N, mask, dx)
        if dw_ptr is not None:
            dw += dy * x_hat
    if dw_ptr is not None:
        # The launcher sums these over programs in a fixed order; atomics would give other bits on each run.
        tl.store(dw_ptr + pid * N + cols, tl.sum(dw, axis=0), mask=in_cols)


def _fwd_fake(x, residual, seed, w, eps: float, offset: float, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    stat = accumulator(x.dtype)[0]
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), x.new_empty(x.shape[:-1], dtype=stat)


def _bwd_fake(dy, dsum, x, seed, w, rstd, offset: float, dropout: float, summed: bool, needs_dw: bool):
    both = summed and dropout > 0
    return x.new_empty(x.shape), x.new_empty(x.shape if both else 0), x.new_empty(x.shape[-1] if needs_dw else 0)


# Operators: what every body returns (above), then the bodies. Forward returns no sum without a residual. Backward is
# given that sum as ``x`` (``summed``), and returns a dresidual only where it is not dx; dx without a residual is final.
fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor? residual, Tensor? seed, Tensor? w, float eps, float offset, float dropout)"
    " -> (Tensor y, Tensor sum, Tensor rstd)",
    fake=_fwd_fake,
)
bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor? dsum, Tensor x, Tensor? seed, Tensor? w, Tensor rstd, float offset, float dropout,"
    " bool summed, bool needs_dw) -> (Tensor dx, Tensor dresidual, Tensor dw)",
    fake=_bwd_fake,
)


@fwd.body("cpu", accepts=lambda x, *rest: x.device.type == "cpu" and x.numel() >= CPU_FEWEST)
def rms_norm_fwd_cpu(x, residual, seed, w, eps: float, offset: float, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    stat = accumulator(x.dtype)[0]
    total = sum_ref(x, residual, mask_ref(x, seed, dropout))
    s = total.to(stat)
    rstd = torch.linalg.vector_norm(s, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    y = torch.mul(s, rstd, out=s.new_empty(x.shape))
    if w is not None:
        y.mul_(offset + w.to(stat))
    return y.to(x.dtype), x.new_empty(0) if residual is None else total.contiguous(), rstd.squeeze(-1)


@bwd.body("cpu", accepts=lambda dy, *rest: dy.device.type == "cpu")
def rms_norm_bwd_cpu(
    dy, dsum, x, seed, w, rstd, offset: float, dropout: float, summed: bool, needs_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """By PyTorch's layer norm with a mean of zero: it subtracts mean(g) from each row, which is added back."""
    shape, N, dtype, stat = x.shape, x.shape[-1], x.dtype, accumulator(x.dtype)[0]
    drop = mask_ref(x, seed, dropout)
    x = (x if summed else sum_ref(x, None, drop)).reshape(-1, N)
    M, step = len(x), max(1, CPU_TILE // N)
    dy, rstd, mean = dy.reshape(-1, N), rstd.view(-1, 1), rstd.new_zeros(min(M, step), 1)
    w32 = x.new_ones(N, dtype=stat) if w is None else offset + w.to(stat)
    # Rounded at the end, and so at once where nothing more comes.
    dx = x.new_empty(M, N, dtype=dtype if dsum is None and drop is None else stat)
    dws = x.new_zeros(triton.cdiv(M, step), N if needs_dw else 0, dtype=stat)
    for i, start in enumerate(range(0, M, step)):
        dy_i, x_i, rstd_i, dx_i = (t[start : start + step] for t in (dy, x, rstd, dx))
        dy_i, x_i = dy_i.to(stat).contiguous(), x_i.to(stat).contiguous()
        part, _, _ = torch.ops.aten.native_layer_norm_backward(
            dy_i, x_i, [N], mean[: len(x_i)], rstd_i, w32, None, [True, False, False]
        )
        dx_i.copy_(part.add_(torch.mv(dy_i, w32).unsqueeze(-1).mul_(rstd_i).div_(N)))
        if needs_dw:
            # Not by the operator above: its sums over rows are three times as far from fp64 as eager's.
            torch.sum(dy_i.mul(x_i).mul_(rstd_i), 0, out=dws[i])
    dx, dw = dx.view(shape), dws.sum(0).to(dtype)
    if dsum is not None:
        dx.add_(dsum)
    if drop is None:
        return dx.to(dtype), x.new_empty(0), dw
    return (dx * drop).to(dtype), dx.to(dtype) if summed else x.new_empty(0), dw


@fwd.body("triton", accepts=lambda x, *rest: x.is_cuda)
def rms_norm_fwd_triton(
    x, residual, seed, w, eps: float, offset: float, dropout: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, rstd = _fwd_fake(x, residual, seed, w, eps, offset, dropout)
    if y.numel():
        x, residual = as_rows(x, residual)
        r, w = x if residual is None else residual, w if w is None else w.contiguous()
        M, H, N = x.shape
        # Blocks of a wider row leave registers for the sums over blocks.
        rows, block_n, warps = launch.row_tile(N, WIDEST if N <= WIDEST else WIDEST // 2)
        rms_norm_fwd_kernel[(triton.cdiv(M, rows) * H,)](
            x, residual, seed, w, y, None if residual is None else total, rstd,
            M, H, N, x.stride(0), x.stride(1), r.stride(0), r.stride(1),
            EPS=eps, OFFSET=offset, DROP=dropout_draws(dropout),
            ROWS=rows, BLOCK_N=block_n, ONE_BLOCK=block_n >= N, ACC=accumulator(x.dtype)[1], num_warps=warps,
        )  # fmt: skip
    return y, total, rstd


@bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)
def rms_norm_bwd_triton(
    dy, dsum, x, seed, w, rstd, offset: float, dropout: float, summed: bool, needs_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dresidual, dw = _bwd_fake(dy, dsum, x, seed, w, rstd, offset, dropout, summed, needs_dw)
    if dx.numel() == 0:
        return dx, dresidual, dw.zero_()
    dy, dsum, x = as_rows(dy, dsum, x)
    d, w, draws = dy if dsum is None else dsum, w if w is None else w.contiguous(), dropout_draws(dropout)
    (M, H, N), (stat, ACC) = x.shape, accumulator(x.dtype)
    rows, block_n, warps = launch.row_tile(N, WIDEST_BWD)
    tiles = triton.cdiv(M, rows) * H
    # Without a sum over rows nothing is kept from tile to tile, and as many programs run as the machine holds.
    programs, each = launch.persistent(tiles, x.device, warps) if needs_dw else (tiles, 1)
    dws = x.new_empty(programs, N, dtype=stat) if needs_dw else None
    sizes = dict(OFFSET=offset, DROP_X=0 if summed else draws, ROWS=rows, BLOCK_N=block_n, ACC=ACC, num_warps=warps)
    mean = rstd
    if block_n < N:
        mean = torch.empty_like(rstd)
        rms_norm_mean_kernel[(tiles,)](
            dy, x, seed, w, rstd, mean, M, H, N, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), **sizes
        )
    rms_norm_bwd_kernel[(programs, triton.cdiv(N, block_n))](
        dy, dsum, x, seed, w, rstd, mean, dx, dresidual if dresidual.numel() else None, dws,
        M, H, N, dy.stride(0), dy.stride(1), d.stride(0), d.stride(1), x.stride(0), x.stride(1), each,
        DROP=draws, ONE_BLOCK=block_n >= N, **sizes,
    )  # fmt: skip
    return dx, dresidual, dw if dws is None else dws.sum(0).to(dw.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, seed, w, eps: float, offset: float, dropout: float) -> tuple[Tensor, Tensor | None]:
        y, total, rstd = fwd(x, residual, seed, w, eps, offset, dropout)
        ctx.save_for_backward(x if residual is None else total, seed, w, rstd)
        ctx.offset, ctx.dropout, ctx.summed = offset, dropout, residual is not None
        ctx.set_materialize_grads(False)
        return y, total if ctx.summed else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor | None, dsum: Tensor | None):
        x, seed, w, rstd = ctx.saved_tensors
        needs_dw = ctx.needs_input_grad[3]
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dresidual, dw = bwd(dy, dsum, x, seed, w, rstd, ctx.offset, ctx.dropout, ctx.summed, needs_dw)
        dresidual = None if not ctx.summed else dresidual if ctx.dropout > 0 else dx
        return dx, dresidual, None, dw if needs_dw else None, None, None, None


def rms_norm(
    x: Tensor, w: Tensor | None = None, eps: float = 1e-6, *, residual: Tensor | None = None,
    offset: float = 0.0, dropout: float = 0.0, seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``x * (offset + w) / sqrt(mean(x^2) + eps)`` over the last dimension of ``x`` (..., N), with ``w`` (N,) or none.

    With a ``residual`` of the shape of ``x`` the sum ``residual + dropout(x)`` is normed instead of ``x``, and returned
    beside the result: (y, sum). Dropout is drawn from ``seed``, an int64 tensor (1,), or from PyTorch's generator; it
    may come without a residual. ``offset`` is 1 for the form ``1 + w`` of Gemma, added in fp32.

    Rows may be views with two strides, as the heads (M, H, N) of a fused projection are. All tensors but ``seed`` share
    device and floating dtype; the mean is taken in fp32. Raises ``ValueError`` on shapes, devices and options,
    ``TypeError`` on dtypes. Source: arXiv:1910.07467.
    """
    check_norm("rms_norm", x, residual, w, None, eps, offset)
    seed = check.dropout("rms_norm", dropout, seed, x)
    if fwd.eager(x):
        return rms_norm_ref(x, w, eps, residual=residual, offset=offset, dropout=dropout, seed=seed)
    y, total = RMSNorm.apply(x, residual, seed, w, eps, offset, dropout)
    return y if residual is None else (y, total)


def check_norm(
    op: str, x: Tensor, residual: Tensor | None, w: Tensor | None, b: Tensor | None, eps: float, offset: float
) -> None:
    """What rms_norm and layer_norm ask of their arguments.

    That each float is looked at here also lets torch.compile trace two calls in one graph with ``dynamic=True``:
    PyTorch 2.13 fails on a float that it meets first inside an ``autograd.Function`` and then again.
    """
    vectors = {name: (t, "N") for name, t in (("w", w), ("b", b)) if t is not None}
    N = check.shape(op, x=(x, "... N"), **vectors)["N"]
    check.dtype(op, x=x)
    check.same(op, x=x, w=w, b=b, residual=residual)
    if N == 0:
        raise ValueError(f"{op}: x must have at least one column, got {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"{op}: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    if offset and w is None:
        raise ValueError(f"{op}: offset must be 0 without w, got {offset}")
