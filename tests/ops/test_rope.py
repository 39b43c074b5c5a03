"""What is peculiar to rope: its conventions against transformers and complex numbers, its tables."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fmcore import ops
from fmcore.kernels.rope import RopeScaling, rope_ref, rope_tables
from fmcore.op import use

LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
pytestmark = pytest.mark.usefixtures("on_device")
bodies = pytest.mark.parametrize("body", ["cpu", "triton"])


def hf_rotary(D: int, parameters: dict) -> LlamaRotaryEmbedding:
    config = LlamaConfig(hidden_size=D, num_attention_heads=1, head_dim=D, rope_parameters=parameters)
    return LlamaRotaryEmbedding(config)


@bodies
def test_half_split_agrees_with_transformers(body):
    B, T, H, G, D = 2, 11, 4, 2, 80
    q, k = torch.randn(B, T, H, D), torch.randn(B, T, G, D)
    positions = torch.randint(0, 1000, (B, T))
    cos, sin = hf_rotary(D, {"rope_type": "default", "rope_theta": 10000.0})(q, positions)
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    with use(body):
        got = ops.rope(q, k, *rope_tables(1000, D), positions)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=2e-6)


@bodies
def test_interleaved_is_complex_multiplication(body):
    B, T, H, D = 2, 7, 3, 96
    q, (cos, sin) = torch.randn(B, T, H, D, dtype=torch.float64), rope_tables(T, D)
    turn = torch.complex(cos.double(), sin.double())[:, None]
    expected = torch.view_as_real(torch.view_as_complex(q.unflatten(-1, (-1, 2))) * turn).flatten(-2)
    with use(body):
        got, _ = ops.rope(q, q[:, :, :1], cos, sin, interleaved=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("D, theta", [(64, 500000.0), (128, 500000.0), (80, 10000.0)])
def test_tables_are_those_of_transformers(D, theta):
    x, positions = torch.empty(1), torch.arange(9000)[None]
    scaling = {
        "factor": LLAMA3.factor,
        "low_freq_factor": LLAMA3.low_freq_factor,
        "high_freq_factor": LLAMA3.high_freq_factor,
        "original_max_position_embeddings": LLAMA3.original_max_position_embeddings,
    }
    plain = hf_rotary(D, {"rope_type": "default", "rope_theta": theta})(x, positions)
    llama3 = hf_rotary(D, {"rope_type": "llama3", "rope_theta": theta, **scaling})(x, positions)
    assert not torch.equal(plain[0], llama3[0])
    for expected, kind in ((plain, None), (llama3, LLAMA3)):
        for got, e in zip(rope_tables(9000, D, theta, kind), expected, strict=True):
            assert got.dtype == torch.float32
            # An angle of 9000 radians is known to half a thousandth in fp32; the roundings on the way must be the same.
            torch.testing.assert_close(got, e[0, :, : D // 2], rtol=0, atol=1e-6)


def test_llama3_stretches_long_wavelengths_only():
    D, theta = 128, 500000.0
    (_, plain), (_, scaled) = rope_tables(2, D, theta), rope_tables(2, D, theta, LLAMA3)
    plain, scaled = plain[1].asin(), scaled[1].asin()
    assert torch.equal(plain[:20], scaled[:20])
    torch.testing.assert_close(plain[-10:] / 8, scaled[-10:])


@bodies
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_keeps_norms_and_depends_on_distance_alone(body, interleaved):
    T, D = 12, 64
    q, k = (torch.randn(1, 1, 1, D, dtype=torch.float64).expand(1, T, 1, D) for _ in "qk")
    tables = rope_tables(64, D)
    with use(body):
        near = ops.rope(q, k, *tables, interleaved=interleaved)
        far = ops.rope(q, k, *tables, torch.arange(T) + 40, interleaved=interleaved)
    for got, x in zip((*near, *far), (q, k, q, k), strict=True):
        # fp32 tables: cos^2 + sin^2 is 1 to 1e-7.
        torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1), rtol=2e-7, atol=0)
    scores = [torch.einsum("bthd,bshd->ts", *pair) for pair in (near, far)]
    assert (scores[0][0, 0] - scores[0][0, -1]).abs() > 1e-2
    torch.testing.assert_close(*scores, rtol=0, atol=1e-3)


@bodies
@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_is_the_inverse(body, interleaved):
    """A rotation is orthogonal, so the gradient of the output pulled back is the input."""
    q, k = torch.randn(2, 5, 3, 96, requires_grad=True), torch.randn(2, 5, 1, 96, requires_grad=True)
    with use(body):
        ys = ops.rope(q, k, *rope_tables(5, 96), interleaved=interleaved)
        back = torch.autograd.grad(ys, (q, k), [y.detach() for y in ys])
    for b, x in zip(back, (q, k), strict=True):
        torch.testing.assert_close(b, x.detach(), rtol=0, atol=1e-6)


@bodies
def test_a_fused_projection_and_flat_rows(body):
    """q and k as views of one projection, and the same rows without a batch dimension."""
    B, T, H, G, D = 2, 9, 4, 2, 32
    qkv, tables = torch.randn(B, T, (H + 2 * G) * D), rope_tables(T, D)
    q = qkv[..., : H * D].view(B, T, H, D)
    k = qkv[..., H * D : (H + G) * D].view(B, T, G, D)
    positions = torch.arange(T).repeat(B)
    with use(body):
        expected = ops.rope(q.contiguous(), k.contiguous(), *tables)
        views = ops.rope(q, k, *tables)
        flat = ops.rope(q.flatten(0, 1), k.flatten(0, 1), *tables, positions)
        # (B, H, T, D) in memory, as attention may want it
        heads_first = ops.rope(q.transpose(1, 2).contiguous().transpose(1, 2), k, *tables)
    for v, f, h, e in zip(views, flat, heads_first, expected, strict=True):
        assert torch.equal(v, e) and torch.equal(f.view_as(e), e) and torch.equal(h, e)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-1, 8])
def test_position_outside_the_tables(dtype, wrong):
    q, positions = torch.randn(3, 1, 4, dtype=dtype, device="cpu"), torch.tensor([0, wrong, 7], device="cpu")
    low, high = min(0, wrong), max(7, wrong)
    with pytest.raises(IndexError, match=f"rope: positions must be at least 0 and below P=8, got {low} to {high}"):
        ops.rope(q, q, *rope_tables(8, 4, device="cpu"), positions)


def test_errors_name_the_argument():
    q, k, (cos, sin) = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8), rope_tables(5, 8)
    with pytest.raises(ValueError, match=r"rope: k must have the leading dimensions of q, \(2, 5\), got \(2, 4\)"):
        ops.rope(q, k[:, :4], cos, sin)
    with pytest.raises(ValueError, match=r"rope: k must be \(\.\.\., G, D\), G=2, D=8, got \(2, 5, 2, 6\)"):
        ops.rope(q, k[..., :6], cos, sin)
    with pytest.raises(ValueError, match=r"rope: cos must have a row for each of T=5 positions, got \(4, 4\)"):
        ops.rope(q, k, cos[:4], sin[:4])
    with pytest.raises(ValueError, match=r"rope: cos must be \(P, R/2\) with 0 < R <= D=8, got \(5, 8\)"):
        ops.rope(q, k, cos.repeat(1, 2), sin.repeat(1, 2))
    with pytest.raises(TypeError, match="rope: cos must be one of"):
        ops.rope(q, k, cos.bfloat16(), sin.bfloat16())
    with pytest.raises(TypeError, match="rope: positions must be one of"):
        ops.rope(q, k, cos, sin, torch.zeros(10))
    with pytest.raises(ValueError, match=r"rope: positions must be \(10,\) or \(2, 5\), got \(5,\)"):
        ops.rope(q, k, cos, sin, torch.arange(5))
    with pytest.raises(ValueError, match="rope_tables: R must be even and positive, got 7"):
        rope_tables(5, 7)
    with pytest.raises(ValueError, match="low_freq_factor < high_freq_factor"):
        rope_tables(5, 8, scaling=RopeScaling(8.0, 4.0, 1.0, 8192))


def test_reference_agrees_with_its_formula():
    """One pair, by hand."""
    q, angle = torch.tensor([3.0, 4.0]).view(1, 1, 1, 2), torch.tensor([[0.5]])
    y, _ = rope_ref(q, q, angle.cos(), angle.sin())
    c, s = angle.cos().item(), angle.sin().item()
    torch.testing.assert_close(y.flatten(), torch.tensor([3 * c - 4 * s, 4 * c + 3 * s]))
