"""registration: one key per backend in the targets that users give, and a clear error where upstream's table is gone."""

import sys

import pytest
from tilelang.backend import module as backend_module
from tvm.target import Target

from tilelang_ext import registration
from tilelang_ext.cpu import backend as cpu
from tilelang_ext.cuda import backend as cuda
from tilelang_ext.metal import backend as metal
from tilelang_ext.rocm import backend as rocm

GIVEN = [
    (metal, {"kind": "metal", "keys": ["metal", "gpu"]}),
    (rocm, {"kind": "hip", "mcpu": "gfx942"}),
    (cuda, {"kind": "cuda", "arch": "sm_90a"}),
    (cpu, {"kind": "c"}),
]


@pytest.mark.parametrize(("backend", "given"), GIVEN, ids=[given["kind"] for _, given in GIVEN])
def test_a_target_gets_one_key(backend, given):
    target = backend.normalize_target(given)
    assert [key for key in target.keys if key.startswith(registration.KEY_PREFIX)] == [backend.lowering_key()]
    assert backend.normalize_target(target).keys == target.keys
    assert not registration.has_key(registration.without_key(target))


def test_each_backend_has_a_key_of_its_own():
    assert len({backend.lowering_key() for backend, _ in GIVEN}) == len(GIVEN)


@pytest.mark.skipif(sys.platform == "darwin", reason="of other systems")
def test_metal_declares_what_this_machine_compiles():
    """Host code in Objective-C is for macOS, and the backend that compiles text through MPS for where torch has it."""
    declared = registration.upstream_backend("metal")
    assert declared.host_codegen_hooks == {}
    assert [spec.is_available() for spec in declared.execution_backends if spec.name == "torch"] == [False]


def test_the_host_of_a_target_stays():
    target = Target(Target("c"), Target("llvm"))
    for changed in (registration.with_key(target, "tilelang_ext-0"), registration.without_key(target)):
        assert changed.host.kind.name == "llvm"


def test_the_key_follows_the_files(tmp_path):
    folder = tmp_path / "backend"
    folder.mkdir()
    (tmp_path / "passes").mkdir()
    (tmp_path / "program").mkdir()
    package = ("codes.py", "formats.py", "marks.py", "program/program.py", "registration.py", "passes/all.py")
    for name in (*package, "backend/pipeline.py"):
        (tmp_path / name).write_text("")
    registration.lowering_key.cache_clear()
    keys = [registration.lowering_key(folder)]
    for path in (folder / "pipeline.py", folder / "types.h", tmp_path / "marks.py", tmp_path / "passes" / "all.py"):
        path.write_text("changed")
        registration.lowering_key.cache_clear()
        keys.append(registration.lowering_key(folder))
    keys.append(registration.lowering_key(folder, "another library"))
    assert len(set(keys)) == 6


@pytest.mark.parametrize("table", [None, {}])
def test_a_tilelang_without_the_table(monkeypatch, table):
    monkeypatch.setattr(backend_module, "_BACKENDS", table)
    with pytest.raises(ImportError, match=r"needs tilelang\.backend\.module\._BACKENDS\['metal'\] .*; install"):
        registration.replace_pass_list("metal", "metal", lambda mod, target: mod)
