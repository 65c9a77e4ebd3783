"""Stand-ins for torch's and MLX's launchers of Metal texts, which record what they are given."""

import sys
import types

import numpy as np
import torch


class RecordedShader:
    """Stands in for what `torch.mps.compile_shader` returns."""

    def __init__(self, source):
        self.source = source
        self.calls = []

    def __getattr__(self, name):
        def launch(*arguments, threads, group_size):
            self.calls.append((name, arguments, threads, group_size))

        return launch


def record_torch(monkeypatch):
    """Put a stand-in in place of `torch.mps.compile_shader`, on a machine that has MPS; return the shaders that it makes."""
    shaders = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "compile_shader", lambda source: shaders.append(RecordedShader(source)) or shaders[-1])
    return shaders


class FakeArray:
    """As much of `mx.array` as the launch needs, over numpy."""

    def __init__(self, values, dtype=None):
        self.values = np.asarray(values, dtype=dtype)

    shape = property(lambda self: self.values.shape)
    size = property(lambda self: self.values.size)

    @property
    def dtype(self):
        return self.values.dtype

    def reshape(self, *shape):
        return FakeArray(self.values.reshape(*shape))


def record_mlx(monkeypatch):
    """Put a stand-in in place of `mlx.core`, whose metal_kernel appends what it is given to `records`; return it."""
    core = types.ModuleType("mlx.core")
    core.array = FakeArray
    core.metal = types.SimpleNamespace(is_available=lambda: True)
    for name in ("float16", "float32", "int64", "uint8", "int32"):
        setattr(core, name, np.dtype(name))
    core.bool_ = np.dtype(bool)
    core.full = lambda shape, value, dtype: FakeArray(np.full(shape, value, dtype))
    core.zeros = lambda shape, dtype: FakeArray(np.zeros(shape, dtype))
    core.concatenate = lambda arrays: FakeArray(np.concatenate([a.values for a in arrays]))
    core.records = []

    def metal_kernel(**definition):
        def launch(**call):
            core.records.append({**definition, **call})
            return [FakeArray(np.zeros(s, d)) for s, d in zip(call["output_shapes"], call["output_dtypes"], strict=True)]

        return launch

    core.fast = types.SimpleNamespace(metal_kernel=metal_kernel)
    package = types.ModuleType("mlx")
    package.core = core
    monkeypatch.setitem(sys.modules, "mlx", package)
    monkeypatch.setitem(sys.modules, "mlx.core", core)
    return core
