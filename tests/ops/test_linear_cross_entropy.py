"""The loss head without logits against PyTorch's with them: numbers, gradients, products, memory."""

import proof
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.loss_head import in_a_process
from fmcore.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_ref,
    linear_logprob,
    linear_logprob_ref,
)
from fmcore.nn import LinearCrossEntropy
from fmcore.op import use

M, C, V = 13, 6, 11
IGNORED = {"none": [], "some": [0, 5, 12], "all": list(range(M))}
OPTIONS = {"label_smoothing": 0.2, "softcap": 2.0, "logit_scale": 0.7, "z_loss": 0.05}
# Rows of a chunk.
CHUNKS = {"1 row": 1, "3 rows": 3, "all rows": 100}


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS.keys())
def workspace(request):
    return request.param * V * 8


@pytest.fixture(params=["cpu", "triton"])
def body(request):
    if request.param == "triton" and proof.DEVICE == "cuda":
        pytest.skip("the tensors of this file are on the CPU")
    with use(request.param):
        yield request.param


def made(ignored="some", dtype=torch.float64, M=M, C=C, V=V):
    h, w, bias = (torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in ((M, C), (V, C), (V,)))
    targets = torch.randint(V, (M,))
    targets[IGNORED[ignored]] = -100
    return h, w, bias, targets


def run(fn, h, w, bias, targets, frozen=(), **options):
    """Outputs, and the gradient of each of h, w, bias that is not frozen, under incoming gradients that are not 1."""
    args = {"h": h, "w": w, "bias": bias}
    args = {n: t if t is None else t.detach().clone().requires_grad_(n not in frozen) for n, t in args.items()}
    out = proof.outputs(lambda: fn(args["h"], args["w"], targets, bias=args["bias"], **options), ())
    wanted = [t for t in args.values() if t is not None and t.requires_grad]
    torch.manual_seed(1)
    return [*(o.detach() for o in out), *torch.autograd.grad(out, wanted, [torch.randn_like(o) for o in out])]


def same(got, want):
    for g, e in zip(got, want, strict=True):
        assert g.dtype == e.dtype and g.shape == e.shape
        torch.testing.assert_close(g, e, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [(), ("w", "bias"), ("h",), ("h", "w")], ids=["all", "h", "w and bias", "bias"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "options"])
def test_equals_pytorch(workspace, reduction, frozen, plain):
    """Whatever trains, in chunks of any size, with and without options."""
    options = {"reduction": reduction}
    if not plain:
        options |= OPTIONS | {"class_weights": torch.rand(V, dtype=torch.float64)}
    args = made()
    same(
        run(linear_cross_entropy, *args, frozen=frozen, workspace=workspace, **options),
        run(linear_cross_entropy_ref, *args, frozen=frozen, **options),
    )


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("frozen", [(), ("w", "bias"), ("h",)], ids=["all", "h", "w and bias"])
def test_logprob_equals_pytorch(workspace, entropy, frozen):
    args, options = made(), {"entropy": entropy, "softcap": 2.0, "logit_scale": 0.7}
    same(
        run(linear_logprob, *args, frozen=frozen, workspace=workspace, **options),
        run(linear_logprob_ref, *args, frozen=frozen, **options),
    )


def test_logprob_by_hand():
    h, w, bias, targets = made()
    logp, entropy = linear_logprob(h, w, targets, bias=bias, entropy=True)
    p = torch.softmax(h @ w.T + bias, 1)
    for i, t in enumerate(targets.tolist()):
        assert logp[i].item() == pytest.approx(0.0 if t == -100 else p[i, t].log().item())
        assert entropy[i].item() == pytest.approx(0.0 if t == -100 else -(p[i] * p[i].log()).sum().item())


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_all_ignored_is_zero(body, reduction):
    for t in run(linear_cross_entropy, *made("all"), reduction=reduction):
        assert (t == 0).all()


def test_mean_over_nothing_is_nan_as_in_pytorch(body):
    h, w, bias, targets = made("all")
    assert linear_cross_entropy(h, w, targets, bias=bias).isnan()
    assert linear_cross_entropy_ref(h, w, targets, bias=bias).isnan()


def test_another_ignore_index(body):
    h, w, bias, _ = made()
    targets = torch.randint(V, (M,), dtype=torch.int32)
    targets[:3] = 4
    got = linear_cross_entropy(h, w, targets, bias=bias, ignore_index=4, reduction="none")
    torch.testing.assert_close(
        got, linear_cross_entropy_ref(h, w, targets, bias=bias, ignore_index=4, reduction="none")
    )
    assert (got[:3] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(body, reduction):
    h, w = torch.randn(0, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    loss = linear_cross_entropy(h, w, torch.zeros(0, dtype=torch.int64), reduction=reduction)
    assert loss.isnan() if reduction == "mean" else loss.sum() == 0
    dh, dw = torch.autograd.grad(loss.sum(), (h, w))
    assert dh.shape == h.shape and (dw == 0).all() | dw.isnan().all()


def test_large_logits_stay_finite(body):
    h, w = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0]])
    losses = linear_cross_entropy(h, w, torch.tensor([0, 1]), reduction="none")
    assert losses.tolist() == [0.0, 2e4]


@pytest.mark.parametrize("count", [64, 3000, 20000])
def test_16_bit_gradients_are_not_scaled(count):
    """A mean over ``count`` targets: 1 / count rounded to 16 bits would make every gradient of h wrong alike."""
    h, w, targets = torch.randn(300, 64).bfloat16(), (torch.randn(500, 64) / 10).bfloat16(), torch.randint(500, (300,))

    def gradients(fn, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (h, w)]
        return torch.autograd.grad(fn(*leaves, targets, reduction="sum") / count, leaves)

    truth = gradients(linear_cross_entropy_ref, torch.float64)
    for got, want in zip(gradients(linear_cross_entropy, torch.bfloat16), truth, strict=True):
        assert abs((got.double() * want).sum() / want.square().sum() - 1) < 1e-3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_pass_is_the_first_again(body, reduction):
    """The first hands out its buffers; what the caller then does to them changes nothing."""
    h, w, bias, targets = (t.requires_grad_() if t.is_floating_point() else t for t in made())
    loss = linear_cross_entropy(h, w, targets, bias=bias, reduction=reduction).sum()
    first = torch.autograd.grad(loss, (h, w, bias), torch.tensor(0.3, dtype=loss.dtype), retain_graph=True)
    kept = [d.clone() for d in first]
    for d in first:
        d.zero_()
    second = torch.autograd.grad(loss, (h, w, bias), torch.tensor(0.3, dtype=loss.dtype), retain_graph=True)
    for a, b in zip(kept, second, strict=True):
        assert torch.equal(a, b)
    twice = torch.autograd.grad(loss, (h, w, bias), torch.tensor(0.6, dtype=loss.dtype))
    for a, b in zip(second, twice, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_gradients_accumulate(body):
    """Two losses into one .grad, through a graph that is used twice: no gradient is written after it was given."""
    h, w, bias, targets = (t.requires_grad_() if t.is_floating_point() else t for t in made())
    want = torch.autograd.grad(linear_cross_entropy_ref(h, w, targets, bias=bias), (h, w, bias))
    loss = linear_cross_entropy(h, w, targets, bias=bias)
    loss.backward(retain_graph=True)
    linear_cross_entropy(h, w, targets, bias=bias).backward()
    loss.backward()
    for t, d in zip((h, w, bias), want, strict=True):
        torch.testing.assert_close(t.grad, 3 * d)


def test_checkpointing():
    h, w, bias, targets = (t.requires_grad_() if t.is_floating_point() else t for t in made())
    want = torch.autograd.grad(linear_cross_entropy(h, w, targets, bias=bias), (h, w))
    loss = torch.utils.checkpoint.checkpoint(
        lambda h: linear_cross_entropy(h, w, targets, bias=bias), h, use_reentrant=False
    )
    for got, expected in zip(torch.autograd.grad(loss, (h, w)), want, strict=True):
        torch.testing.assert_close(got, expected)


class Watch(TorchDispatchMode):
    """The largest tensor that any PyTorch operator returned, and how many matrix products ran, and of how many rows."""

    def __init__(self):
        super().__init__()
        self.largest, self.products, self.rows = 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.largest = max(self.largest, t.numel() if isinstance(t, torch.Tensor) else 0)
        if func._schema.name in ("aten::mm", "aten::addmm"):
            self.products += 1
            self.rows = max(self.rows, len(out))
        return out


def watched(fn):
    # Without the dispatcher, under which nothing of a body could be seen.
    with proof.direct(), Watch() as watch:
        fn()
    return watch


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_never_holds_all_logits(body, reduction):
    """No tensor is larger than a chunk of logits; the reference shows that the watch would see them all."""
    h, w, targets = torch.randn(64, 4), torch.randn(50, 4), torch.randint(50, (64,))
    for options in ({}, OPTIONS):
        args = (h, w, None, targets)
        seen = watched(
            lambda a=args, o=options: run(linear_cross_entropy, *a, reduction=reduction, workspace=1600, **o)
        )
        assert 8 * 50 >= seen.largest > 4 * 50
    assert watched(lambda: run(linear_cross_entropy_ref, h, w, None, targets, reduction=reduction)).largest == 64 * 50


@pytest.mark.parametrize("h_trains, w_trains", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_products(body, h_trains, w_trains, reduction):
    """A frozen head costs no product for its gradient, and without gradients there is the one for the logits."""
    h, w = torch.randn(8, 4, requires_grad=h_trains), torch.randn(9, 4, requires_grad=w_trains)

    def step():
        loss = linear_cross_entropy(h, w, torch.arange(8), reduction=reduction).sum()
        if loss.requires_grad:
            loss.backward()

    again = reduction == "none" and w_trains
    assert watched(step).products == 1 + h_trains + w_trains + again
    with torch.no_grad():
        assert watched(lambda: linear_cross_entropy(h, w, torch.arange(8), reduction=reduction)).products == 1


def test_ignored_rows_are_left_out_of_the_products(body):
    h, w, targets = torch.randn(40, 4), torch.randn(3, 4), torch.full((40,), -100)
    targets[[3, 11, 30]] = 1
    assert watched(lambda: linear_cross_entropy(h, w, targets)).rows == 3


def test_memory_is_a_fraction_of_eager():
    """At a size where eager's logits are 4 times what a chunk may take; benchmarks/loss_head.py has the real one."""
    ours, eager = (in_a_process(side, [1024, 16, 65536, 1]) for side in ("fmcore", "eager"))
    assert ours["loss"] == pytest.approx(eager["loss"], rel=1e-5)
    assert eager["bytes"] > 8 * ours["bytes"]


def test_module():
    torch.manual_seed(3)
    module = LinearCrossEntropy(C, V, bias=True, label_smoothing=0.1, reduction="sum").double()
    h, _, _, targets = made()
    want = linear_cross_entropy_ref(
        h, module.weight, targets, bias=module.bias, label_smoothing=0.1, reduction="sum"
    )  # fmt: skip
    torch.testing.assert_close(module(h, targets), want)
    assert LinearCrossEntropy(C, V).bias is None


@pytest.mark.parametrize("change, error, message", [
    ({"w": torch.zeros(V, C + 1)}, ValueError, r"linear_cross_entropy: w must be \(V, C\), V=11, C=6, got \(11, 7\)"),
    ({"targets": torch.zeros(M + 1, dtype=torch.int64)}, ValueError, "linear_cross_entropy: targets must be"),
    ({"targets": torch.zeros(M)}, TypeError, "linear_cross_entropy: targets must be one of .*got float32"),
    ({"bias": torch.zeros(V + 1)}, ValueError, r"linear_cross_entropy: bias must be \(V\), V=11, got \(12,\)"),
    ({"class_weights": torch.zeros(V + 1)}, ValueError, "linear_cross_entropy: class_weights must be"),
    ({"w": torch.zeros(V, C).bfloat16()}, TypeError, "linear_cross_entropy: w must have the dtype of h"),
    ({"w": torch.zeros(0, C)}, ValueError, "linear_cross_entropy: there must be at least one class"),
    ({"reduction": "average"}, ValueError, "linear_cross_entropy: reduction must be .*got 'average'"),
    ({"label_smoothing": 1.5}, ValueError, "linear_cross_entropy: label_smoothing must be from 0 to 1, got 1.5"),
    ({"softcap": -1.0}, ValueError, "linear_cross_entropy: softcap must be positive or None, got -1.0"),
    ({"workspace": 0}, ValueError, "linear_cross_entropy: workspace must be a positive number of bytes, got 0"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    args = {"h": torch.zeros(M, C), "w": torch.zeros(V, C), "targets": torch.zeros(M, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(args.pop("h"), args.pop("w"), args.pop("targets"), **args)
