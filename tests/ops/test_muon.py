"""The Muon step: singular values, PyTorch's own Muon, batches of one shape, and what forbids a step."""

import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fmcore.kernels import muon
from fmcore.kernels.muon import MuonOptions, muon_, muon_ref, orthogonalize

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHAPES = [(6, 6), (5, 17), (17, 5), (5, 17), (1, 4), (0, 3), (6, 6)]
OPTIONS = MuonOptions(0.02, 0.3, 0.9)


def made(dtype=F32, shapes=SHAPES, n=1):
    return [[torch.randn(s).to(dtype) for s in shapes] for _ in range(n)]


@pytest.mark.parametrize("shape", [(8, 8), (4, 32), (32, 4), (3, 7, 16), (2, 2, 5, 3)])
def test_singular_values_near_one(shape):
    x = torch.randn(shape, dtype=F64)
    y = orthogonalize(x)
    assert y.shape == x.shape
    assert ((s := torch.linalg.svdvals(y)) > 0.6).all() and (s < 1.25).all()
    # The singular vectors are those of x: U'yV is diagonal.
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ y @ vh.mT
    torch.testing.assert_close(core, torch.diag_embed(core.diagonal(dim1=-2, dim2=-1)), atol=1e-9, rtol=0)


def test_each_matrix_of_a_batch_is_its_own():
    x = torch.randn(3, 5, 9, dtype=F64) * torch.tensor([1e-3, 1.0, 1e3], dtype=F64)[:, None, None]
    together = orthogonalize(x)
    for one, y in zip(x, together, strict=True):
        torch.testing.assert_close(orthogonalize(one), y)
    assert (orthogonalize(torch.zeros(2, 3)) == 0).all() and orthogonalize(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize("options", [
    OPTIONS,
    replace(OPTIONS, nesterov=False, adjust_lr_fn="match_rms_adamw", ns_steps=3),
    replace(OPTIONS, weight_decay=0.0, lr=torch.tensor(0.1), ns_coefficients=(2.0, -1.5, 0.5), eps=0.1),
])  # fmt: skip
def test_as_the_reference(options):
    params, *grads = made(F64, n=4)
    mine, theirs = [p.clone() for p in params], [p.clone() for p in params]
    m, k = ([torch.zeros_like(p) for p in params] for _ in range(2))
    for g in grads:
        muon_(mine, g, m, options)
        for p, t, b in zip(theirs, g, k, strict=True):
            muon_ref(p, t, b, options)
    for a, b in zip([*mine, *m], [*theirs, *k], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_as_pytorch(adjust):
    """``torch.optim.Muon`` multiplies in bf16 everywhere."""
    shapes = [(6, 6), (5, 17), (17, 5)]
    params, *grads = made(shapes=shapes, n=4)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn=adjust)
    m = [torch.zeros_like(p) for p in params]
    for g in grads:
        muon_(params, g, m, replace(OPTIONS, adjust_lr_fn=adjust, ns_dtype=BF16))
        for p, t in zip(theirs, g, strict=True):
            p.grad = t.clone()
        optimizer.step()
    for p, b, t in zip(params, m, theirs, strict=True):
        torch.testing.assert_close(b, optimizer.state[t]["momentum_buffer"])
        # Three steps of length 0.02 sqrt(max(1, R / C)), each right to bf16.
        torch.testing.assert_close(
            p, t.detach(), rtol=0, atol=0.03 * 0.02 * 3 * MuonOptions(adjust_lr_fn=adjust).size(*p.shape)
        )


def test_bf16_products_are_near():
    x = torch.randn(12, 40)
    exact, near = orthogonalize(x), orthogonalize(x, dtype=BF16)
    assert near.dtype == F32 and 1e-5 < (near - exact).abs().max() < 0.05


def test_sizes():
    assert MuonOptions().size(16, 4) == 2 and MuonOptions().size(4, 16) == 1 and MuonOptions().size(3, 0) == 1
    assert MuonOptions(adjust_lr_fn="match_rms_adamw").size(4, 16) == pytest.approx(0.8)


def test_batches_are_bounded(monkeypatch):
    """The same numbers, matrix by matrix."""
    params, grads = made(F64, n=2)
    m = [torch.zeros_like(p) for p in params]
    other, k = [p.clone() for p in params], [torch.zeros_like(p) for p in params]
    muon_(params, grads, m, OPTIONS)
    monkeypatch.setattr(muon, "TOGETHER", 1)
    muon_(other, grads, k, OPTIONS)
    for a, b in zip(params, other, strict=True):
        torch.testing.assert_close(a, b)


def test_scale_and_clip():
    """Orthogonal updates do not see a scale, momenta do."""
    params, grads = made(F64, n=2)
    before, m = [p.clone() for p in params], [torch.zeros_like(p) for p in params]
    muon_(params, grads, m, OPTIONS, grad_scale=torch.tensor(4.0), clip=0.5)
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads])) / 4
    assert norm > 0.5
    for b, g in zip(m, grads, strict=True):
        torch.testing.assert_close(b, 0.1 * g / 4 * 0.5 / norm)
    k = [torch.zeros_like(p) for p in params]
    muon_(before, grads, k, OPTIONS)
    for a, b in zip(params, before, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", ["nan", "found_inf"])
def test_a_step_that_must_not_happen(bad):
    params, grads = made(n=2)
    m = [torch.randn_like(p) for p in params]
    before = [t.clone() for t in (*params, *m)]
    given = {"finite_check": True} if bad == "nan" else {"found_inf": torch.ones(())}
    if bad == "nan":
        grads[1][2, 3] = math.nan
    muon_(params, grads, m, OPTIONS, **given)
    assert all(torch.equal(a, b) for a, b in zip((*params, *m), before, strict=True))
    muon_(params, made()[0], m, OPTIONS, finite_check=True, found_inf=torch.zeros(()))
    assert not any(torch.equal(a, b) for a, b in zip((*params, *m), before, strict=True) if a.numel())


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_masters(dtype):
    """Steps add up in fp32 and parameters are its rounding; gradients stay as they are."""
    params, grads = made(dtype, n=2)
    masters, m = [p.float() for p in params], [torch.zeros_like(p, dtype=F32) for p in params]
    wide, k = [p.float() for p in params], [t.clone() for t in m]
    before = [g.clone() for g in grads]
    for _ in range(3):
        muon_(params, grads, m, OPTIONS, masters=masters, clip=1.0)
        muon_(wide, [g.float() for g in grads], k, OPTIONS, clip=1.0)
    for p, w, t, g, b in zip(params, masters, wide, grads, before, strict=True):
        torch.testing.assert_close(w, t)
        assert torch.equal(p, w.to(dtype)) and torch.equal(g, b)


def test_compiles_without_a_break():
    torch._dynamo.reset()
    params, grads = made(n=2)
    other, m = [p.clone() for p in params], [torch.zeros_like(p) for p in params]
    k = [torch.zeros_like(p) for p in params]
    torch.compile(muon_, fullgraph=True, backend="aot_eager")(params, grads, m, OPTIONS, clip=1.0)
    muon_(other, grads, k, OPTIONS, clip=1.0)
    for a, b in zip((*params, *m), (*other, *k), strict=True):
        torch.testing.assert_close(a, b)


class Seen(TorchDispatchMode):
    """Operators and the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.names, self.products = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        if "bmm" in func._schema.name:
            self.products.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_on_a_gpu_products_are_bf16_and_nothing_waits():
    with FakeTensorMode():
        lists = [[torch.empty(3, 4, device="cuda") for _ in range(2)] for _ in range(3)]
        scalar = torch.empty((), device="cuda")
        with Seen() as seen:
            muon_(*lists, replace(OPTIONS, lr=scalar), clip=1.0, norm=scalar, found_inf=scalar)
    assert seen.products == {BF16} and "aten::_local_scalar_dense" not in seen.names
    with FakeTensorMode():
        # A rate on another GPU, and of one element: torch.optim takes it.
        rate = torch.empty(1, device="cuda:1")
        muon_(*([torch.empty(3, 4, device="cuda:0")] for _ in range(3)), replace(OPTIONS, lr=rate))


@pytest.mark.parametrize("change, error, message", [
    ({"params": [torch.zeros(3)], "grads": [torch.zeros(3)], "momentum_buffers": [torch.zeros(3)]}, ValueError,
     r"muon_: params\[0\] must be a matrix \(R, C\), got \(3,\)"),
    ({"grads": [torch.zeros(2, 2)]}, ValueError, r"muon_: grads\[0\] must be \(2, 3\) like its parameter"),
    ({"momentum_buffers": [torch.zeros(2, 3).half()]}, TypeError, r"muon_: momentum_buffers\[0\] must be one of"),
    ({"masters": [torch.zeros(2, 3)]}, TypeError, r"muon_: params\[0\] must have 16 bits"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    args = {name: [torch.zeros(2, 3)] for name in ("params", "grads", "momentum_buffers")}
    with pytest.raises(error, match=message):
        muon_(**(args | change))
    muon_([], [], [])


def test_bad_options():
    with pytest.raises(ValueError, match="muon_: adjust_lr_fn must be original or match_rms_adamw, got 'x'"):
        MuonOptions(adjust_lr_fn="x")
    with pytest.raises(ValueError, match="muon_: momentum must be in .* got 1.0 and 5"):
        MuonOptions(momentum=1.0)
    with pytest.raises(ValueError, match=r"orthogonalize: x must be \(..., R, C\), got \(3,\)"):
        orthogonalize(torch.zeros(3))
    with pytest.raises(TypeError, match="orthogonalize: x must be one of"):
        orthogonalize(torch.zeros(3, 3, dtype=torch.int64))
