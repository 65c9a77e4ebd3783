"""Layout inference does not try operators one after another that meet in fragments whose layouts are fixed.

    Before  gemm(A_s, B_s, C_f); parallel: C_f[i, j] = C_f[i, j] * s[i];  copy(C_f, C_s)
    Within  gemm(A_s, B_s, C_f); parallel: C_0[i, j] = C_0[i, j] * s[i];  copy(C_1, C_s)     layout_map {C_0: L, C_1: L}
    After   what upstream's LayoutInference makes of Before

Upstream takes operators that share a fragment for one component. It tries each operator of a component as the first one, and
each time asks all of them what they make of the layouts so far: n² questions, which the solver answers. A GEMM fixes the
layouts of its fragments before that, whatever the others would like, so operators that share no more than these cannot
influence each other. While layouts are inferred, each of them therefore has the fragments of a GEMM under a name of its own,
with its layout; which that is, layout inference itself says about the GEMMs alone. The same holds of fragments that take their
layout from a GEMM's at once, as an accumulator of float32 does to which scaled products are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import tilelang
from tvm import IRModule, tirx
from tvm.error import InternalError
from tvm.ir import Op, structural_equal
from tvm.ir.instrument import pass_instrument
from tvm.ir.transform import PassInfo
from tvm.tirx.stmt_functor import ir_transform, post_order_visit, pre_order_visit

from tilelang_ext.passes.rewrite import rewritten

_FRAGMENT, _LAYOUTS, _TILE_OPERATION = "local.fragment", "layout_map", "tl.tileop."
_FEWEST = 3  # operators: for fewer there is nothing to gain


def infer_layouts(mod: IRModule) -> IRModule:
    """Return what upstream's LayoutInference makes of tile programs."""
    infer = tilelang.transform.LayoutInference()
    try:
        return _inferred_apart(mod, infer)
    except InternalError:  # whatever it is, upstream says it of the program as it is
        return infer(mod)


@pass_instrument
class InferLayouts:
    """Has `infer_layouts` do what a list of upstream's leaves to its LayoutInference.

    The pass is skipped; the module that it would have got, which only the list holds, gets the functions that it would return.
    """

    def __init__(self, lay_out: Callable[[IRModule], IRModule]):
        self.lay_out = lay_out  # what is to be done to the module before, see `layouts.py`
        self.is_inferring = False

    def should_run(self, mod: IRModule, info: PassInfo) -> bool:
        if info.name != "tl.LayoutInference" or self.is_inferring:
            return True
        self.is_inferring = True
        try:
            mod.update(infer_layouts(self.lay_out(mod)))
        finally:
            self.is_inferring = False
        return False


def _inferred_apart(mod: IRModule, infer: Callable[[IRModule], IRModule]) -> IRModule:
    originals: dict[tirx.Buffer, tirx.Buffer] = {}
    separated = {var: _separated(func, infer, originals) for var, func in mod.functions.items()}
    inferred = infer(IRModule(separated, attrs=mod.attrs))
    if not originals:
        return inferred
    functions = {var: func.with_body(_joined(func.body, originals)) for var, func in inferred.functions.items()}
    return IRModule(functions, attrs=inferred.attrs)


def _separated(func: tirx.PrimFunc, infer, originals: dict[tirx.Buffer, tirx.Buffer]) -> tirx.PrimFunc:
    """Return the function with names of their own for what operators share; `originals` gets what each name stands for."""
    operators = _operators(func.body)
    if len(operators) < _FEWEST or not any(map(_is_gemm, operators)):
        return func
    layouts = _layouts_of_gemms(func, infer)
    others = _shared_otherwise(func.body, operators)
    layouts = {buffer: layout for buffer, layout in layouts.items() if buffer not in others}
    _spread(layouts, others, operators)
    names: dict[tirx.Buffer, list[tirx.Buffer]] = {buffer: [] for buffer in layouts}

    def separate(node):
        if not _is_operator(node):
            return None
        if _is_gemm(node):
            return node
        own = {}
        for buffer in _fragments_in(node):
            if buffer in layouts:
                own[buffer] = tirx.decl_buffer(buffer.shape, buffer.dtype, buffer.name, scope=_FRAGMENT)
                names[buffer].append(own[buffer])
        return _with_buffers_exchanged(node, own) if own else node

    body = ir_transform(func.body, separate, None, ["tirx.For", "tirx.Evaluate"])

    def allocate(block):
        given = {name: buffer for buffer in block.alloc_buffers for name in names.get(buffer, ())}
        if not given:
            return None
        originals.update(given)
        fixed = {name.data: layouts[buffer] for name, buffer in given.items()}
        annotations = {**block.annotations, _LAYOUTS: {**block.annotations.get(_LAYOUTS, {}), **fixed}}
        return _with_buffers(block, [*block.alloc_buffers, *given], annotations)

    return func.with_body(rewritten(body, allocate, ["tirx.SBlock"]))


def _layouts_of_gemms(func: tirx.PrimFunc, infer) -> dict[tirx.Buffer, object]:
    """Return the layouts that fragments have where the GEMMs are all that a function does."""

    def drop(node):
        return tirx.Evaluate(0) if _is_operator(node) and not _is_gemm(node) else None

    alone = func.with_body(ir_transform(func.body, drop, None, ["tirx.For", "tirx.Evaluate"]))
    (inferred,) = infer(IRModule.from_expr(alone)).functions.values()
    layouts = {}

    def visit(node):
        if isinstance(node, tirx.SBlock):
            layouts.update(node.annotations.get(_LAYOUTS, {}))

    post_order_visit(inferred.body, visit)
    return {buffer: layout for buffer, layout in layouts.items() if buffer.scope() == _FRAGMENT}


def _spread(layouts: dict[tirx.Buffer, object], others: set[tirx.Buffer], operators: list[tirx.Stmt]) -> None:
    """Add to the layouts of GEMMs those of fragments that a loop takes together with them, element by element.

    Upstream asks operators in their order, and the first one that knows a layout gives its other fragments theirs: of such a
    loop that is the same layout, of anything else upstream has to say.
    """
    decided = set(others)
    for operator in operators:
        fragments = _fragments_in(operator)
        given, free = [buffer for buffer in fragments if buffer in layouts], decided.isdisjoint(fragments)
        if free and given and isinstance(operator, tirx.For):
            whole, layout = _taken_whole(operator), layouts[given[0]]
            is_one = layout.replicate_size == 1 and all(structural_equal(layouts[buffer], layout) for buffer in given)
            if is_one and whole.issuperset(given):
                layouts.update((buffer, layout) for buffer in whole)
        if given or not free:
            decided.update(buffer for buffer in fragments if buffer not in layouts)


def _taken_whole(loop: tirx.For) -> set[tirx.Buffer]:
    """Return the fragments whose indices are the variables of a nest of parallel loops, in their order."""
    variables, body = [], loop
    while isinstance(body, tirx.For) and body.kind == tirx.ForKind.PARALLEL:
        variables.append((body.loop_var, body.extent))
        body = body.body
    taken: dict[tirx.Buffer, bool] = {}

    def visit(node):
        if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)) and node.buffer.scope() == _FRAGMENT:
            is_whole = len(node.indices) == len(variables) and all(
                index.same_as(variable) and structural_equal(extent, size)
                for index, (variable, extent), size in zip(node.indices, variables, node.buffer.shape, strict=True)
            )
            taken[node.buffer] = taken.get(node.buffer, True) and is_whole

    post_order_visit(loop, visit)
    return {buffer for buffer, is_whole in taken.items() if is_whole}


def _joined(body: tirx.Stmt, originals: dict[tirx.Buffer, tirx.Buffer]) -> tirx.Stmt:
    """Return the body with its fragments under their own names again."""

    def join(node):
        if not isinstance(node, tirx.SBlock):
            return _with_buffer(node, originals)
        layouts = {originals.get(buffer, buffer): layout for buffer, layout in node.annotations.get(_LAYOUTS, {}).items()}
        allocated = [buffer for buffer in node.alloc_buffers if buffer not in originals]
        return _with_buffers(node, allocated, {**node.annotations, _LAYOUTS: layouts})

    return rewritten(body, join, ["tirx.BufferLoad", "tirx.BufferStore", "tirx.SBlock"])


def _operators(body: tirx.Stmt) -> list[tirx.Stmt]:
    """Return what layout inference asks: outermost parallel loops and tile operations."""
    found = []

    def visit(node):
        if _is_operator(node):
            found.append(node)
            return False
        return True

    pre_order_visit(body, visit)
    return found


def _is_operator(node) -> bool:
    if isinstance(node, tirx.For):
        return node.kind == tirx.ForKind.PARALLEL
    return _name(node).startswith(_TILE_OPERATION)


def _is_gemm(node) -> bool:
    return "gemm" in _name(node)


def _name(node) -> str:
    """Return the name of the operator that a statement calls."""
    call = node.value if isinstance(node, tirx.Evaluate) else None
    return call.op.name if isinstance(call, tirx.Call) and isinstance(call.op, Op) else ""


def _shared_otherwise(body: tirx.Stmt, operators: Iterable[tirx.Stmt]) -> set[tirx.Buffer]:
    """Return the fragments that are read or written between operators too, or in more than one view."""
    within = set()
    for operator in operators:
        post_order_visit(operator, within.add)
    views: dict[tirx.Var, set[tirx.Buffer]] = {}
    found: set[tirx.Buffer] = set()

    def visit(node):
        if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)) and node.buffer.scope() == _FRAGMENT:
            views.setdefault(node.buffer.data, set()).add(node.buffer)
            if node not in within:
                found.add(node.buffer)

    post_order_visit(body, visit)
    return found.union(*(buffers for buffers in views.values() if len(buffers) > 1))


def _fragments_in(node) -> list[tirx.Buffer]:
    found: dict[tirx.Buffer, None] = {}

    def visit(node):
        if isinstance(node, (tirx.BufferLoad, tirx.BufferStore)) and node.buffer.scope() == _FRAGMENT:
            found[node.buffer] = None

    post_order_visit(node, visit)
    return list(found)


def _with_buffers_exchanged(stmt: tirx.Stmt, buffers: dict[tirx.Buffer, tirx.Buffer]) -> tirx.Stmt:
    return rewritten(stmt, lambda node: _with_buffer(node, buffers), ["tirx.BufferLoad", "tirx.BufferStore"])


def _with_buffer(node, buffers: dict[tirx.Buffer, tirx.Buffer]):
    if node.buffer not in buffers:
        return None
    if isinstance(node, tirx.BufferLoad):
        return tirx.BufferLoad(buffers[node.buffer], node.indices)
    return tirx.BufferStore(buffers[node.buffer], node.value, node.indices)


def _with_buffers(block: tirx.SBlock, allocated: list[tirx.Buffer], annotations: dict) -> tirx.SBlock:
    return tirx.SBlock(
        block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, allocated, block.match_buffers,
        annotations,
    )  # fmt: skip
