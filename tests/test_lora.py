"""Adapters: their mathematics against dense weights, switching off, merging, and PEFT's own reading of the files."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import GPT2, LLAMA, MISTRAL, QWEN3
from torch.utils._python_dispatch import TorchDispatchMode

from fmcore.adapt.lora import (
    LoraConfig,
    LoraLinear,
    adapter_parameters,
    adapter_size,
    add_lora,
    base_state_dict,
    lora_modules,
    lora_off,
    merge_lora,
    projections,
)
from fmcore.adapt.peft import load_adapter, save_adapter
from fmcore.errors import InputError
from fmcore.files import read_safetensors, write_safetensors
from fmcore.models.decoder import Decoder
from fmcore.models.hf import save_hf
from fmcore.optim import AdamW

CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "mistral": MISTRAL}
LORA = LoraConfig(rank=3, alpha=5.0)


def decoder(config=LLAMA, dtype=torch.float64):
    model = Decoder(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def trained(model, config=LORA):
    """With an adapter whose B is not zero."""
    add_lora(model, config)
    with torch.no_grad():
        for m in lora_modules(model):
            m.lora_b.normal_()
    return model


def tokens(B=2, T=12):
    return torch.randint(40, (B, T))


def dense(m):
    """The weight of an adapted layer with its adapter in, by the definition."""
    w = m.weight.clone()
    scale = m.config.alpha / (m.config.rank**0.5 if m.config.rslora else m.config.rank)
    at = 0
    for i, rows in enumerate(m.rows):
        n = rows.stop - rows.start
        a, b = m.lora_a[i * m.config.rank : (i + 1) * m.config.rank], m.lora_b[at : at + n]
        w[rows] = w[rows] + scale * b @ a
        at += n
    assert at == len(m.lora_b) and len(m.rows) * m.config.rank == len(m.lora_a)
    return w


# Layer rows 10 = 4 + 3 + 3; adapters on all, some or one of the projections.
ROWS = [(slice(0, 10),), (slice(0, 4), slice(4, 7), slice(7, 10)), (slice(0, 4), slice(7, 10)), (slice(4, 7),)]


def layer(rows, config=LORA, bias=True, dtype=torch.float64):
    m = LoraLinear(torch.nn.Linear(6, 10, bias=bias, dtype=dtype), rows, config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        m.lora_b.normal_()
    return m


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [LORA, replace(LORA, rslora=True)], ids=["lora", "rslora"])
@pytest.mark.parametrize("rows", ROWS)
def test_a_layer_equals_its_dense_weight(rows, config, bias):
    """Outputs and every gradient, that of the base too, should somebody train it."""
    m = layer(rows, config, bias)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, *m.parameters()]
    got, want = m(x), F.linear(x, dense(m), m.bias)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    g = torch.randn_like(got)
    for a, b in zip(torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradcheck():
    m = layer(ROWS[2], replace(LORA, rank=1))
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def f(x, a, b):
        return torch.func.functional_call(m, {"lora_a": a, "lora_b": b}, (x,))

    assert torch.autograd.gradcheck(f, (x, m.lora_a, m.lora_b))


def test_gradients_of_expanded_and_missing_inputs():
    """A stride-0 incoming gradient, and an input that needs none."""
    m = layer(ROWS[1])
    x = torch.randn(5, 6, dtype=torch.float64)
    m(x).sum().backward()
    want = torch.autograd.grad(F.linear(x, dense(m), m.bias).sum(), (m.lora_a, m.lora_b))
    for p, g in zip((m.lora_a, m.lora_b), want, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_dropout():
    """One mask for the adapter's input, the same in both directions; the base sees all of the input."""
    m = layer(ROWS[1], replace(LORA, dropout=0.4))
    x = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(7)
    got = m(x)
    torch.manual_seed(7)
    delta = dense(m) - m.weight
    want = F.linear(x, m.weight, m.bias) + F.linear(F.dropout(x, 0.4), delta)
    torch.testing.assert_close(got, want)
    g, wanted = torch.randn_like(got), [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, wanted, g) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    m.eval()
    torch.testing.assert_close(m(x), F.linear(x, dense(m), m.bias))


class Products(TorchDispatchMode):
    """Multiply-adds of all matrix products, and the tensors that autograd keeps."""

    def __init__(self):
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = (args[-2], args[-1])
            self.work += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def test_work_and_memory_of_a_frozen_layer():
    """4 MNK for the base (forward and dx, no dw), 6 MR(N + K) for the adapter; x and S are all that is kept."""
    M, N, K, R = 32, 10, 6, 3
    m = layer(ROWS[0])
    m.weight.requires_grad_(False), m.bias.requires_grad_(False)
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    kept = []
    with Products() as products, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        m(x).sum().backward()
    assert 2 * products.work == 4 * M * N * K + 6 * M * R * (N + K)
    parameters = {p.data_ptr() for p in m.parameters()}
    assert sorted(tuple(t.shape) for t in kept if t.data_ptr() not in parameters) == [(M, R), (M, K)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_fresh_adapter_changes_nothing(config):
    """Bit for bit."""
    model, x = decoder(config, torch.float32), tokens()
    want = model(x)
    add_lora(model, LORA)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_off_is_the_base_bit_for_bit(config, dtype):
    model, x = decoder(config, dtype), tokens()
    want = model(x)
    trained(model)
    with lora_off(model):
        assert torch.equal(model(x), want)
        with lora_off(model):
            assert torch.equal(model(x), want)
        assert torch.equal(model(x), want)
    assert not torch.allclose(model(x), want)
    with pytest.raises(KeyError), lora_off(model):
        raise KeyError
    assert all(m.enabled for m in lora_modules(model))


def test_what_trains():
    model = add_lora(decoder(), LORA)
    own = adapter_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(own)
    assert len(own) == 2 * 4 * 2 and set(name.rpartition(".")[2] for name in own) == {"lora_a", "lora_b"}
    # q 24, k 12, v 12, o 24 of width 24; gate 40, up 40 of 24; down 24 of 40.
    sizes = [(24, 24), (12, 24), (12, 24), (24, 24), (40, 24), (40, 24), (24, 40)]
    assert adapter_size(model) == 2 * 3 * sum(n + k for n, k in sizes)


def test_the_start_is_that_of_peft():
    """A uniform within 1 / sqrt(K), another one in every layer, the same for the same seed; B zero."""
    one, two, other = (add_lora(decoder(replace(LLAMA, width=240)), LORA, seed=s) for s in (5, 5, 6))
    for (name, p), q, r in zip(
        adapter_parameters(one).items(),
        adapter_parameters(two).values(),
        adapter_parameters(other).values(),
        strict=True,
    ):
        assert torch.equal(p, q)
        if name.endswith("lora_b"):
            assert (p == 0).all()
            continue
        bound = p.shape[1] ** -0.5
        assert not torch.equal(p, r)
        assert 0.9 * bound < p.abs().max() <= bound and p.mean().abs() < 0.1 * bound
    starts = [m.lora_a for m in lora_modules(one) if m.in_features == 240]
    assert len({p[0, 0].item() for p in starts}) == len(starts)


@pytest.mark.parametrize(
    "targets, layers",
    [
        (("q", "v"), {"qkv": [slice(0, 24), slice(36, 48)]}),
        (("v", "q"), {"qkv": [slice(0, 24), slice(36, 48)]}),
        (("k", "up", "o"), {"qkv": [slice(24, 36)], "out": [slice(0, 24)], "up": [slice(40, 80)]}),
        (("gate", "down"), {"up": [slice(0, 40)], "down": [slice(0, 24)]}),
    ],
)
def test_targets(targets, layers):
    model = trained(decoder(), LoraConfig(rank=2, targets=targets))
    for block in model.layers:
        assert {n: list(m.rows) for n, m in block.named_children() if isinstance(m, LoraLinear)} == layers
    x = tokens()
    got = model(x)
    with torch.no_grad():
        for m in lora_modules(model):
            m.weight.copy_(dense(m))
    with lora_off(model):
        torch.testing.assert_close(model(x), got)


def test_names_of_the_base_stay(tmp_path):
    model = decoder()
    before, twin = model.state_dict(), Decoder(LLAMA).double()
    trained(model)
    after = base_state_dict(model)
    assert list(after) == list(before) and all(after[name] is not None for name in before)
    twin.load_state_dict(after)
    x = tokens()
    with lora_off(model):
        assert torch.equal(twin(x), model(x))
    missing, unexpected = model.load_state_dict(before, strict=False)
    assert set(missing) == set(adapter_parameters(model)) and not unexpected
    assert [n for n, _ in model.linears()] == [n for n, _ in twin.linears()]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_equals_adapted(config):
    model, x = trained(decoder(config)), tokens()
    want = model(x)
    merged = merge_lora(model)
    assert merged is model and not lora_modules(model)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-11)
    assert set(model.state_dict()) == set(Decoder(config).state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert all(type(m) is torch.nn.Linear for _, m in model.linears())
    model.loss(x, x).backward()
    add_lora(model, LORA)


def test_merging_half_precision_rounds_once():
    model = trained(decoder(dtype=torch.bfloat16))
    want = [dense(m.double()) for m in lora_modules(copy.deepcopy(model))]
    names = [n for n, m in model.named_modules() if isinstance(m, LoraLinear)]
    merge_lora(model)
    for name, w in zip(names, want, strict=True):
        got = model.get_submodule(name).weight
        # Half a unit of bf16 for the rounding, and what fp32 sums may move across the middle between two numbers.
        assert ((got.double() - w).abs() <= 2**-8 * w.abs() + 1e-6).all()


def test_training_moves_the_adapter_alone():
    model, x = decoder(dtype=torch.float32), tokens()
    before = {n: p.clone() for n, p in model.named_parameters()}
    add_lora(model, replace(LORA, dropout=0.1))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(40):
        loss = model.loss(x, x.roll(-1, 1))
        loss.backward()
        optimizer.step(clip=1.0)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = base_state_dict(model)
    assert all(torch.equal(after[n], p) for n, p in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=2, alpha=4.0, dropout=0.1, targets=("o", "up"), rslora=True)])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_saved_and_loaded(tmp_path, config, lora, dtype):
    base = decoder(config, dtype)
    model = trained(copy.deepcopy(base), lora).eval()
    assert save_adapter(model, tmp_path / "a" / "b", base="the/base") == tmp_path / "a" / "b"
    x = tokens()
    loaded = load_adapter(copy.deepcopy(base), tmp_path / "a" / "b").eval()
    assert torch.equal(loaded(x), model(x))
    saved, found = lora_modules(model)[0].config, lora_modules(loaded)[0].config
    targets = tuple(p.target for p in projections(config)) if saved.targets == "all" else saved.targets
    assert found == replace(saved, targets=targets)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(adapter_parameters(loaded))
    # Into a model that has the like of it already.
    again = add_lora(copy.deepcopy(base), lora, seed=9).eval()
    assert torch.equal(load_adapter(again, tmp_path / "a" / "b")(x), model(x))
    settings = json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "the/base"


def test_keys_of_the_file(tmp_path):
    save_adapter(trained(decoder(), LoraConfig(rank=2, targets=("q", "down"))), tmp_path)
    found = {n: tuple(t.shape) for n, t in read_safetensors(tmp_path / "adapter_model.safetensors").items()}
    want = {}
    for i in range(2):
        path = f"base_model.model.model.layers.{i}"
        want |= {
            f"{path}.self_attn.q_proj.lora_A.weight": (2, 24),
            f"{path}.self_attn.q_proj.lora_B.weight": (24, 2),
            f"{path}.mlp.down_proj.lora_A.weight": (2, 40),
            f"{path}.mlp.down_proj.lora_B.weight": (24, 2),
        }
    assert found == want
    save_adapter(trained(decoder(GPT2), LoraConfig(rank=2, targets=("qkv", "o"))), tmp_path)
    found = {n: tuple(t.shape) for n, t in read_safetensors(tmp_path / "adapter_model.safetensors").items()}
    path = "base_model.model.transformer.h.1.attn"
    assert found[f"{path}.c_attn.lora_B.weight"] == (72, 2) and found[f"{path}.c_proj.lora_A.weight"] == (2, 24)
    assert len(found) == 8
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] and settings["target_modules"] == ["c_attn", "attn.c_proj"]


@pytest.fixture(scope="module")
def hugging_face():
    """``(base, folder)`` -> the exported base, read by transformers, in fp64; ``PeftModel`` beside it."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

    def read(base, folder):
        save_hf(base, folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()

    return read, peft


@pytest.mark.parametrize("lora", [LORA, LoraConfig(rank=2, targets=("o", "down"), rslora=True)], ids=["all", "two"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_reads_what_is_written(tmp_path, hugging_face, config, lora):
    """PEFT puts the adapter onto the exported base: the same logits, and the same set of keys when it saves."""
    read, peft = hugging_face
    model = decoder(config)
    theirs = read(model, tmp_path / "base")
    save_adapter(trained(model, lora), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", autocast_adapter_dtype=False).eval()
    x = tokens()
    # The tables of rope are fp32 in both, not the same bits: 3e-6 here, 5e-15 without rope.
    torch.testing.assert_close(theirs(x).logits, model(x), rtol=0, atol=1e-5)
    with lora_off(model):
        assert not torch.allclose(theirs(x).logits, model(x), rtol=0, atol=1e-1)
    theirs.save_pretrained(tmp_path / "back")
    ours, back = (read_safetensors(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "back"))
    assert ours.keys() == back.keys() and all(torch.equal(ours[n], back[n]) for n in ours)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_writes_is_read(tmp_path, hugging_face, config):
    """An adapter made by PEFT with its own defaults, dropout and bare module names."""
    read, peft = hugging_face
    model = decoder(config)
    names = ["c_attn", "c_proj"] if config is GPT2 else ["q_proj", "v_proj", "up_proj"]
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.05,
        target_modules=names,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        fan_in_fan_out=config is GPT2,
    )
    theirs = peft.get_peft_model(read(model, tmp_path / "base"), settings, autocast_adapter_dtype=False).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter").eval()
    assert lora_modules(model)[0].config.targets == (("qkv", "o", "down") if config is GPT2 else ("q", "v", "up"))
    x = tokens()
    torch.testing.assert_close(model(x), theirs(x).logits, rtol=0, atol=1e-5)


@pytest.fixture
def saved(tmp_path):
    """The folder of a good adapter, and ``edit`` to change its settings."""
    save_adapter(trained(decoder(dtype=torch.float32)), tmp_path)

    def edit(**changes):
        path = tmp_path / "adapter_config.json"
        settings = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in settings.items() if v is not ...}))

    return tmp_path, edit


def refused(folder, config=LLAMA, model=None):
    """The message of the one-line error; the model is then as it was."""
    model = model or decoder(config, torch.float32)
    before, x = {n: t.clone() for n, t in model.state_dict().items()}, tokens()
    want = model(x)
    with pytest.raises(InputError) as e:
        load_adapter(model, folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(model(x), want)
    return str(e.value)


@pytest.mark.parametrize("changes, message", [
    ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
    ({"peft_type": ...}, "peft_type must be 'LORA', got None"),
    ({"use_dora": True}, "use_dora is not supported, got True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported, got ['lm_head']"),
    ({"bias": "all"}, "bias is not supported, got 'all'"),
    ({"lora_bias": True}, "lora_bias is not supported, got True"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is not supported, got {'q_proj': 4}"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern is not supported, got {'q_proj': 4}"),
    ({"layers_to_transform": [0]}, "layers_to_transform is not supported, got [0]"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices is not supported, got [3]"),
    ({"something_new": 1.5}, "something_new is not supported, got 1.5"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes the base model"),
    ({"init_lora_weights": ["x"]}, "init_lora_weights ['x'] changes the base model"),
    ({"use_rslora": "yes"}, "use_rslora must be true or false, got 'yes'"),
    ({"r": 0}, "rank must be a positive integer, got 0"),
    ({"r": "8"}, "rank must be a positive integer, got '8'"),
    ({"r": True}, "rank must be a positive integer, got True"),
    ({"lora_alpha": -1}, "alpha must be a positive number, got -1"),
    ({"lora_alpha": [1]}, "alpha must be a positive number, got [1]"),
    ({"lora_dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
    ({"r": 4}, "lora_A.weight must be (4, 40) floating, got (3, 40) float32; is the adapter for another model?"),
    ({"target_modules": ["q_proj"]}, "target_modules mean ['q'], but adapter_model.safetensors holds ['down', 'gate'"),
    ({"target_modules": ["c_attn"]}, "target_modules must name layers of this model, got 'c_attn'"),
    ({"target_modules": [3]}, "target_modules must be a list of names, got [3]"),
    ({"target_modules": {"a": 1}}, "target_modules must be a list of names, got {'a': 1}"),
])  # fmt: skip
def test_settings_that_do_not_fit(saved, changes, message):
    folder, edit = saved
    edit(**changes)
    got = refused(folder)
    assert message in got and got.startswith(f"{folder}/adapter_")


@pytest.mark.parametrize("changes", [
    {"target_modules": "all-linear"}, {"target_modules": ".*proj"}, {"target_modules": None}, {"target_modules": ...},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": True}, {"peft_version": "0.21.0"}, {"lora_bias": False},
    {"lora_dropout": ..., "use_rslora": ...}, {"exclude_modules": ["lm_head"]},
])  # fmt: skip
def test_settings_that_change_nothing(saved, changes):
    folder, edit = saved
    x, base = tokens(), decoder(dtype=torch.float32)
    want = load_adapter(copy.deepcopy(base), folder)(x)
    edit(**changes)
    assert torch.equal(load_adapter(base, folder)(x), want)


@pytest.mark.parametrize("config, message", [
    (GPT2, "fits no layer of this model; is the adapter for another one?"),
    (replace(LLAMA, width=32, head_dim=6), "down_proj.lora_B.weight must be (32, 3) floating, got (24, 3) float32"),
    (replace(LLAMA, kv_heads=4), "k_proj.lora_B.weight must be (24, 3) floating, got (12, 3) float32"),
    (replace(LLAMA, ffn=48), "down_proj.lora_A.weight must be (3, 48) floating, got (3, 40) float32"),
    (replace(LLAMA, layers=1), "fits no layer of this model"),
    (replace(LLAMA, layers=3), "as well, got an adapter without it (some layers, or truncated)"),
])  # fmt: skip
def test_an_adapter_for_other_shapes(saved, config, message):
    assert message in refused(saved[0], config)


def test_damaged_files(saved):
    folder, _ = saved
    path = folder / "adapter_model.safetensors"
    good = path.read_bytes()
    for bad in (good[:-1], good[:100], b"", b"PK\x03\x04 a pickle", good + b"x"):
        path.write_bytes(bad)
        assert str(path) in refused(folder)
    tensors = read_safetensors(_write(path, good))
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    write_safetensors(path, {n: t for n, t in tensors.items() if n != name})
    assert f"wanted {name} as well" in refused(folder)
    write_safetensors(path, tensors | {"base_model.model.lm_head.weight": torch.zeros(40, 24)})
    assert "'base_model.model.lm_head.weight' fits no layer" in refused(folder)
    write_safetensors(path, tensors | {name: torch.zeros(40, 3, dtype=torch.int64)})
    assert "must be (40, 3) floating, got (40, 3) int64" in refused(folder)
    write_safetensors(path, {})
    assert "wanted tensors of an adapter, got none" in refused(folder)
    path.unlink()
    assert "adapter_model.safetensors: wanted a file, found none" in refused(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "adapter_config.json: wanted JSON" in refused(folder)
    assert "wanted a file, found none" in refused(folder / "nowhere")


def _write(path, data):
    path.write_bytes(data)
    return path


def test_another_adapter_in_the_way(saved):
    for lora in (replace(LORA, rank=4), replace(LORA, alpha=1.0), replace(LORA, targets=("q",))):
        assert "wanted an adapter like the one the model has" in refused(
            saved[0], model=add_lora(decoder(dtype=torch.float32), lora)
        )


def test_an_adapter_that_is_or_is_not_there(tmp_path):
    model = decoder()
    for needs_one in (merge_lora, lambda m: save_adapter(m, tmp_path)):
        with pytest.raises(InputError, match="lora: wanted a model with an adapter, got one without"):
            needs_one(model)
    add_lora(model, LORA)
    with pytest.raises(InputError, match="lora: wanted a model without an adapter"):
        add_lora(model, LORA)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot make this folder"):
        save_adapter(model, tmp_path / "file")


@pytest.mark.parametrize("options, message", [
    ({"rank": 0}, "lora: rank must be a positive integer, got 0"),
    ({"rank": 2.0}, "lora: rank must be a positive integer, got 2.0"),
    ({"alpha": 0}, "lora: alpha must be a positive number, got 0"),
    ({"alpha": float("nan")}, "lora: alpha must be a positive number, got nan"),
    ({"dropout": 1}, "lora: dropout must be in [0, 1), got 1"),
    ({"dropout": -0.1}, "lora: dropout must be in [0, 1), got -0.1"),
    ({"targets": "q"}, "lora: targets must be 'all' or a tuple of names, got 'q'"),
    ({"targets": ()}, "lora: targets must be 'all' or a tuple of names, got ()"),
    ({"targets": ("q", "qkv")}, "lora: targets must be of q, k, v, o, gate, up, down for this model, got 'qkv'"),
])  # fmt: skip
def test_config_errors(options, message):
    with pytest.raises(InputError) as e:
        add_lora(decoder(), LoraConfig(**options))
    assert str(e.value) == message


def test_targets_of_each_family():
    def names(config):
        return [p.target for p in projections(config)]

    assert names(LLAMA) == names(QWEN3) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert names(GPT2) == ["qkv", "o", "up", "down"]
    assert names(replace(LLAMA, activation="gelu")) == ["q", "k", "v", "o", "up", "down"]
    assert [p.hf for p in projections(replace(LLAMA, activation="gelu"))][-2:] == ["mlp.up_proj", "mlp.down_proj"]


def test_compiles_without_a_break():
    m = layer(ROWS[1])
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    got, want = compiled(x), m(x)
    torch.testing.assert_close(got, want)
    wanted = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
