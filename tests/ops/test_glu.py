"""What is peculiar to the gated activations: packed and separate are one operator, a packed gradient is one buffer."""

from functools import partial

import interpreter
import proof
import pytest
import torch
import torch.nn.functional as nnf

from fmcore import nn, ops
from fmcore.kernels.glu import OPERATORS
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")
bodies = pytest.mark.parametrize("body", ["cpu", "triton"])

# Each operator and the activation of its gate.
GATES = {
    "swiglu": (ops.swiglu, nnf.silu),
    "geglu": (ops.geglu, partial(nnf.gelu, approximate="tanh")),
    "geglu-none": (partial(ops.geglu, approximate="none"), nnf.gelu),
    "reglu": (ops.reglu, nnf.relu),
}
gates = pytest.mark.parametrize("op, f", GATES.values(), ids=GATES.keys())
gates_and_bodies = pytest.mark.parametrize(
    "op, f, body",
    [pytest.param(*gate, body, id=f"{name}-{body}") for name, gate in GATES.items() for body in ("eager", "triton")]
    + [pytest.param(*GATES["swiglu"], "cpu", id="swiglu-cpu")],
)


@gates_and_bodies
def test_equals_pytorch(body, op, f):
    gate = torch.linspace(-12, 12, 2401, dtype=torch.float64).view(49, 49).requires_grad_()
    up, bias = (torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((49, 49), (98,)))
    expected = f(gate + bias[:49]) * (up + bias[49:])
    dy = torch.randn_like(expected)
    with use(body):
        got = op(gate, up, bias=bias)
        grads = torch.autograd.grad(got, (gate, up, bias), dy)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    for g, e in zip(grads, torch.autograd.grad(expected, (gate, up, bias), dy), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


@gates_and_bodies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("F, biased", [(1, True), (37, False), (37, True), (704, False)])
def test_packed_equals_separate(body, dtype, F, biased, op, f):
    packed = torch.randn(2, 5, 2 * F, dtype=dtype, requires_grad=True)
    gate, up = (x.detach().requires_grad_() for x in packed.chunk(2, -1))
    bias = torch.randn(2 * F, dtype=dtype, requires_grad=True) if biased else None
    dy = torch.randn(2, 5, F, dtype=dtype)
    with use(body):
        one, two = op(packed, bias=bias), op(gate, up, bias=bias)
        d, *db_one = torch.autograd.grad(one, (packed, bias) if biased else packed, dy)
        dgate, dup, *db_two = torch.autograd.grad(two, (gate, up, bias) if biased else (gate, up), dy)
    # On a CPU PyTorch takes the last few elements of a row by other instructions, and rows lie otherwise.
    same = partial(torch.testing.assert_close, **({"rtol": 0, "atol": 0} if body == "triton" else {}))
    same(one, two)
    same(d, torch.cat((dgate, dup), -1))
    same(db_one, db_two)


@pytest.mark.skipif(proof.DEVICE != "cpu", reason="reads the log of the CPU allocator")
@pytest.mark.parametrize("op, body", [(ops.swiglu, "cpu"), (ops.swiglu, "triton"), (ops.reglu, "triton")])
def test_packed_gradient_is_one_buffer(op, body):
    """The peak of backward is the gradient itself: no half that a cat would join to it, no recomputed activation."""
    M, F = 64, 128
    packed, dy = torch.randn(M, 2 * F, requires_grad=True), torch.randn(M, F)
    with use(body):
        y = op(packed)
        with torch.profiler.profile(profile_memory=True) as profile:
            y.backward(dy)
    allocated = [e.self_cpu_memory_usage for e in profile.events()]
    assert [n for n in allocated if n >= M * F * 4] == [M * 2 * F * 4]
    assert packed.grad.is_contiguous()


@pytest.mark.skipif(proof.DEVICE != "cpu", reason="reads the arguments of launches from the interpreter")
@gates
def test_halves_of_a_fused_projection_are_not_copied(op, f):
    """gate and up as two views of one wide product, in either order, with a gradient that is a view too."""
    wide, dy = torch.randn(6, 30), torch.randn(6, 20)[:, 3:13]
    gate, up = wide[:, 18:28].requires_grad_(), wide[:, 2:12].requires_grad_()
    with use("triton"), interpreter.recorded() as launches:
        y = op(gate, up)
        torch.autograd.grad(y, (gate, up), dy)
    for launch in launches:
        reached = {span.tensor.data_ptr() for span in launch.spans}
        assert {gate.data_ptr(), up.data_ptr()} <= reached
    assert dy.data_ptr() in reached


def test_backward_returns_the_layout_of_its_input():
    dy, x, b = torch.randn(3, 4), torch.randn(3, 8), torch.randn(8)
    for name, kind in (("swiglu", "silu"), ("geglu", "gelu"), ("reglu", "relu")):
        bwd = OPERATORS[name][1]
        with use("triton"):
            packed, nothing = bwd(dy, x, None, None, kind, True, False)
            separate, _ = bwd(dy, x[:, :4], x[:, 4:], None, kind, True, False)
            none, db = bwd(dy, x, None, b, kind, False, True)
            both = bwd(dy, x, None, b, kind, True, True)
        assert packed.shape == (3, 8) and separate.shape == (2, 3, 4)
        assert nothing.shape == none.shape == (0,) and torch.equal(db, both[1])


@gates
def test_gradient_of_one_half_alone(op, f):
    gate, up, dy = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 5)
    for i in (0, 1):
        pair = [gate.clone().requires_grad_(i == 0), up.clone().requires_grad_(i == 1)]
        with use("triton"):
            (got,) = torch.autograd.grad(op(*pair), pair[i], dy)
        (expected,) = torch.autograd.grad(f(pair[0]) * pair[1], pair[i], dy)
        torch.testing.assert_close(got, expected)


@bodies
def test_large_gates(body):
    """exp(-gate) overflows: silu is 0 on one side and the identity on the other, with no NaN in value or gradient."""
    gate = torch.tensor([-1e30, -1e4, -200.0, 0.0, 200.0, 1e4, 1e30], requires_grad=True)
    up = torch.full((7,), 2.0, requires_grad=True)
    with use(body):
        y = ops.swiglu(gate, up)
        dgate, dup = torch.autograd.grad(y.sum(), (gate, up))
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0.0, 0.0, 0.0, 400.0, 2e4, 2e30]))
    torch.testing.assert_close(dgate, torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0]))
    torch.testing.assert_close(dup, torch.tensor([0.0, 0.0, 0.0, 0.0, 200.0, 1e4, 1e30]))


@gates
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nan_only_where_pytorch_has_one(op, f, dtype):
    """At infinities, the largest numbers and NaN in both halves; eager in fp32, as 16 bits overflow where we do not."""
    ends = torch.tensor([-float("inf"), -torch.finfo(dtype).max, -1.0, 0.0, 1.0, float("inf"), float("nan")])
    gate, up = (x.to(dtype).requires_grad_() for x in torch.cartesian_prod(ends, ends).unbind(-1))
    wide = [x.detach().float().requires_grad_() for x in (gate, up)]
    expected = f(wide[0]) * wide[1]
    with use("triton"):
        y = op(gate, up)
        grads = torch.autograd.grad(y.sum(), (gate, up))
    for g, e in zip((y, *grads), (expected, *torch.autograd.grad(expected.sum(), wide)), strict=True):
        assert not (g.isnan() & ~e.isnan()).any()
    assert y[gate.isnan() | up.isnan()].isnan().all()


def test_a_closed_gate_of_reglu_passes_nothing_on():
    gate, up = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True), torch.full((3,), float("inf"))
    with use("triton"):
        ops.reglu(gate, up).sum().backward()
    assert torch.equal(gate.grad, torch.tensor([0.0, 0.0, float("inf")]))


@pytest.mark.parametrize("make", [nn.SwiGLU, nn.GEGLU, nn.ReGLU, partial(nn.GEGLU, "none")])
def test_modules(make):
    x, module = torch.randn(3, 8), make(bias=8)
    assert not list(make().parameters())
    torch.testing.assert_close(module(x), make()(x))
    with torch.no_grad():
        module.bias += torch.arange(8.0)
    torch.testing.assert_close(module(x), make()(x + torch.arange(8.0)))
    module(x).sum().backward()
    assert module.bias.grad.shape == (8,)


@pytest.mark.parametrize("name", ["swiglu", "geglu", "reglu"])
def test_errors_name_the_argument(name):
    x, op = torch.randn(3, 7), getattr(ops, name)
    with pytest.raises(ValueError, match=rf"{name}: gate without up must be \(\.\.\., 2F\), got \(3, 7\)"):
        op(x)
    with pytest.raises(ValueError, match=rf"{name}: up must have the shape of gate, \(3, 7\), got \(3, 6\)"):
        op(x, x[:, :6])
    with pytest.raises(TypeError, match=f"{name}: up must have the dtype of gate, float32, got bfloat16"):
        op(x, x.bfloat16())
    with pytest.raises(TypeError, match=f"{name}: gate must be one of"):
        op(x.int())
    with pytest.raises(ValueError, match=rf"{name}: bias must be \(2F\), F=7, got \(7,\)"):
        op(x, x, bias=x[0])
    with pytest.raises(ValueError, match=rf"{name}: bias must be \(2F\), F=3, got \(3,\)"):
        op(x[:, :6], bias=x[0, :3])
    with pytest.raises(TypeError, match=f"{name}: bias must have the dtype of gate, float32, got float64"):
        op(x, x, bias=x.double().flatten()[:14])
    with pytest.raises(ValueError, match=f"{name}: bias must be on the device of gate"):
        op(x, x, bias=torch.empty(14, device="meta"))


def test_geglu_knows_two_formulas():
    with pytest.raises(ValueError, match="geglu: approximate must be 'tanh' or 'none', got 'erf'"):
        ops.geglu(torch.randn(3, 8), approximate="erf")
