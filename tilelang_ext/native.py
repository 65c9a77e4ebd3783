"""Find and load ``libtilelang_ext``, the Metal code generator and its tile operators.

Loading registers global functions (``tilelang_ext.build_metal``, ...), TIR builtins (``tilelang_ext.metal_*``) and the
tile operators that upstream lacks on Metal. Of TVM it replaces, for target ``metal`` only, the rules that expand some math
functions (``tanh``, ``erf``, ...; ``src/metal/builtin.cc`` lists them): they stay calls, which the generator spells.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
from importlib import metadata
from pathlib import Path

_SUFFIX = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")


def find_library() -> Path:
    """Path of the native library built for the installed tilelang: ``lib/<version>/`` beside this file, in a checkout and in
    an installed wheel alike."""
    try:
        version = metadata.version("tilelang").split("+")[0]
    except metadata.PackageNotFoundError:
        raise ImportError(
            "tilelang_ext native library: needs tilelang; got none installed; run `pip install tilelang`"
        ) from None
    path = Path(__file__).resolve().parent / "lib" / version / f"libtilelang_ext{_SUFFIX}"
    if not path.is_file():
        raise ImportError(
            f"tilelang_ext native library: must be built for tilelang {version}; got no file {path}; "
            "run `make venv` (or `pip install --no-build-isolation -e .`) in the checkout"
        )
    return path


@functools.cache
def load_library() -> ctypes.CDLL:
    """Load the library into this process, once; tilelang's own libraries come first, because ours links to them."""
    import tilelang  # noqa: F401

    path = find_library()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ImportError(
            f"tilelang_ext native library: must match the installed tilelang; got {path}: {error}; "
            "rebuild it with `pip install --no-build-isolation -e .`"
        ) from error


@functools.cache
def library_digest() -> str:
    """SHA-256 (hex, first 16 digits) of the library file: part of the key under which generated source is cached."""
    return hashlib.sha256(find_library().read_bytes()).hexdigest()[:16]
