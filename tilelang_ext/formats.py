"""What the bits of every narrow float mean: the one table of facts that kernels, generators and quantisers read.

    value = (-1)^sign * 2^(exponent - bias) * (1 + mantissa / 2^mantissa_bits)        exponent field > 0
    value = (-1)^sign * 2^(1 - bias) * mantissa / 2^mantissa_bits                     exponent field = 0

Every table of values is computed from these two lines. Sources: OCP 8-bit Floating Point (OFP8) 1.0, OCP Microscaling
Formats (MX) 1.0, and "8-bit Numerical Formats for Deep Neural Networks" (the FNUZ flavours). Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class FloatFormat:
    """The facts of one format; `decode` and `values` follow from them."""

    name: str
    dtype: str  # TileLang's name
    torch_dtype: str  # torch's name of the storage; of E2M1 an element is a byte with two codes
    exponent_bits: int
    mantissa_bits: int
    bias: int
    signed: bool = True
    subnormals: bool = True  # without them, exponent field 0 is one more power of two
    inf_codes: tuple[int, ...] = ()
    nan_codes: tuple[int, ...] = ()  # the first is the one that encoders write

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def sign_mask(self) -> int:
        """The sign bit; 0 of an unsigned format."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def has_negative_zero(self) -> bool:
        return self.signed and self.sign_mask not in self.nan_codes

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The value of every code, in order of the codes; exact (a Python float is a float64)."""
        return tuple(self.decode(code) for code in range(1 << self.bits))

    @cached_property
    def max(self) -> float:
        """The largest finite value."""
        return max(value for value in self.values if math.isfinite(value))

    @property
    def max_exponent(self) -> int:
        """floor(log2(max)): `emax` of the OCP text."""
        return math.frexp(self.max)[1] - 1

    @cached_property
    def smallest(self) -> float:
        """The smallest value above zero: the first subnormal where there are any."""
        return min(value for value in self.values if value > 0)

    def decode(self, code: int) -> float:
        """Return the value of one code."""
        if not 0 <= code < 1 << self.bits:
            raise ValueError(f"{self.name}.decode: code must be in [0, {1 << self.bits}); got {code}; unpack the bytes first")
        if code in self.nan_codes:
            return math.nan
        sign = -1.0 if code & self.sign_mask else 1.0
        if code in self.inf_codes:
            return sign * math.inf
        exponent = (code & ~self.sign_mask) >> self.mantissa_bits
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        if exponent == 0 and self.subnormals:
            return sign * math.ldexp(mantissa, 1 - self.bias - self.mantissa_bits)
        return sign * math.ldexp((1 << self.mantissa_bits) + mantissa, exponent - self.bias - self.mantissa_bits)

    def encode(self, value: float) -> int:
        """Return the code nearest to a value, of two the even one; the largest number for what is past it, where infinity has
        no code."""
        if math.isnan(value):
            return self.nan_codes[0]
        negative = math.copysign(1.0, value) < 0 and self.signed
        if math.isinf(value) and self.inf_codes:
            return self.inf_codes[negative]
        magnitudes = range(self.values.index(self.max) + 1)
        code = min(magnitudes, key=lambda code: (abs(self.values[code] - min(abs(value), self.max)), code % 2))
        return code | self.sign_mask if negative and (code or self.has_negative_zero) else code


E4M3 = FloatFormat("E4M3", "float8_e4m3fn", "float8_e4m3fn", 4, 3, 7, nan_codes=(0x7F, 0xFF))
E5M2 = FloatFormat(
    "E5M2", "float8_e5m2", "float8_e5m2", 5, 2, 15, inf_codes=(0x7C, 0xFC), nan_codes=(0x7F, 0x7D, 0x7E, 0xFD, 0xFE, 0xFF)
)
E4M3_FNUZ = FloatFormat("E4M3 FNUZ", "float8_e4m3fnuz", "float8_e4m3fnuz", 4, 3, 8, nan_codes=(0x80,))
E5M2_FNUZ = FloatFormat("E5M2 FNUZ", "float8_e5m2fnuz", "float8_e5m2fnuz", 5, 2, 16, nan_codes=(0x80,))
E8M0 = FloatFormat("E8M0", "float8_e8m0fnu", "float8_e8m0fnu", 8, 0, 127, signed=False, subnormals=False, nan_codes=(0xFF,))
E2M1 = FloatFormat("E2M1", "float4_e2m1fn", "float4_e2m1fn_x2", 2, 1, 1)

FORMATS = (E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ, E8M0, E2M1)
FP8_OPERANDS = (E4M3, E5M2, E4M3_FNUZ, E5M2_FNUZ)  # what a matrix product takes; E8M0 is a scale format, never an operand

# A byte read as FNUZ is half of what it is read as OCP, wherever it is finite in both; 0x80 is NaN in one and -0 in the
# other. Hence OCP bytes are exact as FNUZ bytes under twice the scale, with 0x80 replaced by 0 and NaN by 0x80. The other
# way +-240 (0x7F, 0xFF) has no E4M3 byte under half the scale.
OCP_OF_FNUZ = {E4M3_FNUZ: E4M3, E5M2_FNUZ: E5M2}
FNUZ_OF_OCP = {ocp: fnuz for fnuz, ocp in OCP_OF_FNUZ.items()}
FNUZ_PER_OCP = 0.5  # value as FNUZ / value as OCP, of one byte

# Some producers mean 0 by these two E8M0 bytes; `zero_sentinel=True` reads them so.
E8M0_ZERO_SENTINELS = (0, 255)
E8M0_ONE = E8M0.bias  # the byte of 2^0

# Two E2M1 codes per byte: code k lies in bits [4 * (k % 2), 4 * (k % 2) + 4) of byte k // 2, k along K; low nibble first.
CODES_PER_BYTE = 8 // E2M1.bits

MX_GROUP = 32  # K elements that share an E8M0 scale
NVFP4_GROUP = 16  # K elements that share an E4M3 scale
FP8_BLOCK = 128  # rows and K elements of DeepSeek's float32 blocks


@dataclass(frozen=True)
class BlockScaledLayout:
    """How scales cover an operand (rows, K): one scale per block of `rows` x `k` elements, where None is the whole extent."""

    rows: int | None
    k: int | None
    scale_format: FloatFormat | None = None  # None: float32, float16 or bfloat16; else uint8 codes of this format

    @classmethod
    def per_tensor(cls) -> BlockScaledLayout:
        """One float scale: (1, 1), (1,) or ()."""
        return cls(None, None)

    @classmethod
    def per_row(cls) -> BlockScaledLayout:
        """One float scale per row of A (M) or of B (N): (rows,) or (rows, 1)."""
        return cls(1, None)

    @classmethod
    def block(cls, rows: int, k: int) -> BlockScaledLayout:
        """One float scale per block: (ceil(rows of the operand / rows), ceil(K / k)); blocks at the edges may be partial."""
        if rows < 1 or k < 1:
            raise ValueError(f"BlockScaledLayout.block: both extents must be at least 1; got ({rows}, {k}); use (1, 128)")
        return cls(rows, k)

    @classmethod
    def e8m0_k32(cls) -> BlockScaledLayout:
        """MX, one E8M0 byte per 32 of K: (rows, K / 32), or (K / 32,) if all rows share them."""
        return cls(1, MX_GROUP, E8M0)

    @classmethod
    def e4m3_k16(cls) -> BlockScaledLayout:
        """NVFP4, one E4M3 byte per 16 of K: (rows, K / 16)."""
        return cls(1, NVFP4_GROUP, E4M3)

    def scale_shape(self, rows: int, k: int) -> tuple[int, int]:
        """Return the shape of the scales of an operand (rows, k); ValueError if k ends inside a group whose scale is a byte."""
        if self.scale_format is not None and self.k is not None and k % self.k:
            raise ValueError(
                f"BlockScaledLayout: K must be a multiple of {self.k}, which share a scale byte; got {k}; pad K with zeros"
            )
        return (
            1 if self.rows is None else -(-rows // self.rows),
            1 if self.k is None else -(-k // self.k),
        )


# What MLX's `mode=` means: the element format and how its scales lie.
MLX_MODES = {
    "mxfp4": (E2M1, BlockScaledLayout.e8m0_k32()),
    "mxfp8": (E4M3, BlockScaledLayout.e8m0_k32()),
    "nvfp4": (E2M1, BlockScaledLayout.e4m3_k16()),
}


def format_of(dtype: object) -> FloatFormat:
    """Return the format of a dtype given by TileLang's or torch's name, or as a torch dtype; TypeError if it is none."""
    name = str(dtype).removeprefix("torch.")
    for format in FORMATS:
        if name in (format.dtype, format.torch_dtype):
            return format
    raise TypeError(f"dtype: must be one of {', '.join(f.dtype for f in FORMATS)}; got {name}; quantise the values first")
