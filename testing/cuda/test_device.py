"""T.fp8_scaled_matmul on a Hopper GPU: operands of either major, and the texts for GPUs without fp8 units, run there."""

import pytest
import torch
from cuda.cases import DECODED_CASES, TRANSPOSED_CASES, problem
from cuda.kernels import run_on_gpu
from numeric import assert_close
from tvm.target import Target

pytestmark = pytest.mark.cuda
TENSOR_CORE_ERROR = 2e-3  # sums of products keep fewer than 24 bits between promotions
# Several real architectures make a fat binary, to which the virtual one is added: the driver compiles that for its GPU.
WITHOUT_FP8_UNIT = Target({"kind": "cuda", "arch": "sm_80", "code": ["sm_80", "sm_86"]})
WITH_PTX = {"tl.device_compile_flags": ["-gencode=arch=compute_80,code=compute_80"]}


def check(options, target, **pass_configs):
    kernel, tensors, _, expected = problem(spread=1, **options)
    run_on_gpu(kernel, tensors, target, **pass_configs)
    assert_close(tensors["C"], expected, dtype="float32", max_error=TENSOR_CORE_ERROR)


@pytest.mark.parametrize("options", DECODED_CASES.values(), ids=DECODED_CASES)
def test_decoded_to_half(options):
    check(options, WITHOUT_FP8_UNIT, **WITH_PTX)


@pytest.mark.parametrize("K", [128, 1056])
@pytest.mark.parametrize("trans_B", [True, False])
@pytest.mark.parametrize("trans_A", [True, False])
def test_majors(trans_A, trans_B, K):
    check({"M": 200, "N": 336, "K": K, "trans_A": trans_A, "trans_B": trans_B, "block_M": 128, "block_N": 128}, "cuda")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU, which has WGMMA"
)
@pytest.mark.parametrize("options", TRANSPOSED_CASES.values(), ids=TRANSPOSED_CASES)
def test_transposed_for_wgmma(options):
    check(options, "cuda")
