"""fp8 MMAs on GPUs whose matrix unit takes no fp8: codes become half in registers, then the half MMA runs.

    Before, one mma.m16n8k32 on codes           After
    a: 4 words of 4 codes                       a: 8 words of 2 halves
    b: 2 words of 4 codes                       b: 4 words of 2 halves
    c += a * b                                  c += a[0:4] * b[0:2]; c += a[4:8] * b[2:4]     (mma.m16n8k16)

Invariant: a word of codes covers the same four k in A as in B. An MMA may take its k in any order, so each half MMA takes 16
of them as they lie, and loads, fragments and their layouts are those of the fp8 instruction.

Every E4M3 and E5M2 value, subnormals, infinities and NaN included, is a half.
"""

# Without `from __future__ import annotations`: this file holds macros.

import tilelang.language as T
from tilelang.cuda.intrinsics.macro.mma_macro_generator import TensorCoreIntrinEmitter
from tilelang.utils.language import is_fragment
from tvm import tirx

_CODES_PER_WORD = 4
_FIRST_PAIR, _SECOND_PAIR = 0x1404, 0x3424  # byte selectors: two codes, each the high byte of a half


def half_pair(word: tirx.PrimExpr, second: bool, dtype: str) -> tirx.PrimExpr:
    """Return codes 0 and 1 (or with `second` 2 and 3) of a uint32 of four `dtype` codes as a uint32 of two halves."""
    selector = T.uint32(_SECOND_PAIR if second else _FIRST_PAIR)
    high = T.call_pure_extern("uint32", "__byte_perm", word, T.uint32(0), selector)
    if dtype == "float8_e5m2":
        return high  # E5M2 is the high byte of a half
    # The magnitude of an E4M3 code (bias 7), moved to the bits where a half (bias 15) has it, is 2^-8 of the value. NaN, 0x7f,
    # would become 480, 0x5f80; bit 13 makes that a NaN.
    magnitude = (high & T.uint32(0x7F007F00)) >> T.uint32(1)
    bits = magnitude | (high & T.uint32(0x80008000))
    value = T.reinterpret(bits, "float16x2") * T.Broadcast(T.float16(256), 2)
    nan = ((magnitude + T.uint32(0x00800080)) & T.uint32(0x40004000)) >> T.uint32(1)
    return T.reinterpret(value, "uint32") | nan


class DecodedEmitter(TensorCoreIntrinEmitter):
    """Upstream's fp8 emitter; its MMA decodes the operands and runs as two half MMAs."""

    def mma(self, A_local_buf, B_local_buf, C_local_buf, k_inner=0):
        """Add the product over 32 elements of K to C. A and B hold codes; `k_inner` is the step in fragments of all K."""
        rows, cols, blocks = self.warp_rows, self.warp_cols, self.n_dim // 8
        a_words, b_words = self.local_size_a // _CODES_PER_WORD, self.local_size_b // _CODES_PER_WORD
        a_begin = k_inner * rows * self.local_size_a if is_fragment(A_local_buf) else 0
        b_begin = k_inner * cols * self.local_size_b if is_fragment(B_local_buf) else 0
        a_dtype, b_dtype, accum_dtype, accum_abbrv = self.a_dtype, self.b_dtype, self.accum_dtype, self.accum_dtype_abbrv
        out, out_of_block = self.local_size_out, self.local_size_out // blocks

        def codes(buffer, begin, word):
            """Return four codes of this thread. A fragment has the shape of all threads' parts, so it is redeclared."""
            if is_fragment(buffer):
                tiles, size = (rows, self.local_size_a) if buffer is A_local_buf else (cols, self.local_size_b)
                shape = (self.chunk // self.micro_size_k * tiles * size,)
                buffer = tirx.decl_buffer(shape, buffer.dtype, data=buffer.data, scope="local")
            return T.reinterpret(buffer[T.Ramp(begin + word * _CODES_PER_WORD, 1, _CODES_PER_WORD)], "uint32")

        @T.macro
        def decode_and_multiply(A_local, B_local, C_local):
            a = T.alloc_local((rows * a_words * 2,), "uint32")
            b = T.alloc_local((cols * b_words * 2,), "uint32")
            # Words of A: rows g and g + 8 of the first 16 k, then of the others. A half MMA takes the first pairs of both
            # rows, then the second pairs.
            for i in T.unroll(rows):
                for step in T.unroll(2):
                    for row in T.unroll(2):
                        word = codes(A_local, a_begin, i * a_words + step * 2 + row)
                        a[i * a_words * 2 + step * 4 + row] = half_pair(word, False, a_dtype)
                        a[i * a_words * 2 + step * 4 + 2 + row] = half_pair(word, True, a_dtype)
            # Words of B: for each 8 columns, the first 16 k, then the others.
            for j in T.unroll(cols * b_words):
                word = codes(B_local, b_begin, j)
                b[j * 2] = half_pair(word, False, b_dtype)
                b[j * 2 + 1] = half_pair(word, True, b_dtype)
            for i, j, block, step in T.grid(rows, cols, blocks, 2):
                T.ptx_mma(
                    accum_dtype,
                    "m16n8k16",
                    "row",
                    "col",
                    "fp16",
                    "fp16",
                    accum_abbrv,
                    a.data,
                    i * a_words * 2 + step * 4,
                    b.data,
                    j * b_words * 2 + block * 4 + step * 2,
                    C_local.data,
                    (i * cols + j) * out + block * out_of_block,
                    T.bool(False),
                )

        return decode_and_multiply(A_local_buf, B_local_buf, C_local_buf)
