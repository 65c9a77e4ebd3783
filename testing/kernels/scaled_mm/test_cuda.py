"""`scaled_mm` on an NVIDIA GPU: values of the shapes that models have, against float64 and torch; strides, graphs, tracing.

Kernels are compiled in parallel first: N and K are constants of a kernel, M is not.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from kernels.compile_on_gpu import compile_all
from kernels.scaled_mm.operands import MX, PAIRS, ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, as_torch

from tilelang_ext import reference
from tilelang_ext.kernels.scaled_mm import launch
from tilelang_ext.kernels.scaled_mm.arguments import LAYOUTS
from tilelang_ext.kernels.scaled_mm.operator import scaled_mm

pytestmark = pytest.mark.cuda

MS = (1, 7, 33, 128, 513, 4096)
NS = (64, 2112, 4096, 7168)
KS = (128, 1536, 2048, 7168)
FEW = [(64, 128), (2112, 1536), (7168, 2048)]  # (N, K)
TENSOR_CORE_ERROR = 2e-3  # of the float32 sum: the matrix unit keeps fewer than 24 bits between promotions
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
IDS = {"ids": lambda pair: "-".join(recipe.name for recipe in pair)}


def operand(rows, K, recipe, seed, dtype=torch.float8_e4m3fn):
    """Codes and scales by blocks on the GPU; every scale differs from its neighbours."""
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randn(rows, K, generator=generator, device="cuda").to(dtype)
    shape = LAYOUTS[recipe.value].scale_shape(rows, K)
    if recipe is MX:
        return codes, torch.randint(124, 131, shape, generator=generator, device="cuda", dtype=torch.uint8)
    return codes, torch.rand(shape, generator=generator, device="cuda") / 16 + 1 / 32


def case(M, N, K, recipes, dtypes=(torch.float8_e4m3fn,) * 2):
    """Arguments of scaled_mm up to the recipes, in torch's orientation and strides, and the float64 product."""
    (a, scale_a), (b, scale_b) = operand(M, K, recipes[0], 1, dtypes[0]), operand(N, K, recipes[1], 2, dtypes[1])
    expected = reference.scaled_matmul(a, scale_a, b, scale_b, *(LAYOUTS[recipe.value] for recipe in recipes))
    scales = as_torch(scale_a, recipes[0], "a"), as_torch(scale_b, recipes[1], "b")
    return (a, b.t(), scales[0], recipes[0], scales[1], recipes[1]), expected


def error(result, expected):
    """The largest error against the larger of an element and the RMS of all; NaN counts as infinite."""
    expected = expected.double()
    level = torch.maximum(expected.abs(), expected.square().mean().sqrt())
    return ((result.double() - expected).abs() / level).nan_to_num(torch.inf).max().item()


def check(M, N, K, recipes, dtype=torch.float32, **options):
    arguments, expected = case(M, N, K, recipes)
    out = torch.full((M, N), torch.nan, dtype=dtype, device="cuda")
    scaled_mm(*arguments, out=out, **options)
    assert error(out, expected) <= TENSOR_CORE_ERROR + ROUNDING[dtype], (M, N, K)


@pytest.mark.parametrize("recipes", [(ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK)], **IDS)
def test_every_shape(recipes):
    shapes = list(product(MS, NS, KS))
    compile_all(shapes, recipes)
    for shape in shapes:
        check(*shape, recipes)


@pytest.mark.parametrize("recipes", PAIRS, **IDS)
def test_every_recipe(recipes):
    shapes = [(M, N, K) for M, (N, K) in product((2, 3, 4, *MS), FEW)]
    compile_all(shapes, recipes)
    for shape in shapes:
        check(*shape, recipes)


@pytest.mark.parametrize(("M", "N", "K"), [(3, 33, 72), (70, 150, 288), (5, 66, 33)])
def test_odd_shapes(M, N, K):
    """K that TMA cannot take, and tails in every direction."""
    check(M, N, K, (ROW, ROW))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("M", [1, 4, 33, 200])
def test_outputs_and_bias(M, dtype):
    arguments, expected = case(M, 2112, 1536, (ROW, ROW))
    bias = torch.randn(2112, device="cuda")
    out = torch.full((M, 2112), torch.nan, dtype=dtype, device="cuda")
    for kind in (torch.bfloat16, torch.float32):
        scaled_mm(*arguments, bias=bias.to(kind), out=out)
        assert error(out, expected + bias.to(kind).double()) <= TENSOR_CORE_ERROR + ROUNDING[dtype]


@pytest.mark.parametrize("dtypes", [(torch.float8_e5m2, torch.float8_e4m3fn), (torch.float8_e5m2,) * 2], ids=str)
@pytest.mark.parametrize("M", [2, 65])
def test_e5m2(M, dtypes):
    arguments, expected = case(M, 256, 512, (ROW, ROW), dtypes)
    assert error(scaled_mm(*arguments, output_dtype=torch.float32), expected) <= TENSOR_CORE_ERROR


@pytest.mark.parametrize("recipe", [TENSOR, ROW], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("M", [1, 33, 513])
def test_equals_torch(M, recipe):
    arguments, expected = case(M, 4096, 2048, (recipe, recipe))
    ours, torchs = scaled_mm(*arguments), F.scaled_mm(*arguments)
    limit = TENSOR_CORE_ERROR + ROUNDING[torch.bfloat16]
    assert error(ours, expected) <= limit
    assert error(ours, torchs) <= 2 * limit


@pytest.mark.parametrize(("M", "N", "K"), [(8, 17792, 8192), (40, 20096, 16384), (17, 9088, 16384)])
@pytest.mark.parametrize("recipes", [(ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK)], **IDS)
def test_tiles_that_blocks_share(M, N, K, recipes):
    """Equal bits on two streams at once and after a hundred calls: what was given is taken in each."""
    arguments, expected = case(M, N, K, recipes)
    outs = [torch.full((M, N), torch.nan, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in outs]
    torch.cuda.synchronize()
    for _ in range(50):
        for out, stream in zip(outs, streams, strict=True):
            with torch.cuda.stream(stream):
                scaled_mm(*arguments, out=out)
    torch.cuda.synchronize()
    assert error(outs[0], expected) <= TENSOR_CORE_ERROR + ROUNDING[torch.bfloat16]
    assert torch.equal(*outs)


def test_fast_accumulation_keeps_fewer_bits():
    arguments, expected = case(128, 256, 7168, (ROW, ROW))
    slow, fast = (scaled_mm(*arguments, output_dtype=torch.float32, use_fast_accum=fast) for fast in (False, True))
    assert error(slow, expected) <= TENSOR_CORE_ERROR
    assert error(fast, expected) <= 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"), [(4096, 7168, 2048), (2000, 7168, 1536), (1100, 4096, 640), (513, 2112, 1536), (513, 64, 128)]
)
def test_fast_accumulation_of_several_tiles(M, N, K, dtype):
    """Blocks of one tile and of several, whose last subtiles are deferred; fewer K blocks than their stores take."""
    arguments, expected = case(M, N, K, (ROW, ROW))
    out = torch.full((M, N), torch.nan, dtype=dtype, device="cuda")
    scaled_mm(*arguments, out=out, use_fast_accum=True)
    assert error(out, expected) <= 5e-2
    again = scaled_mm(*arguments, output_dtype=dtype, use_fast_accum=True)
    assert torch.equal(out, again)


def test_strides_of_scales_and_rows():
    """Scales row by row as well as column by column; rows of mat_a apart."""
    (a, b, scale_a, _, scale_b, _), expected = case(70, 256, 512, (ROW_BLOCK, SQUARE_BLOCK))
    wide = torch.cat([a.view(torch.uint8)] * 2, dim=1).view(a.dtype)[:, :512]
    for one, other in product((scale_a, scale_a.contiguous()), (scale_b, scale_b.contiguous(), scale_b[:4])):
        out = scaled_mm(wide, b, one, ROW_BLOCK, other, SQUARE_BLOCK, output_dtype=torch.float32)
        assert error(out, expected) <= TENSOR_CORE_ERROR


def test_row_major_weights_are_refused():
    (a, b, scale_a, _, scale_b, _), _ = case(5, 64, 128, (ROW, ROW))
    with pytest.raises(ValueError, match="mat_b must be column-major"):
        scaled_mm(a, b.contiguous(), scale_a, ROW, scale_b, ROW)


def test_a_new_batch_size_compiles_nothing(monkeypatch):
    check(129, 64, 128, (ROW, ROW))
    monkeypatch.setattr(launch, "add_variant", None)
    for M in (130, 200, 256):
        check(M, 64, 128, (ROW, ROW))


@pytest.mark.parametrize("M", [1, 33])
def test_graph_and_torch_compile(M):
    arguments, expected = case(M, 256, 512, (ROW, ROW))
    out = torch.full((M, 256), torch.nan, device="cuda")
    scaled_mm(*arguments, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scaled_mm(*arguments, out=out)
    out.fill_(torch.nan)
    graph.replay()
    assert error(out, expected) <= TENSOR_CORE_ERROR
    compiled = torch.compile(lambda a, b: scaled_mm(a, b, *arguments[2:], output_dtype=torch.float32) * 2, fullgraph=True)
    assert error(compiled(*arguments[:2]) / 2, expected) <= TENSOR_CORE_ERROR
