"""The Triton interpreter (3.6.0) made strict: what a GPU would do wrong in silence fails here.

``install()`` changes the interpreter of this process for good; ``tests/conftest.py`` calls it where kernels run in the
interpreter. On a machine with a GPU this module imports and does nothing. What each part does, and how:

Memory.  Every tensor that a launch is given gets a made-up address: its number in the top bits, the middle of a range
    of 2^52 bytes in the rest. So each lane of a load or store tells which argument its pointer came from, and the lane
    must hit an element of that very argument: not the padding between the rows of a view, not a neighbour on the heap.
    Only then is it turned into a real address. Real addresses (tables of pointers) are allowed for ``also`` tensors.
Races.  The addresses that each program loads and stores are kept; after the launch no address may have been stored by
    two programs, or stored by one and loaded by another. Atomics are exempt.
Phantoms.  A tensor on the ``meta`` device has a shape and no memory, so 2^34 elements cost nothing. Loads from it give
    zeros, stores are checked and dropped. A launch with such an argument runs the first two and last two programs of
    each axis, and a loop of more than eight steps the first four and last four, which takes addresses computed from the
    loop variable, as everywhere in this repository.
Overflow.  ``debug=True`` makes the interpreter assert that no 32-bit sum, difference or product wraps.
bfloat16.  The interpreter holds bf16 as uint16 and computes on the bits. Here arithmetic, comparisons, functions, dots,
    constants, atomics and conversions of bf16 go through fp32 and round to nearest even.
tf32.  A dot of fp32 in the default precision drops the 13 bits that the tensor cores of a GPU would not see.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

SHIFT = 52
MIDDLE = 1 << (SHIFT - 1)
VERSION = "3.6.0"

_launch: "Launch | None" = None
_recorders: list[list["Launch"]] = []
_also: list[Tensor] = []


class Span:
    """The bytes of one tensor: which byte offsets from its first element are elements of it."""

    def __init__(self, name: str, t: Tensor, base: int):
        self.name, self.tensor, self.base, self.itemsize = name, t, base, t.element_size()
        self.phantom = t.device.type == "meta"
        dims = sorted(((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1 and s > 0), reverse=True)
        self.last = -1 if t.numel() == 0 else sum(s * (n - 1) for s, n in dims)
        # Strides that nest divide an offset into one index a dimension; overlapping views are checked by range alone.
        extents = [s * (n - 1) for s, n in dims]
        self.dims = dims if all(s > sum(extents[i + 1 :]) for i, (s, _) in enumerate(dims)) else []

    def outside(self, offset: np.ndarray, size: int) -> np.ndarray:
        element, rest = np.divmod(offset, self.itemsize)
        bad = (element < 0) | (element > self.last) | (rest != 0) | (size != self.itemsize)
        for stride, n in self.dims:
            index, element = np.divmod(element, stride)
            bad |= index >= n
        return bad | (element != 0) if self.dims else bad


@dataclass
class Launch:
    """One launch of a kernel: its arguments, where they lie, and what each program touched."""

    kernel: str
    args: dict[str, Any]
    spans: list[Span] = field(default_factory=list)
    program: int = 0
    reads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    writes: list[tuple[int, np.ndarray]] = field(default_factory=list)
    # What the interpreter patched for the modules ``tl`` and ``tl.core``, to be undone after the launch.
    patches: dict[frozenset[str], Any] = field(default_factory=dict)

    def patch(self, fn: Callable) -> None:
        """Let ``fn`` run in the interpreter. Once a launch and module: it takes far longer than a helper does."""
        modules = [m for m in fn.__globals__.values() if inspect.ismodule(m)]
        names = frozenset(m.__name__ for m in (tl, tl.core) if m in modules)
        if not any(names <= done for done in self.patches):
            self.patches[names] = triton.runtime.interpreter._patch_lang(fn)

    def pointer(self, t: Tensor) -> int:
        """The made-up address of ``t``."""
        if t.device.type not in ("cpu", "meta"):
            raise ValueError(f"{self.kernel}: the interpreter takes tensors on cpu or meta, got {t.device}")
        name = next((n for n, a in self.args.items() if a is t), "a tensor")
        base = (len(self.spans) + 1 << SHIFT) + MIDDLE
        self.spans.append(Span(name, t, base))
        return base

    @property
    def phantom(self) -> bool:
        return any(a.device.type == "meta" for a in self.args.values() if isinstance(a, Tensor))

    def translate(self, pointers: np.ndarray, mask: np.ndarray, size: int, kind: str) -> tuple[np.ndarray, bool]:
        """Real addresses for ``pointers`` where ``mask``; and whether the memory is a phantom."""
        lanes = pointers[mask]
        if lanes.size == 0:
            return pointers, False
        tag = int(lanes.flat[0]) >> SHIFT
        if tag == 0:
            span = self._known(int(lanes.min()))
        elif tag <= len(self.spans):
            span = self.spans[tag - 1]
        else:
            span = None
        if span is None:
            raise AssertionError(f"{self.kernel}: {kind} through a pointer that is no argument")
        offset = lanes.astype(np.int64) - span.base
        bad = span.outside(offset, size)
        if bad.any():
            raise AssertionError(
                f"{self.kernel}: {kind} outside {span.name} {tuple(span.tensor.shape)} in {int(bad.sum())} lanes of "
                f"program {self.program}, the first at byte {int(offset[bad][0])}"
            )
        real = offset + (span.base if span.phantom else span.tensor.data_ptr())
        if kind != "atomic":
            (self.writes if kind == "store" else self.reads).append((self.program, np.unique(real)))
        out = np.zeros_like(pointers)
        out[mask] = real.astype(np.uint64)
        return out, span.phantom

    def _known(self, address: int) -> Span | None:
        for t in _also:
            if t.data_ptr() <= address < t.data_ptr() + t.numel() * t.element_size():
                return Span("a tensor of the table", t, t.data_ptr())
        return None

    def check_races(self) -> None:
        if not self.writes:
            return
        address = np.concatenate([a for _, a in self.writes])
        program = np.concatenate([np.full(a.size, p) for p, a in self.writes])
        order = np.lexsort((program, address))
        address, program = address[order], program[order]
        twice = (address[1:] == address[:-1]) & (program[1:] != program[:-1])
        if twice.any():
            i = int(np.argmax(twice))
            raise AssertionError(f"{self.kernel}: programs {program[i]} and {program[i + 1]} store to one address")
        for reader, wanted in self.reads:
            at = np.minimum(np.searchsorted(address, wanted), address.size - 1)
            clash = (address[at] == wanted) & (program[at] != reader)
            if clash.any():
                writer = program[at[int(np.argmax(clash))]]
                raise AssertionError(f"{self.kernel}: program {reader} loads what program {writer} stores")


def shortened(*bounds: Any) -> Iterator[int] | range:
    """``range``, of which a phantom launch runs the two ends."""
    whole = range(*(int(b.handle.data.flat[0]) if isinstance(b, tl.tensor) else int(b) for b in bounds))
    if _launch is None or not _launch.phantom or len(whole) <= 8:
        return whole
    return iter([*whole[:4], *whole[-4:]])


def _programs(count: int) -> list[int]:
    return sorted({*range(count)[:2], *range(count)[-2:]}) if _launch.phantom else list(range(count))


def _run_grid(self, *args: Any, **kwargs: Any) -> None:
    """Stands in for ``GridExecutor.__call__``: checks every access, and copies no argument."""
    global _launch
    interp = triton.runtime.interpreter
    bound = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
    for hook in self.pre_run_hooks:
        hook(*args, **kwargs)
    outer, _launch = _launch, Launch(self.fn.__name__, bound)
    for log in _recorders:
        log.append(_launch)
    _launch.patch(self.fn)
    builder = interp.interpreter_builder
    try:
        values = {name: a if name in self.constexprs else interp._implicit_cvt(a) for name, a in bound.items()}
        grid = self.grid(values) if callable(self.grid) else self.grid
        grid = tuple(int(n) for n in grid) + (1,) * (3 - len(grid))
        builder.set_grid_dim(*grid)
        with np.errstate(all="ignore"):
            for x in _programs(grid[0]):
                for y in _programs(grid[1]):
                    for z in _programs(grid[2]):
                        _launch.program = (x * grid[1] + y) * grid[2] + z
                        builder.set_grid_idx(x, y, z)
                        self.fn(**values)
        _launch.check_races()
    except Exception as e:
        raise interp.InterpreterError(f"{self.fn.__name__}: {e}") from e
    finally:
        for patches in reversed(_launch.patches.values()):
            patches.restore()
        _launch = outer


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches inside the block, with the very tensors that the kernels were given."""
    log: list[Launch] = []
    _recorders.append(log)
    try:
        yield log
    finally:
        _recorders.remove(log)


@contextmanager
def also(*tensors: Tensor) -> Iterator[None]:
    """Inside the block kernels may reach ``tensors`` through addresses that they load from a table."""
    _also.extend(tensors)
    try:
        yield
    finally:
        del _also[len(_also) - len(tensors) :]


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bits to fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(value: np.ndarray, nearest: bool = True) -> np.ndarray:
    """fp32 to bf16 bits, to nearest even or towards zero; every NaN becomes the same quiet one."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).reshape(np.shape(value))
    # uint64, so that rounding the largest magnitudes up cannot wrap.
    rounded = (bits.astype(np.uint64) + (((bits >> 16) & 1) + 0x7FFF if nearest else 0)) >> 16
    return np.where(np.isnan(value), 0x7FC0, rounded).astype(np.uint16)


def _patch_memory(builder: type, handle: type, interp: Any) -> None:
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def access(pointers: Any, mask: Any, kind: str) -> tuple[Any, Any, bool]:
        mask = np.asarray(mask.data if isinstance(mask, handle) else mask, bool)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        mask = np.broadcast_to(mask, pointers.data.shape)
        real, phantom = _launch.translate(pointers.data, mask, size, kind)
        return handle(real, pointers.dtype), handle(np.ascontiguousarray(mask), tl.int1), phantom

    def masked_load(self, pointers, mask, other, *rest):
        pointers, mask, phantom = access(pointers, mask, "load")
        if phantom:
            mask = handle(np.zeros_like(mask.data), tl.int1)
        return load(self, pointers, mask, other, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        pointers, mask, phantom = access(pointers, mask, "store")
        return None if phantom else store(self, pointers, value, mask, *rest)

    def atomic_rmw(self, op, pointers, value, mask, *rest):
        pointers, mask, phantom = access(pointers, mask, "atomic")
        if phantom:
            return value
        if value.dtype.scalar != tl.bfloat16:
            return rmw(self, op, pointers, value, mask, *rest)
        if op != interp._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"atomic {op} on bfloat16")
        before, bits = np.zeros(value.data.shape, np.uint16), np.dtype(np.uint16)
        for i in np.ndindex(value.data.shape):
            if mask.data[i]:
                at, one = pointers.data[i].reshape(1), np.ones(1, bool)
                before[i] = interp._interpreter.load(at, one, np.zeros(1, bits), bits)[0]
                after = narrow(widen(before[i].reshape(1)) + widen(value.data[i].reshape(1)))
                interp._interpreter.store(at, after, one)
        return handle(before, tl.bfloat16)

    def atomic_cas(self, pointers, *rest):
        pointers, _, phantom = access(pointers, np.ones(pointers.data.shape, bool), "atomic")
        return rest[0] if phantom else cas(self, pointers, *rest)

    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic_rmw, atomic_cas


def _patch_floats(builder: type, handle: type, interp: Any) -> None:
    def is_bf16(h: Any) -> bool:
        # The interpreter gives the result of a comparison the type of its operands, so look at the data too.
        return isinstance(h, handle) and h.dtype.scalar == tl.bfloat16 and h.data.dtype == np.uint16

    def wide(h: Any) -> Any:
        return handle(widen(h.data), tl.float32) if is_bf16(h) else h

    def through_fp32(method: Callable) -> Callable:
        def computed(self, *args):
            if not any(map(is_bf16, args)) or np.where in args:
                return method(self, *args)
            out = method(self, *map(wide, args))
            return handle(out.data, tl.int1) if out.data.dtype == bool else handle(narrow(out.data), tl.bfloat16)

        return computed

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt"):
        setattr(builder, name, through_fp32(getattr(builder, name)))

    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    reduce = interp.ReduceOps.apply_impl

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and not is_bf16(src):
            return handle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(src) or src.data.dtype == bool:
            return handle(wide(src).data.astype(interp._get_np_dtype(dst_type)), dst_type.scalar)
        return cast(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding):
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar in (tl.float16, tl.float32, tl.float64):
            nearest = rounding != interp._ir.ROUNDING_MODE.RTZ
            return handle(narrow(src.data.astype(np.float32), nearest), tl.bfloat16)
        return convert(self, src, dst_type, rounding)

    def create_dot(self, a, b, d, precision, *rest):
        a, b = wide(a), wide(b)
        if a.dtype.scalar == tl.float32 and a.data.dtype == np.float32 and precision == interp._ir.INPUT_PRECISION.TF32:
            a, b = (handle((h.data.view(np.uint32) & 0xFFFFE000).view(np.float32), tl.float32) for h in (a, b))
        return dot(self, a, b, d, precision, *rest)

    def apply_impl(self, inputs):
        if any(is_bf16(t.handle) for t in inputs):
            raise NotImplementedError("a reduction of bfloat16: convert to float32 first")
        return reduce(self, inputs)

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = cast_impl, fp_to_fp, create_dot
    builder.get_bf16 = lambda self, value: handle(narrow(np.array([value], np.float32)), tl.bfloat16)
    interp.ReduceOps.apply_impl = apply_impl


def install() -> None:
    """Make the interpreter of this process strict; nothing where kernels are compiled. Twice is as good as once."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    if triton.__version__ != VERSION:
        raise RuntimeError(f"tests/interpreter.py is written for triton {VERSION}, got {triton.__version__}")
    import triton.runtime.interpreter as interp

    if interp.GridExecutor.__call__ is _run_grid:
        return
    convert, call = interp._implicit_cvt, interp.InterpretedFunction.__call__

    def implicit_cvt(arg):
        if not isinstance(arg, Tensor):
            return convert(arg)
        ty = tl.str_to_ty(triton.runtime.jit.mangle_type(arg), None)
        return tl.tensor(interp.TensorHandle(np.array([_launch.pointer(arg)], np.uint64), ty), ty)

    def call_helper(self, *args, **kwargs):
        if _launch is None:
            return call(self, *args, **kwargs)
        _launch.patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interp._implicit_cvt = implicit_cvt
    interp.InterpretedFunction.__call__ = call_helper
    interp.GridExecutor.__call__ = _run_grid
    interp.interpreter_builder.options = interp.InterpreterOptions(debug=True)
    # Kernels see this module's names as globals, ``tl.range`` among its functions: one name reaches both.
    interp.range = shortened
    _patch_memory(interp.InterpreterBuilder, interp.TensorHandle, interp)
    _patch_floats(interp.InterpreterBuilder, interp.TensorHandle, interp)
