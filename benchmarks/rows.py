"""What is timed of each operator: its inputs, its sizes, and what a PyTorch user writes instead.

A row bears the name of its operator in fmcore/ops.py. Sizes run from 512 rows, where launching is what counts, past
8192 x 4096, where memory is, and hold shapes of GPT-2 and Llama-3.1-8B.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmcore import ops, optim
from fmcore.kernels.rope import rope_tables

Shape = tuple[int, ...]
# (shape, dtype, device) -> arguments; those that require a gradient are differentiated.
Inputs = Callable[[Shape, torch.dtype, torch.device], list[Tensor]]


@dataclass(frozen=True)
class Row:
    """One operator; ``row(*inputs)`` and every baseline must give the same before they are timed."""

    op: str
    inputs: Inputs
    baselines: dict[str, Callable[..., Any]]  # the first is what the others are checked against
    sizes: tuple[Shape, ...]
    tiny: Shape  # for a test of a second
    ours: Callable[..., Any] | None = None  # by default the operator as it is
    # forward: without a gradient; backward: alone; step: both in one, or the step of an optimizer.
    passes: tuple[str, ...] = ("forward", "backward")
    # FLOPs of a forward and of a backward pass for a shape; without them memory bounds the row.
    flops: Callable[..., tuple[float, float]] | None = None
    # Positions of inputs that backward reads; by default those that it differentiates.
    reads: tuple[int, ...] | None = None
    # Bytes that a forward pass or a step moves for (inputs, outputs), where that is not all of them once.
    moved: Callable[[Sequence[Tensor], Sequence[Tensor]], int] | None = None
    # Whether row and baselines are called once, with inputs of their own, and return the step that is timed.
    stateful: bool = False
    # Whether results are random, so that only their norm can be compared.
    random: bool = False
    # Largest deviation from the baseline; by default told by the dtype.
    tolerance: float | None = None

    def __call__(self, *args: Tensor) -> Any:
        return (self.ours or getattr(ops, self.op))(*args)

    @property
    def bound(self) -> str:
        return "memory" if self.flops is None else "matmul"

    def bytes(self, args: Sequence[Tensor], outs: Sequence[Tensor]) -> dict[str, int]:
        """What each pass must move: inputs read once, outputs written once (derived from the tensors)."""
        forward = self.moved(args, outs) if self.moved else nbytes(args) + nbytes(outs)
        if self.stateful:
            return {"step": forward}
        reads = differentiated(args) if self.reads is None else [args[i] for i in self.reads]
        backward = nbytes(outs) + nbytes(reads) + nbytes(differentiated(args))
        return {"forward": forward, "backward": backward, "step": forward + backward}

    def work(self, shape: Shape) -> dict[str, float]:
        """FLOPs of each pass; what an implementation computes a second time does not count."""
        forward, backward = self.flops(*shape) if self.flops else (0.0, 0.0)
        return {"forward": forward, "backward": backward, "step": forward + backward}


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def differentiated(args: Sequence[Tensor]) -> list[Tensor]:
    return [a for a in args if a.requires_grad]


def normal(*sizes: Callable[..., Shape], then: Callable[..., list[Tensor]] = lambda *shape: []) -> Inputs:
    """Normal tensors of ``size(*shape)`` each, to be differentiated, then constants."""

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        with torch.device(device):
            made = [torch.randn(size(*shape), dtype=dtype) for size in sizes]
            return [t.requires_grad_() for t in made] + then(*shape)

    return inputs


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def eager(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    return eager


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Rotary embedding as most models write it: the halves of a head swapped and negated."""
    cos, sin = (torch.cat((t, t), -1)[:, None].to(q.dtype) for t in (cos, sin))  # (T, 1, D)
    halves = ((x, torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)) for x in (q, k))
    return tuple(x * cos + turned * sin for x, turned in halves)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def lion(params: list[Tensor], lr: float, weight_decay: float) -> Any:
    """Lion in foreach operations, one pass over memory each: PyTorch has none of its own."""
    moments = [torch.zeros_like(p) for p in params]

    class Lion:
        @torch.no_grad()
        def step(self) -> None:
            grads = [p.grad for p in params]
            signs = torch._foreach_lerp(moments, grads, 0.1)
            torch._foreach_sign_(signs)
            torch._foreach_mul_(params, 1 - lr * weight_decay)
            torch._foreach_add_(params, signs, alpha=-lr)
            torch._foreach_lerp_(moments, grads, 0.01)

    return Lion()


def parameters(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """``count`` parameters (M, N) with a gradient; in fp32, in which steps add up whatever a model computes in."""
    count, M, N = shape
    made = [torch.randn(M, N, device=device, requires_grad=True) for _ in range(count)]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


def stepping(name: str, **options: Any) -> Callable[..., Callable[[], Any]]:
    """The optimizer of that name, which clips on the way."""

    def make(*params: Tensor) -> Callable[[], Any]:
        optimizer = getattr(optim, name)(list(params), lr=1e-3, weight_decay=0.1, **options)
        return lambda: optimizer.step(clip=1.0)

    return make


def clipped(make: Callable[..., Any], **options: Any) -> Callable[..., Callable[[], Any]]:
    """Any other optimizer, after PyTorch's clipping. Clipping gradients in place once more changes nothing in them."""

    def start(*params: Tensor) -> Callable[[], Any]:
        optimizer = make(list(params), lr=1e-3, weight_decay=0.1, **options)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step

    return start


def newton_schulz(count: int, M: int, N: int) -> tuple[float, float]:
    """FLOPs of five steps of X <- aX + (bA + cA^2) X with A = X X^T, for matrices turned so that A is the small one."""
    n, m = min(M, N), max(M, N)
    return 5.0 * count * (4 * n * n * m + 2 * n**3), 0.0


# (M, N): 768 is the width of GPT-2, 4096 that of Llama-3.1-8B; their ffn sizes.
WIDTHS: tuple[Shape, ...] = ((512, 768), (512, 4096), (8192, 768), (8192, 4096), (8192, 8192), (32768, 4096))
FFNS: tuple[Shape, ...] = ((512, 3072), (512, 14336), (8192, 3072), (8192, 4096), (8192, 14336), (32768, 14336))
# (B, T, H, G, D)
HEADS: tuple[Shape, ...] = ((8, 1024, 12, 12, 64), (1, 512, 32, 8, 128), (2, 4096, 32, 8, 128), (1, 16384, 32, 8, 128))
# (M, C, V); the last one on a CPU.
LOSSES: tuple[Shape, ...] = ((8192, 768, 50257), (1024, 4096, 128256), (4096, 4096, 128256), (2048, 512, 128256))
# (count, M, N): matrices of some layers.
LAYERS: tuple[Shape, ...] = ((48, 768, 3072), (4, 4096, 4096), (12, 4096, 14336))


def _rowwise(op: str, eager: Callable[..., Any], sizes: tuple[Shape, ...], inputs: Inputs, **options: Any) -> Row:
    return Row(op, inputs, {"eager": eager}, sizes, (37, 96), **options)


def _head(op: str, eager: Callable[..., Any]) -> Row:
    """A loss on hidden states. Its backward may have been done forward, so both are timed together."""
    return Row(
        op,
        # Weights as of a trained model: logits near 1.
        lambda shape, dtype, device: [
            torch.randn(shape[0], shape[1], dtype=dtype, device=device).requires_grad_(),
            (torch.randn(shape[2], shape[1], dtype=dtype, device=device) * shape[1] ** -0.5).requires_grad_(),
            torch.randint(shape[2], shape[:1], device=device),
        ],
        {"eager": eager},
        LOSSES,
        (37, 16, 101),
        passes=("forward", "step"),
        flops=lambda M, C, V: (2.0 * M * C * V, 4.0 * M * C * V),
    )


def _optimizer(
    op: str,
    name: str,
    baselines: dict[str, Callable[..., Any]],
    elements: int = 0,
    flops: Callable[..., tuple[float, float]] | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> Row:
    """A step of ``optim.<name>``, which moves so many elements for each parameter, or is bound by its products."""
    return Row(
        op,
        parameters,
        baselines,
        LAYERS,
        (3, 8, 24),
        ours=stepping(name, **options),
        passes=("step",),
        flops=flops,
        moved=lambda params, outs: elements * nbytes(params),
        stateful=True,
        tolerance=tolerance,
    )


BETAS = (0.9, 0.95)
_matrix, _vector = (lambda M, N: (M, N)), (lambda M, N: (N,))
_one, _packed = normal(_matrix), normal(lambda M, N: (M, 2 * N))
_q, _k = (lambda B, T, H, G, D: (B, T, H, D)), (lambda B, T, H, G, D: (B, T, G, D))

_ROWS = (
    _rowwise("rms_norm", lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), WIDTHS, normal(_matrix, _vector)),
    _rowwise("layer_norm", lambda x, w, b: F.layer_norm(x, w.shape, w, b), WIDTHS, normal(_matrix, _vector, _vector)),
    _rowwise("dropout", lambda x: F.dropout(x, 0.1), WIDTHS, _one, reads=(), random=True, tolerance=0.1),
    _rowwise("swiglu", gated(F.silu), FFNS, _packed),
    _rowwise("geglu", gated(lambda x: F.gelu(x, approximate="tanh")), FFNS, _packed),
    _rowwise("reglu", gated(F.relu), FFNS, _packed),
    _rowwise("gelu", lambda x: F.gelu(x, approximate="tanh"), FFNS, _one),
    _rowwise("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), FFNS, _one),
    _rowwise("relu_squared", lambda x: F.relu(x).square(), FFNS, _one),
    _rowwise(
        "cross_entropy",
        lambda z, targets: F.cross_entropy(z.float(), targets),
        ((512, 50257), (8192, 50257), (4096, 128256), (8192, 128256)),
        normal(_matrix, then=lambda M, V: [torch.randint(V, (M,))]),
    ),
    Row(
        "embedding",
        # (M, V, C); only the rows of w that tokens ask for are read, and its whole gradient is written.
        lambda shape, dtype, device: [
            torch.randint(shape[1], shape[:1], device=device),
            torch.randn(shape[1:], dtype=dtype, device=device, requires_grad=True),
        ],
        {"eager": F.embedding},
        ((512, 50257, 768), (8192, 50257, 768), (8192, 128256, 4096)),
        (37, 50, 16),
        reads=(0,),
        moved=lambda args, outs: nbytes(args[:1]) + 2 * nbytes(outs),
    ),
    Row(
        "rope",
        lambda shape, dtype, device: [
            *normal(_q, _k)(shape, dtype, device),
            *rope_tables(shape[1], shape[4], device=device),
        ],
        {"eager": rotated},
        HEADS,
        (2, 9, 4, 2, 16),
        reads=(2, 3),
    ),
    Row(
        "attention",
        normal(_q, _k, _k),
        {"sdpa": sdpa},
        HEADS,
        (2, 9, 4, 2, 16),
        # The keys that a query sees, on average (T + 1) / 2; five products backward for two forward.
        flops=lambda B, T, H, G, D: (2.0 * B * H * D * T * (T + 1), 5.0 * B * H * D * T * (T + 1)),
    ),
    Row(
        "decode_attention",
        # (B, S, H, G, D); full caches.
        lambda shape, dtype, device: [
            torch.randn(shape[0], shape[2], shape[4], dtype=dtype, device=device),
            *torch.randn(2, shape[0], shape[1], *shape[3:], dtype=dtype, device=device),
            torch.full(shape[:1], shape[1], device=device),
        ],
        {"sdpa": lambda q, k, v, lens: sdpa(q[:, None], k, v, causal=False)[:, 0]},
        ((32, 1024, 12, 12, 64), (1, 8192, 32, 8, 128), (32, 8192, 32, 8, 128)),
        (2, 9, 4, 2, 16),
        passes=("forward",),
    ),
    _head("linear_cross_entropy", lambda h, w, targets: F.cross_entropy(F.linear(h, w).float(), targets)),
    _head(
        "linear_logprob",
        lambda h, w, targets: F.linear(h, w).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0],
    ),
    # Parameter and moments are read and written; the gradient is read twice, first for its norm.
    _optimizer(
        "adamw_", "AdamW", {"fused": clipped(torch.optim.AdamW, fused=True, betas=BETAS)}, elements=8, betas=BETAS
    ),
    _optimizer("lion_", "Lion", {"foreach": clipped(lion)}, elements=6),
    _optimizer("muon_", "Muon", {"torch": clipped(torch.optim.Muon)}, flops=newton_schulz, tolerance=0.05),
)
ROWS: dict[str, Row] = {row.op: row for row in _ROWS}
