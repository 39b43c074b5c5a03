"""What is peculiar to the embedding: runs of every length, sums in fp32, tokens that no table has, addresses."""

import interpreter
import proof
import pytest
import torch
import torch.nn.functional as F

from fmcore import nn, ops
from fmcore.kernels import embedding as kernels
from fmcore.kernels.embedding import embedding_ref
from fmcore.op import use

pytestmark = pytest.mark.usefixtures("on_device")
ON_GPU = torch.cuda.is_available()
bodies = pytest.mark.parametrize("body", ["eager", "cpu", "triton"] if not ON_GPU else ["eager", "triton"])


@pytest.fixture
def short_chunks(monkeypatch) -> int:
    """Chunks of 8 places, so that runs of several are short."""
    monkeypatch.setattr(kernels, "CHUNK", 8)
    return 8


def gradient(tokens: torch.Tensor, dy: torch.Tensor, V: int, **options) -> torch.Tensor:
    w = torch.zeros(V, dy.shape[-1], dtype=dy.dtype, requires_grad=True)
    with use("triton"), proof.poisoned():
        return torch.autograd.grad(ops.embedding(tokens, w, **options), w, dy)[0]


@pytest.mark.parametrize("edge", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_runs_that_end_at_a_chunk(chunks, edge, short_chunks):
    """A run before, on and after the edge of a chunk, alone and between others. Whole numbers make sums exact."""
    C, length = short_chunks, chunks * short_chunks + edge
    for before, after in ((0, 0), (0, 5), (1, 1), (C, 3), (3, C), (1, 2 * C)):
        tokens = torch.tensor([0] * before + [1] * length + [2] * after)
        tokens = tokens[torch.randperm(len(tokens))]
        dy = torch.randint(-9, 9, (len(tokens), 3)).float()
        expected = torch.zeros(4, 3).index_add_(0, tokens, dy)
        assert torch.equal(gradient(tokens, dy, 4), expected)


def test_one_token_everywhere_sums_in_fp32(short_chunks):
    """What PyTorch gets wrong in 16 bits: added one by one, 2^-8 is lost on 1. More pieces than one step adds."""
    M = 70 * short_chunks + 7
    dy = torch.full((M, 2), 2**-8, dtype=torch.bfloat16)
    dy[0] = 1
    expected = torch.full((1, 2), 1 + (M - 1) * 2**-8).bfloat16()
    assert torch.equal(gradient(torch.zeros(M, dtype=torch.int64), dy, 1), expected)


def test_gradient_does_not_depend_on_other_tokens():
    """The sum of a run within a chunk has one order: neighbours in the batch do not change its bits."""
    dy = torch.randn(30, 40)
    alone = gradient(torch.full((30,), 2), dy, 4)[2]
    mixed = gradient(torch.tensor([2] * 30 + [3] * 20), torch.cat((dy, torch.randn(20, 40))), 4)[2]
    assert torch.equal(alone, mixed)


@bodies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_any_shape_of_tokens(body, integers, dtype):
    w = torch.randn(6, 5, dtype=dtype, requires_grad=True)
    tokens = torch.randint(6, (2, 3, 4), dtype=integers)
    for t in (tokens, tokens[0, 0, 0], tokens[:, :0], tokens.transpose(0, 2), tokens[..., ::2]):
        with use(body):
            y = ops.embedding(t, w)
            (dw,) = torch.autograd.grad(y, w, torch.ones_like(y))
        expected = F.embedding(t, w)
        assert torch.equal(y, expected)
        assert torch.equal(dw, torch.autograd.grad(expected, w, torch.ones_like(y))[0])


@bodies
@pytest.mark.parametrize("padding_idx", [0, 3, -1, -4])
def test_padding_gets_no_gradient(body, padding_idx):
    w, tokens = torch.randn(4, 5, requires_grad=True), torch.randint(4, (70,))
    dy = torch.randint(-9, 9, (70, 5)).float()
    with use(body):
        y = ops.embedding(tokens, w, padding_idx=padding_idx)
        (dw,) = torch.autograd.grad(y, w, dy)
    assert torch.equal(y, w[tokens])
    expected = torch.zeros(4, 5).index_add_(0, tokens, dy)
    expected[padding_idx] = 0
    assert torch.equal(dw, expected)


@pytest.mark.parametrize("padding_idx", [None, 0])
def test_tokens_outside_read_nothing(padding_idx, short_chunks):
    """Rows of NaN, which a loss shows, and no gradient; others as ever. Twelve times, so that runs are cut."""
    tokens = torch.tensor([0, -1, 2, 3, 2**31 - 1, -(2**31), 1]).repeat(12)
    inside = (tokens >= 0) & (tokens < 3)
    w, dy = torch.randn(3, 5), torch.randint(-9, 9, (len(tokens), 5)).float()
    with use("triton"):
        for t in (tokens, tokens.int()):
            y = ops.embedding(t, w)
            assert torch.equal(y[inside], w[tokens[inside]]) and y[~inside].isnan().all()
    with use("triton"):
        assert ops.embedding(torch.tensor([2**32]), w).isnan().all()
    expected = torch.zeros(3, 5).index_add_(0, tokens[inside], dy[inside])
    if padding_idx is not None:
        expected[padding_idx] = 0
    for t in (tokens, tokens.int()):
        assert torch.equal(gradient(t, dy, 3, padding_idx=padding_idx), expected)


@pytest.mark.parametrize("wrong", [-1, 6])
def test_tokens_outside_on_a_cpu(wrong):
    w, tokens = torch.randn(6, 5, device="cpu"), torch.tensor([0, wrong, 5], device="cpu")
    low, high = min(0, wrong), max(5, wrong)
    with pytest.raises(IndexError, match=f"embedding: tokens must be at least 0 and below V=6, got {low} to {high}"):
        ops.embedding(tokens, w)


def test_an_empty_table():
    with use("triton"):
        w = torch.zeros(0, 5, requires_grad=True)
        y = ops.embedding(torch.zeros(0, dtype=torch.int64), w)
        assert y.shape == (0, 5)
        assert torch.autograd.grad(y.sum(), w)[0].shape == (0, 5)


@pytest.mark.skipif(ON_GPU, reason="addresses are checked in the interpreter")
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_addresses_of_real_tokens(integers):
    """The tokens exist and the rest has a shape alone: rows of 2^13 at tokens and places up to 2^19."""
    M = V = 2**19
    w, dy = (torch.empty(n, 2**13, dtype=torch.bfloat16, device="meta") for n in (V, M))
    # All different, last first: the programs at the ends of the grid sum one row each. Then one token alone.
    apart, alone = torch.arange(V, dtype=integers).flip(0), torch.full((M,), V - 1, dtype=integers)
    with interpreter.recorded() as launches:
        kernels.embedding_fwd_triton(apart, w)
        kernels.embedding_fwd_triton(alone, w)
        kernels.embedding_bwd_triton(dy, apart, V, None)
        kernels.embedding_bwd_triton(dy, alone, V, None)
    assert len(launches) == 6 and all(launch.phantom for launch in launches)


def test_nothing_waits_for_the_gpu():
    """The number and the size of launches follow from the shapes, so a CUDA graph could hold them."""
    if ON_GPU:
        pytest.skip("reads launches from the interpreter")
    counts = []
    for high in (1, 2, 150):
        with interpreter.recorded() as launches:
            gradient(torch.randint(high, (150,)), torch.randn(150, 8), 150)
        counts.append([launch.kernel for launch in launches])
    assert counts[0] == counts[1] == counts[2]


@bodies
def test_compiles(body):
    torch._dynamo.reset()
    w, tokens = torch.randn(9, 8, requires_grad=True), torch.randint(9, (2, 7))
    compiled = torch.compile(ops.embedding, fullgraph=True, dynamic=True, backend="aot_eager")
    with use(body):
        y = compiled(tokens, w, padding_idx=2)
        assert torch.equal(y, w[tokens])
        y.sum().backward()
    assert torch.equal(w.grad, torch.autograd.grad(embedding_ref(tokens, w, 2).sum(), w)[0])


def test_module_stands_in_for_pytorch():
    theirs = torch.nn.Embedding(7, 4, padding_idx=-2)
    ours = nn.Embedding(7, 4, padding_idx=-2)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(7, (2, 5))
    assert repr(ours) == repr(theirs) and ours.padding_idx == 5
    for module in (ours, theirs):
        module(tokens).square().sum().backward()
    assert torch.equal(ours(tokens), theirs(tokens))
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    frozen = nn.Embedding.from_pretrained(theirs.weight.detach())
    assert type(frozen) is nn.Embedding and not frozen.weight.requires_grad
    assert nn.Embedding(7, 4, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    for option, value in (("max_norm", 1.0), ("scale_grad_by_freq", True), ("sparse", True)):
        with pytest.raises(ValueError, match=f"Embedding: {option} must be (None|False), got {value}"):
            nn.Embedding(7, 4, **{option: value})


def test_errors_name_the_argument():
    w, tokens = torch.randn(6, 5), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"embedding: w must be \(V, C\), got \(5,\)"):
        ops.embedding(tokens, w[0])
    with pytest.raises(TypeError, match="embedding: tokens must be one of"):
        ops.embedding(tokens.float(), w)
    with pytest.raises(TypeError, match="embedding: w must be one of"):
        ops.embedding(tokens, w.long())
    with pytest.raises(ValueError, match="embedding: tokens must be on the device of w"):
        ops.embedding(tokens.to("meta"), w)
    for padding_idx in (6, -7):
        with pytest.raises(ValueError, match=f"padding_idx must be at least -V and below V=6, got {padding_idx}"):
            ops.embedding(tokens, w, padding_idx=padding_idx)
