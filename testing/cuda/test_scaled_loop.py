"""Loops of T.fp8_scaled_matmul on Hopper: values of the CUDA text on the CPU, its structure and machine code, what is left."""

# Without `from __future__ import annotations`: prim_funcs read their annotations.

import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.kernels import lower
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import Box, execute
from numeric import assert_close
from tilelang import tvm
from tvm import IRModule, tirx
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext import reference
from tilelang_ext.cuda.scaled_loop import specialize_scaled_loops
from tilelang_ext.formats import BlockScaledLayout as L

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import fp8_scaled_matmul_persistent as example
from fp8_scaled_matmul_persistent import BLOCKS, ROWS, SMALL, TALL, WIDE, Tile

ROOT = Path(__file__).resolve().parents[2]
ARCH = "sm_90a"
F8 = "float8_e4m3fn"
TENSORS = (L.per_tensor(), L.per_tensor())
ROWS_AND_BLOCKS = (L.per_row(), L.block(128, 128))


def operands(M, N, K, layouts):
    """Random codes and scales, every scale different."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for rows, layout in zip((M, N), layouts, strict=True):
        made.append(torch.randn(rows, K, generator=generator).to(torch.float8_e4m3fn))
        made.append(torch.rand(layout.scale_shape(rows, K), generator=generator) + 0.5)
    return made


def is_specialized(text: str) -> bool:
    return "full[" in text and "empty[" in text


# --- values ----------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("layouts", "tile", "K", "fast"),
    [
        (ROWS, Tile(128, 256, 2), 512, True),  # accumulators stay in the matrix unit
        (TENSORS, Tile(128, 256, 3), 640, True),  # stages that do not divide the steps
        (BLOCKS, Tile(128, 256, 2), 256, True),  # factors of every step: never summed in the unit; two blocks of columns
        (ROWS, Tile(256, 128, 4, store_N=32), 512, False),  # two pieces of rows
        (ROWS, Tile(128, 256, 2), 384, False),  # two pieces of columns, a step left over
        (BLOCKS, Tile(256, 128, 4, store_N=32), 640, False),
        (ROWS, Tile(128, 128, 3), 640, False),  # two products in flight
        (BLOCKS, Tile(64, 64, 2, 128), 512, False),  # one warpgroup
        (ROWS, Tile(64, 64, 4, 256), 128, False),  # two warpgroups share 64 rows; fewer steps than stages
        (ROWS_AND_BLOCKS, Tile(128, 128, 2), 256, False),  # A's scales are of all K, B's of a step
    ],
)
def test_values(layouts, tile, K, fast):
    """Two rows and two columns of tiles, neither full, over two blocks: each walks over several tiles."""
    M, N = tile.block_M + 40, tile.block_N + 8
    A, scale_a, B, scale_b = operands(M, N, K, layouts)
    C = torch.full((M, N), torch.nan, dtype=torch.bfloat16)
    text = lower(example.scaled_matmul(M, N, K, *layouts, tile, num_blocks=2, use_fast_accum=fast), ARCH)
    tensors = {"A": A, "scale_a": scale_a, "B": B, "scale_b": scale_b, "C": C}
    boxes = {"A": Box(tile.block_M, 128), "B": Box(tile.block_N, 128), "C": Box(tile.block_M, tile.store_N)}
    assert is_specialized(text)
    execute(text, (2, 1), tensors, boxes, {})
    assert_close(C, reference.scaled_matmul(A, scale_a, B, scale_b, *layouts), dtype="bfloat16")


def plain(
    M, N, K, begin=0.0, block_M=128, block_N=128, num_stages=2, threads=256, K_tile=128, swizzle=False, **options
):  # fmt: skip
    """A kernel without a persistent loop, whose row of each scale is a variable; C begins at `begin`."""

    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), F8),
        SA: T.Tensor((M,), "float32"),
        B: T.Tensor((N, K), F8),
        SB: T.Tensor((N,), "float32"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=threads) as (bx, by):
            A_s = T.alloc_shared((block_M, K_tile), F8)
            B_s = T.alloc_shared((block_N, K_tile), F8)
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            if swizzle:
                T.use_swizzle(4)
            T.fill(C_f, begin)
            for k in T.Pipelined(T.ceildiv(K, K_tile), num_stages=num_stages):
                row = by * block_M
                T.copy(A[row, k * K_tile], A_s)
                T.copy(B[bx * block_N, k * K_tile], B_s)
                T.fp8_scaled_matmul(
                    A_s,
                    SA[row : row + block_M],
                    B_s,
                    SB[bx * block_N : (bx + 1) * block_N],
                    C_f,
                    transpose_B=True,
                    **options,
                )
            T.copy(C_f, C[by * block_M, bx * block_N])

    return kernel


@needs_compiler
@pytest.mark.parametrize("symbolic", ["M", "K"])
def test_what_c_held_is_not_scaled(symbolic):
    M, N, K = 168, 136, 384
    text = lower(plain(T.dynamic("M") if symbolic == "M" else M, N, K if symbolic == "M" else T.dynamic("k") * 128, 3.0), ARCH)
    A, scale_a, B, scale_b = operands(M, N, K, ROWS)
    C = torch.full((M, N), torch.nan)
    assert is_specialized(text)
    tensors = {"A": A, "SA": scale_a.reshape(M), "B": B, "SB": scale_b.reshape(N), "C": C}
    execute(text, (2, 2), tensors, {"A": Box(128, 128), "B": Box(128, 128)}, {"M": M, "k": K // 128})
    expected = reference.scaled_matmul(A, scale_a, B, scale_b, *ROWS) + 3
    assert_close(C, expected, dtype="float32", max_error=1e-5, rms_error=1e-5)


def test_the_guide_shows_the_kernel_of_the_example():
    source = Path(example.__file__).read_text()
    kernel = source.partition("# [kernel]\n")[2].partition("# [/kernel]")[0].strip("\n")
    assert kernel in (ROOT / "docs" / "guide" / "fp8_scaled_matmul.md").read_text()
    assert len(kernel.splitlines()) <= 40


# --- text and machine code -------------------------------------------------------------------------------------------


def loops(text: str) -> list[str]:
    """Return the loops over K: of the consumers, of the warp that loads, of those that fetch factors."""
    found = []
    for match in re.finditer(r"\n( +)for \(int k(?:_\d+)? = 0;", text):
        found.append(text[match.start() : text.index(f"\n{match[1]}}}", match.end())])
    return found


@pytest.mark.parametrize("fast", [True, False])
def test_scales_of_all_k_are_read_behind_the_loop(fast):
    consumer, producer = loops(lower(plain(256, 256, 1024, swizzle=True, use_fast_accum=fast), ARCH))
    for scale in ("SA", "SB"):
        assert scale not in consumer + producer
    assert "tma_load" in producer
    assert consumer.count("wait_wgmma<1>" if fast else "wait_wgmma<0>") == 1
    assert ("partial" in consumer) is not fast


def test_scales_of_a_step_are_fetched_by_warps_of_their_own():
    """The warp that copies tiles stores nothing: upstream puts a barrier of memory between a store and a copy."""
    consumer, loader, fetcher = loops(lower(example.scaled_matmul(512, 256, 1024, *BLOCKS, TALL, 2), ARCH))
    assert not re.search(r"scale_[ab]|tma_load", consumer)
    assert "tma_load" in loader
    assert "fence_proxy" not in loader
    assert fetcher.count("(float4*)(scale_a") == 3
    assert fetcher.count("(float4*)(scale_b") == 1


def test_the_way_of_sums():
    """Where two products fit in registers, the second is issued before the first is added."""
    consumer, _ = loops(lower(plain(256, 256, 1024), ARCH))
    assert [int(n) for n in re.findall(r"wait_wgmma<(\d)>", consumer)] == [1, 0]
    consumer, _ = loops(lower(plain(512, 256, 1024, block_M=256), ARCH))
    assert [int(n) for n in re.findall(r"wait_wgmma<(\d)>", consumer)] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("layouts", "tile"),
    [(ROWS, TALL), (BLOCKS, TALL), (ROWS, Tile(192, 128, 2, 384)), (BLOCKS, Tile(192, 128, 2, 384))],
)
def test_registers_suffice(layouts, tile):
    """The consumers take no more than the producer gives up of the block's registers, else they wait for ever."""
    text = lower(example.scaled_matmul(768, 256, 1024, *layouts, tile, 2), ARCH)
    threads = int(re.search(r"__launch_bounds__\((\d+), 1\)", text)[1])
    [consumer], [producer] = (re.findall(rf"warpgroup_reg_{change}<(\d+)>", text) for change in ("alloc", "dealloc"))
    assert threads == tile.threads + 128
    assert int(consumer) * tile.threads + int(producer) * 128 <= 65536 // threads // 8 * 8 * threads


@needs_nvcc
def test_instructions():
    """The kernels of the example: warpgroup products that are not serialized, fed by TMA; no register spilled."""
    cases = {"fast": (4096, ROWS, WIDE, True), "rows": (4096, ROWS, TALL, False), "blocks": (4096, BLOCKS, TALL, False)}
    cases |= {"few_rows": (128, ROWS, SMALL, False), "few_blocks": (128, BLOCKS, SMALL, False)}
    texts = {}
    for name, (M, layouts, tile, fast) in cases.items():
        kernel = example.scaled_matmul(M, 4096, 7168, *layouts, tile, 132, use_fast_accum=fast)
        texts[name] = lower(kernel.with_attr("global_symbol", name), ARCH)
    for name, kernel in compile_texts(texts, ARCH).items():
        assert kernel.count("QGMMA"), name
        assert kernel.count("UTMALDG"), name
        assert kernel.count("UTMASTG"), name
        assert kernel.spilled == 0, name


# --- what is left as it was ------------------------------------------------------------------------------------------


def with_scales_in_shared_memory(M=256, N=256, K=512):
    @T.prim_func
    def kernel(
        A: T.Tensor((M, K), F8), SA: T.Tensor((M, K // 128), "float32"), B: T.Tensor((N, K), F8),
        SB: T.Tensor((N // 128, K // 128), "float32"), C: T.Tensor((M, N), "float32"),
    ):  # fmt: skip
        with T.Kernel(N // 128, M // 128, threads=256) as (bx, by):
            A_s, B_s = T.alloc_shared((128, 128), F8), T.alloc_shared((128, 128), F8)
            SA_s = T.alloc_shared((128, 1), "float32")
            C_f = T.alloc_fragment((128, 128), "float32")
            T.clear(C_f)
            for k in T.Pipelined(K // 128, num_stages=2):
                T.copy(A[by * 128, k * 128], A_s)
                T.copy(B[bx * 128, k * 128], B_s)
                T.copy(SA[by * 128, k], SA_s)
                T.fp8_scaled_matmul(
                    A_s, SA_s, B_s, SB[bx : bx + 1, k : k + 1], C_f, transpose_B=True, scale_layout=BLOCKS
                )  # fmt: skip
            T.copy(C_f, C[by * 128, bx * 128])

    return kernel


def with_statement(what: str, M=256, N=256, K=512):
    """A kernel with one statement beside its loop."""

    @T.prim_func
    def kernel(A: T.Tensor((M, K), F8), S: T.Tensor((1,), "float32"), B: T.Tensor((N, K), F8), C: T.Tensor((M, N), "float32")):
        with T.Kernel(N // 128, M // 128, threads=256) as (bx, by):
            A_s, B_s = T.alloc_shared((128, 128), F8), T.alloc_shared((128, 128), F8)
            C_f = T.alloc_fragment((128, 128), "float32")
            first = T.alloc_local((1,), "int32")
            T.clear(C_f)
            first[0] = 0
            if what == "a barrier":
                T.sync_threads()
            if what == "another write":
                A[by * 128, 0] = B[0, 0]
            for k in T.Pipelined(K // 128, num_stages=2):
                T.copy(A[by * 128 + (first[0] if what == "a local index" else 0), k * 128], A_s)
                T.copy(B[bx * 128, k * 128], B_s)
                T.fp8_scaled_matmul(A_s, S, B_s, S, C_f, transpose_B=True)
            if what == "another read":
                C_f[0, 0] = C_f[0, 0] + T.cast(A_s[0, 0], "float32")
            T.copy(C_f, C[by * 128, bx * 128])

    return kernel


LEFT = [
    ("one stage", plain(256, 256, 512, num_stages=1), "its loop is not one of T.Pipelined with num_stages of 2 or more"),
    ("a step of 64", plain(256, 256, 512, K_tile=64), "a step is 64 of K, not 128"),
    ("rows of 8 bytes", plain(256, 256, 520), "rows of A are no multiple of 16 bytes apart"),
    ("half a warpgroup", plain(256, 256, 512, block_M=64, threads=64), "its threads are no whole warpgroups"),
    ("too many accumulators", plain(256, 512, 512, block_M=256, block_N=256), "need too many registers"),
    ("scales in shared memory", with_scales_in_shared_memory(), "its loop has 3 copies and 1 products"),
    ("a barrier", with_statement("a barrier"), "it calls .*sync.* outside of the loop"),
    ("another write", with_statement("another write"), "it writes what the loop reads"),
    ("a local index", with_statement("a local index"), "what it copies depends on first"),
    ("another read", with_statement("another read"), "A_s is used outside of the loop"),
]


def specialized(kernel, arch=ARCH, **pass_configs):
    """Return the function behind the pass."""
    with tvm.transform.PassContext(config=pass_configs):
        mod = specialize_scaled_loops(IRModule({"kernel": kernel}), Target({"kind": "cuda", "arch": arch}))
    return mod["kernel"]


@pytest.mark.parametrize(("kernel", "reason"), [row[1:] for row in LEFT], ids=[row[0] for row in LEFT])
def test_other_kernels_are_left_and_the_reason_is_logged(kernel, reason, caplog):
    with caplog.at_level(logging.INFO, "tilelang_ext"):
        assert specialized(kernel).same_as(kernel)
    [record] = caplog.records
    assert re.search(f"kernel: T.fp8_scaled_matmul is lowered step by step: .*{reason}", record.getMessage())


def test_a_user_may_turn_it_off():
    kernel = plain(256, 256, 512)
    assert not specialized(kernel).same_as(kernel)
    for config in ("tl.disable_warp_specialized", "tl.disable_wgmma", "tl.disable_tma_lower"):
        assert specialized(kernel, **{config: True}).same_as(kernel)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_100a", "sm_120a"])
def test_other_architectures_keep_their_kernels(arch):
    kernel = plain(256, 256, 512)
    assert specialized(kernel, arch).same_as(kernel)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_step_is_lowered_as_without_the_mark(arch):
    """No pass of upstream's reads it: of a kernel that is left as it was, on sm_90, and of another architecture."""
    kernel = plain(256, 256, 512, block_M=64, block_N=64, num_stages=1)
    assert lower(kernel, arch) == lower(without_marks(kernel), arch)


def without_marks(func: tirx.PrimFunc) -> tirx.PrimFunc:
    def strip(node):
        annotations = {key: value for key, value in (node.annotations or {}).items() if key != "scaled_product"}
        if isinstance(node, tirx.Call):
            return tirx.Call(node.dtype, node.op, node.args, annotations)
        bounds = node.loop_var, node.min, node.extent, node.kind, node.body, node.thread_binding
        return tirx.For(*bounds, annotations)

    def replace(node):
        inner = node.value if isinstance(node, tirx.Evaluate) else node
        if not isinstance(inner, (tirx.Call, tirx.For)) or "scaled_product" not in (inner.annotations or {}):
            return None
        return tirx.Evaluate(strip(inner)) if isinstance(node, tirx.Evaluate) else strip(inner)

    return func.with_body(tirx.stmt_functor.ir_transform(func.body, None, replace, ["tirx.Evaluate", "tirx.For"]))
