"""Learning-rate schedules: the values at the corners, the shape between them, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import lr_scale

from fmcore.errors import InputError
from fmcore.train.schedule import Schedule


def test_warm_up_is_a_line_that_never_is_zero():
    assert [lr_scale(s, 100, warmup=4) for s in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert lr_scale(0, 100, warmup=0) == 1.0


def test_cosine():
    values = [lr_scale(s, 110, kind="cosine", warmup=10, min_ratio=0.2) for s in range(120)]
    assert values[10] == 1.0
    assert values[35] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[60] == pytest.approx(0.6)
    assert values[109] == pytest.approx(0.2, abs=3e-4) and values[109] > 0.2
    assert values[110:] == [0.2] * 10


def test_wsd():
    values = [lr_scale(s, 100, kind="wsd", warmup=10, min_ratio=0.0, decay_fraction=0.25) for s in range(103)]
    assert values[10:76] == [1.0] * 66
    assert values[76] == 24 / 25 and values[99] == 1 / 25
    assert values[100:] == [0.0] * 3
    assert lr_scale(90, 100, kind="wsd", warmup=10, min_ratio=0.5, decay_fraction=0.2) == 0.75


def test_constant():
    assert [lr_scale(s, 4, kind="constant", warmup=1) for s in range(6)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_one_step():
    assert [lr_scale(0, 1, kind=kind, warmup=0) for kind in ("cosine", "wsd", "constant")] == [1.0] * 3


def test_no_decay_shorter_than_a_step():
    assert Schedule("wsd", 0, 0.0, 0.01).decay_steps(10) == 1


@given(
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    total=st.integers(2, 400),
    share=st.floats(0, 0.5),
    min_ratio=st.floats(0, 1),
    decay_fraction=st.floats(0.01, 0.4),
)
def test_rises_to_one_then_never_rises(kind, total, share, min_ratio, decay_fraction):
    schedule = Schedule(kind, int(share * total), min_ratio, decay_fraction)
    values = [schedule.scale(s, total) for s in range(total + 1)]
    w = schedule.warmup
    assert values[w] == 1.0 and max(values) <= 1.0
    assert all(a < b for a, b in zip(values[:w], values[1 : w + 1], strict=True))
    assert all(a >= b for a, b in zip(values[w:], values[w + 1 :], strict=False))
    assert values[total] == (1.0 if kind == "constant" else pytest.approx(min_ratio))
    # No step of the run is lost to a rate of zero.
    assert min(values[:total]) > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"kind": "linear"}, "kind"),
        ({"warmup": -1}, "warmup"),
        ({"min_ratio": 1.5}, "min_ratio"),
        ({"min_ratio": math.nan}, "min_ratio"),
        ({"decay_fraction": 0.0}, "decay_fraction"),
        ({"decay_fraction": 1.1}, "decay_fraction"),
        ({"warmup": 50}, "do not fit into 50 steps"),
        ({"kind": "wsd", "warmup": 30, "decay_fraction": 0.5}, "30 of warm-up and 25 of decay do not fit into 50"),
    ],
)
def test_bad_options(options, word):
    with pytest.raises(InputError, match=word):
        lr_scale(0, 50, **{"warmup": 5, **options})


def test_bad_steps():
    for step, total in ((-1, 10), (0, 0)):
        with pytest.raises(InputError, match="step"):
            lr_scale(step, total, warmup=0)
