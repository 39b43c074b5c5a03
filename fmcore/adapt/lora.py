"""Low-rank adapters on frozen linear layers: their mathematics, and putting them on a decoder and off again.

    y = x W^T + b      y[:, rows_i] += s * S_i B_i^T      S = D(x) A^T      s = alpha / R, or alpha / sqrt(R) (rsLoRA)

    x (M, K)    W (N, K)    A (nR, K)    S (M, nR)    B (sum of rows_i, R)    D dropout, one mask for all n projections

    dS_i = s * dy[:, rows_i] B_i    dB_i = s * dy[:, rows_i]^T S_i    dA = dS^T D(x)    dx = dy W + D'(dS A)

A fused layer (q, k and v; gate and up) holds n projections. Each keeps its own A_i and B_i, as in a model that is not
fused, but the A_i stand in one tensor and the B_i in another: one product reads x once for all of them. Saved for the
backward pass: x and S. W gets no gradient, so a step costs 2/3 of the FLOPs of full training.
Source: Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmcore.errors import InputError
from fmcore.models.decoder import Config, Decoder
from fmcore.models.hf_config import GPT2, LLAMA, Family


@dataclass(frozen=True)
class LoraConfig:
    """Size, strength and place of an adapter."""

    rank: int = 8  # R
    alpha: float = 16.0
    dropout: float = 0.0  # of the adapter's input
    targets: tuple[str, ...] | str = "all"  # of q k v o gate up down (GPT-2: qkv o up down), or "all"
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise InputError(f"lora: rank must be a positive integer, got {self.rank!r}")
        for name, fits in (("alpha", 0 < _number(self.alpha) < math.inf), ("dropout", 0 <= _number(self.dropout) < 1)):
            if not fits:
                wanted = "a positive number" if name == "alpha" else "in [0, 1)"
                raise InputError(f"lora: {name} must be {wanted}, got {getattr(self, name)!r}")
        if self.targets != "all" and (isinstance(self.targets, str) or not self.targets):
            raise InputError(f"lora: targets must be 'all' or a tuple of names, got {self.targets!r}")

    @property
    def scale(self) -> float:
        """The factor s on what the adapter adds."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def _number(value: Any) -> float:
    """``value`` if it is a number, else nan, which is within no bounds."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


@dataclass(frozen=True)
class Projection:
    """One linear layer as Hugging Face models have it, and where the decoder holds it."""

    target: str  # its name in LoraConfig.targets
    layer: str  # the linear layer of a Block that it is part of
    rows: slice  # of that layer's weight
    hf: str  # its path below a block of the Hugging Face model


def family_of(config: Config) -> Family:
    """The Hugging Face family whose layer names an adapter uses; Llama, Mistral and Qwen 3 share theirs."""
    return GPT2 if config.positions == "learned" and config.activation != "swiglu" else LLAMA


def projections(config: Config) -> list[Projection]:
    """The linear layers of one block, in the order in which the fused layers hold them."""
    C, F, H, G, D = config.width, config.ffn, config.heads, config.G, config.D
    family = family_of(config)
    split = len(family.layer["qkv"]) > 1
    layers = {
        "qkv": {"q": H * D, "k": G * D, "v": G * D} if split else {"qkv": (H + 2 * G) * D},
        "out": {"o": C},
        "up": {"gate": F, "up": F} if config.activation == "swiglu" else {"up": F},
        "down": {"down": C},
    }
    found = []
    for layer, members in layers.items():
        at = 0
        # From the end: a Llama with GELU has no gate, which comes first.
        for (target, rows), path in zip(members.items(), family.layer[layer][-len(members) :], strict=True):
            found.append(Projection(target, layer, slice(at, at + rows), path))
            at += rows
    return found


def targeted(config: Config, targets: tuple[str, ...] | str) -> list[Projection]:
    """The projections of one block that ``targets`` name. ``InputError`` for a name that the model does not have."""
    known = projections(config)
    names = [p.target for p in known]
    if unknown := [t for t in targets if t not in names] if targets != "all" else []:
        raise InputError(f"lora: targets must be of {', '.join(names)} for this model, got {unknown[0]!r}")
    return [p for p in known if targets == "all" or p.target in targets]


class _LoraProduct(torch.autograd.Function):
    """From x (M, K) to y (M, N), by the formulas above; ``dropped`` is D(x), or ``None`` where that is x itself."""

    @staticmethod
    def forward(ctx, x, dropped, w, bias, a, b, rows, scale):
        y = F.linear(x, w, bias)
        s = F.linear(x if dropped is None else dropped, a)  # (M, nR)
        for part, s_i, b_i in _segments(rows, s, b):
            y[:, part].addmm_(s_i, b_i.T, alpha=scale)
        # x is needed for dA, or for dW when somebody trains the base as well.
        ctx.save_for_backward(x if dropped is None or ctx.needs_input_grad[2] else None, dropped, w, a, b, s)
        ctx.rows, ctx.scale = rows, scale
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, dropped, w, a, b, s = ctx.saved_tensors
        need_x, need_dropped, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:6]
        pieces = list(_segments(ctx.rows, s, b))
        ds = torch.cat([dy[:, part] @ b_i for part, _, b_i in pieces], 1).mul_(ctx.scale)  # (M, nR)
        db = torch.cat([dy[:, part].T @ s_i for part, s_i, _ in pieces]).mul_(ctx.scale) if need_b else None
        dx = dy @ w if need_x else None
        if dx is not None and dropped is None:
            dx.addmm_(ds, a)
        return (
            dx,
            ds @ a if need_dropped else None,
            dy.T @ x if need_w else None,
            dy.sum(0) if need_bias else None,
            ds.T @ (x if dropped is None else dropped) if need_a else None,
            db,
            None,
            None,
        )


def _segments(rows: tuple[slice, ...], s: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each projection: its rows of W, its S_i (M, R) and its B_i (rows, R)."""
    return zip(rows, s.split(b.shape[1], 1), b.split([part.stop - part.start for part in rows]), strict=True)


class LoraLinear(nn.Linear):
    """A linear layer with its adapter. ``weight`` and ``bias`` are those of ``base``, the very same tensors.

    ``lora_a`` (nR, K) holds A_1 .. A_n, ``lora_b`` holds B_1 .. B_n; projection i writes the outputs ``rows[i]``.
    """

    def __init__(self, base: nn.Linear, rows: tuple[slice, ...], config: LoraConfig, generator: torch.Generator):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.config, self.rows, self.enabled = config, rows, True
        # PEFT's start: kaiming_uniform with a = sqrt(5), which is this bound, and B = 0: the adapter starts as nothing.
        bound = base.in_features**-0.5
        a = torch.empty(len(rows) * config.rank, base.in_features, dtype=torch.float32, device="cpu")
        a.uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(self.weight))
        self.lora_b = nn.Parameter(self.weight.new_zeros(sum(part.stop - part.start for part in rows), config.rank))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        flat = x.reshape(-1, self.in_features)
        dropped = F.dropout(flat, self.config.dropout) if self.training and self.config.dropout else None
        y = _LoraProduct.apply(
            flat, dropped, self.weight, self.bias, self.lora_a, self.lora_b, self.rows, self.config.scale
        )
        return y.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def merge(self) -> None:
        """W += s B A, formed in fp32 at least and rounded once."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        for part, a_i, b_i in zip(self.rows, *self.parts(), strict=True):
            w = torch.addmm(self.weight[part].to(wide), b_i.to(wide), a_i.to(wide), alpha=self.config.scale)
            self.weight[part] = w.to(self.weight.dtype)

    def parts(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Each A_i (R, K) and each B_i (rows, R), as views."""
        sizes = [part.stop - part.start for part in self.rows]
        return self.lora_a.split(self.config.rank), self.lora_b.split(sizes)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.config.rank}, projections={len(self.rows)}"


def lora_modules(model: nn.Module) -> list[LoraLinear]:
    """The adapted layers of a model, in its order; empty when it has no adapter."""
    return [m for m in model.modules() if isinstance(m, LoraLinear)]


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapter, by their names in ``model``."""
    return {name: p for name, p in model.named_parameters() if name.endswith((".lora_a", ".lora_b"))}


def adapter_size(model: nn.Module) -> int:
    """How many parameters the adapter has, in elements."""
    return sum(p.numel() for p in adapter_parameters(model).values())


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without its adapter, under the names that it has without one."""
    return {name: t for name, t in model.state_dict().items() if not name.endswith((".lora_a", ".lora_b"))}


def add_lora(model: Decoder, config: LoraConfig, seed: int = 0) -> Decoder:
    """Freeze ``model`` and give its targeted linear layers fresh adapters, in place; its outputs do not change yet.

    Raises ``InputError`` for targets that the model does not have and when there is an adapter already.
    """
    if lora_modules(model):
        raise InputError("lora: wanted a model without an adapter, got one that has one; merge_lora folds it in")
    chosen = targeted(model.config, config.targets)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for block in model.layers:
        for name in dict.fromkeys(p.layer for p in chosen):
            rows = tuple(p.rows for p in chosen if p.layer == name)
            setattr(block, name, LoraLinear(getattr(block, name), rows, config, generator).train(block.training))
    return model


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what it did without the adapter, bit for bit."""
    modules = [(m, m.enabled) for m in lora_modules(model)]
    for m, _ in modules:
        m.enabled = False
    try:
        yield
    finally:
        for m, enabled in modules:
            m.enabled = enabled


def merge_lora(model: Decoder) -> Decoder:
    """Fold the adapter into the weights, in place; what remains is a plain decoder, and all of it can train again.

    Raises ``InputError`` when the model has no adapter.
    """
    adapter_config(model)
    for block in model.layers:
        for name, m in list(block.named_children()):
            if isinstance(m, LoraLinear):
                m.merge()
                plain = nn.Linear(m.in_features, m.out_features, bias=False, device="meta")
                plain.weight, plain.bias = m.weight, m.bias
                setattr(block, name, plain.train(m.training))
    return model.requires_grad_(True)


def adapter_config(model: nn.Module) -> LoraConfig:
    """What adapter ``model`` has. ``InputError`` if it has none."""
    modules = lora_modules(model)
    if not modules:
        raise InputError("lora: wanted a model with an adapter, got one without; add_lora or load_adapter gives it one")
    return modules[0].config
