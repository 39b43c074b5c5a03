"""One Muon step over a list of matrices, in place.

    m = b m + (1 - b) g          u = orthogonal((1 - b) g + b m), or of m without Nesterov's look ahead
    p = p (1 - lr wd) - lr s u          g scaled by 1 / scale first, scale = loss scale * max(1, norm / clip)

``orthogonal`` drives all singular values of u = U S V' towards 1 by Newton-Schulz: with X = u / |u|, five times

    A = X X'          X = a X + (b A + c A A) X          (a, b, c) = (3.4445, -4.7750, 2.0315)

which leaves them in about [0.7, 1.2]. The size of a step s for a matrix (R, C):

    original          sqrt(max(1, R / C))        Jordan 2024, kellerjordan.github.io/posts/muon
    match_rms_adamw   0.2 sqrt(max(R, C))        Moonshot 2025, arXiv:2502.16982: a step is as long as AdamW's, so that
                                                 both may share a learning rate and a decay

FLOPs of one iteration with r = min(R, C) and n = max(R, C): 4 r^2 n + 2 r^3; bound by matrix products, which are
PyTorch's, batched over matrices of one shape. Products in bf16 on a GPU (Newton-Schulz corrects its own rounding) and
in fp32 on a CPU, where bf16 is slow; momentum and parameters in fp32 (fp64 for fp64), 16-bit parameters with an fp32
master. The pointwise part is PyTorch's foreach: two of its passes are hidden behind the products, so there is no kernel
here and no dispatcher operator: a compiler sees what it is made of.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fmcore import check
from fmcore.kernels import multi_tensor as mt
from fmcore.kernels.blocks import accumulator

COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# Elements of matrices that are orthogonalised together; bounds the memory of their copies to some 128 MiB each in bf16.
TOGETHER = 2**26


@dataclass(frozen=True)
class MuonOptions:
    """The numbers of one group of matrices."""

    lr: float | Tensor = 1e-3  # a scalar tensor on a GPU is not waited for
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5  # iterations
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS
    eps: float = 1e-7  # least norm that a matrix is divided by
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    ns_dtype: torch.dtype | None = None  # of the products; None: bfloat16 on a GPU, else that of the momentum

    def __post_init__(self) -> None:
        if self.adjust_lr_fn not in ("original", "match_rms_adamw"):
            raise ValueError(f"muon_: adjust_lr_fn must be original or match_rms_adamw, got {self.adjust_lr_fn!r}")
        if not 0 <= self.momentum < 1 or self.ns_steps < 1:
            raise ValueError(
                f"muon_: momentum must be in [0, 1) and ns_steps at least 1, got {self.momentum} and {self.ns_steps}"
            )

    def size(self, R: int, C: int) -> float:
        """``s`` of the step of a matrix (R, C)."""
        if self.adjust_lr_fn == "original":
            return math.sqrt(max(1.0, R / C)) if C else 1.0
        return 0.2 * math.sqrt(max(R, C))


def orthogonalize(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Matrices ``x`` (.., R, C) with the same singular vectors and singular values near 1, computed in ``dtype``.

    By default ``dtype`` is bfloat16 on a GPU and that of ``x`` elsewhere, which also is the dtype of the result.
    Raises ``ValueError`` when ``x`` is no matrix, ``TypeError`` when it is not floating.
    """
    check.dtype("orthogonalize", x=x)
    if x.ndim < 2:
        raise ValueError(f"orthogonalize: x must be (..., R, C), got {tuple(x.shape)}")
    a, b, c = coefficients
    if dtype is None:
        dtype = torch.bfloat16 if x.is_cuda and x.dtype != torch.float64 else x.dtype
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=accumulator(x.dtype)[0])
    y = (x / norm.clamp(min=eps)).to(dtype).reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    # The products are over the shorter side.
    tall = y.shape[-2] > y.shape[-1]
    if tall:
        y = y.mT
    for _ in range(steps):
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape).to(x.dtype)


# Reference: one matrix, line for line from the formula.
def muon_ref(p: Tensor, g: Tensor, m: Tensor, options: MuonOptions) -> None:
    lr, b = float(options.lr), options.momentum
    m.mul_(b).add_(g, alpha=1 - b)
    x = g * (1 - b) + m * b if options.nesterov else m.clone()
    x = x / x.norm().clamp(min=options.eps)
    k1, k2, k3 = options.ns_coefficients
    for _ in range(options.ns_steps):
        A = x @ x.T
        x = k1 * x + (k2 * A + k3 * A @ A) @ x
    p.mul_(1 - lr * options.weight_decay).sub_(x, alpha=lr * options.size(*p.shape))


def _together(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices of one shape, dtype and device, in batches of at most ``TOGETHER`` elements."""
    by_shape: dict[tuple, list[int]] = {}
    for i, m in enumerate(matrices):
        by_shape.setdefault((m.shape, m.dtype, m.device), []).append(i)
    batches = []
    for at in by_shape.values():
        n = max(1, TOGETHER // max(1, matrices[at[0]].numel()))
        batches += [at[start : start + n] for start in range(0, len(at), n)]
    return batches


def muon_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    options: MuonOptions = MuonOptions(),
    *,
    masters: Sequence[Tensor] = (),
    norm: Tensor | None = None,
    clip: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    finite_check: bool = False,
) -> None:
    """Step matrices ``params`` (R, C) and their fp32 (fp64 for fp64) ``momentum_buffers`` in place.

    The other arguments are those of ``adamw_``; ``grads`` stay as they are and no value is waited for.
    Raises ``ValueError`` when lists do not fit or a parameter is no matrix, ``TypeError`` when a dtype does not.
    """
    if not params:
        return
    mt.check_lists("muon_", params, dict(grads=grads, momentum_buffers=momentum_buffers), None, masters)
    for i, (p, m) in enumerate(zip(params, momentum_buffers, strict=True)):
        if p.ndim != 2:
            raise ValueError(f"muon_: params[{i}] must be a matrix (R, C), got {tuple(p.shape)}")
        check.dtype("muon_", (accumulator(p.dtype)[0],), **{f"momentum_buffers[{i}]": m})
    mt.check_clip("muon_", clip)
    check.dtype("muon_", norm=norm, grad_scale=grad_scale, found_inf=found_inf)
    if norm is None and (clip is not None or finite_check):
        norm = mt.grad_norm(grads)
    with torch.no_grad():
        scale, live = mt.scale_of(norm, clip, grad_scale, found_inf, finite_check)
        lr: float | Tensor = options.lr
        if isinstance(lr, Tensor):
            # Read where one of both is on a CPU; else it goes to the matrices, whichever GPU it was on.
            device = params[0].device
            host = "cpu" in (lr.device.type, device.type)
            lr = lr.item() if host else lr.reshape(()).to(device, non_blocking=True)
        for at in _together(params):
            mine, g, momenta = ([ts[i] for i in at] for ts in (masters or params, grads, momentum_buffers))
            _step(mine, g, momenta, options, lr, scale, live)
        if masters:
            torch._foreach_copy_(list(params), list(masters))


def _step(
    params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], options: MuonOptions, lr: float | Tensor,
    scale: Tensor | None, live: Tensor | None,
) -> None:  # fmt: skip
    """Matrices of one shape and dtype. Where ``live`` is given the old values come back if it is false."""
    wide = momenta[0].dtype
    grads = [g.to(wide) for g in grads]
    if scale is not None:
        grads = list(torch._foreach_div(grads, scale.to(wide)))
    before = [] if live is None else [t.clone() for t in (*params, *momenta)]
    torch._foreach_lerp_(momenta, grads, 1 - options.momentum)
    ahead = torch._foreach_lerp(grads, momenta, options.momentum) if options.nesterov else momenta
    updates = orthogonalize(
        torch.stack(ahead), options.ns_steps, options.ns_coefficients, options.eps, options.ns_dtype
    )
    torch._foreach_mul_(params, 1 - lr * options.weight_decay)
    size = options.size(*params[0].shape)
    steps = list(updates.to(params[0].dtype).unbind())
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(steps, (lr * size).to(steps[0].dtype)))
    else:
        torch._foreach_add_(params, steps, alpha=-lr * size)
    if live is not None:
        for t, old in zip((*params, *momenta), before, strict=True):
            torch.where(live, t, old, out=t)
