"""Evaluation: sums by hand, the same however the text is cut into batches."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmcore.data.packing import Batch, pack
from fmcore.data.tokenizer import ByteTokenizer
from fmcore.errors import InputError
from fmcore.evaluate import Evaluation, evaluate, evaluating
from fmcore.models.decoder import Config, Decoder

V, END = 260, 256
CONFIG = Config(vocab_size=V, layers=1, width=16, heads=2, ffn=24, context=8)
SIZES = ByteTokenizer().token_bytes()  # (257,), fewer than the model has rows


@pytest.fixture
def model():
    model = Decoder(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def rows(count=10, T=8):
    rng = np.random.default_rng(0)
    stream = np.where(rng.random(count * T + 1) < 0.2, END, rng.integers(0, 256, count * T + 1))
    return np.stack([stream[i * T : (i + 1) * T + 1] for i in range(count)]).astype(np.int64)


def test_sums_by_hand(model):
    data = rows()
    batches = [pack(data[:4], END), pack(data[4:], END, ignore_from=41)]
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        logits = model(batch.tokens, batch.positions, batch.cu_seqlens).double().log_softmax(-1)
        for row, targets in zip(logits, batch.targets.tolist(), strict=True):
            for z, target in zip(row, targets, strict=True):
                if target != -100:
                    nats, tokens, size = nats - z[target].item(), tokens + 1, size + (target < 256)
    got = evaluate(model, batches, SIZES)
    assert (got.tokens, got.bytes) == (tokens, size) == (32 + 41, size) and 0 < size < tokens
    assert got.nats == pytest.approx(nats, rel=1e-6)
    assert got.loss == got.nats / tokens
    assert got.perplexity == math.exp(got.loss)
    assert got.bits_per_byte == pytest.approx(got.nats / math.log(2) / size, rel=1e-15)


def test_the_size_of_batches_does_not_matter(model):
    data = rows()
    whole = evaluate(model, [pack(data, END)], SIZES)
    for step in (1, 3, 7):
        got = evaluate(model, (pack(data[i : i + step], END) for i in range(0, len(data), step)), SIZES)
        assert (got.tokens, got.bytes) == (whole.tokens, whole.bytes)
        assert got.nats == pytest.approx(whole.nats, rel=1e-7)
    double = model.double()
    whole = evaluate(double, [pack(data, END)], SIZES)
    alone = [evaluate(double, [pack(row[None], END)], SIZES) for row in data]
    assert sum(one.nats for one in alone) == pytest.approx(whole.nats, rel=1e-14)


def test_token_bytes_of_either_kind(model):
    batches = [pack(rows(), END)]
    assert evaluate(model, batches, SIZES) == evaluate(model, batches, torch.from_numpy(SIZES))
    words = evaluate(model, batches, np.full(V, 3, np.int64))
    assert words.bytes == 3 * 80 and words.bits_per_byte == pytest.approx(words.loss / math.log(8))


def test_a_model_that_knows_the_answer():
    """Uniform guesses cost log2 V bits a byte, up to the separators that stand for no byte."""
    model = Decoder(CONFIG)
    with torch.no_grad():
        model.head.weight.zero_()
    data = np.full((2, 9), 65, np.int64)
    got = evaluate(model, [pack(data, END)], SIZES)
    assert got.loss == pytest.approx(math.log(V), rel=1e-6)
    assert got.bits_per_byte == pytest.approx(math.log2(V), rel=1e-6)
    assert got.perplexity == pytest.approx(V, rel=1e-5)


def test_bf16_sums_in_fp64(model):
    batches = [pack(rows(400), END)] * 3
    half, one = model.bfloat16(), batches[0]
    losses = half.loss(one.tokens, one.targets, one.positions, one.cu_seqlens, reduction="none")
    assert losses.dtype == torch.float32 and losses.sum().item() != losses.double().sum().item()
    assert evaluate(half, batches, SIZES).nats == pytest.approx(3 * losses.double().sum().item(), rel=1e-14)
    # The head does not round its logits to bf16 on a CPU.
    hidden = half.hidden(one.tokens, one.positions, one.cu_seqlens).double().flatten(0, 1)
    logits = hidden @ half.head_weight.double().T
    want = F.cross_entropy(logits, one.targets.flatten(), reduction="sum").item()
    assert losses.double().sum().item() == pytest.approx(want, rel=1e-6)


def test_the_model_stays_as_it_was(model):
    model.layers[0].eval()
    evaluate(model, [pack(rows(), END)], SIZES)
    assert model.training and not model.layers[0].training and model.norm.training
    with pytest.raises(KeyError), evaluating(model):
        assert not any(m.training for m in model.modules())
        raise KeyError
    assert model.training and not model.layers[0].training
    batch = pack(rows(), END)
    model.loss(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_numbers_that_overflow():
    assert Evaluation.of(1e6, 10, 10).perplexity == math.inf
    assert math.isnan(Evaluation.of(math.nan, 10, 10).perplexity)


def empty(*targets):
    n = len(targets)
    return Batch(
        torch.zeros(1, n, dtype=torch.int64),
        torch.tensor([targets]),
        torch.arange(n)[None],
        torch.tensor([0, n], dtype=torch.int32),
        sum(t >= 0 for t in targets),
    )


@pytest.mark.parametrize(
    "batches, got",
    [
        ([], "0 targets that stand for 0 bytes"),
        ([empty(-100, -100)], "0 targets that stand for 0 bytes"),
        ([empty(END, -100)], "1 targets that stand for 0 bytes"),
    ],
)
def test_nothing_to_measure(model, batches, got):
    with pytest.raises(InputError) as e:
        evaluate(model, batches, SIZES)
    assert str(e.value) == f"evaluate: wanted at least one target that stands for text, got {got}"


def test_the_tokenizer_of_another_model(model):
    with pytest.raises(InputError, match=r"evaluate: token_bytes must be \(at most vocab_size=260\), got \(261,\)"):
        evaluate(model, [pack(rows(), END)], np.ones(261, np.int32))
