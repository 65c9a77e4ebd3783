"""Give device kernels their parameters in the order of the user's function.

    Before  kernel(A, B, C, S, m)  (upstream sorts by name)     After, for f(A, B, S, C) over m rows  kernel(A, B, S, C, m)

Tensors first, in the user's order, scratch memory behind them, then scalars in the user's order, then symbolic extents.
"""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.ir import GlobalVar

from tilelang_ext.program import HostCalls, host_calls


def order_parameters(mod: IRModule) -> IRModule:
    """Permute device parameters and the hosts' calls alike; run right after SplitHostDevice."""
    order: dict[str, list[int]] = {}
    for _, host in mod.functions_items():
        if "global_symbol" in host.attrs and not host.attrs.get("tirx.is_global_func", False):
            order.update({name: _order(host, given) for name, given in host_calls(mod, host).arguments.items()})

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
        functions[var] = func.with_body(tirx.stmt_functor.ir_transform(func.body, None, permute, ["tirx.Call"]))
    return IRModule(functions, attrs=mod.attrs)


def in_order(host: tirx.PrimFunc, calls: HostCalls) -> HostCalls:
    """Return the calls of `host` with their arguments in the order that `order_parameters` gives them."""
    ordered = {name: tuple(given[i] for i in _order(host, given)) for name, given in calls.arguments.items()}
    return HostCalls(calls.scratch, ordered)


def _order(host: tirx.PrimFunc, arguments: tuple[int | tirx.PrimExpr, ...]) -> list[int]:
    return sorted(range(len(arguments)), key=lambda i: (*_position(host, arguments[i]), i))


def _position(host: tirx.PrimFunc, source: int | tirx.PrimExpr) -> tuple[int, int, int]:
    """Return where an argument stands: 0 for tensors, 1 for scalars, 2 for extents, and among those by the user's order."""
    if isinstance(source, int):
        return 0, source, 0
    for index, param in enumerate(host.params):
        if param.same_as(source):
            return 1, index, 0
    used = tirx.analysis.undefined_vars(source)
    for index, param in enumerate(host.params):
        if param in host.buffer_map:
            buffer = host.buffer_map[param]
            for axis, extent in enumerate([*buffer.shape, *buffer.strides]):
                if any(var.same_as(other) for var in tirx.analysis.undefined_vars(extent) for other in used):
                    return 2, index, axis
    return 3, 0, 0
