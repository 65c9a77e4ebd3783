"""Gated delta rule: the decode step of linear attention, from kernels of this package."""
