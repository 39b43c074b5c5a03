"""The AdamW step: every body against the formula, PyTorch's own paths and fp64, and what breaks tables of addresses."""

import math
from dataclasses import dataclass, replace
from functools import partial

import interpreter
import proof
import pytest
import tables
import torch
from tables import DEVICE, few_programs, planted, reachable
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fmcore.kernels import multi_tensor as mt
from fmcore.kernels.adamw import AdamWOptions, adamw_, step_op
from fmcore.op import OPS, use

ON_GPU = torch.cuda.is_available()
F64, F32, BF16, F16, I8, U8 = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8,
)  # fmt: skip
SHAPES = [(7,), (3, 5), (), (2, 1, 4), (0,), (1023,), (1024,), (1025,), (41, 53)]
OPTIONS = AdamWOptions(0.02, 0.8, 0.9, 1e-6, 0.3)


@dataclass
class Lists:
    """What a step takes; ``all`` is what it may change."""

    params: list[Tensor]
    m: list[Tensor]
    v: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    absmax: tuple[list[Tensor], list[Tensor]]

    @property
    def all(self) -> list[Tensor]:
        return [*self.params, *self.m, *self.v, *self.steps, *self.masters, *self.absmax[0], *self.absmax[1]]

    @property
    def moments(self) -> tuple[list[Tensor], list[Tensor]]:
        """In fp32, whatever they are kept in."""
        if not self.absmax[0]:
            return self.m, self.v
        m = [mt.dequantise_signed(*pair) for pair in zip(self.m, self.absmax[0], strict=True)]
        return m, [mt.dequantise_unsigned(*pair) for pair in zip(self.v, self.absmax[1], strict=True)]

    def step(self, grads: list[Tensor], options=OPTIONS, fn=adamw_, **given) -> None:
        with reachable():
            fn(
                self.params, grads, self.m, self.v, self.steps, options,
                masters=self.masters, absmax=self.absmax, **given,
            )  # fmt: skip


def made(dtype=F32, moments=(F32, F32), master=False, shapes=SHAPES, device=DEVICE, seed=0) -> Lists:
    generator = torch.Generator().manual_seed(seed)
    params = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
    eight = moments[0] == I8
    absmax = [[torch.zeros(-(-p.numel() // 256), device=device) for p in params] if eight else [] for _ in "mv"]
    return Lists(
        params,
        *([torch.zeros_like(p, dtype=d) for p in params] for d in moments),
        [torch.zeros((), device=device) for _ in params],
        [p.float() for p in params] if master else [],
        tuple(absmax),
    )


def drawn(n=3, dtype=F32, shapes=SHAPES, device=DEVICE) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(s, generator=generator).to(device, dtype) for s in shapes] for _ in range(n)]


def run(body: str, lists: Lists, grads: list[list[Tensor]], **given) -> Lists:
    with use(body):
        for g in grads:
            lists.step([t.clone() for t in g], **given)
    return lists


def formula(p: float, gs: list[float], scale: float = 1.0) -> tuple[float, float, float]:
    """One number, with Python's floats."""
    m = v = 0.0
    for t, g in enumerate(gs, 1):
        g /= scale
        m = 0.8 * m + 0.2 * g
        v = 0.9 * v + 0.1 * g * g
        p *= 1 - 0.02 * 0.3
        p -= 0.02 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.9**t)) + 1e-6)
    return p, m, v


BODIES = ["eager", "triton"] if ON_GPU else ["eager", "cpu", "triton"]
every_body = pytest.mark.parametrize("body", BODIES)
# Parameter, gradient, moments, master.
KINDS = {
    "float32": (F32, F32, (F32, F32), False),
    "float32 with bf16 gradients": (F32, BF16, (F32, F32), False),
    "bf16 with masters": (BF16, BF16, (F32, F32), True),
    "fp16 with masters": (F16, F16, (F32, F32), True),
    "bf16 moments": (F32, F32, (BF16, BF16), False),
    "8-bit moments": (F32, F32, (I8, U8), False),
    "8-bit moments with masters": (BF16, F32, (I8, U8), True),
    "float64": (F64, F64, (F64, F64), False),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.mark.parametrize("scale", [None, 1.7])
@every_body
def test_the_formula(body, scale):
    shapes = [(3,), (2, 2), ()]
    grads = drawn(dtype=F64, shapes=shapes)
    given = {} if scale is None else {"grad_scale": torch.tensor(scale, dtype=F64, device=DEVICE)}
    start = made(F64, (F64, F64), shapes=shapes)
    got = run(body, made(F64, (F64, F64), shapes=shapes), grads, **given)
    for i, p in enumerate(start.params):
        for at in range(p.numel()):
            want = formula(p.reshape(-1)[at].item(), [g[i].reshape(-1)[at].item() for g in grads], scale or 1.0)
            for t, w in zip((got.params, got.m, got.v), want, strict=True):
                # PyTorch's single pass takes the scale in fp32.
                rel = 1e-6 if scale and body == "cpu" else 1e-12
                assert t[i].reshape(-1)[at].item() == pytest.approx(w, rel=rel, abs=1e-14)
    assert all(s == 3 for s in got.steps)


@pytest.mark.parametrize("dtype, stochastic", [(F32, False), (BF16, True)])
def test_gradients_in_fp64_are_taken_in_fp32(dtype, stochastic):
    """They may be wider than the state; what is computed in does not change with them."""
    shapes = [(1025,)]
    one, other = (
        run(
            "triton", made(dtype, (dtype, dtype), shapes=shapes), drawn(2, wide, shapes), stochastic_rounding=stochastic
        )
        for wide in (F32, F64)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.all, other.all, strict=True))


@pytest.mark.skipif(ON_GPU, reason="the paths of a CPU")
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("body, path", [("eager", "foreach"), ("cpu", "fused")])
def test_bitwise_as_pytorch(body, path, dtype):
    grads = drawn(dtype=dtype)
    got = run(body, made(dtype, (dtype, dtype)), grads)
    theirs = [torch.nn.Parameter(p) for p in made(dtype).params]
    optimizer = torch.optim.AdamW(theirs, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, **{path: True})
    for g in grads:
        for p, t in zip(theirs, g, strict=True):
            p.grad = t.clone()
        optimizer.step()
    for i, p in enumerate(theirs):
        state = optimizer.state[p]
        want = (p.detach(), state["exp_avg"], state["exp_avg_sq"], state["step"])
        for mine, wanted in zip((t[i] for t in (got.params, got.m, got.v, got.steps)), want, strict=True):
            assert torch.equal(mine, wanted)


@every_kind
@pytest.mark.parametrize("body", BODIES[1:])
def test_as_exact_as_eager(body, kind):
    """Steps from one state, so that what was rounded before does not add up; with loss scale, clip and decay."""
    dtype, grad_dtype, moments, master = kind
    first, *grads = drawn(4, grad_dtype)
    given = {"clip": 2.0, "grad_scale": torch.tensor(8.0, device=DEVICE), "finite_check": True}
    lists = run("eager", made(dtype, moments, master), [first])
    for g in grads:
        values, wide = lists.masters or lists.params, [m.double() for m in lists.moments[0]]
        exact = Lists(
            [p.double() for p in values], wide, [v.double() for v in lists.moments[1]],
            [s.clone() for s in lists.steps], [], ([], []),
        )  # fmt: skip
        run("eager", exact, [[t.double() for t in g]], **given)
        copy = replace(
            lists, **{k: [t.clone() for t in getattr(lists, k)] for k in ("params", "m", "v", "steps", "masters")},
            absmax=tuple([t.clone() for t in a] for a in lists.absmax),
        )  # fmt: skip
        run(body, copy, [g], **given)
        run("eager", lists, [g], **given)
        for got, eager, truth in (
            (copy.masters or copy.params, lists.masters or lists.params, exact.params),
            (copy.params, lists.params, exact.params),
            (copy.moments[0], lists.moments[0], exact.m),
            (copy.moments[1], lists.moments[1], exact.v),
        ):
            tables.as_exact_as_eager(got, eager, truth)
        assert all(torch.equal(a, b) for a, b in zip(copy.steps, lists.steps, strict=True))
        for p, w in zip(copy.params, copy.masters, strict=False):
            assert torch.equal(p, w.to(dtype))


def test_several_blocks_in_a_program():
    shapes = [(9 * 1024 + 1,), (3 * 1024,), (5,)]
    grads = drawn(1, shapes=shapes)
    with few_programs():
        many = run("triton", made(shapes=shapes), grads, clip=1.0)
        assert ON_GPU or mt.parts(many.params)[0].chunk == 3
    one = run("triton", made(shapes=shapes), grads, clip=1.0)
    for a, b in zip(many.all, one.all, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.skipif(ON_GPU, reason="counts the launches of the interpreter")
def test_one_launch_for_each_set_of_dtypes():
    lists = made(shapes=[(5,), (600,), (0,), (2000,)])
    lists.params[1] = lists.params[1].double()
    lists.m[1], lists.v[1] = lists.m[1].double(), lists.v[1].double()
    grads = drawn(1, shapes=[(5,), (600,), (0,), (2000,)])[0]
    grads[1] = grads[1].double()
    with use("triton"), interpreter.recorded() as launches:
        lists.step(grads, clip=1.0)
    names = sorted(launch.kernel for launch in launches)
    assert names == ["adamw_kernel"] * 2 + ["coefficients_kernel"] + ["grad_norm_kernel"] * 2


def test_groups():
    """Each parameter takes the options of its group, in one launch; the rate may be a tensor."""
    grads = drawn(2)
    options = [OPTIONS, AdamWOptions(torch.tensor(0.5, device=DEVICE), 0.0, 0.5, 1e-3, 0.0), AdamWOptions(0.1)]
    groups = [0, 1, 2, 1, 0, 2, 1, 0, 2]
    for body in BODIES:
        together = run(body, made(), grads, options=options, groups=groups)
        for i, group in enumerate(groups):
            alone = made()
            alone = Lists([alone.params[i]], [alone.m[i]], [alone.v[i]], [alone.steps[i]], [], ([], []))
            run("eager", alone, [[g[i]] for g in grads], options=options[group])
            torch.testing.assert_close(together.params[i], alone.params[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, "found_inf"])
@every_body
def test_a_step_that_must_not_happen(body, bad):
    """Nothing moves and nothing is counted: by a gradient that is not finite or by ``found_inf``."""
    lists = run("eager", made(), drawn(1))
    before = [t.clone() for t in lists.all]
    (grads,) = drawn(1)
    given = {"finite_check": True, "clip": 1.0}
    if bad == "found_inf":
        given = {"found_inf": torch.ones((), device=DEVICE)}
    else:
        grads[5][1022] = bad
    run(body, lists, [grads], **given)
    assert all(torch.equal(a, b) for a, b in zip(lists.all, before, strict=True))
    run(body, lists, drawn(1), finite_check=True, found_inf=torch.zeros((), device=DEVICE))
    assert all(s == 2 for s in lists.steps) and not torch.equal(lists.params[0], before[0])


@every_body
def test_without_the_check_a_nan_is_not_hidden(body):
    lists, (grads,) = made(), drawn(1)
    grads[0][3] = math.nan
    run(body, lists, [grads], clip=1.0)
    assert lists.params[0][3].isnan() and all(p.isnan().all() for p in lists.params), "the norm is NaN, so is its clip"


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_same_bits_each_time(dtype):
    lists = partial(made, dtype, (BF16, BF16))
    grads = drawn(2, BF16)
    given = {"clip": 1.0, "stochastic_rounding": True, "seed": 3}
    first = run("triton", lists(), grads, **given)
    for _ in range(1000 if ON_GPU else 2):
        again = run("triton", lists(), grads, **given)
        assert all(torch.equal(a, b) for a, b in zip(first.all, again.all, strict=True))


# Stochastic rounding.
@pytest.mark.parametrize("dtype, master", [(BF16, False), (BF16, True), (F32, False)])
def test_stochastic_rounding_draws_the_same_in_every_body(dtype, master):
    """Bits may differ only where fp32 differs in its last bit, which moves the threshold of one in 2^16."""
    grads = drawn(2, BF16, device="cpu")
    lists = [
        run(body, made(dtype, (BF16, BF16), master, device="cpu"), grads, stochastic_rounding=True, seed=7)
        for body in ("eager", "triton" if not ON_GPU else "eager")
    ]
    pairs = [(a, b) for a, b in zip(*(x.all for x in lists), strict=True) if a.numel()]
    assert sum(int((a != b).sum()) for a, b in pairs if a.dtype == BF16) <= 10
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("body", ["eager", "triton"])
def test_stochastic_rounding_is_unbiased(body):
    """The mean over elements is that of fp32; rounding to nearest would lose such steps entirely."""
    n, lr = 2**15, 2**-12
    lists = made(BF16, (BF16, BF16), shapes=[(n,)])
    lists.params[0].fill_(1.0)
    grads = [torch.ones(n, dtype=BF16, device=DEVICE)]
    for _ in range(4):
        run(body, lists, [grads], options=AdamWOptions(lr, 0.9, 0.999, 0.0, 0.0), stochastic_rounding=True, seed=11)
    # A step is lr: 1/16 of the distance between neighbours below 1, so one in 16 moves each time.
    steps, spread = (1 - lists.params[0].double()) / 2**-8, math.sqrt(4 * 1 / 16 * 15 / 16 / n)
    assert abs(steps.mean().item() - 4 / 16) < 5 * spread
    assert set(steps.tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    wide = AdamWOptions(lr, 0.9, 0.999, 0.0, 0.0)
    exact = run("eager", made(shapes=[(n,)]), [[g.float() for g in grads]] * 4, options=wide)
    for got, want in ((lists.m, exact.m), (lists.v, exact.v)):
        # One bf16 rounding is at most 2^-8 of the value, with that as a bound of its standard deviation.
        assert got[0].double().mean().item() == pytest.approx(want[0][0].item(), rel=5 * 4 * 2**-8 / math.sqrt(n))


def test_stochastic_bits():
    """Neighbours, exact values, infinities and NaN (all of whose bits may be set) of the rounding itself."""
    words = torch.arange(2**16).repeat(2)
    x = torch.tensor([1 + 2**-9, -(1 + 2**-9)]).repeat_interleave(2**16)
    y = mt.stochastic_bf16(x, words, 0).double()
    assert y[: 2**16].mean() == 1 + 2**-9 and y[2**16 :].mean() == -(1 + 2**-9)
    assert set(y.tolist()) == {1.0, 1 + 2**-7, -1.0, -(1 + 2**-7)}
    odd = torch.tensor([1.5, 0.0, -0.0, math.inf, -math.inf])
    assert torch.equal(mt.stochastic_bf16(odd, torch.full((5,), 0xFFFF), 0), odd.bfloat16())
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(F32)
    assert mt.stochastic_bf16(nan, torch.full((2,), 0xFFFF), 0).isnan().all()


def test_steps_and_tensors_draw_apart():
    words = [mt.stochastic_words(*at, torch.empty(1000)) for at in ((1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1))]
    for i, a in enumerate(words):
        assert all((a == b).sum() < 3 for b in words[:i])


@every_body
def test_nan_survives_stochastic_rounding(body):
    lists, (grads,) = made(BF16, (BF16, BF16), shapes=[(9,)]), drawn(1, BF16, [(9,)])
    grads[0][4] = math.nan
    run(body, lists, [grads], stochastic_rounding=True)
    assert all(t[0].isnan().sum() == 1 for t in (lists.params, lists.m, lists.v))


# 8-bit states.
@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_8bit_error_bounds(n, spread):
    """What comes back, in roots: half a step of the code, and a whole one below the least second moment."""
    x = torch.randn(n) * torch.exp(spread * torch.randn(n))
    codes, absmax = mt.quantise_signed(x)
    back = mt.dequantise_signed(codes, absmax)
    largest = absmax.repeat_interleave(256)[:n]
    assert ((x.abs().sqrt() - back.abs().sqrt()).abs() <= largest.sqrt() / 254 * 1.001).all()
    assert (back * x >= 0).all() and codes.dtype == I8 and absmax.shape == (-(-n // 256),)
    v = x.square()
    codes, absmax = mt.quantise_unsigned(v)
    back, largest = mt.dequantise_unsigned(codes, absmax), absmax.repeat_interleave(256)[:n]
    error, step = (v**0.25 - back**0.25).abs(), largest**0.25 / 256
    assert (error <= torch.where(v**0.25 < step, step, step / 2) * 1.001).all()
    assert (back > 0).all(), "a second moment of 0 would divide by eps alone"


def test_8bit_round_trip():
    """What was quantised once is quantised to the same codes again, and zero stays zero."""
    x = torch.randn(1000)
    for to, back, value in (
        (mt.quantise_signed, mt.dequantise_signed, x),
        (mt.quantise_unsigned, mt.dequantise_unsigned, x.square()),
    ):
        codes, absmax = to(value)
        again, largest = to(back(codes, absmax))
        assert torch.equal(again, codes)
        torch.testing.assert_close(largest, absmax, rtol=1e-6, atol=0)
        assert (back(*to(torch.zeros(300))) == 0).all()


@pytest.mark.skipif(ON_GPU, reason="a GPU rounds roots and quotients otherwise")
def test_8bit_codes_of_the_kernel():
    lists = [run(body, made(F32, (I8, U8)), drawn(2)) for body in ("eager", "triton")]
    for a, b in zip(*([*x.m, *x.v] for x in lists), strict=True):
        assert (a.int() - b.int()).abs().max() <= 1 if a.numel() else True
    apart = sum(int((a != b).sum()) for a, b in zip(*([*x.m, *x.v] for x in lists), strict=True))
    assert apart <= 3, "codes may differ where the last bit of fp32 decides"


# Memory.
def test_views_step_as_their_elements():
    """Transposed and padded parameters, gradients of another layout, and addresses that are no multiple of 16."""

    def views(kind: str, t: Tensor) -> Tensor:
        wide = t.new_full((41, 60), math.nan)
        if kind == "transposed":
            return t.t().contiguous().t()
        if kind == "padded":
            return wide[:, 3:56].copy_(t)
        if kind == "unaligned":
            return wide.view(-1)[1 : 1 + t.numel()].view(t.shape).copy_(t)
        return t

    kinds = ["plain", "transposed", "padded", "unaligned"]
    for eight in (False, True):
        plain = made(moments=(I8, U8) if eight else (F32, F32), shapes=[(41, 53)] * 16, device=DEVICE)
        mine = made(moments=(I8, U8) if eight else (F32, F32), shapes=[(41, 53)] * 16, device=DEVICE)
        mine.params = [views(kinds[i // 4], p) for i, p in enumerate(mine.params)]
        if not eight:
            mine.m = [torch.zeros_like(p) for p in mine.params]
        (grads,) = drawn(1, shapes=[(41, 53)] * 16)
        for body in BODIES:
            run(body, plain, [grads])
            run(body, mine, [[views(kinds[i % 4], g) for i, g in enumerate(grads)]])
            for a, b in zip(plain.all, mine.all, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, check_stride=False)
        assert mine.params[4].stride() == (1, 41) and mine.params[8].stride() == (60, 1), "they step where they lie"


@pytest.mark.skipif(ON_GPU, reason="addresses are checked in the interpreter")
def test_addresses_beyond_32_bits():
    """The last program of a tensor of 2^33 elements without memory: every address lies in its tensor."""
    from fmcore.kernels.adamw import adamw_kernel

    t = torch.empty(2**33 + 5, device="meta")
    blocks = -(-t.numel() // mt.BLOCK)
    coefs = torch.ones(1, mt.COEFS)
    for first in (0, blocks // 2, blocks - 2):
        for aligned in (True, False):
            with interpreter.also(t):
                adamw_kernel[(1,)](
                    torch.zeros(1, dtype=torch.int64), torch.zeros(8, dtype=torch.int64),
                    torch.tensor([[0, first, t.numel()]]), coefs, 32, 0,
                    P=mt.TYPES[F32], G=mt.TYPES[F32], M=mt.TYPES[F32], V=mt.TYPES[F32], ALIGNED=aligned, MASTER=False,
                    EIGHT=False, STOCHASTIC=False, **mt.SIZES, ACC=mt.TYPES[F32],
                )  # fmt: skip


def test_a_launch_takes_tensors_of_one_kind():
    """One dtype in each list, and a promise of 16 bytes only where all addresses keep it; empty ones fall out."""
    params = [torch.zeros(8, device=DEVICE) for _ in range(5)]
    grads = [torch.zeros(8, dtype=d, device=DEVICE) for d in (F32, BF16, F32, BF16, F32)]
    params[2] = torch.zeros(9, device=DEVICE)[1:]
    params[4], grads[4] = params[4][:0], grads[4][:0]
    split = {tuple(part.indices): part.aligned for part in mt.parts(params, grads)}
    assert split == {(0,): True, (1, 3): True, (2,): False}
    assert {tuple(part.indices): part.aligned for part in mt.parts(params)} == {(0, 1, 3): True, (2,): False}


def test_an_empty_list_and_empty_tensors():
    adamw_([], [], [], [], [])
    for body in BODIES:
        lists = made(shapes=[(0,), (3, 0)])
        run(body, lists, [[t.clone() for t in lists.params]], clip=1.0, finite_check=True)
        assert all(s == 1 for s in lists.steps)


def test_a_table_is_kept_while_addresses_stay():
    lists, (grads,) = made(), drawn(1)
    run("triton", lists, [])
    with use("triton"):
        lists.step(grads)
        before = mt._integers.cache_info().misses
        lists.step(grads)
        assert mt._integers.cache_info().misses == before
        lists.step([g.clone() for g in grads])
        assert mt._integers.cache_info().misses == before + 1, "of the gradients alone"


# Planted bugs: each must turn the comparison with eager PyTorch red.
BUGS = [
    ("m.to(ACC) * beta1 + g * rest1", "m.to(ACC) * beta1 + g * rest2", "float32"),
    ("v.to(ACC) * beta2 + g * g * rest2", "v.to(ACC) * beta2 + g * rest2", "float32"),
    ("tl.sqrt(v) * correction + eps", "tl.sqrt(v) * correction", "float32"),
    ("rate = tl.load(coefs + 4)", "rate = tl.load(coefs + 3)", "float32"),
    ("p * decay - rate", "p - rate", "float32"),
    (".to(ACC) * factor", ".to(ACC)", "float32"),
    ("coefs_ptr + ordinal * COEFS", "coefs_ptr + (ordinal + 1) * COEFS", "float32"),
    ("tl.cdiv(size, BLOCK)), first)", "size // BLOCK), first)", "float32"),
    ("put(m_absmax_ptr, block, m_absmax, blocks, TAIL)", "put(m_absmax_ptr, block, v_absmax, blocks, TAIL)",
     "8-bit moments"),
    ("put(master_ptr, i, p, size, TAIL)", "put(master_ptr, i, p.to(P).to(ACC), size, TAIL)", "bf16 with masters"),
    ("blocks = tl.cdiv(size, QBLOCK)", "blocks = tl.cdiv(size, QBLOCK) + 1", "8-bit moments"),
]  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="a bug that writes out of bounds is for the interpreter")
@pytest.mark.parametrize("old, new, kind", BUGS, ids=[new for _, new, _ in BUGS])
def test_planted_bugs_are_caught(old, new, kind, tmp_path):
    dtype, grad_dtype, moments, master = KINDS[kind]
    before = dict(OPS)
    try:
        bad = planted("adamw.py", old, new, tmp_path)
        options, given = bad.AdamWOptions(0.02, 0.8, 0.9, 1e-3, 0.3), {"grad_scale": torch.tensor(4.0)}
        grads = drawn(2, grad_dtype, SHAPES[5:])
        want = run(
            "eager", made(dtype, moments, master, SHAPES[5:]), grads, options=replace(OPTIONS, eps=1e-3), **given
        )
        with pytest.raises(Exception) as caught:  # noqa: PT011
            got = run(
                "triton", made(dtype, moments, master, SHAPES[5:]), grads, options=options, fn=bad.adamw_, **given
            )
            mine, theirs = ([*x.masters, *x.params, *x.moments[0], *x.moments[1]] for x in (got, want))
            for a, b in zip(mine, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-2 if moments[0] == I8 else 1e-5, atol=1e-5)
        assert "not close" in str(caught.value) or "outside" in str(caught.value), caught.value
    finally:
        OPS.clear()
        OPS.update(before)


# The dispatcher.
@every_body
def test_opcheck(body):
    lists, (grads,) = made(shapes=[(7,), (3, 5)]), drawn(1, shapes=[(7,), (3, 5)])
    args = (
        lists.params, grads, lists.m, lists.v, lists.steps, [], [], [], *mt.hyper([(0.1, 0.9, 0.9, 1e-8, 0.1)]),
        [0, 0], False, 0, torch.tensor(2.0, device=DEVICE), 1.0, None, None, True,
    )  # fmt: skip
    if body == "eager":
        return
    with use(body), reachable():
        torch.library.opcheck(getattr(torch.ops.fmcore, step_op.name).default, args)
        torch.library.opcheck(torch.ops.fmcore.grad_norm.default, (grads,))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("body", BODIES[1:])
def test_compiles_without_a_break(body, dynamic):
    torch._dynamo.reset()
    shapes = [(7,), (41, 53)]
    grads = drawn(1, shapes=shapes)[0]

    def step(params, grads, m, v, steps):
        adamw_(params, grads, m, v, steps, OPTIONS, clip=1.0)
        return params[0] * 2

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    with use(body), reachable():
        a, b = made(shapes=shapes), made(shapes=shapes)
        got, want = (
            fn(x.params, [g.clone() for g in grads], x.m, x.v, x.steps) for fn, x in ((compiled, a), (step, b))
        )
    assert torch.equal(got, want) and all(torch.equal(x, y) for x, y in zip(a.all, b.all, strict=True))


@every_body
def test_autograd_sees_the_write(body):
    """A parameter that backward still needs must not change unnoticed: its version counts on."""
    w = torch.ones(5, device=DEVICE, requires_grad=True)
    y = (w * w).sum()
    lists = Lists([w], [torch.zeros_like(w)], [torch.zeros_like(w)], [torch.zeros((), device=DEVICE)], [], ([], []))
    run(body, lists, [[torch.ones_like(w)]])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


class Names(TorchDispatchMode):
    """The operators that ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(ON_GPU, reason="watches the host code in the interpreter")
def test_nothing_on_a_gpu_waits():
    """A number that is read from the GPU stops the host until the GPU has caught up."""
    lists, (grads,) = made(), drawn(1)
    given = {"clip": 1.0, "finite_check": True, "grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
    with use("triton"), proof.direct(), Names() as names:
        lists.step(grads, **given)
    assert "aten::linalg_vector_norm" in names.seen
    assert not {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"} & set(names.seen), names.seen
    with FakeTensorMode():
        tensors = [[torch.empty(3, 4, device="cuda")] for _ in range(4)]
        with Names() as names:
            adamw_(*tensors, [torch.empty((), device="cuda")], clip=1.0, norm=torch.empty((), device="cuda"))
    assert "fmcore::adamw_step" in names.seen and "aten::_local_scalar_dense" not in names.seen


@pytest.mark.parametrize("change, error, message", [
    ({"grads": [torch.zeros(3)] * 2}, ValueError, "adamw_: grads must be as long as params, 1, got 2"),
    ({"grads": [torch.zeros(4)]}, ValueError, r"adamw_: grads\[0\] must be \(3,\) like its parameter, got \(4,\)"),
    ({"exp_avgs": [torch.zeros(1, 3)]}, ValueError, r"adamw_: exp_avgs\[0\] must be \(3,\).*got \(1, 3\)"),
    ({"exp_avgs": [torch.zeros(3, dtype=F16)]}, TypeError, r"exp_avgs\[0\] must be one of.*got float16"),
    ({"params": [torch.zeros(3, dtype=torch.int64)]}, TypeError, r"adamw_: params\[0\] must be floating, got int64"),
    ({"steps": [torch.zeros((), dtype=F64)]}, TypeError, r"adamw_: steps\[0\] must be float32, got float64"),
    ({"steps": [torch.zeros(1)]}, ValueError, r"adamw_: steps\[0\] must be \(\) like its parameter, got \(1,\)"),
    ({"steps": [torch.zeros((), device="meta")]}, ValueError, r"adamw_: steps\[0\] must be on cpu, got meta"),
    ({"masters": [torch.zeros(3)]}, TypeError, r"adamw_: params\[0\] must have 16 bits to have a master, got float32"),
    ({"absmax": ([torch.zeros(1)], [])}, TypeError, r"adamw_: exp_avgs\[0\] must be one of \['int8'\], got float32"),
    ({"absmax": ([], [torch.zeros(1)] * 2)}, ValueError, "adamw_: absmax of exp_avg_sqs must be as long as params, 1"),
    ({"absmax": ([torch.zeros(2)], []), "exp_avgs": [torch.zeros(3, dtype=I8)]}, ValueError,
     r"adamw_: absmax of exp_avgs\[0\] must be float32 \(1,\), got float32 \(2,\)"),
    ({"groups": [1]}, ValueError, r"adamw_: groups must be 1 numbers below 1, one a parameter, got \[1\]"),
    ({"seed": -1}, ValueError, r"adamw_: seed must be in \[0, 2\^31\), got -1"),
    ({"grad_scale": torch.ones((), dtype=torch.int64)}, TypeError, "adamw_: grad_scale must be one of.*got int64"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    args = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises(error, match=message):
        adamw_(**(args | {"steps": [torch.zeros(())]} | change))


def test_the_norm():
    """Of all tensors in any dtype, in fp32 at least; the same bits each time; errors name what came."""
    grads = [torch.randn(s).to(d) for s, d in zip(SHAPES, [F32, BF16, F16] * 3, strict=True)]
    grads.append(torch.randn(41, 60)[:, ::2])
    want = torch.linalg.vector_norm(torch.cat([g.double().flatten() for g in grads]))
    for body in BODIES:
        with use(body), reachable():
            got = mt.grad_norm([g.to(DEVICE) for g in grads])
            assert torch.equal(got, mt.grad_norm([g.to(DEVICE) for g in grads]))
        assert got.dtype == F32 and got.item() == pytest.approx(want.item(), rel=1e-6)
        with use(body), reachable():
            assert mt.grad_norm([grads[0].double().to(DEVICE)]).dtype == F64
    with pytest.raises(ValueError, match="grad_norm: grads must hold at least one tensor"):
        mt.grad_norm([])
    with pytest.raises(TypeError, match=r"grad_norm: grads\[0\] must be one of.*got int64"):
        mt.grad_norm([torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"grad_norm: grads\[1\] must be on cpu like the first, got meta"):
        mt.grad_norm([torch.zeros(2), torch.zeros(2, device="meta")])
