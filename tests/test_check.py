"""Messages name the operator, the argument, what was wanted and what came."""

import pytest
import torch

from fmcore import check, ops


def test_shape_returns_the_sizes():
    x, w = torch.empty(2, 3, 8), torch.empty(8)
    assert check.shape("op", x=(x, "... N"), w=(w, "N")) == {"N": 8}
    assert check.shape("op", x=(x, "B T N")) == {"B": 2, "T": 3, "N": 8}
    assert check.shape("op", x=(x, "B 3 N")) == {"B": 2, "N": 8}


@pytest.mark.parametrize(
    "args, message",
    [
        ({"w": (torch.empty(9), "8")}, r"op: w must be \(8\), got \(9,\)"),
        ({"x": (torch.empty(8), "M N")}, r"op: x must be \(M, N\), got \(8,\)"),
        ({"x": (torch.empty(()), "... N")}, r"op: x must be \(\.\.\., N\), got \(\)"),
        ({"x": (torch.empty(2, 8), "... N"), "w": (torch.empty(9), "N")}, r"op: w must be \(N\), N=8, got \(9,\)"),
    ],
)
def test_shape_says_what_was_wanted(args, message):
    with pytest.raises(ValueError, match=message):
        check.shape("op", **args)


def test_dtype():
    check.dtype("op", x=torch.empty(1), y=None)
    with pytest.raises(TypeError, match=r"op: i must be one of \['int64', 'int32'\], got float32"):
        check.dtype("op", check.INTS, i=torch.empty(1))


def test_same():
    check.same("op", x=torch.empty(1), y=None, z=torch.empty(2))
    with pytest.raises(TypeError, match="op: y must have the dtype of x, float32, got float64"):
        check.same("op", x=torch.empty(1), y=torch.empty(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="op: y must be on the device of x, cpu, got meta"):
        check.same("op", x=torch.empty(1), y=torch.empty(1, device="meta"))


@pytest.mark.parametrize("op", [ops.rms_norm, ops.layer_norm], ids=["rms_norm", "layer_norm"])
@pytest.mark.parametrize(
    "x, w, error, message",
    [
        (torch.empty(2, 8), torch.empty(9), ValueError, r"w must be \(N\), N=8, got \(9,\)"),
        (torch.empty(2, 0), torch.empty(0), ValueError, r"x must have at least one column, got \(2, 0\)"),
        (torch.empty(2, 8, dtype=torch.int64), torch.empty(8), TypeError, r"x must be one of \[.*\], got int64"),
        (torch.empty(2, 8), torch.empty(8).bfloat16(), TypeError, "w must have the dtype of x, float32, got bfloat16"),
    ],
)
def test_norms_refuse(op, x, w, error, message):
    with pytest.raises(error, match=f"^{op.__name__}: {message}"):
        op(x, w)


def test_layer_norm_checks_its_bias():
    with pytest.raises(ValueError, match=r"layer_norm: b must be \(N\), N=8, got \(7,\)"):
        ops.layer_norm(torch.empty(2, 8), torch.empty(8), torch.empty(7))
