"""Single files: strict JSON, text and safetensors, read with distrust and replaced in one step.

A write goes to ``<name>.tmp-<pid>`` beside the file, is synced, and takes its name: a reader, a full disk or a kill -9
sees the old file or the new one. A read believes nothing: size, structure and names are checked first, no code can hide
in what is accepted, and all that a person can fix is an ``InputError`` in one line that names the file.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

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


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """The object in strict JSON: UTF-8, no key twice, no NaN. ``what`` names the source in the ``InputError``."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{what}: wanted JSON, got something else ({one_line(e)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{what}: wanted a JSON object, got {type(value).__name__}")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB; ``InputError`` if it is missing, too large or not one."""
    return parse_json(read_bytes(path, MAX_JSON), str(path))


def read_bytes(path: Path | str, most: int | None = None) -> bytes:
    """All of a regular file; ``InputError`` if it cannot be read or has more than ``most`` bytes."""
    path = Path(path)
    size = file_size(path)
    if most is not None and size > most:
        raise InputError(f"{path}: wanted a file of at most {most} bytes, got {size}")
    try:
        return path.read_bytes()
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({reason(e)})") from e


def write_json(path: Path | str, value: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``value``. ``InputError`` if the disk refuses, ``ValueError`` for what JSON cannot hold."""
    replace_file(Path(path), [json_bytes(Path(path).name, value)])


def write_text(path: Path | str, text: str) -> None:
    """Replace ``path`` by ``text`` in UTF-8. ``InputError`` if the disk refuses."""
    replace_file(Path(path), [text.encode("utf-8")])


def json_bytes(what: str, value: Mapping[str, Any]) -> bytes:
    """``value`` as it is written; ``what`` names it in the ``ValueError`` for what JSON cannot hold."""
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
    size = file_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= MAX_HEADER or 8 + length > size:
                raise InputError(f"{path}: wanted a safetensors file, got {size} bytes that are foreign or truncated")
            header = parse_json(file.read(length), f"{path}: header")
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({reason(e)})") from e
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
    """Dtype, shape, first and last byte of a tensor as the header tells them. ``InputError`` if they do not fit."""
    if not TENSOR_NAME.fullmatch(name):
        raise InputError(f"{path}: {short(name)} is no name for a tensor")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{path}: tensor {short(name)}: wanted dtype, shape and data_offsets, got {short(entry)}")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{path}: tensor {short(name)}: wanted a dtype of {'|'.join(DTYPES)}, got {short(dtype)}")
    if not _are_sizes(shape) or len(shape) > 16 or not _are_sizes(span) or len(span) != 2:
        raise InputError(f"{path}: tensor {short(name)}: bad shape {short(shape)} or data_offsets {short(span)}")
    if math.prod(shape) * DTYPES[dtype].itemsize != span[1] - span[0]:
        raise InputError(f"{path}: tensor {short(name)}: {dtype} {short(shape)} does not fill bytes {short(span)}")
    return DTYPES[dtype], tuple(shape), span[0], span[1]


def _are_sizes(value: Any) -> bool:
    """Whether ``value`` is a list of sizes: integers of at most 63 bits."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def read_safetensors(path: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU, after ``check_safetensors``. ``InputError`` in one line for a bad file."""
    check_safetensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError, ValueError) as e:
        raise InputError(f"{path}: cannot be read as safetensors ({one_line(e)})") from e


def write_safetensors(
    path: Path | str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace ``path`` by a file of ``tensors``. ``InputError`` if the disk refuses; ``path`` is then as before."""
    replace_file(Path(path), safetensors_chunks(tensors, metadata))


def safetensors_chunks(
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
            raise ValueError(f"write_safetensors: {short(name)} is no name for a tensor")
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


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write ``chunks`` beside ``path``, sync, rename. ``InputError`` if the disk refuses; it says what is there now."""
    tmp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    state = "nothing was changed"
    try:
        write_file(tmp, chunks)
        tmp.replace(path)
        state = "it is in place, but may not outlive a power cut"
        sync_folder(path.parent)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({reason(e)}); {state}") from e
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink()


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync a file; returns its size and the sha256 that was taken on the way. Raises ``OSError``."""
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


def sync_folder(folder: Path) -> None:
    """Make the renames in ``folder`` outlive a power cut. Raises ``OSError``."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and those above it where they are missing. ``InputError`` if the disk refuses."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot make this folder ({reason(e)})") from e
    return path


def file_size(path: Path) -> int:
    """Size of a regular file. ``InputError`` for anything else: opening a pipe would wait for ever."""
    try:
        if path.is_file():
            return path.stat().st_size
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read ({reason(e)})") from e
    raise InputError(f"{path}: wanted a file, found {'something else' if path.exists() else 'none'}")


def file_sha256(path: Path) -> str:
    """sha256 (hex) of what a file holds. Raises ``OSError``."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reason(e: BaseException) -> str:
    """Why a call failed, in one line; for an ``OSError`` without its number and path."""
    return getattr(e, "strerror", None) or one_line(e)


def one_line(e: BaseException) -> str:
    """The message of a foreign error as one short line."""
    return " ".join(str(e).split())[:200]


def short(value: Any) -> str:
    """``repr`` of a foreign value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
