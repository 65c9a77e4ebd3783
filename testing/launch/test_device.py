"""Which target a device is, and that a launch leaves the process's current device where it was."""

import pytest
import torch
from kernels.mxfp4_moe import operands as moe_operands
from kernels.scaled_mm.operands import ROW, case

from tilelang_ext import mxfp4_moe, scaled_mm, tile_for_hopper
from tilelang_ext.launch import compile as compiling
from tilelang_ext.launch import device as devices


@pytest.fixture
def asked(monkeypatch):
    """Two GPUs that differ: device 1 is an H200 with 132 SMs, device 0 has half of them. The devices that were asked."""
    asked = []

    class Properties:
        def __init__(self, device):
            asked.append(device)
            self.multi_processor_count = 132 if device.index == 1 else 66
            self.gcnArchName = "gfx942:sramecc+:xnack-"

    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return asked


target_of = devices.target_of.__wrapped__  # the devices of another machine are not kept


def test_the_tensors_device_is_asked(asked):
    assert target_of("f", torch.device("cuda", 1)) == ("cuda", "sm_90a", 132)
    assert target_of("f", torch.device("cuda", 0)).num_sms == 66
    assert [device.index for device in asked] == [1, 0]
    assert target_of("f", torch.device("cuda", 1)).tilelang == {"kind": "cuda", "arch": "sm_90a"}


def test_rocm(asked, monkeypatch):
    """The architecture without its modes."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    target = target_of("f", torch.device("cuda", 0))
    assert target == ("hip", "gfx942", 66)
    assert target.tilelang == {"kind": "hip", "mcpu": "gfx942"}


def test_metal():
    assert target_of("f", torch.device("mps", 0)).tilelang == "metal"


def test_other_devices():
    with pytest.raises(NotImplementedError, match="mxfp4_moe: tensors must be on cuda, mps or cpu; got xpu; move them"):
        target_of("mxfp4_moe", torch.device("xpu", 0))


def test_the_device_before_is_current_again(monkeypatch):
    """torch's guard, for tensors of CUDA alone."""
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device.index)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", Guard)
    with devices.current(torch.device("cuda", 1)), devices.current(torch.device("cpu")):
        pass
    assert entered == [1, "left"]


def test_a_kernel_is_compiled_once_for_its_target(monkeypatch):
    compiled = []

    def compile(prim_func, target, pass_configs):
        compiled.append((prim_func, target, pass_configs))

    monkeypatch.setattr(compiling.tilelang, "compile", compile)
    compiling.compiled.cache_clear()
    h200 = devices.Target("cuda", "sm_90a", 132)
    for _ in range(2):
        compiling.compiled(named, ("a",), h200, (("tl.x", True),))
    assert compiled == [("prim_func of a", {"kind": "cuda", "arch": "sm_90a"}, {"tl.x": True})]
    compiling.compiled(named, ("b",), h200)
    assert len(compiled) == 2
    compiling.compiled.cache_clear()


def named(name):
    return f"prim_func of {name}"


# --- two GPUs --------------------------------------------------------------------------------------------------------


def scaled_mm_on(device):
    arguments, _ = case(64, 256, 256, (ROW, ROW))
    moved = [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]
    moved[1] = moved[1].t().contiguous().t()
    return scaled_mm(*moved, output_dtype=torch.float32)


def mxfp4_moe_on(device):
    (x, topk_ids, topk_weights, *weights), _ = moe_operands.arguments()
    tiled = [tile_for_hopper(each) for each in weights]
    moved = [
        each._replace(**{name: getattr(each, name).to(device) for name in ("tiles", "row_scale", "bias")}) for each in tiled
    ]
    return mxfp4_moe(x.to(device), topk_ids.to(device), topk_weights.to(device), *moved, activation=moe_operands.SWIGLU)


@pytest.mark.cuda
@pytest.mark.two_gpus
@pytest.mark.parametrize("operator_on", [scaled_mm_on, mxfp4_moe_on])
def test_operators_leave_the_current_device_alone(operator_on):
    """A call on cuda:1 while cuda:0 is current, the result beside that of cuda:0; and the other way round."""
    results = []
    for index, current in ((0, 0), (1, 0), (0, 1), (1, 1)):
        torch.cuda.set_device(current)
        results.append(operator_on(torch.device("cuda", index)).cpu())
        assert torch.cuda.current_device() == current
    torch.cuda.set_device(0)
    assert all(torch.equal(result, results[0]) for result in results)
    assert results[0].any()
