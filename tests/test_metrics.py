"""FLOPs against two independent counts, peaks by device name, speed by a clock that the test turns, and the log."""

import json
import random
import resource
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fmcore.errors import InputError
from fmcore.models.decoder import PRESETS, Config, Decoder
from fmcore.train import metrics
from fmcore.train.metrics import (
    PEAK_FLOPS,
    Flops,
    Meter,
    MetricsLog,
    matmul_weights,
    peak_flops,
    peak_memory,
    read_metrics,
    step_flops,
    visible_pairs,
)

GPT2 = Config(vocab_size=97, layers=3, width=24, heads=4, ffn=96, context=16, norm="layer", activation="gelu_tanh",
              positions="learned", bias=True, tied=True)  # fmt: skip
LLAMA = Config(vocab_size=101, layers=2, width=24, heads=6, kv_heads=2, head_dim=8, ffn=40, context=16)
QWEN = Config(vocab_size=64, layers=2, width=16, heads=4, kv_heads=2, head_dim=6, ffn=24, context=16, qk_norm=True,
              tied=True)  # fmt: skip


class Lora(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))


def counted(model: Decoder, rows: int, length: int, backward: bool) -> int:
    """FLOPs that torch sees. Its counter takes every query with every key, whatever the mask: the full convention."""
    tokens = torch.zeros(rows, length, dtype=torch.int64, device=next(model.parameters()).device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(tokens)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("config", [GPT2, LLAMA, QWEN], ids=["gpt2", "llama", "qwen"])
def test_flops_equal_those_that_torch_counts(config, device):
    with torch.device(device):
        model = Decoder(config)
    assert counted(model, 3, 16, backward=False) == step_flops(config, 3, 16, trainable=None).full
    assert counted(model, 3, 16, backward=True) == step_flops(config, 3, 16).full


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_adapter_flops_equal_those_that_torch_counts(config):
    model = Decoder(config).requires_grad_(False)
    added = 0
    for layer in model.layers:
        for name in ("qkv", "out", "up", "down"):
            lora = Lora(getattr(layer, name), rank=2)
            setattr(layer, name, lora)
            added += lora.a.weight.numel() + lora.b.weight.numel()
    # The convention lets the gradient reach the input of the first layer.
    model.embed.register_forward_hook(lambda module, args, out: out.requires_grad_())
    wanted = step_flops(config, 2, 16, trainable="adapter", adapter_weights=added)
    assert counted(model, 2, 16, backward=True) == wanted.full
    assert wanted.full < step_flops(config, 2, 16, adapter_weights=added).full


def test_matmul_weights_are_those_of_the_linear_layers():
    for config in (GPT2, LLAMA, QWEN, PRESETS["gpt2-124m"]):
        with torch.device("meta"):
            model = Decoder(config)
        linear = sum(m.weight.numel() for _, m in model.linears())
        assert matmul_weights(config) == linear + config.vocab_size * config.width


def brute_pairs(lengths: list[int], window: int | None) -> int:
    document = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    at = torch.arange(len(document))
    mask = (document[:, None] == document) & (at[:, None] >= at)
    if window is not None:
        mask &= at[:, None] - at < window
    return int(mask.sum())


def test_visible_pairs_equal_a_counted_mask():
    draw = random.Random(0)
    for window in (None, 1, 2, 5, 64, 1000):
        for _ in range(20):
            lengths = [draw.randrange(0, 40) for _ in range(draw.randrange(0, 6))]
            assert visible_pairs(lengths, window) == brute_pairs(lengths, window), (lengths, window)


def test_exact_counts_documents_and_window():
    windowed = Config(vocab_size=10, layers=3, width=8, heads=2, ffn=8, context=32, window=4)
    segments = [5, 1, 10, 16]
    flops = step_flops(windowed, 2, 16, segments)
    # 4 H D for a pair forward, three passes, L layers
    assert flops.attention == 3 * 3 * 4 * 8 * brute_pairs(segments, 4)
    assert flops.attention_full == 3 * 3 * 4 * 8 * 2 * 16 * 16
    assert flops.exact == flops.matmul + flops.attention and flops.full == flops.matmul + flops.attention_full


@pytest.mark.parametrize("name", PRESETS)
def test_full_is_the_palm_formula(name):
    c = PRESETS[name]
    flops = step_flops(c, 2, 64)
    assert flops.full == 2 * 64 * (6 * matmul_weights(c) + 12 * c.layers * c.heads * c.D * 64)


def test_known_models():
    """Figures for one token of Llama 3.2 1B at 8192 and Llama 3.1 8B at 8192, worked out by hand."""
    assert matmul_weights(PRESETS["gpt2-124m"]) == 12 * 12 * 768**2 + 50257 * 768
    for name, full, exact in (("llama-3.2-1b", 10.636e9, 9.025e9), ("llama-3.1-8b", 57.91e9, 51.47e9)):
        flops = step_flops(PRESETS[name], 1, 8192)
        assert flops.full / 8192 == pytest.approx(full, rel=1e-3)
        assert flops.exact / 8192 == pytest.approx(exact, rel=1e-3)


def test_bad_flops_arguments():
    with pytest.raises(ValueError, match="segments must add up to rows \\* length = 32, got 31"):
        step_flops(LLAMA, 2, 16, [15, 16])
    with pytest.raises(ValueError, match="trainable"):
        step_flops(LLAMA, 2, 16, trainable="some")


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA GH200 144G HBM3e", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("NVIDIA GeForce RTX 5090", 209.5),
        # Not the chip that the beginning of the name says.
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090Ti", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A10M", None),
        ("NVIDIA H20-3e", None),
        ("NVIDIA H2000", None),
        ("NVIDIA L400", None),
        ("NVIDIA H100", None),
        ("Tesla T4", None),
        ("AMD Instinct MI300X", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_flops(name, tera):
    assert peak_flops(name) == (None if tera is None else pytest.approx(tera * 1e12))


def test_every_name_in_the_table_finds_itself():
    assert {name: peak_flops(f"NVIDIA {name}") for name in PEAK_FLOPS} == PEAK_FLOPS


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_meter(monkeypatch):
    monkeypatch.setattr(metrics, "peak_memory", lambda device: 1.5)
    clock = Clock()
    meter = Meter(peak=1e12, window=2, skip=1, clock=clock)
    work = Flops(matmul=10**11, attention=10**11, attention_full=3 * 10**11)

    def step(seconds: float) -> dict[str, float]:
        clock.now += seconds
        return meter.step(1000, work)

    # A warm-up step of a minute is not in any figure.
    assert step(60) == {"memory_gib": 1.5}
    first = step(0.5)
    assert first == pytest.approx({"tokens_per_s": 2000, "tflops": 0.4, "mfu": 0.4, "mfu_full": 0.8, "memory_gib": 1.5})
    with meter.pause():
        clock.now += 1000
    assert step(1.5)["tokens_per_s"] == pytest.approx(1000)
    # The window is two steps: the first has left it.
    assert step(0.5)["tokens_per_s"] == pytest.approx(1000) and step(0.5)["tokens_per_s"] == pytest.approx(2000)
    assert meter.summary() == pytest.approx(
        {"tokens_per_s": 4000 / 3, "tflops": 0.8 / 3, "mfu": 0.8 / 3, "mfu_full": 1.6 / 3, "memory_gib": 1.5,
         "seconds": 3.0}
    )  # fmt: skip


def test_meter_without_a_peak_gives_no_mfu():
    clock = Clock()
    meter = Meter(peak=peak_flops("cpu"), skip=0, clock=clock)
    assert set(meter.summary()) == {"memory_gib", "seconds"}
    clock.now += 1
    assert set(meter.step(10, Flops(1, 1, 1))) == {"tokens_per_s", "tflops", "memory_gib"}


def test_meter_options():
    for options in ({"window": 0}, {"skip": -1}):
        with pytest.raises(ValueError, match="meter"):
            Meter(**options)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_memory_sees_what_was_used():
    # Linux then counts the peak anew, so that an earlier test does not hide the block.
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_memory()
    block = torch.ones(256 << 20, dtype=torch.uint8)
    assert 0.24 < peak_memory() - before < 0.3
    del block
    # The kernel's counters are exact to some pages for each thread only.
    assert 0.24 < peak_memory() - before < 0.3


def write(path, records, resume=None):
    with MetricsLog(path, resume) as log:
        for record in records:
            log.write(record)


def test_log_round_trip(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    records = [{"step": 0, "loss": 2.5}, {"step": 1, "bits_per_byte": {"code": 1.5}, "n": [1, 2]}]
    with MetricsLog(path) as log:
        for i, record in enumerate(records, 1):
            log.write(record)
            # On disk at once, not when the file is closed.
            assert read_metrics(path) == records[:i]
    write(path, [{"step": 2}])
    assert [r["step"] for r in read_metrics(path)] == [0, 1, 2]


def test_log_keeps_nan_as_text_and_stays_json(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [{"step": 0, "loss": float("nan"), "deep": {"x": [float("inf"), -float("inf")]}}])
    text = path.read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"step": 0, "loss": "nan", "deep": {"x": ["inf", "-inf"]}}


@pytest.mark.parametrize("step", [None, 1.0, True, "1"])
def test_log_wants_a_step(tmp_path, step):
    with MetricsLog(tmp_path / "m.jsonl") as log, pytest.raises(ValueError, match="step must be an int"):
        log.write({"step": step})


@pytest.mark.parametrize("torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\0\0\0", b"{}\n", b'{"step": 2\n', b"\xff\n"])
def test_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    write(path, [{"step": 0}, {"step": 1}])
    path.write_bytes(path.read_bytes() + torn)
    assert read_metrics(path) == [{"step": 0}, {"step": 1}]
    write(path, [{"step": 2, "new": 1}])
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2, "new": 1}\n'


def test_damage_in_the_middle_is_told_not_hidden(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    for read in (read_metrics, MetricsLog):
        with pytest.raises(InputError, match="line 2: wanted a JSON object"):
            read(path)
    assert path.read_text().count("\n") == 3


def test_resume_tells_one_history(tmp_path):
    path = tmp_path / "m.jsonl"
    pretrain = [{"phase": "pretrain", "step": s} for s in range(1, 7)]
    adapt = [{"phase": "adapt", "step": s} for s in range(1, 4)]
    write(path, pretrain + adapt)
    # At the end of the last phase, then inside it: nothing of the first phase goes.
    write(path, [], resume=("adapt", 3))
    assert read_metrics(path) == pretrain + adapt
    write(path, [{"phase": "adapt", "step": 2, "again": 1}], resume=("adapt", 1))
    assert read_metrics(path) == [*pretrain, adapt[0], {"phase": "adapt", "step": 2, "again": 1}]
    # At the very end of the first phase: the second one starts again, so its records go.
    write(path, pretrain + adapt, resume=("pretrain", 0))
    write(path, adapt, resume=("pretrain", 6))
    assert read_metrics(path) == pretrain + adapt
    # On a GPU not every step has a record, so the step of the checkpoint may have none, and its phase none at all yet.
    write(path, [], resume=("adapt", 99))
    write(path, [], resume=("late", 7))
    assert read_metrics(path) == pretrain + adapt
    # Inside the first phase: what came out of the rest of it goes as well.
    write(path, [{"phase": "pretrain", "step": 5}], resume=("pretrain", 4))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_resume_without_phases_and_without_a_file(tmp_path):
    write(tmp_path / "m", [{"step": 1}], resume=(None, 5))
    write(tmp_path / "m", [{"step": 7}], resume=(None, 0))
    assert read_metrics(tmp_path / "m") == [{"step": 7}]


def test_full_disk_keeps_whole_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(path) as log:
        log.write({"step": 0, "text": "x" * 40_000})
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
        try:
            with pytest.raises(InputError, match=r"m.jsonl: cannot be written \(.*untouched"):
                log.write({"step": 1, "text": "x" * 40_000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.write({"step": 1})
    assert [r["step"] for r in read_metrics(path)] == [0, 1]


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        MetricsLog(tmp_path / "file" / "m.jsonl")
