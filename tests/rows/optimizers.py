"""The steps of optimizers. They work in place and have no gradient, so the contract of a row does not fit: their proofs
are in tests/ops/test_adamw.py and its neighbours. Here is what tests/aot.py compiles.
"""

from functools import partial

import torch
from case import Case

from fmcore.kernels.adamw import adamw_
from fmcore.kernels.lion import lion_

CASES: dict[str, Case] = {}


def _step(
    moments: tuple[torch.dtype, ...],
    dtype: torch.dtype,
    master: bool = False,
    stochastic: bool = False,
    clip: float | None = None,
) -> None:
    """One step of AdamW (two moments) or Lion (one) on tensors without memory; with ``clip`` the norm goes before."""
    like = partial(torch.empty, 4096, 4096, device="meta")
    params, grads, states = [like(dtype=dtype)], [like(dtype=dtype)], [[like(dtype=m)] for m in moments]
    steps = [torch.empty((), device="meta")]
    scales = [[torch.empty(4096 * 16, device="meta")] if m.itemsize == 1 else [] for m in moments]
    step, absmax = (adamw_, tuple(scales)) if len(moments) == 2 else (lion_, scales[0])
    step(
        params, grads, *states, steps,
        masters=[like(dtype=torch.float32)] if master else [], absmax=absmax,
        clip=clip, stochastic_rounding=stochastic,
    )  # fmt: skip


F32, BF16, I8, U8 = torch.float32, torch.bfloat16, torch.int8, torch.uint8

# Name, as in a row, -> launches on tensors of the ``meta`` device. A name that ends in float32 is compiled for one
# target.
COMPILED = {
    "adamw float32": partial(_step, (F32, F32), F32, clip=1.0),
    "adamw bfloat16 with masters": partial(_step, (F32, F32), BF16, master=True, clip=1.0),
    "adamw bfloat16 with bfloat16 moments, stochastic": partial(_step, (BF16, BF16), BF16, stochastic=True),
    "adamw bfloat16 with masters and bfloat16 moments, stochastic": partial(
        _step, (BF16, BF16), BF16, master=True, stochastic=True
    ),
    "adamw bfloat16 with 8-bit moments, stochastic": partial(_step, (I8, U8), BF16, stochastic=True),
    "lion float32": partial(_step, (F32,), F32),
    "lion bfloat16 with masters": partial(_step, (F32,), BF16, master=True),
    "lion bfloat16 with 8-bit moments, stochastic": partial(_step, (I8,), BF16, stochastic=True),
}
