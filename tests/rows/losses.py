"""Rows of the losses: cross-entropy on logits and on hidden states."""

from dataclasses import replace
from functools import partial

import torch
from case import Bug, Case, by_name, randn

from fmcore import ops
from fmcore.kernels import cross_entropy
from fmcore.kernels import linear_cross_entropy as linear

OPTIONS = {"label_smoothing": 0.1, "softcap": 10.0, "logit_scale": 1.7, "z_loss": 0.01}


def targets(M: int, V: int, ignored: bool = True) -> torch.Tensor:
    """Every third is ignored, but never the first, so that a mean is one of something."""
    t = torch.randint(V, (M,))
    return t.masked_fill((torch.arange(M) % 3 == 1) & ignored, -100)


def _logits(M: int, V: int) -> tuple[torch.Tensor, ...]:
    # Spread like those of a trained model: some rows are all but certain.
    return 4 * randn(M, V), targets(M, V)


def _all_options(M: int, V: int) -> tuple[torch.Tensor, ...]:
    return *_logits(M, V), randn(V), torch.rand(V, dtype=torch.float64) + 0.1


_plain = Case(
    op=partial(ops.cross_entropy, reduction="none"),
    ref=partial(cross_entropy.cross_entropy_ref, reduction="none"),
    inputs=_logits,
    # Blocks of a row are 4096 wide forward; tiles backward 64 to 1024.
    shapes=((0, 8), (1, 1), (2, 1), (5, 7), (37, 63), (33, 64), (3, 65), (2, 4095), (1, 4096), (3, 4097), (2, 9000)),
    gradcheck=(3, 5),
    phantom=(2**17, 2**17),
    draws=((0, 40), (1, 300)),
    aot=((4096, 128256), (4096, 50257), (4096, 256)),
    constants=(1,),
    file="cross_entropy.py",
)


def _hidden(M: int, C: int, V: int) -> tuple[torch.Tensor, ...]:
    return randn(M, C), randn(V, C) / C**0.5, targets(M, V)


def _hidden_options(M: int, C: int, V: int) -> tuple[torch.Tensor, ...]:
    return *_hidden(M, C, V), randn(V), torch.rand(V, dtype=torch.float64) + 0.1


_linear = Case(
    # A workspace of some rows, so that there are several chunks.
    op=partial(ops.linear_cross_entropy, reduction="sum", workspace=4800),
    ref=partial(linear.linear_cross_entropy_ref, reduction="sum"),
    inputs=_hidden,
    shapes=((0, 3, 8), (1, 1, 1), (2, 1, 7), (61, 7, 11), (37, 16, 65), (3, 5, 300)),
    gradcheck=(3, 2, 4),
    # The kernels, which are those of cross_entropy, see one chunk of logits at a time.
    phantom=(),
    draws=((0, 70), (1, 16), (1, 90)),
    aot=((4096, 4096, 128256),),
    constants=(2,),
    # Products read h and w where they are; kernels get the logits.
    no_copy=(),
    bodies=("triton", "cpu"),
    file="linear_cross_entropy.py",
)

CASES = {
    "cross_entropy": replace(
        _plain,
        bugs=(
            Bug("(cols < V)[None, :]", "(cols >= 0)[None, :]", "memory", (5, 7)),
            Bug("rows = (part * tiles + i) * ROWS", "rows = (part * tiles + i).to(tl.int32) * ROWS", "phantom"),
            Bug("rows, rows < M, V", "rows, rows <= M, V", "memory", (5, 7)),
            Bug("M, V, x.stride(0), *o", "M, V, V, *o", "memory", (5, 7)),
            Bug('dz * slope, float("nan")), 0.0)', 'dz * slope, float("nan")), 0.5)', "exact", (5, 7)),
            Bug('float("nan")), 0.0)\n    tl.store', 'float("nan")), 1.0)\n    tl.store', "exact", (5, 7)),
            Bug("sums * shrink + exps", "sums + exps", "exact", (9, 9000)),
            Bug("(p - tl.where", "(p.to(tl.bfloat16).to(ACC) - tl.where", "exact", (5, 7)),
            Bug("0 if g is None else g.stride(0), 0", "0, 0", "exact", (5, 7)),
            Bug("rows = tl.program_id(0).to(tl.int64) * ROWS", "rows = tl.program_id(0) * ROWS", "phantom"),
        ),  # fmt: skip
    ),
    "cross_entropy-options": replace(
        _plain,
        op=partial(by_name, ops.cross_entropy, ("bias", "class_weights"), **OPTIONS),
        ref=partial(by_name, cross_entropy.cross_entropy_ref, ("bias", "class_weights"), **OPTIONS),
        inputs=_all_options,
        # 600 rows are more tiles than there are sums of columns.
        shapes=((5, 7), (37, 63), (3, 65), (3, 4097), (600, 7)),
        gradcheck=(2, 5),
        draws=((1, 40), (1, 300)),
        aot=((4096, 128256),),
        constants=(1, 3),
        bugs=(
            Bug("rest = 2 * z_loss * (top + logsum)", "rest = 0.0 * top", "exact", (5, 7)),
            Bug("loss += z_loss * (top + logsum) *", "loss += z_loss *", "exact", (5, 7)),
            Bug("slope = slope * scale", "slope = scale", "exact", (5, 7)),
            Bug("rest += smoothed_weight(total_ptr, V, smoothing, ACC)", "rest += smoothing", "exact", (5, 7)),
            Bug("- tl.sum(offs, axis=1) * (smoothing / V)", "- tl.sum(offs, axis=1) * smoothing", "exact", (5, 7)),
            Bug("z = (x + bias) * scale", "z = x * scale + bias", "exact", (5, 7)),
            Bug("db += dz", "db = dz", "exact", (600, 7)),
            Bug("db_ptr + part * V + cols", "db_ptr + cols", "memory", (37, 63)),
        ),
    ),
    "linear_cross_entropy": replace(
        _linear,
        bugs=(
            Bug("range(0, count, max(1, step))", "range(0, count - step, max(1, step))", "memory", (37, 16, 65)),
            Bug("add=part.start > 0", "add=False", "exact", (37, 16, 65)),
            Bug("index_copy_(0, self.rows, values)", "index_copy_(0, self.rows, values.flip(0))", "exact", (5, 7, 11)),
            Bug("product(out, h, w.T)", "product(out, h.to(torch.float16).to(h), w.T)", "exact", (37, 16, 65)),
        ),
    ),
    "linear_cross_entropy-options": replace(
        _linear,
        op=partial(by_name, ops.linear_cross_entropy, ("bias", "class_weights"), workspace=4800, **OPTIONS),
        ref=partial(by_name, linear.linear_cross_entropy_ref, ("bias", "class_weights"), **OPTIONS),
        inputs=_hidden_options,
        shapes=((2, 3, 5), (61, 7, 11), (37, 16, 65)),
        gradcheck=(2, 2, 4),
        draws=((1, 70), (1, 16), (2, 90)),
        constants=(2, 4),
        bugs=(
            Bug("self.db += db", "self.db = db", "exact", (37, 16, 65)),
            Bug('smoothing, checked_cap("linear_cross_entropy", softcap)', "smoothing, 0.0", "exact", (5, 7, 11)),
        ),
    ),
    "linear_cross_entropy-frozen": replace(
        _linear,
        op=partial(ops.linear_cross_entropy, reduction="none", workspace=4800, label_smoothing=0.1),
        ref=partial(linear.linear_cross_entropy_ref, reduction="none", label_smoothing=0.1),
        shapes=((0, 3, 8), (61, 7, 11), (37, 16, 65)),
        gradcheck=(5, 4, 4),
        frozen=(1,),
        bugs=(Bug("dh = dh * g[:, None]", "dh = dh * g.mean()", "exact", (5, 7, 11)),),
    ),
    "linear_cross_entropy-none": replace(
        _linear,
        op=partial(by_name, ops.linear_cross_entropy, ("bias", "class_weights"), workspace=4800, reduction="none"),
        ref=partial(by_name, linear.linear_cross_entropy_ref, ("bias", "class_weights"), reduction="none"),
        inputs=_hidden_options,
        shapes=((0, 3, 8), (61, 7, 11), (37, 16, 65)),
        gradcheck=(2, 2, 4),
        constants=(2, 4),
        # For h alone the head is frozen.
        same_alone=False,
        bugs=(Bug("t[chunks.rows] for t in (g,", "t[: len(chunks.rows)] for t in (g,", "exact", (5, 7, 11)),),
    ),
    "linear_logprob": replace(
        _linear,
        op=partial(by_name, ops.linear_logprob, ("bias",), workspace=4800, entropy=True, softcap=10.0, logit_scale=1.7),
        ref=partial(by_name, linear.linear_logprob_ref, ("bias",), entropy=True, softcap=10.0, logit_scale=1.7),
        inputs=lambda M, C, V: (*_hidden(M, C, V), randn(V)),
        shapes=((0, 3, 8), (1, 1, 1), (61, 7, 11), (37, 16, 65)),
        gradcheck=(2, 2, 4),
        same_alone=False,
        bugs=(Bug("g, g_entropy if ctx.entropy else None", "g, g if ctx.entropy else None", "exact", (5, 7, 11)),),
    ),
    "linear_logprob-frozen": replace(
        _linear,
        op=partial(ops.linear_logprob, workspace=4800, entropy=True),
        ref=partial(linear.linear_logprob_ref, entropy=True),
        shapes=((61, 7, 11), (37, 16, 65)),
        gradcheck=(5, 4, 4),
        frozen=(1,),
        bugs=(Bug("dh.addcmul_(dh_entropy", "dh.addcmul_(dh", "exact", (5, 7, 11)),),
    ),
}
