"""The baseline must be the same model, and the statistics must be right, before a speed claim means anything."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.demo import check_equal, ratio_interval
from benchmarks.plain import PlainDecoder
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
