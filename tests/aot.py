"""Compile every kernel of every row of tests/rows/ for GPUs that are not here, and say what the code needs.

    python tests/aot.py             print the resources as JSON
    python tests/aot.py --pin       write them to tests/resources.json, which tests/test_aot.py compares with
    python tests/aot.py --only X    rows whose name contains X; with --pin the others keep what was pinned

The launches are the operators' own: their host code runs on tensors of the ``meta`` device, and what it hands to Triton
is specialized as the JIT would (divisible by 16, equal to 1) and compiled for each target. Runs in a process without
TRITON_INTERPRET, because that is read when a kernel is decorated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import proof  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from cases import CASES, COMPILED  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime import jit  # noqa: E402

from fmcore.kernels import launch  # noqa: E402
from fmcore.op import use  # noqa: E402

PINS = HERE / "resources.json"
TARGETS = {f"sm_{cap}": GPUTarget("cuda", cap, 32) for cap in (80, 89, 90, 100, 120)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
# bf16 for every target; fp32 only here, to bound the time.
FP32_TARGET = "sm_90"
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


Launch = tuple[str, jit.JITFunction, tuple, dict]


def launches(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Launch]:
    """The launches of forward and backward, or of an operator without a row: key, kernel, arguments, keywords."""
    case, log = CASES.get(name), []

    def record(kernel, *args, grid, warmup, **kwargs):
        log.append((kernel, args, kwargs))

    run, jit.JITFunction.run = jit.JITFunction.run, record
    try:
        with use("triton"), proof.direct():
            if case is None:
                COMPILED[name]()
            else:
                args = proof.arguments(case, shape, dtype, "meta")
                proof.run(case, case.op, args, [torch.empty_like(y) for y in proof.outputs(case.op, args)])
    finally:
        jit.JITFunction.run = run
    seen = set()
    for kernel, args, kwargs in log:
        what = f"{name} {'x'.join(map(str, shape))} {str(dtype)[6:]}" if case else name
        key = f"{what} {kernel.__name__}"
        if key not in seen:
            seen.add(key)
            yield key, kernel, args, kwargs


def compiled(kernel: jit.JITFunction, args: tuple, kwargs: dict, target: GPUTarget) -> triton.compiler.CompiledKernel:
    """``kernel`` for ``target``, specialized to these arguments as a launch would."""
    backend = make_backend(target)
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **kwargs)
    options, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), target=target, options=options.__dict__)


def _tool(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        return subprocess.run([NVIDIA_TOOLS / name, option, f.name], capture_output=True, text=True, check=True).stdout


def nvidia_resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    usage = _tool("cuobjdump", "--dump-resource-usage", kernel.asm["cubin"])
    sass = _tool("nvdisasm", "-c", kernel.asm["cubin"])
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "threads": 32 * kernel.metadata.num_warps,
        "registers": found["REG"],
        "spills": max(found["STACK"], found["LOCAL"], len(re.findall(r"\b(?:STL|LDL)\b", sass))),
        "shared": kernel.metadata.shared,
        "loads_128": len(re.findall(r"\bLDG\.E(?:\.\w+)*?\.128\b", sass)),
        "stores_128": len(re.findall(r"\bSTG\.E(?:\.\w+)*?\.128\b", sass)),
        "hgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "hmma": len(re.findall(r"\bHMMA\b", sass)),
        "float_atomics": len(re.findall(r"\b(?:RED|REDG|ATOM|ATOMG|ATOMS)\.[\w.]*F(?:16|32|64)", sass)),
    }


def amd_resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    text = kernel.asm["amdgcn"]
    found = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", text)}
    return {
        "threads": 64 * kernel.metadata.num_warps,
        "registers": found["vgpr_count"],
        "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"],
        "shared": kernel.metadata.shared,
        "loads_128": len(re.findall(r"\b(?:global|buffer)_load_(?:b128|dwordx4)\b", text)),
        "stores_128": len(re.findall(r"\b(?:global|buffer)_store_(?:b128|dwordx4)\b", text)),
        "mfma": len(re.findall(r"\bv_mfma_", text)),
        "float_atomics": len(re.findall(r"\b\w*atomic\w*_(?:pk_)?(?:add|min|max)_(?:f16|bf16|f32|f64)\b", text)),
    }


def measure(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, dict[str, dict[str, int]]]:
    """Kernel key -> target -> resources, of one row on one shape."""
    chosen = CASES[name].targets if name in CASES else ()
    labels = (FP32_TARGET,) if dtype == torch.float32 else chosen or tuple(TARGETS)
    found: dict[str, dict[str, dict[str, int]]] = {}
    for label in labels:
        resources = nvidia_resources if TARGETS[label].backend == "cuda" else amd_resources
        with launch.assume(label):
            for key, kernel, args, kwargs in launches(name, shape, dtype):
                found.setdefault(key, {})[label] = resources(compiled(kernel, args, kwargs, TARGETS[label]))
    return found


def everything(only: str = "") -> dict[str, dict[str, dict[str, int]]]:
    jobs = [(n, s, torch.bfloat16) for n, c in CASES.items() if only in n for s in c.aot]
    jobs += [(n, c.aot[0], torch.float32) for n, c in CASES.items() if only in n and c.aot and not c.targets]
    dtypes = {n: torch.float32 if n.endswith("float32") else torch.bfloat16 for n in COMPILED}
    jobs += [(n, (), dtypes[n]) for n in COMPILED if only in n]
    found: dict[str, dict[str, dict[str, int]]] = {}
    with ProcessPoolExecutor(2) as pool:
        for result in pool.map(measure, *zip(*jobs, strict=True)):
            found |= result
    return dict(sorted(found.items()))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--pin", action="store_true", help=f"write {PINS.name}")
    options.add_argument("--only", default="", help="rows whose name contains this")
    given = options.parse_args()
    found = everything(given.only)
    if given.pin and given.only:
        kept = json.loads(PINS.read_text())["kernels"]
        found = dict(sorted(({k: v for k, v in kept.items() if given.only not in k.split()[0]} | found).items()))
    text = json.dumps({"triton": triton.__version__, "kernels": found}, indent=1)
    # One line for each kernel and target: a change reads as one changed line.
    text = re.sub(r"\{\s+(\"threads\"[^}]*?)\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text)
    if given.pin:
        PINS.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
