"""`mxfp4_moe` on an NVIDIA GPU: the sizes that models have, every format of activations, both epilogues, graphs.

The reference is the CPU's computation, on GPU tensors in float64. Kernels are compiled in parallel first; sizes are run-time
values of theirs.
"""

import math
from functools import cache
from itertools import product
from unittest import mock

import pytest
import torch
from kernels.compile_on_gpu import compile_moe
from kernels.mxfp4_moe.operands import LINEAR, MX, SWIGLU, launch_kernels, one_hot

from tilelang_ext import formats, quantization
from tilelang_ext.kernels.mxfp4_moe import operator as moe_operator
from tilelang_ext.kernels.mxfp4_moe.activation import Activation
from tilelang_ext.kernels.mxfp4_moe.arguments import Operands
from tilelang_ext.kernels.mxfp4_moe.formats import quantize_groups, quantize_rows
from tilelang_ext.kernels.mxfp4_moe.launch import compiled, problem_of
from tilelang_ext.kernels.mxfp4_moe.operator import mxfp4_moe
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import TILE, TILE_FORMATS
from tilelang_ext.kernels.mxfp4_moe.weights import HopperWeights, MXFP4Weights, tile_for_hopper

pytestmark = pytest.mark.cuda
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an NVIDIA Hopper GPU"
)

SHAPES = [  # (tokens, H, I, E, top_k)
    (64, 512, 256, 4, 2),
    (128, 1024, 256, 8, 2),
    (1, 2880, 2880, 32, 4),
    (128, 2880, 2880, 128, 4),
    (17, 7168, 2048, 16, 8),
    (4096, 2880, 2880, 32, 4),
]
A_FORMATS = ("bfloat16", "fp8", "mxfp8", "mxfp4")
EPILOGUES = ("reduce", "atomic")
SMALL = SHAPES[0]


HOPPER_SHAPES = [
    *SHAPES,
    (64, 1024, 512, 8, 2),
    (256, 1024, 512, 8, 2),
    (800, 1024, 512, 8, 2),
    (2000, 7168, 2048, 16, 8),
    (9000, 512, 256, 4, 4),
    (64, 2880, 2880, 32, 4),  # the two GEMMs differ in rows per tile, with tiles of 16 tokens and of 24 or 32
    (128, 2880, 2880, 32, 4),
]


def needed():
    """What the operator compiles in this file, found by calling it on tensors without data."""
    asked = []

    def compiled(make, options, device, pass_configs=()):
        asked.append((make, options, pass_configs))
        return lambda *arguments: None

    cases = [(shape, a_format, epilogue, SWIGLU, False) for shape, a_format, epilogue in product(SHAPES, A_FORMATS, EPILOGUES)]
    cases += [
        (SMALL, "float16", "reduce", Activation("silu"), False),
        ((96, 96, 96, 8, 1), "bfloat16", "reduce", LINEAR, False),
    ]
    if torch.cuda.get_device_capability() == (9, 0):
        on_tiles = product(HOPPER_SHAPES, TILE_FORMATS, EPILOGUES)
        cases += [(shape, a_format, epilogue, SWIGLU, True) for shape, a_format, epilogue in on_tiles]
    of_gpu = {"target_kind": "cuda", "num_sms": torch.cuda.get_device_properties().multi_processor_count}
    for (tokens, H, I, E, top_k), a_format, epilogue, activation, is_tiled in cases:
        x = torch.empty(tokens, H, dtype=torch.float16 if a_format == "float16" else torch.bfloat16, device="meta")
        ids = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
        weights = []
        for rows, k in ((2 * I, H), (H, I)):
            bias = torch.empty(E, rows, device="meta")
            if is_tiled:
                tile_format = TILE_FORMATS[a_format]
                shape = E, -(-rows // TILE), -(-k // tile_format.K), tile_format.tile_words
                tiles = torch.empty(shape, dtype=torch.uint32, device="meta")
                weights.append(HopperWeights(tiles, torch.empty_like(bias), bias, rows, k, a_format, not weights))
            else:
                codes = torch.empty(E, rows, k // 2, dtype=torch.uint8, device="meta")
                scale = torch.empty(E, rows, k // 32, dtype=torch.uint8, device="meta")
                weights.append(MXFP4Weights(codes, scale, bias, rows, k, not weights))
        tensors = x, ids, torch.empty_like(ids, dtype=torch.float32), *weights
        launch_kernels(tensors, torch.empty_like(x), activation, a_format, epilogue, compiled=compiled, **of_gpu)
    return list(dict.fromkeys(asked))


@pytest.fixture(scope="module", autouse=True)
def compiled_in_parallel():
    compile_moe(needed())


@cache
def operands(shape, dtype=torch.bfloat16):
    """Arguments of mxfp4_moe on the GPU: dot products and biases of about 1, and no token for the last expert."""
    tokens, H, I, E, top_k = shape
    generator = torch.Generator("cuda").manual_seed(sum(shape))

    def random(*size, high=256):
        return torch.randint(0, high, size, generator=generator, device="cuda", dtype=torch.uint8)

    def weights(rows, k, gated):
        # Codes have an RMS of 2.9, and these scales one of 1.3 times their middle.
        middle = 127 - math.ceil(math.log2(2.9 * 1.3 * k**0.5))
        scale = random(E, rows, k // 32, high=3) + (middle - 1)
        return MXFP4Weights(
            random(E, rows, k // 2), scale, torch.randn(E, rows, generator=generator, device="cuda"), rows, k, gated
        )

    x = torch.randn(tokens, H, generator=generator, device="cuda").to(dtype)
    score = torch.rand(tokens, E, generator=generator, device="cuda")
    if top_k < E:
        score[:, -1] = -1
    topk_weights = torch.rand(tokens, top_k, generator=generator, device="cuda")
    return x, score.topk(top_k).indices, topk_weights, weights(2 * I, H, True), weights(H, I, False)


def run(arguments, a_format="bfloat16", epilogue="reduce", activation=SWIGLU, mask=None):
    out = torch.full_like(arguments[0], torch.nan)
    launch_kernels(arguments, out, activation, a_format, epilogue, mask)
    return out


def truth(arguments, a_format="bfloat16", activation=SWIGLU, mask=None):
    out = torch.empty(arguments[0].shape, dtype=torch.float64, device="cuda")
    operands = Operands(*arguments, mask)
    moe_operator._by_reference(problem_of(operands, activation, a_format, "reduce"), operands, out)
    return out


def cosine(result, expected):
    return torch.nn.functional.cosine_similarity(result.double(), expected.double(), dim=1)


def assert_near(result, expected):
    """For 16-bit activations."""
    level = expected.square().mean().sqrt()
    error = (result.double() - expected).abs() / expected.abs().maximum(level)
    assert error.nan_to_num(torch.inf).max() <= 3e-2
    assert ((result.double() - expected).square().mean().sqrt() / level).nan_to_num(torch.inf) <= 4e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    arguments = operands(shape)
    exact = truth(arguments)
    for a_format in A_FORMATS:
        expected = exact if a_format == "bfloat16" else truth(arguments, a_format)
        for epilogue in EPILOGUES:
            result = run(arguments, a_format, epilogue)
            if a_format == "bfloat16":
                assert_near(result, expected)
                continue
            near, far = cosine(result, expected), cosine(result, exact)
            assert near.mean() >= 0.999, (a_format, epilogue)
            assert near.min() >= 0.995, (a_format, epilogue)
            assert far.mean() >= (0.985 if a_format == "mxfp4" else 0.999), (a_format, epilogue)
    operands.cache_clear()


def test_float16_and_silu():
    arguments, silu = operands(SMALL, torch.float16), Activation("silu")
    assert_near(run(arguments, "float16", activation=silu), truth(arguments, "float16", silu))


def test_one_hot_gives_columns_of_weights():
    tokens, layers, expected = one_hot()
    for layer in layers.values():
        moved = [MXFP4Weights(*(each.cuda() for each in weights[:3]), *weights[3:]) for weights in layer]
        result = run([*(each.cuda() for each in tokens), *moved], activation=LINEAR)
        assert torch.equal(result.cpu(), expected)


def routings(topk_ids):
    """Tokens, their ids and an expert mask: all to one expert, ids out of range, one token, experts on other ranks."""
    ids = topk_ids.clone()
    ids[::3, 0], ids[1::5, 1], ids[2] = 4, -1, 2**40
    mask = torch.tensor([False, True, True, False, True, True, False], device="cuda")
    wide = torch.rand(64, 7, generator=torch.Generator().manual_seed(3)).topk(2).indices.cuda()
    return (64, torch.full_like(ids, 2), None), (64, ids, None), (1, ids, None), (64, wide, mask)


def tiled(arguments, a_format):
    """Arguments with weights returned by `tile_for_hopper`."""
    w13, w2 = arguments[3:]
    return *arguments[:3], tile_for_hopper(w13, a_dtype=a_format), tile_for_hopper(w2, a_dtype=a_format)


@on_hopper
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
@pytest.mark.parametrize("a_format", ["bfloat16", "fp8"])
def test_tiles_for_hopper(a_format, shape):
    """Every row of the tables of tiles; between FP8 GEMMs whole rows are quantised, not groups of 32."""
    arguments = operands(shape)
    with mock.patch.object(moe_operator, "hidden_format", lambda a_format: a_format):
        expected = truth(arguments, a_format)
    with_tiles = tiled(arguments, a_format)
    for epilogue in EPILOGUES:
        result = run(with_tiles, a_format, epilogue)
        if a_format == "bfloat16":
            assert_near(result, expected)
            continue
        near, far = cosine(result, expected), cosine(result, truth(arguments))
        assert near.mean() >= 0.999, epilogue
        assert near.min() >= 0.995, epilogue
        assert far.mean() >= 0.999, epilogue
    operands.cache_clear()


@on_hopper
@pytest.mark.parametrize("a_format", ["bfloat16", "fp8"])
def test_tiles_for_hopper_routing_and_padding(a_format):
    """The padding of the weights is NaN, too."""
    x, topk_ids, topk_weights, w13, w2 = operands(SMALL)
    for count, routed, local in routings(topk_ids):
        arguments = x[:count], routed[:count], topk_weights[:count], w13, w2
        result, expected = run(tiled(arguments, a_format), a_format, mask=local), truth(arguments, mask=local)
        assert not result[(expected == 0).all(1)].any()
        used = (expected != 0).any(1)
        assert cosine(result[used], expected[used]).min() >= (0.9999 if a_format == "bfloat16" else 0.997)
    with_tiles = tiled((x, topk_ids, topk_weights, w13, w2), a_format)
    pad = torch.nn.functional.pad
    codes, scale = pad(w2.codes, (0, 48, 0, 40), value=0x77), pad(w2.scale, (0, 3, 0, 40), value=255)
    bias = pad(w2.bias, (0, 40), value=torch.nan)
    padded = tile_for_hopper(MXFP4Weights(codes, scale, bias, w2.rows, w2.k, False), a_dtype=a_format)
    assert torch.equal(run((*with_tiles[:4], padded), a_format), run(with_tiles, a_format))


@on_hopper
def test_tiles_for_hopper_are_deterministic():
    arguments = tiled(operands(SHAPES[3]), "fp8")
    first = run(arguments, "fp8")
    assert all(torch.equal(first, run(arguments, "fp8")) for _ in range(5))
    operands.cache_clear()


@pytest.mark.parametrize("a_format", ["fp8", "mxfp8", "mxfp4"])
def test_quantisation_is_the_hosts(a_format):
    x = torch.randn(70, 480, generator=torch.Generator().manual_seed(0)) * torch.exp2(torch.arange(70) - 35.0)[:, None]
    x[:, ::3] = x[:, :1] * 0.75  # multiples of a large element: ties
    x = x.bfloat16()
    if a_format == "fp8":
        want, want_scale = quantization.quantize(x, formats.E4M3, formats.BlockScaledLayout.per_row())
        make, options, shape, scale = quantize_rows, ("bfloat16",), (70, 15, 32), torch.empty(70, device="cuda")
    else:
        x = x.view(-1, 32)
        want, want_scale = quantization.quantize(x, formats.E2M1 if a_format == "mxfp4" else formats.E4M3, MX)
        make, options, shape = quantize_groups, (a_format, "bfloat16"), x.shape
        scale = torch.empty(want_scale.shape, dtype=torch.uint8, device="cuda")
    codes = torch.zeros(*shape[:-1], 16 if a_format == "mxfp4" else 32, dtype=torch.uint8, device="cuda")
    compiled(make, options, torch.device("cuda"))(x.view(shape).cuda(), codes, scale)
    assert torch.equal(scale.cpu(), want_scale.view(scale.shape))
    assert torch.equal(codes.view(want.shape).cpu(), want.view(torch.uint8))


def test_padding_is_not_computed_with():
    """The same bits whether weights are stored exactly or padded with NaN or 1e30, in rows, K and biases."""
    arguments = operands(SMALL)
    expected = run(arguments)
    for byte, number in ((255, torch.nan), (226, 1e30)):

        def padded(w, halves, byte=byte, number=number):
            E, rows, _ = w.codes.shape
            codes = torch.full((E, halves, rows // halves + 40, w.k // 2 + 48), 0x77, dtype=torch.uint8, device="cuda")
            scale = torch.full((*codes.shape[:3], w.k // 32 + 3), byte, dtype=torch.uint8, device="cuda")
            bias = torch.full(codes.shape[:3], number, device="cuda")
            codes[:, :, : rows // halves, : w.k // 2] = w.codes.unflatten(1, (halves, -1))
            scale[:, :, : rows // halves, : w.k // 32] = w.scale.unflatten(1, (halves, -1))
            bias[:, :, : rows // halves] = w.bias.unflatten(1, (halves, -1))
            return MXFP4Weights(codes.flatten(1, 2), scale.flatten(1, 2), bias.flatten(1, 2), *w[3:])

        assert torch.equal(run([*arguments[:3], padded(arguments[3], 2), padded(arguments[4], 1)]), expected)


def test_routing():
    x, topk_ids, topk_weights, w13, w2 = operands(SMALL)
    for count, routed, local in routings(topk_ids):
        arguments = x[:count], routed[:count], topk_weights[:count], w13, w2
        assert_near(run(arguments, mask=local), truth(arguments, mask=local))
    assert mxfp4_moe(x[:0], topk_ids[:0], topk_weights[:0], w13, w2, activation=SWIGLU).shape == (0, 512)


def test_many_tokens():
    """More tokens than a grid has blocks along its second axis."""
    arguments = operands((70000, 64, 64, 4, 1))
    assert_near(run(arguments), truth(arguments))


def test_reduce_is_deterministic():
    arguments = operands(SHAPES[3])
    first = run(arguments)
    assert all(torch.equal(first, run(arguments)) for _ in range(5))
    operands.cache_clear()


@pytest.mark.parametrize(
    ("a_format", "is_tiled"),
    [(a_format, False) for a_format in A_FORMATS] + [pytest.param(name, True, marks=on_hopper) for name in TILE_FORMATS],
)
def test_graph_with_changing_inputs(a_format, is_tiled):
    """One capture, replayed with other tokens, other experts and other weights of the router."""
    x, topk_ids, topk_weights, w13, w2 = (each.clone() if isinstance(each, torch.Tensor) else each for each in operands(SMALL))
    out = torch.full_like(x, torch.nan)
    options = {"activation": SWIGLU, "a_dtype": None if a_format == "bfloat16" else a_format, "out": out}
    arguments = x, topk_ids, topk_weights, w13, w2
    arguments = tiled(arguments, a_format) if is_tiled else arguments
    mxfp4_moe(*arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mxfp4_moe(*arguments, **options)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x.copy_(torch.randn(x.shape, generator=generator))
        if seed == 2:
            topk_ids.fill_(1)
        else:
            topk_ids.copy_(torch.rand(64, 4, generator=generator).topk(2).indices)
        topk_weights.copy_(torch.rand(topk_weights.shape, generator=generator))
        out.fill_(torch.nan)
        graph.replay()
        expected = truth((x, topk_ids, topk_weights, w13, w2), a_format)
        assert cosine(out, expected).min() >= (0.995 if is_tiled else 0.999)


def test_operator():
    """The operator's own choice of kernels, traced and not."""
    arguments = operands(SMALL)
    expected = truth(arguments)
    assert_near(mxfp4_moe(*arguments, activation=SWIGLU), expected)
    traced = torch.compile(lambda *given: mxfp4_moe(*given, *arguments[3:], activation=SWIGLU), fullgraph=True)
    assert_near(traced(*arguments[:3]), expected)
    with pytest.raises(ValueError, match="topk_weights must be on cuda"):
        mxfp4_moe(*arguments[:2], arguments[2].cpu(), *arguments[3:], activation=SWIGLU)
