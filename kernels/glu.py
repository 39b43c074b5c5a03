"""Gated activations: swiglu (Llama, Mistral, Qwen), geglu (Gemma, T5 1.1) and reglu, each with an optional bias.

    y = f(g) * u        g = gate + bias[:F]   u = up + bias[F:]       gate, up, y (M, F)   bias (2F,)

with gate and up side by side in one tensor (M, 2F) = [gate | up], or each in its own. f is silu(g) = g * sigmoid(g)
for swiglu, gelu by erf or tanh for geglu, max(g, 0) for reglu: ``value_and_slope`` of kernels/activation.py. Backward
recomputes f and its slope f' from gate and bias, and so saves nothing but its inputs:

    dgate = dy * u * f'(g)      dup = dy * f(g)       dbias = sum over M of [dgate | dup]

Computed in fp32 whatever the input, the sums with the bias too (fp64 for fp64). Bound by DRAM: forward reads gate and
up and writes y (3MF elements), backward reads dy, gate and up and writes dgate and dup (5MF); dbias is summed in the
same pass. The packed gradient is one buffer.
Source: Shazeer 2020, arXiv:2002.05202.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as nnf
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.activation import chain, value_and_slope
from fmcore.kernels.blocks import accumulator, load_tile, store_tile, unit_columns
from fmcore.op import Op


# References: what the kernels below must equal.
def swiglu_ref(gate: Tensor, up: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    g, u = _operands(gate, up, bias)
    return (nnf.silu(_wide(g)) * u).to(gate.dtype)


def geglu_ref(gate: Tensor, up: Tensor | None = None, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    g, u = _operands(gate, up, bias)
    return (nnf.gelu(_wide(g), approximate=approximate) * u).to(gate.dtype)


def reglu_ref(gate: Tensor, up: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    g, u = _operands(gate, up, bias)
    return (nnf.relu(g) * u).to(gate.dtype)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up, also when ``gate`` holds both."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return gate, up


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _operands(gate: Tensor, up: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """g and u of the header, the sums in fp32 or fp64; without a bias they are the halves themselves."""
    gate, up = _halves(gate, up)
    if bias is None:
        return gate, up
    gate_bias, up_bias = _wide(bias).chunk(2)
    return gate + gate_bias, up + up_bias


# Kernels: one program owns a (ROWS, BLOCK_F) tile; blocks of one row are neighbours, so that lines are read once. The
# number of rows is not specialized, so that another batch size does not compile anew.
@triton.jit(do_not_specialize=["M"])
def glu_fwd_kernel(
    gate_ptr, up_ptr, bias_ptr, y_ptr, M, F, stride_gm, stride_um,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(F, BLOCK_F)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    in_cols = cols < F
    mask = (rows < M)[:, None] & in_cols[None, :]
    g = load_tile(gate_ptr, rows, cols, stride_gm, mask, ACC)  # (ROWS, BLOCK_F)
    u = load_tile(up_ptr, rows, cols, stride_um, mask, ACC)
    if bias_ptr is not None:
        g += tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
        u += tl.load(bias_ptr + F + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
    f, _ = value_and_slope(g, KIND)
    store_tile(y_ptr, rows, cols, F, mask, f * u)


@triton.jit(do_not_specialize=["M", "tiles"])
def glu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, bias_ptr, dgate_ptr, dup_ptr, dbias_ptr,
    M, F, stride_dym, stride_gm, stride_um, stride_dm, tiles,
    KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """With dbias a program goes down ``tiles`` tiles of rows and keeps running sums; without, it owns one tile."""
    pid, blocks = tl.program_id(0), tl.cdiv(F, BLOCK_F)
    part = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    in_cols = cols < F
    if bias_ptr is not None:
        gate_bias = tl.load(bias_ptr + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
        up_bias = tl.load(bias_ptr + F + cols, mask=in_cols, other=0.0).to(ACC)[None, :]
    if dbias_ptr is not None:
        dgate_bias = tl.zeros((ROWS, BLOCK_F), ACC)
        dup_bias = tl.zeros((ROWS, BLOCK_F), ACC)
    for i in range(tiles if dbias_ptr is not None else 1):
        rows = (part * tiles + i) * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & in_cols[None, :]
        dy = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC)
        g = load_tile(gate_ptr, rows, cols, stride_gm, mask, ACC)
        u = load_tile(up_ptr, rows, cols, stride_um, mask, ACC)
        if bias_ptr is not None:
            g += gate_bias
            u += up_bias
        f, slope = value_and_slope(g, KIND)
        dgate = chain(dy * u, slope, KIND)
        dup = dy * f
        if dgate_ptr is not None:
            store_tile(dgate_ptr, rows, cols, stride_dm, mask, dgate)
            store_tile(dup_ptr, rows, cols, stride_dm, mask, dup)
        if dbias_ptr is not None:
            dgate_bias += dgate
            dup_bias += dup
    if dbias_ptr is not None:
        # The launcher sums these over programs in a fixed order; atomics would give other bits on each run.
        sums_ptr = dbias_ptr + part * 2 * F
        tl.store(sums_ptr + cols, tl.sum(dgate_bias, axis=0), mask=in_cols)
        tl.store(sums_ptr + F + cols, tl.sum(dup_bias, axis=0), mask=in_cols)


# Bodies and operators: one pair of Triton bodies, a pair of operators for each public function.
def _gradient(gate: Tensor, up: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """One buffer for both gradients: packed as the input is, or (2, M, F)."""
    return gate.new_empty(gate.shape if up is None else (2, *gate.shape), dtype=dtype or gate.dtype)


def glu_fwd_triton(gate: Tensor, up: Tensor | None, bias: Tensor | None, kind: str) -> Tensor:
    gate, up = (unit_columns(x) for x in _halves(gate, up))
    M, F = gate.shape
    y = gate.new_empty(M, F)
    rows, block_f, warps = launch.element_tile(F)
    if y.numel():
        glu_fwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(F, block_f),)](
            gate, up, None if bias is None else bias.contiguous(), y, M, F, gate.stride(0), up.stride(0),
            KIND=kind, ROWS=rows, BLOCK_F=block_f, ACC=accumulator(y.dtype)[1], num_warps=warps,
        )  # fmt: skip
    return y


def glu_bwd_triton(
    dy: Tensor, gate: Tensor, up: Tensor | None, bias: Tensor | None, kind: str, needs_dx: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor]:
    d = _gradient(gate, up) if needs_dx else gate.new_empty(0)
    dgate, dup = (d.chunk(2, -1) if up is None else d) if needs_dx else (None, None)
    dy, gate, up = (unit_columns(x) for x in (dy, *_halves(gate, up)))
    (M, F), (stat, ACC) = gate.shape, accumulator(d.dtype)
    (rows, block_f, warps), programs, tiles, blocks = launch.column_sums(M, F, 2 * needs_dbias, d.device)
    dbias = d.new_empty(programs, 2 * F, dtype=stat) if needs_dbias else None
    if gate.numel():
        glu_bwd_kernel[(programs * blocks,)](
            dy, gate, up, None if bias is None else bias.contiguous(), dgate, dup, dbias,
            M, F, dy.stride(0), gate.stride(0), up.stride(0), 0 if dgate is None else dgate.stride(0), tiles,
            KIND=kind, ROWS=rows, BLOCK_F=block_f, ACC=ACC, num_warps=warps,
        )  # fmt: skip
    return d, d.new_empty(0) if dbias is None else dbias.sum(0).to(d.dtype)


def _operator(name: str) -> tuple[Op, Op]:
    """Forward and backward of the public function ``name``."""
    fwd = Op(
        f"{name}_fwd(Tensor gate, Tensor? up, Tensor? bias, str kind) -> Tensor",
        fake=lambda gate, up, *rest: gate.new_empty(gate.shape[0], gate.shape[1] // (2 if up is None else 1)),
    )
    bwd = Op(
        f"{name}_bwd(Tensor dy, Tensor gate, Tensor? up, Tensor? bias, str kind, bool needs_dx, bool needs_dbias)"
        " -> (Tensor, Tensor)",
        fake=lambda dy, gate, up, bias, kind, needs_dx, needs_dbias: (
            _gradient(gate, up) if needs_dx else gate.new_empty(0),
            gate.new_empty(2 * dy.shape[1] if needs_dbias else 0),
        ),
    )
    fwd.body("triton", accepts=lambda gate, *rest: gate.is_cuda)(glu_fwd_triton)
    bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)(glu_bwd_triton)
    return fwd, bwd


OPERATORS = {name: _operator(name) for name in ("swiglu", "geglu", "reglu")}
swiglu_fwd, swiglu_bwd = OPERATORS["swiglu"]


@swiglu_fwd.body("cpu", accepts=lambda gate, *rest: gate.device.type == "cpu")
def swiglu_fwd_cpu(gate: Tensor, up: Tensor | None, bias: Tensor | None, kind: str) -> Tensor:
    g, u = _operands(gate, up, bias)
    g = _wide(g)
    y = torch.ops.aten.silu.out(g, out=g.new_empty(g.shape))
    return y.mul_(u).to(gate.dtype)


@swiglu_bwd.body("cpu", accepts=lambda dy, *rest: dy.device.type == "cpu")
def swiglu_bwd_cpu(
    dy: Tensor, gate: Tensor, up: Tensor | None, bias: Tensor | None, kind: str, needs_dx: bool, needs_dbias: bool
) -> tuple[Tensor, Tensor]:
    """In the memory of the result: autograd would also save silu(gate), and join the halves of a packed gradient."""
    g, u = _operands(gate, up, bias)
    g, dy, dtype = _wide(g), _wide(dy), gate.dtype
    d = _gradient(gate, up, g.dtype)
    dgate, dup = d.chunk(2, -1) if up is None else d
    torch.mul(dy, u, out=dgate)
    torch.ops.aten.silu_backward.grad_input(dgate, g, grad_input=dgate)
    torch.ops.aten.silu.out(g, out=dup).mul_(dy)
    dbias = d.sum(-2).flatten().to(dtype) if needs_dbias else gate.new_empty(0)
    return d.to(dtype) if needs_dx else gate.new_empty(0), dbias


class GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None, bias: Tensor | None, name: str, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up, bias)
        ctx.name, ctx.kind = name, kind
        return OPERATORS[name][0](gate, up, bias, kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        needs_dgate, needs_dup, needs_dbias = ctx.needs_input_grad[:3]
        needs_dx, (gate, up, bias) = needs_dgate or needs_dup, ctx.saved_tensors
        d, dbias = OPERATORS[ctx.name][1](dy, gate, up, bias, ctx.kind, needs_dx, needs_dbias)
        dgate, dup = (None, None) if not needs_dx else (d, None) if up is None else d
        return dgate, dup, dbias if needs_dbias else None, None, None


def _glu(
    name: str, kind: str, ref: Callable[..., Tensor], gate: Tensor, up: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Check the arguments and choose the path; ``ref`` takes (gate, up, bias)."""
    check.dtype(name, gate=gate)
    if up is None:
        check.shape(name, gate=(gate, "... 2F"))
        if gate.shape[-1] % 2:
            raise ValueError(f"{name}: gate without up must be (..., 2F), got {tuple(gate.shape)}")
    else:
        check.same(name, gate=gate, up=up)
        if gate.ndim == 0 or up.shape != gate.shape:
            raise ValueError(f"{name}: up must have the shape of gate, {tuple(gate.shape)}, got {tuple(up.shape)}")
    if bias is not None:
        check.same(name, gate=gate, bias=bias)
        F = gate.shape[-1] // (2 if up is None else 1)
        if bias.shape != (2 * F,):
            raise ValueError(f"{name}: bias must be (2F), F={F}, got {tuple(bias.shape)}")
    if OPERATORS[name][0].eager(gate):
        return ref(gate, up, bias)
    gate2d, up2d = (None if x is None else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (gate, up))
    y = GLU.apply(gate2d, up2d, bias, name, kind)
    return y.view(*gate.shape[:-1], y.shape[-1])


def swiglu(gate: Tensor, up: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` (..., F); without ``up``, ``gate`` (..., 2F) holds both side by side, [gate | up].

    ``bias`` (2F,) is added to [gate | up] first, in fp32, in either form. All share device and floating dtype and may
    be views with padded rows; the packed gradient is one buffer. Raises ``ValueError`` on shapes and devices,
    ``TypeError`` on dtypes. Source: arXiv:2002.05202.
    """
    return _glu("swiglu", "silu", swiglu_ref, gate, up, bias)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh", bias: Tensor | None = None) -> Tensor:
    """``gelu(gate) * up`` (..., F), gelu by the tanh approximation or, with ``approximate="none"``, exact by erf.

    Packed input, bias and errors as for ``swiglu``; ``ValueError`` too on another ``approximate``. Source:
    arXiv:2002.05202.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate must be 'tanh' or 'none', got {approximate!r}")
    kind = "gelu_tanh" if approximate == "tanh" else "gelu"
    return _glu("geglu", kind, partial(geglu_ref, approximate=approximate), gate, up, bias)


def reglu(gate: Tensor, up: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """``max(gate, 0) * up`` (..., F), whose slope at a gate of 0 is 0 as in PyTorch.

    Packed input, bias and errors as for ``swiglu``. Source: arXiv:2002.05202.
    """
    return _glu("reglu", "relu", reglu_ref, gate, up, bias)
