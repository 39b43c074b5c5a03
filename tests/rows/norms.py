"""Rows of the normalizations."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from case import Bug, Case, by_name, randn
from torch import Tensor

from fmcore import ops
from fmcore.kernels import layer_norm, rms_norm

ROWS_BY_N = (
    (0, 8), (1, 1), (1, 2049), (2, 1), (5, 7), (3, 63), (3, 64), (3, 65), (37, 128), (61, 127), (67, 300), (2, 1031),
)  # fmt: skip
FEW_ROWS_BY_N = ((0, 8), (1, 1), (2, 3), (5, 7), (3, 65), (37, 128), (2, 1031))

_norm = Case(
    op=ops.rms_norm,
    ref=rms_norm.rms_norm_ref,
    inputs=lambda M, N: (randn(M, N), randn(N)),
    shapes=ROWS_BY_N,
    gradcheck=(3, 5),
    phantom=(2**21, 8192),
    draws=((0, 40), (1, 300)),
    aot=((8192, 4096), (8192, 256), (8192, 8192), (8192, 16384), (8192, 32768)),
    file="rms_norm.py",
)
# Rows wider than a program holds: backward from 8192, forward from 16384.
_wide = ((2, 8193), (3, 16385))


def seed(value: int = 2**40 + 3) -> Tensor:
    """Above 32 bits, so that half of it cannot get lost unseen."""
    return torch.full((1,), value)


def of_heads(fn: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
    """``fn`` on all heads but the last two of ``x`` (M, H, N), as a norm of q finds them in a fused projection.

    Joined to the others again: so the gradient that comes back is a view with two strides as well.
    """
    return torch.cat((fn(x[:, :-2], *rest), x[:, -2:]), 1)


CASES = {
    "rms_norm": replace(
        _norm,
        shapes=(*ROWS_BY_N, *_wide),
        bodies=("triton", "cpu"),
        bugs=(
            Bug("(cols < N)[None, :]", "(cols >= 0)[None, :]", "memory", (5, 7)),
            Bug("in_rows = rows < M", "in_rows = rows <= M", "memory", (5, 7)),
            Bug("x.stride(0), x.stride(1), r.stride(0)", "N, N, r.stride(0)", "memory", (5, 7)),
            Bug("rstd_ptr + flat, rstd, mask=in_rows", "rstd_ptr + flat, rstd, mask=rows < M - 1", "memory", (5, 7)),
            Bug("dw_ptr + pid * N + cols", "dw_ptr + cols", "memory", (3, 2049)),
            Bug("tl.sum(squares, axis=1) / N", "tl.sum(squares, axis=1) / BLOCK_N", "exact", (5, 7)),
            Bug("rstd * (g - x_hat * mean)", "rstd * (g + x_hat * mean)", "exact", (5, 7)),
            Bug("dw += dy * x_hat", "dw += dy * x", "exact", (5, 7)),
            Bug("x * rstd[:, None] *", "(x * rstd[:, None]).to(tl.bfloat16) *", "exact", (37, 128), torch.bfloat16),
            Bug("rows = (tile // H).to(tl.int64) * ROWS", "rows = (tile // H) * ROWS", "phantom"),
        ),
    ),
    "rms_norm-residual-dropout-offset": replace(
        _norm,
        op=partial(by_name, partial(ops.rms_norm, eps=0.1, offset=1.0, dropout=0.3), ("residual", "seed")),
        ref=partial(by_name, partial(rms_norm.rms_norm_ref, eps=0.1, offset=1.0, dropout=0.3), ("residual", "seed")),
        inputs=lambda M, N: (randn(M, N), randn(N), randn(M, N), seed()),
        shapes=(*FEW_ROWS_BY_N, *_wide),
        gradcheck=(2, 4),
        draws=((0, 9), (1, 70)),
        aot=((8192, 8192), (8192, 16384)),
        constants=(3,),
        no_copy=(0, 2),
        bodies=("triton", "cpu"),
        bugs=(
            # A gradient lost, a sum that ignores its residual, a norm of what is not the sum, another mask.
            Bug("if dsum_ptr is not None:", "if dw_ptr is None:", "exact", (5, 7)),
            Bug("x_ptr, residual_ptr, sum_ptr, seed_ptr", "x_ptr, None, sum_ptr, seed_ptr", "exact", (5, 7)),
            Bug("dropout_factor(seed_ptr, flat, first", "dropout_factor(seed_ptr, flat + 1, first", "exact", (5, 7)),
            Bug("dropout_factor(seed_ptr, flat, first", "dropout_factor(seed_ptr, flat, 0", "exact", (2, 8193)),
            Bug("0 if summed else draws", "draws", "exact", (5, 7)),
            Bug("dresidual if ctx.dropout > 0 else dx", "dx", "exact", (5, 7)),
            Bug("OFFSET, ACC)", "0.0, ACC)", "exact", (5, 7)),
            Bug("r.stride(0), r.stride(1),", "N, N,", "memory", (5, 7)),
            Bug("store_tile(dresidual_ptr, flat", "store_tile(dresidual_ptr, flat * 0", "memory", (5, 7)),
        ),
    ),
    "rms_norm-heads": replace(
        _norm,
        op=partial(of_heads, partial(ops.rms_norm, eps=0.1)),
        ref=partial(of_heads, partial(rms_norm.rms_norm_ref, eps=0.1)),
        inputs=lambda M, H, N: (randn(M, H + 2, N),),
        shapes=((0, 2, 8), (1, 1, 1), (3, 2, 5), (37, 3, 64), (2, 16, 128), (2, 2, 8193)),
        gradcheck=(2, 1, 4),
        phantom=(2, 2**20, 8193),
        draws=((0, 9), (1, 5), (1, 40)),
        aot=((8192, 32, 128),),
        bugs=(
            Bug("x_ptr += head * stride_xh", "x_ptr += head * stride_xm", "memory", (3, 2, 5)),
            Bug("dy_ptr + head * stride_dyh", "dy_ptr + head * stride_xh", "memory", (3, 2, 5)),
            Bug("x_ptr + head * stride_xh, None", "x_ptr, None", "exact", (3, 2, 5)),
            Bug("flat = rows * H + head", "flat = rows + head * M", "exact", (3, 2, 5)),
            Bug("head = (tile % H).to(tl.int64)", "head = tile % H", "phantom"),
        ),
    ),
    # No residual: no sum is stored, and backward makes it anew.
    "rms_norm-dropout": replace(
        _norm,
        op=partial(by_name, partial(ops.rms_norm, dropout=0.3), ("seed",)),
        ref=partial(by_name, partial(rms_norm.rms_norm_ref, dropout=0.3), ("seed",)),
        inputs=lambda M, N: (randn(M, N), randn(N), seed(7)),
        shapes=((0, 8), (5, 7), (37, 128), (2, 8193)),
        phantom=(2**28, 64),
        draws=((0, 9), (1, 70)),
        aot=((8192, 8192),),
        constants=(2,),
        bodies=("triton", "cpu"),
        bugs=(
            Bug("0 if summed else draws", "0", "exact", (5, 7)),
            Bug("dx *= dropout_factor", "dx += 0 * dropout_factor", "exact", (5, 7)),
        ),
    ),
    "layer_norm": replace(
        _norm,
        op=ops.layer_norm,
        ref=layer_norm.layer_norm_ref,
        inputs=lambda M, N: (randn(M, N), randn(N), randn(N)),
        shapes=(*ROWS_BY_N, *_wide),
        gradcheck=(2, 5),
        file="layer_norm.py",
        bugs=(
            Bug("(cols < N)[None, :]", "(cols >= 0)[None, :]", "memory", (5, 7)),
            Bug("x.stride(0), x.stride(1), r.stride(0)", "N, N, r.stride(0)", "memory", (5, 7)),
            Bug("mean_ptr + flat, mean, mask=in_rows", "mean_ptr + flat, mean, mask=rows < M - 1", "memory", (5, 7)),
            Bug("db_ptr + pid * N + cols", "db_ptr + cols", "memory", (3, 2049)),
            Bug("tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]", "exact", (5, 7)),
            Bug("dw if needs_dw else None, db if needs_db else None", "db, dw", "exact", (5, 7)),
            Bug("tl.sum(squares, axis=1) / N", "tl.sum(squares, axis=1) / (N - 1)", "exact", (5, 7)),
            Bug("g - mean_g -", "g -", "exact", (5, 7)),
            Bug("x * rstd[:, None] *", "(x * rstd[:, None]).to(tl.bfloat16) *", "exact", (37, 128), torch.bfloat16),
            Bug("rows = (tile // H).to(tl.int64) * ROWS", "rows = (tile // H) * ROWS", "phantom"),
        ),
    ),
    "layer_norm-no_bias": replace(
        _norm,
        op=ops.layer_norm,
        ref=layer_norm.layer_norm_ref,
        inputs=lambda M, N: (randn(M, N), randn(N), None),
        shapes=((0, 8), (5, 7), (37, 128)),
        phantom=(),
        aot=((8192, 4096),),
        file="layer_norm.py",
    ),
    "layer_norm-residual-dropout-offset": replace(
        _norm,
        op=partial(by_name, partial(ops.layer_norm, offset=1.0, dropout=0.3), ("residual", "seed")),
        ref=partial(by_name, partial(layer_norm.layer_norm_ref, offset=1.0, dropout=0.3), ("residual", "seed")),
        inputs=lambda M, N: (randn(M, N), randn(N), randn(N), randn(M, N), seed()),
        shapes=(*FEW_ROWS_BY_N, *_wide),
        gradcheck=(2, 4),
        draws=((0, 9), (1, 70)),
        aot=((8192, 8192), (8192, 16384)),
        constants=(4,),
        no_copy=(0, 3),
        file="layer_norm.py",
        bugs=(
            Bug("if dsum_ptr is not None:", "if dw_ptr is None:", "exact", (5, 7)),
            Bug("x_ptr, residual_ptr, sum_ptr, seed_ptr", "x_ptr, None, sum_ptr, seed_ptr", "exact", (5, 7)),
            Bug("dropout_factor(seed_ptr, flat, first", "dropout_factor(seed_ptr, flat + 1, first", "exact", (5, 7)),
            Bug("0 if summed else draws", "draws", "exact", (5, 7)),
            Bug("dresidual if ctx.dropout > 0 else dx", "dx", "exact", (5, 7)),
            Bug("OFFSET, ACC)", "0.0, ACC)", "exact", (5, 7)),
            Bug("r.stride(0), r.stride(1),", "N, N,", "memory", (5, 7)),
        ),
    ),
    "layer_norm-heads-dropout": replace(
        _norm,
        op=partial(of_heads, partial(by_name, partial(ops.layer_norm, eps=0.1, dropout=0.3), ("seed",))),
        ref=partial(of_heads, partial(by_name, partial(layer_norm.layer_norm_ref, eps=0.1, dropout=0.3), ("seed",))),
        inputs=lambda M, H, N: (randn(M, H + 2, N), seed(7)),
        shapes=((0, 2, 8), (1, 1, 1), (3, 2, 5), (37, 3, 64), (2, 2, 8193)),
        gradcheck=(2, 1, 4),
        phantom=(2, 2**20, 8193),
        draws=((0, 9), (1, 3), (1, 24)),
        aot=((8192, 32, 128),),
        constants=(1,),
        file="layer_norm.py",
        bugs=(
            Bug("x_ptr += head * stride_xh", "x_ptr += head * stride_xm", "memory", (3, 2, 5)),
            Bug("dy_ptr + head * stride_dyh", "dy_ptr + head * stride_xh", "memory", (3, 2, 5)),
            Bug("0 if summed else draws", "0", "exact", (3, 2, 5)),
            Bug("flat = rows * H + head", "flat = rows + head * M", "exact", (3, 2, 5)),
            Bug("head = (tile % H).to(tl.int64)", "head = tile % H", "phantom"),
        ),
    ),
}
