"""`scaled_mm` at its door and on the CPU: every recipe against float64 and torch, errors by message, tracing, launches."""

import pytest
import torch
import torch.nn.functional as F
from kernels.scaled_mm.operands import E4M3, E5M2, MX, PAIRS, ROW, ROW_BLOCK, SQUARE_BLOCK, TENSOR, case, operand
from numeric import assert_close
from torch.nn.functional import ScalingType, SwizzleType

from tilelang_ext import formats, reference
from tilelang_ext.kernels.scaled_mm import launch
from tilelang_ext.kernels.scaled_mm.arguments import options_of
from tilelang_ext.kernels.scaled_mm.operator import scaled_mm

OUTPUTS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("recipes", PAIRS, ids=lambda pair: "-".join(recipe.name for recipe in pair))
@pytest.mark.parametrize(("M", "N", "K"), [(1, 7, 32), (33, 130, 288), (129, 65, 512)])
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_recipes(M, N, K, recipes, dtype):
    arguments, expected = case(M, N, K, recipes)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(3))
    out = torch.full((M, N), torch.nan, dtype=dtype)
    result = scaled_mm(*arguments, bias=bias, output_dtype=dtype, out=out)
    assert result is out
    name = str(dtype).removeprefix("torch.")
    assert_close(result, expected + bias.double(), dtype=name)
    assert_close(scaled_mm(*arguments, output_dtype=dtype), expected, dtype=name)


@pytest.mark.parametrize("recipe", [TENSOR, ROW])
@pytest.mark.parametrize("format_a", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_equals_torch(recipe, format_a, dtype):
    arguments, _ = case(33, 48, 256, (recipe, recipe), format_a)
    for bias in (None, torch.arange(48).to(torch.bfloat16)):
        options = {"bias": bias, "output_dtype": dtype}
        assert_close(
            scaled_mm(*arguments, **options),
            F.scaled_mm(*arguments, **options),
            dtype=str(dtype).removeprefix("torch."),
        )


@pytest.mark.parametrize(("M", "N", "K"), [(0, 16, 32), (5, 0, 32), (5, 16, 0), (0, 0, 0)])
def test_empty_as_torch(M, N, K):
    a, w = torch.zeros(M, K).to(torch.float8_e4m3fn), torch.zeros(N, K).to(torch.float8_e4m3fn)
    arguments = (a, w.t(), torch.rand(M, 1), ROW, torch.rand(1, N), ROW)
    bias = torch.ones(N)  # which torch ignores when K is 0
    got, want = scaled_mm(*arguments, bias=bias), F.scaled_mm(*arguments, bias=bias)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_shapes_of_row_scales():
    (a, b, scale_a, _, scale_b, _), expected = case(5, 16, 32, (ROW, ROW))
    for one in (scale_a, scale_a[:, 0], torch.stack([scale_a, scale_a])[0]):
        for other in (scale_b, scale_b.t(), scale_b[0], scale_b.t().repeat(1, 2)[:, :1]):
            assert_close(scaled_mm(a, b, one, ROW, other, ROW, output_dtype=torch.float32), expected, dtype="float32")


def test_block_scales_of_any_stride():
    (a, b, scale_a, _, scale_b, _), expected = case(40, 200, 384, (ROW_BLOCK, SQUARE_BLOCK))
    assert scale_b.shape == (4, 2)
    assert scale_b[3].isnan().all(), "torch's padding"
    for one in (scale_a, scale_a.contiguous()):
        for other in (scale_b, scale_b.contiguous(), scale_b[:3]):
            out = scaled_mm(a, b, one, ROW_BLOCK, other, SQUARE_BLOCK, output_dtype=torch.float32)
            assert_close(out, expected, dtype="float32")


def swizzled(scale):
    """SWIZZLE_32_4_4 by its definition, a byte at a time; padding is NaN."""
    rows, groups = scale.shape
    row_tiles, group_tiles = -(-rows // 128), -(-groups // 4)
    out = torch.full((row_tiles * group_tiles * 512,), 255, dtype=torch.uint8)
    for row in range(rows):
        for group in range(groups):
            tile = row // 128 * group_tiles + group // 4
            out[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4] = scale[row, group]
    return out


@pytest.mark.parametrize(("M", "N", "K"), [(33, 130, 288), (128, 256, 128)])
def test_swizzled_scales(M, N, K):
    (a, b, scale_a, _, scale_b, _), expected = case(M, N, K, (MX, MX))
    one, other = (swizzled(scale.view(torch.uint8)) for scale in (scale_a, scale_b))
    swizzle = SwizzleType.SWIZZLE_32_4_4
    out = scaled_mm(a, b, one.view(torch.float8_e8m0fnu), MX, other, MX, swizzle, swizzle, output_dtype=torch.float32)
    assert_close(out, expected, dtype="float32")


def test_lists_of_one_as_torch_takes_them():
    (a, b, scale_a, _, scale_b, _), expected = case(5, 16, 32, (ROW, ROW))
    none = SwizzleType.NO_SWIZZLE
    out = scaled_mm(a, b, [scale_a], [ROW], [scale_b], [ROW], [none], [], output_dtype=torch.float32, contraction_dim=[1, 0])
    assert_close(out, expected, dtype="float32")


def test_fnuz_on_the_cpu():
    (a, scale_a), (b, scale_b) = operand(9, 64, ROW, formats.E4M3_FNUZ, 1), operand(10, 64, ROW, formats.E5M2, 2)
    out = scaled_mm(a, b.t(), scale_a, ROW, scale_b, ROW, output_dtype=torch.float32)
    row = formats.BlockScaledLayout.per_row()
    assert_close(out, reference.scaled_matmul(a, scale_a, b, scale_b, row), dtype="float32")


# --- tracing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipes", [(ROW, ROW), (ROW_BLOCK, SQUARE_BLOCK), (MX, MX)])
def test_torch_compile(recipes):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(a, b, scale_a, scale_b, bias):
        return scaled_mm(a, b, scale_a, recipes[0], scale_b, recipes[1], bias=bias).float() * 2

    for M in (5, 6):
        (a, b, scale_a, _, scale_b, _), expected = case(M, 16, 128, recipes)
        bias = torch.ones(16)
        assert_close(compiled(a, b, scale_a, scale_b, bias) / 2, expected + 1, dtype="bfloat16")


def test_torch_compile_with_out(monkeypatch):
    """The graph has the operator: what launches without the dispatcher is not traced."""
    untraceable = torch._C._len_torch_dispatch_stack  # a builtin, as the plan's method is; 0 where nobody looks
    monkeypatch.setattr(launch.directly, "value", lambda *arguments: untraceable())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(a, b, scale_a, scale_b, out):
        return scaled_mm(a, b, scale_a, ROW, scale_b, ROW, out=out) + 1

    (a, b, scale_a, _, scale_b, _), expected = case(5, 16, 128, (ROW, ROW))
    out = torch.full((5, 16), torch.nan)
    result = compiled(a, b, scale_a, scale_b, out)
    assert_close(out, expected, dtype="float32")
    assert torch.equal(result, out + 1)


@pytest.mark.parametrize("operator", ["scaled_mm", "scaled_mm_out"])
def test_opcheck(operator, monkeypatch):
    allclose = torch.allclose

    def bytes_or_close(one, other, **options):  # torch has no allclose of fp8, by which opcheck looks for mutations
        if one.dtype.itemsize == 1:
            return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
        return allclose(one, other, **options)

    monkeypatch.setattr(torch, "allclose", bytes_or_close)
    (a, b, scale_a, _, scale_b, _), _ = case(5, 16, 128, (ROW, ROW))
    arguments = (a, b, scale_a, scale_b, torch.ones(16), options_of(ROW, None, ROW, None, False))
    last = torch.float16 if operator == "scaled_mm" else torch.zeros(5, 16)
    torch.library.opcheck(getattr(torch.ops.tilelang_ext, operator), (*arguments, last))


@pytest.mark.parametrize("operator", ["scaled_mm", "scaled_mm_out"])
def test_compilers_keep_strides(operator):
    """A compiler that laid mat_b out anew, which it may without the tag, would make it row-major."""
    assert torch.Tag.needs_exact_strides in getattr(torch.ops.tilelang_ext, operator).default.tags


def test_meta_tensors_have_the_result_and_the_errors():
    a, b = (
        torch.empty(5, 32, dtype=torch.float8_e4m3fn, device="meta"),
        torch.empty(16, 32, dtype=torch.float8_e4m3fn, device="meta"),
    )
    scales = torch.empty(5, 1, device="meta"), torch.empty(1, 16, device="meta")
    out = scaled_mm(a, b.t(), scales[0], ROW, scales[1], ROW, output_dtype=torch.float16)
    assert (out.shape, out.dtype, out.device.type) == ((5, 16), torch.float16, "meta")
    with pytest.raises(ValueError, match=r"scale_a must have shape \(5, 1\) or \(5,\); got \(16, 1\)"):
        scaled_mm(a, b.t(), scales[1].t(), ROW, scales[1], ROW)


# --- errors ----------------------------------------------------------------------------------------------------------

A, W = torch.zeros(5, 256).to(torch.float8_e4m3fn), torch.zeros(130, 256).to(torch.float8_e4m3fn)
SA, SB = torch.ones(5, 1), torch.ones(1, 130)
BLOCK_A, BLOCK_B = torch.ones(5, 2), torch.ones(2, 2)
ERRORS = {
    "operand dtype": ({"mat_a": A.float()}, TypeError, "mat_a must be one of float8_e4m3fn, .*; got .*float32; quantise it"),
    "e8m0 operand": ({"mat_b": W.view(torch.float8_e8m0fnu).t()}, TypeError, "mat_b must be one of .*; got .*e8m0fnu"),
    "rank": ({"mat_a": A[0]}, ValueError, r"mat_a must have 2 dimensions; got shape \(256,\); reshape it"),
    "K": ({"mat_b": W}, ValueError, r"must agree on K; got \(5, 256\) and \(130, 256\); pass .* weight.t"),
    "output": ({"output_dtype": torch.float64}, TypeError, "output_dtype must be float32, .*; got torch.float64"),
    "no output dtype": ({"output_dtype": None}, TypeError, "output_dtype must be float32, float16 or bfloat16; got None"),
    "out shape": ({"out": torch.empty(5, 129)}, ValueError, r"out must be contiguous of shape \(5, 130\); got \(5, 129\)"),
    "out strides": ({"out": torch.empty(130, 5).t()}, ValueError, r"out must be contiguous .* with strides \(1, 5\)"),
    "out dtype": ({"out": torch.empty(5, 130).double()}, TypeError, "out must be float32, .*; got torch.float64"),
    "bias shape": ({"bias": torch.ones(5)}, ValueError, r"bias must have shape \(130,\); got \(5,\)"),
    "bias dtype": ({"bias": torch.ones(130).int()}, TypeError, "bias must be float32, float16 or bfloat16; got torch.int32"),
    "device": ({"scale_a": SA.to("meta")}, ValueError, "scale_a must be on cpu as mat_a is; got meta; move it"),
    "scale dtype": ({"scale_a": SA.half()}, TypeError, "scale_a must be float32; got torch.float16; convert it"),
    "row shape": ({"scale_b": torch.ones(1, 5)}, ValueError, r"scale_b must have shape \(130, 1\) or \(130,\) or \(1, 130\)"),
    "row of a": ({"scale_a": SA.t()}, ValueError, r"scale_a must have shape .*; got \(1, 5\); pass its .t\(\)"),
    "tensor": ({"recipes": (TENSOR, TENSOR)}, ValueError, r"scale_a must be one element for TensorWise; got \(5, 1\)"),
    "pair": ({"recipes": (ROW, TENSOR)}, ValueError, "recipes must be the same for both, or .*; got RowWise and TensorWise"),
    "squares": ({"recipes": (SQUARE_BLOCK,) * 2}, ValueError, "got BlockWise128x128 and BlockWise128x128; rescale one"),
    "fp4": ({"recipes": (ScalingType.BlockWise1x16,) * 2}, NotImplementedError, "must not be BlockWise1x16, which is for fp4"),
    "two levels": ({"scale_a": [SA, SA]}, NotImplementedError, "scale_a must be one, since two levels are for fp4; got 2"),
    "recipe": ({"recipes": (1, 1)}, TypeError, "scale_recipe_a must be a torch.nn.functional.ScalingType; got int"),
    "swizzle type": ({"swizzle_b": 1}, TypeError, "swizzle_b must be a torch.nn.functional.SwizzleType; got int"),
    "swizzle": ({"swizzle_a": SwizzleType.SWIZZLE_32_4_4}, ValueError, "scales of RowWise must be NO_SWIZZLE"),
    "contraction": ({"contraction_dim": (0, 1)}, ValueError, r"contraction_dim must be \(\) or \(1, 0\); got \(0, 1\)"),
    "1x128": (
        {"recipes": (ROW_BLOCK, ROW_BLOCK), "scale_a": BLOCK_A.t()}, ValueError,
        r"scale_a must have shape \(5, 2\); got \(2, 5\); pass its .t\(\)",
    ),
    "128x128": (
        {"recipes": (ROW_BLOCK, SQUARE_BLOCK), "scale_a": BLOCK_A, "scale_b": torch.ones(3, 2)}, ValueError,
        r"scale_b must have shape \(2, 2\) or \(4, 2\); got \(3, 2\); check its recipe",
    ),
    "1x32 dtype": ({"recipes": (MX, MX)}, TypeError, "scale_a must be float8_e8m0fnu or uint8; got torch.float32"),
    "1x32 K": (
        {"recipes": (MX, MX), "mat_a": A[:, :48], "mat_b": W[:, :48].t(), "scale_a": SA.byte()}, ValueError,
        "K must be a multiple of 32 for BlockWise1x32; got 48; pad K",
    ),
    "1x32 swizzled": (
        {"recipes": (MX, MX), "scale_a": SA.byte(), "swizzle_a": SwizzleType.SWIZZLE_32_4_4}, ValueError,
        "scale_a must be 1024 contiguous bytes for SWIZZLE_32_4_4; got 5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    changes, error, message = ERRORS[name]
    given = {"mat_a": A, "mat_b": W.t(), "scale_a": SA, "scale_b": SB, "recipes": (ROW, ROW), **changes}
    given["scale_recipe_a"], given["scale_recipe_b"] = given.pop("recipes")
    with pytest.raises(error, match="scaled_mm: .*" + message):
        scaled_mm(**given)
