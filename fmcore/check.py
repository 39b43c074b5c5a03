"""Checks on arguments that say which operator, which argument, what was wanted and what came.

They look at metadata only, never at a value, so they cost no synchronisation and trace under ``torch.compile``.
"""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int64, torch.int32)


def shape(op: str, **args: tuple[Tensor, str]) -> dict[str, int]:
    """Check shapes and return the size of each named dimension: ``{"N": n}`` of the call below.

        shape("rms_norm", x=(x, "... N"), w=(w, "N"))

    A spec lists the names of dimensions. The first may be ``...`` for any leading dimensions; a number stands for just
    that size. Raises ``ValueError`` when a tensor does not fit its spec or one name has two sizes.
    """
    size: dict[str, int] = {}
    for name, (t, spec) in args.items():
        dims = spec.split()
        lead = t.ndim - len(dims) + 1 if dims and dims[0] == "..." else 0
        dims = dims[1:] if dims and dims[0] == "..." else dims
        fits = lead >= 0 and t.ndim - lead == len(dims)
        if not fits or any(
            n != (int(d) if d.isdigit() else size.setdefault(d, n)) for d, n in zip(dims, t.shape[lead:], strict=True)
        ):
            known = "".join(f", {d}={size[d]}" for d in dims if d in size)
            raise ValueError(f"{op}: {name} must be ({spec.replace(' ', ', ')}){known}, got {tuple(t.shape)}")
    return size


def dtype(op: str, allowed: tuple[torch.dtype, ...] = FLOATS, **args: Tensor | None) -> None:
    """``TypeError`` unless every given tensor has one of the ``allowed`` dtypes; ``None`` is skipped."""
    for name, t in args.items():
        if t is not None and t.dtype not in allowed:
            raise TypeError(f"{op}: {name} must be one of {[str(a)[6:] for a in allowed]}, got {str(t.dtype)[6:]}")


def same(op: str, **args: Tensor | None) -> None:
    """``ValueError`` unless all given tensors share a device, ``TypeError`` unless a dtype; ``None`` is skipped."""
    given = [(name, t) for name, t in args.items() if t is not None]
    first, x = given[0]
    for name, t in given[1:]:
        if t.device != x.device:
            raise ValueError(f"{op}: {name} must be on the device of {first}, {x.device}, got {t.device}")
        if t.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of {first}, {str(x.dtype)[6:]}, got {str(t.dtype)[6:]}")


def device(op: str, cpu: bool = False, /, **args: Tensor | None) -> None:
    """``ValueError`` unless all given tensors share the first one's device or, with ``cpu``, are on a CPU."""
    (first, x), *rest = ((name, t) for name, t in args.items() if t is not None)
    for name, t in rest:
        if t.device != x.device and not (cpu and t.device.type == "cpu"):
            raise ValueError(f"{op}: {name} must be on the device of {first}, {x.device}, got {t.device}")


def dropout(op: str, p: float, seed: Tensor | None, x: Tensor) -> Tensor | None:
    """The seed for dropout on ``x`` with probability ``p``: the given one, else one from PyTorch's generator.

    ``None`` when nothing is dropped. ``ValueError`` unless ``p`` is in [0, 1) and a given ``seed`` an int64 tensor (1,)
    on the device of ``x``; ``TypeError`` on its dtype.
    """
    if not 0 <= p < 1:
        raise ValueError(f"{op}: dropout must be from 0 to below 1, got {p}")
    if seed is not None:
        shape(op, seed=(seed, "1"))
        dtype(op, (torch.int64,), seed=seed)
        if seed.device != x.device:
            raise ValueError(f"{op}: seed must be on the device of x, {x.device}, got {seed.device}")
    if p == 0:
        return None
    return torch.randint(2**62, (1,), device=x.device) if seed is None else seed
