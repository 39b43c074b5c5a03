"""Text from a model: prompts are read once, then one token at a time follows, with a cache of keys and values.

    p = softmax(z / temperature)        of the top_k likeliest tokens, the fewest whose probability reaches top_p
    token = the first one whose cumulative probability exceeds u        u uniform in [0, 1)

Sequence i draws its u from a generator of its own, seeded by (seed, i): its text does not depend on what else is in the
batch, beyond the rounding of the model. Temperature 0 is greedy.

A sequence that fills the context slides: the last half of it is read again from position 0, and generation goes on.
A prompt longer than the context keeps its tail.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmcore.data.tokenizer import Tokenizer
from fmcore.errors import InputError
from fmcore.evaluate import evaluating
from fmcore.models.decoder import Cache, Decoder


@dataclass(frozen=True)
class SampleConfig:
    """How tokens are chosen."""

    max_tokens: int = 256  # new tokens of a sequence, unless the document ends before
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    seed: int = 0
    batch: int = 64  # sequences at a time

    def __post_init__(self):
        for name, least in (("max_tokens", 1), ("top_k", 0), ("seed", 0), ("batch", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise InputError(f"generate: {name} must be an integer of at least {least}, got {value!r}")
        if not (0 <= self.temperature < math.inf):
            raise InputError(f"generate: temperature must be 0 (greedy) or more, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"generate: top_p must be above 0 and at most 1, got {self.top_p!r}")


def candidates(logits: Tensor, config: SampleConfig) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, K) in fp64, not normalised, and the tokens (B, K) they belong to.

    ``None`` for the tokens means the whole vocabulary in its order.
    """
    z = logits.double()
    p = torch.softmax((z - z.amax(-1, keepdim=True)) / config.temperature, dim=-1)
    K = p.shape[-1]
    if not 0 < config.top_k < K and config.top_p == 1:
        return p, None
    p, ids = p.topk(min(config.top_k or K, K), dim=-1)  # likeliest first
    if config.top_p < 1:
        before = p.cumsum(-1) - p
        p = p.masked_fill(before >= config.top_p * p.sum(-1, keepdim=True), 0.0)
    return p, ids


def choose(logits: Tensor, config: SampleConfig, draws: Sequence[float]) -> Tensor:
    """The next token (B,) of each sequence, by its logits (B, V) and its draw from [0, 1); -1 where logits are nan."""
    if config.temperature == 0:
        return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)
    p, ids = candidates(logits, config)
    c = p.cumsum(-1)
    total = c[:, -1:]
    # The product stays below total, as the largest draw is 1 - 2^-53; only nan has nothing above it.
    u = torch.tensor(draws, dtype=c.dtype, device=c.device)[:, None] * total
    at = torch.searchsorted(c, u, right=True).clamp(max=p.shape[-1] - 1)
    tokens = at if ids is None else ids.gather(-1, at)
    return tokens.masked_fill(total.isnan(), -1)[:, 0]


class _Reader:
    """Sequences of different lengths that the model reads side by side, one token of each at a time.

    The host keeps every length itself, so that nothing waits for the GPU.
    """

    def __init__(self, model: Decoder, prompts: list[list[int]], room: int):
        self.model = model
        self.device = model.embed.weight.device
        self.seqs = [list(p) for p in prompts]  # all that was read
        self.lens = [len(p) for p in prompts]  # of which this many last tokens are in the cache
        size = min(model.config.context, max(self.lens) + room)
        self.cache = Cache(model.config, len(prompts), size, self.device, model.embed.weight.dtype)
        self.h = self._prefill(self.cache, self.seqs)  # (B, C) at the last token of each

    def _prefill(self, cache: Cache, seqs: list[list[int]]) -> Tensor:
        """Read ``seqs`` from position 0 into ``cache``; the hidden state (B, C) at the last token of each."""
        lens = torch.tensor([len(s) for s in seqs])
        tokens = torch.zeros(len(seqs), int(lens.max()), dtype=torch.int64)
        for row, seq in zip(tokens, seqs, strict=True):
            row[: len(seq)] = torch.tensor(seq)
        h = self.model.hidden(tokens.to(self.device), cache=cache)
        # Padding stands to the right, where no real token sees it, and the next tokens overwrite it.
        cache.lens = lens.to(self.device)
        return h[torch.arange(len(seqs), device=self.device), cache.lens - 1]

    def logits(self) -> Tensor:
        """What the model expects after all that was read, (B, V)."""
        return torch.nn.functional.linear(self.h, self.model.head_weight)  # (B, V)

    def read(self, tokens: list[int]) -> None:
        """Read one more token of each sequence; ``logits`` then belong to it."""
        self._slide()
        self.h = self.model.hidden(torch.tensor(tokens, device=self.device)[:, None], cache=self.cache)[:, 0]
        for seq, token in zip(self.seqs, tokens, strict=True):
            seq.append(token)
        self._count([n + 1 for n in self.lens])

    def keep(self, rows: list[int]) -> None:
        """Drop all sequences but these."""
        index = torch.tensor(rows, device=self.device)
        self.seqs = [self.seqs[i] for i in rows]
        self.cache.k, self.cache.v = self.cache.k[:, index], self.cache.v[:, index]
        self.cache.lens, self.h = self.cache.lens[index], self.h[index]
        self._count([self.lens[i] for i in rows])

    def _count(self, lens: list[int]) -> None:
        """Note the lengths here and, as far as the host needs it, in the cache."""
        self.lens, self.cache.longest = lens, max(lens)

    def _slide(self) -> None:
        """Make room in the sequences that fill the context, by reading their last half again from position 0."""
        context = self.model.config.context
        half = context // 2
        full = [i for i, n in enumerate(self.lens) if n == context]
        if not full:
            return
        index = torch.tensor(full, device=self.device)
        if half:
            part = Cache(self.model.config, len(full), half, self.device, self.cache.k.dtype)
            self._prefill(part, [self.seqs[i][-half:] for i in full])
            self.cache.k[:, index, :half], self.cache.v[:, index, :half] = part.k, part.v
        self.cache.lens[index] = half
        self._count([half if n == context else n for n in self.lens])


@torch.inference_mode()
def _sample(
    model: Decoder, prompts: list[list[int]], config: SampleConfig, end: int | None, first: int
) -> Iterator[tuple[int, int]]:
    """(sequence, token) pairs as they come; sequences are numbered from ``first``."""
    generators = [torch.Generator().manual_seed(_seed(config.seed, first + i)) for i in range(len(prompts))]
    with evaluating(model):
        reader = _Reader(model, prompts, config.max_tokens - 1)
        live = list(range(len(prompts)))
        for step in range(config.max_tokens):
            draws = [torch.rand((), generator=generators[i], dtype=torch.float64).item() for i in live]
            tokens = choose(reader.logits(), config, draws).tolist()
            if -1 in tokens:
                raise InputError("generate: the model's logits must be numbers, got nan; has its training diverged?")
            go_on = [row for row, token in enumerate(tokens) if token != end]
            for row in go_on:
                yield first + live[row], tokens[row]
            if not go_on or step + 1 == config.max_tokens:
                return
            if len(go_on) < len(live):
                reader.keep(go_on)
                live, tokens = [live[row] for row in go_on], [tokens[row] for row in go_on]
            reader.read(tokens)


def _seed(seed: int, i: int) -> int:
    """The seed of sequence ``i``."""
    # The CPU generator looks at 32 bits; plain sums would make (0, 1) and (1, 0) the same sequence.
    return int.from_bytes(hashlib.sha256(f"{seed}/{i}".encode()).digest()[:4], "little")


def _prepare(model: Decoder, prompt: Sequence[int] | np.ndarray, end: int | None) -> list[int]:
    """The tokens to read first: ``end``, then the prompt, and of a long one the tail. ``InputError`` for bad tokens."""
    ids = [int(token) for token in prompt]
    if end is not None and ids[:1] != [end]:
        ids = [end, *ids]
    V = model.config.vocab_size
    if bad := [token for token in ids if not 0 <= token < V]:
        raise InputError(
            f"generate: prompt tokens must be below vocab_size={V}, got {bad[0]}; "
            f"does the tokenizer belong to the model?"
        )
    if not ids:
        raise InputError("generate: a prompt must have at least one token when no end is given, got none")
    return ids[-model.config.context :]


def generate(
    model: Decoder, prompts: Sequence[Sequence[int] | np.ndarray], config: SampleConfig, end: int | None = None
) -> list[list[int]]:
    """The tokens that follow each prompt, without the prompt.

    ``end`` is the separator: it goes in front of every prompt that does not start with it, because documents start that
    way (an empty prompt is a new document), and a sequence stops before it. Raises ``InputError`` for tokens that the
    model does not have and for logits that are not numbers.
    """
    ready = [_prepare(model, prompt, end) for prompt in prompts]
    new: list[list[int]] = [[] for _ in ready]
    for first in range(0, len(ready), config.batch):
        for i, token in _sample(model, ready[first : first + config.batch], config, end, first):
            new[i].append(token)
    return new


def complete(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], config: SampleConfig) -> list[str]:
    """The text that follows each prompt, up to the end of its document or ``max_tokens``."""
    new = generate(model, [tokenizer.encode(prompt) for prompt in prompts], config, tokenizer.end)
    return [tokenizer.decode(tokens) for tokens in new]


def stream(model: Decoder, tokenizer: Tokenizer, prompt: str, config: SampleConfig) -> Iterator[str]:
    """The text that follows one prompt, in pieces as it comes; joined they equal ``complete``.

    A piece never holds part of a character. The model is in evaluation mode until the iterator ends or is closed.
    """
    ready = _prepare(model, tokenizer.encode(prompt), tokenizer.end)
    decoder = tokenizer.stream()
    for _, token in _sample(model, [ready], config, tokenizer.end, 0):
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.finish():
        yield piece
