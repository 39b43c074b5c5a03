"""The numerics contract: what every operator must satisfy. A new operator adds a row to tests/rows/ and nothing
here.

Without a GPU the Triton bodies run in the interpreter of tests/interpreter.py, which fails on lanes out of bounds,
races and overflow in every test of this file. With one, the same rows run on it.
"""

import interpreter
import proof
import pytest
import torch
from cases import CASES, Case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmcore.op import use

ON_GPU = torch.cuda.is_available()
REPEATS = 1000 if ON_GPU else 2

BODIES = [pytest.param(case, body, id=f"{name}-{body}") for name, case in CASES.items() for body in case.bodies]
HARD = [
    pytest.param(case, body, shape, id=f"{name}-{body}-{'x'.join(map(str, shape))}")
    for name, case in CASES.items()
    for body in case.bodies
    for shape in case.shapes
]
every_body = pytest.mark.parametrize("case, body", BODIES)
with_gradient = pytest.mark.parametrize("case, body", [p for p in BODIES if not p.values[0].forward_only])


def usual(case: Case) -> tuple[int, ...]:
    """A shape of the row with several rows and columns: the largest that is not the slowest."""
    several = [s for s in case.shapes if min(s) > 1] or case.shapes
    return sorted(several, key=lambda s: torch.Size(s).numel())[len(several) // 2]


@pytest.mark.parametrize("case, body, shape", HARD)
def test_as_exact_as_eager(case, body, shape):
    for dtype in case.dtypes:
        drawn = proof.trials(case, shape, dtype, body)
        with use(body):
            proof.check(case, case.op, drawn)


@every_body
def test_any_shape(case, body):
    @settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*(st.integers(*bounds) for bounds in case.draws)), st.sampled_from(case.dtypes))
    def holds(shape, dtype):
        drawn = proof.trials(case, shape, dtype, body)
        with use(body):
            proof.check(case, case.op, drawn)

    holds()


@every_body
@pytest.mark.parametrize("layout", ["padded_rows", "transposed"])
def test_views(case, body, layout):
    """Inputs and incoming gradients that are views, every one of them at once, no two with the same row strides."""

    def laid(tensors, first):
        if layout == "transposed":
            return [t if t is None else proof.transposed(t) for t in tensors]
        return [t if t is None else proof.padded_rows(t, i) for i, t in enumerate(tensors, first)]

    drawn = proof.trials(case, usual(case), torch.float32, body)
    with use(body):
        proof.check(case, case.op, [(laid(args, 0), laid(grads, len(args))) for args, grads in drawn])


@with_gradient
def test_expanded_gradient(case, body):
    """``y.sum().backward()`` sends a gradient of stride 0."""
    drawn = proof.trials(case, usual(case), torch.float32, body)
    drawn = [(args, [g.new_tensor(0.7).expand(g.shape) for g in grads]) for args, grads in drawn]
    with use(body):
        proof.check(case, case.op, drawn)


@pytest.mark.skipif(ON_GPU, reason="reads the arguments of launches from the interpreter")
@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if c.no_copy])
def test_padded_rows_are_not_copied(case):
    args, grads = proof.trials(case, usual(case), torch.float32)[0]
    args = [proof.padded_rows(a) if i in case.no_copy else a for i, a in enumerate(args)]
    with use("triton"), interpreter.recorded() as launches:
        proof.run(case, case.op, args, grads)
    reached = {span.tensor.data_ptr() for launch in launches for span in launch.spans}
    for i in case.no_copy:
        assert args[i].data_ptr() in reached, f"argument {i} was copied on the way to the kernel"


@with_gradient
def test_gradcheck(case, body):
    args = proof.arguments(case, case.gradcheck, torch.float64, proof.device(body))
    wanted = proof.differentiated(case, args)
    assert sum(args[i].numel() for i in wanted) <= 24
    for i in wanted:
        args[i].requires_grad_()
    with use(body):
        assert torch.autograd.gradcheck(case.op, args)


@with_gradient
def test_each_gradient_alone(case, body):
    """Only one argument needs a gradient: it is the same as when all do."""
    args, grads = proof.trials(case, usual(case), torch.float32, body)[0]
    wanted = proof.differentiated(case, args)
    with use(body):
        together = proof.run(case, case.op, args, grads)[-len(wanted) :]
        for i, expected in zip(wanted, together, strict=True):
            alone = [a.detach().requires_grad_(j == i) if a is not None else a for j, a in enumerate(args)]
            (g,) = torch.autograd.grad(proof.outputs(case.op, alone), alone[i], grads)
            # Programs of the interpreter come in one order; on a GPU sums in any order differ in the last bits.
            if case.same_alone and not (case.unordered and ON_GPU):
                assert torch.equal(g, expected)
            else:
                torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@every_body
def test_opcheck(case, body):
    args, grads = proof.trials(case, usual(case), torch.float32, body)[0]
    with use(body), proof.calls() as log:
        proof.run(case, case.op, args, grads)
    assert log, "the operator did not go through the dispatcher"
    with use(body):
        for op, op_args in log:
            torch.library.opcheck(getattr(torch.ops.fmcore, op.name).default, op_args)


@every_body
def test_results_lie_as_promised(case, body):
    """Also for strided inputs every result has the strides that a compiler was told it would have."""
    args, grads = proof.trials(case, usual(case), torch.float32, body)[0]
    args, grads = [a if a is None else proof.transposed(a) for a in args], [proof.transposed(g) for g in grads]
    with use(body), proof.calls() as log:
        proof.run(case, case.op, args, grads)
    with use(body):
        for op, op_args in log:
            torch.library.opcheck(getattr(torch.ops.fmcore, op.name).default, op_args, test_utils="test_faketensor")


@every_body
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_break(case, body, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    args, grads = proof.trials(case, usual(case), torch.float32, body)[0]
    with use(body):
        got, expected = (proof.run(case, fn, args, grads) for fn in (compiled, case.op))
    for g, e in zip(got, expected, strict=True):
        assert torch.equal(g, e)


@every_body
def test_same_bits_each_time(case, body):
    if case.unordered and ON_GPU:
        pytest.skip("adds in any order")
    args, grads = proof.trials(case, usual(case), case.dtypes[-1], body)[0]
    with use(body):
        first = proof.run(case, case.op, args, grads)
        for _ in range(REPEATS - 1):
            assert all(torch.equal(a, b) for a, b in zip(first, proof.run(case, case.op, args, grads), strict=True))


@pytest.mark.skipif(ON_GPU, reason="addresses are checked in the interpreter")
@pytest.mark.parametrize("case", [pytest.param(c, id=n) for n, c in CASES.items() if c.phantom])
def test_addresses_beyond_32_bits(case):
    """2^34 elements on tensors without memory, through all the host code: every address lies in its tensor."""
    with interpreter.recorded() as launches:
        proof.run_phantom(case)
    assert launches and all(launch.phantom for launch in launches)
