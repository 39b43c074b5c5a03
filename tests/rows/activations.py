"""Rows of the activations, plain and gated."""

from dataclasses import replace
from functools import partial

from case import Bug, Case, by_name, randn

from fmcore import ops
from fmcore.kernels import activation, glu

# Tiles of elementwise operators: 64 columns by 32 rows when the width is odd, 1024 by 2 when it is a power of two.
SHAPES = ((0, 8), (1, 1), (2, 1), (5, 7), (31, 63), (32, 64), (33, 65), (3, 1023), (2, 1024), (3, 1025), (37, 704))
# For variants of one kernel. Those that run the code of another row, or less of it, are not compiled ahead of time.
# With a bias and the four multiprocessors that stand in for a GPU, a program goes down several tiles of (37, 2048), the
# last of which are half full and empty.
FEW = ((0, 8), (1, 1), (5, 7), (33, 65))
TILES = (*FEW, (37, 2048))

_plain = Case(
    op=ops.gelu,
    ref=activation.gelu_ref,
    inputs=lambda M, N: (randn(M, N),),
    shapes=FEW,
    gradcheck=(3, 8),
    phantom=(2**21, 8192),
    draws=((0, 40), (1, 300)),
    aot=((8192, 3072),),
    file="activation.py",
)
_plain_bias = replace(_plain, inputs=lambda M, N: (randn(M, N), randn(N)), gradcheck=(3, 6))
_gated = replace(
    _plain,
    op=ops.swiglu,
    ref=glu.swiglu_ref,
    inputs=lambda M, F: (randn(M, F), randn(M, F)),
    gradcheck=(3, 4),
    no_copy=(0, 1),
    aot=((8192, 8192),),
    file="glu.py",
)
_packed = replace(_gated, inputs=lambda M, F: (randn(M, 2 * F),), no_copy=(0,), phantom=(2**20, 8192))
_gated_bias = replace(_gated, inputs=lambda M, F: (randn(M, F), randn(M, F), randn(2 * F)), gradcheck=(3, 3))
_packed_bias = replace(_packed, inputs=lambda M, F: (randn(M, 2 * F), None, randn(2 * F)), gradcheck=(3, 3))

_memory_bugs = (
    Bug("mask = (rows < M)[:, None] &", "mask = (rows <= M)[:, None] &", "memory", (5, 7)),
    Bug("rows = (pid // blocks).to(tl.int64) * ROWS", "rows = (pid // blocks) * ROWS", "phantom"),
    Bug("part = (pid // blocks).to(tl.int64)", "part = pid // blocks", "phantom"),
)


def _slope_bug(old: str, new: str) -> Bug:
    return Bug(old, new, "exact", (33, 65), file="activation.py")


CASES = {
    "gelu": replace(
        _plain,
        shapes=SHAPES,
        aot=((8192, 3072), (8192, 1664)),
        bugs=(
            *_memory_bugs,
            _slope_bug("s = tl.where(x < 0, e * larger, larger)", "s = larger"),
            _slope_bug("tl.where(x < 0, s - tail, s + tail)", "s + tail"),
            _slope_bug("CUBIC = tl.constexpr(0.044715)", "CUBIC = tl.constexpr(0.044515)"),
            _slope_bug("(1 + 3 * CUBIC * a * a)", "(1 + CUBIC * a * a)"),
            _slope_bug("dx = chain(dy, slope, KIND)", "dx = slope"),
        ),
    ),
    "gelu-none": replace(
        _plain,
        op=partial(ops.gelu, approximate="none"),
        ref=partial(activation.gelu_ref, approximate="none"),
        bugs=(
            _slope_bug("tl.exp(-0.5 * x * x)", "tl.exp(-x * x)"),
            _slope_bug("SQRT_HALF = tl.constexpr(math.sqrt(1 / 2))", "SQRT_HALF = tl.constexpr(0.7)"),
            _slope_bug("slope = cdf + x * (DENSITY", "slope = cdf + (DENSITY"),
        ),
    ),
    "gelu-bias": replace(
        _plain_bias,
        op=partial(by_name, ops.gelu, ("bias",)),
        ref=partial(by_name, activation.gelu_ref, ("bias",)),
        shapes=TILES,
        aot=((8192, 3072), (8192, 1664)),
        bugs=(
            *_memory_bugs,
            Bug("x += tl.load(bias_ptr + cols", "x -= tl.load(bias_ptr + cols", "exact", (5, 7)),
            Bug("            x += bias\n", "            x += 2 * bias\n", "exact", (5, 7)),
            Bug("rows = (part * tiles + i)", "rows = (part * (tiles - 1) + i)", "memory", (37, 2048)),
            Bug("dbias += dx", "dbias += dy", "exact", (5, 7)),
            Bug("dbias += dx", "dbias = dx", "exact", (37, 2048)),
            Bug("range(tiles if dbias", "range(tiles + 1 if dbias", "memory", (37, 2048)),
            Bug("dbias_ptr + part * N + cols", "dbias_ptr + cols", "memory", (37, 2048)),
        ),
    ),
    "gelu-none-bias": replace(
        _plain_bias,
        op=partial(by_name, partial(ops.gelu, approximate="none"), ("bias",)),
        ref=partial(by_name, partial(activation.gelu_ref, approximate="none"), ("bias",)),
        aot=(),
    ),
    "quick_gelu": replace(
        _plain,
        op=ops.quick_gelu,
        ref=activation.quick_gelu_ref,
        bugs=(
            _slope_bug("QUICK = tl.constexpr(1.702)", "QUICK = tl.constexpr(1.7)"),
            _slope_bug("tail = x_dz * (e * larger * larger)", "tail = x_dz * (e * larger)"),
        ),
    ),
    "quick_gelu-bias": replace(
        _plain_bias,
        op=partial(by_name, ops.quick_gelu, ("bias",)),
        ref=activation.quick_gelu_ref,
        aot=(),
    ),
    "relu_squared": replace(
        _plain,
        op=ops.relu_squared,
        ref=activation.relu_squared_ref,
        bugs=(
            _slope_bug("slope = tl.where(x <= 0, 0.0, 2 * x)", "slope = tl.where(x <= 0, 0.0, x)"),
            _slope_bug("value = tl.where(x < 0, 0.0, x * x)", "value = x * x"),
        ),
    ),
    "relu_squared-bias": replace(
        _plain_bias,
        op=partial(by_name, ops.relu_squared, ("bias",)),
        ref=activation.relu_squared_ref,
        aot=(),
    ),
    "swiglu": replace(
        _gated,
        bodies=("triton", "cpu"),
        shapes=SHAPES,
        aot=((8192, 8192), (8192, 704)),
        bugs=(
            *_memory_bugs,
            Bug("dgate, dup, dbias,\n", "dup, dgate, dbias,\n", "exact", (5, 7)),
            Bug("dup = dy * f", "dup = dy * g", "exact", (5, 7)),
            Bug("chain(dy * u, slope, KIND)", "chain(dy, slope, KIND)", "exact", (5, 7)),
            _slope_bug("            z = a\n", "            z = 1.01 * a\n"),
            _slope_bug("a = tl.where(a > FAR, FAR, a)", "a = tl.where(a > 2, 2.0, a)"),
        ),
    ),
    "swiglu-packed": replace(
        _packed,
        bodies=("triton", "cpu"),
        shapes=SHAPES,
        aot=(),
        bugs=(Bug("else dgate.stride(0), tiles", "else F, tiles", "memory", (5, 7)),),
    ),
    "swiglu-bias": replace(
        _gated_bias,
        op=partial(by_name, ops.swiglu, ("bias",)),
        bodies=("triton", "cpu"),
        aot=(),
        bugs=(
            Bug("bias_ptr + F + cols", "bias_ptr + cols", "exact", (5, 7)),
            Bug(
                "        u += tl.load(bias_ptr + F + cols, mask=in_cols, other=0.0).to(ACC)[None, :]\n",
                "",
                "exact",
                (5, 7),
            ),
            Bug("            g += gate_bias\n", "", "exact", (5, 7)),
            Bug("            u += up_bias\n", "", "exact", (5, 7)),
        ),
    ),
    "swiglu-packed-bias": replace(
        _packed_bias,
        op=partial(by_name, ops.swiglu, ("up", "bias")),
        bodies=("triton", "cpu"),
        shapes=TILES,
        aot=((8192, 8192), (8192, 704)),
        bugs=(
            *_memory_bugs,
            Bug("dgate_bias += dgate", "dgate_bias += dup", "exact", (5, 7)),
            Bug("dup_bias += dup", "dup_bias = dup", "exact", (37, 2048)),
            Bug("rows = (part * tiles + i)", "rows = (part * (tiles - 1) + i)", "memory", (37, 2048)),
            Bug("sums_ptr + F + cols, tl.sum", "sums_ptr + cols, tl.sum", "memory", (5, 7)),
            Bug("dbias_ptr + part * 2 * F", "dbias_ptr + part * F", "memory", (37, 2048)),
        ),
    ),
    "geglu": replace(_gated, op=ops.geglu, ref=glu.geglu_ref),
    "geglu-none-packed-bias": replace(
        _packed_bias,
        op=partial(by_name, partial(ops.geglu, approximate="none"), ("up", "bias")),
        ref=partial(glu.geglu_ref, approximate="none"),
        bugs=(Bug('else "gelu"\n', 'else "gelu_tanh"\n', "exact", (33, 65)),),
    ),
    "reglu-packed": replace(
        _packed,
        op=ops.reglu,
        ref=glu.reglu_ref,
        bugs=(
            _slope_bug("slope = tl.where(x <= 0, 0.0, 1.0)", "slope = tl.where(x <= 0, 0.01, 1.0)"),
            _slope_bug("value = tl.where(x < 0, 0.0, x)", "value = tl.where(x < 0, -x, x)"),
        ),
    ),
    "reglu-bias": replace(_gated_bias, op=partial(by_name, ops.reglu, ("bias",)), ref=glu.reglu_ref, aot=()),
}
