"""Floats to codes and scales on the host, and back; computed in float64, so exact, and not available on MPS.

The layout that the kernels read, and that everything here takes and returns:

    8-bit formats    (..., rows, K)      in the format's torch dtype
    E2M1             (..., rows, K / 2)  uint8, low nibble = even K
    float scales     (..., ceil(rows / block rows), ceil(K / block k))  float32
    byte scales      (..., rows, K / 32 or K / 16)  uint8 codes

Quantisers in the field choose scales differently, and libraries change theirs: compare dequantised values, never the codes of
two quantisers. `checkpoints` converts the layouts of gpt-oss, MLX and DeepSeek to and from this one.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F

from tilelang_ext import formats
from tilelang_ext.formats import E2M1, E8M0, BlockScaledLayout, FloatFormat

Tensor = torch.Tensor

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a subnormal scale could be flushed to zero on a device


def _check(tensor: Tensor, format: FloatFormat, name: str) -> None:
    if not isinstance(tensor, Tensor):
        kind = f"{type(tensor).__module__.partition('.')[0]} {type(tensor).__name__}"
        raise TypeError(f"{name}: must be a torch tensor; got a {kind}; convert it, a numpy array with torch.from_numpy")
    if not isinstance(format, FloatFormat):
        raise TypeError(
            f"{name.partition(':')[0]}: format must be a FloatFormat; got {format!r}; pass one of tilelang_ext.formats, "
            "such as E4M3, or format_of a dtype"
        )


# --- one element -----------------------------------------------------------------------------------------------------


def raw_codes(codes: Tensor, format: FloatFormat, name: str = "codes") -> Tensor:
    """Return the bytes of `codes` as uint8; they come as uint8 or in the format's torch dtype."""
    _check(codes, format, name)
    accepted = {torch.uint8, getattr(torch, format.torch_dtype, torch.uint8)}
    if codes.dtype not in accepted:
        raise TypeError(f"{name}: must be uint8 or torch.{format.torch_dtype}; got {codes.dtype}; view the bytes as uint8")
    return codes.view(torch.uint8)


@cache
def _values(format: FloatFormat, zero_sentinel: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = list(format.values)
    if zero_sentinel:
        for code in formats.E8M0_ZERO_SENTINELS:
            values[code] = 0.0
    return torch.tensor(values, dtype=torch.float64).to(device, dtype)


def decode(codes: Tensor, format: FloatFormat, *, dtype: torch.dtype = torch.float32, zero_sentinel: bool = False) -> Tensor:
    """value[i] = format.decode(codes[i]): exact in float32 and float64; one code per element (unpack E2M1 first).

    `zero_sentinel` reads the E8M0 bytes 0 and 255 as zero, for data made so.
    """
    if zero_sentinel and format is not E8M0:
        raise ValueError(f"zero_sentinel: is an option of E8M0; got {format.name}; leave it out")
    raw = raw_codes(codes, format)
    _check_nibbles(raw, format)
    return _values(format, zero_sentinel, dtype, raw.device)[raw.int()]


def encode(values: Tensor, format: FloatFormat) -> Tensor:
    """Return the uint8 codes nearest to `values` (any float dtype), ties to even, saturating at +-format.max, Inf too.

    NaN becomes the format's NaN; E2M1 has none: ValueError. A zero keeps its sign where the format has a negative zero.
    """
    _check(values, format, "encode: values")
    if format is E8M0:
        raise ValueError("encode: E8M0 holds scales, chosen from a block's maximum; got E8M0; use choose_e8m0")
    if not values.dtype.is_floating_point:
        raise TypeError(f"encode: values must be floats; got {values.dtype}; convert them first")
    x = values.double()
    nan = x.isnan()
    if not format.nan_codes and nan.any():
        raise ValueError(f"encode: {format.name} has no NaN; got NaN at {_first(nan)}; replace it first")
    magnitude = x.nan_to_num(nan=0.0).abs().clamp(max=format.max)
    # Exponent field (1 serves subnormals too) and how many units in the last place; a carry walks into the next field.
    field = (torch.frexp(magnitude).exponent - 1 + format.bias).clamp(min=1)
    units = torch.round(magnitude * _power_of_two(format.mantissa_bits + format.bias - field)).int()
    codes = torch.where(units == 0, 0, ((field - 1) << format.mantissa_bits) + units)
    negative = x.signbit() if format.has_negative_zero else x.signbit() & (codes != 0)
    codes = torch.where(negative, codes | format.sign_mask, codes)
    if format.nan_codes:
        codes = torch.where(nan, format.nan_codes[0], codes)
    return codes.to(torch.uint8)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64 by bits, for exponents of normal numbers: no pow or exp2, which may round or flush."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def pack(codes: Tensor) -> Tensor:
    """Pack E2M1 codes (..., K) uint8 into bytes (..., K / 2): byte[i] = code[2i] | code[2i + 1] << 4."""
    raw = raw_codes(codes, E2M1)
    if raw.shape[-1] % formats.CODES_PER_BYTE:
        raise ValueError(f"pack: K must be even; got {raw.shape[-1]}; pad K with zeros")
    _check_nibbles(raw, E2M1)
    return raw[..., 0::2] | raw[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Unpack bytes (..., K / 2) into E2M1 codes (..., K) uint8: the inverse of `pack`."""
    raw = raw_codes(packed, E2M1, "packed")
    return torch.stack([raw & 0xF, raw >> 4], dim=-1).flatten(-2)


def fnuz_to_ocp(codes: Tensor, format: FloatFormat) -> tuple[Tensor, float]:
    """Return OCP codes and a factor (0.5, else 1) with fnuz value = factor * ocp value; ValueError where neither is exact.

    Under 0.5 the bytes stay, and all is exact but +-240 (E5M2: magnitudes from 32768 up); under 1 all is exact but odd
    multiples of the smallest FNUZ subnormal.
    """
    return _convert_flavour(codes, format, formats.OCP_OF_FNUZ, (formats.FNUZ_PER_OCP, 1.0))


def ocp_to_fnuz(codes: Tensor, format: FloatFormat) -> tuple[Tensor, float]:
    """Return FNUZ codes and the factor 2 with ocp value = 2 * fnuz value; exact but for -0 becoming 0 (Inf: ValueError)."""
    return _convert_flavour(codes, format, formats.FNUZ_OF_OCP, (1 / formats.FNUZ_PER_OCP,))


def _convert_flavour(codes: Tensor, source: FloatFormat, targets: dict, factors: tuple[float, ...]) -> tuple[Tensor, float]:
    if source not in targets:
        raise TypeError(f"format: must be {' or '.join(f.name for f in targets)}; got {source.name}; convert the other way")
    target, raw = targets[source], raw_codes(codes, source).int()
    values = _values(source, False, torch.float64, raw.device)
    for factor in factors:
        table = encode(values / factor, target)
        exact = (decode(table, target, dtype=torch.float64) * factor == values) | values.isnan()
        if exact[raw].all():
            return table[raw].view(getattr(torch, target.torch_dtype)), factor
    where = _first(~exact[raw])
    raise ValueError(
        f"codes: must have equals in {target.name}; got {values[raw[where]].item()} at {where}; requantise the values"
    )


# --- blocks ----------------------------------------------------------------------------------------------------------


def choose_e8m0(amax: Tensor, format: FloatFormat, rounding: str = "round_up") -> Tensor:
    """Return the E8M0 bytes of blocks with largest magnitudes `amax`; a block of zeros gets 2^0.

    round_up: 2^ceil(log2(amax / max)), so that nothing saturates; floor (OCP): 2^(floor(log2(amax)) - emax). Both are
    computed from the fraction and exponent of `amax`, so powers of two are never missed, and clamped to [2^-127, 2^127].
    """
    if rounding not in ("round_up", "floor"):
        raise ValueError(f"rounding: must be 'round_up' or 'floor'; got {rounding!r}; use the default")
    fraction, exponent = torch.frexp(amax.double())
    scale = exponent - 1 - format.max_exponent
    if rounding == "round_up":
        scale = scale + (fraction > math.frexp(format.max)[0])
    byte = scale.clamp(-E8M0.bias, E8M0.bias) + E8M0.bias
    return torch.where(amax == 0, formats.E8M0_ONE, byte).to(torch.uint8)


def quantize(
    values: Tensor, format: FloatFormat, layout: BlockScaledLayout, *, rounding: str = "round_up"
) -> tuple[Tensor, Tensor]:
    """Return (codes, scale) with values ~ codes * scale, every block scaled by its own largest magnitude.

    values (..., rows, K), finite; codes and scale as the kernels read them. A float scale is float32(amax / max), at least the
    smallest normal float32, and 1 for a block of zeros; `rounding` is that of `choose_e8m0`.
    """
    _check(values, format, "quantize: values")
    if not isinstance(layout, BlockScaledLayout):
        raise TypeError(f"quantize: layout must be a BlockScaledLayout; got {layout!r}; pass one, such as .per_row()")
    x = values.double()
    if x.ndim < 2:
        raise ValueError(f"quantize: values must have rows and K; got shape {tuple(x.shape)}; reshape to (1, K)")
    if not x.isfinite().all():
        raise ValueError(
            f"quantize: values must be finite; got {x[_first(~x.isfinite())].item()} at {_first(~x.isfinite())}; mask it"
        )
    amax = _block_amax(x, layout)
    if layout.scale_format is E8M0:
        scale = choose_e8m0(amax, format, rounding)
    elif layout.scale_format is None:
        scale = torch.where(amax == 0, 1.0, (amax / format.max).clamp(min=_SMALLEST_SCALE)).float()
    else:
        scale = encode(amax / format.max, layout.scale_format).clamp(min=1)  # 1: the smallest value above zero
    codes = encode(x / expand_scale(scale, layout, x.shape), format)
    return (pack(codes) if format is E2M1 else codes.view(getattr(torch, format.torch_dtype))), scale


def _block_amax(x: Tensor, layout: BlockScaledLayout) -> Tensor:
    rows, k = x.shape[-2:]
    scale_rows, scale_k = layout.scale_shape(rows, k)
    block_rows, block_k = layout.rows or max(rows, 1), layout.k or max(k, 1)
    padded = F.pad(x.abs(), (0, scale_k * block_k - k, 0, scale_rows * block_rows - rows))
    return padded.unflatten(-1, (scale_k, block_k)).unflatten(-3, (scale_rows, block_rows)).amax((-3, -1))


def expand_scale(scale: Tensor, layout: BlockScaledLayout, shape: torch.Size, *, zero_sentinel: bool = False) -> Tensor:
    """Return the scale of every element of an operand of `shape` (..., rows, K), float64: s[i, k] = scale[i // r, k // c].

    Accepted: (..., rows / r, K / c); per row also (..., rows); per tensor also (...) and (); e8m0_k32 also (K / 32,).
    """
    *lead, rows, k = shape
    full = (*lead, *layout.scale_shape(rows, k))
    accepted = [full]
    if layout.k is None:
        accepted.append(full[:-1])
    if layout == BlockScaledLayout.per_tensor():
        accepted += [full[:-2], ()]
    if layout == BlockScaledLayout.e8m0_k32():
        accepted.append(full[-1:])
    if tuple(scale.shape) not in accepted:
        shapes = " or ".join(str(s) for s in dict.fromkeys(accepted))
        raise ValueError(f"scale: must have shape {shapes}; got {tuple(scale.shape)}; check the layout {layout}")
    if layout.scale_format is not None:
        scale = decode(raw_codes(scale, layout.scale_format, "scale"), layout.scale_format, zero_sentinel=zero_sentinel)
    elif scale.dtype not in SCALE_DTYPES:
        raise TypeError(f"scale: must be float32, float16 or bfloat16; got {scale.dtype}; convert it")
    blocks = scale.double().reshape(full) if scale.numel() == math.prod(full) else scale.double().expand(full)
    by_row = blocks.repeat_interleave(layout.rows or rows, dim=-2)[..., :rows, :]
    return by_row.repeat_interleave(layout.k or k, dim=-1)[..., :k]


def _check_nibbles(raw: Tensor, format: FloatFormat) -> None:
    if format is E2M1 and raw.numel() and raw.max() >= 1 << E2M1.bits:
        raise ValueError(f"codes: must be below 16, one per element; got {raw.max().item()}; unpack the bytes first")


def _first(mask: Tensor) -> tuple[int, ...]:
    """The coordinate of the first True."""
    return tuple(mask.nonzero()[0].tolist())
