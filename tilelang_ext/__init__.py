"""tilelang_ext: quantised tile intrinsics, a Metal backend with real fragments, and a simulator, on the installed tilelang.

Importing registers the Metal backend, the pass lists and GEMMs of AMD and the CPU, and the FP8 GEMMs of CUDA, and does nothing
more: operators are loaded when they are first used. What it replaces in tilelang is listed in docs/design/decisions.md.

    from tilelang_ext import language as T, simulate             write a kernel, run its text on the CPU
    from tilelang_ext import scaled_mm, mxfp4_moe, MXFP4Experts  ready operators
    from tilelang_ext import quantize, dequantize                floats to codes and scales, and back
"""

from __future__ import annotations

import importlib as _importlib
from importlib import metadata as _metadata

__version__ = "0.1.0"  # pyproject.toml reads it from here

SUPPORTED_TILELANG = ("0.1.14", "0.1.15")


def _check_tilelang() -> None:
    try:
        version = _metadata.version("tilelang")
    except _metadata.PackageNotFoundError:
        raise ImportError(
            "tilelang_ext: needs tilelang; got none installed; run `pip install tilelang==" + SUPPORTED_TILELANG[-1] + "`"
        ) from None
    if version.split("+")[0] not in SUPPORTED_TILELANG:
        raise ImportError(
            f"tilelang_ext: needs tilelang {' or '.join(SUPPORTED_TILELANG)}; got {version}; "
            f"run `pip install tilelang=={SUPPORTED_TILELANG[-1]}`"
        )


_check_tilelang()

from tilelang_ext.cpu.backend import register as _register_cpu  # noqa: E402
from tilelang_ext.cuda.backend import register as _register_cuda  # noqa: E402
from tilelang_ext.metal.backend import register as _register  # noqa: E402
from tilelang_ext.rocm.backend import register as _register_rocm  # noqa: E402

_register()
_register_cpu()
_register_cuda()
_register_rocm()

from tilelang_ext.kernels import PUBLIC as _OPERATORS  # noqa: E402

# Public names beside the operators, and the modules that they are loaded from on first use.
_LOADED_FROM = {
    "dequantize": "tilelang_ext.reference",
    "quantize": "tilelang_ext.quantization",
    "simulate": "tilelang_ext.simulation",
    **_OPERATORS,
}

__all__ = [
    "SUPPORTED_TILELANG",
    "__version__",
    *_LOADED_FROM,
]


def __getattr__(name: str):
    if name not in _LOADED_FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_importlib.import_module(_LOADED_FROM[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOADED_FROM})
