"""What the commands do, as functions over options: pre-train, fine-tune, score, export.

A run is a folder: ``metrics.jsonl``, ``checkpoints/``, ``data/`` (token shards), and ``adapter/`` when one was trained.
Its newest checkpoint remembers the options and the text it came from, so that going on needs nothing but the folder.
"""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmcore.adapt.lora import LoraConfig, add_lora, save_adapter
from fmcore.data.corpus import read_documents, split_documents
from fmcore.data.packing import Loader, check_vocab, held_out_batches
from fmcore.data.shards import RECORD, Shard, build_shards, open_shards
from fmcore.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from fmcore.errors import InputError
from fmcore.evaluate import Evaluation, evaluate
from fmcore.generate import SampleConfig, complete
from fmcore.load import Loaded, build, config_from_dict, fold_adapter, load, load_base
from fmcore.models.decoder import PRESETS, Config, Decoder
from fmcore.models.hf import save_hf
from fmcore.train.checkpoint import Checkpoint, checkpoints, load_checkpoint
from fmcore.train.loop import Outcome, TrainOptions, pick_device, pick_dtype, train
from fmcore.train.progress import Bar

# Text that takes longer than some seconds to tokenize gets a progress bar.
SLOW_BYTES = 16 << 20


@dataclass(frozen=True)
class DataOptions:
    """Which text."""

    data: str = "stdlib"  # stdlib | topics | a text file or .jsonl | a folder of them or of shards | hf:org/name
    field: str = "text"  # of .jsonl lines and data sets
    held_out: float = 0.05  # share of the text that is never trained on
    eval_tokens: int = 65536  # tokens of held-out text in an evaluation inside training

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise InputError(f"data: held_out must be a share between 0 and 1, got {self.held_out}")
        if self.eval_tokens < 1:
            raise InputError(f"data: eval_tokens must be at least 1, got {self.eval_tokens}")


@dataclass(frozen=True)
class TokenizerOptions:
    """How text becomes tokens."""

    tokenizer: str = "byte"  # byte | bpe (trained on the text) | a tokenizer.json or its folder
    vocab_size: int = 4096  # ids of a bpe tokenizer that is trained here

    def make(self, data: DataOptions) -> Tokenizer:
        """The tokenizer; "bpe" is trained on the training part of ``data``."""
        if self.tokenizer == "byte":
            return ByteTokenizer()
        if self.tokenizer == "bpe":
            training, _ = split_documents(read_documents(data.data, data.field), data.held_out)
            return BPETokenizer.train((document.text for document in training), self.vocab_size)
        return load_tokenizer(self.tokenizer)


@dataclass(frozen=True)
class ModelOptions:
    """Which model: a preset, and what differs from it."""

    preset: str = "demo"  # demo demo-gpu gpt2-124m gpt2-350m gpt2-1.5b llama-3.2-1b llama-3.1-8b qwen3-0.6b
    layers: int | None = None  # blocks; by default the preset's, as all below
    width: int | None = None  # of the residual stream
    heads: int | None = None  # of queries
    kv_heads: int | None = None  # of keys and values; heads must be a multiple
    ffn: int | None = None  # width inside the feed-forward network
    context: int | None = None  # longest sequence, in tokens; with rope at least seq_len

    def config(self, vocab_size: int, seq_len: int) -> Config:
        """The Config of these options for a tokenizer of ``vocab_size`` ids. ``InputError`` for an unknown preset."""
        if self.preset not in PRESETS:
            raise InputError(f"model: preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        base = PRESETS[self.preset]
        given = {k: v for k, v in asdict(self).items() if k != "preset" and v is not None}
        if "context" not in given:
            given["context"] = max(base.context, seq_len) if base.positions == "rope" else base.context
        if given["context"] < seq_len:
            raise InputError(f"model: context must be at least seq_len={seq_len}, got {given['context']}")
        return replace(base, vocab_size=vocab_size, **given)


@dataclass(frozen=True)
class LoraOptions:
    """Which adapter."""

    rank: int = 8
    alpha: float = 16.0  # the adapter's output counts alpha / rank times
    dropout: float = 0.0  # share of the adapter's input that is dropped
    targets: str = "all"  # layers, with commas: of q,k,v,o,gate,up,down (GPT-2: qkv,o,up,down)
    rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> LoraConfig:
        targets = self.targets if self.targets == "all" else tuple(name.strip() for name in self.targets.split(","))
        return LoraConfig(self.rank, self.alpha, self.dropout, targets, self.rslora)


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
    """The checkpoint to go on from. ``InputError`` if there is none."""
    if not checkpoints(run):
        raise InputError(f"{run}: wanted a run with a checkpoint to resume from, found none")
    return load_checkpoint(run)


def saved_options(found: Checkpoint, command: str, **kinds: type) -> dict[str, Any]:
    """The options that a checkpoint of ``command`` remembers, as the dataclasses in ``kinds`` (``str`` as it is)."""
    job = found.state.get("job")
    if not isinstance(job, dict) or job.get("command") != command:
        raise InputError(f"{found.path}: wanted a checkpoint of `fmcore {command}`, got one of another origin")
    try:
        return {name: kind(**job[name]) if is_dataclass(kind) else kind(job[name]) for name, kind in kinds.items()}
    except (TypeError, KeyError) as e:
        raise InputError(f"{found.path}: its options must be those of this version of fmcore ({e})") from e


def check_unchanged(found: Checkpoint, **parts: tuple[Any, Any]) -> None:
    """``InputError`` when an option that a run cannot change differs: for each part what was saved and what came."""
    for part, (saved, now) in parts.items():
        names = [f.name for f in fields(saved)] if is_dataclass(saved) else []
        pairs = [(name, getattr(saved, name), getattr(now, name)) for name in names] or [(part, saved, now)]
        for name, before, after in pairs:
            if before != after:
                raise InputError(
                    f"{found.path}: {name} must stay {before!r} in a run that goes on, got {after!r}; "
                    f"leave it out or start another run"
                )


def pretrain(
    run: Path,
    data: DataOptions,
    tokenizer: TokenizerOptions,
    model: ModelOptions,
    options: TrainOptions,
    *,
    found: Checkpoint | None = None,
) -> Outcome:
    """Train a fresh model on text, into ``run``; with ``found``, a checkpoint of it, go on from there."""
    data = _absolute(data)
    if found is None:
        check_new(run, "pretrain")
        reader = tokenizer.make(data)
        config = model.config(reader.vocab_size, options.seq_len)
    else:
        kinds = {"data": DataOptions, "tokenizer": TokenizerOptions, "model": ModelOptions}
        saved = saved_options(found, "pretrain", **kinds)
        now = {"data": data, "tokenizer": tokenizer, "model": model}
        check_unchanged(found, **{name: (saved[name], now[name]) for name in kinds})
        reader, config = _tokenizer_of(found), config_from_dict(found.config, found.path)
    device = pick_device(options.device)
    job = {"command": "pretrain", "data": asdict(data), "tokenizer": asdict(tokenizer), "model": asdict(model)}
    training, held_out = _shards(run, data, reader, found)
    check_vocab(training, config.vocab_size)
    decoder = build(config, device, pick_dtype(options.dtype, device), options.seed)
    return _train(run, "pretrain", decoder, reader, training, held_out, data, options, found, {"job": job})


def finetune(
    run: Path,
    base: Path | str,
    data: DataOptions,
    lora: LoraOptions,
    options: TrainOptions,
    *,
    full: bool = False,
    found: Checkpoint | None = None,
) -> Outcome:
    """Adapt a model to other text: a LoRA adapter on a frozen base, or with ``full`` every weight, into ``run``."""
    data = _absolute(data)
    if found is None:
        check_new(run, "finetune")
    else:
        saved = saved_options(found, "finetune", base=str, data=DataOptions, lora=LoraOptions, full=bool)
        check_unchanged(found, data=(saved["data"], data), lora=(saved["lora"], lora), full=(saved["full"], full))
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
    training, held_out = _shards(run, data, start.tokenizer, found)
    check_vocab(training, start.model.config.vocab_size)
    outcome = _train(run, "finetune", start.model, start.tokenizer, training, held_out, data, options, found, state)
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
    found: Checkpoint | None,
    state: Mapping[str, Any],
) -> Outcome:
    job = {**state["job"], "train": asdict(options)}
    batches = list(held_out_batches(held_out, options.batch_size, options.seq_len, data.eval_tokens))
    return train(
        model,
        Loader(training, options.batch_size, options.seq_len, options.seed),
        options,
        run,
        phase=phase,
        held_out={"held-out": batches},
        token_bytes=_sizes(tokenizer),
        tokenizer=tokenizer,
        resume=found,
        sample=sampler(model, tokenizer, options.seed),
        state={**state, "job": job},
    )


def _tokenizer_of(found: Checkpoint) -> Tokenizer:
    if found.tokenizer is None:
        raise InputError(f"{found.path}: wanted a tokenizer beside the weights, found none")
    return load_tokenizer(found.tokenizer)


def _sizes(tokenizer: Tokenizer) -> Tensor:
    return torch.from_numpy(tokenizer.token_bytes())


def _absolute(data: DataOptions) -> DataOptions:
    """A path holds from every folder that the run may be continued in."""
    known = data.data in ("stdlib", "topics") or data.data.startswith("hf:")
    return data if known else replace(data, data=str(Path(data.data).resolve()))


def _shards(run: Path, data: DataOptions, tokenizer: Tokenizer, found: Checkpoint | None) -> tuple[Shard, Shard]:
    """Training and held-out tokens. A run that goes on keeps those it began with, whatever became of their source."""
    if found is not None and (run / "data" / RECORD).is_file():
        return open_shards(run / "data", tokenizer)
    return _build(data, tokenizer, run / "data")


def _build(data: DataOptions, tokenizer: Tokenizer, folder: Path) -> tuple[Shard, Shard]:
    with ExitStack() as stack:
        bars: list[Bar] = []

        def progress(done: int, total: int) -> None:
            if total >= SLOW_BYTES:
                if not bars:
                    bars.append(stack.enter_context(Bar("tokenize", total >> 20)))
                bars[0].update(done >> 20, "MiB")

        return build_shards(data.data, tokenizer, folder, data.held_out, progress, data.field)


def sampler(model: Decoder, tokenizer: Tokenizer, seed: int, prompt: str = "", tokens: int = 96) -> Callable[[], str]:
    """A function that gives a short text of the model as it then is."""
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
    found = load(model, adapter=adapter, device=device, dtype=dtype)
    context = found.model.config.context
    T = min(context, 1024) if seq_len is None else seq_len
    if not 1 <= T <= context:
        raise InputError(f"evaluate: seq_len must be from 1 to the model's context={context}, got {T}")
    with tempfile.TemporaryDirectory() as folder:
        shards = _build(data, found.tokenizer, Path(folder)) if data else _own_shards(found, model, Path(folder))
        check_vocab(shards[1], found.model.config.vocab_size)
        batches = [held_out_batches(shard, batch_size, T) for shard in (shards if whole else shards[1:])]
        return evaluate(found.model, chain(*batches), _sizes(found.tokenizer))


def _own_shards(found: Loaded, model: Path | str, folder: Path) -> tuple[Shard, Shard]:
    """The text of the run that the model came from."""
    job = found.checkpoint.state.get("job") if found.checkpoint else None
    if found.checkpoint is None or not isinstance(job, dict):
        raise InputError(f"evaluate: data must be named for {model}, which does not say what it was trained on")
    run = found.checkpoint.path.parent.parent
    if (run / "data" / RECORD).is_file():
        return open_shards(run / "data", found.tokenizer)
    saved = saved_options(found.checkpoint, job.get("command", ""), data=DataOptions)
    return _build(saved["data"], found.tokenizer, folder)


def export(model: Path | str, out: Path, *, adapter: Path | str | None = None) -> Config:
    """Write a Hugging Face folder; an adapter, the run's own or one that is named, is merged into the weights."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: wanted a new or empty folder, got {'one with files' if out.is_dir() else 'a file'}")
    found = load(model, adapter=adapter, device="cpu", dtype="float32")
    fold_adapter(found.model)
    save_hf(found.model, out, found.tokenizer)
    return found.model.config
