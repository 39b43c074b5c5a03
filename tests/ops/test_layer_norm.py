"""What is peculiar to layer_norm: weight and bias each alone, large means. test_rms_norm.py holds what it shares."""

import pytest
import torch
import torch.nn.functional as F

from fmcore import ops
from fmcore.kernels.layer_norm import layer_norm_ref
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("body", ["eager", "triton"])
@pytest.mark.parametrize("has_w", [False, True])
@pytest.mark.parametrize("has_b", [False, True])
def test_weight_and_bias_are_optional(body, has_w, has_b):
    x, w, b, dy = (torch.randn(*s, dtype=torch.float64) for s in ((5, 7), (7,), (7,), (5, 7)))
    w, b = w if has_w else None, b if has_b else None
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    expected = F.layer_norm(x, (7,), w, b, 0.01)
    with use(body):
        got = ops.layer_norm(x, w, b, 0.01)
        grads = torch.autograd.grad(got, leaves, dy)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, leaves, dy), rtol=0, atol=1e-13)


@pytest.mark.parametrize("has_b", [False, True])
def test_reference_with_an_offset(has_b):
    x, w, b = torch.randn(5, 7), torch.randn(7), torch.randn(7) if has_b else None
    torch.testing.assert_close(layer_norm_ref(x, w, b, offset=1.0), F.layer_norm(x, (7,), 1 + w, b))


@pytest.mark.parametrize("N", [24, 16387])
def test_mean_far_from_zero(N):
    """The variance comes from differences to the mean: it survives a mean 4096 times the deviation."""
    x = (torch.randn(3, N) + 4096).double()
    with use("triton"):
        y = ops.layer_norm(x.float())
    torch.testing.assert_close(y.double(), F.layer_norm(x.float().double(), (N,)), rtol=0, atol=1e-2)


def test_a_bias_alone_gets_its_gradient():
    x, b = torch.randn(4, 6), torch.randn(6, requires_grad=True)
    with use("triton"):
        ops.layer_norm(x, None, b).sum().backward()
    torch.testing.assert_close(b.grad, torch.full((6,), 4.0))
