"""AMD GPUs: `T.gemm` on fp8 operands for every matrix unit, and compiling HIP text without AMD hardware."""

from tilelang_ext.rocm.compile import CodeObject, CompileError, KernelResources, compile_hip
from tilelang_ext.rocm.toolchain import CompilerMissingError, find_compiler

__all__ = ["CodeObject", "CompileError", "CompilerMissingError", "KernelResources", "compile_hip", "find_compiler"]
