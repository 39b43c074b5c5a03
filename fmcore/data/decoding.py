"""Token ids back to text, all at once or as they are sampled."""

import codecs
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fmcore.data.tokenizer import Tokenizer

# A model may have more rows than its tokenizer has tokens, so sampling can yield an id that stands for nothing.
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def joined(table: Sequence[bytes], ids: Iterable[int] | np.ndarray) -> bytes:
    """The bytes that ``ids`` stand for, one after the other; ids out of range give U+FFFD."""
    numbers = ids.tolist() if isinstance(ids, np.ndarray) else ids
    return b"".join(table[i] if 0 <= i < len(table) else UNKNOWN.encode() for i in numbers)


class StreamDecoder:
    """Text as it grows: bytes of an incomplete UTF-8 character are held back until the rest comes.

    What ``push`` returned, joined, followed by ``finish``, equals ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, ids: int | Iterable[int] | np.ndarray) -> str:
        """The text that became certain with ``ids`` (one id or several)."""
        new = [int(ids)] if isinstance(ids, (int, np.integer)) else [int(i) for i in ids]
        if self._tokenizer.table is not None:
            return self._utf8.decode(joined(self._tokenizer.table, new))
        self._held += new
        text = self._after_shown()
        if not text or text.endswith(UNKNOWN):
            return ""
        self._shown, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What was still held back; the decoder is fresh afterwards."""
        rest = self._utf8.decode(b"", final=True) if self._tokenizer.table is not None else self._after_shown()
        self._utf8.reset()
        self._shown, self._held = [], []
        return rest

    def _after_shown(self) -> str:
        # Other decoders look at neighbours (is there a space before this word?), so what was shown last goes along.
        return self._tokenizer.decode(self._shown + self._held)[len(self._tokenizer.decode(self._shown)) :]
