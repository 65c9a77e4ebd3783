"""`gated_delta_prefill` on Hopper: values by running the CUDA text of the scan on the CPU, and the machine code."""

from cuda.execute import needs_compiler
from cuda.kernels import lower
from cuda.toolkit import compile_texts, needs_nvcc
from kernels.attention.operands import FUNCTIONS
from kernels.gated_delta.operands import Prefill, prefill_problem
from kernels.hopper import Box, execute

from tilelang_ext.kernels.gated_delta.prefill_problem import HOPPER
from tilelang_ext.kernels.gated_delta.sm90_config import Config
from tilelang_ext.kernels.gated_delta.sm90_scan import PASS_CONFIGS, scan_chunks

# Two consumers, of which each has a slice of V; sequences of some chunks, of no token, and of one, ahead of NaNs
PROBLEM = prefill_problem(HOPPER, 1, 1, 128, 128, l2_norm=True, has_initial=True, has_lengths=True)
CONFIG, LENGTHS = Config(2, 2), [130, 0, 1]


def text():
    return lower(scan_chunks(PROBLEM, CONFIG).with_attr("global_symbol", "scan"), HOPPER, **PASS_CONFIGS)


@needs_compiler
def test_values():
    given = Prefill(PROBLEM, LENGTHS)
    given.solve()
    tensors = {name: given.tensors[name] for name in given.SCAN}
    tokens, sequences = given.tensors["q"].shape[1], len(LENGTHS)
    scalars = {"batch": 1, "tokens": tokens, "__1": tokens, "sequences": sequences, "num_cu": sequences + 1}
    boxes = {name: Box(64, 64) for name in ("q", "k", "v", "solution", "scores")}
    execute(text(), (sequences, 1), tensors, boxes, scalars, functions=FUNCTIONS)
    given.check()


@needs_nvcc
def test_machine_code():
    """No MMA waits for the one before (`compile_texts` sees to that), and nothing spills.

    Each consumer has P ahead of the loop, and the MMAs of a chunk.
    """
    compiled = compile_texts({"scan": text()}, HOPPER)["scan"]
    assert compiled.spilled == 0
    assert compiled.count("HGMMA") == 2 * (8 + 8 + 8 + 4 + 4 + 4)
