"""The doctor says what is there and never fails because something is not."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from operators import public
from tiny import fmcore, process

from fmcore import doctor, op, ops
from fmcore.models.decoder import PRESETS


def table(found: dict) -> dict[str, dict[str, str]]:
    return {row["operator"]: row for row in found["operators"]}


def test_one_screen(capsys):
    assert fmcore("doctor") == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 64 and max(map(len, shown.splitlines())) <= 120
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
        assert row["runs"] in ("eager", "cpu") and bool(row["parts"]) is (row["bodies"] != ["eager"]), name
        for part in row["parts"]:
            bodies = op.OPS[part["name"]].bodies
            assert part["runs"] == ("cpu" if "cpu" in bodies else "eager") and part["bodies"] == ["eager", *bodies]
            assert ("triton needs a GPU" in part["why"]) is ("triton" in bodies)
        # Said as it is: these have no kernel of our own.
        assert row["parts"] or row["why"] == "PyTorch paths only; no kernel of its own yet"


def test_every_operator_is_listed_with_its_bodies():
    rows = table(doctor.examine())
    assert [name for name in rows if hasattr(ops, name)] == list(public())
    for name, fn in public().items():
        listed = {part["name"] for part in rows[name]["parts"]}
        assert listed == {o.name for o in op.behind(fn)}
        assert set(rows[name]["bodies"]) == {"eager", *(body for part in listed for body in op.OPS[part].bodies)}
        in_its_file = {o.name for o in op.OPS.values() if o.module == fn.__module__}
        assert bool(listed & in_its_file) is bool(in_its_file), f"{name}: none of {sorted(in_its_file)} is listed"
    listed = {part["name"] for row in rows.values() for part in row["parts"]}
    assert listed == {o.name for o in op.OPS.values() if o.module.startswith("fmcore.")}, "kernels that nobody lists"


def test_parts_that_differ_are_told_apart(monkeypatch):
    with op.use("triton", "swiglu_bwd"):
        row = table(doctor.examine())["swiglu"]
    assert "swiglu_bwd" in {part["name"] for part in row["parts"]}, row
    assert "bwd triton" in row["runs"] and "fwd cpu" in row["runs"] and "asked for by FMCORE_BODY" in row["why"]


@pytest.fixture
def registry(monkeypatch):
    """A registry of the test's own, whose operators are in the files it says."""
    monkeypatch.setattr(op, "OPS", {})

    class Sample:
        @staticmethod
        def make(schema: str, file: str, accepts) -> op.Op:
            # Not registered with the dispatcher: names there cannot be taken back.
            made = object.__new__(op.Op)
            made.name, made.module, made.bodies = schema.partition("(")[0], file, {}
            made._overload = type("Overload", (), {"_schema": torch._C.parse_schema(schema)})
            made.body("cpu", accepts)(lambda *args: None)
            op.OPS[made.name] = made
            return made

    return Sample


@pytest.mark.parametrize("schema, accepts", [
    ("a(Tensor x) -> Tensor", lambda x: True),
    ("a(Tensor[] params, Tensor[] grads, float lr) -> ()", lambda params, grads, lr: params[0].device.type == "cpu"),
    ("a(Tensor q, Tensor k, Tensor? cu, int n) -> Tensor", lambda q, *rest: q.shape[3] % 16 == 0 and rest[2] > 0),
    # A body for the CPU may leave what is small to the plain path.
    ("a(Tensor dy, Tensor[] rest) -> Tensor", lambda dy, rest: dy.shape[0] >= 1024 and dy.numel() >= 2**20),
    ("a(Tensor q, bool causal, int window) -> Tensor", lambda q, causal, window: q.ndim == 3 and not causal),
])  # fmt: skip
def test_bodies_are_asked_with_arguments_of_their_kind(registry, schema, accepts):
    part = doctor._part(registry.make(schema, "fmcore.kernels.a", accepts), torch.empty(1))
    assert part["runs"] == "cpu" and part["why"] == "eager is the plain formula"


def test_a_function_without_operators_of_its_own_shows_those_it_uses(registry, monkeypatch):
    def loss():
        pass

    loss.__module__ = "fmcore.kernels.test_loss"
    file = type(op)(loss.__module__)
    monkeypatch.setitem(sys.modules, loss.__module__, file)
    fwd = registry.make("a_fwd(Tensor x) -> Tensor", "fmcore.kernels.a", lambda *args: True)
    bwd = registry.make("a_bwd(Tensor x) -> Tensor", "fmcore.kernels.a", lambda *args: True)
    assert op.behind(loss) == []
    file.fwd = fwd
    assert op.behind(loss) == [fwd, bwd]
    other = type(op)("fmcore.kernels.a")
    del file.fwd
    file.a = other
    assert op.behind(loss) == [fwd, bwd]
    shared = registry.make("shared(Tensor x) -> Tensor", loss.__module__, lambda *args: True)
    assert op.behind(loss) == [shared]
    own = registry.make("loss(Tensor x) -> Tensor", loss.__module__, lambda *args: True)
    assert op.behind(loss) == [own]


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
    runs = {part["name"]: part["runs"] for row in rows.values() for part in row["parts"]}
    assert all(body == runs[name] for name, body in ran)
    for name in ("rms_norm", "layer_norm", "gelu", "swiglu"):
        parts = {part["name"] for part in rows[name]["parts"] if part["runs"] != "eager"}
        assert not parts or parts & {name for name, _ in ran}, name


def test_a_body_asked_for_is_shown(monkeypatch):
    monkeypatch.setenv("FMCORE_BODY", "rope=triton")
    with op.use("triton", "rope"), op.use("eager"):
        found = doctor.examine()
    rows = table(found)
    assert rows["rope"]["runs"] == "triton" and rows["rms_norm"]["runs"] == "eager"
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
