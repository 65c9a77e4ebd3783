"""How `attention_decode` is launched: on NVIDIA GPUs by plans, whose arguments are the operator's; elsewhere as compiled.

A variant of the plan is compiled for head_dim, the dtypes, the window, the size of pages and which scales there are; it serves
every number of sequences, tokens, heads and keys, from which each call computes into how many ranges keys are divided.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from tilelang_ext.kernels.attention import sm90_decode, sm90_decode_mma, sm90_sum, split_kv
from tilelang_ext.kernels.attention.arguments import MAX_BATCH, DecodeArguments
from tilelang_ext.kernels.attention.launch import check_elements
from tilelang_ext.kernels.attention.problem import MANY, DecodeProblem
from tilelang_ext.launch.cache import until_reload
from tilelang_ext.launch.compile import compiled
from tilelang_ext.launch.device import Target, current, target_of
from tilelang_ext.launch.expression import apply, fact, recipe_of, select, shape
from tilelang_ext.launch.plan import Plan, launcher
from tilelang_ext.launch.recipe import ALIGNMENT
from tilelang_ext.launch.record import Recorder

KERNELS = (sm90_decode_mma, sm90_decode, split_kv)  # the first that takes a problem compiles it
MAX_ELEMENTS = 2**31 - 1
_OPTIONS = ("window", "softmax_scale")
_NAMES = (*DecodeArguments._fields[:8], *_OPTIONS, "out", "lse")
_HAS_FEW_ROWS = shape("q", 1) * shape("q", 2) <= sm90_sum.MAX_ROWS * shape("cache_k", 2)
_KEY = (
    *(fact("value", name) for name in _OPTIONS),
    *(fact("dtype", name) for name in DecodeArguments._fields),
    fact("device", "q"),
    shape("q", 3),
    select(fact("present", "page_table"), shape("cache_k", 1), 0),
    fact("rank", "k_scale"),
    _HAS_FEW_ROWS,
    _HAS_FEW_ROWS * apply("<=", MANY, shape("q", 0) * shape("cache_k", 2)),
)
_TYPES = {"window": "int", "softmax_scale": "float"}
RECIPE = {
    "name": "attention_decode",
    "arguments": [{"name": name, "type": _TYPES.get(name, "tensor")} for name in _NAMES],
    "key": [recipe_of(value) for value in _KEY],
    "size": recipe_of(shape("q", 0)),
}


@until_reload
def plan() -> Plan:
    """Return the plan of this process, with the variants that calls have added."""
    return launcher().plan(RECIPE)


def problem_of(given: DecodeArguments, window: int, scale: float, target: Target) -> DecodeProblem:
    """Return what a call, whose arguments have been checked, is compiled for."""
    has_few_rows = given.q.shape[1] * given.q.shape[2] <= sm90_sum.MAX_ROWS * given.cache_k.shape[2]
    return DecodeProblem(
        target_kind=target.kind,
        arch=target.arch,
        num_sms=target.num_sms,
        head_dim=given.q.shape[-1],
        dtype=_name(given.q.dtype),
        cache_dtype=_name(given.cache_k.dtype),
        scale=scale,
        window=window,
        page_size=0 if given.page_table is None else given.cache_k.shape[1],
        scales="" if given.k_scale is None else ("head", "page")[given.k_scale.dim() - 1],
        has_sinks=given.sinks is not None,
        has_few_rows=has_few_rows,
        has_many=has_few_rows and given.q.shape[0] * given.cache_k.shape[2] >= MANY,
    )


def launch(given: DecodeArguments, window: int, scale: float) -> None:
    """Launch the kernels for checked arguments with at least one query and one key, on a GPU."""
    target = target_of("attention_decode", given.q.device)
    problem = problem_of(given, window, scale, target)
    given = readable(given)
    if implementation_of(problem) is split_kv:  # TMA counts further
        check_elements("attention_decode", given, ("cache_k", "cache_v"))
    if target.kind == "cuda":
        arguments = (*given[:8], window, scale, *given[8:])
        if not plan().launch(*arguments):
            add_variant(plan(), arguments, problem)
            plan()(*arguments)
        return

    def compile(make: Callable, *arguments, pass_configs=None) -> Callable:
        return compiled(make, arguments, target, tuple((pass_configs or {}).items()))

    def empty(*extents: int, dtype: str) -> Tensor:
        return torch.empty(extents, dtype=getattr(torch, dtype), device=given.q.device)

    def splits(config) -> int:
        batch, tokens, heads, _ = given.q.shape
        _, size, kv_heads, _ = given.cache_k.shape
        keys = size if given.page_table is None else size * given.page_table.shape[1]
        return split_kv.num_splits(problem, config, batch, tokens * heads // kv_heads, kv_heads, keys, apply)

    with current(given.q.device):
        run = compile_kernels(problem, splits, SimpleNamespace(compile=compile, empty=empty))
        run(*_parameters(given, *_unused(given.q.device)))


def implementation_of(problem: DecodeProblem) -> ModuleType:
    return next(file for file in KERNELS if file.takes(problem))


def compile_kernels(problem: DecodeProblem, splits: Callable, device) -> Callable:
    """Return run(q, cache_k, cache_v, seqlens, page_table, k_scale, v_scale, sinks, out, lse).

    `splits(config)` gives the number of ranges, and device.empty allocates what goes between the kernels.
    """
    file = implementation_of(problem)
    config, configs = file.pick_config(problem), split_kv.pass_configs(problem)
    of_ranges = problem if file.sums_ranges(problem) else replace(problem, has_sinks=False)
    attend = device.compile(file.split_kv, of_ranges, config, pass_configs=file.pass_configs(problem))
    if not file.sums_ranges(problem):
        total = device.compile(split_kv.sum_ranges, problem.of_sum(), pass_configs=configs)

    def run(q, cache_k, cache_v, seqlens, page_table, k_scale, v_scale, sinks, out, lse) -> None:
        is_summed = file.sums_ranges(problem)
        results = sm90_sum.places(splits(config), config.ranges) if is_summed else splits(config) * config.ranges
        partial = device.empty(results, *q.shape, dtype="float32")
        partial_lse = device.empty(results, *lse.shape, dtype="float32")
        operands = q, cache_k, cache_v, seqlens, page_table, k_scale, v_scale, partial, partial_lse
        if is_summed:
            given = device.empty(q.shape[0], cache_k.shape[2], splits(config), config.parts + 1, dtype="int64")
            attend(*operands, given, sinks, out, lse)
        else:
            attend(*operands)
            total(partial, partial_lse, sinks, out, lse)

    return run


def readable(given: DecodeArguments) -> DecodeArguments:
    """Return the arguments with copies in place of inputs whose memory kernels cannot read."""
    for name in ("out", "lse", "cache_k", "cache_v"):
        if getattr(given, name).data_ptr() % ALIGNMENT:
            raise ValueError(
                f"attention_decode: {name} must start at a multiple of {ALIGNMENT} bytes; got a slice; pass another"
            )

    def copied(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0):
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)

    return DecodeArguments(*map(copied, given))


def _parameters(given: DecodeArguments, no_numbers, no_table) -> tuple:
    """Return the parameters of the kernels, of tensors or of views."""
    q, cache_k, cache_v, seqlens, page_table, k_scale, v_scale, sinks, out, lse = given
    numbers = (no_numbers if tensor is None else tensor for tensor in (k_scale, v_scale, sinks))
    return (q, cache_k, cache_v, seqlens, no_table if page_table is None else page_table, *numbers, out, lse)


@functools.cache
def _unused(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what parameters get that the kernels do not read: (1,) float32, and (1, 1) int32."""
    return torch.zeros(1).to(device), torch.zeros((1, 1), dtype=torch.int32).to(device)


def add_variant(plan: Plan, arguments: tuple, problem: DecodeProblem) -> None:
    """Compile the kernels for arguments that have been checked, and add them to the plan; not while a graph is captured."""
    recorder = Recorder("attention_decode", problem.arch)
    # Empty tensors and heads of q that are no multiple of those of the cache are left to the operator.
    tokens, size, kv_heads = (apply("max", shape(*of), 1) for of in (("q", 1), ("cache_k", 1), ("cache_k", 2)))
    batch, group = shape("q", 0), shape("q", 2) // kv_heads
    if implementation_of(problem) is split_kv:  # so are caches of 2^31 elements and more
        width = kv_heads * problem.head_dim * (problem.page_size or shape("q", 0))
        most = apply("//", MAX_ELEMENTS, apply("max", width, 1))
        size = apply("min", size, most)
    else:
        most = MAX_ELEMENTS
    heads, pages = group * kv_heads, apply("min", shape("cache_k", 0), most) if problem.page_size else shape("q", 0)
    table_pages = apply("max", shape("page_table", 1), 1)
    q_shape, cache = (batch, tokens, heads, problem.head_dim), (pages, problem.page_size or size, kv_heads, problem.head_dim)
    scale = {"": (), "head": (kv_heads,), "page": (pages, kv_heads)}[problem.scales]
    wanted = {
        "q": (problem.dtype, q_shape),
        "cache_k": (problem.cache_dtype, cache),
        "cache_v": (problem.cache_dtype, cache),
        "seqlens": ("int32", (batch,)),
        "page_table": ("int32", (batch, table_pages)),
        "k_scale": ("float32", scale),
        "v_scale": ("float32", scale),
        "sinks": ("float32", (heads,)),
        "out": (problem.dtype, q_shape),
        "lse": ("float32", (batch, heads, tokens)),
    }
    given = dict(zip(_NAMES, arguments, strict=True))
    views = {name: None if given[name] is None else recorder.argument(name, *wanted[name]) for name in wanted}
    keys = table_pages * problem.page_size if problem.page_size else size

    def splits(config):
        return split_kv.num_splits(problem, config, batch, tokens * group, kv_heads, keys, apply)

    unused = (recorder.constant(tensor) for tensor in _unused(given["q"].device))
    compile_kernels(problem, splits, recorder)(*_parameters(DecodeArguments(**views), *unused))
    key, _ = plan.key(*arguments)
    plan.add(recorder.variant(key, (1, MAX_BATCH)), recorder.cubins, recorder.constants)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
