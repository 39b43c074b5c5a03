"""Flat files of token ids, mapped into memory and checked before they are believed.

    header (256 bytes) | ids (count,) uint16 or uint32, little endian          stream: end d1 end d2 ... dn end

One ``end`` stands in front of every document and one closes the file, so that the stop of the last document is trained
too. Header, little endian: magic, version, bytes per id, count, vocabulary size, largest id, end id, bytes of source
text, documents, sha256 of the ids, fingerprint of the tokenizer, sha256 of the header up to here, zeros.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fmcore.data.corpus import Document, describe_source, plan_split, read_documents
from fmcore.data.tokenizer import Tokenizer
from fmcore.errors import InputError
from fmcore.files import read_json, reason, write_json

MAGIC = b"FMSHARD\0"
VERSION = 1
HEADER = struct.Struct("<8sIIQIIIIQQ32s32s")
HEADER_BYTES = 256
TRAIN, HELD_OUT, RECORD = "train.shard", "held_out.shard", "shards.json"

# Texts go to the tokenizer in groups of about this many bytes: enough for all cores, little beside a model.
GROUP_BYTES = 4 << 20
# Ids looked at together when a shard is checked.
CHUNK = 8 << 20


@dataclass(frozen=True, eq=False)
class Shard:
    """An open shard. ``tokens`` (count,) is mapped read-only; ``fingerprint`` and ``sha256`` are hex."""

    path: Path
    tokens: np.ndarray
    vocab_size: int
    max_token: int
    end: int
    text_bytes: int
    documents: int
    sha256: str
    fingerprint: str

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = True) -> "Shard":
        """Open a shard after checking its header and size; with ``verify`` also all ids: sha256, range, separators.

        Raises ``InputError`` for a file that is missing, foreign, truncated, of another version or damaged.
        """
        path = Path(path)
        try:
            with open(path, "rb") as file:
                header = file.read(HEADER_BYTES)
                size = os.fstat(file.fileno()).st_size
        except OSError as e:
            raise InputError(f"{path}: wanted a token shard, got {reason(e)}") from e
        shard = cls._from_header(path, header, size)
        if verify:
            shard._verify()
        return shard

    @classmethod
    def _from_header(cls, path: Path, header: bytes, size: int) -> "Shard":
        """The shard that a header speaks of. ``InputError`` if header and size of the file contradict."""
        if header[: len(MAGIC)] != MAGIC:
            raise InputError(f"{path}: wanted a token shard (first bytes {MAGIC!r}), got {header[: len(MAGIC)]!r}")
        if len(header) < HEADER_BYTES:
            raise InputError(f"{path}: wanted a header of {HEADER_BYTES} bytes, got a file of {size}: truncated")
        (_, version, width, count, vocab_size, max_token, end, _, text_bytes, documents, sha256, fingerprint) = (
            HEADER.unpack_from(header)
        )
        if version != VERSION:
            raise InputError(f"{path}: wanted shard version {VERSION}, got {version}; build it again from its source")
        if _sealed(header[: HEADER.size]) != header:
            raise InputError(f"{path}: the header does not match its sha256: damaged; build it again from its source")
        if width not in (2, 4) or count < 2 or not max(end, max_token) < vocab_size:
            raise InputError(
                f"{path}: wanted ids of 2 or 4 bytes below the vocabulary, got {width} bytes, {count} "
                f"ids, end {end}, largest {max_token}, vocabulary {vocab_size}"
            )
        if size != HEADER_BYTES + count * width:
            kind = "truncated" if size < HEADER_BYTES + count * width else "something was appended"
            raise InputError(f"{path}: wanted {HEADER_BYTES + count * width} bytes, got {size}: {kind}")
        # A plain array over the map: slicing numpy's memmap class costs ten times as much.
        tokens = np.asarray(np.memmap(path, f"<u{width}", "r", HEADER_BYTES, (count,)))
        return cls(path, tokens, vocab_size, max_token, end, text_bytes, documents, sha256.hex(), fingerprint.hex())

    def _verify(self) -> None:
        """``InputError`` unless the ids are those that the header speaks of."""
        digest, largest, ends = hashlib.sha256(), 0, 0
        for start in range(0, len(self), CHUNK):
            chunk = self.tokens[start : start + CHUNK]
            digest.update(chunk.data)
            largest = max(largest, int(chunk.max()))
            ends += int(np.count_nonzero(chunk == self.end))
        if digest.hexdigest() != self.sha256:
            raise InputError(
                f"{self.path}: wanted ids with sha256 {self.sha256[:12]}, got {digest.hexdigest()[:12]}: "
                f"damaged; build it again from its source"
            )
        if largest != self.max_token:
            raise InputError(f"{self.path}: wanted ids up to {self.max_token}, got {largest}")
        if ends != self.documents + 1 or self.tokens[0] != self.end or self.tokens[-1] != self.end:
            raise InputError(f"{self.path}: wanted {self.documents} documents between separators, got {ends} of those")

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """``InputError`` when the shard was made with another tokenizer."""
        if self.fingerprint != tokenizer.fingerprint():
            raise InputError(
                f"{self.path}: wanted ids of the tokenizer {tokenizer.fingerprint()[:12]} (vocabulary "
                f"{tokenizer.vocab_size}), got ids of {self.fingerprint[:12]} (vocabulary "
                f"{self.vocab_size}); build it again with this tokenizer"
            )


class ShardWriter:
    """Writes a shard as documents come, into a file beside ``path`` that takes its name when all is on the disk.

    A context manager; when its block raises, nothing is left. Raises ``InputError`` when the disk refuses.
    """

    def __init__(self, path: str | os.PathLike[str], tokenizer: Tokenizer):
        self.path = Path(path)
        self._beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        self._tokenizer = tokenizer
        self._dtype = tokenizer.dtype.newbyteorder("<")
        self._sizes: np.ndarray | None = None
        self._digest = hashlib.sha256()
        self._end = np.array([tokenizer.end], self._dtype)
        self._max_token = tokenizer.end
        self.count = self.documents = self.text_bytes = 0

    def __enter__(self) -> "ShardWriter":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._beside, "wb", buffering=1 << 20)  # noqa: SIM115
            self._file.write(bytes(HEADER_BYTES))
        except OSError as e:
            raise self._refused(e) from e
        return self

    def add(self, tokens: np.ndarray, text_bytes: int | None = None) -> None:
        """Append one document (n,), without separators; an empty one is left out.

        ``text_bytes`` is the size of its text in UTF-8; by default what ``tokenizer.token_bytes`` makes of it.
        """
        if not len(tokens):
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self._tokenizer.vocab_size or (tokens == self._tokenizer.end).any():
            raise InputError(
                f"{self.path}: document {self.documents} must hold ids in "
                f"[0, {self._tokenizer.vocab_size}) without the separator "
                f"{self._tokenizer.end}, got {low} to {high}"
            )
        if text_bytes is None:
            if self._sizes is None:
                self._sizes = self._tokenizer.token_bytes()
            text_bytes = int(self._sizes[tokens].sum(dtype=np.int64))
        self._write(self._end)
        self._write(np.ascontiguousarray(tokens, self._dtype))
        self._max_token = max(self._max_token, high)
        self.documents += 1
        self.text_bytes += text_bytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as e:
            raise self._refused(e) from e
        finally:
            self._discard()

    def _write(self, ids: np.ndarray) -> None:
        try:
            self._file.write(ids.data)
        except OSError as e:
            raise self._refused(e) from e
        self._digest.update(ids.data)
        self.count += len(ids)

    def _finish(self) -> None:
        """Write the last separator and the header, sync, and take the place of ``path``."""
        if not self.documents:
            raise InputError(f"{self.path}: wanted at least one document that is not empty, got none")
        self._write(self._end)
        header = HEADER.pack(
            MAGIC,
            VERSION,
            self._dtype.itemsize,
            self.count,
            self._tokenizer.vocab_size,
            self._max_token,
            self._tokenizer.end,
            0,
            self.text_bytes,
            self.documents,
            self._digest.digest(),
            bytes.fromhex(self._tokenizer.fingerprint()),
        )
        self._file.seek(0)
        self._file.write(_sealed(header))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._beside, self.path)

    def _discard(self) -> None:
        """Close and remove the file beside ``path``, if it is still there."""
        # Closing flushes, which fails again on a full disk; the file is closed and goes away all the same.
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._beside.unlink()

    def _refused(self, e: OSError) -> InputError:
        return InputError(f"{self.path}: the shard could not be written: {reason(e)}; nothing was left behind")


def write_shard(path: str | os.PathLike[str], documents: Iterable[np.ndarray], tokenizer: Tokenizer) -> None:
    """Write a shard of ``documents``, arrays of ids (n,) without separators, which are taken one at a time."""
    with ShardWriter(path, tokenizer) as writer:
        for tokens in documents:
            writer.add(tokens)


def build_shards(
    source: str,
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    held_out: float = 0.05,
    progress: Callable[[int, int], None] | None = None,
    field: str = "text",
) -> tuple[Shard, Shard]:
    """Training and held-out shards of ``source`` (see ``read_documents``), in ``folder``.

    Shards that are there and were made from the same source with the same tokenizer and fraction are used again. A
    ``source`` that is itself a folder of shards is opened as it is. ``progress(done, total)`` is called with bytes of
    text.
    """
    if (Path(source) / RECORD).is_file():
        return open_shards(source, tokenizer)
    folder = Path(folder)
    wanted = {
        "version": VERSION,
        "tokenizer": tokenizer.fingerprint(),
        "held_out": held_out,
        "source": describe_source(source, field),
    }
    if shards := _matching(folder, wanted):
        return shards
    # A record speaks for the shards beside it, so it goes before they do and comes back after them.
    with suppress(OSError):
        (folder / RECORD).unlink()
    skipped = _encode(source, tokenizer, folder, held_out, progress or (lambda done, total: None), field)
    shards = Shard.open(folder / TRAIN), Shard.open(folder / HELD_OUT)
    write_json(folder / RECORD, wanted | {"sha256": [shard.sha256 for shard in shards], "skipped": skipped})
    return shards


def open_shards(folder: str | os.PathLike[str], tokenizer: Tokenizer, verify: bool = True) -> tuple[Shard, Shard]:
    """The training and held-out shards of a folder. ``InputError`` when another tokenizer than this made them."""
    shards = Shard.open(Path(folder) / TRAIN, verify), Shard.open(Path(folder) / HELD_OUT, verify)
    for shard in shards:
        shard.check_tokenizer(tokenizer)
    return shards


def _sealed(fields: bytes) -> bytes:
    """The whole header: its fields, their sha256, zeros."""
    return (fields + hashlib.sha256(fields).digest()).ljust(HEADER_BYTES, b"\0")


def _matching(folder: Path, wanted: dict[str, Any]) -> tuple[Shard, Shard] | None:
    """The shards of ``folder`` if its record says what is wanted and they are whole, else ``None``."""
    try:
        record = read_json(folder / RECORD)
        if any(record.get(key) != value for key, value in wanted.items()):
            return None
        shards = Shard.open(folder / TRAIN), Shard.open(folder / HELD_OUT)
    except (OSError, ValueError):
        return None
    return shards if record.get("sha256") == [shard.sha256 for shard in shards] else None


def _encode(
    source: str, tokenizer: Tokenizer, folder: Path, held_out: float, progress: Callable[[int, int], None], field: str
) -> int:
    """Write both shards in a second pass over the documents; returns how many files were no text."""
    split = plan_split(read_documents(source, field), held_out)
    skipped: list[str] = []
    done = 0
    with ShardWriter(folder / TRAIN, tokenizer) as train, ShardWriter(folder / HELD_OUT, tokenizer) as held:
        for group in _groups(read_documents(source, field, skipped)):
            parts = [
                (writer, part.text)
                for document in group
                for writer, part in zip((train, held), split.parts(document), strict=True)
                if part
            ]
            sizes = [len(text.encode()) for _, text in parts]
            for (writer, _), tokens, size in zip(
                parts, tokenizer.encode_batch([text for _, text in parts]), sizes, strict=True
            ):
                writer.add(tokens, size)
            done += sum(sizes)
            progress(done, split.text_bytes)
    return len(skipped)


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """The documents in lists of about ``GROUP_BYTES`` of text."""
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
