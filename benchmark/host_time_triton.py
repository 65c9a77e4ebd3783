"""The kernel of nine tensors of bench_host.py in Triton; Triton reads kernels from files."""

import triton
import triton.language as tl


@triton.jit
def sum_of_eight(x0, x1, x2, x3, x4, x5, x6, x7, out, COLUMNS: tl.constexpr):
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.load(x0 + at) + tl.load(x1 + at) + tl.load(x2 + at) + tl.load(x3 + at)
    total += tl.load(x4 + at) + tl.load(x5 + at) + tl.load(x6 + at) + tl.load(x7 + at)
    tl.store(out + at, total)
