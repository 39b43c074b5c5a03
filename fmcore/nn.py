"""Modules over the operators: parameters and no mathematics.

``RMSNorm``, ``LayerNorm``, ``GELU``, ``Dropout`` and ``Embedding`` can stand in for their ``torch.nn`` namesakes.
Parameters and inputs share a dtype: ``torch.autocast`` does not reach the operators, so cast the model instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fmcore import ops


class _Norm(nn.Module):
    """What the two norms share: a weight that starts so that offset + weight is 1, and dropout while training."""

    def __init__(
        self, normalized_shape: int | Sequence[int], elementwise_affine: bool, offset: float, dropout: float,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ):  # fmt: skip
        super().__init__()
        if isinstance(normalized_shape, int):
            normalized_shape = (normalized_shape,)
        if len(normalized_shape) != 1:
            raise ValueError(f"{type(self).__name__}: normalized_shape must be one size, got {tuple(normalized_shape)}")
        (width,) = normalized_shape
        self.width, self.offset, self.dropout = width, offset if elementwise_affine else 0.0, dropout
        self.weight = (
            nn.Parameter(torch.full((width,), 1.0 - offset, device=device, dtype=dtype)) if elementwise_affine else None
        )

    def reset_parameters(self) -> None:
        for name, p in self.named_parameters():
            nn.init.constant_(p, 0.0 if name == "bias" else 1.0 - self.offset)

    def options(self, residual: Tensor | None) -> dict[str, Any]:
        dropout = self.dropout if self.training else 0.0
        return {"residual": residual, "offset": self.offset, "dropout": dropout}

    def extra_repr(self) -> str:
        affine = self.weight is not None
        return f"{self.width}, elementwise_affine={affine}, offset={self.offset}, dropout={self.dropout}"


class RMSNorm(_Norm):
    """``x * (offset + weight) / sqrt(mean(x^2) + eps)`` over the last dimension, of size ``normalized_shape``.

    With a ``residual`` it norms the sum ``residual + dropout(x)`` and returns (y, sum); ``dropout`` is a probability
    and acts in training only. ``eps=None`` is the distance from 1 to the next number of the dtype of ``x``.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = None, elementwise_affine: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        offset: float = 0.0, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(normalized_shape, elementwise_affine, offset, dropout, device, dtype)
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return ops.rms_norm(x, self.weight, eps, **self.options(residual))


class LayerNorm(_Norm):
    """``(x - mean) / sqrt(var + eps) * (offset + weight) + bias`` over a last dimension of ``normalized_shape``.

    With a ``residual`` it norms the sum ``residual + dropout(x)`` and returns (y, sum); ``dropout`` is a probability
    and acts in training only.
    """

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float = 1e-5, elementwise_affine: bool = True,
        bias: bool = True, device: torch.device | str | None = None, dtype: torch.dtype | None = None, *,
        offset: float = 0.0, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__(normalized_shape, elementwise_affine, offset, dropout, device, dtype)
        self.eps = eps
        affine = elementwise_affine and bias
        self.bias = nn.Parameter(torch.zeros(self.width, device=device, dtype=dtype)) if affine else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return ops.layer_norm(x, self.weight, self.bias, self.eps, **self.options(residual))


class _Activation(nn.Module):
    """An activation with a parameter that is added to its input first, when ``bias`` says of which size."""

    def __init__(self, bias: int | None = None):
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(torch.zeros(bias))


class SwiGLU(_Activation):
    """``silu(gate) * up`` of a packed (..., 2F) input, gate first; ``bias``, if any, is 2F."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.swiglu(x, bias=self.bias)


class GEGLU(_Activation):
    """``gelu(gate) * up`` of a packed (..., 2F) input, gate first; ``approximate`` as for ``GELU``, ``bias`` 2F."""

    def __init__(self, approximate: str = "tanh", bias: int | None = None):
        super().__init__(bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(x, approximate=self.approximate, bias=self.bias)


class ReGLU(_Activation):
    """``max(gate, 0) * up`` of a packed (..., 2F) input, gate first; ``bias``, if any, is 2F."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.reglu(x, bias=self.bias)


class GELU(_Activation):
    """``x * Phi(x)``, Phi exact or, with ``approximate="tanh"``, approximated; ``bias``, if any, is N."""

    def __init__(self, approximate: str = "none", bias: int | None = None):
        super().__init__(bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return ops.gelu(x, self.approximate, bias=self.bias)


class QuickGELU(_Activation):
    """``x * sigmoid(1.702 x)``, the activation of CLIP; ``bias``, if any, is N, the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.quick_gelu(x, bias=self.bias)


class ReLUSquared(_Activation):
    """``max(x, 0)^2``; ``bias``, if any, is N, the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu_squared(x, bias=self.bias)


class Dropout(nn.Dropout):
    """Elements are 0 with probability ``p`` while training; the mask is drawn again in backward, not stored."""

    def __init__(self, p: float = 0.5, inplace: bool = False):
        if inplace:
            raise ValueError("Dropout: inplace must be False, got True")
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p must be at least 0 and below 1, got {p}")
        super().__init__(p)

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p, training=self.training)


class Embedding(nn.Embedding):
    """Rows of a table (num_embeddings, embedding_dim) with a dense, deterministic gradient.

    What ``torch.nn.Embedding`` has besides, ``max_norm``, ``scale_grad_by_freq`` and ``sparse``, raises ``ValueError``.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for name, off in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
            if getattr(self, name) != off:
                raise ValueError(f"Embedding: {name} must be {off}, got {getattr(self, name)}")

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.embedding(tokens, self.weight, padding_idx=self.padding_idx)


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
