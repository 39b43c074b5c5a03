"""How well a model predicts text it has not seen.

    nats = sum_i -ln p(target_i)        loss = nats / tokens        perplexity = exp(loss)
    bits_per_byte = nats / (ln 2 * bytes)        bytes = UTF-8 bytes that the targets stand for

Bits per byte compare models across tokenizers: the text has the same bytes however it is cut into tokens. The separator
between documents counts as a token and in nats, and stands for no byte.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fmcore.data.packing import Batch
from fmcore.errors import InputError
from fmcore.models.decoder import Decoder


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicted a text: sums over all targets, and what follows from them."""

    nats: float
    tokens: int  # targets that count
    bytes: int  # of text that they stand for
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float

    @classmethod
    def of(cls, nats: float, tokens: int, bytes: int) -> "Evaluation":
        """The evaluation that these sums make. ``InputError`` when there is nothing to divide by."""
        if tokens < 1 or bytes < 1:
            raise InputError(
                f"evaluate: wanted at least one target that stands for text, got {tokens} targets that "
                f"stand for {bytes} bytes"
            )
        loss = nats / tokens
        # A loss beyond 709 nats per token overflows exp; math.exp would raise.
        perplexity = math.exp(loss) if not loss > 709 else math.inf
        return cls(nats, tokens, bytes, loss, perplexity, nats / math.log(2) / bytes)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside the block; afterwards each module is as it was, frozen parts of a training model too."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@torch.inference_mode()
def evaluate(model: Decoder, batches: Iterable[Batch], token_bytes: Tensor | np.ndarray) -> Evaluation:
    """Loss, perplexity and bits per byte of ``model`` on ``batches``; targets of -100 do not count.

    ``token_bytes`` (at most V,), integers, holds the bytes of text that each token stands for, as
    ``Tokenizer.token_bytes()`` gives them; ids beyond it stand for none. The loss of each token is summed in fp64, so
    how the tokens are cut into batches changes nothing but the rounding inside the model. Raises ``InputError`` when no
    target counts.
    """
    device = model.embed.weight.device
    V = model.config.vocab_size
    known = torch.as_tensor(token_bytes, dtype=torch.int64, device=device)
    if known.ndim != 1 or len(known) > V:
        raise InputError(
            f"evaluate: token_bytes must be (at most vocab_size={V}), got {tuple(known.shape)}; "
            f"does the tokenizer belong to the model?"
        )
    sizes = torch.cat([known, known.new_zeros(V - len(known))])
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens, size = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    with evaluating(model):
        for batch in batches:
            batch = batch.to(device)
            losses = model.loss(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, reduction="none")
            targets = batch.targets[batch.targets != -100]
            nats += losses.sum(dtype=torch.float64)
            tokens += targets.numel()
            size += sizes[targets].sum()
    return Evaluation.of(nats.item(), int(tokens), int(size))
