"""One Lion step over a list of tensors, in place.

    p = p (1 - lr wd) - lr sign(b1 m + (1 - b1) g)          m = b2 m + (1 - b2) g          g scaled by 1 / scale first

scale = loss scale * max(1, norm / clip). One moment and no root: half of AdamW's state. Precision, narrow states and
masters as in adamw.py. Traffic: read p, g, m and write p, m, 5 elements for each parameter; bound by DRAM. The norm
reads g once more. Source: Chen et al. 2023, arXiv:2302.06675.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import multi_tensor as mt
from fmcore.kernels.blocks import accumulator
from fmcore.kernels.multi_tensor import address, fetch, from_signed, lanes, narrowed, put, to_signed, words_of
from fmcore.op import Op


@dataclass(frozen=True)
class LionOptions:
    """The numbers of one group of parameters."""

    lr: float | Tensor = 1e-4  # a scalar tensor on a GPU is not waited for
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.0


# Reference: what the kernel below must equal.
def lion_ref(p: Tensor, g: Tensor, m: Tensor, options: LionOptions) -> None:
    """One tensor, in place, in its own dtype."""
    lr = float(options.lr)
    blend = m * options.beta1 + g * (1 - options.beta1)
    # PyTorch's sign of NaN is 0, which would hide it.
    direction = torch.where(blend.isnan(), blend, blend.sign())
    p.mul_(1 - lr * options.weight_decay).sub_(direction, alpha=lr)
    m.mul_(options.beta2).add_(g, alpha=1 - options.beta2)


@triton.jit(do_not_specialize=["chunk", "seed"])
def lion_kernel(
    grads_ptr, states_ptr, map_ptr, coefs_ptr, chunk, seed,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, ALIGNED: tl.constexpr, MASTER: tl.constexpr,
    EIGHT: tl.constexpr, STOCHASTIC: tl.constexpr, STATES: tl.constexpr, COEFS: tl.constexpr, ROWS: tl.constexpr,
    QBLOCK: tl.constexpr, SHIFT_P: tl.constexpr, SHIFT_M: tl.constexpr, SHIFT_V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program steps through ``chunk`` blocks of one tensor."""
    BLOCK: tl.constexpr = ROWS * QBLOCK
    pid = tl.program_id(0).to(tl.int64)
    t = tl.load(map_ptr + 3 * pid)
    first = tl.load(map_ptr + 3 * pid + 1)
    size = tl.load(map_ptr + 3 * pid + 2)
    states = states_ptr + t * STATES
    ordinal = tl.load(states)
    g_ptr = address(grads_ptr + t, G, ALIGNED)
    p_ptr = address(states + 1, P, ALIGNED)
    m_ptr = address(states + 2, M, ALIGNED)
    master_ptr = address(states + 4, ACC, ALIGNED)
    absmax_ptr = address(states + 5, tl.float32, False)
    coefs = coefs_ptr + ordinal * COEFS
    factor = tl.load(coefs + 1).to(ACC)
    decay = tl.load(coefs + 2).to(ACC)
    lr = tl.load(coefs + 3).to(ACC)
    beta1 = tl.load(coefs + 7).to(ACC)
    rest1 = tl.load(coefs + 8).to(ACC)
    beta2 = tl.load(coefs + 9).to(ACC)
    rest2 = tl.load(coefs + 10).to(ACC)
    key = (tl.load(coefs + 11).to(tl.int64) << 32) | seed
    # A step that must not happen has no blocks.
    end = tl.where(tl.load(coefs) != 0, tl.minimum(first + chunk, tl.cdiv(size, BLOCK)), first)
    full = tl.minimum(end, size // BLOCK)
    for TAIL in tl.static_range(2):
        for b in range(full if TAIL else first, end if TAIL else full):
            # A product, for the compiler to see that it is a multiple of BLOCK and load 128 bits.
            start = b * BLOCK
            i = start + lanes(QBLOCK, ROWS)
            block = b * ROWS + tl.arange(0, ROWS)
            blocks = tl.cdiv(size, QBLOCK)
            g = fetch(g_ptr, i, size, TAIL).to(ACC) * factor
            m = fetch(m_ptr, i, size, TAIL)
            if EIGHT:
                m = from_signed(m, fetch(absmax_ptr, block, blocks, TAIL))
            m = m.to(ACC)
            direction = m * beta1 + g * rest1
            # NaN compares false twice and must not pass for 0.
            sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, direction))
            p = fetch(master_ptr, i, size, TAIL) if MASTER else fetch(p_ptr, i, size, TAIL).to(ACC)
            p = p * decay - lr * sign
            m = m * beta2 + g * rest2
            words = words_of(key, ordinal, start, ROWS, QBLOCK) if STOCHASTIC else 0
            if MASTER:
                put(master_ptr, i, p, size, TAIL)
                put(p_ptr, i, p.to(P), size, TAIL)
            else:
                put(p_ptr, i, narrowed(p, words, SHIFT_P, P, STOCHASTIC), size, TAIL)
            if EIGHT:
                codes, absmax = to_signed(m)
                put(m_ptr, i, codes, size, TAIL)
                put(absmax_ptr, block, absmax, blocks, TAIL)
            else:
                put(m_ptr, i, narrowed(m, words, SHIFT_M, M, STOCHASTIC), size, TAIL)


@dataclass(frozen=True)
class Lists:
    """What a step goes over; the last two are empty or as long as the others."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    absmax: list[Tensor]  # of 8-bit exp_avgs

    def written(self) -> None:
        mt.written(self.params, self.exp_avgs, self.steps, self.masters, self.absmax)


step_op = Op(
    "lion_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] steps, Tensor(d!)[] masters, "
    f"Tensor(e!)[] absmax, {mt.HOW}) -> ()",
    fake=lambda *args: None,
)


@step_op.body("cpu", accepts=lambda params, *rest: params[0].device.type == "cpu")
def lion_eager(*args) -> None:
    """The reference for all lists and options. It looks at the step counts, so on a GPU it waits."""
    on, how = Lists(*args[:6]), mt.How(*args[6:])
    scale, live = how.scale
    if live is not None and not live:
        return
    options = [LionOptions(lr, beta1, beta2, decay) for lr, beta1, beta2, _, decay in how.rows]
    for i, (p, g, kept) in enumerate(zip(on.params, on.grads, on.exp_avgs, strict=True)):
        on.steps[i] += 1
        wide = accumulator(p.dtype)[0]
        g = g.to(wide) if scale is None else g.to(wide) / scale
        w = on.masters[i] if on.masters else p.to(wide)
        m = mt.dequantise_signed(kept, on.absmax[i]) if on.absmax else kept.to(wide)
        lion_ref(w, g, m, options[how.groups[i]])
        words = mt.stochastic_words(int(on.steps[i].item()), how.seed, i, p) if how.stochastic else None
        mt.keep(p, w, None if on.masters else words, mt.SHIFT_P)
        if on.absmax:
            codes, absmax = mt.quantise_signed(m)
            kept.copy_(codes), on.absmax[i].copy_(absmax)
        else:
            mt.keep(kept, m, words, mt.SHIFT_M)
    on.written()


@step_op.body("triton", accepts=lambda params, *rest: params[0].is_cuda)
def lion_triton(*args) -> None:
    on, how = Lists(*args[:6]), mt.How(*args[6:])
    coefs = how.coefficients(on.params, on.steps)
    with mt.in_one_layout(on.grads, (on.params, on.exp_avgs, [], on.masters), bool(on.absmax)) as (grads, laid):
        for part in mt.parts(grads, *filter(None, laid)):
            G, P, M = (ts[part.indices[0]].dtype for ts in (grads, *laid[:2]))
            lion_kernel[part.grid](
                mt.grad_table(part, grads), mt.state_table(part, [*laid, on.absmax]), part.map, coefs,
                part.chunk, how.seed,
                P=mt.TYPES[P], G=mt.TYPES[G], M=mt.TYPES[M], ALIGNED=part.aligned, MASTER=bool(on.masters),
                EIGHT=bool(on.absmax), STOCHASTIC=how.stochastic, **mt.SIZES, ACC=accumulator(P)[1],
                num_warps=mt.WARPS,
            )  # fmt: skip
    on.written()


def lion_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: LionOptions | Sequence[LionOptions] = LionOptions(),
    *,
    groups: Sequence[int] | None = None,
    masters: Sequence[Tensor] = (),
    absmax: Sequence[Tensor] = (),
    norm: Tensor | None = None,
    clip: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    finite_check: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    """Step ``params`` and their states in place, each ``steps[i]`` (a scalar in fp32) counted on first.

    ``exp_avgs`` are fp64 for fp64, else fp32 or bf16 alike, or codes int8 with ``absmax``, a list of fp32
    (ceil(numel / 256),). Everything else is as in ``adamw_``; ``grads`` stay as they are.
    Raises ``ValueError`` when lists do not fit, ``TypeError`` when a dtype does not.
    """
    options = [options] if isinstance(options, LionOptions) else list(options)
    if not params:
        return
    mt.check_lists("lion_", params, dict(grads=grads, exp_avgs=exp_avgs), steps, masters)
    mt.check_states("lion_", params, dict(exp_avgs=exp_avgs), (absmax,))
    groups = mt.check_groups("lion_", len(params), len(options), groups)
    mt.check_clip("lion_", clip)
    mt.check_seed("lion_", seed)
    check.dtype("lion_", norm=norm, grad_scale=grad_scale, found_inf=found_inf)
    if norm is None and (clip is not None or finite_check):
        norm = mt.grad_norm(grads)
    body = lion_eager if step_op.eager(list(params)) else step_op
    rows = [(o.lr, o.beta1, o.beta2, 0.0, o.weight_decay) for o in options]
    with torch.no_grad():
        body(
            list(params), list(grads), list(exp_avgs), list(steps), list(masters), list(absmax),
            *mt.hyper(rows), groups, stochastic_rounding, seed, norm, clip, grad_scale, found_inf,
            finite_check,
        )  # fmt: skip
