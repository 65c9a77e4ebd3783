"""Plans on a GPU: results, streams, graphs, threads, memory, and the current device."""

import threading

import pytest
import torch
from launch.kernels import add_blocks, double, matmul, nine_tensors

from tilelang_ext import launch
from tilelang_ext.launch.device import target_of
from tilelang_ext.launch.expression import recipe_of, shape
from tilelang_ext.launch.plan import launcher
from tilelang_ext.launch.record import Recorder

pytestmark = pytest.mark.cuda


def arch():
    return target_of("test", torch.device("cuda", torch.cuda.current_device())).arch


def doubled_and_masked():
    """A plan of two kernels with a workspace between them: out = 2 x + mask, for whole blocks of eight rows."""
    recorder = Recorder("doubled_and_masked", arch())
    n = shape("x", 0)
    x, mask = recorder.argument("x", "float32", (n, 64)), recorder.argument("mask", "float32", (64,))
    out, hidden = recorder.argument("out", "float32", (n, 64)), recorder.empty(n, 64, dtype="float32")
    recorder.compile(double, 64)(x, hidden)
    recorder.compile(add_blocks, 8)(hidden, mask, out.view(-1, 8, 64))
    names = ("x", "mask", "out")
    arguments = [{"name": name, "type": "tensor"} for name in names]
    plan = launcher().plan({"name": recorder.name, "arguments": arguments, "key": [], "size": recipe_of(n)})
    plan.add(recorder.variant([], (1, 1 << 20)), recorder.cubins)
    return plan


@pytest.fixture(scope="module")
def plan():
    return doubled_and_masked()


def tensors(rows=4096, device="cuda"):
    x, mask = torch.randn(rows, 64, device=device), torch.randn(64, device=device)
    return x, mask, torch.full_like(x, torch.nan)


def check(x, mask, out):
    assert torch.equal(out, 2 * x + mask)


def test_nine_tensors():
    plan = launch.prepare(nine_tensors())
    xs = [torch.randn(1000, 512, device="cuda")[:, :256], *(torch.randn(1000, 256, device="cuda") for _ in range(7))]
    out = torch.full((1000, 256), torch.nan, device="cuda")
    plan(*xs, 0.5, out)
    assert torch.allclose(out, 0.5 * torch.stack(xs).sum(0), atol=1e-5)
    bound = plan.bind(*xs, 0.5, out)
    out.fill_(torch.nan)
    bound()
    assert torch.allclose(out, 0.5 * torch.stack(xs).sum(0), atol=1e-5)


def test_tma():
    plan = launch.prepare(matmul())
    for rows in (64, 100, 1):
        a, b = torch.randn(rows, 256, device="cuda").bfloat16(), torch.randn(512, 256, device="cuda").bfloat16()
        out = torch.full((rows, 512), torch.nan, device="cuda")
        plan(a, b, out)
        assert torch.allclose(out, a.float() @ b.float().t(), rtol=1e-2, atol=1e-2)


def test_workspace_is_kept(plan):
    """After the first call no call allocates."""
    given = tensors()
    plan(*given)
    check(*given)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        plan(*given)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    check(*given)


def test_two_streams(plan):
    streams = [torch.cuda.Stream() for _ in range(2)]
    given = [tensors() for _ in streams]
    torch.cuda.synchronize()
    for _ in range(50):
        for stream, each in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                each[2].fill_(torch.nan)
                plan(*each)
    torch.cuda.synchronize()
    for each in given:
        check(*each)


def test_graph(plan):
    """A graph replays while its stream is used for other calls, whose workspace is another."""
    given, other = tensors(), tensors()
    plan(*given)
    bound = plan.bind(*given)
    stream, graphs = torch.cuda.Stream(), []
    for call in (lambda: plan(*given), bound):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
        graphs.append(graph)
    for graph in graphs:
        for _ in range(20):
            given[0].normal_()
            given[2].fill_(torch.nan)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                plan(*other)
            graph.replay()
            torch.cuda.synchronize()
            check(*given)
            check(*other)


def test_first_call_while_a_graph_is_captured():
    """Modules are loaded and workspace is found also then."""
    fresh, given = doubled_and_masked(), tensors()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fresh(*given)
    graph.replay()
    check(*given)


def test_threads(plan):
    failures = []

    def work():
        try:
            given = tensors(512)
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(200):
                    given[2].fill_(torch.nan)
                    plan(*given)
                torch.cuda.current_stream().synchronize()
            check(*given)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_on_one_stream(plan):
    """Their calls share a workspace, one whole call after another."""
    given, failures = [tensors(512) for _ in range(4)], []

    def work(each):
        try:
            for _ in range(300):
                plan(*each)
        except Exception as error:
            failures.append(error)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(each,)) for each in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not failures
    for each in given:
        check(*each)


def test_binary_for_another_gpu():
    other = "sm_80" if torch.cuda.get_device_capability() != (8, 0) else "sm_90"
    plan = launch.prepare(double(64), arch=other)
    with pytest.raises(RuntimeError, match=f"double: kernels for {other} must run on compute capability"):
        plan(*(torch.randn(4, 64, device="cuda") for _ in range(2)))


@pytest.mark.two_gpus
def test_another_device(plan):
    given = tensors(device="cuda:1")
    assert torch.cuda.current_device() == 0
    plan(*given)
    check(*given)
    assert torch.cuda.current_device() == 0
    mixed = (given[0], tensors(device="cuda:0")[1], given[2])
    with pytest.raises(ValueError, match="doubled_and_masked: mask must be on cuda:1 as x is; got cuda:0; move it"):
        plan(*mixed)
