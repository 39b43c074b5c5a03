"""The AdamW step: both bodies against the formula and against PyTorch's own paths."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fmcore.kernels.adamw import adamw_, adamw_foreach_, adamw_fused_

SHAPES = [(7,), (3, 5), (), (2, 1, 4), (0,), (513,)]
OPTIONS = {"lr": 0.02, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.3}


def made(dtype, steps=3):
    params = [torch.randn(s, dtype=dtype) for s in SHAPES]
    grads = [[torch.randn(s, dtype=dtype) for s in SHAPES] for _ in range(steps)]
    return params, grads


def run(body, params, grads, scale=None):
    """Parameters and both moments after one step for each entry of ``grads``."""
    params = [p.clone() for p in params]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    for step, g in enumerate(grads, 1):
        body(params, [t.clone() for t in g], *state, step, *OPTIONS.values(), scale)
    return [params, *state]


def formula(p, gs, scale=1.0):
    """One number, with Python's floats."""
    m = v = 0.0
    for t, g in enumerate(gs, 1):
        g /= scale
        m = 0.8 * m + 0.2 * g
        v = 0.9 * v + 0.1 * g * g
        p *= 1 - 0.02 * 0.3
        p -= 0.02 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-6)
    return p, m, v


@pytest.mark.parametrize("scale", [None, 1.7])
@pytest.mark.parametrize("body", [adamw_foreach_, adamw_fused_])
def test_the_formula(body, scale):
    params, grads = made(torch.float64)
    tensor = None if scale is None else torch.tensor(scale)
    got = run(body, params, grads, tensor)
    for i, p in enumerate(params):
        for at in range(p.numel()):
            want = formula(p.reshape(-1)[at].item(), [g[i].reshape(-1)[at].item() for g in grads], scale or 1.0)
            for t, w in zip(got, want, strict=True):
                # The scale is fp32 in the operator.
                assert t[i].reshape(-1)[at].item() == pytest.approx(w, rel=1e-12 if scale is None else 1e-6, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("body, path", [(adamw_foreach_, "foreach"), (adamw_fused_, "fused")])
def test_bitwise_as_pytorch(body, path, dtype):
    params, grads = made(dtype)
    got = run(body, params, grads)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, **{path: True})
    for g in grads:
        for p, t in zip(theirs, g, strict=True):
            p.grad = t.clone()
        optimizer.step()
    for i, p in enumerate(theirs):
        state = optimizer.state[p]
        for mine, want in zip((t[i] for t in got), (p.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=True):
            assert torch.equal(mine, want)


@pytest.mark.parametrize("scale", [None, 3.0])
def test_bodies_agree(scale):
    params, grads = made(torch.float32)
    scale = None if scale is None else torch.tensor(scale)
    foreach, fused = (sum(run(body, params, grads, scale), []) for body in (adamw_foreach_, adamw_fused_))
    for a, b in zip(foreach, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * 2**-23, atol=2**-23)


def test_the_public_function_takes_mixed_lists():
    """Dtypes that differ and a transposed parameter go through foreach, and equal each step alone."""
    params = [torch.randn(4, 3).T, torch.randn(5, dtype=torch.float64), torch.randn(2, 2)]
    grads = [torch.randn_like(p) for p in params]
    alone = [p.clone() for p in params]
    together = [p.clone() for p in params]
    state = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    adamw_(together, [g.clone() for g in grads], *state, 1, **OPTIONS)
    for p, g in zip(alone, grads, strict=True):
        adamw_foreach_([p], [g.clone()], [torch.zeros_like(p)], [torch.zeros_like(p)], 1, *OPTIONS.values(), None)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=4 * 2**-23, atol=2**-23)


def test_no_parameters():
    adamw_([], [], [], [], 1)


@pytest.mark.parametrize("change, error, message", [
    ({"grads": [torch.zeros(3)] * 2}, ValueError, "adamw_: params, grads.* must be equally long, got 1, 2, 1, 1"),
    ({"grads": [torch.zeros(4)]}, ValueError, r"adamw_: grads\[0\] must be \(3,\) like its parameter, got \(4,\)"),
    ({"exp_avgs": [torch.zeros(1, 3)]}, ValueError, r"adamw_: exp_avgs\[0\] must be \(3,\).*got \(1, 3\)"),
    ({"params": [torch.zeros(3, dtype=torch.int64)]}, TypeError, r"adamw_: params\[0\] must be floating, got int64"),
    ({"step": 0}, ValueError, "adamw_: step must count from 1, got 0"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    args = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")} | {"step": 1} | change
    with pytest.raises(error, match=message):
        adamw_(*args.values())


class Names(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nothing_on_a_gpu_waits():
    """A number that is copied to the GPU, or read from it, stops the host until the GPU has caught up."""
    with FakeTensorMode():
        tensors = [[torch.empty(3, 4, device="cuda")] for _ in range(4)]
        scale = torch.empty((), device="cuda")
        with Names() as names:
            adamw_(*tensors, 1, grad_scale=scale)
    assert "aten::_fused_adamw_" in names.seen
    assert not {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense"} & set(names.seen), names.seen
