"""Text to ids and back, exactly, whatever the text; and files of tokenizers that strangers wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.data.decoding import StreamDecoder
from fmcore.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from fmcore.errors import InputError

tokenizers = pytest.importorskip("tokenizers", reason="BPE needs the package 'tokenizers'")

CODE = Path(os.__file__).with_name("textwrap.py").read_text(encoding="utf-8")
BYTE, BPE = ByteTokenizer(), BPETokenizer.train([CODE], 512)
BOTH = pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])
# Text that strains the splitter and the special tokens, besides what hypothesis makes up.
PIECES = [
    "<|end|>",
    "<|",
    " ",
    "\n",
    "\r\n",
    "\t",
    "    ",
    "def",
    "_x",
    "1234",
    "'s",
    "\xe9",
    "e\u0301",
    "\u20ac",
    "\U0001f389",
    "\0",
    "\u2028",
    "\u0120",
]
TEXT = st.text() | st.lists(st.sampled_from(PIECES)).map("".join)


def spaces(texts: list[str]) -> BPETokenizer:
    """A tokenizer that is not byte-level: SentencePiece style, words marked with U+2581, bytes as a way out."""
    hf = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    hf.pre_tokenizer, hf.decoder = (
        tokenizers.pre_tokenizers.Metaspace(),
        tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]),
    )
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>", *fallback], show_progress=False)
    hf.train_from_iterator(texts, trainer)
    return BPETokenizer(hf)


@BOTH
@given(text=TEXT)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.end not in ids
    assert (ids < tokenizer.vocab_size).all()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@BOTH
def test_batch_equals_one_by_one(tokenizer: Tokenizer):
    texts = ["", "a", CODE, "<|end|>", "\U0001f389" * 3]
    for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert ids.dtype == tokenizer.dtype


@BOTH
def test_the_separator_stands_for_no_text(tokenizer: Tokenizer):
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes().dtype == np.int32
    assert tokenizer.token_bytes()[tokenizer.end] == 0
    assert tokenizer.decode([tokenizer.end, *tokenizer.encode("a"), tokenizer.end]) == "a"


@BOTH
@given(data=st.data())
def test_a_stream_shows_what_decode_shows(tokenizer: Tokenizer, data: st.DataObject):
    # Ids at random, also beyond the vocabulary, are mostly broken UTF-8.
    ids = data.draw(st.lists(st.integers(-2, tokenizer.vocab_size + 2)))
    cut = data.draw(st.integers(0, len(ids)))
    stream = tokenizer.stream()
    shown = stream.push(ids[:cut]) + "".join(stream.push(i) for i in ids[cut:]) + stream.finish()
    assert shown == tokenizer.decode(ids) == tokenizer.decode(np.array(ids, np.int64))


@BOTH
@given(text=TEXT)
def test_a_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str):
    stream, shown = StreamDecoder(tokenizer), ""
    for i in tokenizer.encode(text):
        shown += stream.push(i)
        assert text.startswith(shown)
    assert shown == text and stream.finish() == ""


def test_a_stream_is_fresh_after_finish():
    stream = BYTE.stream()
    assert stream.push([0xE2, 0x82]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.push(0x61) == "a"


@BOTH
def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer):
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(InputError, match=r"lone surrogate '\\ud800' at character 2"):
            encode("ab\ud800")


def test_bpe_learns_and_splits_like_code():
    assert BPE.vocab_size == 512
    assert len(BPE.encode(CODE)) < 0.5 * len(CODE.encode())
    # A word takes the space before it along, so indentation is one token and the word is the same at any depth.
    deep = [BPE.decode([i]) for i in BPE.encode("        return self")]
    assert deep == ["       ", " return", " self"]


TRAIN = """
import pathlib, textwrap
from fmcore.data.tokenizer import BPETokenizer
print(BPETokenizer.train([pathlib.Path(textwrap.__file__).read_text(encoding="utf-8")], 512).fingerprint())
"""


@pytest.mark.parametrize("threads", ["1", "3"])
def test_training_is_deterministic(threads: str):
    env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.strip() == BPE.fingerprint()


def test_training_on_little_text_stops_early():
    small = BPETokenizer.train(["ab"], 1000)
    assert small.vocab_size == 258
    assert small.decode(small.encode("xyz")) == "xyz"


def test_training_needs_room_for_the_bytes():
    with pytest.raises(InputError, match="vocab_size must be at least 257 .* got 256"):
        BPETokenizer.train(["ab"], 256)


@BOTH
def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path: Path):
    assert tokenizer.save(tmp_path / "made" / "here").is_file()
    loaded = load_tokenizer(tmp_path / "made" / "here")
    assert type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.end, loaded.fingerprint()) == (
        tokenizer.vocab_size,
        tokenizer.end,
        tokenizer.fingerprint(),
    )
    np.testing.assert_array_equal(loaded.encode(CODE + "<|end|>"), tokenizer.encode(CODE + "<|end|>"))
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_byte_by_name():
    assert load_tokenizer("byte").fingerprint() == BYTE.fingerprint()


def definition() -> dict:
    return json.loads(BPE.hf.to_str())


def stored(path: Path, value: object) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_the_fingerprint_sees_what_matters(tmp_path: Path):
    seen = {BYTE.fingerprint(), BPE.fingerprint(), BPETokenizer.train([CODE], 511).fingerprint()}
    fewer, lower = definition(), definition()
    fewer["model"]["merges"].pop()
    lower["normalizer"] = {"type": "Lowercase"}
    for name, changed in (("fewer.json", fewer), ("lower.json", lower)):
        seen.add(load_tokenizer(stored(tmp_path / name, changed)).fingerprint())
    assert len(seen) == 5
    two = definition()
    two["added_tokens"].append(two["added_tokens"][0] | {"id": 512, "content": "</s>"})
    path = stored(tmp_path / "two.json", two)
    assert len({load_tokenizer(path, end=end).fingerprint() for end in ("<|end|>", "</s>")}) == 2


def test_the_fingerprint_does_not_see_how_it_is_written(tmp_path: Path):
    old = definition()
    # The form of older library versions.
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    old["model"].pop("ignore_merges", None)
    # Settings of a data loader, not of the tokenizer; they would cut documents.
    old["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    old["padding"] = {
        "strategy": {"Fixed": 99},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|end|>",
    }
    loaded = load_tokenizer(stored(tmp_path / "tokenizer.json", old))
    assert loaded.fingerprint() == BPE.fingerprint()
    assert loaded.decode(loaded.encode(CODE)) == CODE
    assert len(loaded.encode("a")) == 1


def test_a_folder_with_only_a_tokenizer_json(tmp_path: Path):
    stored(tmp_path / "tokenizer.json", definition())
    assert load_tokenizer(tmp_path).fingerprint() == BPE.fingerprint()


def test_the_separator_is_found_or_named(tmp_path: Path):
    renamed = definition()
    renamed["added_tokens"][0]["content"] = "<|endoftext|>"
    renamed["model"]["vocab"]["<|endoftext|>"] = renamed["model"]["vocab"].pop("<|end|>")
    assert load_tokenizer(stored(tmp_path / "usual.json", renamed)).end == BPE.end
    renamed["added_tokens"][0]["content"] = "<<stop>>"
    renamed["model"]["vocab"]["<<stop>>"] = renamed["model"]["vocab"].pop("<|endoftext|>")
    odd = stored(tmp_path / "odd.json", renamed)
    assert load_tokenizer(odd, end="<<stop>>").end == BPE.end
    with pytest.raises(InputError, match=r"odd.json: wanted the separator token '<\|end\|>' or .* name one with end="):
        load_tokenizer(odd)
    with pytest.raises(InputError, match="wanted the separator token 'nope'"):
        load_tokenizer(odd, end="nope")


@pytest.mark.parametrize("added", ["ordinary", "absent"])
def test_text_cannot_spell_a_separator_stored_as_an_ordinary_token(tmp_path: Path, added: str):
    changed = definition()
    changed["added_tokens"][0]["special"] = False
    changed["added_tokens"] = changed["added_tokens"] if added == "ordinary" else []
    loaded = load_tokenizer(stored(tmp_path / "tokenizer.json", changed))
    assert loaded.end == BPE.end
    assert loaded.decode(loaded.encode("a<|end|>b")) == "a<|end|>b"
    assert loaded.end not in loaded.encode("a<|end|>b")


def test_a_separator_that_text_yields_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="separator 'e' must be a special token that text cannot spell"):
        load_tokenizer(stored(tmp_path / "tokenizer.json", definition() | {"added_tokens": []}), end="e")


def test_other_added_tokens_keep_their_text(tmp_path: Path):
    changed = definition()
    changed["added_tokens"].append(changed["added_tokens"][0] | {"id": 512, "content": "<\xe9>", "special": False})
    loaded = load_tokenizer(stored(tmp_path / "tokenizer.json", changed))
    ids = loaded.encode("a<\xe9>b")
    assert 512 in ids and loaded.decode(ids) == "a<\xe9>b"
    assert loaded.token_bytes()[512] == 4


def test_a_large_vocabulary_takes_uint32(tmp_path: Path):
    large = definition()
    large["model"]["vocab"] |= {f"unused {i}": i for i in range(512, 65537)}
    loaded = load_tokenizer(stored(tmp_path / "tokenizer.json", large))
    assert loaded.vocab_size == 65537
    assert loaded.encode("a").dtype == loaded.dtype == np.uint32


def test_a_tokenizer_that_is_not_byte_level():
    tokenizer = spaces([CODE])
    text = "the quick return of text \U0001f389 again"
    ids = tokenizer.encode(text)
    assert tokenizer.table is None and tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.vocab_size]) == text + "\N{REPLACEMENT CHARACTER}"
    # The mark in front of the first word is the one byte that the text does not have.
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) + 1
    assert tokenizer.token_bytes()[tokenizer.end] == 0
    stream, shown = tokenizer.stream(), ""
    for i in ids:
        shown += stream.push(i)
        assert text.startswith(shown)
    assert shown + stream.finish() == text


@settings(max_examples=50)
@given(words=st.lists(st.sampled_from(["the", "text", "\U0001f389", "\xe9", "x"]), min_size=1))
def test_its_stream_shows_what_decode_shows(words: list[str]):
    tokenizer = SPACES
    ids = tokenizer.encode(" ".join(words))
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) + stream.finish() == tokenizer.decode(ids)


SPACES = spaces([CODE])


@pytest.mark.parametrize(
    "content, wanted",
    [
        ("", "wanted JSON, got something else"),
        ("[" * 100000, "wanted JSON, got something else"),
        ('{"model": 1, "model": 2}', "wanted JSON, got something else (a key occurs twice)"),
        ('{"model": 1}', "tokenizer.json: wanted a Hugging Face tokenizer.json, got one that cannot be loaded"),
        ("[1]", "wanted a JSON object, got list"),
        ("{}", "wanted a Hugging Face tokenizer.json, got one that cannot be loaded"),
        ('{"model": {"type": "BPE"}}', "tokenizer.json: wanted"),
        ('{"format": "fmcore-tokenizer", "kind": "piece"}', "kind must be 'byte' or 'bpe', got 'piece'"),
        ('{"format": "fmcore-tokenizer", "kind": "bpe", "end": 3}', "end must be a string, got 3"),
        (
            '{"format": "fmcore-tokenizer", "kind": "byte", "fingerprint": "00"}',
            "wanted the tokenizer with fingerprint 00",
        ),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: str, wanted: str):
    with pytest.raises(InputError) as e:
        load_tokenizer(stored(tmp_path / "tokenizer.json", content))
    assert wanted in str(e.value) and "\n" not in str(e.value) and str(tmp_path) in str(e.value)


def test_no_tokenizer_there(tmp_path: Path):
    with pytest.raises(InputError, match=r"missing: wanted a tokenizer \('byte', a tokenizer.json or .*found none"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(InputError, match="wanted a folder with fmcore_tokenizer.json or tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_changed_after_it_was_saved(tmp_path: Path):
    BPE.save(tmp_path)
    stored(tmp_path / "tokenizer.json", json.loads(BPETokenizer.train([CODE], 300).hf.to_str()))
    with pytest.raises(InputError, match="tokenizer.json beside it has changed since it was saved"):
        load_tokenizer(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot make this folder"):
        BYTE.save(tmp_path / "file")


BARE = """
import sys
sys.modules["tokenizers"] = None
from fmcore.data.tokenizer import BPETokenizer, load_tokenizer
from fmcore.errors import InputError
byte = load_tokenizer("byte")
print(byte.decode(byte.encode("fine")))
try:
    BPETokenizer.train(["a"], 300)
except InputError as e:
    print(e)
"""


def test_bytes_need_no_package():
    done = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.splitlines()[0] == "fine"
    assert "pip install tokenizers" in done.stdout.splitlines()[1]
