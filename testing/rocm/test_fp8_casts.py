"""Conversions, constants and arithmetic of fp8 types that are not the chip's: every code, and every half rounded to it."""

import numpy as np
import pytest
import torch
from rocm.fp8_kernels import CODES, CONSTANT, FOREIGN, HALVES, conversions
from rocm.kernels import lower

from tilelang_ext import formats, simulate


def expected_codes(values: np.ndarray, format) -> torch.Tensor:
    """Return the codes of float32 values by the format's table: to nearest, to even, saturating."""
    magnitudes = np.array(format.values[: format.values.index(format.max) + 1])
    absolute = np.minimum(np.abs(values), format.max)
    above = np.searchsorted(magnitudes, absolute).clip(1, len(magnitudes) - 1)
    low, high = absolute - magnitudes[above - 1], magnitudes[above] - absolute
    code = np.where((high < low) | ((high == low) & (above % 2 == 0)), above, above - 1)
    negative = np.signbit(values) & ((code > 0) | format.has_negative_zero)
    code = np.where(np.isnan(values), format.nan_codes[0], code | np.where(negative, format.sign_mask, 0))
    return torch.from_numpy(code.astype(np.uint8))


@pytest.mark.parametrize("arch", FOREIGN)
def test_conversions(arch):
    e4, e5 = FOREIGN[arch]
    dtypes = [getattr(torch, format.torch_dtype) for format in (e4, e5)]
    codes = torch.arange(CODES, dtype=torch.uint8)
    x = torch.arange(HALVES, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()
    v4, v5 = torch.zeros(CODES), torch.zeros(CODES, dtype=torch.float16)
    c4, c5, s4, s5, k = (torch.zeros(n, dtype=torch.uint8) for n in (HALVES, HALVES, CODES, CODES, 2))
    typed = [c4.view(dtypes[0]), c5.view(dtypes[1]), s4.view(dtypes[0]), s5.view(dtypes[1]), k.view(dtypes[0])]
    program = conversions((e4.dtype, e5.dtype), HALVES)
    report = simulate(program, codes.view(dtypes[0]), codes.view(dtypes[1]), x, v4, v5, *typed, target=f"hip -mcpu={arch}")
    assert not report.findings, str(report)
    values4, values5 = (torch.tensor(format.values) for format in (e4, e5))
    torch.testing.assert_close(v4.double(), values4.double(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v5.double(), values5.double(), rtol=0, atol=0, equal_nan=True)
    for found, format in ((c4, e4), (c5, e5)):
        want = expected_codes(x.numpy(), format)
        assert torch.equal(found, want), (x[found != want][:8], found[found != want][:8], want[found != want][:8])
    finite = values4.isfinite() & values4.flip(0).isfinite()
    assert torch.equal(s4[finite], expected_codes((values4 + values4.flip(0)).numpy(), e4)[finite])
    finite = values5.isfinite() & values5.flip(0).isfinite()
    product = expected_codes((values5 * values5.flip(0)).numpy(), e5)
    want = torch.tensor(np.fmax(np.array(e5.values)[product], np.array(e5.values)), dtype=torch.float32)
    assert torch.equal(values5[s5.long()][finite], want[finite])
    assert k.tolist() == [e4.encode(CONSTANT)] * 2


@pytest.mark.parametrize("arch", FOREIGN)
def test_the_chips_own_types_keep_upstreams_conversions(arch):
    own = [format.dtype for format in FOREIGN["gfx950" if arch == "gfx942" else "gfx942"]]
    assert "_of_" not in lower(conversions(own, CODES), arch).source


@pytest.mark.parametrize("format", formats.FP8_OPERANDS, ids=lambda format: format.dtype)
def test_encode(format):
    """One value at a time: what the table of all values says."""
    values = np.array(
        [0.0, -0.0, 0.3, -0.3, 1.0, format.max, format.max * 4, format.smallest / 2, format.smallest * 0.75, np.nan]
    )
    assert [format.encode(float(value)) for value in values] == expected_codes(values, format).tolist()
    assert format.encode(float("-inf")) == (format.inf_codes[1] if format.inf_codes else format.encode(-format.max))
