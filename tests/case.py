"""What a row of tests/rows/ says of an operator, or of one variant of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bug:
    """A planted bug: ``old`` becomes ``new`` in the operator's source, and the check named ``caught_by`` must fail.

    ``caught_by`` is one of ``exact`` (wrong numbers in an output or a gradient on ``shape``), ``memory`` (on views with
    padded rows a lane out of bounds, a race or an element never written), ``phantom`` (addresses beyond 2^31).
    Every occurrence of ``old`` is replaced, in the operator's own file or in ``file``, one that it imports from.
    """

    old: str
    new: str
    caught_by: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    file: str = ""


@dataclass(frozen=True)
class Case:
    """``op(*args)`` must equal ``ref(*args)``, where ``args = inputs(*shape)``."""

    op: Callable[..., Tensor | tuple[Tensor, ...]]
    ref: Callable[..., Tensor | tuple[Tensor, ...]]
    # (*shape) -> arguments: tensors to differentiate in fp64 (tests cast them), constants in the dtype they keep, None.
    inputs: Callable[..., tuple[Tensor | None, ...]]
    # The shapes that break kernels: 0 rows, 1 column, primes, block - 1, block, block + 1.
    shapes: tuple[tuple[int, ...], ...]
    # At most 24 elements in all arguments together.
    gradcheck: tuple[int, ...]
    # About 2^34 elements; run on tensors that have a shape and no memory. Empty, with the reason beside it, where the
    # kernels see a bounded part of any tensor.
    phantom: tuple[int, ...]
    # (smallest, largest) of each entry of a shape, for hypothesis.
    draws: tuple[tuple[int, int], ...]
    # Shapes compiled ahead of time, the first also in fp32.
    aot: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    # Positions of arguments that get no gradient and keep their dtype (tables, indices).
    constants: tuple[int, ...] = ()
    # Positions of arguments that get no gradient but are cast like those that do (weights of a frozen layer).
    frozen: tuple[int, ...] = ()
    # Positions of arguments of which a view with padded rows must reach the kernel without a copy.
    no_copy: tuple[int, ...] = (0,)
    # Its sums are added in any order: float atomics are allowed, equal bits on each run are not asked for on a GPU.
    unordered: bool = False
    # Targets of tests/aot.py that ``aot`` is compiled for, in bf16 alone; all when empty, and one in fp32.
    targets: tuple[str, ...] = ()
    # Bodies besides the plain PyTorch path.
    bodies: tuple[str, ...] = ("triton",)
    # No gradient is promised: outputs alone are proven.
    forward_only: bool = False
    # A gradient asked for alone comes by the same sums, and so with the same bits, as together with the others.
    same_alone: bool = True
    # The source file whose kernels this row tests, and bugs that must turn its tests red.
    file: str = ""
    bugs: tuple[Bug, ...] = ()


def by_name(op: Callable, names: tuple[str, ...], *args: Tensor | None, **options: object) -> Any:
    """``op`` with its last arguments given by name: a row is ``partial(by_name, ops.rope, ("cu_seqlens",))``."""
    split = len(args) - len(names)
    return op(*args[:split], **dict(zip(names, args[split:], strict=True)), **options)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)
