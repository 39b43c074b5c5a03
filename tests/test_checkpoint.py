"""Checkpoints: what is saved comes back bit for bit, and neither a disk nor a kill loses the last good one."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fmcore.errors import InputError
from fmcore.files import read_safetensors, write_json, write_safetensors
from fmcore.train import checkpoint
from fmcore.train.checkpoint import checkpoints, load_checkpoint, rng_state, save_checkpoint, set_rng_state


class Tokenizer:
    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text('{"vocab": 257}')


def save(run: Path, step: int, size: int = 64, keep: int = 2, value: float | None = None) -> Path:
    value = float(step) if value is None else value
    model = {"embed.weight": torch.full((size,), value), "norm.weight": torch.full((3,), value).bfloat16()}
    model["head.weight"] = model["embed.weight"]
    optimizer = {"exp_avg.embed.weight": torch.full((size,), value)}
    state = {"step": step, "loader": {"row": step * 7}}
    return save_checkpoint(
        run, step, model=model, optimizer=optimizer, state=state, config={"width": 8}, tokenizer=Tokenizer(), keep=keep
    )


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000
    return text


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and bytes(a.view(-1).view(torch.uint8)) == bytes(b.contiguous().view(-1).view(torch.uint8))
    )


def test_round_trip_is_bit_exact(tmp_path):
    model = {
        "a.weight": torch.randn(5, 3),
        "half": torch.tensor([1.0, float("nan"), float("inf"), -0.0]).bfloat16(),
        "transposed": torch.randn(4, 6).t(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 4),
    }
    optimizer = {"step": torch.tensor(7), **rng_state()}
    state = {"loader": {"epoch": 1}, "best": 2.25, "text": "\u00e4"}
    path = save_checkpoint(tmp_path, 12, model=model, optimizer=optimizer, state=state, config={"layers": 2})
    assert path == tmp_path / "checkpoints" / "step-00000012"
    for where in (tmp_path, path, path.parent):
        found = load_checkpoint(where)
        assert (found.path, found.step, found.state, found.config) == (path, 12, state, {"layers": 2})
        assert found.tokenizer is None
        assert found.model.keys() == model.keys() and all(same(found.model[k], t) for k, t in model.items())
        assert found.optimizer.keys() == optimizer.keys()
        assert all(same(found.optimizer[k], t) for k, t in optimizer.items())
    assert load_checkpoint(path, optimizer=False).optimizer == {}


def test_tied_weights_are_stored_once(tmp_path):
    path = save(tmp_path, 1, size=10_000)
    found = load_checkpoint(path)
    assert (path / "model.safetensors").stat().st_size < 60_000
    assert found.model["head.weight"] is found.model["embed.weight"]
    assert found.tokenizer == path / "tokenizer"
    assert (found.tokenizer / "tokenizer.json").read_text() == '{"vocab": 257}'


def test_views_of_one_tensor_are_not_tied(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    model = {"whole": base, "row": base[0], "transposed": base.t()}
    path = save_checkpoint(tmp_path, 1, model=model, optimizer={}, state={}, config={})
    found = load_checkpoint(path).model
    assert all(same(found[k], t) for k, t in model.items())


def test_prune_keeps_the_newest(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000030", "step-00000040"]
    save(tmp_path, 50, keep=1)
    assert names(tmp_path) == ["step-00000050"]
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 60, keep=0)


def test_stale_folders_of_killed_saves_are_swept(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / "checkpoints" / "step-00000002.tmp-99999"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert load_checkpoint(tmp_path).step == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["notes", "step-00000001", "step-00000003"]


def test_a_later_history_is_put_aside_not_deleted(tmp_path):
    for step, name in ((11, "step-00000020.aside"), (12, "step-00000020.aside1")):
        save(tmp_path, 20)
        with pytest.warns(UserWarning, match=f"put aside as {name}$"):
            save(tmp_path, step)
        assert load_checkpoint(tmp_path).step == step
    assert {"step-00000020.aside", "step-00000020.aside1"} <= set(names(tmp_path))


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 10, value=1.0)
    save(tmp_path, 10, value=2.0)
    assert names(tmp_path) == ["step-00000010"]
    assert load_checkpoint(tmp_path).model["norm.weight"][0] == 2.0


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json",
         "tokenizer/tokenizer.json")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(tmp_path, name):
    path = save(tmp_path, 5)
    file = path / name
    good = file.read_bytes()
    draw = random.Random(0)
    places = range(len(good)) if len(good) <= 64 else [0, 7, 8, len(good) - 1, *draw.sample(range(len(good)), 60)]
    for at in places:
        bad = bytearray(good)
        bad[at] ^= 1 << draw.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(InputError) as error:
            load_checkpoint(path)
        assert str(file) in one_line(error)
    file.write_bytes(good)
    assert load_checkpoint(path).step == 5


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_found(tmp_path, name, verify):
    path = save(tmp_path, 5)
    file = path / name
    good = file.read_bytes()
    for size in (0, 1, 7, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:size])
        # A manifest that lost only its last newline has lost nothing.
        if name == "manifest.json" and size == len(good) - 1:
            continue
        with pytest.raises(InputError, match=name):
            load_checkpoint(path, verify=verify)
    file.unlink()
    with pytest.raises(InputError, match=name):
        load_checkpoint(path, verify=verify)


def test_falls_back_to_the_older_one_with_a_warning(tmp_path):
    save(tmp_path, 10)
    newest = save(tmp_path, 20)
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.warns(UserWarning, match=r"step-00000020/model.safetensors: damaged.*trying the older step-00000010"):
        assert load_checkpoint(tmp_path).step == 10
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010" / "tokenizer")
    with pytest.warns(UserWarning), pytest.raises(InputError, match="none of its 2 checkpoints can be used"):
        load_checkpoint(tmp_path)
    # Asked for by name there is no other.
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(newest)


def test_no_checkpoint(tmp_path):
    assert checkpoints(tmp_path) == []
    for path in (tmp_path, tmp_path / "none", tmp_path / "checkpoints" / "step-00000001"):
        with pytest.raises(InputError) as error:
            load_checkpoint(path)
        assert str(path) in one_line(error)


def test_manifest_cannot_point_outside(tmp_path):
    path = save(tmp_path, 1)
    for name in ("../../secret", "/etc/passwd", "a/../b", "", "a\nb"):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest.pop("sha256")
        manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
        write_json(path / "manifest.json", manifest | {"sha256": checkpoint._self_digest(manifest)})
        with pytest.raises(InputError, match="plain relative name"):
            load_checkpoint(path)


@pytest.mark.parametrize("tied", [{"x": "nowhere"}, {"embed.weight": "norm.weight"}, {"x": 3}, []])
def test_manifest_cannot_tie_what_is_not_there(tmp_path, tied):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.pop("sha256")
    manifest["tied"] = tied
    write_json(path / "manifest.json", manifest | {"sha256": checkpoint._self_digest(manifest)})
    with pytest.raises(InputError, match="tied"):
        load_checkpoint(path)


def test_full_disk_leaves_the_previous_one(tmp_path):
    save(tmp_path, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError) as error:
            save(tmp_path, 2, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    text = one_line(error)
    assert "step-00000002: File too large; 8.1 MB are needed; step-00000001 is untouched" in text
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert load_checkpoint(tmp_path).step == 1


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(checkpoint, "write_file", lambda *args: pytest.fail("wrote"))
    with pytest.raises(InputError, match=r"No space left on device, 0.0 MB free; 0.1 MB are needed; there was none"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("nth", range(1, 10))
def test_failing_fsync(tmp_path, monkeypatch, code, nth):
    save(tmp_path, 1)
    calls = iter(range(1, 100))
    real = os.fsync

    def fail(fd: int) -> None:
        if next(calls) == nth:
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=f"{os.strerror(code)}; .* step-00000001 is untouched"):
        save(tmp_path, 2)
    # The last call is that of the parent folder: the new one is then in place already, and complete.
    assert names(tmp_path) == ["step-00000001"] + ["step-00000002"] * (nth == 9)
    assert load_checkpoint(tmp_path).step == 1 + (nth == 9)


def test_run_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        save(tmp_path / "run", 1)


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path):
    for state in ({"loss": float("nan")}, {"x": torch.zeros(1)}):
        with pytest.raises(ValueError, match="state: wanted values that JSON can hold"):
            save_checkpoint(tmp_path, 1, model={}, optimizer={}, state=state, config={})
    assert not (tmp_path / "checkpoints").exists()


KILLED = """
    import hashlib, os, random, shutil, signal, sys, time
    from pathlib import Path
    import torch
    from fmcore.train import checkpoint

    torch.set_num_threads(1)
    # What a process has written outlives it without fsync, which is for the machine; and it is slow on some disks.
    os.fsync = lambda fd: None
    run = Path(sys.argv[1])

    def save(step, value):
        model = {"w": torch.full((50_000,), value), "v": torch.full((3,), value)}
        checkpoint.save_checkpoint(run, step, model=model, optimizer={"m": torch.full((9,), value)},
                                   state={"value": value}, config={"c": 1}, keep=1)

    def die_at(n):
        '''Kill this process at the n-th thing that it does to the disk.'''
        left = [n]
        def tick():
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        def hook(event, args):
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.unlink"):
                tick()
        sys.addaudithook(hook)
        os.fsync = lambda fd: (tick(), tick())
        class Digest:
            def __init__(self):
                self.real = sha256()
                self.hexdigest = self.real.hexdigest
            def update(self, data):
                tick()
                self.real.update(data)
        sha256, hashlib.sha256 = hashlib.sha256, lambda data=b"": Digest() if not data else sha256(data)

    def child(act):
        pid = os.fork()
        if pid == 0:
            act()
            os._exit(0)
        return pid

    def look(step, value, before):
        '''What is on disk now is the old state or the new one, whole.'''
        for path in checkpoint.checkpoints(run):
            checkpoint.load_checkpoint(path)
        found = checkpoint.load_checkpoint(run)
        got = float(found.model["w"][0])
        assert (found.step, got) in ((step, value), before), (found.step, got)
        assert bool((found.model["w"] == got).all()) and bool((found.model["v"] == got).all())
        assert found.state == {"value": got} and bool((found.optimizer["m"] == got).all())
        return (found.step, got)

    draw, counts, seen = random.Random(0), [], set()
    for again in (False, True):  # the next step, then the same step anew
        for n in range(1, 200):
            shutil.rmtree(run, ignore_errors=True)
            save(1, 1.0)
            step = 1 if again else 2
            status = os.waitpid(child(lambda: (die_at(n), save(step, 2.0))), 0)[1]
            seen.add(look(step, 2.0, (1, 1.0)))
            save(step + 1, 3.0)
            assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{step + 1:08d}"]
            if status == 0:
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
        counts.append(n - 1)
    last = (1, 1.0)
    shutil.rmtree(run)
    save(*last)
    for i in range(2, 42):
        pid = child(lambda: save(i, float(i)))
        time.sleep(draw.random() * 0.004)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        last = look(i, float(i), last)
        seen.add("random new" if last[0] == i else "random old")
    print(*counts, len(seen))
"""


def test_kill_9_at_every_point_of_a_save(tmp_path):
    """Each fault point in a forked child of its own; the loader must find the old or the new one, never a mix."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(tmp_path / "run")]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=root, env=_env(root))
    assert done.returncode == 0, done.stderr[-2000:]
    new, again, seen = map(int, done.stdout.split())
    assert new >= 30 and again >= 30
    # Both outcomes came up: old and new.
    assert seen >= 4


def _env(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}


def test_rng_state_round_trip(tmp_path):
    loader = torch.Generator().manual_seed(3)
    write_safetensors(tmp_path / "rng", rng_state({"loader": loader}))
    wanted = torch.rand(4), torch.rand(4, generator=loader)
    stored = read_safetensors(tmp_path / "rng")
    assert all(t.dtype == torch.uint8 for t in stored.values())
    torch.manual_seed(99)
    set_rng_state(stored | {"exp_avg.w": torch.zeros(1)}, {"loader": loader})
    assert torch.equal(torch.rand(4), wanted[0]) and torch.equal(torch.rand(4, generator=loader), wanted[1])


@pytest.mark.parametrize("state", [{}, {"rng.cpu": torch.zeros(5)}, {"rng.cpu": torch.zeros(5, dtype=torch.uint8)}])
def test_bad_rng_state(state):
    with pytest.raises(InputError, match="rng.cpu"):
        set_rng_state(state)
