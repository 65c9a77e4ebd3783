"""T.cumsum and T.cummax on waves of 32 lanes, and thread counts that upstream's templates do not take.

    Before  tl::CumSum2D<128, 1, false>::run(src, dst, ...)                       lines of 64 lanes, whatever the chip has
    After   tl::InclusiveScan2D<tl::ScanSumOp, 128, 1, false>::run_auto(...)      lines of a wave

A wave of 32 lanes takes nothing from the lanes beyond its own, so scans longer than 32 were wrong on RDNA.
"""

from __future__ import annotations

import re

from tvm import IRModule, tirx
from tvm.target import Target

from tilelang_ext.passes.rewrite import rewritten

_SCAN = re.compile(r"^tl::Cum(Sum|Max)([12]D)<(\d+)(.*)>::run$")
_MOST_THREADS = 1024


def spell_scans(mod: IRModule, target: Target) -> IRModule:
    """Return the module with its scans for the waves of the target; ValueError for threads that no template has."""
    wave = int(target.attrs["thread_warp_size"])

    def spell(node):
        found = _SCAN.match(node.value)
        if not found:
            return None
        operator, rank, threads, rest = found[1], found[2], int(found[3]), found[4]
        if threads < wave or threads > _MOST_THREADS or threads & (threads - 1):
            raise ValueError(
                f"T.cum{operator.lower()}: threads must be a power of two from {wave}, a wave, to {_MOST_THREADS}; "
                f"got {threads}; use threads={max(wave, 1 << threads.bit_length() - 1)}"
            )
        if wave == 64:
            return None
        return tirx.StringImm(f"tl::InclusiveScan{rank}<tl::Scan{operator}Op, {threads}{rest}>::run_auto")

    functions = {
        name: func.with_body(rewritten(func.body, spell, ["tirx.StringImm"])) if isinstance(func, tirx.PrimFunc) else func
        for name, func in mod.functions_items()
    }
    return IRModule(functions, attrs=mod.attrs)
