"""Options of the commands, and what each prints: the thin layer between a command line and ``jobs``."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fmcore import jobs
from fmcore.arguments import prog
from fmcore.errors import InputError
from fmcore.generate import SampleConfig, complete, stream
from fmcore.load import load
from fmcore.options import DataOptions, LoraOptions, ModelOptions, TokenizerOptions
from fmcore.train.checkpoint import Checkpoint
from fmcore.train.loop import Outcome, TrainOptions
from fmcore.train.metrics import read_metrics

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Pretrain:
    """Train a fresh model on text, into a run folder."""

    run: Path = Path("runs/pretrain")  # folder for metrics, checkpoints and tokens
    resume: bool = False  # go on from the run's newest checkpoint, with its options; --steps, --lr ... may change
    data: DataOptions = DataOptions()
    tokenizer: TokenizerOptions = TokenizerOptions()
    model: ModelOptions = ModelOptions()
    train: TrainOptions = TrainOptions()

    @classmethod
    def saved(cls, checkpoint: Checkpoint, run: Path) -> "Pretrain":
        """The options of a run that goes on."""
        kinds = {"data": DataOptions, "tokenizer": TokenizerOptions, "model": ModelOptions, "train": TrainOptions}
        return cls(run=run, resume=True, **jobs.saved_options(checkpoint, "pretrain", **kinds))

    def execute(self, checkpoint: Checkpoint | None) -> None:
        outcome = jobs.pretrain(self.run, self.data, self.tokenizer, self.model, self.train, resume=checkpoint)
        _summary(self.run, outcome, checkpoint)


@dataclass(frozen=True)
class Finetune:
    """Adapt a model to other text: a LoRA adapter on a frozen base, or every weight, into a run folder."""

    model: str | None = None  # the base: a run, a checkpoint or a Hugging Face folder
    run: Path = Path("runs/finetune")  # folder for metrics, checkpoints, tokens and the adapter
    full: bool = False  # train every weight instead of an adapter
    resume: bool = False  # go on from the run's newest checkpoint, with its options; --steps, --lr ... may change
    data: DataOptions = DataOptions(data="topics")
    lora: LoraOptions = LoraOptions()
    train: TrainOptions = TrainOptions(steps=200, lr=1e-3, weight_decay=0.0, eval_every=50)

    @classmethod
    def saved(cls, checkpoint: Checkpoint, run: Path) -> "Finetune":
        """The options of a run that goes on."""
        kinds = {"full": bool, "data": DataOptions, "lora": LoraOptions, "train": TrainOptions}
        return cls(run=run, resume=True, **jobs.saved_options(checkpoint, "finetune", **kinds))

    def execute(self, checkpoint: Checkpoint | None) -> None:
        if self.model is None and checkpoint is None:
            raise InputError("finetune: --model must be given: a run, a checkpoint or a Hugging Face folder")
        if self.model is not None and checkpoint is not None:
            raise InputError(f"finetune: --model must be left out with --resume, got {self.model}; {self.run} knows it")
        outcome = jobs.finetune(
            self.run, self.model or "", self.data, self.lora, self.train, full=self.full, resume=checkpoint
        )
        _summary(self.run, outcome, checkpoint)
        if not self.full:
            print(f"adapter {self.run / 'adapter'} (PEFT's format)")


def _summary(run: Path, outcome: Outcome, checkpoint: Checkpoint | None) -> None:
    """Print what training came to."""
    if checkpoint is not None and checkpoint.step >= outcome.steps:
        print(f"nothing left to train: {run} is at step {checkpoint.step}; --steps names a later one")
    else:
        last = read_metrics(run / "metrics.jsonl")[-1]
        bits = "".join(f", {name} {value:.3f} bits per byte" for name, value in last.get("bits_per_byte", {}).items())
        print(f"{outcome.steps} steps, {outcome.tokens:,} tokens, last loss {outcome.loss:.3f} nats per token{bits}")
        speed = outcome.speed
        if "tokens_per_s" in speed:
            mfu = f", mfu {speed['mfu']:.1%}" if "mfu" in speed else ""
            print(
                f"{speed['tokens_per_s']:,.0f} tokens/s, {speed['tflops']:.3g} TFLOP/s{mfu}, "
                f"{speed['memory_gib']:.2f} GiB"
            )
    if outcome.checkpoint is not None:
        print(f"checkpoint {outcome.checkpoint}")
    print(f"try: {prog()} generate --model {run} --prompt 'The '")


@dataclass(frozen=True)
class Generate:
    """Continue prompts with text of a model."""

    model: str  # a run, a checkpoint or a Hugging Face folder
    adapter: str | None = None  # folder of an adapter to put on top
    prompt: tuple[str, ...] = ()  # what to continue; repeat it for several; without one, a new document
    echo: bool = True  # print each prompt in front of what follows it
    max_tokens: int = 256  # new tokens for each prompt
    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    greedy: bool = False  # always the likeliest token, whatever the temperature
    seed: int = 0  # the same seed gives the same text
    device: str = "auto"  # auto: cuda if there is a GPU, else cpu
    dtype: Dtype = "auto"  # of weights and activations; auto: bfloat16 on a GPU

    def execute(self, checkpoint: Checkpoint | None) -> None:
        temperature = 0.0 if self.greedy else self.temperature
        config = SampleConfig(self.max_tokens, temperature, self.top_k, self.top_p, self.seed)
        prompts = self.prompt or ("",)
        loaded = load(self.model, adapter=self.adapter, device=self.device, dtype=self.dtype)
        if len(prompts) == 1:
            pieces = stream(loaded.model, loaded.tokenizer, prompts[0], config)
            if self.echo:
                _write(prompts[0])
            for piece in pieces:
                _write(piece)
            _write("\n")
            return
        texts = complete(loaded.model, loaded.tokenizer, prompts, config)
        shown = [prompt + text if self.echo else text for prompt, text in zip(prompts, texts, strict=True)]
        _write("\n---\n".join(shown) + "\n")


def _write(text: str) -> None:
    """Print text of a model, which may hold characters that the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


@dataclass(frozen=True)
class Evaluate:
    """Bits per byte and perplexity of a model on held-out text."""

    model: str  # a run, a checkpoint or a Hugging Face folder
    adapter: str | None = None  # folder of an adapter to put on top
    data: str | None = None  # stdlib | topics | a file | a folder | hf:org/name; by default the text of the model's run
    field: str = "text"  # of .jsonl lines and data sets
    held_out: float = 0.05  # share of --data that is held out; take the one of the training
    whole: bool = False  # score all of the text, not only what is held out
    seq_len: int | None = None  # tokens read together; by default the model's context, 1024 at most
    batch_size: int = 16  # sequences in one forward pass
    device: str = "auto"  # auto: cuda if there is a GPU, else cpu
    dtype: Dtype = "auto"  # of weights and activations; auto: bfloat16 on a GPU

    def execute(self, checkpoint: Checkpoint | None) -> None:
        data = None if self.data is None else DataOptions(self.data, self.field, self.held_out)
        result = jobs.score(
            self.model,
            data,
            adapter=self.adapter,
            seq_len=self.seq_len,
            batch_size=self.batch_size,
            whole=self.whole,
            device=self.device,
            dtype=self.dtype,
        )
        if self.data is not None and not self.whole:
            print(f"on the held-out {self.held_out:.0%} of {self.data}; --whole scores all of it")
        print(f"bits per byte  {result.bits_per_byte:.4f}")
        print(f"perplexity     {result.perplexity:.4f}")
        print(f"loss           {result.loss:.4f} nats per token")
        print(f"tokens         {result.tokens:,}")
        print(f"bytes          {result.bytes:,}")


@dataclass(frozen=True)
class Export:
    """Write a model as a Hugging Face folder, with its adapter merged if it has one."""

    model: str  # a run, a checkpoint or a Hugging Face folder
    out: Path  # folder to write, new or empty
    adapter: str | None = None  # folder of an adapter to merge

    def execute(self, checkpoint: Checkpoint | None) -> None:
        config = jobs.export(self.model, self.out, adapter=self.adapter)
        print(f"wrote {self.out}: {config.layers} layers of width {config.width}, vocabulary {config.vocab_size}")
        for path in sorted(self.out.iterdir()):
            print(f"  {path.name:28} {path.stat().st_size:>14,} bytes")
