"""Run a tile program of MXFP4 and MoE intrinsics on a target by name: c on the CPU itself, others in the simulator."""

import tilelang

from tilelang_ext import simulate

TARGETS = ["c", "metal", "hip -mcpu=gfx942", "hip -mcpu=gfx1100"]


def run(kernel, *arguments, target):
    """Run one launch, which must give no findings where there are any."""
    if target == "c":
        tilelang.compile(kernel, target="c")(*arguments)
    elif target == "cuda":
        on_device = [argument.cuda() for argument in arguments]
        tilelang.compile(kernel, target="cuda")(*on_device)
        for argument, result in zip(arguments, on_device, strict=True):
            argument.copy_(result.cpu())
    else:
        report = simulate(kernel, *arguments, target=target)
        assert not report.findings, str(report)
