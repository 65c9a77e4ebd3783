"""Every kernel as a prim_func: what one version of tilelang takes of Python within a kernel, another may not."""

from kernels.prim_funcs import FAMILIES


def test_prim_funcs():
    for family in FAMILIES:
        for case in family():
            case.make(*case.arguments)
