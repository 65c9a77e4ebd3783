"""`from tilelang_ext import language as T` is upstream's language and more, and importing it registers the backend only."""

import subprocess
import sys

import tilelang.language as upstream

from tilelang_ext import language as T


def test_superset_of_upstream():
    assert set(upstream.__all__) <= set(T.__all__)
    ours = {name for name in upstream.__all__ if getattr(T, name) is not getattr(upstream, name)}
    # The first takes packed E2M1 beside other types; the last two are of the type; the others say which tiles are unlike.
    assert ours <= {"gemm_blockscaled", "copy", "atomic_add", "atomic_max", "atomic_min", "max_value", "min_value"}
    assert len(T.__all__) == len(set(T.__all__))


def test_import_changes_nothing_but_what_it_registers():
    program = """
import tilelang, tilelang.language as L
from tilelang.backend import module
from tilelang.tileop.gemm import registry
language, backends, impls = dict(vars(L)), dict(module._BACKENDS), {impl.name: impl for impl in registry._GEMM_IMPLS}
import tilelang_ext
assert {k for k in vars(L) if vars(L)[k] is not language.get(k)} <= {"__warningregistry__"}, "upstream's language patched"
replaced = {n for n in backends if module._BACKENDS[n] is not backends[n]}
assert replaced == {"cpu", "cuda", "metal", "rocm"}, "other backends replaced"
now = {impl.name: impl for impl in registry._GEMM_IMPLS}
assert len(now) == len(registry._GEMM_IMPLS), "a name registered twice"
assert now.keys() - impls.keys() == {"tilelang_ext.cpu"} and not impls.keys() - now.keys(), now.keys() ^ impls.keys()
changed = {name for name in impls if now[name] is not impls[name]}
metal, rocm = {"metal.simdgroup", "metal.cooperative_tensor"}, {"rocm.mfma", "rocm.wmma"}
assert changed == {*metal, *rocm, "cuda.mma", "cuda.wgmma", "cuda.fma", "cpu.scalar"}, changed
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_tilelang_is_refused_with_one_message():
    program = """
import importlib.metadata as metadata
version = metadata.version
metadata.version = lambda name: "0.1.13" if name == "tilelang" else version(name)
import tilelang_ext
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    message = "tilelang_ext: needs tilelang 0.1.14 or 0.1.15; got 0.1.13; run `pip install tilelang==0.1.15`"
    assert message in done.stderr.splitlines()[-1]
