"""Rows of dropout: the seed is an argument, so that every run draws the same mask."""

from functools import partial

import torch
from case import Bug, Case, by_name, randn

from fmcore import ops
from fmcore.kernels import dropout

CASES = {
    # Half of the draws of 0.75 have the sign bit of a 32-bit word.
    "dropout": Case(
        op=partial(by_name, ops.dropout, ("seed",), p=0.75),
        ref=partial(dropout.dropout_ref, p=0.75),
        inputs=lambda M, N: (randn(M, N), torch.randint(2**62, (1,))),
        shapes=((0, 8), (1, 1), (2, 1), (5, 7), (31, 63), (32, 64), (33, 65), (3, 1023), (2, 1024), (3, 1025)),
        gradcheck=(4, 6),
        phantom=(2**21, 8192),
        draws=((0, 40), (1, 300)),
        aot=((8192, 4096), (8192, 704)),
        constants=(1,),
        bodies=("triton", "cpu"),
        file="dropout.py",
        bugs=(
            Bug("mask = (rows < M)[:, None] & (cols", "mask = (rows <= M)[:, None] & (cols", "memory", (5, 7)),
            Bug("x.stride(0),", "N,", "memory", (5, 7)),
            Bug("rows = (pid // blocks).to(tl.int64) * ROWS", "rows = (pid // blocks) * ROWS", "phantom"),
            Bug("dropout_factor(seed_ptr, rows, start,", "dropout_factor(seed_ptr, rows, 0,", "exact", (5, 67)),
            Bug("rows, start, N, DROP", "rows, start, M, DROP", "exact", (5, 67)),
            Bug("bwd(dy, *ctx.saved_tensors,", "bwd(dy, ctx.saved_tensors[0] + 1,", "exact", (5, 7)),
        ),
    ),
}
