"""A decoder-only transformer: GPT-2, Llama 3, Qwen 3 and Mistral from one Config.

    x = embed(tokens) [+ pos(positions)]
    x = x + out(attention(rope(qkv(norm1(x)))))          rows of qkv: [q | k | v], H, G and G heads of size D
    x = x + down(activation(up(norm2(x))))               rows of up for SwiGLU: [gate | up]
    logits = head(norm(x))

Each sum is taken by the norm that follows it, in one kernel: a layer hands on the stream and the branch to be added.

Tokens come packed: rows of (B, T), and inside a row documents that do not see each other, told by ``cu_seqlens``.
Activations are (M, C) with M = B * T from the first line to the last.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fmcore import ops
from fmcore.errors import InputError
from fmcore.kernels.rope import RopeScaling, rope_tables
from fmcore.nn import GELU, Embedding, LayerNorm, RMSNorm, SwiGLU

# A Config may come from a file, so its values are looked at: what is wanted of each type, and whether a value is that.
_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a positive integer", lambda n: type(n) is int and n > 0),
    float: ("a positive number", lambda x: type(x) in (int, float) and 0 < x < math.inf),
    bool: ("true or false", lambda b: type(b) is bool),
}


@dataclass(frozen=True)
class Config:
    """The architecture of a decoder. Sizes are in elements; the defaults make a Llama-like block."""

    vocab_size: int
    layers: int
    width: int  # C
    heads: int  # H
    ffn: int  # F
    context: int  # longest sequence, in tokens
    kv_heads: int | None = None  # G; None: as many as heads
    head_dim: int | None = None  # D; None: width / heads
    norm: str = "rms"  # rms | layer
    norm_eps: float = 1e-6
    activation: str = "swiglu"  # swiglu | gelu_tanh | gelu
    positions: str = "rope"  # rope | learned
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False  # RMSNorm on each head of q and k
    window: int | None = None  # sliding window, in tokens
    bias: bool = False  # on every linear layer but the head
    tied: bool = False  # head = embedding
    init_std: float = 0.02  # of matrices; those that write to the residual stream get 1 / sqrt(2 layers) of it

    def __post_init__(self):
        for name, allowed in (
            ("norm", ("rms", "layer")),
            ("activation", ("swiglu", "gelu_tanh", "gelu")),
            ("positions", ("rope", "learned")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"config: {name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            kind = int if field.type == int | None and value is not None else field.type
            wanted, fits = _KINDS.get(kind, ("", None))
            if fits and not fits(value):
                raise InputError(f"config: {field.name} must be {wanted}, got {value!r}")
        if self.rope_scaling is not None and not all(_KINDS[float][1](n) for n in astuple(self.rope_scaling)):
            raise InputError(f"config: rope_scaling must hold positive numbers, got {self.rope_scaling}")
        if self.head_dim is None and self.width % self.heads:
            raise InputError(f"config: width must be a multiple of heads={self.heads}, got {self.width}")
        if self.heads % self.G:
            raise InputError(f"config: heads must be a multiple of kv_heads={self.G}, got {self.heads}")
        if self.positions == "rope" and self.D % 2:
            raise InputError(f"config: head_dim must be even for rope, got {self.D}")

    @property
    def G(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def D(self) -> int:
        """Size of a head."""
        return self.head_dim or self.width // self.heads


def _gpt2(layers: int, width: int, heads: int) -> Config:
    return Config(
        vocab_size=50257,
        layers=layers,
        width=width,
        heads=heads,
        ffn=4 * width,
        context=1024,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu_tanh",
        positions="learned",
        bias=True,
        tied=True,
    )


def _llama3(layers: int, width: int, heads: int, ffn: int, factor: float, tied: bool) -> Config:
    return Config(
        vocab_size=128256,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=8,
        ffn=ffn,
        context=131072,
        norm_eps=1e-5,
        rope_theta=500000.0,
        tied=tied,
        rope_scaling=RopeScaling(
            factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        ),
    )


PRESETS: dict[str, Config] = {
    # Width, rate and initial size were chosen by what 150 s on two CPU cores learn: LOG.md.
    "demo": Config(vocab_size=257, layers=4, width=128, heads=4, ffn=352, context=256, tied=True, init_std=0.04),
    "demo-gpu": Config(vocab_size=4096, layers=8, width=512, heads=8, ffn=1408, context=512, tied=True),
    "gpt2-124m": _gpt2(12, 768, 12),
    "gpt2-350m": _gpt2(24, 1024, 16),
    "gpt2-1.5b": _gpt2(48, 1600, 25),
    "llama-3.2-1b": _llama3(16, 2048, 32, 8192, 32.0, tied=True),
    "llama-3.1-8b": _llama3(32, 4096, 32, 14336, 8.0, tied=False),
    "qwen3-0.6b": Config(
        vocab_size=151936,
        layers=28,
        width=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        ffn=3072,
        context=40960,
        rope_theta=1000000.0,
        qk_norm=True,
        tied=True,
    ),
}


class Cache:
    """Keys and values of what each of B sequences has read so far, with room for ``size`` tokens in each."""

    def __init__(self, config: Config, B: int, size: int, device: torch.device | str, dtype: torch.dtype):
        shape = (config.layers, B, size, config.G, config.D)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.size = size
        self.lens = torch.zeros(B, dtype=torch.int64, device=device)
        self.longest = 0  # no sequence is longer: a number of the host, so that slicing needs no synchronisation

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put ``k``, ``v`` (B, T, G, D) of a layer behind what is there.

        Returns all keys and values of the layer up to the longest sequence, and how many of them count in each sequence
        (B,); ``None`` there means all.
        """
        B, T = k.shape[:2]
        if not self.longest:
            self.k[layer, :, :T], self.v[layer, :, :T] = k, v
            return k, v, None
        rows = torch.arange(B, device=k.device)[:, None]
        at = self.lens[:, None] + torch.arange(T, device=k.device)  # (B, T)
        self.k[layer, rows, at], self.v[layer, rows, at] = k, v
        end = self.longest + T
        return self.k[layer, :, :end], self.v[layer, :, :end], self.lens + T

    def advance(self, T: int) -> None:
        """Count the T tokens that every layer has written."""
        self.lens += T
        self.longest += T


@dataclass(frozen=True)
class Rows:
    """Where the M = B * T tokens of a pass stand: what every layer asks of them."""

    B: int
    # (M,), or None where ``angles`` are looked up already.
    positions: Tensor | None
    # cos and sin, None without rope.
    angles: tuple[Tensor, Tensor] | None
    cu_seqlens: Tensor | None
    cache: Cache | None


class Block(nn.Module):
    """One layer: attention, then the feed-forward network, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config, index: int):
        super().__init__()
        C, D, H, G, F = config.width, config.D, config.heads, config.G, config.ffn
        self.config, self.index = config, index
        norm = RMSNorm if config.norm == "rms" else LayerNorm
        self.norm1, self.norm2 = norm(C, config.norm_eps), norm(C, config.norm_eps)
        self.qkv = nn.Linear(C, (H + 2 * G) * D, bias=config.bias)
        self.out = nn.Linear(H * D, C, bias=config.bias)
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(D, config.norm_eps), RMSNorm(D, config.norm_eps)
        self.up = nn.Linear(C, 2 * F if config.activation == "swiglu" else F, bias=config.bias)
        self.activation = (
            SwiGLU() if config.activation == "swiglu" else GELU("tanh" if config.activation == "gelu_tanh" else "none")
        )
        self.down = nn.Linear(F, C, bias=config.bias)

    def forward(self, x: Tensor, branch: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """The residual stream (M, C) with ``branch`` and the attention added, and what is still to be added to it."""
        y, x = (self.norm1(x), x) if branch is None else self.norm1(branch, residual=x)
        y, x = self.norm2(self.attend(y, rows), residual=x)
        return x, self.down(self.activation(self.up(y)))

    def attend(self, x: Tensor, rows: Rows) -> Tensor:
        """The attention half of the layer, for ``x`` (M, C) that is already normed."""
        H, G, D, B = self.config.heads, self.config.G, self.config.D, rows.B
        q, k, v = self.qkv(x).unflatten(-1, (H + 2 * G, D)).split((H, G, G), dim=1)  # (M, H, D), (M, G, D), (M, G, D)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rows.angles is not None:
            q, k = ops.rope(q, k, *rows.angles, rows.positions)
        if rows.cu_seqlens is not None:
            o = ops.attention(q, k, v, window=self.config.window, cu_seqlens=rows.cu_seqlens)
            return self.out(o.flatten(1))
        k, v = k.unflatten(0, (B, -1)), v.unflatten(0, (B, -1))  # (B, T, G, D)
        k, v, lens = rows.cache.write(self.index, k, v) if rows.cache is not None else (k, v, None)
        if lens is not None and len(q) == B:
            return self.out(ops.decode_attention(q, k, v, lens, window=self.config.window).flatten(1))
        q = q.unflatten(0, (B, -1))  # (B, T, H, D)
        return self.out(ops.attention(q, k, v, window=self.config.window, kv_lens=lens).flatten(2).flatten(0, 1))


class Decoder(nn.Module):
    """The model of a ``Config``, with fresh weights.

    ``embed`` (V, C), ``pos`` (context, C) for learned positions, ``layers``, ``norm``, ``head`` (V, C) unless tied.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        C = config.width
        self.embed = Embedding(config.vocab_size, C)
        if config.positions == "learned":
            self.pos = Embedding(config.context, C)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.layers))
        self.norm = (RMSNorm if config.norm == "rms" else LayerNorm)(C, config.norm_eps)
        if not config.tied:
            self.head = nn.Linear(C, config.vocab_size, bias=False)
        self._angles: dict[torch.device, tuple[int, tuple[Tensor, Tensor]]] = {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal matrices of ``init_std``, smaller where they write to the residual stream; zero biases; unit norms."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=self.config.init_std * ((2 * self.config.layers) ** -0.5 if residual else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.ones_(p)

    @property
    def head_weight(self) -> Tensor:
        """Weights of the output layer (V, C); the embedding when they are tied."""
        return self.embed.weight if self.config.tied else self.head.weight

    def angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cos and sin for at least the positions below ``length``, ``None`` without rope.

        Tables are kept for each device, and made anew, at least twice as long, when they are too short.
        """
        if self.config.positions != "rope":
            return None
        have, tables = self._angles.get(device, (0, None))
        if have < length:
            have = min(self.config.context, max(length, 2 * have))
            # Tables made in inference mode could never be saved for a backward pass afterwards.
            with torch.inference_mode(False):
                tables = rope_tables(have, self.config.D, self.config.rope_theta, self.config.rope_scaling, device)
            self._angles[device] = have, tables
        return tables

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """The last hidden states (B, T, C) of ``tokens`` (B, T), after the final norm.

        Args:
            positions: (B, T) position of each token in its document; by default 0..T-1, or after what the cache holds.
            cu_seqlens: (S+1,) int32 on the CPU, where documents start in the B * T tokens; every row starts one.
            cache: read and extended; then ``cu_seqlens`` must be None.

        Raises ``ValueError`` when tokens are longer than the context or than the cache has room for.
        """
        B, T = tokens.shape
        length = T + (cache.longest if cache is not None else 0)
        if length > self.config.context:
            raise ValueError(f"decoder: tokens must be at most context={self.config.context} long, got {length}")
        if cache is not None and length > cache.size:
            raise ValueError(f"decoder: cache must have room for {length} tokens, got {cache.size}")
        if cache is not None and cu_seqlens is not None:
            raise ValueError("decoder: cu_seqlens must be None with a cache, got both")
        if positions is None:
            positions = torch.arange(T, device=tokens.device).expand(B, T)
            positions = positions if cache is None else positions + cache.lens[:, None]
        positions = positions.reshape(-1)  # (M,)
        x = self.embed(tokens.reshape(-1))  # (M, C)
        if self.config.positions == "learned":
            x = x + self.pos(positions)
        angles = self.angles(length, tokens.device)
        at: Tensor | None = positions
        if tokens.device.type == "cpu":
            if angles is not None:
                # Looked up once for all layers; a GPU's kernel reads the small tables, which stay in its cache.
                angles, at = (angles[0][positions], angles[1][positions]), None
        elif cu_seqlens is not None:
            # Sent once for all layers, and nobody waits for it.
            cu_seqlens = cu_seqlens.to(tokens.device, non_blocking=True)
        rows, branch = Rows(B, at, angles, cu_seqlens, cache), None
        for layer in self.layers:
            x, branch = layer(x, branch, rows)
        if cache is not None:
            cache.advance(T)
        y, _ = self.norm(branch, residual=x)
        return y.unflatten(0, (B, T))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Logits (B, T, V); arguments as for ``hidden``."""
        return nn.functional.linear(self.hidden(tokens, positions, cu_seqlens, cache), self.head_weight)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy in nats of ``targets`` (B, T), which are -100 where there is none.

        ``reduction`` is that of ``ops.linear_cross_entropy``, the other arguments are those of ``hidden``. The logits
        never exist as a whole.
        """
        h = self.hidden(tokens, positions, cu_seqlens).flatten(0, 1)
        return ops.linear_cross_entropy(h, self.head_weight, targets.reshape(-1), reduction=reduction)

    def linears(self) -> Iterator[tuple[str, nn.Linear]]:
        """Name and module of every linear layer inside the blocks; the head is not one of them."""
        return ((f"layers.{name}", m) for name, m in self.layers.named_modules() if isinstance(m, nn.Linear))
