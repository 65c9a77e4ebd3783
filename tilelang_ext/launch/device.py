"""Which target the device of a tensor is, and the one guard that makes a device current for a launch."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from tilelang.contrib import nvcc


class Target(NamedTuple):
    """What kernels are compiled for, as the device reports it."""

    kind: str  # "cuda", "hip" or "metal"
    arch: str  # as "sm_90a" or "gfx942"; "" on Metal
    num_sms: int  # streaming multiprocessors, on AMD compute units; 0 on Metal, which does not report them

    @property
    def tilelang(self) -> dict | str:
        """The target as tilelang.compile takes it."""
        if self.kind == "metal":
            return self.kind
        return {"kind": self.kind, "arch" if self.kind == "cuda" else "mcpu": self.arch}


@functools.cache
def target_of(name: str, device: torch.device) -> Target:
    """Return the target of a tensor's device, for the operator called `name`.

    Asks the device itself, not the current one. Raises NotImplementedError for devices other than cuda (ROCm's too) and mps.
    """
    if device.type == "mps":
        return Target("metal", "", 0)
    if device.type != "cuda":
        raise NotImplementedError(f"{name}: tensors must be on cuda, mps or cpu; got {device.type}; move them")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    arch = "sm_" + nvcc.get_target_arch("{}.{}".format(*torch.cuda.get_device_capability(device)))
    return Target("cuda", arch, properties.multi_processor_count)


def is_for_nvidia() -> bool:
    """Return whether this build of torch is for NVIDIA GPUs, which plans launch on; for AMD's it calls them cuda too."""
    return torch.version.hip is None


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which `device` is the current one of this thread. The one before is current again afterwards,
    whatever a launch has set meanwhile: compiled kernels make the device of their tensors current and leave it so.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
