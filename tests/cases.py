"""The rows of tests/rows/: how to call each operator, what it must equal, and what breaks it.

``tests/test_ops.py`` proves the numerics contract for every row, ``tests/aot.py`` compiles the kernels that the row
launches, ``tests/test_harness.py`` plants the row's bugs. A new operator adds a row there and nothing here.
"""

from importlib import import_module
from pathlib import Path

from case import Bug as Bug
from case import Case as Case

FILES = sorted(p.stem for p in Path(__file__).with_name("rows").glob("*.py"))
CASES: dict[str, Case] = {name: row for file in FILES for name, row in import_module(f"rows.{file}").CASES.items()}
