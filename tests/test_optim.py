"""The optimizer against ``torch.optim.AdamW`` with ``clip_grad_norm_`` in front."""

import copy

import pytest
import torch
from torch import nn

from fmcore.errors import InputError
from fmcore.optim import AdamW, decay_groups

OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.2}


def net(dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3)).to(dtype)


def backward(model, i, factor=1.0):
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(i)).to(next(model.parameters()).dtype)
    model.zero_grad()
    (model(x).square().sum() * factor).backward()


def same(a, b, **tolerance):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bitwise_as_pytorch_without_clipping(dtype):
    mine, theirs = (m := net(dtype)), copy.deepcopy(m)
    a, b = AdamW(mine.parameters(), **OPTIONS), torch.optim.AdamW(theirs.parameters(), fused=True, **OPTIONS)
    for i in range(5):
        backward(mine, i), backward(theirs, i)
        norm = a.step()
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(p.grad for p in theirs.parameters()))
        b.step()
        same(mine, theirs)


@pytest.mark.parametrize("factor", [1e-4, 10.0])
def test_clip_is_clip_grad_norm(factor):
    """Below the limit nothing is scaled; above it the step is that of gradients of norm ``clip``."""
    mine, theirs = (m := net(torch.float64)), copy.deepcopy(m)
    a, b = AdamW(mine.parameters(), **OPTIONS), torch.optim.AdamW(theirs.parameters(), **OPTIONS)
    for i in range(5):
        backward(mine, i, factor), backward(theirs, i, factor)
        norm = a.step(clip=0.5)
        want = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert (want > 0.5) == (factor > 1)
        torch.testing.assert_close(norm, want)
        b.step()
        # PyTorch divides by norm + 1e-6, and the scale is fp32 here.
        same(mine, theirs, rtol=1e-5, atol=1e-7)


def test_clipping_by_hand():
    """One parameter, one step: Adam divides a gradient by itself, so eps is what makes its scale visible."""
    p = nn.Parameter(torch.tensor([1.0, -1.0]))
    p.grad = torch.tensor([3.0, 4.0])
    norm = AdamW([p], lr=1.0, betas=(0.0, 0.0), eps=1.0, weight_decay=0.0).step(clip=1.0)
    assert norm.item() == 5.0
    torch.testing.assert_close(p.detach(), torch.tensor([1 - 0.6 / 1.6, -1 - 0.8 / 1.8]))


def test_parameters_without_a_gradient_wait():
    """They do not move, decay or count a step until their first gradient comes."""
    model = net()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    late = model[3].weight
    before = late.detach().clone()
    for i in range(3):
        backward(model, i)
        late.grad = None
        optimizer.step()
    assert torch.equal(late, before) and not optimizer.state[late]
    backward(model, 3)
    grad = late.grad.clone()
    optimizer.step()
    assert optimizer.state[late]["step"] == 1 and optimizer.state[model[0].weight]["step"] == 4
    twin = nn.Parameter(before.clone())
    twin.grad = grad
    AdamW([twin], **OPTIONS).step()
    assert torch.equal(late, twin)


def test_no_gradient_at_all():
    model = net()
    before = copy.deepcopy(model)
    assert AdamW(model.parameters()).step(clip=1.0).item() == 0.0
    same(model, before)


def test_groups_have_their_own_options():
    mine, theirs = (m := net()), copy.deepcopy(m)

    def groups(model):
        return [
            {"params": list(model[0].parameters()), "lr": 0.1, "weight_decay": 0.0},
            {"params": list(model[3].parameters()), "betas": (0.5, 0.6), "eps": 1e-3},
        ]

    a, b = AdamW(groups(mine), **OPTIONS), torch.optim.AdamW(groups(theirs), fused=True, **OPTIONS)
    for i in range(3):
        backward(mine, i), backward(theirs, i)
        a.step(), b.step()
        for group in (*a.param_groups, *b.param_groups):
            group["lr"] *= 0.5
    same(mine, theirs)


def test_decay_groups():
    model = net()
    model[3].weight.requires_grad_(False)
    matrices, vectors = decay_groups(model, 0.3)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert [id(p) for p in matrices["params"]] == [id(model[0].weight)]
    assert [id(p) for p in vectors["params"]] == [id(p) for p in (model[0].bias, *model[1].parameters(), model[3].bias)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_fp32(dtype):
    """Steps too small for one rounding of the parameter still add up, and both moments are fp32."""
    p = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = AdamW([p], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step(clip=1.0)
    torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 100 * 1e-4))
    assert all(optimizer.state[p][name].dtype == torch.float32 for name in ("master", "exp_avg", "exp_avg_sq"))


def test_the_norm_of_bf16_gradients_is_fp32():
    p = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    p.grad = torch.randn(1000).bfloat16()
    norm = AdamW([p]).step()
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm, p.grad.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_exactly(dtype):
    """tensors, load_tensors: the second half of a run is bit for bit that of a run without a break."""
    straight = net(dtype)
    a = AdamW(straight.parameters(), **OPTIONS)
    for i in range(6):
        backward(straight, i)
        a.step(clip=1.0)
        if i == 2:
            resumed = copy.deepcopy(straight)
            saved = {name: t.clone() for name, t in a.tensors(dict(straight.named_parameters())).items()}
    b = AdamW(resumed.parameters(), **OPTIONS)
    b.load_tensors(dict(resumed.named_parameters()), saved)
    for i in range(3, 6):
        backward(resumed, i)
        b.step(clip=1.0)
    same(straight, resumed)


def test_state_of_another_shape():
    model = net()
    optimizer = AdamW(model.parameters())
    backward(model, 0)
    optimizer.step()
    named = dict(model.named_parameters())
    saved = optimizer.tensors(named)
    for name, change in (("0.weight:exp_avg", torch.zeros(3)), ("0.weight:exp_avg_sq", None)):
        bad = {key: t for key, t in (saved | {name: change}).items() if t is not None}
        with pytest.raises(InputError, match=f"optimizer: {name} must be .16, 6. like its parameter, got"):
            AdamW(model.parameters()).load_tensors(named, bad)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -0.1}, {"betas": (1.0, 0.9)}])
def test_bad_options(bad):
    with pytest.raises(ValueError, match="AdamW: lr, eps and weight_decay must be"):
        AdamW(net().parameters(), **bad)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="AdamW.step: closure must be None"):
        AdamW(net().parameters()).step(lambda: 0.0)
