"""Hugging Face model folders: read into a ``Decoder`` and written from one, without transformers.

    config.json        <->  Config        ``models/hf_config.py``, by ``Family.keys``
    model.safetensors  <->  parameters    here, by ``Family.top`` and ``Family.layer``

Every Hugging Face tensor is a view of one of our parameters: q, k and v are row ranges of ``qkv``, gate and up of
``up``, GPT-2's Conv1D weights are transposes. Import copies into the views and export writes them, so the two
directions cannot disagree.
"""

import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmcore.check import FLOATS
from fmcore.errors import InputError
from fmcore.files import check_safetensors, make_folder, read_json, read_safetensors, write_json, write_safetensors
from fmcore.models.decoder import Decoder
from fmcore.models.hf_config import FAMILIES, Family, config_from_hf, config_to_hf, refuse

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
# Constants that older versions of transformers stored beside the weights.
BUFFERS = re.compile(r".*\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")

# A stored tensor: its file, its name in there, its dtype and its shape.
Entry = tuple[Path, str, torch.dtype, tuple[int, ...]]


def hf_views(model: Decoder, family: Family) -> dict[str, Tensor]:
    """Each Hugging Face tensor by name, as the view of our parameter that holds it.

    Raises ``InputError`` for a parameter that the family has no name for, such as an adapter's.
    """
    H, G, D, F = model.config.heads, model.config.G, model.config.D, model.config.ffn
    rows = {"qkv": [H * D, G * D, G * D], "up": [F, F]}
    views = {}
    for name, p in model.named_parameters():
        found = re.fullmatch(r"(?:layers\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        index, module, kind = found.groups() if found else (None, "", "")
        theirs = (family.layer if index else family.top).get(module)
        if theirs is None:
            raise InputError(f"save_hf: {name} has no place in a {family.architecture}: merge or remove adapters first")
        for part, view in zip(theirs, p.detach().split(rows[module] if len(theirs) > 1 else len(p)), strict=True):
            view = view.t() if family.conv1d and index and view.ndim == 2 else view
            views[f"{family.blocks}{index}.{part}.{kind}" if index else f"{part}.{kind}"] = view
    return views


def _stored(folder: Path, family: Family) -> dict[str, Entry]:
    """What the weight files hold, by full Hugging Face name, from their headers alone."""
    names = {WEIGHTS}
    if not (folder / WEIGHTS).exists():
        if not (folder / INDEX).exists():
            way_out = ": save it again with safe_serialization=True" if any(folder.glob("*.bin")) else ""
            raise InputError(f"{folder}: wanted {WEIGHTS} or {INDEX}, found neither{way_out}")
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise refuse(folder / INDEX, "weight_map", "a JSON object of tensor and file names", shards)
        for name in shards.values():
            if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
                raise refuse(folder / INDEX, "weight_map", "to .safetensors files beside it", name)
        names = set(shards.values())
    stored: dict[str, Entry] = {}
    for file in sorted(folder / name for name in names):
        for name, entry in check_safetensors(file).items():
            if name in stored:
                raise refuse(folder, f"tensor {name}", "in one file", [stored[name][0].name, file.name])
            if not BUFFERS.fullmatch(name):
                stored[name] = file, name, *entry
    if any(name.startswith(family.prefix) for name in stored):
        return stored
    return {("" if name.startswith("lm_head.") else family.prefix) + name: entry for name, entry in stored.items()}


def _fit(folder: Path, views: Mapping[str, Tensor], stored: Mapping[str, Entry]) -> None:
    """Raise ``InputError`` for tensors that are missing, unknown, of another shape or not floating."""
    for what, names in (("missing", views.keys() - stored), ("unknown", stored.keys() - views)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder}: {what} tensor {min(names)}{more}: wanted {len(views)}, got {len(stored)}")
    for name, view in views.items():
        _, _, dtype, shape = stored[name]
        if shape != tuple(view.shape) or dtype not in FLOATS:
            raise refuse(folder, f"tensor {name}", f"{tuple(view.shape)}, floating", f"{shape}, {str(dtype)[6:]}")


def load_hf(folder: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Decoder:
    """The ``Decoder`` in a Hugging Face folder: config.json and model.safetensors, in one file or in shards.

    Names, shapes and dtypes are checked before memory is taken; then each tensor is copied from its mapped file to its
    place. ``dtype`` is that of the parameters, by default the one that holds every stored value exactly.

    Raises ``InputError`` for a bad or unsupported folder, ``TypeError`` when ``dtype`` is no floating one.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"load_hf: dtype must be one of {[str(d)[6:] for d in FLOATS]}, got {dtype}")
    config = config_from_hf(folder)
    family = FAMILIES[read_json(folder / "config.json")["model_type"]]
    stored = _stored(folder, family)
    if config.layers > len(stored):
        raise refuse(folder, family.keys["layers"], f"at most the {len(stored)} tensors there are", config.layers)
    try:
        with torch.device("meta"):
            model = Decoder(config)
    except RuntimeError as e:
        raise InputError(f"{folder}/config.json: sizes beyond what a tensor can have ({str(e).splitlines()[0]})") from e
    spare = stored.pop("lm_head.weight", None) if config.tied else None
    _fit(folder, hf_views(model, family), stored)
    model = model.to(dtype or reduce(torch.promote_types, (entry[2] for entry in stored.values())))
    model = model.to_empty(device=device)
    views = hf_views(model, family)
    for file in sorted({entry[0] for entry in stored.values()}):
        tensors = read_safetensors(file)
        for name, (place, theirs, *_) in stored.items():
            if place == file:
                views[name].copy_(tensors[theirs])
    # Some folders store a tied head too; transformers unties it when it differs.
    if spare and not torch.equal(read_safetensors(spare[0])[spare[1]].to(model.embed.weight), model.embed.weight):
        raise InputError(
            f"{folder}: lm_head.weight must equal the embedding, as tie_word_embeddings is true, got "
            "other values: set that to false to keep both"
        )
    return model


def save_hf(model: Decoder, folder: Path | str, tokenizer: Any = None) -> None:
    """Write a folder that transformers and ``load_hf`` read, as gpt2, llama, mistral or qwen3.

    Each file is written beside its place and renamed, config.json last. A tied head is stored once, as the embedding.
    With a ``tokenizer`` the folder holds that too: its separator becomes bos and eos, and transformers reads it when
    it has a tokenizer.json.

    Raises ``InputError`` when no model_type of Hugging Face computes the same, or the disk refuses.
    """
    folder, hf = Path(folder), config_to_hf(model.config)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise refuse(
            "save_hf", "tokenizer.vocab_size", f"at most the model's {model.config.vocab_size}", tokenizer.vocab_size
        )
    end, dtype = tokenizer.end if tokenizer is not None else None, str(model.embed.weight.dtype)[6:]
    hf |= {"bos_token_id": end, "eos_token_id": end, "dtype": dtype, "torch_dtype": dtype}
    views = hf_views(model, FAMILIES[hf["model_type"]])
    make_folder(folder)
    write_safetensors(folder / WEIGHTS, views, {"format": "pt"})
    if tokenizer is not None:
        tokenizer.save(folder)
    if (text := getattr(tokenizer, "end_text", None)) is not None:
        # Without it transformers takes the tokenizer class of the model_type, which splits text in its own way.
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": text,
                "eos_token": text,
                "model_max_length": model.config.context,
                "clean_up_tokenization_spaces": False,
            },
        )
    write_json(folder / "config.json", hf)
