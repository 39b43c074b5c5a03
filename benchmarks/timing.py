"""What every benchmark shares: a fair clock, statistics of paired times, and where a record came from."""

import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import triton


def interleaved(
    calls: Mapping[str, Callable[[], Callable[[], Any]]], device: torch.device, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Seconds of each provider, call by call in turns and in alternating order, so that a noisy machine hits all alike.

    A provider prepares a call, untimed, and returns what is timed.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    times: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}
    for i in range(warmup + repeats):
        for name in sorted(calls, reverse=bool(i % 2)):
            times[name].append(clock(calls[name]()))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: [read() for read in each[warmup:]] for name, each in times.items()}


def _cpu_clock(call: Callable[[], Any]) -> Callable[[], float]:
    began = time.perf_counter()
    call()
    took = time.perf_counter() - began
    return lambda: took


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], Any]], Callable[[], float]]:
    """By events, which are read when all is over. Not run yet: no GPU has been at hand."""
    # Twice the L2 cache, so that nothing of the last call is left in it. The write also takes longer than the host
    # needs to launch the call, whose launch is then not part of the time.
    flush = torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)

    def clock(call: Callable[[], Any]) -> Callable[[], float]:
        flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        call()
        ended.record()
        return lambda: began.elapsed_time(ended) / 1e3

    return clock


def ratio_interval(a: list[float], b: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of the paired ratios b / a and a 95 % bootstrap interval of it."""
    ratios = [y / x for x, y in zip(a, b, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def _git(*words: str) -> str | None:
    """What git says of this checkout; ``None`` where there is no git or no checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """What a record must say of where it was measured; ``dirty``: files differ from the commit (None: unknown)."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": None if changed is None else bool(changed),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "fmcore_body": os.environ.get("FMCORE_BODY", ""),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """One more line of a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
