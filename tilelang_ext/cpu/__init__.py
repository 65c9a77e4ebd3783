"""Target `c`: tile programs written for a GPU, run on the CPU, one thread a block."""
