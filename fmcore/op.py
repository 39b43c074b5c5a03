"""One operator, many bodies: a thin layer over ``torch.library``.

The dispatcher sees one opaque ``fmcore::name`` for each direction of an operator, so ``torch.compile``, FakeTensor,
activation checkpointing, FLOP counters and the profiler see it too. Which body runs is decided inside, when it runs.
``FMCORE_BODY=rms_norm_fwd=triton,*=eager`` or ``with use("triton")`` names a body; otherwise the last one whose
``accepts`` says yes is taken. A CPU tensor takes the plain PyTorch path unless the operator has a body named ``cpu``.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fmcore.errors import InputError

OPS: dict[str, "Op"] = {}

_lib = torch.library.Library("fmcore", "DEF")


def _from_env(text: str) -> dict[str, str]:
    """What ``FMCORE_BODY`` says, as operator -> body."""
    pairs = [[word.strip() for word in pair.split("=")] for pair in text.split(",") if pair.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"FMCORE_BODY must read op=body,op=body (op may be *), got {text!r}")
    return dict(pairs)


# Operator name (or "*" for all) -> body. A plain global: backward runs on autograd's own thread and must see it.
_forced: dict[str, str] = _from_env(os.environ.get("FMCORE_BODY", ""))


class Op:
    """A dispatcher operator: its schema, what it returns (``fake``), and its bodies, the best one last."""

    def __init__(self, schema: str, fake: Callable[..., Any]):
        self.name = schema.partition("(")[0]
        # The file of kernels/ that defines it.
        self.module = fake.__module__
        self.bodies: dict[str, tuple[Callable[..., Any], Callable[..., bool]]] = {}
        _lib.define(schema)
        _lib.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fmcore::{self.name}", fake, lib=_lib)
        self._overload = getattr(torch.ops.fmcore, self.name).default
        OPS[self.name] = self

    def body(self, name: str, accepts: Callable[..., bool] = lambda *args: True) -> Callable:
        """Decorator: the function is a body of this operator, for all arguments that ``accepts(*args)`` says yes to."""

        def register(fn: Callable) -> Callable:
            self.bodies[name] = (fn, accepts)
            return fn

        return register

    def eager(self, *args: Any) -> bool:
        """Whether the caller should take its plain PyTorch path.

        It should when that was asked for by name, and for a first argument that is not on a GPU when the operator has
        no body for a CPU that accepts ``args``. Of a first argument that is a list of tensors the first one counts.
        """
        forced = self._choice()
        if forced is not None or _first(args).is_cuda:
            return forced == "eager"
        return "cpu" not in self.bodies or not self.bodies["cpu"][1](*args)

    @property
    def _stem(self) -> str:
        """The name without its direction: what is asked for rms_norm is asked for its forward and its backward."""
        return self.name.removesuffix("_fwd").removesuffix("_bwd")

    def _choice(self) -> str | None:
        """The body that was asked for, by the operator's name or for all; ``None`` when none was."""
        named = _forced.get(self.name) or _forced.get(self._stem)
        if named and named != "eager" and named not in self.bodies:
            raise ValueError(f"fmcore::{self.name} has no body {named!r}, only {['eager', *self.bodies]}")
        everywhere = _forced.get("*")
        return named or (everywhere if everywhere == "eager" or everywhere in self.bodies else None)

    def _run(self, *args: Any) -> Any:
        """What the dispatcher calls: choose a body and run it."""
        x = _first(args)
        if isinstance(x, torch.Tensor) and x.is_cuda and x.device.index != torch.cuda.current_device():
            # Triton launches on the current device, wherever the tensors are.
            with torch.cuda.device(x.device):
                return self._run_here(*args)
        return self._run_here(*args)

    def _run_here(self, *args: Any) -> Any:
        if (forced := self._choice()) in self.bodies:
            return self.bodies[forced][0](*args)
        for fn, accepts in reversed(self.bodies.values()):
            if accepts(*args):
                return fn(*args)
        got = ", ".join(map(_told, args))
        raise NotImplementedError(f"fmcore::{self.name}: none of {list(self.bodies)} takes ({got})")

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)


def _first(args: tuple[Any, ...]) -> Any:
    """The first argument, or what stands first in it where it is a list."""
    x = args[0]
    return x[0] if isinstance(x, (list, tuple)) and x else x


def _told(value: Any) -> str:
    """An argument for a message: of tensors what they are, never what they hold."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{tuple(value.shape)}"
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
        return f"{len(value)} tensors, the first {_told(value[0])}"
    return repr(value)


def check_environment() -> None:
    """``InputError`` when ``FMCORE_BODY`` names an operator or a body that there is not; call it when all are there."""
    bodies = {"eager"}.union(*(op.bodies for op in OPS.values()))
    for name, body in _from_env(os.environ.get("FMCORE_BODY", "")).items():
        ops = [op for op in OPS.values() if name in ("*", op.name, op._stem)]
        if not ops:
            raise InputError(f"FMCORE_BODY: no operator {name!r}, only *, {', '.join(sorted(OPS))}")
        known = bodies if name == "*" else {"eager"}.union(*(op.bodies for op in ops))
        if body not in known:
            raise InputError(f"FMCORE_BODY: {name} has no body {body!r}, only {', '.join(sorted(known))}")


@contextmanager
def use(body: str, op: str = "*") -> Iterator[None]:
    """Inside the block ``op`` (``"*"``: every operator that has it) runs ``body``.

    With it tests and benchmarks name what they measure.
    """
    before = _forced.copy()
    _forced[op] = body
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def behind(fn: Callable) -> list[Op]:
    """The operators that a public function of kernels/ stands for.

    Those of its file: the ones that bear its name if there are any, else all. Where its file defines none, those of the
    files of kernels/ that it takes something from.
    """
    own = [op for op in OPS.values() if op.module == fn.__module__]
    if own:
        stem = fn.__name__.rstrip("_")
        return [op for op in own if op.name == stem or op.name.startswith(f"{stem}_")] or own
    used = vars(sys.modules[fn.__module__]).values()
    # An operator names its file itself; functions and classes know theirs; a module is one.
    files = {x.module if isinstance(x, Op) else getattr(x, "__module__", getattr(x, "__name__", "")) for x in used}
    return [op for op in OPS.values() if op.module in files]
