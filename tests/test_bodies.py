"""A decoder learns the same whichever bodies its operators run: the numerics contract, for a whole training step."""

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import interpreter
import proof
import pytest
import torch
from operators import public
from tiny import GPT2, LLAMA, ROOT, process
from torch import Tensor

import fmcore.nn
from fmcore import ops
from fmcore.models import decoder
from fmcore.models.decoder import Decoder
from fmcore.op import OPS, Op, behind, use
from fmcore.optim import AdamW, decay_groups

STEPS = 3
SEEDS = (0, 1, 2, 3)
# The second step is the first to see what an optimizer did.
SHORT = {"seeds": SEEDS[:1], "steps": 2}
# Between them every operator that a decoder trains with, in few launches: the interpreter takes its time for each.
CONFIGS = {
    "gpt2": replace(GPT2, layers=1, heads=2),
    # Grouped heads, norms of heads, a window and an untied head, with documents packed into the rows.
    "packed": replace(LLAMA, layers=1, heads=2, kv_heads=1, head_dim=8, qk_norm=True, window=3),
    "gelu": replace(LLAMA, layers=1, heads=2, activation="gelu", tied=True),
}
# How each takes its loss: as people do, as the trainer does, and row by row, which may be other operators.
REDUCTIONS = {"gpt2": "mean", "packed": "sum", "gelu": "none"}
# The cache has it, and nothing trains on a cache.
UNTRAINED = {"decode_attention"}


@dataclass(frozen=True)
class Curve:
    """Loss and norm of the gradient at each step: AdamW divides the size of a gradient away, the norm tells it."""

    losses: list[float]
    norms: list[float]


def data(packed: bool, device: str) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(1)
    tokens, targets = (torch.randint(40, (2, 12), generator=made) for _ in range(2))
    targets[0, 3] = targets[1, 11] = -100
    batch = {"tokens": tokens.to(device), "targets": targets.to(device)}
    if packed:
        lengths = (5, 7, 1, 11)
        positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 12)
        batch["positions"] = positions.to(device)
        batch["cu_seqlens"] = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    return batch


def train(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: str = proof.DEVICE,
    seeds: Sequence[int] = SEEDS,
    steps: int = STEPS,
) -> Curve:
    curve = Curve([], [])
    batch = data(name == "packed", device)
    for seed in seeds:
        torch.manual_seed(seed)
        model = Decoder(CONFIGS[name])
        with torch.no_grad():
            for p in model.parameters():
                p += 0.2 * torch.randn_like(p)
        model.to(device, dtype)
        # With the usual eps a step would make as much of a gradient of rounding errors as of any other.
        optimizer = AdamW(decay_groups(model, 0.1), lr=0.01, eps=1e-4)
        for _ in range(steps):
            loss = model.loss(**batch, reduction=REDUCTIONS[name])
            if REDUCTIONS[name] != "mean":
                loss = loss.sum() / (batch["targets"] != -100).sum()
            loss.backward()
            curve.norms.append(float(optimizer.step(clip=1.0)))
            curve.losses.append(loss.item())
            optimizer.zero_grad(set_to_none=True)
    return curve


def run(fn: Callable, args: tuple) -> object:
    """A body with these arguments; kernels find the tensors of a list by a table of addresses."""
    lists = (a for a in args if isinstance(a, (list, tuple)))
    with interpreter.also(*(t for tensors in lists for t in tensors if isinstance(t, Tensor))):
        return fn(*args)


@contextmanager
def logged() -> Iterator[set[tuple[str, str]]]:
    """Which body of which operator ran inside the block."""
    ran: set[tuple[str, str]] = set()
    before = {name: dict(op.bodies) for name, op in OPS.items()}
    for name, op in OPS.items():
        for body, (fn, accepts) in op.bodies.items():

            def spy(*args, key=(name, body), fn=fn):
                ran.add(key)
                return run(fn, args)

            op.bodies[body] = (spy, accepts)
    try:
        yield ran
    finally:
        for name, bodies in before.items():
            OPS[name].bodies.update(bodies)


@contextmanager
def called() -> Iterator[set[str]]:
    """Which public operators the model called inside the block, and the optimizer's, which reaches its own directly."""
    names = {"adamw_"}
    with pytest.MonkeyPatch.context() as patch:
        for name, fn in public().items():

            def spy(*args, name=name, fn=fn, **options):
                names.add(name)
                return fn(*args, **options)

            patch.setattr(ops, name, spy)
        yield names


def assert_ran(body: str, names: set[str], ran: set[tuple[str, str]]) -> None:
    """Every operator that has ``body`` ran it, forward and backward, and nothing else."""
    if body == "eager":
        assert not ran
        return
    assert [(name, b) for name, b in ran if b != body and body in OPS[name].bodies] == []
    mine = {name for name, b in ran if b == body}
    for name in names:
        have = {op.name for op in behind(public()[name]) if body in op.bodies}
        assert not have or have & mine, f"{name}: none of {sorted(have)} ran {body}"
        for op in have & mine:
            backward = op.removesuffix("_fwd") + "_bwd"
            assert not op.endswith("_fwd") or backward not in have or backward in mine, f"{backward} did not run {body}"


def assert_same(got: Curve, eager: Curve, exact: Curve) -> None:
    """The contract for curves: at most twice eager's error, plus one ulp of the largest value.

    In root mean square over all steps and seeds: the largest of so few errors of about an ulp is a matter of luck.
    """
    for what in ("losses", "norms"):
        g, e, t = (torch.tensor(getattr(curve, what), dtype=torch.float64) for curve in (got, eager, exact))
        error, allowed = ((x - t).square().mean().sqrt().item() for x in (g, e))
        limit = 2 * allowed + torch.finfo(torch.float32).eps * t.abs().max().item()
        assert error <= limit, f"{what}: error {error:.3g} exceeds {limit:.3g}"


def test_the_configurations_train_every_operator_of_a_decoder():
    """Those that the decoder names, and those of the modules that it is made of."""
    source = inspect.getsource(decoder)
    modules = [cls for name, cls in vars(decoder).items() if getattr(cls, "__module__", "") == fmcore.nn.__name__]
    used = set(re.findall(r"\bops\.(\w+)", "\n".join([source, *map(inspect.getsource, modules)])))
    with called() as names:
        for name in CONFIGS:
            train(name, **SHORT)
    assert {"attention", "linear_cross_entropy"} <= names
    assert used - UNTRAINED - names == set(), "no configuration of this file trains these operators of the decoder"


@pytest.fixture(scope="module")
def exact() -> dict[str, Curve]:
    with use("eager"):
        return {name: train(name, torch.float64, "cpu") for name in CONFIGS}


def test_there_is_something_to_learn(exact):
    for curve in exact.values():
        for i in range(0, len(curve.losses), STEPS):
            assert curve.losses[i + STEPS - 1] < 0.95 * curve.losses[i]
        assert min(curve.norms) > 1, "clipping must count"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_curve_is_the_same_with_every_body(name, exact):
    bodies = sorted({body for op in OPS.values() if op.module.startswith("fmcore.") for body in op.bodies})
    assert "triton" in bodies
    eager: dict[str, Curve] = {}
    for body in bodies:
        device = proof.device(body)
        if device not in eager:
            with use("eager"), logged() as ran:
                eager[device] = train(name, device=device)
            assert_ran("eager", set(), ran)
        with use(body), logged() as ran, called() as names:
            got = train(name, device=device)
        assert_ran(body, names, ran)
        assert_same(got, eager[device], exact[name])


def written(op: Op, args: tuple, out: object) -> Iterator[Tensor]:
    """The floating tensors that an operator returned or changed."""
    changed = [a for a, said in zip(args, op._overload._schema.arguments, strict=False) if said.is_write]
    for t in torch.utils._pytree.tree_leaves((out, changed)):
        if isinstance(t, Tensor) and t.is_floating_point():
            yield t


def test_an_error_of_a_thousandth_shows_in_the_curve(monkeypatch, exact):
    """In whichever operator it is: each one is made wrong in turn."""
    seen = set()
    for name in CONFIGS:
        first = Curve(*(values[:2] for values in (exact[name].losses, exact[name].norms)))
        with use("eager"):
            eager = train(name, **SHORT)
        with use("triton"), logged() as ran:
            train(name, **SHORT)
        for op in sorted({op for op, body in ran if body == "triton"} - seen):
            fn, accepts = OPS[op].bodies["triton"]

            def wrong(*args, op=op, fn=fn):
                out = fn(*args)
                for t in written(OPS[op], args, out):
                    t.mul_(1.001)
                return out

            seen.add(op)
            with use("triton"), monkeypatch.context() as patch:
                patch.setitem(OPS[op].bodies, "triton", (wrong, accepts))
                with logged():
                    got = train(name, **SHORT)
            with pytest.raises(AssertionError, match="error .* exceeds"):
                assert_same(got, eager, first)
    assert seen


def test_a_body_that_does_not_run_is_noticed():
    """The log has teeth: an operator that quietly takes another body turns the test of curves red."""
    with use("triton"), logged() as ran, called() as names:
        train("packed", **SHORT)
    forced = {(op, body) for op, body in ran if body == "triton"}
    assert_ran("triton", names, ran)
    for op, body in forced:
        with pytest.raises(AssertionError):
            assert_ran("triton", names, ran - {(op, body)} | {(op, "cpu")})
    with pytest.raises(AssertionError, match="ran triton"):
        assert_ran("triton", names, ran - forced)


def test_the_environment_names_the_bodies():
    """``FMCORE_BODY=*=triton`` for a process is ``use("triton")`` for a block, bit for bit."""
    code = """
import json, sys
sys.path[:0] = ["tests", "."]
import conftest, test_bodies as t
with t.logged() as ran:
    curve = t.train("packed", **t.SHORT)
print(json.dumps([curve.losses, curve.norms, sorted(ran)]))
"""
    env = process()[1] | {"FMCORE_BODY": "*=triton"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    losses, norms, ran = json.loads(done.stdout.splitlines()[-1])
    with use("triton"), logged() as here:
        curve = train("packed", **SHORT)
    assert {tuple(pair) for pair in ran} == here and any(body == "triton" for _, body in here)
    assert (losses, norms) == (curve.losses, curve.norms)
