"""Rows of the attention of one new token over a cache."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from case import Bug, Case, by_name, randn
from torch import Tensor

from fmcore import ops
from fmcore.kernels import decode_attention


def decode_inputs(sinks: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    """q, caches, kv_lens, sinks from (B, S, G, R, D, Dv), with H = G * R; lengths of 0 and S among the first three."""

    def inputs(B: int, S: int, G: int, R: int, D: int, Dv: int) -> tuple[Tensor | None, ...]:
        lens = torch.randint(0, S + 1, (B,))
        lens[0:1], lens[2:3] = S, 0
        return randn(B, G * R, D), randn(B, S, G, D), randn(B, S, G, Dv), lens, randn(G * R) if sinks else None

    return inputs


_decode = Case(
    op=partial(by_name, ops.decode_attention, ("sinks",)),
    ref=decode_attention.decode_attention_ref,
    inputs=decode_inputs(sinks=False),
    # Blocks of 64 keys (16 in fp32, 32 for heads of 256); a program takes 16 query heads; up to 8 splits here.
    shapes=(
        (0, 5, 1, 2, 8, 8),
        (2, 0, 2, 1, 8, 8),
        (1, 1, 1, 1, 1, 1),
        (3, 5, 2, 3, 16, 16),
        (3, 63, 1, 4, 80, 80),
        (1, 64, 1, 1, 96, 64),
        (3, 200, 2, 2, 32, 20),
        (1, 300, 1, 17, 40, 33),
        (1, 130, 1, 35, 16, 16),
        (2, 70, 1, 2, 256, 256),
    ),  # fmt: skip
    gradcheck=(),
    # The host code never sees 2^34 keys with lengths it could read: tests/ops/test_decode_attention.py has a launch.
    phantom=(),
    draws=((0, 4), (0, 150), (1, 3), (1, 5), (1, 70), (1, 70)),
    aot=((1, 8192, 2, 4, 128, 128), (64, 2048, 8, 8, 64, 64), (8, 8192, 1, 64, 192, 128), (8, 4096, 2, 4, 256, 256)),
    constants=(3,),
    no_copy=(0, 1, 2),
    bodies=("triton", "cpu"),
    forward_only=True,
    file="decode_attention.py",
)

CASES = {
    "decode_attention": replace(
        _decode,
        bugs=(
            Bug("in_cols, in_cols_v = cols < D, cols_v < DV", "in_cols, in_cols_v = cols >= 0, cols_v < DV", "memory",
                (3, 5, 2, 3, 20, 16)),
            Bug("seen = keys < end", "seen = keys <= end", "exact", (3, 5, 2, 3, 16, 16)),
            Bug("start + each, length)", "start + each, start + each)", "memory", (3, 5, 2, 3, 16, 16)),
            Bug("in_rows = local < R", "in_rows = local <= R", "memory", (3, 5, 2, 3, 16, 16)),
            Bug("*k.stride()[:3],", "S * G * D, G * D, D,", "memory", (3, 5, 2, 3, 16, 16)),
            Bug("rows * splits + split", "rows * splits", "memory", (1, 300, 1, 17, 40, 33)),
            Bug("total * shrink + tl.sum", "total + tl.sum", "exact", (3, 200, 2, 2, 32, 20)),
            Bug("parts * share[:, None]", "parts", "exact", (1, 300, 1, 17, 40, 33)),
            Bug("tl.where(total == 0.0, 1.0, total)", "total", "memory", (3, 5, 2, 3, 16, 16)),
            Bug("tl.where(whole == 0.0, 1.0, whole)", "whole", "memory", (3, 65, 1, 1, 8, 8)),
            Bug("s = tl.dot(q, tl.trans(k), input_precision=\"ieee\")", "s = tl.dot(q, tl.trans(k))", "exact",
                (1, 64, 1, 1, 96, 64)),
        ),
    ),
    "decode_attention-options": replace(
        _decode,
        op=partial(by_name, ops.decode_attention, ("sinks",), window=70, softcap=3.0, scale=0.4),
        ref=partial(decode_attention.decode_attention_ref, window=70, softcap=3.0, scale=0.4),
        inputs=decode_inputs(sinks=True),
        shapes=((2, 0, 2, 1, 8, 8), (3, 5, 2, 3, 16, 16), (3, 200, 1, 3, 16, 20), (1, 130, 1, 35, 16, 16)),
        aot=((1, 8192, 2, 4, 128, 128),),
        bugs=(
            Bug("first = tl.maximum(length - window, 0)", "first = tl.maximum(length - window - 1, 0)", "exact",
                (3, 200, 1, 3, 16, 20)),
            Bug("tl.where(split == 0, 1.0,", "tl.where(split == 0, 0.0,", "exact", (3, 200, 1, 3, 16, 20)),
            Bug("* tanh(s / softcap)", "* tanh(s)", "exact", (3, 5, 2, 3, 16, 16)),
            Bug("sinks_ptr + heads", "sinks_ptr + local", "exact", (3, 5, 2, 3, 16, 16)),
        ),
    ),
}  # fmt: skip
