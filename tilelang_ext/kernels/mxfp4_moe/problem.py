"""What the kernels of `mxfp4_moe` are chosen and compiled for, and what an implementation of its two GEMMs promises.

An implementation is a file with these names. `launch.IMPLEMENTATIONS` lists the files; the first that takes a problem runs it.

    takes(problem) -> bool
    pick_config(problem)      the tile; the sort pads the rows of each expert to a multiple of its block_M
    pick_configs(problem)     everything by which the kernels of a problem differ from those for another number of tokens
    compile_kernels(problem, device) -> run(x, routing, w13, w2, y)
    PARTIAL_DTYPE             dtype of y where every slot has a row of its own
    USES_PDL                  whether its kernels start before the kernel launched before them has ended

`device` compiles kernels and allocates tensors (`launch.Device`). `run` computes both GEMMs and the activation between them on
the current stream, for any number of tokens that has the problem's tile. It is given, and need not check:

| argument | shape | memory |
| --- | --- | --- |
| x | (tokens, H) of the problem's dtype | contiguous |
| routing | the tensors that `moe_sort` writes (`launch.Routing`) | contiguous |
| w13, w2 | weights in the problem's layout | contiguous |
| y | `reduce`: (tokens, top_k, H) of PARTIAL_DTYPE; `atomic`: (tokens, H), float32 zeros | contiguous |

`reduce` writes one row per slot, `atomic` adds the rows of a token.
"""

from dataclasses import dataclass

from tilelang_ext.kernels.mxfp4_moe.activation import Activation

# Layouts of weights: as `MXFP4Weights` has them, and as `HopperWeights` has them for each format of activations.
GENERAL_LAYOUT = "general"
HOPPER_LAYOUTS = {"bfloat16": "hopper_bfloat16", "fp8": "hopper_fp8"}
TOKEN_BITS = 24  # of a sorted token id (`routing`); the slot lies above
TOKEN_MASK = (1 << TOKEN_BITS) - 1
MAX_TOP_K = 127  # slots and the sentinel share the 7 bits that an int32 has left
EPILOGUES = ("reduce", "atomic")


@dataclass(frozen=True)
class Problem:
    """Everything that the choice of kernels and tiles may depend on; dtypes by TileLang's names."""

    tokens: int
    top_k: int
    num_experts: int  # of the router, those on other ranks too
    num_local_experts: int  # whose weights are here
    hidden_size: int  # H
    intermediate_size: int  # I
    dtype: str  # of x and out: "bfloat16" or "float16"
    ids_dtype: str  # of topk_ids: "int32" or "int64"
    a_format: str  # what the first GEMM takes activations in, a row of the table in `formats`
    weights_layout: str  # GENERAL_LAYOUT or one of HOPPER_LAYOUTS
    activation: Activation
    epilogue: str  # "reduce": slots are stored and then added in order; "atomic": they are added in any order
    target_kind: str  # "cuda", "hip", "metal" or, on the CPU, "c"
    num_sms: int  # of the device: the blocks of a persistent kernel; 0 on targets that have none

    @property
    def slots(self) -> int:
        """Pairs of a token and one of its experts."""
        return self.tokens * self.top_k

    @property
    def rows_per_expert(self) -> int:
        """Rows that an expert has when all experts are equally busy."""
        return -(-self.slots // self.num_experts)

    @property
    def max_experts(self) -> int:
        """The number of experts that the sort is compiled for: a power of two, at least 64."""
        return max(64, 1 << (self.num_experts - 1).bit_length())
