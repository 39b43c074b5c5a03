"""Models, a text and a command line that are small enough for a test of a second."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fmcore import cli
from fmcore.models.decoder import PRESETS, Config
from fmcore.train.schedule import Schedule

ROOT = Path(__file__).resolve().parent.parent
CONFIG = replace(PRESETS["demo"], vocab_size=257, layers=2, width=32, heads=2, ffn=64, context=64)
# One of each family, with sizes that differ wherever they may.
GPT2 = Config(
    vocab_size=40,
    layers=2,
    width=24,
    heads=3,
    ffn=64,
    context=16,
    norm="layer",
    norm_eps=1e-5,
    activation="gelu_tanh",
    positions="learned",
    bias=True,
    tied=True,
)
LLAMA = Config(vocab_size=40, layers=2, width=24, heads=4, kv_heads=2, ffn=40, context=16)
QWEN3 = replace(LLAMA, head_dim=8, kv_heads=1, qk_norm=True, tied=True)
MISTRAL = replace(LLAMA, window=3)
TRAIN = ["--seq-len", "32", "--batch-size", "2", "--warmup", "2"]
MODEL = ["--layers", "2", "--width", "32", "--heads", "2", "--ffn", "64", "--lr", "0.01", *TRAIN]


def write_text(path: Path, lines: int = 150) -> Path:
    """Some kB of text that is not all alike."""
    functions = (f"def f{i}(x):\n    return x * {i * i} + {i % 7}" for i in range(lines))
    path.write_text("\n".join(functions), encoding="utf-8")
    return path


def _on_cpu(words: tuple[object, ...]) -> list[str]:
    """What tests compare step by step and bit by bit holds on a CPU, also on a machine with a GPU."""
    command, *rest = [*map(str, words)] or [""]
    takes_device = command in ("pretrain", "finetune", "generate", "evaluate", "demo") and "--device" not in rest
    return [command, *["--device=cpu"] * takes_device, *rest] if words else []


def fmcore(*words: object) -> int:
    """One command line in this process; its exit code."""
    return cli.main(_on_cpu(words))


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """Run a command line that must fail as people expect: code 2 and one line, which is returned."""
    capsys.readouterr()
    code = fmcore(*words)
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.startswith("fmcore: ") and said.count("\n") == 1 and said.endswith("\n"), said
    assert "Traceback" not in said
    return said.removeprefix("fmcore: ").rstrip("\n")


def process(*words: object) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a process of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env.pop("TRITON_INTERPRET", None)
    return [sys.executable, "-m", "fmcore", *_on_cpu(words)], env


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, to tell whether something changed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lr_scale(step: int, total: int, **schedule: object) -> float:
    """The factor on the learning rate at ``step`` of ``total``, under ``Schedule(**schedule)``."""
    return Schedule(**schedule).scale(step, total)


def losses(run: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]
