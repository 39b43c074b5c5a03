"""Is the demo's training step at least as fast as the same model written plainly? ``python -m benchmarks.demo``

Both models start from the same weights and read the same batches of the standard library; their optimizer steps take
turns, so that a noisy machine hits both alike. fmcore keeps documents apart and measures the gradient; the plain
model ignores boundaries, clips with torch's clip_grad_norm_ and steps with torch.optim.AdamW(fused=True). Before
anything is timed, both must agree on loss and gradient for a batch without a boundary. The last line printed is the
record as JSON; --out appends it to a file.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.plain import PlainDecoder
from benchmarks.timing import append, environment, ratio_interval
from fmcore.data.corpus import read_documents, split_documents
from fmcore.data.packing import Batch, Loader, pack
from fmcore.data.shards import build_shards
from fmcore.data.tokenizer import BPETokenizer
from fmcore.demo import CPU, GPU
from fmcore.device import pick_device, pick_dtype
from fmcore.models.decoder import PRESETS, Decoder
from fmcore.optim import AdamW, decay_groups


def fmcore_step(model: Decoder, optimizer: AdamW) -> Callable[[Batch], float]:
    def step(batch: Batch) -> float:
        loss = (
            model.loss(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, reduction="sum")
            / batch.n_targets
        )
        loss.backward()
        optimizer.step(clip=1.0)
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def plain_step(model: PlainDecoder, optimizer: torch.optim.AdamW) -> Callable[[Batch], float]:
    def step(batch: Batch) -> float:
        loss = model(batch.tokens, batch.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def check_equal(ours: Decoder, plain: PlainDecoder, batch: Batch) -> float:
    """Largest relative deviation of loss and gradients on one segment a row; ``RuntimeError`` if it is not rounding."""
    rows = torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1).numpy()
    whole = pack(rows, end=-1).to(batch.tokens.device)
    losses = (
        ours.loss(whole.tokens, whole.targets, whole.positions, whole.cu_seqlens),
        plain(whole.tokens, whole.targets),
    )
    for loss in losses:
        loss.backward()
    worst = abs(1 - losses[0].item() / losses[1].item())
    for name, p in plain.named_parameters():
        mine = ours.get_parameter(name).grad
        worst = max(worst, ((mine - p.grad).norm() / p.grad.norm()).item())
    for model in (ours, plain):
        model.zero_grad(set_to_none=True)
    if worst > (1e-3 if losses[0].dtype == torch.float32 and batch.tokens.device.type == "cpu" else 5e-2):
        raise RuntimeError(f"the two models must agree before they are timed, but differ by {worst:.1e}")
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each model")
    parser.add_argument("--warmup", type=int, default=5, help="steps of each that are not counted")
    parser.add_argument("--device", default="auto", help="auto | cpu | cuda")
    parser.add_argument("--out", type=Path, help="append the record to this JSON-lines file")
    args = parser.parse_args()
    device = pick_device(args.device)
    recipe, dtype = (GPU if device.type == "cuda" else CPU), pick_dtype("auto", device)
    training, _ = split_documents(read_documents("stdlib"))
    tokenizer = BPETokenizer.train((document.text for document in training), recipe.vocab_size)
    config = replace(PRESETS[recipe.preset], vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    ours, plain = Decoder(config).to(device, dtype), PlainDecoder(config).to(device, dtype)
    plain.load_state_dict(ours.state_dict())
    options = recipe.train
    steps = {
        "fmcore": fmcore_step(ours, AdamW(decay_groups(ours, 0.1), lr=1e-4, betas=(0.9, 0.95))),
        "plain": plain_step(plain, torch.optim.AdamW(decay_groups(plain, 0.1), lr=1e-4, betas=(0.9, 0.95), fused=True)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        shard, _ = build_shards("stdlib", tokenizer, folder)
        loader = Loader(shard, options.batch_size, options.seq_len, seed=0)
        deviation = check_equal(ours, plain, loader.next_batch().to(device))
        for i in range(args.warmup + args.steps):
            batch = loader.next_batch().to(device)
            for name in sorted(steps, reverse=bool(i % 2)):
                began = time.perf_counter()
                losses[name] = steps[name](batch)
                times[name].append(time.perf_counter() - began)
    times = {name: seconds[args.warmup :] for name, seconds in times.items()}
    tokens = options.batch_size * options.seq_len
    median, low, high = ratio_interval(times["fmcore"], times["plain"])
    record = {
        "benchmark": "demo",
        **environment(device),
        "preset": recipe.preset,
        "vocab_size": config.vocab_size,
        "dtype": str(dtype)[6:],
        "tokens_per_step": tokens,
        "steps": args.steps,
        "tokens_per_s": {name: round(tokens / statistics.median(seconds)) for name, seconds in times.items()},
        "speedup": round(median, 3),
        "speedup_95": [round(low, 3), round(high, 3)],
        "deviation": deviation,
        "last_loss": losses,
    }
    for name, rate in record["tokens_per_s"].items():
        print(f"{name:8s} {rate:8,d} tokens/s (median of {args.steps} steps)")
    print(f"fmcore / plain: {median:.3f}, 95 % interval {low:.3f} to {high:.3f}")
    print(json.dumps(record))
    if args.out:
        append(args.out, record)


if __name__ == "__main__":
    main()
