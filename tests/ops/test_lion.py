"""The Lion step: both bodies against the formula, and the tables it shares with AdamW (test_adamw.py proves those)."""

import math
from dataclasses import replace

import pytest
import tables
import torch
from tables import DEVICE, few_programs, planted, reachable
from torch import Tensor

from fmcore.kernels import multi_tensor as mt
from fmcore.kernels.lion import LionOptions, lion_, step_op
from fmcore.op import OPS, use

ON_GPU = torch.cuda.is_available()
F64, F32, BF16, F16, I8 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8
SHAPES = [(7,), (), (0,), (1023,), (1024,), (41, 53)]
OPTIONS = LionOptions(0.02, 0.8, 0.9, 0.3)
# Parameter, gradient, moment, master, stochastic.
KINDS = {
    "float32": (F32, F32, F32, False, False),
    "bf16 with masters": (BF16, F32, F32, True, False),
    "fp16 with masters": (F16, F16, F32, True, False),
    "bf16, stochastic": (BF16, BF16, BF16, False, True),
    "8-bit": (F32, BF16, I8, False, False),
    "8-bit, stochastic": (BF16, BF16, I8, False, True),
    "float64": (F64, F64, F64, False, False),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def run(body: str, kind: tuple, steps: int = 3, fn=lion_, options=OPTIONS, shapes=SHAPES, **given) -> list[Tensor]:
    """Parameters, moments, step counts, masters and absmax after ``steps``."""
    dtype, grad_dtype, moment, master, stochastic = kind
    generator = torch.Generator().manual_seed(0)

    def drawn(d: torch.dtype) -> list[Tensor]:
        return [torch.randn(s, generator=generator).to(DEVICE, d) for s in shapes]

    params = drawn(dtype)
    moments, counts = (
        [torch.zeros_like(p, dtype=moment) for p in params],
        [torch.zeros((), device=DEVICE) for _ in params],
    )
    masters = [p.float() for p in params] if master else []
    absmax = [torch.zeros(-(-p.numel() // 256), device=DEVICE) for p in params] if moment == I8 else []
    with use(body), reachable():
        for _ in range(steps):
            fn(
                params, drawn(grad_dtype), moments, counts, options,
                masters=masters, absmax=absmax, stochastic_rounding=stochastic, seed=5, **given,
            )  # fmt: skip
    return [*params, *moments, *counts, *masters, *absmax]


def formula(p: float, gs: list[float], scale: float) -> tuple[float, float]:
    """One number, with Python's floats."""
    m = 0.0
    for g in gs:
        g /= scale
        p = p * (1 - 0.02 * 0.3) - 0.02 * math.copysign(1, 0.8 * m + 0.2 * g)
        m = 0.9 * m + 0.1 * g
    return p, m


@pytest.mark.parametrize("body", ["eager", "triton"])
def test_the_formula(body):
    p, gs = torch.randn(5, dtype=F64, device=DEVICE), torch.randn(3, 5, dtype=F64, device=DEVICE)
    mine, m = p.clone(), torch.zeros_like(p)
    with use(body), reachable():
        step, scale = torch.zeros((), device=DEVICE), torch.tensor(2.0, device=DEVICE)
        for g in gs:
            lion_([mine], [g], [m], [step], OPTIONS, grad_scale=scale)
    for i in range(5):
        want = formula(p[i].item(), gs[:, i].tolist(), 2.0)
        assert (mine[i].item(), m[i].item()) == pytest.approx(want, rel=1e-12)
    assert step == 3


def test_gradients_in_fp64_are_taken_in_fp32():
    """They may be wider than the state; what is computed in does not change with them."""
    for dtype, stochastic in ((F32, False), (BF16, True)):
        one, other = (run("triton", (dtype, wide, dtype, False, stochastic), shapes=[(1025,)]) for wide in (F32, F64))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_one_list_of_two_dtypes_is_two_lists():
    """The numbers of a step come in the widest dtype of the list; each tensor is computed in its own."""

    def step(dtypes: list[torch.dtype]) -> list[Tensor]:
        params, moments, grads = ([torch.linspace(-1, 1, 1025, dtype=d) for d in dtypes] for _ in range(3))
        grads = [g.roll(7) for g in grads]
        with use("triton"), reachable():
            lion_(params, grads, moments, [torch.zeros(()) for _ in params], LionOptions(0.1, 0.9, 0.99))
        return [*params, *moments]

    p32, p64, m32, m64 = step([F32, F64])
    for together, alone in zip((p32, m32, p64, m64), step([F32]) + step([F64]), strict=True):
        assert torch.equal(together, alone)


def test_a_gradient_of_zero_has_no_direction():
    for body in ("eager", "triton"):
        p, m = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE)
        g = torch.tensor([0.0, 1.0, -1.0], device=DEVICE)
        with use(body), reachable():
            lion_([p], [g], [m], [torch.zeros((), device=DEVICE)], LionOptions(0.5))
        assert p.tolist() == [1.0, 0.5, 1.5]


@every_kind
def test_as_exact_as_eager(kind):
    """One step from zero and its moments; later ones may take another sign where a blend is zero to the last bit."""
    got, eager = (run(body, kind, 1, clip=2.0, finite_check=True) for body in ("triton", "eager"))
    truth = run("eager", (F64, F64, F64, False, False), 1, clip=2.0)
    n = len(SHAPES)
    if not kind[4]:
        for i in range(n):
            error = [(x[i].double() - truth[i]).abs().max().item() if x[i].numel() else 0.0 for x in (got, eager)]
            assert error[0] <= 2 * error[1] + torch.finfo(kind[0]).eps * 4
    for a, b in zip(got, eager, strict=True):
        # Rounding at random falls apart where fp32 differs in its last bit: one element in thousands.
        apart = (a.double() - b.double()).abs() > 1e-6 + 1e-6 * b.double().abs()
        assert a.dtype == b.dtype and int(apart.sum()) <= (3 if kind[4] or kind[2] == I8 else 0)


@every_kind
def test_same_bits_each_time(kind):
    first, again = (run("triton", kind) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_several_blocks_in_a_program():
    shapes = [(9 * 1024 + 1,), (3 * 1024,), (5,)]
    with few_programs():
        many = run("triton", KINDS["float32"], 1, shapes=shapes)
    assert all(torch.equal(a, b) for a, b in zip(many, run("triton", KINDS["float32"], 1, shapes=shapes), strict=True))


@pytest.mark.parametrize("body", ["eager", "triton"])
def test_a_step_that_must_not_happen(body):
    p, m, step = torch.ones(3, device=DEVICE), torch.zeros(3, device=DEVICE), torch.zeros((), device=DEVICE)
    bad, one = torch.tensor([1.0, math.nan, 1.0], device=DEVICE), torch.ones((), device=DEVICE)
    with use(body), reachable():
        lion_([p], [bad], [m], [step], finite_check=True)
        lion_([p], [one.expand(3)], [m], [step], found_inf=one)
        assert (p == 1).all() and (m == 0).all() and step == 0
        lion_([p], [bad], [m], [step])
        assert p.isnan().tolist() == m.isnan().tolist() == [False, True, False] and step == 1


BUGS = [
    ("m * beta1 + g * rest1", "m * beta2 + g * rest1"),
    ("m * beta2 + g * rest2", "direction"),
    ("tl.where(direction < 0, -1.0, direction)", "-1.0"),
    ("p * decay - lr * sign", "p - lr * sign"),
    (".to(ACC) * factor", ".to(ACC)"),
    ("tl.cdiv(size, BLOCK)), first)", "size // BLOCK), first)"),
    ("tl.load(coefs) != 0", "tl.load(coefs) == 0"),
]


@pytest.mark.skipif(ON_GPU, reason="a bug that writes out of bounds is for the interpreter")
@pytest.mark.parametrize("old, new", BUGS, ids=[new for _, new in BUGS])
def test_planted_bugs_are_caught(old, new, tmp_path):
    before = dict(OPS)
    try:
        bad = planted("lion.py", old, new, tmp_path)
        given = {"grad_scale": torch.tensor(4.0)}
        want = run("eager", KINDS["float32"], **given)
        got = run("triton", KINDS["float32"], fn=bad.lion_, options=bad.LionOptions(0.02, 0.8, 0.9, 0.3), **given)
        zero = torch.ones(3)
        with use("triton"), reachable():
            bad.lion_([zero], [torch.zeros(3)], [torch.zeros(3)], [torch.zeros(())], bad.LionOptions(0.5))
        good = all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(got, want, strict=True))
        assert not (good and (zero == 1).all())
    finally:
        OPS.clear()
        OPS.update(before)


@pytest.mark.parametrize("body", ["triton"] if ON_GPU else ["cpu", "triton"])
def test_opcheck(body):
    lists = [[torch.randn(3, 5, device=DEVICE)] for _ in range(3)]
    args = (
        *lists, [torch.zeros((), device=DEVICE)], [], [], *mt.hyper([(0.1, 0.9, 0.9, 0.0, 0.1)]), [0], False, 0,
        torch.tensor(2.0, device=DEVICE), 1.0, None, None, True,
    )  # fmt: skip
    with use(body), reachable():
        torch.library.opcheck(getattr(torch.ops.fmcore, step_op.name).default, args)


@pytest.mark.parametrize("change, error, message", [
    ({"grads": [torch.zeros(4)]}, ValueError, r"lion_: grads\[0\] must be \(3,\) like its parameter, got \(4,\)"),
    ({"exp_avgs": [torch.zeros(3, dtype=F64)]}, TypeError, r"lion_: exp_avgs\[0\] must be one of.*got float64"),
    ({"absmax": [torch.zeros(1)]}, TypeError, r"lion_: exp_avgs\[0\] must be one of \['int8'\], got float32"),
    ({"groups": [0, 0]}, ValueError, "lion_: groups must be 1 numbers below 1"),
    ({"seed": 2**31}, ValueError, "lion_: seed must be in"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    args = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs")} | {"steps": [torch.zeros(())]}
    with pytest.raises(error, match=message):
        lion_(**(args | change))
    lion_([], [], [], [])
    assert replace(OPTIONS, lr=torch.tensor(0.1)).lr == torch.tensor(0.1) and tables.DEVICE
