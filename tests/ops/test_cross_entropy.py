"""Cross-entropy on logits: every option against PyTorch's, and logits at the ends of what a number can be."""

import pytest
import torch
import torch.nn.functional as F

from fmcore.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from fmcore.nn import CrossEntropyLoss
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture(params=["eager", "triton"])
def body(request):
    with use(request.param):
        yield request.param


def run(fn, x, targets, **options):
    """The loss and the gradient of the logits."""
    x = x.detach().requires_grad_()
    loss = fn(x, targets, **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_pytorch(body, reduction, smoothing, weighted):
    """Every option that PyTorch has too."""
    x, targets = torch.randn(17, 9, dtype=torch.float64), torch.randint(9, (17,))
    targets[::4] = 3
    weights = torch.rand(9, dtype=torch.float64) if weighted else None
    options = {"ignore_index": 3, "label_smoothing": smoothing, "reduction": reduction}
    got = run(cross_entropy, x, targets, class_weights=weights, **options)
    want = run(F.cross_entropy, x, targets, weight=weights, **options)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-7)


def test_the_order_of_bias_scale_and_softcap(body):
    """Those of a layer with a bias, of Cohere and of Gemma, in that order; z-loss on what comes out."""
    x, bias, targets = torch.randn(6, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64), torch.arange(6) % 5
    got = cross_entropy(x, targets, bias=bias, logit_scale=0.5, softcap=2.0, z_loss=0.1, reduction="none")
    z = 2 * torch.tanh(0.5 * (x + bias) / 2)
    want = F.cross_entropy(z, targets, reduction="none") + 0.1 * z.logsumexp(1).square()
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [2.0, 4.5, 7.0, 12.0, 50.0])
def test_confident_tokens(body, dtype, margin):
    """p - 1 of the target is formed before it is rounded: what a confident token has left is right to its last bit."""
    x = torch.zeros(3, 40, dtype=dtype)
    x[:, 7] = margin
    targets = torch.full((3,), 7)
    _, got = run(cross_entropy, x, targets, reduction="sum")
    _, want = run(F.cross_entropy, x.double(), targets, reduction="sum")
    # fp32 knows p to some 2^-24, so that much of p - 1 is lost.
    assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 5e-7).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"z_loss": 1e-3}], ids=["plain", "softcap", "z-loss"])
@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(body, options, size):
    """Large alike, and large apart: nothing is NaN where it is not in fp64."""
    if size == 1e30 and "z_loss" in options:
        pytest.skip("its square is beyond fp32")
    x = torch.tensor([[size, size, -size], [size, 0.0, 0.0], [0.0, size, 1.0]])
    targets = torch.tensor([0, 0, 1])
    got = run(cross_entropy, x, targets, reduction="none", **options)
    want = run(cross_entropy_ref, x.double(), targets, reduction="none", **options)
    for g, e in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("V", [6, 5000])
def test_logits_of_minus_infinity(body, V):
    """Masked classes have probability 0; a masked target costs infinity. The first block of a row may be all masked."""
    x = torch.randn(4, V)
    x[0, : V - 2] = -torch.inf
    x[1, 1:] = -torch.inf
    x[2, 3] = -torch.inf
    targets = torch.tensor([V - 1, 0, 3, 2])
    for options in ({}, {"softcap": 5.0}):
        loss, dx = run(cross_entropy, x, targets, reduction="none", **options)
        want, dwant = run(cross_entropy_ref, x.double(), targets, reduction="none", **options)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(dx.double(), dwant, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_ignored_rows_are_not_looked_at(body, bad):
    x, targets = torch.randn(5, 6), torch.tensor([1, -100, 2, -100, 0])
    x[1::2] = bad
    for options in ({}, {"z_loss": 0.1, "label_smoothing": 0.1}):
        loss, dx = run(cross_entropy, x, targets, **options)
        if body == "triton":
            assert loss.isfinite() and dx.isfinite().all() and (dx[1::2] == 0).all()
        else:
            assert loss.isfinite() and (dx[1::2] == 0).all() or dx[1::2].isnan().any()


def test_all_rows_ignored(body):
    x, targets = torch.randn(3, 4), torch.full((3,), -100)
    loss, dx = run(cross_entropy, x, targets, reduction="sum", z_loss=0.1, label_smoothing=0.1)
    assert loss == 0 and (dx == 0).all()
    # As in PyTorch: the mean of nothing.
    assert cross_entropy(x, targets).isnan() and F.cross_entropy(x, targets).isnan()


def test_a_target_that_is_no_class():
    x = torch.randn(3, 4)
    with use("triton"):
        loss, dx = run(cross_entropy, x, torch.tensor([1, 4, -1]), reduction="none")
    assert loss.isnan().tolist() == [False, True, True] and dx.isnan().any(1).tolist() == [False, True, True]


def test_int32_targets(body):
    x, targets = torch.randn(3, 4), torch.tensor([1, 0, 3])
    assert torch.equal(cross_entropy(x, targets.int()), cross_entropy(x, targets))


@pytest.mark.parametrize("weighted", [False, True])
def test_module(weighted):
    """In the place of PyTorch's."""
    x, targets, weights = torch.randn(8, 5), torch.randint(5, (8,)), torch.rand(5) if weighted else None
    ours, theirs = (
        kind(weights, label_smoothing=0.1, ignore_index=2) for kind in (CrossEntropyLoss, torch.nn.CrossEntropyLoss)
    )
    torch.testing.assert_close(ours(x, targets), theirs(x, targets))
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("change, error, message", [
    ({"logits": torch.zeros(3)}, ValueError, r"cross_entropy: logits must be \(M, V\), got \(3,\)"),
    ({"logits": torch.zeros(3, 0)}, ValueError, "cross_entropy: there must be at least one class, got V=0"),
    ({"logits": torch.zeros(3, 5).long()}, TypeError, "cross_entropy: logits must be one of"),
    ({"targets": torch.zeros(2).long()}, ValueError, r"cross_entropy: targets must be \(M\), M=3, got \(2,\)"),
    ({"targets": torch.zeros(3)}, TypeError, "cross_entropy: targets must be one of .*got float32"),
    ({"bias": torch.zeros(4)}, ValueError, r"cross_entropy: bias must be \(V\), V=5, got \(4,\)"),
    ({"bias": torch.zeros(5).double()}, TypeError, "cross_entropy: bias must have the dtype of logits"),
    ({"class_weights": torch.zeros(5).long()}, TypeError, "cross_entropy: class_weights must be one of"),
    ({"class_weights": torch.zeros(5, device="meta")}, ValueError, "cross_entropy: class_weights must be on cpu"),
    ({"reduction": "all"}, ValueError, "cross_entropy: reduction must be 'mean', 'sum' or 'none', got 'all'"),
    ({"softcap": -2.0}, ValueError, "cross_entropy: softcap must be positive or None, got -2.0"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    args = {"logits": torch.zeros(3, 5, device="cpu"), "targets": torch.zeros(3, dtype=torch.int64, device="cpu")}
    args |= change
    with pytest.raises(error, match=message):
        cross_entropy(args.pop("logits"), args.pop("targets"), **args)


@pytest.mark.parametrize("softcap", [0.0, -1.0])
def test_a_softcap_must_be_positive(softcap):
    with pytest.raises(ValueError, match="cross_entropy: softcap must be positive or None, got"):
        cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), softcap=softcap)
