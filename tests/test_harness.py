"""The tests of operators have teeth: bugs planted in the source of each one turn them red.

A bug is a line of a row in cases.py. The operator's file is copied with the bug in it, imported under operator names of
its own, and put through the same check that the real one passes; the copy without a bug must pass.
"""

import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import proof
import pytest
import torch
from cases import CASES, Bug, Case

import fmcore
from fmcore import op as op_file

KERNELS = Path(fmcore.__file__).parent / "kernels"
ON_GPU = torch.cuda.is_available()
BUGS = [
    pytest.param(case, bug, id=f"{name}-{bug.caught_by}-{bug.new}") for name, case in CASES.items() for bug in case.bugs
]
WRONG_NUMBERS = "error .* exceeds"
NEVER_WRITTEN = "elements are NaN"
_counter = itertools.count()


@pytest.fixture
def planted(tmp_path: Path) -> Iterator[Callable[[Case, Bug | None], Case]]:
    """``planted(case, bug)``: the case with its operator taken from a copy of its file that has the bug."""
    before = dict(op_file.OPS)

    def plant(case: Case, bug: Bug | None) -> Case:
        source = (KERNELS / case.file).read_text()
        if bug:
            assert bug.old in source, f"kernels/{case.file} no longer holds {bug.old!r}: plant the bug elsewhere"
            source = source.replace(bug.old, bug.new)
        # The dispatcher knows each operator's name once.
        number = next(_counter)
        source = re.sub(r'(Op\(\s*")(\w+)\(', rf"\g<1>\g<2>_planted{number}(", source)
        path = tmp_path / f"planted{number}.py"
        path.write_text(source)
        return replace(case, op=_from(_module(path), case.op))

    yield plant
    op_file.OPS.clear()
    op_file.OPS.update(before)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from(module: ModuleType, op: Callable) -> Callable:
    if isinstance(op, partial):
        args = [_from(module, a) if callable(a) else a for a in op.args]
        return partial(_from(module, op.func), *args, **op.keywords)
    # What the file does not define is how the row calls it.
    return getattr(module, op.__name__, op)


def exact(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    drawn = proof.trials(case, shape, dtype)
    with op_file.use("triton"):
        proof.check(case, case.op, drawn)


def memory(case: Case, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    drawn = [
        ([proof.padded_rows(a) if i in case.no_copy else a for i, a in enumerate(args)], grads)
        for args, grads in proof.trials(case, shape, dtype)
    ]
    with op_file.use("triton"):
        proof.check(case, case.op, drawn)


def phantom(case: Case, *_: object) -> None:
    proof.run_phantom(case)


CHECKS = {"exact": exact, "memory": memory, "phantom": phantom}


@pytest.mark.parametrize("case, bug", BUGS)
def test_planted_bug_is_caught(case, bug, planted):
    if ON_GPU and bug.caught_by != "exact":
        pytest.skip("memory and addresses are checked in the interpreter, which runs where there is no GPU")
    with pytest.raises(Exception) as caught:
        CHECKS[bug.caught_by](planted(case, bug), bug.shape, bug.dtype)
    text = str(caught.value)
    if bug.caught_by == "exact":
        assert re.search(WRONG_NUMBERS, text), text
    elif bug.caught_by == "memory":
        assert re.search(f"outside|store to one address|loads what program|{NEVER_WRITTEN}", text), text
    else:
        assert re.search("outside|overflow", text), text


@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if c.bugs])
def test_copy_without_a_bug_passes(case, planted):
    copy = planted(case, None)
    for bug in case.bugs:
        if not ON_GPU or bug.caught_by == "exact":
            CHECKS[bug.caught_by](copy, bug.shape, bug.dtype)


def test_every_kernel_file_has_a_planted_bug():
    without = {c.file for c in CASES.values()} - {c.file for c in CASES.values() if c.bugs}
    assert not without
