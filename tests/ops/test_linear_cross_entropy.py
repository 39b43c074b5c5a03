"""The loss without logits against PyTorch's with them: numbers, gradients, memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fmcore.kernels import linear_cross_entropy as file
from fmcore.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref

M, C, V = 13, 6, 11
IGNORED = {"none": [], "some": [0, 5, 12], "all": list(range(M))}


@pytest.fixture(params=[1, 3 * V, 2**25], ids=["1 row", "3 rows", "1 chunk"])
def chunk(request, monkeypatch):
    """How many rows go through at a time."""
    monkeypatch.setattr(file, "CHUNK", request.param)


def made(ignored="some", dtype=torch.float64, M=M, C=C, V=V):
    h, w, bias = (torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((M, C), (V, C), (V,)))
    targets = torch.randint(V, (M,))
    targets[IGNORED[ignored]] = -100
    return h, w, bias, targets


def run(fn, h, w, bias, targets, reduction, frozen=()):
    """Loss, and the gradient of each of h, w, bias that is not frozen, under an upstream gradient that is not 1."""
    args = {"h": h, "w": w, "bias": bias}
    args = {n: t if t is None else t.detach().clone().requires_grad_(n not in frozen) for n, t in args.items()}
    loss = fn(args["h"], args["w"], targets, bias=args["bias"], reduction=reduction)
    wanted = [t for t in args.values() if t is not None and t.requires_grad]
    torch.manual_seed(1)
    return [loss.detach(), *torch.autograd.grad(loss, wanted, torch.randn_like(loss))]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["none", "some"])
@pytest.mark.parametrize("frozen", [(), ("w", "bias"), ("h",), ("h", "w")], ids=["all", "h", "w and bias", "bias"])
def test_equals_pytorch(chunk, reduction, ignored, frozen):
    args = made(ignored)
    for got, want in zip(
        run(linear_cross_entropy, *args, reduction, frozen),
        run(linear_cross_entropy_ref, *args, reduction, frozen),
        strict=True,
    ):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_bias(chunk, reduction):
    h, w, _, targets = made()
    for got, want in zip(
        run(linear_cross_entropy, h, w, None, targets, reduction),
        run(linear_cross_entropy_ref, h, w, None, targets, reduction),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_the_reference_by_hand():
    h, w, bias, targets = made()
    losses = linear_cross_entropy_ref(h, w, targets, bias, reduction="none")
    z = h @ w.T + bias
    for i, t in enumerate(targets.tolist()):
        want = 0.0 if t == -100 else (z[i].exp().sum().log() - z[i, t]).item()
        assert losses[i].item() == pytest.approx(want)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_all_ignored_is_zero(chunk, reduction):
    for t in run(linear_cross_entropy, *made("all"), reduction):
        assert (t == 0).all()


def test_mean_over_nothing_is_nan_as_in_pytorch():
    h, w, bias, targets = made("all")
    assert linear_cross_entropy(h, w, targets, bias=bias).isnan()
    assert linear_cross_entropy_ref(h, w, targets, bias).isnan()


def test_another_ignore_index(chunk):
    h, w, bias, _ = made()
    targets = torch.randint(V, (M,))
    targets[:3] = 4
    got = linear_cross_entropy(h, w, targets, bias=bias, ignore_index=4, reduction="none")
    torch.testing.assert_close(got, linear_cross_entropy_ref(h, w, targets, bias, 4, "none"))
    assert (got[:3] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    h, w = torch.randn(0, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    loss = linear_cross_entropy(h, w, torch.zeros(0, dtype=torch.int64), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss.sum() == 0
    dh, dw = torch.autograd.grad(loss.sum(), (h, w))
    assert dh.shape == h.shape and (dw == 0).all() | dw.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [32, 200])
def test_low_precision_errs_no_more_than_pytorch(monkeypatch, dtype, reduction, rows):
    """Over several draws, because the largest error of one is a matter of luck."""
    monkeypatch.setattr(file, "CHUNK", rows * 61)
    draws = []
    for _ in range(4):
        args = made(dtype=dtype, M=130, C=32, V=61)
        state = torch.get_rng_state()
        truth = run(linear_cross_entropy_ref, *(t.double() for t in args[:3]), args[3], reduction)
        eager, got = (run(fn, *args, reduction) for fn in (linear_cross_entropy_ref, linear_cross_entropy))
        torch.set_rng_state(state)
        assert got[0].dtype == torch.float32 and all(g.dtype == dtype for g in got[1:])
        draws.append(
            [
                ((g - t).abs().max(), (e - t).abs().max(), t.abs().max())
                for g, e, t in zip(got, eager, truth, strict=True)
            ]
        )
    for results in zip(*draws, strict=True):
        error, eager, largest = (max(column) for column in zip(*results, strict=True))
        assert error <= 2 * eager + torch.finfo(dtype).eps * largest


def test_large_logits_stay_finite():
    h, w = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    losses = linear_cross_entropy(h, w, torch.tensor([0, 1]), reduction="none")
    assert losses.tolist() == [0.0, 2e4]


@pytest.mark.parametrize("count", [64, 300, 3000, 20000])
def test_16_bit_gradients_are_not_scaled(count):
    """A mean over ``count`` targets: 1 / count rounded to 16 bits would make every gradient of h wrong alike."""
    h, w, targets = torch.randn(300, 64).bfloat16(), (torch.randn(500, 64) / 10).bfloat16(), torch.randint(500, (300,))

    def gradients(fn, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (h, w)]
        return torch.autograd.grad(fn(*leaves, targets, reduction="sum") / count, leaves)

    truth = gradients(linear_cross_entropy_ref, torch.float64)
    for got, want in zip(gradients(linear_cross_entropy, torch.bfloat16), truth, strict=True):
        assert abs((got.double() * want).sum() / want.square().sum() - 1) < 1e-3


def test_gradcheck():
    h, w, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (4, 2), (4,)))
    targets = torch.tensor([1, -100, 3])
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda h, w, b, r=reduction: linear_cross_entropy(h, w, targets, bias=b, reduction=r), (h, w, bias)
        )


class Watch(TorchDispatchMode):
    """The largest tensor that any operator returned, and how many matrix products ran."""

    largest = products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.largest = max(self.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
        self.products += func._schema.name in ("aten::mm", "aten::addmm")
        return out


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_never_holds_all_logits(monkeypatch, reduction):
    """No tensor is larger than a chunk of logits; the reference shows that the watch would see them all."""
    h, w, targets = torch.randn(64, 4), torch.randn(50, 4), torch.randint(50, (64,))
    monkeypatch.setattr(file, "CHUNK", 8 * 50)
    with Watch() as watch:
        run(linear_cross_entropy, h, w, None, targets, reduction)
    assert watch.largest <= 8 * 50
    with Watch() as watch:
        run(linear_cross_entropy_ref, h, w, None, targets, reduction)
    assert watch.largest == 64 * 50


@pytest.mark.parametrize("h_trains, w_trains", [(True, True), (True, False), (False, True), (False, False)])
def test_products(h_trains, w_trains):
    """A frozen head costs no product for its gradient, and without gradients there is the one for the logits."""
    h, w = torch.randn(8, 4, requires_grad=h_trains), torch.randn(9, 4, requires_grad=w_trains)
    targets = torch.arange(8)
    with Watch() as watch:
        loss = linear_cross_entropy(h, w, targets)
        if loss.requires_grad:
            loss.backward()
    assert watch.products == 1 + h_trains + w_trains
    with Watch() as watch, torch.no_grad():
        linear_cross_entropy(h, w, targets)
    assert watch.products == 1


@pytest.mark.parametrize("change, error, message", [
    ({"w": torch.zeros(V, C + 1)}, ValueError, r"linear_cross_entropy: w must be \(V, C\), V=11, C=6, got \(11, 7\)"),
    ({"targets": torch.zeros(M + 1, dtype=torch.int64)}, ValueError, "linear_cross_entropy: targets must be"),
    ({"targets": torch.zeros(M)}, TypeError, "linear_cross_entropy: targets must be one of .*got float32"),
    ({"bias": torch.zeros(V + 1)}, ValueError, "linear_cross_entropy: bias must be"),
    ({"w": torch.zeros(V, C).bfloat16()}, TypeError, "linear_cross_entropy: w must have the dtype of h"),
    ({"reduction": "average"}, ValueError, "linear_cross_entropy: reduction must be .*got 'average'"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    args = {"h": torch.zeros(M, C), "w": torch.zeros(V, C), "targets": torch.zeros(M, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(args.pop("h"), args.pop("w"), args.pop("targets"), **args)
