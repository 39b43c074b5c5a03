"""Dropout whose mask is drawn anew from a seed wherever it is needed, and never stored.

    y = x * f          f = 0 with probability p, else 1 / (1 - p)          x, y (M, N)

The factor of element (i, j) is word j % 4 of Philox-4x32 with 7 rounds on counter i * ceil(N / 4) + j // 4 under a
64-bit key, the seed: the same on every device and in every body. Backward is the same operator on dy. Bound by DRAM:
reads x and writes y (2MN elements). Source: Srivastava et al. 2014, JMLR 15; Salmon et al. 2011.
"""

import torch
from torch import Tensor

from fmcore.kernels.blocks import dropout_draws

_ROUND_A, _ROUND_B, _KEY_A, _KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def dropout_factor_ref(seed: Tensor, M: int, N: int, p: float) -> Tensor:
    """The factors (M, N) in fp64 for ``seed`` (1,) int64, by 64-bit integers: what ``blocks.dropout_factor`` equals."""
    groups = torch.arange(M * (-(-N // 4)), device=seed.device)
    # The products of 32-bit words wrap in 64 signed bits, which keeps all 64 of them.
    c0, c1, c2, c3 = groups & _LOW, groups >> 32, torch.zeros_like(groups), torch.zeros_like(groups)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(7):
        b, a = _ROUND_B * c2, _ROUND_A * c0
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEY_A) & _LOW, (k1 + _KEY_B) & _LOW
    words = torch.stack((c0, c1, c2, c3), -1).view(M, 4 * -(-N // 4))[:, :N]
    draws = dropout_draws(p)
    return (words >= draws).double() * (2**32 / (2**32 - draws))
