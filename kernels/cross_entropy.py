"""Cross-entropy on logits, with every usual option; the softmax of the linear loss heads too.

    u = logit_scale * (x + bias)          z = softcap * tanh(u / softcap), or u          x, z (M, V)   bias (V,)
    lse_i = log sum_v exp(z_iv)           p = exp(z - lse)           t_i = target of row i   c (V,) class weights, or 1

    loss_i = (1 - e) c_t (lse - z_t) + e / V * sum_v c_v (lse - z_v) + z_loss * lse^2         e = label_smoothing
    dz_i   = (1 - e) c_t (p - onehot(t)) + (e / V * sum_v c_v + 2 z_loss lse) p - e / V * c
    dx     = logit_scale * (1 - (z / softcap)^2) * dz                db = sum over M of dx

The bias belongs to the linear layer before, so it comes first; the scale of Cohere and the softcap of Gemma follow, in
that order. "mean" divides the sum of loss_i by the sum of c_t, as PyTorch does. Ignored rows give 0, and are not read.
The entropy H_i = - sum_v p log p, which the heads ask for, adds - dH_i p (log p + H) to dz.

Computed in fp32 whatever the input (fp64 for fp64); p - 1 of the target is formed there, before dx is rounded. Top and
log of the sum are kept apart: of large logits their sum would lose what a confident token has left. Bound by DRAM:
forward reads x once (MV elements), backward reads x and writes dx (2MV).
Source: Milakov & Gimelshein 2018, arXiv:1805.02867 (the online sum); de Brebisson & Vincent 2015, arXiv:1511.05042.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.blocks import accumulator, load_tile, store_tile, unit_columns
from fmcore.op import Op

# Widest block of a row that one program holds: 16 elements a thread, beside as many of each running sum.
WIDEST = 4096

# Programs among which the rows of a column are split where the gradient of the bias is summed.
DB_PARTS = 16

REDUCTIONS = ("mean", "sum", "none")


class Options(NamedTuple):
    """What the formula above calls them; a softcap of 0 is none."""

    ignore_index: int = -100
    smoothing: float = 0.0
    softcap: float = 0.0
    scale: float = 1.0
    z_loss: float = 0.0


SCHEMA = "int ignore_index, float smoothing, float softcap, float scale, float z_loss"


def losses_ref(x: Tensor, targets: Tensor, weights: Tensor | None, o: Options) -> tuple[Tensor, Tensor]:
    """loss_i (M,) and z (M, V) from x + bias, in plain PyTorch."""
    z = x.to(torch.promote_types(x.dtype, torch.float32)) * o.scale
    if o.softcap:
        z = o.softcap * torch.tanh(z / o.softcap)
    weights, targets = None if weights is None else weights.to(z.dtype), targets.long()
    loss = F.cross_entropy(z, targets, weights, None, o.ignore_index, None, "none", o.smoothing)
    if o.z_loss:
        ignored = targets == o.ignore_index
        loss = loss + o.z_loss * z.masked_fill(ignored[:, None], 0.0).logsumexp(1).masked_fill(ignored, 0.0).square()
    return loss, z


def reduced(loss: Tensor, targets: Tensor, weights: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """``loss`` (M,) or its sum () as ``reduction`` wants it."""
    if reduction == "none":
        return loss
    targets = targets.to(loss.device)
    kept = targets != ignore_index
    if reduction == "mean" and weights is not None:
        count = weights.to(loss.dtype)[targets.clamp(0, len(weights) - 1)].masked_fill(~kept, 0.0).sum()
    else:
        count = kept.sum()
    return loss.sum() / count if reduction == "mean" else loss.sum()


# Reference: what the kernels below must equal.
def cross_entropy_ref(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    options = Options(ignore_index, label_smoothing, softcap or 0.0, logit_scale, z_loss)
    loss, _ = losses_ref(logits if bias is None else logits + bias, targets, class_weights, options)
    return reduced(loss, targets, class_weights, ignore_index, reduction)


# Kernels. Forward: one program owns ROWS rows, block after block. Backward: one program owns a (ROWS, BLOCK_V) tile.
@triton.jit
def tanh(x):
    """tanh of x and its slope."""
    e = tl.exp(-2 * tl.abs(x))
    # Not 1 - tanh^2, of which near 1 only rounding is left.
    slope = 4 * e / ((1 + e) * (1 + e))
    y = tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    if x.dtype == tl.float32:
        # 1 - e has lost the digits of a small x. The polynomial is that of Cephes' tanhf, good to 2 ulp below 0.625.
        s = x * x
        near = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
        y = tl.where(tl.abs(x) < 0.625, x + x * s * (near - 3.33332819422e-1), y)
    return y, slope


@triton.jit
def capped(x, bias, scale, softcap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """z of x and dz / dx, where both ``x`` and ``bias`` are in ACC."""
    z = (x + bias) * scale
    slope = scale
    if SOFTCAP:
        y, slope = tanh(z / softcap)
        z = softcap * y
        slope = slope * scale
    return z, slope


@triton.jit
def load_columns(ptr, cols, V, default, ACC: tl.constexpr):
    """A vector at ``cols`` (1, BLOCK_V); ``default`` where there is none."""
    values = tl.full(cols.shape, default, ACC)
    if ptr is not None:
        values = tl.load(ptr + cols, mask=cols < V, other=0.0).to(ACC)
    return values[None, :]


@triton.jit
def load_target(targets_ptr, weights_ptr, rows, in_rows, V, ignore_index, smoothing, ACC: tl.constexpr):
    """Of each row the target, whether it counts, whether it is one of the V, and (1 - e) c_t."""
    t = tl.load(targets_ptr + rows, mask=in_rows, other=0).to(tl.int64)
    kept = in_rows & (t != ignore_index)
    valid = kept & (t >= 0) & (t < V)
    share = tl.full(t.shape, 1.0, ACC) - smoothing
    if weights_ptr is not None:
        share *= tl.load(weights_ptr + t, mask=valid, other=0.0)
    return t, kept, valid, share


@triton.jit
def smoothed_weight(total_ptr, V, smoothing, ACC: tl.constexpr):
    """e / V * sum_v c_v."""
    weight = tl.full((), 1.0, ACC) * smoothing
    if total_ptr is not None:
        weight = tl.load(total_ptr) * (smoothing / V)
    return weight


@triton.jit(do_not_specialize=["M", "ignore_index"])
def cross_entropy_fwd_kernel(
    x_ptr, targets_ptr, bias_ptr, weights_ptr, total_ptr, loss_ptr, top_ptr, logsum_ptr, entropy_ptr,
    M, V, stride_xm, ignore_index, smoothing, softcap, scale, z_loss,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, kept, valid, share = load_target(targets_ptr, weights_ptr, rows, rows < M, V, ignore_index, smoothing, ACC)
    z_t = tl.load(x_ptr + rows * stride_xm + t, mask=valid, other=0.0).to(ACC)
    bias_t = tl.zeros((ROWS,), ACC)
    if bias_ptr is not None:
        bias_t = tl.load(bias_ptr + t, mask=valid, other=0.0).to(ACC)
    # Not an underscore, twice: Triton takes it for one variable, of two shapes.
    z_t, slope_t = capped(z_t, bias_t, scale, softcap, SOFTCAP, ACC)

    infinity: tl.constexpr = float("inf")
    top = tl.full((ROWS,), -infinity, ACC)
    # Each lane sums its own columns: only the top is shared among the lanes at every block.
    sums = tl.zeros((ROWS, BLOCK_V), ACC)
    # Of exp(z - top) * (z - top), for the entropy.
    moments = tl.zeros((ROWS, BLOCK_V), ACC)
    # Of c (z - z_t), which stays small where all z are large.
    offs = tl.zeros((ROWS, BLOCK_V), ACC)
    for start in range(0, V, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = kept[:, None] & (cols < V)[None, :]
        x = load_tile(x_ptr, rows, cols, stride_xm, mask, ACC)  # (ROWS, BLOCK_V)
        z, slope = capped(x, load_columns(bias_ptr, cols, V, 0.0, ACC), scale, softcap, SOFTCAP, ACC)
        if SMOOTH:
            offs += tl.where(mask, load_columns(weights_ptr, cols, V, 1.0, ACC) * (z - z_t[:, None]), 0.0)
        z = tl.where(mask, z, -infinity)
        higher = tl.maximum(top, tl.max(z, axis=1))
        # A row may be -inf so far; -inf - -inf would be NaN.
        base = tl.where(higher == -infinity, 0.0, higher)
        shrink = tl.exp(top - base)[:, None]
        exps = tl.exp(z - base[:, None])
        if entropy_ptr is not None:
            lower = tl.where(top == -infinity, 0.0, top - base)[:, None]
            moments = shrink * (moments + lower * sums) + tl.where(exps > 0, exps * (z - base[:, None]), 0.0)
        sums = sums * shrink + exps
        top = higher
    denominator = tl.sum(sums, axis=1)
    logsum = tl.log(denominator)
    loss = share * (logsum + (top - z_t))
    if SMOOTH:
        weight = smoothed_weight(total_ptr, V, smoothing, ACC)
        loss += weight * (logsum + (top - z_t)) - tl.sum(offs, axis=1) * (smoothing / V)
    loss += z_loss * (top + logsum) * (top + logsum)
    loss = tl.where(kept, tl.where(valid, loss, float("nan")), 0.0)
    tl.store(loss_ptr + rows, loss, mask=rows < M)
    tl.store(top_ptr + rows, top, mask=rows < M)
    tl.store(logsum_ptr + rows, logsum, mask=rows < M)
    if entropy_ptr is not None:
        entropy = logsum - tl.sum(moments, axis=1) / denominator
        tl.store(entropy_ptr + rows, tl.where(kept, entropy, 0.0), mask=rows < M)


@triton.jit(do_not_specialize=["M", "ignore_index"])
def cross_entropy_bwd_kernel(
    g_ptr, g_entropy_ptr, x_ptr, targets_ptr, bias_ptr, weights_ptr, total_ptr, top_ptr, logsum_ptr, entropy_ptr,
    dx_ptr, db_ptr, M, V, stride_gm, stride_em, stride_xm, stride_dxm, tiles,
    ignore_index, smoothing, softcap, scale, z_loss,
    SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, which may lie where x does. Without a ``g_ptr`` the incoming gradient is 1, without ``g_entropy_ptr`` 0.

    One program owns ``tiles`` tiles, one below the other, so that it can sum db over them.
    """
    pid, blocks = tl.program_id(0), tl.cdiv(V, BLOCK_V)
    part = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    in_cols = (cols < V)[None, :]
    bias = load_columns(bias_ptr, cols, V, 0.0, ACC)
    if SMOOTH:
        smooth = load_columns(weights_ptr, cols, V, 1.0, ACC) * (smoothing / V)
    db = tl.zeros((ROWS, BLOCK_V), ACC)
    for i in range(tiles):
        rows = (part * tiles + i) * ROWS + tl.arange(0, ROWS)
        in_rows = rows < M
        t, kept, valid, share = load_target(targets_ptr, weights_ptr, rows, in_rows, V, ignore_index, smoothing, ACC)
        x = load_tile(x_ptr, rows, cols, stride_xm, kept[:, None] & in_cols, ACC)  # (ROWS, BLOCK_V)
        z, slope = capped(x, bias, scale, softcap, SOFTCAP, ACC)
        top = tl.load(top_ptr + rows, mask=kept, other=0.0)
        logsum = tl.load(logsum_ptr + rows, mask=kept, other=0.0)
        log_p = (z - top[:, None]) - logsum[:, None]
        p = tl.exp(log_p)
        dz = share[:, None] * (p - tl.where(cols[None, :] == t[:, None], 1.0, 0.0))
        rest = 2 * z_loss * (top + logsum)
        if SMOOTH:
            rest += smoothed_weight(total_ptr, V, smoothing, ACC)
            dz -= smooth
        dz += rest[:, None] * p
        if g_ptr is not None:
            dz *= tl.load(g_ptr + rows * stride_gm, mask=kept, other=0.0).to(ACC)[:, None]
        if g_entropy_ptr is not None:
            g_entropy = tl.load(g_entropy_ptr + rows * stride_em, mask=kept, other=0.0).to(ACC)[:, None]
            entropy = tl.load(entropy_ptr + rows, mask=kept, other=0.0)[:, None]
            dz -= tl.where(p > 0, g_entropy * p * (log_p + entropy), 0.0)
        dz = tl.where(kept[:, None], tl.where(valid[:, None], dz * slope, float("nan")), 0.0)
        store_tile(dx_ptr, rows, cols, stride_dxm, in_rows[:, None] & in_cols, dz)
        if db_ptr is not None:
            db += dz
    if db_ptr is not None:
        tl.store(db_ptr + part * V + cols, tl.sum(db, axis=0), mask=cols < V)


# Launchers, for the operators below and for the linear heads, which give them chunks of their own logits.
Stats = tuple[Tensor, Tensor, Tensor, Tensor]


def weights_of(weights: Tensor | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Class weights in the dtype of sums, and their sum (1,)."""
    if weights is None:
        return None, None
    weights = weights.to(accumulator(x.dtype)[0]).contiguous()
    return weights, weights.sum().view(1)


def statistics(
    x: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None],
    o: Options,
    entropy: bool,
) -> Stats:
    """loss, top, log of the sum and entropy (or nothing) of each row of ``x`` (M, V), whose columns lie side by side.

    ``bias`` and ``targets`` are contiguous; ``weights`` are from ``weights_of``.
    """
    (M, V), (stat, ACC) = x.shape, accumulator(x.dtype)
    loss, top, logsum = (x.new_empty(M, dtype=stat) for _ in range(3))
    h = x.new_empty(M if entropy else 0, dtype=stat)
    rows, block_v, warps = launch.row_tile(V, WIDEST)
    # One more running sum: half as many elements a thread, without spills (tests/resources.json).
    warps = min(16, 2 * warps) if entropy else warps
    if M:
        cross_entropy_fwd_kernel[(triton.cdiv(M, rows),)](
            x, targets, bias, *weights, loss, top, logsum, h if entropy else None,
            M, V, x.stride(0), *o, SMOOTH=o.smoothing != 0, SOFTCAP=o.softcap != 0,
            ROWS=rows, BLOCK_V=block_v, ACC=ACC, num_warps=warps,
        )  # fmt: skip
    return loss, top, logsum, h


def gradient(
    dx: Tensor,
    x: Tensor,
    g: Tensor | None,
    g_entropy: Tensor | None,
    targets: Tensor,
    bias: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None],
    stats: Stats,
    o: Options,
    needs_db: bool,
) -> Tensor | None:
    """Write the gradient of the logits ``x`` to ``dx``, which may be ``x``; arguments as for ``statistics``.

    Returns its sum over the rows in the dtype of sums, if that is needed.
    """
    (M, V), (stat, ACC), (_, top, logsum, entropy) = x.shape, accumulator(x.dtype), stats
    rows, block_v, warps = launch.element_tile(V)
    # As above: with a softcap, an entropy or the sum of db a thread has too much to hold.
    warps = 2 * warps if o.softcap or needs_db or g_entropy is not None else warps
    # DB_PARTS sums of columns cost little memory; without them every tile has a program of its own.
    tiles = triton.cdiv(triton.cdiv(M, rows), DB_PARTS) if needs_db else 1
    parts = triton.cdiv(M, rows * max(1, tiles))
    db = x.new_empty(parts, V, dtype=stat) if needs_db else None
    if M:
        cross_entropy_bwd_kernel[(parts * triton.cdiv(V, block_v),)](
            g, g_entropy, x, targets, bias, *weights, top, logsum, entropy, dx, db,
            M, V, 0 if g is None else g.stride(0), 0 if g_entropy is None else g_entropy.stride(0), x.stride(0),
            dx.stride(0), tiles, *o, SMOOTH=o.smoothing != 0, SOFTCAP=o.softcap != 0,
            ROWS=rows, BLOCK_V=block_v, ACC=ACC, num_warps=warps,
        )  # fmt: skip
    return None if db is None else db.sum(0)


# Operators: what every body returns, then the bodies.
fwd = Op(
    "cross_entropy_fwd(Tensor x, Tensor targets, Tensor? bias, Tensor? weights,"
    f" {SCHEMA}) -> (Tensor loss, Tensor top, Tensor logsum)",
    fake=lambda x, *rest: tuple(x.new_empty(x.shape[0], dtype=accumulator(x.dtype)[0]) for _ in range(3)),
)
bwd = Op(
    "cross_entropy_bwd(Tensor g, Tensor x, Tensor targets, Tensor? bias, Tensor? weights, Tensor top, Tensor logsum,"
    f" {SCHEMA}, bool needs_db) -> (Tensor dx, Tensor db)",
    fake=lambda g, x, *rest: (x.new_empty(x.shape), x.new_empty(x.shape[1] if rest[-1] else 0)),
)


@fwd.body("triton", accepts=lambda x, *rest: x.is_cuda)
def cross_entropy_fwd_triton(
    x: Tensor, targets: Tensor, bias: Tensor | None, weights: Tensor | None, *options
) -> tuple[Tensor, Tensor, Tensor]:
    x, bias, o = unit_columns(x), None if bias is None else bias.contiguous(), Options(*options)
    loss, top, logsum, _ = statistics(x, targets.contiguous(), bias, weights_of(weights, x), o, False)
    return loss, top, logsum


@bwd.body("triton", accepts=lambda g, *rest: g.is_cuda)
def cross_entropy_bwd_triton(
    g: Tensor, x: Tensor, targets: Tensor, bias: Tensor | None, weights: Tensor | None, top: Tensor, logsum: Tensor,
    *rest,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    *options, needs_db = rest
    dx, bias = x.new_empty(x.shape), None if bias is None else bias.contiguous()
    # The gradient asks neither for the loss nor, without one of its own, for the entropy: any tensor stands for them.
    stats = (top, top, logsum, top)
    db = gradient(
        dx, unit_columns(x), g, None, targets.contiguous(), bias, weights_of(weights, x), stats, Options(*options),
        needs_db,
    )  # fmt: skip
    return dx, x.new_empty(0) if db is None else db.to(x.dtype)


class CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor | None, o: Options) -> Tensor:
        loss, top, logsum = fwd(x, targets, bias, weights, *o)
        ctx.save_for_backward(x, targets, bias, weights, top, logsum)
        ctx.o = o
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor):
        needs_db = ctx.needs_input_grad[1]
        dx, db = bwd(g, *ctx.saved_tensors, *ctx.o, needs_db)
        return dx, db if needs_db else None, None, None, None


def check_loss(
    op: str,
    like: Tensor,
    V: int,
    targets: Tensor | None,
    bias: Tensor | None,
    weights: Tensor | None,
    o: Options,
    reduction: str,
) -> None:
    """What all losses ask of their arguments, besides the shapes; ``like`` says on which device everything must be."""
    if V == 0:
        raise ValueError(f"{op}: there must be at least one class, got V=0")
    check.dtype(op, check.INTS, targets=targets)
    check.dtype(op, class_weights=weights)
    for name, t in (("bias", bias), ("class_weights", weights)):
        if t is not None and t.shape != (V,):
            raise ValueError(f"{op}: {name} must be (V), V={V}, got {tuple(t.shape)}")
    for name, t in (("targets", targets), ("class_weights", weights)):
        if t is not None and t.device != like.device:
            raise ValueError(f"{op}: {name} must be on {like.device}, as all else is, got {t.device}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0 <= o.smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be from 0 to 1, got {o.smoothing}")


def checked_cap(op: str, softcap: float | None) -> float:
    """``softcap`` as ``Options`` hold it: 0 for none."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive or None, got {softcap}")
    return softcap or 0.0


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy in nats of ``targets`` (M,) int under ``logits`` (M, V); the formula heads this file.

    The logits that count are ``softcap * tanh(logit_scale * (logits + bias) / softcap)``, with ``bias`` (V,) of their
    dtype. ``z_loss`` times the squared logsumexp of each row is added. ``class_weights`` (V,) get no gradient. The loss
    is fp32 (fp64 for fp64), a number, or (M,) with ``reduction="none"``; a mean over no row is nan, as in PyTorch.
    Raises ``ValueError`` on shapes, devices and options, ``TypeError`` on dtypes. A target outside [0, V) that is not
    ``ignore_index`` gives nan on a GPU, where asking would mean waiting, and is an error of PyTorch's elsewhere.
    """
    o = Options(ignore_index, label_smoothing, checked_cap("cross_entropy", softcap), logit_scale, z_loss)
    V = check.shape("cross_entropy", logits=(logits, "M V"), targets=(targets, "M"))["V"]
    check.dtype("cross_entropy", logits=logits)
    check.same("cross_entropy", logits=logits, bias=bias)
    check_loss("cross_entropy", logits, V, targets, bias, class_weights, o, reduction)
    if fwd.eager(logits):
        loss, _ = losses_ref(logits if bias is None else logits + bias, targets, class_weights, o)
    else:
        loss = CrossEntropy.apply(logits, bias, targets, class_weights, o)
    return reduced(loss, targets, class_weights, ignore_index, reduction)
