"""Encoders, scales, packing: bit for bit, against torch, ml_dtypes and brute force."""

import bisect
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from formats.operands import random_bytes, random_values
from hypothesis import given, settings
from hypothesis import strategies as st

from tilelang_ext import quantization as q
from tilelang_ext.formats import E2M1, E4M3, E4M3_FNUZ, E5M2, E5M2_FNUZ, E8M0, BlockScaledLayout
from tilelang_ext.reference import dequantize

ELEMENTS = [E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ, E2M1]
PER_TENSOR, PER_ROW, MX = BlockScaledLayout.per_tensor(), BlockScaledLayout.per_row(), BlockScaledLayout.e8m0_k32()
by_name = pytest.mark.parametrize("format", ELEMENTS, ids=lambda f: f.name)
seeds = st.integers(0, 2**32 - 1)


def encode_one(value: float, format) -> int:
    return int(q.encode(torch.tensor([value], dtype=torch.float64), format)[0])


def nearest(value: float, format) -> int:
    """The definition: the closest finite code, ties to the even one, saturating; sign of zero as the format has it."""
    positive = [(v, c) for c, v in enumerate(format.values) if math.isfinite(v) and math.copysign(1, v) > 0]
    values = sorted(positive)
    magnitude = min(abs(value), format.max)
    i = bisect.bisect_left(values, (magnitude, -1))
    around = values[max(0, i - 1) : i + 1]
    code = min(around, key=lambda vc: (abs(Fraction(vc[0]) - Fraction(magnitude)), vc[1] & 1))[1]
    negative = math.copysign(1, value) < 0 and (code or format.has_negative_zero)
    return code | (format.sign_mask if negative else 0)


# --- encode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@by_name
def test_encode_all_16_bit_floats(format, dtype):
    values = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[~values.isnan()]
    codes = q.encode(values, format)
    clamped = values.float().clamp(-format.max, format.max)
    witness = clamped.numpy().astype(getattr(ml_dtypes, format.dtype)).view(np.uint8)
    assert (codes.numpy() == witness).all()
    if format is not E2M1:
        assert torch.equal(codes, clamped.to(getattr(torch, format.torch_dtype)).view(torch.uint8))


@by_name
def test_encode_midpoints_and_their_neighbours(format):
    positive = [c for c in range(format.sign_mask) if math.isfinite(format.values[c])]
    low, high = positive[:-1], positive[1:]
    middle = np.array([(format.values[a] + format.values[b]) / 2 for a, b in zip(low, high, strict=True)])
    even = [a if a % 2 == 0 else b for a, b in zip(low, high, strict=True)]
    for values, expected in ((middle, even), (np.nextafter(middle, 0), low), (np.nextafter(middle, np.inf), high)):
        assert q.encode(torch.from_numpy(values), format).tolist() == expected
        assert [c & ~format.sign_mask for c in q.encode(torch.from_numpy(-values), format).tolist()] == expected


@by_name
def test_encode_returns_every_finite_code(format):
    codes = torch.arange(1 << format.bits, dtype=torch.uint8)
    finite = codes[torch.tensor(format.values).isfinite()]
    assert torch.equal(q.encode(q.decode(finite, format), format), finite)


@by_name
@settings(max_examples=60)
@given(data=st.data())
def test_encode_is_nearest_even(format, data):
    near = st.floats(-2 * format.max, 2 * format.max) | st.floats(-4 * format.smallest, 4 * format.smallest)
    value = data.draw(near | st.floats(allow_nan=False))
    assert encode_one(value, format) == nearest(value, format)


# value, format, code, why
TRAPS = [
    (1.9375, E4M3, 0x40, "a tie that carries into the exponent is 2"),
    (1.0625 + 2**-40, E4M3, 0x39, "rounding through float32 first would make a tie of it"),
    (0.5 * 2**-9, E4M3, 0x00, "tie between zero and the first subnormal"),
    (1.5 * 2**-9, E4M3, 0x02, "tie between subnormals"),
    (7.5 * 2**-9, E4M3, 0x08, "the last subnormal carries into the first normal"),
    (463.9, E4M3, 0x7E, "below the midpoint to the absent 480"),
    (464.0, E4M3, 0x7E, "at it: 0x7F is NaN"),
    (1e300, E4M3, 0x7E, "saturates"),
    (-math.inf, E4M3, 0xFE, "an infinity saturates"),
    (61440.0, E5M2, 0x7B, "the midpoint to the absent 65536 would round to infinity"),
    (math.inf, E5M2, 0x7B, "an infinity saturates, though the format has one"),
    (248.0, E4M3_FNUZ, 0x7F, "saturates at 240"),
    (-0.0, E4M3, 0x80, "keeps the sign"),
    (-0.0, E4M3_FNUZ, 0x00, "0x80 would be NaN"),
    (-1e-9, E5M2_FNUZ, 0x00, "0x80 would be NaN"),
    (5e-324, E5M2, 0x00, "a float64 subnormal"),
    (math.nan, E4M3, 0x7F, "NaN"),
    (math.nan, E5M2, 0x7F, "NaN"),
    (-math.nan, E4M3_FNUZ, 0x80, "NaN"),
]


@pytest.mark.parametrize(("value", "format", "code", "why"), TRAPS, ids=[t[3] for t in TRAPS])
def test_encode_traps(value, format, code, why):
    assert encode_one(value, format) == code, why


def test_encode_halves_between_248_and_432():
    # Another encoder's overflow: magnitudes just under e4m3fn's largest.
    values = torch.arange(248, 449, 0.25, dtype=torch.float64).half()
    assert q.encode(values, E4M3).tolist() == [nearest(v, E4M3) for v in values.tolist()]


def test_encode_e2m1_midpoints():
    values = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -5])
    assert q.decode(q.encode(values, E2M1), E2M1).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -4]


def test_encode_errors():
    with pytest.raises(ValueError, match=r"E2M1 has no NaN; got NaN at \(1, 0\)"):
        q.encode(torch.tensor([[1.0], [math.nan]]), E2M1)
    with pytest.raises(ValueError, match="E8M0 holds scales"):
        q.encode(torch.ones(1), E8M0)
    with pytest.raises(TypeError, match=r"values must be floats; got torch\.int32"):
        q.encode(torch.ones(1, dtype=torch.int32), E4M3)


# --- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_is_exact(dtype):
    codes = torch.arange(256, dtype=torch.uint8)
    for format in [*ELEMENTS[:4], E8M0]:
        expected = torch.tensor(format.values, dtype=torch.float64)
        for stored in (codes, codes.view(getattr(torch, format.torch_dtype))):
            got = q.decode(stored, format, dtype=dtype)
            assert got.dtype == dtype
            assert torch.equal(got.double().nan_to_num(nan=-7e77), expected.nan_to_num(nan=-7e77))


def test_zero_sentinel():
    plain, zeros = (q.decode(torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8), E8M0, zero_sentinel=z) for z in (0, 1))
    assert plain[:4].tolist() == [2.0**-127, 2.0**-126, 1, 2.0**127]
    assert plain[4].isnan()
    assert zeros.tolist() == [0, 2.0**-126, 1, 2.0**127, 0]


def test_decode_errors():
    with pytest.raises(ValueError, match="codes: must be below 16, one per element; got 33; unpack"):
        q.decode(torch.tensor([33], dtype=torch.uint8), E2M1)
    with pytest.raises(TypeError, match=r"codes: must be uint8 or torch\.float8_e4m3fn; got torch\.float8_e5m2"):
        q.decode(torch.zeros(1).to(torch.float8_e5m2), E4M3)
    with pytest.raises(ValueError, match="zero_sentinel: is an option of E8M0; got E4M3"):
        q.decode(torch.zeros(1, dtype=torch.uint8), E4M3, zero_sentinel=True)


# --- packing and flavours --------------------------------------------------------------------------------------------


def test_the_low_nibble_is_the_even_index():
    assert q.pack(torch.tensor([[0x1, 0x2, 0xF, 0x0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    assert q.unpack(torch.tensor([[0x21, 0x0F]], dtype=torch.uint8)).tolist() == [[0x1, 0x2, 0xF, 0x0]]


@settings(max_examples=20)
@given(seed=seeds, rows=st.integers(0, 5), k=st.integers(0, 20))
def test_pack_round_trip(seed, rows, k):
    packed = random_bytes(seed, rows, k)
    assert torch.equal(q.pack(q.unpack(packed)), packed)
    assert torch.equal(q.unpack(packed.view(torch.float4_e2m1fn_x2)), q.unpack(packed))


def test_pack_errors():
    with pytest.raises(ValueError, match="pack: K must be even; got 3"):
        q.pack(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="below 16"):
        q.pack(torch.full((2, 2), 16, dtype=torch.uint8))


@pytest.mark.parametrize(("ocp", "fnuz"), [(E4M3, E4M3_FNUZ), (E5M2, E5M2_FNUZ)], ids=["E4M3", "E5M2"])
def test_flavours_are_exact_for_every_code(ocp, fnuz):
    codes = torch.tensor([c for c in range(256) if c not in ocp.inf_codes], dtype=torch.uint8)
    converted, factor = q.ocp_to_fnuz(codes, ocp)
    assert factor == 2
    assert torch.equal(q.decode(converted, fnuz).nan_to_num() * factor, q.decode(codes, ocp).nan_to_num())
    assert torch.equal(q.decode(converted, fnuz).isnan(), q.decode(codes, ocp).isnan())
    for code in range(256):  # each alone takes the factor that suits it
        if math.isinf(fnuz.values[code]):
            continue
        back, factor = q.fnuz_to_ocp(torch.tensor([code], dtype=torch.uint8), fnuz)
        value = q.decode(back, ocp).item() * factor
        assert value == fnuz.values[code] or (math.isnan(value) and code == 0x80)
        assert factor == (1 if (code & 0x7F) in {c & 0x7F for c in (*ocp.nan_codes, *ocp.inf_codes)} else 0.5)


def test_flavour_bytes_stay_but_for_0x80():
    codes = torch.tensor([0x00, 0x80, 0x7F, 0x01, 0xFE], dtype=torch.uint8).view(torch.float8_e4m3fn)
    converted, _ = q.ocp_to_fnuz(codes, E4M3)
    assert converted.dtype == torch.float8_e4m3fnuz
    assert converted.view(torch.uint8).tolist() == [0x00, 0x00, 0x80, 0x01, 0xFE]


def test_flavour_errors():
    with pytest.raises(ValueError, match=r"have equals in E4M3; got 0.0009765625 at \(1,\); requantise"):
        q.fnuz_to_ocp(torch.tensor([0x7F, 0x01], dtype=torch.uint8), E4M3_FNUZ)  # 240 wants factor 1, 2^-10 wants 0.5
    with pytest.raises(ValueError, match=r"have equals in E5M2 FNUZ; got inf at \(0,\)"):
        q.ocp_to_fnuz(torch.tensor([0x7C], dtype=torch.uint8), E5M2)
    with pytest.raises(TypeError, match="format: must be E4M3 or E5M2; got E4M3 FNUZ"):
        q.ocp_to_fnuz(torch.zeros(1, dtype=torch.uint8), E4M3_FNUZ)


# --- scales and blocks -----------------------------------------------------------------------------------------------


def ceil_log2(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length() - 1
    while Fraction(2) ** e < x:
        e += 1
    return e


@pytest.mark.parametrize("rounding", ["round_up", "floor"])
@by_name
@settings(max_examples=60)
@given(data=st.data())
def test_choose_e8m0_is_its_formula(format, rounding, data):
    power = data.draw(st.integers(-149, 127))
    amax = data.draw(
        st.floats(0, width=32, allow_infinity=False, exclude_min=True)
        | st.sampled_from(
            [2.0**power, format.max * 2.0 ** (power % 60), np.nextafter(2.0**power, 0), np.nextafter(2.0**power, 9e99)]
        )
    )
    log2 = ceil_log2(Fraction(amax) / Fraction(format.max))
    if rounding == "floor":
        log2 = -ceil_log2(1 / Fraction(amax)) - format.max_exponent  # floor(log2 x) = -ceil(log2 1/x)
    byte = int(q.choose_e8m0(torch.tensor([amax], dtype=torch.float64), format, rounding)[0])
    assert byte == min(max(log2, -127), 127) + 127


def test_choose_e8m0_ends_and_zero():
    amax = torch.tensor([0.0, 6.0, 6.0000005, 3.0, 2.0**-149, 3.4e38])
    assert q.choose_e8m0(amax, E2M1).tolist() == [127, 127, 128, 126, 0, 253]
    assert q.choose_e8m0(torch.tensor([7.9]), E2M1, "floor").tolist() == [127]
    with pytest.raises(ValueError, match="rounding: must be 'round_up' or 'floor'; got 'up'"):
        q.choose_e8m0(amax, E2M1, "up")


LAYOUTS = [PER_TENSOR, PER_ROW, BlockScaledLayout.block(1, 128), BlockScaledLayout.block(128, 128), MX]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda b: f"{b.rows}x{b.k}")
@pytest.mark.parametrize("format", [E4M3, E4M3_FNUZ, E2M1], ids=lambda f: f.name)
@settings(max_examples=6)
@given(seed=seeds, lead=st.sampled_from([(), (2,)]), rows=st.sampled_from([0, 1, 3, 130]), groups=st.integers(0, 9))
def test_quantize_each_block_by_its_own_maximum(format, layout, seed, lead, rows, groups):
    x = random_values(seed, *lead, rows, 32 * groups)
    codes, scale = q.quantize(x, format, layout)
    assert scale.shape == (*lead, *layout.scale_shape(rows, 32 * groups))
    assert scale.dtype == (torch.float32 if layout.scale_format is None else torch.uint8)
    back = dequantize(codes, scale, format, layout)
    block_rows, block_k = layout.rows or max(rows, 1), layout.k or max(32 * groups, 1)
    for i in range(0, rows, block_rows):
        for j in range(0, 32 * groups, block_k):
            want, got = (t[..., i : i + block_rows, j : j + block_k] for t in (x, back))
            # half a unit in the last place of the block's largest binade, and the rounding of a float32 scale
            limit = want.abs().amax((-2, -1), keepdim=True) * (2.0 ** -(format.mantissa_bits + 1) + 1e-6)
            assert ((want - got).abs() <= limit).all()


def test_quantize_nvfp4():
    layout = BlockScaledLayout.e4m3_k16()
    power = (torch.arange(20) % 8 - 2).reshape(5, 4).repeat_interleave(16, -1)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9)) * 2.0**power
    codes, scale = q.quantize(x, E2M1, layout)
    amax = x.unflatten(-1, (-1, 16)).abs().amax(-1)
    assert torch.equal(scale, q.encode(amax / 6, E4M3))
    # a scale is within 2^-4 of amax / 6, so a value is within 1/4 of amax of its own, and a block of zeros stays zero
    error = (dequantize(codes, scale, E2M1, layout) - x).abs().unflatten(-1, (-1, 16)).amax(-1)
    assert (error <= amax / 4).all()
    assert dequantize(*q.quantize(x * 0, E2M1, layout), E2M1, layout).eq(0).all()


def test_quantize_round_up_never_saturates_and_floor_may():
    x = torch.full((1, 32), 7.0)
    assert q.quantize(x, E2M1, MX)[1].item() == 128
    assert dequantize(*q.quantize(x, E2M1, MX, rounding="floor"), E2M1, MX).max() == 6
    assert dequantize(*q.quantize(x, E2M1, MX), E2M1, MX).max() == 8  # 3.5 ties to 4


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda b: f"{b.rows}x{b.k}")
def test_quantize_zeros_and_the_smallest_values(layout):
    x = torch.zeros(2, 128)
    codes, scale = q.quantize(x, E4M3, layout)
    assert codes.view(torch.uint8).eq(0).all()
    assert (scale == (127 if layout is MX else 1)).all()
    tiny = q.quantize(x + 1e-42, E4M3, layout)
    assert dequantize(*tiny, E4M3, layout).isfinite().all()
    assert layout is MX or (tiny[1] == 2.0**-126).all()


def test_quantize_errors():
    with pytest.raises(ValueError, match=r"values must be finite; got inf at \(0, 1\)"):
        q.quantize(torch.tensor([[1, math.inf]]), E4M3, PER_ROW)
    with pytest.raises(ValueError, match="K must be a multiple of 32"):
        q.quantize(torch.ones(1, 33), E4M3, MX)
    with pytest.raises(ValueError, match=r"must have rows and K; got shape \(4,\)"):
        q.quantize(torch.ones(4), E4M3, PER_ROW)


def test_expand_scale_errors():
    scale = random_bytes(0, 4, 2)
    with pytest.raises(ValueError, match=r"scale: must have shape \(4, 64\) or \(64,\); got \(4, 2\)"):
        q.expand_scale(scale, MX, (4, 2048))
    with pytest.raises(TypeError, match=r"scale: must be float32, float16 or bfloat16; got torch\.uint8"):
        q.expand_scale(scale, BlockScaledLayout.block(1, 16), (4, 32))
