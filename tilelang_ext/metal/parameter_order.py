"""Give the device kernel its parameters in the order of the user's function.

    Before  kernel(A, B, C, S, m)  (upstream sorts by name)      After, for f(A, B, S, C) over m rows  kernel(A, B, S, C, m)

Whoever binds buffers by position (torch, MLX, a recorded launch) then needs no map: tensors first, in the user's order, then
scalars in the user's order, then the symbolic extents of shapes.
"""

from __future__ import annotations

from tvm import IRModule, tirx
from tvm.ir import GlobalVar


def order_parameters(mod: IRModule) -> IRModule:
    """Permute device parameters and the host's calls alike; run right after SplitHostDevice."""
    rank_of: dict[str, dict[str, int]] = {}
    for _, host in mod.functions_items():
        ranks = _user_order(host)

        def record(node, ranks=ranks):
            if isinstance(node, tirx.Call) and isinstance(node.op, GlobalVar):
                rank_of[node.op.name_hint] = ranks

        tirx.stmt_functor.post_order_visit(host.body, record)

    permutations = {}
    functions = {}
    for var, func in mod.functions_items():
        if var.name_hint in rank_of:
            ranks = rank_of[var.name_hint]
            key = lambda i, f=func, ranks=ranks: (  # noqa: E731
                f.params[i].dtype != "handle",
                ranks.get(f.params[i].name, len(ranks)),
                i,
            )
            permutations[var.name_hint] = sorted(range(len(func.params)), key=key)
            func = tirx.PrimFunc(
                [func.params[i] for i in permutations[var.name_hint]],
                func.body,
                func.ret_type,
                func.buffer_map,
                func.attrs,
            )
        functions[var] = func

    def permute(node):
        if isinstance(node, tirx.Call) and isinstance(node.op, GlobalVar) and node.op.name_hint in permutations:
            order = permutations[node.op.name_hint]
            return tirx.Call(node.dtype, node.op, [*(node.args[i] for i in order), *node.args[len(order) :]], node.span)
        return None

    for var, func in functions.items():
        functions[var] = func.with_body(tirx.stmt_functor.ir_transform(func.body, None, permute, ["tirx.Call"]))
    return IRModule(functions, attrs=mod.attrs)


def _user_order(func: tirx.PrimFunc) -> dict[str, int]:
    names = [func.buffer_map[p].data.name if p in func.buffer_map else p.name for p in func.params]
    return {name: rank for rank, name in enumerate(names)}
