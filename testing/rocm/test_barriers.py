"""As testing/metal/test_barriers.py: barriers that all threads meet, reductions from any thread on."""

import pytest
import torch
from passes import meeting_kernels as kernels
from rocm.kernels import lower

from tilelang_ext import simulate


def check(kernel, arguments, want, arch, tolerance=0.0):
    report = simulate(kernel, *arguments, target=f"hip -mcpu={arch}")
    assert not report.findings, str(report)
    torch.testing.assert_close(arguments[-1], want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("K", [32, 96])
def test_a_pipeline_of_fewer_rounds_than_stages(K):
    arguments, want = kernels.gemm_case(K)
    check(kernels.gemm_of_any_k(2), arguments, want, "gfx942", 1e-3)


def test_the_back_edge_of_while():
    A, C = torch.randn(4, kernels.THREADS), torch.empty(4, kernels.THREADS)
    check(kernels.rounds_of_while, (4, A, C), A.flip(1), "gfx1100")


def test_a_barrier_for_a_part_of_the_threads():
    check(kernels.part_of_the_threads(64), *kernels.part_case(64), "gfx942")


@pytest.mark.parametrize(("arch", "first"), [("gfx942", 32), ("gfx1100", 48), ("gfx1100", 0)])
def test_a_reduction_from_another_thread_on(arch, first):
    A, C = torch.rand(256), torch.empty(256)
    check(kernels.normalized_row(first), (A, C), A / A.sum(), arch, 1e-6)


def test_upstreams_reduction_where_it_is_right():
    """A row of threads that no barrier is needed for, from a multiple of its number on."""
    assert "tl::AllReduce<tl::SumOp, 64, 1, 0>::run" in lower(kernels.normalized_row(0), "gfx942").source
    with pytest.raises(NotImplementedError, match="must begin at a multiple of their number; got 8 threads from thread 4"):
        lower(kernels.normalized_row(4, sharers=8), "gfx942")
