"""How a prim_func runs on the device of some tensors: which target it is, how the kernel is compiled, what is current.

plan = launch.prepare(prim_func, arch="sm_90a")    compile a prim_func to a plan, which launches natively (`plan`)
plan(x, weight, out)
launch.reload()                                    forget compiled kernels and plans; the next call looks at the cache's folder
"""

from tilelang_ext.launch.cache import reload
from tilelang_ext.launch.recipe import prepare

__all__ = ["prepare", "reload"]
