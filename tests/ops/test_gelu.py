"""What is peculiar to gelu: both formulas against PyTorch's, tails included."""

import pytest
import torch
import torch.nn.functional as F

from fmcore import ops
from fmcore.kernels.gelu import gelu_ref
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")
kinds = pytest.mark.parametrize("approximate", ["tanh", "none"])


@kinds
@pytest.mark.parametrize("body", ["eager", "triton"])
def test_equals_pytorch(body, approximate):
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    expected = F.gelu(x, approximate=approximate)
    with use(body):
        got = ops.gelu(x, approximate)
        (dx,) = torch.autograd.grad(got, x, dy)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy)[0], rtol=0, atol=1e-13)


@kinds
def test_reference_equals_pytorch(approximate):
    x = torch.randn(1000, dtype=torch.float64)
    torch.testing.assert_close(gelu_ref(x, approximate), F.gelu(x, approximate=approximate), rtol=0, atol=1e-15)


@kinds
def test_tails(approximate):
    """Far out GELU is 0 or the identity; the exponentials inside must not make a NaN of it."""
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], requires_grad=True)
    with use("triton"):
        y = ops.gelu(x, approximate)
        (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))
    torch.testing.assert_close(dx, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@kinds
def test_any_number_of_dimensions(approximate):
    x = torch.randn(2, 3, 5)
    for t in (x, x[0, 0, 0], x[:, ::2], x.transpose(0, 2), x[:0]):
        with use("triton"):
            torch.testing.assert_close(ops.gelu(t, approximate), F.gelu(t, approximate=approximate))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="gelu: approximate must be 'tanh' or 'none', got 'erf'"):
        ops.gelu(torch.randn(3), "erf")
    with pytest.raises(TypeError, match="gelu: x must be one of"):
        ops.gelu(torch.arange(3))
