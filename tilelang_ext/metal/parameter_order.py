"""Give the device kernel its parameters in the order of the user's function, and record where each comes from.

    Before  kernel(A, B, C, S, m)  (upstream sorts by name)     After, for f(A, B, S, C) over m rows  kernel(A, B, S, C, m)
                                                                with "tilelang_ext.sources" = ["0", "1", "2", "3", "0.0"]

Tensors first, in the user's order, then scalars in the user's order, then the symbolic extents of shapes; "0.0" is the
extent of axis 0 of parameter 0. Parameters are told apart by identity: tracing may give two of them one name.
"""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.ir import GlobalVar

SOURCES = "tilelang_ext.sources"


def order_parameters(mod: IRModule) -> IRModule:
    """Permute device parameters and the host's calls alike; run right after SplitHostDevice."""
    order: dict[str, list[int]] = {}
    sources: dict[str, list[str]] = {}
    for _, host in mod.functions_items():

        def plan(node, host=host):
            if isinstance(node, tirx.Call) and isinstance(node.op, GlobalVar):
                name = node.op.name_hint
                found = [_source(host, argument) for argument in node.args[: len(mod[node.op].params)]]
                order[name] = sorted(range(len(found)), key=lambda i: (mod[node.op].params[i].dtype != "handle", *found[i], i))
                sources[name] = [".".join(map(str, found[i][1:])) for i in order[name]]

        tirx.stmt_functor.post_order_visit(host.body, plan)

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
            func = func.with_attr(SOURCES, sources[var.name_hint])
        functions[var] = func.with_body(tirx.stmt_functor.ir_transform(func.body, None, permute, ["tirx.Call"]))
    return IRModule(functions, attrs=mod.attrs)


def _source(host: tirx.PrimFunc, argument: tirx.PrimExpr) -> tuple[int, ...]:
    """Return (0, parameter) for a parameter, (1, parameter, axis) for an extent of its shape."""
    for index, param in enumerate(host.params):
        given = host.buffer_map[param].data if param in host.buffer_map else param
        if given.same_as(argument):
            return 0, index
    for index, param in enumerate(host.params):
        if param in host.buffer_map:
            for axis, extent in enumerate(host.buffer_map[param].shape):
                if extent.same_as(argument):
                    return 1, index, axis
    raise NotImplementedError(
        f"metal: what a kernel uses must be a parameter or an extent of a tensor's shape; got {argument}; "
        "add it as a scalar parameter"
    )
