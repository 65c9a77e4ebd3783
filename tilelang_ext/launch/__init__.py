"""How a prim_func runs on the device of some tensors: which target it is, how the kernel is compiled, what is current.

plan = launch.prepare(prim_func, arch="sm_90a")    compile a prim_func to a plan, which launches natively (`plan`)
plan(x, weight, out)
"""

from tilelang_ext.launch.recipe import prepare

__all__ = ["prepare"]
