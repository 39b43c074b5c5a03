"""Which device and which dtype to compute in, from the names that people give."""

import torch

from fmcore.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. ``InputError`` if this machine has no such device."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"train: device must be one of this machine's, got {name!r} ({str(e).splitlines()[0]})") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
