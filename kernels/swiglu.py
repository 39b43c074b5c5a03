"""SwiGLU, the gated activation of Llama, Mistral and Qwen.

    y = silu(gate) * up        silu(g) = g * s, s = sigmoid(g)        gate, up, y (M, F); packed (M, 2F) = [gate | up]

Backward, which recomputes s from gate and so saves nothing but its inputs:

    dgate = dy * up * s * (1 + gate * (1 - s))          dup = dy * gate * s

Computed in fp32 whatever the input (fp64 for fp64). Bound by DRAM: forward reads gate and up and writes y (3MF
elements), backward reads dy, gate and up and writes dgate and dup (5MF). The packed gradient is one buffer.
Source: Shazeer 2020, arXiv:2002.05202.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from fmcore import check
from fmcore.kernels import launch
from fmcore.kernels.blocks import accumulator, load_tile, store_tile, unit_columns
from fmcore.op import Op


# Reference: what the kernels below must equal.
def swiglu_ref(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    gate32, up32 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (gate, up))
    return (silu(gate32) * up32).to(gate.dtype)


# Kernels: one program owns a (ROWS, BLOCK_F) tile; blocks of one row are neighbours, so that lines are read once.
@triton.jit
def swiglu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr, M, F, stride_gm, stride_um,
    ROWS: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(F, BLOCK_F)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    gate = load_tile(gate_ptr, rows, cols, stride_gm, mask, ACC)  # (ROWS, BLOCK_F)
    up = load_tile(up_ptr, rows, cols, stride_um, mask, ACC)
    store_tile(y_ptr, rows, cols, F, mask, gate / (1 + tl.exp(-gate)) * up)


@triton.jit
def swiglu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, M, F, stride_dym, stride_gm, stride_um, stride_dm,
    ROWS: tl.constexpr, BLOCK_F: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    pid, blocks = tl.program_id(0), tl.cdiv(F, BLOCK_F)
    rows = (pid // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < M)[:, None] & (cols < F)[None, :]
    dy = load_tile(dy_ptr, rows, cols, stride_dym, mask, ACC)
    gate = load_tile(gate_ptr, rows, cols, stride_gm, mask, ACC)
    up = load_tile(up_ptr, rows, cols, stride_um, mask, ACC)
    s = 1 / (1 + tl.exp(-gate))
    store_tile(dgate_ptr, rows, cols, stride_dm, mask, dy * up * s * (1 + gate * (1 - s)))
    store_tile(dup_ptr, rows, cols, stride_dm, mask, dy * gate * s)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up, also when ``gate`` holds both."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    return gate, up


def _gradient(gate: Tensor, up: Tensor | None) -> Tensor:
    """One buffer for both gradients: packed as the input is, or (2, M, F)."""
    return gate.new_empty(gate.shape if up is None else (2, *gate.shape))


# Operators: what every body returns, then the bodies.
fwd = Op(
    "swiglu_fwd(Tensor gate, Tensor? up) -> Tensor",
    fake=lambda gate, up: gate.new_empty(gate.shape[0], gate.shape[1] // (2 if up is None else 1)),
)
bwd = Op("swiglu_bwd(Tensor dy, Tensor gate, Tensor? up) -> Tensor", fake=lambda dy, gate, up: _gradient(gate, up))


@fwd.body("cpu", accepts=lambda gate, *rest: gate.device.type == "cpu")
def swiglu_fwd_cpu(gate: Tensor, up: Tensor | None) -> Tensor:
    gate32, up32 = (x.to(accumulator(x.dtype)[0]) for x in _halves(gate, up))
    y = torch.ops.aten.silu.out(gate32, out=gate32.new_empty(gate32.shape))
    return y.mul_(up32).to(gate.dtype)


@bwd.body("cpu", accepts=lambda dy, *rest: dy.device.type == "cpu")
def swiglu_bwd_cpu(dy: Tensor, gate: Tensor, up: Tensor | None) -> Tensor:
    """In the memory of the result: autograd would also save silu(gate), and join the halves of a packed gradient."""
    dtype, stat = gate.dtype, accumulator(gate.dtype)[0]
    dy, gate, up = dy.to(stat), gate.to(stat), None if up is None else up.to(stat)
    d = _gradient(gate, up)
    (dgate, dup), (g, u) = d.chunk(2, -1) if up is None else d, _halves(gate, up)
    torch.mul(dy, u, out=dgate)
    torch.ops.aten.silu_backward.grad_input(dgate, g, grad_input=dgate)
    torch.ops.aten.silu.out(g, out=dup).mul_(dy)
    return d.to(dtype)


@fwd.body("triton", accepts=lambda gate, *rest: gate.is_cuda)
def swiglu_fwd_triton(gate: Tensor, up: Tensor | None) -> Tensor:
    gate, up = (unit_columns(x) for x in _halves(gate, up))
    M, F = gate.shape
    y = gate.new_empty(M, F)
    rows, block_f, warps = launch.element_tile(F)
    if y.numel():
        swiglu_fwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(F, block_f),)](
            gate, up, y, M, F, gate.stride(0), up.stride(0),
            ROWS=rows, BLOCK_F=block_f, ACC=accumulator(y.dtype)[1], num_warps=warps,
        )  # fmt: skip
    return y


@bwd.body("triton", accepts=lambda dy, *rest: dy.is_cuda)
def swiglu_bwd_triton(dy: Tensor, gate: Tensor, up: Tensor | None) -> Tensor:
    d = _gradient(gate, up)
    dgate, dup = d.chunk(2, -1) if up is None else d
    dy, gate, up = (unit_columns(x) for x in (dy, *_halves(gate, up)))
    M, F = gate.shape
    rows, block_f, warps = launch.element_tile(F)
    if d.numel():
        swiglu_bwd_kernel[(triton.cdiv(M, rows) * triton.cdiv(F, block_f),)](
            dy, gate, up, dgate, dup, M, F, dy.stride(0), gate.stride(0), up.stride(0), dgate.stride(0),
            ROWS=rows, BLOCK_F=block_f, ACC=accumulator(d.dtype)[1], num_warps=warps,
        )  # fmt: skip
    return d


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        return fwd(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        d = bwd(dy, gate, up)
        return (d, None) if up is None else tuple(d)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` (..., F); without ``up``, ``gate`` (..., 2F) holds both side by side, [gate | up].

    Both share shape, device and floating dtype and may be views with padded rows; the packed gradient is one buffer.
    Raises ``ValueError`` on shapes and devices, ``TypeError`` on dtypes. Source: arXiv:2002.05202.
    """
    check.dtype("swiglu", gate=gate)
    if up is None:
        check.shape("swiglu", gate=(gate, "... 2F"))
        if gate.shape[-1] % 2:
            raise ValueError(f"swiglu: gate without up must be (..., 2F), got {tuple(gate.shape)}")
    else:
        check.same("swiglu", gate=gate, up=up)
        if gate.ndim == 0 or up.shape != gate.shape:
            raise ValueError(f"swiglu: up must have the shape of gate, {tuple(gate.shape)}, got {tuple(up.shape)}")
    if fwd.eager(gate):
        return swiglu_ref(gate, up)
    gate2d, up2d = (None if x is None else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]) for x in (gate, up))
    y = SwiGLU.apply(gate2d, up2d)
    return y.view(*gate.shape[:-1], y.shape[-1])
