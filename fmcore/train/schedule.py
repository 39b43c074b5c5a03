"""Learning-rate schedules as pure functions of the step.

    warm-up   (s + 1) / (w + 1)                             s < w, so that no step is lost to a rate of zero
    constant  1
    cosine    m + (1 - m) * (1 + cos(pi * p)) / 2           p = (s - w) / (total - w)
    wsd       1 until total - d, then m + (1 - m) * (total - s) / d     d = decay_fraction * total steps, at least one

s is the 0-based index of the step about to be taken, w the warm-up steps, m the smallest ratio. Every schedule is 1 at
s = w and (except constant) m from s = total on. Sources: Loshchilov & Hutter 2016, arXiv:1608.03983 (cosine);
Hu et al. 2024, arXiv:2404.06395 (wsd: warm-up, stable, decay).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fmcore.errors import InputError

Kind = Literal["cosine", "wsd", "constant"]


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves over a run; ``scale`` gives the factor for a step."""

    kind: Kind = "cosine"
    warmup: int = 100  # steps
    min_ratio: float = 0.1  # last rate over peak rate
    decay_fraction: float = 0.2  # of all steps, wsd only

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"schedule: kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.warmup < 0:
            raise InputError(f"schedule: warmup must be 0 steps or more, got {self.warmup}")
        if not 0 <= self.min_ratio <= 1:
            raise InputError(f"schedule: min_ratio must be within 0 and 1, got {self.min_ratio}")
        if not 0 < self.decay_fraction <= 1:
            raise InputError(f"schedule: decay_fraction must be above 0 and at most 1, got {self.decay_fraction}")

    def check(self, total: int) -> None:
        """``InputError`` if warm-up and decay do not fit into ``total`` steps."""
        if total < 1:
            raise InputError(f"schedule: wanted at least 1 step, got {total}")
        decay = self.decay_steps(total) if self.kind == "wsd" else 0
        if self.warmup + decay > total or self.warmup == total:
            parts = f"{self.warmup} of warm-up" + (f" and {decay} of decay" if decay else "")
            raise InputError(f"schedule: {parts} do not fit into {total} steps; lower warmup or take more steps")

    def decay_steps(self, total: int) -> int:
        """Steps of the linear decay at the end of a wsd run."""
        return max(1, round(self.decay_fraction * total))

    def scale(self, step: int, total: int) -> float:
        """Factor on the peak learning rate for ``step`` (0-based) of ``total``: 0 to 1."""
        self.check(total)
        if step < 0:
            raise InputError(f"schedule: step must be 0 or more, got {step}")
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return 1.0
        if self.kind == "wsd":
            height = min(1.0, max(0, total - step) / self.decay_steps(total))
        else:
            height = (1 + math.cos(math.pi * min(1.0, (step - self.warmup) / (total - self.warmup)))) / 2
        return self.min_ratio + (1 - self.min_ratio) * height
