"""Attention: every path of the public function against the formula in fp64, gradients included."""

import interpreter
import proof
import pytest
import torch

from fmcore.kernels.attention import attention, attention_ref
from fmcore.op import use

# (B, Tq, Tk, H, G, D, Dv): grouped and single kv heads, more keys than queries, one token, odd sizes.
SHAPES = [
    (2, 7, 7, 4, 4, 8, 8),
    (1, 5, 5, 6, 2, 4, 4),
    (3, 1, 9, 4, 1, 8, 8),
    (2, 3, 8, 2, 2, 6, 5),
    (1, 1, 1, 1, 1, 2, 2),
]


def made(B, Tq, Tk, H, G, D, Dv, dtype=torch.float64):
    return [
        torch.randn(B, T, heads, size, dtype=torch.float64).to(dtype).requires_grad_()
        for T, heads, size in ((Tq, H, D), (Tk, G, D), (Tk, G, Dv))
    ]


def same(got, want, inputs, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)
    g = torch.randn_like(want)
    for a, b in zip(torch.autograd.grad(got, inputs, g), torch.autograd.grad(want, inputs, g), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(shape, causal, window):
    q, k, v = made(*shape)
    options = {"causal": causal, "window": window, "scale": 0.3}
    same(attention(q, k, v, **options), attention_ref(q, k, v, **options), (q, k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_the_formula_by_hand(causal):
    """``attention_ref`` itself, one query and head at a time."""
    q, k, v = (t.detach() for t in made(1, 3, 5, 2, 1, 4, 4))
    o = attention_ref(q, k, v, causal=causal, window=2)
    for i in range(3):
        for h in range(2):
            p = 5 - 3 + i
            keys = [j for j in range(5) if (p - 2 < j <= p if causal else abs(j - p) < 2)]
            weights = torch.stack([q[0, i, h] @ k[0, j, 0] / 2 for j in keys]).softmax(0)
            torch.testing.assert_close(o[0, i, h], sum(w * v[0, j, 0] for w, j in zip(weights, keys, strict=True)))


@pytest.mark.parametrize("causal, window", [(True, None), (True, 2), (False, None), (False, 3)])
def test_filled_keys(causal, window):
    """With kv_lens each sequence sees its own filled keys, whatever stands behind them."""
    q, k, v = made(4, 2, 9, 4, 2, 8, 8)
    lens = torch.tensor([9, 2, 5, 3])
    got = attention(q, k, v, causal=causal, window=window, kv_lens=lens)
    same(got, attention_ref(q, k, v, causal, window, kv_lens=lens), (q, k, v))
    for i, n in enumerate(lens.tolist()):
        alone = attention(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n], causal=causal, window=window)
        torch.testing.assert_close(got[i : i + 1], alone)


def test_a_query_that_sees_nothing_gives_zero():
    q, k, v = made(2, 4, 3, 2, 1, 4, 4)
    lens = torch.tensor([0, 3])
    o = attention(q, k, v, kv_lens=lens)
    # The first sequence has no key at all; in the second, the first query stands before every key.
    assert (o[0] == 0).all() and (o[1, 0] == 0).all() and (o[1, 1:] != 0).all()
    same(o, attention_ref(q, k, v, kv_lens=lens), (q, k, v))
    dq, dk, dv = torch.autograd.grad(attention(q, k, v, kv_lens=lens).sum(), (q, k, v))
    assert (dq[0] == 0).all() and (dk[0] == 0).all() and (dv[0] == 0).all() and dv[1].abs().min() > 0


@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 0, 1, 5, 0, 3), (0, 7), (9, 0), (1, 1, 2), (6,), (0, 0)])
@pytest.mark.parametrize("causal, window", [(True, None), (True, 3), (False, None)])
def test_packed_documents_are_alone(lengths, causal, window):
    M = sum(lengths)
    q, k, v = (t[0] for t in made(1, M, M, 4, 2, 8, 6))
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    got = attention(q, k, v, causal=causal, window=window, cu_seqlens=cu_seqlens)
    assert got.shape == (M, 4, 6)
    if M:
        parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
        want = [attention_ref(*(t[None] for t in part), causal, window)[0] for part in parts if len(part[0])]
        same(got, torch.cat(want), (q, k, v))


@pytest.mark.parametrize("dtype, eps", [(torch.float32, 2**-23), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)])
def test_low_precision_errs_no_more_than_the_formula(dtype, eps):
    q, k, v = (t.detach() for t in made(2, 33, 33, 4, 2, 16, 16, dtype))
    truth = attention_ref(q.double(), k.double(), v.double())
    got, eager = attention(q, k, v), attention_ref(q, k, v)
    assert got.dtype == dtype
    assert (got - truth).abs().max() <= 2 * (eager - truth).abs().max() + eps * truth.abs().max()


def test_strided_views_of_a_fused_projection():
    x = torch.randn(6, 4 + 2 + 2, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = x.split((4, 2, 2), dim=1)
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32)
    want = attention(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens=cu_seqlens)
    same(attention(q, k, v, cu_seqlens=cu_seqlens), want, (x,))


def test_gradcheck():
    q, k, v = made(1, 2, 2, 2, 1, 2, 2)
    assert torch.autograd.gradcheck(attention, (q, k, v))
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, kv_lens=torch.tensor([1])), (q, k, v))


@pytest.mark.parametrize("change, error, message", [
    ({"q": (2, 3, 5, 8)}, ValueError, "attention: H must be a multiple of G, got H=5, G=2"),
    ({"k": (2, 4, 2, 7)}, ValueError, r"attention: k must be \(B, Tk, G, D\).*D=8, got \(2, 4, 2, 7\)"),
    ({"v": (2, 5, 2, 8)}, ValueError, r"attention: v must be .*Tk=4.* got \(2, 5, 2, 8\)"),
    ({"window": (-1, 2)}, ValueError, "attention: window must be a pair of distances"),
    ({"softcap": 0.0}, ValueError, "attention: softcap must be above 0, got 0.0"),
    ({"sinks": torch.zeros(3)}, ValueError, r"attention: sinks must be \(H\), H=4, got \(3,\)"),
    ({"cu_seqlens_k": torch.tensor([0, 2])}, ValueError, "attention: cu_seqlens_k must be None without cu_seqlens"),
    ({"window": 0}, ValueError, "attention: window must be at least 1, got 0"),
    ({"kv_lens": torch.tensor([1, 2, 3])}, ValueError, r"attention: .*B=3"),
    ({"kv_lens": torch.tensor([1.0, 2.0])}, TypeError, "attention: kv_lens must be one of .*got float32"),
    ({"dtype": torch.int64}, TypeError, "attention: q must be one of .*got int64"),
    ({name: (2, 4, 2, 0) for name in "qk"}, ValueError, r"attention: q must have a head size .*got \(2, 4, 2, 0\)"),
    ({"scale": torch.nan}, ValueError, "attention: scale must be finite, got nan"),
    ({"sinks": torch.zeros(4, device="meta")}, ValueError, "attention: sinks must be on the device of q, cpu"),
    ({"kv_lens": torch.empty(2, dtype=torch.int64, device="meta")}, ValueError, "attention: kv_lens must be on"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    dtype = change.pop("dtype", torch.float32)
    shapes = {"q": (2, 3, 4, 8), "k": (2, 4, 2, 8), "v": (2, 4, 2, 8)}
    tensors = [torch.zeros(change.pop(name, shape), dtype=dtype) for name, shape in shapes.items()]
    with pytest.raises(error, match=message):
        attention(*tensors, **change)


def test_bad_boundaries():
    x = torch.zeros(5, 2, 4)
    for bad in ([1, 3], [0, 4, 3, 5], [0, 6]):
        with pytest.raises(ValueError, match="attention: cu_seqlens must rise from 0 to at most M=5"):
            attention(x, x, x, cu_seqlens=torch.tensor(bad, dtype=torch.int32))
    with pytest.raises(ValueError, match="kv_lens must be None"):
        attention(x, x, x, cu_seqlens=torch.tensor([0, 5], dtype=torch.int32), kv_lens=torch.tensor([5]))
    with pytest.raises(ValueError, match=r"cu_seqlens_k must be \(S\+1\), S\+1=2, got \(3,\)"):
        attention(x, x, x, cu_seqlens=torch.tensor([0, 5]), cu_seqlens_k=torch.tensor([0, 2, 5]))


@pytest.mark.parametrize("options", [
    {"softcap": 3.0, "return_lse": True},
    {"sinks": True, "return_lse": True},
    {"sinks": True, "causal": False, "window": (2, None)},
    {"apart": True, "causal": False, "return_lse": True},
    {"apart": True, "sinks": True, "softcap": 2.0, "window": (None, 1), "causal": False, "return_lse": True},
])  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_options_on_a_cpu(options, packed):
    """Document by document it is the formula over all rows with its mask, rows of no document included."""
    options = dict(options)
    apart = options.pop("apart", False)
    Tk = 13 if apart else 9
    q, k, v = made(1, 9, Tk, 4, 2, 4, 6)
    inputs = [q, k, v]
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(4, dtype=torch.float64, requires_grad=True)
        inputs.append(options["sinks"])
    if packed:
        q, k, v = q[0], k[0], v[0]
        options["cu_seqlens"] = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
        if apart:
            options["cu_seqlens_k"] = torch.tensor([0, 0, 5, 12], dtype=torch.int32)
    got, want = attention(q, k, v, **options), attention_ref(q, k, v, **options)
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    grads = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    results = (torch.autograd.grad(x, inputs, grads) for x in (got, want))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("body", ["eager", "triton"])
@pytest.mark.usefixtures("on_device")
def test_rows_of_no_document(body):
    """They give 0, their lse is -inf whatever the sink, their gradients are 0, and NaN in them goes nowhere."""
    q, k, v = (torch.randn(40, 2, 16) for _ in range(3))
    for t in (q, k, v):
        t[36:] = float("nan")
    q, k, v, sinks = (t.requires_grad_() for t in (q, k, v, torch.randn(2)))
    options = {"cu_seqlens": torch.tensor([0, 20, 36], dtype=torch.int32), "sinks": sinks, "return_lse": True}
    with use(body):
        o, lse = attention(q, k, v, **options)
        grads = torch.autograd.grad((o, lse), (q, k, v, sinks), (torch.ones_like(o), torch.ones_like(lse)))
    assert (o[36:] == 0).all() and (lse[:, 36:] == -torch.inf).all() and o[:36].isfinite().all()
    assert all((g[36:] == 0).all() and g[:36].isfinite().all() for g in grads[:3]) and grads[3].isfinite().all()


@pytest.mark.usefixtures("on_device")
def test_a_query_that_sees_nothing_has_the_lse_of_its_sink():
    """Without a sink -inf; other documents' NaN does not reach it, and no gradient leaves it but that of the sink."""
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (4, 2, 2))
    sinks = torch.tensor([0.5, -2.0], requires_grad=True)
    with use("triton"):
        o, lse = attention(q, k, v, return_lse=True)
        dq, dk, dv = torch.autograd.grad(o, (q, k, v), torch.ones_like(o))
        _, with_sink = attention(q, k, v, sinks=sinks, return_lse=True)
        (dsinks,) = torch.autograd.grad(with_sink[:, :, :2].sum(), sinks)
    assert (o[:, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all() and lse[:, :, 2:].isfinite().all()
    assert (dq[:, :2] == 0).all() and all(t.isfinite().all() for t in (dq, dk, dv))
    torch.testing.assert_close(with_sink[0, :, 0], sinks.detach())
    torch.testing.assert_close(dsinks, torch.full((2,), 2.0, device=dsinks.device))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("shift, scale", [(0.0, 40.0), (-120.0, 1.0)], ids=["huge logits", "lse about -120"])
def test_far_from_zero(shift, scale):
    """Scores in the hundreds, and denominators far below 1."""
    q, k, v = (torch.randn(1, 40, 1, 16, dtype=torch.float64) for _ in range(3))
    # A last column that adds the same to every score.
    q[..., -1], k[..., -1] = (shift, 1.0) if shift else (q[..., -1], k[..., -1])
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    with use("triton"):
        got = attention(q, k, v, scale=scale, return_lse=True)
        grads = [torch.randn_like(x) for x in got]
        got = (*got, *torch.autograd.grad(got, (q, k, v), grads))
    want = attention_ref(q, k, v, scale=scale, return_lse=True)
    if shift:
        assert -125 < want[1].mean() < -105
    for a, b in zip(got, (*want, *torch.autograd.grad(want, (q, k, v), grads)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("on_device")
def test_the_cache_path_in_the_kernels():
    """kv_lens with NaN behind the filled keys."""
    q, k, v = (torch.randn(3, n, 2, 16) for n in (2, 40, 40))
    lens = torch.tensor([40, 1, 33])
    want = attention_ref(q, k, v, kv_lens=lens)
    for b, n in enumerate(lens.tolist()):
        k[b, n:], v[b, n:] = float("nan"), float("nan")
    with use("triton"):
        torch.testing.assert_close(attention(q, k, v, kv_lens=lens), want)


@pytest.mark.parametrize("body", ["eager", "triton"])
@pytest.mark.usefixtures("on_device")
def test_no_gradient_of_an_lse_of_minus_inf(body):
    """A query that sees nothing has none, even where what comes for its lse is NaN, as 2 * -inf * 0 of a square is."""
    q, k, v = (torch.randn(1, n, 2, 16, requires_grad=True) for n in (4, 2, 2))
    with use(body):
        _, lse = attention(q, k, v, return_lse=True)
        dq, dk = torch.autograd.grad(lse.square()[lse.isfinite()].sum(), (q, k))
    assert (dq[:, :2] == 0).all() and dq.isfinite().all() and dk.isfinite().all() and (dk != 0).any()


@pytest.mark.parametrize("body", ["eager", "triton"])
@pytest.mark.usefixtures("on_device")
def test_a_length_beyond_the_cache_counts_as_all_of_it(body):
    q, k, v = (torch.randn(2, n, 2, 16) for n in (3, 5, 5))
    with use(body):
        got = attention(q, k, v, kv_lens=torch.tensor([9, -1]))
        torch.testing.assert_close(got[:1], attention(q[:1], k[:1], v[:1]))
    assert (got[1] == 0).all()


@pytest.mark.usefixtures("on_device")
def test_two_calls_with_one_scale_compile():
    """A scale that a module holds is a symbol under ``dynamic=True``."""
    torch._dynamo.reset()

    class Twice(torch.nn.Module):
        scale = 0.3

        def forward(self, q, k, v):
            return attention(attention(q, k, v, scale=self.scale), k, v, scale=self.scale)

    module = Twice()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    q, k, v = (torch.randn(1, 5, 2, 16, requires_grad=True) for _ in range(3))
    with use("triton"):
        for module.scale in (0.3, 0.2):
            grads = [torch.autograd.grad(f(q, k, v).sum(), (q, k, v)) for f in (compiled, module)]
            torch.testing.assert_close(*grads)


@pytest.mark.usefixtures("on_device")
def test_a_cap_far_above_the_scores():
    """tanh of small numbers keeps its digits: the cap multiplies what it lost."""
    q, k, v = (torch.randn(1, 8, 1, 16, dtype=torch.float64) for _ in range(3))
    with use("triton"):
        _, lse = attention(q.float(), k.float(), v.float(), softcap=1000.0, return_lse=True)
    _, want = attention_ref(q, k, v, softcap=1000.0, return_lse=True)
    torch.testing.assert_close(lse.double(), want, rtol=0, atol=2e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="addresses are checked in the interpreter")
@pytest.mark.parametrize("deterministic", [True, False])
def test_rows_that_lie_far_apart(deterministic):
    """The rows of one tile span more than 2^31 elements: views of tensors without memory."""
    q, k, v, do = torch.empty(4, 1, 70, 2**27, dtype=torch.bfloat16, device="meta")[..., :32].unflatten(-1, (2, 16))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    with use("triton"), proof.direct(), interpreter.recorded() as launches:
        o = attention(q, k, v, deterministic=deterministic)
        torch.autograd.grad(o, (q, k, v), do)
    assert launches and all(launch.phantom for launch in launches)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_is_not_positive(scale):
    q, k, v = made(2, 5, 5, 2, 1, 4, 4)
    same(attention(q, k, v, scale=scale), attention_ref(q, k, v, scale=scale), (q, k, v))
