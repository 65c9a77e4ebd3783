"""T.print and T.device_assert in the simulator, and what a Mac and an AMD GPU get of them."""

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import metal, simulate
from tilelang_ext.rocm import program as rocm

TARGETS = ["metal", "hip -mcpu=gfx942"]


@T.prim_func
def kernel(A: T.Tensor((2, 32), "float16"), codes: T.Tensor((4,), "float8_e4m3fn"), C: T.Tensor((2, 32), "float32")):
    with T.Kernel(2, threads=32) as bx:
        tx = T.get_thread_binding()
        a_s = T.alloc_shared((4,), "float16")
        c_f = T.alloc_fragment((32,), "float32")
        for i in T.Parallel(4):
            a_s[i] = A[bx, i]
        for i in T.Parallel(32):
            c_f[i] = T.cast(A[bx, i], "float32") * 2
        T.device_assert(A[bx, tx] < 40, "A must be small")
        if bx == 1:
            T.print(a_s)
            T.print(c_f, msg="doubled")
            if tx == 3:
                T.print(tx, msg="thread")
                T.print(A[bx, tx] > 1)
                T.print(codes[tx], msg="code")
                T.print(msg="here")
        T.copy(c_f, C[bx, 0:32])


def values():
    A = torch.arange(64).reshape(2, 32).half() / 2
    A[1, 7] = 40
    return A, torch.tensor([1.0, 2, -448, 0.5]).to(torch.float8_e4m3fn), torch.zeros(2, 32)


@pytest.fixture(scope="module")
def programs():
    return {TARGETS[0]: metal.lower(kernel), TARGETS[1]: rocm.lower(kernel, TARGETS[1])}


@pytest.mark.parametrize("target", TARGETS)
def test_print_and_assert(programs, target, capsys):
    A, codes, C = values()
    report = simulate(programs[target], A, codes, C, target=target)
    shown = capsys.readouterr().out
    assert shown == "".join(report.printed)
    lines = shown.splitlines()
    where = "BlockIdx=(1, 0, 0), ThreadIdx=(3, 0, 0)"
    assert f"msg='thread' {where}: dtype=int value=3" in lines
    assert sum(f"{where}: dtype=bool value=true" in line for line in lines) == 1
    assert sum(line.startswith(f"msg='code' {where}: dtype=") and line.endswith(" value=0.500000") for line in lines) == 1
    assert f"msg='here' {where}" in lines
    of = "BlockIdx=(1, 0, 0), ThreadIdx=(0, 0, 0)"
    for name, at, value in (("a_s", 3, 17.5), ("c_f", 31, 63)):
        assert any(f"{of}: buffer={name}, index={at}, " in line and line.endswith(f"value={value:f}") for line in lines), name
    assert len(lines) == 4 + 4 + 32
    (finding,) = report.findings
    assert (finding.kind, finding.count, finding.threadgroup, finding.thread) == ("assertion", 1, (1, 0, 0), (7, 0, 0))
    assert finding.message.startswith("A must be small\n  at test_debugging.py:")


def test_lines_are_in_the_order_of_threads():
    @T.prim_func
    def all_threads(C: T.Tensor((2, 32), "int32")):
        with T.Kernel(2, threads=32) as bx:
            tx = T.get_thread_binding()
            C[bx, tx] = 0
            T.print(bx * 32 + tx)

    report = simulate(all_threads, torch.zeros(2, 32, dtype=torch.int32), seed=5)
    assert [int(line.rpartition("=")[2]) for line in report.printed] == list(range(64))


def test_a_mac_refuses_by_name_and_amd_prints(programs):
    text = programs["metal"].source
    assert '#error "T.print: a kernel on a Mac cannot print;' in text
    assert '#error "T.device_assert: a kernel on a Mac cannot report;' in text
    text = programs[TARGETS[1]].source
    assert "__builtin_trap();" in text
    assert "#define TL_ASSERT(condition, message) tilelang_ext::device_assert(condition, message)" in text


def test_assertions_are_traced_where_there_is_no_cuda():
    from tilelang.cuda import debug

    assert debug._IS_CUDA_AVAILABLE
