"""Run a kernel by the text that a target gets."""

import tilelang

from tilelang_ext import simulate


def run(kernel, *arguments, target: str) -> None:
    """Run `kernel` on CPU tensors: target `c` compiled, another in the simulator and without a finding."""
    if target == "c":
        tilelang.compile(kernel, target="c")(*arguments)
    else:
        report = simulate(kernel, *arguments, target=target)
        assert not report.findings, str(report)
