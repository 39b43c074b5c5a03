"""What is peculiar to the plain activations: formulas against PyTorch's, tails and what is not finite, the bias."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmcore import nn as fnn
from fmcore import ops
from fmcore.kernels.activation import OPERATORS, gelu_ref
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")

# Each operator and what a PyTorch user would write.
EAGER = {
    "gelu": (ops.gelu, partial(F.gelu, approximate="tanh")),
    "gelu-none": (partial(ops.gelu, approximate="none"), F.gelu),
    "quick_gelu": (ops.quick_gelu, lambda x: x * torch.sigmoid(1.702 * x)),
    "relu_squared": (ops.relu_squared, lambda x: F.relu(x).square()),
}
kinds = pytest.mark.parametrize("op, eager", EAGER.values(), ids=EAGER.keys())


@kinds
@pytest.mark.parametrize("body", ["eager", "triton"])
def test_equals_pytorch(body, op, eager):
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    expected = eager(x)
    with use(body):
        got = op(x)
        (dx,) = torch.autograd.grad(got, x, dy)
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy)[0], rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_is_its_formula(approximate):
    """PyTorch's own gelu, which the reference calls, against the formulas of the header."""
    x = torch.randn(1000, dtype=torch.float64)
    u = (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    cdf = (1 + torch.tanh(u)) / 2 if approximate == "tanh" else (1 + torch.erf(x * 0.5**0.5)) / 2
    torch.testing.assert_close(gelu_ref(x, approximate), x * cdf, rtol=0, atol=1e-15)


@kinds
def test_tails(op, eager):
    """Far out gelu is 0 or the identity; the exponentials inside must not make a NaN of it."""
    x = torch.tensor([-1e30, -1e19, -1e4, -100.0, 0.0, 100.0, 1e4, 1e19, 1e30], requires_grad=True)
    with use("triton"):
        y = op(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach(), eager(x.detach()))
    exact = x.detach().double().requires_grad_()
    torch.testing.assert_close(dx, torch.autograd.grad(eager(exact).sum(), exact)[0].float())


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_only_where_pytorch_has_one(op, eager, dtype):
    """At infinities, the largest numbers and NaN, in x and in dy; a NaN of x is passed on."""
    top = torch.finfo(dtype).max
    ends = [-float("inf"), -top, -1.0, 0.0, 1.0, top, float("inf"), float("nan")]
    x, dy = torch.cartesian_prod(torch.tensor(ends, dtype=dtype), torch.tensor(ends, dtype=dtype)).unbind(-1)
    x = x.clone().requires_grad_()
    expected = eager(x)
    with use("triton"):
        y = op(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    (eager_dx,) = torch.autograd.grad(expected, x, dy)
    assert not (y.isnan() & ~expected.isnan()).any()
    assert not (dx.isnan() & ~eager_dx.isnan()).any()
    assert y[x.isnan()].isnan().all()
    if op is not ops.relu_squared:
        assert dx[x.isnan()].isnan().all()


def test_the_slope_of_relu_at_zero_is_zero():
    x = torch.zeros(3, requires_grad=True)
    with use("triton"):
        ops.relu_squared(x).backward(torch.full((3,), float("inf")))
    assert torch.equal(x.grad, torch.zeros(3))


@kinds
def test_any_number_of_dimensions(op, eager):
    x = torch.randn(2, 3, 5)
    for t in (x, x[0, 0, 0], x[:, ::2], x.transpose(0, 2), x[:0], x[..., :0]):
        with use("triton"):
            torch.testing.assert_close(op(t), eager(t))


@kinds
@pytest.mark.parametrize("body", ["eager", "triton"])
def test_bias_is_added_in_fp32(body, op, eager):
    x, b = torch.full((2, 3), 1.0).bfloat16(), torch.tensor([0.001, -0.001, 0.0]).bfloat16()
    with use(body):
        assert torch.equal(op(x, bias=b), eager(x.float() + b.float()).bfloat16())
        # In bf16 1 + 0.001 is 1; the sum must differ from it before the activation rounds.
        got = op(x.repeat(1, 2), bias=torch.tensor([0.0, 0.003, 0.006] * 2).bfloat16())
    assert torch.equal(got[:, :3], got[:, 3:]) and got[0, 2] != got[0, 0]


@kinds
def test_bias_of_no_rows_has_no_gradient(op, eager):
    x, b = torch.randn(0, 4, requires_grad=True), torch.randn(4, requires_grad=True)
    with use("triton"):
        op(x, bias=b).sum().backward()
    assert x.grad.shape == (0, 4) and torch.equal(b.grad, torch.zeros(4))


def test_backward_writes_what_is_asked_for():
    """A frozen input costs no gradient of its size, a frozen bias no sums."""
    x, b, dy = torch.randn(5, 3), torch.randn(3), torch.randn(5, 3)
    bwd = OPERATORS["gelu"][1]
    with use("triton"):
        dx, db = bwd(dy, x, b, "gelu", True, True)
        only_dx, nothing = bwd(dy, x, b, "gelu", True, False)
        none, only_db = bwd(dy, x, b, "gelu", False, True)
    assert torch.equal(dx, only_dx) and torch.equal(db, only_db) and nothing.shape == none.shape == (0,)


@pytest.mark.parametrize("module", [nn.GELU("tanh"), nn.GELU("none")], ids=str)
def test_module_stands_in_for_pytorchs(module):
    x = torch.randn(3, 8)
    torch.testing.assert_close(fnn.GELU(module.approximate)(x), module(x))
    assert not list(fnn.GELU().parameters())


@pytest.mark.parametrize("make", [fnn.GELU, fnn.QuickGELU, fnn.ReLUSquared, partial(fnn.GELU, "none")])
def test_module_with_a_bias(make):
    x, module = torch.randn(3, 8), make(bias=8)
    torch.testing.assert_close(module(x), make()(x))
    with torch.no_grad():
        module.bias += 1
    torch.testing.assert_close(module(x), make()(x + 1))
    module(x).sum().backward()
    assert module.bias.grad.shape == (8,)


def test_errors_name_the_argument():
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="gelu: approximate must be 'tanh' or 'none', got 'erf'"):
        ops.gelu(x, "erf")
    with pytest.raises(TypeError, match="gelu: x must be one of"):
        ops.gelu(torch.arange(3))
    with pytest.raises(TypeError, match="relu_squared: x must be one of"):
        ops.relu_squared(torch.arange(3))
    with pytest.raises(ValueError, match=r"quick_gelu: bias must be \(N\), N=3, got \(4,\)"):
        ops.quick_gelu(x, bias=torch.randn(4))
    with pytest.raises(ValueError, match=r"gelu: x must be \(\.\.\., N\), got \(\)"):
        ops.gelu(x[0, 0], bias=torch.randn(1))
    with pytest.raises(TypeError, match="relu_squared: bias must have the dtype of x, float32, got bfloat16"):
        ops.relu_squared(x, bias=torch.randn(3).bfloat16())
    with pytest.raises(ValueError, match="gelu: bias must be on the device of x"):
        ops.gelu(x, bias=torch.empty(3, device="meta"))
