"""Documents of text from wherever they lie, and their split into training and held-out text.

    "stdlib"       source of Python's standard library, as found on this Python, tests left out: one document a file
    "topics"       the English prose of ``pydoc_data.topics``: one document a topic
    a text file    one document; a name that ends in .jsonl: one document a line, taken from the field "text"
    a folder       every text and .jsonl file below it, sorted; hidden and binary files are left out
    "hf:org/name[/config][:split]"     a data set through the package ``datasets`` (an extra)

A folder called "stdlib" is read as "./stdlib". Blank documents are left out. All errors are ``InputError``.
"""

import hashlib
import json
import os
import platform
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fmcore.errors import InputError
from fmcore.files import one_line, read_bytes, reason

SOURCES = "'stdlib', 'topics', a text file, a .jsonl file, a folder or 'hf:org/name'"
LIBRARY_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A text, under a name that is unique within its source."""

    name: str
    text: str


def read_documents(source: str, field: str = "text", skipped: list[str] | None = None) -> Iterator[Document]:
    """The documents of ``source``, in a fixed order, one at a time.

    ``field`` names the text in .jsonl files and data sets; files of a folder that are no text are added to ``skipped``.
    """
    skipped = [] if skipped is None else skipped
    if source.startswith("hf:"):
        documents = _data_set(source, field)
    elif source == "topics":
        documents = _topics()
    else:
        files = _files(source)
        documents = _read_files(files, field, skipped, alone=source != "stdlib" and not os.path.isdir(source))
    return _not_blank(documents, source, skipped)


def describe_source(source: str, field: str = "text") -> dict[str, Any]:
    """What tells whether ``source`` is still the same: names, sizes and times of its files, which are not read."""
    described: dict[str, Any] = {"source": source, "field": field}
    if source.startswith("hf:"):
        return described
    if source == "topics":
        text = "".join(f"{d.name}\0{d.text}\0" for d in _topics())
        return described | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    stats = [(name, os.stat(path)) for name, path in _files(source)]
    lines = "".join(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n" for name, stat in stats)
    described |= {"python": platform.python_version()} if source == "stdlib" else {}
    return described | {
        "files": len(stats),
        "bytes": sum(stat.st_size for _, stat in stats),
        "sha256": hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest(),
    }


@dataclass(frozen=True)
class Split:
    """Which text is held out: the documents whose hash is in ``held``; with ``cut``, the tail of each instead."""

    held_out: float
    held: frozenset[int]
    cut: bool
    documents: int
    text_bytes: int

    def parts(self, document: Document) -> tuple[Document | None, Document | None]:
        """The training and the held-out part of one document."""
        if self.cut:
            return _cut(document, self.held_out)
        return (None, document) if _hash(document)[0] in self.held else (document, None)


def plan_split(documents: Iterable[Document], held_out: float = 0.05) -> Split:
    """Which of ``documents`` to hold out; one pass that keeps 16 bytes of each, so that a second pass can stream."""
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be a fraction between 0 and 1, got {held_out}")
    hashes, sizes = array("Q"), array("Q")
    for document in documents:
        digest, size = _hash(document)
        hashes.append(digest)
        sizes.append(size)
    if not hashes:
        raise InputError("split: wanted at least one document, got none")
    distinct, which = np.unique(np.array(hashes, np.uint64), return_inverse=True)
    weight = np.bincount(which, np.array(sizes, np.float64))  # bytes, copies together
    held = _held(weight, held_out) if len(distinct) > 1 else []
    return Split(
        held_out,
        frozenset(distinct[held].tolist()) if held else frozenset(),
        cut=len(distinct) == 1,
        documents=len(hashes),
        text_bytes=sum(sizes),
    )


def split_documents(documents: Iterable[Document], held_out: float = 0.05) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, about ``held_out`` of the bytes, at least one document each.

    The choice hashes the text alone, so it depends on no order and no name, and copies stay on one side. A single
    document is cut at the line boundary before its last ``held_out``.
    """
    documents = list(documents)
    split = plan_split(documents, held_out)
    parts = [split.parts(document) for document in documents]
    return [train for train, _ in parts if train], [held for _, held in parts if held]


def _held(weight: np.ndarray, held_out: float) -> list[int]:
    """Which documents to hold out: in the order of their hashes, until they have bytes enough.

    Counting documents instead would leave the held-out text of a small corpus to chance: 2 of the 79 topics, 1 kB.
    One that overshoots the wanted bytes by more than a quarter is passed over.
    """
    wanted = held_out * weight.sum()
    held: list[int] = []
    total = 0.0
    for i, size in enumerate(weight.tolist()):
        if total >= wanted or len(held) == len(weight) - 1:
            break
        if total + size <= 1.25 * wanted:
            held.append(i)
            total += size
    return held or [int(weight.argmin())]


def _hash(document: Document) -> tuple[int, int]:
    """64 bits of the sha256 of the text, and its bytes."""
    text = document.text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big"), len(text)


def _cut(document: Document, held_out: float) -> tuple[Document, Document]:
    """The two parts of a document, at the line boundary before its last ``held_out``."""
    text = document.text
    target = min(max(round(len(text) * (1 - held_out)), 1), len(text) - 1)
    at = text.rfind("\n", 0, target) + 1 or text.find("\n", target) + 1
    # No line boundary with text on both sides: cut between characters.
    if not text[:at].strip() or not text[at:].strip():
        at = target
    if not text[:at].strip() or not text[at:].strip():
        raise InputError(
            f"{document.name}: wanted text that can be split into a training and a held-out part, got "
            f"{len(text)} characters"
        )
    return Document(document.name, text[:at]), Document(f"{document.name} (tail)", text[at:])


def _not_blank(documents: Iterator[Document], source: str, skipped: list[str]) -> Iterator[Document]:
    """The documents that hold more than white space. ``InputError`` at the end if there was none."""
    empty = True
    for document in documents:
        if document.text.strip():
            empty = False
            yield document
    if empty:
        why = f"none ({len(skipped)} files are not UTF-8 text)" if skipped else "none"
        raise InputError(f"{source}: wanted text, got {why}")


def _files(source: str) -> list[tuple[str, str]]:
    """(name, path) of the files of ``source``, sorted by name; names are relative to the folder, with '/'."""
    if source == "stdlib":
        folder = os.path.dirname(os.__file__)
        files = _below(folder, lambda name: name not in LIBRARY_LEFT_OUT)
        files = [(name, path) for name, path in files if name.endswith(".py") and name != "pydoc_data/topics.py"]
        if not files:
            raise InputError(f"stdlib: wanted the source of Python's standard library in {folder}, got no .py file")
        return files
    if not os.path.exists(source):
        raise InputError(f"{source}: no such file or folder; wanted {SOURCES}")
    if not os.path.isdir(source):
        return [(os.path.basename(source), source)]
    files = _below(source, lambda name: not name.startswith("."))
    if not files:
        raise InputError(f"{source}: wanted a folder with text files, got an empty one")
    return files


def _below(folder: str, wanted: Callable[[str], bool]) -> list[tuple[str, str]]:
    """(name, path) of all files below ``folder`` whose own name, and that of every folder above, is ``wanted``."""

    def refuse(e: OSError) -> None:
        raise InputError(f"{e.filename}: cannot be read ({reason(e)})") from e

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = filter(wanted, folders)
        paths = (os.path.join(parent, name) for name in names if wanted(name))
        # Pipes and sockets would block, dead links cannot be opened.
        found += [(Path(path).relative_to(folder).as_posix(), path) for path in paths if os.path.isfile(path)]
    return sorted(found)


def _read_files(files: list[tuple[str, str]], field: str, skipped: list[str], alone: bool) -> Iterator[Document]:
    """The documents of (name, path) files; a file that is no text raises ``InputError`` if it is ``alone``."""
    for name, path in files:
        if name.endswith(".jsonl"):
            yield from _json_lines(name, path, field)
            continue
        problem, text = _decoded(read_bytes(path))
        if problem and alone:
            raise InputError(f"{path}: wanted UTF-8 text, got {problem}")
        if problem:
            skipped.append(name)
        else:
            yield Document(name, text)


def _decoded(data: bytes) -> tuple[str, str]:
    """(what is wrong or "", text). Line ends are kept as they are, a byte order mark is dropped."""
    if (at := data.find(0)) >= 0:
        return f"a binary file (a zero byte at {at})", ""
    try:
        return "", data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        return f"byte 0x{data[e.start]:02x} at {e.start}", ""


def _json_lines(name: str, path: str, field: str) -> Iterator[Document]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Document(f"{name}:{number}", _field(line, field, f"{path}:{number}"))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({reason(e)})") from e


def _field(line: bytes, field: str, where: str) -> str:
    """The text in ``field`` of one line of a .jsonl file."""
    wanted = f"{where}: wanted a JSON object with a text in field {field!r}, got"
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{wanted} {one_line(e)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{wanted} a {type(value).__name__}")
    return _checked_text(value, field, wanted)


def _checked_text(row: dict[str, Any], field: str, wanted: str) -> str:
    """The text in ``field`` of a row; ``wanted`` begins the message of the ``InputError`` for anything else."""
    text = row.get(field)
    if field not in row:
        raise InputError(f"{wanted} the fields {list(row)[:8]}")
    if not isinstance(text, str):
        raise InputError(f"{wanted} a {type(text).__name__} in it")
    # JSON can spell half of a surrogate pair, which is no character and has no UTF-8.
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InputError(f"{wanted} a lone surrogate in it")
    return text


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            f"topics: wanted the module pydoc_data.topics, got a Python without it; take another source: {SOURCES}"
        ) from None
    return (Document(f"topics/{name}", topics[name]) for name in sorted(topics))


def _data_set(source: str, field: str) -> Iterator[Document]:
    """One document for each row of a data set of the package ``datasets``."""
    path, _, split = source.removeprefix("hf:").partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3:
        raise InputError(f"{source}: wanted 'hf:org/name[/config][:split]'")
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source}: needs the package 'datasets', got none installed; pip install datasets") from None
    config = parts[2] if len(parts) == 3 else None
    # The library raises many kinds of errors: network, names, formats. All are about the source that was named.
    try:
        rows = datasets.load_dataset("/".join(parts[:2]), config, split=split or "train")
    except Exception as e:
        raise InputError(f"{source}: could not be loaded: {type(e).__name__}: {one_line(e)}") from e
    wanted = f"wanted a text in field {field!r}, got"
    return (
        Document(f"{path}:{i}", _checked_text(row, field, f"{source}: row {i}: {wanted}")) for i, row in enumerate(rows)
    )
