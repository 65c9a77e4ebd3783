"""Registration: what tilelang_ext adds to upstream's CPU backend for target kind `c`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import tilelang.cpu.op.gemm  # noqa: F401  upstream's registration comes first, ours narrows it
import tvm_ffi
from tilelang.backend.target import TargetLike, register_target_normalizer
from tilelang.cpu.op.gemm import GEMM_INST_SCALAR, GemmScalar
from tilelang.cpu.pipeline import CPUPassPipelineBody
from tilelang.jit.adapter import wrapper
from tilelang.tileop.gemm.registry import register_gemm_impl
from tvm import IRModule, tirx
from tvm.ir.transform import PassContext
from tvm.target import Target
from tvm.tirx.stmt_functor import substitute

from tilelang_ext import registration
from tilelang_ext.cpu import narrow_floats, pipeline
from tilelang_ext.cpu.gemm import OneThreadGemm
from tilelang_ext.cpu.one_thread_blocks import RefuseThreadIndices, needs_one_thread_blocks, needs_scalars
from tilelang_ext.cpu.operators import RULES, register_functions
from tilelang_ext.passes.booleans import SpellBooleans
from tilelang_ext.passes.empty_loops import GuardEmptyLoops
from tilelang_ext.passes.float_arithmetic import KeepFloatArithmetic, ReleaseFloatArithmetic
from tilelang_ext.passes.float_constants import SpellFloatConstants, by_ldexp
from tilelang_ext.passes.foreign_calls import naming_unknown, refuse_foreign
from tilelang_ext.passes.held_bounds import HoldBounds
from tilelang_ext.passes.hidden_conditions import restore_conditions
from tilelang_ext.passes.narrow_integers import WrapNarrowIntegers
from tilelang_ext.passes.operators import spell_operators
from tilelang_ext.passes.region_shapes import refuse_unlike_regions
from tilelang_ext.passes.rewrite import rewritten
from tilelang_ext.passes.scalar_parameters import refuse_narrow_scalars
from tilelang_ext.passes.shifted_indices import HideShiftedTileIndices
from tilelang_ext.passes.single_rounds import EndSingleRounds
from tilelang_ext.passes.solver import in_linear_arithmetic
from tilelang_ext.passes.tma_hints import drop_tma_hints
from tilelang_ext.passes.upstream_errors import in_our_words
from tilelang_ext.passes.vector_lanes import SelectLanes
from tilelang_ext.passes.wrapping_casts import KeepWrappingCasts
from tilelang_ext.registration import has_key

_BUILD = "target.build.tilelang_c"
_IMPORT = "pragma_import_c"  # annotation of a block: text for the head of the generated source


def register() -> None:
    """Register the pass list, the GEMM implementation and the C types of narrow floats; idempotent.

    A kernel that upstream's CPU backend compiles is left to it, to the letter of its text.
    """
    narrow_floats.register()
    register_functions()
    register_gemm_impl("cpu.scalar", GEMM_INST_SCALAR, lambda target: _is_cpu(target) and not has_key(target), GemmScalar)
    register_gemm_impl("tilelang_ext.cpu", GEMM_INST_SCALAR, lambda target: _is_cpu(target) and has_key(target), OneThreadGemm)
    register_target_normalizer("c", normalize_target, override=True)
    _wrap_builder()
    registration.replace_pass_list("cpu", "c", lower)
    _add_parameter_types()


def _is_cpu(target: Target) -> bool:
    return target.kind.name in ("c", "llvm")


def lowering_key() -> str:
    """Return the target key that names these passes."""
    return registration.lowering_key(Path(__file__).parent)


def normalize_target(target: TargetLike) -> Target | None:
    """Add the key to a target of kind `c`, however it is given; None for any other."""
    if isinstance(target, str) and target != "c":
        return None
    if isinstance(target, dict) and target.get("kind") != "c":
        return None
    target = target if isinstance(target, Target) else Target(target)
    return registration.with_key(target, lowering_key()) if target.kind.name == "c" else None


@in_our_words("c")
@in_linear_arithmetic
def lower(mod: IRModule, target: Target) -> IRModule:
    """Lower by our pass list what upstream's refuses, and everything else by upstream's."""
    names = _names_of_arguments(mod)
    mod = _lower(_end_imported_lines(mod), target)
    return _name_arguments(mod, names) if names else mod


def _names_of_arguments(mod: IRModule) -> dict[str, str]:
    """Return the name of a tensor's pointer -> the tensor's, where they differ, as they do behind `g = T.reshape(A, ...)`."""
    arguments = (buffer for func in mod.functions.values() for buffer in func.buffer_map.values())
    return {buffer.data.name: buffer.name for buffer in arguments if buffer.data.name != buffer.name}


def _name_arguments(mod: IRModule, names: dict[str, str]) -> IRModule:
    """Call the kernel's parameters by their tensors: upstream's host code passes arguments by name."""
    functions = {}
    for name, func in mod.functions_items():
        renamed = {var: tirx.Var(names[var.name], var.type_annotation) for var in func.params if var.name in names}
        params = [renamed.get(var, var) for var in func.params]
        body = substitute(func.body, renamed) if renamed else func.body
        functions[name] = tirx.PrimFunc(params, body, func.ret_type, func.buffer_map, func.attrs) if renamed else func
    return IRModule(functions, attrs=mod.attrs)


def _lower(mod: IRModule, target: Target) -> IRModule:
    mod = RefuseThreadIndices(refuse_unlike_regions(refuse_foreign(drop_tma_hints(refuse_narrow_scalars(mod)), "c")))
    if any(needs_one_thread_blocks(func) for func in mod.functions.values()):
        return pipeline.lower(mod, target)
    mod = KeepWrappingCasts(KeepFloatArithmetic(SpellBooleans(SelectLanes(spell_operators(mod, RULES)))))
    mod = GuardEmptyLoops(EndSingleRounds(HideShiftedTileIndices(HoldBounds(mod))))
    with _without_vectors() if needs_scalars(mod) else contextlib.nullcontext():
        return CPUPassPipelineBody(mod, registration.without_key(target))


def _end_imported_lines(mod: IRModule) -> IRModule:
    """End the text of `T.import_source` with its line: upstream's generator would write on in that line."""

    def end_line(block: tirx.SBlock) -> tirx.SBlock | None:
        text = block.annotations.get(_IMPORT)
        if text is None or str(text).endswith("\n"):
            return None
        return tirx.SBlock(
            block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, block.alloc_buffers,
            block.match_buffers, {**block.annotations, _IMPORT: f"{text}\n"},
        )  # fmt: skip

    functions = {name: func.with_body(rewritten(func.body, end_line, ["tirx.SBlock"])) for name, func in mod.functions_items()}
    return IRModule(functions, attrs=mod.attrs)


def _without_vectors() -> PassContext:
    """Return the caller's pass context without the vectoriser."""
    current = PassContext.current()
    return PassContext(
        current.opt_level,
        required_pass=list(current.required_pass),
        disabled_pass=list(current.disabled_pass),
        instruments=list(current.instruments or []),
        config={**dict(current.config), "tirx.disable_vectorize": True},
    )


def _wrap_builder() -> None:
    """Give upstream's generator the floats' arithmetic as it was written, and the target without the key, which it prints."""
    upstream = tvm_ffi.get_global_func(f"{_BUILD}.upstream", allow_missing=True)
    if upstream is None:
        upstream = tvm_ffi.get_global_func(_BUILD)
        tvm_ffi.register_global_func(f"{_BUILD}.upstream", upstream)

    generate = naming_unknown(upstream, "c")

    def build(mod: IRModule, target: Target):
        mod = SpellFloatConstants(ReleaseFloatArithmetic(restore_conditions(mod)), by_ldexp)
        return generate(WrapNarrowIntegers(mod), registration.without_key(target))

    tvm_ffi.register_global_func(_BUILD, build, override=True)


def _add_parameter_types() -> None:
    """Say what C type a tensor of codes or of uint32 is passed as, in upstream's table of those types, a private touch too."""
    types = getattr(getattr(wrapper, "TLCPUSourceWrapper", None), "_TYPE_MAP", None)
    if not isinstance(types, dict):
        raise ImportError(
            "tilelang_ext: needs tilelang.jit.adapter.wrapper.TLCPUSourceWrapper._TYPE_MAP to pass fp8 and bfloat16; "
            "this tilelang has none; install tilelang 0.1.14 or 0.1.15"
        )
    types["bool"] = "int8_t"  # as the generator has it; upstream's entry is the C type, whose pointer does not convert
    types.setdefault("uint32", "uint32_t")
    for dtype in narrow_floats.CARRIED:
        types.setdefault(dtype, f"{narrow_floats.storage_dtype(dtype)}_t")
