"""The strict interpreter catches what it says it catches, and computes bf16 as a GPU does."""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

import interpreter
import numpy as np
import proof
import triton
import triton.language as tl


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i + shift, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def overlap_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr + tl.program_id(0) + tl.arange(0, BLOCK), tl.arange(0, BLOCK).to(tl.float32))


@triton.jit
def neighbour_kernel(y_ptr):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, tl.load(y_ptr + (pid + 1) % 4))


@triton.jit
def overflow_kernel(y_ptr, stride):
    pid = tl.program_id(0)
    tl.store(y_ptr + pid, (pid * stride).to(tl.int64))


@triton.jit
def table_kernel(table_ptr, n, BLOCK: tl.constexpr):
    ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(ptr + i, tl.load(ptr + i, mask=i < n, other=0.0) + 1, mask=i < n)


@triton.jit
def bf16_kernel(a_ptr, b_ptr, out_ptr, f_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i)
    b = tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a * b)
    tl.store(out_ptr + 2 * N + i, tl.where(a > b, a, -b))
    tl.store(out_ptr + 3 * N + i, tl.load(f_ptr + i))
    tl.store(out_ptr + 4 * N + i, a * 1.5 + tl.full((N,), 0.1, tl.bfloat16))
    tl.store(out_ptr + 5 * N + i, (a > b).to(tl.bfloat16))
    tl.store(out_ptr + 6 * N + i, tl.maximum(a, b) - tl.abs(a))
    tl.store(out_ptr + 7 * N + i, i.to(tl.bfloat16))
    tl.store(f_ptr + i, a)


@triton.jit
def bf16_dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION))


@triton.jit
def bf16_atomic_kernel(out_ptr, a_ptr, N: tl.constexpr):
    tl.atomic_add(out_ptr + tl.arange(0, N) % 2, tl.load(a_ptr + tl.arange(0, N)))


def test_lanes_outside_a_tensor():
    x, y = torch.ones(100), torch.zeros(100)
    copy_kernel[(2,)](x, y, 100, 0, BLOCK=64)
    assert torch.equal(x, y)
    with pytest.raises(Exception, match=r"load outside x_ptr \(100,\) in 1 lanes of program 1, the first at byte 400"):
        copy_kernel[(2,)](x, y, 100, 1, BLOCK=64)
    with pytest.raises(Exception, match=r"load outside x_ptr \(100,\) in 3 lanes of program 0, the first at byte -12"):
        copy_kernel[(2,)](x, y, 100, -3, BLOCK=64)


def test_padding_between_rows_is_outside():
    x = torch.ones(4, 8)[:, :6]
    with pytest.raises(Exception, match=r"load outside x_ptr \(4, 6\) in 2 lanes of program 0, the first at byte 24"):
        copy_kernel[(1,)](x, torch.zeros(8), 8, 0, BLOCK=8)


def test_other_size_than_the_tensors():
    with pytest.raises(Exception, match="store outside y_ptr"):
        copy_kernel[(1,)](torch.ones(8), torch.zeros(8, dtype=torch.float64)[:4], 8, 0, BLOCK=8)


def test_two_programs_store_to_one_address():
    overlap_kernel[(1,)](torch.zeros(8), BLOCK=8)
    with pytest.raises(Exception, match="programs 0 and 1 store to one address"):
        overlap_kernel[(2,)](torch.zeros(9), BLOCK=8)


def test_one_program_loads_what_another_stores():
    with pytest.raises(Exception, match="program 0 loads what program 1 stores"):
        neighbour_kernel[(4,)](torch.zeros(4))


def test_overflow_of_32_bits():
    y = torch.zeros(4, dtype=torch.int64)
    overflow_kernel[(2,)](y, 2**30)
    with pytest.raises(Exception, match="overflow"):
        overflow_kernel[(4,)](y, 2**30)


def test_phantoms_are_checked_and_never_touched():
    x, y = (torch.empty(2**34, device="meta", dtype=torch.bfloat16) for _ in range(2))
    with pytest.raises(Exception, match="overflow"):
        copy_kernel[(2**34 // 1024,)](x, y, 2**34, 0, BLOCK=1024)
    copy_kernel[(2,)](x, y, 2**34, 2**33, BLOCK=1024)
    with pytest.raises(Exception, match="load outside x_ptr"):
        copy_kernel[(2,)](x, y, 2**34, 2**34 - 2047, BLOCK=1024)


def test_table_of_pointers():
    a, b = torch.zeros(5), torch.ones(5)
    table = torch.tensor([a.data_ptr(), b.data_ptr()])
    with interpreter.also(a, b):
        table_kernel[(2,)](table, 5, BLOCK=8)
        assert a.tolist() == [1.0] * 5 and b.tolist() == [2.0] * 5
        with pytest.raises(Exception, match="outside a tensor of the table"):
            table_kernel[(2,)](table, 6, BLOCK=8)
    with pytest.raises(Exception, match="through a pointer that is no argument"):
        table_kernel[(2,)](table, 5, BLOCK=8)


def test_bf16_arithmetic_rounds_as_pytorch_does():
    N = 256
    a, b, f = torch.randn(N).bfloat16(), torch.randn(N).bfloat16(), torch.randn(N)
    rounded = f.bfloat16()
    out = torch.empty(8, N, dtype=torch.bfloat16)
    bf16_kernel[(1,)](a, b, out, f, N=N)
    tenth = torch.tensor(0.1, dtype=torch.bfloat16)
    wanted = [a + b, a * b, torch.where(a > b, a, -b), rounded, a * 1.5 + tenth, (a > b).bfloat16()]
    wanted += [torch.maximum(a, b) - a.abs(), torch.arange(N).bfloat16()]
    for i, w in enumerate(wanted):
        assert torch.equal(out[i], w), i
    assert torch.equal(f, a.float())


def test_bf16_conversion_of_special_values():
    values = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, -3.4e38, 1e-40, 1.00390625, 1.01171875])
    bits = interpreter.narrow(values.numpy())
    assert torch.equal(torch.from_numpy(bits.view(np.int16)), values.bfloat16().view(torch.int16))
    assert np.isnan(interpreter.widen(interpreter.narrow(np.array([np.nan], np.float32)))).all()


def test_bf16_dot():
    a, b, out = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16(), torch.empty(32, 32)
    bf16_dot_kernel[(1,)](a, b, out, N=32, PRECISION="tf32")
    assert (out.double() - a.double() @ b.double()).abs().max() < 1e-4


def test_fp32_dot_in_tf32_is_as_coarse_as_on_a_gpu():
    a, b, out = torch.randn(32, 32), torch.randn(32, 32), torch.empty(32, 32)
    exact = a.double() @ b.double()
    bf16_dot_kernel[(1,)](a, b, out, N=32, PRECISION="ieee")
    assert (out - exact).abs().max() < 1e-5
    bf16_dot_kernel[(1,)](a, b, out, N=32, PRECISION="tf32")
    assert 1e-4 < (out - exact).abs().max() < 1e-1


def test_bf16_atomics_add_values_and_not_bits():
    out, a = torch.zeros(2, dtype=torch.bfloat16), torch.arange(8).bfloat16()
    bf16_atomic_kernel[(1,)](out, a, N=8)
    assert out.tolist() == [0 + 2 + 4 + 6, 1 + 3 + 5 + 7]


def test_outputs_are_poisoned():
    x = torch.zeros(3)
    with proof.poisoned():
        for made in (torch.empty(5), torch.empty_like(x), x.new_empty(2, 2), torch.empty(3, dtype=torch.bfloat16)):
            assert made.isnan().all()
