"""What docs/guide/language_support.md says of upstream's front end; when upstream repairs one, its test and its row go."""

import pytest
import torch
from tilelang import tvm

from tilelang_ext import language as T


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_min_value_of_fnuz_is_zero(dtype):
    assert T.min_value(dtype).value == 0
    assert -T.max_value(dtype).value <= torch.finfo(getattr(torch, dtype)).min, "a larger one saturates"


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
