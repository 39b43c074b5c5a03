"""Rows of the normalizations."""

from dataclasses import replace

import torch
from case import Bug, Case, randn

from fmcore import ops
from fmcore.kernels import layer_norm, rms_norm

ROWS_BY_N = (
    (0, 8), (1, 1), (1, 2049), (2, 1), (5, 7), (3, 63), (3, 64), (3, 65), (37, 128), (61, 127), (67, 300), (2, 1031),
)  # fmt: skip

_norm = Case(
    op=ops.rms_norm,
    ref=rms_norm.rms_norm_ref,
    inputs=lambda M, N: (randn(M, N), randn(N)),
    shapes=ROWS_BY_N,
    gradcheck=(3, 5),
    phantom=(2**21, 8192),
    draws=((0, 40), (1, 300)),
    aot=((8192, 4096), (8192, 256), (8192, 8192), (8192, 16384)),
    file="rms_norm.py",
)
# Rows wider than a program holds: backward from 8192, forward from 16384.
_wide = ((2, 8193), (3, 16385))

CASES = {
    "rms_norm": replace(
        _norm,
        shapes=(*ROWS_BY_N, *_wide),
        bodies=("triton", "cpu"),
        bugs=(
            Bug("(cols < N)[None, :]", "(cols >= 0)[None, :]", "memory", (5, 7)),
            Bug("in_rows = rows < M", "in_rows = rows <= M", "memory", (5, 7)),
            Bug("x.stride(0), eps", "N, eps", "memory", (5, 7)),
            Bug("rstd_ptr + rows, rstd, mask=in_rows", "rstd_ptr + rows, rstd, mask=rows < M - 1", "memory", (5, 7)),
            Bug("dw_ptr + pid * N + cols", "dw_ptr + cols", "memory", (3, 2049)),
            Bug("tl.sum(squares, axis=1) / N", "tl.sum(squares, axis=1) / BLOCK_N", "exact", (5, 7)),
            Bug("rstd * (g - x_hat * mean)", "rstd * (g + x_hat * mean)", "exact", (5, 7)),
            Bug("dw += dy * x_hat", "dw += dy * x", "exact", (5, 7)),
            Bug("x * rstd[:, None] *", "(x * rstd[:, None]).to(tl.bfloat16) *", "exact", (37, 128), torch.bfloat16),
            Bug("rows = tl.program_id(0).to(tl.int64) * ROWS", "rows = tl.program_id(0) * ROWS", "phantom"),
            Bug("pid = tl.program_id(0).to(tl.int64)", "pid = tl.program_id(0)", "phantom"),
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
            Bug("(dy.stride(0), x.stride(0))", "(dy.stride(0), N)", "memory", (5, 7)),
            Bug("mean_ptr + rows, mean, mask=in_rows", "mean_ptr + rows, mean, mask=rows < M - 1", "memory", (5, 7)),
            Bug("db_ptr + pid * N + cols", "db_ptr + cols", "memory", (3, 2049)),
            Bug("tl.where(mask, x - mean[:, None], 0.0)", "x - mean[:, None]", "exact", (5, 7)),
            Bug("dw if needs_dw else None, db if needs_db else None", "db, dw", "exact", (5, 7)),
            Bug("tl.sum(squares, axis=1) / N", "tl.sum(squares, axis=1) / (N - 1)", "exact", (5, 7)),
            Bug("g - mean_g -", "g -", "exact", (5, 7)),
            Bug("= x * rstd[:, None] *", "= (x * rstd[:, None]).to(tl.bfloat16) *", "exact", (37, 128), torch.bfloat16),
            Bug("rows = tl.program_id(0).to(tl.int64) * ROWS", "rows = tl.program_id(0) * ROWS", "phantom"),
        ),
    ),
    "layer_norm-no_bias": replace(
        _norm,
        op=ops.layer_norm,
        ref=layer_norm.layer_norm_ref,
        inputs=lambda M, N: (randn(M, N), randn(N), None),
        shapes=((0, 8), (5, 7), (37, 128)),
        aot=((8192, 4096),),
        file="layer_norm.py",
    ),
}
