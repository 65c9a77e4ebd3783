"""tilelang_ext: quantised tile intrinsics, a Metal backend with real fragments, and a simulator, on the installed tilelang.

Importing registers the Metal backend, the fp8 products of CUDA and AMD, and what the CPU lacked, by name; nothing else.
"""

from __future__ import annotations

from importlib import metadata as _metadata

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

from tilelang_ext.simulation import simulate  # noqa: E402

__all__ = ["simulate"]
