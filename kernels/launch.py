"""Launch numbers shared by the row-wise operators: rows per program, block, warps, programs.

They are formulas and not an autotuner's choice, so that every rank launches the same code and a rerun gives the same
bits. What a formula rests on stands beside it; numbers without a measurement say so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import triton

# Stands in for the multiprocessor count where there is no GPU (the interpreter); small, so that tests run several
# tiles in one program. 132 of an H100 would give each program one tile and leave the loop untested.
SMS_WITHOUT_GPU = 4

# Elements of a tile that one thread holds: two 128-bit loads of a 16-bit dtype, four of fp32.
ELEMENTS_PER_THREAD = 16

# Smallest tile: 4 warps, so that a program of narrow rows is not all prologue.
SMALLEST_TILE = 2048


# What ``target`` says where there is no GPU.
INTERPRETER = "interpreter"
_assumed: str | None = None


@cache
def _target(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def target(device: torch.device) -> str:
    """What kernels for ``device`` are compiled for: ``sm_90``, ``gfx942``, or ``INTERPRETER`` without a GPU."""
    return _assumed or (_target(device) if device.type == "cuda" else INTERPRETER)


@contextmanager
def assume(name: str) -> Iterator[None]:
    """Inside the block ``target`` says ``name``, so that launches can be compiled for GPUs that are not here."""
    global _assumed
    before, _assumed = _assumed, name
    try:
        yield
    finally:
        _assumed = before


@cache
def _sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def sm_count(device: torch.device) -> int:
    """The number of multiprocessors of ``device``, or ``SMS_WITHOUT_GPU`` where it is no CUDA device."""
    return _sms(device) if device.type == "cuda" else SMS_WITHOUT_GPU


def row_tile(N: int, widest: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_N, num_warps) for rows of ``N`` elements held whole, or in blocks of ``widest`` when that is less.

    Depends on ``N`` alone: a formula that looked at the number of rows would compile anew for each batch size. Blocks
    are multiples of 4, as dropout draws. At most 16 warps: an AMD warp has 64 lanes, and 1024 threads are the most.
    """
    block_n = min(max(4, triton.next_power_of_2(N)), widest)
    rows = max(1, SMALLEST_TILE // block_n)
    return rows, block_n, min(16, max(4, rows * block_n // (32 * ELEMENTS_PER_THREAD)))


def persistent(tiles: int, device: torch.device, num_warps: int) -> tuple[int, int]:
    """(programs, tiles for each) when a program keeps a running sum over its tiles.

    16 warps a multiprocessor: more do not fit with the 128 registers a thread that such kernels take
    (tests/resources.json), and programs that wait for others only add partial sums. With 16 elements of two 16-bit
    tensors a thread, 32 KiB are in flight on each of 132, about what 4.8 TB/s times 1 us of latency asks for (derived,
    not measured).
    """
    most = sm_count(device) * max(1, 16 // num_warps)
    each = triton.cdiv(tiles, most)
    return triton.cdiv(tiles, max(1, each)), each


def element_tile(N: int) -> tuple[int, int, int]:
    """(ROWS, BLOCK_N, num_warps) for elementwise work on rows of ``N`` elements, none of which must be held whole.

    The widest power of two that divides ``N`` wastes no lane; 64 columns of a 16-bit dtype still fill a line of 128
    bytes, and more than 1024 gain nothing.
    """
    block_n = min(1024, max(64, N & -N))
    return SMALLEST_TILE // block_n, block_n, SMALLEST_TILE // (32 * ELEMENTS_PER_THREAD)


def column_sums(M: int, N: int, sums: int, device: torch.device) -> tuple[tuple[int, int, int], int, int, int]:
    """(``element_tile``, programs for each block of columns, tiles of each program, blocks) of an elementwise backward.

    With ``sums`` running sums over rows there are as many programs in all as ``persistent`` says; with none, one a
    tile. Two sums take twice the warps: with 4 they need up to 168 registers a thread, with 8 no more than 111
    (tests/resources.json), and ``persistent`` counts on 128.
    """
    rows, block_n, warps = element_tile(N)
    warps *= max(1, sums)
    row_tiles, blocks = triton.cdiv(M, rows), triton.cdiv(N, block_n)
    each = max(1, persistent(row_tiles * blocks, device, warps)[1]) if sums else 1
    return (rows, block_n, warps), triton.cdiv(row_tiles, each), each, blocks
