"""What a step costs and how fast it went: FLOPs, model FLOPs utilisation, memory, and the log that keeps them.

    matmul     2 N tokens             N = weights of all linear layers and the head; the embedding lookup is not one
    attention  4 H D pairs L          a pair is a query and a key that it sees: Q K^T and P V cost 2 D each

A training step costs three forwards; with a frozen base its matmuls cost two (no weight gradients), attention and the
adapter still three. Two figures, because published ones differ by up to 18 % on this alone:

    mfu        pairs counted exactly: causal, documents apart, inside the sliding window. What had to be computed.
    mfu_full   every token paired with all T of its row: 6 N + 12 L H D T per token (PaLM, arXiv:2204.02311, appendix B)

A GPU whose peak is not in the table gets neither.
"""

import contextlib
import errno
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fmcore.errors import InputError

if TYPE_CHECKING:
    from fmcore.models.decoder import Config

# Dense bf16 tensor-core FLOP/s with fp32 accumulation, by device name as torch reports it, without the vendor.
# Data sheets state most numbers with 2:4 sparsity: those are halved here.
PEAK_FLOPS: dict[str, float] = {
    "A100": 312e12,  # A100 data sheet, 2021, SXM and PCIe alike
    "A800": 312e12,  # A800: A100 with slower links
    "A30": 165e12,  # A30 data sheet, 2021
    "A10": 125e12,  # A10 data sheet, 2021
    "A40": 149.7e12,  # A40 data sheet, 2021
    "RTX A6000": 154.8e12,  # RTX A6000: 309.7 with sparsity, GA102 white paper
    "GeForce RTX 3090": 71e12,  # GA102 white paper, appendix A: fp16 with fp32 accumulate
    "GeForce RTX 3090 Ti": 80e12,  # GA102 at 1.86 GHz: 84 SMs x 512 FLOPs per clock
    "H100 80GB HBM3": 989.4e12,  # H100 data sheet, 2023: SXM, 1978.9 with sparsity
    "H100 PCIe": 756e12,  # H100 data sheet, 2022: PCIe, 1513 with sparsity
    "H100 NVL": 835e12,  # H100 data sheet, 2023: NVL, 1671 with sparsity
    "H800": 989.4e12,  # H800 SXM: H100 with slower links
    "H20": 148e12,  # H20 data sheet, 2023
    "H200": 989.4e12,  # H200 data sheet, 2024: SXM, 1978.9 with sparsity
    "H200 NVL": 835.5e12,  # H200 data sheet, 2024: NVL, 1671 with sparsity
    "GH200": 989.4e12,  # GH200 data sheet, 2023
    "B200": 2250e12,  # HGX B200 data sheet, 2024: 4.5 PFLOP/s with sparsity
    "GB200": 2500e12,  # GB200 NVL72 data sheet, 2024: 360 PFLOP/s for 72 with sparsity
    "L4": 121e12,  # L4 data sheet, 2023: 242 with sparsity
    "L40": 181e12,  # L40 data sheet, 2022: 362.1 with sparsity
    "L40S": 362e12,  # L40S data sheet, 2023: 362.05 as printed, without sparsity
    "GeForce RTX 4090": 165.2e12,  # Ada white paper, appendix A
    "RTX 6000 Ada Generation": 364.2e12,  # RTX 6000 Ada data sheet: 1457 fp8 with sparsity
    "GeForce RTX 5090": 209.5e12,  # Blackwell RTX white paper, appendix A
}
# What may follow a name in the table without changing the chip: memory, form factor. Not "Laptop GPU", "D", "MIG 1g".
_HARMLESS = re.compile(r"(?:[ -](?:\d+GB?|SXM\d*|PCIe|HBM\d\w*))*", re.IGNORECASE)


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by the name that ``torch.cuda.get_device_name`` gives; None if it is not known."""
    name = device.removeprefix("NVIDIA ")
    best = max((key for key in PEAK_FLOPS if name.startswith(key)), key=len, default=None)
    return PEAK_FLOPS[best] if best and _HARMLESS.fullmatch(name[len(best) :]) else None


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one step, a multiply and an add counted as two."""

    matmul: int
    attention: int  # visible pairs only
    attention_full: int  # every token with its whole row

    @property
    def exact(self) -> int:
        """What had to be computed: with visible pairs only."""
        return self.matmul + self.attention

    @property
    def full(self) -> int:
        """By the convention of PaLM: with every token and its whole row."""
        return self.matmul + self.attention_full


def matmul_weights(config: "Config") -> int:
    """N: weights that multiply every token. The head counts, tied or not; embeddings, biases and norms do not."""
    C, F, D, H, G = config.width, config.ffn, config.D, config.heads, config.G
    up = 2 * F if config.activation == "swiglu" else F
    return config.layers * ((H + 2 * G) * D * C + H * D * C + (up + F) * C) + config.vocab_size * C


def visible_pairs(lengths: Iterable[int], window: int | None = None) -> int:
    """Pairs (query, key) that causal attention computes over segments: sum over i of min(i + 1, window)."""
    total = 0
    for n in lengths:
        w = n if window is None else min(window, n)
        total += w * (w + 1) // 2 + (n - w) * w
    return total


def step_flops(
    config: "Config",
    rows: int,
    length: int,
    segments: Iterable[int] | None = None,
    *,
    trainable: Literal["all", "adapter"] | None = "all",
    adapter_weights: int = 0,
) -> Flops:
    """FLOPs of one step over ``rows`` sequences of ``length`` tokens. ``ValueError`` for segments that do not add up.

    Args:
        segments: lengths of the documents inside them, adding up to rows * length; None: one document per row.
        trainable: "all" 3 forwards; "adapter" a frozen base (2 forwards of its matmuls, by the usual convention that
            the input gradient reaches the first layer); None a forward pass only.
        adapter_weights: weights of the adapter's own matmuls, which count beside the base.
    """
    if trainable not in ("all", "adapter", None):
        raise ValueError(f"step_flops: trainable must be 'all', 'adapter' or None, got {trainable!r}")
    tokens = rows * length
    segments = [length] * rows if segments is None else list(segments)
    if sum(segments) != tokens:
        raise ValueError(f"step_flops: segments must add up to rows * length = {tokens}, got {sum(segments)}")
    passes = 3 if trainable else 1
    base = 2 if trainable == "adapter" else passes
    pair = 4 * config.heads * config.D * config.layers * passes
    return Flops(
        matmul=2 * tokens * (base * matmul_weights(config) + passes * adapter_weights),
        attention=pair * visible_pairs(segments, config.window),
        attention_full=pair * tokens * length,
    )


def peak_memory(device: torch.device | str = "cpu") -> float:
    """The most memory so far, in GiB: what torch allocated on a GPU, else what of this process was resident."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        # Not getrusage: its maximum outlives exec, so that a child reports the size of what started it.
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        import resource
        import sys

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Meter:
    """Speed over the last ``window`` steps. Call ``step`` once per optimizer step, after a value of it was read.

    The first ``skip`` steps (compilation, allocation, caches) are left out, as is what runs inside ``pause()``. Figures
    are absent as long as nothing was measured, ``mfu`` and ``mfu_full`` where ``peak`` (FLOP/s, all devices) is None.
    """

    def __init__(
        self,
        peak: float | None = None,
        device: torch.device | str = "cpu",
        window: int = 20,
        skip: int = 2,
        clock: Callable[[], float] = time.perf_counter,
    ):
        if window < 1 or skip < 0:
            raise ValueError(f"meter: window must be >= 1 and skip >= 0, got {window} and {skip}")
        self.peak, self.device, self.skip, self.clock = peak, device, skip, clock
        # (seconds, tokens, exact FLOPs, full FLOPs) of a step
        self.recent: deque[tuple[float, int, int, int]] = deque(maxlen=window)
        self.sums = [0.0, 0.0, 0.0, 0.0]
        self.last = clock()

    def step(self, tokens: int, flops: Flops) -> dict[str, float]:
        """Count a step of ``tokens``: tokens_per_s, tflops, mfu, mfu_full (fractions of 1) and memory_gib."""
        now = self.clock()
        took, self.last = now - self.last, now
        if self.skip > 0:
            self.skip -= 1
        else:
            entry = (took, tokens, flops.exact, flops.full)
            self.recent.append(entry)
            self.sums = [a + b for a, b in zip(self.sums, entry, strict=True)]
        return self._rates(*(sum(column) for column in zip(*self.recent, strict=True))) | self._memory()

    def summary(self) -> dict[str, float]:
        """The same figures over all counted steps, and their seconds."""
        return self._rates(*self.sums) | self._memory() | {"seconds": self.sums[0]}

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent inside (evaluation, sampling, saving) belongs to no step."""
        before = self.clock()
        try:
            yield
        finally:
            self.last += self.clock() - before

    def _rates(self, seconds: float = 0, tokens: float = 0, exact: float = 0, full: float = 0) -> dict[str, float]:
        if seconds <= 0:
            return {}
        rates = {"tokens_per_s": tokens / seconds, "tflops": exact / seconds / 1e12}
        if self.peak:
            rates |= {"mfu": exact / seconds / self.peak, "mfu_full": full / seconds / self.peak}
        return rates

    def _memory(self) -> dict[str, float]:
        return {"memory_gib": peak_memory(self.device)}


class MetricsLog:
    """``metrics.jsonl``: one JSON object a line, on disk as soon as it is written.

    Every record has an int ``step`` and, if the run has several, a ``phase``. Opening drops a line torn by a crash;
    with ``resume=(phase, step)`` also everything behind the last record of that phase up to that step, so that the file
    tells one history and holds each step once.
    """

    def __init__(self, path: Path | str, resume: tuple[str | None, int] | None = None):
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = self._keep(resume) if self.path.exists() else 0
            self.file = self.path.open("ab", buffering=0)
            self.file.truncate(kept)
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from e

    def _keep(self, resume: tuple[str | None, int] | None) -> int:
        """Bytes of the file that stay."""
        kept = own = 0
        for end, record in _lines(self.path):
            if resume and record.get("phase") == resume[0]:
                if record["step"] > resume[1]:
                    break
                own = end
            kept = end
        # Behind the last record of the phase that goes on stand phases that came out of it, and will again.
        return own or kept

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. A float that JSON cannot hold becomes "nan", "inf" or "-inf": ``float()`` reads it back."""
        if type(record.get("step")) is not int:
            raise ValueError(f"metrics: step must be an int, got {record.get('step')!r}")
        line = json.dumps(_plain(record), allow_nan=False).encode() + b"\n"
        start = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            with contextlib.suppress(OSError):
                self.file.truncate(start)
            raise InputError(f"{self.path}: cannot be written ({e.strerror}); what it held is untouched") from e

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """All records of a ``metrics.jsonl``; a torn last line is left out. ``InputError`` if another line is damaged."""
    try:
        return [record for _, record in _lines(Path(path))]
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(end offset, record) for every whole line."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            end += len(line)
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or type(record.get("step")) is not int:
                    raise ValueError("no object with an int step")
            except (ValueError, RecursionError) as e:
                # A crash tears only the last line: anything else was not written by this class.
                if not file.read(1):
                    return
                raise InputError(f"{path}: line {number}: wanted a JSON object with a step; move the file away") from e
            if not line.endswith(b"\n"):
                return
            yield end, record


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
