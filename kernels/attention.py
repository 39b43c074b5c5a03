"""Softmax attention over queries, keys and values.

    o_i = sum_j p_ij v_j      p_ij = softmax_j(scale * q_i . k_j)      over the keys j that query i may see

    q (B, Tq, H, D)   k (B, Tk, G, D)   v (B, Tk, G, Dv)   o (B, Tq, H, Dv)   query head h reads kv head h // (H / G)

Queries are aligned to the end of the keys: query i stands at position p = len_k - Tq + i, where len_k is Tk or, with
``kv_lens``, the number of keys that are filled in that sequence (a KV cache). Causal: j <= p. Window: j > p - window.
Packed documents: q (M, H, D), k, v (M, G, D) and the boundaries ``cu_seqlens`` (S+1,); nothing crosses a boundary.

Work forward: 4 D FLOPs for each visible pair and head. The body here is PyTorch's scaled_dot_product_attention, which
never holds the scores of the plain causal and bidirectional cases.
Source: Vaswani et al. 2017, arXiv:1706.03762; grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from fmcore import check


def visible(Tq: int, Tk: int, causal: bool, window: int | None, kv_lens: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees: (B or 1, 1, Tq, Tk), true where it does."""
    keys = torch.arange(Tk, device=device)
    lens = torch.full((1,), Tk, device=device) if kv_lens is None else kv_lens
    p = (lens[:, None] - Tq + torch.arange(Tq, device=device))[:, None, :, None]  # (B, 1, Tq, 1)
    mask = (keys < lens[:, None, None, None]).expand(-1, 1, Tq, Tk)
    if causal:
        mask = mask & (keys <= p)
    if window is not None:
        mask = mask & (keys > p - window) if causal else mask & ((keys - p).abs() < window)
    return mask


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor:
    """The formula as it stands, scores and all: what every path must equal."""
    H, G, D = q.shape[2], k.shape[2], q.shape[3]
    k, v = (t.repeat_interleave(H // G, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (D**-0.5 if scale is None else scale)
    mask = visible(q.shape[1], k.shape[1], causal, window, kv_lens, q.device)
    p = torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1).masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return torch.einsum("bhij,bjhd->bihd", p, v)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None, kv_lens: Tensor | None
) -> Tensor:
    """Rows of one length each, (B, Tq, H, D); a mask is formed only where PyTorch's own flags cannot say it."""
    Tq, Tk, grouped = q.shape[1], k.shape[1], q.shape[2] != k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
    narrow = window is not None and window < Tk
    if kv_lens is None and not narrow and (not causal or Tq == Tk):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return o.transpose(1, 2)
    mask = visible(Tq, Tk, causal, window, kv_lens, q.device)
    # A query that sees no key would be 0/0: let it see all of them, then blank its output and so its gradient.
    some = mask.any(-1, keepdim=True)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~some, scale=scale, enable_gqa=grouped)
    return o.masked_fill(~some, 0.0).transpose(1, 2)


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int | None, scale: float | None
) -> Tensor:
    """Packed documents, (M, H, D). Neighbours of one length share a call, and no input is copied.

    Long documents fill whole rows, so that few neighbours differ. Gathering all documents of a length into one call
    makes fewer calls, but copies q, k and v: with one boundary in 8 rows the forward pass of a model lost 10 %.
    """
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != q.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(f"attention: cu_seqlens must rise from 0 to M={q.shape[0]}, got {cu_seqlens.tolist()[:8]}...")
    runs = [(n, n * len(list(same))) for n, same in groupby(n for n in lengths if n)]
    if not runs:
        return q.new_empty(0, q.shape[1], v.shape[2])
    parts = zip(*(t.split([span for _, span in runs]) for t in (q, k, v)), strict=True)
    outs = []
    for (n, _), part in zip(runs, parts, strict=True):
        q_rows, k_rows, v_rows = (t.unflatten(0, (-1, n)) for t in part)
        outs.append(_dense(q_rows, k_rows, v_rows, causal, window, scale, None).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * q k^T) v`` over the keys that each query may see, (B, Tq, H, Dv).

    q is (B, Tq, H, D), k (B, Tk, G, D), v (B, Tk, G, Dv); query head h reads kv head h // (H / G).

    Args:
        causal: a query sees keys up to its own position.
        window: a query sees only the last ``window`` keys, its own included (on both sides when not causal).
        scale: factor on q . k, by default 1 / sqrt(D).
        cu_seqlens: (S+1,) int32, where packed documents start, 0 first and M last; then q is (M, H, D), k and v are
            (M, G, D). Its values are read: keep it on the CPU, where that costs no synchronisation.
        kv_lens: (B,) integers, how many keys of each sequence are filled; queries stand at the end of those.

    A query that sees no key gives 0. Raises ``ValueError`` for shapes that do not fit, ``TypeError`` for dtypes.
    """
    check.same("attention", q=q, k=k, v=v)
    check.dtype("attention", q=q)
    if cu_seqlens is not None:
        size = check.shape("attention", q=(q, "M H D"), k=(k, "M G D"), v=(v, "M G Dv"), cu_seqlens=(cu_seqlens, "S+1"))
        check.dtype("attention", check.INTS, cu_seqlens=cu_seqlens)
        if kv_lens is not None:
            raise ValueError("attention: kv_lens must be None when cu_seqlens is given, got both")
    else:
        size = check.shape("attention", q=(q, "B Tq H D"), k=(k, "B Tk G D"), v=(v, "B Tk G Dv"))
        if kv_lens is not None:
            check.shape("attention", kv_lens=(kv_lens, "B"), q=(q, "B Tq H D"))
            check.dtype("attention", check.INTS, kv_lens=kv_lens)
    if size["H"] % size["G"]:
        raise ValueError(f"attention: H must be a multiple of G, got H={size['H']}, G={size['G']}")
    if window is not None and window < 1:
        raise ValueError(f"attention: window must be at least 1, got {window}")
    if cu_seqlens is not None:
        return _packed(q, k, v, cu_seqlens, causal, window, scale)
    return _dense(q, k, v, causal, window, scale, kv_lens)
