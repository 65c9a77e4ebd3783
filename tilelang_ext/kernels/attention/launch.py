"""How `attention` is launched: by plans on NVIDIA GPUs, whose arguments are the operator's; elsewhere by compiled kernels.

A variant of the plan is compiled for head_dim, the dtype, the mask, and whether there are sinks and lengths; it serves every
number of sequences, tokens and heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from tilelang_ext.kernels.attention import sm90_forward, sm90_wide, tiled
from tilelang_ext.kernels.attention.arguments import FP8_DTYPE, Arguments
from tilelang_ext.kernels.attention.problem import Problem
from tilelang_ext.kernels.attention.sm90_block import ARCH
from tilelang_ext.kernels.attention.tiles import SHORT_WINDOW
from tilelang_ext.launch.cache import until_reload
from tilelang_ext.launch.compile import compiled
from tilelang_ext.launch.device import Target, current, target_of
from tilelang_ext.launch.expression import apply, contiguous_strides, fact, recipe_of, select, shape
from tilelang_ext.launch.plan import Plan, launcher
from tilelang_ext.launch.recipe import ALIGNMENT
from tilelang_ext.launch.record import Recorder, View

KERNELS = (sm90_forward, sm90_wide, tiled)  # the first that takes a problem compiles it
MAX_EXTENT = 2**31 - 1
PACKS = (2, 4, 8, 16)  # heads of a tile, of which its rows are a multiple
MAX_GRID = 65535  # of the second dimension
_OPTIONS = ("causal", "window", "softmax_scale")
_SCALES = ("q_scale", "k_scale", "v_scale")
_INPUTS = len(Arguments._fields) - 2
_NAMES = (*Arguments._fields[:_INPUTS], *_OPTIONS, "out", "lse")
_HAS_LENGTHS = fact("rank", "q") == 3
_GROUP = shape("q", 2) // apply("max", shape("k", 2), 1)  # heads of q that share a head of k and v
_KEY = (
    *(fact("value", name) for name in _OPTIONS),
    *(fact("dtype", name) for name in Arguments._fields),
    fact("device", "q"),
    _HAS_LENGTHS,
    select(_HAS_LENGTHS, shape("q", 2), shape("q", 3)),
    select(_HAS_LENGTHS, 1, select(fact("value", "window") != 0, _GROUP, 1)),
)
_TYPES = {"causal": "int", "window": "int", "softmax_scale": "float"}
RECIPE = {
    "name": "attention",
    "arguments": [{"name": name, "type": _TYPES.get(name, "tensor")} for name in _NAMES],
    "key": [recipe_of(value) for value in _KEY],
    "size": recipe_of(shape("q", 0)),
}


@until_reload
def plan() -> Plan:
    """Return the plan of this process, with the variants that calls have added."""
    return launcher().plan(RECIPE)


def problem_of(given: Arguments, causal: int, window: int, scale: float, target: Target) -> Problem:
    """Return what a call, whose arguments have been checked, is compiled for."""
    has_lengths = given.cu_seqlens_q is not None
    group = given.q.shape[-2] // given.k.shape[-2]
    packs = (
        0 < window <= SHORT_WINDOW and not has_lengths and target.arch == ARCH and group in PACKS and given.q.shape[-1] <= 256
    )
    return Problem(
        target_kind=target.kind,
        arch=target.arch,
        num_sms=target.num_sms,
        head_dim=given.q.shape[-1],
        dtype=_name(given.q.dtype),
        scale=scale,
        causal=bool(causal),
        window=window,
        has_sinks=given.sinks is not None,
        has_lengths=has_lengths,
        pack=group if packs and given.q.dtype != FP8_DTYPE else 1,
        out_dtype="" if given.out.dtype == given.q.dtype else _name(given.out.dtype),
    )


def implementation_of(problem: Problem) -> ModuleType:
    return next(file for file in KERNELS if file.takes(problem))


def launch(given: Arguments, causal: int, window: int, scale: float) -> None:
    """Launch the kernel for checked arguments with at least one query and one key, on a GPU."""
    target = target_of("attention", given.q.device)
    problem = problem_of(given, causal, window, scale, target)
    given = readable(given)
    batch_heads = given.q.shape[-2] * (len(given.q) if given.q.dim() == 4 else 1)
    if implementation_of(problem) is tiled and batch_heads > MAX_GRID:
        raise ValueError(f"attention: batch times heads must be at most {MAX_GRID}; got {batch_heads}; divide the batch")
    if target.kind == "cuda":
        arguments = (*given[:_INPUTS], causal, window, scale, *given[_INPUTS:])
        if not plan().launch(*arguments):
            add_variant(plan(), arguments, problem, implementation_of(problem))
            plan()(*arguments)
        return

    def compile(make: Callable, *arguments, pass_configs=None) -> Callable:
        return compiled(make, arguments, target, tuple((pass_configs or {}).items()))

    with current(given.q.device):
        kernel = implementation_of(problem).compile_kernel(problem, SimpleNamespace(compile=compile))  # none needs `empty`
        kernel(*_parameters(given, problem, *_unused(given.q.device), lambda tensor: tensor[None]))


def check_elements(operator: str, given, names: tuple[str, ...]) -> None:
    """Raise ValueError for tensors with more elements than kernels count."""
    for name in names:
        count = getattr(given, name).numel()
        if count > MAX_EXTENT:
            raise ValueError(f"{operator}: {name} must have fewer than 2^31 elements; got {count}; divide the batch")


def readable(given: Arguments) -> Arguments:
    """Return the arguments with copies in place of inputs whose memory kernels cannot read."""
    for name in ("out", "lse"):
        if getattr(given, name).data_ptr() % ALIGNMENT:
            raise ValueError(f"attention: {name} must start at a multiple of {ALIGNMENT} bytes; got a slice; pass another")

    check_elements("attention", given, ("q", "k", "v"))

    def copied(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0):
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)

    return Arguments(*map(copied, given[:_INPUTS]), given.out, given.lse)


def _parameters(given: Arguments, problem: Problem, no_scale, no_lengths, with_batch: Callable) -> tuple:
    """Return the kernel's parameters, of tensors or of views; `with_batch` adds a first dimension of one."""
    q, k, v, sinks, cu_q, cu_k, *scales, out, lse = given
    if problem.has_lengths:
        q, k, v, out, lse = (with_batch(x) for x in (q, k, v, out, lse))
    lengths = (cu_q, cu_k) if problem.has_lengths else (no_lengths, no_lengths)
    scales = (no_scale if scale is None else scale for scale in scales)
    return (q, k, v, sinks if problem.has_sinks else no_scale, *lengths, *scales, out, lse)


@functools.cache
def _unused(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what parameters get that are not given: a scale of one, and int32 that no kernel reads."""
    return torch.ones(1).to(device), torch.zeros(1, dtype=torch.int32).to(device)


def add_variant(plan: Plan, arguments: tuple, problem: Problem, implementation: ModuleType) -> None:
    """Compile the kernel for arguments that have been checked, and add it to the plan; not while a graph is captured."""
    recorder = Recorder("attention", problem.arch)
    batch = () if problem.has_lengths else (shape("q", 0),)
    first = len(batch)
    # Empty tensors and heads of q that are no multiple of those of k are left to the operator.
    tokens, keys, kv_heads = (apply("max", shape(name, first + i), 1) for name, i in (("q", 0), ("k", 0), ("k", 1)))
    group = problem.pack if problem.pack > 1 else shape("q", first + 1) // kv_heads
    heads = group * kv_heads
    # So are tensors of 2^31 elements and more.
    sequences = shape("q", 0) if batch else 1
    tokens = apply("min", tokens, apply("//", MAX_EXTENT, apply("max", sequences * heads * problem.head_dim, 1)))
    keys = apply("min", keys, apply("//", MAX_EXTENT, apply("max", sequences * kv_heads * problem.head_dim, 1)))
    q_shape, kv_shape = (*batch, tokens, heads, problem.head_dim), (*batch, keys, kv_heads, problem.head_dim)
    wanted = {
        "q": (problem.dtype, q_shape),
        "k": (problem.dtype, kv_shape),
        "v": (problem.dtype, kv_shape),
        "sinks": ("float32", (heads,)),
        "cu_seqlens_q": ("int32", (shape("cu_seqlens_q", 0),)),
        "cu_seqlens_k": ("int32", (shape("cu_seqlens_q", 0),)),
        **{name: ("float32", (shape(name, 0),)) for name in _SCALES},
        "out": (problem.result, q_shape),
        "lse": ("float32", (*batch, heads, tokens)),
    }
    given = dict(zip(_NAMES, arguments, strict=True))
    views = {name: None if given[name] is None else recorder.argument(name, *wanted[name]) for name in wanted}

    def with_batch(view: View) -> View:
        extents = (1, *view.shape)
        return View(view.buffer, view.dtype, extents, tuple(contiguous_strides(extents)))

    unused = (recorder.constant(tensor) for tensor in _unused(given["q"].device))
    parameters = _parameters(Arguments(**views), problem, *unused, with_batch)
    implementation.compile_kernel(problem, recorder)(*parameters)
    key, _ = plan.key(*arguments)
    most = MAX_GRID // given["q"].shape[-2] if implementation is tiled and batch else MAX_EXTENT
    plan.add(recorder.variant(key, (1, most)), recorder.cubins, recorder.constants)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
