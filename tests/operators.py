"""README's table of operators, from the registry. ``python tests/operators.py [--write]``

A row for each function of fmcore.ops: its first sentence says what it is, its signature which options it has,
the registry which bodies, and the tests where it is proven.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    # As pyproject.toml tells pytest.
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from cases import FILES  # noqa: E402

from fmcore import ops  # noqa: E402
from fmcore.op import behind  # noqa: E402

README = ROOT / "README.md"
COMMAND = "python tests/operators.py --write"
BEGIN, END = f"<!-- operators: written by `{COMMAND}` -->", "<!-- end of operators -->"


def public() -> dict[str, Callable]:
    """The public operators, in the order of fmcore/ops.py."""
    return {name: fn for name, fn in vars(ops).items() if getattr(fn, "__module__", "").startswith("fmcore.kernels.")}


def file_of(fn: Callable) -> str:
    """The file of kernels/ that holds the function, without its ending."""
    return fn.__module__.rpartition(".")[2]


def what(fn: Callable) -> str:
    """The first sentence of the function's docstring."""
    text = " ".join((inspect.getdoc(fn) or "").partition("\n\n")[0].split())
    return re.split(r"[.;] |\.$", text)[0].replace("``", "`").replace("|", "\\|")


def options(fn: Callable) -> str:
    """Everything that may be left out."""
    parameters = inspect.signature(fn).parameters.values()
    return ", ".join(f"`{p.name}`" for p in parameters if p.default is not p.empty)


def bodies(fn: Callable) -> str:
    """The bodies by name, ``eager``, the plain formula, first; those that only a part of the operators has say so."""
    parts = behind(fn)
    cells = ["eager"]
    for body in dict.fromkeys(body for op in parts for body in op.bodies):
        have = [op.name for op in parts if body in op.bodies]
        cells.append(body if len(have) == len(parts) else f"{body} ({', '.join(have)})")
    return ", ".join(cells)


def rows_of() -> dict[str, dict[str, int]]:
    """Operator -> file of tests/rows/ -> number of its rows; a row belongs to the longest name that it begins with."""
    found: dict[str, dict[str, int]] = {name: {} for name in public()}
    for file in FILES:
        for row in import_module(f"rows.{file}").CASES:
            owner = max((name for name in found if row.startswith(name.rstrip("_"))), key=len, default=None)
            if owner:
                found[owner][file] = found[owner].get(file, 0) + 1
    return found


def proven(name: str, fn: Callable, rows: dict[str, int]) -> str:
    """Links to the rows and to the test file of the operator, or of its file."""
    cells = [f"[{n} row{'s' * (n > 1)}](tests/rows/{file}.py)" for file, n in rows.items()]
    for stem in dict.fromkeys((name.rstrip("_"), file_of(fn))):
        path = f"tests/ops/test_{stem}.py"
        cells += [f"[test_{stem}]({path})"] if (ROOT / path).exists() else []
    return ", ".join(cells)


def table() -> str:
    rows = rows_of()
    lines = ["| operator | what | options | bodies | proven by |", "|---|---|---|---|---|"]
    for name, fn in public().items():
        cells = (
            f"[`{name}`](kernels/{file_of(fn)}.py)",
            what(fn),
            options(fn),
            bodies(fn),
            proven(name, fn, rows[name]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts(text: str) -> tuple[str, str, str]:
    """What stands before, between and behind the markers of a README."""
    before, begin, rest = text.partition(f"{BEGIN}\n")
    inside, end, after = rest.partition(f"\n{END}")
    if not begin or not end:
        raise SystemExit(f"README.md: wanted the lines {BEGIN} and {END} around the table of operators")
    return before + begin, inside, end + after


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/operators.py", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into README.md instead of printing it")
    if not parser.parse_args().write:
        print(table())
        return
    before, _, after = parts(README.read_text())
    README.write_text(before + table() + after)


if __name__ == "__main__":
    main()
