"""The rows of tests/rows/: how to call each operator, what it must equal, and what breaks it.

``tests/test_ops.py`` proves the numerics contract for every row, ``tests/aot.py`` compiles the kernels that the row
launches, ``tests/test_harness.py`` plants the row's bugs. A new operator adds a row there and nothing here.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from case import Bug as Bug
from case import Case as Case

FILES = sorted(p.stem for p in Path(__file__).with_name("rows").glob("*.py"))
ROWS = [import_module(f"rows.{file}") for file in FILES]
CASES: dict[str, Case] = {name: row for rows in ROWS for name, row in rows.CASES.items()}
# Operators whose kernels are compiled and that have no row: name -> launches on tensors of the ``meta`` device.
COMPILED: dict[str, Callable[[], None]] = {
    name: launch for rows in ROWS for name, launch in getattr(rows, "COMPILED", {}).items()
}
