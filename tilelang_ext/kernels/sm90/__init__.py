"""Building blocks of kernels for Hopper (sm_90a), in the language only: what a warp-specialized persistent kernel is made of.

| file | what it holds |
| --- | --- |
| roles | producer and consumer warpgroups, their registers, the named barrier of a warpgroup |
| pipeline | stages of shared memory with a full and an empty barrier each |
| scheduler | which tile a block takes next, or which part of it, and where that tile lies |
| split_tiles | accumulators that one block gives another, through global memory |
| epilogue | subtiles of the result on their way through shared memory, TMA stores in flight, deferred subtiles |
| pdl | programmatic dependent launch |

Structs hold buffers and the host's constants. Functions and methods that return nothing emit their statements where they are
called, in a kernel, in a macro, or in a plain function that one of those calls. Python numbers reach a macro as fields or
closures, since a macro turns a number that it is given into a variable.
"""
