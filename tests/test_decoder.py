"""The decoder: packing, caching, windows, its loss, its parameters."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import GPT2, LLAMA, MISTRAL, QWEN3

from fmcore.errors import InputError
from fmcore.kernels.rope import RopeScaling
from fmcore.models.decoder import PRESETS, Cache, Decoder

CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "mistral": MISTRAL, "gelu": replace(LLAMA, activation="gelu")}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    """In fp64 and with parameters that all matter: fresh norms and biases would hide a norm or a bias left out."""
    model = Decoder(request.param).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def packed(lengths, T=12):
    """Random tokens (B, T) of documents of these lengths, their targets, positions and boundaries."""
    M = sum(lengths)
    tokens, targets = torch.randint(40, (2, M // T, T))
    targets.view(-1)[[1, M - 1]] = -100
    positions = torch.cat([torch.arange(n) for n in lengths]).view(-1, T)
    return tokens, targets, positions, torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("lengths", [(12, 12), (5, 7, 1, 3, 8), (4, 4, 4, 6, 6)])
def test_packed_documents_equal_each_one_alone(model, lengths):
    tokens, targets, positions, cu_seqlens = packed(lengths)
    logits = model(tokens, positions, cu_seqlens).flatten(0, 1)
    losses = model.loss(tokens, targets, positions, cu_seqlens, reduction="none")
    model.loss(tokens, targets, positions, cu_seqlens, reduction="sum").backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    documents = [t.flatten().split(lengths) for t in (tokens, targets)]
    for at, (document, target) in zip(cu_seqlens.tolist(), zip(*documents, strict=True), strict=False):
        part = slice(at, at + len(document))
        close(logits[part], model(document[None])[0])
        close(losses[part], model.loss(document[None], target[None], reduction="none"))
        model.loss(document[None], target[None], reduction="sum").backward()
    for p, g in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-9)


def test_a_token_sees_no_later_one(model):
    tokens = torch.randint(40, (1, 9))
    other = tokens.clone()
    other[0, 6:] = (other[0, 6:] + 1) % 40
    before, after = model(tokens), model(other)
    close(before[:, :6], after[:, :6])
    assert ((before[:, 6:] - after[:, 6:]).abs().amax(-1) > 1e-3).all()


def test_a_window_is_what_a_layer_sees():
    model = Decoder(replace(MISTRAL, layers=1)).double()
    tokens = torch.randint(40, (1, 9))
    other = tokens.clone()
    other[0, 2] = (other[0, 2] + 1) % 40
    changed = (model(tokens) - model(other)).abs().amax(-1)[0] > 1e-9
    assert changed.nonzero().flatten().tolist() == [2, 3, 4]


@pytest.mark.parametrize("steps", [(1,) * 10, (10,), (4, 1, 3, 2), (1, 9)])
def test_the_cache_changes_nothing(model, steps):
    tokens = torch.randint(40, (3, 10))
    cache = Cache(model.config, 3, 16, "cpu", torch.float64)
    got = torch.cat([model(part, cache=cache) for part in tokens.split(steps, 1)], 1)
    close(got, model(tokens))
    assert cache.lens.tolist() == [10, 10, 10] and cache.longest == 10


def test_the_cache_of_ragged_prompts(model):
    """Prompts padded on the right, lengths corrected, then two more tokens each."""
    lens = [1, 7, 4]
    tokens = torch.randint(40, (3, 9))
    cache = Cache(model.config, 3, 9, "cpu", torch.float64)
    prompts = tokens[:, :7].masked_fill(torch.arange(7) >= torch.tensor(lens)[:, None], 0)
    model(prompts, cache=cache)
    cache.lens = torch.tensor(lens)
    new = torch.randint(40, (3, 2))
    got = torch.cat([model(new[:, i : i + 1], cache=cache) for i in range(2)], 1)
    for i, n in enumerate(lens):
        close(got[i], model(torch.cat([tokens[i, :n], new[i]])[None])[0, -2:])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_is_cross_entropy_of_the_logits(model, reduction):
    tokens, targets, positions, cu_seqlens = packed((5, 7, 12))
    logits = model(tokens, positions, cu_seqlens)
    want = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
    close(model.loss(tokens, targets, positions, cu_seqlens, reduction), want)


def test_a_fresh_model_knows_nothing():
    """Its loss is that of a uniform guess, ln V."""
    for config in CONFIGS.values():
        model = Decoder(config)
        tokens = torch.randint(40, (8, 16))
        assert model.loss(tokens, torch.randint(40, (8, 16))).item() == pytest.approx(math.log(40), abs=0.05)


def shapes(config):
    C, D, H, G, F, V = config.width, config.D, config.heads, config.G, config.ffn, config.vocab_size
    norm = {"weight": (C,)} | ({"bias": (C,)} if config.norm == "layer" else {})
    linears = {
        "qkv": ((H + 2 * G) * D, C),
        "out": (C, H * D),
        "down": (C, F),
        "up": (2 * F if config.activation == "swiglu" else F, C),
    }
    found = {"embed.weight": (V, C)} | ({"pos.weight": (config.context, C)} if config.positions == "learned" else {})
    found |= {} if config.tied else {"head.weight": (V, C)}
    found |= {f"norm.{name}": s for name, s in norm.items()}
    for i in range(config.layers):
        found |= {f"layers.{i}.{n}.{name}": s for n in ("norm1", "norm2") for name, s in norm.items()}
        found |= {f"layers.{i}.{n}.weight": s for n, s in linears.items()}
        found |= {f"layers.{i}.{n}.bias": s[:1] for n, s in linears.items() if config.bias}
        found |= {f"layers.{i}.{n}.weight": (D,) for n in ("q_norm", "k_norm") if config.qk_norm}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters(name):
    model = Decoder(CONFIGS[name])
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == shapes(CONFIGS[name])
    assert set(model.state_dict()) == set(shapes(CONFIGS[name]))
    linears = [f"layers.{i}.{n}" for i in range(2) for n in ("qkv", "out", "up", "down")]
    assert [n for n, _ in model.linears()] == linears


@pytest.mark.parametrize("name, count", [
    ("gpt2-124m", 124_439_808), ("gpt2-350m", 354_823_168), ("gpt2-1.5b", 1_557_611_200),
    ("llama-3.2-1b", 1_235_814_400), ("llama-3.1-8b", 8_030_261_248), ("qwen3-0.6b", 596_049_920),
])  # fmt: skip
def test_presets_have_the_published_size(name, count):
    with torch.device("meta"):
        model = Decoder(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_initial_weights():
    model = Decoder(replace(GPT2, width=192, ffn=512))
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = name.endswith(("out.weight", "down.weight"))
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(4) if residual else 0.02, rel=0.05)
        else:
            assert (p == (0 if name.endswith("bias") else 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_after_inference(dtype):
    """What inference mode made on the way (the tables of rope) must not spoil a later backward pass."""
    model = Decoder(LLAMA).to(dtype)
    tokens = torch.randint(40, (1, 8))
    with torch.inference_mode():
        model(tokens)
    # Not every body of rope saves them as they are, but none may be in the way.
    assert not any(table.is_inference() for table in model.angles(8, tokens.device))
    model.loss(tokens, tokens).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_tables_grow_with_the_length():
    model = Decoder(replace(LLAMA, context=64)).double()
    twin = copy.deepcopy(model)
    tokens = torch.randint(40, (1, 40))
    steps = [model(tokens[:, :n]) for n in (3, 5, 40)]
    want = twin(tokens)
    for got in steps:
        close(got, want[:, : got.shape[1]])


@pytest.mark.parametrize("change, message", [
    ({"norm": "batch"}, "config: norm must be one of rms, layer, got 'batch'"),
    ({"activation": "relu"}, "config: activation must be one of swiglu, gelu_tanh, gelu, got 'relu'"),
    ({"positions": "alibi"}, "config: positions must be one of rope, learned, got 'alibi'"),
    ({"layers": 0}, "config: layers must be a positive integer, got 0"),
    ({"window": -1}, "config: window must be a positive integer, got -1"),
    ({"width": 64.0}, "config: width must be a positive integer, got 64.0"),
    ({"layers": True}, "config: layers must be a positive integer, got True"),
    ({"ffn": None}, "config: ffn must be a positive integer, got None"),
    ({"rope_theta": "1e4"}, "config: rope_theta must be a positive number, got '1e4'"),
    ({"norm_eps": float("nan")}, "config: norm_eps must be a positive number, got nan"),
    ({"init_std": 0.0}, "config: init_std must be a positive number, got 0.0"),
    ({"tied": "false"}, "config: tied must be true or false, got 'false'"),
    ({"rope_scaling": RopeScaling("8", 1.0, 4.0, 8192)},
     "config: rope_scaling must hold positive numbers, got RopeScaling(factor='8', low_freq_factor=1.0, "
     "high_freq_factor=4.0, original_max_position_embeddings=8192)"),
    ({"head_dim": None, "width": 25}, "config: width must be a multiple of heads=4, got 25"),
    ({"kv_heads": 3}, "config: heads must be a multiple of kv_heads=3, got 4"),
    ({"head_dim": 5}, "config: head_dim must be even for rope, got 5"),
])  # fmt: skip
def test_config_errors(change, message):
    with pytest.raises(InputError) as e:
        replace(LLAMA, **change)
    assert str(e.value) == message


def test_too_long():
    model = Decoder(LLAMA)
    with pytest.raises(ValueError, match="decoder: tokens must be at most context=16 long, got 17"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    cache = Cache(LLAMA, 1, 3, "cpu", torch.float32)
    model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="decoder: cache must have room for 4 tokens, got 3"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="decoder: cu_seqlens must be None with a cache"):
        model(torch.zeros(1, 1, dtype=torch.int64), cu_seqlens=torch.tensor([0, 1]), cache=cache)
