"""T.mxfp4_scaled_matmul on Hopper: values of the CUDA text on the CPU, which kernels are rebuilt, machine code, a GPU."""

import logging
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import tilelang
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import Box, execute
from language.mxfp4_cases import activations, name_of, tiled, weights
from numeric import assert_close
from tvm.target import Target

from tilelang_ext import language as T
from tilelang_ext import reference
from tilelang_ext.formats import E2M1, BlockScaledLayout

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import moe
import mxfp4_scaled_matmul as by_tiles
import mxfp4_scaled_matmul_persistent as persistent
from mxfp4_scaled_matmul import FEW, MANY, SOME, Tile, scaled_matmul

ROOT = Path(__file__).parents[2]
ARCH = "sm_90a"
# The functions that the text calls, and for a CPU what they do in PTX.
FUNCTIONS = "".join(
    (ROOT / name).read_text()
    for name in (
        "testing/cuda/mxfp4_device.h",
        *(f"tilelang_ext/cuda/mxfp4_{part}.h" for part in ("decode", "mma", "wgmma")),
    )
)


def source_of(kernel, arch: str = ARCH) -> str:
    target = Target({"kind": "cuda", "arch": arch})
    with target:
        return tilelang.lower(kernel, target=target, enable_device_compile=False).kernel_source


def text_of(kernel, arch: str = ARCH) -> str:
    text = source_of(kernel, arch)
    return text[text.index('extern "C"') :]


def calls(text: str) -> list[str]:
    return re.findall(r"tilelang_ext::(\w+<[^>]*>)", text)


# --- values ----------------------------------------------------------------------------------------------------------


def run(kernel, grid, A, SA, W, SW, N, boxes=None) -> torch.Tensor:
    """Run the text of a kernel of the examples; C is poisoned."""
    C = torch.full((A.shape[0], N), torch.nan, dtype=torch.bfloat16)
    tensors = {"A": A, "scale_a": torch.ones(A.shape[0]) if SA is None else SA.flatten(), "W": W, "scale_w": SW, "C": C}
    execute(text_of(kernel), grid, tensors, boxes or {}, {}, functions=FUNCTIONS)
    return C


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "tile", "K", "fitting_rows"),
    [
        ("bfloat16", Tile(32, 128, 256), 640, 0),  # the stages are used twice
        ("fp8 per row", Tile(32, 128, 256), 384, 64),  # one warpgroup with scales in E4M3, one with scales of any size
        ("e5m2 per row", Tile(24, 192, 384), 256, 200),  # three warpgroups
    ],
)
def test_values(kind, tile, K, fitting_rows):
    """Two rows and two columns of tiles, neither full, over two blocks: each walks over several tiles."""
    M, N = tile.block_M + 8, tile.block_N + 8
    (A, SA, x), (W, SW) = activations(kind, M, K), weights(N, K)
    SW[:fitting_rows] = torch.randint(124, 134, (min(fitting_rows, N), K // 32), dtype=torch.uint8)
    SW[-1] = 0
    kernel = persistent.scaled_matmul(M, N, K, tile, 2, name_of(A))
    step = 128 // A.itemsize
    C = run(kernel, (2, 1), A, SA, W, SW, N, {"A": Box(tile.block_M, step), "W": Box(tile.block_N, step // 2)})
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="bfloat16")


@needs_compiler
@pytest.mark.parametrize(
    ("make", "tile", "M", "K"),
    [
        (partial(scaled_matmul, chained=True), Tile(16, 32, 128), 13, 1280),
        (by_tiles.dequant_matmul, Tile(8, 16, 128), 1, 640),
        (scaled_matmul, Tile(8, 16, 128), 5, 8 * 128 + 96),  # K ends inside a block, and rows of scales anywhere
        (scaled_matmul, Tile(5, 16, 128), 9, 64 * 128 + 64),  # more than 64 blocks of K; an odd tile
        (partial(scaled_matmul, chained=True), Tile(8, 16, 384), 5, 64 * 128 + 640),  # which are not divided among the warps
    ],
)
def test_values_of_few_rows(make, tile, M, K):
    """Scales that fit one factor, and rows that need two; the last block of K is one warp's alone, or is cut."""
    N = tile.block_N + 8
    (A, _, x), (W, SW) = activations("bfloat16", M, K), weights(N, K)
    SW[3], SW[tile.block_N :] = torch.randint(0, 248, (K // 32,), dtype=torch.uint8), 0
    C = run(make(M, N, K, tile), (2, -(-M // tile.block_M)), A, None, W, SW, N)
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="bfloat16")


@needs_compiler
def test_values_of_gathered_rows():
    """The example's kernels: gathered tokens, rows of scales anywhere, K of two steps and a half, and of one and a half."""
    tile, H, I, columns, tokens, experts, top_k = moe.Tile(24, 64, 128), 160, 96, 192, 11, 3, 2
    x, (topk_weights, topk_ids) = torch.randn(tokens, H).bfloat16(), torch.rand(tokens, experts).topk(top_k)
    (w13, _), (w2, _) = weights(experts * 2 * I, H), weights(experts * columns, I)
    s13, s2 = (torch.randint(119, 125, (len(w), w.shape[1] // 16), dtype=torch.uint8) for w in (w13, w2))
    rows = reference.moe_sort(topk_ids, topk_weights, experts, tile.block_M)
    blocks = len(rows.expert_ids)
    matrices = {"w13": w13, "scale13": s13, "w2": w2, "scale2": s2}
    tensors = {name: matrix.view(experts, -1, matrix.shape[1]) for name, matrix in matrices.items()}
    tensors |= {"x": x, "token_ids": rows.token_ids, "expert_ids": rows.expert_ids, "weights": rows.weights}
    hidden = torch.full((blocks * 24, I), torch.nan).bfloat16()
    tensors |= {"hidden": hidden, "y": torch.full((tokens, top_k, columns), torch.nan)}
    boxes = {"w13": Box(64, 32), "w2": Box(64, 32), "hidden": Box(24, 64)}
    first = moe.gate_up(tokens, H, I, experts, blocks, *tile, block_K=32)
    second = moe.down(tokens, top_k, columns, I, experts, blocks, *tile)
    for kernel, gathers in ((first, "true"), (second, "false")):
        text = text_of(kernel)
        consume, fetch = (call.partition("kBFloat16, ")[2] for call in calls(text))
        assert (consume, fetch) == ("24, 64, 1, 8>", f"24, 64, 8, 96, 1, {gathers}>")
        assert ("float even[" in text) == (kernel is first)  # gate and up, from registers
        execute(text, (2 * I // 64 if kernel is first else columns // 64, blocks), tensors, boxes, {}, functions=FUNCTIONS)
    mx = BlockScaledLayout.e8m0_k32()
    d13, d2 = (reference.dequantize(tensors[w], tensors[s], E2M1, mx) for w, s in (("w13", "scale13"), ("w2", "scale2")))
    token, slot = rows.token_ids & 0xFFFFFF, rows.token_ids >> 24
    for row in (token < tokens).nonzero().flatten().tolist():
        expert = rows.expert_ids[row // 24]
        want = reference.swiglu((d13[expert] @ x[token[row]].double())[None])[0]
        assert_close(hidden[row], want, dtype="bfloat16")
        want = d2[expert] @ hidden[row].double() * rows.weights[row].double()
        assert_close(tensors["y"][token[row], slot[row]], want, dtype="float32")
    assert not tensors["y"].isnan().any()


@needs_compiler
def test_values_of_two_products_in_one_kernel():
    """They take the same shared memory one after the other."""
    M, N, K = 5, 32, 512

    @T.prim_func
    def gated(
        A: T.Tensor((M, K), "bfloat16"),
        W: T.Tensor((2 * N, K // 2), "uint8"),
        scale_w: T.Tensor((2 * N, K // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, 16), threads=128) as block:
            j = block * 16
            gate_f = T.alloc_fragment((8, 16), "float32")
            up_f = T.alloc_fragment((8, 16), "float32")
            gate, up = slice(j, j + 16), slice(N + j, N + j + 16)
            T.mxfp4_scaled_matmul(A[0:8, 0:K], None, W[gate, 0 : K // 2], scale_w[gate, 0 : K // 32], gate_f, clear_accum=True)
            T.mxfp4_scaled_matmul(A[0:8, 0:K], None, W[up, 0 : K // 2], scale_w[up, 0 : K // 32], up_f, clear_accum=True)
            for i, k in T.Parallel(8, 16):
                gate_f[i, k] *= up_f[i, k]
            T.copy(gate_f, C[0, j])

    (A, _, x), (W, SW) = activations("bfloat16", M, K), weights(2 * N, K)
    C = torch.full((M, N), torch.nan)
    text = text_of(gated)
    assert calls(text) == ["mxfp4_mma<8, 16, 128, true, 3>"] * 2
    execute(text, (2, 1), {"A": A, "W": W, "scale_w": SW, "C": C}, {}, {}, functions=FUNCTIONS)
    both = reference.mxfp4_matmul(x, W, SW)
    assert_close(C, both[:, :N] * both[:, N:], dtype="float32")


# --- which kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "called"),
    [
        (scaled_matmul(300, 512, 1024, MANY), "mxfp4_consume<tl::DataType::kBFloat16, 256, 128, 2, 6>"),
        (scaled_matmul(300, 512, 1024, MANY, "float8_e4m3fn"), "mxfp4_consume<tl::DataType::kFloat8_e4m3, 256, 128, 2, 5>"),
        (
            scaled_matmul(300, 512, 1024, Tile(128, 128, 128), "float8_e5m2"),
            "mxfp4_consume<tl::DataType::kFloat8_e5m2, 128, 128, 1, 8>",
        ),
        (scaled_matmul(16, 512, 1024, Tile(16, 64, 128)), "mxfp4_consume<tl::DataType::kBFloat16, 16, 64, 1, 8>"),
        (scaled_matmul(16, 512, 1024, Tile(16, 64, 128), chained=True), "Mxfp4Mma<16, 64, 128, true, 3>"),  # which waits
        (scaled_matmul(300, 512, 1024, SOME), "mxfp4_mma<16, 32, 256, true, 2>"),
        (scaled_matmul(300, 512, 4096, FEW), "mxfp4_mma<8, 32, 256, true, 3>"),
        (scaled_matmul(300, 512, 4096, Tile(8, 32, 512)), "mxfp4_mma<8, 32, 512, true, 2>"),
        (scaled_matmul(300, 512, 4096, Tile(8, 32, 512), chained=True), "Mxfp4Mma<8, 32, 512, true, 1>"),  # and the next
        (scaled_matmul(300, 512, 4096, Tile(8, 16, 512), chained=True), "Mxfp4Mma<8, 16, 512, true, 2>"),
        (scaled_matmul(300, 512, 4096, Tile(16, 16, 512)), "mxfp4_mma<16, 16, 512, true, 1>"),  # or for another block
        (by_tiles.dequant_matmul(16, 512, 2880, SOME), "mxfp4_mma<16, 32, 256, false, 2>"),
        (persistent.dequant_matmul(300, 512, 1024, MANY, 2), "mxfp4_consume<tl::DataType::kBFloat16, 256, 128, 2, 6>"),
    ],
)
def test_all_of_k_is_one_call(kernel, called):
    assert calls(text_of(kernel)).count(called) == 1


def test_blocks_of_few_rows_share_an_sm():
    assert "__launch_bounds__(256, 3)" in text_of(scaled_matmul(16, 512, 1024, Tile(16, 64, 128)))
    assert "__launch_bounds__(256, 1)" in text_of(scaled_matmul(16, 512, 1024, Tile(64, 64, 128)))
    assert "__launch_bounds__(256, 2)" in text_of(scaled_matmul(1, 512, 1024, FEW))
    assert "__launch_bounds__(256, 2)" in text_of(scaled_matmul(16, 512, 1024, SOME))
    assert "__launch_bounds__(128, 2)" in text_of(scaled_matmul(16, 512, 1024, Tile(16, 64, 128), chained=True))


def test_a_producer_copies():
    text = text_of(persistent.scaled_matmul(300, 512, 1024, MANY, 2))
    consumer, _, producer = text.partition("warpgroup_reg_dealloc")
    assert calls(consumer) == ["mxfp4_consume<tl::DataType::kBFloat16, 256, 128, 2, 6>"]
    assert calls(producer) == ["mxfp4_fetch_scales<tl::DataType::kBFloat16, 128, 6, 96>"]
    assert producer.count("tl::tma_load") == 2
    assert len(re.findall(r"for \(int \w+ = 0; \w+ < 4; \+\+\w+\)", text)) == 3  # tiles of a block: each role walks alone


@pytest.mark.parametrize(
    ("kernel", "arch", "reason"),
    [
        (scaled_matmul(300, 512, 1024, Tile(128, 128, 256)), "sm_80", None),
        (scaled_matmul(300, 512, 288, Tile(128, 128, 256), "float8_e4m3fn"), ARCH, "no multiple of 128"),
        (scaled_matmul(300, 512, 1024, Tile(128, 96, 256)), ARCH, "128 x 96 is not divided among 256 threads"),
        (scaled_matmul(300, 512, 1024, Tile(256, 256, 256)), ARCH, "sums of a tile of 256 x 256 do not fit"),
        (scaled_matmul(300, 512, 1024, MANY, "float16"), ARCH, "A is float16"),
    ],
)
def test_other_kernels_decode_to_shared_memory(kernel, arch, reason, caplog):
    with caplog.at_level(logging.INFO, "tilelang_ext"):
        assert calls(text_of(kernel, arch)) == []
    assert [reason in record.getMessage() for record in caplog.records] == ([] if reason is None else [True])


def test_a_kernel_that_waits_asks_for_its_weights():
    text = text_of(by_tiles.dequant_matmul(16, 512, 1024, SOME, chained=True))
    before, _, behind = text.partition("cudaGridDependencySynchronize")
    asked = [*["mxfp4_prefetch<32, 256>"] * 2, "mxfp4_prefetch_part<16, 256>"]  # weights, scales; tokens
    assert calls(before) == ["Mxfp4Mma<16, 32, 256, true, 2>", *asked]
    assert "cudaTrigger" not in text  # the product does
    assert "product_0.run<true>(" in behind


def test_a_product_in_a_loop_is_declared_in_it():
    M, N, K = 8, 64, 512

    @T.prim_func
    def walks(
        A: T.Tensor((M, K), "bfloat16"),
        W: T.Tensor((N, K // 2), "uint8"),
        scale_w: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(2, threads=128) as block:
            C_f = T.alloc_fragment((8, 16), "float32")
            T.pdl_sync()
            for tile in T.serial(2):
                j = (block * 2 + tile) * 16
                rows = slice(j, j + 16)
                T.mxfp4_scaled_matmul(A[0:8, 0:K], None, W[rows, 0 : K // 2], scale_w[rows, 0 : K // 32], C_f, clear_accum=True)
                T.copy(C_f, C[0, j])

    before, _, behind = text_of(walks).partition("cudaGridDependencySynchronize")
    assert calls(before) == ["mxfp4_prefetch_part<8, 128>"]
    assert calls(behind) == ["mxfp4_mma<8, 16, 128, true, 3>"]


@pytest.mark.parametrize(
    ("module", "mark"), [(by_tiles, "kernel"), (by_tiles, "dequant"), (persistent, "kernel"), (persistent, "dequant")]
)
def test_kernels_of_the_examples_have_at_most_40_lines(module, mark):
    kernel = Path(module.__file__).read_text().partition(f"# [{mark}]\n")[2].partition(f"# [/{mark}]")[0].strip("\n")
    assert 10 < len(kernel.splitlines()) <= 40


@needs_nvcc
def test_weights_go_to_the_matrix_unit_from_registers():
    text = source_of(scaled_matmul(300, 512, 1024, MANY))
    [compiled] = compile_texts({"scaled_matmul": text}, ARCH).values()
    assert compiled.spilled == 0
    assert compiled.count("HGMMA") == 8  # two steps of four
    assert compiled.count("HMMA") == 0


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("kind", "tile", "M", "N", "K"),
    [
        ("bfloat16", (256, 128, 256), 300, 200, 1152),
        ("bfloat16", (128, 256, 256), 40, 512, 128),
        ("bfloat16", (64, 64, 128), 130, 72, 384),
        ("bfloat16", (16, 32, 512), 13, 150, 4224),
        ("bfloat16", (8, 16, 256), 1, 150, 640),
        ("fp8 per row", (256, 128, 256), 300, 200, 1152),
        ("e5m2 per row", (128, 128, 256), 40, 150, 384),
    ],
)
def test_values_on_a_hopper_gpu(kind, tile, M, N, K):
    """Rows end inside a tile; outputs and what lies beside them are poisoned; scales over the whole range and over a part."""
    (A, SA, x), (W, SW) = activations(kind, M, K), weights(N, K)
    for scales in (
        SW,
        torch.randint(124, 134, SW.shape, dtype=torch.uint8),
        torch.randint(60, 190, SW.shape, dtype=torch.uint8),
    ):
        C = torch.full((M, N), torch.nan)
        arguments = [A, torch.zeros(1, 1, dtype=torch.uint8) if SA is None else SA, W, scales, C]
        on_device = [argument.cuda() for argument in arguments]
        kernel = tiled(A, SA, W, *tile)
        assert name_of(A) in str(kernel)
        tilelang.compile(kernel, target={"kind": "cuda", "arch": "sm_90a"})(*on_device)
        # The matrix unit keeps fewer bits of a sum of fp8 products.
        assert_close(
            on_device[-1], reference.mxfp4_matmul(x, W, scales), dtype="float32", max_error=2e-3 if SA is None else 3e-2
        )


def in_steps(decodes, block_K=64, M=300, N=512, K=1024, block_M=128, block_N=128, first=0, factor=1.0):
    """C = A W^T in a pipelined loop of tiles: T.mxfp4_dequant and T.gemm, or T.mxfp4_scaled_matmul."""

    @T.prim_func
    def in_steps(
        A: T.Tensor((M, K), "bfloat16"),
        W: T.Tensor((N, K // 2), "uint8"),
        SW: T.Tensor((N, K // 32), "uint8"),
        C: T.Tensor((M, N), "float32"),
    ):
        with T.Kernel(T.ceildiv(N, block_N), T.ceildiv(M, block_M), threads=256) as (bx, by):
            A_s = T.alloc_shared((block_M, block_K), "bfloat16")
            W_s = T.alloc_shared((block_N, block_K // 2), "uint8")
            W_d = T.alloc_shared((block_N, block_K), "bfloat16")
            C_f = T.alloc_fragment((block_M, block_N), "float32")
            T.clear(C_f)
            for k in T.Pipelined(K // block_K, num_stages=3):
                T.copy(A[by * block_M, k * block_K], A_s)
                T.copy(W[bx * block_N, (k + first) * (block_K // 2)], W_s)
                groups = k * (block_K // 32)
                scales = SW[bx * block_N : (bx + 1) * block_N, groups : groups + block_K // 32]
                if decodes:
                    T.mxfp4_dequant(W_s, scales, W_d)
                    T.gemm(A_s, W_d, C_f, transpose_B=True)
                else:
                    T.mxfp4_scaled_matmul(A_s, None, W_s, scales, C_f)
                if factor != 1.0:
                    for i, j in T.Parallel(block_M, block_N):
                        C_f[i, j] *= factor
            T.copy(C_f, C[by * block_M, bx * block_N])

    return in_steps


@pytest.mark.parametrize("decodes", [True, False])
def test_a_loop_of_tiles_is_one_call(decodes):
    text = text_of(in_steps(decodes))
    [call] = re.findall(r"tilelang_ext::mxfp4_consume<tl::DataType::kBFloat16, 128, 128, 2, 8>\(.*\);", text)
    # The first scale of a block's rows, bytes from row to row, rows that are left, K.
    assert "(&(SW[(((int)blockIdx.x) * 4096)]))" in call
    assert call.endswith("32, (512 - (((int)blockIdx.x) * 128)), 1024);")
    loads = [load.rsplit(", ", 2)[1:] for load in re.findall(r"tl::tma_load\((.*)\);", text)]
    assert loads == [["(k * 64)", "(((int)blockIdx.y) * 128)"], ["(k * 32)", "(((int)blockIdx.x) * 128)"]]
    assert re.search(r"\+v_?\w*\.x", text)  # C is added to


@pytest.mark.parametrize("change", [{"first": 1}, {"factor": 0.5}])
@pytest.mark.parametrize("decodes", [True, False])
def test_a_loop_that_does_something_else_stays(decodes, change):
    """Weights of the next step, whose last is past the end; a sum that is multiplied in each step."""
    assert calls(text_of(in_steps(decodes, **change))) == []


@pytest.mark.cuda
@pytest.mark.parametrize("decodes", [True, False])
def test_values_of_a_loop_on_a_hopper_gpu(decodes):
    (A, _, x), (W, SW) = activations("bfloat16", 300, 1024), weights(512, 1024)
    C = torch.full((300, 512), torch.nan, device="cuda")
    kernel = tilelang.compile(in_steps(decodes), target={"kind": "cuda", "arch": "sm_90a"})
    kernel(A.cuda(), W.cuda(), SW.cuda(), C)
    assert_close(C, reference.mxfp4_matmul(x, W, SW), dtype="float32", max_error=2e-3)
