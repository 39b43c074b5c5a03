"""Softmax attention over queries, keys and values.

    o_i = sum_j p_ij v_j     p_ij = exp(s_ij - lse_i)     lse_i = log(exp(sink_h) + sum_j exp(s_ij))

over the keys j that query i may see, with s_ij = scale * q_i . k_j, or softcap * tanh(scale * q_i . k_j / softcap).

    q (B, Tq, H, D)   k (B, Tk, G, D)   v (B, Tk, G, Dv)   o (B, Tq, H, Dv)   lse (B, H, Tq)   sinks (H,)

Query head h reads kv head h // (H / G). Packed documents: q (M, H, D), k (Mk, G, D), v (Mk, G, Dv), o (M, H, Dv),
lse (H, M) and the boundaries ``cu_seqlens`` (S+1,) of queries and of keys; nothing crosses a boundary.

Queries are aligned to the end of the keys: query i stands at position p = len_k - len_q + i, where len_k may be told by
``kv_lens``, the number of keys that are filled in a sequence (a KV cache). It sees p - left <= j <= p + right.

Backward recomputes p from lse, with delta_i = do_i . o_i - dlse_i:

    dv_j = sum_i p_ij do_i     ds_ij = p_ij (do_i . v_j - delta_i)     dq_i = scale * sum_j ds_ij k_j
    dk_j = scale * sum_i ds_ij q_i     dsink_h = -sum_i exp(sink_h - lse_i) delta_i

and ds times 1 - tanh^2 under a softcap. Products in the dtype of the inputs, softmax and every sum in fp32. A pair of a
query and a key that it sees costs 2 (D + Dv) FLOPs forward; backward 6 D + 4 Dv in one kernel (unordered) and
8 D + 6 Dv in two, which compute the scores twice and add in a fixed order. Neither holds the scores.
Source: Dao 2023, arXiv:2307.08691; Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023,
arXiv:2305.13245; sinks: Xiao et al. 2023, arXiv:2309.17453.
"""

import math
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.blocks import accumulator, unit_columns
from fmcore.op import Op

LOG2E = tl.constexpr(math.log2(math.e))

Window = int | tuple[int | None, int | None] | None
WIDEST = 256  # largest head size that the kernels take


# Reference: what the kernels below must equal.
def visible(
    q: Tensor, k: Tensor, left: int, right: int, kv_lens: Tensor | None = None, cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Which keys each query sees: (B or 1, 1, Tq, Tk), true where it does. -1 stands for no bound."""
    i, j = (torch.arange(t.shape[-3], device=q.device) for t in (q, k))
    if cu_seqlens is None:
        lens = torch.full((1,), len(j), device=q.device) if kv_lens is None else kv_lens.clamp(max=len(j))
        ahead = j - (i[:, None] + (lens - len(i))[:, None, None, None])  # (B, 1, Tq, Tk)
        mask = (j < lens[:, None, None, None]).expand_as(ahead)
    else:
        ends_q = cu_seqlens[1:].contiguous()
        ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k[1:].contiguous()
        docs_q, docs_k = torch.searchsorted(ends_q, i, right=True), torch.searchsorted(ends_k, j, right=True)
        # Rows past the last boundary are in no document.
        mask = ((docs_q[:, None] == docs_k) & (docs_q < len(ends_q))[:, None])[None, None]
        past = ends_q.new_zeros(1)
        ahead = (j - torch.cat([ends_k, past])[docs_k]) - (i - torch.cat([ends_q, past])[docs_q])[:, None]
    if left >= 0:
        mask = mask & (ahead >= -left)
    return mask & (ahead <= right) if right >= 0 else mask


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, window: Window = None, scale: float | None = None, *,
    softcap: float | None = None, sinks: Tensor | None = None, cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, kv_lens: Tensor | None = None, return_lse: bool = False,
) -> Any:  # fmt: skip
    """The formula as it stands, scores and all: what every path must equal."""
    mask = visible(q, k, *_bounds(causal, window), kv_lens, cu_seqlens, cu_seqlens_k)
    packed, group = q.ndim == 3, q.shape[-2] // k.shape[-2]
    q, k, v = (t[None] if packed else t for t in (q, k, v))
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    some = mask.any(-1, keepdim=True)
    # One more column for the sink, which no query sees when there is none.
    sink = scores.new_zeros(1, 1, 1, 1) if sinks is None else sinks.to(scores.dtype)[:, None, None]
    if sinks is not None:
        inside = cu_seqlens is None or torch.arange(q.shape[1], device=q.device)[:, None] < cu_seqlens[-1]
        some = torch.ones_like(some) & inside
    scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1)
    mask = torch.cat([mask, some if sinks is not None else torch.zeros_like(some)], -1)
    # A query that sees nothing would be 0/0: give it scores of 0, then blank its results and so its gradient.
    scores = scores.masked_fill(~mask, -torch.inf).masked_fill(~some, 0.0)
    p = torch.softmax(scores, dim=-1).masked_fill(~some, 0.0)[..., :-1].to(v.dtype)
    o = torch.einsum("bhij,bjhd->bihd", p, v)
    lse = torch.logsumexp(scores, -1).masked_fill(~some.squeeze(-1), -torch.inf)
    if packed:
        o, lse = o[0], lse[0]
    return (o, lse) if return_lse else o


# Kernels. One program owns a block of queries (forward, dq) or of keys (dk and dv) of one head. Tiles that every query
# of the block sees whole are computed without a mask, those at an edge in loops of their own. Scores are kept in units
# of log 2, so that exp is exp2 and the scale costs nothing. Addresses are 64-bit; positions in a sequence are not.
@triton.jit
def place(pid, blocks, heads, section):
    """The head of a program and the rank of its block. ``section`` heads take turns, so that their keys stay in L2."""
    first = pid // (section * blocks) * section
    local = pid % (section * blocks)
    size = tl.minimum(section, heads - first)
    return first + local % size, local // size


@triton.jit
def boundary(cu_ptr, s, M):
    """Where packed document ``s`` starts. Whatever the tensor holds, it is a row: no address depends on its truth."""
    return tl.minimum(tl.maximum(tl.load(cu_ptr + s).to(tl.int32), 0), M)


@triton.jit
def document(block, cu_ptr, S, M, BLOCK: tl.constexpr):
    """The packed document of a block and the block's first row there; rows past the last boundary are document ``S``.

    Document s has its blocks from cu[s] // BLOCK + s on: room enough for each, and no block needs to know the others.
    """
    low, high = 0 * S, S
    while low < high:
        middle = (low + high + 1) // 2
        before = boundary(cu_ptr, middle, M) // BLOCK + middle <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low, (block - boundary(cu_ptr, low, M) // BLOCK - low) * BLOCK


@triton.jit
def rows_of(cu_ptr, s, S, M):
    """First row and length of packed document ``s``."""
    start = boundary(cu_ptr, s, M)
    return start, tl.where(s < S, boundary(cu_ptr, tl.minimum(s + 1, S), M), M) - start


@triton.jit
def key_count(kv_lens_ptr, b, Tk):
    """How many keys of sequence ``b`` are filled."""
    count = Tk
    if kv_lens_ptr is not None:
        count = tl.minimum(tl.maximum(tl.load(kv_lens_ptr + b).to(tl.int32), 0), Tk)
    return count


@triton.jit
def block_of_queries(block, b, cu_q_ptr, cu_k_ptr, kv_lens_ptr, Tq, Tk, S, BLOCK_M: tl.constexpr):
    """First query of a block, first row and length of its sequence, those of the keys, whether it is in no document."""
    if cu_q_ptr is None:
        m, q_row, len_q, k_row, outside = block * BLOCK_M, 0 * b, Tq, 0 * b, block < 0
        len_k = key_count(kv_lens_ptr, b, Tk)
    else:
        s, m = document(block, cu_q_ptr, S, Tq, BLOCK_M)
        q_row, len_q = rows_of(cu_q_ptr, s, S, Tq)
        k_row, len_k = rows_of(cu_k_ptr, s, S, Tk)
        len_k, outside = tl.where(s < S, len_k, 0), s == S
        q_row, k_row = q_row.to(tl.int64), k_row.to(tl.int64)
    return m, q_row, len_q, k_row, len_k, outside


@triton.jit
def tile_ranges(first, last, back, ahead, n, whole, BACK: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles for loops over the other side, of length ``n``: how many full ones and where they start, then how many at
    an edge, where those start, and after how many of them and how far they jump over the full ones.

    The positions ``first`` to ``last`` of a block see from ``back`` before themselves to ``ahead`` after. A block that
    is not ``whole`` has no full tiles.
    """
    low, full_low, high, full_high = 0 * n, 0 * n, n, n
    if BACK:
        low, full_low = tl.maximum(first - back, 0), tl.maximum(last - back, 0)
    if AHEAD:
        high = tl.maximum(tl.minimum(last + ahead + 1, n), 0)
        full_high = tl.maximum(tl.minimum(first + ahead + 1, n), 0)
    begin = low // BLOCK
    full_begin, full_end, end = tl.cdiv(full_low, BLOCK), full_high // BLOCK, tl.cdiv(high, BLOCK)
    fulls = tl.where(whole, tl.maximum(full_end - full_begin, 0), 0)
    before = tl.where(fulls > 0, full_begin - begin, 0)
    edges = tl.maximum(end - begin - fulls, 0)
    return fulls, full_begin * BLOCK, edges, begin * BLOCK, before, fulls * BLOCK


@triton.jit
def load_part(ptrs, rows, cols, n, N: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """A tile at ``ptrs``; 0 in rows from ``n`` on where there may be such (EDGE), and in columns from N to BLOCK."""
    if EDGE and N < BLOCK:
        part = tl.load(ptrs, mask=(rows < n)[:, None] & (cols < N)[None, :], other=0.0)
    elif EDGE:
        part = tl.load(ptrs, mask=(rows < n)[:, None], other=0.0)
    elif N < BLOCK:
        part = tl.load(ptrs, mask=(cols < N)[None, :], other=0.0)
    else:
        part = tl.load(ptrs)
    return part


@triton.jit
def dot(a, b, acc, ACC: tl.constexpr):
    """a @ b, plus ``acc`` unless that is None, with nothing of fp32 inputs dropped."""
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=ACC)


@triton.jit
def tanh(x, FINE: tl.constexpr):
    t = 1 - 2 / (1 + tl.exp2(2 * LOG2E * x))
    if FINE:
        # The difference above loses the digits of a small x.
        y = x * x
        series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
        t = tl.where(y < 0.0625, series, t)
    return t


@triton.jit
def capped(products, inner, outer, SOFTCAP: tl.constexpr, FINE: tl.constexpr):
    """Scores in units of log 2 for products q . k, and their tanh."""
    t = products * inner
    scores = t
    if SOFTCAP:
        t = tanh(t, FINE)
        scores = t * outer
    return scores, t


@triton.jit
def sight(x, back, ahead, n, BACK: tl.constexpr, AHEAD: tl.constexpr):
    """The first and the last of ``n`` positions on the other side that each position ``x`` sees."""
    low, high = x * 0, x * 0 + (n - 1)
    if BACK:
        low = x - back
    if AHEAD:
        high = tl.minimum(x + ahead, n - 1)
    return low, high


@triton.jit
def fwd_tiles(
    acc, total, top, q, k_ptr, v_ptr, k_row, stride_km, stride_vm, tiles, start, before, jump, low, high, len_k,
    inner, outer, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BACK: tl.constexpr, SOFTCAP: tl.constexpr, POSITIVE: tl.constexpr, EDGE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Add ``tiles`` tiles of keys to ``acc``, the sum ``total`` of exponentials and the largest score ``top``."""
    j0, cols, cols_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_tile = j0.to(tl.int64)[:, None] * stride_km + cols[None, :]
    v_tile = j0.to(tl.int64)[:, None] * stride_vm + cols_v[None, :]
    for t in range(tiles):
        n = start + t * BLOCK_N
        if EDGE:
            n += tl.where(t >= before, jump, 0)
        j = n + j0
        k = load_part(k_ptr + (k_row + n) * stride_km + k_tile, j, cols, len_k, D, BLOCK_D, EDGE)
        s = dot(q, tl.trans(k), None, ACC)  # (BLOCK_M, BLOCK_N)
        # A positive scale leaves the largest score the largest: one multiplication a row, and one fused with the shift.
        factor = inner if POSITIVE and not SOFTCAP else 1.0
        if SOFTCAP or not POSITIVE:
            s, _ = capped(s, inner, outer, SOFTCAP, k.dtype == tl.float32)
        if EDGE:
            ok = j[None, :] <= high[:, None]
            if BACK:
                ok = ok & (j[None, :] >= low[:, None])
            s = tl.where(ok, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * factor)
        shift = tl.where(new == float("-inf"), 0.0, new) if EDGE else new
        weights = tl.exp2(s * factor - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, 1)
        v = load_part(v_ptr + (k_row + n) * stride_vm + v_tile, j, cols_v, len_k, DV, BLOCK_DV, EDGE)
        acc = dot(weights.to(v.dtype), v, acc * decay[:, None], ACC)
        top = new
    return acc, total, top


@triton.jit(do_not_specialize=["Tq", "Tk", "S", "left", "right", "heads", "blocks", "section"])
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sinks_ptr, o_ptr, lse2_ptr, cu_q_ptr, cu_k_ptr, kv_lens_ptr, Tq, Tk, S, H,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_km, stride_kh, stride_vb, stride_vm, stride_vh,
    left, right, inner, outer, heads, blocks, section,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SOFTCAP: tl.constexpr, POSITIVE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, rank = place(tl.program_id(0), blocks, heads, section)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    # The last queries see the most keys: longest first, so that the short ones fill the end.
    block = blocks - 1 - rank
    m, q_row, len_q, k_row, len_k, outside = block_of_queries(
        block, b, cu_q_ptr, cu_k_ptr, kv_lens_ptr, Tq, Tk, S, BLOCK_M
    )
    if m >= len_q:
        return
    i, cols, cols_v = m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    g = h // GROUP
    k_ptr += b * stride_kb + g * stride_kh
    v_ptr += b * stride_vb + g * stride_vh
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + (q_row + i)[:, None] * stride_qm + cols[None, :]
    q = load_part(q_ptrs, i, cols, len_q, D, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_DV), ACC)
    total = tl.full((BLOCK_M,), 1.0, ACC)
    if sinks_ptr is None:
        # The first key rescales this to nothing.
        top = tl.full((BLOCK_M,), float("-inf"), ACC)
    else:
        sink = tl.where(outside, float("-inf"), tl.load(sinks_ptr + h).to(ACC) * LOG2E)
        top = tl.zeros((BLOCK_M,), ACC) + sink
    shift = len_k - len_q
    last = tl.minimum(m + BLOCK_M, len_q) - 1
    fulls, full_start, edges, start, before, jump = tile_ranges(
        m + shift, last + shift, left, right, len_k, True, BACK, AHEAD, BLOCK_N
    )
    low, high = sight(i + shift, left, right, len_k, BACK, AHEAD)
    acc, total, top = fwd_tiles(
        acc, total, top, q, k_ptr, v_ptr, k_row, stride_km, stride_vm, fulls, full_start, 0, 0, low, high, len_k,
        inner, outer, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BACK, SOFTCAP, POSITIVE, False, ACC,
    )  # fmt: skip
    acc, total, top = fwd_tiles(
        acc, total, top, q, k_ptr, v_ptr, k_row, stride_km, stride_vm, edges, start, before, jump, low, high, len_k,
        inner, outer, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BACK, SOFTCAP, POSITIVE, True, ACC,
    )  # fmt: skip
    # A query that has seen nothing has a sum of 0, or still the 1 it began with, and a largest score of -inf.
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(lse2_ptr + (b * H + h) * Tq + q_row + i, top + tl.log2(total), mask=i < len_q)
    o_ptrs = o_ptr + ((b * Tq + q_row + i)[:, None] * H + h) * DV + cols_v[None, :]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=(i < len_q)[:, None] & (cols_v < DV)[None, :])


@triton.jit(do_not_specialize=["Tq", "blocks"])
def attention_delta_kernel(
    o_ptr, do_ptr, lse2_ptr, dlse2_ptr, sinks_ptr, delta_ptr, dsinks_ptr, Tq, H, stride_db, stride_dm, stride_dh,
    blocks, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta of each query and head, and this block's share of the gradient of the head's sink."""
    pid = tl.program_id(0)
    b, h = (pid // blocks // H).to(tl.int64), (pid // blocks % H).to(tl.int64)
    i, cols = pid % blocks * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    mask = (i < Tq)[:, None] & (cols < DV)[None, :]
    o = tl.load(o_ptr + ((b * Tq + i)[:, None] * H + h) * DV + cols[None, :], mask=mask, other=0.0).to(ACC)
    do_ptrs = do_ptr + b * stride_db + i.to(tl.int64)[:, None] * stride_dm + h * stride_dh + cols[None, :]
    delta = tl.sum(o * tl.load(do_ptrs, mask=mask, other=0.0).to(ACC), 1)
    at = (b * H + h) * Tq + i
    lse2 = tl.load(lse2_ptr + at, mask=i < Tq, other=float("-inf"))
    if dlse2_ptr is not None:
        delta -= tl.load(dlse2_ptr + at, mask=i < Tq, other=0.0) * LOG2E
        # A query that sees nothing has no gradient, even where that of its lse of -inf is no number.
        delta = tl.where(lse2 == float("-inf"), 0.0, delta)
    tl.store(delta_ptr + at, delta, mask=i < Tq)
    if sinks_ptr is not None:
        # Rows of no document have no sink either.
        share = tl.exp2(tl.load(sinks_ptr + h).to(ACC) * LOG2E - lse2) * delta
        tl.store(dsinks_ptr + pid, -tl.sum(tl.where(lse2 == float("-inf"), 0.0, share), 0))


@triton.jit
def dkdv_tiles(
    dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr, q_row, Tq, stride_qm, stride_qh, stride_dm, stride_dh,
    stride_dq, tiles, start, before, jump, low, high, len_q, inner, outer,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr, AHEAD: tl.constexpr, SOFTCAP: tl.constexpr, UNORDERED: tl.constexpr,
    EDGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add what ``tiles`` tiles of queries of each of GROUP heads give to dk, dv and, when UNORDERED, dq."""
    i0, cols, cols_v = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_tile = i0.to(tl.int64)[:, None] * stride_qm + cols[None, :]
    do_tile = i0.to(tl.int64)[:, None] * stride_dm + cols_v[None, :]
    # One loop over heads and tiles: a loop in a loop takes registers that dk and dv need.
    for t in range(GROUP * tiles):
        h, m = q_row * 0, start + t * BLOCK_M
        if GROUP > 1:
            h, m = q_row * 0 + t // tiles, start + t % tiles * BLOCK_M
        if EDGE:
            m += tl.where(m >= start + before * BLOCK_M, jump, 0)
        i = m + i0
        q = load_part(q_ptr + h * stride_qh + (q_row + m) * stride_qm + q_tile, i, cols, len_q, D, BLOCK_D, EDGE)
        at = h * Tq + i
        lse2 = tl.load(lse2_ptr + at, mask=i < len_q, other=0.0) if EDGE else tl.load(lse2_ptr + at)
        s, slope = capped(dot(k, tl.trans(q), None, ACC), inner, outer, SOFTCAP, q.dtype == tl.float32)
        p = tl.exp2(s - lse2[None, :])  # (BLOCK_N, BLOCK_M)
        if EDGE:
            ok = i[None, :] <= high[:, None]
            if AHEAD:
                ok = ok & (i[None, :] >= low[:, None])
            p = tl.where(ok, p, 0.0)
        do = load_part(do_ptr + h * stride_dh + (q_row + m) * stride_dm + do_tile, i, cols_v, len_q, DV, BLOCK_DV, EDGE)
        dv = dot(p.to(do.dtype), do, dv, ACC)
        delta = tl.load(delta_ptr + at, mask=i < len_q, other=0.0) if EDGE else tl.load(delta_ptr + at)
        ds = p * (dot(v, tl.trans(do), None, ACC) - delta[None, :])
        if SOFTCAP:
            ds *= 1 - slope * slope
        ds = ds.to(q.dtype)
        dk = dot(ds, q, dk, ACC)
        if UNORDERED:
            # Transposed, because the tensor cores of sm_90 take 64 rows and the block of queries may be smaller.
            part = dot(tl.trans(k), ds, None, ACC)  # (BLOCK_D, BLOCK_M)
            ptrs = dq_ptr + h * D + (q_row + i)[None, :] * stride_dq + cols[:, None]
            tl.atomic_add(ptrs, part, mask=(i < len_q)[None, :] & (cols < D)[:, None], sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=["Tq", "Tk", "S", "left", "right", "heads", "blocks", "section"])
def attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr, kv_lens_ptr,
    Tq, Tk, S, H, stride_qb, stride_qm, stride_qh, stride_kb, stride_km, stride_kh,
    stride_vb, stride_vm, stride_vh, left, right, inner, outer, heads, blocks, section,
    stride_db, stride_dm, stride_dh, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SOFTCAP: tl.constexpr, POSITIVE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNORDERED: tl.constexpr,
):  # fmt: skip
    """The first keys are seen by the most queries: the blocks come longest first as they stand."""
    head, block = place(tl.program_id(0), blocks, heads, section)
    G = H // GROUP
    b, g = (head // G).to(tl.int64), (head % G).to(tl.int64)
    if cu_k_ptr is None:
        n, q_row, len_q, k_row, len_k, rows_k = block * BLOCK_N, 0 * b, Tq, 0 * b, key_count(kv_lens_ptr, b, Tk), Tk
    else:
        s, n = document(block, cu_k_ptr, S, Tk, BLOCK_N)
        q_row, len_q = rows_of(cu_q_ptr, s, S, Tq)
        k_row, len_k = rows_of(cu_k_ptr, s, S, Tk)
        len_q, rows_k = tl.where(s < S, len_q, 0), len_k
        q_row, k_row = q_row.to(tl.int64), k_row.to(tl.int64)
    if n >= rows_k:
        return
    j, cols, cols_v = n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_ptrs = k_ptr + b * stride_kb + g * stride_kh + (k_row + j)[:, None] * stride_km + cols[None, :]
    v_ptrs = v_ptr + b * stride_vb + g * stride_vh + (k_row + j)[:, None] * stride_vm + cols_v[None, :]
    k = load_part(k_ptrs, j, cols, len_k, D, BLOCK_D, True)
    v = load_part(v_ptrs, j, cols_v, len_k, DV, BLOCK_DV, True)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), ACC), tl.zeros((BLOCK_N, BLOCK_DV), ACC)
    shift = len_k - len_q
    last = tl.minimum(n + BLOCK_N, len_k) - 1
    # Heads that are wider, or of 65 to 127, leave no registers for a second loop: all their tiles are masked.
    SPLIT: tl.constexpr = D + DV <= 128 or (D == 128 and DV == 128)
    # Seen from a key the window is turned round. Keys past the end have no scores: their block is masked throughout.
    fulls, full_start, edges, start, before, jump = tile_ranges(
        n - shift, last - shift, right, left, len_q, SPLIT & (n + BLOCK_N <= len_k), AHEAD, BACK, BLOCK_M
    )
    edges = tl.where(n < len_k, edges, 0)
    low, high = sight(j - shift, right, left, len_q, AHEAD, BACK)
    high = tl.where(j < len_k, high, -1)
    q_ptr += b * stride_qb + g * GROUP * stride_qh
    do_ptr += b * stride_db + g * GROUP * stride_dh
    at = (b * H + g * GROUP) * Tq + q_row
    lse2_ptr += at
    delta_ptr += at
    if UNORDERED:
        dq_ptr += (b * Tq * H + g * GROUP) * D
    if SPLIT:
        dk, dv = dkdv_tiles(
            dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr, q_row, Tq, stride_qm, stride_qh, stride_dm,
            stride_dh, H * D, fulls, full_start, 0, 0, low, high, len_q, inner, outer,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, GROUP, AHEAD, SOFTCAP, UNORDERED, False, ACC,
        )  # fmt: skip
    dk, dv = dkdv_tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr, q_row, Tq, stride_qm, stride_qh, stride_dm, stride_dh,
        H * D, edges, start, before, jump, low, high, len_q, inner, outer,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, GROUP, AHEAD, SOFTCAP, UNORDERED, True, ACC,
    )  # fmt: skip
    rows = (b * Tk + k_row + j)[:, None] * G + g
    dk_ptrs, dv_ptrs = dk_ptr + rows * D + cols[None, :], dv_ptr + rows * DV + cols_v[None, :]
    in_rows = (j < rows_k)[:, None]
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_rows & (cols < D)[None, :])
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=in_rows & (cols_v < DV)[None, :])


@triton.jit
def dq_tiles(
    dq, q, do, lse2, delta, k_ptr, v_ptr, k_row, stride_km, stride_vm, tiles, start, before, jump, low, high, len_k,
    inner, outer, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BACK: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add what ``tiles`` tiles of keys give to dq."""
    j0, cols, cols_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_tile = j0.to(tl.int64)[:, None] * stride_km + cols[None, :]
    v_tile = j0.to(tl.int64)[:, None] * stride_vm + cols_v[None, :]
    for t in range(tiles):
        n = start + t * BLOCK_N
        if EDGE:
            n += tl.where(t >= before, jump, 0)
        j = n + j0
        k = load_part(k_ptr + (k_row + n) * stride_km + k_tile, j, cols, len_k, D, BLOCK_D, EDGE)
        s, slope = capped(dot(q, tl.trans(k), None, ACC), inner, outer, SOFTCAP, k.dtype == tl.float32)
        weights = tl.exp2(s - lse2[:, None])
        if EDGE:
            ok = j[None, :] <= high[:, None]
            if BACK:
                ok = ok & (j[None, :] >= low[:, None])
            weights = tl.where(ok, weights, 0.0)
        v = load_part(v_ptr + (k_row + n) * stride_vm + v_tile, j, cols_v, len_k, DV, BLOCK_DV, EDGE)
        ds = weights * (dot(do, tl.trans(v), None, ACC) - delta[:, None])
        if SOFTCAP:
            ds *= 1 - slope * slope
        dq = dot(ds.to(k.dtype), k, dq, ACC)
    return dq


@triton.jit(do_not_specialize=["Tq", "Tk", "S", "left", "right", "heads", "blocks", "section"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse2_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr, kv_lens_ptr, Tq, Tk, S, H,
    stride_qb, stride_qm, stride_qh, stride_kb, stride_km, stride_kh, stride_vb, stride_vm, stride_vh,
    left, right, inner, outer, heads, blocks, section, stride_db, stride_dm, stride_dh, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, GROUP: tl.constexpr,
    BACK: tl.constexpr, AHEAD: tl.constexpr, SOFTCAP: tl.constexpr, POSITIVE: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, rank = place(tl.program_id(0), blocks, heads, section)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    block = blocks - 1 - rank
    m, q_row, len_q, k_row, len_k, outside = block_of_queries(
        block, b, cu_q_ptr, cu_k_ptr, kv_lens_ptr, Tq, Tk, S, BLOCK_M
    )
    if m >= len_q:
        return
    i, cols, cols_v = m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    g = h // GROUP
    k_ptr += b * stride_kb + g * stride_kh
    v_ptr += b * stride_vb + g * stride_vh
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + (q_row + i)[:, None] * stride_qm + cols[None, :]
    do_ptrs = do_ptr + b * stride_db + h * stride_dh + (q_row + i)[:, None] * stride_dm + cols_v[None, :]
    q = load_part(q_ptrs, i, cols, len_q, D, BLOCK_D, True)
    do = load_part(do_ptrs, i, cols_v, len_q, DV, BLOCK_DV, True)
    at = (b * H + h) * Tq + q_row + i
    lse2 = tl.load(lse2_ptr + at, mask=i < len_q, other=0.0)
    delta = tl.load(delta_ptr + at, mask=i < len_q, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    shift = len_k - len_q
    last = tl.minimum(m + BLOCK_M, len_q) - 1
    fulls, full_start, edges, start, before, jump = tile_ranges(
        m + shift, last + shift, left, right, len_k, True, BACK, AHEAD, BLOCK_N
    )
    low, high = sight(i + shift, left, right, len_k, BACK, AHEAD)
    dq = dq_tiles(
        dq, q, do, lse2, delta, k_ptr, v_ptr, k_row, stride_km, stride_vm, fulls, full_start, 0, 0, low, high, len_k,
        inner, outer, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BACK, SOFTCAP, False, ACC,
    )  # fmt: skip
    dq = dq_tiles(
        dq, q, do, lse2, delta, k_ptr, v_ptr, k_row, stride_km, stride_vm, edges, start, before, jump, low, high, len_k,
        inner, outer, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, BACK, SOFTCAP, True, ACC,
    )  # fmt: skip
    dq_ptrs = dq_ptr + ((b * Tq + q_row + i)[:, None] * H + h) * D + cols[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(i < len_q)[:, None] & (cols < D)[None, :])


# Launch numbers.
# Keys and values of this many bytes are read by neighbouring programs before others take their place: a third of the
# 50 MB of L2 of an H100 or H200 (derived, not measured).
SECTION_BYTES = 2**24

# (device, kernel) -> largest head size -> BLOCK_M, BLOCK_N, warps, stages. The widest that spill nothing and fit in
# shared memory, as compiled ahead of time (tests/resources.json); none was measured.
TILES: dict[tuple[str, str], dict[int, tuple[int, int, int, int]]] = {
    # Its tensor cores take 64 rows: queries in fwd and dq, keys in dkdv. Blocks of 64 by 128 in dkdv spill at 128.
    ("sm_90", "fwd"): {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (128, 32, 8, 2)},
    ("sm_90", "dq"): {128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
    ("sm_90", "dkdv"): {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (16, 64, 8, 2)},
    ("sm_100", "fwd"): {128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
    ("sm_100", "dq"): {128: (128, 64, 8, 2), 256: (64, 32, 8, 2)},
    ("sm_100", "dkdv"): {128: (32, 128, 8, 2), 256: (32, 64, 8, 1)},
    # All other NVIDIA GPUs: 99 KiB of shared memory.
    ("cuda", "fwd"): {128: (128, 32, 8, 2), 256: (64, 32, 8, 2)},
    ("cuda", "dq"): {128: (64, 64, 8, 1), 256: (32, 32, 8, 1)},
    ("cuda", "dkdv"): {128: (32, 64, 8, 1), 256: (16, 32, 8, 1)},
    # AMD: 64 KiB.
    ("gfx", "fwd"): {128: (128, 32, 4, 1), 256: (64, 32, 8, 1)},
    ("gfx", "dq"): {128: (64, 32, 4, 1), 256: (16, 32, 4, 1)},
    ("gfx", "dkdv"): {128: (16, 64, 4, 1), 256: (16, 32, 8, 1)},
    # fp32 and fp64 without tensor cores, anywhere.
    ("exact", "fwd"): {128: (32, 16, 8, 1), 256: (16, 16, 8, 1)},
    ("exact", "dq"): {128: (32, 16, 8, 2), 256: (16, 16, 8, 1)},
    ("exact", "dkdv"): {128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
}
# The interpreter: so small that 70 tokens have full tiles, tiles at an edge, and several of each. Also wider heads.
SMALLEST = (32, 32, 4, 1)


def _head_block(size: int) -> int:
    """Columns of a tile for heads of ``size``; the tensor cores take no fewer than 16."""
    return max(16, triton.next_power_of_2(size))


def tile(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    """Block sizes, warps and stages of ``kernel`` for heads of these sizes on this device."""
    target = launch.target(q.device)
    device = target if target in ("sm_90", "sm_100", launch.INTERPRETER) else "gfx" if "gfx" in target else "cuda"
    if q.element_size() > 2 and device != launch.INTERPRETER:
        device = "exact"
    size = max(_head_block(q.shape[-1]), _head_block(v.shape[-1]))
    sizes = TILES.get((device, kernel), {})
    block_m, block_n, warps, stages = next((numbers for most, numbers in sizes.items() if size <= most), SMALLEST)
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages)


def _grid(rows: int, block: int, cu: Tensor | None, heads: int, other: Tensor, group: int) -> tuple[int, int, int]:
    """(heads, blocks, section) for ``place``: ``group`` heads read the same rows of ``other``, one block each."""
    blocks = triton.cdiv(rows, block) if cu is None else rows // block + cu.shape[0]
    each = 2 * other.shape[-3] * other.shape[-1] * other.element_size()
    return heads, blocks, max(1, min(heads, max(1, SECTION_BYTES // max(1, each)) * group))


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of sequence, token and head; packed rows are one sequence."""
    return x.stride()[:3] if x.ndim == 4 else (0, *x.stride()[:2])


def _common(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, kv_lens: Tensor | None,
    left: int, right: int, scale: float | None, softcap: float | None,
) -> tuple[tuple, dict[str, object], float]:  # fmt: skip
    """What all three large kernels take: arguments, constants and the scale."""
    D, DV, H = q.shape[-1], v.shape[-1], q.shape[-2]
    scale = D**-0.5 if scale is None else scale
    S = 0
    if cu_seqlens is not None:
        S = cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.contiguous()
        cu_seqlens_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k.contiguous()
    kv_lens = None if kv_lens is None else kv_lens.contiguous()
    # Products are multiplied with the first before tanh and with the second after it.
    inner, outer = (scale, 1.0) if softcap is None else (scale / softcap, softcap)
    inner, outer = (inner * math.log2(math.e), outer) if softcap is None else (inner, outer * math.log2(math.e))
    arguments = (
        cu_seqlens, cu_seqlens_k, kv_lens, q.shape[-3], k.shape[-3], S, H,
        *_strides(q), *_strides(k), *_strides(v), left, right, inner, outer,
    )  # fmt: skip
    constants = dict(
        D=D, DV=DV, BLOCK_D=_head_block(D), BLOCK_DV=_head_block(DV), GROUP=H // k.shape[-2], BACK=left >= 0,
        AHEAD=right >= 0, SOFTCAP=softcap is not None, POSITIVE=scale > 0, ACC=accumulator(q.dtype)[1],
    )  # fmt: skip
    return arguments, constants, scale


# Operators: what every body returns, then the bodies. A window of -1 has no bound. lse2 is lse in units of log 2, which
# backward takes as it is: turned into natural logarithms and back it would cost fp32 scores two roundings.
def _fwd_fake(q, k, v, *rest):
    stat, (H, D) = accumulator(q.dtype)[0], (q.shape[-2], v.shape[-1])
    rows = (*q.shape[:-3], H, q.shape[-3])
    return q.new_empty((*q.shape[:-1], D)), q.new_empty(rows, dtype=stat)


def _bwd_fake(do, dlse2, q, k, v, sinks, *rest):
    needs = zip((q, k, v, sinks if rest[-1] else q), (rest[-3], rest[-2], *rest[-2:]), strict=True)
    return tuple(t.new_empty(t.shape if n else 0) for t, n in needs)


fwd = Op(
    "attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, Tensor? cu_seqlens_k, "
    "Tensor? kv_lens, SymInt left, SymInt right, float? scale, float? softcap) -> (Tensor o, Tensor lse2)",
    fake=_fwd_fake,
)
bwd = Op(
    "attention_bwd(Tensor do, Tensor? dlse2, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor o, Tensor lse2, "
    "Tensor? cu_seqlens, Tensor? cu_seqlens_k, Tensor? kv_lens, SymInt left, SymInt right, float? scale, "
    "float? softcap, bool deterministic, bool needs_dq, bool needs_dkdv, bool needs_dsinks) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    fake=_bwd_fake,
)


@fwd.body("triton", accepts=lambda q, k, v, *_: q.is_cuda and max(q.shape[-1], v.shape[-1]) <= WIDEST)
def attention_fwd_triton(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None,
    kv_lens: Tensor | None, left: int, right: int, scale: float | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k, v = (unit_columns(t) for t in (q, k, v))
    o, lse2 = _fwd_fake(q, k, v)
    arguments, constants, _ = _common(q, k, v, cu_seqlens, cu_seqlens_k, kv_lens, left, right, scale, softcap)
    numbers = tile("fwd", q, v)
    heads = q.shape[-2] * (q.shape[0] if q.ndim == 4 else 1)
    order = _grid(q.shape[-3], numbers["BLOCK_M"], cu_seqlens, heads, k, q.shape[-2] // k.shape[-2])
    if q.shape[-3] and heads:
        attention_fwd_kernel[(order[0] * order[1],)](
            q, k, v, None if sinks is None else sinks.contiguous(), o, lse2, *arguments, *order, **constants, **numbers
        )
    return o, lse2


@bwd.body("triton", accepts=lambda do, dlse2, q, k, v, *_: q.is_cuda and max(q.shape[-1], v.shape[-1]) <= WIDEST)
def attention_bwd_triton(
    do: Tensor, dlse2: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, o: Tensor, lse2: Tensor,
    cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, kv_lens: Tensor | None, left: int, right: int,
    scale: float | None, softcap: float | None, deterministic: bool, needs_dq: bool, needs_dkdv: bool,
    needs_dsinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v = (unit_columns(t) for t in (do, q, k, v))
    o, lse2 = o.contiguous(), lse2.contiguous()
    sinks = sinks.contiguous() if sinks is not None and needs_dsinks else None
    (stat, ACC), DV, H, G, Tq = accumulator(q.dtype), v.shape[-1], q.shape[-2], k.shape[-2], q.shape[-3]
    B = q.shape[0] if q.ndim == 4 else 1
    rows = max(1, 4096 // _head_block(DV))
    blocks = triton.cdiv(Tq, rows)
    delta, dsinks = torch.empty_like(lse2), q.new_empty((B, H, blocks) if sinks is not None else 0, dtype=stat)
    if B * H * blocks:
        attention_delta_kernel[(B * H * blocks,)](
            o, do, lse2, None if dlse2 is None else dlse2.contiguous(), sinks, delta, dsinks, Tq, H, *_strides(do),
            blocks, DV=DV, BLOCK_DV=_head_block(DV), ROWS=rows, ACC=ACC, num_warps=4,
        )  # fmt: skip
    dsinks = q.new_empty(0) if sinks is None else dsinks.sum((0, 2)).to(sinks.dtype)
    arguments, constants, scale = _common(q, k, v, cu_seqlens, cu_seqlens_k, kv_lens, left, right, scale, softcap)
    given = (*_strides(do), scale)
    dq, dk, dv = q.new_empty(q.shape if needs_dq else 0), k.new_empty(0), v.new_empty(0)
    if needs_dq and deterministic and dq.numel():
        sizes = tile("dq", q, v)
        order = _grid(Tq, sizes["BLOCK_M"], cu_seqlens, B * H, k, H // G)
        grid = (order[0] * order[1],)
        attention_dq_kernel[grid](q, k, v, do, lse2, delta, dq, *arguments, *order, *given, **constants, **sizes)
    unordered = needs_dq and not deterministic
    if needs_dkdv or unordered:
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        sums = torch.zeros(q.shape if unordered else 0, dtype=stat, device=q.device)
        numbers = tile("dkdv", q, v)
        order = _grid(k.shape[-3], numbers["BLOCK_N"], cu_seqlens, B * G, q, 1)
        if k.shape[-3] and B * G:
            attention_dkdv_kernel[(order[0] * order[1],)](
                q, k, v, do, lse2, delta, sums, dk, dv, *arguments, *order, *given,
                UNORDERED=unordered, **constants, **numbers,
            )  # fmt: skip
        if unordered:
            dq = sums.mul_(scale).to(q.dtype)
    return (dq, dk, dv, dsinks) if needs_dkdv else (dq, k.new_empty(0), v.new_empty(0), dsinks)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, cu_seqlens, cu_seqlens_k, kv_lens, left, right, scale, softcap, deterministic):
        o, lse2 = fwd(q, k, v, sinks, cu_seqlens, cu_seqlens_k, kv_lens, left, right, scale, softcap)
        ctx.save_for_backward(q, k, v, sinks, o, lse2, cu_seqlens, cu_seqlens_k, kv_lens)
        ctx.options = (left, right, scale, softcap, deterministic)
        ctx.set_materialize_grads(False)
        return o, lse2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do: Tensor | None, dlse2: Tensor | None):
        q, k, v, sinks, o, lse2, *lengths = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        do = torch.zeros_like(o) if do is None else do
        grads = bwd(do, dlse2, q, k, v, sinks, o, lse2, *lengths, *ctx.options, needs[0], any(needs[1:3]), needs[3])
        return *(g if n else None for g, n in zip(grads, needs, strict=True)), *[None] * 8


# The plain path: PyTorch's scaled_dot_product_attention where it can say what is asked, else the formula.
def _dense(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float | None, kv_lens: Tensor | None
) -> Tensor:
    """Rows of one length each, (B, Tq, H, D); a mask is formed only where PyTorch's own flags cannot say it."""
    Tq, Tk, grouped = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
    # A scale that is not positive makes NaN of PyTorch's causal flag.
    causal, plain = right == 0 and Tq == Tk, kv_lens is None and (scale is None or scale > 0)
    flags = plain and not 0 <= left < Tk - 1 and (causal or not 0 <= right < Tq - 1)
    mask = None if flags else visible(q, k, left, right, kv_lens)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    if mask is None:
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2)
    # A query that sees no key would be 0/0: let it see all of them, then blank its output and so its gradient.
    some = mask.any(-1, keepdim=True)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some, scale=scale, enable_gqa=grouped)
    return o.masked_fill(~some, 0.0).transpose(1, 2)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float | None, softcap: float | None,
    sinks: Tensor | None, kv_lens: Tensor | None, return_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if softcap is None and sinks is None and not return_lse and k.shape[1]:
        return _dense(q, k, v, left, right, scale, kv_lens), None
    window = None if left < 0 else left, None if right < 0 else right
    return attention_ref(q, k, v, False, window, scale, softcap=softcap, sinks=sinks, kv_lens=kv_lens, return_lse=True)


def _lengths(name: str, rows: str, cu_seqlens: Tensor, M: int) -> list[int]:
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] > M or any(a > b for a, b in pairwise(starts)):
        raise ValueError(f"attention: {name} must rise from 0 to at most {rows}={M}, got {starts[:8]}...")
    return [b - a for a, b in pairwise(starts)]


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, return_lse: bool, **options
) -> tuple[Tensor, Tensor | None]:
    """Packed documents, (M, H, D). Neighbours of one length share a call, and no input is copied.

    Long documents fill whole rows, so that few neighbours differ. Gathering all documents of a length into one call
    makes fewer calls, but copies q, k and v: with one boundary in 8 rows the forward pass of a model lost 10 %.
    """
    lengths = lengths_k = _lengths("cu_seqlens", "M", cu_seqlens, q.shape[0])
    if cu_seqlens_k is not None:
        lengths_k = _lengths("cu_seqlens_k", "Mk", cu_seqlens_k, k.shape[0])
    runs = [(*pair, len(list(same))) for pair, same in groupby(zip(lengths, lengths_k, strict=True)) if any(pair)]
    outs, lses, i, j = [], [], 0, 0
    for n, n_k, count in runs:
        q_rows = q[i : i + n * count].unflatten(0, (count, n))
        k_rows, v_rows = (t[j : j + n_k * count].unflatten(0, (count, n_k)) for t in (k, v))
        i, j = i + n * count, j + n_k * count
        o, lse = _plain(q_rows, k_rows, v_rows, kv_lens=None, return_lse=return_lse, **options)
        outs.append(o.flatten(0, 1))
        lses += [] if lse is None else [lse.transpose(0, 1).flatten(1)]  # (H, count * n)
    if i < q.shape[0] or not outs:
        # Rows past the last boundary are in no document.
        outs.append(q.new_zeros(q.shape[0] - i, q.shape[1], v.shape[2]))
        lses.append(q.new_full((q.shape[1], q.shape[0] - i), -torch.inf, dtype=accumulator(q.dtype)[0]))
    o = outs[0] if len(outs) == 1 else torch.cat(outs)
    return o, torch.cat(lses, 1) if return_lse else None


def _bounds(causal: bool, window: Window) -> tuple[int, int]:
    """How far a query sees to the left and to the right; -1 for no bound."""
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"attention: window must be at least 1, got {window}")
        window = (window - 1, window - 1)
    pair = window or (None, None)
    if any(n is not None and n < 0 for n in pair):
        raise ValueError(f"attention: window must be a pair of distances of at least 0 or None, got {window}")
    # Positions in a sequence are 32-bit in the kernels.
    left, right = (-1 if n is None else min(n, 2**30) for n in pair)
    return left, 0 if causal else right


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, window: Window = None, scale: float | None = None,
    softcap: float | None = None, sinks: Tensor | None = None, cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, kv_lens: Tensor | None = None, return_lse: bool = False,
    deterministic: bool = True,
) -> Any:  # fmt: skip
    """``softmax(scale * q k^T) v`` over the keys that each query may see, (B, Tq, H, Dv).

    q is (B, Tq, H, D), k (B, Tk, G, D), v (B, Tk, G, Dv); query head h reads kv head h // (H / G). The last query
    stands at the last key.

    Args:
        causal: a query sees keys up to its own position.
        window: a query sees only the last ``window`` keys, its own included (on both sides when not causal); or a pair
            (left, right) of how many keys it sees before and after its own, ``None`` for all.
        scale: factor on q . k, by default 1 / sqrt(D).
        softcap: scores s become ``softcap * tanh(s / softcap)``.
        sinks: (H,), one logit for each head that takes its share of the softmax and gives no value.
        cu_seqlens: (S+1,) integers, where packed documents start, 0 first; then q is (M, H, D), k (M, G, D) and
            v (M, G, Dv). Rows past the last entry are in no document. On a GPU it is never read by the host; for
            tensors on a CPU it is.
        cu_seqlens_k: (S+1,), the same for keys and values (Mk, G, .) that are packed otherwise than the queries.
        kv_lens: (B,) integers, how many keys of each sequence are filled, beyond Tk all; queries stand at their end.
        return_lse: return (o, lse) with lse (B, H, Tq), or (H, M), the natural logarithm of the softmax's denominator,
            in fp32 (fp64 for fp64). It has a gradient.
        deterministic: False lets programs add to dq in any order, in a kernel that computes the scores once and not
            twice.

    A query that sees no key gives 0, with lse -inf (its sink, if there is one). Raises ``ValueError`` for shapes and
    options that do not fit, ``TypeError`` for dtypes, ``NotImplementedError`` for heads wider than 256 on a GPU.
    """
    check.same("attention", q=q, k=k, v=v)
    check.dtype("attention", q=q, sinks=sinks)
    check.device("attention", q=q, sinks=sinks)
    check.device("attention", True, q=q, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, kv_lens=kv_lens)
    if cu_seqlens is None:
        size = check.shape("attention", q=(q, "B Tq H D"), k=(k, "B Tk G D"), v=(v, "B Tk G Dv"))
        if cu_seqlens_k is not None:
            raise ValueError("attention: cu_seqlens_k must be None without cu_seqlens, got it alone")
    else:
        rows = "M" if cu_seqlens_k is None else "Mk"
        size = check.shape("attention", q=(q, "M H D"), k=(k, f"{rows} G D"), v=(v, f"{rows} G Dv"))
        keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        check.shape("attention", cu_seqlens=(cu_seqlens, "S+1"), cu_seqlens_k=(keys, "S+1"))
        check.dtype("attention", check.INTS, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k)
        if cu_seqlens.shape[0] == 0:
            raise ValueError("attention: cu_seqlens must have at least one entry, got none")
        if kv_lens is not None:
            raise ValueError("attention: kv_lens must be None when cu_seqlens is given, got both")
    if kv_lens is not None:
        check.shape("attention", kv_lens=(kv_lens, "B"), q=(q, "B Tq H D"))
        check.dtype("attention", check.INTS, kv_lens=kv_lens)
    if sinks is not None:
        check.shape("attention", q=(q, "... H D"), sinks=(sinks, "H"))
    if size["D"] == 0:
        raise ValueError(f"attention: q must have a head size of at least 1, got {tuple(q.shape)}")
    if size["G"] == 0 or size["H"] % size["G"]:
        raise ValueError(f"attention: H must be a multiple of G, got H={size['H']}, G={size['G']}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap must be above 0, got {softcap}")
    if scale is not None and not abs(scale) < math.inf:  # also for torch.compile: see check_norm in rms_norm.py
        raise ValueError(f"attention: scale must be finite, got {scale}")
    left, right = _bounds(causal, window)
    if fwd.eager(q):
        options: dict[str, Any] = dict(left=left, right=right, scale=scale, softcap=softcap, sinks=sinks)
        if cu_seqlens is None:
            o, lse = _plain(q, k, v, kv_lens=kv_lens, return_lse=return_lse, **options)
        else:
            o, lse = _packed(q, k, v, cu_seqlens, cu_seqlens_k, return_lse, **options)
    else:
        # The kernels read lengths where the rows are; those on the CPU are sent there without waiting.
        lengths = (t if t is None else t.to(q.device, non_blocking=True) for t in (cu_seqlens, cu_seqlens_k, kv_lens))
        o, lse2 = Attention.apply(q, k, v, sinks, *lengths, left, right, scale, softcap, deterministic)
        lse = lse2 * math.log(2) if return_lse else None
    return (o, lse) if return_lse else o
