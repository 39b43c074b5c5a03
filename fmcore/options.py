"""What people choose for a run besides the training itself: text, tokenizer, model, adapter.

The command line makes its flags of these dataclasses, and a checkpoint remembers them. The comment behind a field is
its help.
"""

from dataclasses import asdict, dataclass, replace

from fmcore.adapt.lora import LoraConfig
from fmcore.data.corpus import read_documents, split_documents
from fmcore.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer
from fmcore.errors import InputError
from fmcore.models.decoder import PRESETS, Config


@dataclass(frozen=True)
class DataOptions:
    """Which text, and how much of it is held out."""

    data: str = "stdlib"  # stdlib | topics | a text file or .jsonl | a folder of them or of shards | hf:org/name
    field: str = "text"  # of .jsonl lines and data sets
    held_out: float = 0.05  # share of the text that is never trained on
    eval_tokens: int = 65536  # tokens of held-out text in an evaluation inside training

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise InputError(f"data: held_out must be a share between 0 and 1, got {self.held_out}")
        if self.eval_tokens < 1:
            raise InputError(f"data: eval_tokens must be at least 1, got {self.eval_tokens}")


@dataclass(frozen=True)
class TokenizerOptions:
    """How text becomes tokens."""

    tokenizer: str = "byte"  # byte | bpe (trained on the text) | a tokenizer.json or its folder
    vocab_size: int = 4096  # ids of a bpe tokenizer that is trained here

    def make(self, data: DataOptions) -> Tokenizer:
        """The tokenizer of these options; "bpe" trains one on the training part of ``data``."""
        if self.tokenizer == "byte":
            return ByteTokenizer()
        if self.tokenizer == "bpe":
            training, _ = split_documents(read_documents(data.data, data.field), data.held_out)
            return BPETokenizer.train((document.text for document in training), self.vocab_size)
        return load_tokenizer(self.tokenizer)


@dataclass(frozen=True)
class ModelOptions:
    """Which model: a preset, and where it differs from it."""

    preset: str = "demo"  # demo demo-gpu gpt2-124m gpt2-350m gpt2-1.5b llama-3.2-1b llama-3.1-8b qwen3-0.6b
    layers: int | None = None  # blocks; by default the preset's, as all below
    width: int | None = None  # of the residual stream
    heads: int | None = None  # of queries
    kv_heads: int | None = None  # of keys and values; heads must be a multiple
    ffn: int | None = None  # width inside the feed-forward network
    context: int | None = None  # longest sequence, in tokens; with rope at least seq_len

    def config(self, vocab_size: int, seq_len: int) -> Config:
        """The ``Config`` of these options for a tokenizer of ``vocab_size`` ids and sequences of ``seq_len`` tokens.

        Raises ``InputError`` for an unknown preset and for a context shorter than ``seq_len``.
        """
        if self.preset not in PRESETS:
            raise InputError(f"model: preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        base = PRESETS[self.preset]
        given = {k: v for k, v in asdict(self).items() if k != "preset" and v is not None}
        if "context" not in given:
            given["context"] = max(base.context, seq_len) if base.positions == "rope" else base.context
        if given["context"] < seq_len:
            raise InputError(f"model: context must be at least seq_len={seq_len}, got {given['context']}")
        return replace(base, vocab_size=vocab_size, **given)


@dataclass(frozen=True)
class LoraOptions:
    """Which adapter, in words that fit on a command line."""

    rank: int = 8
    alpha: float = 16.0  # the adapter's output counts alpha / rank times
    dropout: float = 0.0  # share of the adapter's input that is dropped
    targets: str = "all"  # layers, with commas: of q,k,v,o,gate,up,down (GPT-2: qkv,o,up,down)
    rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank

    def __post_init__(self) -> None:
        # LoraConfig checks the values.
        self.config()

    def config(self) -> LoraConfig:
        """The adapter that these options mean. ``InputError`` for values that no adapter can have."""
        targets = self.targets if self.targets == "all" else tuple(name.strip() for name in self.targets.split(","))
        return LoraConfig(self.rank, self.alpha, self.dropout, targets, self.rslora)
