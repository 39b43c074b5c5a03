"""A model that can be used, from wherever it lies: a run, one of its checkpoints, or a Hugging Face folder.

A checkpoint of an adapter holds the adapter alone and names the base it belongs to; both are read.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fmcore.adapt.lora import LoraConfig, add_lora, lora_modules, merge_lora
from fmcore.adapt.peft import load_adapter
from fmcore.data.tokenizer import Tokenizer, load_tokenizer
from fmcore.device import pick_device, pick_dtype
from fmcore.errors import InputError
from fmcore.kernels.rope import RopeScaling
from fmcore.models.decoder import Config, Decoder
from fmcore.models.hf import load_hf
from fmcore.train.checkpoint import Checkpoint, load_checkpoint


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and the checkpoint it came from, if any."""

    model: Decoder
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None


def load(path: Path | str, *, adapter: Path | str | None = None, device: str = "auto", dtype: str = "auto") -> Loaded:
    """A model from a run, a checkpoint or a Hugging Face folder, with its tokenizer, and an adapter on top if asked.

    Raises ``InputError`` for what is missing, damaged, or does not fit together.
    """
    path, on = Path(path), pick_device(device)
    in_dtype = pick_dtype(dtype, on)
    if not path.exists():
        raise InputError(f"{path}: wanted a run, a checkpoint or a Hugging Face folder, found nothing")
    if (path / "config.json").exists() and not (path / "manifest.json").exists():
        found = Loaded(load_hf(path, dtype=in_dtype, device=on), load_tokenizer(path), None)
    else:
        found = from_checkpoint(load_checkpoint(path, optimizer=False), on, in_dtype)
    check_vocab_fits(found.tokenizer, found.model.config, path)
    if adapter is not None:
        own = found.checkpoint.path.parent.parent / "adapter" if found.checkpoint else None
        if lora_modules(found.model) and own is not None and Path(adapter).resolve() == own.resolve():
            raise InputError(f"{adapter}: wanted another adapter than the model's own, which {path} comes with already")
        fold_adapter(found.model)
        load_adapter(found.model, Path(adapter))
    return found


def from_checkpoint(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Loaded:
    """The model of a checkpoint. ``InputError`` if it does not hold what its config promises."""
    tokenizer = tokenizer_of(checkpoint)
    if "lora" in checkpoint.state:
        name = str(dtype).removeprefix("torch.")
        model = load_base(checkpoint.state.get("base", ""), device=str(device), dtype=name).model
        add_lora(model, lora_from_dict(checkpoint.state["lora"], checkpoint.path))
    else:
        with torch.device("meta"):
            model = Decoder(config_from_dict(checkpoint.config, checkpoint.path))
        model = model.to_empty(device=device).to(dtype)
    _fill(model, checkpoint)
    return Loaded(model, tokenizer, checkpoint)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that was saved with a checkpoint. ``InputError`` if none was."""
    if checkpoint.tokenizer is None:
        raise InputError(f"{checkpoint.path}: wanted a tokenizer beside the weights, found none")
    return load_tokenizer(checkpoint.tokenizer)


def load_base(path: Path | str, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """As ``load``, with an adapter that the model has merged into its weights, so that the next one fits on top."""
    found = load(path, device=device, dtype=dtype)
    fold_adapter(found.model)
    return found


def fold_adapter(model: Decoder) -> None:
    """Merge the adapter of ``model`` into its weights, if it has one."""
    if lora_modules(model):
        merge_lora(model)


def build(config: Config, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """A fresh model; the same weights for the same seed on every device."""
    torch.manual_seed(seed)
    return Decoder(config).to(device, dtype)


def config_from_dict(found: Mapping[str, Any], where: Path | str) -> Config:
    """The ``Config`` that ``asdict`` turned into ``found``. ``InputError`` for fields that are missing or unknown."""
    known = {f.name for f in fields(Config)}
    if odd := found.keys() - known:
        raise InputError(f"{where}: config has an unknown field {min(odd)!r}; a newer fmcore may have written it")
    scaling = found.get("rope_scaling")
    try:
        return Config(**{**found, "rope_scaling": None if scaling is None else RopeScaling(**scaling)})
    except TypeError as e:
        raise InputError(f"{where}: config must have the fields of a fmcore Config ({e})") from e


def lora_from_dict(found: Any, where: Path | str) -> LoraConfig:
    """The ``LoraConfig`` that ``asdict`` turned into ``found``. ``InputError`` if ``found`` is no such thing."""
    try:
        targets = found["targets"]
        return LoraConfig(**{**found, "targets": targets if isinstance(targets, str) else tuple(targets)})
    except (TypeError, KeyError) as e:
        raise InputError(f"{where}: lora must have the fields {sorted(asdict(LoraConfig()))} ({e})") from e


def _fill(model: Decoder, checkpoint: Checkpoint) -> None:
    """Copy the tensors of a checkpoint into the parameters that train: all of them, or those of the adapter."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in own.items():
        theirs = checkpoint.model.get(name)
        if theirs is None or theirs.shape != p.shape:
            got = "nothing" if theirs is None else tuple(theirs.shape)
            raise InputError(f"{checkpoint.path}: {name} must be {tuple(p.shape)}, got {got}")
        with torch.no_grad():
            p.copy_(theirs)


def check_vocab_fits(tokenizer: Tokenizer, config: Config, where: Path | str) -> None:
    """``InputError`` when the tokenizer has ids that the model has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer must have at most vocab_size={config.vocab_size} ids like the model, "
            f"got {tokenizer.vocab_size}"
        )
