"""One row per operator, or per variant of one: how to call it, what it must equal, and what breaks it.

``tests/test_ops.py`` proves the numerics contract for every row, ``tests/aot.py`` compiles the kernels that the row
launches, ``tests/test_harness.py`` plants the row's bugs. A new operator adds a row here and nothing there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fmcore import ops
from fmcore.kernels import gelu, layer_norm, rms_norm, rope, swiglu


@dataclass(frozen=True)
class Bug:
    """A planted bug: ``old`` becomes ``new`` in the operator's source, and the check named ``caught_by`` must fail.

    ``caught_by`` is one of ``exact`` (wrong numbers in an output or a gradient on ``shape``), ``memory`` (on views with
    padded rows a lane out of bounds, a race or an element never written), ``phantom`` (addresses beyond 2^31).
    Every occurrence of ``old`` is replaced.
    """

    old: str
    new: str
    caught_by: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Case:
    """``op(*args)`` must equal ``ref(*args)``, where ``args = inputs(*shape)``."""

    op: Callable[..., Tensor | tuple[Tensor, ...]]
    ref: Callable[..., Tensor | tuple[Tensor, ...]]
    # (*shape) -> arguments: tensors to differentiate in fp64 (tests cast them), constants in the dtype they keep, None.
    inputs: Callable[..., tuple[Tensor | None, ...]]
    # The shapes that break kernels: 0 rows, 1 column, primes, block - 1, block, block + 1.
    shapes: tuple[tuple[int, ...], ...]
    # At most 24 elements in all arguments together.
    gradcheck: tuple[int, ...]
    # About 2^34 elements; run on tensors that have a shape and no memory.
    phantom: tuple[int, ...]
    # (smallest, largest) of each entry of a shape, for hypothesis.
    draws: tuple[tuple[int, int], ...]
    # Shapes compiled ahead of time, the first also in fp32.
    aot: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    # Positions of arguments that get no gradient and keep their dtype (tables, indices).
    constants: tuple[int, ...] = ()
    # Positions of arguments of which a view with padded rows must reach the kernel without a copy.
    no_copy: tuple[int, ...] = (0,)
    # Bodies besides the plain PyTorch path.
    bodies: tuple[str, ...] = ("triton",)
    # The source file whose kernels this row tests, and bugs that must turn its tests red.
    file: str = ""
    bugs: tuple[Bug, ...] = ()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


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


def rope_inputs(R: int, use_positions: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    """q, k, cos, sin, positions from (B, T, H, G, D); R of the D dimensions are rotated, all when R exceeds D."""

    def inputs(B: int, T: int, H: int, G: int, D: int) -> tuple[Tensor | None, ...]:
        P = 50 if use_positions else T
        cos, sin = rope.rope_tables(P, min(R, D // 2 * 2))
        positions = torch.randint(0, P, (B, T)) if use_positions else None
        return randn(B, T, H, D), randn(B, T, G, D), cos, sin, positions

    return inputs


_rope = Case(
    op=ops.rope,
    ref=rope.rope_ref,
    inputs=rope_inputs(2**30, use_positions=False),
    shapes=(
        (2, 0, 3, 1, 8),
        (0, 5, 2, 2, 8),
        (1, 1, 1, 1, 2),
        (2, 5, 3, 1, 80),
        (3, 1, 8, 2, 32),
        (1, 37, 6, 2, 96),
        (2, 65, 1, 1, 64),
        (1, 9, 5, 5, 128),
    ),  # fmt: skip
    gradcheck=(1, 2, 2, 1, 4),
    phantom=(64, 8192, 128, 128, 128),
    draws=((0, 3), (0, 9), (1, 5), (1, 3), (2, 40)),
    aot=((4, 2048, 32, 8, 128), (4, 2048, 12, 12, 64)),
    constants=(2, 3, 4),
    no_copy=(0, 1),
    bodies=("triton", "cpu"),
    file="rope.py",
)

CASES: dict[str, Case] = {
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
    "rope": replace(
        _rope,
        bugs=(
            Bug("sin = -sin", "sin = 1.0 * sin", "exact", (1, 9, 5, 5, 128)),
            Bug("in_rows = tokens < T", "in_rows = tokens <= T", "memory", (2, 5, 3, 1, 80)),
            Bug("(pid // (q_blocks + k_blocks)).to(tl.int64)", "pid // (q_blocks + k_blocks)", "phantom"),
            Bug("heads = (local % H).to(tl.int64)", "heads = (local // H).to(tl.int64)", "memory", (2, 5, 3, 1, 80)),
        ),
    ),
    "rope-positions-interleaved-partial": replace(
        _rope,
        op=partial(ops.rope, interleaved=True),
        ref=lambda q, k, cos, sin, positions: rope.rope_ref(q, k, cos, sin, positions.flatten(), interleaved=True),
        inputs=rope_inputs(40, use_positions=True),
        phantom=(1, 2**28, 16, 16, 4),
        bugs=(
            Bug("positions_ptr + batch * T + tokens", "positions_ptr + tokens", "exact", (2, 5, 3, 1, 80)),
            Bug("(rest < D)", "(rest < D - 1)", "memory", (2, 5, 3, 1, 80)),
            Bug("first = block.to(tl.int64) * HEAD_ROWS", "first = block * HEAD_ROWS", "phantom"),
        ),
    ),
    "rope-partial": replace(
        _rope,
        inputs=rope_inputs(32, use_positions=False),
        shapes=((0, 5, 2, 2, 8), (1, 37, 6, 2, 96), (1, 9, 5, 5, 128)),
    ),
}
