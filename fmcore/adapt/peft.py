"""Adapters on disk in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT names each tensor by the path of its layer in the Hugging Face model, ``base_model.model.<path>.lora_A.weight``
(R, K) and ``....lora_B.weight`` (rows, R). A reader believes nothing: settings, names, shapes and dtypes are checked
before the model is touched, and what would need more than a plain adapter is refused.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmcore.adapt.lora import LoraConfig, adapter_config, add_lora, family_of, lora_modules, projections, targeted
from fmcore.errors import InputError
from fmcore.files import (
    check_safetensors,
    make_folder,
    read_json,
    read_safetensors,
    short,
    write_json,
    write_safetensors,
)
from fmcore.models.decoder import Config, Decoder

WEIGHTS, SETTINGS, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."

# Settings that change nothing here, or are looked at by name. Every other one must have a value that means "not used".
_READ = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules", "fan_in_fan_out",
    "init_lora_weights", "eva_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip
_UNUSED: tuple[Any, ...] = (None, False, [], {}, "none")
# Other ways to start (PiSSA, OLoRA, CorDA, LoftQ ...) move the base weights, so the adapter alone is not enough.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def _path(config: Config, block: int, projection: str) -> str:
    """Where PEFT keeps the tensors of a projection, given by its path below a block of the Hugging Face model."""
    return f"{PREFIX}{family_of(config).blocks}{block}.{projection}"


def _tensors(model: Decoder, config: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """Name in the file and tensor of every A (R, K) and every B (rows, R) that ``model`` holds, as views."""
    chosen = targeted(model.config, config.targets)
    for i, block in enumerate(model.layers):
        for layer in dict.fromkeys(p.layer for p in chosen):
            m = getattr(block, layer)
            names = [p.hf for p in chosen if p.layer == layer]
            for name, a, b in zip(names, *m.parts(), strict=True):
                path = _path(model.config, i, name)
                yield f"{path}.lora_A.weight", a
                yield f"{path}.lora_B.weight", b


def save_adapter(model: Decoder, folder: Path | str, base: str | None = None) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads them; returns the folder.

    ``base`` is the name or path of the base model, for those who load the adapter later. Raises ``InputError`` when the
    model has no adapter or the disk refuses.
    """
    config = adapter_config(model)
    folder = make_folder(folder)
    tensors = {name: t.detach() for name, t in _tensors(model, config)}
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / SETTINGS, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout, "use_rslora": config.rslora,
        "target_modules": _peft_targets(model.config, config), "fan_in_fan_out": family_of(model.config).conv1d,
        "bias": "none", "use_dora": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    })  # fmt: skip
    return folder


def _peft_targets(config: Config, lora: LoraConfig) -> list[str]:
    """``target_modules``: the last part of each path where that says enough; GPT-2 calls two layers c_proj."""

    def last(path: str) -> str:
        return path.rpartition(".")[2]

    everywhere = [last(p.hf) for p in projections(config)]
    return [p.hf if everywhere.count(last(p.hf)) > 1 else last(p.hf) for p in targeted(config, lora.targets)]


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
        has = adapter_config(model)
        if (has.rank, has.scale, targeted(model.config, has.targets)) != (
                config.rank, config.scale, targeted(model.config, targets)):  # fmt: skip
            raise InputError(
                f"{folder}: wanted an adapter like the one the model has, rank {has.rank} and scale "
                f"{has.scale:g} on {has.targets}, got rank {config.rank} and scale {config.scale:g} on "
                f"{targets}; load it into the base model"
            )
    tensors = read_safetensors(folder / WEIGHTS)
    if not adapted:
        add_lora(model, config)
    with torch.no_grad():
        for name, t in _tensors(model, config):
            t.copy_(tensors[name])
    return model


def _check_settings(path: Path, settings: dict[str, Any]) -> LoraConfig:
    """The ``LoraConfig`` of an adapter_config.json, but for its targets; absent settings take PEFT's defaults."""
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: peft_type must be 'LORA', got {short(settings.get('peft_type'))}")
    for name, value in settings.items():
        if name not in _READ and value not in _UNUSED:
            raise InputError(f"{path}: {name} is not supported, got {short(value)}")
    if settings.get("init_lora_weights") not in _STARTS:
        raise InputError(
            f"{path}: init_lora_weights {short(settings['init_lora_weights'])} changes the base model; "
            f"convert it to a plain adapter with PEFT (path_initial_model_for_weight_conversion)"
        )
    if not isinstance(settings.get("use_rslora", False), bool):
        raise InputError(f"{path}: use_rslora must be true or false, got {short(settings['use_rslora'])}")
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
    """The targets that the file has tensors for. ``InputError`` unless it has all of those, and nothing else."""
    wanted: dict[str, tuple[str, tuple[int, int]]] = {}
    for i, block in enumerate(model.layers):
        for p in projections(model.config):
            layer = _path(model.config, i, p.hf)
            wanted[f"{layer}.lora_A.weight"] = p.target, (rank, getattr(block, p.layer).in_features)
            wanted[f"{layer}.lora_B.weight"] = p.target, (p.rows.stop - p.rows.start, rank)
    for name, (dtype, shape) in header.items():
        if name not in wanted:
            raise InputError(f"{path}: {short(name)} fits no layer of this model; is the adapter for another one?")
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
    """``InputError`` if a list of names means other layers than the file has tensors for; a pattern is not run."""
    if named is None or isinstance(named, str):
        return
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise InputError(f"{path}: target_modules must be a list of names, got {short(named)}")
    config = model.config
    layers = {_path(config, i, p.hf): p.target for i in range(config.layers) for p in projections(config)}
    meant = set()
    for name in named:
        hits = {target for layer, target in layers.items() if f".{layer.removeprefix(PREFIX)}".endswith(f".{name}")}
        if not hits:
            raise InputError(f"{path}: target_modules must name layers of this model, got {short(name)}")
        meant |= hits
    if meant != set(targets):
        raise InputError(f"{path}: target_modules mean {sorted(meant)}, but {WEIGHTS} holds {sorted(targets)}")
