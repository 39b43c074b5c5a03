"""The doctor says what is there and never fails because something is not."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from tiny import fmcore, process

from fmcore import doctor, op, ops
from fmcore.models.decoder import PRESETS


def table(found: dict) -> dict[str, dict[str, str]]:
    return {row["operator"]: row for row in found["operators"]}


def test_one_screen(capsys):
    assert fmcore("doctor") == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 48 and max(map(len, shown.splitlines())) <= 120
    assert shown.rstrip().endswith("ready") and torch.__version__.split("+")[0] in shown
    assert all(preset in shown for preset in PRESETS)


def test_json_is_the_same_for_programs(capsys):
    assert fmcore("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(doctor.examine())) and found["usable"] and found["problems"] == []
    assert found["packages"]["torch"]["version"] == torch.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU runs")
def test_operators_on_a_cpu():
    found = doctor.examine()
    rows = table(found)
    assert found["gpus"] == [] and found["why_no_gpu"]
    for name, row in rows.items():
        assert row["runs"] in ("eager", "cpu"), name
        known = op.OPS.get(name)
        if known is None:
            # Said as it is: these have no kernel of our own.
            assert row["why"] == "PyTorch paths only; no kernel of its own yet" and hasattr(ops, name)
        else:
            assert (row["runs"] == "cpu") is ("cpu" in known.bodies) and "triton needs a GPU" in row["why"]
    public = {name for name, fn in vars(ops).items() if getattr(fn, "__module__", "").startswith("fmcore.kernels")}
    shown = {name.removesuffix("_fwd").removesuffix("_bwd") for name in rows}
    assert shown == public, "every public operator has a row"


def test_the_table_tells_what_really_runs(monkeypatch):
    """Bodies are replaced by ones that remember that they ran."""
    rows, ran = table(doctor.examine()), []
    for name, known in op.OPS.items():
        for body, (_, accepts) in list(known.bodies.items()):

            def spy(*args, name=name, body=body, fn=known.bodies[body][0]):
                ran.append((name, body))
                return fn(*args)

            monkeypatch.setitem(known.bodies, body, (spy, accepts))
    x = torch.randn(512, 256, requires_grad=True, device="cuda" if torch.cuda.is_available() else "cpu")
    ops.rms_norm(x, torch.ones_like(x[0])).sum().backward()
    ops.layer_norm(x, torch.ones_like(x[0])).sum().backward()
    ops.gelu(x).sum().backward()
    ops.swiglu(x).sum().backward()
    expected = {
        (name, row["runs"])
        for name, row in rows.items()
        if row["runs"] != "eager" and name.startswith(("rms_norm", "layer_norm", "gelu", "swiglu"))
    }
    assert set(ran) == expected


def test_a_body_asked_for_is_shown(monkeypatch):
    monkeypatch.setenv("FMCORE_BODY", "rope=triton")
    with op.use("triton", "rope"), op.use("eager"):
        found = doctor.examine()
    rows = table(found)
    assert rows["rope"]["runs"] == "triton" and rows["rms_norm_fwd"]["runs"] == "eager"
    assert "asked for by FMCORE_BODY" in rows["rope"]["why"]
    assert "FMCORE_BODY=rope=triton" in doctor.render(found)


@pytest.mark.parametrize("package, usable", [("torch", False), ("triton", False), ("peft", True), ("tyro", True)])
def test_a_missing_package_is_said_with_the_way_out(monkeypatch, package, usable):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == package else real(name))
    found = doctor.examine()
    assert found["usable"] is usable and (f"{package} is missing" in found["problems"]) is not usable
    assert f"missing (needed for {doctor.PACKAGES[package][0]}: pip install {package})" in doctor.render(found)
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert fmcore("doctor") == (0 if usable else 1)


@pytest.mark.parametrize("package", ["torch", "triton", "rich", "numpy"])
def test_a_package_that_cannot_be_imported(tmp_path, package):
    """A process of its own in which importing the package fails."""
    (tmp_path / f"{package}.py").write_text("raise ImportError('libbroken.so: cannot open\\nshared object file')\n")
    command, env = process("doctor")
    env["PYTHONPATH"] = f"{tmp_path}:{env['PYTHONPATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert "Traceback" not in done.stderr
    # rich is imported by training alone, which the doctor does not start.
    assert done.returncode == (0 if package == "rich" else 1), done.stdout
    assert package == "rich" or "libbroken.so: cannot open shared object file" in done.stdout


def test_a_bad_fmcore_body_is_a_problem_not_a_crash():
    command, env = process("doctor")
    done = subprocess.run(command, capture_output=True, text=True, env=env | {"FMCORE_BODY": "rope"}, timeout=120)
    assert done.returncode == 1 and done.stderr == ""
    assert "FMCORE_BODY must read op=body,op=body" in done.stdout


def test_a_gpu_is_described(monkeypatch):
    class Seen:
        name, major, minor, total_memory, multi_processor_count = "NVIDIA H200", 9, 0, 141 << 30, 132

    found = doctor.examine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Seen)
    gpu = doctor._gpu()
    assert "GPU 0: NVIDIA H200, capability 9.0, 141.0 GiB, 132 multiprocessors, peak 989 bf16 TFLOP/s" in doctor.render(
        {**found, **gpu}
    )
    monkeypatch.setattr(Seen, "name", "Unheard Of 9000")
    assert "peak unknown, so no MFU is shown" in doctor.render({**found, **doctor._gpu()})


def test_programs_that_fail_or_hang_are_not_there(monkeypatch):
    def hang(*args, **options):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert doctor._driver() is None and doctor._nvcc() is None


def test_it_imports_nothing_heavy_itself():
    code = "import sys, fmcore.doctor; print(sorted({'torch', 'triton', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=process()[1], timeout=60)
    assert done.stdout == "[]\n"
    assert importlib.import_module("fmcore.doctor") is doctor
