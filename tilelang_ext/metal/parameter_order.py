"""Give the device kernel its parameters in the order of the user's function, and record where each comes from.

    Before  kernel(A, B, C, S, m)  (upstream sorts by name)     After, for f(A, B, S, C) over m rows  kernel(A, B, S, C, m)
                                                                with "tilelang_ext.sources" = ["0", "1", "2", "3", "0.0"]

Tensors first, in the user's order, then scalars in the user's order, then the symbolic extents of shapes; "0.0" is the
extent of axis 0 of parameter 0.
"""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.ir import GlobalVar

from tilelang_ext.program import Source, parameter_sources

_SOURCES = "tilelang_ext.sources"


def order_parameters(mod: IRModule) -> IRModule:
    """Permute device parameters and the host's calls alike; run right after SplitHostDevice."""
    order: dict[str, list[int]] = {}
    texts: dict[str, list[str]] = {}
    for name, sources in parameter_sources(mod).items():
        params = mod[name].params
        order[name] = sorted(range(len(sources)), key=lambda i: _position(params[i], sources[i], i))
        texts[name] = [_text(sources[i]) for i in order[name]]

    def permute(node):
        if isinstance(node, tirx.Call) and isinstance(node.op, GlobalVar) and node.op.name_hint in order:
            places = order[node.op.name_hint]
            return tirx.Call(node.dtype, node.op, [*(node.args[i] for i in places), *node.args[len(places) :]], node.span)
        return None

    functions = {}
    for var, func in mod.functions_items():
        if var.name_hint in order:
            params = [func.params[i] for i in order[var.name_hint]]
            func = tirx.PrimFunc(params, func.body, func.ret_type, func.buffer_map, func.attrs)
            func = func.with_attr(_SOURCES, texts[var.name_hint])
        functions[var] = func.with_body(tirx.stmt_functor.ir_transform(func.body, None, permute, ["tirx.Call"]))
    return IRModule(functions, attrs=mod.attrs)


def sources_of(kernel: tirx.PrimFunc) -> list[Source]:
    """Return the sources that `order_parameters` has recorded, one per parameter of the kernel."""
    return [Source(*map(int, str(text).split("."))) for text in kernel.attrs[_SOURCES]]


def _position(param: tirx.Var, source: Source, index: int) -> tuple:
    is_extent = source.axis is not None
    return param.dtype != "handle", is_extent, source.parameter, source.axis or 0, index


def _text(source: Source) -> str:
    return ".".join(str(number) for number in source if number is not None)
