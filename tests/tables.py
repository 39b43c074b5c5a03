"""What tests of operators over tables of addresses share."""

import importlib.util
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import interpreter
import torch
from torch import Tensor

import fmcore
from fmcore.kernels import multi_tensor as mt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_counter = itertools.count()


@contextmanager
def reachable() -> Iterator[None]:
    """Inside the block kernels may reach the tensors that tables are made of, and no others."""
    plain = mt.addresses
    with ExitStack() as stack:

        def addresses(tensors: Sequence[Tensor]) -> list[int]:
            stack.enter_context(interpreter.also(*tensors))
            return plain(tensors)

        mt.addresses = addresses
        try:
            yield
        finally:
            mt.addresses = plain


@contextmanager
def few_programs() -> Iterator[None]:
    """Inside the block a program takes several blocks of a tensor although tensors are small."""
    before, mt.PROGRAMS_PER_SM = mt.PROGRAMS_PER_SM, 1
    mt._map.cache_clear()
    try:
        yield
    finally:
        mt.PROGRAMS_PER_SM = before
        mt._map.cache_clear()


def planted(file: str, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of ``kernels/<file>`` with ``old`` replaced by ``new``, its operators under names of their own."""
    source = (Path(fmcore.__file__).parent / "kernels" / file).read_text()
    assert old in source, f"kernels/{file} no longer holds {old!r}: plant the bug elsewhere"
    number = next(_counter)
    source = re.sub(r'(Op\(\s*")(\w+)\(', rf"\g<1>\g<2>_table{number}(", source.replace(old, new))
    path = folder / f"table{number}_{file}"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_exact_as_eager(got: Sequence[Tensor], eager: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """Against fp64, an error of at most twice that of the same steps in PyTorch plus one ulp of the largest value."""
    for i, (g, e, t) in enumerate(zip(got, eager, truth, strict=True)):
        assert g.dtype == e.dtype and g.shape == e.shape
        if g.numel():
            g, e = (x.double().cpu() for x in (g, e))
            ulp = torch.finfo(got[i].dtype).eps * t.abs().max()
            limit, error = 2 * (e - t).abs().max() + ulp, (g - t).abs().max()
            assert error <= limit, f"result {i}: error {error.item():.3g} exceeds {limit.item():.3g}"
