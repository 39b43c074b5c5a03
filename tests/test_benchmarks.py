"""The baseline must be the same model, and the statistics must be right, before a speed claim means anything."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.__main__ as benchmark
from benchmarks.__main__ import main
from benchmarks.demo import check_equal
from benchmarks.plain import PlainDecoder
from benchmarks.rows import ROWS, differentiated
from benchmarks.timing import interleaved, ratio_interval
from fmcore.data.packing import pack
from fmcore.models.decoder import Config, Decoder

CONFIG = Config(vocab_size=61, layers=2, width=32, heads=4, kv_heads=2, ffn=48, context=16, tied=True)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    ours, plain = Decoder(CONFIG), PlainDecoder(CONFIG)
    plain.load_state_dict(ours.state_dict())
    return ours, plain, pack(np.random.default_rng(0).integers(1, 61, (3, 17)), end=0)


def test_plain_is_the_same_model(pair):
    assert check_equal(*pair) < 1e-5


def test_a_different_model_is_not_timed(pair):
    ours, plain, batch = pair
    with torch.no_grad():
        plain.layers[1].down.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="must agree"):
        check_equal(ours, plain, batch)


def test_another_architecture_does_not_fit():
    with pytest.raises(RuntimeError, match="size mismatch"):
        PlainDecoder(CONFIG).load_state_dict(Decoder(replace(CONFIG, ffn=64)).state_dict())


def test_interval_holds_the_truth_under_common_drift():
    """b is 10 % slower than a while both drift threefold: the paired ratio sees 1.10, each alone would not."""
    rng = random.Random(0)
    drift = [1 + 2 * i / 200 for i in range(200)]
    a = [d * rng.uniform(0.95, 1.05) for d in drift]
    b = [1.1 * d * rng.uniform(0.95, 1.05) for d in drift]
    median, low, high = ratio_interval(a, b)
    assert low < 1.1 < high and high - low < 0.05 and low <= median <= high


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.op)
def test_every_row_runs(row, tmp_path, capsys):
    """At its tiny size: what each provider gives is compared, timed and recorded."""
    out = tmp_path / "results" / "records.jsonl"
    main([row.op, "--tiny", "--device=cpu", "--repeats=3", "--warmup=1", f"--out={out}"])
    records = [json.loads(text) for text in out.read_text().splitlines()]
    assert [record["pass"] for record in records] == list(row.passes)
    assert len(capsys.readouterr().out.splitlines()) == len(records)
    for record in records:
        assert record["benchmark"] == row.op and record["shape"] == list(row.tiny) and record["dtype"] == "float32"
        assert record["ms"].keys() == record["rate"].keys() == {"fmcore", *row.baselines}
        assert all(rate > 0 for rate in record["rate"].values())
        for median, low, high in record["ratio"].values():
            assert 0 < low <= median <= high
        assert record["commit"] and record["dirty"] in (True, False, None) and record["torch"] == torch.__version__


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.op)
def test_a_wrong_provider_is_not_timed(row):
    """Not even where it is wrong in a gradient or a step alone."""
    args = row.inputs(row.tiny, torch.float32, torch.device("cpu"))
    first = next(iter(row.baselines))

    def wrong(*args):
        if row.stateful:
            step = row(*args)
            return lambda: (step(), [p.data.mul_(1.01) for p in args])
        outs = row(*args)
        return tuple(bent(y, row.random) for y in outs) if isinstance(outs, tuple) else bent(outs, row.random)

    good = {"fmcore": row, first: row.baselines[first]}
    assert max(benchmark.check(row, good, args, torch.float32).values()) <= (row.tolerance or 1e-3)
    with pytest.raises(RuntimeError, match=f"{row.op}: wrong must agree with {first} before it is timed"):
        benchmark.check(row, good | {"wrong": wrong}, args, torch.float32)


def bent(y, grossly):
    """``y`` itself, with a gradient that is not its own; without one another value."""
    by = 1.5 if grossly else 1.01
    return y.detach() + by * (y - y.detach()) if y.requires_grad else by * y


def test_every_row_has_something_to_time():
    for row in ROWS.values():
        assert row.baselines and row.sizes and row.passes and len(row.tiny) == len(row.sizes[0]), row.op
        args = row.inputs(row.tiny, torch.float32, torch.device("cpu"))
        assert row.passes == ("forward",) or differentiated(args), row.op
        for baseline in row.baselines.values():
            made = benchmark.results(row, baseline, args)
            assert made and all(t.isfinite().all() and t.abs().sum() > 0 for t in made), row.op


@pytest.mark.parametrize("op, shape, forward, backward", [
    ("rms_norm", (8, 16), 2 * 8 * 16 + 16, 3 * 8 * 16 + 2 * 16),
    ("swiglu", (8, 16), 3 * 8 * 16, 5 * 8 * 16),
    ("gelu", (8, 16), 2 * 8 * 16, 3 * 8 * 16),
    ("dropout", (8, 16), 2 * 8 * 16, 2 * 8 * 16),
    # Targets of 8 bytes count as two elements of 4.
    ("cross_entropy", (8, 50), 8 * 50 + 2 * 8 + 1, 2 * 8 * 50 + 1),
    ("embedding", (8, 50, 16), 2 * 8 + 2 * 8 * 16, 8 * 16 + 2 * 8 + 50 * 16),
    ("rope", (2, 9, 4, 2, 16), 2 * 2 * 9 * 6 * 16 + 2 * 9 * 8, 2 * 2 * 9 * 6 * 16 + 2 * 9 * 8),
])  # fmt: skip
def test_bytes_are_those_that_must_move(op, shape, forward, backward):
    """In elements of fp32: a backward pass reads dy and what it needs, and writes the gradients."""
    row = ROWS[op]
    args = row.inputs(shape, torch.float32, torch.device("cpu"))
    outs = next(iter(row.baselines.values()))(*args)
    moved = row.bytes(args, outs if isinstance(outs, tuple) else (outs,))
    assert (moved["forward"], moved["backward"]) == (4 * forward, 4 * backward)


def test_flops_are_those_of_the_products():
    """Counted by PyTorch; attention's half of a square needs a formula of its own."""
    row = ROWS["linear_cross_entropy"]
    args = row.inputs(row.tiny, torch.float32, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        loss = row.baselines["eager"](*args)
        forward = counter.get_total_flops()
        loss.backward()
    assert row.work(row.tiny) == {"forward": forward, "backward": counter.get_total_flops() - forward,
                                  "step": counter.get_total_flops()}  # fmt: skip
    B, T, H, G, D = shape = (2, 9, 4, 2, 16)
    pairs = B * H * sum(range(1, T + 1))
    assert ROWS["attention"].work(shape) == {
        "forward": 4 * pairs * D,
        "backward": 10 * pairs * D,
        "step": 14 * pairs * D,
    }


def test_calls_take_turns():
    log = []

    def provider(name):
        def prepare():
            log.append(f"prepare {name}")
            return lambda: log.append(name)

        return prepare

    times = interleaved({name: provider(name) for name in "ab"}, torch.device("cpu"), repeats=2, warmup=1)
    assert log == [f"{prefix}{name}" for name in "abbaab" for prefix in ("prepare ", "")]
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2}


def test_an_unknown_operator(capsys):
    with pytest.raises(SystemExit):
        main(["softmax"])
    assert "op must be one of rms_norm, " in capsys.readouterr().err
