"""How MXFP4 weights lie for Hopper, and how their codes become operands of products in bfloat16 or in FP8.

A tile is 64 rows by 128 bytes of a token's K: 64 of bfloat16, 128 of E4M3. The words of codes come first, then those of scales,
and one bulk copy moves both. Rows of 16 belong to a warp, and a lane's words are its part of the left operand, the same for a
product of a warp and of a warpgroup (PTX ISA 9.7.14 and 9.7.15). With g = lane / 4 and t = lane % 4:

**bfloat16**, one word for 16 of K

    word   low half: first of a pair, high half: second; bits of the four pairs' codes in each half
    pair 0 sign 15, magnitude 8..6        row g,     k = 2 t
    pair 1 sign 12, magnitude 5..3        row g + 8, k = 2 t
    pair 2 sign  9, magnitude 2..0        row g,     k = 2 t + 8
    pair 3 sign 14, magnitude 11, 10, 13  row g + 8, k = 2 t + 8

So a pair is a shift and a mask away from two bfloat16 with the code's exponent and mantissa in the last bits of theirs: 2^-126
of the value. Multiplying by a power of two that holds 2^126 and the scale makes it exact, subnormal codes too. That power's
exponent is what a byte of scales holds, E8M0 + 126; a word has those of rows g (K groups 0 and 1) and g + 8.

**E4M3**, two words for 32 of K, of row g and of row g + 8

    word   code i of 8: magnitude 4 i + 2..4 i
    codes 0 to 3   k = 4 t + i,      signs 7, 15, 23, 31
    codes 4 to 7   k = 4 t + i + 12, signs 3, 11, 19, 27

The magnitudes select bytes of a table of eight, E2M1's numbers times 2^(shift - 6) as E4M3. The shift of a row's group is what
a byte of scales holds; what all of a row's groups share is left to the sum, as a power of two. A shift is exact as long as no
code leaves E4M3's normal numbers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP

TILE = 64  # rows
_MAX_SCALE = 128  # bfloat16: E8M0 + 126 is at most 254, the largest finite exponent
_SCALE_BIAS = 126
_FIELDS = 0x81C081C0


class Operand(NamedTuple):
    """What products take: the dtype of tokens, its name in PTX, the K of a tile, a lane's words of codes."""

    dtype: str
    ptx: str
    K: int
    lane_words: int

    @property
    def tile_words(self) -> int:
        return self.lane_words * 136  # codes of 128 lanes, and a sixteenth for the scales


BFLOAT16 = Operand("bfloat16", "bf16", 64, 4)
E4M3 = Operand("float8_e4m3fn", "e4m3", 128, 8)
OPERANDS = {"bfloat16": BFLOAT16, "fp8": E4M3}  # by the kind of activations


class ScaleError(ValueError):
    """Scales that tiles cannot hold exactly."""


def pack(codes: Tensor, scale: Tensor) -> Tensor:
    """Return tiles for bfloat16, uint32 (E, rows / 64, K / 64, 544).

    `codes` (E, rows, K / 2) have the even k in the low nibble, `scale` (E, rows, K / 32) is E8M0. Rows and K that do not fill a
    tile are filled with zeros. Raises ScaleError for scales above 2^1 and NaN.
    """
    if (scale > _MAX_SCALE).any():
        raise ScaleError(
            f"tile_for_hopper: E8M0 scales beside bfloat16 must be at most 128, 2^1; got {int(scale.max())}; "
            "use the weights as they are"
        )
    device = codes.device
    lane = torch.arange(32, device=device)
    g, t = lane // 4, lane % 4
    row_of = torch.stack([g, g + 8, g, g + 8], -1)[..., None].expand(32, 4, 2)  # lane, pair, half
    k_of = torch.stack([2 * t, 2 * t, 2 * t + 8, 2 * t + 8], -1)[..., None] + torch.arange(2, device=device)

    def words(nibbles: Tensor) -> Tensor:
        own = nibbles.unflatten(-1, (4, 16)).transpose(-3, -2)[..., row_of, k_of]  # ..., 16 of K, lane, pair, half
        sign, magnitude = own >> 3, own & 7
        fields = torch.zeros_like(own[..., 0, :])
        for pair, shift in enumerate((0, 3, 6)):
            fields |= (sign[..., pair, :] << (15 - shift)) | (magnitude[..., pair, :] << (6 - shift))
        last = magnitude[..., 3, :]
        fields |= (sign[..., 3, :] << 14) | ((last >> 1) << 10) | ((last & 1) << 13)
        return fields[..., 0] | (fields[..., 1] << 16)  # ..., a lane's words, lane

    def bytes_of(expert: int) -> Tensor:
        return scale[expert].int() + _SCALE_BIAS

    return _tiles(codes, words, bytes_of, _SCALE_BIAS, BFLOAT16)


def pack_e4m3(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return tiles for E4M3, uint32 (E, rows / 64, K / 128, 1088), and the powers of two of rows, float32 (E, rows).

    Arguments are those of `pack`. Raises ScaleError for a row whose scales lie more than 2^11 apart, and for NaN.
    """
    device = codes.device
    lane = torch.arange(32, device=device)
    g, t = lane // 4, lane % 4
    row_of = torch.stack([g, g + 8], -1)[..., None].expand(32, 2, 8)  # lane, word, code
    code = torch.arange(8, device=device)
    k_of = (4 * t[:, None] + code + code // 4 * 12)[:, None].expand(32, 2, 8)
    sign_bit = torch.where(code < 4, 8 * code + 7, 8 * (code - 4) + 3)

    def words(nibbles: Tensor) -> Tensor:
        own = nibbles.unflatten(-1, (4, 32)).transpose(-3, -2)[..., row_of, k_of]  # ..., 32 of K, lane, word, code
        bits = ((own & 7) << (4 * code)) | ((own >> 3) << sign_bit)
        return bits.sum(-1).transpose(-2, -1).flatten(-3, -2)  # ..., a lane's words, lane

    shifts, powers = [], []
    for expert in range(codes.shape[0]):
        shift, power = _shifts(codes[expert], scale[expert])
        shifts.append(shift)
        powers.append(power)
    return _tiles(codes, words, shifts.__getitem__, 0, E4M3), torch.stack(powers)


# Of the eight magnitudes: by which powers of two E4M3 holds each as a normal number, from the table's first on. Zero fits
# anywhere.
_LEAST = torch.tensor([-999, -5, -6, -6, -6, -6, -6, -6])
_MOST = torch.tensor([999, 9, 8, 8, 7, 7, 6, 6])
_SHIFT_BIAS = 6  # the table's first entry is 2^-6 of E2M1's


def _shifts(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shift of each group (rows, K / 32), and the power of two that is left of each row."""
    least, most = (table.to(codes.device, torch.int16) for table in (_LEAST, _MOST))
    groups = codes.unflatten(-1, (-1, MX_GROUP // 2))
    pairs = torch.stack([groups & 7, groups >> 4 & 7], -1).flatten(-2).int()
    exponent = scale.int() - 127
    low = (exponent - most[pairs].amin(-1)).amax(-1)  # of the row's exponent, by its groups
    high = (exponent - least[pairs].amax(-1)).amin(-1)
    low = low.clamp(min=-126)  # what float32 holds as a normal number
    bad = ((low > high) | (scale == 255).any(-1)).nonzero()
    if len(bad):
        got = scale[bad[0, 0]]
        raise ScaleError(
            "tile_for_hopper: E8M0 scales of a row must lie within 2^11 of each other to be exact in E4M3; got "
            f"{int(got.min())} to {int(got.max())} in one; use the weights as they are"
        )
    shift = exponent - low[:, None] + _SHIFT_BIAS
    return torch.where(pairs.any(-1), shift, 0), torch.ldexp(torch.ones_like(low, dtype=torch.float32), low)


def _tiles(codes: Tensor, words, bytes_of, empty: int, operand: Operand) -> Tensor:
    """Return tiles: `words` orders the codes of blocks of 16 rows, `bytes_of` an expert gives the bytes of its scales."""
    E, rows, half = codes.shape
    K = operand.K
    row_tiles, steps, groups = -(-rows // TILE), -(-half * 2 // K), K // MX_GROUP
    tiles = torch.empty(E, row_tiles, steps, operand.tile_words, dtype=torch.int32, device=codes.device)
    for expert in range(E):  # one at a time: eight bytes a code while they are moved
        nibbles = torch.zeros(row_tiles * TILE, steps * K, dtype=torch.int64, device=codes.device)
        nibbles[:rows, : half * 2] = torch.stack([codes[expert] & 15, codes[expert] >> 4], -1).flatten(1)
        blocks = nibbles.view(row_tiles, 4, 16, steps, K).permute(0, 3, 1, 2, 4)  # row tile, step, warp, row, k
        own = bytes_of(expert)
        scales = torch.full((row_tiles * TILE, steps * groups), empty, dtype=torch.int64, device=codes.device)
        scales[:rows, : own.shape[1]] = own
        # row tile, step, warp, g, upper, group: of bfloat16 a word, of E4M3 a word each for g and g + 8
        scales = scales.view(row_tiles, 4, 2, 8, steps, groups).permute(0, 4, 1, 3, 2, 5)
        scales = scales.reshape(row_tiles, steps, -1, 4) << torch.arange(0, 32, 8, device=codes.device)
        # Four words of every lane, then the next four: what a load takes without conflicts.
        own = words(blocks).unflatten(-2, (-1, 4)).transpose(-2, -1)
        parts = [own.reshape(row_tiles, steps, -1), scales.sum(-1)]
        tiles[expert] = torch.cat(parts, -1).to(torch.int32)
    return tiles.view(torch.uint32)


def gate_beside_up(rows: Tensor) -> Tensor:
    """Return (E, 2 I, ...) gate above up as eight rows of gate, eight of up, and so on: a lane then has both of a feature."""
    E, both = rows.shape[:2]
    return rows.view(E, 2, both // 16, 8, *rows.shape[2:]).transpose(1, 2).reshape(rows.shape)


def neighbours(rows: Tensor) -> Tensor:
    """Return (E, N, ...) with the even rows of 16 before the odd ones: a lane then has two neighbours, to store at once."""
    E, count = rows.shape[:2]
    return rows.view(E, count // 16, 8, 2, *rows.shape[2:]).transpose(2, 3).reshape(rows.shape)


def decode(operand: Operand, codes, scales, out, begin: int) -> None:
    """Emit the decoding of a lane's words into `out[begin:]`, 16 words of the left operand in the order of products.

    `codes` has operand.lane_words words, `scales` one of bfloat16, two of E4M3.
    """
    if operand is BFLOAT16:
        for i in range(operand.lane_words):
            _decode_bfloat16(codes[i], scales[0], i // 2, out, begin + 4 * i)
    else:
        _decode_e4m3(codes, scales, out, begin)


def _decode_bfloat16(word, scales, group: int, out, place: int) -> None:
    def power(byte: int):
        return ((scales >> T.uint32(8 * byte)) & T.uint32(0xFF)) * T.uint32(0x00800080)

    def times(bits, power_of_two):
        product = T.reinterpret(bits, "bfloat16x2") * T.reinterpret(power_of_two, "bfloat16x2")
        return T.reinterpret(product, "uint32")

    @T.macro
    def emit():
        last = ((word << T.uint32(1)) & T.uint32(0x80008000)) | ((word >> T.uint32(3)) & T.uint32(0x01800180))
        out[place] = times(word & T.uint32(_FIELDS), power(group))
        out[place + 1] = times((word << T.uint32(3)) & T.uint32(_FIELDS), power(2 + group))
        out[place + 2] = times((word << T.uint32(6)) & T.uint32(_FIELDS), power(group))
        out[place + 3] = times(last | ((word >> T.uint32(7)) & T.uint32(0x00400040)), power(2 + group))

    emit()


def _decode_e4m3(codes, scales, out, begin: int) -> None:
    def shift_of(i):
        return (scales[i % 2] >> T.cast(8 * (i // 2), "uint32")) & T.uint32(0xFF)

    def select(low, high, selectors):
        return T.call_pure_extern("uint32", "__byte_perm", low, high, selectors)

    @T.macro
    def emit():
        for i in T.unroll(E4M3.lane_words):  # as a loop: the compiler's passes take long over many statements
            # Of 0, 0.5, 1, 1.5 and of 2, 3, 4, 6: E4M3 has three bits of mantissa, a shift adds to what lies above. Zero stays.
            low = shift_of(i) * T.uint32(0x08080800) + T.uint32(0x0C080000)
            high = shift_of(i) * T.uint32(0x08080808) + T.uint32(0x1C181410)
            magnitudes = codes[i] & T.uint32(0x77777777)
            place = begin + i // 2 * 4 + i % 2
            out[place] = select(low, high, magnitudes) | (codes[i] & T.uint32(0x80808080))
            out[place + 2] = select(low, high, magnitudes >> T.uint32(16)) | ((codes[i] << T.uint32(4)) & T.uint32(0x80808080))

    emit()
