"""Shards hold exactly the documents, are read only when whole, and leave nothing half-written."""

import errno
import hashlib
import json
import os
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmcore.data import shards as shards_file
from fmcore.data.corpus import read_documents, split_documents
from fmcore.data.shards import HEADER, HEADER_BYTES, Shard, ShardWriter, build_shards, open_shards, write_shard
from fmcore.data.tokenizer import ByteTokenizer, Tokenizer
from fmcore.errors import InputError

BYTE = ByteTokenizer()
END = BYTE.end


class Wide(ByteTokenizer):
    """Bytes in a vocabulary that needs 32 bits."""

    vocab_size = 70_000
    end = 69_999

    def token_bytes(self) -> np.ndarray:
        return np.concatenate([np.ones(256, np.int32), np.zeros(self.vocab_size - 256, np.int32)])

    def fingerprint(self) -> str:
        return hashlib.sha256(b"wide").hexdigest()


def documents_of(shard: Shard) -> list[list[int]]:
    """What stands between the separators."""
    at = np.flatnonzero(shard.tokens == shard.end)
    return [shard.tokens[a + 1 : b].tolist() for a, b in zip(at, at[1:], strict=False)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "a.shard"
    write_shard(path, [BYTE.encode("first"), BYTE.encode("second \U0001f389")], BYTE)
    return path


@pytest.mark.parametrize("tokenizer, dtype", [(BYTE, "<u2"), (Wide(), "<u4")], ids=["uint16", "uint32"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=st.lists(st.lists(st.integers(0, 255)), min_size=1).filter(any))
def test_what_is_written_is_read(tmp_path: Path, tokenizer: Tokenizer, dtype: str, documents: list[list[int]]):
    path = tmp_path / "a.shard"
    write_shard(path, (np.array(d, np.int64) for d in documents), tokenizer)
    shard = Shard.open(path)
    kept = [d for d in documents if d]
    assert documents_of(shard) == kept
    assert shard.tokens[0] == shard.tokens[-1] == tokenizer.end and len(shard) == sum(map(len, kept)) + len(kept) + 1
    assert shard.tokens.dtype == np.dtype(dtype) and not shard.tokens.flags.writeable
    assert (shard.documents, shard.text_bytes) == (len(kept), sum(map(len, kept)))
    assert (shard.vocab_size, shard.end, shard.max_token) == (tokenizer.vocab_size, tokenizer.end, tokenizer.end)
    assert shard.fingerprint == tokenizer.fingerprint()
    assert os.listdir(tmp_path) == ["a.shard"]


def test_the_header_is_as_documented(shard: Path):
    data = shard.read_bytes()
    fields = struct.unpack_from("<8sIIQIIIIQQ32s32s", data)
    payload = np.array([END, *b"first", END, *"second \U0001f389".encode(), END], "<u2").tobytes()
    assert data[HEADER_BYTES:] == payload
    assert fields == (
        b"FMSHARD\0",
        1,
        2,
        len(payload) // 2,
        257,
        256,
        256,
        0,
        16,
        2,
        hashlib.sha256(payload).digest(),
        bytes.fromhex(BYTE.fingerprint()),
    )


def test_every_flipped_byte_is_noticed(shard: Path):
    data = shard.read_bytes()
    for at in range(len(data)):
        shard.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        with pytest.raises(InputError, match="a.shard"):
            Shard.open(shard)


def test_every_truncation_is_noticed(shard: Path):
    data = shard.read_bytes()
    for size in range(len(data)):
        shard.write_bytes(data[:size])
        for verify in (True, False):
            with pytest.raises(InputError, match="truncated|wanted a token shard"):
                Shard.open(shard, verify=verify)
    shard.write_bytes(data + b"\0")
    with pytest.raises(InputError, match="something was appended"):
        Shard.open(shard, verify=False)


@pytest.mark.parametrize("data", [b"", b"text " * 100, b"\x93NUMPY" + bytes(300), bytes(1000)])
def test_foreign_files(tmp_path: Path, data: bytes):
    path = tmp_path / "a.shard"
    path.write_bytes(data)
    with pytest.raises(InputError, match="wanted a token shard .*got b'"):
        Shard.open(path)


def test_no_file(tmp_path: Path):
    with pytest.raises(InputError, match="none.shard: wanted a token shard, got No such file"):
        Shard.open(tmp_path / "none.shard")
    with pytest.raises(InputError, match="wanted a token shard, got Is a directory"):
        Shard.open(tmp_path)


def forged(path: Path, tokens: list[int] | None = None, **changes: object) -> Path:
    """The shard with other fields or ids, and checksums that fit them."""
    names = (
        "magic",
        "version",
        "width",
        "count",
        "vocab_size",
        "max_token",
        "end",
        "zero",
        "text_bytes",
        "documents",
        "sha256",
        "fingerprint",
    )
    data = path.read_bytes()
    fields = dict(zip(names, HEADER.unpack_from(data), strict=True))
    payload = data[HEADER_BYTES:] if tokens is None else np.array(tokens, "<u2").tobytes()
    fields |= {"count": len(payload) // 2, "sha256": hashlib.sha256(payload).digest()} | changes
    header = HEADER.pack(*fields.values())
    path.write_bytes((header + hashlib.sha256(header).digest()).ljust(HEADER_BYTES, b"\0") + payload)
    return path


@pytest.mark.parametrize(
    "tokens, changes, wanted",
    [
        (None, {"version": 2}, "wanted shard version 1, got 2; build it again"),
        (None, {"width": 3}, "wanted ids of 2 or 4 bytes"),
        (None, {"width": 4}, "truncated"),
        (None, {"vocab_size": 256}, "below the vocabulary"),
        (None, {"end": 1000}, "below the vocabulary"),
        ([END], {}, "wanted ids of 2 or 4 bytes below the vocabulary, got 2 bytes, 1 ids"),
        ([END, 300, END], {"documents": 1}, "wanted ids up to 256, got 300"),
        ([END, 65, END], {"documents": 2}, "wanted 2 documents between separators, got 2 of those"),
        ([END, END, 65], {"documents": 1}, "wanted 1 documents between separators"),
        ([65, END, END], {"documents": 1}, "wanted 1 documents between separators"),
        (None, {"count": 1 << 62}, "truncated"),
    ],
)
def test_forged_fields_are_not_believed(shard: Path, tokens: list[int] | None, changes: dict, wanted: str):
    with pytest.raises(InputError) as e:
        Shard.open(forged(shard, tokens, **changes))
    assert wanted in str(e.value) and "\n" not in str(e.value)


def test_a_forged_file_that_is_right_opens(shard: Path):
    assert documents_of(Shard.open(forged(shard, [END, 65, END], documents=1))) == [[65]]


def test_without_verify_only_the_header_is_read(shard: Path):
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    assert Shard.open(shard, verify=False).documents == 2
    with pytest.raises(InputError, match="wanted ids with sha256 .* damaged"):
        Shard.open(shard)


def test_a_check_in_chunks(shard: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards_file, "CHUNK", 3)
    assert Shard.open(shard).documents == 2


@pytest.mark.parametrize("document", [[257], [-1], [1, END, 1], [70_000]])
def test_ids_that_are_no_document(tmp_path: Path, document: list[int]):
    with pytest.raises(InputError, match=r"document 1 must hold ids in \[0, 257\) without the separator 256"):
        write_shard(tmp_path / "a.shard", [BYTE.encode("fine"), np.array(document)], BYTE)
    assert os.listdir(tmp_path) == []


def test_no_documents(tmp_path: Path):
    for documents in ([], [np.array([], np.uint16)]):
        with pytest.raises(InputError, match="wanted at least one document that is not empty, got none"):
            write_shard(tmp_path / "a.shard", documents, BYTE)
    assert os.listdir(tmp_path) == []


def test_documents_are_taken_one_at_a_time(tmp_path: Path):
    alive, most = set(), 0

    class Array(np.ndarray):
        def __del__(self) -> None:
            alive.discard(id(self))

    def documents() -> Iterator[np.ndarray]:
        nonlocal most
        for _ in range(50):
            array = np.zeros(100, np.uint16).view(Array)
            alive.add(id(array))
            most = max(most, len(alive))
            yield array
            del array

    write_shard(tmp_path / "a.shard", documents(), BYTE)
    assert Shard.open(tmp_path / "a.shard").documents == 50
    assert most <= 2


def test_a_failing_source_leaves_the_old_shard(shard: Path):
    before = shard.read_bytes()

    def failing() -> Iterator[np.ndarray]:
        yield BYTE.encode("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(shard, failing(), BYTE)
    assert shard.read_bytes() == before and os.listdir(shard.parent) == ["a.shard"]


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The system refuses to let a file grow beyond ``size``, which looks to a program like a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("documents", [1, 400], ids=["refused at the end", "refused on the way"])
def test_a_full_disk_leaves_the_old_shard(shard: Path, documents: int):
    before = shard.read_bytes()
    with files_at_most(4096), pytest.raises(InputError, match="a.shard: the shard could not be written: .*nothing was"):
        write_shard(shard, [np.zeros(5000, np.uint16)] * documents, BYTE)
    assert shard.read_bytes() == before and os.listdir(shard.parent) == ["a.shard"]


def test_a_disk_that_fails_at_fsync(shard: Path, monkeypatch: pytest.MonkeyPatch):
    before = shard.read_bytes()

    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_shard(shard, [BYTE.encode("new")], BYTE)
    assert shard.read_bytes() == before and os.listdir(shard.parent) == ["a.shard"]


def test_a_folder_that_is_a_file(shard: Path):
    with pytest.raises(InputError, match="b.shard: the shard could not be written"):
        write_shard(shard / "b.shard", [BYTE.encode("new")], BYTE)
    with pytest.raises(InputError, match="train.shard: the shard could not be written"):
        build_shards("topics", BYTE, shard)


def test_the_writer_takes_the_size_of_the_text(tmp_path: Path):
    with ShardWriter(tmp_path / "a.shard", BYTE) as writer:
        writer.add(BYTE.encode("abc"), text_bytes=7)
        writer.add(BYTE.encode("abc"))
    assert Shard.open(tmp_path / "a.shard").text_bytes == 10


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i} \u20ac\n" * (i + 1), encoding="utf-8")
    (folder / "picture").write_bytes(b"\0")
    return folder


def test_build_splits_and_encodes(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards_file, "GROUP_BYTES", 2000)
    told: list[tuple[int, int]] = []
    built = build_shards(str(texts), BYTE, tmp_path / "out", progress=lambda done, total: told.append((done, total)))
    split = split_documents(read_documents(str(texts)))
    for shard, documents in zip(built, split, strict=True):
        assert documents_of(shard) == [list(d.text.encode()) for d in documents]
        assert shard.text_bytes == sum(len(d.text.encode()) for d in documents)
    total = sum(shard.text_bytes for shard in built)
    assert len(told) > 3 and told == sorted(told) and told[-1] == (total, total)
    assert sorted(os.listdir(tmp_path / "out")) == ["held_out.shard", "shards.json", "train.shard"]
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["skipped"] == 1


class Lossy(ByteTokenizer):
    """A tokenizer whose sizes are not exact, as those that are not byte-level."""

    def token_bytes(self) -> np.ndarray:
        return 2 * super().token_bytes()

    def fingerprint(self) -> str:
        return hashlib.sha256(b"lossy").hexdigest()


def test_build_counts_the_text_itself(texts: Path, tmp_path: Path):
    built = build_shards(str(texts), Lossy(), tmp_path / "out")
    text = sum(len(d.text.encode()) for d in read_documents(str(texts)))
    assert sum(shard.text_bytes for shard in built) == text


def test_build_of_one_file_cuts_its_tail(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("line\n" * 1000)
    train, held = build_shards(str(path), BYTE, tmp_path / "out", held_out=0.1)
    assert (train.text_bytes, held.text_bytes) == (4500, 500)


def built_again(tmp_path: Path, source: object, tokenizer: Tokenizer = BYTE, **options: object) -> bool:
    """Did a second build write the shards once more?"""
    inode = os.stat(tmp_path / "out" / "train.shard").st_ino
    train, _ = build_shards(str(source), tokenizer, tmp_path / "out", **options)
    train.check_tokenizer(tokenizer)
    return os.stat(tmp_path / "out" / "train.shard").st_ino != inode


def test_build_again_only_when_something_changed(texts: Path, tmp_path: Path):
    build_shards(str(texts), BYTE, tmp_path / "out")
    # A second name keeps the first file, so its number is not given to another one.
    os.link(tmp_path / "out" / "train.shard", tmp_path / "first")
    assert not built_again(tmp_path, texts)
    assert built_again(tmp_path, texts, held_out=0.1)
    assert not built_again(tmp_path, texts, held_out=0.1)
    os.link(tmp_path / "out" / "train.shard", tmp_path / "second")
    (texts / "new.txt").write_text("new")
    assert built_again(tmp_path, texts, held_out=0.1)
    os.link(tmp_path / "out" / "train.shard", tmp_path / "third")
    assert built_again(tmp_path, texts, Wide(), held_out=0.1)
    assert not built_again(tmp_path, texts, Wide(), held_out=0.1)


@pytest.mark.parametrize(
    "name, damage",
    [
        ("held_out.shard", b"x"),
        ("train.shard", b""),
        ("shards.json", b"{"),
        ("shards.json", b"[]"),
        ("shards.json", b"[" * 100_000),
    ],
)
def test_build_again_when_something_is_damaged(texts: Path, tmp_path: Path, name: str, damage: bytes):
    before = build_shards(str(texts), BYTE, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).write_bytes(damage)
    after = build_shards(str(texts), BYTE, tmp_path / "out")
    assert [s.sha256 for s in after] == [s.sha256 for s in before]


def test_build_again_when_a_shard_is_from_elsewhere(texts: Path, tmp_path: Path):
    train, _ = build_shards(str(texts), BYTE, tmp_path / "out")
    write_shard(tmp_path / "out" / "train.shard", [BYTE.encode("another")], BYTE)
    assert build_shards(str(texts), BYTE, tmp_path / "out")[0].sha256 == train.sha256


def test_an_interrupted_build_is_not_taken_for_whole(texts: Path, tmp_path: Path):
    build_shards(str(texts), BYTE, tmp_path / "out")
    (texts / "new.txt").write_text("new")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(str(texts), BYTE, tmp_path / "out", progress=interrupt)
    assert sorted(os.listdir(tmp_path / "out")) == ["held_out.shard", "train.shard"]
    assert sum(s.documents for s in build_shards(str(texts), BYTE, tmp_path / "out")) == 41


def test_a_folder_of_shards_is_a_source(texts: Path, tmp_path: Path):
    built = build_shards(str(texts), BYTE, tmp_path / "out")
    opened = build_shards(str(tmp_path / "out"), BYTE, tmp_path / "unused")
    assert [s.sha256 for s in opened] == [s.sha256 for s in built] and not (tmp_path / "unused").exists()
    with pytest.raises(InputError, match="train.shard: wanted ids of the tokenizer .* build it again with this"):
        open_shards(tmp_path / "out", Wide())
    data = (tmp_path / "out" / "held_out.shard").read_bytes()
    (tmp_path / "out" / "held_out.shard").write_bytes(data[:-2])
    with pytest.raises(InputError, match="held_out.shard: .* truncated"):
        build_shards(str(tmp_path / "out"), BYTE, tmp_path / "unused")
