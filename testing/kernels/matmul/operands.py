"""Operands of matmuls for tests: every row and column has its own magnitude."""

import torch

from tilelang_ext.kernels.matmul.problem import Epilogue, Problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NONE = Epilogue()
ALL = Epilogue(True, True, "float32", "gelu", "bfloat16")


def name(dtype):
    return str(dtype).removeprefix("torch.")


def problem(M, N, K, dtype=BF16, out=None, a_is_k_major=True, b_is_k_major=True, epilogue=NONE, arch="sm_90a"):
    """What a kernel is compiled for: on an H200, on a chip of AMD, or on Metal where arch is empty."""
    kind = {"sm": "cuda", "gf": "hip", "": "metal"}[arch[:2]]
    num_sms = {"cuda": 132, "hip": 304, "metal": 0}[kind]
    return Problem(kind, arch, num_sms, M, N, K, name(dtype), name(out or dtype), a_is_k_major, b_is_k_major, epilogue)


def operands(of: Problem, seed=0):
    """Return a, b, row_scale, column_scale, bias, residual, with None for what the problem lacks; a and b as (M, K), (K, N)."""
    generator = torch.Generator().manual_seed(seed)
    dtype, epilogue, M, N, K = getattr(torch, of.dtype), of.epilogue, of.M, of.N, of.K

    def spread(rows):
        return torch.exp2(torch.randint(-2, 2, (rows,), generator=generator).float())

    a = (torch.randn(M, K, generator=generator) * spread(M)[:, None] / K**0.5).to(dtype)
    b = (torch.randn(K, N, generator=generator) * spread(N)).to(dtype)
    a = a if of.a_is_k_major else a.t().contiguous().t()
    b = b.t().contiguous().t() if of.b_is_k_major else b
    row_scale = torch.rand(M, generator=generator) + 0.5 if epilogue.row_scale else None
    column_scale = torch.rand(N, generator=generator) + 0.5 if epilogue.column_scale else None
    bias = residual = None
    if epilogue.bias_dtype:
        bias = torch.randn(N, generator=generator).to(getattr(torch, epilogue.bias_dtype))
    if epilogue.residual_dtype:
        residual = torch.randn(M, N, generator=generator).to(getattr(torch, epilogue.residual_dtype))
    return a, b, row_scale, column_scale, bias, residual
