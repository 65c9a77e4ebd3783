"""Compile kernels on a GPU, many at a time: lowering holds Python's lock, so each in a process of its own.

What they compile is found in TileLang's cache on disk afterwards.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch.nn.functional import ScalingType

from tilelang_ext.kernels.matmul import problem as matmul_problem
from tilelang_ext.kernels.matmul.operator import KERNELS as MATMUL_KERNELS
from tilelang_ext.kernels.scaled_mm.arguments import LAYOUTS
from tilelang_ext.kernels.scaled_mm.problem import bucket_of
from tilelang_ext.launch import record
from tilelang_ext.launch.device import target_of


def compile_all(shapes, recipes) -> None:
    """Compile what `scaled_mm` needs for (M, N, K) `shapes` with float32 output."""
    needed = sorted({(bucket_of(M), N, K) for M, N, K in shapes})
    in_processes(partial(_compile, recipes=tuple(recipe.value for recipe in recipes)), needed)


def compile_moe(kernels) -> None:
    """Compile what `mxfp4_moe` needs: the function that makes a prim_func, its arguments, pass configurations."""
    in_processes(_compile_moe, kernels)


def compile_matmuls(cases) -> None:
    """Compile what `matmul` needs for cases (M, N, K, dtype, layout) as benchmark/bench_matmul.py has them."""
    target = target_of("matmul", torch.device("cuda", torch.cuda.current_device()))
    compile_matmul_problems(
        matmul_problem.Problem(*target, M, N, K, dtype, dtype, layout[0] == "N", layout[1] == "T")
        for M, N, K, dtype, layout in cases
        if dtype in ("float16", "bfloat16")
    )


def compile_matmul_problems(problems) -> None:
    """Compile what `matmul` needs for problems on this GPU."""
    kernels = {}
    for of in problems:
        arch = of.arch
        next(file for file in MATMUL_KERNELS if file.takes(of)).compile_kernel(of, _Listed(kernels))
    missing = [listed for listed in kernels if not record.is_compiled(*listed[:2], arch, listed[2])]
    if missing:
        in_processes(partial(_compile_kernel, arch=arch), missing)


class _Listed:
    """Stands in for what compiles kernels: keeps what it is asked for."""

    def __init__(self, kernels: dict):
        self.kernels = kernels

    def compile(self, make, *arguments, pass_configs=None) -> None:
        self.kernels[make, arguments, tuple((pass_configs or {}).items())] = None


def _compile_kernel(listed, arch: str) -> None:
    make, arguments, pass_configs = listed
    record.kernel(make, arguments, arch, pass_configs)


def in_processes(function, jobs) -> None:
    """Call function(job) for each job, every one in a process of its own; what it compiles is found on disk afterwards."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(16, os.cpu_count(), len(jobs)), mp_context=context) as pool:
        list(pool.map(function, jobs))


def _compile_moe(kernel) -> None:
    from tilelang_ext.kernels.mxfp4_moe.launch import compiled

    make, arguments, pass_configs = kernel
    compiled(make, arguments, torch.device("cuda"), pass_configs)


def _compile(shape: tuple[int, int, int], recipes: tuple[int, int]) -> None:
    from kernels.scaled_mm.operands import as_torch

    from tilelang_ext.kernels.scaled_mm.operator import scaled_mm

    M, N, K = shape
    scales = []
    for side, rows, recipe in (("a", M, recipes[0]), ("b", N, recipes[1])):
        layout = LAYOUTS[recipe]
        dtype = torch.float32 if layout.scale_format is None else torch.uint8
        scale = torch.ones(layout.scale_shape(rows, K), dtype=dtype, device="cuda")
        scales.append(as_torch(scale, ScalingType(recipe), side))
    a, b = (torch.zeros(rows, K, device="cuda").to(torch.float8_e4m3fn) for rows in (M, N))
    scaled_mm(
        a,
        b.t(),
        scales[0],
        ScalingType(recipes[0]),
        scales[1],
        ScalingType(recipes[1]),
        output_dtype=torch.float32,
    )
    torch.cuda.synchronize()
