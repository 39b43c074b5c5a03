"""Code for GPUs that are not here: registers, shared memory and wide loads as pinned; no spills, no float atomics."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).with_name("aot.py")
PINNED = json.loads(AOT.with_name("resources.json").read_text())
# One worker compiles, once.
pytestmark = pytest.mark.xdist_group("aot")
HOW = "If the change is wanted: python tests/aot.py --pin"


@pytest.fixture(scope="module")
def now() -> dict[str, dict[str, dict[str, int]]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    import triton

    if triton.__version__ != PINNED["triton"]:
        pytest.skip(f"resources are pinned for triton {PINNED['triton']}, this is {triton.__version__}")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(AOT)], capture_output=True, text=True, env=env, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)["kernels"]


@pytest.mark.timeout(1900)
def test_as_pinned(now):
    pinned = PINNED["kernels"]
    changed = [
        f"{kernel} {target}: {pinned.get(kernel, {}).get(target)} -> {now.get(kernel, {}).get(target)}"
        for kernel in sorted({*pinned, *now})
        for target in sorted({*pinned.get(kernel, {}), *now.get(kernel, {})})
        if pinned.get(kernel, {}).get(target) != now.get(kernel, {}).get(target)
    ]
    assert not changed, "\n".join([*changed, HOW])


def test_every_case_is_compiled(now):
    from cases import CASES, COMPILED

    wanted = {name for name, case in CASES.items() if case.aot} | {name.split()[0] for name in COMPILED}
    assert wanted == {kernel.split()[0] for kernel in now}


# What a launch is refused beyond: bytes of shared memory of one program, and threads.
SHARED = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}


def test_every_kernel_would_launch(now):
    bad = [
        f"{kernel} {target}: {used}"
        for kernel, targets in now.items()
        for target, used in targets.items()
        if used["shared"] > SHARED[target]
        or used["threads"] > 1024
        or (target != "gfx942" and used["threads"] * used["registers"] > 65536)
    ]
    assert not bad, "\n".join(bad)


def test_no_spills_and_no_float_atomics(now):
    from cases import CASES

    bad = [
        f"{kernel} {target}: {used}"
        for kernel, targets in now.items()
        for target, used in targets.items()
        if used["spills"] or (used["float_atomics"] and not CASES[kernel.split()[0]].unordered)
    ]
    assert not bad, "\n".join(bad)


def test_attention_runs_on_the_warpgroup_products_of_hopper(now):
    """wgmma is what reaches the speed of sm_90; HMMA is the older, slower instruction."""
    kernels = {k: targets["sm_90"] for k, targets in now.items() if k.startswith("attention") and "bfloat16" in k}
    products = {k: used for k, used in kernels.items() if "delta" not in k}
    assert len(products) >= 10
    assert not {k: used for k, used in products.items() if not used["hgmma"] or used["hmma"]}


def test_memory_moves_128_bits_at_a_time(now):
    # Rows of an odd vocabulary are not aligned, and the coefficients of a step are single numbers.
    narrow = ("50257", "coefficients_kernel")
    bad = [
        f"{kernel}: {targets['sm_90']}"
        for kernel, targets in now.items()
        if not any(n in kernel for n in narrow) and not targets["sm_90"]["loads_128"]
    ]
    assert not bad, "\n".join(bad)
