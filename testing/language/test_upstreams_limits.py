"""What docs/guide/language_support.md says of upstream's front end; when upstream repairs one, its test and its row go."""

import pytest
import tilelang.language as upstream
import torch
from tilelang import tvm

from tilelang_ext import language as T
from tilelang_ext import simulate


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_min_value_of_fnuz_is_zero(dtype):
    limits = torch.finfo(getattr(torch, dtype))
    assert T.min_value(dtype).value == 0
    assert (T.max_value(dtype).value, -T.max_value(dtype).value) == (limits.max, limits.min)
    assert T.max_value(dtype).dtype == dtype


def test_bounds_of_upstream_are_no_numbers_of_the_type():
    """What tilelang_ext.language has its own functions for; these go when upstream has the numbers."""
    assert upstream.max_value("bfloat16").value == -upstream.min_value("bfloat16").value == torch.finfo(torch.float32).max
    assert upstream.max_value("float8_e4m3fnuz").value == 448


def test_bounds_in_a_kernel():
    """Of every type that a kernel can have: an element of each bound, and no infinity."""

    @T.prim_func
    def kernel(
        B: T.Tensor((2,), "bfloat16"),
        H: T.Tensor((2,), "float16"),
        F: T.Tensor((2,), "float32"),
        E: T.Tensor((2,), "float8_e4m3fn"),
    ):
        with T.Kernel(1, threads=32):
            T.fill(B[0:1], T.max_value("bfloat16"))
            T.fill(B[1:2], T.min_value("bfloat16"))
            T.fill(H[0:1], T.max_value("float16"))
            T.fill(H[1:2], T.min_value("float16"))
            T.fill(F[0:1], T.max_value("float32"))
            T.fill(F[1:2], T.min_value("float32"))
            T.fill(E[0:1], T.max_value("float8_e4m3fn"))
            T.fill(E[1:2], T.min_value("float8_e4m3fn"))

    tensors = [torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)]
    for target in ("metal", "hip -mcpu=gfx942"):
        assert simulate(kernel, *tensors, target=target).findings == ()
        for tensor in tensors:
            limits = torch.finfo(tensor.dtype)
            assert tensor.tolist() == [limits.max, limits.min]
            tensor.zero_()


@pytest.mark.parametrize("operator", ["__invert__", "__neg__"])
def test_operators_of_a_comparison_without_a_type(operator):
    """TVM defers `a == b` until it is used, and these two operators ask it for a type."""
    a, b = T.float32(1) + T.dynamic("n"), T.float32(2)
    with pytest.raises(AttributeError, match="'EqualOp' object has no attribute 'dtype'"):
        getattr(a == b, operator)()
    assert str(T.Not(a == b).dtype) == str((~(a < b)).dtype) == "bool"


def test_constants_outside_of_an_unsigned_type():
    with pytest.raises(tvm.error.InternalError, match="cannot make uint from negative value -1"):
        T.cast(-1, "uint8")
    assert int(T.cast(255, "uint8")) == 255
