"""The kernels for Hopper: values by running their CUDA text on the CPU, the machine code, which one a problem gets."""

import re
from dataclasses import replace

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import GIVEN, GIVING, Box, execute
from kernels.scaled_mm.operands import E4M3, E5M2, MX, ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, operands, problem
from numeric import assert_close
from tilelang import tvm
from tilelang.engine.lower import lower
from tvm.target import Target

from tilelang_ext.kernels.scaled_mm import operator, selection, sm90_block, sm90_config, sm90_persistent, sm90_split_k, tiled
from tilelang_ext.kernels.scaled_mm.sm90_block import ARCH, BLOCK_K, WGMMA_M, scale_sets_of

TENSORS, ROWS, BLOCKS = (TENSOR, TENSOR), (ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK)
Config, SplitK = sm90_block.Config, sm90_split_k.Config
needs_clusters = pytest.mark.skipif(not sm90_split_k.CLUSTERS, reason="tilelang 0.1.14 has no clusters")


def text_of(module, kernel_problem, config, name="scaled_matmul"):
    target = Target({"kind": "cuda", "arch": ARCH})
    with tvm.transform.PassContext(config=module.PASS_CONFIGS), target:
        kernel = module.scaled_matmul(kernel_problem, config).with_attr("global_symbol", name)
        return lower(kernel, target=target, enable_device_compile=False).kernel_source


def hopper_problem(M, N, K, recipes, **options):
    return replace(problem(M, N, K, recipes, kind="cuda", arch=ARCH, **options), max_M=M)


def run(
    module,
    config,
    M,
    N,
    K,
    recipes,
    *,
    grid,
    boxes,
    cluster=1,
    bias=False,
    out="float32",
    fast_accum=False,
    formats=(E4M3, E4M3),
    dynamic=False,
):
    """Check one launch against float64, of a kernel with N and K as constants or `dynamic`; other bytes of memory are NaN."""
    (a, scale_a, b, scale_b), expected = operands(M, N, K, recipes, *formats)
    kernel_problem = hopper_problem(
        M, N, K, recipes, a=formats[0], b=formats[1], bias="float32" if bias else None, out=out, fast_accum=fast_accum
    )
    kernel_problem = replace(kernel_problem, N=0, K=0) if dynamic else kernel_problem
    tensors = {"a": a, "scale_a": scale_a, "b": b, "scale_b": scale_b}
    tensors["out"] = torch.full((M, N), torch.nan, dtype=getattr(torch, out))
    if bias:
        tensors["bias"] = torch.randn(N, generator=torch.Generator().manual_seed(3))
        expected = expected + tensors["bias"].double()
    memory = sm90_persistent.memory_of(config) if module is sm90_persistent else ()
    for name, (shape, dtype) in zip(("partial", "given"), memory, strict=False):
        tensors[name] = torch.full(shape, torch.nan) if dtype == "float32" else torch.full(shape, -1)
    scalars = {"M": M, "K_in_16": K // 16, "N_in_8": N // 8, "N_in_4": N // 4}
    for name, scale in (("scale_a", scale_a), ("scale_b", scale_b)):
        scalars |= {f"{name}_stride_{i}": stride for i, stride in enumerate(scale.stride())}
    text = text_of(module, kernel_problem, config)
    # One thread waits until shared memory has been stored; copies are done when issued here, so values do not show a race.
    # The last wait of each consumer has nothing behind it. A tile's first store waits for all of those of the tile before.
    waits = re.findall(r"tma_store_wait<([01]), true>\(\);\n\s*(.*)", text)
    before_stores = [in_flight for in_flight, statement in waits if "__sync_thread_partial" in statement]
    assert len(before_stores) == text.count("tl::tma_store(")
    assert module is sm90_split_k or "0" in before_stores
    assert f"0x{GIVEN:x}LL" in text or not memory
    execute(text, grid, tensors, boxes, scalars, cluster, GIVING)
    if memory:
        assert (tensors["given"] == 0).any(), "a tile was divided"
        assert not (tensors["given"] == GIVEN).any(), "what was given has been taken"
    bounds = {"max_error": 1e-5, "rms_error": 1e-5} if out == "float32" else {}
    assert_close(tensors["out"], expected, dtype=out, **bounds)


# --- values ----------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("recipes", "config", "K", "fast", "out"),
    [
        (TENSORS, Config(128, 128, 3, 32, 2, 2), 528, True, "float32"),  # not promoted; K ends inside a K block; deferred
        (ROWS, Config(128, 256, 2, 64, 1, 3), 768, True, "bfloat16"),  # stmatrix; the producer loads scales
        (ROWS, Config(128, 128, 2, 32, 5, 1), 256, True, "float32"),  # as many stages as K blocks: consumers load scales
        (ROWS, Config(128, 64, 2, 16, 2), 384, False, "float32"),  # stages that do not divide the K blocks
        (ROWS, Config(128, 112, 2, 16, 2), 512, False, "bfloat16"),  # constant stages; one matrix store writes a subtile
        (BLOCKS, Config(256, 128, 2, 64, 2), 512, False, "bfloat16"),  # two MMA tiles per consumer, constant stages
        (BLOCKS, Config(128, 128, 1, 32, 3), 128, False, "float32"),  # one K block, in two MMAs
        (BLOCKS, Config(64, 80, 5, 16, 2, num_consumers=1), 896, False, "bfloat16"),  # two K blocks behind iterations of five
    ],
)
def test_tiles(recipes, config, K, fast, out):
    """Two rows and two columns of tiles, neither full; more blocks than one, so that each walks over several tiles."""
    M, N = config.block_M + 40, config.block_N + 8
    columns = min(BLOCK_K, K // 2)  # the MMAs of a single K block take half of it
    boxes = {
        "a": Box(config.block_M, columns),
        "b": Box(config.block_N, columns),
        "out": Box(WGMMA_M, config.subtile),
    }
    run(
        sm90_persistent, config, M, N, K, recipes,
        grid=(config.num_blocks, 1), boxes=boxes, bias=True, out=out, fast_accum=fast,
    )  # fmt: skip


SWAPPED = {"num_blocks": 2, "is_swapped": True}


@needs_compiler
@pytest.mark.parametrize(
    ("M", "recipes", "config", "K", "fast", "dynamic"),
    [
        # Two rows of tiles; a K block is left over; scales come by the producer; subtiles of 40 rows, stored transposed
        (100, ROWS, Config(80, 128, 3, 40, **SWAPPED), 656, True, True),
        # Two sets of scales, of 128 columns each; the last iteration has an empty step
        (7, BLOCKS, Config(8, 256, 2, 8, **SWAPPED), 896, False, True),
        # Three tiles for two blocks, which share them: the second finishes the one in which the part of the first ends
        (12, BLOCKS, Config(16, 64, 8, 16, num_consumers=1, divides_k=True, **SWAPPED), 1280, False, True),
        (40, ROWS, Config(48, 64, 4, 48, num_consumers=1, **SWAPPED), 512, False, False),  # consumers load scales
        (70, ROWS, Config(128, 64, 3, 32, 7, divides_k=True), 1168, True, True),  # two or three blocks for a tile
        # Two rows of tiles with four blocks each, one block is left over; a part ends behind an iteration that is not whole
        (150, BLOCKS, Config(80, 128, 4, 40, 9, is_swapped=True, divides_k=True), 1408, False, False),
        # Two rows of tiles, of which four blocks share all six in one line
        (150, BLOCKS, Config(128, 128, 4, 32, 4, divides_k=True), 1408, False, False),
        # One consumer; seven stages, which no iteration of four K blocks has all of
        (60, BLOCKS, Config(64, 160, 7, 32, 2, num_consumers=1), 1280, False, True),
        # A tile meets two blocks of scale_b, and the second tile at another column
        (140, BLOCKS, Config(128, 160, 2, 32, 2), 528, False, False),
    ],
)
def test_swapped_and_straddling_tiles(M, recipes, config, K, fast, dynamic):
    """Three columns of tiles for two blocks, the last one cut; bfloat16, with a bias."""
    N = 2 * config.block_N + 24
    boxes = {"a": Box(config.block_M, BLOCK_K), "b": Box(config.block_N, BLOCK_K)}
    boxes["out"] = Box(config.subtile, WGMMA_M) if config.is_swapped else Box(WGMMA_M, config.subtile)
    run(
        sm90_persistent, config, M, N, K, recipes, grid=(config.num_blocks, 1), boxes=boxes, bias=True, out="bfloat16",
        fast_accum=fast, dynamic=dynamic,
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    ("M", "recipes", "config", "K"),
    [
        (7, ROWS, SplitK(16, 32, 1, 4, 4), 1040),  # MMAs read the next stages below the rows of a
        (40, BLOCKS, SplitK(64, 32, 1, 2, 2), 640),
        (100, ROWS, SplitK(128, 32, 1, 2, 2), 256),  # two MMAs per K block
        pytest.param(
            7, BLOCKS, SplitK(16, 32, 2, 4, 4), 896, marks=needs_clusters
        ),  # two blocks split K, one has fewer K blocks
        pytest.param(40, TENSORS, SplitK(64, 32, 2, 1, 1), 256, marks=needs_clusters),
        (16, ROWS, SplitK(16, 64, 1, 2, 4), 384),  # one consumer has a K block less
    ],
)
def test_few_rows(M, recipes, config, K):
    """Two tiles of columns, the second not full."""
    N = config.block_N + 8
    boxes = {"a": Box(config.block_M, BLOCK_K), "b": Box(config.block_N, BLOCK_K)}
    run(
        sm90_split_k, config, M, N, K, recipes,
        grid=(config.num_splits, 2), boxes=boxes, cluster=config.num_splits, bias=True,
    )  # fmt: skip


@needs_compiler
def test_mixed_operands():
    config = SplitK(16, 32, 1, 2, 2)
    boxes = {"a": Box(16, BLOCK_K), "b": Box(32, BLOCK_K)}
    run(sm90_split_k, config, 9, 32, 256, ROWS, grid=(1, 1), boxes=boxes, formats=(E5M2, E4M3))


# --- machine code ----------------------------------------------------------------------------------------------------


@needs_nvcc
def test_instructions():
    """WGMMAs that are not serialized, fed by TMA; no accumulator spilled."""
    cases = {
        "fast": (4096, 4096, 7168, ROWS, True),
        "rows": (4096, 4096, 7168, ROWS, False),
        "blocks": (3199, 10240, 27520, BLOCKS, False),
        "few_rows": (16, 4096, 7168, ROWS, False),
        "few_blocks": (128, 4096, 7168, BLOCKS, False),
        "swapped": (8, 27648, 7168, BLOCKS, False),
        "one_consumer": (64, 19968, 6784, BLOCKS, False),
        "divided": (297, 1536, 22144, BLOCKS, False),
        "straddling": (200, 10240, 7168, BLOCKS, False),
    }
    texts = {}

    def listed(make, *arguments, pass_configs=None):
        kernels.append((make, arguments))

    for name, (M, N, K, recipes, fast) in cases.items():
        kernels = []
        selection.compile_kernel(hopper_problem(M, N, K, recipes, out="bfloat16", fast_accum=fast), listed)
        [(make, (kernel_problem, config))] = kernels
        if name == "blocks":
            assert (config.block_M, config.block_N) == (256, 128)
            assert K // BLOCK_K % config.num_stages == 3, "K blocks behind the main loop"
        modules = {module.scaled_matmul: module for module in (sm90_persistent, sm90_split_k)}
        texts[name] = text_of(modules[make], kernel_problem, config, name)
    for name, kernel in compile_texts(texts, ARCH).items():
        assert kernel.count("QGMMA"), name
        assert kernel.count("UTMALDG"), name
        assert not kernel.count("QMMA"), name
        assert kernel.spilled <= 4, f"{name}: more than a scalar"


# --- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("M", "N", "K", "recipes", "fast", "config"),
    [
        (4096, 4096, 7168, ROWS, True, Config(128, 256, 4, 64, 132, 3)),
        (4096, 4096, 7168, ROWS, False, Config(256, 128, 4, 32, 132)),
        (4096, 4096, 7168, BLOCKS, True, Config(256, 128, 4, 32, 132)),  # blockwise scales are always promoted
        (384, 10240, 8192, BLOCKS, True, Config(128, 128, 4, 32, 132)),  # 240 tiles in two waves, not 160 of twice the size
        (200, 10240, 8192, BLOCKS, True, Config(128, 160, 4, 32, 132)),  # 128 tiles in one wave
        (8, 27648, 5120, ROWS, True, Config(8, 128, 8, 8, 132, is_swapped=True, divides_k=True)),  # 216 tiles: 1.6 waves
        (16, 4096, 7168, BLOCKS, False, SplitK(16, 32, 1, 4, 32)),
        pytest.param(64, 2112, 7168, BLOCKS, False, SplitK(64, 32, 2, 4, 8), marks=needs_clusters),  # 66 tiles: two blocks each
        (128, 4096, 7168, BLOCKS, False, SplitK(128, 32, 1, 2, 8)),
        (2, 20224, 17280, BLOCKS, False, Config(8, 128, 8, 8, 132, 0, 2, True, True)),  # 135 K blocks: no multiple of 4
        (48, 10240, 8192, BLOCKS, False, Config(64, 80, 8, 16, 132, num_consumers=1)),  # 128 tiles in one wave
        # 48 tiles of 173 K blocks: 33 blocks for each of their four rows
        (297, 1536, 22144, BLOCKS, False, Config(80, 128, 7, 40, 132, is_swapped=True, divides_k=True)),
        (374, 3584, 9344, BLOCKS, False, Config(128, 96, 7, 32, 132)),  # 114 tiles in one wave: all stages that fit
        # Many rows: 207 columns of tiles fill waves better than 166 or 138; operands are not swapped
        (936, 26496, 29184, BLOCKS, False, Config(128, 128, 4, 32, 132)),
        # 540 tiles, 12 more than fill four waves: the last 144 are divided, all in one line
        (1475, 11520, 10624, BLOCKS, False, Config(256, 128, 4, 32, 132, divides_k=True)),
        (1131, 7808, 23040, BLOCKS, False, Config(128, 192, 4, 32, 132)),  # nine rows of tiles: none is divided
    ],
)
def test_choice(M, N, K, recipes, fast, config):
    assert selection.pick(hopper_problem(M, N, K, recipes, out="bfloat16", fast_accum=fast)).config == config


MATRICES = ((8, 16), (64, 256), (64, 384), (2112, 2880), (32768, 32768))  # N and K
SIZES = [(M, N, K) for M in (1, 4, 5, 17, 64, 129, 300, 4096) for N, K in MATRICES]


@pytest.mark.parametrize(("recipes", "out"), [(ROWS, "bfloat16"), (BLOCKS, "bfloat16"), (ROWS, "float32")], ids=str)
def test_choices_fit(recipes, out):
    """Every choice of every size has the shared memory and the registers of a block, and there is one."""
    for (M, N, K), fast in [(size, fast) for size in SIZES for fast in (False, True)]:
        kernel_problem = hopper_problem(sm90_config.rounded(M), N, K, recipes, out=out, fast_accum=fast)
        choices = list(sm90_config.choices(kernel_problem))
        assert selection.pick(kernel_problem) in choices
        for kernel, config in choices:
            if kernel == "sm90_split_k":
                k_blocks = -(-K // (BLOCK_K * config.num_splits))
                assert config.num_stages % config.num_consumers == 0 or config.num_stages >= k_blocks, (M, N, K)
                stages = config.num_stages * (config.block_M + config.block_N) * BLOCK_K
                assert stages + sm90_split_k._fixed_bytes(kernel_problem, config) <= 225 * 1024, (M, N, K)
            elif kernel == "sm90_persistent":
                rows, columns = (config.subtile, WGMMA_M) if config.is_swapped else (WGMMA_M, config.subtile)
                bytes_of_row = columns * (4 if out == "float32" else 2)
                assert bytes_of_row in (32, 64, 128), "the swizzles that TMA has"
                stages = config.num_stages * (config.block_M + config.block_N) * BLOCK_K
                sets = scale_sets_of(config.block_N, config.is_swapped)
                blockwise = config.num_stages * sets * config.block_M
                scales = 4 * (blockwise if recipes is BLOCKS else config.block_M + config.block_N)
                stores = 2 * config.num_consumers * rows * bytes_of_row
                assert stages + stores + scales <= 227 * 1024 - 512, (M, N, K, config)
                assert config.deferred <= -(-K // BLOCK_K) // 2
                tile_rows = -(-kernel_problem.max_M // config.block_M)
                if config.divides_k:
                    in_step = sm90_config._rows_in_step(config, kernel_problem)
                    assert config.deferred == 0
                    assert in_step <= 8, "rows that are walked together"
                    assert in_step == tile_rows or config.block_M == 256, "all tiles in one line"
                assert config.num_stages >= min(2, -(-K // BLOCK_K)), "one is released when the next has arrived"


def test_sizes_that_share_a_choice():
    """Neighbours have it, and no others."""
    kernel_problem = hopper_problem(200, 10240, 8192, BLOCKS, out="bfloat16")
    first, last = selection.sizes_served(kernel_problem)
    assert first <= 200 <= last
    choices = [selection.pick(replace(kernel_problem, max_M=M)) for M in (first - 1, first, last, last + 1)]
    assert choices[1] == choices[2] == selection.pick(kernel_problem)
    assert choices[0] != choices[1]
    assert choices[3] != choices[2]


def test_first_kernel_that_takes_a_problem():
    def kernel_of(M, N=4096, K=4096, recipes=ROWS, **options):
        return next(file for file in operator.KERNELS if file.takes(hopper_problem(M, N, K, recipes, **options)))

    assert kernel_of(5) is kernel_of(4096, recipes=BLOCKS) is selection
    for problem_of_others in ({"recipes": (MX, MX)}, {"recipes": (ROW_BLOCK, ROW_BLOCK)}, {"K": 72}, {"N": 33}):
        assert kernel_of(4096, **problem_of_others) is tiled
