"""decode_attention beyond its rows: the formula by hand, lengths, splits, what is never read, errors, gradients."""

from dataclasses import replace
from functools import partial

import interpreter
import proof
import pytest
import torch
from cases import CASES

from fmcore.kernels import launch
from fmcore.kernels.decode_attention import decode_attention, decode_attention_fwd_triton, decode_attention_ref
from fmcore.op import use
from fmcore.ops import attention

BODIES = ["triton", "cpu", "eager"]
OFF_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")


def made(B, S, G, R, D, Dv, body="cpu", dtype=torch.float64):
    device = proof.device(body)
    shapes = (B, G * R, D), (B, S, G, D), (B, S, G, Dv)
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes]


def lengths(*lens, body="cpu", dtype=torch.int64):
    return torch.tensor(lens, dtype=dtype, device=proof.device(body))


def test_the_formula_by_hand():
    """``decode_attention_ref`` itself, one head at a time."""
    q, k, v = made(2, 7, 2, 3, 4, 5)
    sinks = torch.randn(6, dtype=torch.float64)
    o = decode_attention_ref(q, k, v, torch.tensor([7, 3]), sinks, scale=0.7, window=4, softcap=1.5)
    for b, keys in enumerate((range(3, 7), range(3))):
        for h in range(6):
            s = [1.5 * torch.tanh(0.7 * (q[b, h] @ k[b, j, h // 3]) / 1.5) for j in keys]
            weights = torch.stack([*s, sinks[h]]).softmax(0)[:-1]
            torch.testing.assert_close(o[b, h], sum(w * v[b, j, h // 3] for w, j in zip(weights, keys, strict=True)))


def test_equals_attention():
    q, k, v = made(3, 9, 2, 2, 8, 6)
    lens = torch.tensor([9, 1, 4])
    for window in (None, 1, 3, 9, 100):
        want = attention(q[:, None], k, v, kv_lens=lens, window=window)[:, 0]
        for body in ("cpu", "eager"):
            with use(body):
                torch.testing.assert_close(decode_attention(q, k, v, lens, window=window), want)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_beyond_the_cache_and_below_zero(body, dtype):
    q, k, v = made(4, 70, 1, 2, 16, 16, body, torch.float32)
    sinks = torch.randn(2).to(q)
    for options in ({}, {"window": 5}, {"sinks": sinks}):
        with use(body):
            got = decode_attention(q, k, v, lengths(70, 1000, 0, -3, body=body, dtype=dtype), **options)
            want = decode_attention(q, k, v, lengths(70, 70, 0, 0, body=body), **options)
        assert torch.equal(got, want) and got[:2].abs().min() > 0 and (got[2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_visible_keys_are_read(dtype):
    """NaN behind the filled keys, and before the window, changes no bit."""
    q, k, v = made(3, 150, 1, 2, 20, 16, "triton", dtype)
    lens = lengths(150, 0, 77, body="triton")
    at = torch.arange(150, device=q.device)
    hidden = (at >= lens[:, None]) | (at < lens[:, None] - 60)
    bad = [t.masked_fill(hidden[..., None, None], torch.nan) for t in (k, v)]
    with use("triton"):
        want, got = (decode_attention(q, *kv, lens, window=60) for kv in ((k, v), bad))
    assert torch.equal(got, want)


@pytest.mark.parametrize("softcap, scale", [(50.0, None), (0.5, 1.0), (30.0, 8.0)])
def test_a_softcap_costs_no_digits(softcap, scale):
    """Scores far below the cap, around it and far above it."""
    case = CASES["decode_attention"]
    options = {"softcap": softcap, "scale": scale}
    case = replace(case, op=partial(case.op, **options), ref=partial(case.ref, **options))
    with use("triton"):
        proof.check(case, case.op, proof.trials(case, (3, 40, 2, 2, 16, 16), torch.float32))


@pytest.mark.parametrize("body", BODIES)
def test_large_scores_do_not_overflow(body):
    q, k, v = made(2, 70, 1, 2, 16, 16, body, torch.float32)
    lens = lengths(70, 3, body=body)
    with use(body):
        got = decode_attention(q, k, v, lens, scale=1000.0, sinks=torch.full_like(q[0, :, 0], -50000.0))
    want = decode_attention_ref(q.double(), k.double(), v.double(), lens, scale=1000.0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype, eps", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("S", [40, 200])
def test_scores_are_not_rounded(dtype, eps, S):
    """In 16 bits a score of 60 is off by an eighth, and eager PyTorch with it; here only weights and output round."""
    q, k, v = made(1, S, 1, 16, 32, 16, "triton", dtype)
    lens = lengths(S, body="triton")
    # As much weight for the sink of each head as for its largest score.
    sinks = (4 * torch.einsum("bhd,bsgd->bhs", q.float(), k.float()).amax((0, 2))).to(dtype)
    want = decode_attention_ref(*(t.double() for t in (q, k, v)), lens, sinks.double(), scale=4.0)
    with use("triton"):
        got = decode_attention(q, k, v, lens, sinks=sinks, scale=4.0)
    assert (got.double() - want).abs().max() <= eps * v.double().abs().max()


@pytest.mark.parametrize("B", [1, 20])
@pytest.mark.parametrize("body", BODIES)
def test_scores_far_below_zero_do_not_vanish(body, B):
    """The largest score is what the others are measured by, not 0; with splits and without."""
    q, k, v = made(B, 150, 1, 2, 16, 16, body, torch.float32)
    k = k * 0.01 - 40 * q[:, :1, None] / q[:, :1, None].square().sum(-1, keepdim=True)
    q = q[:, :1].expand(B, 2, 16)
    lens = lengths(*[150] * (B - 1), 3, body=body)
    with use(body):
        got = decode_attention(q, k, v, lens, scale=5.0)
    want = decode_attention_ref(q.double(), k.double(), v.double(), lens, scale=5.0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-3)


def test_a_sink_of_minus_infinity_is_none():
    q, k, v = made(2, 70, 1, 2, 16, 16, "triton", torch.float32)
    lens = lengths(70, 0, body="triton")
    with use("triton"):
        got, want = (decode_attention(q, k, v, lens, sinks=s) for s in (torch.full((2,), -torch.inf).to(q), None))
    assert torch.equal(got, want)


@OFF_GPU
@pytest.mark.parametrize("B, S, window, splits", [(1, 600, None, 38), (1, 4096, None, 128), (20, 600, None, 7),
                                                  (1, 4096, 40, 3), (1, 10, None, 1), (140, 40, None, 1)])  # fmt: skip
def test_splits_fill_a_large_gpu(monkeypatch, B, S, window, splits):
    """Blocks of 16 keys, at most 2 programs for each of 66 multiprocessors; lengths play no part."""
    monkeypatch.setattr(launch, "SMS_WITHOUT_GPU", 66)
    q, k, v = made(1, S, 1, 1, 8, 8, "triton", torch.float32)
    for n in (S, S // 3):
        lens = torch.full((B,), n)
        with use("triton"), interpreter.recorded() as launches:
            got = decode_attention(q.expand(B, 1, 8), k.expand(B, S, 1, 8), v.expand(B, S, 1, 8), lens, window=window)
        found = launches[1].args["splits"] if len(launches) > 1 else 1
        assert found == splits
        want = decode_attention_ref(q.double(), k.double(), v.double(), lens[:1], window=window)
        torch.testing.assert_close(got.double(), want.expand_as(got), rtol=0, atol=1e-6)


@OFF_GPU
@pytest.mark.parametrize("shape", [(2, 2**22, 8, 1, 128, 256), (2**16, 64, 16, 2, 128, 128), (1, 2**27, 1, 1, 128, 16)])
def test_addresses_beyond_32_bits(shape):
    """2^33 elements and more on tensors without memory, with lengths that the kernel can read."""
    B, S, G, R, D, Dv = shape
    with torch.device("meta"):
        q, k, v = (torch.empty(s, dtype=torch.bfloat16) for s in ((B, G * R, D), (B, S, G, D), (B, G, S, Dv)))
    # Keys of all heads side by side, values head after head.
    v = v.transpose(1, 2)
    assert max(k.numel(), v.numel()) >= 2**33
    with interpreter.recorded() as launches:
        decode_attention_fwd_triton(q, k, v, torch.full((B,), S), None, 0.1, None, None)
        decode_attention_fwd_triton(q, k, v, torch.full((B,), S), None, 0.1, 1000, None)
    assert len(launches) >= 2 and all(one.phantom for one in launches)


@OFF_GPU
def test_a_layer_of_a_cache_is_not_copied():
    """What fmcore.models.decoder.Cache hands out: one layer, cut behind the longest sequence."""
    cache = torch.randn(2, 3, 90, 2, 16)
    q, lens = torch.randn(3, 4, 16), torch.tensor([5, 70, 69])
    with use("triton"), interpreter.recorded() as launches:
        got = decode_attention(q, cache[0, :, :70], cache[1, :, :70], lens)
    assert launches[0].args["k_ptr"].data_ptr() == cache.data_ptr()
    assert launches[0].args["v_ptr"].data_ptr() == cache[1].data_ptr()
    want = decode_attention_ref(*(t.double() for t in (q, cache[0], cache[1])), lens)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


def test_a_wanted_gradient_takes_the_formula():
    q, k, v = (t.requires_grad_() for t in made(2, 5, 1, 2, 4, 3))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)
    lens = torch.tensor([5, 0])
    call = partial(decode_attention, window=3, softcap=2.0)
    assert torch.autograd.gradcheck(lambda q, k, v, sinks: call(q, k, v, lens, sinks=sinks), (q, k, v, sinks))
    with torch.no_grad():
        assert not call(q, k, v, lens, sinks=sinks).requires_grad


@pytest.mark.parametrize("change, error, message", [
    ({"q": (2, 5, 8)}, ValueError, "decode_attention: H must be a multiple of G, got H=5, G=2"),
    ({"q": (2, 4, 8, 1)}, ValueError, r"decode_attention: q must be \(B, H, D\), got \(2, 4, 8, 1\)"),
    ({"q": (2, 4, 0), "k_cache": (2, 3, 2, 0)}, ValueError, "decode_attention: q must have a head size of at least 1"),
    ({"k_cache": (2, 3, 2, 7)}, ValueError, r"decode_attention: k_cache must be .*D=8, got \(2, 3, 2, 7\)"),
    ({"k_cache": (2, 3, 0, 8), "v_cache": (2, 3, 0, 8)}, ValueError, "decode_attention: H must be a mul.*H=4, G=0"),
    ({"v_cache": (2, 4, 2, 8)}, ValueError, r"decode_attention: v_cache must be .*S=3.* got \(2, 4, 2, 8\)"),
    ({"kv_lens": (3,)}, ValueError, r"decode_attention: kv_lens must be \(B\), B=2, got \(3,\)"),
    ({"kv_lens": torch.tensor([1.0, 2.0])}, TypeError, "decode_attention: kv_lens must be one of .*got float32"),
    ({"kv_lens": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "kv_lens must be on the device of q"),
    ({"v_cache": torch.zeros(2, 3, 2, 8).half()}, TypeError, "decode_attention: v_cache must have the dtype of q"),
    ({"sinks": torch.zeros(2)}, ValueError, r"decode_attention: sinks must be \(H\), H=4, got \(2,\)"),
    ({"sinks": torch.zeros(4).double()}, TypeError, "decode_attention: sinks must have the dtype of q, float32"),
    ({"window": 0}, ValueError, "decode_attention: window must be at least 1, got 0"),
    ({"softcap": 0.0}, ValueError, "decode_attention: softcap must be above 0, got 0.0"),
])  # fmt: skip
def test_errors_name_the_argument(change, error, message):
    given = {"q": (2, 4, 8), "k_cache": (2, 3, 2, 8), "v_cache": (2, 3, 2, 8), "kv_lens": (2,)} | change
    given = {
        name: torch.zeros(a, dtype=torch.int64 if name == "kv_lens" else torch.float32) if isinstance(a, tuple) else a
        for name, a in given.items()
    }
    with pytest.raises(error, match=message):
        decode_attention(**given)


def test_heads_too_large_for_the_kernel():
    for D, Dv in ((257, 8), (8, 512)):
        q, k, v = made(2, 3, 1, 2, D, Dv, "triton", torch.float32)
        with use("triton"), pytest.raises(NotImplementedError, match=f"at most 256 elements, got {D} and {Dv}"):
            decode_attention(q, k, v, lengths(3, 2, body="triton"))


def test_integers_are_refused():
    q, k, v = (t.long() for t in made(2, 3, 2, 2, 8, 8))
    with pytest.raises(TypeError, match="decode_attention: q must be one of .*got int64"):
        decode_attention(q, k, v, torch.ones(2, dtype=torch.int64))
