"""Checkpoints on disk: written beside the old one, then renamed; verified when read.

    run/checkpoints/step-00000100/
        model.safetensors  optimizer.safetensors  state.json  config.json  [tokenizer/...]  manifest.json

A save writes every file into ``step-00000100.tmp-<pid>``, calls fsync on each, and renames the folder: at any moment a
kill -9 leaves either the old state of the run or the new one. ``manifest.json`` holds size and sha256 of every file and
of itself, so that a load notices a lost, truncated or flipped byte and falls back to the next older checkpoint.
One process at a time writes to a run. Only JSON and safetensors are read: nothing on disk can carry code.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fmcore import __version__
from fmcore.errors import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 16 << 20  # bytes; a larger header can cost gigabytes and seconds before the first tensor
MAX_TENSORS = 200_000
MAX_JSON = 64 << 20  # bytes
TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,511}")
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


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Strict JSON object: UTF-8, no key twice, no NaN. ``what`` names the source in the ``InputError``."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{what}: wanted JSON, got something else ({_line(e)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{what}: wanted a JSON object, got {type(value).__name__}")
    return value


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB; ``InputError`` if it is missing, too large or not one."""
    path = Path(path)
    size = _file_size(path)
    if size > MAX_JSON:
        raise InputError(f"{path}: wanted a JSON file of at most {MAX_JSON} bytes, got {size}")
    try:
        return parse_json(path.read_bytes(), str(path))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({_reason(e)})") from e


def write_json(path: Path | str, value: Mapping[str, Any]) -> None:
    """Write ``value`` beside ``path``, then rename. ``InputError`` if the disk refuses, ``ValueError`` for no JSON."""
    _replace_file(Path(path), [_json_bytes(Path(path).name, value)])


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 beside ``path``, then rename. ``InputError`` if the disk refuses."""
    _replace_file(Path(path), [text.encode("utf-8")])


def _json_bytes(what: str, value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as e:
        raise ValueError(f"{what}: wanted values that JSON can hold, got something else ({e})") from e


def check_safetensors(path: Path | str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of a safetensors file, without reading its tensors.

    The header is checked before the library sees the file, because that accepts headers of 100 MB, a name twice and
    names such as ``../../etc/x``. Raises ``InputError`` in one line for anything foreign, truncated or corrupt.
    """
    path = Path(path)
    size = _file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= MAX_HEADER or 8 + length > size:
                raise InputError(f"{path}: wanted a safetensors file, got {size} bytes that are foreign or truncated")
            header = parse_json(file.read(length), f"{path}: header")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({_reason(e)})") from e
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ must map text to text")
    if len(header) > MAX_TENSORS:
        raise InputError(f"{path}: wanted at most {MAX_TENSORS} tensors, got {len(header)}")
    spans = []
    found = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _check_entry(path, name, entry)
        spans.append((begin, end))
        found[name] = (dtype, shape)
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise InputError(f"{path}: wanted tensors side by side, got a gap or an overlap at byte {at} of the data")
        at = end
    if 8 + length + at != size:
        raise InputError(f"{path}: wanted {8 + length + at} bytes, got {size}: the file is truncated or damaged")
    return found


def _check_entry(path: Path, name: str, entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not TENSOR_NAME.fullmatch(name):
        raise InputError(f"{path}: {_short(name)} is no name for a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: tensor {_short(name)}: wanted dtype, shape and data_offsets, got {_short(entry)}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{path}: tensor {_short(name)}: wanted a dtype of {'|'.join(DTYPES)}, got {_short(dtype)}")
    if not _sizes(shape) or len(shape) > 16 or not _sizes(span) or len(span) != 2:
        raise InputError(f"{path}: tensor {_short(name)}: bad shape {_short(shape)} or data_offsets {_short(span)}")
    if math.prod(shape) * DTYPES[dtype].itemsize != span[1] - span[0]:
        raise InputError(f"{path}: tensor {_short(name)}: {dtype} {_short(shape)} does not fill bytes {_short(span)}")
    return DTYPES[dtype], tuple(shape), span[0], span[1]


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def read_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU, after ``check_safetensors``. ``InputError`` in one line for a bad file."""
    check_safetensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as safetensors ({_line(e)})") from e


def write_safetensors(
    path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors beside ``path``, then rename. ``InputError`` if the disk refuses; ``path`` is then as before."""
    _replace_file(Path(path), _safetensors_chunks(tensors, metadata))


def _safetensors_chunks(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> Iterable[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor.

    The library's own writer keeps a CPU copy of every tensor until it is done and leaves the hashing to a second read
    of the file; this holds one tensor at a time and lets the caller hash what it writes.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        t = tensors[name]
        if not TENSOR_NAME.fullmatch(name):
            raise ValueError(f"write_safetensors: {_short(name)} is no name for a tensor")
        if t.dtype not in DTYPE_NAMES or t.layout != torch.strided or t.is_meta:
            raise TypeError(f"write_safetensors: {name} must be a dense tensor of {'|'.join(DTYPES)}, got {t.dtype}")
        header[name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER or len(order) > MAX_TENSORS:
        raise ValueError(f"write_safetensors: {len(order)} tensors are too many for one file")
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if tensors[name].numel():
            yield tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def rng_state(generators: Mapping[str, torch.Generator] | None = None) -> dict[str, torch.Tensor]:
    """States of torch's own generators and of named ones, as uint8 tensors to store beside the optimizer's."""
    state = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"rng.cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state | {f"rng.named.{name}": g.get_state() for name, g in (generators or {}).items()}


def set_rng_state(
    tensors: Mapping[str, torch.Tensor], generators: Mapping[str, torch.Generator] | None = None
) -> None:
    """Undo ``rng_state``; tensors with other names are ignored, as are devices that this machine lacks."""
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
            raise InputError(f"checkpoint: {name}: wanted the state of a random generator ({_line(e)})") from e


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
        "model.safetensors": _safetensors_chunks(model, {"format": "pt"}),
        "optimizer.safetensors": _safetensors_chunks(optimizer),
        "state.json": [_json_bytes("state", state)],
        "config.json": [_json_bytes("config", config)],
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        older = checkpoints(run)
        _sweep(folder)
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {_bytes(free)} free")
        tmp.mkdir()
        files = {name: _write_file(tmp / name, chunks) for name, chunks in contents.items()}
        if tokenizer is not None:
            files |= _save_tokenizer(tokenizer, tmp)
        manifest = {"format": FORMAT, "version": 1, "fmcore": __version__, "step": step, "tied": tied, "files": files}
        _write_file(tmp / "manifest.json", [_json_bytes("manifest", manifest | {"sha256": _self_digest(manifest)})])
        _sync_folder(tmp)
        _commit(tmp, final)
    except OSError as e:
        kept = f"{older[0].name} is untouched" if older else "there was none before"
        raise InputError(f"checkpoint: cannot write {final}: {_reason(e)}; {_bytes(needed)} are needed; {kept}") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    _tidy(folder, step, keep)
    return final


def _untie(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """One piece of memory under several names: the first name keeps it, the others go into ``tied``."""
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
    folder = tmp / "tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(tmp).as_posix()
        if not FILE_NAME.fullmatch(name):
            raise ValueError(f"save_checkpoint: {_short(name)} is no name for a tokenizer's file")
        files[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)
    return files


def _commit(tmp: Path, final: Path) -> None:
    """Rename; an older checkpoint of the same step steps back first, under a name that loading still knows."""
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
    _sync_folder(final.parent)


def _tidy(folder: Path, step: int, keep: int) -> None:
    """After a save: put later steps aside, remove what is too old. The checkpoint just written always stays."""
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
        warnings.warn(f"checkpoint: cannot remove older ones in {folder} ({_reason(e)})", stacklevel=3)


def _remove(path: Path) -> None:
    """Rename first, so that a kill in between never leaves half a checkpoint under a good name."""
    doomed = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sweep(folder: Path) -> None:
    """Remove what a killed process left. Before a save, because it may be the space that the save needs."""
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
    if not folder.is_dir():
        raise InputError(f"{folder}: wanted a checkpoint folder, found none")
    manifest = _read_manifest(folder)
    wanted = [name for name in manifest["files"] if optimizer or name != "optimizer.safetensors"]
    for name in wanted:
        _check_file(folder / name, manifest["files"][name], verify)
    model = read_safetensors(folder / "model.safetensors")
    for name, same in manifest["tied"].items():
        if name in model or same not in model:
            raise InputError(f"{folder}/manifest.json: tied: {_short(name)} and {_short(same)} do not fit the model")
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
    path = folder / "manifest.json"
    manifest = read_json(path)
    digest = manifest.pop("sha256", None)
    if manifest.get("format") != FORMAT or manifest.get("version") != 1:
        raise InputError(f"{path}: wanted format {FORMAT!r} version 1, got {_short(manifest.get('format'))}")
    if digest != _self_digest(manifest):
        raise InputError(f"{path}: damaged, its sha256 does not fit")
    step, files, tied = (manifest.get(key) for key in ("step", "files", "tied"))
    if type(step) is not int or step < 0 or not isinstance(files, dict) or not isinstance(tied, dict):
        raise InputError(f"{path}: wanted step, files and tied")
    if missing := [name for name in REQUIRED if name not in files]:
        raise InputError(f"{path}: wanted {', '.join(missing)} among its files")
    for name, entry in files.items():
        if not FILE_NAME.fullmatch(name) or not isinstance(entry, dict) or set(entry) != {"bytes", "sha256"}:
            raise InputError(f"{path}: file {_short(name)}: wanted a plain relative name with bytes and sha256")
    if not all(isinstance(same, str) for same in tied.values()):
        raise InputError(f"{path}: tied must map names to names")
    return manifest


def _check_file(path: Path, entry: dict[str, Any], verify: bool) -> None:
    size = _file_size(path)
    if size != entry["bytes"]:
        raise InputError(f"{path}: wanted {_short(entry['bytes'])} bytes, got {size}: truncated or replaced")
    try:
        if verify and _digest(path) != entry["sha256"]:
            raise InputError(f"{path}: damaged, its sha256 does not fit the manifest")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({_reason(e)})") from e


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    tmp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        _write_file(tmp, chunks)
        tmp.replace(path)
        _sync_folder(path.parent)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({_reason(e)}); nothing was changed") from e
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _file_size(path: Path) -> int:
    """Size of a regular file. Anything else is refused: opening a pipe would wait for ever."""
    try:
        if path.is_file():
            return path.stat().st_size
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({_line(e)})") from e
    raise InputError(f"{path}: wanted a file, found {'something else' if path.exists() else 'none'}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _self_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _reason(e: OSError) -> str:
    return e.strerror or _line(e)


def _line(e: BaseException) -> str:
    """The message of a foreign error as one short line."""
    return " ".join(str(e).split())[:200]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"
