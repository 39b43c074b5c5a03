"""One AdamW step over a list of tensors, in place.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2          g scaled by 1 / scale first
    p = p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

scale = loss scale * max(1, norm / clip). Computed in fp32 (fp64 for fp64); moments in fp32, bf16 or 8 bits, 16-bit
parameters with an fp32 master or rounded at random (multi_tensor.py). One launch for each set of dtypes, over all
tensors. Traffic: read p, g, m, v and write p, m, v, 7 elements for each parameter (28 bytes in fp32, and in bf16 with
masters, which are read in the place of p; 10 in bf16 with 8-bit moments); bound by DRAM. The norm reads g once more.
Source: Loshchilov & Hutter 2017, arXiv:1711.05101; Dettmers et al. 2021, arXiv:2110.02861 (blockwise 8 bits).
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fmcore import check
from fmcore.kernels import multi_tensor as mt
from fmcore.kernels.blocks import accumulator
from fmcore.kernels.multi_tensor import (
    address,
    fetch,
    from_signed,
    from_unsigned,
    lanes,
    narrowed,
    put,
    to_signed,
    to_unsigned,
    words_of,
)
from fmcore.op import Op


@dataclass(frozen=True)
class AdamWOptions:
    """The numbers of one group of parameters."""

    lr: float | Tensor = 1e-3  # a scalar tensor on a GPU is not waited for
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0


# Reference: what the kernel below must equal.
def adamw_ref(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: float, options: AdamWOptions) -> None:
    """One tensor, in place, in its own dtype; line for line as PyTorch's foreach path."""
    lr, beta1, beta2, eps, weight_decay = float(options.lr), *astuple(options)[1:]
    p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (v.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    p.addcdiv_(m, root, value=-lr / (1 - beta1**step))


@triton.jit(do_not_specialize=["chunk", "seed"])
def adamw_kernel(
    grads_ptr, states_ptr, map_ptr, coefs_ptr, chunk, seed,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr, MASTER: tl.constexpr,
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
    v_ptr = address(states + 3, V, ALIGNED)
    master_ptr = address(states + 4, ACC, ALIGNED)
    m_absmax_ptr = address(states + 5, tl.float32, False)
    v_absmax_ptr = address(states + 6, tl.float32, False)
    coefs = coefs_ptr + ordinal * COEFS
    factor = tl.load(coefs + 1).to(ACC)
    decay = tl.load(coefs + 2).to(ACC)
    rate = tl.load(coefs + 4).to(ACC)
    correction = tl.load(coefs + 5).to(ACC)
    eps = tl.load(coefs + 6).to(ACC)
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
            v = fetch(v_ptr, i, size, TAIL)
            if EIGHT:
                m = from_signed(m, fetch(m_absmax_ptr, block, blocks, TAIL))
                v = from_unsigned(v, fetch(v_absmax_ptr, block, blocks, TAIL))
                if TAIL:
                    # Code 0 is no zero, and what is not there must not count for the absmax.
                    v = tl.where(i < size, v, 0.0)
            m = m.to(ACC) * beta1 + g * rest1
            v = v.to(ACC) * beta2 + g * g * rest2
            p = fetch(master_ptr, i, size, TAIL) if MASTER else fetch(p_ptr, i, size, TAIL).to(ACC)
            p = p * decay - rate * m / (tl.sqrt(v) * correction + eps)
            words = words_of(key, ordinal, start, ROWS, QBLOCK) if STOCHASTIC else 0
            if MASTER:
                put(master_ptr, i, p, size, TAIL)
                put(p_ptr, i, p.to(P), size, TAIL)
            else:
                put(p_ptr, i, narrowed(p, words, SHIFT_P, P, STOCHASTIC), size, TAIL)
            if EIGHT:
                m_codes, m_absmax = to_signed(m)
                v_codes, v_absmax = to_unsigned(v)
                put(m_ptr, i, m_codes, size, TAIL)
                put(v_ptr, i, v_codes, size, TAIL)
                put(m_absmax_ptr, block, m_absmax, blocks, TAIL)
                put(v_absmax_ptr, block, v_absmax, blocks, TAIL)
            else:
                put(m_ptr, i, narrowed(m, words, SHIFT_M, M, STOCHASTIC), size, TAIL)
                put(v_ptr, i, narrowed(v, words, SHIFT_V, V, STOCHASTIC), size, TAIL)


@dataclass(frozen=True)
class Lists:
    """What a step goes over; the last three are empty or as long as the others."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    masters: list[Tensor]
    absmax1: list[Tensor]  # of 8-bit exp_avgs
    absmax2: list[Tensor]  # of 8-bit exp_avg_sqs

    def written(self) -> None:
        mt.written(
            self.params, self.exp_avgs, self.exp_avg_sqs, self.steps, self.masters, self.absmax1, self.absmax2
        )  # fmt: skip


# Operator. ``grads`` counts as written because PyTorch's CPU path divides them by the scale where they lie.
step_op = Op(
    "adamw_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    f"Tensor(e!)[] steps, Tensor(f!)[] masters, Tensor(g!)[] absmax1, Tensor(h!)[] absmax2, {mt.HOW}) -> ()",
    fake=lambda *args: None,
)


def adamw_eager(*args) -> None:
    """The reference for all lists and options. It looks at the step counts, so on a GPU it waits."""
    on, how = Lists(*args[:8]), mt.How(*args[8:])
    scale, live = how.scale
    if live is not None and not live:
        return
    options = [AdamWOptions(*row) for row in how.rows]
    for i, (p, g, m_kept, v_kept) in enumerate(zip(on.params, on.grads, on.exp_avgs, on.exp_avg_sqs, strict=True)):
        on.steps[i] += 1
        step = on.steps[i].item()
        wide = accumulator(p.dtype)[0]
        g = g.to(wide) if scale is None else g.to(wide) / scale
        w = on.masters[i] if on.masters else p.to(wide)
        if on.absmax1:
            m, v = mt.dequantise_signed(m_kept, on.absmax1[i]), mt.dequantise_unsigned(v_kept, on.absmax2[i])
        else:
            m, v = m_kept.to(wide), v_kept.to(wide)
        adamw_ref(w, g, m, v, step, options[how.groups[i]])
        words = mt.stochastic_words(int(step), how.seed, i, p) if how.stochastic else None
        mt.keep(p, w, None if on.masters else words, mt.SHIFT_P)
        if on.absmax1:
            for codes, absmax, (q, a) in (
                (m_kept, on.absmax1[i], mt.quantise_signed(m)),
                (v_kept, on.absmax2[i], mt.quantise_unsigned(v)),
            ):
                codes.copy_(q), absmax.copy_(a)
        else:
            mt.keep(m_kept, m, words, mt.SHIFT_M)
            mt.keep(v_kept, v, words, mt.SHIFT_V)
    on.written()


@step_op.body("cpu", accepts=lambda params, *rest: params[0].device.type == "cpu")
def adamw_cpu(*args) -> None:
    """PyTorch's single pass where all lists have one dtype; else the reference, tensor by tensor."""
    on, how = Lists(*args[:8]), mt.How(*args[8:])
    wide = on.masters or on.params
    dtype = wide[0].dtype
    if on.absmax1 or not all(
        [t.dtype == dtype and t.is_contiguous() for ts in (wide, on.exp_avgs, on.exp_avg_sqs) for t in ts]
    ):
        return adamw_eager(*args)
    scale, live = how.scale
    if live is not None and not live:
        return None
    grads = [g if g.dtype == dtype and g.is_contiguous() else g.to(dtype).contiguous() for g in on.grads]
    # One tensor for all: of a number each addition would make its own.
    torch._foreach_add_(on.steps, torch.ones((), dtype=torch.float32, device="cpu"), alpha=1)
    if scale is not None and dtype == torch.float64:
        grads, scale = list(torch._foreach_div(grads, scale.double())), None
    # Whatever the gradients are, the single pass takes their scale in fp32.
    scale = None if scale is None else scale.float()
    # It was 4.8 times as fast as foreach (3.2 M fp32, LOG.md).
    for group, (lr, beta1, beta2, eps, weight_decay) in enumerate(how.rows):
        at = [i for i, mine in enumerate(how.groups) if mine == group]
        if at:
            p, g, m, v = ([ts[i] for i in at] for ts in (wide, grads, on.exp_avgs, on.exp_avg_sqs))
            torch._fused_adamw_(
                p, g, m, v, [], [on.steps[i] for i in at], lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay,
                eps=eps, amsgrad=False, maximize=False, grad_scale=scale,
            )  # fmt: skip
    if on.masters:
        torch._foreach_copy_(on.params, on.masters)
    on.written()
    return None


@step_op.body("triton", accepts=lambda params, *rest: params[0].is_cuda)
def adamw_triton(*args) -> None:
    on, how = Lists(*args[:8]), mt.How(*args[8:])
    coefs = how.coefficients(on.params, on.steps)
    columns = (on.params, on.exp_avgs, on.exp_avg_sqs, on.masters)
    with mt.in_one_layout(on.grads, columns, blocks=bool(on.absmax1)) as (grads, laid):
        for part in mt.parts(grads, *filter(None, laid)):
            G, P, M, V = (ts[part.indices[0]].dtype for ts in (grads, *laid[:3]))
            adamw_kernel[part.grid](
                mt.grad_table(part, grads), mt.state_table(part, [*laid, on.absmax1, on.absmax2]), part.map, coefs,
                part.chunk, how.seed,
                P=mt.TYPES[P], G=mt.TYPES[G], M=mt.TYPES[M], V=mt.TYPES[V], ALIGNED=part.aligned,
                MASTER=bool(on.masters), EIGHT=bool(on.absmax1), STOCHASTIC=how.stochastic, **mt.SIZES,
                ACC=accumulator(P)[1], num_warps=mt.WARPS,
            )  # fmt: skip
    on.written()


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    options: AdamWOptions | Sequence[AdamWOptions] = AdamWOptions(),
    *,
    groups: Sequence[int] | None = None,
    masters: Sequence[Tensor] = (),
    absmax: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
    norm: Tensor | None = None,
    clip: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    finite_check: bool = False,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    """Step ``params`` and their states in place, each ``steps[i]`` (a scalar in fp32) counted on first.

    Args:
        exp_avgs, exp_avg_sqs: moments in the shape of their parameter: fp64 for fp64, else fp32 or bf16 alike, or codes
            int8 and uint8 with ``absmax``, two lists of fp32 (ceil(numel / 256),), one for each moment. In bf16 they
            want ``stochastic_rounding``: to nearest, a ``beta`` above 0.998 leaves a moment where it is.
        options, groups: one for all, or several and which of them each parameter takes.
        masters: fp32 parameters that the steps add up in, of which ``params`` (16 bits) become the rounded copies.
        norm: of all gradients as they are; measured from ``grads`` where it is needed and not given.
        clip: largest norm; gradients count as scaled down to it.
        grad_scale: a scalar that gradients were multiplied by.
        found_inf: a scalar that forbids the step unless it is 0; so does a norm that is not finite, with
            ``finite_check``. A step that does not happen is not counted.
        stochastic_rounding: round bf16 parameters and moments at random by ``seed``, in [0, 2^31), and step, so that
            their mean is right.

    No value is waited for on a GPU. On a CPU ``grads`` may be left divided by the scale.
    Raises ``ValueError`` when lists do not fit, ``TypeError`` when a dtype does not.
    """
    options = [options] if isinstance(options, AdamWOptions) else list(options)
    if not params:
        return
    mt.check_lists("adamw_", params, dict(grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs), steps, masters)
    mt.check_states("adamw_", params, dict(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs), absmax)
    groups = mt.check_groups("adamw_", len(params), len(options), groups)
    mt.check_clip("adamw_", clip)
    mt.check_seed("adamw_", seed)
    check.dtype("adamw_", norm=norm, grad_scale=grad_scale, found_inf=found_inf)
    if norm is None and (clip is not None or finite_check):
        norm = mt.grad_norm(grads)
    body = adamw_eager if step_op.eager(list(params)) else step_op
    with torch.no_grad():
        body(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), list(masters),
            list(absmax[0]), list(absmax[1]), *mt.hyper([tuple(vars(o).values()) for o in options]),
            groups, stochastic_rounding, seed, norm, clip, grad_scale, found_inf, finite_check,
        )  # fmt: skip
