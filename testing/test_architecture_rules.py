"""The arrows between rooms: which part of the package may import which, and what kernels may not do."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tilelang_ext"
BACKENDS = ("metal", "rocm", "cuda", "cpu")

# room: what it may not import, as prefixes of module names; a reason each
FORBIDDEN = {
    **dict.fromkeys(("formats", "marks"), ("tilelang_ext", "tilelang", "tvm", "torch")),  # everybody imports them
    # It executes text, wherever that came from, and works where tilelang is not installed.
    "simulator": ("tilelang", "tvm", "tilelang_ext.language", "tilelang_ext.kernels", *(f"tilelang_ext.{b}" for b in BACKENDS)),
    "kernels": ("time", "timeit"),  # benchmarks time
}
# room: all that it may import besides the standard library
UPSTREAM = ("tilelang", "tvm", "torch")
BELOW_BACKENDS = tuple(f"tilelang_ext.{room}" for room in ("formats", "marks", "native", "program", "registration"))
ALLOWED = {
    "reference": ("torch", "tilelang_ext.formats", "tilelang_ext.quantization"),  # the truth, in plain torch
    # No target branches: a macro is the same on each.
    "language": (*UPSTREAM, *(f"tilelang_ext.{room}" for room in ("formats", "marks", "language"))),
    **dict.fromkeys(("program", "registration"), UPSTREAM),  # any backend stands on them
    **{backend: (*UPSTREAM, *BELOW_BACKENDS, f"tilelang_ext.{backend}") for backend in BACKENDS},  # and not one another
}
NO_ROOMS = {"utils", "common", "helpers", "misc"}


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


def violations(room: str, text: str, package: str) -> list[str]:
    found = [name for name in imports(text, package) if within(name, FORBIDDEN.get(room, ()))]
    if room in ALLOWED:
        own = [name for name in imports(text, package) if name.split(".")[0] in ("tilelang_ext", "tilelang", "tvm", "torch")]
        found += [name for name in own if not within(name, ALLOWED[room])]
    if room == "kernels":
        found += [
            "print"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    package = ".".join(["tilelang_ext", *parts[:-1]])
    assert not violations(parts[0], path.read_text(), package), "see the import rules in docs/design/architecture.md"


def test_no_room_without_a_question():
    assert not {path.name for path in PACKAGE.rglob("*")} & {*NO_ROOMS, *(f"{name}.py" for name in NO_ROOMS)}


def test_code_generator_knows_no_kernel():
    kernels = {path.stem for path in (PACKAGE / "kernels").glob("*.py")} - {"__init__"}
    for path in (ROOT / "src" / "metal").iterdir():
        assert not kernels & set(re.findall(r"\w+", path.read_text())), path.name


@pytest.mark.parametrize(
    ("room", "text", "found"),
    [
        ("metal", "from tilelang_ext import language as T", ["tilelang_ext.language"]),
        ("language", "from ..marks import READ_ONCE\nfrom ..rocm import gemm", ["tilelang_ext.rocm.gemm"]),
        ("rocm", "from tilelang_ext.metal.program import Parameter", ["tilelang_ext.metal.program.Parameter"]),
        ("program", "import torch\nfrom tilelang_ext.formats import E2M1", ["tilelang_ext.formats.E2M1"]),
        ("cuda", "from tilelang_ext.rocm import gemm\nfrom tilelang_ext import marks", ["tilelang_ext.rocm.gemm"]),
        ("registration", "from tilelang_ext import native\nimport torch", ["tilelang_ext.native"]),
        ("metal", "from ..kernels import moe", ["tilelang_ext.kernels.moe"]),
        ("metal", "def late():\n    import tilelang_ext.kernels.moe", ["tilelang_ext.kernels.moe"]),
        ("metal", "from tilelang import language as T\nfrom . import layout", []),
        ("simulator", "import tilelang.language", ["tilelang.language"]),
        ("simulator", "from tilelang_ext.metal import lower", ["tilelang_ext.metal.lower"]),
        ("formats", "from .quantization import pack", ["tilelang_ext.quantization.pack"]),
        ("marks", "import math\nfrom tilelang_ext.formats import E2M1\nimport torch", ["tilelang_ext.formats.E2M1", "torch"]),
        ("reference", "import torch\nfrom tilelang_ext.metal import lower", ["tilelang_ext.metal.lower"]),
        ("reference", "import math\nimport torch\nfrom tilelang_ext import formats", []),
        ("kernels", "import time\nprint(time.time())", ["time", "print"]),
    ],
)
def test_the_rules_see_a_violation(room, text, found):
    package = f"tilelang_ext.{room}" if room in (*BACKENDS, "language", "kernels") else "tilelang_ext"
    assert violations(room, text, package) == found


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
