"""Conditions that the pass list takes out of a function's body come back whole, and what they read is known meanwhile."""

import pytest
import tilelang
from tvm import IRModule, ir, tirx
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext import metal
from tilelang_ext.cpu import pipeline as cpu_pipeline
from tilelang_ext.cuda import pipeline as cuda_pipeline
from tilelang_ext.metal import pipeline as metal_pipeline
from tilelang_ext.passes import hidden_conditions
from tilelang_ext.rocm import pipeline as rocm_pipeline
from tilelang_ext.rocm import program as rocm_program

PIPELINES = {"metal": metal_pipeline, "hip": rocm_pipeline, "cuda": cuda_pipeline, "c": cpu_pipeline}


@T.prim_func
def choose(flags: T.Tensor((64,), "int32"), A: T.Tensor((64,), "float32"), C: T.Tensor((64,), "float32")):
    with T.Kernel(2, threads=32) as block:
        thread = T.get_thread_binding()
        i = block * 32 + thread
        if flags[T.if_then_else(A[i // 2] > 0.0, i % 8, i // 8)] > 0:
            C[i] = T.if_then_else(A[i] > 1.0, A[63 - i], 0.0)
            flags[i] = 2


@T.prim_func
def copy_once(flags: T.Tensor((64,), "int32"), A: T.Tensor((64,), "float32"), C: T.Tensor((64,), "float32")):
    with T.Kernel(2, threads=32) as block:
        i = block * 32 + T.get_thread_binding()
        C[i] = T.if_then_else(flags[i] == 0, A[i], 0.0)
        flags[i] = 1


@T.prim_func
def shift(A: T.Tensor((77,), "float32"), C: T.Tensor((77,), "float32")):
    with T.Kernel(3, threads=32) as block:
        A_f = T.alloc_fragment((32,), "float32")
        T.copy(A[block * 32 + 5], A_f)
        for i in T.Parallel(32):
            C[block * 32 + i] = T.if_then_else(A[i // 2] > 0.0, A_f[i], 0.0)


def program(kernel, target):
    return metal.lower(kernel) if target == "metal" else rocm_program.lower(kernel, {"kind": "hip", "mcpu": "gfx942"})


def text(target):
    if target in ("metal", "hip"):
        return program(choose, target).source
    # Target c has no index of a thread, hence a kernel of its own.
    kernel, options = (shift, "c") if target == "c" else (choose, {"kind": "cuda", "arch": "sm_90a"})
    with Target(options) as whole:
        return tilelang.lower(kernel, target=whole, enable_device_compile=False).kernel_source


@pytest.mark.parametrize("target", PIPELINES)
def test_text(target, monkeypatch):
    """The text is that of the pass list without the pass: every condition comes back, also one within another."""
    seen, hide = [], PIPELINES[target].hide_conditions
    monkeypatch.setattr(PIPELINES[target], "hide_conditions", lambda mod: seen.append(hide(mod)) or seen[-1])
    hidden = text(target)
    assert "condition_" in seen[0].script()
    assert "condition_" not in hidden
    monkeypatch.setattr(PIPELINES[target], "hide_conditions", lambda mod: mod)
    assert text(target) == hidden


def test_variables_that_upstream_inlines():
    """What reads them within a condition is not in sight of the pass that removes them."""
    alias, twice, tx = (tirx.Var(name, "int32") for name in ("alias", "twice", "tx"))
    A = tirx.decl_buffer((8,), "int32", "A")
    store = tirx.BufferStore(A, tirx.const(1, "int32"), [tx])
    body = tirx.SeqStmt([tirx.Bind(alias, tx), tirx.Bind(twice, alias), tirx.IfThenElse(twice < 3, store, None)])
    func = tirx.PrimFunc([A.data, tx], body).with_attr("calling_conv", 2).with_attr("target", Target("metal"))
    [hidden] = hidden_conditions.hide_conditions(IRModule({"f": func})).functions.values()
    inlined = hidden.with_body(hidden.body[2])
    [restored] = hidden_conditions.restore_conditions(IRModule({"f": inlined})).functions.values()
    ir.assert_structural_equal(restored.body, tirx.IfThenElse(tx < 3, store, None))
    assert set(restored.attrs.keys()) == set(func.attrs.keys())


@pytest.mark.parametrize("target", ["metal", "hip"])
def test_tensors_that_only_conditions_read(target):
    """`flags` is written too, so that it is no tensor that is only read."""
    [kernel] = program(copy_once, target).kernels
    assert (kernel.read, kernel.written) == ({0, 1}, {0, 2})
