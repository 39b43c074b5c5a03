"""Rows of the embedding."""

from functools import partial

import torch
from case import Bug, Case, randn
from torch import Tensor

from fmcore import ops
from fmcore.kernels import embedding


def embedding_inputs(M: int, V: int, C: int) -> tuple[Tensor, Tensor]:
    """Tokens, half of them 0, and a table. Below 6 none is padding, whose gradient is not what gradcheck expects."""
    return torch.randint(V - (M < 6), (M,)) * torch.randint(2, (M,)), randn(V, C)


# Chunks of 64 places, columns in blocks of 512 (pieces) and 128 (sums of pieces): few tokens make runs of all lengths.
CASES = {
    "embedding": Case(
        op=partial(ops.embedding, padding_idx=-1),
        ref=partial(embedding.embedding_ref, padding_idx=-1),
        inputs=embedding_inputs,
        shapes=(
            (0, 4, 8),
            (1, 2, 1),
            (7, 3, 5),
            (63, 2, 20),
            (64, 4, 96),
            (65, 2, 130),
            (200, 5, 130),
            (129, 3, 513),
            (200, 150, 3),
        ),
        gradcheck=(5, 4, 5),
        # One more than a multiple of 64 tokens: the last program begins a chunk.
        phantom=(2**22 + 1, 2**20, 2**16),
        draws=((0, 150), (2, 9), (1, 70)),
        aot=((8192, 32000, 4096), (8192, 50257, 704)),
        constants=(0,),
        no_copy=(1,),
        bodies=("triton", "cpu"),
        file="embedding.py",
        bugs=(
            Bug("mask = (rows < M)[:, None]", "mask = (rows <= M)[:, None]", "memory", (7, 3, 5)),
            Bug("w.stride(0), ROWS", "C, ROWS", "memory", (7, 3, 5)),
            Bug("rows = (pid // blocks).to(tl.int64) * ROWS", "rows = (pid // blocks) * ROWS", "phantom"),
            # A run that is cut and not continued, cut off its chunk, not cut, cut in the middle, written twice.
            Bug("run_starts | (first % CHUNK == 0)", "run_starts", "memory", (200, 5, 130)),
            Bug("mask=places < end, other=-1", "mask=places < M, other=-1", "exact", (200, 5, 130)),
            Bug(
                "end = tl.minimum((chunk + 1) * CHUNK, M)",
                "end = tl.minimum(first + CHUNK, M)",
                "memory",
                (200, 5, 130),
            ),
            Bug("if run_starts & (run_goes_on == 0)", "if run_starts", "memory", (200, 5, 130)),
            Bug("at = chunk + 1", "at = chunk + 2", "exact", (200, 5, 130)),
            Bug("total = tail + tl.sum(total", "total = tl.sum(total", "exact", (200, 5, 130)),
            Bug("wanted & leaves & (came == 0)", "wanted & leaves", "memory", (300, 5, 40)),
            Bug("wanted & leaves & (came == 0)", "wanted & (came == 0)", "memory", (200, 150, 3)),
            Bug("& (token != padding_idx)", "", "exact", (7, 3, 5)),
            Bug("torch.sort(tokens, stable=True)", "(tokens, torch.arange(len(tokens)))", "memory", (7, 3, 5)),
        ),
    ),
}
