"""Rows of a table, one for each token, with a deterministic gradient.

    y[m] = w[tokens[m]]        dw[v] = sum over tokens[m] = v of dy[m]        tokens (M)   w, dw (V, C)   y, dy (M, C)

Backward sorts the tokens, stably, so that the rows of each token stand side by side, a run. A run is cut at every
multiple of CHUNK places into pieces; one program sums one piece in fp32 (fp64 for fp64). The sum of a run of one piece
is rounded and written; the sums of longer runs, two places a chunk, are added by a second kernel. Every sum has one
order and is rounded once, there are no atomics, and one token in all places costs no more than as many different ones.
Nothing waits for the GPU: every launch has a size that follows from M.

Bound by DRAM: forward reads M rows and writes as many (2MC elements); backward reads dy (MC), writes dw with zeros
(VC) and the rows that were asked for (MC at most), and of runs cut in pieces moves up to 4MC / CHUNK elements in fp32.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.blocks import accumulator, load_tile, store_tile, unit_columns
from fmcore.op import Op

# Longest piece, in rows. A run of L rows then takes 64 / 8 steps of a program for each piece and L / 64 / 32 for the
# sum of its pieces, both short for L = 10^5; the sums of pieces are 1/8 of the bytes of a 16-bit dy at most (derived).
CHUNK = 64
# Elements of a tile: 32 for each thread of 4 warps, four 128-bit loads in a 16-bit dtype. Derived, as in rope.py.
TILE = 4096
WARPS = 4
# Widest block of columns of a piece, so that a tile holds 8 rows; and of the sum of pieces, of which there are few.
PIECE_COLUMNS = 512
RUN_COLUMNS = 128


# Reference: what the kernels below must equal. Sums in fp32, rounded once.
def embedding_ref(tokens: Tensor, w: Tensor, padding_idx: int | None = None) -> Tensor:
    w32 = w.to(torch.promote_types(w.dtype, torch.float32))
    return F.embedding(tokens, w32, padding_idx).to(w.dtype)


# Kernels: forward, one program owns a (ROWS, BLOCK_C) tile.
@triton.jit(do_not_specialize=["M"])
def embedding_fwd_kernel(
    tokens_ptr, w_ptr, y_ptr, M, V, C, stride_wv, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    tokens = tl.load(tokens_ptr + rows, mask=rows < M, other=0).to(tl.int64)
    mask = (rows < M)[:, None] & (cols < C)[None, :]
    in_table = ((tokens >= 0) & (tokens < V))[:, None]
    w = tl.load(w_ptr + tokens[:, None] * stride_wv + cols[None, :], mask=mask & in_table, other=float("nan"))
    store_tile(y_ptr, rows, cols, C, mask, w)


@triton.jit(do_not_specialize=["M"])
def embedding_pieces_kernel(
    dy_ptr, sorted_ptr, order_ptr, dw_ptr, head_ptr, tail_ptr, M, V, C, stride_dym, padding_idx,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program owns one place of the sorted tokens and one block of columns, and works if a piece starts there.

    The sum goes to dw when the piece is a whole run; else to the tail of its chunk, if the run starts in it, or to the
    head, if it comes from the chunk before.
    """
    pid, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    first = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(sorted_ptr + first).to(tl.int64)
    run_starts = (first == 0) | (tl.load(sorted_ptr + first - 1, mask=first > 0, other=0).to(tl.int64) != token)
    wanted = (token >= 0) & (token < V) & (token != padding_idx)
    if wanted & (run_starts | (first % CHUNK == 0)):
        chunk = first // CHUNK
        end = tl.minimum((chunk + 1) * CHUNK, M)
        total = tl.zeros((ROWS, BLOCK_C), ACC)
        at = first
        while at < end:
            places = at + tl.arange(0, ROWS)
            same = tl.load(sorted_ptr + places, mask=places < end, other=-1).to(tl.int64) == token
            rows = tl.load(order_ptr + places, mask=same, other=0)
            total += load_tile(dy_ptr, rows, cols, stride_dym, same[:, None] & (cols < C)[None, :], ACC)
            # A run that ended within these places has no more of them.
            at = tl.where(tl.sum(same.to(tl.int32)) == ROWS, at + ROWS, end)
        total = tl.sum(total, axis=0)  # (BLOCK_C,)
        run_goes_on = tl.load(sorted_ptr + end, mask=end < M, other=-1).to(tl.int64) == token
        if run_starts & (run_goes_on == 0):
            tl.store(dw_ptr + token * C + cols, total.to(dw_ptr.dtype.element_ty), mask=cols < C)
        elif run_starts:
            tl.store(tail_ptr + chunk * C + cols, total, mask=cols < C)
        else:
            tl.store(head_ptr + chunk * C + cols, total, mask=cols < C)


@triton.jit(do_not_specialize=["chunks"])
def embedding_runs_kernel(
    sorted_ptr, dw_ptr, head_ptr, tail_ptr, chunks, V, C, padding_idx,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program owns the run that leaves its chunk, if it starts there: adds its tail and the heads that follow."""
    pid, blocks = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    chunk = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    token = tl.load(sorted_ptr + (chunk + 1) * CHUNK - 1).to(tl.int64)
    leaves = tl.load(sorted_ptr + (chunk + 1) * CHUNK).to(tl.int64) == token
    came = tl.load(sorted_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1).to(tl.int64) == token
    wanted = (token >= 0) & (token < V) & (token != padding_idx)
    if wanted & leaves & (came == 0):
        total = tl.zeros((ROWS, BLOCK_C), ACC)
        at = chunk + 1
        while at < chunks:
            rows = at + tl.arange(0, ROWS)
            same = tl.load(sorted_ptr + rows * CHUNK, mask=rows < chunks, other=-1).to(tl.int64) == token
            total += load_tile(head_ptr, rows, cols, C, same[:, None] & (cols < C)[None, :], ACC)
            at = tl.where(tl.sum(same.to(tl.int32)) == ROWS, at + ROWS, chunks)
        tail = tl.load(tail_ptr + chunk * C + cols, mask=cols < C, other=0.0)
        total = tail + tl.sum(total, axis=0)  # (BLOCK_C,)
        tl.store(dw_ptr + token * C + cols, total.to(dw_ptr.dtype.element_ty), mask=cols < C)


# Operators: what every body returns, then the bodies.
fwd = Op(
    "embedding_fwd(Tensor tokens, Tensor w) -> Tensor",
    fake=lambda tokens, w: w.new_empty(tokens.shape[0], w.shape[1]),
)
bwd = Op(
    "embedding_bwd(Tensor dy, Tensor tokens, SymInt V, int? padding_idx) -> Tensor",
    fake=lambda dy, tokens, V, padding_idx: dy.new_empty(V, dy.shape[1]),
)


@fwd.body("cpu", accepts=lambda tokens, *rest: tokens.device.type == "cpu")
def embedding_fwd_cpu(tokens: Tensor, w: Tensor) -> Tensor:
    try:
        # Unlike w[tokens], this takes no negative token for one counted from the end.
        return w.index_select(0, tokens)
    except IndexError:
        low, high, V = int(tokens.min()), int(tokens.max()), w.shape[0]
        raise IndexError(f"embedding: tokens must be at least 0 and below V={V}, got {low} to {high}") from None


@bwd.body("cpu", accepts=lambda dy, *rest: dy.device.type == "cpu")
def embedding_bwd_cpu(dy: Tensor, tokens: Tensor, V: int, padding_idx: int | None) -> Tensor:
    """PyTorch's, but in 16 bits, where it rounds at every step: off by 2 in a sum of 68 over 4096 tokens, this by 0.12.

    That sum took twice as long (14 and 7 ms, 4096 x 512 in bf16, one core of a machine that others used too).
    """
    stat = accumulator(dy.dtype)[0]
    if stat == dy.dtype:
        return torch.ops.aten.embedding_dense_backward(dy, tokens, V, -1 if padding_idx is None else padding_idx, False)
    seen, places = tokens.unique(return_inverse=True)
    sums = dy.new_zeros(len(seen), dy.shape[1], dtype=stat).index_add_(0, places, dy.to(stat))
    if padding_idx is not None:
        sums[seen == padding_idx] = 0
    return dy.new_zeros(V, dy.shape[1]).index_copy_(0, seen.long(), sums.to(dy.dtype))


@fwd.body("triton", accepts=lambda tokens, *rest: tokens.is_cuda)
def embedding_fwd_triton(tokens: Tensor, w: Tensor) -> Tensor:
    M, (V, C), w = tokens.shape[0], w.shape, unit_columns(w)
    y = w.new_empty(M, C)
    rows, block_c, warps = launch.element_tile(C)
    if y.numel():
        embedding_fwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(C, block_c),)](
            tokens.contiguous(), w, y, M, V, C, w.stride(0), ROWS=rows, BLOCK_C=block_c, num_warps=warps
        )
    return y


@bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)
def embedding_bwd_triton(dy: Tensor, tokens: Tensor, V: int, padding_idx: int | None) -> Tensor:
    (M, C), dy, (stat, ACC) = dy.shape, unit_columns(dy), accumulator(dy.dtype)
    dw = dy.new_zeros(V, C)
    if dy.numel() == 0 or V == 0:
        return dw
    in_order, order = torch.sort(tokens, stable=True)
    chunks, none = triton.cdiv(M, CHUNK), -1 if padding_idx is None else padding_idx
    head, tail = dw.new_empty(chunks, C, dtype=stat), dw.new_empty(chunks, C, dtype=stat)
    block_c = min(triton.next_power_of_2(C), PIECE_COLUMNS)
    embedding_pieces_kernel[(M * triton.cdiv(C, block_c),)](
        dy, in_order, order, dw, head, tail, M, V, C, dy.stride(0), none,
        CHUNK=CHUNK, ROWS=min(CHUNK, TILE // block_c), BLOCK_C=block_c, ACC=ACC, num_warps=WARPS,
    )  # fmt: skip
    if chunks > 1:
        block_c = min(block_c, RUN_COLUMNS)
        embedding_runs_kernel[((chunks - 1) * triton.cdiv(C, block_c),)](
            in_order, dw, head, tail, chunks, V, C, none,
            CHUNK=CHUNK, ROWS=TILE // RUN_COLUMNS, BLOCK_C=block_c, ACC=ACC, num_warps=WARPS,
        )  # fmt: skip
    return dw


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, w: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.V, ctx.padding_idx = w.shape[0], padding_idx
        return fwd(tokens, w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        return None, bwd(dy, *ctx.saved_tensors, ctx.V, ctx.padding_idx), None


def embedding(tokens: Tensor, w: Tensor, *, padding_idx: int | None = None) -> Tensor:
    """``w[tokens]`` (..., C) for ``tokens`` (...) of int64 or int32 and ``w`` (V, C).

    The gradient of w is dense, and zero in row ``padding_idx`` and in rows that no token asked for. Its sums are taken
    in fp32, in one order and with the same bits each time.

    Tokens must lie in [0, V). On a GPU nothing looks at them beforehand, which would cost a synchronization: others
    read nothing, give rows of NaN and get no gradient; on a CPU they raise ``IndexError``. Raises ``ValueError`` on
    shapes, devices and unless padding_idx lies in [-V, V), ``TypeError`` on dtypes.
    """
    V, C = check.shape("embedding", w=(w, "V C")).values()
    check.dtype("embedding", check.INTS, tokens=tokens)
    check.dtype("embedding", w=w)
    if tokens.device != w.device:
        raise ValueError(f"embedding: tokens must be on the device of w, {w.device}, got {tokens.device}")
    if padding_idx is not None and not -V <= padding_idx < V:
        raise ValueError(f"embedding: padding_idx must be at least -V and below V={V}, got {padding_idx}")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += V
    if fwd.eager(w):
        return F.embedding(tokens, w, padding_idx)
    return Embedding.apply(tokens.reshape(-1), w, padding_idx).view(*tokens.shape, C)
