"""Run a kernel on the CPU through target `c`. The passes are part of the cache's key: no stale kernel is met."""

import tilelang
from numeric import assert_close


def compile_c(kernel, **options):
    """Compile for target `c`."""
    return tilelang.compile(kernel, target="c", **options)


def check(kernel, arguments, C, expected, out="float32"):
    """Run `kernel` on `arguments` with the result in C, and compare C with the float64 reference."""
    compile_c(kernel)(*arguments, C)
    assert_close(C, expected, dtype=out)
