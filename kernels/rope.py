"""Rotary position embedding of queries and keys, in one launch.

    y1 = x1 * cos[p] - x2 * sin[p]          y2 = x2 * cos[p] + x1 * sin[p]          p = position of the row

for the pairs (x1, x2) of the first R dimensions of each head, which are (i, i + R/2) or, interleaved, (2i, 2i + 1); the
other D - R pass through. q (B, T, H, D)   k (B, T, G, D)   cos, sin (P, R/2) in fp32.

Of packed documents each tile finds the positions of its rows in cu_seqlens (S + 1) by binary search: log2(S + 1) loads
that all threads share, against one more launch and 8 bytes a row written and read back had the positions been made
before (derived, not measured).

Backward is the rotation by the opposite angle: the same kernel with -sin, and no activation is saved. Computed in fp32
whatever the input (fp64 for fp64). Bound by DRAM: reads q and k and writes both (2 B T (H + G) D elements).
Source: Su et al. 2021, arXiv:2104.09864; the scaling of Llama 3.1, arXiv:2407.21783.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from fmcore import check
from fmcore.kernels.blocks import accumulator, unit_columns
from fmcore.op import Op

# Elements of a tile: 32 for each thread of 4 warps, four 128-bit loads in a 16-bit dtype. Derived from the bytes in
# flight that hide the latency of DRAM (launch.persistent), not measured.
TILE = 4096
WARPS = 4


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 stretches its rotations to a longer context: long wavelengths by ``factor``, short ones not."""

    factor: float
    # Wavelengths beyond original_max_position_embeddings / low_freq_factor positions are stretched in full, those below
    # original_max_position_embeddings / high_freq_factor not at all, those between in proportion.
    low_freq_factor: float
    high_freq_factor: float
    # Context of the first training, in tokens.
    original_max_position_embeddings: int


def _frequencies(R: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair (R/2,), in fp32 step by step: models were trained with these very roundings."""
    freq = 1.0 / (theta ** (torch.arange(0, R, 2, dtype=torch.float32, device="cpu") / R))
    if scaling is None:
        return freq
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / freq
    # 1 keeps a frequency, 0 divides it by factor.
    keep = (context / wavelength - low) / (high - low)
    between = (1 - keep) * freq / scaling.factor + keep * freq
    stretched = torch.where(wavelength > context / low, freq / scaling.factor, between)
    return torch.where(wavelength < context / high, freq, stretched)


def rope_tables(
    P: int, R: int, theta: float = 10000.0, scaling: RopeScaling | None = None, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin (P, R/2) in fp32 of ``position * theta^(-2i/R)`` for P positions and R rotated dimensions.

    Raises ``ValueError`` unless R is even and positive, P and theta are not negative and the scaling is in order.
    """
    if R <= 0 or R % 2:
        raise ValueError(f"rope_tables: R must be even and positive, got {R}")
    if P < 0 or not 0 < theta < math.inf:
        raise ValueError(f"rope_tables: P must be at least 0 and theta positive, got P={P}, theta={theta}")
    if scaling and not (
        scaling.factor > 0
        and 0 < scaling.low_freq_factor < scaling.high_freq_factor
        and scaling.original_max_position_embeddings > 0
    ):
        raise ValueError(f"rope_tables: scaling must be positive, low_freq_factor < high_freq_factor, got {scaling}")
    positions = torch.arange(P, dtype=torch.float32, device="cpu")
    # On the CPU whatever the device, so that every device gets the same bits.
    angles = positions[:, None] * _frequencies(R, theta, scaling)
    device = torch.get_default_device() if device is None else device
    return angles.cos().to(device), angles.sin().to(device)


def _positions(cu_seqlens: Tensor, M: int) -> Tensor:
    """The distance of each of M rows from the last of ``cu_seqlens`` (S + 1,) that is not beyond it, or the first."""
    rows, cu_seqlens = torch.arange(M, device=cu_seqlens.device), cu_seqlens.contiguous()
    last = torch.searchsorted(cu_seqlens, rows.to(cu_seqlens.dtype), right=True) - 1
    # A row before all of them is at a negative position, outside every table.
    return rows - cu_seqlens[last.clamp(min=0)]


def _angles(table: Tensor, positions: Tensor | None, B: int, T: int) -> Tensor:
    """The row of ``table`` (P, R/2) for each of the B * T tokens, (B or 1, T, 1, R/2)."""
    if positions is None:
        return table[:T][None, :, None]
    try:
        # Unlike table[positions], this takes no negative position for one counted from the end.
        return table.index_select(0, positions).view(B, T, 1, table.shape[1])
    except IndexError:
        low, high, P = int(positions.min()), int(positions.max()), table.shape[0]
        raise IndexError(f"rope: positions must be at least 0 and below P={P}, got {low} to {high}") from None


# Reference: what the kernel below must equal. q (B, T, H, D), k (B, T, G, D), positions (B * T,), cu_seqlens (S + 1,).
def rope_ref(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    *, interleaved: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    R = 2 * cos.shape[1]
    if cu_seqlens is not None:
        positions = _positions(cu_seqlens, q.shape[0] * q.shape[1])
    c, s = (_angles(table, positions, *q.shape[:2]) for table in (cos, sin))  # (B or 1, T, 1, R/2)

    def rotate(x: Tensor) -> Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        x1, x2 = (x32[..., :R:2], x32[..., 1:R:2]) if interleaved else x32[..., :R].chunk(2, -1)
        y1, y2 = x1 * c - x2 * s, x2 * c + x1 * s
        y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
        return torch.cat((y.to(x.dtype), x[..., R:]), -1)

    return rotate(q), rotate(k)


# Kernels: a tile holds HEAD_ROWS heads of neighbouring tokens of one batch row, whole.
@triton.jit
def document_start(cu_seqlens_ptr, rows, S, steps):
    """The last of the ascending cu_seqlens[0..S] that is not beyond each row (int64), after ``steps`` halvings.

    cu_seqlens[0] for rows before all of them. Every load lies inside, whatever the values.
    """
    low = tl.zeros_like(rows).to(tl.int32)
    high = low + S
    for _ in range(steps):
        middle = (low + high + 1) // 2
        reached = tl.load(cu_seqlens_ptr + middle).to(tl.int64) <= rows
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return tl.load(cu_seqlens_ptr + low).to(tl.int64)


@triton.jit
def rotate_tile(
    x_ptr, y_ptr, cos_ptr, sin_ptr, positions_ptr, cu_seqlens_ptr, batch, block, T, P, S, steps,
    stride_xb, stride_xt, stride_xh,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HEAD_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    first = block.to(tl.int64) * HEAD_ROWS
    # 32-bit division by the constant H inside the tile; only the scalar one above it is 64 bits wide.
    local = (first % H).to(tl.int32) + tl.arange(0, HEAD_ROWS)
    tokens = first // H + local // H  # (HEAD_ROWS,)
    heads = (local % H).to(tl.int64)
    in_rows = tokens < T
    positions = tokens
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + batch * T + tokens, mask=in_rows, other=0).to(tl.int64)
    if cu_seqlens_ptr is not None:
        positions = batch * T + tokens
        positions -= document_start(cu_seqlens_ptr, positions, S, steps)
    x_row = (x_ptr + batch * stride_xb + tokens * stride_xt + heads * stride_xh)[:, None]
    y_row = (y_ptr + ((batch * T + tokens) * H + heads) * D)[:, None]

    half = tl.arange(0, BLOCK_HALF)[None, :]
    mask = in_rows[:, None] & (half < HALF)
    angles = positions[:, None] * HALF + half
    # NaN for a position that no table has; nothing is read there.
    in_table = mask & ((positions >= 0) & (positions < P))[:, None]
    cos = tl.load(cos_ptr + angles, mask=in_table, other=float("nan")).to(ACC)  # (HEAD_ROWS, BLOCK_HALF)
    sin = tl.load(sin_ptr + angles, mask=in_table, other=float("nan")).to(ACC)
    if INVERSE:
        sin = -sin
    if INTERLEAVED:
        # Both of a pair in one wide load, parted in registers.
        cols = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        both = in_rows[:, None] & (cols < 2 * HALF)
        x = tl.load(x_row + cols, mask=both, other=0.0).to(ACC)
        x1, x2 = tl.split(tl.reshape(x, (HEAD_ROWS, BLOCK_HALF, 2)))
        y = tl.reshape(tl.join(x1 * cos - x2 * sin, x2 * cos + x1 * sin), (HEAD_ROWS, 2 * BLOCK_HALF))
        tl.store(y_row + cols, y.to(y_ptr.dtype.element_ty), mask=both)
    else:
        x1 = tl.load(x_row + half, mask=mask, other=0.0).to(ACC)
        x2 = tl.load(x_row + HALF + half, mask=mask, other=0.0).to(ACC)
        tl.store(y_row + half, (x1 * cos - x2 * sin).to(y_ptr.dtype.element_ty), mask=mask)
        tl.store(y_row + HALF + half, (x2 * cos + x1 * sin).to(y_ptr.dtype.element_ty), mask=mask)
    if BLOCK_REST:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask = in_rows[:, None] & (rest < D)
        tl.store(y_row + rest, tl.load(x_row + rest, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["T", "P", "S", "steps", "q_blocks", "k_blocks"])
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, cu_seqlens_ptr, T, P, S, steps,
    q_blocks, k_blocks,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HEAD_ROWS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program owns one tile: of each batch row, first the tiles of q, then those of k."""
    pid = tl.program_id(0)
    batch, block = (pid // (q_blocks + k_blocks)).to(tl.int64), pid % (q_blocks + k_blocks)
    if block < q_blocks:
        rotate_tile(
            q_ptr, q_out_ptr, cos_ptr, sin_ptr, positions_ptr, cu_seqlens_ptr, batch, block, T, P, S, steps,
            stride_qb, stride_qt, stride_qh, H, D, HALF, INTERLEAVED, INVERSE, HEAD_ROWS, BLOCK_HALF, BLOCK_REST, ACC,
        )  # fmt: skip
    else:
        rotate_tile(
            k_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, cu_seqlens_ptr, batch, block - q_blocks, T, P, S, steps,
            stride_kb, stride_kt, stride_kh, G, D, HALF, INTERLEAVED, INVERSE, HEAD_ROWS, BLOCK_HALF, BLOCK_REST, ACC,
        )  # fmt: skip


# Operator: forward, and with inverse backward; what every body returns, then the bodies.
fwd = bwd = Op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, Tensor? cu_seqlens,"
    " bool interleaved, bool inverse) -> (Tensor q, Tensor k)",
    fake=lambda q, k, *rest: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


@fwd.body("cpu", accepts=lambda q, *rest: q.device.type == "cpu")
def rope_cpu(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None,
    interleaved: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Three passes over each: the product with cos, then one half of the pairs after the other."""
    R, stat = 2 * cos.shape[1], accumulator(q.dtype)[0]
    if cu_seqlens is not None:
        positions = _positions(cu_seqlens, q.shape[0] * q.shape[1])
    c, s = (_angles(table, positions, *q.shape[:2]).to(stat) for table in (cos, sin))
    c = c.repeat_interleave(2, -1) if interleaved else torch.cat((c, c), -1)
    c = pad(c, (0, q.shape[-1] - R), value=1.0)
    first, second = (slice(0, R, 2), slice(1, R, 2)) if interleaved else (slice(0, R // 2), slice(R // 2, R))
    sign = -1 if inverse else 1

    def rotate(x: Tensor) -> Tensor:
        x32 = x.to(stat)
        y = torch.mul(x32, c, out=x32.new_empty(x.shape))
        y[..., first].addcmul_(x32[..., second], s, value=-sign)
        y[..., second].addcmul_(x32[..., first], s, value=sign)
        return y.to(x.dtype)

    return rotate(q), rotate(k)


@fwd.body("triton", accepts=lambda q, *rest: q.is_cuda)
def rope_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None,
    interleaved: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, H, D), G, half = q.shape, k.shape[2], cos.shape[1]
    q, k, cos, sin = unit_columns(q), unit_columns(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    block_half = triton.next_power_of_2(half)
    block_rest = triton.next_power_of_2(D - 2 * half) if 2 * half < D else 0
    rows = max(1, TILE // triton.next_power_of_2(2 * block_half + block_rest))
    q_blocks, k_blocks = triton.cdiv(T * H, rows), triton.cdiv(T * G, rows)
    positions, cu_seqlens = (None if t is None else t.contiguous() for t in (positions, cu_seqlens))
    S = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if tiles := B * (q_blocks + k_blocks):
        rope_kernel[(tiles,)](
            q, k, q_out, k_out, cos, sin, positions, cu_seqlens, T, cos.shape[0], S, S.bit_length(),
            q_blocks, k_blocks, *q.stride()[:3], *k.stride()[:3],
            H=H, G=G, D=D, HALF=half, INTERLEAVED=interleaved, INVERSE=inverse, HEAD_ROWS=rows, BLOCK_HALF=block_half,
            BLOCK_REST=block_rest, ACC=accumulator(q.dtype)[1], num_warps=WARPS,
        )  # fmt: skip
    return q_out, k_out


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None,
        interleaved: bool,
    ):  # fmt: skip
        ctx.save_for_backward(cos, sin, positions, cu_seqlens)
        ctx.interleaved = interleaved
        return fwd(q, k, cos, sin, positions, cu_seqlens, interleaved, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor):
        return *bwd(dq, dk, *ctx.saved_tensors, ctx.interleaved, True), None, None, None, None, None


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None) -> None:
    check.shape("rope", q=(q, "... H D"), k=(k, "... G D"))
    check.shape("rope", cos=(cos, "P R/2"), sin=(sin, "P R/2"))
    check.dtype("rope", q=q)
    check.same("rope", q=q, k=k)
    check.dtype("rope", (torch.float32, torch.float64), cos=cos)
    check.same("rope", cos=cos, sin=sin)
    lead, M = q.shape[:-2], math.prod(q.shape[:-2])
    if k.shape[:-2] != lead:
        raise ValueError(f"rope: k must have the leading dimensions of q, {tuple(lead)}, got {tuple(k.shape[:-2])}")
    if cos.device != q.device:
        raise ValueError(f"rope: cos must be on the device of q, {q.device}, got {cos.device}")
    if not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        raise ValueError(f"rope: cos must be (P, R/2) with 0 < R <= D={q.shape[-1]}, got {tuple(cos.shape)}")
    if cu_seqlens is not None:
        if positions is not None:
            raise ValueError("rope: positions and cu_seqlens exclude each other, got both")
        check.dtype("rope", check.INTS, cu_seqlens=cu_seqlens)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"rope: cu_seqlens must be (S + 1,), got {tuple(cu_seqlens.shape)}")
        if cu_seqlens.device != q.device:
            raise ValueError(f"rope: cu_seqlens must be on the device of q, {q.device}, got {cu_seqlens.device}")
        return
    if positions is None:
        if lead and lead[-1] > cos.shape[0]:
            raise ValueError(f"rope: cos must have a row for each of T={lead[-1]} positions, got {tuple(cos.shape)}")
        return
    check.dtype("rope", check.INTS, positions=positions)
    if positions.shape != lead and positions.shape != (M,):
        raise ValueError(f"rope: positions must be {(M,)} or {tuple(lead)}, got {tuple(positions.shape)}")
    if positions.device != q.device:
        raise ValueError(f"rope: positions must be on the device of q, {q.device}, got {positions.device}")


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *,
    cu_seqlens: Tensor | None = None, interleaved: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rotate the first R dimensions of every head of ``q`` (..., H, D) and ``k`` (..., G, D) by its row's angles.

    ``cos``, ``sin`` (P, R/2) come from ``rope_tables`` and get no gradient; pairs are (i, i + R/2), or (2i, 2i + 1)
    when ``interleaved``. q and k may be views of a fused projection, with a unit stride in D. The position of a row is

    - in ``positions``, int64 or int32, (M,) for the M rows or in the leading dimensions of q;
    - or its distance from the last of ``cu_seqlens`` (S + 1,), int64 or int32 and ascending from 0, that is not beyond
      it: the documents packed in the M rows start there, empty ones among them; rows after the last one count from 0;
    - or, with neither, its index along the dimension before H.

    Positions must lie in [0, P). On a GPU nothing looks at them beforehand, which would cost a synchronization: the
    rotated dimensions of others come out NaN, and nothing is read; on a CPU they raise ``IndexError``. Raises
    ``ValueError`` on shapes and devices, ``TypeError`` on dtypes. Source: arXiv:2104.09864.
    """
    _check(q, k, cos, sin, positions, cu_seqlens)
    T = q.shape[-3] if q.ndim > 2 else 1
    B = math.prod(q.shape[:-3])
    q4, k4 = (x.reshape(B, T, *x.shape[-2:]) for x in (q, k))
    at = None if positions is None else positions.reshape(-1)
    if fwd.eager(q):
        y = rope_ref(q4, k4, cos, sin, at, cu_seqlens, interleaved=interleaved)
    else:
        y = Rope.apply(q4, k4, cos, sin, at, cu_seqlens, interleaved)
    return y[0].view(q.shape), y[1].view(k.shape)
