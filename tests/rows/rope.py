"""Rows of the rotary embedding."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from case import Bug, Case, by_name, randn
from torch import Tensor

from fmcore import ops
from fmcore.kernels import rope


def rope_inputs(R: int, use_positions: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    """q, k, cos, sin, positions from (B, T, H, G, D); R of the D dimensions are rotated, all when R exceeds D."""

    def inputs(B: int, T: int, H: int, G: int, D: int) -> tuple[Tensor | None, ...]:
        P = 50 if use_positions else T
        cos, sin = rope.rope_tables(P, min(R, D // 2 * 2))
        positions = torch.randint(0, P, (B, T)) if use_positions else None
        return randn(B, T, H, D), randn(B, T, G, D), cos, sin, positions

    return inputs


def packed_inputs(B: int, T: int, H: int, G: int, D: int) -> tuple[Tensor, ...]:
    """q, k, cos, sin, cu_seqlens of 16 entries, or 17, where a search takes one step more. The first document is empty.

    The last offset is not the end, so that rows follow it.
    """
    cos, sin = rope.rope_tables(B * T, D // 2 * 2)
    starts = torch.randint(0, B * T + 1, (14 + (B > 1),)).sort().values
    cu_seqlens = torch.cat((starts.new_zeros(2), starts)).int()
    return randn(B, T, H, D), randn(B, T, G, D), cos, sin, cu_seqlens


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

CASES = {
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
            Bug("(positions < P)", "(positions < P // 2)", "memory", (2, 5, 3, 1, 80)),
            Bug("(rest < D)", "(rest < D - 1)", "memory", (2, 5, 3, 1, 80)),
            Bug("first = block.to(tl.int64) * HEAD_ROWS", "first = block * HEAD_ROWS", "phantom"),
        ),
    ),
    "rope-cu_seqlens": replace(
        _rope,
        op=partial(by_name, ops.rope, ("cu_seqlens",)),
        ref=lambda q, k, cos, sin, cu_seqlens: rope.rope_ref(q, k, cos, sin, None, cu_seqlens),
        inputs=packed_inputs,
        shapes=((0, 5, 2, 2, 8), (2, 0, 3, 1, 8), (1, 1, 1, 1, 2), (1, 37, 6, 2, 96), (3, 65, 2, 1, 64)),
        phantom=(),  # the row before has every address that this one has
        bugs=(
            Bug("for _ in range(steps)", "for _ in range(steps - 1)", "exact", (3, 65, 2, 1, 64)),
            Bug(".to(tl.int64) <= rows", ".to(tl.int64) < rows", "exact", (3, 65, 2, 1, 64)),
            Bug("where(reached, middle, low)", "where(reached, middle - 1, low)", "exact", (1, 37, 6, 2, 96)),
            Bug("high = low + S", "high = low + S - 1", "exact", (3, 65, 2, 1, 64)),
            Bug("S.bit_length()", "(S - 1).bit_length()", "exact", (3, 65, 2, 1, 64)),
            Bug("positions = batch * T + tokens\n", "positions = tokens\n", "exact", (3, 65, 2, 1, 64)),
        ),
    ),
    "rope-partial": replace(
        _rope,
        inputs=rope_inputs(32, use_positions=False),
        shapes=((0, 5, 2, 2, 8), (1, 37, 6, 2, 96), (1, 9, 5, 5, 128)),
    ),
}
