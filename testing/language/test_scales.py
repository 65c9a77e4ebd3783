"""language.scales: the layout that scales have by their shape and dtype, and where the first one lies; errors by message."""

import pytest
from tilelang import tvm

from tilelang_ext.formats import BlockScaledLayout as L
from tilelang_ext.language.e8m0 import e8m0_to_float
from tilelang_ext.language.scales import read_scales

WHOLE = {"shape": (64, 256), "begin": (0, 0), "matrix": (64, 256)}
TILE = {"shape": (64, 128), "begin": (128, 256), "matrix": (512, 1024)}  # rows 128.. and K 256.. of a larger matrix


def read(shape, dtype="float32", layout=None, of=WHOLE):
    return read_scales("T.test", "scale_a", tvm.tirx.decl_buffer(shape, dtype), layout, **of)


@pytest.mark.parametrize(
    ("shape", "dtype", "of", "layout", "k0"),
    [
        ((1, 1), "float32", WHOLE, L.per_tensor(), 0),
        ((64, 1), "float16", WHOLE, L.per_row(), 0),
        ((64,), "float32", WHOLE, L.per_row(), 0),
        ((64, 2), "float32", WHOLE, L.block(1, 128), 0),
        ((1, 2), "bfloat16", WHOLE, L.block(128, 128), 0),
        ((64, 8), "uint8", WHOLE, L.e8m0_k32(), 0),
        ((8,), "float8_e8m0fnu", WHOLE, L.e8m0_k32(), 0),
        ((512, 8), "float32", TILE, L.block(1, 128), 256),  # of the whole matrix: the tile's group is number 2
        ((4, 8), "float32", TILE, L.block(128, 128), 256),
        ((64, 4), "uint8", TILE, L.e8m0_k32(), 0),  # sliced as the tile is
        ((512, 32), "uint8", TILE, L.e8m0_k32(), 256),
    ],
)
def test_the_layout_follows_from_the_shape(shape, dtype, of, layout, k0):
    scales = read(shape, dtype, of=of)
    assert scales.layout == layout
    assert int(scales.k0) == k0
    assert (scales.region is None) == (layout != L.e8m0_k32() or len(shape) == 1)


def test_a_number_scales_the_tensor():
    assert read_scales("T.test", "scale_a", tvm.tirx.Var("s", "float32"), None, **WHOLE).layout == L.per_tensor()


@pytest.mark.parametrize(
    ("shape", "dtype", "layout", "error", "message"),
    [
        (
            (48,),
            "float32",
            None,
            ValueError,
            r"scale_a must fit per_tensor\(\), .* 64 rows .*; got shape \[48\]; slice",
        ),
        ((64,), "int32", None, TypeError, r"scale_a must be float32, .*; got int32; convert the scales"),
        ((64, 8), "float32", L.e8m0_k32(), TypeError, r"scale_a must be uint8, .* for e8m0_k32\(\); got float32; convert"),
        ((64, 8), "float32", L.per_row(), ValueError, r"scale_a must fit per_row\(\) of an operand"),
        (
            (tvm.tirx.Var("n", "int32"), 1),
            "float32",
            None,
            ValueError,
            r"scale_a must fit .*; got shape \[n, 1\]; slice",
        ),
    ],
)
def test_errors(shape, dtype, layout, error, message):
    with pytest.raises(error, match=r"T\.test: " + message):
        read(shape, dtype, layout)


def test_a_byte_is_no_other_number():
    with pytest.raises(
        TypeError, match=r"^T\.e8m0_to_float: byte must be uint8 or float8_e8m0fnu; got int8; pass the stored byte"
    ):
        e8m0_to_float(tvm.tirx.const(1, "int8"))


def test_two_layouts_of_one_shape():
    """64 rows of a matrix of 8192: (64, 1) is one scale per row of the tile, or one per block of 128 rows of the matrix."""
    of = {"shape": (64, 128), "begin": (0, 0), "matrix": (8192, 128)}
    with pytest.raises(
        ValueError, match=r"scale_a of shape \[64, 1\] reads as per_row\(\) or .*block\(128, 128\); .*pass scale"
    ):
        read((64, 1), of=of)
    assert read((64, 1), layout=L.per_row(), of=of).layout == L.per_row()
