"""The demo on a small budget, end to end: everything it promises to leave behind is there and says the same."""

import json
import shutil

import pytest
import torch

from fmcore import demo as demo_file
from fmcore.demo import DemoOptions, demo, set_aside
from fmcore.errors import InputError
from fmcore.load import load
from fmcore.train.checkpoint import checkpoints, read_safetensors
from fmcore.train.loop import Interrupted
from fmcore.train.metrics import read_metrics

STEPS, ADAPT = 12, 6


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A demo of a few steps; its figures and its folder."""
    run = tmp_path_factory.mktemp("demo") / "run"
    return demo(DemoOptions(run=run, steps=STEPS, adapt_steps=ADAPT, eval_tokens=2048, device="cpu")), run


def test_every_file_is_there(small):
    _, run = small
    for name in (
        "metrics.jsonl",
        "samples.txt",
        "loss.png",
        "report.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ):
        assert (run / name).stat().st_size > 0, name
    (checkpoint,) = checkpoints(run)
    assert checkpoint.name == f"step-{STEPS:08d}"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "adapter/adapter_model.safetensors").stat().st_size < 600_000


def test_metrics_hold_both_phases(small):
    _, run = small
    records = read_metrics(run / "metrics.jsonl")
    assert [(r["phase"], r["step"]) for r in records] == (
        [("pretrain", i + 1) for i in range(STEPS)] + [("adapt", i + 1) for i in range(ADAPT)]
    )
    assert all({"loss", "lr", "grad_norm", "tokens", "memory_gib"} <= r.keys() for r in records)
    assert {"tokens_per_s", "tflops"} <= records[-1].keys()
    assert records[-1]["bits_per_byte"].keys() == {"code", "prose"}


def test_scores_move_as_they_should(small):
    scores = small[0]["scores"]
    assert scores["base"]["code"] < scores["untrained"]["code"]
    assert scores["adapted"]["prose"] < scores["base"]["prose"]
    assert scores["adapter off"] == scores["base"]


def test_report_shows_the_same_figures(small):
    figures, run = small
    report = (run / "report.md").read_text()
    for row in figures["scores"].values():
        assert all(f"{value:.3f}" in report for value in row.values())
    assert "loss.png" in report and "## Samples" in report


def test_the_saved_model_and_adapter_are_the_ones_that_were_scored(small):
    _, run = small
    base = load(run, device="cpu")
    adapted = load(run, adapter=run / "adapter", device="cpu")
    tokens = torch.arange(32).reshape(1, 32)
    with torch.no_grad():
        assert not torch.equal(base.model(tokens), adapted.model(tokens))
    names = read_safetensors(run / "adapter/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in names)


def test_an_earlier_run_is_kept(small, tmp_path):
    run = tmp_path / "demo"
    shutil.copytree(small[1], run)
    assert set_aside(run) == tmp_path / "demo-1" and not run.exists()
    assert json.loads((tmp_path / "demo-1/metrics.jsonl").read_text().splitlines()[0])["step"] == 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="other files"):
        demo(DemoOptions(run=tmp_path, steps=1))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_stopped_demo_goes_on(tmp_path, monkeypatch, small):
    """Stopped after 5 steps and resumed, pre-training ends with the weights of the demo that ran through."""
    run = tmp_path / "demo"
    options = DemoOptions(run=run, steps=STEPS, adapt_steps=ADAPT, eval_tokens=2048, device="cpu")
    real = demo_file.train

    def stopped(*args, **kwargs):
        real(*args, **kwargs, stop_after=5)
        raise Interrupted(run, 5, 2)

    monkeypatch.setattr(demo_file, "train", stopped)
    with pytest.raises(Interrupted):
        demo(options)
    monkeypatch.setattr(demo_file, "train", real)
    again = demo(DemoOptions(run=run, adapt_steps=ADAPT, eval_tokens=2048, device="cpu", resume=True))
    assert again["scores"] == small[0]["scores"]
    whole, parts = (read_safetensors(checkpoints(r)[0] / "model.safetensors") for r in (small[1], run))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("field, value", [("seconds", 0.0), ("eval_tokens", 0), ("steps", -1), ("adapt_steps", -1)])
def test_options_are_checked(field, value):
    with pytest.raises(InputError, match=f"demo: {field} must be"):
        DemoOptions(**{field: value})
