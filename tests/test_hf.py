"""Hugging Face folders both ways: the same logits as transformers, the same gradients, and clear refusals."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from fmcore.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from fmcore.errors import InputError
from fmcore.kernels.rope import RopeScaling
from fmcore.models.decoder import PRESETS, Config, Decoder
from fmcore.models.hf import load_hf, save_hf
from fmcore.models.hf_config import config_from_hf, config_to_hf

transformers = pytest.importorskip("transformers", reason="transformers is the other side of every comparison here")

T = 40
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
DENSE = {"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
GPT2 = {"vocab_size": 131, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
# name: (model_type, what differs from the sizes above, [new head size])
CASES = {
    "gpt2": ("gpt2", {}),
    "gpt2-wide-erf": ("gpt2", {"n_inner": 100, "activation_function": "gelu", "tie_word_embeddings": False}),
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-tied-llama3": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"rope_theta": 10000.0}}),
    "llama-mha-head-dim": ("llama", {"num_key_value_heads": 4, "head_dim": 24}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-window": ("qwen3", {"head_dim": 32, "use_sliding_window": True, "sliding_window": 7,
                               "max_window_layers": 0}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-full": ("mistral", {"sliding_window": None, "head_dim": 32}),
}  # fmt: skip


def hf_model(name: str):
    """A tiny random model of transformers. Norms and biases are random too, so that a mixed-up one shows."""
    model_type, changes = CASES[name]
    sizes = GPT2 if model_type == "gpt2" else DENSE
    config = transformers.AutoConfig.for_model(model_type, **(sizes | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.1 if p.ndim == 2 else 1 + 0.2 * noise)
    return model


def tokens(model, B: int = 2) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(2))


def plain(config: Config) -> Config:
    return dataclasses.replace(config, kv_heads=config.G, head_dim=config.D)


def reload(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_agree_with_transformers_both_ways(name, tmp_path):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    x = tokens(theirs)
    want = theirs(x).logits
    ours = load_hf(tmp_path / "theirs")
    # The promise is 1e-4; 3e-6 was measured on logits of about 1.
    assert ours.embed.weight.dtype == torch.float32 and want.std() > 0.5
    torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=0)

    save_hf(ours, tmp_path / "ours")
    back = reload(tmp_path / "ours")
    torch.testing.assert_close(back(x).logits, want, atol=1e-5, rtol=0)
    again = back.state_dict()
    assert all(torch.equal(t, again[key]) for key, t in theirs.state_dict().items())
    assert plain(config_from_hf(tmp_path / "ours")) == plain(ours.config)


@pytest.mark.parametrize("name", ["mistral-window", "qwen3-window"])
@torch.no_grad()
def test_the_window_is_read(name, tmp_path):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path)
    ours, x = load_hf(tmp_path), tokens(theirs)
    ours_full = Decoder(dataclasses.replace(ours.config, window=None))
    ours_full.load_state_dict(ours.state_dict())
    far = (ours_full(x) - theirs(x).logits).abs().amax((0, 2))
    assert far[:7].max() < 1e-4 and far[7:].max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_gradients_of_the_loss_agree_with_transformers(name, tmp_path):
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path)
    ours, x = load_hf(tmp_path), tokens(theirs)
    targets = torch.cat((x[:, 1:], torch.full((2, 1), -100)), 1)
    want = theirs(x, labels=x).loss
    want.backward()
    loss = ours.loss(x, targets)
    loss.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=0)
    # Gradients under the names of the other side: a model that holds them as its weights, exported.
    grads = Decoder(ours.config)
    grads.load_state_dict({key: p.grad for key, p in ours.named_parameters()})
    save_hf(grads, tmp_path / "grads")
    got = load_file(tmp_path / "grads/model.safetensors")
    assert got.keys() == {key for key, _ in theirs.named_parameters()}
    for key, p in theirs.named_parameters():
        torch.testing.assert_close(got[key], p.grad, atol=1e-5, rtol=1e-3, msg=lambda m, key=key: f"{key}: {m}")


@torch.no_grad()
def test_shards_buffers_base_models_and_a_stored_tied_head(tmp_path):
    theirs = hf_model("gpt2")
    x = tokens(theirs)
    want = theirs(x).logits
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(load_hf(tmp_path / "shards")(x), want, atol=1e-5, rtol=0)

    # As the first GPT-2 folders are: no prefix, masks among the weights.
    theirs.transformer.save_pretrained(tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    tensors = load_file(file)
    assert "wte.weight" in tensors
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}, file)
    torch.testing.assert_close(load_hf(tmp_path / "base")(x), want, atol=1e-5, rtol=0)

    # As the Qwen 3 folders are: tied, and the head is stored all the same.
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, file)
    torch.testing.assert_close(load_hf(tmp_path / "base")(x), want, atol=1e-5, rtol=0)
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"] + 1}, file)
    with pytest.raises(InputError, match="lm_head.weight must equal the embedding, as tie_word_embeddings is true"):
        load_hf(tmp_path / "base")


def test_dtypes(tmp_path):
    model = Decoder(SMALL).to(torch.bfloat16)
    save_hf(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = load_hf(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert {p.dtype for p in load_hf(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())
    assert reload(tmp_path).dtype == torch.bfloat16
    # A norm kept in fp32 is not rounded.
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.full((32,), 1.0001)}, tmp_path / "model.safetensors")
    loaded = load_hf(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and loaded.norm.weight[0] == torch.tensor(1.0001)
    with pytest.raises(TypeError, match="load_hf: dtype must be one of .*float32.*, got torch.int64"):
        load_hf(tmp_path, dtype=torch.int64)


def test_parameters_are_memory_of_their_own(tmp_path):
    save_hf(Decoder(SMALL), tmp_path)
    model = load_hf(tmp_path)
    before = {key: p.clone() for key, p in model.state_dict().items()}
    size = (tmp_path / "model.safetensors").stat().st_size
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    assert all(torch.equal(p, before[key]) for key, p in model.state_dict().items())


def test_tokenizer_goes_along(tmp_path):
    texts = ["def f(x):\n    return x + 12345\n" * 20, "once more, with feeling: it's 3.14\n" * 20]
    bpe = BPETokenizer.train(texts, 300)
    config = dataclasses.replace(SMALL, vocab_size=bpe.vocab_size)
    save_hf(Decoder(config), tmp_path / "bpe", bpe)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bpe")
    for text in texts:
        assert theirs(text)["input_ids"] == bpe.encode(text).tolist()
    model = reload(tmp_path / "bpe")
    assert theirs.eos_token_id == model.config.eos_token_id == model.config.bos_token_id == bpe.end
    assert load_tokenizer(tmp_path / "bpe").fingerprint() == bpe.fingerprint()

    with pytest.raises(InputError, match="save_hf: tokenizer.vocab_size must be at most the model's 100, got"):
        save_hf(Decoder(dataclasses.replace(SMALL, vocab_size=100)), tmp_path / "small", bpe)
    assert not (tmp_path / "small").exists()
    save_hf(Decoder(dataclasses.replace(SMALL, vocab_size=257)), tmp_path / "byte", ByteTokenizer())
    assert not (tmp_path / "byte/tokenizer.json").exists() and reload(tmp_path / "byte").config.eos_token_id == 256
    assert load_tokenizer(tmp_path / "byte").end == 256


SMALL = Config(vocab_size=64, layers=2, width=32, heads=4, kv_heads=2, ffn=48, context=64)
SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize("config", [
    *PRESETS.values(), SMALL, dataclasses.replace(SMALL, rope_scaling=SCALING, rope_theta=77.5, norm_eps=1e-3),
    dataclasses.replace(SMALL, window=5), dataclasses.replace(SMALL, window=5, qk_norm=True, head_dim=64),
    dataclasses.replace(SMALL, width=30, head_dim=16), dataclasses.replace(PRESETS["gpt2-124m"], activation="gelu"),
], ids=lambda c: f"{c.width}-{c.layers}-{c.window}")  # fmt: skip
def test_configs_survive_the_round_trip(config):
    hf = json.loads(json.dumps(config_to_hf(config)))
    back = config_from_hf(hf)
    assert plain(back) == plain(config)
    theirs = transformers.AutoConfig.for_model(**hf)
    assert theirs.model_type == hf["model_type"]
    if config.positions == "rope":
        assert theirs.rope_parameters == hf["rope_parameters"] and theirs.head_dim == config.D


@pytest.mark.parametrize("name, count", [
    ("gpt2-124m", 124_439_808), ("gpt2-350m", 354_823_168), ("gpt2-1.5b", 1_557_611_200),
    ("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248), ("qwen3-0.6b", 596_049_920),
])  # fmt: skip
def test_presets_have_the_sizes_of_their_models(name, count):
    with torch.device("meta"):
        ours = Decoder(PRESETS[name])
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**config_to_hf(PRESETS[name]))
        )
    assert sum(p.numel() for p in ours.parameters()) == count == sum(p.numel() for p in theirs.parameters())


LLAMA_JSON = {"model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "max_position_embeddings": 64}  # fmt: skip
MISTRAL_JSON, QWEN3_JSON = (LLAMA_JSON | {"model_type": name} for name in ("mistral", "qwen3"))
SAME = "layer_types must be the same for all layers and fit sliding_window="
GPT2_JSON = {"model_type": "gpt2"} | GPT2


def test_keys_of_transformers_4_and_5():
    five = LLAMA_JSON | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}
    four = LLAMA_JSON | {"rope_theta": 500000, "rope_scaling": {"type": "llama3", **LLAMA3}}
    assert config_from_hf(five) == config_from_hf(four) == config_from_hf(four | five)
    assert config_from_hf(five).rope_scaling == RopeScaling(4.0, 1.0, 4.0, 16)
    assert config_from_hf(five).rope_theta == 5e5
    plain = config_from_hf(LLAMA_JSON)
    assert plain.rope_theta == 10000.0 and plain.rope_scaling is None and not plain.tied and plain.norm_eps == 1e-6
    assert config_from_hf(LLAMA_JSON | {"rope_scaling": {"type": "default"}, "rope_theta": 10000}) == plain
    no_heads = {key: value for key, value in LLAMA_JSON.items() if key != "num_key_value_heads"}
    assert config_from_hf(no_heads).G == 4
    assert config_from_hf(GPT2_JSON).ffn == 256 and config_from_hf(GPT2_JSON).tied


def test_windows():
    assert config_from_hf(MISTRAL_JSON).window == 4096
    assert config_from_hf(MISTRAL_JSON | {"sliding_window": None}).window is None
    qwen3 = QWEN3_JSON | {"head_dim": 8, "sliding_window": 9}
    assert config_from_hf(qwen3).window is None
    on = qwen3 | {"use_sliding_window": True}
    assert config_from_hf(on | {"max_window_layers": 0}).window == 9
    assert config_from_hf(on | {"max_window_layers": 2}).window is None
    assert config_from_hf(on | {"layer_types": ["sliding_attention"] * 2}).window == 9
    assert config_from_hf(on | {"layer_types": ["full_attention"] * 2}).window is None


@pytest.mark.parametrize("hf, message", [
    ({}, "model_type must be one of gpt2, llama, mistral, qwen3, got None"),
    ({"model_type": "mamba"}, "model_type must be one of gpt2, llama, mistral, qwen3, got 'mamba'"),
    ({"model_type": ["llama"]}, "model_type must be one of"),
    ({"model_type": "llama"}, "wanted vocab_size, which a llama model must have, found none"),
    (LLAMA_JSON | {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
    (LLAMA_JSON | {"attention_bias": True}, "attention_bias must be False, got True"),
    (LLAMA_JSON | {"mlp_bias": True}, "mlp_bias must be False, got True"),
    (QWEN3_JSON | {"attention_bias": True}, "attention_bias must be False, got True"),
    (LLAMA_JSON | {"quantization_config": {"bits": 4}}, "quantization_config must be absent, got {'bits': 4}"),
    (LLAMA_JSON | {"num_hidden_layers": "2"}, "num_hidden_layers must be an integer > 0, got '2'"),
    (LLAMA_JSON | {"num_hidden_layers": True}, "num_hidden_layers must be an integer > 0, got True"),
    (LLAMA_JSON | {"hidden_size": -32}, "hidden_size must be an integer > 0, got -32"),
    (LLAMA_JSON | {"hidden_size": None}, "hidden_size must be an integer > 0, got None"),
    (LLAMA_JSON | {"hidden_size": 10**40}, "hidden_size must be an integer > 0, got 1000"),
    (LLAMA_JSON | {"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
    (LLAMA_JSON | {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
    (LLAMA_JSON | {"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads=3, got 32"),
    (LLAMA_JSON | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
     "rope_scaling.rope_type must be default or llama3, got 'yarn'"),
    (LLAMA_JSON | {"rope_scaling": {"type": "linear", "factor": 4.0}},
     "rope_scaling.rope_type must be default or llama3, got 'linear'"),
    (LLAMA_JSON | {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
     "rope_scaling.low_freq_factor must be a positive number, got None"),
    (LLAMA_JSON | {"rope_scaling": LLAMA3 | {"factor": "4"}}, "rope_scaling.factor must be a positive number, got '4'"),
    (LLAMA_JSON | {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
     "rope_scaling.low_freq_factor must be less than high_freq_factor, got 4.0"),
    (LLAMA_JSON | {"rope_scaling": LLAMA3 | {"beta_fast": 3}},
     "rope_scaling.beta_fast must be absent with rope_type llama3"),
    (LLAMA_JSON | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention must be absent with"),
    (LLAMA_JSON | {"rope_scaling": "llama3"}, "rope_scaling must be a JSON object, got 'llama3'"),
    (LLAMA_JSON | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
     "rope_parameters.rope_theta must be 10000.0, as it also says, got 500000.0"),
    (LLAMA_JSON | {"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
    (LLAMA_JSON | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0, got 0.5"),
    (LLAMA_JSON | {"layer_types": ["full_attention", "sliding_attention"]}, SAME),
    (MISTRAL_JSON | {"layer_types": ["full_attention"] * 2}, SAME),
    (QWEN3_JSON | {"use_sliding_window": True, "max_window_layers": 1},
     "max_window_layers must be the same for all layers and fit sliding_window=4096, got 1"),
    (QWEN3_JSON | {"layer_types": ["sliding_attention"] * 2}, SAME),
    (LLAMA_JSON | {"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads=3, got 4"),
    (QWEN3_JSON | {"layer_types": ["chunked_attention"] * 2}, SAME),
    (QWEN3_JSON | {"layer_types": [[]]}, SAME),
    (GPT2_JSON | {"activation_function": "relu"},
     "activation_function must be one of gelu_new, gelu_pytorch_tanh, gelu, got 'relu'"),
    (GPT2_JSON | {"activation_function": ["gelu"]}, "activation_function must be one of"),
    (GPT2_JSON | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False, got True"),
    (GPT2_JSON | {"scale_attn_weights": False}, "scale_attn_weights must be True, got False"),
    (GPT2_JSON | {"n_head": 5}, "n_embd must be a multiple of n_head=5, got 64"),
])  # fmt: skip
def test_configs_that_are_refused(hf, message):
    with pytest.raises(InputError, match="config.json: .*" + re.escape(message)) as e:
        config_from_hf(hf)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("changes, message", [
    ({"norm": "layer"}, "config.norm must be 'rms' in a llama, the nearest of Hugging Face, got 'layer'"),
    ({"activation": "gelu"}, "config.activation must be 'swiglu' in a llama"),
    ({"bias": True}, "config.bias must be False in a llama"),
    ({"positions": "learned"}, "activation_function must be one of gelu_new, gelu_pytorch_tanh, gelu, got 'swiglu'"),
    ({"positions": "learned", "activation": "gelu"}, "config.kv_heads must be 4 in a gpt2, the nearest"),
    ({"positions": "learned", "activation": "gelu", "kv_heads": 4}, "config.norm must be 'layer' in a gpt2"),
    ({"qk_norm": True, "norm": "layer"}, "config.norm must be 'rms' in a qwen3"),
])  # fmt: skip
def test_configs_that_no_model_type_expresses(changes, message, tmp_path):
    with pytest.raises(InputError, match="save_hf: " + re.escape(message)):
        save_hf(Decoder(dataclasses.replace(SMALL, **changes)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def folder(tmp_path):
    """A good folder, the names of its files and its tensors."""
    save_hf(Decoder(SMALL), tmp_path)
    return tmp_path


def change(folder, **json_changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | json_changes))


def test_tensors_that_do_not_fit(folder):
    file, q = folder / "model.safetensors", "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(file)
    for damage, message in (
        ({q: None}, f"missing tensor {q}: wanted 21, got 20"),
        ({q: None, "lm_head.weight": None}, "missing tensor lm_head.weight and 1 more: wanted 21, got 19"),
        ({"model.layers.2.mlp.down_proj.weight": torch.ones(2)}, "unknown tensor model.layers.2.mlp.down_proj.weight"),
        ({q.replace("weight", "bias"): torch.ones(32)}, "unknown tensor model.layers.1.self_attn.q_proj.bias"),
        ({q: torch.ones(16, 32)}, f"tensor {q} must be (32, 32), floating, got '(16, 32), float32'"),
        ({q: torch.ones(32, 32, dtype=torch.int8)}, f"tensor {q} must be (32, 32), floating, got '(32, 32), int8'"),
    ):
        save_file({key: t for key, t in (tensors | damage).items() if t is not None}, file)
        with pytest.raises(InputError, match=re.escape(f"{folder}: {message}")):
            load_hf(folder)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_hf(folder)


def test_sizes_that_do_not_fit(folder):
    change(folder, num_hidden_layers=10**9)
    with pytest.raises(InputError, match="num_hidden_layers must be at most the 21 tensors there are, got 1000000000"):
        load_hf(folder)
    change(folder, num_hidden_layers=2, head_dim=2**30, num_attention_heads=2**30, num_key_value_heads=2**30)
    with pytest.raises(InputError, match="sizes beyond what a tensor can have"):
        load_hf(folder)


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(InputError, match="openai/gpt2: wanted a Hugging Face folder on this machine, with a "):
        load_hf("openai/gpt2")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(InputError, match="wanted model.safetensors or model.safetensors.index.json, found neither$"):
        load_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="found neither: save it again with safe_serialization=True"):
        load_hf(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: wanted JSON"):
        load_hf(folder)


def test_an_index_cannot_leave_its_folder(folder):
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    index = folder / "model.safetensors.index.json"
    up = "../outside.safetensors"
    for name in (up, str(outside), f"a/../{up}", f"a.safetensors/../{up}", ".x.safetensors", "x.bin", 3):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        with pytest.raises(InputError, match="weight_map must be to .safetensors files beside it, got"):
            load_hf(folder)
    for wrong in ({}, {"weight_map": []}, {"weight_map": {}}):
        index.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match="weight_map must be a JSON object"):
            load_hf(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "lost.safetensors"}}))
    with pytest.raises(InputError, match="lost.safetensors: wanted a file, found none"):
        load_hf(folder)
    tensors = load_file(outside)
    save_file(tensors, folder / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "b.safetensors")
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "b.safetensors", "x": "a.safetensors"}}))
    with pytest.raises(InputError, match="norm.weight must be in one file, got .'a.safetensors', 'b.safetensors'"):
        load_hf(folder)


def test_an_export_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot make this folder"):
        save_hf(Decoder(SMALL), tmp_path / "file")
    model = Decoder(SMALL)
    model.layers[0].qkv.extra = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="layers.0.qkv.extra.weight has no place in a LlamaForCausalLM: merge"):
        save_hf(model, tmp_path / "out")
