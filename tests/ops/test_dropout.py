"""What is peculiar to dropout: its bits, its statistics, where its seed comes from."""

import math

import pytest
import torch
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from fmcore import nn, ops
from fmcore.kernels.blocks import dropout_draws, dropout_factor
from fmcore.kernels.dropout import dropout_factor_ref
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")
bodies = pytest.mark.parametrize("body", ["eager", "cpu", "triton"])
here = pytest.mark.parametrize("body", ["cpu", "triton"])


@triton.jit
def factors_kernel(seed_ptr, out_ptr, first_row, N, DROP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = first_row.to(tl.int64) + tl.arange(0, ROWS)
    start = tl.program_id(0) * BLOCK
    at = tl.arange(0, ROWS)[:, None] * N + start + tl.arange(0, BLOCK)[None, :]
    mask = (tl.arange(0, ROWS)[:, None] >= 0) & (start + tl.arange(0, BLOCK) < N)[None, :]
    tl.store(out_ptr + at, dropout_factor(seed_ptr, rows, start, N, DROP, ROWS, BLOCK), mask=mask)


def draws(seed: int, N: int, p: float, first_row: int = 0) -> torch.Tensor:
    out = torch.empty(2, N)
    factors_kernel[(triton.cdiv(N, 8),)](
        torch.tensor([seed]), out, first_row, N, DROP=dropout_draws(p), ROWS=2, BLOCK=8
    )
    return out


def philox(counter: int, key: int) -> list[int]:
    """Philox-4x32 with 7 rounds, from the paper, in Python's integers."""
    low = 0xFFFFFFFF
    c, k = [counter >> 32 * i & low for i in range(4)], [key & low, key >> 32 & low]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & low, a >> 32 ^ c[3] ^ k[1], a & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c


def test_philox_gives_the_published_words():
    """Known answers of Random123 for counter and key of zeros and of ones."""
    assert philox(0, 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert philox(2**128 - 1, 2**64 - 1) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1, 0x1234_5678_9ABC_DEF0])
def test_each_element_has_its_word(seed):
    """Which word, which counter and which half of the key, at thresholds that tell the words apart."""
    N = 13
    words = [[philox(row * 4 + j // 4, seed)[j % 4] for j in range(N)] for row in range(2)]
    for p in (0.02, 0.1, 0.3, 0.5, 0.7, 0.98):
        expected = torch.tensor([[0.0 if w < int(p * 2**32) else 1 / (1 - p) for w in row] for row in words])
        torch.testing.assert_close(draws(seed, N, p), expected)
        torch.testing.assert_close(dropout_factor_ref(torch.tensor([seed]), 2, N, p).float(), expected)


def test_counters_beyond_32_bits():
    """Element 2^34 is not element 0 again."""
    N, first_row = 8, 2**33 + 3
    words = [[philox((first_row + i) * 2 + j // 4, 7)[j % 4] for j in range(N)] for i in range(2)]
    expected = torch.tensor([[2.0 * (w >= 2**31) for w in row] for row in words])
    assert torch.equal(draws(7, N, 0.5, first_row), expected)
    assert not torch.equal(draws(7, N, 0.5, first_row % 2**31), expected)


@bodies
def test_statistics(body):
    """Keep rate, and no correlation of neighbours, rows, columns or seeds: all within five standard deviations."""
    M, N, p = 64, 1024, 0.3
    x = torch.ones(M, N)
    with use(body):
        kept, other = (ops.dropout(x, p, seed=torch.tensor([seed])).ne(0).double() for seed in (5, 6))
    torch.testing.assert_close(ops.dropout(x, p).unique(), torch.tensor([0, 1 / (1 - p)]))
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 5 * sigma / math.sqrt(M * N)
    z = (kept - (1 - p)) / sigma
    for shifted in (z.roll(1, 1), z.roll(2, 1), z.roll(4, 1), z.roll(1, 0), z.roll(2, 0), (other - (1 - p)) / sigma):
        assert abs((z * shifted).mean()) < 5 / math.sqrt(M * N)
    assert (z.mean(1).abs() < 5 / math.sqrt(N)).all() and (z.mean(0).abs() < 5 / math.sqrt(M)).all()


@bodies
def test_the_seed_comes_from_the_generator(body):
    x = torch.randn(5, 67)
    with use(body):
        torch.manual_seed(3)
        first, second = ops.dropout(x, 0.5), ops.dropout(x, 0.5)
        torch.manual_seed(3)
        again = ops.dropout(x, 0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)


@here
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_draws_the_same_mask(body, use_reentrant):
    """Forward runs again in backward: with another mask the gradient would not be that of the output."""
    x, w = torch.randn(6, 40, requires_grad=True), torch.randn(40, 40)

    def layer(x):
        return ops.dropout(ops.dropout(x, 0.4).matmul(w).square(), 0.4)

    with use(body):
        torch.manual_seed(1)
        y = layer(x)
        (expected,) = torch.autograd.grad(y.sum(), x)
        torch.manual_seed(1)
        y_saved = checkpoint(layer, x, use_reentrant=use_reentrant)
        y_saved.sum().backward()
    assert torch.equal(y_saved, y) and torch.equal(x.grad, expected)


@here
def test_any_shape_and_strides_have_one_mask(body):
    """The mask goes by place, whatever the strides; the body does not matter either."""
    seed, x = torch.tensor([9]), torch.randn(2, 3, 10)
    with use(body):
        y = ops.dropout(x, 0.5, seed=seed)
        views = (x.transpose(0, 2).contiguous().transpose(0, 2), torch.cat((x, x), -1)[..., :10])
        for view in views:
            assert torch.equal(ops.dropout(view, 0.5, seed=seed), y)
        assert ops.dropout(x[0, 0, 0], 0.5, seed=seed).shape == ()
        assert ops.dropout(x[:, :0], 0.5, seed=seed).shape == (2, 0, 10)
        assert ops.dropout(x[..., :0], 0.5, seed=seed).shape == (2, 3, 0)
    factors = dropout_factor_ref(seed, 6, 10, 0.5).float().view(2, 3, 10)
    assert torch.equal(y, x * factors)


def test_tiles_of_the_cpu_body(monkeypatch):
    """Tiles of rows, and of columns where a row is wider than one, draw what the whole draws."""
    from fmcore.kernels import dropout

    monkeypatch.setattr(dropout, "CPU_TILE", 16)
    seed = torch.tensor([11], device="cpu")
    for M, N in ((7, 5), (3, 50), (1, 16), (2, 17)):
        x = torch.randn(M, N, device="cpu")
        assert torch.equal(ops.dropout(x, 0.5, seed=seed), x * dropout_factor_ref(seed, M, N, 0.5).float())


def test_no_mask_is_saved():
    saved = []
    x = torch.randn(64, 64, requires_grad=True)
    with use("triton"), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.dropout(x, 0.5)
    assert saved == [1]


@here
def test_compiles_with_a_seed_of_its_own(body):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.dropout(x, 0.5), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64, requires_grad=True)
    with use(body):
        torch.manual_seed(2)
        first = compiled(x)
        second = compiled(x)
        torch.manual_seed(2)
        again = compiled(x)
        (dx,) = torch.autograd.grad(first, x, torch.ones_like(first))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(dx * x, first)


def test_off_is_the_input_itself():
    x = torch.randn(3)
    assert ops.dropout(x, 0.0) is x and ops.dropout(x, 0.5, training=False) is x


def test_module_stands_in_for_pytorch():
    module, x = nn.Dropout(0.5), torch.randn(100)
    assert repr(module) == repr(torch.nn.Dropout(0.5))
    assert 20 < (module(x) == 0).sum() < 80 and module.eval()(x) is x
    with pytest.raises(ValueError, match="Dropout: inplace must be False"):
        nn.Dropout(0.5, inplace=True)
    with pytest.raises(ValueError, match="Dropout: p must be at least 0 and below 1, got 1"):
        nn.Dropout(1)


def test_errors_name_the_argument():
    x = torch.randn(3)
    for p in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"dropout: p must be at least 0 and below 1, got {p}"):
            ops.dropout(x, p)
    with pytest.raises(ValueError, match=r"dropout: seed must be \(1\), got \(2,\)"):
        ops.dropout(x, seed=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="dropout: seed must be one of"):
        ops.dropout(x, seed=torch.tensor([1.0]))
    with pytest.raises(ValueError, match="dropout: seed must be on the device of x"):
        ops.dropout(x, seed=torch.empty(1, dtype=torch.int64, device="meta"))
    with pytest.raises(TypeError, match="dropout: x must be one of"):
        ops.dropout(torch.arange(3))
