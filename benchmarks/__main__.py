"""Time operators against what a PyTorch user writes. ``python -m benchmarks [op ...]``

Results and gradients of all providers are compared before anything is timed; then their calls take turns. A ratio
above 1 means that fmcore was faster. What is printed in a line, --out appends as a record to a JSON-lines file.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import ROWS, Row, Shape, differentiated
from benchmarks.timing import append, environment, interleaved, ratio_interval
from fmcore.device import pick_device, pick_dtype

# Largest deviation from the baseline, relative in norm: some roundings, and sums in another order.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}

Provider = Callable[..., Any]


def _outputs(fn: Provider, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = fn(*args)
    return out if isinstance(out, tuple) else (out,)


def _incoming(outs: Sequence[Tensor]) -> list[Tensor]:
    """Random gradients of the outputs, the same each time."""
    made = torch.Generator(outs[0].device).manual_seed(1)
    return [torch.randn(y.shape, generator=made, dtype=y.dtype, device=y.device) for y in outs]


def _gradients(args: Sequence[Tensor], outs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outs, differentiated(args), grads)


def _started(fn: Provider, params: Sequence[Tensor]) -> tuple[Callable[[], Any], list[Tensor]]:
    """A step over copies of the parameters, and the copies."""
    copies = [p.detach().clone().requires_grad_() for p in params]
    for new, old in zip(copies, params, strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return fn(*copies), copies


def results(row: Row, fn: Provider, args: Sequence[Tensor]) -> list[Tensor]:
    """Outputs and gradients; of an optimizer what two steps add to the parameters."""
    if row.stateful:
        step, params = _started(fn, args)
        step(), step()
        return [(p - before).detach() for p, before in zip(params, args, strict=True)]
    outs = _outputs(fn, args)
    grads = _gradients(args, outs, _incoming(outs)) if differentiated(args) else ()
    return [y.detach() for y in (*outs, *grads)]


def check(row: Row, providers: dict[str, Provider], args: Sequence[Tensor], dtype: torch.dtype) -> dict[str, float]:
    """How far each provider is from the first baseline; ``RuntimeError`` where that is more than rounding."""
    first = next(iter(row.baselines))
    want, found = results(row, providers[first], args), {}
    for name in providers:
        if name == first:
            continue
        pairs = list(zip(results(row, providers[name], args), want, strict=True))
        if row.random:
            pairs = [(got.norm(), expected.norm()) for got, expected in pairs]
        found[name] = max(((g.float() - w.float()).norm() / w.float().norm()).item() for g, w in pairs)
        if not found[name] <= (row.tolerance or TOLERANCE[dtype]):
            raise RuntimeError(
                f"{row.op}: {name} must agree with {first} before it is timed, but is {found[name]:.1e} off"
            )
    return found


def prepared(row: Row, which: str, fn: Provider, args: Sequence[Tensor]) -> Callable[[], Callable[[], Any]]:
    """For ``interleaved``: what prepares a call of the pass ``which``, untimed, and returns what is timed."""
    if row.stateful:
        step, _ = _started(fn, args)
        return lambda: step
    if which == "forward":
        return lambda: torch.no_grad()(lambda: fn(*args))
    grads = _incoming(_outputs(fn, args))
    if which == "step":
        return lambda: lambda: _gradients(args, _outputs(fn, args), grads)

    def forward() -> Callable[[], Any]:
        outs = _outputs(fn, args)
        return lambda: _gradients(args, outs, grads)

    return forward


def measure(
    row: Row, shape: Shape, dtype: torch.dtype, device: torch.device, repeats: int, warmup: int, compiled: bool = False
) -> Iterator[dict[str, Any]]:
    """A record for each pass of the row at one size."""
    torch.manual_seed(0)
    dtype = torch.float32 if row.stateful else dtype
    args = row.inputs(shape, dtype, device)
    providers: dict[str, Provider] = {"fmcore": row, **row.baselines}
    if compiled and not row.stateful:
        providers["compiled"] = torch.compile(next(iter(row.baselines.values())))
    deviation = check(row, providers, args, dtype)
    # A few tensors to count bytes with; of an optimizer the parameters.
    outs = args if row.stateful else _outputs(row, args)
    moved, flops = row.bytes(args, outs), row.work(shape)
    del outs
    for which in row.passes:
        calls = {name: prepared(row, which, fn, args) for name, fn in providers.items()}
        times = interleaved(calls, device, repeats, warmup)
        seconds = {name: statistics.median(each) for name, each in times.items()}
        amount, unit = (moved[which] / 1e9, "GB/s") if row.bound == "memory" else (flops[which] / 1e12, "TFLOP/s")
        yield {
            "benchmark": row.op,
            "pass": which,
            "shape": list(shape),
            "dtype": str(dtype)[6:],
            "bound": row.bound,
            "repeats": repeats,
            "ms": {name: each * 1e3 for name, each in seconds.items()},
            "unit": unit,
            "rate": {name: amount / each for name, each in seconds.items()},
            # baseline / fmcore: median of the paired ratios, and its 95 % interval
            "ratio": {name: ratio_interval(times["fmcore"], each) for name, each in times.items() if name != "fmcore"},
            "deviation": deviation,
            **environment(device),
        }


def line(record: dict[str, Any]) -> str:
    size, rate = "x".join(map(str, record["shape"])), record["rate"]["fmcore"]
    ratios = (f"{name} {m:.3f} [{low:.3f}, {high:.3f}]" for name, (m, low, high) in record["ratio"].items())
    time = f"{record['ms']['fmcore']:10.4f} ms {rate:9.4g} {record['unit']:7}"
    return f"{record['benchmark']:20} {record['pass']:8} {size:18} {record['dtype']:8} {time} {'  '.join(ratios)}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help="names in fmcore/ops.py; by default all")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda (the clock for cuda has not been run yet)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--tiny", action="store_true", help="one small size each: does it run, not how fast")
    parser.add_argument("--compile", action="store_true", help="the first baseline through torch.compile as well")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls of each provider")
    parser.add_argument("--warmup", type=int, default=10, help="calls of each that are not counted")
    parser.add_argument("--out", type=Path, help="append the records to this JSON-lines file")
    args = parser.parse_args(words)
    if unknown := [name for name in args.ops if name not in ROWS]:
        parser.error(f"op must be one of {', '.join(ROWS)}, got {unknown[0]}")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    for name in args.ops or ROWS:
        row = ROWS[name]
        for shape in (row.tiny,) if args.tiny else row.sizes:
            for record in measure(row, shape, dtype, device, args.repeats, args.warmup, args.compile):
                print(line(record), flush=True)
                if args.out:
                    append(args.out, record)


if __name__ == "__main__":
    main()
