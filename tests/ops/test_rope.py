"""What is peculiar to rope: its conventions against transformers and complex numbers, its tables."""

import interpreter
import proof
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


@pytest.mark.parametrize("interleaved", [False, True])
def test_tables_in_fp64_are_taken_in_fp32(interleaved):
    """Tables may be finer than q and k; what is computed in does not change with them."""
    q, k = torch.randn(2, 37, 2, 16)
    angles = torch.rand(37, 8, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    with use("triton"):
        got = ops.rope(q, k, cos, sin, interleaved=interleaved)
        expected = ops.rope(q, k, cos.float(), sin.float(), interleaved=interleaved)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


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


@bodies
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_documents_are_rotated_as_if_alone(body, integers):
    """Packed in rows, with and without a batch dimension, over the end of a batch row; empty ones at all places."""
    lens, H, G, D = [0, 3, 0, 0, 7, 1, 9, 0], 3, 1, 16
    B, T = 2, sum(lens) // 2
    q, k, tables = torch.randn(B * T, H, D), torch.randn(B * T, G, D), rope_tables(9, D)
    cu_seqlens = torch.tensor([0, *lens]).cumsum(0).to(integers)
    positions = torch.cat([torch.arange(n) for n in lens])
    parts = zip(q.split(lens), k.split(lens), strict=True)
    with use(body):
        alone = [torch.cat(x) for x in zip(*(ops.rope(*part, *tables) for part in parts if len(part[0])), strict=True)]
        packed = ops.rope(q, k, *tables, cu_seqlens=cu_seqlens)
        folded = ops.rope(q.view(B, T, H, D), k.view(B, T, G, D), *tables, cu_seqlens=cu_seqlens)
        given = ops.rope(q, k, *tables, positions)
    for a, p, f, g in zip(alone, packed, folded, given, strict=True):
        assert torch.equal(p, a) and torch.equal(f.view_as(p), a) and torch.equal(g, a)


@bodies
@pytest.mark.parametrize("entries", [*range(1, 10), 31, 32, 33])
def test_every_number_of_documents(body, entries):
    """The search ends at the right offset for every row, whatever the number of halvings; rows follow the last one."""
    q, tables = torch.randn(70, 1, 2), rope_tables(70, 2)
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), torch.randint(0, 70, (entries - 1,)).sort().values))
    positions = torch.tensor([row - max(c for c in cu_seqlens.tolist() if c <= row) for row in range(70)])
    with use(body):
        got, expected = ops.rope(q, q, *tables, cu_seqlens=cu_seqlens), ops.rope(q, q, *tables, positions)
    assert torch.equal(got[0], expected[0])


def test_gradients_that_are_views():
    """dq and dk as parts of one gradient of a fused projection reach the kernel without a copy."""
    B, T, H, G, D = 2, 5, 4, 2, 16
    dqkv, tables = torch.randn(B, T, H + 2 * G, D), rope_tables(T, D)
    q, k = torch.randn(B, T, H, D, requires_grad=True), torch.randn(B, T, G, D, requires_grad=True)
    dq, dk = dqkv[:, :, :H], dqkv[:, :, H : H + G]
    with use("triton"):
        ys = ops.rope(q, k, *tables)
        views = torch.autograd.grad(ys, (q, k), (dq, dk), retain_graph=True)
        expected = torch.autograd.grad(ys, (q, k), (dq.contiguous(), dk.contiguous()), retain_graph=True)
        if proof.DEVICE == "cpu":
            with interpreter.recorded() as launches:
                torch.autograd.grad(ys, (q, k), (dq, dk))
            assert {dq.data_ptr(), dk.data_ptr()} <= {span.tensor.data_ptr() for span in launches[0].spans}
    assert torch.equal(views[0], expected[0]) and torch.equal(views[1], expected[1])


@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_outside_read_nothing(interleaved):
    """In the kernel: NaN in the rotated dimensions of that row, the rest as ever. 2^32 is not 0."""
    q, tables = torch.randn(6, 2, 10), rope_tables(8, 8)
    positions = torch.tensor([0, -1, 8, 7, 2**32, -(2**40)])
    outside = (positions < 0) | (positions >= 8)
    with use("triton"):
        got, _ = ops.rope(q, q, *tables, positions, interleaved=interleaved)
        inside, _ = ops.rope(q, q, *tables, positions.where(~outside, 0), interleaved=interleaved)
        # Rows before the first document, and a document longer than the tables.
        before, _ = ops.rope(q, q, *tables, cu_seqlens=torch.tensor([2, 6]))
        long, _ = ops.rope(q, q, *(t[:4] for t in tables), cu_seqlens=torch.tensor([0, 6]))
    assert got[outside][..., :8].isnan().all() and torch.equal(got[~outside], inside[~outside])
    assert torch.equal(got[..., 8:], q[..., 8:])
    assert before[:2, :, :8].isnan().all() and not before[2:].isnan().any()
    assert long[4:, :, :8].isnan().all() and not long[:4].isnan().any()


def test_documents_outside_the_tables_on_a_cpu():
    q, tables = torch.randn(6, 2, 8, device="cpu"), rope_tables(4, 8, device="cpu")
    with pytest.raises(IndexError, match="rope: positions must be at least 0 and below P=4, got 0 to 5"):
        ops.rope(q, q, *tables, cu_seqlens=torch.tensor([0, 6], device="cpu"))
    with pytest.raises(IndexError, match="below P=4, got -2 to 1"):
        ops.rope(q, q, *tables, cu_seqlens=torch.tensor([2, 4, 6], device="cpu"))


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
    cu_seqlens = torch.tensor([0, 10])
    with pytest.raises(ValueError, match="rope: positions and cu_seqlens exclude each other, got both"):
        ops.rope(q, k, cos, sin, torch.arange(10), cu_seqlens=cu_seqlens)
    with pytest.raises(TypeError, match="rope: cu_seqlens must be one of"):
        ops.rope(q, k, cos, sin, cu_seqlens=cu_seqlens.float())
    for wrong in (cu_seqlens[:0], cu_seqlens[None]):
        with pytest.raises(ValueError, match=r"rope: cu_seqlens must be \(S \+ 1,\), got"):
            ops.rope(q, k, cos, sin, cu_seqlens=wrong)
    with pytest.raises(ValueError, match="rope: cu_seqlens must be on the device of q"):
        ops.rope(q, k, cos, sin, cu_seqlens=cu_seqlens.to("meta"))
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
