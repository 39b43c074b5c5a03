"""What is peculiar to swiglu: packed and separate are one operator, the packed gradient is one buffer."""

import proof
import pytest
import torch

from fmcore import ops
from fmcore.kernels.swiglu import bwd
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")
bodies = pytest.mark.parametrize("body", ["cpu", "triton"])


@bodies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("F", [1, 37, 704])
def test_packed_equals_separate(body, dtype, F):
    packed = torch.randn(2, 5, 2 * F, dtype=dtype, requires_grad=True)
    gate, up = (x.detach().requires_grad_() for x in packed.chunk(2, -1))
    dy = torch.randn(2, 5, F, dtype=dtype)
    with use(body):
        one, two = ops.swiglu(packed), ops.swiglu(gate, up)
        (d,) = torch.autograd.grad(one, packed, dy)
        dgate, dup = torch.autograd.grad(two, (gate, up), dy)
    assert torch.equal(one, two)
    assert torch.equal(d[..., :F], dgate) and torch.equal(d[..., F:], dup)


@pytest.mark.skipif(proof.DEVICE != "cpu", reason="reads the log of the CPU allocator")
@bodies
def test_packed_gradient_is_one_buffer(body):
    """The peak of backward is the gradient itself: no half that a cat would join to it, no recomputed activation."""
    M, F = 64, 128
    packed, dy = torch.randn(M, 2 * F, requires_grad=True), torch.randn(M, F)
    with use(body):
        y = ops.swiglu(packed)
        with torch.profiler.profile(profile_memory=True) as profile:
            y.backward(dy)
    allocated = [e.self_cpu_memory_usage for e in profile.events()]
    assert [n for n in allocated if n >= M * F * 4] == [M * 2 * F * 4]
    assert packed.grad.is_contiguous()


def test_backward_returns_the_layout_of_its_input():
    dy, x = torch.randn(3, 4), torch.randn(3, 8)
    with use("triton"):
        assert bwd(dy, x, None).shape == (3, 8)
        assert bwd(dy, x[:, :4], x[:, 4:]).shape == (2, 3, 4)


@bodies
def test_large_gates(body):
    """exp(-gate) overflows: silu is 0 on one side and the identity on the other, with no NaN in value or gradient."""
    gate = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], requires_grad=True)
    up = torch.full((5,), 2.0, requires_grad=True)
    with use(body):
        y = ops.swiglu(gate, up)
        dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0.0, 0.0, 400.0, 2e4]))
    torch.testing.assert_close(dgate, torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]))
    torch.testing.assert_close(dup, torch.tensor([0.0, 0.0, 0.0, 200.0, 1e4]))


def test_errors_name_the_argument():
    x = torch.randn(3, 7)
    with pytest.raises(ValueError, match=r"swiglu: gate without up must be \(\.\.\., 2F\), got \(3, 7\)"):
        ops.swiglu(x)
    with pytest.raises(ValueError, match=r"swiglu: up must have the shape of gate, \(3, 7\), got \(3, 6\)"):
        ops.swiglu(x, x[:, :6])
    with pytest.raises(TypeError, match="swiglu: up must have the dtype of gate, float32, got bfloat16"):
        ops.swiglu(x, x.bfloat16())
    with pytest.raises(TypeError, match="swiglu: gate must be one of"):
        ops.swiglu(x.int())
