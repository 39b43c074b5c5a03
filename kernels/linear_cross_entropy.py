"""Cross-entropy and log-probabilities of a linear head, without its logits: one loss head for everything.

    x = h w^T          h (M, C)   w (V, C)   x (M, V), never whole; from x on all is as in cross_entropy.py

    dh = dx w          dw = dx^T h          db = sum over M of dx          log p(t_i) = z_t - lse

Rows go through in chunks whose logits fill ``workspace`` bytes: one product gives x, which turns into dx in place, and
two products give dh and dw, which accumulates in the dtype of sums. A loss that is a number only scales dx later, so
all of that happens in the forward pass: 3 products, 2 with a frozen head or a frozen trunk, 1 without gradients.
Of row losses (M,) the incoming gradient is not known yet. With a frozen head dh_i = g_i G_i, so the forward pass forms
G (M, C) and the backward pass has no product; otherwise the backward pass forms x once more (4 products in all).
A second backward pass through a retained graph forms x once more too, for the first has handed out its buffers.

Ignored rows are left out of the products when ``targets`` lie on the CPU, which they may for ``h`` on a GPU as well.
Asking a GPU how many there are would mean waiting for it, so for targets there the kernels skip those rows and their
dx is 0. On a GPU x is in the dtype of h for a loss, as that of the layer would be: in fp32 a chunk would hold half the
rows. ``linear_logprob`` has x in fp32, for the ratios of two policies need it. On a CPU 16-bit arguments are turned
into fp32 copies. dh and dw stay in the dtype of sums until the incoming gradient has scaled them: one rounding, at the
price of 4VC bytes until then where w has 16 bits.

FLOPs 2MCV a product; DRAM 3MV elements of x beside the products, and dw twice a chunk.
Source: Wijmans et al. 2024, arXiv:2411.09009 (no logits in memory); Hsu et al. 2024, arXiv:2410.10989 (chunks).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fmcore import check
from fmcore.kernels.blocks import accumulator
from fmcore.kernels.cross_entropy import (
    SCHEMA,
    Options,
    Stats,
    check_loss,
    checked_cap,
    gradient,
    losses_ref,
    reduced,
    statistics,
    weights_of,
)
from fmcore.op import Op

# Bytes of logits that exist at a time. On a GPU 2093 rows of a 16-bit Llama vocabulary, enough to keep the products at
# full speed (derived, not measured). On a CPU more memory gained no speed: benchmarks/loss_head.py.
WORKSPACE = {"cuda": 2**29, "cpu": 2**26}

# A CPU's chunk of more rows and elements than these only leaves the cache: forward and backward of 4096 rows, C = 128,
# V = 2048 took 70 ms of one core in chunks of 512 rows and 86 ms in one.
CPU_ROWS, CPU_CHUNK = 512, 2**20

# Logits that the CPU body takes through softmax and gradient at a time: they stay in the cache meanwhile.
CPU_TILE = 2**18

# Which of h, w and bias need a gradient.
Needs = tuple[bool, bool, bool]


# References: what the chunks below must equal, logits and all.
def linear_cross_entropy_ref(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    options = Options(ignore_index, label_smoothing, softcap or 0.0, logit_scale, z_loss)
    loss, _ = losses_ref(F.linear(h, w, bias), targets, class_weights, options)
    return reduced(loss, targets, class_weights, ignore_index, reduction)


def linear_logprob_ref(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    loss, z = losses_ref(F.linear(h, w, bias), targets, None, Options(ignore_index, 0.0, softcap or 0.0, logit_scale))
    if not entropy:
        return -loss
    log_p = z.masked_fill((targets == ignore_index)[:, None], 0.0).log_softmax(1)
    # Not log_p itself, which may be -inf where p is 0.
    terms = log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)
    return -loss, -terms.sum(1).masked_fill(targets == ignore_index, 0.0)


class Given(NamedTuple):
    """What a loss takes beside the logits (m, V) of a chunk: targets (m,), ``bias`` and ``weights_of`` the classes."""

    targets: Tensor
    bias: Tensor | None
    weights: tuple[Tensor | None, Tensor | None]
    o: Options


# Two ways to turn logits into losses and gradients; the chunks are the same for both.
class Triton:
    """Logits as the product leaves them; the kernels of cross_entropy.py do the rest."""

    @staticmethod
    def dtype(h: Tensor, exact: bool) -> torch.dtype:
        """Of the logits."""
        return accumulator(h.dtype)[0] if exact else h.dtype

    @staticmethod
    def logits(out: Tensor, h: Tensor, w: Tensor, bias: Tensor | None, scale: float) -> None:
        product(out, h, w.T)

    @staticmethod
    def turn(x, dx, given: Given, g, g_entropy, stats: Stats | None, entropy: bool, needs_db: bool):
        """Stats of the rows of ``x``, their gradient to ``dx`` if there is one (it may be ``x``), and its db."""
        targets, bias, weights, o = given
        stats = stats or statistics(x, targets, bias, weights, o, entropy)
        if dx is None:
            return stats, None
        return stats, gradient(dx, x, g, g_entropy, targets, bias, weights, stats, o, needs_db)


class Cpu:
    """In PyTorch, a tile of rows after the other, so that all passes but the first find it in the cache."""

    @staticmethod
    def dtype(h: Tensor, exact: bool) -> torch.dtype:
        return h.dtype

    @staticmethod
    def logits(out: Tensor, h: Tensor, w: Tensor, bias: Tensor | None, scale: float) -> None:
        if bias is None:
            product(out, h, w.T, scale)
        else:
            torch.addmm(bias, h, w.T, beta=scale, alpha=scale, out=out)

    @staticmethod
    def turn(x, dx, given: Given, g, g_entropy, stats: Stats | None, entropy: bool, needs_db: bool):
        """As for ``Triton``; ``x`` is lost."""
        kept, db = [], x.new_zeros(x.shape[1]) if needs_db else None
        step = max(1, CPU_TILE // x.shape[1])
        for i in range(0, len(x), step):
            part = slice(i, i + step)
            z = x[part] if dx is None or dx is x else dx[part].copy_(x[part])
            rows = given._replace(targets=_column(given.targets, part).long())
            kept.append(_turn_tile(z, rows, _column(g, part), _column(g_entropy, part), entropy, dx is not None))
            if db is not None:
                db += z.sum(0)
        return tuple(map(torch.cat, zip(*kept, strict=True))), db


def _column(t: Any, part: slice) -> Any:
    """Some elements of ``t`` (m,), one below the other; ``None`` for ``None``."""
    return None if t is None else t[part, None]


def _turn_tile(z, given: Given, g, g_entropy, entropy: bool, needs_dx: bool) -> Stats:
    """Stats of the tile ``z`` (m, V) of scaled logits, which becomes its gradient or something of no use."""
    targets, _, (weights, weight_sum), o = given
    slope = None
    if o.softcap:
        z.div_(o.softcap).tanh_()
        # 1 - z^2 with one rounding less.
        slope = (1 - z).mul_(1 + z)
        z.mul_(o.softcap)
    z_t, top = z.gather(1, targets), z.amax(1, keepdim=True)
    if o.smoothing:
        offs = z - z_t
        offs = offs.sum(1, keepdim=True) if weights is None else (offs @ weights)[:, None]
    p = torch.softmax(z, 1, out=z)
    # The largest p is at least 1 / V, so its logarithm is exact where that of another could be of 0.
    logsum = p.amax(1, keepdim=True).log_().neg_()
    # 1 - e is rounded as the kernels round it.
    share = z_t.new_full((), 1.0) - o.smoothing if weights is None else weights[targets] * (1 - o.smoothing)
    nll, lse = logsum + (top - z_t), top + logsum
    loss, rest = share * nll, 2 * o.z_loss * lse
    if o.smoothing:
        weight = o.smoothing * (1.0 if weight_sum is None else weight_sum / z.shape[1])
        loss += weight * nll - offs * (o.smoothing / z.shape[1])
        rest += weight
    if o.z_loss:
        loss += o.z_loss * lse.square()
    plogp = torch.special.xlogy(p, p) if entropy else p[:0]
    entropies = -plogp.sum(1, keepdim=True)
    if needs_dx:
        one = torch.ones_like(z_t) if g is None else g
        share = share * one
        factor = share + rest * one
        if g_entropy is not None:
            factor = factor - g_entropy * entropies
        if o.smoothing or o.z_loss or weights is not None or g is not None or g_entropy is not None:
            p.mul_(factor)
        if g_entropy is not None:
            p.addcmul_(plogp, g_entropy, value=-1)
        if o.smoothing:
            smooth = p.new_ones(p.shape[1]) if weights is None else weights
            p.addr_(one[:, 0], smooth, alpha=-o.smoothing / p.shape[1])
        p.scatter_add_(1, targets, share.expand(z_t.shape).neg())
        if slope is not None:
            p.mul_(slope)
        if o.scale != 1:
            p.mul_(o.scale)
    return loss[:, 0], top[:, 0], logsum[:, 0], entropies[:, 0]


def product(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, add: bool = False) -> None:
    """``scale * a @ b`` into ``out`` or added to it; ``out`` may be fp32 where ``a`` and ``b`` have 16 bits."""
    options: dict[str, Any] = {"beta": int(add), "alpha": scale, "out": out}
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, **options)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, **options)
    else:
        # For kernels of a GPU that run without one: the same sums.
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), **options)


def _counted(h: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor | None, Tensor, Tensor]:
    """Which rows count, where that is known without waiting and not all do; those of ``h``; their targets beside it."""
    rows = None
    if targets.device.type == "cpu":
        counted = (targets != ignore_index).nonzero().squeeze(1)
        if len(counted) < len(h):
            rows, targets = counted.to(h.device), targets[counted]
            h = h[rows]
    return rows, h, targets.to(h.device).contiguous()


def _even(count: int, most: int) -> int:
    """Rows of a chunk when ``count`` rows are cut into chunks of at most ``most``."""
    # Products like round sizes, and chunks of even size: a short last one would be slow.
    most -= most % 128 if most > 128 else 0
    return -(-count // max(1, -(-count // most)))


class Chunks:
    """The rows of ``h`` that count, cut into chunks; their stats and the sums of their gradients as they come.

    ``args`` are ``ARGS``. Logits are in the dtype of sums when ``exact``; their gradient takes room of its own, and
    leaves them as they are, when ``apart``.
    """

    def __init__(self, way: Any, args: list, needs: Needs, entropy: bool, exact: bool = False, apart: bool = False):
        h, w, targets, bias, weights, *o, workspace = args
        self.way, self.o, self.M, self.stat = way, Options(*o), len(h), accumulator(h.dtype)[0]
        self.rows, self.h, self.targets = _counted(h, targets, self.o.ignore_index)
        self.w, self.bias, self.weights = w, None if bias is None else bias.contiguous(), weights_of(weights, h)
        if way is Cpu:
            self.h, self.w = self.h.to(self.stat), w.to(self.stat)
            self.bias = None if bias is None else bias.to(self.stat)
        dtype = way.dtype(self.h, exact)
        # Where dx does not take the place of x it needs room of its own, in the dtype of h for the products.
        apart = apart or dtype != self.h.dtype
        each = (dtype.itemsize + apart * self.h.itemsize) * len(w)
        count, most = len(self.h), max(1, workspace // each)
        if way is Cpu:
            most = min(most, max(CPU_ROWS, CPU_CHUNK // len(w)))
        step = _even(count, most)
        self.parts = [slice(i, min(i + step, count)) for i in range(0, count, max(1, step))]
        self.x = h.new_empty(step, len(w), dtype=dtype)
        self.dx = h.new_empty(step, len(w), dtype=self.h.dtype) if apart else self.x
        self.stats = [h.new_empty(count, dtype=self.stat) for _ in range(3 + entropy)]
        self.dh, self.dw, self.db = (
            h.new_empty(count, h.shape[1], dtype=self.stat) if needs[0] else None,
            w.new_empty(w.shape, dtype=self.stat) if needs[1] else None,
            w.new_zeros(len(w), dtype=self.stat) if needs[2] else None,
        )
        if self.dw is not None and not self.parts:
            self.dw.zero_()

    def logits(self, part: slice) -> tuple[Tensor, Tensor, Given]:
        """x of some rows, where its gradient goes, and what else is known of them."""
        m = part.stop - part.start
        self.way.logits(self.x[:m], self.h[part], self.w, self.bias, self.o.scale)
        return self.x[:m], self.dx[:m], Given(self.targets[part], self.bias, self.weights, self.o)

    def keep(self, part: slice, stats: Stats) -> None:
        """``stats`` of some rows, among which no entropy is kept unless it was asked for."""
        for of_all, some in zip(self.stats, stats[: len(self.stats)], strict=True):
            of_all[part] = some

    def add(self, part: slice, dx: Tensor, db: Tensor | None) -> None:
        """What some rows contribute by the gradient ``dx`` of their logits."""
        if self.dh is not None:
            product(self.dh[part], dx, self.w)
        if self.dw is not None:
            product(self.dw, dx.T, self.h[part], add=part.start > 0)
        if self.db is not None:
            self.db += db

    def whole(self, values: Tensor | None) -> Tensor:
        """``values`` of the rows that count, with zeros at the others; nothing for ``None``."""
        if values is None:
            return self.h.new_empty(0, dtype=self.stat)
        if self.rows is None:
            return values
        return values.new_zeros(self.M, *values.shape[1:]).index_copy_(0, self.rows, values)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """dh, dw and db in the dtype of sums; nothing where it was not needed."""
        empty = self.h.new_empty(0, dtype=self.stat)
        return self.whole(self.dh), empty if self.dw is None else self.dw, empty.clone() if self.db is None else self.db


# Operators: what every body returns, then the bodies, one for each way.
ARGS = f"Tensor h, Tensor w, Tensor targets, Tensor? bias, Tensor? weights, {SCHEMA}, int workspace"


def _fake_gradients(h: Tensor, w: Tensor, needs: Needs) -> tuple[Tensor, ...]:
    sizes = (h.shape, w.shape, w.shape[:1])
    stat = accumulator(h.dtype)[0]
    return tuple(h.new_empty(s if needed else (0,), dtype=stat) for s, needed in zip(sizes, needs, strict=True))


def _fake_stats(h: Tensor, *counts: bool) -> tuple[Tensor, ...]:
    return tuple(h.new_empty(h.shape[0] if n else 0, dtype=accumulator(h.dtype)[0]) for n in counts)


# The sum of the losses, and its gradients.
total = Op(
    f"linear_cross_entropy_total({ARGS}, bool[] needs) -> (Tensor loss, Tensor dh, Tensor dw, Tensor db)",
    fake=lambda h, w, *rest: (h.new_empty((), dtype=accumulator(h.dtype)[0]), *_fake_gradients(h, w, rest[-1])),
)
# The losses, the entropies if asked for, and with a frozen head the gradients of h for incoming gradients of 1.
fwd = Op(
    f"linear_cross_entropy_fwd({ARGS}, bool exact, bool entropy, bool frozen)"
    " -> (Tensor loss, Tensor top, Tensor logsum, Tensor entropies, Tensor dh, Tensor dh_entropy)",
    fake=lambda h, w, *rest: (
        *_fake_stats(h, True, True, True, rest[-2]),
        *_fake_gradients(h, h, (rest[-1], rest[-1] and rest[-2], False))[:2],
    ),
)
bwd = Op(
    f"linear_cross_entropy_bwd({ARGS}, bool exact, Tensor g, Tensor? g_entropy, Tensor top, Tensor logsum,"
    " Tensor entropies, bool[] needs) -> (Tensor dh, Tensor dw, Tensor db)",
    fake=lambda h, w, *rest: _fake_gradients(h, w, rest[-1]),
)


# Bodies take a way, then the operator's arguments; the first of those are what ``Chunks`` cuts up.
def _total(way: Any, *args) -> tuple[Tensor, ...]:
    *head, needs = args
    chunks = Chunks(way, head, needs, False)
    for part in chunks.parts:
        x, dx, known = chunks.logits(part)
        stats, db = way.turn(x, dx if any(needs) else None, known, None, None, None, False, needs[2])
        chunks.keep(part, stats)
        if any(needs):
            chunks.add(part, dx, db)
    return chunks.stats[0].sum(), *chunks.gradients()


def _fwd(way: Any, *args) -> tuple[Tensor, ...]:
    *head, exact, entropy, frozen = args
    chunks = Chunks(way, head, (frozen, False, False), entropy, exact, apart=frozen and entropy)
    dh_entropy = torch.empty_like(chunks.dh) if chunks.dh is not None and entropy else None
    for part in chunks.parts:
        x, dx, known = chunks.logits(part)
        stats, _ = way.turn(x, dx if frozen else None, known, None, None, None, entropy, False)
        chunks.keep(part, stats)
        if frozen:
            chunks.add(part, dx, None)
        if dh_entropy is not None:
            one = torch.ones_like(stats[0])
            way.turn(x, dx, known, torch.zeros_like(one), one, stats, True, False)
            product(dh_entropy[part], dx, chunks.w)
    loss, top, logsum, entropies = map(chunks.whole, chunks.stats if entropy else (*chunks.stats, None))
    return loss, top, logsum, entropies, chunks.whole(chunks.dh), chunks.whole(dh_entropy)


def _bwd(way: Any, *args) -> tuple[Tensor, ...]:
    *head, exact, g, g_entropy, top, logsum, entropies, needs = args
    chunks = Chunks(way, head, needs, g_entropy is not None, exact)
    incoming = [t if t is None or chunks.rows is None else t[chunks.rows] for t in (g, g_entropy, top, logsum)]
    if g_entropy is not None and chunks.rows is not None:
        entropies = entropies[chunks.rows]
    for part in chunks.parts:
        x, dx, known = chunks.logits(part)
        g_part, g_entropy_part, top_part, logsum_part = (t if t is None else t[part] for t in incoming)
        stats = (top_part, top_part, logsum_part, entropies[part])
        _, db = way.turn(x, dx, known, g_part, g_entropy_part, stats, g_entropy is not None, needs[2])
        chunks.add(part, dx, db)
    return chunks.gradients()


for _op, _body in ((total, _total), (fwd, _fwd), (bwd, _bwd)):
    _op.body("cpu", accepts=lambda h, *rest: h.device.type == "cpu")(partial(_body, Cpu))
    _op.body("triton", accepts=lambda h, *rest: h.is_cuda)(partial(_body, Triton))


class Total(torch.autograd.Function):
    """The sum of the losses; its gradients are formed with it and wait for a factor."""

    @staticmethod
    def forward(ctx, h, w, bias, targets, weights, o: Options, workspace: int, needs: Needs):
        ctx.options = *o, workspace, list(needs)
        loss, *gradients = total(h, w, targets, bias, weights, *ctx.options)
        ctx.dtype, ctx.needs, ctx.compiled = h.dtype, needs, torch.compiler.is_compiling()
        if ctx.compiled:
            ctx.save_for_backward(*gradients)
        else:
            # Not among the saved tensors: the backward pass scales them where they are, and hands them out.
            ctx.gradients = gradients
            ctx.save_for_backward(h, w, targets, bias, weights)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if ctx.compiled:
            found = [(d * g).to(ctx.dtype) for d in ctx.saved_tensors]
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                _, *gradients = total(*ctx.saved_tensors, *ctx.options)
            found = [d.mul_(g).to(ctx.dtype) for d in gradients]
        dh, dw, db = (d if needed else None for d, needed in zip(found, ctx.needs, strict=True))
        return dh, dw, db, None, None, None, None, None


class Rows(torch.autograd.Function):
    """The losses (M,), and the entropies (M,) or nothing."""

    @staticmethod
    def forward(
        ctx, h, w, bias, targets, weights, o: Options, workspace: int, exact: bool, entropy: bool, needs: Needs
    ):
        ctx.frozen = needs == (True, False, False)
        args = (h, w, targets, bias, weights, *o, workspace, exact)
        loss, top, logsum, entropies, dh, dh_entropy = fwd(*args, entropy, ctx.frozen)
        if ctx.frozen:
            ctx.save_for_backward(dh, dh_entropy)
        else:
            ctx.save_for_backward(h, w, bias, targets, weights, top, logsum, entropies)
        ctx.dtype, ctx.options, ctx.entropy, ctx.needs = h.dtype, (*o, workspace, exact), entropy, needs
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return loss, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, g_entropy):
        if ctx.frozen:
            dh, dh_entropy = ctx.saved_tensors
            dh = dh * g[:, None]
            if ctx.entropy:
                dh.addcmul_(dh_entropy, g_entropy[:, None])
            found = (dh, dh, dh)
        else:
            h, w, bias, targets, weights, top, logsum, entropies = ctx.saved_tensors
            args = (h, w, targets, bias, weights, *ctx.options, g, g_entropy if ctx.entropy else None)
            found = bwd(*args, top, logsum, entropies, list(ctx.needs))
        dh, dw, db = (d.to(ctx.dtype) if needed else None for d, needed in zip(found, ctx.needs, strict=True))
        return dh, dw, db, *[None] * 7


def _prepared(op: str, h, w, targets, bias, weights, o: Options, workspace: int | None, reduction: str):
    """Checks of both public functions; the workspace in bytes, and who needs a gradient."""
    V = check.shape(op, h=(h, "M C"), w=(w, "V C"), targets=(targets, "M"))["V"]
    check.dtype(op, h=h)
    check.same(op, h=h, w=w, bias=bias)
    check_loss(op, h, V, targets if targets.device.type != "cpu" else None, bias, weights, o, reduction)
    check.dtype(op, check.INTS, targets=targets)
    if workspace is not None and workspace <= 0:
        raise ValueError(f"{op}: workspace must be a positive number of bytes, got {workspace}")
    train = torch.is_grad_enabled()
    needs = tuple(train and t is not None and t.requires_grad for t in (h, w, bias))
    return workspace or WORKSPACE.get(h.device.type, WORKSPACE["cuda"]), needs


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    class_weights: Tensor | None = None,
    reduction: str = "mean",
    workspace: int | None = None,
) -> Tensor:
    """``cross_entropy(h @ w.T, targets, ...)`` without the logits; h (M, C), w (V, C), targets (M,), bias (V,).

    All options are those of ``cross_entropy`` and compose. ``workspace`` is how many bytes logits may take at a time
    (512 MiB on a GPU, 64 MiB on a CPU). ``targets`` may lie on the CPU whatever the device of ``h``; then ignored
    rows cost nothing. The loss is fp32 (fp64 for fp64 input), a number, or (M,) with ``reduction="none"``. Raises
    ``ValueError`` for shapes, devices and options, ``TypeError`` for dtypes. A target outside [0, V) that is not
    ``ignore_index`` is an error of PyTorch's on a CPU and gives nan on a GPU.
    """
    o = Options(ignore_index, label_smoothing, checked_cap("linear_cross_entropy", softcap), logit_scale, z_loss)
    room, needs = _prepared("linear_cross_entropy", h, w, targets, bias, class_weights, o, workspace, reduction)
    if (fwd if reduction == "none" else total).eager(h):
        targets = targets.to(h.device)
        loss, _ = losses_ref(F.linear(h, w, bias), targets, class_weights, o)
        return reduced(loss, targets, class_weights, ignore_index, reduction)
    if reduction == "none":
        return Rows.apply(h, w, bias, targets, class_weights, o, room, False, False, needs)[0]
    loss = Total.apply(h, w, bias, targets, class_weights, o, room, needs)
    return reduced(loss, targets, class_weights, ignore_index, reduction)


def linear_logprob(
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    workspace: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities (M,) in nats of ``targets`` (M,) under the head ``w`` (V, C) on ``h`` (M, C), fp32.

    With ``entropy`` also the entropies (M,) of the distributions. Both are 0 in ignored rows, and differentiable under
    any incoming gradient in h, w and bias. ``logit_scale`` is 1 / temperature. Other arguments and errors are those of
    ``linear_cross_entropy``, from the same code; on a GPU the logits are formed in fp32 here.
    """
    o = Options(ignore_index, 0.0, checked_cap("linear_logprob", softcap), logit_scale)
    room, needs = _prepared("linear_logprob", h, w, targets, bias, None, o, workspace, "none")
    if fwd.eager(h):
        return linear_logprob_ref(
            h, w, targets.to(h.device), bias=bias, ignore_index=ignore_index, softcap=softcap, logit_scale=logit_scale,
            entropy=entropy,
        )  # fmt: skip
    loss, entropies = Rows.apply(h, w, bias, targets, None, o, room, True, entropy, needs)
    return (-loss, entropies) if entropy else -loss
