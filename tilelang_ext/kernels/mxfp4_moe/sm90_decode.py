"""Tiles of MXFP4 weights on Hopper: how the codes lie in them, and how a lane decodes its part to bfloat16 or E4M3.

A tile is 64 rows by the K that 128 bytes of activations hold: 64 of bfloat16, 128 of E4M3. The words of codes come first, then
the words of scales, and one TMA load moves both. Each group of 16 rows belongs to one warp of a warpgroup, and the words of a
lane decode to its registers of the left operand, which are the same for `mma` and for `wgmma` (PTX ISA 9.7.14 and 9.7.15).
With g = lane / 4 and t = lane % 4:

**bfloat16**, one word for 16 of K

    a word holds four pairs of codes; the low half has the first code of each pair, the high half the second
    pair 0   sign in bit 15, magnitude in bits 8..6         row g,     k = 2 t and 2 t + 1
    pair 1   sign in bit 12, magnitude in bits 5..3         row g + 8, k = 2 t and 2 t + 1
    pair 2   sign in bit  9, magnitude in bits 2..0         row g,     k = 2 t + 8 and 2 t + 9
    pair 3   sign in bit 14, magnitude in bits 11, 10, 13   row g + 8, k = 2 t + 8 and 2 t + 9

A shift and a mask turn a pair into two bfloat16 numbers whose lowest exponent bits and highest mantissa bit are the code's:
2^-126 times its value. Multiplying them by a power of two that contains 2^126 and the scale is exact, for subnormal codes too.
A byte of the scales is the exponent of that power, E8M0 + 126. A word of scales has the bytes of row g for K groups 0 and 1,
then those of row g + 8.

**E4M3**, two words for 32 of K: one of row g and one of row g + 8

    code i of a word has its magnitude in bits 4 i + 2..4 i
    codes 0 to 3   k = 4 t + i,       signs in bits 7, 15, 23, 31
    codes 4 to 7   k = 4 t + i + 12,  signs in bits 3, 11, 19, 27

The magnitudes select bytes from a table of eight: the E2M1 numbers times 2^(shift - 6), as E4M3. A byte of the scales is the
shift of one row and one K group; the power of two that all groups of a row share multiplies the accumulator instead
(`HopperWeights.row_scale`). A shift is exact as long as no code leaves the normal numbers of E4M3.
"""

from tilelang_ext import language as T
from tilelang_ext.kernels.mxfp4_moe.sm90_tiles import BFLOAT16, E4M3, TileFormat

_FIELDS = 0x81C081C0  # sign and magnitude of pair 0, in both halves of a word


def decode(tile_format: TileFormat, codes, scales, out, begin: int) -> None:
    """Emit the decoding of one lane's words of a tile into `out[begin:]`: 16 registers of the left operand, in order of K.

    `codes` has tile_format.lane_words words; `scales` has one word for bfloat16 and two for E4M3.
    """
    if tile_format == BFLOAT16:
        for i in range(tile_format.lane_words):
            _decode_bfloat16(codes[i], scales[0], i // 2, out, begin + 4 * i)
    else:
        _decode_e4m3(codes, scales, out, begin)


def _decode_bfloat16(word, scales, group: int, out, begin: int) -> None:
    def power(byte: int):
        return ((scales >> T.uint32(8 * byte)) & T.uint32(0xFF)) * T.uint32(0x00800080)

    def times(bits, power_of_two):
        product = T.reinterpret(bits, "bfloat16x2") * T.reinterpret(power_of_two, "bfloat16x2")
        return T.reinterpret(product, "uint32")

    @T.macro
    def emit():
        pair_3 = ((word << T.uint32(1)) & T.uint32(0x80008000)) | ((word >> T.uint32(3)) & T.uint32(0x01800180))
        out[begin] = times(word & T.uint32(_FIELDS), power(group))
        out[begin + 1] = times((word << T.uint32(3)) & T.uint32(_FIELDS), power(2 + group))
        out[begin + 2] = times((word << T.uint32(6)) & T.uint32(_FIELDS), power(group))
        out[begin + 3] = times(pair_3 | ((word >> T.uint32(7)) & T.uint32(0x00400040)), power(2 + group))

    emit()


def _decode_e4m3(codes, scales, out, begin: int) -> None:
    def shift_of(i):
        return (scales[i % 2] >> T.cast(8 * (i // 2), "uint32")) & T.uint32(0xFF)

    def select(low, high, selectors):
        return T.call_pure_extern("uint32", "__byte_perm", low, high, selectors)

    @T.macro
    def emit():
        for i in T.unroll(E4M3.lane_words):  # a loop, since the compiler's passes take long over many statements
            # The table's bytes for 0, 0.5, 1, 1.5 and for 2, 3, 4, 6. E4M3 has three bits of mantissa, and a shift is added to
            # the exponent above them; zero stays zero.
            low = shift_of(i) * T.uint32(0x08080800) + T.uint32(0x0C080000)
            high = shift_of(i) * T.uint32(0x08080808) + T.uint32(0x1C181410)
            magnitudes = codes[i] & T.uint32(0x77777777)
            at = begin + i // 2 * 4 + i % 2
            out[at] = select(low, high, magnitudes) | (codes[i] & T.uint32(0x80808080))
            out[at + 2] = select(low, high, magnitudes >> T.uint32(16)) | ((codes[i] << T.uint32(4)) & T.uint32(0x80808080))

    emit()
