"""Attention of one new token of each sequence over a cache of keys and values.

    o = sum_j p_j v_j      p_j = exp(s_j) / (exp(sink) + sum_i exp(s_i))      s_j = cap(scale * q . k_j)

    q (B, H, D)   k_cache (B, S, G, D)   v_cache (B, S, G, Dv)   kv_lens (B,)   sinks (H,)   o (B, H, Dv)

over the keys j < kv_lens, of which only the last ``window`` count when one is given; cap(s) = softcap * tanh(s /
softcap). The query stands at position kv_lens - 1, its own key and value are in the cache. Query head h reads kv head
h // (H / G). The term exp(sink) is absent without sinks. A sequence of length 0 gives 0.

Scores, sums and partial results in fp32; bound by DRAM: it reads the visible keys and values once, (D + Dv) elements
for each kv head and key, for all H / G query heads that share them. One program for each sequence and kv head would
leave most of a GPU idle, so the keys are cut into splits, each with a program and a partial result, and a second kernel
puts those together. How many splits depends on shapes alone, so a rerun gives the same bits. No gradient.
Source: Dao et al. 2023, Flash-Decoding; online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import launch
from fmcore.op import Op

# Largest head size: beyond it the sums of a program do not fit its registers.
WIDEST_HEAD = 256

# Query heads of one kv head that share a program, the least that tl.dot takes. More of them would save nothing below 16
# heads; 32 and 64 spill on sm_80, sm_120 and gfx942. A kv head with more has several programs, which all read its keys.
ROWS = 16

# Keys that a program loads at a time, at most, and bytes of keys and values. With two stages there is one buffer of
# them, next to which four programs fit a multiprocessor of sm_90; registers allow no more (tests/resources.json). Dots
# of fp32 run without tensor cores: 32 keys spill there.
MOST_KEYS = 64
MOST_KEYS_FP32 = 16
BYTES_PER_STEP = 2**15

# Programs to aim at for each multiprocessor, and the most splits of a sequence (derived, not measured).
PROGRAMS_PER_SM = 2
MOST_SPLITS = 128

# Columns of the output that one program combines: a line of 128 bytes from each partial result.
COMBINED_COLUMNS = 32

LOG2E = tl.constexpr(1.4426950408889634)


# Reference: what the kernels below must equal.
def decode_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    sinks: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    B, H, D = q.shape
    k, v = (t.repeat_interleave(H // k_cache.shape[2], dim=2) for t in (k_cache, v_cache))
    s = torch.einsum("bhd,bshd->bhs", q, k) * (D**-0.5 if scale is None else scale)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    mask = visible(k_cache.shape[1], kv_lens, window)[:, None]  # (B, 1, S)
    # The sink is one more column, with nothing to add to the output; without sinks it has no weight.
    sink = q.new_full((H,), -torch.inf) if sinks is None else sinks
    s = torch.cat((s.masked_fill(~mask, -torch.inf), sink[:, None].expand(B, H, 1)), dim=-1)
    none = s.amax(-1, keepdim=True) == -torch.inf
    p = torch.softmax(s.masked_fill(none, 0.0), dim=-1)[..., :-1].masked_fill(~mask, 0.0)
    return torch.einsum("bhs,bshd->bhd", p, v)


def visible(S: int, kv_lens: Tensor, window: int | None) -> Tensor:
    """Which of S keys the query of each sequence sees, (B, S)."""
    keys, lens = torch.arange(S, device=kv_lens.device), kv_lens.clamp(max=S)[:, None]
    return keys < lens if window is None or window >= S else (keys < lens) & (keys >= lens - window)


# Kernels.
@triton.jit
def tanh(x):
    """tanh in fp32 to 2 ulp: near 0 a polynomial, as 1 - 2 / (e^2x + 1) would lose the digits of a small x."""
    z = x * x
    small = ((((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
             - 3.33332819422e-1) * z * x + x  # fmt: skip
    large = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(z < 0.390625, small, tl.where(x < 0, -large, large))


@triton.jit(do_not_specialize=["S", "window"])
def decode_attention_split_kernel(
    q_ptr, k_ptr, v_ptr, kv_lens_ptr, sinks_ptr, o_ptr, m_ptr, total_ptr, S, R, scale, window, softcap,
    stride_qb, stride_qh, stride_kb, stride_ks, stride_kg, stride_vb, stride_vs, stride_vg,
    D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_S: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program owns a split of the keys of one kv head, for up to ROWS of the R query heads that read it.

    With SPLIT it stores its sums (o, m, total): those of exp2(s - m) v and of exp2(s - m), where m is the largest s.
    """
    tiles = tl.cdiv(R, ROWS)
    batch = tl.program_id(0).to(tl.int64)
    group = (tl.program_id(1) // tiles).to(tl.int64)
    split, splits = tl.program_id(2), tl.num_programs(2)
    local = tl.program_id(1) % tiles * ROWS + tl.arange(0, ROWS)
    in_rows = local < R
    heads = group * R + local  # (ROWS,)
    cols, cols_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_cols, in_cols_v = cols < D, cols_v < DV

    # The visible keys, first to end, in splits of whole blocks. A length beyond the cache counts as all of it.
    length = tl.minimum(tl.load(kv_lens_ptr + batch).to(tl.int64), S)
    first = tl.maximum(length - window, 0)
    blocks = tl.cdiv(length - first, BLOCK_S).to(tl.int32)
    each = tl.cdiv(blocks, splits).to(tl.int64) * BLOCK_S
    start = first + split * each
    end = tl.minimum(start + each, length)

    q = tl.load(
        q_ptr + batch * stride_qb + heads[:, None] * stride_qh + cols[None, :],
        mask=in_rows[:, None] & in_cols[None, :], other=0.0,
    )  # fmt: skip
    k_ptr += batch * stride_kb + group * stride_kg
    v_ptr += batch * stride_vb + group * stride_vg
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if sinks_ptr is not None:
        # A sink is a key whose value is 0, and the first split sees it.
        sink = tl.load(sinks_ptr + heads, mask=in_rows, other=0.0).to(tl.float32) * LOG2E
        m = tl.where(split == 0, sink, m)
        total = tl.where(split == 0, 1.0, total)
    for at in range(start, end, BLOCK_S):
        keys = (at + tl.arange(0, BLOCK_S)).to(tl.int64)
        seen = keys < end
        k = tl.load(k_ptr + keys[:, None] * stride_ks + cols[None, :], mask=seen[:, None] & in_cols[None, :], other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (ROWS, BLOCK_S)
        if softcap is not None:
            s = softcap * tanh(s / softcap)
        s = tl.where(seen[None, :], s * LOG2E, float("-inf"))
        # At least one key of every block is seen, so the new maximum is a number.
        largest = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - largest[:, None])
        shrink = tl.exp2(m - largest)
        v = tl.load(
            v_ptr + keys[:, None] * stride_vs + cols_v[None, :], mask=seen[:, None] & in_cols_v[None, :], other=0.0
        )
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        m = largest

    rows = batch * (tl.num_programs(1) // tiles) * R + heads
    mask = in_rows[:, None] & in_cols_v[None, :]
    if SPLIT:
        rows = rows * splits + split
        tl.store(m_ptr + rows, m, mask=in_rows)
        tl.store(total_ptr + rows, total, mask=in_rows)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(o_ptr + rows[:, None] * DV + cols_v[None, :], acc.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def decode_attention_combine_kernel(
    parts_ptr, m_ptr, total_ptr, o_ptr, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One program puts the at most MOST partial results of a query head together, in BLOCK_DV columns."""
    row = tl.program_id(0).to(tl.int64)
    cols, every = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV), tl.arange(0, MOST)
    in_cols, in_splits = cols < DV, every < splits
    m = tl.load(m_ptr + row * splits + every, mask=in_splits, other=float("-inf"))
    total = tl.load(total_ptr + row * splits + every, mask=in_splits, other=0.0)
    largest = tl.max(m, axis=0)
    # No split saw a key: any number will do, but inf - inf is none.
    share = tl.exp2(m - tl.where(largest == float("-inf"), 0.0, largest))  # (MOST,)
    whole = tl.sum(total * share, axis=0)
    parts = tl.load(
        parts_ptr + (row * splits + every)[:, None] * DV + cols[None, :],
        mask=in_splits[:, None] & in_cols[None, :], other=0.0,
    )  # fmt: skip
    o = tl.sum(parts * share[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
    tl.store(o_ptr + row * DV + cols, o.to(o_ptr.dtype.element_ty), mask=in_cols)


# Operator: what every body returns, then the bodies.
fwd = Op(
    "decode_attention_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_lens, Tensor? sinks, float scale, "
    "int? window, float? softcap) -> Tensor",
    fake=lambda q, k_cache, v_cache, *rest: q.new_empty(*q.shape[:2], v_cache.shape[3]),
)


@fwd.body("cpu", accepts=lambda q, *rest: q.device.type == "cpu")
def decode_attention_fwd_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The query heads of a kv head are the rows of one matrix, so that no key is repeated."""
    (B, H, _), (S, G) = q.shape, k_cache.shape[1:3]
    if softcap is not None or sinks is not None or not B * S:
        return decode_attention_ref(q, k_cache, v_cache, kv_lens, sinks, scale, window, softcap).contiguous()
    q, k, v = q.unflatten(1, (G, H // G)), k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    mask = visible(S, kv_lens, window)[:, None, None]  # (B, 1, 1, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).flatten(1, 2).contiguous()


@fwd.body("triton", accepts=lambda q, *rest: q.is_cuda and q.dtype != torch.float64)
def decode_attention_fwd_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    (B, H, D), (S, G, DV) = q.shape, (*k_cache.shape[1:3], v_cache.shape[3])
    R = H // G
    if max(D, DV) > WIDEST_HEAD:
        raise NotImplementedError(f"decode_attention: heads must have at most {WIDEST_HEAD} elements, got {D} and {DV}")
    q, k, v = (t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in (q, k_cache, v_cache))
    window = S if window is None else min(window, S)
    block_d, block_dv = (max(16, triton.next_power_of_2(n)) for n in (D, DV))
    exact, wide = q.dtype == torch.float32, block_d + block_dv
    block_s = min(
        MOST_KEYS_FP32 if exact else MOST_KEYS, BYTES_PER_STEP // (q.element_size() * triton.next_power_of_2(wide))
    )
    programs = B * G * triton.cdiv(R, ROWS)
    o = q.new_empty(B, H, DV)
    if not o.numel():
        return o
    wanted = triton.cdiv(PROGRAMS_PER_SM * launch.sm_count(q.device), programs)
    splits = max(1, min(wanted, triton.cdiv(window, block_s), MOST_SPLITS))
    parts, m, total = o, None, None
    if splits > 1:
        parts = o.new_empty(B, H, splits, DV, dtype=torch.float32)
        m, total = (o.new_empty(B, H, splits, dtype=torch.float32) for _ in range(2))
    decode_attention_split_kernel[(B, programs // B, splits)](
        q, k, v, kv_lens.contiguous(), None if sinks is None else sinks.contiguous(), parts, m, total,
        S, R, scale, window, softcap, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3],
        D=D, DV=DV, ROWS=ROWS, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_S=block_s, SPLIT=splits > 1,
        num_warps=8 if exact and wide <= 256 else 4, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        decode_attention_combine_kernel[(B * H, triton.cdiv(DV, COMBINED_COLUMNS))](
            parts, m, total, o, splits, DV=DV, BLOCK_DV=COMBINED_COLUMNS, MOST=MOST_SPLITS, num_warps=4
        )
    return o


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lens: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of one query (B, H, D) of each sequence over its filled keys of a cache, (B, H, Dv).

    k_cache is (B, S, G, D), v_cache (B, S, G, Dv), of any strides; query head h reads kv head h // (H / G). All share
    device and floating dtype.

    Args:
        kv_lens: (B,) int32 or int64 on the same device, how many keys of each sequence are filled, the query's own
            included. Never read by the host; a length beyond S counts as S, 0 or less gives a row of 0.
        scale: factor on q . k, by default 1 / sqrt(D).
        window: only the last ``window`` keys count.
        softcap: scores s become softcap * tanh(s / softcap), after the scale.
        sinks: (H,) a score of each head that takes weight and has no value.

    For inference: where a gradient is wanted, and in fp64 on a GPU, the plain formula runs, which PyTorch
    differentiates. Raises ``ValueError`` for shapes, devices and options that do not fit, ``TypeError`` for dtypes,
    ``NotImplementedError`` for heads of more than 256 on a GPU.
    """
    name = "decode_attention"
    size = check.shape(
        name, q=(q, "B H D"), k_cache=(k_cache, "B S G D"), v_cache=(v_cache, "B S G Dv"), kv_lens=(kv_lens, "B")
    )
    check.dtype(name, q=q)
    check.dtype(name, check.INTS, kv_lens=kv_lens)
    check.same(name, q=q, k_cache=k_cache, v_cache=v_cache, sinks=sinks)
    if kv_lens.device != q.device:
        raise ValueError(f"{name}: kv_lens must be on the device of q, {q.device}, got {kv_lens.device}")
    if sinks is not None:
        check.shape(name, q=(q, "B H D"), sinks=(sinks, "H"))
    if size["D"] == 0:
        raise ValueError(f"{name}: q must have a head size of at least 1, got {tuple(q.shape)}")
    if not size["G"] or size["H"] % size["G"]:
        raise ValueError(f"{name}: H must be a multiple of G, got H={size['H']}, G={size['G']}")
    if window is not None and window < 1:
        raise ValueError(f"{name}: window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be above 0, got {softcap}")
    scale = size["D"] ** -0.5 if scale is None else scale
    given = (q, k_cache, v_cache, sinks)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if learns or fwd.eager(q) or (q.is_cuda and q.dtype == torch.float64):
        return decode_attention_ref(q, k_cache, v_cache, kv_lens, sinks, scale, window, softcap)
    return fwd(q, k_cache, v_cache, kv_lens, sinks, scale, window, softcap)
