"""The training loop: pre-training, full fine-tuning and adapters alike, one file from top to bottom.

A step draws ``accumulate`` batches, sums their losses over tokens, divides by the number of targets in all of them (so
that accumulation changes nothing but memory), clips, and steps. State that a later step depends on (weights, moments,
position in the data, random generators) is in the checkpoint, so that a resumed run repeats the uninterrupted one.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fmcore.data.packing import Batch, Loader
from fmcore.data.tokenizer import Tokenizer
from fmcore.errors import InputError
from fmcore.evaluate import evaluate
from fmcore.models.decoder import Decoder
from fmcore.optim import AdamW, Lion, Muon, Stepper, decay_groups, muon_groups
from fmcore.train.checkpoint import Checkpoint, rng_state, save_checkpoint, set_rng_state
from fmcore.train.metrics import Meter, MetricsLog, peak_flops, step_flops
from fmcore.train.progress import Bar, headline, scalars, tensorboard
from fmcore.train.schedule import Kind, Schedule

# Steps between looks at the loss. A GPU is asked for its numbers every tenth step only: asking means waiting for it.
LOG_EVERY = {"cpu": 1}


OptimizerName = Literal["adamw", "lion", "muon"]


@dataclass(frozen=True)
class TrainOptions:
    """How to train. The defaults suit a small model from scratch."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # sequences in one forward pass
    seq_len: int = 256  # tokens in a sequence
    accumulate: int = 1  # forward passes in one step
    optimizer: OptimizerName = "adamw"  # muon: of hidden matrices, adamw of the rest
    lr: float = 3e-3  # peak learning rate; lion wants a third to a tenth of adamw's, muon the same
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
        if self.optimizer not in get_args(OptimizerName):
            wanted = ", ".join(get_args(OptimizerName))
            raise InputError(f"train: optimizer must be one of {wanted}, got {self.optimizer!r}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"train: {name} must be within [0, 1), got {getattr(self, name)}")
        self.plan.check(self.steps)

    @property
    def plan(self) -> Schedule:
        """How the learning rate moves over the run."""
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
    """Somebody asked to stop. ``code`` is the exit code that the signal stands for."""

    def __init__(self, run: Path, step: int, signum: int, saved: bool = True):
        kept = f"saved in {run}" if saved else f"not saved; what {run} held before is untouched"
        super().__init__(f"stopped after step {step}, {kept}")
        self.run, self.step, self.code = run, step, 128 + signum


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
    """What a checkpoint of this model has to hold: everything, or when the base is frozen only what trains."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t for name, t in model.state_dict().items() if name not in frozen}


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> Stepper:
    """The optimizer that ``options`` name, over what trains; matrices decay and vectors do not."""
    lr, betas, decay = options.lr, (options.beta1, options.beta2), options.weight_decay
    if options.optimizer == "muon":
        # Its steps are then as long as AdamW's, so that one learning rate serves both.
        return Muon(muon_groups(model, decay), lr=lr, betas=betas, adjust_lr_fn="match_rms_adamw")
    kind = Lion if options.optimizer == "lion" else AdamW
    return kind(decay_groups(model, decay), lr=lr, betas=betas)


def restore(model: torch.nn.Module, optimizer: Stepper, loader: Loader, checkpoint: Checkpoint) -> None:
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


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. Nobody has waited for its tensors yet."""

    loss: Tensor  # nats per target, over all batches of the step
    grad_norm: Tensor  # before clipping
    lr: float
    targets: int  # trained on
    segments: list[int]  # lengths of the documents in its rows, in tokens


def take_step(model: Decoder, loader: Loader, optimizer: Stepper, options: TrainOptions, step: int) -> Step:
    """Draw the batches of step number ``step`` (0-based), sum their gradients, clip, and change the weights."""
    batches = [loader.next_batch() for _ in range(options.accumulate)]
    targets = sum(batch.n_targets for batch in batches)
    device = next(model.parameters()).device
    loss = torch.zeros((), device=device)
    for batch in batches:
        on = batch.to(device)
        part = model.loss(on.tokens, on.targets, on.positions, on.cu_seqlens, reduction="sum") / targets
        part.backward()
        loss += part.detach()
    lr = options.lr * options.plan.scale(step, options.steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    grad_norm = optimizer.step(clip=options.clip)
    optimizer.zero_grad(set_to_none=True)
    segments = [n for batch in batches for n in batch.cu_seqlens.diff().tolist()]
    return Step(loss, grad_norm, lr, targets, segments)


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
        save: write checkpoints, every ``save_every`` steps and at the end.
        stop_after: leave after this many steps of this call, while the schedule still spans all of ``options.steps``
            (for tests, and for runs that are split on purpose).
        quiet: show and log nothing.

    Raises ``Interrupted`` after SIGINT or SIGTERM, with everything saved if ``save``; ``InputError`` if the loss is not
    finite.
    """
    device = next(model.parameters()).device
    options = replace(options, device=str(device))
    optimizer = make_optimizer(model, options)
    step, tokens, loss, last_saved = 0, 0, math.nan, None
    if resume is not None:
        restore(model, optimizer, loader, resume)
        step, tokens = resume.step, int(resume.state["tokens"])
    steps = options.steps if stop_after is None else min(options.steps, step + stop_after)
    done: Step | None = None
    frozen = any(not p.requires_grad for p in model.parameters())
    flops_of = partial(
        step_flops,
        model.config,
        loader.batch_size * options.accumulate,
        loader.seq_len,
        trainable="adapter" if frozen else "all",
        adapter_weights=sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim == 2) if frozen else 0,
    )
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    meter = Meter(peak=peak, device=device)
    log_every = LOG_EVERY.get(device.type, 10)

    def due(every: int) -> bool:
        return every > 0 and step % every == 0

    def held_out_bits() -> dict[str, float]:
        """Bits per byte of each held-out text."""
        assert held_out is not None and token_bytes is not None
        return {name: evaluate(model, batches, token_bytes).bits_per_byte for name, batches in held_out.items()}

    def write_checkpoint() -> Path:
        if done is not None:
            _check_finite(done.loss.item(), step, phase)
            # The loss was taken before the step: a bad gradient has spoiled the weights that would be saved.
            _check_finite(done.grad_norm.item(), step, phase, "grad_norm")
        own = {"phase": phase, "tokens": tokens, "loader": loader.state_dict(), "options": asdict(options)}
        return save_checkpoint(
            run,
            step,
            model=trained_tensors(model),
            state={**own, **(state or {})},
            config=asdict(model.config),
            optimizer={**optimizer.tensors(dict(model.named_parameters())), **rng_state()},
            tokenizer=tokenizer,
            keep=options.keep,
        )

    with ExitStack() as stack:
        board = stack.enter_context(closing(tensorboard(run))) if options.tensorboard else None
        log = bar = None
        if not quiet:
            log = stack.enter_context(MetricsLog(run / "metrics.jsonl", (phase, step) if resume is not None else None))
            bar = stack.enter_context(Bar(phase, options.steps, step))
        signals = stack.enter_context(catch_signals())
        model.train()
        while step < steps and not signals:
            done = take_step(model, loader, optimizer, options, step)
            step, tokens = step + 1, tokens + done.targets
            last, flops = step == steps, flops_of(done.segments)
            # The clock starts and pauses on steps that were waited for, or it would miss what a GPU has still to do.
            stops = (log_every, options.eval_every, options.sample_every, options.save_every)
            if last or meter.skip or any(map(due, stops)):
                loss = done.loss.item()
                _check_finite(loss, step, phase)
                record: dict[str, Any] = {
                    "phase": phase,
                    "step": step,
                    "loss": loss,
                    "lr": done.lr,
                    "grad_norm": done.grad_norm.item(),
                    "tokens": tokens,
                    **meter.step(done.targets, flops),
                }
                if held_out and (last or due(options.eval_every)):
                    with meter.pause():
                        record["bits_per_byte"] = held_out_bits()
                if log and bar:
                    log.write(record)
                    bar.update(step, headline(record))
                if board:
                    for name, value in scalars(record):
                        board.add_scalar(f"{phase}/{name}", value, step)
            else:
                meter.step(done.targets, flops)
            if bar and sample is not None and due(options.sample_every) and not last:
                with meter.pause():
                    bar.say(f"--- step {step}\n{sample()}\n---")
            if save and (last or due(options.save_every)):
                with meter.pause():
                    last_saved = write_checkpoint()
        if signals and step < steps:
            if save:
                last_saved = write_checkpoint()
            raise Interrupted(run, step, signals[0], save)
    return Outcome(step, tokens, loss, meter.summary(), last_saved)


def _check_finite(value: float, step: int, phase: str, name: str = "loss") -> None:
    if not math.isfinite(value):
        raise InputError(
            f"{phase}: {name} must be finite, got {value} at step {step}; what was saved before is "
            "untouched: resume from there with a lower lr or a lower clip"
        )
