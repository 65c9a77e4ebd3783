"""The table of facts, for all codes, against torch's casts and ml_dtypes, which share no code with it."""

import ast
import math
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from tilelang_ext import formats
from tilelang_ext.formats import E2M1, E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, E8M0, FORMATS, BlockScaledLayout, format_of

BYTE_FORMATS = [f for f in FORMATS if f.bits == 8]
NAMES = [f.name for f in FORMATS]


def assert_same_values(actual, expected):
    """Equal float64 bits, zeros' signs too; NaN where the other has NaN."""
    a, e = np.asarray(actual, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    same = (a.view(np.int64) == e.view(np.int64)) | (np.isnan(a) & np.isnan(e))
    assert same.all(), f"code {int(np.argmin(same)):#04x}: {a[~same][0]} instead of {e[~same][0]}"


@pytest.mark.parametrize("format", BYTE_FORMATS, ids=lambda f: f.name)
def test_all_codes_equal_torch(format):
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, format.torch_dtype))
    assert_same_values(format.values, codes.float().double())


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_all_codes_equal_ml_dtypes(format):
    codes = np.arange(1 << format.bits, dtype=np.uint8).view(getattr(ml_dtypes, format.dtype))
    assert_same_values(format.values, codes.astype(np.float64))


# format, bits, bias, largest, smallest above zero, codes of NaN, codes of Inf, floor(log2(largest))
FACTS = [
    (E4M3, 8, 7, 448, 2**-9, {0x7F, 0xFF}, set(), 8),
    (E5M2, 8, 15, 57344, 2**-16, {0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}, {0x7C, 0xFC}, 15),
    (E4M3_FNUZ, 8, 8, 240, 2**-10, {0x80}, set(), 7),
    (E5M2_FNUZ, 8, 16, 57344, 2**-17, {0x80}, set(), 15),
    (E8M0, 8, 127, 2**127, 2**-127, {0xFF}, set(), 127),
    (E2M1, 4, 1, 6, 0.5, set(), set(), 2),
]


@pytest.mark.parametrize(("format", "bits", "bias", "largest", "smallest", "nan", "inf", "emax"), FACTS, ids=NAMES)
def test_facts(format, bits, bias, largest, smallest, nan, inf, emax):
    assert (format.bits, format.bias, format.max, format.smallest) == (bits, bias, largest, smallest)
    assert {c for c, v in enumerate(format.values) if math.isnan(v)} == set(format.nan_codes) == nan
    assert {c for c, v in enumerate(format.values) if math.isinf(v)} == set(format.inf_codes) == inf
    assert format.max_exponent == emax


def test_e4m3_subnormals_are_not_twice_too_large():
    assert [E4M3.decode(code) for code in range(1, 8)] == [m * 2.0**-9 for m in range(1, 8)]


def test_e2m1_values():
    magnitudes = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    assert_same_values(E2M1.values, [*magnitudes, *(-m for m in map(float, magnitudes))])


def test_e8m0_ends():
    assert E8M0.decode(0) == 2.0**-127
    assert E8M0.decode(formats.E8M0_ONE) == 1.0
    assert math.isnan(E8M0.decode(255))


@pytest.mark.parametrize("fnuz", [E4M3_FNUZ, E5M2_FNUZ], ids=lambda f: f.name)
def test_fnuz_is_half_of_ocp_for_every_byte_finite_in_both(fnuz):
    ocp = formats.OCP_OF_FNUZ[fnuz]
    assert formats.FNUZ_OF_OCP[ocp] is fnuz
    finite = [c for c in range(256) if math.isfinite(fnuz.values[c]) and math.isfinite(ocp.values[c])]
    assert len(finite) == 256 - 1 - len(ocp.nan_codes) - len(ocp.inf_codes)  # 0x80 is NaN in FNUZ alone
    assert all(fnuz.values[c] == formats.FNUZ_PER_OCP * ocp.values[c] for c in finite)
    assert not fnuz.has_negative_zero
    assert ocp.has_negative_zero


@pytest.mark.parametrize(("format", "code"), [(E2M1, 16), (E4M3, 256), (E4M3, -1)])
def test_decode_refuses_codes_out_of_range(format, code):
    with pytest.raises(ValueError, match=rf"{format.name}.decode: code must be in \[0, {1 << format.bits}\); got {code}"):
        format.decode(code)


@pytest.mark.parametrize("format", FORMATS, ids=NAMES)
def test_format_of_every_spelling(format):
    assert format_of(format.dtype) is format
    assert format_of(getattr(torch, format.torch_dtype)) is format


@pytest.mark.parametrize("dtype", ["float16", torch.uint8, "float8", "float8_e8m0", "xfloat8_e4m3fn"])
def test_format_of_matches_whole_names(dtype):
    with pytest.raises(TypeError, match="dtype: must be one of float8_e4m3fn"):
        format_of(dtype)


def test_e8m0_is_no_operand():
    assert set(formats.FP8_OPERANDS) == set(BYTE_FORMATS) - {E8M0}


@pytest.mark.parametrize(
    ("layout", "rows", "k", "shape"),
    [
        (BlockScaledLayout.per_tensor(), 7, 33, (1, 1)),
        (BlockScaledLayout.per_row(), 7, 33, (7, 1)),
        (BlockScaledLayout.block(1, 128), 7, 300, (7, 3)),  # the last group is partial
        (BlockScaledLayout.block(128, 128), 576, 256, (5, 2)),  # DeepSeek's kv_a_proj has 576 rows
        (BlockScaledLayout.e8m0_k32(), 7, 96, (7, 3)),
        (BlockScaledLayout.e4m3_k16(), 7, 48, (7, 3)),
        (BlockScaledLayout.e8m0_k32(), 0, 0, (0, 0)),
    ],
)
def test_scale_shape(layout, rows, k, shape):
    assert layout.scale_shape(rows, k) == shape


def test_layout_errors():
    with pytest.raises(ValueError, match="K must be a multiple of 32, which share a scale byte; got 48"):
        BlockScaledLayout.e8m0_k32().scale_shape(4, 48)
    with pytest.raises(ValueError, match=r"block: both extents must be at least 1; got \(0, 128\)"):
        BlockScaledLayout.block(0, 128)


def test_formats_imports_the_standard_library_alone():
    tree = ast.parse(Path(formats.__file__).read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= set(sys.stdlib_module_names)
