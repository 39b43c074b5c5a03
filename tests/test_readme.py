"""The README's promises: its example runs, its files and links exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import operators
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.splitlines()) <= 25
    env_path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", env_path + code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        # Threads that spin while they wait stop each other on a busy machine: LOG.md.
        env=os.environ | {"GOMP_SPINCOUNT": "2000"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/readme/metrics.jsonl").is_file()
    assert "adapt" in done.stdout


def test_links_and_paths_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for command in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
    from fmcore.cli import COMMANDS

    for command in re.findall(r"^fmcore (\w+)", README, re.MULTILINE):
        assert command in COMMANDS, command


def test_options_on_the_command_line_exist():
    """Every ``fmcore ...`` line of the README is parsed as the command line would, short of running it."""
    import importlib
    import shlex

    from fmcore.cli import COMMANDS, parse

    lines = re.findall(r"^fmcore (\w+) *([^#\n]*)", README, re.MULTILINE)
    assert len(lines) >= 6
    for command, rest in lines:
        module, name, _ = COMMANDS[command]
        options, _ = parse(getattr(importlib.import_module(module), name), shlex.split(rest), command)
        assert type(options).__name__ == name


def test_the_table_of_operators_is_up_to_date():
    _, inside, _ = operators.parts(README)
    assert inside == operators.table(), f"README's table of operators is stale: run {operators.COMMAND}"


def test_the_table_of_operators_tells_each_one():
    rows = [line.split(" | ") for line in operators.table().splitlines()[2:]]
    assert [row[0].split("`")[1] for row in rows] == list(operators.public())
    for name, what, _, bodies, proven in rows:
        assert what and "eager" in bodies and "](tests/" in proven, name
    assert len(max(operators.table().splitlines(), key=len)) <= 600, "a table is read, not scrolled"


def test_writing_the_table_changes_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(operators, "README", tmp_path / "README.md")
    monkeypatch.setattr(sys, "argv", ["operators.py", "--write"])
    before, inside, after = operators.parts(README)
    operators.README.write_text(before + "| stale |" + after)
    operators.main()
    assert operators.README.read_text() == before + operators.table() + after
    operators.README.write_text("no markers")
    with pytest.raises(SystemExit, match="wanted the lines <!-- operators"):
        operators.main()
