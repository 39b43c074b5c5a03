"""Optimizers over the operators, drop-in for those of ``torch.optim``.

Parameter groups, schedulers, ``state_dict``, ``GradScaler`` and learning rates that are tensors work as there. Beyond
that ``step(clip=...)`` measures and clips the gradient on the way and returns its norm, and nothing waits for a GPU:
whether a step happens (``finite_check``, ``found_inf``) and which one it is (``state["step"]``) is known there alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fmcore.errors import InputError
from fmcore.kernels import multi_tensor as mt
from fmcore.kernels.adamw import AdamWOptions, adamw_
from fmcore.kernels.lion import LionOptions, lion_
from fmcore.kernels.muon import COEFFICIENTS, MuonOptions, muon_
from fmcore.param_groups import decay_groups as decay_groups
from fmcore.param_groups import muon_groups as muon_groups

# Tensors with fewer elements keep wide moments, as in bitsandbytes: norm weights and biases are sensitive and small.
LEAST_8BIT = 4096
STATE_DTYPES = ("float32", "bfloat16", "8bit")
# How each moment is kept in 8 bits: dtype of its codes, to codes, from codes.
CODES = {
    "exp_avg": (torch.int8, mt.quantise_signed, mt.dequantise_signed),
    "exp_avg_sq": (torch.uint8, mt.quantise_unsigned, mt.dequantise_unsigned),
}
# Arguments of ``torch.optim`` that change how it runs or what it computes. The first three are accepted: here every
# step is one over lists and never waits. The others are refused unless they are off.
RUNS = ("foreach", "fused", "capturable")
UNKNOWN = ("amsgrad", "maximize", "differentiable")

Item = tuple[int, nn.Parameter, Tensor, dict[str, Any]]  # number of its group, parameter, gradient, state


class Stepper(torch.optim.Optimizer):
    """What the optimizers of this file share: state, its formats, and the order of a step."""

    # GradScaler then leaves unscaling and skipping to ``step``.
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable, defaults: dict[str, Any], **torch_only: Any):
        name = type(self).__name__
        for key, value in torch_only.items():
            if key not in RUNS + UNKNOWN:
                raise TypeError(f"{name}: got an unexpected argument {key!r}")
            if key in UNKNOWN and value:
                raise ValueError(f"{name}: {key} must be off, it is not supported")
        # By name: a loaded group that lacks it takes it from here.
        defaults["state_dtype"] = str(defaults["state_dtype"]).removeprefix("torch.")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        name, lr = type(self).__name__, group["lr"]
        # A tensor on a GPU cannot be looked at without waiting for it.
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{name}: lr must be a number or a tensor of one, got {tuple(lr.shape)}")
        low = not isinstance(lr, Tensor) and not lr >= 0
        if low or not (
            group.get("eps", 0) >= 0 and group["weight_decay"] >= 0 and all(0 <= b < 1 for b in group.get("betas", ()))
        ):
            raise ValueError(
                f"{name}: lr, eps and weight_decay must be >= 0 and betas in [0, 1), got lr={lr}, "
                f"eps={group.get('eps')}, weight_decay={group['weight_decay']}, betas={group.get('betas')}"
            )
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")
        if group["state_dtype"] not in STATE_DTYPES:
            raise ValueError(
                f"{name}: state_dtype must be one of {', '.join(STATE_DTYPES)}, got {group['state_dtype']}"
            )
        if len(set(group["params"])) < len(group["params"]):
            # PyTorch warns only; here two programs of one launch would write to it.
            raise ValueError(f"{name}: a parameter must be given once, got one several times in a group")
        for p in group["params"]:
            if not p.is_floating_point():
                raise TypeError(f"{name}: parameters must be floating, got {str(p.dtype)[6:]}")

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the moments of a group's parameters."""
        raise NotImplementedError

    def _apply(self, items: list[Item], scaling: dict[str, Any]) -> None:
        """Step ``items``, which share a device."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, clip: float | None = None) -> Any:
        """One step; returns the norm of all gradients before clipping, a scalar tensor that nobody has waited for.

        With ``closure``, which evaluates the loss anew, its result is returned instead. With ``clip`` the step is that
        of gradients scaled to a norm of at most ``clip``; ``.grad`` itself may be scaled on the way.
        """
        mt.check_clip(f"{type(self).__name__}.step", clip)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        devices: dict[torch.device, list[Item]] = defaultdict(list)
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if (g := p.grad) is not None:
                    if not (state := self.state[p]):
                        self._start(p, group)
                    devices[p.device].append((i, p, g, state))
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        norm = self._norm(devices)
        finite = any(group["finite_check"] for group in self.param_groups)
        for device, items in devices.items():
            near = {
                name: t if t is None else _sent(t, device)
                for name, t in (("norm", norm), ("grad_scale", scale), ("found_inf", found_inf))
            }
            self._apply(items, {**near, "clip": clip, "finite_check": finite})
        if closure is not None:
            return loss
        return norm if scale is None else norm / _sent(scale, norm.device)

    @staticmethod
    def _norm(devices: dict[torch.device, list[Item]]) -> Tensor:
        norms = [mt.grad_norm([g for _, _, g, _ in items]) for items in devices.values()]
        if len(norms) < 2:
            return norms[0] if norms else torch.zeros(())
        return torch.linalg.vector_norm(torch.stack([_sent(n, norms[0].device).to(norms[0]) for n in norms]))

    def _start(self, p: Tensor, group: dict[str, Any]) -> None:
        """Step 0: moments of zero in the group's format, and an fp32 master where steps add up in one."""
        wide, state = torch.promote_types(p.dtype, torch.float32), self.state[p]
        if not group.get("use_muon"):
            # In fp32 whatever the default dtype is: the kernels read it as such.
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        narrow = group["state_dtype"] if wide == torch.float32 else "float32"
        for name in self._moments(group):
            if narrow == "8bit" and p.numel() >= LEAST_8BIT and name in CODES:
                state[name] = torch.zeros(p.shape, dtype=CODES[name][0], device=p.device)
                state[f"{name}_absmax"] = p.new_zeros(-(-p.numel() // mt.QBLOCK), dtype=torch.float32)
            else:
                bf16 = narrow == "bfloat16" and name in CODES
                state[name] = torch.zeros_like(p, dtype=torch.bfloat16 if bf16 else wide)
        rounded = group["stochastic_rounding"] and p.dtype == torch.bfloat16 and not group.get("use_muon")
        if wide != p.dtype and not rounded:
            state["master"] = p.detach().to(wide)

    def _take(self, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        """The state of ``p`` from ``saved``, whatever the formats of both. ``ValueError`` names what does not fit."""
        self.state[p] = {}
        self._start(p, group)
        state = self.state[p]
        # A master that was not saved is the parameter.
        for name in [key for key in state if not key.endswith("_absmax") and (key != "master" or key in saved)]:
            theirs = torch.as_tensor(saved[name]) if name in saved else None
            shape = () if name == "step" else tuple(p.shape)
            if theirs is None or (theirs.numel() != 1 if name == "step" else theirs.shape != shape):
                got = "nothing" if theirs is None else tuple(theirs.shape)
                raise ValueError(f"{name} must be {shape} like its parameter, got {got}")
            absmax = saved.get(f"{name}_absmax")
            if absmax is not None and absmax.dtype == torch.float32 and theirs.dtype == CODES[name][0]:
                blocks = -(-p.numel() // mt.QBLOCK)
                if absmax.shape != (blocks,):
                    raise ValueError(f"{name}_absmax must be {(blocks,)} for its parameter, got {tuple(absmax.shape)}")
                if f"{name}_absmax" in state:
                    state[name].copy_(theirs), state[f"{name}_absmax"].copy_(absmax)
                    continue
                theirs = CODES[name][2](theirs, absmax)
            elif name != "step" and not theirs.is_floating_point():
                raise ValueError(f"{name}_absmax must be there for codes of {str(theirs.dtype)[6:]}, got nothing")
            if f"{name}_absmax" in state:
                codes, absmax = CODES[name][1](theirs.float())
                state[name].copy_(codes), state[f"{name}_absmax"].copy_(absmax)
            else:
                state[name].copy_(theirs.reshape(shape))

    def _groups(self) -> dict[Tensor, dict[str, Any]]:
        return {p: group for group in self.param_groups for p in group["params"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also after loading: options that whoever saved did not have take their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a ``state_dict`` of this class or of its namesake in ``torch.optim``.

        Moments that were kept otherwise are converted; a missing fp32 master starts from its parameter.
        """
        for group in state_dict["param_groups"]:
            if on := [key for key in UNKNOWN if group.get(key)]:
                raise ValueError(f"{type(self).__name__}: {on[0]} of the loaded state must be off, it is not supported")
        given: list[dict[str, Any]] = []

        def take(_: torch.optim.Optimizer) -> None:
            # PyTorch has cast all of it to the dtypes of parameters, codes and masters too.
            self.state.clear()
            saved = [i for group in given[0]["param_groups"] for i in group["params"]]
            for i, (p, group) in zip(saved, self._groups().items(), strict=True):
                if given[0]["state"].get(i):
                    self._take(p, group, given[0]["state"][i])

        # After the hooks of others that change what is loaded, before those that look at what was.
        last = self.register_load_state_dict_pre_hook(lambda _, changed: given.append(changed))
        first = self.register_load_state_dict_post_hook(take, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in (last, first):
                hook.remove()

    def tensors(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state as tensors named ``parameter:key``, for a safetensors file.

        ``named`` holds the parameters by name.
        """
        found = {name: self.state[p] for name, p in named.items() if self.state.get(p)}
        return {f"{name}:{key}": t for name, state in found.items() for key, t in state.items()}

    def load_tensors(self, named: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
        """Take over a state that ``tensors`` returned; other names in it are ignored.

        Raises ``InputError`` if a piece of a parameter's state is missing or has another shape.
        """
        groups = self._groups()
        states: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, t in tensors.items():
            name, colon, piece = key.rpartition(":")
            if colon:
                states[name][piece] = t
        for name, p in named.items():
            if p not in groups or not p.requires_grad:
                continue
            # Of a parameter without a gradient so far there is nothing.
            self.state.pop(p, None)
            if states[name]:
                try:
                    self._take(p, groups[p], states[name])
                except ValueError as e:
                    raise InputError(f"optimizer: {name}:{e}") from e
                if missing := self.state[p].keys() - states[name].keys() - {f"{m}_absmax" for m in CODES}:
                    raise InputError(f"optimizer: {name}:{min(missing)} must be there, got nothing")

    def _like(self, items: list[Item]) -> Iterable[tuple[list, list, list, list, dict[str, Any]]]:
        """Items that an operator takes together: groups, parameters, gradients, states, and arguments by keyword."""
        found: dict[tuple, list[Item]] = defaultdict(list)
        for item in items:
            group, state = self.param_groups[item[0]], item[3]
            kept = ("master" in state, "exp_avg_absmax" in state)
            # Moments in bf16 need it: the thousandth that a second moment changes by in a step is less than half of its
            # last bit, so that to nearest it would neither grow nor decay. Parameters that have a master do not notice.
            stochastic = group["stochastic_rounding"] or group["state_dtype"] == "bfloat16"
            found[(*kept, stochastic, group["seed"])].append(item)
        for (master, _, stochastic, seed), same in found.items():
            groups, params, grads, states = map(list, zip(*same, strict=True))
            yield groups, params, grads, states, {
                "masters": [s["master"] for s in states] if master else (),
                "stochastic_rounding": stochastic,
                "seed": seed,
            }  # fmt: skip


def _sent(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on ``device``. A CPU waits: what a copy that nobody waited for holds there is not known."""
    return t if t.device == device else t.to(device, non_blocking=device.type != "cpu")


def _listed(states: list[dict], name: str) -> list[Tensor]:
    """A piece of all states, or nothing where they do not have it."""
    return [s[name] for s in states] if name in states[0] else []


class AdamW(Stepper):
    """AdamW whose step also measures and clips the gradient, in two passes over memory and without a synchronisation.

    Args:
        params: parameters or parameter groups, as for every PyTorch optimizer.
        lr: learning rate per step.        betas: decay of the two moments.        eps: added to the root.
        weight_decay: decoupled; each step multiplies parameters by ``1 - lr * weight_decay``.
        state_dtype: of the moments, float32, bfloat16 or 8bit (int8 codes with an absmax for each 256 elements; not for
            tensors below 4096 elements). fp64 parameters have fp64 moments whatever this says.
        stochastic_rounding: bf16 parameters round at random with the right mean, and have no fp32 master. Other 16-bit
            parameters have one. Moments in bf16 round at random anyway: to nearest they would stand still.
        seed: of that rounding, in [0, 2^31). A resumed run draws what it would have drawn.
        finite_check: a step whose gradient is not finite does not happen and is not counted.
        torch_only: ``foreach``, ``fused`` and ``capturable`` change nothing; ``amsgrad``, ``maximize`` and
            ``differentiable`` must be off.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype | str = "float32",
        stochastic_rounding: bool = False,
        seed: int = 0,
        finite_check: bool = False,
        **torch_only: Any,
    ):
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding, seed=seed, finite_check=finite_check,
        )  # fmt: skip
        super().__init__(params, defaults, **torch_only)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _apply(self, items: list[Item], scaling: dict[str, Any]) -> None:
        options = [
            AdamWOptions(
                lr=g["lr"], beta1=g["betas"][0], beta2=g["betas"][1], eps=g["eps"], weight_decay=g["weight_decay"]
            )
            for g in self.param_groups
        ]
        for groups, params, grads, states, given in self._like(items):
            m, v, steps = (_listed(states, name) for name in ("exp_avg", "exp_avg_sq", "step"))
            absmax = (_listed(states, "exp_avg_absmax"), _listed(states, "exp_avg_sq_absmax"))
            adamw_(params, grads, m, v, steps, options, groups=groups, absmax=absmax, **given, **scaling)


class Lion(Stepper):
    """Lion: the sign of a blend of momentum and gradient; one moment, so half the state of AdamW.

    ``lr`` is usually three to ten times smaller than AdamW's and ``weight_decay`` as much larger (arXiv:2302.06675).
    The other arguments are those of ``AdamW``.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        state_dtype: torch.dtype | str = "float32",
        stochastic_rounding: bool = False,
        seed: int = 0,
        finite_check: bool = False,
        **torch_only: Any,
    ):
        defaults = dict(
            lr=lr, betas=betas, weight_decay=weight_decay, state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding, seed=seed, finite_check=finite_check,
        )  # fmt: skip
        super().__init__(params, defaults, **torch_only)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",)

    def _apply(self, items: list[Item], scaling: dict[str, Any]) -> None:
        options = [
            LionOptions(lr=g["lr"], beta1=g["betas"][0], beta2=g["betas"][1], weight_decay=g["weight_decay"])
            for g in self.param_groups
        ]
        for groups, params, grads, states, given in self._like(items):
            m, steps, absmax = (_listed(states, name) for name in ("exp_avg", "step", "exp_avg_absmax"))
            lion_(params, grads, m, steps, options, groups=groups, absmax=absmax, **given, **scaling)


class Muon(AdamW):
    """Muon for matrices, AdamW for the rest, in one optimizer: see ``muon_groups``.

    A group with ``use_muon`` (the default) holds matrices only and steps by ``momentum``, ``nesterov``, ``ns_steps``,
    ``ns_coefficients``, ``muon_eps`` and ``adjust_lr_fn``, named as in ``torch.optim.Muon``; a group without it by
    ``betas`` and ``eps``, as ``AdamW``. With ``adjust_lr_fn="match_rms_adamw"`` both may share ``lr`` and
    ``weight_decay``. ``state_dtype`` and ``stochastic_rounding`` are about the groups of AdamW: momenta of matrices are
    fp32, and 16-bit matrices have fp32 masters.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        muon_eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "original",
        *,
        use_muon: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        state_dtype: torch.dtype | str = "float32",
        stochastic_rounding: bool = False,
        seed: int = 0,
        finite_check: bool = False,
        **torch_only: Any,
    ):
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients,
            muon_eps=muon_eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn, use_muon=use_muon, betas=betas, eps=eps,
            state_dtype=state_dtype, stochastic_rounding=stochastic_rounding, seed=seed, finite_check=finite_check,
        )  # fmt: skip
        Stepper.__init__(self, params, defaults, **torch_only)

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["use_muon"]:
            _muon_options(group)
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon: a group with use_muon must hold matrices, got {tuple(p.shape)}")

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else super()._moments(group)

    def _apply(self, items: list[Item], scaling: dict[str, Any]) -> None:
        others = [item for item in items if not self.param_groups[item[0]]["use_muon"]]
        if others:
            super()._apply(others, scaling)
        for i, group in enumerate(self.param_groups):
            mine = [item for item in items if item[0] == i]
            if group["use_muon"] and mine:
                options = _muon_options(group)
                # Parameters of 16 bits have masters and others do not, so that they step apart.
                for narrow in (True, False):
                    same = [item for item in mine if ("master" in item[3]) == narrow]
                    if same:
                        _, params, grads, states = map(list, zip(*same, strict=True))
                        momenta, masters = (_listed(states, name) for name in ("momentum_buffer", "master"))
                        muon_(params, grads, momenta, options, masters=masters, **scaling)


def _muon_options(group: dict[str, Any]) -> MuonOptions:
    return MuonOptions(
        group["lr"], group["weight_decay"], group["momentum"], group["nesterov"], group["ns_steps"],
        tuple(group["ns_coefficients"]), group["muon_eps"], group["adjust_lr_fn"] or "original",
    )  # fmt: skip
