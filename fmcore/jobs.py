"""What the commands do, as functions over options: pre-train, fine-tune, score, export.

A run is a folder: ``metrics.jsonl``, ``checkpoints/``, ``data/`` (token shards), and ``adapter/`` when one was trained.
Its newest checkpoint remembers the options and the text it came from, so that going on needs nothing but the folder.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmcore.adapt.lora import add_lora
from fmcore.adapt.peft import save_adapter
from fmcore.data.packing import Loader, check_vocab, held_out_batches
from fmcore.data.shards import RECORD, Shard, build_shards, open_shards
from fmcore.data.tokenizer import Tokenizer
from fmcore.device import pick_device, pick_dtype
from fmcore.errors import InputError
from fmcore.evaluate import Evaluation, evaluate
from fmcore.generate import SampleConfig, complete
from fmcore.load import Loaded, build, config_from_dict, fold_adapter, load, load_base, tokenizer_of
from fmcore.models.decoder import Config, Decoder
from fmcore.models.hf import save_hf
from fmcore.options import DataOptions, LoraOptions, ModelOptions, TokenizerOptions
from fmcore.train.checkpoint import Checkpoint, checkpoints, load_checkpoint
from fmcore.train.loop import Outcome, TrainOptions, train
from fmcore.train.progress import Bar

# Text that takes longer than some seconds to tokenize gets a progress bar.
SLOW_BYTES = 16 << 20


def check_new(run: Path, command: str) -> None:
    """``InputError`` when ``run`` holds another run, which a new one would write into."""
    if checkpoints(run):
        raise InputError(
            f"{run}: wanted a new folder, got a run with checkpoints; continue it with "
            f"`fmcore {command} --run {run} --resume`, or name another --run"
        )
    if (run / "metrics.jsonl").exists():
        raise InputError(f"{run}: wanted a new folder, got a run without a checkpoint; remove it or name another --run")


def find_run(run: Path) -> Checkpoint:
    """The newest checkpoint of ``run``, to go on from. ``InputError`` if there is none."""
    if not checkpoints(run):
        raise InputError(f"{run}: wanted a run with a checkpoint to resume from, found none")
    return load_checkpoint(run)


def saved_options(checkpoint: Checkpoint, command: str, **kinds: type) -> dict[str, Any]:
    """The options that a checkpoint of ``command`` remembers, each as the type that ``kinds`` gives for its name.

    Raises ``InputError`` when another command wrote the checkpoint or its options are not those of this version.
    """
    job = checkpoint.state.get("job")
    if not isinstance(job, dict) or job.get("command") != command:
        raise InputError(f"{checkpoint.path}: wanted a checkpoint of `fmcore {command}`, got one of another origin")
    try:
        return {name: kind(**job[name]) if is_dataclass(kind) else kind(job[name]) for name, kind in kinds.items()}
    except (TypeError, KeyError) as e:
        raise InputError(f"{checkpoint.path}: its options must be those of this version of fmcore ({e})") from e


def check_unchanged(checkpoint: Checkpoint, **parts: tuple[Any, Any]) -> None:
    """``InputError`` when an option that a run cannot change did: each part is (what was saved, what came)."""
    for part, (saved, now) in parts.items():
        names = [f.name for f in fields(saved)] if is_dataclass(saved) else []
        pairs = [(name, getattr(saved, name), getattr(now, name)) for name in names] or [(part, saved, now)]
        for name, before, after in pairs:
            if before != after:
                raise InputError(
                    f"{checkpoint.path}: {name} must stay {before!r} in a run that goes on, got {after!r}; "
                    f"leave it out or start another run"
                )


def pretrain(
    run: Path,
    data: DataOptions,
    tokenizer: TokenizerOptions,
    model: ModelOptions,
    options: TrainOptions,
    *,
    resume: Checkpoint | None = None,
) -> Outcome:
    """Train a fresh model on text, into ``run``; or go on from ``resume``, a checkpoint of that run.

    Raises ``InputError`` for a run that is not new, for options that changed and for data that does not fit.
    """
    data = _absolute(data)
    if resume is None:
        check_new(run, "pretrain")
        reader = tokenizer.make(data)
        config = model.config(reader.vocab_size, options.seq_len)
    else:
        kinds = {"data": DataOptions, "tokenizer": TokenizerOptions, "model": ModelOptions}
        saved = saved_options(resume, "pretrain", **kinds)
        now = {"data": data, "tokenizer": tokenizer, "model": model}
        check_unchanged(resume, **{name: (saved[name], now[name]) for name in kinds})
        reader, config = tokenizer_of(resume), config_from_dict(resume.config, resume.path)
    device = pick_device(options.device)
    job = {"command": "pretrain", "data": asdict(data), "tokenizer": asdict(tokenizer), "model": asdict(model)}
    training, held_out = _shards(run, data, reader, resume)
    check_vocab(training, config.vocab_size)
    decoder = build(config, device, pick_dtype(options.dtype, device), options.seed)
    return _train(run, "pretrain", decoder, reader, training, held_out, data, options, resume, {"job": job})


def finetune(
    run: Path,
    base: Path | str,
    data: DataOptions,
    lora: LoraOptions,
    options: TrainOptions,
    *,
    full: bool = False,
    resume: Checkpoint | None = None,
) -> Outcome:
    """Adapt a model to other text, into ``run``: a LoRA adapter on the frozen ``base``, or with ``full`` every weight.

    Or go on from ``resume``, a checkpoint of that run; the base is then the one that it was started with.
    Raises ``InputError`` as ``pretrain`` does.
    """
    data = _absolute(data)
    if resume is None:
        check_new(run, "finetune")
    else:
        saved = saved_options(resume, "finetune", base=str, data=DataOptions, lora=LoraOptions, full=bool)
        check_unchanged(resume, data=(saved["data"], data), lora=(saved["lora"], lora), full=(saved["full"], full))
        base = saved["base"]
    start = load_base(base, device=options.device, dtype=options.dtype)
    # The very checkpoint: the run of the base may go on, and an adapter fits only the weights it was trained on.
    base = str((start.checkpoint.path if start.checkpoint else Path(base)).resolve())
    if options.seq_len > start.model.config.context:
        raise InputError(
            f"finetune: seq_len must be at most the model's context={start.model.config.context}, got {options.seq_len}"
        )
    state: dict[str, Any] = {
        "job": {"command": "finetune", "base": base, "full": full, "data": asdict(data), "lora": asdict(lora)}
    }
    if not full:
        add_lora(start.model, lora.config(), seed=options.seed)
        state |= {"lora": asdict(lora.config()), "base": base}
    # The base may come with dropout's random state of its own past; a run depends on its seed alone.
    torch.manual_seed(options.seed)
    training, held_out = _shards(run, data, start.tokenizer, resume)
    check_vocab(training, start.model.config.vocab_size)
    outcome = _train(run, "finetune", start.model, start.tokenizer, training, held_out, data, options, resume, state)
    if not full:
        save_adapter(start.model, run / "adapter", base=base)
    return outcome


def _train(
    run: Path,
    phase: str,
    model: Decoder,
    tokenizer: Tokenizer,
    training: Shard,
    held_out: Shard,
    data: DataOptions,
    options: TrainOptions,
    resume: Checkpoint | None,
    state: Mapping[str, Any],
) -> Outcome:
    """``train`` with what both commands want: held-out batches, samples, and the options kept in the checkpoint."""
    job = {**state["job"], "train": asdict(options)}
    batches = list(held_out_batches(held_out, options.batch_size, options.seq_len, data.eval_tokens))
    return train(
        model,
        Loader(training, options.batch_size, options.seq_len, options.seed),
        options,
        run,
        phase=phase,
        held_out={"held-out": batches},
        token_bytes=_token_bytes(tokenizer),
        tokenizer=tokenizer,
        resume=resume,
        sample=sampler(model, tokenizer, options.seed),
        state={**state, "job": job},
    )


def _token_bytes(tokenizer: Tokenizer) -> Tensor:
    """Bytes of text behind each token id (V,)."""
    return torch.from_numpy(tokenizer.token_bytes())


def _absolute(data: DataOptions) -> DataOptions:
    """``data`` with an absolute path, because the run may be continued from another folder."""
    known = data.data in ("stdlib", "topics") or data.data.startswith("hf:")
    return data if known else replace(data, data=str(Path(data.data).resolve()))


def _shards(run: Path, data: DataOptions, tokenizer: Tokenizer, resume: Checkpoint | None) -> tuple[Shard, Shard]:
    """Training and held-out tokens. A run that goes on keeps those it began with, whatever became of their source."""
    if resume is not None and (run / "data" / RECORD).is_file():
        return open_shards(run / "data", tokenizer)
    return _tokenized(data, tokenizer, run / "data")


def _tokenized(data: DataOptions, tokenizer: Tokenizer, folder: Path) -> tuple[Shard, Shard]:
    """``build_shards`` with a progress bar where it takes long."""
    with ExitStack() as stack:
        bars: list[Bar] = []

        def progress(done: int, total: int) -> None:
            if total >= SLOW_BYTES:
                if not bars:
                    bars.append(stack.enter_context(Bar("tokenize", total >> 20)))
                bars[0].update(done >> 20, "MiB")

        return build_shards(data.data, tokenizer, folder, data.held_out, progress, data.field)


def sampler(model: Decoder, tokenizer: Tokenizer, seed: int, prompt: str = "", tokens: int = 96) -> Callable[[], str]:
    """A function without arguments that returns a short text of ``model``, as trained by then."""
    config = SampleConfig(max_tokens=tokens, temperature=0.8, top_p=0.95, seed=seed)
    return lambda: complete(model, tokenizer, [prompt], config)[0]


def score(
    model: Path | str,
    data: DataOptions | None = None,
    *,
    adapter: Path | str | None = None,
    seq_len: int | None = None,
    batch_size: int = 16,
    whole: bool = False,
    device: str = "auto",
    dtype: str = "auto",
) -> Evaluation:
    """Bits per byte and perplexity of a model on held-out text, or with ``whole`` on all of it.

    Without ``data`` it is the text that the model's run was trained on. The split into training and held-out text
    depends on the text and ``held_out`` alone, so the same words are held out here as in training.
    """
    loaded = load(model, adapter=adapter, device=device, dtype=dtype)
    context = loaded.model.config.context
    T = min(context, 1024) if seq_len is None else seq_len
    if not 1 <= T <= context:
        raise InputError(f"evaluate: seq_len must be from 1 to the model's context={context}, got {T}")
    with tempfile.TemporaryDirectory() as folder:
        shards = _tokenized(data, loaded.tokenizer, Path(folder)) if data else _own_shards(loaded, model, Path(folder))
        check_vocab(shards[1], loaded.model.config.vocab_size)
        batches = [held_out_batches(shard, batch_size, T) for shard in (shards if whole else shards[1:])]
        return evaluate(loaded.model, chain(*batches), _token_bytes(loaded.tokenizer))


def _own_shards(loaded: Loaded, model: Path | str, folder: Path) -> tuple[Shard, Shard]:
    """The token shards of the run that the model came from, or its text tokenized again into ``folder``."""
    job = loaded.checkpoint.state.get("job") if loaded.checkpoint else None
    if loaded.checkpoint is None or not isinstance(job, dict):
        raise InputError(f"evaluate: data must be named for {model}, which does not say what it was trained on")
    run = loaded.checkpoint.path.parent.parent
    if (run / "data" / RECORD).is_file():
        return open_shards(run / "data", loaded.tokenizer)
    saved = saved_options(loaded.checkpoint, job.get("command", ""), data=DataOptions)
    return _tokenized(saved["data"], loaded.tokenizer, folder)


def export(model: Path | str, out: Path, *, adapter: Path | str | None = None) -> Config:
    """Write a Hugging Face folder; an adapter, the run's own or one that is named, is merged into the weights."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: wanted a new or empty folder, got {'one with files' if out.is_dir() else 'a file'}")
    loaded = load(model, adapter=adapter, device="cpu", dtype="float32")
    fold_adapter(loaded.model)
    save_hf(loaded.model, out, loaded.tokenizer)
    return loaded.model.config
