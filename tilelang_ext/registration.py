"""How a backend takes its place in upstream's registries: a key of its own in the target, and a pass list of its own.

Both are the same for every target. Upstream has no hook for either, so what is touched is named here: the table
`tilelang.backend.module._BACKENDS`, and `tilelang.cuda.debug._IS_CUDA_AVAILABLE`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import tvm_ffi
from tilelang.backend import module as backend_module
from tilelang.backend.pass_pipeline import PassPipeline
from tilelang.cuda import debug
from tvm import IRModule
from tvm.target import Target

KEY_PREFIX = "tilelang_ext-"
# What any backend may import.
_SHARED_FILES = ("codes.py", "formats.py", "marks.py", "passes/*.py", "program/*.py", "registration.py")


@functools.cache
def lowering_key(folder: Path, digest: str = "") -> str:
    """Return the target key that names the code in a backend's `folder`; `digest` stands for what lies elsewhere.

    Upstream caches a kernel's text under its target. A target with this key never meets a text of upstream's passes, nor of
    another version of ours.
    """
    key = hashlib.sha256(digest.encode())
    own = [path for path in folder.iterdir() if path.suffix in (".py", ".h")]
    shared = [path for pattern in _SHARED_FILES for path in folder.parent.glob(pattern)]
    for path in (*sorted(own), *sorted(shared)):
        key.update(path.read_bytes())
    return f"{KEY_PREFIX}{key.hexdigest()[:12]}"


def with_key(target: Target, key: str) -> Target:
    """Return the target, host included, with `key` among its keys."""
    return target if key in target.keys else _with_keys(target, [*target.keys, key])


def without_key(target: Target) -> Target:
    """Return the target, host included, without the key of any version."""
    return _with_keys(target, [key for key in target.keys if not key.startswith(KEY_PREFIX)])


def has_key(target: Target) -> bool:
    """Whether the target has the key of any version."""
    return any(key.startswith(KEY_PREFIX) for key in target.keys)


def _with_keys(target: Target, keys: list[str]) -> Target:
    return Target({**target.export(), "keys": keys})


def replace_pass_list(backend: str, target_kind: str, lower: Callable[[IRModule, Target], IRModule]) -> None:
    """Make `lower` the pass list of one target kind of upstream's `backend`; its other kinds keep theirs."""
    pipelines = {**upstream_backend(backend).pipelines, target_kind: PassPipeline(target_kind, lower)}
    replace_backend(backend, {"pipelines": pipelines})


def keep_device_asserts() -> None:
    """Have `T.device_assert` traced on every machine: upstream drops it, for all targets, where it finds no CUDA."""
    if not hasattr(debug, "_IS_CUDA_AVAILABLE"):
        raise ImportError(
            "tilelang_ext: needs tilelang.cuda.debug._IS_CUDA_AVAILABLE to keep T.device_assert; this tilelang has none; "
            "install tilelang 0.1.14 or 0.1.15"
        )
    debug._IS_CUDA_AVAILABLE = True


def upstream_backend(backend: str) -> backend_module.BackendModule:
    """Return what upstream's table holds for `backend`; ImportError where this tilelang has no such table."""
    backends = getattr(backend_module, "_BACKENDS", None)
    if not isinstance(backends, dict) or backend not in backends:
        raise ImportError(
            f"tilelang_ext: needs tilelang.backend.module._BACKENDS[{backend!r}] to replace the pass list; "
            "this tilelang has none; install tilelang 0.1.14 or 0.1.15"
        )
    return backends[backend]


def replace_backend(backend: str, changes: Mapping[str, object]) -> None:
    """Replace fields of what upstream's table holds for `backend`."""
    backend_module._BACKENDS[backend] = dataclasses.replace(upstream_backend(backend), **changes)


def wrap_builder(name: str, spell: Callable[[IRModule], IRModule]) -> None:
    """Put `spell`, which must follow upstream's last simplification, before the generator `name`; idempotent."""
    upstream = tvm_ffi.get_global_func(f"{name}.upstream", allow_missing=True)
    if upstream is None:
        upstream = tvm_ffi.get_global_func(name)
        tvm_ffi.register_global_func(f"{name}.upstream", upstream)

    def build(mod: IRModule, target: Target):
        return upstream(spell(mod), target)

    tvm_ffi.register_global_func(name, build, override=True)
