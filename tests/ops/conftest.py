from collections.abc import Iterator

import proof
import pytest
import torch


@pytest.fixture
def on_device() -> Iterator[None]:
    """Tensors are made where the kernels run: on the GPU, or for the interpreter on the CPU."""
    before = torch.get_default_device()
    torch.set_default_device(None if proof.DEVICE == "cpu" else proof.DEVICE)
    yield
    torch.set_default_device(None if before.type == "cpu" else before)
