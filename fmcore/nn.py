"""Modules over the operators: parameters and no mathematics.

``RMSNorm``, ``LayerNorm`` and ``GELU`` can stand in for their ``torch.nn`` namesakes.
"""

import torch
from torch import Tensor, nn

from fmcore import ops


class RMSNorm(nn.Module):
    """``x * weight / sqrt(mean(x^2) + eps)`` over the last dimension, of size ``width``."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, of size ``width``."""

    def __init__(self, width: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class SwiGLU(nn.Module):
    """``silu(gate) * up`` of a packed (..., 2F) input, gate first."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x)


class GELU(nn.Module):
    """``x * Phi(x)``, Phi approximated with tanh or, with ``approximate="none"``, exact by erf."""

    def __init__(self, approximate: str = "tanh"):
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(x, self.approximate)
