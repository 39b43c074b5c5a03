"""Low-rank adapters on frozen linear layers, saved in PEFT's format.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmcore.errors import InputError
from fmcore.files import check_safetensors, read_json, read_safetensors, write_json, write_safetensors
from fmcore.models.decoder import Config, Decoder
from fmcore.models.hf import GPT2, LLAMA, Family

WEIGHTS, SETTINGS, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter is."""

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
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


@dataclass(frozen=True)
class Projection:
    """One linear layer as Hugging Face models have it, and where it is in the decoder."""

    target: str  # as in LoraConfig.targets
    layer: str  # of a block of the decoder
    rows: slice  # of that layer's weight
    hf: str  # path below a block of the Hugging Face model


def _family(config: Config) -> Family:
    """The one whose names the adapter uses: Llama, Mistral and Qwen3 have the same."""
    return GPT2 if config.positions == "learned" and config.activation != "swiglu" else LLAMA


def projections(config: Config) -> list[Projection]:
    """The linear layers of one block, in the order in which the fused layers hold them."""
    C, F, H, G, D = config.width, config.ffn, config.heads, config.G, config.D
    family = _family(config)
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


def _targeted(config: Config, targets: tuple[str, ...] | str) -> list[Projection]:
    known = projections(config)
    names = [p.target for p in known]
    if unknown := [t for t in targets if t not in names] if targets != "all" else []:
        raise InputError(f"lora: targets must be of {', '.join(names)} for this model, got {unknown[0]!r}")
    return [p for p in known if targets == "all" or p.target in targets]


class _LoraProduct(torch.autograd.Function):
    """x (M, K) and dropped = D(x), or None where that is x itself, to y (M, N)."""

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
    """A linear layer with its adapter. ``weight`` and ``bias`` are the objects of ``base``, under the same names.

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
    """The parameters of the adapter by name."""
    return {name: p for name, p in model.named_parameters() if name.endswith((".lora_a", ".lora_b"))}


def adapter_size(model: nn.Module) -> int:
    """How many numbers the adapter has."""
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
    chosen = _targeted(model.config, config.targets)
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
    _adapter_config(model)
    for block in model.layers:
        for name, m in list(block.named_children()):
            if isinstance(m, LoraLinear):
                m.merge()
                plain = nn.Linear(m.in_features, m.out_features, bias=False, device="meta")
                plain.weight, plain.bias = m.weight, m.bias
                setattr(block, name, plain.train(m.training))
    return model.requires_grad_(True)


def _adapter_config(model: Decoder) -> LoraConfig:
    modules = lora_modules(model)
    if not modules:
        raise InputError("lora: wanted a model with an adapter, got one without; add_lora or load_adapter gives it one")
    return modules[0].config


def _tensors(model: Decoder, config: LoraConfig) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path of each adapted projection in the Hugging Face model, its A (R, K) and its B (rows, R), as views."""
    chosen = _targeted(model.config, config.targets)
    for i, block in enumerate(model.layers):
        for layer in dict.fromkeys(p.layer for p in chosen):
            m = getattr(block, layer)
            names = [p.hf for p in chosen if p.layer == layer]
            for name, a, b in zip(names, *m.parts(), strict=True):
                yield f"{_family(model.config).blocks}{i}.{name}", a, b


def save_adapter(model: Decoder, folder: Path | str, base: str | None = None) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads them; returns the folder.

    ``base`` is the name or path of the base model, for those who load the adapter later. Raises ``InputError`` when the
    model has no adapter and when the disk refuses.
    """
    config = _adapter_config(model)
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: cannot make a folder for the adapter ({e.strerror})") from e
    tensors: dict[str, Tensor] = {}
    for path, a, b in _tensors(model, config):
        tensors |= {f"{PREFIX}{path}.lora_A.weight": a.detach(), f"{PREFIX}{path}.lora_B.weight": b.detach()}
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / SETTINGS, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "use_rslora": config.rslora,
        "target_modules": _peft_targets(model.config, config), "fan_in_fan_out": _family(model.config).conv1d,
        "bias": "none", "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    })  # fmt: skip
    return folder


def _peft_targets(config: Config, lora: LoraConfig) -> list[str]:
    """The last name where it says enough; GPT-2 calls two different layers c_proj."""
    paths = [p.hf for p in projections(config)]
    last = [path.rpartition(".")[2] for path in paths]
    return [
        p.hf if last.count(p.hf.rpartition(".")[2]) > 1 else p.hf.rpartition(".")[2]
        for p in _targeted(config, lora.targets)
    ]


# Fields that change nothing here, or are looked at by name. Every other one must have a value that means "not used".
_READ = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_UNUSED: tuple[Any, ...] = (None, False, [], {}, "none")
# Other ways to start (PiSSA, OLoRA, CorDA, LoftQ ...) move the base weights, so the adapter alone is not enough.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def load_adapter(model: Decoder, folder: Path | str) -> Decoder:
    """Give ``model`` the adapter in ``folder``, written by ``save_adapter`` or PEFT, in place and in the model's dtype.

    Nothing is changed unless all of it fits. A model that has an adapter takes the new numbers if both are alike.
    Raises ``InputError`` in one line for an adapter that is truncated, foreign, of other shapes or of a kind that is
    not supported (DoRA, modules_to_save, ranks by pattern, only some layers).
    """
    folder = Path(folder)
    settings = read_json(folder / SETTINGS)
    config = _check_settings(folder / SETTINGS, settings)
    header = check_safetensors(folder / WEIGHTS)
    targets = _check_tensors(folder / WEIGHTS, model, header, config.rank)
    _check_targets(folder / SETTINGS, model, settings.get("target_modules"), targets)
    config = replace(config, targets=targets)
    if adapted := bool(lora_modules(model)):
        has = _adapter_config(model)
        if (has.rank, has.scale, _targeted(model.config, has.targets)) != (
                config.rank, config.scale, _targeted(model.config, targets)):  # fmt: skip
            raise InputError(
                f"{folder}: wanted an adapter like the one the model has, rank {has.rank} and scale "
                f"{has.scale:g} on {has.targets}, got rank {config.rank} and scale {config.scale:g} on "
                f"{targets}; load it into the base model"
            )
    tensors = read_safetensors(folder / WEIGHTS)
    if not adapted:
        add_lora(model, config)
    with torch.no_grad():
        for path, a, b in _tensors(model, config):
            a.copy_(tensors[f"{PREFIX}{path}.lora_A.weight"])
            b.copy_(tensors[f"{PREFIX}{path}.lora_B.weight"])
    return model


def _check_settings(path: Path, settings: dict[str, Any]) -> LoraConfig:
    """What they say, but for the targets; the defaults are PEFT's."""
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type must be 'LORA', got {_short(settings.get('peft_type'))}")
    for name, value in settings.items():
        if name not in _READ and value not in _UNUSED:
            raise InputError(f"{path}: {name} is not supported, got {_short(value)}")
    if settings.get("init_lora_weights") not in _STARTS:
        raise InputError(
            f"{path}: init_lora_weights {_short(settings['init_lora_weights'])} changes the base model; "
            f"convert it to a plain adapter with PEFT (path_initial_model_for_weight_conversion)"
        )
    if not isinstance(settings.get("use_rslora", False), bool):
        raise InputError(f"{path}: use_rslora must be true or false, got {_short(settings['use_rslora'])}")
    try:
        return LoraConfig(
            settings.get("r", 8),
            settings.get("lora_alpha", 8),
            settings.get("lora_dropout", 0.0),
            rslora=settings.get("use_rslora", False),
        )
    except InputError as e:
        raise InputError(f"{path}: {str(e)[:200]}") from None


def _check_tensors(
    path: Path, model: Decoder, header: dict[str, tuple[torch.dtype, tuple[int, ...]]], rank: int
) -> tuple[str, ...]:
    """The targets that the file has tensors for; all of them in all layers, and nothing else."""
    wanted: dict[str, tuple[str, tuple[int, int]]] = {}
    for i, block in enumerate(model.layers):
        for p in projections(model.config):
            name = f"{PREFIX}{_family(model.config).blocks}{i}.{p.hf}"
            wanted[f"{name}.lora_A.weight"] = p.target, (rank, getattr(block, p.layer).in_features)
            wanted[f"{name}.lora_B.weight"] = p.target, (p.rows.stop - p.rows.start, rank)
    for name, (dtype, shape) in header.items():
        if name not in wanted:
            raise InputError(f"{path}: {_short(name)} fits no layer of this model; is the adapter for another one?")
        if shape != wanted[name][1] or not dtype.is_floating_point:
            raise InputError(
                f"{path}: {name} must be {wanted[name][1]} floating, got {shape} {str(dtype)[6:]}; "
                f"is the adapter for another model?"
            )
    found = {wanted[name][0] for name in header}
    if missing := [name for name, (target, _) in wanted.items() if target in found and name not in header]:
        raise InputError(f"{path}: wanted {missing[0]} as well, got an adapter without it (some layers, or truncated)")
    if not found:
        raise InputError(f"{path}: wanted tensors of an adapter, got none")
    return tuple(p.target for p in projections(model.config) if p.target in found)


def _check_targets(path: Path, model: Decoder, named: Any, targets: tuple[str, ...]) -> None:
    """A list of names must mean the layers that the file has tensors for; a pattern is not run."""
    if named is None or isinstance(named, str):
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{path}: target_modules must be a list of names, got {_short(named)}")
    paths = {f"{_family(model.config).blocks}{i}.{p.hf}": p.target
             for i in range(model.config.layers) for p in projections(model.config)}  # fmt: skip
    meant = set()
    for name in named:
        hits = {target for full, target in paths.items() if f".{full}".endswith(f".{name}")}
        if not hits:
            raise InputError(f"{path}: target_modules must name layers of this model, got {_short(name)}")
        meant |= hits
    if meant != set(targets):
        raise InputError(f"{path}: target_modules mean {sorted(meant)}, but {WEIGHTS} holds {sorted(targets)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
