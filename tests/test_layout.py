"""The house keeps its order: where things stand, who may import whom, what must not be in the tree."""

import ast
import os
import re
from pathlib import Path

import pytest
from cases import CASES
from operators import public

from benchmarks.rows import ROWS
from fmcore import ops

ROOT = Path(__file__).parent.parent
SHARED = {"blocks", "launch", "multi_tensor"}  # files in kernels/ that are no operator
OPERATORS = sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if p.stem not in SHARED)
# Operators that work in place or without a gradient: the contract of a row does not fit, a test file of their own does.
WITHOUT_ROWS = {"adamw", "lion", "muon"}
SOURCES = sorted(p for top in ("fmcore", "kernels", "benchmarks") for p in (ROOT / top).rglob("*.py"))
SOURCES = [p for p in SOURCES if "fmcore/kernels" not in str(p) and "fmcore/csrc" not in str(p)]
# From the bottom to the top: a room may import those before it, not those after it.
ROOMS = ("errors", "files", "device", "check", "op", "kernels", "ops", "nn", "param_groups", "optim", "models", "data",
         "evaluate", "generate", "adapt", "train", "arguments", "load", "options", "jobs", "demo", "doctor", "commands",
         "cli", "__main__")  # fmt: skip


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_in_the_index(name):
    public = [n for n in dir(ops) if getattr(getattr(ops, n), "__module__", "") == f"fmcore.kernels.{name}"]
    assert public, f"fmcore/ops.py has no line for kernels/{name}.py"


@pytest.mark.parametrize("name", public())
def test_operator_is_measured(name):
    assert name in ROWS, f"benchmarks/rows.py has no row for {name}"


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_is_proven(name):
    if name not in WITHOUT_ROWS:
        rows = [case for case in CASES.values() if case.file == f"{name}.py"]
        assert rows, f"tests/rows/ has no row for kernels/{name}.py"
        assert any(case.bugs for case in rows), f"no row of {name} in tests/rows/ plants a bug"
    else:
        assert (ROOT / "tests/ops" / f"test_{name}.py").exists()


def test_cuda_files_have_a_kernel_file():
    names = {p.stem for p in (ROOT / "csrc").glob("*.cu")}
    assert names <= set(OPERATORS)


@pytest.mark.parametrize("link", ["fmcore/kernels", "fmcore/csrc"])
def test_links_are_relative_links(link):
    assert os.readlink(ROOT / link) == f"../{Path(link).name}"
    assert not (ROOT / Path(link).name / "__init__.py").exists()


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parts[-2] != "benchmarks"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_one_way(path):
    if path == ROOT / "fmcore/__init__.py":
        return
    mine = ROOMS.index(room(path))
    for name in imports(path):
        if name.startswith("fmcore.") and (other := name.split(".")[1]) in ROOMS:
            assert ROOMS.index(other) <= mine, f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_command_line_needs_tyro():
    users = {p.relative_to(ROOT).as_posix() for p in SOURCES if any(n.split(".")[0] == "tyro" for n in imports(p))}
    assert users == {"fmcore/cli.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_on_disk_is_trusted(path):
    names = {name.split(".")[0] for name in imports(path)}
    assert not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [c for c in calls if isinstance(c, ast.Name) and c.id in ("eval", "exec")]
    assert not [
        c for c in calls if isinstance(c, ast.Attribute) and ast.unparse(c) in ("torch.load", "torch.save", "np.load")
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    lines = path.read_text().splitlines()
    # Device code may be long: each version of an operator stands in its one file.
    assert len(lines) <= (900 if path.parent.name == "kernels" else 450)
    assert lines == [] or path.name == "__init__.py" or path.read_text().lstrip().startswith('"""')


def test_no_machine_is_named():
    wrong = re.compile(r"/(work|root|farm)/")
    for path in [
        *SOURCES,
        *ROOT.glob("*.md"),
        *(ROOT / "tests").rglob("*.py"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]:
        if path != Path(__file__):
            assert not wrong.search(path.read_text()), path
