"""The kernels for Hopper: values by running their CUDA text on the CPU, the machine code, which one a problem gets."""

import re

import pytest
import torch
from cuda.execute import needs_compiler
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.hopper import Box, execute
from kernels.scaled_mm.operands import E4M3, E5M2, MX, ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, operands, problem
from numeric import assert_close
from tilelang import tvm
from tilelang.engine.lower import lower
from tvm.target import Target

from tilelang_ext.kernels.scaled_mm import operator, sm90_persistent, sm90_split_k, tiled
from tilelang_ext.kernels.scaled_mm.sm90_persistent import ARCH, BLOCK_K, PASS_CONFIGS

TENSORS, ROWS, BLOCKS = (TENSOR, TENSOR), (ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK)
Config, SplitK = sm90_persistent.Config, sm90_split_k.Config
needs_clusters = pytest.mark.skipif(not sm90_split_k.CLUSTERS, reason="tilelang 0.1.14 has no clusters")


def text_of(module, kernel_problem, config, name="scaled_matmul"):
    target = Target({"kind": "cuda", "arch": ARCH})
    with tvm.transform.PassContext(config=PASS_CONFIGS), target:
        kernel = module.scaled_matmul(kernel_problem, config).with_attr("global_symbol", name)
        return lower(kernel, target=target, enable_device_compile=False).kernel_source


def hopper_problem(M, N, K, recipes, **options):
    return problem(M, N, K, recipes, kind="cuda", arch=ARCH, **options)


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
):
    """Check one launch against float64; every other byte of memory is a NaN."""
    (a, scale_a, b, scale_b), expected = operands(M, N, K, recipes, *formats)
    kernel_problem = hopper_problem(
        M, N, K, recipes, a=formats[0], b=formats[1], bias="float32" if bias else None, out=out, fast_accum=fast_accum
    )
    tensors = {"a": a, "scale_a": scale_a, "b": b, "scale_b": scale_b}
    tensors["out"] = torch.full((M, N), torch.nan, dtype=getattr(torch, out))
    if bias:
        tensors["bias"] = torch.randn(N, generator=torch.Generator().manual_seed(3))
        expected = expected + tensors["bias"].double()
    scalars = {"M": M}
    for name, scale in (("scale_a", scale_a), ("scale_b", scale_b)):
        scalars |= {f"{name}_stride_{i}": stride for i, stride in enumerate(scale.stride())}
    text = text_of(module, kernel_problem, config)
    # One thread waits until shared memory has been stored; copies are done when issued here, so values do not show a race.
    after_waits = re.findall(r"tma_store_wait<1, true>\(\);\n\s*(.*)", text)
    assert after_waits or module is sm90_split_k
    assert all("__sync_thread_partial" in statement for statement in after_waits)
    execute(text, grid, tensors, boxes, scalars, cluster)
    bounds = {"max_error": 1e-5, "rms_error": 1e-5} if out == "float32" else {}
    assert_close(tensors["out"], expected, dtype=out, **bounds)


# --- values ----------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    ("recipes", "config", "K", "fast", "out"),
    [
        (TENSORS, Config(128, 256, 3, 32, 2, 2), 528, True, "float32"),  # not promoted; K ends inside a K block; deferred
        (ROWS, Config(128, 256, 2, 64, 1, 3), 768, True, "bfloat16"),  # stmatrix; the producer loads scales
        (ROWS, Config(128, 256, 2, 32, 5, 1), 256, True, "float32"),  # as many stages as K blocks: consumers load scales
        (ROWS, Config(128, 128, 2, 16, 2), 384, False, "float32"),  # stages that do not divide the K blocks
        (ROWS, Config(128, 128, 2, 64, 2), 512, False, "bfloat16"),  # constant stages; the producer loads scales
        (BLOCKS, Config(256, 128, 4, 32, 2), 512, False, "bfloat16"),  # two MMA tiles per consumer, constant stages
        (BLOCKS, Config(128, 128, 1, 16, 3), 128, False, "float32"),  # one K block, in two MMAs
    ],
)
def test_tiles(recipes, config, K, fast, out):
    """Two rows and two columns of tiles, neither full; more blocks than one, so that each walks over several tiles."""
    M, N = config.block_M + 40, config.block_N + 8
    columns = min(BLOCK_K, K // 2)  # the MMAs of a single K block take half of it
    boxes = {
        "a": Box(config.block_M, columns),
        "b": Box(config.block_N, columns),
        "out": Box(sm90_persistent.WGMMA_M, config.subtile_N),
    }
    run(
        sm90_persistent, config, M, N, K, recipes,
        grid=(config.num_blocks, 1), boxes=boxes, bias=True, out=out, fast_accum=fast,
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
    """WGMMAs that are not serialized, fed by TMA; no register spilled."""
    cases = {
        "fast": (sm90_persistent, 4096, ROWS, True),
        "rows": (sm90_persistent, 4096, ROWS, False),
        "blocks": (sm90_persistent, 4096, BLOCKS, False),
        "few_rows": (sm90_split_k, 16, ROWS, False),
        "few_blocks": (sm90_split_k, 128, BLOCKS, False),
    }
    texts = {}
    for name, (module, M, recipes, fast) in cases.items():
        kernel_problem = hopper_problem(M, 4096, 7168, recipes, out="bfloat16", bias="bfloat16", fast_accum=fast)
        texts[name] = text_of(module, kernel_problem, module.pick_config(kernel_problem), name)
    for name, kernel in compile_texts(texts, ARCH).items():
        assert kernel.count("QGMMA"), name
        assert kernel.count("UTMALDG"), name
        assert not kernel.count("QMMA"), name
        assert kernel.spilled == 0, name


# --- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("M", "N", "K", "recipes", "fast", "config"),
    [
        (4096, 4096, 7168, ROWS, True, Config(128, 256, 4, 64, 132, 3)),
        (4096, 4096, 7168, ROWS, False, Config(256, 128, 4, 32, 132)),
        (4096, 4096, 7168, BLOCKS, True, Config(256, 128, 4, 32, 132)),  # blockwise scales are always promoted
        (
            512,
            4096,
            7168,
            ROWS,
            False,
            Config(128, 128, 4, 32, 132),
        ),  # too few tiles of 256; 4 stages divide 56 K blocks, 5 do not
        (256, 64, 384, ROWS, True, Config(128, 128, 3, 64, 132, 1)),  # three K blocks: time for one deferred subtile
    ],
)
def test_pick_config(M, N, K, recipes, fast, config):
    kernel_problem = hopper_problem(M, N, K, recipes, out="bfloat16", fast_accum=fast)
    assert sm90_persistent.pick_config(kernel_problem) == config


@pytest.mark.parametrize(
    ("M", "N", "K", "config"),
    [
        (16, 4096, 7168, SplitK(16, 32, 1, 4, 32)),
        pytest.param(64, 2112, 7168, SplitK(64, 32, 2, 4, 8), marks=needs_clusters),  # 66 tiles: two blocks each
        (128, 4096, 7168, SplitK(128, 32, 1, 2, 8)),
        (128, 7168, 2048, SplitK(128, 64, 1, 2, 4)),
        (16, 4096, 384, SplitK(16, 32, 1, 2, 4)),  # three K blocks: a stage that two consumers use would race
        pytest.param(16, 64, 256, SplitK(16, 32, 2, 1, 1), marks=needs_clusters),
    ],
)
def test_pick_split_k_config(M, N, K, config):
    assert sm90_split_k.pick_config(hopper_problem(M, N, K, ROWS)) == config


@pytest.mark.parametrize("recipes", [ROWS, BLOCKS], ids=["rows", "blocks"])
def test_split_k_configs_fit(recipes):
    """A stage has one consumer or is used once, and a block has enough shared memory."""
    for M in (16, 32, 64, 128):
        for N in (8, 64, 2112, 4096, 7168, 16896):
            for K in (16, 128, 256, 384, 1536, 2880, 7168, 16384):
                kernel_problem = hopper_problem(M, N, K, recipes)
                config = sm90_split_k.pick_config(kernel_problem)
                if config is None:
                    continue
                k_blocks = -(-K // (BLOCK_K * config.num_splits))
                assert config.num_stages % config.num_consumers == 0 or config.num_stages >= k_blocks, (M, N, K)
                stages = config.num_stages * (config.block_M + config.block_N) * BLOCK_K
                assert stages + sm90_split_k._fixed_bytes(kernel_problem, config) <= 225 * 1024, (M, N, K)


def test_first_kernel_that_takes_a_problem():
    def kernel_of(M, N=4096, K=4096, recipes=ROWS, **options):
        return next(file for file in operator.KERNELS if file.takes(hopper_problem(M, N, K, recipes, **options)))

    assert kernel_of(5) is kernel_of(128) is sm90_split_k
    assert kernel_of(129) is kernel_of(4096, recipes=BLOCKS) is sm90_persistent
    assert kernel_of(128, N=32768) is sm90_persistent  # more tiles than SMs
    for problem_of_others in ({"recipes": (MX, MX)}, {"recipes": (ROW_BLOCK, ROW_BLOCK)}, {"K": 72}, {"N": 33}):
        assert kernel_of(4096, **problem_of_others) is tiled
