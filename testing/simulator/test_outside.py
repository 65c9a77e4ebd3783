"""What a guard of the text hides of a kernel's own accesses is counted by tensor and line, and is a finding on request."""

import pytest
import torch

from tilelang_ext import language as T
from tilelang_ext import metal, simulate
from tilelang_ext.rocm import program as rocm

TARGETS = ["metal", "hip -mcpu=gfx942"]
N = 64


@T.prim_func
def every_kind(
    X: T.Tensor((N, N), "float16"),
    places: T.Tensor((N,), "int32"),
    scale: T.Tensor((N, 2), "float32"),
    Y: T.Tensor((N, N), "float16"),
    Z: T.Tensor((N, N), "float16"),
    scales: T.Tensor((N,), "float32"),
    total: T.Tensor((N,), "float32"),
    tail: T.Tensor((50,), "float32"),
):
    with T.Kernel(1, threads=64):
        for i, j in T.Parallel(N, N):
            Y[i, j] = X[i + 1, j]
        for i, j in T.Parallel(N, N):
            Z[i + 3, j] = X[places[i], j]
        for i in T.Parallel(N):
            if i < N - 1:
                scales[i] = scale[i, i // 32 + 1]
        for i in T.Parallel(N):
            T.atomic_add(total[i + 60], 1.0)
        tail_s = T.alloc_shared((N,), "float32")
        T.copy(tail[0:N], tail_s)
        T.copy(tail_s, tail[0:N])


def arguments():
    X, scale = torch.randn(N, N).half(), torch.rand(N, 2) + 1
    places = torch.arange(N, dtype=torch.int32)
    places[:3] = torch.tensor([N, -1, 100000])
    return X, places, scale, torch.zeros(N, N).half(), torch.zeros(N, N).half(), torch.zeros(N), torch.zeros(N), torch.rand(50)


@pytest.fixture(scope="module")
def programs():
    return {TARGETS[0]: metal.lower(every_kind), TARGETS[1]: rocm.lower(every_kind, TARGETS[1])}


@pytest.mark.parametrize("target", TARGETS)
def test_hidden_accesses_are_counted(programs, target):
    """The last row of the first loop; three gathers; stores of three rows, the gathers among them; 31 scales; 60 updates."""
    given = arguments()
    report = simulate(programs[target], *given, target=target)
    assert report.findings == ()
    X, Y = given[0], given[3]
    assert torch.equal(Y[:-1], X[1:])
    assert not Y[-1].any()
    counted = {}
    for note in report.notes:
        assert note.kind == "outside"
        assert note.text.strip() in report.text_file.read_text()
        array, _, rest = note.message.partition(": ")
        count, _, rest = rest.partition(" ")
        counted.setdefault((array, rest), []).append(int(count.replace(",", "")))
    assert {key: sorted(values) for key, values in counted.items()} == {
        ("X", "reads outside (64, 64) read as 0"): [64, 64, 128],
        ("Z", "stores outside (64, 64) dropped"): [192],
        ("scale", "reads outside (64, 2) read as 0"): [31],
        ("total", "updates outside (64,) dropped"): [60],
    }


def test_strict_makes_them_findings(programs):
    report = simulate(programs["metal"], *arguments(), target="metal", strict=True)
    assert {f.kind for f in report.findings} == {"outside"}
    assert report.notes == ()
    assert "X: 64 reads outside (64, 64) read as 0" in str(report)


def test_marks_are_plain_conditions_for_other_compilers(programs):
    for source in (program.source for program in programs.values()):
        definition = source.index("#define TL_OUTSIDE(tensor, accesses, shape, lanes, ...) (__VA_ARGS__)")
        assert definition < source.index('TL_OUTSIDE("X", "reads"')
        assert source.count("#define TL_OUTSIDE") == 1


def test_accesses_in_bounds_have_no_marks():
    @T.prim_func
    def kernel(X: T.Tensor((N, N), "float32"), Y: T.Tensor((N, N), "float32"), tail: T.Tensor((50,), "float32")):
        with T.Kernel(1, threads=64):
            tail_s = T.alloc_shared((N,), "float32")
            T.copy(tail[0:N], tail_s)
            for i, j in T.Parallel(N, N):
                if i < N - 1:
                    Y[i, j] = X[i + 1, j] + tail_s[j]

    assert "TL_OUTSIDE" not in metal.lower(kernel).source


def test_reads_of_a_tensor_with_a_safe_value_are_meant():
    @T.prim_func
    def kernel(X: T.Tensor((N,), "float32"), Y: T.Tensor((N,), "float32")):
        with T.Kernel(1, threads=64):
            T.annotate_safe_value({X: -1.0})
            for i in T.Parallel(N):
                Y[i] = X[i + 1]

    y = torch.zeros(N)
    report = simulate(kernel, torch.ones(N), y, target="metal")
    assert y[-1] == -1
    assert report.notes == ()
