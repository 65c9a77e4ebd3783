"""Layout inference with the fragments of GEMMs under names of their own: what upstream makes of the program as it is."""

import pytest
import tilelang
from cuda import kernels as cuda_kernels
from tilelang import tvm
from tvm import tirx
from tvm.ir import structural_equal

from tilelang_ext import language as T
from tilelang_ext import metal
from tilelang_ext.cuda import pipeline as cuda_pipeline
from tilelang_ext.metal import pipeline as metal_pipeline
from tilelang_ext.passes import known_layouts
from tilelang_ext.passes.instruments import instrumented

N = 64


@tvm.ir.instrument.pass_instrument
class Nothing:
    """An instrument that leaves every pass alone."""


def scaled_products(steps=3):
    """Two accumulators, one of them no GEMM's; a reduction, whose result only other operators lay out."""

    @T.prim_func
    def kernel(
        A: T.Tensor((N, N), "float16"),
        B: T.Tensor((N, N), "float16"),
        scales: T.Tensor((N,), "float32"),
        C: T.Tensor((N, N), "float16"),
        peaks: T.Tensor((N,), "float32"),
    ):
        with T.Kernel(1, threads=128):
            A_s, B_s = T.alloc_shared((N, N), "float16"), T.alloc_shared((N, N), "float16")
            partial, total = T.alloc_fragment((N, N), "float32"), T.alloc_fragment((N, N), "float32")
            peak = T.alloc_fragment((N,), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.clear(total)
            for _ in T.serial(steps):
                T.gemm(A_s, B_s, partial, transpose_B=True, clear_accum=True)
                for i, j in T.Parallel(N, N):
                    total[i, j] += partial[i, j] * scales[i]
            T.reduce_max(total, peak, dim=1)
            for i, j in T.Parallel(N, N):
                total[i, j] -= peak[i]
            T.copy(total, C)
            T.copy(peak, peaks)

    return kernel


def before_inference(kernel) -> tvm.IRModule:
    """Return the module that `infer_layouts` gets on Metal."""
    seen = []

    def infer_layouts(mod):
        seen.append(mod)
        return known_layouts.infer_layouts(mod)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metal_pipeline, "infer_layouts", infer_layouts)
        metal.lower(kernel)
    return seen[0]


def separated(mod: tvm.IRModule):
    """Return the function as layout inference gets it, and the fragments' names that stand for others."""
    ((_, func),) = mod.functions_items()
    originals = {}
    return known_layouts._separated(func, tilelang.transform.LayoutInference(), originals), originals


@pytest.fixture
def on_metal():
    with tvm.target.Target("metal"):
        yield


def test_is_upstreams(on_metal):
    mod = before_inference(scaled_products())
    _, originals = separated(mod)
    assert {buffer.name for buffer in originals.values()} == {"partial", "total"}
    upstreams = tilelang.transform.LayoutInference()(mod)
    assert structural_equal(known_layouts.infer_layouts(mod), upstreams, map_free_vars=True)


def test_operators_share_no_fragment_of_a_gemm():
    func, originals = separated(before_inference(scaled_products()))
    users = {}
    for operator in known_layouts._operators(func.body):
        for buffer in known_layouts._fragments_in(operator):
            users.setdefault(buffer, []).append(operator)
    assert len(originals) == 6
    assert all(len(users[buffer]) == 1 for buffer in originals)
    assert {buffer.name for buffer, of in users.items() if len(of) > 1} == {"peak"}


def test_without_gemm():
    @T.prim_func
    def kernel(A: T.Tensor((N, N), "float32"), C: T.Tensor((N, N), "float32")):
        with T.Kernel(1, threads=128):
            x = T.alloc_fragment((N, N), "float32")
            T.copy(A, x)
            for i, j in T.Parallel(N, N):
                x[i, j] += 1
            T.copy(x, C)

    assert not separated(before_inference(kernel))[1]


def test_a_fragment_read_between_operators_keeps_its_name():
    """Every thread has all of it, whatever a GEMM would like."""
    mod = before_inference(scaled_products())
    ((var, func),) = mod.functions_items()
    (total,) = (buffer for buffer in known_layouts._fragments_in(func.body) if buffer.name == "total")
    reads = tirx.Evaluate(tirx.BufferLoad(total, [0, 0]))
    body = known_layouts.rewritten(
        func.body,
        lambda node: tirx.SeqStmt([reads, *node.seq]) if len(node.seq) > 4 else None,
        ["tirx.SeqStmt"],
    )
    _, originals = separated(tvm.IRModule({var: func.with_body(body)}))
    assert {buffer.name for buffer in originals.values()} == {"partial"}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_in_upstreams_list(arch, monkeypatch):
    """The text is that of upstream's list with its own pass."""
    kernel = scaled_products(2).with_attr("global_symbol", "kernel")
    asked = []

    def infer_layouts(mod):
        asked.append(mod)
        return known_layouts._inferred_apart(mod, tilelang.transform.LayoutInference())

    def lower():
        monkeypatch.setattr(cuda_kernels, "_TEXTS", {})
        return cuda_kernels.lower(kernel, arch)

    monkeypatch.setattr(known_layouts, "infer_layouts", infer_layouts)
    text = lower()
    assert asked

    asked.clear()
    monkeypatch.setattr(cuda_pipeline, "InferLayouts", lambda lay_out: Nothing())
    assert text == lower()
    assert not asked


def test_what_fails_is_upstreams_to_say(on_metal, monkeypatch):
    """Also where names of their own would be the reason."""

    def fail(*arguments):
        raise tvm.error.InternalError("of another program")

    mod = before_inference(scaled_products())
    upstreams = tilelang.transform.LayoutInference()(mod)
    monkeypatch.setattr(known_layouts, "_inferred_apart", fail)
    assert structural_equal(known_layouts.infer_layouts(mod), upstreams, map_free_vars=True)


def test_instruments_add_up():
    outer, inner = Nothing(), Nothing()
    with instrumented(outer), instrumented(inner):
        assert [*tvm.transform.PassContext.current().instruments] == [outer, inner]
    assert not tvm.transform.PassContext.current().instruments
