"""What a run leaves for people: the loss curve as a picture and one page of Markdown that shows it all."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fmcore.errors import InputError
from fmcore.files import write_text
from fmcore.train.metrics import read_metrics

# Okabe & Ito 2008: distinct for colour-blind readers, in this order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#333333", "#DDDDDD"


def bits_per_byte(nats: float, count: int) -> float:
    """Summed cross-entropy ``nats`` of a text over its ``count`` bytes: nats / (count * ln 2); any tokenizer."""
    if count < 1:
        raise InputError(f"bits per byte: wanted a text of at least 1 byte, got {count}")
    return nats / (count * math.log(2))


def plot_loss(metrics: Path | str, picture: Path | str, title: str = "Loss") -> Path:
    """Draw ``metrics.jsonl`` as a PNG: training loss above, held-out bits per byte below, one column a phase.

    Records with ``loss`` (nats per token) are training steps; records with ``bits_per_byte``, a number or numbers by
    name of the text, are evaluations. ``phase`` tells the columns apart. Raises ``InputError`` if there is nothing to
    draw or matplotlib is missing.
    """
    phases = _phases(read_metrics(metrics), metrics)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError("plot: wanted matplotlib, which is not installed; pip install matplotlib") from e
    texts = list(dict.fromkeys(name for _, evaluations in phases.values() for name in evaluations))
    rows = 2 if texts else 1
    spans = [max(s[-1] for s, _ in (train, *evals.values()) if s) for train, evals in phases.values()]
    # Widths follow the steps, but a short phase still has room for its title and ticks.
    widths = [max(span / max(spans), 0.45) for span in spans]
    figure = Figure(figsize=(3.2 + 5.2 * sum(widths), 2.9 * rows + 0.6), dpi=150, layout="constrained")
    # The canvas attaches itself: no pyplot, no global state, no display.
    FigureCanvasAgg(figure)
    # Every panel has its own scale: beside the fall of a fresh model, what adaptation does would be a flat line.
    axes = figure.subplots(rows, len(phases), sharex="col", squeeze=False, width_ratios=widths)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    for column, (phase, (train, evaluations)) in enumerate(phases.items()):
        _style(axes[0][column], phase if len(phases) > 1 else "", "training loss (nats per token)" * (column == 0))
        _draw_training(axes[0][column], *train)
        if texts:
            _style(axes[1][column], "", "held-out (bits per byte)" * (column == 0))
            _draw_heldout(axes[1][column], evaluations, texts)
        axes[-1][column].set_xlabel("optimizer step", color=INK)
    for row in axes:
        row[0].legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    try:
        figure.savefig(picture, format="png")
    except OSError as e:
        raise InputError(f"{picture}: cannot be written ({e.strerror})") from e
    return Path(picture)


Series = tuple[list[int], list[float]]


def _phases(records: Sequence[Mapping[str, Any]], source: Path | str) -> dict[str, tuple[Series, dict[str, Series]]]:
    """By phase: the training losses, and by text the bits per byte, each with its steps; only finite numbers count."""
    phases: dict[str, tuple[Series, dict[str, Series]]] = {}
    for record in records:
        train, evaluations = phases.setdefault(str(record.get("phase") or "training"), (([], []), {}))
        _add(train, record["step"], record.get("loss"))
        scores = record.get("bits_per_byte")
        scores = scores if isinstance(scores, Mapping) else {"held-out": scores}
        for name, score in scores.items():
            if _number(score) is not None:
                _add(evaluations.setdefault(name, ([], [])), record["step"], score)
    phases = {name: found for name, found in phases.items() if found[0][0] or found[1]}
    if not phases:
        raise InputError(f"{source}: wanted records with loss or bits_per_byte, found none to draw")
    return phases


def _add(series: Series, step: int, value: Any) -> None:
    if (number := _number(value)) is not None:
        series[0].append(step)
        series[1].append(number)


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """For each value the mean over the ``window`` values around it, which lags behind nothing."""
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    half = window // 2
    # The window opens with i, because the first losses fall too steeply for a one-sided mean.
    spans = ((max(0, i - half), min(len(values), i + min(half, i) + 1)) for i in range(len(values)))
    return [(sums[b] - sums[a]) / (b - a) for a, b in spans]


def _style(axis: Any, title: str, label: str) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#999999")
    axis.grid(True, axis="y", color=FAINT, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, length=3, labelsize=9)
    axis.margins(x=0.02)
    axis.locator_params(axis="x", integer=True, nbins=6)
    if title:
        axis.set_title(title, loc="left", fontsize=11, color=INK)
    if label:
        axis.set_ylabel(label, color=INK)


def _draw_training(axis: Any, steps: list[int], losses: list[float]) -> None:
    axis.plot(steps, losses, color=COLOURS[0], alpha=0.3, linewidth=0.8, label="each step")
    axis.plot(steps, _smooth(losses, max(5, len(losses) // 20)), color=COLOURS[0], linewidth=1.8, label="smoothed")


def _draw_heldout(axis: Any, evaluations: Mapping[str, Series], texts: Sequence[str]) -> None:
    """A line for each text, in its colour of all phases, with its last value written at its end."""
    ends = []
    for name, (steps, scores) in evaluations.items():
        colour = COLOURS[(texts.index(name) + 1) % len(COLOURS)]
        axis.plot(steps, scores, color=colour, linewidth=1.6, marker="o", markersize=4, label=name)
        ends.append((scores[-1], steps[-1], colour, name))
    low, high = axis.get_ylim()
    at = -math.inf
    for score, step, colour, name in sorted(ends):
        # Labels of ends that lie close together are pushed apart, upwards.
        at = max(score, at + 0.07 * (high - low))
        axis.annotate(
            f"{name} {score:.2f}",
            (step, at),
            (7, 0),
            textcoords="offset points",
            fontsize=9,
            color=colour,
            va="center",
            annotation_clip=False,
        )


def write_report(
    run: Path | str,
    *,
    title: str,
    facts: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]],
    samples: Mapping[str, str],
    scores_title: str = "Held-out bits per byte",
    picture: str = "loss.png",
) -> Path:
    """Compose ``run/report.md``.

    Args:
        facts: name -> value, a table in the given order (command, device, parameters, ...); str, int or float.
        scores: row -> column -> number; a column that a row lacks stays empty.
        samples: heading -> text as the model wrote it; shown between fences that the text cannot close.
        picture: file in ``run`` to show, left out if it is not there.
    """
    run = Path(run)
    parts = [f"# {_inline(title)}", _table(["", ""], [[name, _value(value)] for name, value in facts.items()])]
    if scores:
        columns = list(dict.fromkeys(column for row in scores.values() for column in row))
        rows = [[name, *(_value(row.get(column, "")) for column in columns)] for name, row in scores.items()]
        parts += [f"## {_inline(scores_title)}", _table(["", *columns], rows, numbers=True)]
    if (run / picture).is_file():
        parts += ["## Loss", f"![loss against optimizer step]({picture})"]
    if samples:
        parts.append("## Samples")
        for heading, text in samples.items():
            parts += [f"### {_inline(heading)}", _fenced(text)]
    files = [[name, size] for name, size in _files(run)]
    if files:
        parts += ["## Files", _table(["file", "size"], [[f"`{name}`", size] for name, size in files], numbers=True)]
    write_text(run / "report.md", "\n\n".join(parts) + "\n")
    return run / "report.md"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = False) -> str:
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    lines = [[_cell(name) for name in header], rule, *([_cell(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _value(value: Any) -> str:
    """A value as it stands in a table."""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _inline(text: str) -> str:
    """``text`` on one line, without control characters."""
    return " ".join(_visible(text).split())


def _cell(text: str) -> str:
    """``text`` as it may stand between the bars of a table."""
    return _inline(text).replace("|", "\\|")


def _visible(text: str) -> str:
    """Control characters as their escapes: a model of bytes may write a bell or a terminal sequence."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", lambda m: repr(m[0])[1:-1], text)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{_visible(text)}\n{fence}"


def _files(run: Path) -> list[tuple[str, str]]:
    """Files of the run and their sizes; a checkpoint counts as one, and report.md itself does not."""
    sizes: dict[str, int] = {}
    for path in sorted(run.rglob("*")):
        parts = path.relative_to(run).parts
        if path.is_file() and ".tmp-" not in str(path.relative_to(run)) and parts != ("report.md",):
            name = "/".join(parts[:2]) + "/" if parts[0] == "checkpoints" and len(parts) > 2 else "/".join(parts)
            sizes[name] = sizes.get(name, 0) + path.stat().st_size
    return [(name, _size(size)) for name, size in sizes.items()]


def _size(n: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} B"
