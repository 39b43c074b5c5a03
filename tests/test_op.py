"""One operator, many bodies: which one runs, and what is said when none does."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fmcore import op as op_file
from fmcore.errors import InputError
from fmcore.op import Op, use

double = Op("test_double(Tensor x) -> Tensor", fake=lambda x: torch.empty_like(x))


@double.body("slow")
def _slow(x):
    return x + x


@double.body("small", accepts=lambda x: x.numel() <= 4)
def _small(x):
    return 2 * x + 0.5


only_small = Op("test_only_small(Tensor x, int n) -> Tensor", fake=lambda x, n: torch.empty_like(x))
only_small.body("small", accepts=lambda x, n: x.numel() <= 4)(lambda x, n: x.clone())


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = op_file._forced.copy()
    op_file._forced.clear()
    yield
    op_file._forced.clear()
    op_file._forced.update(before)


def test_last_body_that_accepts_runs():
    assert double(torch.ones(3)).tolist() == [2.5] * 3
    assert double(torch.ones(5)).tolist() == [2.0] * 5


def test_a_named_body_runs_whether_it_accepts_or_not():
    with use("small"):
        assert double(torch.ones(5)).tolist() == [2.5] * 5
    with use("slow", op="test_double"):
        assert double(torch.ones(3)).tolist() == [2.0] * 3
    assert double(torch.ones(3)).tolist() == [2.5] * 3


def test_the_operators_own_choice_beats_the_choice_for_all():
    with use("small"), use("slow", op="test_double"):
        assert double(torch.ones(3)).tolist() == [2.0] * 3


def test_a_choice_ends_with_its_block_even_on_an_error():
    with pytest.raises(RuntimeError, match="inside"), use("slow"):
        raise RuntimeError("inside")
    assert not op_file._forced


def test_a_body_for_all_is_ignored_by_operators_that_lack_it():
    with use("triton"):
        assert double(torch.ones(3)).tolist() == [2.5] * 3


def test_unknown_body_of_one_operator():
    message = r"fmcore::test_double has no body 'cuda', only \['eager', 'slow', 'small'\]"
    with use("cuda", op="test_double"), pytest.raises(ValueError, match=message):
        double(torch.ones(3))


def test_no_body_says_what_came():
    message = r"fmcore::test_only_small: none of \['small'\] takes \(torch.float32\(5,\), 7\)"
    with pytest.raises(NotImplementedError, match=message):
        only_small(torch.ones(5), 7)


def test_a_message_tells_of_lists_what_they_are_and_not_what_they_hold():
    assert op_file._told([torch.ones(5), torch.ones(2)]) == "2 tensors, the first torch.float32(5,)"
    assert op_file._told([]) == "[]" and op_file._told([1, 2]) == "[1, 2]"


def test_eager_on_a_cpu_unless_there_is_a_body_for_it():
    x = torch.ones(3)
    assert double.eager(x)
    with use("slow"):
        assert not double.eager(x)
    with use("eager"):
        assert double.eager(x)
    double.body("cpu")(_slow)
    try:
        assert not double.eager(x)
        with use("eager"):
            assert double.eager(x)
        double.body("cpu", accepts=lambda x: x.numel() > 3)(_slow)
        assert double.eager(x) and not double.eager(torch.ones(4))
        with use("cpu"):
            assert not double.eager(x)
    finally:
        del double.bodies["cpu"]


@pytest.mark.parametrize("text, code", [("*=eager", 0), ("rms_norm_fwd=eager,gelu_fwd=triton", 0), ("rms_norm_fwd", 1)])
def test_environment_names_bodies(text, code):
    program = f"import os; os.environ['FMCORE_BODY'] = {text!r}; import fmcore.op"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code
    if code:
        assert f"FMCORE_BODY must read op=body,op=body (op may be *), got {text!r}" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="fakes four GPUs, which only works where there is none")
def test_a_body_runs_with_the_device_of_its_tensors_current(monkeypatch):
    """Triton launches on the current device, wherever the tensors are."""
    current = [0]

    class Guard:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *error):
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Guard)
    where = Op("test_where(Tensor x) -> Tensor", fake=lambda x: x)
    where.body("any")(lambda x: current[-1])
    with FakeTensorMode():
        assert [where._run(torch.empty(2, device=f"cuda:{i}")) for i in (0, 1, 3)] == [0, 1, 3]
    assert current == [0] and where._run(torch.empty(2)) == 0


@pytest.mark.parametrize("text, message", [
    ("rms_nrm_fwd=triton", "FMCORE_BODY: no operator 'rms_nrm_fwd', only \\*, adamw"),
    ("rms_norm_fwd=tritn", "FMCORE_BODY: rms_norm_fwd has no body 'tritn', only cpu, eager, triton"),
    ("*=tritn", "FMCORE_BODY: \\* has no body 'tritn'"),
])  # fmt: skip
def test_a_mistyped_environment_is_named(text, message, monkeypatch):
    import fmcore.ops  # noqa: F401

    monkeypatch.setenv("FMCORE_BODY", text)
    with pytest.raises(InputError, match=message):
        op_file.check_environment()


def test_spaces_and_public_names_are_understood(monkeypatch):
    from fmcore.kernels import rms_norm

    monkeypatch.setenv("FMCORE_BODY", " rms_norm = eager , *=eager")
    op_file.check_environment()
    op_file._forced.update(op_file._from_env(" rms_norm = eager "))
    x = torch.empty(1024, 1024)
    assert rms_norm.fwd._choice() == rms_norm.bwd._choice() == "eager" and rms_norm.fwd.eager(x)
