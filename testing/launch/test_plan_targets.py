"""Which GPUs a plan takes a binary for, and TMA descriptors, on a driver that writes down what it is told."""

import pytest
import torch
from launch.fakes import cubin, launch, tensor
from launch.plan_parts import nine_tensors, of_x, one_kernel, with_descriptor

# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("built_for", ["sm_90", "sm_80", "sm_100a"])
def test_binary_of_another_target(cuda, built_for):
    plan = nine_tensors(cuda)
    variant = {"key": [], "sizes": [0, 0], "target": "sm_90a", "tensors": [], "steps": []}
    with pytest.raises(ValueError, match=f"add: binary must be for sm_90a; got one whose ELF says {built_for}; compile it for"):
        plan.add(variant, [cubin(built_for, {})])
    with pytest.raises(ValueError, match=r"add: binary must be a cubin whose ELF proves its arch.*; got one that is no ELF"):
        plan.add(variant, [b"// .target sm_90a"])


def test_plain_target_takes_no_specific_binary(cuda):
    with pytest.raises(ValueError, match="binary must be for sm_90; got one whose ELF says sm_90a"):
        nine_tensors(cuda).add(
            {"key": [], "sizes": [0, 0], "target": "sm_90", "tensors": [], "steps": []}, [cubin("sm_90a", {})]
        )


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [("sm_90a", 90, True), ("sm_90a", 100, False), ("sm_80", 89, True), ("sm_89", 80, False), ("sm_80", 90, False)],
)
def test_compute_capability(cuda, arch, capability, runs):
    cuda.driver.fake_capability(capability)
    variant = {"tensors": [tensor("x", [None])], "steps": [launch("one_kernel", [["pointer", "x", 0]])]}
    plan = cuda.plan("x", {"x": "tensor"}, variant, arch=arch)
    if runs:
        plan(torch.randn(4))
    else:
        with pytest.raises(RuntimeError, match=f"kernels for {arch} must run on compute capability"):
            plan(torch.randn(4))
    assert len(cuda.launches()) == runs


@pytest.mark.parametrize("sizes", [{"one_kernel": [8, 8]}, {"one_kernel": [4]}, {"two_kernel": [8]}])
def test_binary_of_another_kernel(cuda, sizes):
    plan, step = of_x(cuda), one_kernel(["pointer", "x", 0])
    variant = {"key": [], "sizes": [0, 0], "target": "sm_90a", "tensors": [tensor("x", [None])], "steps": [step]}
    with pytest.raises(ValueError, match=r"binary must have kernel one_kernel with parameters of bytes \(8,\); got one"):
        plan.add(variant, [cubin("sm_90a", sizes)])


# --- TMA descriptors ------------------------------------------------------------------------------------------------


def test_descriptors_are_encoded_once_an_address_and_shape(cuda):
    plan, x, y = with_descriptor(cuda), torch.randn(20, 128), torch.randn(20, 128)
    calls = (x, x, y, x[:10], x, y)
    for called in calls:
        plan(called)
    encoded = [(line.split()[4], line.split()[7]) for line in cuda.lines("encode")]
    starts = [(x, 20), (y, 20), (x, 10)]
    assert encoded == [(f"{a.data_ptr() + offset:x}", str(rows)) for a, rows in starts for offset in (0, 256)]
    for called, done in zip(calls, cuda.launches(), strict=True):
        first, one, second = done.parameters
        assert (first, one) == (called.data_ptr() | 128 << 64 | len(called) << 128, 1)
        assert second == (called.data_ptr() + 256) | 128 << 64 | len(called) << 128


def test_descriptor_as_it_is_encoded(cuda):
    x = torch.randn(20, 128)
    with_descriptor(cuda)(x)
    wanted = f"encode dtype 7 address {x.data_ptr():x} extents 128 20 strides 512 box 32 64"
    assert cuda.lines("encode")[0] == f"{wanted} swizzle 3 interleave 0 promotion 2 fill 0"


def test_descriptor_of_nothing(cuda):
    with pytest.raises(RuntimeError, match=r"extents above 0 .*; got address % 16 = 0, extents \(128, 0\), strides in bytes"):
        with_descriptor(cuda)(torch.randn(0, 128))
    assert cuda.launches() == []
