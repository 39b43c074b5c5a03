"""Rows of attention. In the interpreter its blocks are 32 by 32 (kernels/attention.py), so that 70 tokens have full
tiles, tiles at an edge and several of each; a tile takes some ms there, so shapes stay small.

Draws leave out a few tokens or columns: backward takes delta from the rounded output, eager from the same products that
it is subtracted from, so with two or three keys, where the true gradient nearly cancels, eager is nearer by luck.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from case import Bug, Case, by_name, randn
from torch import Tensor

from fmcore import ops
from fmcore.kernels import attention

Inputs = Callable[..., tuple[Tensor | None, ...]]


def heads(B: int, Tq: int, Tk: int, H: int, G: int, D: int, Dv: int) -> tuple[Tensor, ...]:
    """q, k, v."""
    return randn(B, Tq, H, D), randn(B, Tk, G, D), randn(B, Tk, G, Dv)


def plain(B: int, T: int, G: int, D: int) -> tuple[Tensor, ...]:
    """Three query heads to a key head."""
    return heads(B, T, T, 3 * G, G, D, D)


def filled(B: int, Tq: int, Tk: int, D: int, Dv: int) -> tuple[Tensor, ...]:
    """With kv_lens: the first sequence is full, the last one empty."""
    return *heads(B, Tq, Tk, 2, 1, D, Dv), torch.linspace(Tk, 0, B).long()


def with_sinks(B: int, Tq: int, Tk: int, G: int, D: int) -> tuple[Tensor, ...]:
    return *heads(B, Tq, Tk, 2 * G, G, D, D), randn(2 * G)


def boundaries(M: int, *shares: float) -> Tensor:
    return torch.tensor([0, *(int(M * share) for share in shares)], dtype=torch.int32)


def packed(M: int, H: int, G: int, D: int) -> tuple[Tensor, ...]:
    """Documents of all lengths, two empty ones, and rows at the end that are in none."""
    q, k, v = (t[0] for t in heads(1, M, M, H, G, D, D))
    return q, k, v, boundaries(M, 0, 0.55, 0.55, 0.6, 0.95)


def packed_apart(M: int, Mk: int, D: int, Dv: int) -> tuple[Tensor, ...]:
    """Queries and keys of one document in different numbers, none of one, none of the other."""
    q, k, v = (t[0] for t in heads(1, M, Mk, 2, 2, D, Dv))
    return q, k, v, boundaries(M, 0.5, 0.5, 0.8, 1).long(), boundaries(Mk, 0.4, 0.7, 0.7, 0.9).long()


_attention = Case(
    op=ops.attention,
    ref=attention.attention_ref,
    inputs=plain,
    shapes=((2, 0, 1, 16), (0, 5, 1, 16), (1, 70, 1, 80), (2, 32, 1, 24), (1, 33, 2, 16)),
    gradcheck=(1, 2, 1, 2),
    phantom=(2, 2**21, 16, 96),
    draws=((0, 2), (8, 40), (1, 2), (8, 40)),
    aot=((4, 2048, 8, 128),),
    no_copy=(0, 1, 2),
    file="attention.py",
)


def by_names(names: tuple[str, ...], **options) -> dict[str, Callable]:
    """``op`` and ``ref`` of a row whose last arguments are called so."""
    return dict(
        op=partial(by_name, partial(ops.attention, **options), names),
        ref=partial(
            by_name,
            partial(attention.attention_ref, **{k: v for k, v in options.items() if k != "deterministic"}),
            names,
        ),
    )


CASES = {
    "attention": replace(
        _attention,
        bugs=(
            Bug("s = tl.where(ok, s, float", "s = tl.where(ok | True, s, float", "exact", (1, 70, 1, 80)),
            Bug("p = tl.where(ok, p, 0.0)", "p = tl.where(ok, p, p)", "exact", (1, 70, 1, 80)),
            Bug(
                "weights = tl.where(ok, weights, 0.0)",
                "weights = tl.where(ok, weights, weights)",
                "exact",
                (1, 70, 1, 80),
            ),
            Bug("g = h // GROUP", "g = h % (H // GROUP)", "exact", (1, 33, 2, 16)),
            Bug("h, m = q_row * 0 + t // tiles,", "h, m = q_row * 0,", "exact", (1, 33, 2, 16)),
            Bug("None, ACC) - delta[:, None])", "None, ACC))", "exact", (1, 33, 2, 16)),
            Bug("None, ACC) - delta[None, :])", "None, ACC))", "exact", (1, 33, 2, 16)),
            Bug("(dq * scale).to(", "(dq * scale * scale).to(", "exact", (1, 33, 2, 16)),
            Bug("total = total * decay +", "total = total +", "exact", (1, 70, 1, 80)),
            Bug("acc * decay[:, None]", "acc", "exact", (1, 70, 1, 80)),
            Bug(
                "full_low, BLOCK), full_high // BLOCK",
                "full_low, BLOCK), tl.cdiv(full_high, BLOCK)",
                "memory",
                (1, 70, 1, 80),
            ),
            Bug("(rows < n)[:, None] & (cols < N)[None, :]", "(rows < n)[:, None]", "memory", (1, 70, 1, 80)),
            Bug("(i < len_q)[:, None] & (cols < D)", "(i <= len_q)[:, None] & (cols < D)", "memory", (1, 33, 2, 16)),
            Bug("b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)", "b, h = head // H, head % H", "phantom"),
            Bug("b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)", "b, g = head // G, head % G", "phantom"),
        ),
    ),
    # A larger scale makes rows of one large score, which backward computes again in another order and eager does not.
    "attention-window-filled": replace(
        _attention,
        **by_names(("kv_lens",), causal=False, window=(9, 4), scale=-0.2),
        inputs=filled,
        shapes=((2, 0, 5, 16, 16), (2, 5, 0, 16, 16), (2, 37, 41, 40, 24), (3, 50, 19, 16, 8)),
        gradcheck=(1, 1, 2, 2, 2),
        phantom=(2**10, 2**10, 2**16, 256, 64),
        draws=((1, 2), (8, 30), (8, 40), (8, 20), (8, 20)),
        constants=(3,),
        aot=((4, 2048, 2048, 64, 64), (4, 2048, 2048, 256, 256)),
        targets=("sm_90",),
        bugs=(
            Bug("*_strides(k), *_strides(v)", "*_strides(k), *_strides(k)", "memory", (2, 37, 41, 40, 24)),
            Bug("low = x - back", "low = x - back + 1", "exact", (2, 37, 41, 40, 24)),
            Bug(
                "high = tl.minimum(x + ahead, n - 1)",
                "high = tl.minimum(x + ahead + 1, n - 1)",
                "exact",
                (2, 37, 41, 40, 24),
            ),
            Bug("tl.where(j < len_k, high, -1)", "high", "exact", (3, 50, 19, 16, 8)),
            Bug("shift = len_k - len_q", "shift = 0 * len_k", "exact", (2, 37, 41, 40, 24)),
            Bug('tl.where(new == float("-inf"), 0.0, new) if EDGE else new', "new", "memory", (3, 50, 19, 16, 8)),
            Bug("tl.load(kv_lens_ptr + b)", "tl.load(kv_lens_ptr)", "exact", (2, 37, 41, 40, 24)),
        ),
    ),
    "attention-softcap-sinks-lse": replace(
        _attention,
        **by_names(("sinks",), softcap=2.0, return_lse=True),
        inputs=with_sinks,
        shapes=((1, 0, 3, 1, 16), (1, 3, 0, 1, 16), (1, 20, 37, 1, 16), (1, 37, 20, 1, 48)),
        gradcheck=(1, 1, 2, 1, 2),
        phantom=(2, 2**21, 2**15, 16, 128),
        draws=((0, 1), (8, 30), (8, 40), (1, 1), (8, 20)),
        aot=((4, 2048, 2048, 4, 128),),
        targets=("sm_90",),
        bugs=(
            Bug("if dlse2_ptr is not None", "if False", "exact", (1, 20, 37, 1, 16)),
            Bug("dsinks_ptr + pid, -tl.sum", "dsinks_ptr + pid, tl.sum", "exact", (1, 20, 37, 1, 16)),
            Bug("ds *= 1 - slope * slope", "ds *= 1", "exact", (1, 20, 37, 1, 16)),
            Bug(
                "tl.load(sinks_ptr + h).to(ACC) * LOG2E)\n",
                "tl.load(sinks_ptr + h).to(ACC))\n",
                "exact",
                (1, 20, 37, 1, 16),
            ),
            Bug("t = tl.where(y < 0.0625, series, t)", "t = series", "exact", (1, 20, 37, 1, 16)),
        ),
    ),
    "attention-packed": replace(
        _attention,
        **by_names(("cu_seqlens",), window=12),
        inputs=packed,
        shapes=((0, 2, 1, 16), (80, 2, 1, 24)),
        gradcheck=(2, 1, 1, 2),
        phantom=(2**22, 32, 32, 128),
        draws=((20, 70), (2, 2), (1, 2), (8, 20)),
        constants=(3,),
        aot=((8192, 16, 4, 80),),
        targets=("sm_90",),
        bugs=(
            Bug("rows_of(cu_k_ptr, s, S, Tk)", "rows_of(cu_k_ptr, 0 * s, S, Tk)", "exact", (80, 2, 1, 24)),
            Bug("outside = tl.where(s < S, len_k, 0)", "outside = len_k", "exact", (80, 2, 1, 24)),
            Bug("// BLOCK - low) * BLOCK", "// BLOCK) * BLOCK", "memory", (80, 2, 1, 24)),
            Bug("rows // block + cu.shape[0]", "rows // block + 1", "memory", (80, 2, 1, 24)),
            Bug("q_row, k_row = q_row.to(tl.int64), k_row.to(tl.int64)", "q_row, k_row = q_row, k_row", "phantom"),
        ),
    ),
    "attention-packed-apart": replace(
        _attention,
        **by_names(("cu_seqlens", "cu_seqlens_k"), causal=False, window=(None, 7)),
        inputs=packed_apart,
        shapes=((0, 5, 16, 16), (5, 0, 16, 16), (50, 71, 16, 24)),
        gradcheck=(2, 2, 2, 1),
        phantom=(2**25, 2**20, 256, 32),
        draws=((20, 50), (30, 60), (8, 20), (8, 20)),
        constants=(3, 4),
        aot=(),
        bugs=(
            Bug(
                "cu_seqlens if cu_seqlens_k is None else cu_seqlens_k.contiguous()",
                "cu_seqlens",
                "exact",
                (50, 71, 16, 24),
            ),
        ),
    ),
    "attention-unordered": replace(
        _attention,
        op=partial(ops.attention, deterministic=False),
        shapes=((2, 0, 1, 16), (1, 37, 1, 80), (2, 33, 2, 16)),
        unordered=True,
        targets=("sm_90",),
        bugs=(
            Bug("sums.mul_(scale)", "sums", "exact", (2, 33, 2, 16)),
            Bug("part, mask=(i < len_q)[None, :] &", "part, mask=(i <= len_q)[None, :] &", "memory", (2, 33, 2, 16)),
        ),
    ),
}
