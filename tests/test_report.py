"""The picture and the page of a run: drawn from hostile logs too, and safe to open whatever a model wrote."""

import math
import re
import struct
import sys

import pytest

from fmcore.errors import InputError
from fmcore.train.metrics import MetricsLog
from fmcore.train.report import bits_per_byte, plot_loss, write_report


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2), 1) == pytest.approx(8.0)
    assert bits_per_byte(100 * math.log(256), 400) == pytest.approx(2.0)
    for count in (0, -1):
        with pytest.raises(InputError, match="at least 1 byte"):
            bits_per_byte(1.0, count)


def log(path, records):
    with MetricsLog(path) as file:
        for record in records:
            file.write(record)
    return path


def size(png) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def labels(monkeypatch) -> list[str]:
    """Everything that the figure says, collected when it is saved."""
    from matplotlib.figure import Figure

    said: list[str] = []
    real = Figure.savefig

    def savefig(self, *args, **options):
        from matplotlib.text import Text

        real(self, *args, **options)
        said.extend(t.get_text() for t in self.findobj(Text) if t.get_text())

    monkeypatch.setattr(Figure, "savefig", savefig)
    return said


def test_picture_of_two_phases(tmp_path, monkeypatch):
    said = labels(monkeypatch)
    records = [{"phase": "pretrain", "step": s, "loss": 5 / (s + 1)} for s in range(50)]
    records += [{"phase": "pretrain", "step": 50, "loss": 0.1, "bits_per_byte": {"code": 2.25, "prose": 3.125}}]
    records += [{"phase": "adapt", "step": s, "loss": 1.0} for s in range(10)]
    records += [{"phase": "adapt", "step": 10, "bits_per_byte": {"code": 2.5, "prose": 2.0}}]
    picture = plot_loss(log(tmp_path / "m.jsonl", records), tmp_path / "loss.png", "A run")
    width, height = size(picture)
    assert 1000 < width < 4000 and 600 < height < 2000
    wanted = {"A run", "pretrain", "adapt", "training loss (nats per token)", "held-out (bits per byte)"}
    wanted |= {
        "optimizer step",
        "each step",
        "smoothed",
        "code",
        "prose",
        "code 2.25",
        "prose 3.12",
        "code 2.50",
        "prose 2.00",
    }
    assert wanted <= set(said), wanted - set(said)


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 3, "loss": 1.0}],
        [{"step": 3, "bits_per_byte": 2.0}],
        [{"step": 0, "loss": float("nan")}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": "inf"}, {"step": 3}],
        [{"step": s, "loss": 2.0, "bits_per_byte": {str(i): 1.0 for i in range(9)}} for s in range(3)],
        [{"step": 1, "bits_per_byte": {"$x_{": 1.0}}],
        [{"phase": "$x_{", "step": 1, "loss": 1e30}, {"phase": "b", "step": 10**9, "loss": -5.0}],
    ],
    ids=["one step", "one evaluation", "not finite", "many texts", "odd text", "odd names"],
)
def test_picture_of_odd_runs(tmp_path, records):
    size(plot_loss(log(tmp_path / "m.jsonl", records), tmp_path / "loss.png", "$_{"))


@pytest.mark.parametrize("records", [[], [{"step": 1}], [{"step": 1, "loss": "nan", "bits_per_byte": {"a": None}}]])
def test_nothing_to_draw(tmp_path, records):
    with pytest.raises(InputError, match="found none to draw"):
        plot_loss(log(tmp_path / "m.jsonl", records), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        plot_loss(log(tmp_path / "m.jsonl", [{"step": 1, "loss": 1.0}]), tmp_path / "none" / "loss.png")


def test_no_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        plot_loss(log(tmp_path / "m.jsonl", [{"step": 1, "loss": 1.0}]), tmp_path / "loss.png")


def page(run, **options):
    given = {"title": "t", "facts": {}, "scores": {}, "samples": {}} | options
    return write_report(run, **given).read_text()


def test_page(tmp_path):
    folder = tmp_path / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1500)
    (folder / "state.json").write_bytes(b"x" * 500)
    (tmp_path / "checkpoints" / "step-00000020.tmp-7").mkdir()
    (tmp_path / "checkpoints" / "step-00000020.tmp-7" / "a").write_bytes(b"x")
    (tmp_path / "loss.png").write_bytes(b"x" * 7)
    for _ in range(2):
        text = page(
            tmp_path,
            title="fmcore demo",
            facts={"command": "fmcore demo", "parameters": 1234567, "seconds": 3.14159, "tokens": 9999999.0, "b": True},
            scores={"untrained": {"code": 8.0125, "prose": 8.1}, "base": {"code": 2.2}},
            samples={"base": "def f():\n    pass"},
        )
    assert text.startswith("# fmcore demo\n\n|  |  |\n| --- | --- |\n| command | fmcore demo |\n")
    for part in (
        "| parameters | 1,234,567 |\n| seconds | 3.142 |\n| tokens | 9,999,999 |\n| b | True |\n",
        "## Held-out bits per byte\n\n|  | code | prose |\n| --- | ---: | ---: |\n| untrained | 8.012 | 8.100 |\n",
        "| base | 2.200 |  |\n",
        "![loss against optimizer step](loss.png)",
        "### base\n\n```text\ndef f():\n    pass\n```\n",
        "| `checkpoints/step-00000010/` | 2.0 kB |\n| `loss.png` | 7 B |\n",
    ):
        assert part in text, part
    assert "tmp-" not in text and "report.md" not in text


def test_page_without_a_picture(tmp_path):
    assert "loss.png" not in page(tmp_path)


@pytest.mark.parametrize("ticks", range(0, 9))
def test_a_sample_cannot_close_its_fence(tmp_path, ticks):
    sample = "a\n" + "`" * ticks + "\n# not a heading\n" + "~~~\n" + "`" * max(0, ticks - 1) + "b"
    lines = page(tmp_path, samples={"s": sample}).split("\n")
    start = next(i for i, line in enumerate(lines) if line.endswith("text") and line.startswith("```"))
    fence = lines[start].removesuffix("text")
    # CommonMark: the block ends at the first line of at least as many backticks and nothing else.
    end = next(i for i in range(start + 1, len(lines)) if re.fullmatch(f"{fence}`*\\s*", lines[i]))
    assert "\n".join(lines[start + 1 : end]) == sample


def test_control_characters_are_shown_not_sent(tmp_path):
    text = page(tmp_path, samples={"s\x1b[2J": "a\x00b\x1b[31mc\rd\x07\te\u202ef\u2028g\x9b\u00e4"}, title="x\ny|")
    assert "a\\x00b\\x1b[31mc\\rd\\x07\te\\u202ef\\u2028g\\x9b\u00e4" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", text)
    assert text.startswith("# x y|\n")


def test_cells_cannot_break_the_table(tmp_path):
    text = page(tmp_path, facts={"command": "a | b\nc"})
    assert "| command | a \\| b c |" in text


def test_page_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        page(tmp_path / "none")
