"""Names in a tile program that the language writes and backends read: of annotations, and of an operator."""

# On a T.Parallel loop: every element of a buffer with fewer axes, such as a scale, is read once, so a backend may load it
# ahead of the loop. Metal stages such reads (`metal/staged_reads.py`).
READ_ONCE = "read_once"

# On a loop or a T.gemm that multiplies codes with E8M0 scales per 32 elements of K: the value is what
# `language.block_scaled.block_scaled` returns. A target whose matrix unit takes scales replaces the statement.
BLOCK_SCALED = "block_scaled"

# On a T.gemm: a target whose matrix unit takes no fp8 must refuse the product instead of decoding the codes.
REQUIRE_NATIVE_FP8 = "require_native_fp8"

# On a T.gemm: its loop over K stays a loop. Unrolled, its loads keep so many addresses in registers on RDNA 3 that they spill.
ROLLED_K = "rolled_k"

# On a T.gemm and the loops behind it that together add a product times its scales to a fragment: the value is what
# `language.scaled_product.scaled_product` returns, and an empty list on all but the first. CUDA keeps the sum of a loop over K
# across its steps (`cuda/scaled_loop.py`).
SCALED_PRODUCT = "scaled_product"

# On the loops that decode MXFP4 weights: a list of regions, of packed weights, their scales (None for 1) and what is written.
# CUDA looks for a product of them (`cuda/mxfp4_loop.py`).
MXFP4_DEQUANT = "mxfp4_dequant"

# On the loop of T.moe_gather: a list of regions, of the rows of all tokens, of the ids and of the tile that is written. CUDA
# looks for a product of such a tile (`cuda/mxfp4_loop.py`).
MOE_GATHER = "moe_gather"

# On the loop of T.swiglu and T.silu_mul over a fragment with gate and up in turn: a list of regions, of the fragment and of its
# copy in shared memory, from which the loop reads columns 2 j and 2 j + 1. CUDA reads them from registers where a thread has
# both (`cuda/column_pairs.py`).
COLUMN_PAIRS = "column_pairs"

# On the loops that only add the total of the BLOCK_SCALED loop before them to a float32 fragment: a list of its region.
ADDS_TOTAL = "adds_total"

# The operator that a call of T.gemm_blockscaled is, with the arguments of tilelang 0.1.15.
GEMM_BLOCKSCALED = "tl.tileop.gemm_blockscaled"
