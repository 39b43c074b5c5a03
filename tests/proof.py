"""How a row of tests/rows/ is run and judged; shared by the tests of operators, of memory and of the harness."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from cases import Case
from torch import Tensor

from fmcore.op import Op, use

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device(body: str) -> str:
    """Where ``body`` is tested: the GPU if there is one, unless it is a body for the CPU."""
    return "cpu" if body == "cpu" else DEVICE


def arguments(case: Case, shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor | None]:
    """The row's arguments on ``device``: those to differentiate in ``dtype``, constants in their own."""
    with torch.device(device):
        made = case.inputs(*shape)
    return [a if a is None or i in case.constants else a.to(dtype) for i, a in enumerate(made)]


def differentiated(case: Case, args: Sequence[Tensor | None]) -> list[int]:
    return [i for i, a in enumerate(args) if a is not None and i not in (*case.constants, *case.frozen)]


def outputs(fn: Callable, args: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    out = fn(*args)
    return out if isinstance(out, tuple) else (out,)


def incoming(case: Case, args: Sequence[Tensor | None]) -> list[Tensor]:
    """One random gradient for each output. Random, because a gradient of ones hides a lost term."""
    with torch.no_grad():
        return [torch.randn(y.shape, dtype=torch.float64).to(y) for y in outputs(case.ref, args)]


def run(case: Case, fn: Callable, args: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of ``fn``, then the gradient of each differentiated argument unless the row is forward only."""
    wanted = [] if case.forward_only else differentiated(case, args)
    # detach keeps strides, so that a view is tested as the view it is.
    args = [a.detach().requires_grad_(i in wanted) if isinstance(a, Tensor) else a for i, a in enumerate(args)]
    ys = outputs(fn, args)
    if case.forward_only:
        return list(ys)
    return [*(y.detach() for y in ys), *torch.autograd.grad(ys, [args[i] for i in wanted], grads)]


def truth(case: Case, args: Sequence[Tensor | None], grads: Sequence[Tensor]) -> list[Tensor]:
    args = [a if a is None or i in case.constants else a.double() for i, a in enumerate(args)]
    return run(case, case.ref, args, [g.double() for g in grads])


Trial = tuple[list[Tensor | None], list[Tensor]]


def trials(case: Case, shape: Sequence[int], dtype: torch.dtype, body: str = "triton") -> list[Trial]:
    """Random arguments and incoming gradients.

    Several times over for small shapes: the error of eager PyTorch in one or two elements is a matter of luck and may
    be zero, so it says nothing about what an operator may err.
    """
    drawn = []
    elements = 0
    while not drawn or (0 < elements < 256 and len(drawn) < 16):
        args = arguments(case, shape, dtype, device(body))
        drawn.append((args, incoming(case, args)))
        elements += min(args[i].numel() for i in differentiated(case, args))
    return drawn


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance from ``value`` to the next number of ``dtype``."""
    info = torch.finfo(dtype)
    return info.eps * value.clamp(min=info.smallest_normal)


def judge(case: Case, results: Sequence[Sequence[Tensor]], drawn: Sequence[Trial]) -> None:
    """Against fp64 truth, an operator may err twice as much as eager PyTorch, plus one ulp of the largest value.

    In 16 bits the rounding of the result hides a second rounding before it from that bound, but not from the root mean
    square of the error, which it raises by up to 1.4; that may exceed eager's by a tenth.
    """
    exact = [truth(case, *trial) for trial in drawn]
    eager = [run(case, case.ref, *trial) for trial in drawn]
    for i in range(len(exact[0])):
        got, e, t = ([result[i] for result in each] for each in (results, eager, exact))
        for g, r in zip(got, e, strict=True):
            came, wanted = (g.dtype, g.shape), (r.dtype, r.shape)
            assert came == wanted, f"result {i}: {came}, not {wanted}"
        g, e, t = (torch.stack([x.double() for x in xs]) for xs in (got, e, t))
        if g.numel() == 0:
            continue
        nans = int(g.isnan().sum())
        assert not nans, f"result {i}: {nans} elements are NaN, written as such or never written"
        limit = 2 * (e - t).abs().max() + ulp(t.abs().max(), got[0].dtype)
        error = (g - t).abs().max()
        assert error <= limit, f"result {i}: error {error.item():.3g} exceeds {limit.item():.3g}"
        if got[0].itemsize == 2 and g.numel() >= 256:
            rms, most = ((x - t).square().mean().sqrt() for x in (g, e))
            most = 1.1 * most + ulp(t.abs().max(), got[0].dtype) / 1000
            assert rms <= most, f"result {i}: error {rms.item():.3g} (root mean square) exceeds {most.item():.3g}"


def check(case: Case, fn: Callable, drawn: Sequence[Trial]) -> None:
    """Run and judge ``fn``, with NaN in every output before it starts; it must leave its inputs alone."""
    results = []
    for args, grads in drawn:
        given = [t for t in (*args, *grads) if t is not None]
        before = [t.clone() for t in given]
        with poisoned():
            results.append(run(case, fn, args, grads))
        for t, b in zip(given, before, strict=True):
            assert torch.equal(t, b), "an input or an incoming gradient was changed"
    judge(case, results, drawn)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block ``torch.empty`` and its kin return NaN, so that an element never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def direct() -> Iterator[None]:
    """Inside the block operators call their bodies without the dispatcher, which has no body for ``meta`` tensors.

    So the whole host code of an operator runs, forward and backward, on tensors that have a shape and no memory.
    """
    through_dispatcher = Op.__call__
    Op.__call__ = Op._run
    try:
        yield
    finally:
        Op.__call__ = through_dispatcher


def run_phantom(case: Case) -> None:
    """Forward and backward of the Triton bodies on the row's ``phantom`` shape, in tensors without memory."""
    with use("triton"), direct():
        args = arguments(case, case.phantom, torch.bfloat16, "meta")
        assert max(a.numel() for a in args if a is not None) >= 2**33
        run(case, case.op, args, [torch.empty_like(y) for y in outputs(case.op, args)])


@contextmanager
def calls() -> Iterator[list[tuple[Op, tuple]]]:
    """The calls of dispatcher operators inside the block, with detached arguments."""
    log: list[tuple[Op, tuple]] = []
    through_dispatcher = Op.__call__

    def logged(self: Op, *args):
        log.append((self, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return through_dispatcher(self, *args)

    Op.__call__ = logged
    try:
        yield log
    finally:
        Op.__call__ = through_dispatcher


def padded_rows(t: Tensor, more: int = 0) -> Tensor:
    """The same values as a view into wider rows that do not start at the first element; ``more`` widens them."""
    if t.ndim == 0:
        return t
    filler = float("nan") if t.is_floating_point() else 0
    wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5 + more), filler)
    return wide[..., 3 : 3 + t.shape[-1]].copy_(t)


def transposed(t: Tensor) -> Tensor:
    """The same values with the last dimension strided."""
    if t.ndim < 2:
        wide = t.new_empty(2 * t.numel())
        return wide[::2].copy_(t) if t.ndim else t
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)
