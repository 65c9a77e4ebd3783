"""Launches of the gated delta rule: by a plan on NVIDIA GPUs, elsewhere by a compiled kernel.

A variant of a plan is compiled for the sizes, dtypes and options of a call, and serves the batches whose configuration is that
of its kernel (`batches_of_kernel`). The plan's arguments are those of the torch operator, with None for `new_state` where it
has none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from tilelang_ext.kernels.gated_delta import decode, replay
from tilelang_ext.kernels.gated_delta.arguments import Arguments, ReplayArguments
from tilelang_ext.kernels.gated_delta.config import regime_of
from tilelang_ext.kernels.gated_delta.problem import STRIDE_UNIT, Problem
from tilelang_ext.launch.compile import compiled
from tilelang_ext.launch.device import Target, current, is_for_nvidia, target_of
from tilelang_ext.launch.expression import fact, recipe_of, shape, stride
from tilelang_ext.launch.plan import Plan, launcher
from tilelang_ext.launch.recipe import ALIGNMENT
from tilelang_ext.launch.record import Recorder, View

MAX_BATCH = 1 << 20
_OPTIONS = ("scale", "options")  # stand before the results
_RESULTS = {Arguments: 2, ReplayArguments: 1}
_NAMES = {Arguments: "gated_delta_decode", ReplayArguments: "gated_delta_replay"}
_KERNELS: dict[type, ModuleType] = {Arguments: decode, ReplayArguments: replay}
_WIDE = ("q", "k", "v")  # what kernels load by more than two bytes at a time, beside states
_TOKENS = (*_WIDE, "a", "b")  # what may lie apart from token to token
_POOLS = ("state", "k_ring", "r_ring", "decay_ring")  # whose first extent is the number of slots


def names_of(kind: type) -> tuple[str, ...]:
    """Return the names of the plan's arguments for `Arguments` or `ReplayArguments`."""
    fields = kind._fields
    return (*fields[: -_RESULTS[kind]], *_OPTIONS, *fields[-_RESULTS[kind] :])


def recipe(kind: type) -> dict:
    """Return the recipe of the plan."""
    key = (
        *(fact("value", name) for name in _OPTIONS),
        *(fact("dtype", name) for name in kind._fields),
        fact("device", "q"),
        *(shape("q", i) for i in (1, 2, 3)),
        *(shape("v", i) for i in (2, 3)),
        fact("rank", "a"),
        fact("rank", "new_state") if kind is Arguments else shape("k_ring", 1),
    )
    types = {"scale": "float", "options": "int"}
    return {
        "name": _NAMES[kind],
        "arguments": [{"name": name, "type": types.get(name, "tensor")} for name in names_of(kind)],
        "key": [recipe_of(value) for value in key],
        "size": recipe_of(shape("q", 0)),
    }


@functools.cache
def plan(kind: type) -> Plan:
    """Return the plan of this process, with the variants that calls have added."""
    return launcher().plan(recipe(kind))


@functools.cache
def directly(kind: type) -> Callable[..., bool]:
    """Return the plan's `launch_directly`; where there is no NVIDIA GPU, what never launches."""
    takes_plans = is_for_nvidia() and torch.cuda.is_available()
    return plan(kind).launch_directly if takes_plans else lambda *arguments: False


def problem_of(given: Arguments | ReplayArguments, scale: float, l2_norm: bool, target: Target) -> Problem:
    """Return what a call, whose arguments have been checked, is compiled for."""
    _, tokens, qk_heads, K = given.q.shape
    heads, V = given.v.shape[2:]
    options = {}
    if isinstance(given, Arguments):
        options = {
            "in_place": given.new_state is None,
            "each_token": given.new_state is not None and given.new_state.dim() == 5,
            "has_accepted": given.num_accepted is not None,
        }
    else:
        options = {"limit": given.k_ring.shape[1] - tokens}
    return Problem(
        target_kind=target.kind,
        num_sms=target.num_sms,
        tokens=tokens,
        qk_heads=qk_heads,
        heads=heads,
        K=K,
        V=V,
        dtype=_name(given.q.dtype),
        state_dtype=_name(given.state.dtype),
        scale=scale,
        per_channel=given.a.dim() == 4,
        l2_norm=l2_norm,
        has_indices=given.state_indices is not None,
        **options,
    )


def launch(given: Arguments | ReplayArguments, scale: float, l2_norm: bool) -> None:
    """Launch the kernel for checked arguments of at least one sequence, on a GPU."""
    kind = type(given)
    target = target_of(_NAMES[kind], given.q.device)
    problem = problem_of(given, scale, l2_norm, target)
    given = readable(given, problem)
    if target.kind == "cuda":
        results = _RESULTS[kind]
        arguments = (*given[:-results], scale, int(l2_norm), *given[-results:])
        if not plan(kind).launch(*arguments):
            add_variant(plan(kind), kind, arguments, problem, target.arch)
            plan(kind)(*arguments)
        return

    def compile(make: Callable, *arguments, pass_configs=None) -> Callable:
        return compiled(make, arguments, target, tuple((pass_configs or {}).items()))

    with current(given.q.device):
        kernel = _KERNELS[kind].compile_kernel(problem, len(given.q), compile)
        kernel(*_parameters(given, problem, _unused(given.q.device)))


def readable(given: Arguments | ReplayArguments, problem: Problem):
    """Return the arguments with copies in place of inputs whose memory kernels cannot read."""
    on_cuda = problem.target_kind == "cuda"

    def is_readable(name: str, tensor: Tensor) -> bool:
        free = 2 if on_cuda and name in _TOKENS else 0
        heads = tensor[(0,) * free] if free else tensor
        strides = [tensor.stride(i) for i in range(free) if tensor.shape[i] > 1]
        is_wide = name in _WIDE and any(stride % STRIDE_UNIT for stride in strides)
        return heads.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and not is_wide

    names = (*_TOKENS, "A_log", "dt_bias", "state_indices", "num_accepted", "windows")
    inputs = {name: tensor for name in names if (tensor := getattr(given, name, None)) is not None}
    return given._replace(
        **{
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in inputs.items()
            if tensor.numel() and not is_readable(name, tensor)
        }
    )


def _parameters(given, problem: Problem, unused) -> tuple:
    """Return the kernel's parameters, of tensors or of views."""
    indices = unused if given.state_indices is None else given.state_indices
    if isinstance(given, ReplayArguments):
        return (*given[:8], indices, *given[9:])
    accepted = unused if given.num_accepted is None else given.num_accepted
    new_state = given.state if problem.in_place else given.new_state
    if problem.each_token:
        new_state = new_state.flatten(0, 1)
    return (*given[:8], indices, accepted, given.out, new_state)


@functools.cache
def _unused(device: torch.device) -> Tensor:
    """Return what a parameter gets that the kernel does not read."""
    return torch.zeros(1, dtype=torch.int32).to(device)


def add_variant(plan: Plan, kind: type, arguments: tuple, problem: Problem, arch: str) -> None:
    """Compile the kernel for arguments that have been checked, and add it to the plan; not while a graph is captured."""
    given = dict(zip(names_of(kind), arguments, strict=True))
    recorder = Recorder(_NAMES[kind], arch)
    recorded = {name: None if given[name] is None else _argument(recorder, name, given[name], problem) for name in kind._fields}
    unused = recorder.constant(_unused(given["q"].device))
    batch = len(given["q"])
    _KERNELS[kind].compile_kernel(problem, batch, recorder.compile)(*_parameters(kind(**recorded), problem, unused))
    key, _ = plan.key(*arguments)
    plan.add(recorder.variant(key, batches_of_kernel(problem, batch)), recorder.cubins, recorder.constants)


def _argument(recorder: Recorder, name: str, tensor: Tensor, problem: Problem) -> View:
    """Return an argument with its rules: only slots and tokens may lie further apart than they are long."""
    is_pool = name in _POOLS or (name == "new_state" and not problem.each_token)
    free, unit = 0, 1
    if name in _TOKENS:
        free, unit = 2, STRIDE_UNIT if name in _WIDE else 1
    elif is_pool and name in ("state", "new_state"):
        free, unit = 1, STRIDE_UNIT
    extents = list(tensor.shape)
    if is_pool:
        extents[0] = shape("state" if name != "new_state" else name, 0)
    elif name not in ("A_log", "dt_bias"):
        extents[0] = shape("q", 0)
    strides = [1] * len(extents)
    for axis in reversed(range(len(extents) - 1)):
        strides[axis] = strides[axis + 1] * extents[axis + 1]
    for axis in range(free):
        strides[axis] = stride(name, axis) if unit == 1 else stride(name, axis) // unit * unit
    return recorder.argument(name, _name(tensor.dtype), extents, strides)


def batches_of_kernel(problem: Problem, batch: int) -> tuple[int, int]:
    """Return the fewest and the most sequences that have the configuration of this batch."""
    wanted = regime_of(problem, batch)
    bounds = []
    for outside in (0, MAX_BATCH + 1):
        inside = batch
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if regime_of(problem, middle) == wanted else (inside, middle)
        bounds.append(inside)
    return bounds[0], bounds[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
