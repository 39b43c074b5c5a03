"""What a person sees while training: a bar on a terminal, a line now and then elsewhere, curves in TensorBoard.

A record is what the training loop writes for a step into ``metrics.jsonl``.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fmcore.errors import InputError

PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal


class _Steps(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed)}/{int(task.total or 0)}")


class Bar:
    """A progress bar over the steps of one phase; a context manager.

    ``update(step, note)`` shows how many steps are done and a short note; ``say(text)`` prints above the bar.
    """

    def __init__(self, title: str, total: int, done: int = 0, console: Console | None = None):
        self.title, self.total, self.done = title, total, done
        self.console = console or Console()
        self.note, self.last, self.began = "", time.monotonic(), time.monotonic()
        self.first = done
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                _Steps(),
                TextColumn("{task.fields[note]}"),
                TextColumn("eta"),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self.task = self.bar.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "Bar":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, step: int, note: str) -> None:
        self.done, self.note = step, note
        if self.bar:
            self.bar.update(self.task, completed=step, note=note)
        elif step == self.total or time.monotonic() - self.last >= PLAIN_EVERY:
            self.last = time.monotonic()
            left = (self.total - step) * (self.last - self.began) / max(1, step - self.first)
            self.console.print(
                f"{self.title}  {step}/{self.total}  {note}  eta {left:.0f} s", markup=False, highlight=False
            )

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def headline(record: Mapping[str, Any]) -> str:
    """The figures of a record that stand beside the bar."""
    parts = [f"loss {record['loss']:.3f}"]
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    parts += [f"{name} {bits:.3f} bits/byte" for name, bits in record.get("bits_per_byte", {}).items()]
    return "  ".join(parts)


def tensorboard(run: Path) -> Any:
    """A writer of TensorBoard event files in ``run``. ``InputError`` when the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise InputError("train: --tensorboard needs the package tensorboard: pip install 'fmcore[tensorboard]'") from e
    return SummaryWriter(str(run / "tensorboard"))


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every curve that a record has a point of; the name of an inner one is ``outer/inner``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        elif name not in ("phase", "step"):
            yield name, value
