"""What is peculiar to rms_norm, and what it shares with layer_norm: sums, dropout, heads, errors, modules."""

from contextlib import nullcontext

import proof
import pytest
import torch
import torch.nn.functional as F
from proof import DEVICE

from fmcore import nn, ops
from fmcore.kernels import layer_norm, rms_norm
from fmcore.kernels.blocks import as_rows
from fmcore.kernels.dropout import dropout_factor_ref
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="reads the arguments of launches from the interpreter")
both = pytest.mark.parametrize(
    "op, ref",
    [(ops.rms_norm, rms_norm.rms_norm_ref), (ops.layer_norm, layer_norm.layer_norm_ref)],
    ids=["rms", "layer"],
)
modules = pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])


def heads(M: int, H: int, N: int) -> list[torch.Tensor]:
    """Four of (M, H, N) as the middle heads of wider tensors: two strides each, all of them different."""
    return [torch.randn(M, H + 3 + i, N + 2 + i)[:, 1 : 1 + H, 1 : 1 + N] for i in range(4)]


@pytest.mark.parametrize("w", [None, 0.7])
def test_reference_equals_pytorch(w):
    x = torch.randn(5, 7, dtype=torch.float64)
    w = None if w is None else torch.full((7,), w, dtype=torch.float64)
    torch.testing.assert_close(rms_norm.rms_norm_ref(x, w, 0.01), F.rms_norm(x, (7,), w, 0.01), rtol=0, atol=1e-14)


@both
def test_eps_keeps_its_bits_in_fp64(op, ref):
    x = torch.randn(3, 9, dtype=torch.float64)
    with use("triton"):
        torch.testing.assert_close(op(x, eps=0.1), ref(x, eps=0.1), rtol=0, atol=1e-14)


@both
@pytest.mark.parametrize("body", ["eager", "triton"])
def test_offset_is_added_in_fp32(op, ref, body):
    """1 + w rounded to bf16 is 1 for a w of 2^-9, which moves every other product by one bit."""
    x, w = torch.randn(40, 64).bfloat16(), torch.full((64,), 2.0**-9).bfloat16()
    with use(body):
        y, without = op(x, w, offset=1.0), op(x)
    assert (1 + w == 1).all() and 0.2 < (y != without).float().mean() < 0.9


@both
@pytest.mark.parametrize("body", ["eager", "triton"])
def test_sum_is_rounded_as_eager_rounds(op, ref, body):
    x, residual = torch.randn(2, 37, 24).bfloat16()
    with use(body):
        y, total = op(x, residual=residual)
        assert torch.equal(total, residual + x)
        assert torch.equal(y, op(total))


@both
def test_the_smallest_dropout_drops(op, ref):
    """One draw of 2^32. Under this seed, found by search, it is that of element (0, 3)."""
    x, residual, dy, ds = torch.randn(4, 2, 7)
    x.requires_grad_()
    with use("triton"):
        y, total = op(x, residual=residual, dropout=1.5 * 2**-32, seed=torch.tensor([1411659918]))
        (dx,) = torch.autograd.grad((y, total), x, (dy, ds))
    assert (total == residual).nonzero().tolist() == (dx == 0).nonzero().tolist() == [[0, 3]]


@both
@pytest.mark.parametrize("body", ["eager", "triton"])
@pytest.mark.parametrize("N", [1, 3, 24, 37])
def test_dropout_is_that_of_the_seed(op, ref, body, N):
    x, residual, seed = torch.randn(5, 2, N), torch.randn(5, 2, N), torch.tensor([2**45 + 1])
    factor = dropout_factor_ref(seed, 10, N, 0.3).view(5, 2, N).float()
    with use(body):
        y, total = op(x, residual=residual, dropout=0.3, seed=seed)
        torch.testing.assert_close(total, residual + x * factor, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(op(x, dropout=0.3, seed=seed), op(x * factor))


@both
def test_seeds_come_from_the_generator(op, ref):
    x = torch.randn(16, 64)
    drawn = []
    for s in (1, 1, 2):
        torch.manual_seed(s)
        drawn.append(op(x, dropout=0.5))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(op(x, dropout=0.5), op(x, dropout=0.5))


@both
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(37, 3, 24), (2, 2, 8195)])
def test_heads_of_everything(op, ref, dropout, shape):
    """x, residual and both incoming gradients with two strides each, also in rows that come in blocks."""
    given, seed = heads(*shape), torch.tensor([5])
    results = []
    for fn in (op, ref):
        x, residual = (t.detach().requires_grad_() for t in given[:2])
        w = torch.linspace(-1, 2, shape[-1]).requires_grad_()
        with use("triton"):
            y, total = fn(x, w, eps=0.1, residual=residual, dropout=dropout, seed=seed, offset=1.0)
            results.append((y, total, *torch.autograd.grad((y, total), (x, residual, w), given[2:])))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@interpreted
@both
def test_heads_are_not_copied(op, ref):
    import interpreter

    given = x, residual, dy, dsum = heads(5, 3, 8)
    with use("triton"), interpreter.recorded() as launches:
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        torch.autograd.grad(op(x, residual=residual), (x, residual), (dy, dsum))
    reached = {span.tensor.data_ptr() for launch in launches for span in launch.spans}
    assert all(t.data_ptr() in reached for t in given)


def test_rows_as_views():
    """Leading dimensions are folded wherever the strides allow it; what fits nowhere is copied, its values kept."""
    x = torch.randn(2, 3, 5, 8)
    assert as_rows(x)[0].shape == (30, 1, 8) and as_rows(x[0, 0, 0])[0].shape == (1, 1, 8)
    for view, shape, copied in [
        (x[:, :, 1:4], (6, 3, 8), False),
        (x[:, 1:], (2, 10, 8), False),
        (x[..., 2:], (30, 1, 6), False),
        (x[:, 1:, 1:], (16, 1, 8), True),
        (x.transpose(1, 2), (30, 1, 8), True),
        (x.transpose(2, 3), (48, 1, 5), True),
        (x[:1].expand(4, 3, 5, 8), (4, 15, 8), False),
        (x[:, :0, 1:], (0, 1, 8), True),
    ]:
        rows = as_rows(view)[0]
        assert rows.shape == shape and torch.equal(rows.reshape(view.shape), view)
        assert view.numel() == 0 or (rows.data_ptr() != view.data_ptr()) == copied
    # The cut where fewest are copied.
    a, b = as_rows(x.contiguous(), x[:, :, 1:4].new_zeros(2, 3, 6, 8)[:, :, :5])
    assert a.shape == b.shape == (6, 5, 8)
    assert as_rows(x, None)[1] is None


@both
@pytest.mark.parametrize("body", ["eager", "triton"])
def test_any_number_of_dimensions(op, ref, body):
    x = torch.randn(2, 3, 4, 6)
    for t in (x, x[0, 0, 0], x[:, ::2], x.transpose(0, 2), x.transpose(-1, -2), x[:0], x[:, :, :0]):
        with use(body):
            torch.testing.assert_close(op(t, residual=t)[0], ref(t + t))


@both
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("used", [0, 1])
def test_only_one_result_is_used(op, ref, dropout, used):
    results = []
    x, residual = torch.randn(2, 5, 12)
    for fn in (op, ref):
        leaves = [t.clone().requires_grad_() for t in (x, residual, torch.linspace(1, 2, 12))]
        with use("triton"):
            out = fn(leaves[0], leaves[2], residual=leaves[1], dropout=dropout, seed=torch.tensor([3]))
            out[used].square().sum().backward()
        # The reference has no gradient where ours has zeros.
        results.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@both
def test_one_gradient_for_two_inputs_is_not_shared(op, ref):
    """Without dropout x and residual get the same tensor: accumulating into one must not change the other."""
    x, residual = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    with use("triton"):
        for _ in range(2):
            op(x, residual=residual)[0].square().sum().backward()
        (2 * op(x, residual=residual.detach())[0].square().sum()).backward()
    torch.testing.assert_close(x.grad, 2 * residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()


@both
def test_two_calls_compile_with_seeds_of_their_own(op, ref):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def step(x, residual):
        y, total = op(x, residual=residual, dropout=0.5)
        return op(y, dropout=0.25) + total

    x, residual = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    with use("triton"):
        step(x, residual).sum().backward()
    assert x.grad.isfinite().all() and (x.grad == 0).any() and (residual.grad != 0).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="about CPU tensors")
def test_few_elements_take_the_plain_path():
    """The CPU body is chosen from 2^17 elements on; asked for by name it takes any number."""
    for rows, body, calls in ((511, None, 0), (512, None, 2), (1, "cpu", 2)):
        x = torch.randn(rows, 256, requires_grad=True)
        with use(body) if body else nullcontext(), proof.calls() as log:
            ops.rms_norm(x, torch.ones(256), residual=x, dropout=0.1)[0].sum().backward()
        assert len(log) == calls


@both
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"residual": torch.empty(3, 8)}, ValueError, r"residual must have the shape of x, \(2, 8\), got \(3, 8\)"),
        ({"residual": torch.empty(2, 8).half()}, TypeError, "residual must have the dtype of x, float32, got float16"),
        ({"dropout": 1.0}, ValueError, "dropout must be from 0 to below 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must be from 0 to below 1, got -0.1"),
        ({"dropout": 0.1, "seed": torch.tensor([1, 2])}, ValueError, r"seed must be \(1\), got \(2,\)"),
        ({"dropout": 0.1, "seed": torch.tensor([1.0])}, TypeError, r"seed must be one of \['int64'\], got float32"),
        (
            {"dropout": 0.1, "seed": torch.empty(1, dtype=torch.int64, device="meta")},
            ValueError,
            "seed must be on the device of x, cpu, got meta",
        ),
        ({"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
        ({"offset": 1.0}, ValueError, "offset must be 0 without w, got 1.0"),
        ({"w": torch.empty(9), "offset": 1.0}, ValueError, r"w must be \(N\), N=8, got \(9,\)"),
    ],
)
def test_errors_name_the_argument(op, ref, options, error, message):
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(torch.empty(2, 8, device="cpu"), **options)


@modules
@pytest.mark.parametrize("affine", [True, False])
def test_modules_stand_in_for_pytorch(name, affine):
    ours, theirs = (getattr(m, name)(8, 1e-3, affine) for m in (nn, torch.nn))
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.reset_parameters()
    theirs.reset_parameters()
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@modules
def test_modules_with_residual_offset_and_dropout(name):
    norm, x, residual = getattr(nn, name)(8, offset=1.0, dropout=0.5), torch.randn(40, 8), torch.randn(40, 8)
    assert (norm.weight == 0).all()
    y, total = norm.eval()(x, residual)
    assert torch.equal(total, residual + x)
    torch.testing.assert_close(y, getattr(torch.nn, name)(8, eps=norm.eps)(residual + x))
    y, total = norm.train()(x, residual)
    dropped = (total == residual).float().mean()
    assert 0.3 < dropped < 0.7 and not torch.equal(norm(x), norm(x))
    assert norm(x).shape == x.shape


def test_module_options():
    with pytest.raises(ValueError, match=r"LayerNorm: normalized_shape must be one size, got \(2, 8\)"):
        nn.LayerNorm((2, 8))
    assert nn.LayerNorm(8, bias=False).bias is None
    assert nn.RMSNorm([8], dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    x = torch.randn(3, 8) * 1e-4
    torch.testing.assert_close(nn.RMSNorm(8, eps=None)(x), torch.nn.RMSNorm(8)(x))
