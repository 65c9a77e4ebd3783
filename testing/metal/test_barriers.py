"""Every thread that waits is waited for, and no thread goes ahead: barriers that upstream's ThreadSync leaves out or puts where
not all threads come, and reductions over threads that do not begin at the first."""

import pytest
import torch
from passes import meeting_kernels as kernels

from tilelang_ext import metal, simulate
from tilelang_ext.metal import pipeline


def check(program, arguments, want, tolerance=0.0):
    report = simulate(program, *arguments)
    assert not report.findings, str(report)
    torch.testing.assert_close(arguments[-1], want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_pipeline_of_fewer_rounds_than_stages(num_stages):
    program = metal.lower(kernels.gemm_of_any_k(num_stages))
    for K in (32, 64, 96, 8):
        arguments, want = kernels.gemm_case(K)
        check(program, arguments, want, 1e-3)


def test_without_thread_sync(monkeypatch):
    """All barriers of a pipeline are found by our pass alone."""
    monkeypatch.setattr(pipeline.tilelang.transform, "ThreadSync", lambda scope: lambda mod: mod)
    arguments, want = kernels.gemm_case(96)
    check(metal.lower(kernels.gemm_of_any_k(2)), arguments, want, 1e-3)


def test_the_back_edge_of_while():
    A = torch.randn(4, kernels.THREADS)
    program = metal.lower(kernels.rounds_of_while)
    for n in (0, 1, 4):
        C = torch.full_like(A, 7.0)
        check(program, (n, A, C), torch.cat([A[:n].flip(1), C[n:]]))


def test_a_barrier_for_a_part_of_the_threads():
    check(kernels.part_of_the_threads(96), *kernels.part_case(96))


@pytest.mark.parametrize("first", [32, 48])
def test_a_reduction_from_another_thread_on(first):
    """A simdgroup's first thread, or one within it: their groups are counted from there, and all threads meet the barrier."""
    A, C = torch.rand(256), torch.empty(256)
    check(kernels.normalized_row(first), (A, C), A / A.sum(), 1e-6)


def test_a_reduction_within_a_simdgroup():
    assert "all_reduce<SumOp, 8, 1>" in metal.lower(kernels.normalized_row(8, sharers=8)).source
    with pytest.raises(NotImplementedError, match="must begin at a multiple of their number; got 8 threads from thread 4"):
        metal.lower(kernels.normalized_row(4, sharers=8))
