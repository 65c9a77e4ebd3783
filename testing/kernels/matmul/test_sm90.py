"""The kernels for Hopper: values by running their CUDA text on the CPU, the machine code, which one a problem gets."""

import re

import pytest
import torch
import torch.nn.functional as F
from cuda.execute import needs_compiler
from cuda.kernels import lower
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import GIVING, Box, execute
from kernels.matmul.operands import ALL, BF16, FP16, FP32, operands, problem
from numeric import assert_close

from tilelang_ext import reference
from tilelang_ext.kernels.matmul import operator, pad, sm90_config, sm90_persistent, sm90_vecmat, sum_splits, tiled, turn
from tilelang_ext.kernels.matmul.problem import Epilogue
from tilelang_ext.kernels.matmul.sm90_block import WGMMA_M
from tilelang_ext.kernels.matmul.sm90_config import BLOCK_K, Config
from tilelang_ext.kernels.matmul.sm90_persistent import ARCH, PASS_CONFIGS

needs_clusters = pytest.mark.skipif(not sm90_config.CLUSTERS, reason="tilelang 0.1.14 has no clusters")
JOINING = """
static void tilelang_ext_write(void* memory, int index, float value) { ((float*)memory)[index] = value; }
static void tilelang_ext_add_group(void* memory, int index, int block, float* sum) {
  for (int i = 0; i < 8; ++i) sum[i] += ((float*)in_block(memory, block))[index + i];
}
"""
DTYPES = {"bfloat16": BF16, "float16": FP16, "float32": FP32}


def text_of(make, *arguments, name="matmul"):
    return lower(make(*arguments).with_attr("global_symbol", name), ARCH, **PASS_CONFIGS)


def with_rows_for_tma(matrix):
    """Return an operand as `pad` copies it."""
    return F.pad(matrix, (0, -matrix.shape[1] % pad.ROW if pad.is_padded(matrix.shape[1]) else 0)).contiguous()


def run(of, config, splits=1):
    """Check one launch, and that of the sum over splits, against float64; every other byte of memory is a NaN."""
    a, b, *others = operands(of)
    given = dict(zip(("row_scale", "column_scale", "bias", "residual"), others, strict=True))
    expected = reference.matmul(a, b, *others[:3], of.epilogue.activation, others[3])
    tensors = {"a": with_rows_for_tma(a if of.a_is_k_major else a.t()), "b": with_rows_for_tma(b.t() if of.b_is_k_major else b)}
    a_row, b_row = (tensors[name].shape[1] // 8 for name in "ab")
    tensors |= {name: tensor for name, tensor in given.items() if tensor is not None}
    out = tensors["out"] = torch.full((of.M, of.N), torch.nan, dtype=DTYPES[of.out_dtype])
    first, second = ("b", "a") if config.is_swapped else ("a", "b")
    layout = {"a": of.a_is_k_major, "b": of.b_is_k_major}
    a_blocks, b_blocks = config.tiles_beside, config.tiles_below  # that load a part each
    columns = min(sm90_config.columns_loaded(config.block_N, layout[second]), BLOCK_K)
    boxes = {
        first: Box((config.a_rows if layout[first] else BLOCK_K) // a_blocks, BLOCK_K),
        second: Box(config.block_N // b_blocks, BLOCK_K) if layout[second] else Box(BLOCK_K // b_blocks, columns),
        "out": Box(config.subtile_N, WGMMA_M) if config.is_swapped else Box(WGMMA_M, config.subtile_N),
    }
    scalars = {"M": of.M, "N": of.N, "K": of.K, "M_in_8": of.M // 8, "N_in_8": of.N // 8, "splits": splits}
    scalars |= {"K_in_8": a_row if of.a_is_k_major else b_row, "a_row_in_8": a_row, "b_row_in_8": b_row}
    scalars |= {"groups": -(-of.N // 8)}
    general = sm90_persistent._any_sizes(of)
    grid = (config.num_blocks, 1)
    if config.adds:
        rows, columns = (of.N, of.M) if config.is_swapped else (of.M, of.N)
        below, beside = config.tiles_below, config.tiles_beside
        tiles = -(-rows // (config.block_M * below)) * config.cluster * -(-columns // (config.block_N * beside))
        tensors["partial"] = torch.full((splits, tiles, config.block_M * config.block_N), torch.nan)
        given = tensors["given"] = torch.full((splits, tiles, config.num_consumers), -1)
        text = text_of(sm90_persistent.added_matmul, general, config)
        execute(text, grid, tensors, boxes, scalars | {"tiles": tiles}, config.cluster, GIVING)
        assert (given[:-1] == 0).all(), "what was given has been taken"
        assert (given[-1] == -1).all()
    elif config.streams:
        tensors["partial"] = torch.full((config.num_blocks, config.block_M * config.block_N), torch.nan)
        given = tensors["given"] = torch.full((config.num_blocks, config.num_consumers), -1)
        execute(
            text_of(sm90_persistent.streamed_matmul, general, config), grid, tensors, boxes, scalars, config.cluster, GIVING
        )
        assert ((given == 0) | (given == -1)).all(), "what was given has been taken"
        assert (given == 0).any()
    elif splits == 1 or config.joined > 1:
        text = text_of(sm90_persistent.matmul, general, config)
        execute(text, grid, tensors, boxes, scalars, config.cluster_blocks, JOINING if config.joined > 1 else "")
    else:
        tensors["partial"] = torch.full((splits, of.M, scalars["groups"] * 8), torch.nan)
        execute(text_of(sm90_persistent.partial_matmul, general, config), grid, tensors, boxes, scalars, config.cluster)
        groups = scalars["groups"] * 8 // sum_splits.GROUP
        blocks = -(-of.M * groups // sum_splits.THREADS), 1
        execute(text_of(sum_splits.sum_splits, general, 4), blocks, tensors, {}, scalars | {"groups": groups})
    bounds = {"max_error": 1e-5, "rms_error": 1e-5} if of.out_dtype == "float32" else {}
    assert_close(out, expected, dtype=of.out_dtype, **bounds)


@needs_compiler
@pytest.mark.parametrize(
    ("of", "config", "splits"),
    [
        # K ends inside a K block; deferred subtiles, of which the next unit stores those that it has K blocks for
        (problem(168, 72, 264, epilogue=ALL), Config(128, 64, 2, 2, 32, 1, False, 2, 128), 1),
        # two MMA tiles of a consumer; both operands turned; float32
        (problem(296, 72, 72, FP16, FP32, False, False), Config(256, 64, 2, 2, 32, 0, False, 1, 256), 1),
        # three splits of 2 K blocks: the last has one; one consumer; one operand turned
        (problem(72, 136, 296, BF16, a_is_k_major=False, epilogue=ALL), Config(64, 128, 1, 4, 0, 0, True, 5, 64), 3),
        # fewer rows of A than an MMA has, whose last rows are those of other stages; stages that are no power of two
        (problem(13, 72, 328, BF16, b_is_k_major=False), Config(64, 64, 1, 3, 64, 0, False, 3, 16), 1),
        # five subtiles of 16 columns, so that a buffer begins and ends a tile
        (problem(13, 168, 264, FP16, FP32), Config(64, 80, 1, 3, 16, 0, False, 2, 16), 1),
        # swapped: rows of out that fill no multiple of 64 are columns of MMAs; two consumers, two MMA tiles; either order
        (problem(13, 136, 264, epilogue=ALL), Config(128, 16, 2, 3, 16, 0, False, 2, 128, is_swapped=True), 1),
        (
            problem(88, 168, 136, a_is_k_major=False, b_is_k_major=False),
            Config(128, 64, 1, 2, 64, 0, False, 3, 128, is_swapped=True),
            1,
        ),
        (problem(37, 72, 328, BF16, FP32, epilogue=ALL), Config(64, 48, 1, 3, 0, 0, True, 3, 64, is_swapped=True), 2),
        # blocks begin with different K blocks
        (problem(13, 1160, 264, BF16, b_is_k_major=False), Config(64, 64, 1, 3, 64, 0, False, 19, 16, rotates=True), 1),
        (
            problem(24, 1160, 456, a_is_k_major=False, epilogue=ALL),
            Config(64, 32, 1, 3, 32, 0, True, 38, 64, is_swapped=True, adds=True, rotates=True),
            2,
        ),
        # one block adds what the others have multiplied of its tile; here each runs after those before it
        (problem(72, 136, 456, epilogue=ALL), Config(128, 80, 2, 3, 16, 0, True, 6, 128, adds=True), 3),
        (
            problem(40, 72, 328, FP16, BF16, b_is_k_major=False),
            Config(64, 32, 1, 3, 32, 0, True, 8, 64, is_swapped=True, adds=True),
            2,
        ),
        # the blocks of a cluster share B of either order; the last one has no row of A
        pytest.param(problem(88, 104, 200), Config(64, 96, 1, 2, 0, 0, True, 4, 64, 2), 2, marks=needs_clusters),
        pytest.param(
            problem(136, 136, 136, b_is_k_major=False), Config(64, 128, 1, 2, 64, 0, False, 2, 64, 2), 1, marks=needs_clusters
        ),
        # an N-major operand in narrow boxes, or in panels of which the MMAs leave columns out
        (
            problem(24, 136, 136, a_is_k_major=False, b_is_k_major=True),
            Config(64, 16, 1, 2, 16, 0, False, 3, 64, is_swapped=True),
            1,
        ),
        (problem(72, 72, 264, b_is_k_major=False), Config(64, 32, 1, 3, 32, 0, False, 2, 64), 1),
        (
            problem(88, 136, 264, FP16, BF16, a_is_k_major=False, epilogue=ALL),
            Config(128, 48, 2, 3, 48, 0, True, 8, 128, is_swapped=True, adds=True),
            2,
        ),
        (problem(72, 168, 136, b_is_k_major=False), Config(64, 80, 1, 2, 16, 0, False, 2, 64), 1),
        # rows of operands and of out that are no multiples of 16 bytes
        (problem(69, 75, 261, epilogue=ALL), Config(64, 64, 1, 2, 64, 1, False, 2, 64), 1),
        (problem(69, 75, 131, b_is_k_major=False), Config(128, 32, 2, 2, 32, 0, False, 2, 128), 1),
        (
            problem(35, 77, 203, FP16, BF16, a_is_k_major=False, epilogue=ALL),
            Config(64, 48, 1, 2, 48, 0, False, 2, 64, is_swapped=True),
            1,
        ),
        (
            problem(69, 75, 261, a_is_k_major=False, b_is_k_major=False, epilogue=ALL),
            Config(64, 64, 1, 2, 0, 0, True, 2, 64),
            3,
        ),
        # the blocks of a cluster share A of either order; the last one has no column of B
        pytest.param(
            problem(136, 136, 200, epilogue=ALL),
            Config(128, 64, 2, 2, 64, 0, False, 2, 128, 2, shares_a=True),
            1,
            marks=needs_clusters,
        ),
        pytest.param(
            problem(136, 136, 328, a_is_k_major=False, b_is_k_major=False),
            Config(128, 80, 2, 2, 16, 0, True, 8, 128, 2, adds=True, shares_a=True),
            2,
            marks=needs_clusters,
        ),
        pytest.param(
            problem(200, 136, 200, a_is_k_major=False),
            Config(128, 80, 2, 2, 40, 0, False, 2, 128, 2, is_swapped=True, shares_a=True),
            1,
            marks=needs_clusters,
        ),
        pytest.param(
            problem(200, 136, 200, FP16, BF16, a_is_k_major=False),
            Config(128, 80, 2, 2, 40, 0, False, 2, 128, 2, is_swapped=True),
            1,
            marks=needs_clusters,
        ),
        # four blocks share both operands; the last ones have no row of A, or no column of B
        pytest.param(
            problem(200, 136, 200, epilogue=ALL), Config(64, 64, 1, 2, 64, 0, False, 4, 64, 4), 1, marks=needs_clusters
        ),
        pytest.param(
            problem(136, 200, 328, FP16, BF16, False, False),
            Config(128, 64, 2, 2, 64, 0, True, 16, 128, 4, adds=True),
            2,
            marks=needs_clusters,
        ),
        pytest.param(
            problem(88, 264, 200, a_is_k_major=False),
            Config(128, 64, 2, 2, 64, 0, False, 4, 128, 4, is_swapped=True),
            1,
            marks=needs_clusters,
        ),
        # K blocks of all tiles in equal parts: of more than a tile, of a third of one, and fewer parts than blocks
        (problem(72, 136, 648, epilogue=ALL), Config(64, 64, 1, 3, 32, 0, False, 5, 64, streams=True), 1),
        (problem(40, 75, 1288, FP16, BF16, b_is_k_major=False), Config(128, 64, 2, 2, 64, 0, False, 6, 128, streams=True), 1),
        (
            problem(24, 136, 520, a_is_k_major=False, epilogue=ALL),
            Config(64, 32, 1, 3, 32, 0, False, 7, 64, is_swapped=True, streams=True),
            1,
        ),
        pytest.param(
            problem(200, 136, 456, a_is_k_major=False, b_is_k_major=False),
            Config(64, 80, 1, 2, 16, 0, False, 6, 64, 2, shares_a=True, streams=True),
            1,
            marks=needs_clusters,
        ),
        pytest.param(
            problem(200, 136, 456, FP16, BF16),
            Config(64, 64, 1, 2, 64, 0, False, 8, 64, 2, streams=True),
            1,
            marks=needs_clusters,
        ),
        # blocks of a cluster have a range of K each, the last of which adds
        pytest.param(
            problem(72, 136, 456, epilogue=ALL), Config(128, 80, 2, 4, 0, 0, True, 6, 128, joined=3), 3, marks=needs_clusters
        ),
        pytest.param(
            problem(40, 72, 328, FP16, BF16, b_is_k_major=False),
            Config(64, 32, 1, 3, 0, 0, True, 16, 64, is_swapped=True, joined=4),
            4,
            marks=needs_clusters,
        ),
        pytest.param(
            problem(200, 75, 328, epilogue=ALL), Config(256, 48, 2, 4, 0, 0, True, 4, 256, joined=2), 2, marks=needs_clusters
        ),
    ],
)
def test_values(of, config, splits):
    """Several rows and columns of tiles, none of the last ones full; blocks walk over several tiles."""
    run(of, config, splits)


@pytest.mark.parametrize(("columns", "subtile", "deferred"), [(96, 32, 0), (96, 32, 1), (80, 16, 0)])
def test_a_store_has_read_its_buffer_before_the_next_is_written(columns, subtile, deferred):
    """Also across tiles, of an odd number of subtiles, so that the first and the last have the same buffer; and all threads
    wait for the one that has waited."""
    of = problem(168, columns, 264)
    config = Config(64, columns, 1, 2, subtile, deferred, False, 2, 64)
    text = text_of(sm90_persistent.matmul, of.without_sizes("M", "N", "K"), config)
    after = re.findall(r"tma_store_wait<\d, true>\(\);\n\s*(.*)", text)
    assert sum("__sync_thread_partial" in statement for statement in after) == text.count("tl::tma_store(")
    found = re.findall(r"tma_store_wait<(\d), true>\(\);|tma_store\(out_desc, \(&\(\(\(bfloat16_t\*\)(\w+)\)", text)
    waits, buffers = ([value for value in values if value] for values in zip(*found, strict=True))
    stores = list(zip(buffers, map(int, waits), strict=False))
    of_tile = stores[: len(stores) - deferred]  # what was deferred is stored once more, after the last tile
    assert len(of_tile) == columns // subtile
    in_flight: list[str] = []
    for buffer, at_most in of_tile * 3:
        in_flight = in_flight[len(in_flight) - at_most :] if at_most else []
        assert buffer not in in_flight
        in_flight.append(buffer)


@needs_compiler
@pytest.mark.parametrize(("columns", "granule"), [(21, 1), (26, 2), (36, 4)])
def test_pad(columns, granule):
    matrix = torch.arange(9 * columns, dtype=torch.int16).reshape(9, columns).view(BF16)
    longer = torch.full((9, -(-columns // 16) * 16), torch.nan, dtype=BF16)
    tensors, groups = {"matrix": matrix, "padded": longer}, longer.shape[1] // 8
    scalars = {"rows": 9, "groups": groups, "granules": columns // granule}
    execute(text_of(pad.pad, "bfloat16", granule), (-(-9 * groups // 128), 1), tensors, {}, scalars)
    assert torch.equal(longer.view(torch.int16), with_rows_for_tma(matrix).view(torch.int16))


@needs_compiler
def test_pad_both():
    tensors, scalars, blocks = {}, {}, 0
    for name, rows, columns, granule in (("a", 90, 29, 1), ("b", 11, 22, 2)):
        tensors[name] = torch.arange(rows * columns, dtype=torch.int16).reshape(rows, columns).view(BF16)
        longer = tensors[f"padded_{name}"] = torch.full((rows, -(-columns // 16) * 16), torch.nan, dtype=BF16)
        groups = longer.shape[1] // 8
        scalars |= {f"{name}_rows": rows, f"{name}_groups": groups, f"{name}_granules": columns // granule}
        blocks += -(-rows * groups // 128)
    execute(text_of(pad.pad_both, "bfloat16", (1, 2)), (blocks, 1), tensors, {}, scalars)
    for name in "ab":
        wanted = with_rows_for_tma(tensors[name])
        assert torch.equal(tensors[f"padded_{name}"].view(torch.int16), wanted.view(torch.int16))


@needs_compiler
def test_turn():
    a = torch.arange(130 * 16, dtype=torch.int16).reshape(130, 16).view(BF16)
    tensors = {"a": a, "turned": torch.full((16, 130), torch.nan, dtype=BF16)}
    execute(text_of(turn.turn, "bfloat16"), (2, 2), tensors, {}, {"K": 130, "groups": 2})
    assert torch.equal(tensors["turned"].view(torch.int16), a.t().view(torch.int16))


# --- machine code ----------------------------------------------------------------------------------------------------


@needs_nvcc
def test_instructions():
    """WGMMAs that are not serialized, fed by TMA; no register spilled, with the most registers that a tile has."""
    of = problem(4096, 4096, 4096, epilogue=Epilogue(bias_dtype="bfloat16", activation="gelu"))
    text = text_of(sm90_persistent.matmul, of.without_sizes("M", "N", "K"), sm90_config.pick_config(of)[0])
    kernel = compile_texts({"matmul": text}, ARCH)["matmul"]
    assert kernel.count("HGMMA")
    assert kernel.count("UTMALDG")
    assert not kernel.count("HMMA")
    assert kernel.spilled == 0


# --- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "tile", "splits"),
    [
        (problem(8192, 8192, 8192, b_is_k_major=False), (128, 256, 1, 128), 1),
        (problem(1024, 1024, 1024), (64, 128, 1, 64), 1),  # 128 tiles: one for each SM
        (problem(128, 4096, 7168, b_is_k_major=False), (64, 128, 1, 64), 2),
        (problem(5, 4096, 4096), (64, 16, 1, 64), 2),
        pytest.param(problem(4096, 4096, 4104), (128, 256, 2, 128), 1, marks=needs_clusters),  # rows of no 128 bytes
        pytest.param(problem(1271, 1208, 1896), (128, 112, 4, 128), 1, marks=needs_clusters),  # few of them for each MMA
    ],
)
def test_pick_config(of, tile, splits):
    config, picked = sm90_config.pick_config(of)
    assert (config.block_M, config.block_N, config.cluster, config.a_rows) == tile
    assert (picked, config.is_split) == (splits, splits > 1)


def test_configs_fit():
    """Every choice has enough shared memory, K blocks for every split, and blocks for every cluster."""
    for M in (1, 17, 33, 65, 200, 4000):
        for N, K in ((8, 8), (264, 16384), (4096, 520), (16384, 4096)):
            for out, is_k_major in ((BF16, True), (FP32, False)):
                of = problem(-(-M // 8) * 8, N, K, BF16, out, is_k_major, is_k_major)
                for tile, splits in sm90_config.choices(of):
                    config = sm90_config.config_of(tile, of, splits)
                    assert config.is_split or config.block_N % config.subtile_N == 0
                    assert config.deferred * (config.block_M // (WGMMA_M * config.num_consumers)) <= config.block_N // 32
                    stage = (config.a_rows + sm90_config.columns_loaded(config.block_N, is_k_major)) * BLOCK_K * 2
                    assert config.num_stages >= 2
                    subtiles = 2 * config.num_consumers * WGMMA_M * config.subtile_N * out.itemsize
                    padding = (max(WGMMA_M, config.a_rows) - config.a_rows) * BLOCK_K * 2
                    assert config.num_stages * stage + subtiles + padding <= 226 * 1024, config
                    assert config.num_blocks % config.cluster == 0
                    k_blocks = -(-K // BLOCK_K)
                    assert (splits - 1) * -(-k_blocks // splits) < k_blocks


@pytest.mark.parametrize(
    ("M", "is_k_major"),
    [*((M, True) for M in (1, 16, 17, 40, 64, 65, 700, 4096)), *((M, False) for M in (8, 24, 40, 64, 72, 704))],
)
def test_rows_served(M, is_k_major):
    """Every number of rows that a variant serves would have had the same kernels: of an M-major a those that are alike in their
    remainder by 16."""

    def kernels(rows):
        of = problem(rows, 4096, 4104, a_is_k_major=is_k_major)
        return sm90_config.is_turned(of), *sm90_config.pick_config(of)

    first, last = sm90_persistent.sizes_served(problem(M, 4096, 4104, a_is_k_major=is_k_major))
    assert first <= M <= last
    alike = range(M % 16, last + 1, 16) if not is_k_major else range(last + 1)
    served = [rows for rows in alike if rows >= first]
    assert len({kernels(rows) for rows in (served[0], M, served[-1])}) == 1


@pytest.mark.parametrize(("M", "loads_by_tma"), [(58, False), (64, True)])
def test_rows_that_tma_does_not_take(M, loads_by_tma):
    """An M-major a whose M is no multiple of eight: upstream knows no extent of it."""
    launched = []
    tiled.compile_kernel(problem(M, 30, 24, a_is_k_major=False), Recorded(launched))
    [(make, arguments, pass_configs)] = launched
    text = lower(make(*arguments), ARCH, **pass_configs)
    assert ("tma_load" in text) == loads_by_tma


class Recorded:
    """Stands in for what compiles kernels."""

    def __init__(self, launched: list):
        self.launched = launched

    def compile(self, make, *arguments, pass_configs=None):
        self.launched.append((make, arguments, pass_configs or {}))


def test_first_kernel_that_takes_a_problem():
    def kernel_of(*sizes, **options):
        return next(file for file in operator.KERNELS if file.takes(problem(*sizes, **options)))

    assert kernel_of(5, 8, 8) is kernel_of(9, 33, 41, b_is_k_major=False) is sm90_persistent
    assert kernel_of(1, 4096, 4096) is kernel_of(2, 33, 41, b_is_k_major=False) is sm90_vecmat
    assert kernel_of(64, 64, 64, arch="sm_80") is kernel_of(64, 64, 64, arch="gfx942") is tiled
