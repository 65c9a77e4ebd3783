"""How MXFP4 weights lie for Hopper, and how their codes become pairs of bfloat16.

A tile is 64 rows by 64 of K: 512 words of codes, then 32 words of scales, 2,176 bytes that one bulk copy moves. Rows of 16
belong to a warp, and a lane's four words are its part of the left operand of a product, 16 of K each, the same for a warp's and
for a warpgroup's (PTX ISA 9.7.14 and 9.7.15, fragments of m16n8k16 and of m64nNk16).

    word   low half: first of a pair, high half: second; bits of the four pairs' codes in each half
    pair 0 sign 15, magnitude 8..6        row g,     k = 2 t
    pair 1 sign 12, magnitude 5..3        row g + 8, k = 2 t        g = lane / 4, t = lane % 4
    pair 2 sign  9, magnitude 2..0        row g,     k = 2 t + 8
    pair 3 sign 14, magnitude 11, 10, 13  row g + 8, k = 2 t + 8

So a pair is a shift and a mask away from two bfloat16 with the code's exponent and mantissa in the last bits of theirs: 2^-126
of the value. Multiplying by a power of two that holds 2^126 and the scale makes it exact, subnormal codes too. That power's
exponent is what a byte of scales holds, E8M0 + 126; a word has those of rows g (K groups 0 and 1) and g + 8.
"""

import torch
from torch import Tensor

from tilelang_ext import language as T
from tilelang_ext.formats import MX_GROUP

TILE = 64  # rows, and K
TILE_WORDS = 16 * 32 + 32  # codes, scales
LANE_WORDS = 4  # of codes in a tile of 16 rows
_MAX_SCALE = 128  # E8M0 + 126 is at most 254, the largest finite exponent
_SCALE_BIAS = 126
_FIELDS = 0x81C081C0


def fits(scale: Tensor) -> bool:
    """Whether every E8M0 scale can be held: none above 2^1, and no NaN."""
    return bool((scale <= _MAX_SCALE).all())


def pack(codes: Tensor, scale: Tensor) -> Tensor:
    """Return uint32 (E, rows / 64, K / 64, 544).

    `codes` (E, rows, K / 2) have the even k in the low nibble, `scale` (E, rows, K / 32) is E8M0. Rows and K that do not fill a
    tile are filled with zeros.
    """
    E, rows, half = codes.shape
    row_tiles, steps = -(-rows // TILE), -(-half * 2 // TILE)
    device = codes.device
    lane = torch.arange(32, device=device)
    g, t = lane // 4, lane % 4
    row_of = torch.stack([g, g + 8, g, g + 8], -1)[..., None].expand(32, 4, 2)  # lane, pair, half
    k_of = torch.stack([2 * t, 2 * t, 2 * t + 8, 2 * t + 8], -1)[..., None] + torch.arange(2, device=device)
    tiles = torch.empty(E, row_tiles, steps, TILE_WORDS, dtype=torch.int32, device=device)
    for expert in range(E):  # one at a time: eight bytes a code while they are moved
        nibbles = torch.zeros(row_tiles * TILE, steps * TILE, dtype=torch.int64, device=device)
        nibbles[:rows, : half * 2] = torch.stack([codes[expert] & 15, codes[expert] >> 4], -1).flatten(1)
        blocks = nibbles.view(row_tiles, 4, 16, steps, 4, 16).permute(0, 3, 1, 4, 2, 5)  # row tile, step, warp, 16 of K, row, k
        own = blocks[..., row_of, k_of]  # ..., lane, pair, half
        sign, magnitude = own >> 3, own & 7
        fields = torch.zeros_like(own[..., 0, :])
        for pair, shift in enumerate((0, 3, 6)):
            fields |= (sign[..., pair, :] << (15 - shift)) | (magnitude[..., pair, :] << (6 - shift))
        last = magnitude[..., 3, :]
        fields |= (sign[..., 3, :] << 14) | ((last >> 1) << 10) | ((last & 1) << 13)
        words = fields[..., 0] | (fields[..., 1] << 16)  # row tile, step, warp, 16 of K, lane
        exponents = torch.full((row_tiles * TILE, steps * TILE // MX_GROUP), _SCALE_BIAS, dtype=torch.int64, device=device)
        exponents[:rows, : scale.shape[2]] = scale[expert].to(torch.int64) + _SCALE_BIAS
        exponents = exponents.view(row_tiles, 4, 2, 8, steps, 2).permute(
            0, 4, 1, 3, 2, 5
        )  # row tile, step, warp, g, upper, group
        bytes_of = exponents.reshape(row_tiles, steps, 4, 8, 4)
        scales = sum(bytes_of[..., i] << (8 * i) for i in range(4))
        tiles[expert] = torch.cat(
            [words.transpose(3, 4).reshape(row_tiles, steps, -1), scales.reshape(row_tiles, steps, -1)], -1
        ).to(torch.int32)
    return tiles.view(torch.uint32)


def gate_beside_up(rows: Tensor) -> Tensor:
    """Return (E, 2 I, ...) gate above up as eight rows of gate, eight of up, and so on: a lane then has both of a feature."""
    E, both = rows.shape[:2]
    return rows.view(E, 2, both // 16, 8, *rows.shape[2:]).transpose(1, 2).reshape(rows.shape)


def pairs(words: list, scales, out, begin: int) -> None:
    """Emit the decoding of a lane's four words into `out[begin:]`, 16 words of pairs in the order of products."""

    def power(byte: int):
        return ((scales >> T.uint32(8 * byte)) & T.uint32(0xFF)) * T.uint32(0x00800080)

    def times(bits, power_of_two):
        product = T.reinterpret(bits, "bfloat16x2") * T.reinterpret(power_of_two, "bfloat16x2")
        return T.reinterpret(product, "uint32")

    def decode(place: int, word, lower: int, upper: int) -> None:
        @T.macro
        def emit():
            last = ((word << T.uint32(1)) & T.uint32(0x80008000)) | ((word >> T.uint32(3)) & T.uint32(0x01800180))
            out[place] = times(word & T.uint32(_FIELDS), power(lower))
            out[place + 1] = times((word << T.uint32(3)) & T.uint32(_FIELDS), power(upper))
            out[place + 2] = times((word << T.uint32(6)) & T.uint32(_FIELDS), power(lower))
            out[place + 3] = times(last | ((word >> T.uint32(7)) & T.uint32(0x00400040)), power(upper))

        emit()

    for i, word in enumerate(words):
        decode(begin + 4 * i, word, i // 2, 2 + i // 2)
