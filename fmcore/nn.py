"""Modules over the operators: parameters and no mathematics.

``RMSNorm``, ``LayerNorm`` and ``GELU`` can stand in for their ``torch.nn`` namesakes.
"""

from typing import Any

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


class CrossEntropyLoss(nn.Module):
    """``ops.cross_entropy`` of logits (M, V) and targets (M,); ``options`` are its keywords but bias and weights.

    ``weight`` (V,) are the class weights, named and first as in ``torch.nn.CrossEntropyLoss``.
    """

    weight: Tensor | None

    def __init__(self, weight: Tensor | None = None, **options: Any):
        super().__init__()
        self.options = options
        self.register_buffer("weight", weight)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return ops.cross_entropy(logits, targets, class_weights=self.weight, **self.options)


class LinearCrossEntropy(nn.Module):
    """A linear layer from ``width`` to ``vocab_size`` and the cross-entropy of its logits, which never exist.

    ``options`` are keywords of ``ops.linear_cross_entropy``; parameters start as those of ``torch.nn.Linear``.
    """

    def __init__(self, width: int, vocab_size: int, bias: bool = False, **options: Any):
        super().__init__()
        self.options = options
        layer = nn.Linear(width, vocab_size, bias=bias)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, h: Tensor, targets: Tensor) -> Tensor:
        """The loss of hidden states ``h`` (M, C) for ``targets`` (M,)."""
        return ops.linear_cross_entropy(h, self.weight, targets, bias=self.bias, **self.options)
