"""The training loop: a run that was split repeats the whole one bit by bit, and what it writes is what it promises."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CONFIG, losses, lr_scale, write_text

from fmcore.adapt.lora import LoraConfig, adapter_parameters, add_lora, base_state_dict
from fmcore.data.packing import Loader, held_out_batches
from fmcore.data.shards import build_shards
from fmcore.data.tokenizer import ByteTokenizer
from fmcore.errors import InputError
from fmcore.models.decoder import Decoder
from fmcore.train import loop
from fmcore.train.checkpoint import checkpoints, load_checkpoint
from fmcore.train.loop import TrainOptions, train
from fmcore.train.metrics import read_metrics, step_flops

OPTIONS = TrainOptions(steps=20, batch_size=2, seq_len=32, lr=0.01, warmup=3, eval_every=0, save_every=0)
BYTES = torch.from_numpy(ByteTokenizer().token_bytes())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return build_shards(str(write_text(folder / "text.txt")), ByteTokenizer(), folder / "shards", held_out=0.1)


def loader(shards, options: TrainOptions = OPTIONS) -> Loader:
    return Loader(shards[0], options.batch_size, options.seq_len, options.seed)


def model(lora: LoraConfig | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    torch.manual_seed(1)
    fresh = Decoder(CONFIG).to(dtype)
    return fresh if lora is None else add_lora(fresh, lora, seed=2)


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and random state of the newest checkpoint."""
    found = load_checkpoint(run)
    return {**found.model, **{f"optimizer {name}": t for name, t in found.optimizer.items()}}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


SPLITS = {
    "plain": ({}, None),
    "accumulate": ({"accumulate": 2}, None),
    "wsd": ({"schedule": "wsd", "decay_fraction": 0.5}, None),
    "bfloat16": ({"dtype": "bfloat16"}, None),
    "lion": ({"optimizer": "lion", "lr": 0.002}, None),
    "muon": ({"optimizer": "muon"}, None),
    # Dropout draws from the random state that the checkpoint has to carry.
    "lora": ({"weight_decay": 0.0}, LoraConfig(rank=4, dropout=0.3)),
}


@pytest.mark.parametrize("change, lora", SPLITS.values(), ids=SPLITS)
def test_twenty_steps_equal_ten_resumed_and_ten(shards, tmp_path, change, lora):
    options = replace(OPTIONS, **change)
    dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    straight = train(model(lora, dtype), loader(shards, options), options, whole)
    first = train(model(lora, dtype), loader(shards, options), options, parts, stop_after=10)
    assert (first.steps, straight.steps) == (10, 20) and checkpoints(parts)[0].name == "step-00000010"
    # Nothing of the first process survives: another model, another loader, another random state.
    torch.manual_seed(777)
    rest = model(lora, dtype)
    with torch.no_grad():
        for p in rest.parameters():
            if p.requires_grad:
                p.add_(1.0)
    resumed = train(rest, loader(shards, options), options, parts, resume=load_checkpoint(parts))
    assert (resumed.steps, resumed.tokens, resumed.loss) == (20, straight.tokens, straight.loss)
    assert_same(state(whole), state(parts))
    for name in ("loss", "lr", "grad_norm", "tokens", "step"):
        assert losses(whole, name) == losses(parts, name)
    assert load_checkpoint(whole).state == load_checkpoint(parts).state


def test_resuming_drops_what_came_after_the_checkpoint(shards, tmp_path):
    train(model(), loader(shards), replace(OPTIONS, save_every=8, keep=5), tmp_path / "a")
    found = load_checkpoint(tmp_path / "a" / "checkpoints" / "step-00000008")
    before = losses(tmp_path / "a")
    train(model(), loader(shards), OPTIONS, tmp_path / "a", resume=found)
    assert losses(tmp_path / "a") == before and losses(tmp_path / "a", "step") == list(range(1, 21))


def test_accumulation_equals_one_large_batch(shards, tmp_path):
    """Four rows at once, or twice two of them; rows of different value, so that a plain mean of means would differ."""
    whole, parts = model(), model()
    one = replace(OPTIONS, steps=4, warmup=1, batch_size=4)
    train(whole, loader(shards, one), one, tmp_path / "one")
    two = replace(one, batch_size=2, accumulate=2)
    train(parts, loader(shards, two), two, tmp_path / "two")
    assert np.allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5)
    assert losses(tmp_path / "one", "tokens") == losses(tmp_path / "two", "tokens")
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_accumulation_counts_tokens_not_batches(shards, tmp_path):
    """A batch with few targets weighs as much as its targets."""
    options = replace(OPTIONS, steps=1, warmup=0, batch_size=2, accumulate=2)
    batches = [loader(shards).next_batch(), loader(shards).next_batch()]
    batches[1].targets[:, 5:] = -100
    batches[1] = replace(batches[1], n_targets=10)
    net, given = model(), iter(batches)
    each = [net.loss(b.tokens, b.targets, b.positions, b.cu_seqlens, reduction="sum").item() for b in batches]
    source = loader(shards)
    source.next_batch = lambda: next(given)
    outcome = train(net, source, options, tmp_path, save=False)
    assert outcome.loss == pytest.approx(sum(each) / (64 + 10), rel=1e-5) and outcome.tokens == 74


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_and_keeps_what_was_saved(shards, tmp_path, bad):
    class Spoiled(Decoder):
        calls = 0

        def loss(self, *args, **options):
            self.calls += 1
            return super().loss(*args, **options) * (bad if self.calls > 7 else 1.0)

    torch.manual_seed(1)
    with pytest.raises(InputError, match="loss must be finite, got (nan|inf) at step 8; .* resume from there") as error:
        train(Spoiled(CONFIG), loader(shards), replace(OPTIONS, save_every=5), tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]
    assert losses(tmp_path, "step") == list(range(1, 8))
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path).model.values())
    train(model(), loader(shards), OPTIONS, tmp_path, resume=load_checkpoint(tmp_path))
    assert losses(tmp_path, "step") == list(range(1, 21))


def test_weights_that_a_bad_gradient_spoiled_are_not_saved(shards, tmp_path):
    class Spoiled(Decoder):
        calls = 0

        def loss(self, *args, **options):
            self.calls += 1
            found = super().loss(*args, **options)
            # sqrt(0) is 0, its gradient times 0 is not a number.
            return found if self.calls < 10 else found + (self.norm.weight * 0).sqrt().sum()

    torch.manual_seed(1)
    with pytest.raises(InputError, match="grad_norm must be finite, got nan at step 10"):
        train(Spoiled(CONFIG), loader(shards), replace(OPTIONS, save_every=5), tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]


@pytest.mark.parametrize("save", [True, False])
def test_a_signal_says_whether_it_saved(shards, tmp_path, save):
    class Stopped(Decoder):
        def loss(self, *args, **options):
            signal.raise_signal(signal.SIGINT)
            return super().loss(*args, **options)

    with pytest.raises(loop.Interrupted, match="stopped after step 1, saved in" if save else "step 1, not saved") as e:
        train(Stopped(CONFIG), loader(shards), OPTIONS, tmp_path, save=save)
    assert e.value.code == 130 and bool(checkpoints(tmp_path)) is save


def test_looks_and_saves_when_asked(shards, tmp_path, capsys):
    held = list(held_out_batches(shards[1], 2, 32))
    texts, asked = iter(f"sample {i}" for i in range(99)), []

    def sample() -> str:
        asked.append(net.training)
        return next(texts)

    net = model()
    options = replace(OPTIONS, eval_every=6, sample_every=8, save_every=7, keep=9)
    outcome = train(
        net,
        loader(shards),
        options,
        tmp_path,
        held_out={"text": held},
        token_bytes=BYTES,
        sample=sample,
        phase="first",
        tokenizer=ByteTokenizer(),
        state={"note": 3},
    )
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "bits_per_byte" in r] == [6, 12, 18, 20]
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["20", "14", "07"]
    said = capsys.readouterr().out
    assert "--- step 8\nsample 0\n---" in said and "--- step 16\nsample 1\n---" in said and len(asked) == 2
    assert net.training, "evaluation must leave a model that trains"
    assert outcome.checkpoint == checkpoints(tmp_path)[0] and load_checkpoint(tmp_path).state["note"] == 3
    assert (outcome.checkpoint / "tokenizer").is_dir()
    bits = [r["bits_per_byte"]["text"] for r in records if "bits_per_byte" in r]
    assert bits[-1] < bits[0] < 9


def test_looks_and_saves_when_asked_on_a_gpu(shards, tmp_path, monkeypatch):
    """Where the loss is read every fourth step only, the other intervals hold all the same, and so does the clock."""
    monkeypatch.setattr(loop, "LOG_EVERY", {"cpu": 4})
    held = list(held_out_batches(shards[1], 2, 32))
    options = replace(OPTIONS, eval_every=6, sample_every=9, save_every=7, keep=9)
    more = {"held_out": {"text": held}, "token_bytes": BYTES, "sample": lambda: "text"}
    train(model(), loader(shards), options, tmp_path, **more)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "bits_per_byte" in r] == [6, 12, 18, 20]
    assert [path.name[-2:] for path in checkpoints(tmp_path)] == ["20", "14", "07"]
    # Read too: the steps before the meter counts, and those after which it pauses.
    assert [r["step"] for r in records] == [1, 2, 4, 6, 7, 8, 9, 12, 14, 16, 18, 20]


def test_looking_and_sampling_change_nothing(shards, tmp_path):
    lora = LoraConfig(rank=4, dropout=0.3)
    held = {"text": list(held_out_batches(shards[1], 2, 32))}
    train(model(lora), loader(shards), OPTIONS, tmp_path / "a")
    options = replace(OPTIONS, eval_every=2, sample_every=3, save_every=4)
    train(model(lora), loader(shards), options, tmp_path / "b", held_out=held, token_bytes=BYTES, sample=lambda: "text")
    assert_same(state(tmp_path / "a"), state(tmp_path / "b"))


def test_metrics_say_what_was_promised(shards, tmp_path):
    train(model(), loader(shards), OPTIONS, tmp_path, save=False)
    records = read_metrics(tmp_path / "metrics.jsonl")
    for i, record in enumerate(records):
        assert record["phase"] == "pretrain" and record["step"] == i + 1 and record["tokens"] == 64 * (i + 1)
        assert record["lr"] == pytest.approx(0.01 * lr_scale(i, 20, warmup=3, min_ratio=0.05))
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0 and record["memory_gib"] > 0
    # The first two steps are warming up; an unknown device has no MFU rather than a wrong one.
    assert all(record["tokens_per_s"] > 0 and record["tflops"] > 0 for record in records[2:])
    assert not any("mfu" in record or "mfu_full" in record for record in records)
    assert records[-1]["loss"] < records[0]["loss"]
    assert not checkpoints(tmp_path)


def test_a_known_peak_gives_both_kinds_of_mfu(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Meter", lambda peak, device: Meter(peak=1e12, device=device))
    from fmcore.train.metrics import Meter

    train(model(), loader(shards), OPTIONS, tmp_path, save=False)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    # Causal and document-aware counts fewer pairs than the PaLM convention.
    assert 0 < last["mfu"] < last["mfu_full"] and last["mfu"] == pytest.approx(last["tflops"])
    flops = step_flops(CONFIG, 2, 32, None)
    assert flops.exact < flops.full


def test_an_adapter_trains_alone(shards, tmp_path):
    net = model(LoraConfig(rank=4))
    base = {name: t.clone() for name, t in base_state_dict(net).items()}
    before = {name: p.detach().clone() for name, p in adapter_parameters(net).items()}
    train(net, loader(shards), replace(OPTIONS, weight_decay=0.0), tmp_path)
    assert_same(base, base_state_dict(net))
    assert all(not torch.equal(before[name], p) for name, p in adapter_parameters(net).items())
    saved = load_checkpoint(tmp_path)
    assert saved.model.keys() == before.keys(), "a checkpoint of an adapter holds no base"
    assert not any(name in key for key in saved.optimizer for name in base)


def test_a_checkpoint_of_another_run_is_refused(shards, tmp_path):
    train(model(), loader(shards), replace(OPTIONS, steps=4), tmp_path)
    found = load_checkpoint(tmp_path)
    other = replace(CONFIG, width=48)
    with pytest.raises(InputError, match=r"must be \(257, 48\), got \(257, 32\)"):
        train(Decoder(other), loader(shards), OPTIONS, tmp_path / "b", resume=found)
    with pytest.raises(InputError, match="tensors must be those of this model, but differ in layers.2"):
        train(Decoder(replace(CONFIG, layers=3)), loader(shards), OPTIONS, tmp_path / "b", resume=found)
    with pytest.raises(InputError, match="seed differs"):
        train(model(), Loader(shards[0], 2, 32, 5), OPTIONS, tmp_path / "b", resume=found)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"lr": math.inf}, "lr must be above 0"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, lion, muon, got 'sgd'"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"save_every": -1}, "save_every must be 0 or more"),
        ({"beta2": 1.5}, "beta2 must be within"),
        ({"warmup": 30}, "30 of warm-up do not fit into 20 steps"),
        ({"min_ratio": 2.0}, "min_ratio must be within"),
    ],
)
def test_options_are_checked(change, wanted):
    with pytest.raises(InputError, match=wanted.replace("(", r"\(")):
        replace(OPTIONS, **change)


def test_tensorboard_gets_the_same_numbers(shards, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    train(model(), loader(shards), replace(OPTIONS, steps=5, tensorboard=True), tmp_path, save=False)
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert np.allclose([point.value for point in board.Scalars("pretrain/loss")], losses(tmp_path))


def test_a_quiet_run_writes_nothing(shards, tmp_path, capsys):
    outcome = train(model(), loader(shards), replace(OPTIONS, steps=5), tmp_path, save=False, quiet=True)
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == "" and outcome.steps == 5
    json.dumps(outcome.speed)
