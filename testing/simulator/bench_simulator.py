"""How fast the simulator itself is: MMAs per second and time to compile. This says nothing about any GPU.

PYTHONPATH=.:testing python testing/simulator/bench_simulator.py
"""

import os
import resource
import time

import torch

from simulator import kernels
from tilelang_ext.simulator import execute_msl, find_compiler

REPEAT = 32  # passes over k, and as many threadgroups


def processor_seconds() -> float:
    """Spent in finished child processes: on a busy machine, more telling than the clock."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    print(f"{find_compiler().version}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    source = kernels.plant(
        kernels.GEMM, "for (int k = 0; k < 64; k += 16) {", f"for (int kr = 0; kr < {64 * REPEAT}; kr += 16) {{"
    )
    source = kernels.plant(
        source,
        "  threadgroup_barrier(mem_flags::mem_threadgroup);  // top",
        "  const int k = kr % 64; threadgroup_barrier(mem_flags::mem_threadgroup);",
    )
    source = kernels.plant(source, "device float* place = C +", "device float* place = C + group * 4096 +")
    source = kernels.plant(source, "uint thread_index [[", "uint group [[threadgroup_position_in_grid]], uint thread_index [[")
    a, b, c = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(REPEAT * 64, 64)

    def run(text, check, workers):
        start, used = time.perf_counter(), processor_seconds()
        report = execute_msl(text, "gemm", [a, b, c], grid=(REPEAT, 1, 1), threads=(128, 1, 1), check=check, workers=workers)
        assert not report.findings
        return time.perf_counter() - start, processor_seconds() - used, report.counts.mma

    print(f"{'check':<8}{'workers':<9}{'seconds':<9}{'M 8x8x8/s':<12}of CPU seconds (whole calls)")
    for check in (False, True):
        for workers in sorted({1, os.cpu_count()}):
            run(source, check, workers)
            seconds, used, mma = min(run(source, check, workers) for _ in range(5))
            print(f"{check!s:<8}{workers:<9}{seconds:<9.3f}{mma / seconds / 1e6:<12.2f}{mma / used / 1e6:.2f}")
    print("call of a text never seen, with one threadgroup:")
    for check in (False, True):
        text = kernels.GEMM + f"// {time.time_ns()}\nconstant int unseen_{time.time_ns()} = 1;\n"
        start = time.perf_counter()
        execute_msl(text, "gemm", [a, b, c], grid=(1, 1, 1), threads=(128, 1, 1), check=check)
        print(f"check={check!s:<7}{time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
