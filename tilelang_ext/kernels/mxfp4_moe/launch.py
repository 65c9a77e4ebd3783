"""Launches of `mxfp4_moe`: the sort, the GEMMs of one implementation, the sum over slots.

The launches are written once, in `compile_launches`, for torch tensors and for the views of a plan (`signature`): on NVIDIA
GPUs a plan launches them (`plan`, `add_variant`). A variant is compiled for the sizes, dtypes and options of a call, and serves
all numbers of tokens that have its kernels and tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import tilelang
import torch
from torch import Tensor

from tilelang_ext.formats import MX_GROUP
from tilelang_ext.kernels.mxfp4_moe import sm90_mma, sm90_wgmma, tiled
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands
from tilelang_ext.kernels.mxfp4_moe.problem import GENERAL_LAYOUT, HOPPER_LAYOUTS, TOKEN_BITS, Problem
from tilelang_ext.kernels.mxfp4_moe.routing import CHUNK, capacity_of, count_slots, moe_sort
from tilelang_ext.kernels.mxfp4_moe.signature import RECIPE, TYPES, readable, to_plan
from tilelang_ext.kernels.mxfp4_moe.sum_slots import PDL_PASS_CONFIGS, sum_slots
from tilelang_ext.kernels.mxfp4_moe.weights import from_arguments
from tilelang_ext.launch.cache import UntilReload, until_reload
from tilelang_ext.launch.compile import compiled as compile_kernel
from tilelang_ext.launch.device import is_for_nvidia, target_of
from tilelang_ext.launch.expression import minimum, shape
from tilelang_ext.launch.plan import Plan, launcher
from tilelang_ext.launch.record import Recorder

IMPLEMENTATIONS = (sm90_mma, sm90_wgmma, tiled)  # the first that takes a problem runs it


def compiled(make: Callable, arguments: tuple, device: torch.device, pass_configs: tuple = ()) -> Callable:
    """Return make(*arguments), a prim_func, as a function of tensors on `device`; see `tilelang_ext.launch.compile`."""
    return compile_kernel(make, arguments, target_of("mxfp4_moe", device), pass_configs)


@dataclass(frozen=True)
class Device:
    """Where the kernels of a call run: it compiles them and allocates their tensors."""

    device: torch.device
    compiled: Callable  # the function of that name, or a stand-in

    def compile(self, make: Callable, *arguments, pass_configs: Mapping[str, bool] | None = None) -> Callable:
        """Return make(*arguments) as a function of tensors."""
        return self.compiled(make, arguments, self.device, tuple((pass_configs or {}).items()))

    def empty(self, *shape: int, dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)


class Routing(NamedTuple):
    """The tensors that `moe_sort` writes, in the order of its parameters."""

    token_ids: Tensor
    weights: Tensor
    expert_ids: Tensor
    num_valid: Tensor
    positions: Tensor


def problem_of(operands: Operands, activation: Activation, a_format: str, epilogue: str) -> Problem:
    """Return the problem that a call is, given arguments that have been checked.

    Raises NotImplementedError for devices other than cuda (ROCm's too), mps and cpu.
    """
    x, topk_ids, _, w13, w2, expert_mask = operands
    # On the CPU nothing is compiled; stand-ins for `compiled` run what a GPU would get. Tensors without data are like those.
    target_kind, num_sms = "c", 0
    if x.device.type not in ("cpu", "meta"):
        target_kind, _, num_sms = target_of("mxfp4_moe", x.device)
    return Problem(
        tokens=topk_ids.shape[0],
        top_k=topk_ids.shape[1],
        num_experts=w13.num_experts if expert_mask is None else expert_mask.numel(),
        num_local_experts=w13.num_experts,
        hidden_size=w13.k,
        intermediate_size=w2.k,
        dtype=_name(x.dtype),
        ids_dtype=_name(topk_ids.dtype),
        a_format=a_format,
        weights_layout=w13.layout,
        activation=activation,
        epilogue=epilogue,
        target_kind=target_kind,
        num_sms=num_sms,
    )


def launch(problem: Problem, operands: Operands, out: Tensor, *, compiled: Callable = compiled) -> None:
    """Launch the kernels for arguments of `mxfp4_moe` that have been checked, with at least one slot.

    A caller with another way to run a prim_func passes a function in place of `compiled`.
    """
    # These copies come before the sort, since kernels launched after it may read x before the one before them has ended.
    operands = readable(operands)
    if operands.expert_mask is None:
        operands = operands._replace(expert_mask=_every_expert(problem.num_experts, out.device))
    _compile_once(problem, Device(out.device, compiled))(operands, out)


def compile_launches(problem: Problem, device) -> Callable:
    """Return run(operands, out): it launches on tensors and a `Device`, and records on views and a `Recorder`.

    The problem decides which kernels run, with which tiles; extents that differ with the number of tokens come from the
    operands.
    """
    _check_tilelang(problem)
    implementation = _implementation_of(problem)
    sort = _compile_sort(problem, implementation, device)
    gemms = implementation.compile_kernels(problem, device)
    combine = _compile_combine(problem, implementation, device)

    def run(operands: Operands, out) -> None:
        x, topk_ids, topk_weights, w13, w2, mask = operands
        routing = sort(topk_ids, topk_weights, mask)
        if problem.epilogue == "atomic":
            y = torch.zeros(out.shape, device=x.device)
        else:
            y = device.empty(*topk_ids.shape, problem.hidden_size, dtype=implementation.PARTIAL_DTYPE)
        gemms(x, routing, w13, w2, y)
        combine(y, routing, out)

    return run


# Of problems, which differ in tokens; the kernels are fewer, and kept by `compiled`.
_compile_once = functools.lru_cache(maxsize=1024)(compile_launches)


def _implementation_of(problem: Problem):
    return next(file for file in IMPLEMENTATIONS if file.takes(problem))


def _compile_sort(problem: Problem, implementation, device) -> Callable:
    """Return sort(topk_ids, topk_weights, mask), which returns the Routing."""
    block_M, max_experts = implementation.pick_config(problem).block_M, problem.max_experts
    has_chunks = problem.slots > CHUNK
    if has_chunks:
        count = device.compile(count_slots, max_experts, problem.ids_dtype)
    sort = device.compile(moe_sort, block_M, max_experts, problem.ids_dtype, implementation.USES_PDL)

    def run(topk_ids, topk_weights, mask) -> Routing:
        tokens, top_k = topk_ids.shape
        # No more experts have rows than there are slots, so with few tokens hardly a block of the next launches is empty. At
        # least top_k experts are counted, since the rows of ids that are not distinct have to fit too.
        experts = minimum(max(problem.num_experts, top_k), tokens * top_k)
        capacity = capacity_of(tokens, top_k, experts, block_M)
        routing = Routing(
            token_ids=device.empty(capacity, dtype="int32"),
            weights=device.empty(capacity, dtype="float32"),
            expert_ids=device.empty(capacity // block_M, dtype="int32"),
            num_valid=device.empty(1, dtype="int32"),
            positions=device.empty(tokens, top_k, dtype="int32"),
        )
        counts = device.empty(-(-tokens * top_k // CHUNK), max_experts, dtype="int32")
        if has_chunks:
            count(topk_ids, counts)
        sort(topk_ids, topk_weights, mask, counts, *routing)
        return routing

    return run


def _compile_combine(problem: Problem, implementation, device) -> Callable:
    """Return combine(y, routing, out), which adds the slots of each token where the GEMMs have not."""
    if problem.epilogue == "atomic":
        return lambda y, routing, out: out.copy_(y)
    uses_pdl = implementation.USES_PDL
    arguments = problem.dtype, implementation.PARTIAL_DTYPE, uses_pdl
    add = device.compile(sum_slots, *arguments, pass_configs=PDL_PASS_CONFIGS if uses_pdl else None)

    def run(y, routing: Routing, out) -> None:
        add(y.unflatten(2, (-1, MX_GROUP)), routing.positions, out.unflatten(1, (-1, MX_GROUP)))

    return run


def _check_tilelang(problem: Problem) -> None:
    """Raise where upstream's CUDA for the general kernels does not compile."""
    is_general = problem.weights_layout == GENERAL_LAYOUT
    if is_general and problem.target_kind == "cuda" and tilelang.__version__.startswith("0.1.14"):
        raise NotImplementedError(
            f"mxfp4_moe: these weights need tilelang 0.1.15 on NVIDIA GPUs; got {tilelang.__version__}; "
            "upgrade tilelang, or use tile_for_hopper on a Hopper GPU"
        )


_MASKS: dict[tuple[int, torch.device], Tensor] = {}


def _every_expert(num_experts: int, device: torch.device) -> Tensor:
    """Return a mask of ones that is filled once per device; a mask made while a graph is captured belongs to that graph."""
    key = num_experts, device
    is_capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in _MASKS and (is_capturing or device.type == "cpu"):  # on the CPU it may be a tensor without data
        return torch.ones(num_experts, dtype=torch.int32, device=device)
    if key not in _MASKS:
        _MASKS[key] = torch.ones(num_experts, dtype=torch.int32).to(device)  # this waits, so any stream may read the mask
    return _MASKS[key]


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- the plan of NVIDIA GPUs -----------------------------------------------------------------------------------------


@until_reload
def plan() -> Plan:
    """Return the plan of this process, with the variants that calls have added."""
    return launcher().plan(RECIPE)


def _find_directly() -> Callable[..., bool]:
    takes_plans = is_for_nvidia() and torch.cuda.is_available()
    return plan().launch_directly if takes_plans else lambda *arguments: False


directly = UntilReload(_find_directly)  # its value: the plan's `launch_directly`; where no NVIDIA GPU is, what never launches


def has_plan(problem: Problem) -> bool:
    """Return whether a plan launches this: what torch does beside kernels, as the cast of atomic sums, is in none."""
    return problem.target_kind == "cuda" and problem.epilogue == "reduce"


def add_variant(plan: Plan, arguments: tuple, problem: Problem, arch: str) -> None:
    """Compile the kernels of one call, whose arguments are those of `mxfp4_moe_out` and `readable`, and add them to the plan.

    Not while a graph is captured: a mask of every expert is kept.
    """
    in_plan = to_plan(arguments)
    given = dict(zip(TYPES, in_plan, strict=True))
    recorder = Recorder("mxfp4_moe", arch)
    tokens, H = shape("x", 0), problem.hidden_size

    def argument(name: str, *extents):
        return recorder.argument(name, _name(given[name].dtype), extents or given[name].shape)

    weights = []
    for matrix, gated in (("13", True), ("2", False)):
        tensors = (argument(f"{part}{matrix}") for part in ("w", "scale", "bias"))
        rows, k, tiles = (given[f"{part}{matrix}"] for part in ("rows", "k", "tiles"))
        weights.append(from_arguments(*tensors, rows, k, HOPPER_LAYOUTS.get(tiles, GENERAL_LAYOUT), gated=gated))
    if given["expert_mask"] is None:
        mask = recorder.constant(_every_expert(problem.num_experts, given["x"].device))
    else:
        mask = argument("expert_mask")
    operands = Operands(
        argument("x", tokens, H),
        argument("topk_ids", tokens, problem.top_k),
        argument("topk_weights", tokens, problem.top_k),
        *weights,
        mask,
    )
    compile_launches(problem, recorder)(operands, argument("out", tokens, H))
    key, _ = plan.key(*in_plan)
    plan.add(recorder.variant(key, tokens_of_kernels(problem)), recorder.cubins, recorder.constants)


def tokens_of_kernels(problem: Problem) -> tuple[int, int]:
    """Return the fewest and the most tokens that get the kernels and tiles of this problem."""

    def kernels(tokens: int) -> tuple:
        of_tokens = replace(problem, tokens=tokens)
        implementation = _implementation_of(of_tokens)
        return implementation, implementation.pick_configs(of_tokens), of_tokens.slots > CHUNK

    # Numbers of tokens that have the same kernels lie together, but for single ones at which a last wave of tiles is full or
    # not. So each side is walked in steps of a twentieth, to the first number that has others: the bound is in the last step.
    wanted, bounds = kernels(problem.tokens), []
    for end in (0, 1 << TOKEN_BITS):
        inside, outside = problem.tokens, end
        while inside != end:
            step = inside // 20 + 1
            beyond = max(inside - step, end) if end < inside else min(inside + step, end)
            if beyond == end or kernels(beyond) != wanted:
                outside = beyond
                break
            inside = beyond
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if kernels(middle) == wanted else (inside, middle)
        bounds.append(inside)
    return bounds[0], bounds[1]
