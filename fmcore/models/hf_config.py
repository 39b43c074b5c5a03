"""config.json of Hugging Face models to a ``Config`` and back, for gpt2, llama, mistral and qwen3.

One ``Family`` for each model_type holds both tables: ``keys`` maps the fields of a ``Config`` to the keys of
config.json, ``top`` and ``layer`` map our modules to the names of their tensors (``models/hf.py`` copies those).

What a ``Decoder`` cannot compute is refused with the key that asks for it, never approximated, and a ``Config`` is
exported only if importing the result gives it back: so the two directions cannot disagree. Dropout is not imported, and
is written as 0.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from fmcore.errors import InputError
from fmcore.files import read_json, short
from fmcore.kernels.rope import RopeScaling
from fmcore.models.decoder import Config

# Activations of GPT-2; of several names for one function the first is written.
GELUS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# What ``layer_types`` can say of the attention in a layer.
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


def refuse(where: Path | str, key: str, wanted: Any, got: Any) -> InputError:
    """The error to raise for a ``key`` of the file ``where`` that is not what was ``wanted``."""
    return InputError(f"{where}: {key} must be {wanted}, got {short(got)}")


def _value(where: Path | str, key: str, value: Any, kind: Any) -> Any:
    """``value`` itself if it is of ``kind``: bool, a finite float > 0, or (``int``, ``int | None``) an int > 0."""
    if kind is bool and type(value) is bool:
        return value
    if kind is float and type(value) in (int, float) and 0 < value < math.inf:
        return float(value)
    if kind not in (bool, float) and type(value) is int and 0 < value < 1 << 31:
        return value
    raise refuse(where, key, {bool: "true or false", float: "a positive number"}.get(kind, "an integer > 0"), value)


def _rope(where: Path | str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling`` of a ``Config``.

    transformers 4 writes the keys rope_theta and rope_scaling, 5 writes rope_parameters; a file that has both must say
    the same in both.
    """
    top = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    sources = {"": {key: hf.get(key) for key in top}}
    sources |= {key: hf.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    seen: dict[str, Any] = {}
    for place, source in sources.items():
        if not isinstance(source, dict):
            raise refuse(where, place, "a JSON object", source)
        for key, value in source.items():
            name = "rope_type" if key == "type" else key
            if value is not None and seen.setdefault(name, value) != value:
                raise refuse(where, f"{place}.{key}".strip("."), f"{seen[name]!r}, as it also says", value)
    kind, rotated = seen.pop("rope_type", "default"), seen.pop("partial_rotary_factor", 1.0)
    if kind not in ("default", "llama3"):
        raise refuse(where, "rope_scaling.rope_type", "default or llama3", kind)
    if rotated != 1.0:
        raise refuse(where, "partial_rotary_factor", "1.0", rotated)
    theta = _value(where, "rope_theta", seen.pop("rope_theta", 10000.0), float)
    types = {f.name: f.type for f in fields(RopeScaling)} if kind == "llama3" else {}
    for key in sorted(seen.keys() - types.keys() - {"original_max_position_embeddings"}):
        raise refuse(where, f"rope_scaling.{key}", f"absent with rope_type {kind}", seen[key])
    values = {key: _value(where, f"rope_scaling.{key}", seen.get(key), type_) for key, type_ in types.items()}
    if values and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise refuse(where, "rope_scaling.low_freq_factor", "less than high_freq_factor", values["low_freq_factor"])
    return {"rope_theta": theta, "rope_scaling": RopeScaling(**values) if values else None}


def _window(where: Path | str, hf: Mapping[str, Any], layers: int) -> int | None:
    """The sliding window if all layers have it, ``None`` if no layer has one; a mixture of both is refused."""
    model_type, first = hf["model_type"], 0
    # transformers ignores the key in a Llama.
    window = None if model_type == "llama" else hf["sliding_window"]
    if model_type == "qwen3":
        window = window if _value(where, "use_sliding_window", hf["use_sliding_window"], bool) else None
        first = hf["max_window_layers"]
    if window is not None:
        _value(where, "sliding_window", window, int)
        if type(first) is not int:
            raise refuse(where, "max_window_layers", "an integer", first)
    kinds = FULL if window is None or first >= layers else SLIDING if first <= 0 else FULL | SLIDING
    if types := hf.get("layer_types"):
        said = set(map(str, types)) if isinstance(types, list) else set()
        # Only a Qwen 3 reads the key; elsewhere it may say no more than the window does.
        kinds = said if model_type == "qwen3" or said == kinds else set()
    if kinds != FULL and (kinds != SLIDING or window is None):
        key, got = ("layer_types", types) if types else ("max_window_layers", first)
        raise refuse(where, key, f"the same for all layers and fit sliding_window={window}", got)
    return window if kinds == SLIDING else None


def config_from_hf(source: Path | str | Mapping[str, Any], where: Path | str = "config.json") -> Config:
    """The ``Config`` of a Hugging Face folder, or of what its config.json holds: gpt2, llama, mistral or qwen3.

    Raises ``InputError`` for anything that a ``Decoder`` cannot compute. It names the file (for a mapping: ``where``)
    and the key.
    """
    if not isinstance(source, Mapping):
        where = Path(source) / "config.json"
        if not where.is_file():
            raise InputError(f"{source}: wanted a Hugging Face folder on this machine, with a config.json, found none")
        source = read_json(where)
    model_type = source.get("model_type")
    # A tuple, because what a file says need not be hashable; likewise below.
    if model_type not in tuple(FAMILIES):
        raise refuse(where, "model_type", f"one of {', '.join(FAMILIES)}", model_type)
    family = FAMILIES[model_type]
    hf = family.defaults | dict(source)
    for key, only in family.constants.items():
        if hf.get(key) is not None and hf[key] != only:
            raise refuse(where, key, "absent" if only is None else repr(only), hf[key])
    values = dict(family.fixed)
    kinds = {f.name: f.type for f in fields(Config)}
    for ours, key in family.keys.items():
        if key not in hf:
            raise InputError(f"{where}: wanted {key}, which a {model_type} model must have, found none")
        if hf[key] is None and family.defaults.get(key, key) is None:
            values[ours] = 4 * values["width"] if ours == "ffn" else None
        elif ours != "activation":
            values[ours] = _value(where, key, hf[key], kinds[ours])
        elif hf[key] in tuple(GELUS):
            values[ours] = GELUS[hf[key]]
        else:
            raise refuse(where, key, f"one of {', '.join(GELUS)}", hf[key])
    if values["positions"] == "rope":
        values |= _rope(where, hf) | {"window": _window(where, hf, values["layers"])}
    try:
        return Config(**values)
    except InputError as e:
        text = re.sub(r"\w+", lambda word: family.keys.get(word[0], word[0]), str(e).removeprefix("config: "))
        raise InputError(f"{where}: {text}") from None


def _nearest_model_type(config: Config) -> str:
    """The only model_type that may compute what ``config`` says; ``config_to_hf`` finds out whether it does."""
    if config.positions == "learned":
        return "gpt2"
    if config.qk_norm:
        return "qwen3"
    # A Llama must have a width that is a multiple of its heads; a Mistral with no window is the same without that.
    return "mistral" if config.window or config.width % config.heads else "llama"


def config_to_hf(config: Config) -> dict[str, Any]:
    """config.json of the model_type that computes what ``config`` says, readable by transformers 4 and 5.

    Raises ``InputError`` that names the field when no model_type computes it.
    """
    model_type = _nearest_model_type(config)
    family = FAMILIES[model_type]
    ours = {f.name: getattr(config, f.name) for f in fields(config)} | {"kv_heads": config.G, "head_dim": config.D}
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": model_type}
    hf |= {key: only for key, only in family.constants.items() if only is not None}
    hf |= {key: ours[f] for f, key in family.keys.items()}
    if model_type == "gpt2":
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
    if model_type == "qwen3":
        hf |= {"use_sliding_window": bool(config.window), "max_window_layers": 0 if config.window else config.layers}
    back = config_from_hf(hf, "save_hf")
    for key, value in ours.items():
        theirs = getattr(back, {"kv_heads": "G", "head_dim": "D"}.get(key, key))
        if theirs != value:
            raise refuse(
                "save_hf", f"config.{key}", f"{theirs!r} in a {model_type}, the nearest of Hugging Face", value
            )
    return hf
