"""Rows of the activations, plain and gated."""

from dataclasses import replace
from functools import partial

from case import Bug, Case, randn

from fmcore import ops
from fmcore.kernels import gelu, swiglu

# Tiles of elementwise operators: 64 columns by 32 rows when the width is odd, 1024 by 2 when it is a power of two.
_elementwise = Case(
    op=ops.gelu,
    ref=gelu.gelu_ref,
    inputs=lambda M, N: (randn(M, N),),
    shapes=((0, 8), (1, 1), (2, 1), (5, 7), (31, 63), (32, 64), (33, 65), (3, 1023), (2, 1024), (3, 1025), (37, 704)),
    gradcheck=(3, 8),
    phantom=(2**21, 8192),
    draws=((0, 40), (1, 300)),
    aot=((8192, 3072), (8192, 1664)),
    file="gelu.py",
)
_elementwise_bugs = (
    Bug("mask = (rows < M)[:, None] & (cols", "mask = (rows <= M)[:, None] & (cols", "memory", (5, 7)),
    Bug("rows = (pid // blocks).to(tl.int64) * ROWS", "rows = (pid // blocks) * ROWS", "phantom"),
)

CASES = {
    "gelu": replace(
        _elementwise,
        bugs=(
            *_elementwise_bugs,
            Bug("s = tl.where(x < 0, e * larger, larger)", "s = larger", "exact", (5, 7)),
        ),
    ),
    "gelu-none": replace(
        _elementwise,
        op=partial(ops.gelu, approximate="none"),
        ref=partial(gelu.gelu_ref, approximate="none"),
        bugs=(Bug("x * DENSITY * tl.exp(-0.5", "x * DENSITY * tl.exp(-1.0", "exact", (5, 7)),),
    ),
    "swiglu": replace(
        _elementwise,
        op=ops.swiglu,
        ref=swiglu.swiglu_ref,
        inputs=lambda M, F: (randn(M, F), randn(M, F)),
        bodies=("triton", "cpu"),
        gradcheck=(3, 4),
        no_copy=(0, 1),
        aot=((8192, 8192), (8192, 704)),
        file="swiglu.py",
        bugs=(
            *_elementwise_bugs,
            Bug("gate, up, dgate, dup, M, F, dy", "gate, up, dup, dgate, M, F, dy", "exact", (5, 7)),
        ),
    ),
    "swiglu-packed": replace(
        _elementwise,
        op=ops.swiglu,
        ref=swiglu.swiglu_ref,
        inputs=lambda M, F: (randn(M, 2 * F),),
        bodies=("triton", "cpu"),
        gradcheck=(3, 4),
        phantom=(2**20, 8192),
        aot=((8192, 8192), (8192, 704)),
        file="swiglu.py",
        bugs=(Bug("up.stride(0), dgate.stride(0),", "up.stride(0), gate.shape[1],", "memory", (5, 7)),),
    ),
}
