"""The arrows between rooms: who imports whom, and what kernels may not do. ROOMS is the table."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tilelang_ext"
UPSTREAM = ("tilelang", "tvm", "torch")
BACKENDS = ("metal", "rocm", "cuda", "cpu")
# Of an operator's package.
HOST_FILES = (
    *("__init__", "ahead", "arguments", "decode_launch", "experts", "launch", "operator"),
    *("prefill_arguments", "prefill_launch", "prefill_operator"),
    *("selection", "signature", "sm90_packing", "tuning", "weights"),
)
NO_ROOMS = {"utils", "common", "helpers", "misc"}


@dataclass(frozen=True)
class Room:
    """`may`: prefixes of our own modules that it may import, beside itself. `never`: modules of others that it may not."""

    may: tuple[str, ...]
    never: tuple[str, ...] = ()
    silent: bool = False  # calls no print


ROOMS = {
    "formats": Room((), never=UPSTREAM),  # what the bits mean: everybody imports it, so it imports nobody
    "marks": Room((), never=UPSTREAM),
    "codes": Room(("formats",)),  # the same bits in TIR
    "language": Room(("codes", "formats", "marks")),  # no branch on a target: a macro is the same on each
    "program": Room(()),
    "native": Room(()),
    "passes": Room(("codes", "formats", "marks")),  # what must hold of lowered TIR on every target
    "quantization": Room(("formats",)),
    "checkpoints": Room(("formats", "quantization")),
    "reference": Room(("formats", "quantization"), never=("tilelang", "tvm")),  # the truth, in plain torch
    **dict.fromkeys(
        BACKENDS, Room(("formats", "marks", "program", "native", "registration", "passes"))
    ),  # a backend serves any kernel
    "registration": Room(()),
    # It executes text, wherever that came from, and works where tilelang is not installed.
    "simulator": Room((), never=("tilelang", "tvm")),
    "simulation": Room(("metal", "rocm", "program", "simulator")),
    "launch": Room(("program", *BACKENDS)),
    "kernels": Room(()),  # the names of public functions and their modules, as text
    "kernels/sm90": Room(("language", "formats"), never=("torch",), silent=True),
    # An operator's package has two rooms: what runs on the device, and what runs before it on the host.
    "device file": Room(
        ("language", "codes", "formats", "marks", "kernels.sm90", "kernels.metal_tile"),
        never=("torch", "time", "timeit"),
        silent=True,
    ),
    "host file": Room(("launch", "reference", "formats", "quantization", "checkpoints"), never=("time", "timeit"), silent=True),
    "ahead": Room(("launch", "kernels")),  # kernels compiled before they are called
    "export": Room(("ahead", "launch", "kernels")),
    "tune": Room(("launch", "kernels")),
    "parallel": Room(("kernels",)),
    "integrations": Room(("kernels", "parallel")),
    "__init__": Room((*BACKENDS, "kernels")),  # registers the backends; operators are loaded by name
}


def room_of(module: tuple[str, ...]) -> tuple[str, str]:
    """Return the room of a module by its path inside the package, and the prefix of what belongs to the room itself."""
    if module[0] != "kernels" or len(module) < 3:
        return module[0], module[0]
    operator = f"kernels.{module[1]}"
    if module[1] == "sm90":
        return "kernels/sm90", operator
    return ("host file" if module[2] in HOST_FILES else "device file"), operator


def imports(text: str, package: str) -> list[str]:
    """Every module that a file of `package` imports, at any depth, under its full name."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]  # `from tilelang_ext import language` too
    return names


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(module: tuple[str, ...], text: str) -> list[str]:
    """Return what a file may not do: its imports by full name, and calls of print."""
    name, own = room_of(module)
    room = ROOMS[name]
    package = ".".join(["tilelang_ext", *module[:-1]])
    found = []
    for imported in imports(text, package):
        if imported.startswith("tilelang_ext."):
            ours = imported.removeprefix("tilelang_ext.")
            host = f"tilelang_ext.{own}."
            to_host = name == "device file" and any(within(imported, (host + file,)) for file in HOST_FILES)
            if not within(ours, (own, *room.may)) or to_host:
                found.append(imported)
        elif within(imported, room.never):
            found.append(imported)
    if room.silent:
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        found += ["print" for node in calls if getattr(node.func, "id", "") == "print"]
    return found


def module_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    assert not violations(module_of(path), path.read_text()), "see ROOMS"


def test_no_circle():
    """Modules can be put in an order in which each imports only those before it."""
    names = {".".join(["tilelang_ext", *module_of(path)]).removesuffix(".__init__"): path for path in FILES}
    arrows = {}
    for name, path in names.items():
        found = imports(path.read_text(), ".".join(["tilelang_ext", *module_of(path)[:-1]]))
        # `from package.module import name` gives package.module.name: the longest prefix that is a module.
        arrows[name] = {other for each in found if (other := longest(each, names)) not in (None, name)}
    while ends := {name for name, others in arrows.items() if not others & arrows.keys()}:
        arrows = {name: others for name, others in arrows.items() if name not in ends}
    assert not arrows, "these modules import each other, or one that does"


def longest(name: str, modules) -> str | None:
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def test_no_room_without_a_question():
    assert not {path.name for path in PACKAGE.rglob("*")} & {*NO_ROOMS, *(f"{name}.py" for name in NO_ROOMS)}
    assert {room_of(module_of(path))[0] for path in FILES} <= ROOMS.keys()


def test_code_generator_knows_no_kernel():
    operators = {path.parent.name for path in (PACKAGE / "kernels").glob("*/operator.py")}
    assert operators
    for path in (ROOT / "src" / "metal").iterdir():
        assert not operators & set(re.findall(r"\w+", path.read_text())), path.name


@pytest.mark.parametrize(
    ("module", "text", "found"),
    [
        ("formats", "from .quantization import pack", ["tilelang_ext.quantization.pack"]),
        ("marks", "import math\nfrom tilelang_ext.formats import E2M1\nimport torch", ["tilelang_ext.formats.E2M1", "torch"]),
        ("registration", "from tilelang_ext import native\nimport torch", ["tilelang_ext.native"]),
        ("language.moe", "from tilelang_ext.metal import layout", ["tilelang_ext.metal.layout"]),
        ("program", "import torch, tvm\nfrom tilelang_ext import formats", ["tilelang_ext.formats"]),
        ("reference", "import torch\nfrom tilelang_ext.metal import lower", ["tilelang_ext.metal.lower"]),
        ("reference", "import math\nimport torch\nfrom tilelang_ext import formats", []),
        ("metal.layout", "from tilelang_ext import language as T", ["tilelang_ext.language"]),
        ("metal.layout", "from ..kernels import moe", ["tilelang_ext.kernels.moe"]),
        ("metal.layout", "def late():\n    import tilelang_ext.kernels.moe", ["tilelang_ext.kernels.moe"]),
        ("metal.layout", "from tilelang import language as T\nfrom . import layout\nfrom tilelang_ext import program", []),
        ("rocm.program", "from tilelang_ext.metal import program", ["tilelang_ext.metal.program"]),
        ("cuda.fp8_gemm", "from tilelang_ext.launch.device import target_of", ["tilelang_ext.launch.device.target_of"]),
        ("cpu.gemm", "from tilelang_ext import rocm", ["tilelang_ext.rocm"]),
        ("simulator.execute", "import tilelang.language", ["tilelang.language"]),
        ("simulator.execute", "from tilelang_ext.metal import lower", ["tilelang_ext.metal.lower"]),
        ("launch.compile", "from tilelang_ext import metal, language", ["tilelang_ext.language"]),
        ("launch.plan", "from tilelang_ext.kernels import mxfp4_moe", ["tilelang_ext.kernels.mxfp4_moe"]),
        ("kernels.sm90.pipeline", "import torch\nfrom tilelang_ext import launch", ["torch", "tilelang_ext.launch"]),
        (
            "kernels.sm90.pipeline",
            "from tilelang_ext.kernels.scaled_mm import problem",
            ["tilelang_ext.kernels.scaled_mm.problem"],
        ),
        ("kernels.scaled_mm.tiled", "from torch import Tensor", ["torch.Tensor"]),
        ("kernels.scaled_mm.tiled", "from tilelang_ext.launch import compile", ["tilelang_ext.launch.compile"]),
        ("kernels.scaled_mm.tiled", "from . import operator", ["tilelang_ext.kernels.scaled_mm.operator"]),
        (
            "kernels.scaled_mm.tiled",
            "from tilelang_ext.kernels.mxfp4_moe import tiled",
            ["tilelang_ext.kernels.mxfp4_moe.tiled"],
        ),
        ("kernels.scaled_mm.tiled", "from tilelang_ext.kernels.sm90 import pipeline\nfrom . import problem", []),
        (
            "kernels.scaled_mm.operator",
            "from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe",
            ["tilelang_ext.kernels.mxfp4_moe.operator.mxfp4_moe"],
        ),
        ("kernels.scaled_mm.operator", "import time\nprint(time.time())", ["time", "print"]),
        ("kernels.scaled_mm.operator", "import torch\nfrom tilelang_ext import launch, reference\nfrom . import tiled", []),
        ("tune", "from tilelang_ext import metal", ["tilelang_ext.metal"]),
        ("parallel.expert", "from tilelang_ext.integrations import mlx", ["tilelang_ext.integrations.mlx"]),
        ("integrations.mlx_lm", "from tilelang_ext import launch", ["tilelang_ext.launch"]),
    ],
)
def test_the_rules_see_a_violation(module, text, found):
    assert violations(tuple(module.split(".")), text) == found


def borrowed(text: str, prefix: str) -> list[str]:
    """Return what a file takes from files whose names begin with `prefix`."""
    return [name for name in imports(text, "own") if any(part.startswith(prefix) for part in name.split("."))]


@pytest.mark.parametrize(("folder", "prefix"), [("testing", "test_"), ("benchmark", "bench_")])
def test_no_test_imports_a_test_and_no_bench_a_bench(folder, prefix):
    """What two of them share is a module of its own, so that neither is run or changed for the other's sake."""
    found = {str(path.relative_to(ROOT)): borrowed(path.read_text(), prefix) for path in (ROOT / folder).rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from metal.test_run import FakeArray", ["metal.test_run.FakeArray"]),
        ("from .test_run import FakeArray", ["own.test_run.FakeArray"]),
        ("from metal import test_run", ["metal.test_run"]),
        ("def late():\n    import test_run as t", ["test_run"]),
        ("from metal.recording import FakeArray\nimport testing", []),
    ],
)
def test_the_rule_sees_a_borrowed_name(text, found):
    assert borrowed(text, "test_") == found
