"""GPU source text, executed on a CPU: numerics, memory and race checks, operation counts. Never speed."""

from .errors import CompileError, CompilerMissingError, CrashError, SimulatorError, TimeLimitError
from .execute import execute_hip, execute_msl, translate_msl
from .hip import ARCHITECTURES
from .report import Counts, Finding, Report
from .toolchain import find_compiler

__all__ = [
    "ARCHITECTURES",
    "CompileError",
    "CompilerMissingError",
    "Counts",
    "CrashError",
    "Finding",
    "Report",
    "SimulatorError",
    "TimeLimitError",
    "execute_hip",
    "execute_msl",
    "find_compiler",
    "translate_msl",
]
