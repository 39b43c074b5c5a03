"""Hugging Face model folders: config.json and safetensors to a Decoder and back, without transformers.

    config.json        <->  Config        by ``Family.keys``, one table for each model_type
    model.safetensors  <->  parameters    by ``Family.tensors``, one table for each model_type

Every Hugging Face tensor is a view of one of our parameters: q, k and v are row ranges of ``qkv``, gate and up of
``up``, GPT-2's Conv1D weights are transposes. Import copies into the views and export writes them; a Config is exported
only if importing the result gives it back. So the two directions cannot disagree.
What a Decoder cannot compute is refused, never approximated. Dropout is not imported, and written as 0.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmcore.check import FLOATS
from fmcore.errors import InputError
from fmcore.files import check_safetensors, read_json, read_safetensors, write_json, write_safetensors
from fmcore.kernels.rope import RopeScaling
from fmcore.models.decoder import Config, Decoder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
BUFFERS = re.compile(r".*\.(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)")  # constants that older versions stored
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}  # the first of equals is written
Entry = tuple[Path, str, torch.dtype, tuple[int, ...]]  # of a stored tensor: file, name in it, dtype, shape
FULL, SLIDING = {"full_attention"}, {"sliding_attention"}


@dataclass(frozen=True)
class Family:
    """One model_type of transformers. Tensors are named without ``.weight`` and ``.bias``."""

    architecture: str
    prefix: str  # of all tensors but the head; folders of base models lack it
    top: dict[str, tuple[str, ...]]  # our module -> theirs
    blocks: str
    layer: dict[str, tuple[str, ...]]  # our module in a layer -> theirs, in the order of our rows
    keys: dict[str, str]  # field of Config -> key of config.json
    fixed: dict[str, Any]  # fields of Config that the family implies
    constants: dict[str, Any]  # the one value of a key that a Decoder computes; None: the key must be absent or null
    defaults: dict[str, Any]  # what transformers takes for an absent key; other keys must be there
    conv1d: bool = False  # linear weights are stored (in, out)


LLAMA = Family(
    "LlamaForCausalLM", "model.", {"embed": ("model.embed_tokens",), "norm": ("model.norm",), "head": ("lm_head",)},
    "model.layers.",
    {"norm1": ("input_layernorm",), "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
     "q_norm": ("self_attn.q_norm",), "k_norm": ("self_attn.k_norm",), "out": ("self_attn.o_proj",),
     "norm2": ("post_attention_layernorm",), "up": ("mlp.gate_proj", "mlp.up_proj"), "down": ("mlp.down_proj",)},
    {"vocab_size": "vocab_size", "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
     "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "ffn": "intermediate_size",
     "context": "max_position_embeddings", "norm_eps": "rms_norm_eps", "init_std": "initializer_range",
     "tied": "tie_word_embeddings"},
    {"norm": "rms", "activation": "swiglu", "positions": "rope", "bias": False, "qk_norm": False},
    {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "quantization_config": None, "auto_map": None},
    {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
     "tie_word_embeddings": False},
)  # fmt: skip
GPT2 = Family(
    "GPT2LMHeadModel", "transformer.",
    {"embed": ("transformer.wte",), "pos": ("transformer.wpe",), "norm": ("transformer.ln_f",), "head": ("lm_head",)},
    "transformer.h.",
    {"norm1": ("ln_1",), "qkv": ("attn.c_attn",), "out": ("attn.c_proj",), "norm2": ("ln_2",), "up": ("mlp.c_fc",),
     "down": ("mlp.c_proj",)},
    {"vocab_size": "vocab_size", "layers": "n_layer", "width": "n_embd", "heads": "n_head", "ffn": "n_inner",
     "context": "n_positions", "norm_eps": "layer_norm_epsilon", "init_std": "initializer_range",
     "tied": "tie_word_embeddings", "activation": "activation_function"},
    {"norm": "layer", "positions": "learned", "bias": True},
    {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
     "quantization_config": None, "auto_map": None},
    {"n_inner": None, "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": True,
     "activation_function": "gelu_new"},
    conv1d=True,
)  # fmt: skip
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": replace(LLAMA, architecture="MistralForCausalLM",
                       defaults=LLAMA.defaults | {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen3": replace(LLAMA, architecture="Qwen3ForCausalLM", fixed=LLAMA.fixed | {"qk_norm": True},
                     defaults=LLAMA.defaults | {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096,
                                                "use_sliding_window": False, "max_window_layers": 28}),
}  # fmt: skip


def _refuse(where: Path | str, key: str, wanted: Any, got: Any) -> InputError:
    text = repr(got)
    return InputError(f"{where}: {key} must be {wanted}, got {text if len(text) <= 80 else text[:77] + '...'}")


def _value(where: Path | str, key: str, value: Any, kind: Any) -> Any:
    """``value`` when it is a ``kind``: bool, a finite float > 0, an int > 0 (``int | None`` as well)."""
    if kind is bool and type(value) is bool:
        return value
    if kind is float and type(value) in (int, float) and 0 < value < math.inf:
        return float(value)
    if kind not in (bool, float) and type(value) is int and 0 < value < 1 << 31:
        return value
    raise _refuse(where, key, {bool: "true or false", float: "a positive number"}.get(kind, "an integer > 0"), value)


def _rope(where: Path | str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The rope fields, by the keys of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) or both."""
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    sources = {"": {key: hf.get(key) for key in top}}
    sources |= {key: hf.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    seen: dict[str, Any] = {}
    for place, source in sources.items():
        if not isinstance(source, dict):
            raise _refuse(where, place, "a JSON object", source)
        for key, value in source.items():
            name = "rope_type" if key == "type" else key
            if value is not None and seen.setdefault(name, value) != value:
                raise _refuse(where, f"{place}.{key}".strip("."), f"{seen[name]!r}, as it also says", value)
    kind, part = seen.pop("rope_type", "default"), seen.pop("partial_rotary_factor", 1.0)
    if kind not in ("default", "llama3"):
        raise _refuse(where, "rope_scaling.rope_type", "default or llama3", kind)
    if part != 1.0:
        raise _refuse(where, "partial_rotary_factor", "1.0", part)
    theta = _value(where, "rope_theta", seen.pop("rope_theta", 10000.0), float)
    types = {f.name: f.type for f in fields(RopeScaling)} if kind == "llama3" else {}
    for key in sorted(seen.keys() - types.keys() - {"original_max_position_embeddings"}):
        raise _refuse(where, f"rope_scaling.{key}", f"absent with rope_type {kind}", seen[key])
    values = {key: _value(where, f"rope_scaling.{key}", seen.get(key), type_) for key, type_ in types.items()}
    if values and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise _refuse(where, "rope_scaling.low_freq_factor", "less than high_freq_factor", values["low_freq_factor"])
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**values) if values else None}


def _window(where: Path | str, hf: Mapping[str, Any], layers: int) -> int | None:
    """The sliding window when all layers have one, None when no layer has; a mixture is refused."""
    name, first = hf["model_type"], 0
    # transformers ignores the key in a Llama.
    window = None if name == "llama" else hf["sliding_window"]
    if name == "qwen3":
        window = window if _value(where, "use_sliding_window", hf["use_sliding_window"], bool) else None
        first = hf["max_window_layers"]
    if window is not None:
        _value(where, "sliding_window", window, int)
        if type(first) is not int:
            raise _refuse(where, "max_window_layers", "an integer", first)
    kinds = FULL if window is None or first >= layers else SLIDING if first <= 0 else FULL | SLIDING
    if types := hf.get("layer_types"):
        said = set(map(str, types)) if isinstance(types, list) else set()
        # Only a Qwen 3 reads the key; elsewhere it may say no more than the window does.
        kinds = said if name == "qwen3" or said == kinds else set()
    if kinds != FULL and (kinds != SLIDING or window is None):
        key, got = ("layer_types", types) if types else ("max_window_layers", first)
        raise _refuse(where, key, f"the same for all layers and fit sliding_window={window}", got)
    return window if kinds == SLIDING else None


def config_from_hf(source: Path | str | Mapping[str, Any], where: Path | str = "config.json") -> Config:
    """The Config of a Hugging Face folder, or of what its config.json holds: gpt2, llama, mistral or qwen3.

    Raises InputError that names the key (in ``where``, for a mapping) for anything that a Decoder cannot compute.
    """
    if not isinstance(source, Mapping):
        where = Path(source) / "config.json"
        if not where.is_file():
            raise InputError(f"{source}: wanted a Hugging Face folder on this machine, with a config.json, found none")
        source = read_json(where)
    name = source.get("model_type")
    if name not in tuple(FAMILIES):
        raise _refuse(where, "model_type", f"one of {', '.join(FAMILIES)}", name)
    family = FAMILIES[name]
    hf = family.defaults | dict(source)
    for key, only in family.constants.items():
        if hf.get(key) is not None and hf[key] != only:
            raise _refuse(where, key, "absent" if only is None else repr(only), hf[key])
    values = dict(family.fixed)
    kinds = {f.name: f.type for f in fields(Config)}
    for ours, key in family.keys.items():
        if key not in hf:
            raise InputError(f"{where}: wanted {key}, which a {name} model must have, found none")
        if hf[key] is None and family.defaults.get(key, key) is None:
            values[ours] = 4 * values["width"] if ours == "ffn" else None
        elif ours != "activation":
            values[ours] = _value(where, key, hf[key], kinds[ours])
        elif hf[key] in tuple(GELUS):
            values[ours] = GELUS[hf[key]]
        else:
            raise _refuse(where, key, f"one of {', '.join(GELUS)}", hf[key])
    if values["positions"] == "rope":
        values |= _rope(where, hf) | {"window": _window(where, hf, values["layers"])}
    try:
        return Config(**values)
    except InputError as e:
        text = re.sub(r"\w+", lambda word: family.keys.get(word[0], word[0]), str(e).removeprefix("config: "))
        raise InputError(f"{where}: {text}") from None


def config_to_hf(config: Config) -> dict[str, Any]:
    """config.json for the model_type that computes what ``config`` says, readable by transformers 4 and 5.

    Raises InputError that names the field when there is none.
    """
    # A Llama must have a width that is a multiple of its heads; a Mistral with no window is the same without that.
    name = (
        "gpt2"
        if config.positions == "learned"
        else "qwen3"
        if config.qk_norm
        else "mistral"
        if config.window or config.width % config.heads
        else "llama"
    )
    family = FAMILIES[name]
    ours = {f.name: getattr(config, f.name) for f in fields(config)} | {"kv_heads": config.G, "head_dim": config.D}
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": name}
    hf |= {key: only for key, only in family.constants.items() if only is not None}
    hf |= {key: ours[f] for f, key in family.keys.items()}
    if name == "gpt2":
        written = next((theirs for theirs, gelu in GELUS.items() if gelu == config.activation), config.activation)
        hf |= {"activation_function": written, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
        ours |= {"rope_theta": Config.rope_theta, "rope_scaling": None}  # not used
    else:
        scaling = {"rope_type": "llama3", **asdict(config.rope_scaling)} if config.rope_scaling else None
        hf |= {
            "sliding_window": config.window,
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": config.rope_theta},
        }
    if name == "qwen3":
        hf |= {"use_sliding_window": bool(config.window), "max_window_layers": 0 if config.window else config.layers}
    back = config_from_hf(hf, "save_hf")
    for key, value in ours.items():
        theirs = getattr(back, {"kv_heads": "G", "head_dim": "D"}.get(key, key))
        if theirs != value:
            raise _refuse("save_hf", f"config.{key}", f"{theirs!r} in a {name}, the nearest of Hugging Face", value)
    return hf


def hf_views(model: Decoder, family: Family) -> dict[str, Tensor]:
    """Each Hugging Face tensor by name, as the view of our parameter that holds it."""
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
            raise _refuse(folder / INDEX, "weight_map", "a JSON object of tensor and file names", shards)
        for name in shards.values():
            if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
                raise _refuse(folder / INDEX, "weight_map", "to .safetensors files beside it", name)
        names = set(shards.values())
    stored: dict[str, Entry] = {}
    for file in sorted(folder / name for name in names):
        for name, entry in check_safetensors(file).items():
            if name in stored:
                raise _refuse(folder, f"tensor {name}", "in one file", [stored[name][0].name, file.name])
            if not BUFFERS.fullmatch(name):
                stored[name] = file, name, *entry
    if any(name.startswith(family.prefix) for name in stored):
        return stored
    return {("" if name.startswith("lm_head.") else family.prefix) + name: entry for name, entry in stored.items()}


def _fit(folder: Path, views: Mapping[str, Tensor], stored: Mapping[str, Entry]) -> None:
    """Refuse tensors that are missing, unknown, of another shape or not floating."""
    for what, names in (("missing", views.keys() - stored), ("unknown", stored.keys() - views)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder}: {what} tensor {min(names)}{more}: wanted {len(views)}, got {len(stored)}")
    for name, view in views.items():
        _, _, dtype, shape = stored[name]
        if shape != tuple(view.shape) or dtype not in FLOATS:
            raise _refuse(folder, f"tensor {name}", f"{tuple(view.shape)}, floating", f"{shape}, {str(dtype)[6:]}")


def load_hf(folder: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Decoder:
    """The Decoder in a Hugging Face folder: config.json and model.safetensors, in one file or in shards.

    Names, shapes and dtypes are checked before memory is taken; then each tensor is copied from its mapped file to its
    place. ``dtype`` is that of the parameters, by default the one that holds every stored value exactly.

    Raises InputError for a bad or unsupported folder, TypeError when ``dtype`` is no floating one.
    """
    folder = Path(folder)
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"load_hf: dtype must be one of {[str(d)[6:] for d in FLOATS]}, got {dtype}")
    config = config_from_hf(folder)
    family = FAMILIES[read_json(folder / "config.json")["model_type"]]
    stored = _stored(folder, family)
    if config.layers > len(stored):
        raise _refuse(folder, family.keys["layers"], f"at most the {len(stored)} tensors there are", config.layers)
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

    Each file is written beside and renamed, config.json last. A tied head is stored once, as the embedding.
    ``tokenizer`` goes along: its separator is bos and eos, and transformers reads it when it has a tokenizer.json.

    Raises InputError when no model_type of Hugging Face computes the same, or the disk refuses.
    """
    folder, hf = Path(folder), config_to_hf(model.config)
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise _refuse(
            "save_hf", "tokenizer.vocab_size", f"at most the model's {model.config.vocab_size}", tokenizer.vocab_size
        )
    end, dtype = tokenizer.end if tokenizer is not None else None, str(model.embed.weight.dtype)[6:]
    hf |= {"bos_token_id": end, "eos_token_id": end, "dtype": dtype, "torch_dtype": dtype}
    views = hf_views(model, FAMILIES[hf["model_type"]])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{folder}: wanted a folder to write to ({e.strerror})") from e
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
