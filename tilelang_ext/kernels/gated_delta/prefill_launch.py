"""Launches of `gated_delta_prefill`: by a plan on NVIDIA GPUs, elsewhere by compiled kernels.

A variant of the plan is compiled for the sizes of heads, dtypes and options of a call, and serves any number of sequences and
tokens. T, A and the factors of tokens are slots of its workspace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from tilelang_ext.kernels.gated_delta import scan_chunks, sm90_scan, solve_chunks
from tilelang_ext.kernels.gated_delta.prefill_arguments import MAX_EXTENT, NAME, PrefillArguments
from tilelang_ext.kernels.gated_delta.prefill_problem import FACTORS, PrefillProblem
from tilelang_ext.launch.cache import until_reload
from tilelang_ext.launch.compile import compiled
from tilelang_ext.launch.device import Target, current, target_of
from tilelang_ext.launch.expression import apply, ceildiv, contiguous_strides, fact, recipe_of, shape
from tilelang_ext.launch.plan import Plan, launcher
from tilelang_ext.launch.recipe import ALIGNMENT
from tilelang_ext.launch.record import Recorder, View

KERNELS = (sm90_scan, scan_chunks)  # the first that takes a problem compiles it
_OPTIONS = ("scale", "options")
_NAMES = (*PrefillArguments._fields[:-2], *_OPTIONS, *PrefillArguments._fields[-2:])
_RANK = fact("rank", "q")
_KEY = (
    *(fact("value", name) for name in _OPTIONS),
    *(fact("dtype", name) for name in PrefillArguments._fields),
    fact("device", "q"),
    _RANK,
    *(apply("select", _RANK == 3, shape(name, i), shape(name, i + 1)) for name in ("q", "v") for i in (1, 2)),
)
_TYPES = {"scale": "float", "options": "int"}
RECIPE = {
    "name": NAME,
    "arguments": [{"name": name, "type": _TYPES.get(name, "tensor")} for name in _NAMES],
    "key": [recipe_of(value) for value in _KEY],
    "size": recipe_of(apply("max", shape("initial_state", 0), shape("final_state", 0))),
}


@until_reload
def plan() -> Plan:
    """Return the plan of this process, with the variants that calls have added."""
    return launcher().plan(RECIPE)


def problem_of(given: PrefillArguments, scale: float, l2_norm: bool, target: Target) -> PrefillProblem:
    """Return what a call, whose arguments have been checked, is compiled for."""
    return PrefillProblem(
        target_kind=target.kind,
        arch=target.arch,
        num_sms=target.num_sms,
        qk_heads=given.q.shape[-2],
        heads=given.v.shape[-2],
        K=given.q.shape[-1],
        V=given.v.shape[-1],
        dtype=_name(given.q.dtype),
        state_dtype=_name(given.final.dtype),
        scale=scale,
        l2_norm=l2_norm,
        has_initial=given.initial_state is not None,
        has_lengths=given.cu_seqlens is not None,
    )


def launch(given: PrefillArguments, scale: float, l2_norm: bool) -> None:
    """Launch the kernels for checked arguments of at least one token, on a GPU."""
    target = target_of(NAME, given.q.device)
    problem = problem_of(given, scale, l2_norm, target)
    given = readable(given)
    if target.kind == "cuda":
        arguments = (*given[:-2], scale, int(l2_norm), *given[-2:])
        if not plan().launch(*arguments):
            add_variant(plan(), arguments, problem)
            plan()(*arguments)
        return

    def compile(make: Callable, *arguments, pass_configs=None) -> Callable:
        return compiled(make, arguments, target, tuple((pass_configs or {}).items()))

    def empty(*shape: int, dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=given.q.device)

    with current(given.q.device):
        device = SimpleNamespace(compile=compile, empty=empty)
        sequences = len(given.final)
        _launch(given, problem, sequences, device, *_unused(given.q.device, problem), lambda tensor: tensor[None])


def readable(given: PrefillArguments) -> PrefillArguments:
    """Return the arguments with copies in place of inputs whose memory kernels cannot read."""
    for name, tensor in (("out", given.out), ("final_state", given.final), ("q", given.q), ("v", given.v)):
        if tensor.numel() > MAX_EXTENT:
            raise ValueError(f"{NAME}: {name} must have fewer than 2^31 elements; got {tensor.numel()}; divide the batch")
        if name in ("out", "final_state") and tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"{NAME}: {name} must start at a multiple of {ALIGNMENT} bytes; got a slice; pass another")

    def copied(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0):
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)

    return PrefillArguments(*map(copied, given[:-2]), *given[-2:])


def _launch(given, problem: PrefillProblem, sequences: int, device, no_lengths, no_state, with_batch: Callable) -> None:
    """Launch both kernels on tensors or on views; `with_batch` adds a first dimension of one.

    The kernels are those for numbers of sequences like `sequences`.
    """
    q, k, v, A_log, dt_bias, a, b, initial, cu_seqlens, out, final = given
    final = initial if final is None else final
    if problem.has_lengths:
        q, k, v, a, b, out = (with_batch(x) for x in (q, k, v, a, b, out))
    else:
        cu_seqlens = no_lengths
    C = problem.chunk
    slots = apply("//", q.shape[1], C) + final.shape[0] if problem.has_lengths else q.shape[0] * ceildiv(q.shape[1], C)
    solution = device.empty(slots * problem.heads, C, C, dtype=problem.dtype)
    scores = device.empty(slots * problem.heads, C, C, dtype=problem.dtype)
    factors = device.empty(slots * problem.heads, FACTORS, C, dtype="float32")
    solve = solve_chunks.compile_kernel(problem, device)
    scan = implementation_of(problem).compile_kernel(problem, sequences, device)
    solve(q, k, A_log, dt_bias, a, b, cu_seqlens, solution, scores, factors)
    initial = initial if problem.has_initial else no_state
    scan(q, k, v, solution, scores, factors, cu_seqlens, initial, out, final)


def implementation_of(problem: PrefillProblem) -> ModuleType:
    return next(file for file in KERNELS if file.takes(problem))


@functools.cache
def _unused(device: torch.device, problem: PrefillProblem) -> tuple[Tensor, Tensor]:
    """Return what parameters get that the kernels do not read: lengths, and states."""
    states = torch.zeros(1, problem.heads, problem.V, problem.K, dtype=getattr(torch, problem.state_dtype))
    return torch.zeros(1, dtype=torch.int32).to(device), states.to(device)


def add_variant(plan: Plan, arguments: tuple, problem: PrefillProblem) -> None:
    """Compile the kernels for arguments that have been checked, and add them to the plan; not while a graph is captured."""
    recorder = Recorder(NAME, problem.arch)
    given = dict(zip(_NAMES, arguments, strict=True))
    batch = () if problem.has_lengths else (shape("q", 0),)
    heads, K, V = problem.heads, problem.K, problem.V
    # Calls without a token, and tensors of 2^31 elements and more, are left to the operator.
    tokens = apply("max", shape("q", len(batch)), 1)
    of_token = max(problem.qk_heads * K, heads * V)
    tokens = apply("min", tokens, apply("//", MAX_EXTENT, apply("max", (batch[0] if batch else 1) * of_token, 1)))
    sequences = shape("cu_seqlens", 0) - 1 if problem.has_lengths else batch[0]
    qk, gates, states = (*batch, tokens, problem.qk_heads, K), (*batch, tokens, heads), (sequences, heads, V, K)
    wanted = {
        **dict.fromkeys(("q", "k"), (problem.dtype, qk)),
        **dict.fromkeys(("v", "out"), (problem.dtype, (*gates, V))),
        **dict.fromkeys(("a", "b"), (problem.dtype, gates)),
        **dict.fromkeys(("A_log", "dt_bias"), ("float32", (heads,))),
        "cu_seqlens": ("int32", (shape("cu_seqlens", 0),)),
        **dict.fromkeys(("initial_state", "final_state"), (problem.state_dtype, states)),
    }
    views = {name: None if given[name] is None else recorder.argument(name, *wanted[name]) for name in PrefillArguments._fields}

    def with_batch(view: View) -> View:
        extents = (1, *view.shape)
        return View(view.buffer, view.dtype, extents, tuple(contiguous_strides(extents)))

    unused = (recorder.constant(tensor) for tensor in _unused(given["q"].device, problem))
    key, sequences = plan.key(*arguments)
    _launch(PrefillArguments(**views), problem, sequences, recorder, *unused, with_batch)
    served = implementation_of(problem).sequences_served(problem, sequences)
    plan.add(recorder.variant(key, served), recorder.cubins, recorder.constants)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
