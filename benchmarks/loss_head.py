"""The loss head against eager PyTorch on a CPU: memory and time of one step. ``python -m benchmarks.loss_head``

Each measurement is a process of its own, which makes the inputs, reads its resident memory, and watches the peak of it
while it runs forward and backward; the two sides take turns, so that a noisy machine hits both alike. What counts is
the peak beyond the inputs and beyond the gradients, which both sides must return. Loss and gradient norms of both must
agree. Times are those of the wall and of the processor. The last line printed is the record as JSON; --out appends it
to a file.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import append, environment, ratio_interval

SIDES = ("fmcore", "eager")


class Peak:
    """The largest resident memory of this process while the block runs, in bytes beyond that at its start."""

    def __enter__(self) -> "Peak":
        # Writing 5 there makes the kernel count the peak from now on.
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self._status("VmHWM") - self.before

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(side: str, tokens: int, width: int, vocab: int, threads: int) -> dict[str, float]:
    """One forward and backward of ``side`` in this process."""
    from fmcore import ops

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    h = torch.randn(tokens, width, requires_grad=True)
    w = torch.empty(vocab, width).normal_(std=0.02).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    # Threads and libraries are there before memory is counted.
    for _ in range(2):
        small = F.cross_entropy(h[:8] @ w[:64].T, targets[:8] % 64)
        torch.autograd.grad(small, h)
        torch.autograd.grad(ops.linear_cross_entropy(h[:8], w[:64], targets[:8] % 64), h)
    with Peak() as peak:
        began, worked = time.perf_counter(), time.process_time()
        loss = ops.linear_cross_entropy(h, w, targets) if side == "fmcore" else F.cross_entropy(F.linear(h, w), targets)
        loss.backward()
        wall, cpu = time.perf_counter() - began, time.process_time() - worked
    gradients = h.grad.nbytes + w.grad.nbytes
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "bytes": peak.bytes - gradients,
        "loss": loss.item(),
        "dh": h.grad.norm().item(),
        "dw": w.grad.norm().item(),
    }


def in_a_process(side: str, sizes: list[int]) -> dict[str, float]:
    """What ``measure`` finds for ``side`` and (tokens, width, vocabulary, threads) in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.loss_head", "--side", side, "--sizes", *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return json.loads(done.stdout.splitlines()[-1])


def compare(sizes: list[int], repeats: int) -> dict[str, object]:
    """Both sides ``repeats`` times in turn; ``RuntimeError`` if their results differ by more than rounding."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for i in range(repeats):
        for side in sorted(SIDES, reverse=bool(i % 2)):
            found[side].append(in_a_process(side, sizes))
    ours, eager = (found[side][0] for side in SIDES)
    worst = max(abs(1 - ours[k] / eager[k]) for k in ("loss", "dh", "dw"))
    if worst > 1e-4:
        raise RuntimeError(f"both sides must give the same, but differ by {worst:.1e}")
    middle = {
        side: {k: statistics.median(run[k] for run in runs) for k in ("wall_s", "cpu_s", "bytes")}
        for side, runs in found.items()
    }
    record: dict[str, object] = {
        "benchmark": "loss_head",
        **environment(torch.device("cpu")),
        "dtype": "float32",
        **dict(zip(("tokens", "width", "vocab_size", "threads"), sizes, strict=True)),
        "repeats": repeats,
        **{side: {k: round(v, 3) for k, v in values.items()} for side, values in middle.items()},
        "memory_ratio": round(middle["eager"]["bytes"] / middle["fmcore"]["bytes"], 2),
        "deviation": worst,
    }
    for clock in ("wall", "cpu"):
        times = ([run[f"{clock}_s"] for run in found[side]] for side in SIDES)
        median, low, high = ratio_interval(*times)
        record |= {f"speedup_{clock}": round(median, 3), f"speedup_{clock}_95": [round(low, 3), round(high, 3)]}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_head", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs=4, default=[2048, 512, 128256, torch.get_num_threads()],
                        metavar=("TOKENS", "WIDTH", "VOCAB", "THREADS"))  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    parser.add_argument("--side", choices=SIDES, help="measure this side alone, in this process")
    parser.add_argument("--out", type=Path, help="append the record to this JSON-lines file")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, *args.sizes)))
        return
    record = compare(args.sizes, args.repeats)
    for side in SIDES:
        found = record[side]
        print(f"{side:8s} {found['bytes'] / 2**20:8.0f} MiB beyond inputs and gradients, {found['wall_s']:6.2f} s")
    print(f"eager / fmcore: {record['memory_ratio']} in memory, {record['speedup_wall']} in time")
    print(json.dumps(record))
    if args.out:
        append(args.out, record)


if __name__ == "__main__":
    main()
