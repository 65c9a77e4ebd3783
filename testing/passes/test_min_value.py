"""What docs/guide/language_support.md says of T.min_value; when upstream repairs it, this test and the row go."""

import pytest
import torch

from tilelang_ext import language as T


@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_min_value_of_fnuz_is_upstreams_zero(dtype):
    assert T.min_value(dtype).value == 0
    assert -T.max_value(dtype).value <= torch.finfo(getattr(torch, dtype)).min, "a larger one saturates"
