"""How a prim_func runs on the device of some tensors: which target it is, how the kernel is compiled, what is current."""
