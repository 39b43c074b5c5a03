"""Text to token ids and back: bytes (no dependency) or byte-level BPE through Hugging Face ``tokenizers`` (an extra).

    encode(text) -> ids (n,) uint16 when vocab_size <= 65536 else uint32          decode(encode(text)) == text

Every tokenizer has one separator token, ``end``, that stands between documents and for no text. ``encode`` never yields
it: text that happens to spell a special token is encoded as ordinary text.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fmcore.data.decoding import UNKNOWN, StreamDecoder, joined
from fmcore.errors import InputError
from fmcore.files import make_folder, one_line, read_json, write_json, write_text

SAVED_FORM = "fmcore_tokenizer.json"
HF_FORM = "tokenizer.json"
END = "<|end|>"
USUAL_ENDS = (END, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")

# A word with the character in front of it (space, underscore, dot), up to three digits, a run of punctuation with its
# line ends, blank lines, and indentation without the last space, which belongs to the word after it.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer(ABC):
    """What the rest of fmcore knows of a tokenizer.

    ``vocab_size`` is the largest id + 1, ``end`` the id of the separator, ``table`` the bytes of each id when the
    tokenizer is byte-level, else ``None``.
    """

    vocab_size: int
    end: int
    table: tuple[bytes, ...] | None

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids (n,) of ``text``, without ``end``. ``InputError`` for a lone surrogate, which is not valid Unicode."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of ``ids``: ``end`` gives none, bytes that are no UTF-8 and ids out of range give U+FFFD."""

    def stream(self) -> StreamDecoder:
        """A decoder that is fed ids as they are sampled."""
        return StreamDecoder(self)

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, (vocab_size,) int32; 0 for ``end``.

        Exact for byte-level tokenizers.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the ids, the separator included."""

    @abstractmethod
    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write into ``folder`` what ``load_tokenizer(folder)`` reads; returns the path of the fmcore form."""


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are bytes of UTF-8, 256 is the separator. Needs no training and no package, and fits any text."""

    vocab_size = 257
    end = 256
    table = (*(bytes([i]) for i in range(256)), b"")

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        return joined(self.table, ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"fmcore byte tokenizer: 256 bytes, end 256").hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        return _save_form(folder, {"kind": "byte", "fingerprint": self.fingerprint()})


class BPETokenizer(Tokenizer):
    """A Hugging Face tokenizer (``tokenizers.Tokenizer``), by default byte-level BPE trained here.

    A tokenizer that is not byte-level (SentencePiece style, WordPiece) may change spaces and normal form, so text may
    not come back as it was; ``token_bytes`` is then the length of each token's own text, exact but for such changes.
    """

    def __init__(self, hf: Any, end: str | None = None, name: str = "tokenizer"):
        hf.no_truncation()
        hf.no_padding()
        self.hf = hf
        self.name = name
        self.vocab_size = max(hf.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.end_text = _find_end(hf, end, name)
        self.end = hf.token_to_id(self.end_text)
        # Some files hold the separator as an ordinary token; text must not be able to spell it there either.
        hf.add_special_tokens([self.end_text])
        hf.encode_special_tokens = True
        self.table = self._table()
        if self.end in hf.encode(self.end_text, add_special_tokens=False).ids:
            raise InputError(
                f"{name}: the separator {self.end_text!r} must be a special token that text cannot spell, "
                f"got one that encode yields; name another with end="
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Byte-level BPE with at most ``vocab_size`` ids (fewer when the texts have no more pairs); deterministic."""
        if vocab_size < 257:
            raise InputError(
                f"BPETokenizer.train: vocab_size must be at least 257 (256 bytes and {END}), got {vocab_size}"
            )
        lib = _tokenizers()
        hf = lib.Tokenizer(lib.models.BPE())
        hf.pre_tokenizer = lib.pre_tokenizers.Sequence(
            [
                lib.pre_tokenizers.Split(lib.Regex(SPLIT), "isolated"),
                lib.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        hf.decoder = lib.decoders.ByteLevel()
        alphabet = lib.pre_tokenizers.ByteLevel.alphabet()
        trainer = lib.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        hf.train_from_iterator((text for text in texts if _utf8(text)), trainer)
        return cls(hf, END)

    @classmethod
    def from_json(cls, definition: dict[str, Any], end: str | None = None, name: str = HF_FORM) -> "BPETokenizer":
        """What any ``tokenizer.json`` holds; ``end`` names its separator, otherwise the usual names are looked for."""
        lib = _tokenizers()
        # ``tokenizers`` raises bare Exception for a definition it does not take.
        try:
            return cls(lib.Tokenizer.from_str(json.dumps(definition)), end, name)
        except InputError:
            raise
        except Exception as e:
            raise InputError(
                f"{name}: wanted a Hugging Face tokenizer.json, got one that cannot be loaded: {one_line(e)}"
            ) from e

    def _table(self) -> tuple[bytes, ...] | None:
        """The bytes of each id (vocab_size,), ``None`` when the tokenizer is not byte-level."""
        decoder = json.loads(self.hf.to_str()).get("decoder") or {}
        stages = {stage.get("type") for stage in (decoder, *decoder.get("decoders", ()))}
        vocab = self.hf.get_vocab(with_added_tokens=True)
        if "ByteLevel" not in stages or not all(char in vocab for char in _BYTE_OF):
            return None
        added = self.hf.get_added_tokens_decoder()
        table = [b""] * self.vocab_size
        for token, i in vocab.items():
            spelled = i not in added and all(char in _BYTE_OF for char in token)
            table[i] = bytes(_BYTE_OF[char] for char in token) if spelled else token.encode("utf-8", "replace")
        table[self.end] = b""
        return tuple(table)

    def encode(self, text: str) -> np.ndarray:
        _utf8(text)
        return np.array(self.hf.encode(text, add_special_tokens=False).ids, self.dtype)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """``encode`` of each text, on all cores."""
        for text in texts:
            _utf8(text)
        encoded = self.hf.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(e.ids, self.dtype) for e in encoded]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        if self.table is not None:
            return joined(self.table, ids).decode("utf-8", errors="replace")
        text, run = [], []
        # The library drops ids it does not know; here they show, as they do in the byte-level case.
        for i in (int(i) for i in ids):
            if 0 <= i < self.vocab_size:
                run += [i] if i != self.end else []
            else:
                text += [self.hf.decode(run, skip_special_tokens=False), UNKNOWN]
                run = []
        return "".join([*text, self.hf.decode(run, skip_special_tokens=False)])

    def token_bytes(self) -> np.ndarray:
        if self.table is not None:
            return np.array([len(b) for b in self.table], np.int32)
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, i in self.hf.get_vocab(with_added_tokens=True).items():
            fallback = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            text = token.removeprefix("##").replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
            sizes[i] = 1 if fallback else len(text.encode("utf-8", "replace"))
        sizes[self.end] = 0
        return sizes

    @cached_property
    def _fingerprint(self) -> str:
        definition = json.loads(self.hf.to_str())
        model = definition["model"]
        # Older versions of the library write a merge as "a b", newer ones as ["a", "b"].
        if "merges" in model:
            model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        parts = {key: definition.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        canonical = json.dumps([_without_defaults(parts), self.end], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def fingerprint(self) -> str:
        return self._fingerprint

    def save(self, folder: str | os.PathLike[str]) -> Path:
        write_text(make_folder(folder) / HF_FORM, self.hf.to_str(pretty=True))
        return _save_form(folder, {"kind": "bpe", "end": self.end_text, "fingerprint": self.fingerprint()})


def load_tokenizer(name_or_path: str | os.PathLike[str], end: str | None = None) -> Tokenizer:
    """The tokenizer "byte", that of a ``tokenizer.json``, or that of a folder with one or with what ``save`` wrote.

    ``end`` names another separator than the saved or usual one. Raises ``InputError`` when there is no tokenizer, or
    when it is not the one that was saved.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    path = Path(name_or_path)
    if os.path.isdir(path):
        found = [path / name for name in (SAVED_FORM, HF_FORM) if (path / name).is_file()]
        if not found:
            raise InputError(f"{path}: wanted a folder with {SAVED_FORM} or {HF_FORM}, got neither in it")
        path = found[0]
    if not os.path.exists(path):
        raise InputError(f"{path}: wanted a tokenizer ('byte', a {HF_FORM} or a folder with one), found none")
    definition = read_json(path)
    if definition.get("format") != "fmcore-tokenizer":
        return BPETokenizer.from_json(definition, end, str(path))
    if definition.get("kind") == "byte":
        tokenizer: Tokenizer = ByteTokenizer()
    elif definition.get("kind") == "bpe":
        saved_end = definition.get("end")
        if not isinstance(saved_end, str):
            raise InputError(f"{path}: end must be a string, got {saved_end!r}")
        beside = path.parent / HF_FORM
        tokenizer = BPETokenizer.from_json(read_json(beside), end or saved_end, str(beside))
    else:
        raise InputError(f"{path}: kind must be 'byte' or 'bpe', got {definition.get('kind')!r}")
    if end is None and definition.get("fingerprint") != tokenizer.fingerprint():
        saved = str(definition.get("fingerprint"))[:12]
        raise InputError(
            f"{path}: wanted the tokenizer with fingerprint {saved}, got "
            f"{tokenizer.fingerprint()[:12]}: {HF_FORM} beside it has changed since it was saved"
        )
    return tokenizer


def _byte_alphabet() -> dict[str, int]:
    """The byte behind each printable character of a byte-level vocabulary.

    Printable Latin-1 stands for itself, every other byte for the next free character from U+0100 on. Source: Radford et
    al. 2019 (GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _utf8(text: str) -> bytes:
    """``text`` in UTF-8. ``InputError`` for a lone surrogate, which has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(
            f"text must be valid Unicode, got the lone surrogate {text[e.start]!r} at character {e.start}"
        ) from None


def _find_end(hf: Any, end: str | None, name: str) -> str:
    """The separator's text: ``end``, or the first usual name that is in the vocabulary. ``InputError`` for none."""
    wanted = USUAL_ENDS if end is None else (end,)
    for token in wanted:
        if hf.token_to_id(token) is not None:
            return token
    names = " or ".join(repr(token) for token in wanted)
    raise InputError(f"{name}: wanted the separator token {names}, got a vocabulary without it; name one with end=")


def _without_defaults(value: Any) -> Any:
    """``value`` less the fields that are null, false or empty: library versions differ in which of those they write."""
    if isinstance(value, dict):
        return {key: _without_defaults(v) for key, v in value.items() if v is not None and v is not False and v != ""}
    return [_without_defaults(v) for v in value] if isinstance(value, list) else value


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            "a BPE tokenizer needs the package 'tokenizers', got none installed; "
            "pip install tokenizers, or take the tokenizer 'byte'"
        ) from None
    return tokenizers


def _save_form(folder: str | os.PathLike[str], fields: dict[str, str]) -> Path:
    path = make_folder(folder) / SAVED_FORM
    write_json(path, {"format": "fmcore-tokenizer", "version": 1, **fields})
    return path
