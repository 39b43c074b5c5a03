"""Bad input: one line that names the thing, what was wanted and what came; exit code 2; nothing lost."""

import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MODEL, TRAIN, files, fmcore, losses, process, refused, write_text

from fmcore import jobs
from fmcore.data.shards import build_shards
from fmcore.data.tokenizer import BPETokenizer, ByteTokenizer
from fmcore.train.checkpoint import checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """text.txt, a run, an adapter on it, and a Hugging Face folder: none of the tests below may change them."""
    folder = tmp_path_factory.mktemp("made")
    text = write_text(folder / "text.txt")
    assert fmcore("pretrain", "--run", folder / "run", "--data", text, "--steps", 6, "--save-every", 3, *MODEL) == 0
    assert (
        fmcore("finetune", "--model", folder / "run", "--run", folder / "tuned", "--data", text, "--steps", 3, *TRAIN)
        == 0
    )
    assert fmcore("export", "--model", folder / "run", "--out", folder / "hf") == 0
    return folder


@pytest.fixture
def own(made, tmp_path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def cut(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def pretrain(data: object, run: Path, *more: object) -> list[object]:
    return ["pretrain", "--data", data, "--run", run, "--steps", 4, *MODEL, *more]


# What a person points at as text.


def test_missing_data(tmp_path, capsys):
    said = refused(capsys, *pretrain(tmp_path / "nowhere.txt", tmp_path / "run"))
    assert f"{tmp_path / 'nowhere.txt'}: no such file or folder; wanted" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content, wanted",
    [
        (b"", "wanted text, got none"),
        (b" \n\n ", "wanted text, got none"),
        (b"ab\xffcd", "byte 0xff at 2"),
        (b"ab\0cd", "a binary file (a zero byte at 2)"),
    ],
)
def test_a_file_that_is_no_text(tmp_path, capsys, content, wanted):
    data = tmp_path / "data.txt"
    data.write_bytes(content)
    said = refused(capsys, *pretrain(data, tmp_path / "run"))
    assert str(data) in said and wanted in said


@pytest.mark.parametrize(
    "content, wanted",
    [
        ('{"text": "a"}\n{"txt": "b"}', ":2: wanted a JSON object with a text in field 'text', got the fields ['txt']"),
        ('{"text": "a"}\n{"text"', ":2: wanted a JSON object"),
        ('{"text": 3}', ":1: wanted a JSON object with a text in field 'text', got a int"),
    ],
)
def test_bad_json_lines(tmp_path, capsys, content, wanted):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    assert f"{data}{wanted}" in refused(capsys, *pretrain(data, tmp_path / "run"))


def test_an_empty_folder(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    said = refused(capsys, *pretrain(tmp_path / "data", tmp_path / "run"))
    assert f"{tmp_path / 'data'}: wanted a folder with text files, got an empty one" in said


def test_a_corpus_shorter_than_one_sequence(tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text("one line\nand another\n")
    said = refused(capsys, *pretrain(data, tmp_path / "run"))
    assert "wanted at least seq_len + 1 = 33 tokens, got" in said and "shorter seq_len" in said


@pytest.fixture
def shards(tmp_path) -> Path:
    build_shards(str(write_text(tmp_path / "text.txt")), ByteTokenizer(), tmp_path / "shards")
    return tmp_path / "shards"


def foreign(path: Path) -> None:
    path.write_bytes(b"NOTOURS\0" + path.read_bytes()[8:])


def newer(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + struct.pack("<I", 9) + data[12:])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    "damage, wanted",
    [
        (cut, "truncated"),
        (foreign, "wanted a token shard (first bytes"),
        (newer, "wanted shard version 1, got 9"),
        (flipped, "damaged"),
        (Path.unlink, "wanted a token shard, got No such file"),
    ],
)
def test_damaged_shards(shards, tmp_path, capsys, damage, wanted):
    assert fmcore(*pretrain(shards, tmp_path / "good")) == 0
    damage(shards / "train.shard")
    before = files(shards)
    said = refused(capsys, *pretrain(shards, tmp_path / "run"))
    assert str(shards / "train.shard") in said and wanted in said
    assert files(shards) == before


def test_shards_of_another_tokenizer(shards, tmp_path, capsys):
    BPETokenizer.train([(tmp_path / "text.txt").read_text()], 300).save(tmp_path / "bpe")
    said = refused(capsys, *pretrain(shards, tmp_path / "run", "--tokenizer", tmp_path / "bpe"))
    assert "wanted ids of the tokenizer" in said and "(vocabulary 300), got ids of" in said


def test_token_ids_beyond_the_vocabulary(own, capsys):
    """A model whose vocabulary is smaller than that of its tokenizer."""
    config = json.loads((own / "hf" / "config.json").read_text())
    tensors = load_file(own / "hf" / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, own / "hf" / "model.safetensors", {"format": "pt"})
    (own / "hf" / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    said = refused(capsys, "generate", "--model", own / "hf")
    assert f"{own / 'hf'}: the tokenizer must have at most vocab_size=100 ids like the model, got 257" in said


def test_a_tokenizer_that_does_not_fit_the_checkpoint(own, capsys):
    BPETokenizer.train([(own / "text.txt").read_text()], 300).save(own / "hf")
    assert "the tokenizer must have at most vocab_size=257 ids" in refused(capsys, "generate", "--model", own / "hf")
    newest = checkpoints(own / "run")[0]
    for old in checkpoints(own / "run")[1:]:
        shutil.rmtree(old)
    BPETokenizer.train([(own / "text.txt").read_text()], 300).save(newest / "tokenizer")
    assert "tokenizer" in refused(capsys, "generate", "--model", own / "run")


@pytest.mark.parametrize("content", ["{}", "[1]", '{"model": ', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_tokenizer_file_that_is_none(made, tmp_path, capsys, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    said = refused(capsys, *pretrain(made / "text.txt", tmp_path / "run", "--tokenizer", path))
    assert str(path) in said


# Checkpoints, adapters, Hugging Face folders.


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_truncated_checkpoint(own, capsys, name):
    newest, older = checkpoints(own / "run")
    cut(newest / name)
    before = files(own)
    capsys.readouterr()
    # The newest one that is whole serves, and a line says so.
    if name != "optimizer.safetensors":
        assert fmcore("generate", "--model", own / "run", "--max-tokens", 3) == 0
        said = capsys.readouterr().err
        assert said.startswith(f"fmcore: warning: {newest / name}: ") and f"trying the older {older.name}\n" in said
        assert said.count("\n") == 1
        assert str(newest / name) in refused(capsys, "generate", "--model", newest)
    cut(older / name)
    before = files(own)
    capsys.readouterr()
    assert fmcore("pretrain", "--run", own / "run", "--resume", "--steps", 8) == 2
    warning, said = capsys.readouterr().err.splitlines()
    assert warning.startswith("fmcore: warning: ") and said.startswith("fmcore: ")
    assert "none of its 2 checkpoints can be used" in said and str(older / name) in said
    assert files(own) == before


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_truncated_adapter(own, capsys, name):
    cut(own / "tuned" / "adapter" / name)
    said = refused(capsys, "generate", "--model", own / "run", "--adapter", own / "tuned" / "adapter")
    assert str(own / "tuned" / "adapter" / name) in said


def test_no_adapter(made, capsys):
    said = refused(capsys, "generate", "--model", made / "run", "--adapter", made / "hf")
    assert str(made / "hf" / "adapter_config.json") in said


def test_an_adapter_for_other_shapes(made, tmp_path, capsys):
    wide = [{"32": "48", "64": "96"}.get(word, word) for word in MODEL]
    assert fmcore("pretrain", "--run", tmp_path / "wide", "--data", made / "text.txt", "--steps", 3, *wide) == 0
    said = refused(capsys, "generate", "--model", tmp_path / "wide", "--adapter", made / "tuned" / "adapter")
    assert str(made / "tuned" / "adapter") in said and "must be (8, 96) floating, got (8, 64)" in said


def test_an_adapter_whose_base_has_gone(own, tmp_path, capsys):
    words = ["finetune", "--model", own / "run", "--run", tmp_path / "run", "--data", own / "text.txt", "--steps", 3]
    assert fmcore(*words, *TRAIN) == 0
    base = checkpoints(own / "run")[0]
    shutil.rmtree(own / "run")
    for command in (["generate", "--model", tmp_path / "run"], ["finetune", "--run", tmp_path / "run", "--resume"]):
        said = refused(capsys, *command)
        assert f"{base}: wanted a run, a checkpoint or a Hugging Face folder, found nothing" in said


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert f"{tmp_path}: wanted a run with checkpoints" in refused(capsys, "generate", "--model", tmp_path)


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"model_type": "mamba"}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"hidden_size": 48}, "(257, 48)"),
        ({"vocab_size": -3}, "vocab_size"),
    ],
)
def test_a_hugging_face_folder_that_is_not_supported(own, capsys, change, wanted):
    path = own / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    said = refused(capsys, "generate", "--model", own / "hf")
    assert str(own / "hf") in said and wanted in said


def test_a_truncated_hugging_face_folder(own, capsys):
    weights = own / "hf" / "model.safetensors"
    cut(weights)
    assert str(weights) in refused(capsys, "evaluate", "--model", own / "hf", "--data", "topics")


# Runs.


def test_a_run_that_is_used_already(made, capsys):
    before = files(made)
    said = refused(capsys, *pretrain(made / "text.txt", made / "run"))
    assert f"{made / 'run'}: wanted a new folder, got a run with checkpoints" in said and "--resume" in said
    assert "wanted a new folder" in refused(capsys, "finetune", "--model", made / "run", "--run", made / "tuned")
    assert f"{made / 'hf'}: wanted a new or empty folder" in refused(
        capsys, "export", "--model", made / "run", "--out", made / "hf"
    )
    assert files(made) == before


def test_resume_of_nothing(tmp_path, capsys):
    said = refused(capsys, "pretrain", "--run", tmp_path / "run", "--resume")
    assert f"{tmp_path / 'run'}: wanted a run with a checkpoint to resume from, found none" in said
    assert not (tmp_path / "run").exists()


def test_resume_of_another_kind_of_run(made, capsys):
    before = files(made)
    said = refused(capsys, "pretrain", "--run", made / "tuned", "--resume")
    assert "wanted a checkpoint of `fmcore pretrain`, got one of another origin" in said
    assert files(made) == before


def test_a_run_in_a_file(made, capsys):
    assert str(made / "text.txt") in refused(capsys, *pretrain(made / "text.txt", made / "text.txt" / "run"))


def test_sequences_longer_than_the_context(made, tmp_path, capsys):
    words = ["finetune", "--model", made / "run", "--run", tmp_path / "run", "--data", made / "text.txt"]
    assert "seq_len must be at most the model's context=256, got 512" in refused(capsys, *words, "--seq-len", 512)
    words = ["pretrain", "--run", tmp_path / "run", "--context", 16]
    assert "context must be at least seq_len=256, got 16" in refused(capsys, *words)
    assert "seq_len must be from 1 to" in refused(capsys, "evaluate", "--model", made / "run", "--seq-len", 4096)


def test_evaluate_without_text(made, capsys):
    assert f"data must be named for {made / 'hf'}" in refused(capsys, "evaluate", "--model", made / "hf")


# The disk.


def limited(size: int, *words: object) -> subprocess.CompletedProcess:
    """A process whose files cannot grow beyond ``size`` bytes: what a full disk does to a write."""
    command, env = process(*words)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_full_disk_while_writing_shards(tmp_path):
    text = write_text(tmp_path / "text.txt", 3000)
    done = limited(50000, *pretrain(text, tmp_path / "run"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"fmcore: {tmp_path / 'run/data/train.shard'}: ") and "File too large" in done.stderr
    # Without its record a shard counts for nothing.
    assert not files(tmp_path / "run").keys() - {"data/held_out.shard"}


def test_full_disk_while_saving_keeps_the_older_checkpoint(own):
    newest = checkpoints(own / "run")[0]
    before = files(newest)
    done = limited(60000, "pretrain", "--run", own / "run", "--resume", "--steps", 9)
    assert done.returncode == 2
    assert done.stderr.startswith("fmcore: checkpoint: cannot write ") and done.stderr.count("\n") == 1
    assert f"{newest.name} is untouched" in done.stderr and "File too large" in done.stderr
    assert files(newest) == before and checkpoints(own / "run")[0] == newest
    assert not list((own / "run" / "checkpoints").glob("*.tmp-*"))
    assert fmcore("pretrain", "--run", own / "run", "--resume", "--steps", 9) == 0
    assert load_checkpoint(own / "run").step == 9


# Ctrl-C.


def interrupted(words: list[object], run: Path, after: int, number: signal.Signals) -> tuple[int, str]:
    """Send a signal when ``after`` lines of metrics are there; exit code and stderr."""
    command, env = process(*words)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env) as running:
        deadline = time.monotonic() + 90
        metrics = run / "metrics.jsonl"
        while running.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= after):
            assert time.monotonic() < deadline, "training did not start"
            time.sleep(0.005)
        os.kill(running.pid, number)
        said = running.stderr.read()
        return running.wait(timeout=60), said


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_resumed_is_as_if_never_stopped(tmp_path, number, code):
    text = write_text(tmp_path / "text.txt")
    words = ["pretrain", "--data", text, "--steps", 200, *MODEL, "--save-every", 0, "--eval-every", 0]
    assert fmcore(*words, "--run", tmp_path / "straight") == 0
    run = tmp_path / "stopped run"
    got, said = interrupted([*words, "--run", run], run, 5, number)
    assert got == code
    step = load_checkpoint(run).step
    assert 5 <= step < 200
    assert said.startswith(f"fmcore: stopped after step {step}, saved in {run}; go on with: ") and said.count("\n") == 1
    assert said.endswith(f"-m fmcore pretrain --run '{run}' --resume\n")
    assert fmcore("pretrain", "--run", run, "--resume") == 0
    assert_same_run(tmp_path / "straight", run, 200)


def test_a_stopped_adapter_goes_on_as_if_never_stopped(made, tmp_path, capsys, monkeypatch):
    words = ["finetune", "--model", made / "run", "--data", made / "text.txt", "--steps", 16, *TRAIN, "--dropout", 0.2]
    assert fmcore(*words, "--run", tmp_path / "straight") == 0
    monkeypatch.setattr(jobs, "sampler", lambda *args: lambda: os.kill(os.getpid(), signal.SIGINT))
    assert fmcore(*words, "--run", tmp_path / "stopped", "--sample-every", 7) == 130
    assert "stopped after step 7" in capsys.readouterr().err and not (tmp_path / "stopped" / "adapter").exists()
    assert fmcore("finetune", "--run", tmp_path / "stopped", "--resume", "--sample-every", 0) == 0
    assert_same_run(tmp_path / "straight", tmp_path / "stopped", 16)
    assert files(tmp_path / "straight" / "adapter") == files(tmp_path / "stopped" / "adapter")


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Losses, weights, moments and random state, bit by bit."""
    a, b = load_checkpoint(one), load_checkpoint(other)
    assert a.step == b.step == step and losses(one) == losses(other)
    for mine, theirs in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
