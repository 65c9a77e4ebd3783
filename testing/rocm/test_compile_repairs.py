"""AMD's compiler takes what the repairs of passes and generator write into a text."""

import pytest
from passes import meeting_kernels, operator_kernels
from rocm.fp8_kernels import CODES, FOREIGN, conversions
from rocm.kernels import lower

from tilelang_ext.rocm import compile_hip

KERNELS = {
    "reduction from any thread": lambda: meeting_kernels.normalized_row(48),
    "float64": lambda: operator_kernels.floats("float64"),
    "booleans": operator_kernels.booleans,
    "narrow integers": operator_kernels.narrow_integers,
    "fp8": lambda: conversions([format.dtype for format in FOREIGN["gfx942"]], CODES),
}


@pytest.mark.hip
@pytest.mark.parametrize("name", KERNELS)
def test_compiles(name):
    compile_hip(lower(KERNELS[name](), "gfx942").source, "gfx942")
