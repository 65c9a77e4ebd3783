"""Exported kernels: the same launches as the package's own, in a folder that needs no tilelang; the wheel; the Hub's layout."""

import importlib
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from launch.fakes import FakeCuda, compile_without_nvcc, library
from torch.nn.functional import ScalingType

from tilelang_ext import ahead, export
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.weights import HopperWeights
from tilelang_ext.kernels.scaled_mm.signature import to_plan

ROW = ScalingType.RowWise
TARGET = ahead.target_for("sm_90a")


@pytest.fixture(scope="module")
def calls():
    """Of each operator the calls of the fewest rows, for sizes that other tests lower too."""
    matmuls = ahead.calls_of([ahead.Model(matmuls=((256, 512),))], ["scaled_mm"], TARGET, max_rows=1)
    experts = ahead.calls_of([ahead.Model(ahead.Experts(4, 2, 128, 64))], ["mxfp4_moe"], TARGET, max_rows=1)
    return [matmuls[0], experts[0]]


@pytest.fixture(scope="module")
def folder(calls, tmp_path_factory):
    """An exported folder, whose cubins are headers alone."""
    patches = pytest.MonkeyPatch()
    compile_without_nvcc(patches)
    out = tmp_path_factory.mktemp("export")
    export.export(calls, "sm_90a", out)
    patches.undo()
    return out


@pytest.fixture
def aot(folder, monkeypatch):
    """The exported package, in this process, on the fake driver; and that driver."""
    cuda = FakeCuda()
    monkeypatch.syspath_prepend(str(folder))
    package = importlib.import_module("tilelang_ext_aot")
    face, table = (sys.modules[f"tilelang_ext_aot.export.face{name}"] for name in ("", ".table"))
    made = sys.modules["tilelang_ext_aot.launch.plan"].Launcher(library()[1], *cuda.torch)
    monkeypatch.setattr(table, "launcher", lambda: made)
    monkeypatch.setattr(table, "device_name", lambda number: "cpu")
    monkeypatch.setattr(face, "_check_device", lambda *arguments: None)
    monkeypatch.setattr(face, "check_moe", lambda *arguments: None)  # which wants a Hopper GPU; other tests have it
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for each in (face._MATMUL, face._MOE):
        each.__dict__.pop("plan", None)
        each.__dict__.pop("launch_directly", None)
    return package, cuda


def test_matmul_launches_the_same(aot, calls):
    """Through the table first, then directly; as the live plan with the variant that was exported."""
    package, cuda = aot
    [call, _] = calls
    a, b, scale_a, scale_b, _, _, out = call.arguments
    for _ in range(2):
        assert package.scaled_mm(a, b, scale_a, ROW, scale_b, ROW, out=out) is out
    fresh = package.scaled_mm(a, b, scale_a, ROW, scale_b, ROW)
    assert (fresh.shape, fresh.dtype) == (out.shape, out.dtype)
    ours = cuda.launches()
    assert len(ours) == 3
    assert len(cuda.lines("load")) == 1
    live = live_plan(cuda, call)
    live.launch(*to_plan(call.arguments))
    assert cuda.launches()[3] == ours[0] == ours[1]
    with pytest.raises(NotImplementedError, match=r"scaled_mm: kernels must have been exported for these sizes, .*; got key"):
        package.scaled_mm(a, b, scale_a.flatten(), ROW, scale_b, ROW)
    with pytest.raises(TypeError, match="scaled_mm: mat_a must be one of"):
        package.scaled_mm(a.float(), b, scale_a, ROW, scale_b, ROW)


def live_plan(cuda, call):
    added = []

    class Plan:
        key = staticmethod(lambda *arguments: plan.key(*arguments))
        add = staticmethod(lambda *arguments: added.append(arguments))

    plan = cuda.launcher.plan(export._RECIPES[call.operator], export.MEMBERS if call.operator == "scaled_mm" else None)
    patches = pytest.MonkeyPatch()
    compile_without_nvcc(patches)
    ahead.scaled_mm.add_call(Plan, call.problem, call.arguments)
    patches.undo()
    plan.add(*added[0])
    return plan


def test_experts_launch(aot, calls):
    package, cuda = aot
    [_, call] = calls
    x, ids, row_weights, *rest = call.arguments
    w13, w2 = ((*rest[i : i + 5], "bfloat16") for i in (0, 6))
    pair = package.HopperWeights(*w13, True), package.HopperWeights(*w2, False)
    out = torch.empty_like(x)
    activation = package.Activation()
    for _ in range(2):
        package.mxfp4_moe(x, ids, row_weights, *pair, activation=activation, out=out)
    first, second = cuda.launches()[:4], cuda.launches()[4:]
    assert first == second
    assert [done.kernel for done in first][:1] == ["moe_sort_kernel"]
    with pytest.raises(TypeError, match="mxfp4_moe: w13 must be HopperWeights; got HopperWeights; call prepare_mxfp4_weights"):
        package.mxfp4_moe(x, ids, row_weights, HopperWeights(*w13, True), pair[1], activation=activation)
    with pytest.raises(ValueError, match="mxfp4_moe: a_dtype must be None, x's dtype or an fp8 dtype"):
        package.mxfp4_moe(x, ids, row_weights, *pair, activation=activation, a_dtype=torch.float32)
    assert Activation() != activation, "the folder has classes of its own"


ALONE = """
import sys
sys.modules.update(dict.fromkeys(("tilelang", "tvm", "tilelang_ext")))  # importing one fails
sys.path.insert(0, sys.argv[1])
import torch, tilelang_ext_aot
from torch.nn.functional import ScalingType
from tilelang_ext_aot.launch.plan import launcher
launcher()
print(*map(len, tilelang_ext_aot.exported().values()))
a = torch.zeros(1, 512, dtype=torch.float8_e4m3fn)
b, row = torch.zeros(512, 256, dtype=torch.float8_e4m3fn), ScalingType.RowWise
try:
    tilelang_ext_aot.scaled_mm(a, b, torch.ones(1, 1), row, torch.ones(1, 256), row)
except NotImplementedError as error:
    print(error)
weights = tilelang_ext_aot.prepare_mxfp4_weights(torch.zeros(2, 64, 64, dtype=torch.uint8), torch.full((2, 64, 4), 120).byte())
print(tilelang_ext_aot.tile_for_hopper(weights).layout)
"""


def test_no_tilelang_is_needed(folder):
    """Not even to be imported; without a GPU the error says what the kernels are for."""
    done = subprocess.run([sys.executable, "-c", ALONE, folder], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "1 1",
        "scaled_mm: mat_a must be on an NVIDIA GPU, for which kernels were exported; got cpu; move the tensors, or install "
        "tilelang_ext",
        "hopper_bfloat16",
    ]


def test_wheel(folder, tmp_path):
    package = folder / export.PACKAGE
    with zipfile.ZipFile(export.wheel(package, tmp_path)) as wheel:
        names = wheel.namelist()
        metadata = wheel.read("tilelang_ext_aot-0.1.0.dist-info/METADATA").decode()
        record = wheel.read("tilelang_ext_aot-0.1.0.dist-info/RECORD").decode()
    assert {line.split(",")[0] for line in record.splitlines()} == set(names)
    assert sum(name.endswith(".cubin") for name in names) == len(list(package.glob("cubins/*")))
    assert "Requires-Dist: apache-tvm-ffi>=0.1.11\n" in metadata
    assert "tilelang\n" not in metadata
    assert not [name for name in names if "__pycache__" in name]


def test_layout_of_the_hub(folder, tmp_path):
    build = export.hub(folder / export.PACKAGE, tmp_path, "sm_90a")
    assert build.parent == tmp_path / "build"
    assert build.name.startswith("tvm-ffi01-cu130-")
    assert (build / "__init__.py").is_file()
    assert (build / export.PACKAGE / "__init__.py").is_file()
    assert "[tvm-ffi]" in (tmp_path / "build.toml").read_text()
    metadata = json.loads((build / "metadata.json").read_text())
    assert metadata["name"] == "tilelang-ext-aot"
    assert metadata["id"].startswith("tilelang_ext_aot_cuda_"), "the module's name in the process"
    assert metadata["backend"] == {"type": "cuda", "archs": ["9.0a"]}


def test_a_folder_is_not_overwritten(folder, calls):
    with pytest.raises(FileExistsError, match=r"export: .*tilelang_ext_aot must not exist; got a folder; remove it, or pass"):
        export.export(calls, "sm_90a", folder)


def test_tables_hold_no_device(folder):
    """A table is JSON, and what it names is there."""
    for operator in ("scaled_mm", "mxfp4_moe"):
        table = json.loads((folder / export.PACKAGE / "operators" / f"{operator}.json").read_text())
        for variant in table["variants"]:
            assert all((folder / export.PACKAGE / "cubins" / name).is_file() for name in variant["cubins"])
            assert variant["recipe"]["target"] == "sm_90a"
