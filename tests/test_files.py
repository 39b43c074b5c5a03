"""Single files: foreign bytes are refused in one line, and a write that fails leaves the old file."""

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fmcore.errors import InputError
from fmcore.files import (
    DTYPES,
    MAX_JSON,
    check_safetensors,
    file_sha256,
    make_folder,
    read_bytes,
    read_json,
    read_safetensors,
    short,
    write_file,
    write_json,
    write_safetensors,
    write_text,
)


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 1000
    return text


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8)


def test_library_and_we_read_each_other(tmp_path):
    tensors = {f"t.{d}".replace("torch.", ""): torch.randn(6).to(d) for d in DTYPES.values()}
    write_safetensors(tmp_path / "ours", tensors, {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    for back in (load_file(tmp_path / "ours"), read_safetensors(tmp_path / "theirs")):
        assert back.keys() == tensors.keys()
        assert all(back[k].dtype == t.dtype and torch.equal(bits(back[k]), bits(t)) for k, t in tensors.items())
    assert check_safetensors(tmp_path / "theirs") == {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}


WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json(path, {"a": "new" * 70_000}),
    "text": lambda path: write_text(path, "new\n" * 50_000),
    "safetensors": lambda path: write_safetensors(path, {"a": torch.zeros(1_000_000)}),
}


def test_text_and_json_come_back(tmp_path):
    write_text(tmp_path / "x.txt", "\u00e4\r\n\U0001f389")
    assert read_bytes(tmp_path / "x.txt").decode() == "\u00e4\r\n\U0001f389"
    value = {"a": [1, 2.5, None, True], "\u00e4": {"b": "\U0001f389\n"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    write_json(tmp_path / "x.json", {})
    assert read_json(str(tmp_path / "x.json")) == {}
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.txt"]


@pytest.mark.parametrize("kind", WRITERS)
def test_full_disk_leaves_the_old_file(tmp_path, kind):
    (tmp_path / "x").write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError) as error:
            WRITERS[kind](tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert one_line(error) == f"{tmp_path / 'x'}: cannot be written (File too large); nothing was changed"
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name, nth", [("fsync", 1), ("fsync", 2), ("replace", 1)])
def test_a_failing_call_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, kind, name, nth):
    WRITERS[kind](tmp_path / "new")
    new = (tmp_path / "new").read_bytes()
    (tmp_path / "x").write_bytes(b"old")
    real, calls = getattr(os, name), iter(range(1, 100))

    def fail(*args: object) -> None:
        if next(calls) == nth:
            raise OSError(5, os.strerror(5))
        real(*args)

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(InputError) as error:
        WRITERS[kind](tmp_path / "x")
    # The second fsync is that of the folder: the new file has its name by then.
    said, found = ("it is in place", new) if nth == 2 else ("nothing was changed", b"old")
    assert f"x: cannot be written (Input/output error); {said}" in one_line(error)
    assert (tmp_path / "x").read_bytes() == found
    assert sorted(os.listdir(tmp_path)) == ["new", "x"]


@pytest.mark.parametrize("kind", WRITERS)
def test_no_folder_to_write_to(tmp_path, kind):
    (tmp_path / "file").write_text("")
    for folder, why in (("missing", "No such file or directory"), ("file", "Not a directory")):
        with pytest.raises(InputError) as error:
            WRITERS[kind](tmp_path / folder / "x")
        assert f"{folder}/x: cannot be written ({why}); nothing was changed" in one_line(error)


def test_make_folder(tmp_path):
    for _ in range(2):
        assert make_folder(str(tmp_path / "a" / "b")).is_dir()
    (tmp_path / "file").write_text("")
    for path, why in (("file", "File exists"), ("file/a", "Not a directory")):
        with pytest.raises(InputError) as error:
            make_folder(tmp_path / path)
        assert one_line(error) == f"{tmp_path / path}: cannot make this folder ({why})"


def test_what_json_cannot_hold(tmp_path):
    for value in ({"loss": float("nan")}, {"x": torch.zeros(1)}):
        with pytest.raises(ValueError, match="x.json: wanted values that JSON can hold"):
            write_json(tmp_path / "x.json", value)
    assert os.listdir(tmp_path) == []


def test_written_bytes_are_counted_and_hashed(tmp_path):
    assert write_file(tmp_path / "x", [b"ab", memoryview(b"c")]) == {"bytes": 3, "sha256": file_sha256(tmp_path / "x")}
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_foreign_values_are_shown_short():
    assert short("a\nb") == "'a\\nb'"
    assert len(short("x" * 1000)) == 80 and short("x" * 1000).endswith("xxx...")


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), span: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span, **more}


HOSTILE = {
    "empty file": b"",
    "short": b"\1\2\3",
    "text": b"#!/bin/sh\nrm -rf /\n" * 9,
    "pickle": b"\x80\x04\x95" + b"c" * 100,
    "zip": b"PK\3\4" + b"\0" * 100,
    "header length 2^62": raw({}, length=1 << 62),
    "header length past the end": raw({}, length=100),
    "header of 17 MiB": raw(b"{" + b" " * (17 << 20) + b"}"),
    "not utf-8": raw(b'{"\xff": 1}'),
    "list": raw([]),
    "deep": raw(b"[" * 100_000),
    "long integer": raw(b'{"a": ' + b"9" * 10_000 + b"}"),
    "NaN": raw(b'{"a": NaN}'),
    "name twice": raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
    "name with a path": raw({"../../etc/passwd": entry()}, b"\0" * 8),
    "name with a newline": raw({"a\nb": entry()}, b"\0" * 8),
    "empty name": raw({"": entry()}, b"\0" * 8),
    "entry is a number": raw({"a": 1}),
    "entry with more keys": raw({"a": entry(code="x")}, b"\0" * 8),
    "entry without a shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "foreign dtype": raw({"a": entry("C64", [1])}, b"\0" * 8),
    "dtype is a list": raw({"a": entry([])}, b"\0" * 8),
    "negative shape": raw({"a": entry(shape=[-1, -2])}, b"\0" * 8),
    "float shape": raw({"a": entry(shape=[2.0])}, b"\0" * 8),
    "bool shape": raw({"a": entry("I64", [True])}, b"\0" * 8),
    "shape overflow": raw({"a": entry(shape=[1 << 62, 1 << 62, 0])}),
    "huge shape": raw({"a": entry(shape=[1 << 40], span=[0, 1 << 42])}),
    "many dimensions": raw({"a": entry(shape=[1] * 10_000, span=[0, 4])}, b"\0" * 4),
    "span backwards": raw({"a": entry(span=[8, 0])}, b"\0" * 8),
    "span of three": raw({"a": entry(span=[0, 4, 8])}, b"\0" * 8),
    "span too short": raw({"a": entry(span=[0, 4])}, b"\0" * 4),
    "overlap": raw({"a": entry(), "b": entry()}, b"\0" * 8),
    "gap": raw({"a": entry(), "b": entry(span=[16, 24])}, b"\0" * 24),
    "data cut": raw({"a": entry()}, b"\0" * 7),
    "bytes behind": raw({"a": entry()}, b"\0" * 9),
    "metadata not text": raw({"__metadata__": {"a": 1}}),
    "too many tensors": raw({str(i): entry(shape=[0], span=[0, 0]) for i in range(200_001)}),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_safetensors(tmp_path, case):
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(InputError) as error:
        read_safetensors(path)
    assert str(path) in one_line(error)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", tmp_path / ("n" * 300), Path("a\0b")):
        for read in (read_safetensors, read_json):
            with pytest.raises(InputError):
                read(path)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutated_safetensors_raise_nothing_else(tmp_path_factory, data):
    good = raw({"__metadata__": {"a": "b"}, "x": entry(), "y": entry("BF16", [1, 2], [8, 12])}, b"\1" * 12)
    bad = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(bad) - 1))
        cut = data.draw(st.integers(0, 4))
        bad[at : at + cut] = data.draw(st.binary(max_size=4) | st.sampled_from([b"-", b"]", b"9" * 30, b"1e9", b'"x"']))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bad)
    try:
        read_safetensors(path)
    except InputError as e:
        assert "\n" not in str(e)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": Infinity}', "[" * 100_000, "\ufeff{}"]
)
def test_bad_json(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError) as error:
        read_json(tmp_path / "x.json")
    assert "x.json" in one_line(error)


def test_large_json_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(MAX_JSON + 1)
    with pytest.raises(InputError, match="at most"):
        read_json(tmp_path / "x.json")


def test_bad_tensors_are_refused_before_writing(tmp_path):
    with pytest.raises(ValueError, match="no name"):
        write_safetensors(tmp_path / "x.safetensors", {"../a": torch.zeros(1)})
    for t in (torch.zeros(1, dtype=torch.complex64), torch.zeros(1, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(TypeError, match="dense"):
            write_safetensors(tmp_path / "x.safetensors", {"a": t})
    assert list(tmp_path.iterdir()) == []
