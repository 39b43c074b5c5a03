"""The whole life of a small foundation model, on this machine, with nothing to download.

Pre-train a decoder on the source of Python's standard library, sample from it, adapt it to English prose with a LoRA
adapter while the base stays frozen, sample again, and measure all of it in bits per byte on text that was held out.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fmcore.adapt.lora import LoraConfig, adapter_size, add_lora, lora_off
from fmcore.adapt.peft import WEIGHTS as ADAPTER_WEIGHTS
from fmcore.adapt.peft import save_adapter
from fmcore.arguments import prog
from fmcore.data.corpus import read_documents, split_documents
from fmcore.data.packing import Batch, Loader, held_out_batches
from fmcore.data.shards import build_shards
from fmcore.data.tokenizer import BPETokenizer, Tokenizer
from fmcore.device import pick_device, pick_dtype
from fmcore.errors import InputError
from fmcore.evaluate import evaluate
from fmcore.files import write_text
from fmcore.generate import SampleConfig, complete
from fmcore.load import build, config_from_dict, tokenizer_of
from fmcore.models.decoder import PRESETS, Decoder
from fmcore.train.checkpoint import Checkpoint, checkpoints, load_checkpoint
from fmcore.train.loop import Outcome, TrainOptions, train
from fmcore.train.report import plot_loss, write_report

CODE_PROMPTS = ("", "class Reader:\n    def __init__(self", "import os\n\ndef ")
PROSE_PROMPTS = ("", "The ", "When a function is called, ")


@dataclass(frozen=True)
class DemoOptions:
    """The demo. Every default works; with the same ``steps`` and ``seed`` a machine repeats itself."""

    run: Path = Path("runs/demo")  # folder for everything it makes
    seconds: float = 180.0  # of pre-training; the steps that fit are measured first
    steps: int = 0  # of pre-training; 0: as many as fit into seconds
    adapt_steps: int = 0  # of adaptation, half as large; 0: half as many as of pre-training
    eval_tokens: int = 49152  # tokens of each held-out text in the final table
    seed: int = 0
    device: str = "auto"  # auto: cuda if there is a GPU, else cpu
    resume: bool = False  # go on with a pre-training that was stopped

    def __post_init__(self) -> None:
        for name in ("seconds", "eval_tokens"):
            if not getattr(self, name) > 0:
                raise InputError(f"demo: {name} must be above 0, got {getattr(self, name)}")
        for name in ("steps", "adapt_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"demo: {name} must be 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class Recipe:
    """What suits a kind of machine."""

    preset: str
    vocab_size: int
    train: TrainOptions
    adapt_lr: float
    most_epochs: float  # over the training text


CPU = Recipe(
    "demo",
    2048,
    TrainOptions(batch_size=16, seq_len=256, lr=4e-3, min_ratio=0.02, beta2=0.99, eval_every=100, save_every=0, keep=1),
    adapt_lr=8e-3,
    most_epochs=4.0,
)
GPU = Recipe(
    "demo-gpu",
    4096,
    TrainOptions(
        batch_size=64, seq_len=512, lr=1.5e-3, min_ratio=0.02, beta2=0.99, eval_every=200, save_every=0, keep=1
    ),
    adapt_lr=2e-3,
    most_epochs=10.0,
)


@dataclass(frozen=True)
class Texts:
    """Training loaders and held-out batches of both domains, and bytes behind each token id."""

    code: Loader
    prose: Loader
    held_out: dict[str, Sequence[Batch]]  # small, for inside the training
    final: dict[str, Sequence[Batch]]  # larger, for the table
    token_bytes: Tensor


def prepare_texts(run: Path, tokenizer: Tokenizer, options: DemoOptions, recipe: TrainOptions) -> Texts:
    """Tokenize both corpora into shards under ``run``."""
    B, T = recipe.batch_size, recipe.seq_len
    code, held_code = build_shards("stdlib", tokenizer, run / "data" / "code")
    prose, held_prose = build_shards("topics", tokenizer, run / "data" / "prose", held_out=0.2)
    held = {"code": held_code, "prose": held_prose}

    def some(tokens: int) -> dict[str, Sequence[Batch]]:
        return {name: list(held_out_batches(shard, B, T, tokens)) for name, shard in held.items()}

    return Texts(
        Loader(code, B, T, options.seed),
        Loader(prose, max(1, B // 2), T, options.seed),
        some(8192),
        some(options.eval_tokens),
        torch.from_numpy(tokenizer.token_bytes()),
    )


def steps_that_fit(make: Callable[[], Decoder], loader: Loader, recipe: Recipe, seconds: float) -> int:
    """How many steps of a throw-away model fit into ``seconds``, within the recipe's epochs; a multiple of 10."""
    model, before = make(), loader.state_dict()
    with_timing = replace(recipe.train, steps=20, eval_every=0)
    outcome = train(model, loader, with_timing, Path(), save=False, quiet=True)
    loader.load_state_dict(before)
    fit = seconds * outcome.speed["tokens_per_s"] / (loader.batch_size * loader.seq_len)
    most = recipe.most_epochs * loader.rows_per_epoch / loader.batch_size
    return max(100, int(min(fit, most)) // 10 * 10)


def set_aside(run: Path) -> Path | None:
    """Rename an earlier demo's folder to the next free name, so that nothing is lost."""
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return None
    if not run.is_dir():
        raise InputError(f"demo: run must be a folder, got the file {run}")
    if not (run / "metrics.jsonl").exists() and not checkpoints(run) and not (run / "data").is_dir():
        raise InputError(f"demo: run must be a new folder or that of an earlier demo, got {run} with other files")
    n = 1
    while (kept := run.with_name(f"{run.name}-{n}")).exists():
        n += 1
    run.rename(kept)
    return kept


def demo(options: DemoOptions, console: Console | None = None) -> dict[str, Any]:
    """Run it all; returns the figures of the report. Raises ``Interrupted`` like ``train``."""
    console = console or Console()
    began = time.monotonic()
    device = pick_device(options.device)
    recipe = GPU if device.type == "cuda" else CPU
    run = options.run
    found = load_checkpoint(run) if options.resume else None
    if found is not None:
        options = replace(options, seed=_seed_of(found))
    elif kept := set_aside(run):
        console.print(f"kept the earlier run as {kept}", highlight=False)
    base, tokenizer, texts, trained = _pretrain(options, recipe, device, found, console)
    scores = {
        "untrained": _scores(build(base.config, device, base.embed.weight.dtype, options.seed), texts),
        "base": _scores(base, texts),
    }
    samples = _samples(base, tokenizer, CODE_PROMPTS, "base", options.seed, console)
    adapted = _adapt(base, texts, options, recipe, trained.steps, console)
    scores["adapted"] = _scores(base, texts)
    with lora_off(base):
        scores["adapter off"] = _scores(base, texts)
    if scores["adapter off"] != scores["base"]:
        raise RuntimeError(
            f"demo: with the adapter off the base must score {scores['base']}, got {scores['adapter off']}"
        )
    samples |= _samples(base, tokenizer, PROSE_PROMPTS, "adapted", options.seed, console)
    write_text(run / "samples.txt", "\n\n".join(f"=== {name}\n{text}" for name, text in samples.items()) + "\n")
    facts = _facts(base, recipe, device, trained, adapted, run, time.monotonic() - began)
    plot_loss(run / "metrics.jsonl", run / "loss.png", title="fmcore demo")
    write_report(run, title="fmcore demo", facts=facts, scores=scores, samples=samples)
    _show(console, scores, facts, run)
    return {"facts": facts, "scores": scores}


def _seed_of(found: Checkpoint) -> int:
    about = found.state.get("demo")
    if not isinstance(about, dict) or type(about.get("seed")) is not int:
        raise InputError(f"{found.path}: wanted a checkpoint of the demo to resume, got one of another origin")
    return about["seed"]


def _pretrain(
    options: DemoOptions, recipe: Recipe, device: torch.device, found: Checkpoint | None, console: Console
) -> tuple[Decoder, Tokenizer, Texts, Outcome]:
    """Train the base, or go on with ``found``; returns it with its tokenizer, its texts and what training did."""
    run = options.run
    if found is not None:
        tokenizer = tokenizer_of(found)
        plan, config = TrainOptions(**found.state["options"]), config_from_dict(found.config, found.path)
    else:
        console.print("[bold]1[/] reading the standard library and training a tokenizer on it")
        training, _ = split_documents(read_documents("stdlib"))
        tokenizer = BPETokenizer.train((document.text for document in training), recipe.vocab_size)
        plan, config = recipe.train, replace(PRESETS[recipe.preset], vocab_size=tokenizer.vocab_size)
    texts = prepare_texts(run, tokenizer, options, plan)
    dtype = pick_dtype("auto", device)
    if found is None:
        steps = options.steps or steps_that_fit(
            lambda: build(config, device, dtype, options.seed), texts.code, recipe, options.seconds
        )
        plan = replace(plan, steps=steps, seed=options.seed)
    model = build(config, device, dtype, options.seed)
    params = sum(p.numel() for p in model.parameters())
    console.print(
        f"[bold]2[/] pre-training {params / 1e6:.2f} M parameters for {plan.steps} steps of "
        f"{plan.batch_size * plan.seq_len} tokens on {_device_name(device)}"
    )
    outcome = train(
        model,
        texts.code,
        plan,
        run,
        held_out={"code": texts.held_out["code"]},
        token_bytes=texts.token_bytes,
        tokenizer=tokenizer,
        resume=found,
        state={"demo": {"seed": options.seed}},
    )
    return model, tokenizer, texts, outcome


def _adapt(base: Decoder, texts: Texts, options: DemoOptions, recipe: Recipe, steps: int, console: Console) -> Outcome:
    """Put an adapter on ``base`` in place, train it on prose, save it."""
    add_lora(base, LoraConfig(rank=8, alpha=16.0), seed=options.seed)
    steps = options.adapt_steps or max(20, steps // 2)
    plan = replace(
        recipe.train,
        steps=steps,
        batch_size=texts.prose.batch_size,
        warmup=max(1, steps // 10),
        lr=recipe.adapt_lr,
        weight_decay=0.0,
        eval_every=max(10, -(-steps // 4)),
        seed=options.seed,
    )
    console.print(
        f"[bold]3[/] adapting to English prose: {adapter_size(base) / 1e3:.0f} k "
        f"adapter parameters on the frozen base, {steps} steps"
    )
    outcome = train(
        base,
        texts.prose,
        plan,
        options.run,
        phase="adapt",
        held_out=texts.held_out,
        token_bytes=texts.token_bytes,
        save=False,
    )
    save_adapter(base, options.run / "adapter", base=str(options.run))
    return outcome


def _scores(model: Decoder, texts: Texts) -> dict[str, float]:
    """Bits per byte of each text, on the batches of the final table."""
    return {name: evaluate(model, batches, texts.token_bytes).bits_per_byte for name, batches in texts.final.items()}


def _samples(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str], name: str, seed: int, console: Console
) -> dict[str, str]:
    """What ``model`` writes after each prompt, by heading; shown on the console as well."""
    config = SampleConfig(max_tokens=80, temperature=0.7, top_p=0.95, seed=seed)
    texts = complete(model, tokenizer, prompts, config)
    found = {}
    for prompt, text in zip(prompts, texts, strict=True):
        heading = f"{name}, prompt {prompt!r}" if prompt else f"{name}, no prompt"
        found[heading] = prompt + text
        console.rule(f"[bold]{name}[/] writes", align="left")
        console.print(prompt + text, markup=False, highlight=False)
    console.rule()
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _facts(
    model: Decoder, recipe: Recipe, device: torch.device, trained: Outcome, adapted: Outcome, run: Path, seconds: float
) -> dict[str, Any]:
    """The first table of the report."""
    adapter = adapter_size(model)
    size = (run / "adapter" / ADAPTER_WEIGHTS).stat().st_size
    return {
        "command": " ".join(["fmcore", *sys.argv[1:]]),
        "device": _device_name(device),
        "preset": recipe.preset,
        "parameters": sum(p.numel() for p in model.parameters()) - adapter,
        "adapter parameters": adapter,
        "adapter file": f"{size / 1000:.0f} kB",
        "pre-training": f"{trained.steps} steps, {trained.tokens:,} tokens",
        "adaptation": f"{adapted.steps} steps, {adapted.tokens:,} tokens",
        "tokens/s, pre-training": round(trained.speed.get("tokens_per_s", 0)),
        "tokens/s, adaptation": round(adapted.speed.get("tokens_per_s", 0)),
        "seconds in all": round(seconds),
    }


def _show(console: Console, scores: dict[str, dict[str, float]], facts: dict[str, Any], run: Path) -> None:
    """Print the scores, and where to look next."""
    table = Table(title="bits per byte on held-out text (lower is better)", title_justify="left")
    table.add_column("model")
    for name in scores["base"]:
        table.add_column(name, justify="right")
    for row, values in scores.items():
        table.add_row(row, *(f"{value:.3f}" for value in values.values()))
    console.print(table)
    change = 1 - scores["adapted"]["prose"] / scores["base"]["prose"]
    cost = scores["adapted"]["code"] / scores["base"]["code"] - 1
    console.print(
        f"adaptation lowered prose by {change:.1%} and raised code by {cost:.1%}; with the adapter off, the base is "
        "bit-identical",
        highlight=False,
    )
    console.print(
        f"{facts['seconds in all']} s in all. Look at {run / 'report.md'} and {run / 'loss.png'}; try\n"
        f"  {prog()} generate --model {run} --adapter {run / 'adapter'} --prompt 'The '",
        highlight=False,
        soft_wrap=True,
    )
