"""Checkpoints on disk: written beside the old one, then renamed; verified when read.

    run/checkpoints/step-00000100/
        model.safetensors  optimizer.safetensors  state.json  config.json  [tokenizer/...]  manifest.json

A save writes every file into ``step-00000100.tmp-<pid>``, calls fsync on each, and renames the folder: at any moment a
kill -9 leaves either the old state of the run or the new one. ``manifest.json`` holds size and sha256 of every file and
of itself, so that a load notices a lost, truncated or flipped byte and falls back to the next older checkpoint.
One process at a time writes to a run. Only JSON and safetensors are read: nothing on disk can carry code.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fmcore import __version__
from fmcore.errors import InputError
from fmcore.files import (
    file_sha256,
    file_size,
    json_bytes,
    one_line,
    read_json,
    read_safetensors,
    reason,
    safetensors_chunks,
    short,
    sync_folder,
    write_file,
)

FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}){0,3}")
STEP_NAME = re.compile(r"step-([0-9]{8,12})(\.replaced)?")
FORMAT = "fmcore checkpoint"
REQUIRED = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json")


@dataclass(frozen=True)
class Checkpoint:
    """What ``load_checkpoint`` found. Tensors are on the CPU; tied weights are one tensor under both names."""

    path: Path
    step: int  # optimizer steps done
    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    config: dict[str, Any]
    tokenizer: Path | None  # folder with the tokenizer's files


def rng_state(generators: Mapping[str, torch.Generator] | None = None) -> dict[str, torch.Tensor]:
    """The states of torch's own generators and of ``generators``, as uint8 tensors to store with the optimizer's."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state | {f"rng.named.{name}": g.get_state() for name, g in (generators or {}).items()}


def set_rng_state(tensors: Mapping[str, torch.Tensor], generators: Mapping[str, torch.Generator] | None = None) -> None:
    """Put back what ``rng_state`` returned; other tensors are ignored, as are devices that this machine lacks.

    Raises ``InputError`` for a state that is missing or damaged.
    """
    wanted = {"rng.cpu": torch.default_generator}
    if torch.cuda.is_available():
        # Only then are there generators to set.
        torch.cuda.init()
        mine = {f"rng.cuda.{i}": g for i, g in enumerate(torch.cuda.default_generators)}
        wanted |= {name: g for name, g in mine.items() if name in tensors}
    wanted |= {f"rng.named.{name}": g for name, g in (generators or {}).items()}
    for name, generator in wanted.items():
        try:
            generator.set_state(tensors[name].clone())
        except (KeyError, TypeError, RuntimeError) as e:
            raise InputError(f"checkpoint: {name}: wanted the state of a random generator ({one_line(e)})") from e


def save_checkpoint(
    run: Path | str,
    step: int,
    *,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: Any = None,
    keep: int = 2,
) -> Path:
    """Write ``run/checkpoints/step-XXXXXXXX`` and return it; older ones beyond ``keep`` are removed afterwards.

    ``model`` is a ``state_dict()`` (tensors that share memory are stored once), ``state`` and ``config`` are JSON,
    ``tokenizer`` has ``save(folder)``. A checkpoint of a later step belongs to a history that was given up (somebody
    resumed from an older one): it is not deleted but renamed to ``step-XXXXXXXX.aside``. Raises ``InputError`` when the
    disk refuses; what was there before is then untouched.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"save_checkpoint: step must be >= 0 and keep >= 1, got {step} and {keep}")
    folder = Path(run) / "checkpoints"
    final = folder / f"step-{step:08d}"
    tmp = folder / f"{final.name}.tmp-{os.getpid()}"
    model, tied = _untie(model)
    older: list[Path] = []
    needed = sum(t.nbytes for t in (*model.values(), *optimizer.values())) + (1 << 16)
    contents = {
        "model.safetensors": safetensors_chunks(model, {"format": "pt"}),
        "optimizer.safetensors": safetensors_chunks(optimizer),
        "state.json": [json_bytes("state", state)],
        "config.json": [json_bytes("config", config)],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        older = checkpoints(run)
        _sweep(folder)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {_bytes(free)} free")
        tmp.mkdir()
        files = {name: write_file(tmp / name, chunks) for name, chunks in contents.items()}
        if tokenizer is not None:
            files |= _save_tokenizer(tokenizer, tmp)
        manifest = {"format": FORMAT, "version": 1, "fmcore": __version__, "step": step, "tied": tied, "files": files}
        write_file(tmp / "manifest.json", [json_bytes("manifest", manifest | {"sha256": _self_digest(manifest)})])
        sync_folder(tmp)
        _commit(tmp, final)
    except OSError as e:
        kept = f"{older[0].name} is untouched" if older else "there was none before"
        raise InputError(f"checkpoint: cannot write {final}: {reason(e)}; {_bytes(needed)} are needed; {kept}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    _tidy(folder, step, keep)
    return final


def _untie(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors without those that share memory, and for each of those the name that kept the memory."""
    kept: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, t in tensors.items():
        same = first.setdefault((t.device, t.data_ptr(), t.dtype, t.shape, t.stride()), name) if t.numel() else name
        if same == name:
            kept[name] = t
        else:
            tied[name] = same
    return kept, tied


def _save_tokenizer(tokenizer: Any, tmp: Path) -> dict[str, dict[str, Any]]:
    """Save into ``tmp/tokenizer`` and sync; returns the manifest's entries for its files."""
    folder = tmp / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(tmp).as_posix()
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"save_checkpoint: {short(name)} is no name for a tokenizer's file")
        files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    return files


def _commit(tmp: Path, final: Path) -> None:
    """Rename ``tmp`` to ``final``; a checkpoint that is there steps aside first, under a name that loading knows."""
    replaced = final.with_name(f"{final.name}.replaced")
    if final.exists():
        if replaced.exists():
            _remove(replaced)
        final.rename(replaced)
    try:
        tmp.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync_folder(final.parent)


def _tidy(folder: Path, step: int, keep: int) -> None:
    """After a save: put later steps aside and remove what is too old. The checkpoint just written always stays."""
    try:
        older = []
        for path in checkpoints(folder.parent):
            at = int(path.name.split(".")[0].removeprefix("step-"))
            if at > step:
                names = (path.with_name(f"{path.name}.aside{i or ''}") for i in itertools.count())
                aside = path.rename(next(name for name in names if not name.exists()))
                warnings.warn(f"checkpoint: {path} is later than step {step}, put aside as {aside.name}", stacklevel=3)
            elif path.name.endswith(".replaced"):
                _remove(path)
            elif at < step:
                older.append(path)
        for path in older[keep - 1 :]:
            _remove(path)
    except OSError as e:
        warnings.warn(f"checkpoint: cannot remove older ones in {folder} ({reason(e)})", stacklevel=3)


def _remove(path: Path) -> None:
    """Remove a checkpoint, renamed first: a kill in between leaves no half of one under a good name."""
    doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left; before a save, which may need the space."""
    for path in folder.iterdir():
        if re.fullmatch(r"step-[0-9]+(\.replaced)?\.tmp-[0-9]+", path.name):
            shutil.rmtree(path)


def checkpoints(run: Path | str) -> list[Path]:
    """The checkpoint folders of a run, newest step first, valid or not; empty if there are none."""
    folder = Path(run) / "checkpoints"
    found = [(m, p) for p in folder.iterdir() if (m := STEP_NAME.fullmatch(p.name))] if folder.is_dir() else []
    return [p for _, p in sorted(found, key=lambda pair: (-int(pair[0][1]), pair[0][2] or ""))]


def load_checkpoint(path: Path | str, verify: bool = True, optimizer: bool = True) -> Checkpoint:
    """Read a checkpoint folder, or the newest valid one of a run folder (with a warning if a newer one is not valid).

    Sizes and structure are always checked, every sha256 if ``verify``. With ``optimizer=False`` its file is neither
    verified nor read. Raises ``InputError`` if nothing usable is there.
    """
    path = Path(path)
    if (path / "manifest.json").exists() or STEP_NAME.fullmatch(path.name):
        return _load(path, verify, optimizer)
    run = path.parent if path.name == "checkpoints" else path
    found = checkpoints(run)
    if not found:
        raise InputError(f"{path}: wanted a run with checkpoints/step-... or a checkpoint folder, found neither")
    for i, folder in enumerate(found):
        try:
            return _load(folder, verify, optimizer)
        except InputError as e:
            problem = str(e)
            if i + 1 < len(found):
                warnings.warn(f"{problem}; trying the older {found[i + 1].name}", stacklevel=2)
    raise InputError(f"{run}: none of its {len(found)} checkpoints can be used; the oldest: {problem}")


def _load(folder: Path, verify: bool, optimizer: bool) -> Checkpoint:
    """One checkpoint folder. ``InputError`` unless all of it is there and whole."""
    if not folder.is_dir():
        raise InputError(f"{folder}: wanted a checkpoint folder, found none")
    manifest = _read_manifest(folder)
    wanted = [name for name in manifest["files"] if optimizer or name != "optimizer.safetensors"]
    for name in wanted:
        _check_file(folder / name, manifest["files"][name], verify)
    model = read_safetensors(folder / "model.safetensors")
    for name, same in manifest["tied"].items():
        if name in model or same not in model:
            raise InputError(f"{folder}/manifest.json: tied: {short(name)} and {short(same)} do not fit the model")
        model[name] = model[same]
    has_tokenizer = any(name.startswith("tokenizer/") for name in manifest["files"])
    return Checkpoint(
        path=folder,
        step=manifest["step"],
        model=model,
        optimizer=read_safetensors(folder / "optimizer.safetensors") if optimizer else {},
        state=read_json(folder / "state.json"),
        config=read_json(folder / "config.json"),
        tokenizer=folder / "tokenizer" if has_tokenizer else None,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, checked field by field."""
    path = folder / "manifest.json"
    manifest = read_json(path)
    digest = manifest.pop("sha256", None)
    if manifest.get("format") != FORMAT or manifest.get("version") != 1:
        raise InputError(f"{path}: wanted format {FORMAT!r} version 1, got {short(manifest.get('format'))}")
    if digest != _self_digest(manifest):
        raise InputError(f"{path}: damaged, its sha256 does not fit")
    step, files, tied = (manifest.get(key) for key in ("step", "files", "tied"))
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not isinstance(tied, dict):
        raise InputError(f"{path}: wanted step, files and tied")
    if missing := [name for name in REQUIRED if name not in files]:
        raise InputError(f"{path}: wanted {', '.join(missing)} among its files")
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name) or not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise InputError(f"{path}: file {short(name)}: wanted a plain relative name with bytes and sha256")
    if not all(isinstance(same, str) for same in tied.values()):
        raise InputError(f"{path}: tied must map names to names")
    return manifest


def _check_file(path: Path, entry: dict[str, Any], verify: bool) -> None:
    """``InputError`` unless the file has the size, and if ``verify`` the sha256, of its manifest entry."""
    size = file_size(path)
    if size != entry["bytes"]:
        raise InputError(f"{path}: wanted {short(entry['bytes'])} bytes, got {size}: truncated or replaced")
    try:
        if verify and file_sha256(path) != entry["sha256"]:
            raise InputError(f"{path}: damaged, its sha256 does not fit the manifest")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({reason(e)})") from e


def _self_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
