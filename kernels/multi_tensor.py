"""One launch over many tensors: tables of addresses, the norm of all gradients, and narrow optimizer states.

A table holds the addresses of each tensor's parameter, gradient and states; a map says which part of which tensor a
program takes. Both are made on the host from sizes and addresses alone, travel through pinned memory without a wait,
and are kept while addresses stay what they are. An optimizer reads memory twice:

1. ``grad_norm``: programs write the norms of their parts, which are added up in a fixed order.
2. ``coefficients``, one small program a tensor, turns norm, loss scale and step count into the numbers that scale,
   clip, correct and decay; then the kernel of the optimizer (adamw.py, lion.py) steps. Nothing of it is known on the
   host: a step that must not happen, for a gradient that is not finite, is found out and skipped on the device.

Narrow states:

    8 bits     in blocks of QBLOCK elements with an fp32 absmax each; x = absmax * c and c a power of the code:
               signed (first moments)    c = sign(q) (q / 127)^2       q int8
               unsigned (second ones)    c = ((q + 1) / 256)^4         q uint8: never 0, or a step would divide by eps
    bfloat16   rounded to nearest, or up or down at random so that the mean is right (``stochastic``): Philox words
               under the key (step, seed), by tensor and element, so that a resumed run draws the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.blocks import accumulator, philox_ref
from fmcore.op import Op

# Elements with one absmax, as in arXiv:2110.02861 (there 2048; bitsandbytes has had 256 since).
QBLOCK = 256

# Elements that a program holds at a time: 8 a thread, two 128-bit loads of each fp32 tensor and one of bf16. Twice as
# many take up to 250 registers a thread, which leaves two programs on a multiprocessor, and spill on gfx942.
BLOCK = 1024
WARPS = 4

# Blocks of one program, when there are enough to keep every multiprocessor in 16 programs (derived, not measured).
MOST_BLOCKS = 32
PROGRAMS_PER_SM = 16

# Columns of a row of the table of states, and of a row of coefficients.
STATES = 8
COEFS = 16

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


# Narrow states in PyTorch: what the kernels' helpers below must equal.
def absmax_of(x: Tensor) -> Tensor:
    """The largest magnitude of each block of ``QBLOCK`` elements of ``x``, in fp32."""
    flat = torch.nn.functional.pad(x.reshape(-1).float().abs(), (0, -x.numel() % QBLOCK))
    return flat.view(-1, QBLOCK).amax(1)


def _spread(absmax: Tensor, shape: Sequence[int]) -> Tensor:
    """``absmax`` once for each element of a tensor of ``shape``."""
    return absmax.repeat_interleave(QBLOCK)[: int(np.prod(shape))].view(shape)


def quantise_signed(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 and absmax of fp32 ``x``: |sqrt|x| - sqrt|y|| <= sqrt(absmax) / 254 for what comes back."""
    absmax = absmax_of(x)
    share = x.abs() / _spread(torch.where(absmax > 0, absmax, 1.0), x.shape)
    return ((share.sqrt() * 127 + 0.5).floor() * x.sign()).to(torch.int8), absmax


def dequantise_signed(codes: Tensor, absmax: Tensor) -> Tensor:
    q = codes.float()
    return q * q.abs() * _spread(absmax / 16129, codes.shape)


def quantise_unsigned(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 and absmax of fp32 ``x`` >= 0: |x^(1/4) - y^(1/4)| <= absmax^(1/4) / 512, twice that below it."""
    absmax = absmax_of(x)
    share = x / _spread(torch.where(absmax > 0, absmax, 1.0), x.shape)
    return (share.sqrt().sqrt() * 256 - 0.5).floor().clamp(0, 255).to(torch.uint8), absmax


def dequantise_unsigned(codes: Tensor, absmax: Tensor) -> Tensor:
    root = (codes.float() + 1) / 256
    square = root * root
    return square * square * _spread(absmax, codes.shape)


def stochastic_words(step: int, seed: int, ordinal: int, like: Tensor) -> Tensor:
    """The random word in [0, 2^32) of each element of ``like``, tensor number ``ordinal`` of a step."""
    key = torch.tensor((step << 32) | seed, device=like.device)
    groups = torch.arange(-(-like.numel() // 4), device=like.device) + (ordinal << 40)
    return philox_ref(key, groups).view(-1)[: like.numel()].view(like.shape)


def stochastic_bf16(x: Tensor, words: Tensor, shift: int) -> Tensor:
    """fp32 ``x`` to bf16, away from zero with the probability that 16 bits of ``words``, from bit ``shift``, give."""
    noise = ((words >> shift) & 0xFFFF).to(torch.int32)
    rounded = ((torch.where(x.isnan(), 0.0, x).view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


# Which 16 bits of an element's word round its parameter, first and second moment. Each is uniform: each mean is right.
SHIFT_P, SHIFT_M, SHIFT_V = 0, 16, 8


SIZES = dict(
    STATES=STATES, COEFS=COEFS, ROWS=BLOCK // QBLOCK, QBLOCK=QBLOCK, SHIFT_P=SHIFT_P, SHIFT_M=SHIFT_M, SHIFT_V=SHIFT_V
)


def keep(kept: Tensor, value: Tensor, words: Tensor | None, shift: int) -> None:
    """``value`` into ``kept``, rounded to its dtype: with ``words`` and to bf16 at random."""
    if kept is not value:
        kept.copy_(
            stochastic_bf16(value, words, shift) if words is not None and kept.dtype == torch.bfloat16 else value
        )


# Helpers of kernels.
@triton.jit
def address(entry_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that stands in a table at ``entry_ptr``."""
    ptr = tl.load(entry_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def fetch(ptr, i, size, TAIL: tl.constexpr):
    """Elements ``i``; only a tensor's last block needs a mask, so that all others are loaded in 128 bits."""
    return tl.load(ptr + i, mask=i < size, other=0) if TAIL else tl.load(ptr + i)


@triton.jit
def put(ptr, i, x, size, TAIL: tl.constexpr):
    if TAIL:
        tl.store(ptr + i, x, mask=i < size)
    else:
        tl.store(ptr + i, x)


@triton.jit
def lanes(QBLOCK: tl.constexpr, ROWS: tl.constexpr):
    """0 .. ROWS * QBLOCK - 1 as (ROWS, QBLOCK)."""
    return tl.arange(0, ROWS)[:, None] * QBLOCK + tl.arange(0, QBLOCK)[None, :]


@triton.jit
def words_of(key, ordinal, start, ROWS: tl.constexpr, QBLOCK: tl.constexpr):
    """Random words (ROWS, QBLOCK) of the elements from ``start`` of tensor number ``ordinal``."""
    quarter = lanes(QBLOCK // 4, ROWS)
    a, b, c, d = tl.randint4x(key, (ordinal << 40) + start // 4 + quarter, n_rounds=7)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, QBLOCK)).to(tl.uint32, bitcast=True)


@triton.jit
def narrowed(x, words, SHIFT: tl.constexpr, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    """``x`` as DTYPE, to nearest or at random. NaN is kept apart: adding to its bits would make a zero of it."""
    if STOCHASTIC and tl.bfloat16 == DTYPE:
        is_number = x == x
        bits = tl.where(is_number, x, 0.0).to(tl.uint32, bitcast=True) + ((words >> SHIFT) & 0xFFFF)
        x = tl.where(is_number, (bits & 0xFFFF0000).to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)


@triton.jit
def from_signed(codes, absmax):
    q = codes.to(tl.float32)
    return q * tl.abs(q) * (absmax / 16129)[:, None]


@triton.jit
def to_signed(x):
    absmax = tl.max(tl.abs(x), axis=1)
    share = tl.abs(x) / tl.where(absmax > 0, absmax, 1.0)[:, None]
    q = tl.floor(tl.sqrt(share) * 127 + 0.5)
    return tl.where(x < 0, -q, q).to(tl.int8), absmax


@triton.jit
def from_unsigned(codes, absmax):
    root = (codes.to(tl.float32) + 1) / 256
    square = root * root
    return square * square * absmax[:, None]


@triton.jit
def to_unsigned(x):
    absmax = tl.max(x, axis=1)
    share = x / tl.where(absmax > 0, absmax, 1.0)[:, None]
    q = tl.floor(tl.sqrt(tl.sqrt(share)) * 256 - 0.5)
    return tl.minimum(tl.maximum(q, 0.0), 255.0).to(tl.uint8), absmax


# Kernels.
@triton.jit(do_not_specialize=["chunk"])
def grad_norm_kernel(
    grads_ptr, map_ptr, out_ptr, chunk,
    G: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, QBLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The norm of each program's part of one tensor."""
    BLOCK: tl.constexpr = ROWS * QBLOCK
    pid = tl.program_id(0).to(tl.int64)
    t = tl.load(map_ptr + 3 * pid)
    first = tl.load(map_ptr + 3 * pid + 1)
    size = tl.load(map_ptr + 3 * pid + 2)
    g_ptr = address(grads_ptr + t, G, ALIGNED)
    end = tl.minimum(first + chunk, tl.cdiv(size, BLOCK))
    full = tl.minimum(end, size // BLOCK)
    squares = tl.zeros((ROWS, QBLOCK), ACC)
    for TAIL in tl.static_range(2):
        for b in range(full if TAIL else first, end if TAIL else full):
            i = b * BLOCK + lanes(QBLOCK, ROWS)
            g = fetch(g_ptr, i, size, TAIL).to(ACC)
            squares += g * g
    tl.store(out_ptr + pid, tl.sqrt(tl.sum(tl.sum(squares, axis=1), axis=0)).to(out_ptr.dtype.element_ty))


@triton.jit
def coefficients_kernel(
    steps_ptr, groups_ptr, hyper_ptr, norm_ptr, clip_ptr, grad_scale_ptr, found_inf_ptr, out_ptr,
    FINITE: tl.constexpr, COEFS: tl.constexpr, HYPER: tl.constexpr,
):  # fmt: skip
    """Program ``t`` counts a step of tensor ``t`` and leaves the numbers of that step in row ``t``, all from fp64."""
    t = tl.program_id(0).to(tl.int64)
    hyper = hyper_ptr + tl.load(groups_ptr + t) * HYPER
    lr = tl.load(hyper)
    beta1 = tl.load(hyper + 1)
    beta2 = tl.load(hyper + 2)
    decay = 1 - lr * tl.load(hyper + 4)
    live = tl.full((), 1, tl.int32)
    scale = tl.full((), 1, tl.float64)
    if grad_scale_ptr is not None:
        scale = tl.load(grad_scale_ptr).to(tl.float64)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr).to(tl.float64)
        if FINITE:
            live = tl.where(norm * 0 == 0, live, 0)
        if clip_ptr is not None:
            # A norm that is NaN must spoil the step, not pass for a small one.
            excess = norm / scale / tl.load(clip_ptr)
            scale *= tl.where(excess <= 1, 1.0, excess)
    if found_inf_ptr is not None:
        live = tl.where(tl.load(found_inf_ptr) == 0, live, 0)
    step_ptr = tl.load(steps_ptr + t).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr) + live
    tl.store(step_ptr, step)
    count = step.to(tl.float64)
    c1 = 1 - tl.exp2(count * tl.load(hyper + 5))
    c2 = 1 - tl.exp2(count * tl.load(hyper + 6))
    out = out_ptr + t * COEFS
    dtype = out_ptr.dtype.element_ty
    tl.store(out, live.to(dtype))
    tl.store(out + 1, (1 / scale).to(dtype))
    tl.store(out + 2, decay.to(dtype))
    tl.store(out + 3, lr.to(dtype))
    tl.store(out + 4, (lr / c1).to(dtype))
    tl.store(out + 5, tl.sqrt(1 / c2).to(dtype))
    tl.store(out + 6, tl.load(hyper + 3).to(dtype))
    tl.store(out + 7, beta1.to(dtype))
    tl.store(out + 8, (1 - beta1).to(dtype))
    tl.store(out + 9, beta2.to(dtype))
    tl.store(out + 10, (1 - beta2).to(dtype))
    tl.store(out + 11, step.to(dtype))


# Tables. Their content is a function of the key they are kept under, so that a kept one is never stale.
# What a graph copies from each time it is replayed; it must outlive the graph, of which nobody here knows.
_captured: list[Tensor] = []


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _sent(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` on ``device``, which nobody waits for: it is copied out of pinned memory in the stream's own time."""
    t = torch.from_numpy(array)
    if device.type != "cuda":
        return t.to(device)
    t = t.pin_memory()
    if _capturing(device):
        _captured.append(t)
    return t.to(device, non_blocking=True)


def _kept(make: Any, values: tuple, device: torch.device) -> Any:
    """What ``make`` made of ``values`` before, or makes now. While a graph is captured nothing has content yet."""
    if _capturing(device):
        return make.__wrapped__(values, device)
    # The copy is ordered before the kernels of its own stream only.
    return make(values, device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)


@lru_cache(maxsize=128)
def _integers(values: tuple[int, ...], device: torch.device, stream: int = 0) -> Tensor:
    return _sent(np.array(values, np.int64), device)


@lru_cache(maxsize=16)
def _floats(values: tuple[float, ...], device: torch.device, stream: int = 0) -> Tensor:
    return _sent(np.array(values, np.float64), device)


@lru_cache(maxsize=64)
def _map(sizes: tuple[int, ...], device: torch.device, stream: int = 0) -> tuple[Tensor, int]:
    """Rows (tensor, first block, size of the tensor), one for each program; and the blocks of a program."""
    chunk = max(1, min(MOST_BLOCKS, sum(sizes) // (BLOCK * PROGRAMS_PER_SM * launch.sm_count(device))))
    size = np.array(sizes, np.int64)
    counts = -(-size // (BLOCK * chunk))
    tensor = np.repeat(np.arange(len(sizes)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    start = (np.arange(len(tensor)) - first) * chunk
    return _sent(np.stack([tensor, start, size[tensor]], 1), device), chunk


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    return _kept(_integers, tuple(values), device)


def floats(values: Sequence[float], device: torch.device) -> Tensor:
    """``values`` in fp64 on ``device``; not to be written to."""
    return _kept(_floats, tuple(values), device)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


@dataclass(frozen=True)
class Part:
    """What one launch needs to know of the tensors it goes over, which agree in their dtypes."""

    indices: list[int]
    map: Tensor  # (programs, 3)
    chunk: int
    aligned: bool

    @property
    def grid(self) -> tuple[int]:
        return (len(self.map),)


def parts(*columns: Sequence[Tensor]) -> list[Part]:
    """Split tensors by the dtypes of their ``columns`` and by whether all start on 16 bytes; empty ones fall out."""
    found: dict[tuple, list[int]] = {}
    for i, row in enumerate(zip(*columns, strict=True)):
        if row[0].numel():
            aligned = not any(t.data_ptr() % 16 for t in row)
            found.setdefault((aligned, *(t.dtype for t in row)), []).append(i)
    device = columns[0][0].device if columns[0] else torch.device("cpu")
    split = []
    for (aligned, *_), at in found.items():
        programs, chunk = _kept(_map, tuple(columns[0][i].numel() for i in at), device)
        split.append(Part(at, programs, chunk, aligned))
    return split


def state_table(part: Part, columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """A row of STATES numbers for each tensor of ``part``: its place in the lists, then addresses; 0 for no tensor."""
    empty = [0] * len(part.indices)
    found = [addresses([column[i] for i in part.indices]) if column else empty for column in columns]
    found += [empty] * (STATES - 1 - len(found))
    return integers([n for row in zip(part.indices, *found, strict=True) for n in row], part.map.device)


def grad_table(part: Part, grads: Sequence[Tensor]) -> Tensor:
    return integers(addresses([grads[i] for i in part.indices]), part.map.device)


def _dense(t: Tensor) -> bool:
    """Whether the elements of ``t`` fill a stretch of memory, in whatever order."""
    if t.is_contiguous():
        return True
    dims = sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1)
    expected = 1
    for stride, n in dims:
        if stride != expected:
            return False
        expected *= n
    return True


@contextmanager
def in_one_layout(
    grads: Sequence[Tensor], columns: Sequence[Sequence[Tensor]], blocks: bool
) -> Iterator[tuple[list[Tensor], list[list[Tensor]]]]:
    """Tensors whose elements lie in one order, so that a kernel may run over memory: ``grads`` and each of ``columns``.

    A parameter and its states that are dense with equal strides are taken as they lie, and the gradient is copied
    into their order if it has another. Where they are not, and with ``blocks`` (of 8-bit states, in the order of the
    elements) where they are not contiguous, contiguous copies step and are copied back.
    """
    grads, laid = list(grads), [list(column) for column in columns]
    copied: list[tuple[Tensor, Tensor]] = []
    for i, p in enumerate(columns[0]):
        row = [column[i] for column in laid if column]
        if not (p.is_contiguous() if blocks else _dense(p)) or any(t.stride() != p.stride() for t in row):
            for column in laid:
                if column and not column[i].is_contiguous():
                    mine = column[i].contiguous()
                    copied.append((column[i], mine))
                    column[i] = mine
        if grads[i].stride() != laid[0][i].stride():
            grads[i] = torch.empty_like(laid[0][i], dtype=grads[i].dtype).copy_(grads[i])
    yield grads, laid
    for theirs, mine in copied:
        theirs.copy_(mine)


# The first pass.
grad_norm_op = Op(
    "grad_norm(Tensor[] grads) -> Tensor",
    fake=lambda grads: grads[0].new_empty((), dtype=_statistic(grads)),
)


def _statistic(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def grad_norm_ref(grads: Sequence[Tensor]) -> Tensor:
    norms = torch._foreach_norm(list(grads), 2, dtype=_statistic(grads))
    return torch.linalg.vector_norm(torch.stack(norms))


grad_norm_op.body("cpu", accepts=lambda grads: grads[0].device.type == "cpu")(grad_norm_ref)


@grad_norm_op.body("triton", accepts=lambda grads: grads[0].is_cuda)
def grad_norm_triton(grads: list[Tensor]) -> Tensor:
    device = grads[0].device
    # The order of the elements does not matter, only that they fill their memory.
    grads = [g if _dense(g) else g.contiguous() for g in grads]
    split = parts(grads)
    out = torch.empty(sum(len(part.map) for part in split), dtype=_statistic(grads), device=device)
    done = 0
    for part in split:
        G = grads[part.indices[0]].dtype
        grad_norm_kernel[part.grid](
            grad_table(part, grads), part.map, out[done:], part.chunk,
            G=TYPES[G], ALIGNED=part.aligned, ROWS=BLOCK // QBLOCK, QBLOCK=QBLOCK, ACC=accumulator(G)[1],
            num_warps=WARPS,
        )  # fmt: skip
        done += len(part.map)
    return torch.linalg.vector_norm(out)


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all ``grads`` together: a scalar in fp32, in fp64 if one of them is fp64.

    Raises ``ValueError`` without any tensor or with several devices, ``TypeError`` when a dtype is not floating.
    """
    if not grads:
        raise ValueError("grad_norm: grads must hold at least one tensor, got none")
    device = grads[0].device
    for i, g in enumerate(grads):
        if g.dtype not in check.FLOATS:
            check.dtype("grad_norm", check.FLOATS, **{f"grads[{i}]": g})
        if g.layout != torch.strided:
            raise ValueError(f"grad_norm: grads[{i}] must be dense, got {str(g.layout)[6:]}")
        if g.device != device:
            raise ValueError(f"grad_norm: grads[{i}] must be on {device} like the first, got {g.device}")
    return grad_norm_ref(grads) if grad_norm_op.eager(list(grads)) else grad_norm_op(list(grads))


# The second pass: what every optimizer shares.
HYPER = 7


def hyper(rows: Sequence[tuple[float | Tensor, float, float, float, float]]) -> tuple[list[float], list[Tensor | None]]:
    """What an operator takes for rows (lr, beta1, beta2, eps, weight_decay): numbers, and rates that are tensors."""
    lrs = [lr if isinstance(lr, Tensor) else None for lr, *_ in rows]
    # The others are read where they are tensors, which PyTorch allows too.
    numbers = [n for lr, *rest in rows for n in (0.0 if isinstance(lr, Tensor) else float(lr), *map(float, rest))]
    return numbers, lrs


def hyper_rows(numbers: Sequence[float], lrs: Sequence[Tensor | None]) -> list[tuple[float, ...]]:
    """The rows again, on the host: for bodies that may wait."""
    rows = [tuple(numbers[5 * i : 5 * i + 5]) for i in range(len(lrs))]
    return [row if lr is None else (float(lr), *row[1:]) for row, lr in zip(rows, lrs, strict=True)]


def hyper_table(numbers: Sequence[float], lrs: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """(groups, HYPER) in fp64 on ``device``: lr, beta1, beta2, eps, weight_decay, log2 of both betas.

    A rate that is a tensor on a GPU is copied there, not read.
    """
    far = {i: lr for i, lr in enumerate(lrs) if lr is not None and lr.device.type != "cpu"}
    rows = hyper_rows(numbers, [None if i in far else lr for i, lr in enumerate(lrs)])
    table = floats([n for row in rows for n in (*row, _log2(row[1]), _log2(row[2]))], device).view(-1, HYPER)
    if far:
        table = table.clone()
        for i, lr in far.items():
            table[i, :1].copy_(lr.reshape(1))
    return table


def _log2(x: float) -> float:
    return float(np.log2(x)) if x > 0 else -np.inf


# The end of every optimizer's schema, and the same as a value.
HOW = (
    "float[] hyper, Tensor?[] lrs, int[] groups, bool stochastic, int seed, Tensor? norm, float? clip, "
    "Tensor? grad_scale, Tensor? found_inf, bool finite_check"
)


@dataclass(frozen=True)
class How:
    """How a step is taken: the numbers of each group, which group a parameter is in, rounding, and the scale."""

    hyper: Sequence[float]  # five a group
    lrs: Sequence[Tensor | None]  # one a group: rates that are tensors
    groups: Sequence[int]  # one a parameter
    stochastic: bool
    seed: int
    norm: Tensor | None
    clip: float | None
    grad_scale: Tensor | None
    found_inf: Tensor | None
    finite_check: bool

    @property
    def rows(self) -> list[tuple[float, ...]]:
        """(lr, beta1, beta2, eps, weight_decay) of each group, on the host: for bodies that may wait."""
        return hyper_rows(self.hyper, self.lrs)

    @property
    def scale(self) -> tuple[Tensor | None, Tensor | None]:
        """What gradients are divided by and whether the step happens, as scalar tensors; ``None`` for 1, for yes."""
        return scale_of(self.norm, self.clip, self.grad_scale, self.found_inf, self.finite_check)

    def coefficients(self, params: Sequence[Tensor], steps: Sequence[Tensor]) -> Tensor:
        """(tensors, COEFS): what ``coefficients_kernel`` leaves for the kernel of an optimizer. ``steps`` count on."""
        device = params[0].device
        out = torch.empty(len(params), COEFS, dtype=_statistic(params), device=device)
        clip = None if self.clip is None else floats((self.clip,), device)
        coefficients_kernel[(len(params),)](
            integers(addresses(steps), device), integers(self.groups, device),
            hyper_table(self.hyper, self.lrs, device), self.norm, clip, self.grad_scale, self.found_inf, out,
            FINITE=self.finite_check, COEFS=COEFS, HYPER=HYPER, num_warps=1,
        )  # fmt: skip
        return out


def scale_of(
    norm: Tensor | None,
    clip: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    finite_check: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``How.scale``, for a step that is no operator."""
    scale, live = grad_scale, None
    if clip is not None and norm is not None:
        excess = ((norm if scale is None else norm / scale) / clip).clamp(min=1.0)
        scale = excess if scale is None else scale * excess
    if finite_check and norm is not None:
        live = norm.isfinite()
    if found_inf is not None:
        zero = found_inf == 0
        live = zero if live is None else live & zero
    return scale, live


def written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd that a body wrote to these: it would miss a pointer's stores, and those below the dispatcher."""
    torch.autograd.graph.increment_version([t for ts in lists for t in ts if not t.is_inference()])


# Checks of what an optimizer's public function is given.
def check_lists(
    op: str,
    params: Sequence[Tensor],
    like: dict[str, Sequence[Tensor]],
    steps: Sequence[Tensor] | None,
    masters: Sequence,
) -> None:
    """Lists run in parallel, every tensor has the shape and device of its parameter, and dtypes are what they must."""
    device = params[0].device if params else None
    for i, p in enumerate(params):
        if p.dtype not in check.FLOATS:
            raise TypeError(f"{op}: params[{i}] must be floating, got {str(p.dtype)[6:]}")
        if p.device != device:
            raise ValueError(f"{op}: params[{i}] must be on {device} like the first, got {p.device}")
        if masters and p.itemsize != 2:
            raise TypeError(f"{op}: params[{i}] must have 16 bits to have a master, got {str(p.dtype)[6:]}")
    shapes = [p.shape for p in params]
    lists: list[tuple[str, Sequence[Tensor], list[torch.Size], tuple[torch.dtype, ...]]] = [
        (name, tensors, shapes, check.FLOATS if name == "grads" else ()) for name, tensors in like.items()
    ]
    if steps is not None:
        lists.append(("steps", steps, [torch.Size(())] * len(params), (torch.float32,)))
    if masters:
        lists.append(("masters", masters, shapes, (torch.float32,)))
    for name, tensors, wanted, dtypes in lists:
        if len(tensors) != len(params):
            raise ValueError(f"{op}: {name} must be as long as params, {len(params)}, got {len(tensors)}")
        kinds = {t.dtype for t in tensors} if dtypes else set()
        if [t.shape for t in tensors] == wanted and {t.device for t in tensors} <= {device} and kinds <= {*dtypes}:
            continue
        for i, (shape, t) in enumerate(zip(wanted, tensors, strict=True)):
            if t.shape != shape:
                raise ValueError(f"{op}: {name}[{i}] must be {tuple(shape)} like its parameter, got {tuple(t.shape)}")
            if t.device != device:
                raise ValueError(f"{op}: {name}[{i}] must be on {device}, got {t.device}")
            if dtypes and t.dtype not in dtypes:
                wants = "floating" if len(dtypes) > 1 else str(dtypes[0])[6:]
                raise TypeError(f"{op}: {name}[{i}] must be {wants}, got {str(t.dtype)[6:]}")


def check_states(
    op: str, params: Sequence[Tensor], moments: dict[str, Sequence[Tensor]], absmax: Sequence[Sequence[Tensor]]
) -> None:
    """Moments are wide or bf16; with ``absmax`` they are codes with an fp32 number for each block."""
    for (name, tensors), scales, codes in zip(moments.items(), absmax, (torch.int8, torch.uint8), strict=False):
        if len(scales) not in (0, len(params)):
            raise ValueError(f"{op}: absmax of {name} must be as long as params, {len(params)}, got {len(scales)}")
        kinds = {(p.dtype, t.dtype) for p, t in zip(params, tensors, strict=True)}
        if not scales and all(kind in (accumulator(dtype)[0], torch.bfloat16) for dtype, kind in kinds):
            continue
        for i, (p, t) in enumerate(zip(params, tensors, strict=True)):
            allowed = (codes,) if scales else (accumulator(p.dtype)[0], torch.bfloat16)
            if t.dtype not in allowed:
                check.dtype(op, allowed, **{f"{name}[{i}]": t})
            if not scales:
                continue
            blocks = -(-p.numel() // QBLOCK)
            if scales[i].shape != (blocks,) or scales[i].dtype != torch.float32:
                got = f"{str(scales[i].dtype)[6:]} {tuple(scales[i].shape)}"
                raise ValueError(f"{op}: absmax of {name}[{i}] must be float32 {(blocks,)}, got {got}")


def check_groups(op: str, n: int, options: int, groups: Sequence[int] | None) -> list[int]:
    """Which options each of ``n`` parameters takes; the first without ``groups``."""
    groups = [0] * n if groups is None else list(groups)
    if len(groups) != n or any(not 0 <= group < options for group in groups):
        raise ValueError(f"{op}: groups must be {n} numbers below {options}, one a parameter, got {groups}")
    return groups


def check_clip(op: str, clip: float | None) -> None:
    if clip is not None and not clip > 0:
        raise ValueError(f"{op}: clip must be above 0 or None, got {clip}")


def check_seed(op: str, seed: int) -> None:
    if not 0 <= seed < 2**31:
        raise ValueError(f"{op}: seed must be in [0, 2^31), got {seed}")
