"""Compiled kernels on disk, under tilelang's cache folder: what `recipe` lowered, and the cubin.

A kernel is found by what it is made from: the caller's key, the sources of this package, and tilelang's version. An entry is
written beside its place and then moved there, so that processes may write at the same time; one that is cut short or changed
fails its digest and is built again. A folder that cannot be written is left alone. Where tilelang's cache is off, so is this.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import tilelang
from tilelang.env import env

_DIGEST_BYTES, _LENGTH_BYTES = 32, 8


def folder() -> Path:
    """Return the folder of entries; it need not exist."""
    return Path(env.TILELANG_CACHE_DIR) / "tilelang_ext"


def cached(key: tuple, build: Callable[[], tuple[dict, bytes]]) -> tuple[dict, bytes]:
    """Return what `build` made for this key: data that JSON can hold, and a binary. `key` has a repr that tells keys apart."""
    if not env.is_cache_enabled():
        return build()
    path = folder() / f"{hashlib.sha256(repr((*key, _environment())).encode()).hexdigest()}.kernel"
    with contextlib.suppress(OSError, ValueError):
        return _unpack(path.read_bytes())
    data, binary = build()
    with contextlib.suppress(OSError):
        _write(path, _pack(data, binary))
    return data, binary


@functools.cache
def _environment() -> tuple[str, str]:
    """Return what decides beside the key how a kernel comes out. A cubin stays good when nvcc is updated."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest(), tilelang.__version__


def _pack(data: dict, binary: bytes) -> bytes:
    text = json.dumps(data).encode()
    body = len(text).to_bytes(_LENGTH_BYTES, "little") + text + binary
    return hashlib.sha256(body).digest() + body


def _unpack(entry: bytes) -> tuple[dict, bytes]:
    """Return what was packed. Raises ValueError for an entry that is not whole."""
    digest, body = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        raise ValueError(f"cache: an entry must be whole; got {len(entry)} bytes of another digest; remove it")
    end = _LENGTH_BYTES + int.from_bytes(body[:_LENGTH_BYTES], "little")
    return json.loads(body[_LENGTH_BYTES:end]), body[end:]


def _write(path: Path, entry: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(entry)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
