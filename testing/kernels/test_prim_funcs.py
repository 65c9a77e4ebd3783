"""Every kernel as a prim_func: what one version of tilelang takes of Python within a kernel, another may not."""

import pytest
from kernels.prim_funcs import FAMILIES


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_prim_funcs(family):
    for case in family():
        case.make(*case.arguments)
