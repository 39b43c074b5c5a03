"""Batches of packed documents from a stream of tokens, in an order that is a function of a seed and a count.

    row i: tokens = stream[s : s+T]   targets = stream[s+1 : s+T+1]   s = shift(seed, epoch) + T * order(seed, epoch)[i]

A document (a segment) starts at every ``end`` in the inputs and at every row start; ``positions`` count from there and
``cu_seqlens`` holds where segments start in the flattened rows. The target after the last token of a document is the
next ``end``, so no target crosses a boundary and none is wasted.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmcore.data.shards import Shard
from fmcore.errors import InputError

# The target that does not train, as PyTorch has it.
IGNORE = -100
# Of the Feistel network that shuffles.
ROUNDS = 6


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents: tokens, targets, positions (B, T) int64; cu_seqlens (S+1,) int32, always on the CPU.

    Targets of -100 do not train; ``n_targets`` counts the others.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    n_targets: int

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on ``device``; ``cu_seqlens`` stays, so that launch sizes are known without a synchronisation."""
        return replace(
            self,
            **{name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "targets", "positions")},
        )


def pack(rows: np.ndarray, end: int, ignore_from: int | None = None) -> Batch:
    """The batch of ``rows`` (B, T+1) int64, whose documents are told apart by the separator ``end``.

    Of the B * T flattened targets, those from index ``ignore_from`` on do not train.
    """
    B, T = rows.shape[0], rows.shape[1] - 1
    # Copies, not ascontiguousarray: one row is contiguous as it is, and both would share its memory.
    tokens, targets = rows[:, :-1].copy(), rows[:, 1:].copy()
    n_targets = B * T if ignore_from is None else ignore_from
    targets.reshape(-1)[n_targets:] = IGNORE
    starts = tokens == end  # (B, T)
    starts[:, 0] = True
    cu_seqlens = np.append(np.flatnonzero(starts), B * T)
    positions = np.arange(B * T) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        torch.from_numpy(positions.reshape(B, T)),
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        n_targets,
    )


def check_vocab(shard: Shard, vocab_size: int) -> None:
    """``InputError`` when the shard holds an id that a model of ``vocab_size`` has no embedding for."""
    if shard.max_token >= vocab_size:
        raise InputError(
            f"{shard.path}: wanted ids below the model's vocabulary {vocab_size}, got ids up to "
            f"{shard.max_token}; take the tokenizer of the model"
        )


class Loader:
    """Endless batches of shuffled windows over one or more shards.

    An epoch visits every window once; the next one shifts all windows and draws another order. Both are pure functions
    of (seed, epoch), made of sha256 and integer arithmetic, so they hold across versions of numpy. The state is the
    number of rows consumed by all ranks together: a resumed loader goes on exactly, also with another batch size.
    Fewer than 2T tokens of each shard, at its ends, stay out of an epoch and come back in others.
    """

    def __init__(
        self,
        shards: Shard | Sequence[Shard],
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        self.shards = [shards] if isinstance(shards, Shard) else list(shards)
        self.batch_size, self.seq_len, self.seed, self.rank, self.world = batch_size, seq_len, seed, rank, world
        self.rows = 0
        self._check()
        windows = [max(1, (len(shard) - seq_len) // seq_len) for shard in self.shards]
        self._first = np.cumsum([0, *windows])
        self.rows_per_epoch = int(self._first[-1])
        # How far the windows of a shard can shift and still all fit.
        self._room = [min(seq_len, len(s) - w * seq_len) for s, w in zip(self.shards, windows, strict=True)]

    def _check(self) -> None:
        for name in ("batch_size", "seq_len", "world"):
            if getattr(self, name) < 1:
                raise InputError(f"loader: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rank < self.world:
            raise InputError(f"loader: rank must be in [0, {self.world}), got {self.rank}")
        if not self.shards:
            raise InputError("loader: wanted at least one shard, got none")
        for shard in self.shards:
            _check_length(shard, self.seq_len)
            if shard.fingerprint != self.shards[0].fingerprint:
                raise InputError(
                    f"{shard.path}: wanted ids of the same tokenizer as {self.shards[0].path}, "
                    f"{self.shards[0].fingerprint[:12]}, got {shard.fingerprint[:12]}"
                )

    @property
    def epoch(self) -> int:
        """Epochs that all ranks together have finished."""
        return self.rows // self.rows_per_epoch

    def next_batch(self) -> Batch:
        """The next ``batch_size`` rows of this rank; ranks of one world take disjoint rows of the same order."""
        first = self.rows + self.rank * self.batch_size
        self.rows += self.world * self.batch_size
        rows = np.empty((self.batch_size, self.seq_len + 1), np.int64)
        for row, (shard, start) in zip(rows, self._windows(first), strict=True):
            row[:] = shard.tokens[start : start + self.seq_len + 1]
        return pack(rows, self.shards[0].end)

    def _windows(self, first: int) -> Iterator[tuple[Shard, int]]:
        """The shard and the first token of each row from ``first`` on, ``batch_size`` of them."""
        epoch, last = first // self.rows_per_epoch, first + self.batch_size
        while first < last:
            stop = min(last, (epoch + 1) * self.rows_per_epoch)
            key, shift, step = _key(self.seed, epoch)
            order = shuffled(np.arange(first, stop) - epoch * self.rows_per_epoch, self.rows_per_epoch, key)
            which = np.searchsorted(self._first, order, side="right") - 1
            for k, i in zip(which.tolist(), order.tolist(), strict=True):
                yield self.shards[k], (shift + k * step) % self._room[k] + (i - int(self._first[k])) * self.seq_len
            epoch, first = epoch + 1, stop

    def _data(self) -> dict[str, Any]:
        """What decides which rows there are and their order."""
        return {
            "shards": [shard.sha256 for shard in self.shards],
            "tokenizer": self.shards[0].fingerprint,
            "seed": self.seed,
            "seq_len": self.seq_len,
        }

    def state_dict(self) -> dict[str, Any]:
        """Rows consumed and what they were taken from, ready for JSON."""
        return {"rows": self.rows, "data": self._data()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. ``InputError`` when it belongs to other data, another seed or another ``seq_len``."""
        rows, data = (state.get("rows"), state.get("data")) if isinstance(state, dict) else (None, None)
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 0 or not isinstance(data, dict):
            raise InputError(
                f"loader state: wanted rows (a count) and data, got rows {rows!r} and a {type(data).__name__}"
            )
        for name, value in self._data().items():
            if data.get(name) != value:
                raise InputError(
                    f"loader state: {name} differs: this run has {_short(value)}, the state was saved "
                    f"with {_short(data.get(name))}; resume with the same data, seed and seq_len"
                )
        self.rows = rows


def held_out_batches(shard: Shard, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]:
    """Windows over the shard in order, every target once; the last batch is filled up with targets of -100.

    With ``max_tokens``, as many whole windows as it allows (at least one), spread evenly so that every part of the
    shard counts. A shard shorter than one window is padded.
    """
    if batch_size < 1 or seq_len < 1 or (max_tokens is not None and max_tokens < 1):
        raise InputError(
            f"held_out_batches: batch_size, seq_len and max_tokens must be at least 1, got {batch_size}, "
            f"{seq_len}, {max_tokens}"
        )
    count = math.ceil((len(shard) - 1) / seq_len)
    starts = np.arange(count) * seq_len
    if max_tokens is not None and max_tokens < len(shard) - 1:
        # Only whole windows, so that the spread does not depend on a short last one.
        whole = max(1, (len(shard) - 1) // seq_len)
        keep = min(whole, max(1, max_tokens // seq_len))
        starts = starts[np.arange(keep) * whole // keep]
    return _in_order(shard, batch_size, seq_len, starts)


def _in_order(shard: Shard, batch_size: int, seq_len: int, starts: np.ndarray) -> Iterator[Batch]:
    """The windows from ``starts`` on, ``batch_size`` to a batch; what is missing of the last one is padding."""
    # Padding is one segment: a separator that opens it, then any other id.
    filler = 1 if shard.end == 0 else 0
    for first in range(0, len(starts), batch_size):
        rows = np.full((batch_size, seq_len + 1), filler, np.int64)
        n_targets = 0
        for row, start in zip(rows, starts[first : first + batch_size].tolist(), strict=False):
            window = shard.tokens[start : start + seq_len + 1]
            row[: len(window)] = window
            row[len(window) : len(window) + 1] = shard.end
            n_targets += len(window) - 1
        yield pack(rows, shard.end, n_targets)


def shuffled(i: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where a permutation of [0, n), chosen by ``key``, sends each of ``i`` (k,) int64; O(k) time and memory.

    A Feistel network on pairs (left, right) below (a, b), a*b >= n, added modulo a and b; what lands beyond n goes
    through it again. Source: Black & Rogaway 2002, Ciphers with Arbitrary Finite Domains.
    """
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    out = i.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        left, right = out[todo] // np.uint64(b), out[todo] % np.uint64(b)
        for round_ in range(ROUNDS):
            left = (left + _mixed(right, key + 2 * round_) % np.uint64(a)) % np.uint64(a)
            right = (right + _mixed(left, key + 2 * round_ + 1) % np.uint64(b)) % np.uint64(b)
        out[todo] = left * np.uint64(b) + right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)


def _mixed(x: np.ndarray, key: int) -> np.ndarray:
    """64 well-mixed bits of each x, by the steps of splitmix64 (Steele et al. 2014)."""
    x = x + np.uint64(key * 0x9E3779B97F4A7C15 % (1 << 64))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _key(seed: int, epoch: int) -> tuple[int, int, int]:
    """Three 64-bit numbers that depend on (seed, epoch): one for the order, two for the shifts."""
    digest = hashlib.sha256(f"fmcore loader {seed} {epoch}".encode()).digest()
    order, shift, step = (int.from_bytes(digest[8 * n : 8 * n + 8], "big") for n in range(3))
    return order, shift, step


def _check_length(shard: Shard, seq_len: int) -> None:
    if len(shard) < seq_len + 1:
        raise InputError(
            f"{shard.path}: wanted at least seq_len + 1 = {seq_len + 1} tokens, got {len(shard)}; take "
            f"more text or a shorter seq_len"
        )


def _short(value: Any) -> str:
    return ", ".join(str(v)[:12] for v in value) if isinstance(value, list) else str(value)[:12]
