"""A lowered function as data, for any target: its text, its kernels, and what one call launches."""

from tilelang_ext.program.arguments import pack_scalar
from tilelang_ext.program.lowered import HostCalls, function_of, host_calls, lower_function
from tilelang_ext.program.program import Binding, Kernel, Launch, Parameter, Program

__all__ = [
    "Binding",
    "HostCalls",
    "Kernel",
    "Launch",
    "Parameter",
    "Program",
    "function_of",
    "host_calls",
    "lower_function",
    "pack_scalar",
]
