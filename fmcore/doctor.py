"""What is installed here, which GPU there is, and which body every operator runs and why.

Nothing in this file may fail because something is missing: finding that out is its purpose.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fmcore import __version__

# Package: what it is for, and whether fmcore works without it.
PACKAGES = {
    "torch": ("everything", True),
    "triton": ("the kernels", True),
    "numpy": ("data", True),
    "safetensors": ("checkpoints", True),
    "rich": ("progress and tables", True),
    "tyro": ("the command line; argparse takes over without it", False),
    "matplotlib": ("the loss curve of a report", False),
    "tokenizers": ("BPE tokenizers", False),
    "datasets": ("--data hf:org/name", False),
    "tensorboard": ("--tensorboard", False),
    "transformers": ("the tests of import and export", False),
    "peft": ("the tests of adapters", False),
}


@dataclass(frozen=True)
class DoctorOptions:
    """What is installed, which GPU there is, and which body every operator runs and why not another."""

    json: bool = False  # for programs

    def execute(self) -> int:
        found = examine()
        print(json.dumps(found, indent=2) if self.json else render(found))
        return 0 if found["usable"] else 1


def examine() -> dict[str, Any]:
    """All findings, ready for JSON; ``usable`` says whether training works on this machine."""
    problems = [f"{name} is missing" for name, (_, must) in PACKAGES.items() if must and _version(name) is None]
    gpu, operators = _try(_gpu, problems, "torch"), _try(_operators, problems, "fmcore's operators")
    presets = _try(_presets, problems, "fmcore's models")
    return {
        "fmcore": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {
            name: {"version": _version(name), "for": why, "required": must} for name, (why, must) in PACKAGES.items()
        },
        "nvcc": _nvcc(),
        "fmcore_body": os.environ.get("FMCORE_BODY", ""),
        **(gpu or {"gpus": [], "threads": None, "cuda": None, "driver": None, "why_no_gpu": "torch cannot be asked"}),
        "operators": operators or [],
        "presets": presets or [],
        "problems": problems,
        "usable": not problems,
    }


def _try(ask: Callable[[], Any], problems: list[str], what: str) -> Any:
    """What ``ask`` finds out; ``None``, and a line in ``problems``, when it fails."""
    # Broken installations raise anything at import: missing libraries, wrong versions, a bad FMCORE_BODY.
    try:
        return ask()
    except Exception as e:
        problems.append(f"{what} cannot be used: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    """What a program prints, or ``None`` when it is not there or fails."""
    path = shutil.which(command[0])
    try:
        done = subprocess.run([path or "", *command[1:]], capture_output=True, text=True, timeout=20) if path else None
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done and done.returncode == 0 else None


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    version = _output_of("nvcc", "--version") or _output_of(str(Path(home) / "bin" / "nvcc"), "--version")
    release = re.search(r"release ([\d.]+)", version or "")
    return release[1] if release else None


def _driver() -> str | None:
    versions = (_output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").split()
    return versions[0] if versions else None


def _gpu() -> dict[str, Any]:
    """The GPUs that torch sees, why there is none, and what computes instead."""
    import torch

    from fmcore.train.metrics import peak_flops

    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        seen = torch.cuda.get_device_properties(i)
        gpus.append(
            {
                "name": seen.name,
                "capability": f"{seen.major}.{seen.minor}",
                "memory_gib": round(seen.total_memory / 2**30, 1),
                "multiprocessors": seen.multi_processor_count,
                "peak_flops": peak_flops(seen.name),
            }
        )
    driver, cuda = _driver(), torch.version.cuda or torch.version.hip
    return {
        "gpus": gpus,
        "why_no_gpu": "" if gpus else _why_no_gpu(cuda, driver),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cuda": cuda,
        "driver": driver,
    }


def _why_no_gpu(cuda: str | None, driver: str | None) -> str:
    if cuda is None:
        return "this torch is built for CPUs only"
    return "no driver answers" if driver is None else "torch sees no device (CUDA_VISIBLE_DEVICES?)"


def _operators() -> list[dict[str, Any]]:
    """For each public operator its bodies, the one that runs here, and why; then operators with no function of ours."""
    import torch

    # Imported for what it registers: an optimizer may have kernels that no public function calls.
    import fmcore.optim  # noqa: F401
    from fmcore import ops
    from fmcore.op import OPS, behind

    x = torch.empty(1, device="cuda" if torch.cuda.is_available() else "cpu")
    public = {name: fn for name, fn in vars(ops).items() if getattr(fn, "__module__", "").startswith("fmcore.kernels.")}
    parts = {name: behind(fn) for name, fn in public.items()}
    shown = {op.name for found in parts.values() for op in found}
    parts |= {name: [op] for name, op in OPS.items() if name not in shown and op.module.startswith("fmcore.")}
    return [_row(name, [_part(op, x) for op in found]) for name, found in parts.items()]


def _row(name: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One line of the table: an operator and what its parts, mostly forward and backward, run."""
    if not parts:
        why = "PyTorch paths only; no kernel of its own yet"
        return {"operator": name, "runs": "eager", "bodies": ["eager"], "why": why, "parts": []}
    runs = {part["name"].removeprefix(f"{name}_"): part["runs"] for part in parts}
    return {
        "operator": name,
        "runs": parts[0]["runs"] if len({*runs.values()}) == 1 else ", ".join(f"{k} {v}" for k, v in runs.items()),
        "bodies": list(dict.fromkeys(body for part in parts for body in part["bodies"])),
        "why": "; ".join(dict.fromkeys(part["why"] for part in parts)),
        "parts": parts,
    }


def _part(op: Any, x: Any) -> dict[str, Any]:
    """What one operator of the dispatcher runs for tensors on the device of ``x``, and why nothing else."""
    forced = op._choice()
    taken = [name for name, (_, accepts) in op.bodies.items() if _takes(op, accepts, x)]
    # As Op.eager says: on a CPU only a body of that name replaces the plain path.
    runs = forced or (taken[-1] if taken and (x.is_cuda or "cpu" in taken) else "eager")
    notes = []
    for name in reversed([name for name in op.bodies if name != runs]):
        place = "CPU" if name == "cpu" else "GPU"
        notes.append(f"{name} needs a {place}" if x.is_cuda != (place == "GPU") else f"{name} is slower")
    notes += ["eager is the plain formula"] if runs != "eager" else []
    return {
        "name": op.name,
        "runs": runs,
        "bodies": ["eager", *op.bodies],
        "why": "asked for by FMCORE_BODY" if forced else "; ".join(notes),
    }


def _takes(op: Any, accepts: Callable[..., bool], x: Any) -> bool:
    """Whether a body takes tensors like ``x`` in some shape of a training step; nobody reads their values."""
    by_type = {"Tensor": lambda t: t, "List[Tensor]": lambda t: [t], "bool": lambda t: False, "int": lambda t: 1}
    kinds = [str(argument.type) for argument in op._overload._schema.arguments]
    for shape in ((1024, 1024), (4, 1024, 16, 64), (4096, 16, 64), (2**20,)):
        t = x.expand(shape)
        try:
            if accepts(*(by_type.get(kind, lambda t: None)(t) for kind in kinds)):
                return True
        except Exception:  # a look at a number or a dimension that these arguments do not have
            continue
    return False


def _presets() -> list[str]:
    from fmcore.models.decoder import PRESETS

    return list(PRESETS)


def render(found: dict[str, Any]) -> str:
    """The findings as one screen of text."""
    threads = f"{found['threads']} threads for torch on {found['cores']} cores" if found["threads"] else ""
    lines = [f"fmcore {found['fmcore']}   Python {found['python']}   {found['platform']}   {threads}".rstrip(), ""]
    lines += [_package(name, about) for name, about in found["packages"].items()]
    lines += ["", *_devices(found)]
    if found["operators"]:
        lines += ["", f"{'operator':22} {'bodies':18} {'runs':8} why"]
        lines += [
            f"{row['operator']:22} {' '.join(row['bodies']):18} {row['runs']:8} {row['why']}"
            for row in found["operators"]
        ]
    lines += [f"FMCORE_BODY={found['fmcore_body']}" if found["fmcore_body"] else "FMCORE_BODY is not set"]
    lines += ["presets: " + ", ".join(found["presets"])] if found["presets"] else []
    lines += ["", *(f"problem: {problem}" for problem in found["problems"])]
    verdict = "ready" if found["usable"] else f"not usable until that is mended (Python is {sys.executable})"
    return "\n".join([*lines, verdict])


def _package(name: str, about: dict[str, Any]) -> str:
    missing = f"missing (needed for {about['for']}: pip install {name})"
    return f"{name:14} {about['version'] or missing}"


def _devices(found: dict[str, Any]) -> list[str]:
    lines = []
    for i, gpu in enumerate(found["gpus"]):
        flops = gpu["peak_flops"]
        peak = f"peak {flops / 1e12:.0f} bf16 TFLOP/s" if flops else "peak unknown, so no MFU is shown"
        lines.append(
            f"GPU {i}: {gpu['name']}, capability {gpu['capability']}, {gpu['memory_gib']} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, {peak}"
        )
    lines = lines or [f"no GPU: {found['why_no_gpu']}"]
    versions = {"CUDA of torch": found["cuda"], "driver": found["driver"], "nvcc": found["nvcc"]}
    return [*lines, ", ".join(f"{name} {version or 'none'}" for name, version in versions.items())]
