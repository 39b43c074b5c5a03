"""The training loop: pre-training, full fine-tuning and adapters alike, one file from top to bottom.

A step draws ``accumulate`` batches, sums their losses over tokens, divides by the number of targets in all of them (so
that accumulation changes nothing but memory), clips, and steps. State that a later step depends on (weights, moments,
position in the data, random generators) is in the checkpoint, so that a resumed run repeats the uninterrupted one.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fmcore.data.packing import Batch, Loader
from fmcore.data.tokenizer import Tokenizer
from fmcore.errors import InputError
from fmcore.evaluate import evaluate
from fmcore.models.decoder import Decoder
from fmcore.optim import AdamW, decay_groups
from fmcore.train.checkpoint import Checkpoint, rng_state, save_checkpoint, set_rng_state
from fmcore.train.metrics import Meter, MetricsLog, peak_flops, step_flops
from fmcore.train.progress import Bar
from fmcore.train.schedule import Kind, Schedule


@dataclass(frozen=True)
class TrainOptions:
    """How to train. The defaults suit a small model from scratch."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences in one forward pass
    seq_len: int = 256  # tokens in a sequence
    accumulate: int = 1  # forward passes in one step
    lr: float = 3e-3  # peak learning rate
    schedule: Kind = "cosine"
    warmup: int | None = None  # steps; by default a twentieth of all
    min_ratio: float = 0.05  # last learning rate over the peak
    decay_fraction: float = 0.2  # of the steps, wsd only
    weight_decay: float = 0.1  # of matrices
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 200  # steps; 0: only after the last
    sample_every: int = 0  # steps; 0: never
    save_every: int = 500  # steps; 0: only after the last
    keep: int = 2  # checkpoints
    seed: int = 0
    device: str = "auto"  # auto: cuda if there is a GPU, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and activations; auto: bfloat16 on a GPU
    tensorboard: bool = False  # also write event files into the run folder

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "seq_len", "accumulate", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"train: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "sample_every", "save_every", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"train: {name} must be 0 or more, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InputError(f"train: {name} must be above 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"train: {name} must be within [0, 1), got {getattr(self, name)}")
        self.plan.check(self.steps)

    @property
    def plan(self) -> Schedule:
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        return Schedule(self.schedule, warmup, self.min_ratio, self.decay_fraction)


@dataclass(frozen=True)
class Outcome:
    """What a call of ``train`` did."""

    steps: int  # done, those before a resume included
    tokens: int  # trained on, likewise
    loss: float  # of the last step, nats per token
    speed: dict[str, float]  # means over the steps of this call: tokens_per_s, tflops, mfu, memory_gib, seconds
    checkpoint: Path | None


class Interrupted(Exception):
    """Somebody asked to stop; everything is saved. ``code`` is the exit code that the signal stands for."""

    def __init__(self, run: Path, step: int, signum: int):
        super().__init__(f"stopped after step {step}, saved in {run}")
        self.run, self.step, self.code = run, step, 128 + signum


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. ``InputError`` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"train: device must be one of this machine's, got {name!r} ({str(e).splitlines()[0]})") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one of them ends the process as usual."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, frame: Any) -> None:
        caught.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    for s in before:
        signal.signal(s, note)
    try:
        yield caught
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def trained_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of this model has to hold: everything, or only what trains when the base is frozen."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def restore(model: torch.nn.Module, optimizer: AdamW, loader: Loader, checkpoint: Checkpoint) -> None:
    """Put everything back to where ``checkpoint`` was written. ``InputError`` if it belongs to another run."""
    wanted = trained_tensors(model)
    if odd := wanted.keys() ^ checkpoint.model.keys():
        raise InputError(f"{checkpoint.path}: tensors must be those of this model, but differ in {sorted(odd)[0]}")
    with torch.no_grad():
        for name, t in wanted.items():
            if t.shape != checkpoint.model[name].shape:
                got = tuple(checkpoint.model[name].shape)
                raise InputError(f"{checkpoint.path}: {name} must be {tuple(t.shape)}, got {got}")
            t.copy_(checkpoint.model[name])
    optimizer.load_tensors(dict(model.named_parameters()), checkpoint.optimizer)
    loader.load_state_dict(checkpoint.state["loader"])
    set_rng_state(checkpoint.optimizer)


def train(
    model: Decoder,
    loader: Loader,
    options: TrainOptions,
    run: Path,
    *,
    phase: str = "pretrain",
    held_out: Mapping[str, Sequence[Batch]] | None = None,
    token_bytes: Tensor | None = None,
    tokenizer: Tokenizer | None = None,
    sample: Callable[[], str] | None = None,
    resume: Checkpoint | None = None,
    state: dict[str, Any] | None = None,
    save: bool = True,
    stop_after: int | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train ``model`` in place; write ``metrics.jsonl`` and checkpoints into ``run``.

    Args:
        phase: name of this part of the run in its metrics.
        held_out: batches by name of their text, evaluated every ``eval_every`` steps and at the end.
        token_bytes: (V,) bytes of text behind each token id, needed with ``held_out``.
        tokenizer: saved beside the weights.
        sample: gives text to show every ``sample_every`` steps.
        resume: continue from here; ``options`` must then be those it was written with, steps excepted.
        state: more JSON to keep in the checkpoint (where the data came from, say).
        save: write checkpoints.
        stop_after: leave after this many steps as if that had been the end of the schedule's first part (for tests and
            for runs that are split on purpose).
        quiet: show and log nothing.

    Raises ``Interrupted`` after SIGINT or SIGTERM, with everything saved; ``InputError`` if the loss is not finite.
    """
    device = next(model.parameters()).device
    options = replace(options, device=str(device))
    optimizer = AdamW(decay_groups(model, options.weight_decay), lr=options.lr, betas=(options.beta1, options.beta2))
    frozen = any(not p.requires_grad for p in model.parameters())
    extra = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2) if frozen else 0
    step, tokens, loss, last_saved = 0, 0, math.nan, None
    latest: tuple[Tensor, Tensor] | None = None
    if resume is not None:
        restore(model, optimizer, loader, resume)
        step, tokens = resume.step, int(resume.state["tokens"])
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    meter = Meter(peak=peak, device=device)
    steps = options.steps if stop_after is None else min(options.steps, step + stop_after)
    # A GPU is asked for its numbers every tenth step only: asking means waiting for it.
    log_every = 1 if device.type == "cpu" else 10
    board = _tensorboard(run) if options.tensorboard else None

    def write_checkpoint() -> Path:
        if latest is not None:
            _finite(latest[0].item(), step, phase)
            # The loss was taken before the step: a bad gradient has spoiled the weights that would be saved.
            _finite(latest[1].item(), step, phase, "grad_norm")
        about = {
            "phase": phase,
            "tokens": tokens,
            "loader": loader.state_dict(),
            "options": asdict(options),
            **(state or {}),
        }
        return save_checkpoint(
            run,
            step,
            model=trained_tensors(model),
            state=about,
            config=asdict(model.config),
            optimizer={**optimizer.tensors(dict(model.named_parameters())), **rng_state()},
            tokenizer=tokenizer,
            keep=options.keep,
        )

    def look() -> dict[str, float]:
        """Bits per byte of each held-out text."""
        assert held_out is not None and token_bytes is not None
        return {name: evaluate(model, batches, token_bytes).bits_per_byte for name, batches in held_out.items()}

    with ExitStack() as stack:
        log = bar = None
        if not quiet:
            log = stack.enter_context(MetricsLog(run / "metrics.jsonl", (phase, step) if resume is not None else None))
            bar = stack.enter_context(Bar(phase, options.steps, step))
        signals = stack.enter_context(catch_signals())
        model.train()
        while step < steps and not signals:
            batches = [loader.next_batch() for _ in range(options.accumulate)]
            targets = sum(batch.n_targets for batch in batches)
            total = torch.zeros((), device=device)
            for batch in batches:
                on = batch.to(device)
                part = model.loss(on.tokens, on.targets, on.positions, on.cu_seqlens, reduction="sum") / targets
                part.backward()
                total += part.detach()
            scale = options.plan.scale(step, options.steps)
            for group in optimizer.param_groups:
                group["lr"] = options.lr * scale
            norm = optimizer.step(clip=options.clip)
            latest = total, norm
            optimizer.zero_grad(set_to_none=True)
            step, tokens = step + 1, tokens + targets
            last = step == steps
            segments = [n for batch in batches for n in batch.cu_seqlens.diff().tolist()]
            flops = step_flops(
                model.config,
                loader.batch_size * options.accumulate,
                loader.seq_len,
                segments,
                trainable="adapter" if frozen else "all",
                adapter_weights=extra,
            )
            if step % log_every == 0 or last:
                loss = total.item()
                _finite(loss, step, phase)
                record: dict[str, Any] = {
                    "phase": phase,
                    "step": step,
                    "loss": loss,
                    "lr": options.lr * scale,
                    "grad_norm": norm.item(),
                    "tokens": tokens,
                    **meter.step(targets, flops),
                }
                if held_out and (last or (options.eval_every and step % options.eval_every == 0)):
                    with meter.pause():
                        record["bits_per_byte"] = look()
                if log and bar:
                    log.write(record)
                    bar.update(step, _note(record))
                if board:
                    for name, value in _flat(record):
                        board.add_scalar(f"{phase}/{name}", value, step)
            else:
                meter.step(targets, flops)
            if bar and sample is not None and options.sample_every and step % options.sample_every == 0 and not last:
                with meter.pause():
                    bar.say(f"--- step {step}\n{sample()}\n---")
            if save and (last or (options.save_every and step % options.save_every == 0)):
                with meter.pause():
                    last_saved = write_checkpoint()
        if signals and step < steps:
            if save:
                last_saved = write_checkpoint()
            raise Interrupted(run, step, signals[0])
    if board:
        board.close()
    return Outcome(step, tokens, loss, meter.summary(), last_saved)


def _finite(value: float, step: int, phase: str, name: str = "loss") -> None:
    if not math.isfinite(value):
        raise InputError(
            f"{phase}: {name} must be finite, got {value} at step {step}; what was saved before is "
            "untouched: resume from there with a lower lr or a lower clip"
        )


def _note(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.3f}"]
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    parts += [f"{name} {bits:.3f} bits/byte" for name, bits in record.get("bits_per_byte", {}).items()]
    return "  ".join(parts)


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        elif name not in ("phase", "step"):
            yield name, value


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise InputError("train: --tensorboard needs the package tensorboard: pip install 'fmcore[tensorboard]'") from e
    return SummaryWriter(str(run / "tensorboard"))
