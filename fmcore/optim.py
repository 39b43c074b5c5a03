"""Optimizers over the operators."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fmcore.errors import InputError
from fmcore.kernels.adamw import adamw_

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(torch.optim.Optimizer):
    """AdamW whose step also measures and clips the gradient, without a pass over it and without a synchronisation.

    Args:
        params: parameters or parameter groups, as for every PyTorch optimizer.
        lr: learning rate per step.        betas: decay of the two moments.        eps: added to the root.
        weight_decay: decoupled; each step multiplies parameters by ``1 - lr * weight_decay``.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ValueError(
                f"AdamW: lr, eps and weight_decay must be >= 0 and betas in [0, 1), got lr={lr}, "
                f"eps={eps}, weight_decay={weight_decay}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None, *, clip: float | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the norm of all gradients before clipping, a scalar tensor that nobody has waited for.

        With ``clip`` the step is that of gradients scaled to a norm of at most ``clip``; ``.grad`` itself may be scaled
        on the way.
        """
        if closure is not None:
            raise ValueError("AdamW.step: closure must be None, this optimizer evaluates the gradient once")
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = _norm(grads) if grads else torch.zeros(())
        scale = None if clip is None else (norm / clip).clamp(min=1.0)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self._start(p)
                self.state[p]["step"] += 1
            for at in sorted({self.state[p]["step"] for p in params}):
                self._update([p for p in params if self.state[p]["step"] == at], at, group, scale)
        return norm

    def _start(self, p: Tensor) -> None:
        """Moments in fp32 at least; half-precision parameters also get an fp32 master copy that steps add up in."""
        wide = torch.promote_types(p.dtype, torch.float32)
        self.state[p].update(step=0, **{name: torch.zeros_like(p, dtype=wide) for name in MOMENTS})
        if wide != p.dtype:
            self.state[p]["master"] = p.detach().to(wide)

    def _update(self, params: list[Tensor], step: int, group: dict, scale: Tensor | None) -> None:
        """One AdamW step, number ``step``, of parameters that all have a gradient."""
        states = [self.state[p] for p in params]
        masters = [s.get("master", p) for p, s in zip(params, states, strict=True)]
        # For a parameter that is its own master, ``to`` gives the gradient itself.
        grads = [p.grad.to(m.dtype) for p, m in zip(params, masters, strict=True) if p.grad is not None]
        m, v = ([s[name] for s in states] for name in MOMENTS)
        adamw_(
            masters,
            grads,
            m,
            v,
            step,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_scale=scale,
        )
        narrow = [(p, m) for p, m in zip(params, masters, strict=True) if p is not m]
        if narrow:
            torch._foreach_copy_([p for p, _ in narrow], [m for _, m in narrow])

    def tensors(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state as tensors named ``parameter:key``, for a safetensors file.

        ``named`` holds the parameters by name.
        """
        found = {name: self.state[p] for name, p in named.items() if self.state.get(p)}
        return {
            f"{name}:{key}": torch.tensor(t) if key == "step" else t
            for name, state in found.items()
            for key, t in state.items()
        }

    def load_tensors(self, named: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        """Take over a state that ``tensors`` returned; other names in it are ignored.

        Raises ``InputError`` if a piece of a parameter's state is missing or has another shape.
        """
        for name, p in named.items():
            if not p.requires_grad or f"{name}:step" not in tensors:
                continue
            self._start(p)
            for key, mine in self.state[p].items():
                theirs = tensors.get(f"{name}:{key}")
                if theirs is None or (key != "step" and theirs.shape != mine.shape):
                    got = "nothing" if theirs is None else tuple(theirs.shape)
                    raise InputError(f"optimizer: {name}:{key} must be {tuple(p.shape)} like its parameter, got {got}")
                self.state[p][key] = int(theirs) if key == "step" else theirs.to(mine)


def _norm(grads: list[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, in fp32 at least: in bf16 it would be right to two digits."""
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    norms = torch._foreach_norm(grads, 2, dtype=wide)
    return torch.linalg.vector_norm(torch.stack([n.to(grads[0].device) for n in norms]))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay, vectors (norm weights, biases) do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
