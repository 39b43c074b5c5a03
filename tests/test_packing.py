"""Batches keep document boundaries, epochs visit every window once, and a resumed loader goes on exactly."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmcore.data.packing import IGNORE, Batch, Loader, check_vocab, held_out_batches, pack, shuffled
from fmcore.data.shards import Shard, write_shard
from fmcore.data.tokenizer import ByteTokenizer
from fmcore.errors import InputError

BYTE = ByteTokenizer()
END = BYTE.end


def of_documents(documents: list[list[int]], name: str = "a", fingerprint: str = "f") -> Shard:
    """A shard in memory; only the file's checks are missing."""
    stream = np.array([END, *(i for d in documents for i in [*d, END])], np.uint16)
    return Shard(Path(name), stream, 257, int(stream.max()), END, len(stream), len(documents), name * 64, fingerprint)


def counting(length: int, name: str = "a") -> Shard:
    """A stream of ``length`` tokens in which no two windows are alike: i, or pairs (i // 250, i % 250)."""
    ids = range(length) if length < 250 else [v for i in range(length) for v in (i // 250, i % 250)]
    return of_documents([list(ids[: length - 2])], name)


def same(a: Batch, b: Batch) -> bool:
    return a.n_targets == b.n_targets and all(
        torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "targets", "positions", "cu_seqlens")
    )


SHARDS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=40), min_size=1, max_size=30).map(of_documents)


def check_boundaries(batch: Batch, stream: np.ndarray) -> None:
    """Positions, segments and targets of every row, told again token by token."""
    B, T = batch.tokens.shape
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32 and batch.cu_seqlens.device.type == "cpu"
    assert batch.tokens.min() >= 0
    starts = []
    for row in range(B):
        since = 0
        for t in range(T):
            token, target = int(batch.tokens[row, t]), int(batch.targets[row, t])
            since = 0 if t == 0 or token == END else since + 1
            starts += [row * T + t] if since == 0 else []
            assert batch.positions[row, t] == since
            # The target is what follows in the same document, or the separator that says it is over.
            if t + 1 < T and target != IGNORE:
                assert target == batch.tokens[row, t + 1]
    assert batch.cu_seqlens.tolist() == [*starts, B * T]
    assert (np.diff(batch.cu_seqlens) > 0).all() and {row * T for row in range(B)} <= set(starts)
    assert batch.n_targets == int((batch.targets != IGNORE).sum())
    text = stream.tobytes()
    for row in range(B):
        kept = int((batch.targets[row] != IGNORE).sum())
        window = np.append(batch.tokens[row, :kept].numpy(), batch.targets[row, kept - 1 : kept].numpy())
        assert window.astype(np.uint16).tobytes() in text


@settings(deadline=None)
@given(shard=SHARDS, B=st.integers(1, 5), T=st.integers(1, 30), seed=st.integers(0, 2**70))
def test_no_document_is_crossed(shard: Shard, B: int, T: int, seed: int):
    if len(shard) < T + 1:
        with pytest.raises(InputError, match="wanted at least seq_len"):
            Loader(shard, B, T, seed)
        return
    loader = Loader(shard, B, T, seed)
    for _ in range(3):
        batch = loader.next_batch()
        assert batch.tokens.shape == (B, T) and batch.n_targets == B * T
        check_boundaries(batch, shard.tokens)


def test_a_worked_example():
    shard = of_documents([[1, 2, 3], [4], [5, 6]])
    (batch,) = held_out_batches(shard, 2, 5)
    assert batch.tokens.tolist() == [[END, 1, 2, 3, END], [4, END, 5, 6, END]]
    assert batch.targets.tolist() == [[1, 2, 3, END, 4], [END, 5, 6, END, IGNORE]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0], [0, 0, 1, 2, 0]]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 6, 9, 10]
    assert batch.n_targets == 9


def windows(loader: Loader, rows: int) -> list[bytes]:
    out: list[bytes] = []
    while len(out) < rows:
        batch = loader.next_batch()
        out += [torch.cat([t, g[-1:]]).numpy().tobytes() for t, g in zip(batch.tokens, batch.targets, strict=True)]
    return out


@pytest.mark.parametrize("length, T", [(1000, 7), (1000, 100), (150, 100), (101, 100), (200, 100), (299, 100), (10, 1)])
def test_an_epoch_visits_every_window_once(length: int, T: int):
    shard = counting(length)
    assert len(shard) == length
    loader = Loader(shard, 1, T, seed=3)
    n = loader.rows_per_epoch
    assert n == max(1, (length - T) // T)
    starts = {shard.tokens[s : s + T + 1].astype(np.int64).tobytes(): s for s in range(length - T)}
    shifts = []
    for epoch in range(30):
        assert loader.epoch == epoch
        at = sorted(starts[w] for w in windows(loader, n))
        assert at == [at[0] + i * T for i in range(n)]
        shifts.append(at[0])
        # Fewer than 2T tokens stay out.
        assert length - 1 - n * T < 2 * T
    assert len(set(shifts)) > 1 or length - n * T == 1 or T == 1


def test_epochs_differ_and_follow_the_seed():
    shard = counting(3000)
    runs = {seed: windows(Loader(shard, 4, 10, seed), 900) for seed in (0, 1, 0)}
    again = windows(Loader(shard, 4, 10, 0), 900)
    n = Loader(shard, 4, 10).rows_per_epoch
    assert runs[0] == again != runs[1]
    assert runs[0][:n] != runs[0][n : 2 * n] and runs[0][:n] != sorted(runs[0][:n])


def test_the_order_is_pinned():
    """A saved run must find the same order in every version of numpy and fmcore."""
    assert shuffled(np.arange(12), 12, 0).tolist() == [6, 11, 1, 3, 0, 10, 7, 2, 8, 9, 4, 5]
    assert Loader(counting(500), 3, 16, seed=7).next_batch().tokens[:, :2].tolist() == [[153, 0], [57, 0], [161, 0]]


@settings(deadline=None)
@given(n=st.integers(1, 400), key=st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(n: int, key: int):
    order = shuffled(np.arange(n), n, key)
    assert sorted(order.tolist()) == list(range(n))
    # Each place can be asked for alone.
    assert [int(shuffled(np.array([i]), n, key)[0]) for i in range(0, n, 37)] == order[::37].tolist()


def test_shuffled_on_large_sets():
    n = 10**13 + 7
    some = shuffled(np.arange(10**13 - 50_000, n), n, 5)
    assert len(set(some.tolist())) == 50_007 and some.min() >= 0 and some.max() < n
    # Evenly spread: ten bins within five standard deviations.
    counts = np.bincount(some // (n // 10 + 1), minlength=10)
    assert abs(counts - 5000.7).max() < 5 * 5000**0.5


def test_shuffled_is_as_random_as_a_shuffle():
    """Over many keys every place goes everywhere equally often, and neighbours do not stay neighbours."""
    n, keys = 30, 4000
    orders = np.stack([shuffled(np.arange(n), n, k * 7919) for k in range(keys)])
    counts = np.stack([np.bincount(orders[:, i], minlength=n) for i in range(n)])  # (n, n)
    expected = keys / n
    chi2 = ((counts - expected) ** 2 / expected).sum() / ((n - 1) ** 2)
    assert 0.8 < chi2 < 1.25
    steps = np.abs(np.diff(orders, axis=1)) == 1
    assert abs(steps.mean() - 2 / n) < 0.1 * 2 / n


@settings(deadline=None, max_examples=50)
@given(before=st.integers(0, 12), after=st.integers(1, 12), B=st.integers(1, 7))
def test_resume_is_exact(before: int, after: int, B: int):
    shards = [counting(310, "a"), counting(150, "b")]
    straight = Loader(shards, B, 16, seed=5)
    for _ in range(before):
        straight.next_batch()
    resumed = Loader(shards, B, 16, seed=5)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    # 25 rows an epoch, so most draws cross epochs.
    for _ in range(after):
        assert same(resumed.next_batch(), straight.next_batch())
    assert resumed.state_dict() == straight.state_dict()


def test_resume_with_another_batch_size_goes_on_where_it_was():
    shard = counting(2000)
    straight = windows(Loader(shard, 1, 16, 2), 400)
    first = Loader(shard, 5, 16, 2)
    got = windows(first, 100)
    second = Loader(shard, 12, 16, 2)
    second.load_state_dict(first.state_dict())
    assert got + windows(second, 300) == straight


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"seed": 1}, "seed differs: this run has 1, the state was saved with 0"),
        ({"seq_len": 8}, "seq_len differs: this run has 8, the state was saved with 16"),
        (
            {"shards": counting(500, "b")},
            f"shards differs: this run has {'b' * 12}, the state was saved with {'a' * 12}",
        ),
    ],
)
def test_a_state_of_other_data_is_refused(change: dict, wanted: str):
    options = {"shards": counting(500), "batch_size": 2, "seq_len": 16, "seed": 0}
    state = Loader(**options).state_dict()
    with pytest.raises(InputError) as e:
        Loader(**options | change).load_state_dict(state)
    assert wanted in str(e.value)


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        None,
        {"rows": -1, "data": {}},
        {"rows": 1.5, "data": {}},
        {"rows": True, "data": {}},
        {"rows": 1},
        {"rows": 1, "data": {}},
        {"rows": 1, "data": {"shards": 3}},
    ],
)
def test_a_state_that_is_none_is_refused(state: object):
    loader = Loader(counting(500), 2, 16)
    with pytest.raises(InputError, match="^loader state: "):
        loader.load_state_dict(state)
    assert loader.rows == 0


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_of_one_order(world: int):
    shard = counting(2000)
    alone = windows(Loader(shard, 4 * world, 16, 9), 240)
    ranks = [Loader(shard, 4, 16, 9, rank, world) for rank in range(world)]
    together = [w for _ in range(240 // (4 * world)) for loader in ranks for w in windows(loader, 4)]
    assert together == alone
    assert len({loader.rows for loader in ranks}) == 1


def test_several_shards_are_all_visited():
    shards = [counting(400, "a"), of_documents([[7] * 99]), of_documents([[8] * 49])]
    loader = Loader(shards, 1, 24, seed=1)
    assert loader.rows_per_epoch == (400 - 24) // 24 + 3 + 1
    seen = Counter()
    for _ in range(loader.rows_per_epoch):
        tokens = loader.next_batch().tokens[0]
        seen[7 if (tokens == 7).sum() > 20 else 8 if (tokens == 8).sum() > 20 else 0] += 1
    assert seen == {0: 15, 7: 3, 8: 1}


def test_bad_loaders():
    shard = counting(100)
    with pytest.raises(InputError, match="a: wanted at least seq_len . 1 = 101 tokens, got 100; take more text"):
        Loader(shard, 1, 100)
    for options in ({"batch_size": 0}, {"seq_len": 0}, {"world": 0}):
        with pytest.raises(InputError, match=f"loader: {next(iter(options))} must be at least 1, got 0"):
            Loader(**{"shards": shard, "batch_size": 1, "seq_len": 8} | options)
    for rank in (-1, 2):
        with pytest.raises(InputError, match=rf"rank must be in \[0, 2\), got {rank}"):
            Loader(shard, 1, 8, rank=rank, world=2)
    with pytest.raises(InputError, match="at least one shard, got none"):
        Loader([], 1, 8)
    with pytest.raises(InputError, match="b: wanted ids of the same tokenizer as a, f, got g"):
        Loader([shard, of_documents([[1] * 50], "b", "g")], 1, 8)


def test_ids_beyond_the_model(tmp_path: Path):
    write_shard(tmp_path / "a.shard", [BYTE.encode("text")], BYTE)
    shard = Shard.open(tmp_path / "a.shard")
    check_vocab(shard, 257)
    with pytest.raises(InputError, match="a.shard: wanted ids below the model's vocabulary 256, got ids up to 256"):
        check_vocab(shard, 256)


@settings(deadline=None)
@given(shard=SHARDS, B=st.integers(1, 5), T=st.integers(1, 30))
def test_held_out_covers_every_target_once(shard: Shard, B: int, T: int):
    targets = []
    for batch in held_out_batches(shard, B, T):
        check_boundaries(batch, shard.tokens)
        assert batch.tokens.shape == (B, T)
        assert batch.tokens.max() < shard.vocab_size
        targets += batch.targets[batch.targets != IGNORE].tolist()
    assert targets == shard.tokens[1:].tolist()


def test_held_out_padding_is_one_segment_a_row():
    (batch,) = held_out_batches(of_documents([[1, 2, 3]]), 3, 8)
    assert batch.n_targets == 4
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 8, 16, 24]


@pytest.mark.parametrize(
    "limit, rows", [(1, 1), (10, 1), (20, 2), (99, 9), (990, 99), (998, 99), (999, 100), (5000, 100)]
)
def test_held_out_with_a_limit_spreads_over_the_shard(limit: int, rows: int):
    shard = counting(1000)
    batches = list(held_out_batches(shard, 1, 10, limit))
    assert len(batches) == rows
    at = [int(b.tokens[0, 2]) for b in batches]
    assert same(batches[0], next(held_out_batches(shard, 1, 10, limit)))
    assert len(at) == len(batches) and sum(b.n_targets for b in batches) <= max(limit, 10)
    spread = {shard.tokens[s : s + 10].astype(np.int64).tobytes(): s for s in range(990)}
    if 1 < rows < 100:
        starts = [spread[b.tokens[0].numpy().tobytes()] for b in batches]
        assert starts[0] == 0 and starts == sorted(starts) and starts[-1] >= 990 * (rows - 1) / rows - 10


def test_held_out_of_a_short_shard_with_a_limit():
    (batch,) = held_out_batches(of_documents([[1, 2, 3]]), 1, 8, 2)
    assert batch.n_targets == 4


def test_bad_held_out():
    for B, T, limit in ((0, 1, None), (1, 0, None), (1, 1, 0)):
        with pytest.raises(InputError, match="must be at least 1"):
            held_out_batches(counting(100), B, T, limit)


def test_to_keeps_the_segments_on_the_cpu():
    batch = Loader(counting(100), 2, 8).next_batch()
    moved = batch.to("meta")
    assert moved.tokens.is_meta and moved.targets.is_meta and moved.positions.is_meta
    assert moved.cu_seqlens is batch.cu_seqlens and moved.n_targets == 16
    assert same(batch.to("cpu"), batch)


def test_pack_does_not_write_its_rows():
    rows = np.array([[END, 1, 2, END, 3]])
    pack(rows, END, 2)
    assert rows.tolist() == [[END, 1, 2, END, 3]]
