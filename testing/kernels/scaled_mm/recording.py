"""A stand-in for the kernel files of `scaled_mm`, which records what is compiled and launched."""

import torch
from kernels.scaled_mm.operands import ROW

from tilelang_ext.kernels.scaled_mm import operator
from tilelang_ext.kernels.scaled_mm.problem import bucket_of
from tilelang_ext.launch.device import target_of

CUDA = torch.device("cuda", 1)
E4M3_TORCH, BF16 = torch.float8_e4m3fn, torch.bfloat16


class H200:
    """What torch says of an H200, as far as it is asked."""

    multi_processor_count = 132


class Kernels:
    """Stands in for a kernel file: keeps the problems it compiled and the arguments of each launch."""

    def __init__(self):
        self.problems, self.launches = [], []

    def takes(self, problem):
        return True

    def compile_kernel(self, problem, compile):
        self.problems.append(problem)
        return lambda *arguments: self.launches.append(arguments)


def record_kernels(monkeypatch):
    """Put a stand-in in place of the kernels of an H200, and return it."""
    stand_in = Kernels()
    monkeypatch.setattr(operator, "KERNELS", (stand_in,))
    monkeypatch.setattr(operator, "_launchers", {})
    monkeypatch.setattr(operator, "target_of", target_of.__wrapped__)  # another machine's devices are not kept
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    return stand_in


def key(M=5, device=CUDA, a=E4M3_TORCH, b=E4M3_TORCH, recipes=(ROW, ROW), bias=BF16, out=BF16):
    return (device, bucket_of(M), 64, 128, a, b, *(recipe.value for recipe in recipes), bias, out)
