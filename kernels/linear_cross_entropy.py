"""Cross-entropy of a linear head: the loss of a language model without its logits.

    z = h w^T + b      loss_i = logsumexp(z_i) - z_i[target_i]      h (M, C)   w (V, C)   b (V,)   z (M, V), never whole

    dz_i = softmax(z_i) - onehot(target_i)        dh = dz w        dw = dz^T h        db = sum_i dz_i

Rows go through in chunks: one product gives the logits of a chunk, they turn into dz in place, two products give dh and
dw, and the chunk is dropped, so at most CHUNK logits exist at a time, in the forward pass alone (a scalar loss only
scales dz afterwards). With ``reduction="none"`` the upstream gradient differs from row to row, so only logsumexp is
kept and the backward pass forms the logits again. Ignored rows give loss 0 and gradient 0. A frozen head costs 2
products and no dw; without gradients there is 1. Softmax and sums in fp32, in fp64 for fp64 input.
Source: Wijmans et al. 2024, arXiv:2411.09009 (no logits in memory); Hsu et al. 2024, arXiv:2410.10989 (chunks).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fmcore import check

# Logits of one chunk, in elements: 128 MB in fp32, 261 rows of a Llama vocabulary. Larger chunks only cost memory.
CHUNK = 2**25


def linear_cross_entropy_ref(
    h: Tensor, w: Tensor, targets: Tensor, bias: Tensor | None = None, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The formula as it stands, logits and all: what the chunks must equal."""
    z = F.linear(h, w, bias).to(torch.promote_types(h.dtype, torch.float32))
    return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction=reduction)


def _logits(h: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """z of some rows (m, V), in the dtype of the sums."""
    return F.linear(h, w, bias).to(torch.promote_types(h.dtype, torch.float32))


def _softmax_(z: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp of each row, and the rows turned into their softmax in place: one exp serves both.

    The largest probability is at least 1/V, so its logarithm is exact where that of another could be of zero.
    """
    top = z.amax(1)
    torch.softmax(z, 1, out=z)
    return top - z.amax(1).log(), z


def _minus_onehot_(p: Tensor, targets: Tensor, ignored: Tensor) -> Tensor:
    """dz of some rows from their probabilities, in place; 0 in ignored rows."""
    p.scatter_add_(1, targets.masked_fill(ignored, 0)[:, None], p.new_full((len(p), 1), -1.0))
    return p.masked_fill_(ignored[:, None], 0.0)


class _Gradients:
    """dh, dw and db as the chunks add to them, dw and db in ``acc``; ``None`` where nobody needs one."""

    def __init__(self, h: Tensor, w: Tensor, acc: torch.dtype, needs: tuple[bool, bool, bool]):
        self.h, self.w, self.acc = h, w, acc
        self.dh = torch.empty_like(h) if needs[0] else None
        self.dw = torch.zeros_like(w, dtype=acc) if needs[1] else None
        self.db = torch.zeros_like(w[:, 0], dtype=acc) if needs[2] else None

    def add(self, part: slice, dz: Tensor) -> None:
        """What the rows ``part`` contribute, from their dz (m, V)."""
        if self.dh is not None:
            self.dh[part] = dz @ self.w
        if self.dw is not None:
            self.dw += dz.T @ self.h[part]
        if self.db is not None:
            self.db += dz.sum(0, dtype=self.acc)


class LinearCrossEntropy(torch.autograd.Function):
    """Row losses (M,) when ``rows``; else their sum, with the gradients of that sum already formed on the way."""

    @staticmethod
    def forward(ctx, h, w, bias, targets, ignore_index, rows, needs):
        step = max(1, CHUNK // w.shape[0])
        acc = torch.promote_types(h.dtype, torch.float32)
        loss, lse = (torch.empty(len(h), dtype=acc, device=h.device) for _ in range(2))
        gradients = _Gradients(h, w, acc, (False,) * 3 if rows else needs)
        for i in range(0, len(h), step):
            part = slice(i, i + step)
            z = _logits(h[part], w, bias)  # (m, V)
            ignored = targets[part] == ignore_index
            hit = z.gather(1, targets[part].masked_fill(ignored, 0)[:, None])[:, 0]
            lse[part], p = _softmax_(z)
            loss[part] = (lse[part] - hit).masked_fill(ignored, 0.0)
            if not rows and any(needs):
                gradients.add(part, _minus_onehot_(p, targets[part], ignored).to(h.dtype))
        ctx.options = ignore_index, rows, step, needs
        if rows:
            ctx.save_for_backward(h, w, bias, targets, lse)
            return loss
        ctx.save_for_backward(gradients.dh, gradients.dw, gradients.db)
        ctx.dtypes = w.dtype, None if bias is None else bias.dtype
        return loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        ignore_index, rows, step, needs = ctx.options
        if not rows:
            dh, dw, db = ctx.saved_tensors
            # Not in 16 bits, which would round g, say 1 / targets, alike for every row.
            dh = None if dh is None else (dh.to(g.dtype) * g).to(dh.dtype)
            dw = None if dw is None else (dw * g).to(ctx.dtypes[0])
            db = None if db is None else (db * g).to(ctx.dtypes[1])
            return dh, dw, db, None, None, None, None
        h, w, bias, targets, lse = ctx.saved_tensors
        gradients = _Gradients(h, w, lse.dtype, needs)
        for i in range(0, len(h), step):
            part = slice(i, i + step)
            p = _logits(h[part], w, bias).sub_(lse[part, None]).exp_()
            dz = _minus_onehot_(p, targets[part], targets[part] == ignore_index).mul_(g[part, None]).to(h.dtype)
            gradients.add(part, dz)
        dw = None if gradients.dw is None else gradients.dw.to(w.dtype)
        db = None if gradients.db is None else gradients.db.to(bias.dtype)
        return gradients.dh, dw, db, None, None, None, None


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``cross_entropy(h @ w.T + bias, targets)`` without the logits; h (M, C), w (V, C), targets (M,), bias (V,).

    ``reduction`` is "mean" over the rows that are not ignored (nan when all are, as in PyTorch), "sum", or "none" for
    the (M,) row losses. The loss is fp32 (fp64 for fp64 input). Raises ``ValueError`` for shapes, devices and an
    unknown reduction, ``TypeError`` for dtypes. A target outside [0, V) that is not ``ignore_index`` is an index error
    of PyTorch's gather.
    """
    check.shape("linear_cross_entropy", h=(h, "M C"), w=(w, "V C"), targets=(targets, "M"))
    check.same("linear_cross_entropy", h=h, w=w, bias=bias)
    check.dtype("linear_cross_entropy", h=h)
    check.dtype("linear_cross_entropy", check.INTS, targets=targets)
    if bias is not None:
        check.shape("linear_cross_entropy", w=(w, "V C"), bias=(bias, "V"))
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    train = torch.is_grad_enabled()
    needs = tuple(train and t is not None and t.requires_grad for t in (h, w, bias))
    loss = LinearCrossEntropy.apply(h, w, bias, targets.long(), ignore_index, reduction == "none", needs)
    return loss / (targets != ignore_index).sum() if reduction == "mean" else loss
