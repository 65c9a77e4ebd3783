"""Operands, scales and one program of T.gemm_blockscaled in four forms, that the tests of every target share."""

# Without `from __future__ import annotations`: this file holds kernels.

from dataclasses import dataclass

import torch

from tilelang_ext import formats, quantization
from tilelang_ext import language as T
from tilelang_ext.formats import E2M1, E4M3, E8M0, format_of

M, N, K, BLOCK_K = 64, 32, 128, 64
FORMS = 4
NAMES = ("A", "B", *(f"S{operand}{form}" for form in range(FORMS) for operand in "AB"), "C")
DTYPES = ("float32", "bfloat16", "float32", "float32")  # of the sums of each form


@dataclass(frozen=True)
class Pair:
    """Types of A and B: fp8, float4_e2m1fn, or uint8 with two codes per byte; and which are transposed."""

    a: str
    b: str
    trans_A: bool = False
    trans_B: bool = True
    A_scope: str = "shared"
    e8m0: str = E8M0.dtype  # how a target stores it

    @property
    def scales(self) -> tuple:
        """(dtype, granularity) of SFA and SFB of each form; the last is NVFP4's where the dtypes leave the format open."""
        return (
            (("uint32", 32), ("uint32", 32)),
            (("uint8", 64), (self.e8m0, 32)),
            (("float32", 32), ("float32", 2 * BLOCK_K)),
            ((E4M3.dtype, 16), ("uint32", 16)),
        )


def codes_per_element(dtype: str) -> int:
    return 2 if dtype == "uint8" else 1


def stored_shape(rows: int, K: int, dtype: str, transposed: bool) -> tuple[int, int]:
    K //= codes_per_element(dtype)
    return (K, rows) if transposed else (rows, K)


def format_of_codes(dtype: str) -> formats.FloatFormat:
    return E2M1 if dtype == "uint8" else format_of(dtype)


def format_of_scales(dtype: str, granularity: int, operand: str) -> formats.FloatFormat | None:
    if dtype in (E4M3.dtype, E8M0.dtype):
        return format_of(dtype)
    if dtype == "float32":
        return None
    return E4M3 if granularity == 16 and format_of_codes(operand) is E2M1 else E8M0


def operand(rows: int, dtype: str, transposed: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return stored codes and the values of (rows, K), whose rows and columns have magnitudes of their own."""
    generator = torch.Generator().manual_seed(seed)
    format = format_of_codes(dtype)
    codes = quantization.encode(torch.randn(rows, K, generator=generator) * 2, format)
    values = quantization.decode(codes, format, dtype=torch.float64)
    codes = codes.view(torch.uint8)
    if dtype == "uint8":
        packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
        return (packed.T if transposed else packed).contiguous(), values
    codes = (codes.T if transposed else codes).contiguous()
    if format is E2M1:
        return (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.float4_e2m1fn_x2), values
    return codes.view(getattr(torch, dtype)), values


def scales(rows: int, dtype: str, granularity: int, of: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return stored scales and the factor of every element (rows, K); every row and group has its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = rows, K // granularity
    format = format_of_scales(dtype, granularity, of)
    if format is None:
        stored = torch.rand(shape, generator=generator) + 0.5
        values = stored.double()
    else:
        low, high = (121, 134) if format is E8M0 else (0x20, 0x60)
        codes = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
        values = quantization.decode(codes, format, dtype=torch.float64)
        stored = codes.view(torch.uint32) if dtype == "uint32" else codes.view(getattr(torch, dtype))
    return stored, values.repeat_interleave(granularity, 1)


def problem(pair: Pair) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return the arguments of `program`, whose results are poisoned, and what they must be."""
    (A, a), (B, b) = operand(M, pair.a, pair.trans_A, 1), operand(N, pair.b, not pair.trans_B, 2)
    tensors, expected = [A, B], []
    for form, ((dtype_a, g_a), (dtype_b, g_b)) in enumerate(pair.scales):
        (SA, sa), (SB, sb) = scales(M, dtype_a, g_a, pair.a, 10 + form), scales(N, dtype_b, g_b, pair.b, 20 + form)
        tensors += [SA, SB]
        expected.append((a * sa) @ (b * sb).T)
    return [*tensors, torch.full((FORMS, M, N), torch.nan)], torch.stack(expected)


def program(pair: Pair, threads: int = 128, gemm_blockscaled=T.gemm_blockscaled):
    """Four products of the same A and B, each with scales of its own:

    0: words in global memory; 1: windows of bytes in shared memory and in a fragment, C is bfloat16; 2: floats, of which
    one covers two tiles; 3: E4M3, and words that are E4M3 beside E2M1, with a `clear_accum` that depends on the step.
    """
    a, b, trans_A, trans_B = pair.a, pair.b, pair.trans_A, pair.trans_B
    (type_a0, g_a0), (type_b0, g_b0) = pair.scales[0]
    (type_a1, g_a1), (type_b1, g_b1) = pair.scales[1]
    (type_a2, g_a2), (type_b2, g_b2) = pair.scales[2]
    (type_a3, g_a3), (type_b3, g_b3) = pair.scales[3]
    step_a, step_b = BLOCK_K // codes_per_element(a), BLOCK_K // codes_per_element(b)
    alloc_A = T.alloc_shared if pair.A_scope == "shared" else T.alloc_fragment

    def columns(dtype, granularity):
        return K // granularity // (4 if dtype == "uint32" else 1)

    def product(A, B, C, SFA, SFB, k_start, form, **options):
        (_, g_a), (_, g_b) = pair.scales[form]
        return gemm_blockscaled(
            A, B, C, SFA, SFB, trans_A, trans_B, k_start=k_start, sf_a_granularity_k=g_a, sf_b_granularity_k=g_b, **options
        )  # fmt: skip

    @T.prim_func
    def kernel(
        A: T.Tensor(stored_shape(M, K, a, trans_A), a),
        B: T.Tensor(stored_shape(N, K, b, not trans_B), b),
        SA0: T.Tensor((M, columns(type_a0, g_a0)), type_a0),
        SB0: T.Tensor((N, columns(type_b0, g_b0)), type_b0),
        SA1: T.Tensor((M, columns(type_a1, g_a1)), type_a1),
        SB1: T.Tensor((N, columns(type_b1, g_b1)), type_b1),
        SA2: T.Tensor((M, columns(type_a2, g_a2)), type_a2),
        SB2: T.Tensor((N, columns(type_b2, g_b2)), type_b2),
        SA3: T.Tensor((M, columns(type_a3, g_a3)), type_a3),
        SB3: T.Tensor((N, columns(type_b3, g_b3)), type_b3),
        C: T.Tensor((FORMS, M, N), "float32"),
    ):
        with T.Kernel(1, threads=threads) as _:
            A_s = alloc_A(stored_shape(M, BLOCK_K, a, trans_A), a)
            B_s = T.alloc_shared(stored_shape(N, BLOCK_K, b, not trans_B), b)
            SA1_s = T.alloc_shared((M, BLOCK_K // g_a1), type_a1)
            SB1_f = T.alloc_fragment((N, BLOCK_K // g_b1), type_b1)
            C0_f = T.alloc_fragment((M, N), "float32")
            C1_f = T.alloc_fragment((M, N), "bfloat16")
            C2_f = T.alloc_fragment((M, N), "float32")
            C3_f = T.alloc_fragment((M, N), "float32")
            T.clear(C0_f)
            T.clear(C1_f)
            T.clear(C2_f)
            for ko in T.Pipelined(K // BLOCK_K, num_stages=0):
                if trans_A:
                    T.copy(A[ko * step_a, 0], A_s)
                else:
                    T.copy(A[0, ko * step_a], A_s)
                if trans_B:
                    T.copy(B[0, ko * step_b], B_s)
                else:
                    T.copy(B[ko * step_b, 0], B_s)
                T.copy(SA1[0, ko * (BLOCK_K // g_a1)], SA1_s)
                T.copy(SB1[0, ko * (BLOCK_K // g_b1)], SB1_f)
                product(A_s, B_s, C0_f, SA0, SB0, ko * BLOCK_K, 0)
                product(A_s, B_s, C1_f, SA1_s, SB1_f, ko * BLOCK_K, 1)
                product(A_s, B_s, C2_f, SA2, SB2, ko * BLOCK_K, 2)
                product(A_s, B_s, C3_f, SA3, SB3, ko * BLOCK_K, 3, clear_accum=ko == 0)
            T.copy(C0_f, C[0, 0, 0])
            T.copy(C1_f, C[1, 0, 0])
            T.copy(C2_f, C[2, 0, 0])
            T.copy(C3_f, C[3, 0, 0])

    return kernel
