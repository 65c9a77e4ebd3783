"""A threadgroup that needs more memory than Metal has: which buffers take it, and which `num_stages` and tile would fit.

    shared memory: a Metal threadgroup has 32768 bytes; got 46080 in kernel gemm_kernel (A_s 18432 in 3 stages, ...);
    use num_stages=2 (30720 bytes)

`Stages` reads the number of stages of each buffer from the tile program; `check_memory` runs when threadgroup memory has been
placed and merged.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import IRModule, tirx
from tvm.ir import Op
from tvm.tirx.stmt_functor import post_order_visit

from tilelang_ext.metal.threadgroup_memory import THREADGROUP_MEMORY_BYTES, aligned_bytes, shared_buffers

_COPY = "tl.tileop.copy"


def stages_of_buffers(mod: IRModule) -> dict[str, int]:
    """Return, by the name of each shared buffer that a loop of `T.Pipelined` fills, the number of its stages."""
    loops: list[tirx.For] = []

    def find_loop(node):
        if isinstance(node, tirx.For) and int(node.annotations.get("num_stages", 0)) > 1:
            loops.append(node)

    for _, func in mod.functions_items():
        post_order_visit(func.body, find_loop)

    stages: dict[str, int] = {}
    for loop in loops:
        count = int(loop.annotations["num_stages"])
        for buffer in _filled(loop):
            stages[buffer.name] = max(count, stages.get(buffer.name, 1))
    return stages


def _filled(loop: tirx.For) -> list[tirx.Buffer]:
    """Return the shared buffers into which a loop copies."""
    filled = []

    def visit(node):
        if isinstance(node, tirx.Call) and isinstance(node.op, Op) and node.op.name == _COPY:
            buffer = node.args[1].args[0].buffer
            if buffer.scope().startswith("shared"):
                filled.append(buffer)

    post_order_visit(loop.body, visit)
    return filled


def declared_bytes(mod: IRModule) -> dict[str, dict[str, int]]:
    """Return, by the name of each kernel, the bytes of each of its shared buffers."""
    return {
        name.name_hint: {buffer.name: aligned_bytes(buffer) for buffer in shared_buffers(func)}
        for name, func in mod.functions_items()
    }


def check_memory(mod: IRModule, declared: Mapping[str, Mapping[str, int]], stages: Mapping[str, int]) -> None:
    """Raise ValueError for a kernel whose threadgroup memory, as it was placed, is more than Metal has."""
    for name, func in mod.functions_items():
        needed = sum(aligned_bytes(buffer) for buffer in shared_buffers(func))
        if needed > THREADGROUP_MEMORY_BYTES:
            raise ValueError(_message(name.name_hint, needed, declared[name.name_hint], stages))


def _message(kernel: str, needed: int, declared: Mapping[str, int], stages: Mapping[str, int]) -> str:
    by_size = sorted(declared.items(), key=lambda item: -item[1])
    buffers = ", ".join(f"{name} {size}" + _in_stages(stages.get(name, 1)) for name, size in by_size)
    limit = THREADGROUP_MEMORY_BYTES
    text = f"shared memory: a Metal threadgroup has {limit} bytes; got {needed} in kernel {kernel} ({buffers}); "
    most = max((stages.get(name, 1) for name in declared), default=1)
    for count in range(most - 1, 0, -1):
        size = _with_stages(declared, stages, count)
        if size <= limit:
            return text + f"use num_stages={count} ({size} bytes)"
    size, divisor = _with_stages(declared, stages, 1), 2
    while size > divisor * limit:
        divisor *= 2
    with_stages = " with num_stages=1" if most > 1 else ""
    return text + f"use tiles of 1/{divisor} of these elements{with_stages} ({-(-size // divisor)} bytes)"


def _with_stages(declared: Mapping[str, int], stages: Mapping[str, int], count: int) -> int:
    """Return the bytes of all buffers when none has more than `count` stages."""
    return sum(size // stages.get(name, 1) * min(count, stages.get(name, 1)) for name, size in declared.items())


def _in_stages(count: int) -> str:
    return f" in {count} stages" if count > 1 else ""
