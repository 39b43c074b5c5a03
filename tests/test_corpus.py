"""Where documents come from, what is refused, and a split that depends on the documents alone."""

import json
import os
import random
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmcore.data.corpus import Document, describe_source, plan_split, read_documents, split_documents
from fmcore.errors import InputError


def read(source: object, **options: object) -> dict[str, str]:
    return {d.name: d.text for d in read_documents(str(source), **options)}


def refused(source: object, **options: object) -> str:
    with pytest.raises(InputError) as e:
        list(read_documents(str(source), **options))
    assert "\n" not in str(e.value)
    return str(e.value)


def size(documents: list[Document]) -> int:
    return sum(len(d.text.encode()) for d in documents)


def test_the_standard_library():
    documents = list(read_documents("stdlib"))
    names = [d.name for d in documents]
    assert size(documents) > 10_000_000
    assert names == sorted(names) and len(names) == len(set(names))
    assert {"os.py", "asyncio/base_events.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")[:-1]}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert "pydoc_data/topics.py" not in names
    assert read("stdlib")["textwrap.py"] == Path(os.__file__).with_name("textwrap.py").read_bytes().decode()
    train, held = split_documents(documents)
    assert {d.name for d in train} | {d.name for d in held} == set(names)
    assert not {d.name for d in train} & {d.name for d in held}
    assert 0.05 <= size(held) / size(documents) <= 0.0625


def test_the_topics():
    documents = list(read_documents("topics"))
    assert len(documents) > 50 and all(d.name.startswith("topics/") for d in documents)
    assert 300_000 < size(documents) < 2_000_000
    train, held = split_documents(documents)
    # Few and uneven documents: the share still holds in bytes.
    assert 0.05 <= size(held) / size(documents) <= 0.0625 and len(train) + len(held) == len(documents)


def test_a_file_is_one_document(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffon\xe9\r\ntwo\n".encode())
    assert read(path) == {"a.txt": "on\xe9\r\ntwo\n"}


def test_a_folder(tmp_path: Path):
    for name, data in {
        "b.txt": b"b",
        "a/deep/c.md": b"c",
        "a.jsonl": b'{"text": "j"}\n',
        "blank.txt": b" \n",
        ".git/config": b"hidden",
        ".hidden": b"hidden",
        "x.bin": b"\0\1",
        "latin.txt": b"\xe9t\xe9",
        "empty": b"",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    skipped: list[str] = []
    found = [(d.name, d.text) for d in read_documents(str(tmp_path), skipped=skipped)]
    assert found == [("a.jsonl:1", "j"), ("a/deep/c.md", "c"), ("b.txt", "b")]
    assert skipped == ["latin.txt", "x.bin"]


def test_json_lines(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "", "body": "x"}\n{"text": "tw\\u00f6", "body": "y"}\n')
    assert read(path) == {"d.jsonl:1": "one", "d.jsonl:4": "tw\xf6"}


@pytest.mark.parametrize(
    "line, got",
    [
        (b"{", "Expecting"),
        (b"[1]", "a list"),
        (b'{"body": "x"}', "the fields ['body']"),
        (b'{"text": 3}', "a int in it"),
        (b'{"text": "\\ud800"}', "a lone surrogate"),
        (b'{"text": "\xff"}', "'utf-8' codec"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, got: str):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    message = refused(path)
    assert message.startswith(f"{path}:2: wanted a JSON object with a text in field 'text', got") and got in message


def test_another_field(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"body": "x"}\n')
    assert read(path, field="body") == {"d.jsonl:1": "x"}


def test_bad_sources(tmp_path: Path):
    files = {"empty.txt": b"", "blank.txt": b" \n\t", "latin.txt": b"caf\xe9", "binary": b"ab\0c", "empty.jsonl": b""}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "binaries").mkdir()
    (tmp_path / "binaries" / "x").write_bytes(b"\0")
    assert "missing: no such file or folder; wanted 'stdlib'" in refused(tmp_path / "missing")
    for name in ("empty.txt", "blank.txt", "empty.jsonl"):
        assert refused(tmp_path / name) == f"{tmp_path / name}: wanted text, got none"
    assert refused(tmp_path / "latin.txt").endswith("latin.txt: wanted UTF-8 text, got byte 0xe9 at 3")
    assert refused(tmp_path / "binary").endswith("wanted UTF-8 text, got a binary file (a zero byte at 2)")
    assert refused(tmp_path / "folder").endswith("wanted a folder with text files, got an empty one")
    assert refused(tmp_path / "binaries").endswith("wanted text, got none (1 files are not UTF-8 text)")


def test_a_missing_path_is_refused_before_the_first_document(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        read_documents(str(tmp_path / "missing"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    path.chmod(0)
    assert refused(path).endswith("cannot be read (Permission denied)")


def test_no_topics(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert refused("topics").startswith("topics: wanted the module pydoc_data.topics")


def test_a_data_set(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict]:
        asked.append((name, config, split))
        if name == "org/gone":
            raise ConnectionError("no\nnetwork")
        return [{"text": "one", "n": 1}, {"text": "two", "n": 2}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("hf:org/name/config:train[:1%]") == {"org/name/config:0": "one", "org/name/config:1": "two"}
    assert list(read("hf:plain")) == ["plain:0", "plain:1"]
    assert asked == [("org/name", "config", "train[:1%]"), ("plain", None, "train")]
    assert refused("hf:org/gone") == "hf:org/gone: could not be loaded: ConnectionError: no network"
    assert "row 0: wanted a text in field 'body', got the fields ['text', 'n']" in refused("hf:org/name", field="body")
    assert "got a int in it" in refused("hf:org/name", field="n")
    for bad in ("hf:", "hf:a//b", "hf:a/b/c/d"):
        assert "wanted 'hf:org/name[/config][:split]'" in refused(bad)


def test_no_package_for_data_sets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused("hf:org/name")
    assert message == "hf:org/name: needs the package 'datasets', got none installed; pip install datasets"


def test_the_description_changes_with_the_files(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    first = describe_source(str(tmp_path))
    assert describe_source(str(tmp_path)) == first and json.loads(json.dumps(first)) == first
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    touched = describe_source(str(tmp_path))
    (tmp_path / "b.txt").write_text("b")
    assert len({json.dumps(d) for d in (first, touched, describe_source(str(tmp_path)))}) == 3
    assert describe_source("topics") == describe_source("topics") != describe_source("stdlib")
    assert describe_source("hf:x")["source"] == "hf:x"


DOCUMENTS = st.lists(
    st.builds(Document, st.text(max_size=3), st.text(min_size=2, max_size=30).filter(str.strip)),
    min_size=2,
    max_size=30,
)


@given(documents=DOCUMENTS, held_out=st.floats(0.001, 0.999), order=st.randoms(use_true_random=False))
def test_the_split_depends_on_the_documents_alone(documents: list[Document], held_out: float, order: random.Random):
    if len({d.text for d in documents}) == 1:
        documents = [*documents, Document("another", "text " * 9)]
    train, held = split_documents(documents, held_out)
    assert train and held
    # Every document is on one side, copies together, whatever they are called.
    assert Counter(train) + Counter(held) == Counter(documents)
    assert not {d.text for d in train} & {d.text for d in held}
    mixed = documents.copy()
    order.shuffle(mixed)
    again = split_documents(mixed, held_out)
    assert Counter(again[0]) == Counter(train) and Counter(again[1]) == Counter(held)


@pytest.mark.parametrize("held_out", [0.01, 0.05, 0.3, 0.7])
def test_the_share_is_of_bytes(held_out: float):
    draw = random.Random(0)
    documents = [Document(str(i), f"{i:5}" + "x" * draw.randint(1, 200)) for i in range(3000)]
    train, held = split_documents(documents, held_out)
    # At most one document more than was wanted.
    assert 0 <= size(held) - held_out * size(documents) <= max(size([d]) for d in documents)
    kept = {d.name for d in train}
    assert [d for d in documents if d.name in kept] == train


def test_a_document_larger_than_the_share_is_not_held_out():
    documents = [Document("large", "x" * 10_000), *(Document(str(i), "xx") for i in range(100))]
    for n in range(20):
        train, held = split_documents([Document(f"{n} {d.name}", f"{n:02} {d.name:5}{d.text}") for d in documents])
        assert f"{n} large" in {d.name for d in train} and 500 <= size(held) <= 700


def test_two_documents_of_any_size():
    train, held = split_documents([Document("a", "x" * 100), Document("b", "y")])
    assert [d.name for d in train] == ["a"] and [d.name for d in held] == ["b"]


def test_one_document_is_cut_at_a_line():
    text = "".join(f"line {i}\n" for i in range(1000))
    (train,), (held,) = split_documents([Document("a", text)], 0.1)
    assert train.text + held.text == text and train.text.endswith("\n")
    assert abs(len(held.text) - 0.1 * len(text)) < 10
    assert train.name == "a" and held.name == "a (tail)"


@pytest.mark.parametrize(
    "text, train",
    [
        ("a\n" + "b" * 100, "a\n"),
        ("b" * 99 + "\nx", "b" * 99 + "\n"),
        ("b" * 100, "b" * 95),
        ("b" * 100 + "\n", "b" * 96),
        ("ab", "a"),
    ],
)
def test_one_document_with_few_lines(text: str, train: str):
    (head,), (tail,) = split_documents([Document("a", text)])
    assert head.text == train and head.text + tail.text == text


def test_one_document_that_cannot_be_cut():
    with pytest.raises(InputError, match="a: wanted text that can be split .* got 1 characters"):
        split_documents([Document("a", "x")])


def test_copies_of_one_document_are_cut_alike():
    train, held = split_documents([Document("a", "one\ntwo\n")] * 3)
    assert [d.text for d in train] == ["one\n"] * 3 and [d.text for d in held] == ["two\n"] * 3


def test_bad_splits():
    for fraction in (0.0, 1.0, -1, float("nan")):
        with pytest.raises(InputError, match="held_out must be a fraction between 0 and 1"):
            split_documents([Document("a", "x"), Document("b", "x")], fraction)
    with pytest.raises(InputError, match="wanted at least one document, got none"):
        plan_split([])
