"""The command line: two parsers that mean the same, messages of one line, and each command on a tiny model."""

import errno
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import MODEL, ROOT, TRAIN, fmcore, losses, process, refused, write_text

from fmcore import __version__, arguments, cli, commands, doctor
from fmcore.models.decoder import PRESETS
from fmcore.train.checkpoint import load_checkpoint
from fmcore.train.metrics import read_metrics

OPTIONS = {
    "pretrain": commands.Pretrain,
    "finetune": commands.Finetune,
    "generate": commands.Generate,
    "evaluate": commands.Evaluate,
    "export": commands.Export,
    "doctor": doctor.DoctorOptions,
}


@pytest.fixture(params=["tyro", "argparse"])
def parser(request, monkeypatch):
    """Both ways to read a command line; the second one is for machines without tyro."""
    if request.param == "argparse":
        monkeypatch.setitem(sys.modules, "tyro", None)
    return request.param


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run that was trained for some steps."""
    folder = tmp_path_factory.mktemp("base")
    text = write_text(folder / "text.txt")
    assert fmcore("pretrain", "--run", folder / "run", "--data", text, "--steps", 12, *MODEL) == 0
    return folder / "run"


LINES = [
    ("pretrain", ""),
    ("pretrain", "--steps 70 --lr=1e-3 --batch_size 3 --data x.txt --preset gpt2-124m --layers 3 --tensorboard"),
    ("pretrain", "--layers None --no-tensorboard --schedule wsd --dtype bfloat16 --held-out .25 --run a/b"),
    ("pretrain", "--steps 70 --steps 80 --weight-decay 0 --seed 5"),
    ("finetune", "--model runs/x --rank 4 --targets q,v --no-rslora --full"),
    ("finetune", "--data stdlib --alpha=2.5e0 --run r"),
    ("generate", "--model m --prompt a --prompt b --greedy --no-echo"),
    ("generate", "--model m --prompt=--x --prompt= --prompt None --top-k 3 --adapter None"),
    ("evaluate", "--model m --whole --seq-len 12"),
    ("export", "--model m --out folder/deep --adapter a"),
    ("doctor", "--json"),
]


@pytest.mark.parametrize("command, line", LINES)
def test_both_parsers_mean_the_same(monkeypatch, command, line):
    with_tyro, _ = cli.parse(OPTIONS[command], line.split(), command)
    monkeypatch.setitem(sys.modules, "tyro", None)
    with_argparse, _ = cli.parse(OPTIONS[command], line.split(), command)
    assert with_tyro == with_argparse
    assert isinstance(with_tyro, OPTIONS[command])


def test_what_is_typed_arrives(parser):
    line = "--steps 70 --lr 1e-3 --batch_size=3 --layers 3 --kv-heads None --tensorboard --run a/b --data d"
    options, _ = cli.parse(commands.Pretrain, line.split(), "pretrain")
    assert (options.model.layers, options.model.kv_heads, options.run, options.data.data) == (3, None, Path("a/b"), "d")
    untouched = asdict(commands.TrainOptions()) | {"steps": 70, "lr": 1e-3, "batch_size": 3, "tensorboard": True}
    assert asdict(options.train) == untouched
    options, _ = cli.parse(commands.Generate, ["--model", "m", "--prompt", "- a -b", "--prompt=--c"], "generate")
    assert options.prompt == ("- a -b", "--c") and options.echo and not options.greedy


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("pretrain --stepz 3", "no option --stepz; did you mean --steps?"),
        ("pretrain --batchsize 3", "did you mean --batch-size?"),
        ("pretrain -steps 3", "did you mean --steps?"),
        ("pretrain --no-steps", "no option --no-steps"),
        ("pretrain --xyzzy 3", "no option --xyzzy; `fmcore pretrain --help`"),
        ("pretrain --steps 3.5", "--steps must be an integer, got '3.5'"),
        ("pretrain --lr fast", "--lr must be a number, got 'fast'"),
        ("pretrain --lr -3", "lr must be above 0, got -3.0"),
        ("pretrain --lr nan", "lr must be above 0, got nan"),
        ("pretrain --lr", "--lr needs a number, got nothing"),
        ("pretrain --lr --steps 3", "--lr needs a number, got the option --steps"),
        ("pretrain --resume=yes", "--resume takes no value, got 'yes'"),
        (
            "pretrain --schedule cosin",
            "--schedule must be one of cosine, wsd, constant, got 'cosin'; did you mean cosine?",
        ),
        ("pretrain --steps 10 --warmup 50", "50 of warm-up do not fit into 10 steps"),
        ("pretrain --beta1 1", "beta1 must be within [0, 1), got 1.0"),
        ("pretrain --held-out 2", "held_out must be a share between 0 and 1, got 2.0"),
        ("pretrain text.txt", "wanted options, which start with --, got 'text.txt'"),
        ("pretrain --", "wanted options, which start with --, got '--'"),
        ("pretrain --preset tiny", "preset must be one of demo"),
        ("pretrain --device tpu9", "device must be one of this machine's, got 'tpu9'"),
        ("generate", "--model must be given: a run, a checkpoint or a Hugging Face folder"),
        ("generate --model nowhere --top-p 2", "top_p must be above 0 and at most 1, got 2.0"),
        ("export --model x", "--out must be given"),
        ("finetune", "--model must be given"),
        ("finetune --model x --dropout 1", "dropout must be in [0, 1), got 1.0"),
        ("pretran", "no command 'pretran'; did you mean pretrain?"),
        ("xyzzy", "no command 'xyzzy'; there are demo, pretrain"),
    ],
)
def test_one_line_says_what_is_wrong(parser, capsys, monkeypatch, tmp_path, line, wanted):
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    said = refused(capsys, *line.split())
    assert wanted in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"], "a refused command must write nothing"


@pytest.mark.parametrize("command", ["pretrain", "finetune", "generate", "evaluate", "export", "doctor", "demo"])
def test_help_names_every_option_and_its_default(parser, capsys, command):
    assert fmcore(command, "--help") == 0
    shown = capsys.readouterr()
    text = " ".join(shown.out.split())
    module, name, _ = cli.COMMANDS[command]
    known = list(arguments.flags(getattr(sys.modules[module], name)))
    for flag in known:
        assert f"--{flag.name}" in text
    assert "FMCORE_DEBUG" in text and not shown.err
    defaults = [flag.default for flag in known if type(flag.default) in (int, float)]
    assert all(f"default: {value})" in text.replace("│ ", "") for value in defaults)


def test_options_explain_themselves():
    plain = {"--seed", "--field", "--preset", "--alpha", "--rank", "--beta1", "--beta2", "--schedule"}
    for command, options in OPTIONS.items():
        for flag in arguments.flags(options):
            assert flag.help or f"--{flag.name}" in plain, f"{command} --{flag.name} has no help"
    preset = next(flag for flag in arguments.flags(commands.Pretrain) if flag.name == "preset")
    assert preset.help.split() == list(PRESETS)


def test_version_and_overview(capsys):
    assert fmcore("--version") == 0 and capsys.readouterr().out == f"fmcore {__version__}\n"
    assert fmcore() == 0
    alone = capsys.readouterr().out
    assert fmcore("--help") == 0 and capsys.readouterr().out == alone
    assert all(f"  {command}" in alone for command in cli.COMMANDS)


def test_a_short_question_imports_nothing_heavy():
    code = "import sys; from fmcore.cli import main; main(['--version']); main(['x']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=process()[1], timeout=60)
    assert done.stdout.splitlines()[-1] == "False"


def test_only_cli_imports_tyro():
    users = [path.name for path in (ROOT / "fmcore").rglob("*.py") if "import tyro" in path.read_text(encoding="utf-8")]
    assert users == ["cli.py"]


def test_faults_of_the_program_are_not_hidden(monkeypatch):
    def fail(self):
        raise ValueError("a bug")

    monkeypatch.setattr(doctor.DoctorOptions, "execute", fail)
    with pytest.raises(ValueError, match="a bug"):
        fmcore("doctor")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EACCES])
def test_refusals_of_the_system_name_the_path(monkeypatch, capsys, code):
    def fail(self):
        raise OSError(code, "refused", "some/path")

    monkeypatch.setattr(doctor.DoctorOptions, "execute", fail)
    assert refused(capsys, "doctor") == "some/path: refused"


def test_a_missing_package_is_named(monkeypatch, capsys):
    def fail(self):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(doctor.DoctorOptions, "execute", fail)
    assert "'triton' must be installed" in refused(capsys, "doctor")


def test_interrupt_before_anything_began(monkeypatch, capsys):
    def fail(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor.DoctorOptions, "execute", fail)
    assert fmcore("doctor") == 130
    assert capsys.readouterr().err == ""


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("FMCORE_DEBUG", "1")
    assert fmcore("pretrain", "--stepz", 3) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("fmcore: pretrain: no option --stepz")


def test_pretrain_reports(base, capsys):
    fmcore("pretrain", "--run", base, "--resume")
    said = capsys.readouterr().out
    assert "nothing left to train" in said and f"fmcore generate --model {base}" in said
    last = read_metrics(base / "metrics.jsonl")[-1]
    assert last["step"] == 12 and last["bits_per_byte"]["held-out"] < 8


def test_generate(base, capsys):
    words = ["generate", "--model", base, "--max-tokens", 24, "--seed", 3, "--prompt", "def "]
    assert fmcore(*words) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("def ") and len(alone) > 5
    assert fmcore(*words, "--prompt", "return") == 0
    first, _, second = capsys.readouterr().out.partition("\n---\n")
    assert first + "\n" == alone and second.startswith("return")
    assert fmcore(*words, "--no-echo") == 0
    assert "def " + capsys.readouterr().out == alone
    assert fmcore(*words[:-4], "--greedy") == 0
    greedy = capsys.readouterr().out
    assert fmcore(*words[:-4], "--temperature", 0, "--seed", 9) == 0
    assert capsys.readouterr().out == greedy


def test_generate_into_a_closed_pipe(base):
    command, env = process("generate", "--model", base, "--max-tokens", 4000, "--seed", 1, "--prompt", "x" * 70000)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as running:
        assert running.stdout.read(10) == b"x" * 10
        running.stdout.close()
        said = running.stderr.read().decode()
        assert running.wait(timeout=60) == 141
    assert said == ""


def test_evaluate(base, capsys):
    assert fmcore("evaluate", "--model", base) == 0
    shown = dict(line.rsplit("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {name.strip(): value.split()[0] for name, value in shown.items()}
    last = read_metrics(base / "metrics.jsonl")[-1]["bits_per_byte"]["held-out"]
    # Inside training the same text is read 32 tokens at a time, here 64 and more.
    assert float(shown["bits per byte"]) == pytest.approx(last, rel=0.05)
    text = base.parent / "text.txt"
    assert fmcore("evaluate", "--model", base, "--seq-len", 32, "--data", text) == 0
    assert f"bits per byte  {last:.4f}" in capsys.readouterr().out
    assert fmcore("evaluate", "--model", base, "--data", text, "--whole") == 0
    assert f"bytes          {text.stat().st_size:,}" in capsys.readouterr().out


@pytest.mark.parametrize("full", [False, True])
def test_finetune_then_export(base, tmp_path, capsys, full):
    text = tmp_path / "prose.txt"
    text.write_text("\n".join(f"The {i}th day was as long as the one before it." for i in range(80)))
    run = tmp_path / "tuned"
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    words = ["finetune", "--model", base, "--run", run, "--data", text, "--steps", 30, "--lr", 0.01, *TRAIN]
    assert fmcore(*words, *["--full"] * full) == 0
    assert before == {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    loss = losses(run)
    assert sum(loss[-5:]) < sum(loss[:5]) and (run / "adapter").is_dir() is not full

    def greedy(*model: object) -> str:
        capsys.readouterr()
        assert fmcore("generate", *model, "--greedy", "--max-tokens", 40, "--prompt", "The ") == 0
        return capsys.readouterr().out

    text = greedy("--model", run)
    assert text != greedy("--model", base)
    if not full:
        assert text == greedy("--model", base, "--adapter", run / "adapter")
        # Its own adapter on top would count twice.
        assert fmcore("generate", "--model", run, "--adapter", run / "adapter") == 2
        assert "comes with already" in capsys.readouterr().err
    assert fmcore("export", "--model", run, "--out", tmp_path / "hf") == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert text == greedy("--model", tmp_path / "hf")
    # A model that was adapted is a base like any other.
    words = ["finetune", "--model", run, "--run", tmp_path / "again", "--data", base.parent / "text.txt", "--steps", 4]
    assert fmcore(*words, *TRAIN) == 0
    assert greedy("--model", tmp_path / "again") == greedy("--model", run, "--adapter", tmp_path / "again" / "adapter")


def test_a_run_goes_on_with_other_steps_but_not_with_other_data(base, tmp_path, capsys):
    run, text = tmp_path / "run", base.parent / "text.txt"
    assert fmcore("pretrain", "--run", run, "--data", text, "--steps", 6, *MODEL) == 0
    assert "layers must stay 2" in refused(capsys, "pretrain", "--run", run, "--resume", "--layers", 3)
    assert "held_out must stay 0.05" in refused(capsys, "pretrain", "--run", run, "--resume", "--held-out", 0.5)
    assert "--model must be left out" in refused_finetune(tmp_path, base, capsys)
    text.touch()
    assert fmcore("pretrain", "--run", run, "--resume", "--steps", 9, "--lr", 0.001, "--data", text) == 0
    found = load_checkpoint(run)
    assert (found.step, found.state["job"]["train"]["lr"], found.state["job"]["train"]["seq_len"]) == (9, 0.001, 32)
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, 10))


def refused_finetune(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> str:
    words = ["finetune", "--run", tmp_path / "tuned"]
    assert fmcore(*words, "--model", base, "--data", base.parent / "text.txt", "--steps", 3, *TRAIN) == 0
    return refused(capsys, *words, "--model", base, "--resume")
