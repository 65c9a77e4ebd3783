"""Regenerate the code blocks of docs/design/architecture.md: what one kernel becomes at every step.

    python docs/update_architecture.py            # rewrite the document
    python docs/update_architecture.py --check    # say whether it is up to date

A block is the fence after a line `<!-- generated: name -->`. testing/test_architecture_doc.py compares the same text.
"""

import inspect
import re
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tilelang
import torch
from tvm.ir.instrument import pass_instrument
from tvm.ir.transform import PassContext

from tilelang_ext import language as T
from tilelang_ext import metal, simulate
from tilelang_ext.metal.layout import SIMDGROUP_MATRIX
from tilelang_ext.metal.program import metal_target

DOCUMENT = Path(__file__).resolve().parent / "design" / "architecture.md"
WIDTH = 128
LEFT_OUT = ("#", "T.func_attr", "T.sblock_attr", "T.reads()", "T.writes()", "@I.ir_module", "class Module", "ty =", "tz =")


def kernel():
    @T.prim_func
    def tile_matmul(
        A: T.Tensor((64, 32), "float8_e4m3fn"),
        B: T.Tensor((32, 64), "float8_e4m3fn"),
        scale: T.Tensor((64,), "float32"),
        C: T.Tensor((64, 64), "float16"),
    ):
        with T.Kernel(1, threads=128):
            A_s = T.alloc_shared((64, 32), "float8_e4m3fn")
            B_s = T.alloc_shared((32, 64), "float8_e4m3fn")
            C_f = T.alloc_fragment((64, 64), "float32")
            T.copy(A, A_s)
            T.copy(B, B_s)
            T.gemm(A_s, B_s, C_f, clear_accum=True)
            for i, j in T.Parallel(64, 64):
                C_f[i, j] *= scale[i]
            T.copy(C_f, C)

    return tile_matmul


def generate() -> dict[str, str]:
    """Return the text of every block by name; the same for every supported tilelang."""
    func = kernel()
    program = metal.lower(func)
    return {
        "kernel": _source(),
        "lanes": _lanes(),
        "tile operators lowered": _after_tile_operators(func),
        "device": _shorten(tilelang.lower(func, target=metal_target("metal")).device_mod.script()),
        "helper": _helper(program.source),
        "metal": program.get_kernel_source().rstrip(),
        "report": _report(program),
    }


def _source() -> str:
    lines = inspect.getsource(kernel).splitlines()[1:-2]
    return "\n".join(line.removeprefix("    ") for line in lines).rstrip()


def _lanes() -> str:
    rows = []
    for i in range(8):
        rows.append("  ".join(f"{SIMDGROUP_MATRIX.lane(i, j):2}.{SIMDGROUP_MATRIX.element(i, j)}" for j in range(8)))
    return "\n".join(rows)


def _after_tile_operators(func) -> str:
    seen = []

    @pass_instrument
    class Record:
        def run_after_pass(self, mod, info):
            if info.name == "tl.LowerTileOp":
                seen.append(mod.script())

    with PassContext(instruments=[Record()]):
        metal.lower(func)
    lines = _shorten(seen[0]).splitlines()
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith('with T.sblock("tilelang_root")'))
    return textwrap.dedent("\n".join(lines[start:]))


def _shorten(script: str) -> str:
    """Without attributes and boilerplate; lines cut before the word that crosses WIDTH."""
    kept = [line.rstrip() for line in script.splitlines() if line.strip() and not line.strip().startswith(LEFT_OUT)]
    indent = min(len(line) - len(line.lstrip()) for line in kept)
    kept = [line[indent:] for line in kept]
    return "\n".join(line if len(line) <= WIDTH else re.sub(r"\w*$", "...", line[: WIDTH - 4]) for line in kept)


def _helper(source: str) -> str:
    start = source.index("//")
    return source[start : source.index("[[max_total_threads", start)].rstrip()


def _report(program) -> str:
    torch.manual_seed(0)
    A, B, scale = torch.randn(64, 32).to(torch.float8_e4m3fn), torch.randn(32, 64).to(torch.float8_e4m3fn), torch.rand(64)
    C = torch.full((64, 64), float("nan"), dtype=torch.float16)
    report = simulate(program, A, B, scale, C)
    error = (C.double() - scale.double()[:, None] * (A.double() @ B.double())).abs().max()
    return f"{report}\nwithin 0.01 of float64: {bool(error < 0.01)}"


def update(document: str, blocks: dict[str, str]) -> str:
    """Return the document with every generated block replaced."""
    for name, text in blocks.items():
        pattern = re.compile(rf"(<!-- generated: {re.escape(name)} -->\n```\w*\n).*?(\n```)", re.S)
        document, found = pattern.subn(lambda match, text=text: match[1] + text + match[2], document)
        if found != 1:
            raise SystemExit(f"{DOCUMENT.name}: must hold one block `<!-- generated: {name} -->`; got {found}; add it")
    return document


if __name__ == "__main__":
    before = DOCUMENT.read_text()
    after = update(before, generate())
    if "--check" in sys.argv:
        sys.exit(f"{DOCUMENT.name}: out of date; run python docs/update_architecture.py" if before != after else 0)
    DOCUMENT.write_text(after)
