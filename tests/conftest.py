"""Set before any kernel is decorated: with no GPU, Triton kernels run in the interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import interpreter  # noqa: E402

interpreter.install()

# One thread a process, so that ``pytest -n 2`` keeps two cores busy and not more.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
