"""Compiled kernels on disk, under tilelang's cache folder: what `recipe` lowered, and the cubin.

A kernel is found by what it is made from: the caller's key (names, configuration and the exact architecture), the sources of
this package, and the versions of both packages, each pair of which has a folder of its own and leaves the others alone. While
one process builds an entry, others wait for it, up to a limit. An entry is written beside its place and then moved there; one
that is cut short, changed or another's fails its digest and is built again. What cannot be written, for a full disk or a folder
that is only read, stays in memory, after one warning. Where tilelang's cache is off, so is the disk.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import tilelang
from tilelang.env import env

import tilelang_ext

if os.name == "posix":
    import fcntl

_DIGEST_BYTES, _LENGTH_BYTES = 32, 8
WAIT_SECONDS, _POLL_SECONDS = 300.0, 0.05  # for another process that builds the same kernel
_memory: dict[Path, tuple[dict, bytes]] = {}
_forgotten_by_reload: list[Callable[[], None]] = []


def folder() -> Path:
    """Return the folder of this version's entries; it need not exist."""
    return Path(env.TILELANG_CACHE_DIR) / "tilelang_ext" / f"{tilelang_ext.__version__}-tilelang-{tilelang.__version__}"


def cached(key: tuple, build: Callable[[], tuple[dict, bytes]]) -> tuple[dict, bytes]:
    """Return what `build` made for this key: data that JSON can hold, and a binary. `key` has a repr that tells keys apart."""
    path = _path(key)
    if path not in _memory:
        _memory[path] = _from_disk(path, build) if env.is_cache_enabled() else build()
    return _memory[path]


def is_cached(key: tuple) -> bool:
    """Return whether this process or the disk has an entry for this key."""
    path = _path(key)
    return path in _memory or (env.is_cache_enabled() and _read(path) is not None)


def _path(key: tuple) -> Path:
    return folder() / f"{hashlib.sha256(repr((*key, _sources())).encode()).hexdigest()}.kernel"


class UntilReload:
    """An attribute that is found when it is first needed, and then costs no call: `value`, which `reload` forgets."""

    def __init__(self, find: Callable[[], object]):
        self._find = find
        _forgotten_by_reload.append(self._forget)

    def _forget(self) -> None:
        self.__dict__.pop("value", None)

    def __getattr__(self, name: str):
        if name != "value":
            raise AttributeError(name)
        self.value = self._find()
        return self.value


def until_reload(function: Callable) -> Callable:
    """Return the function with its results kept, as functools.cache keeps them, until `reload`."""
    kept = functools.cache(function)
    _forgotten_by_reload.append(kept.cache_clear)
    return kept


def reload() -> None:
    """Forget the kernels and the plans of this process, and what its sources were: the next calls look at the disk again."""
    _memory.clear()
    _sources.cache_clear()
    for forget in _forgotten_by_reload:
        forget()


def _from_disk(path: Path, build: Callable[[], tuple[dict, bytes]]) -> tuple[dict, bytes]:
    found = _read(path)
    if found is not None:
        return found
    with _alone(path):
        found = _read(path)  # another process may have built it meanwhile
        if found is None:
            found = build()
            try:
                _write(path, _pack(path.name, *found))
            except OSError as error:
                _warn_once(str(path.parent), str(error))
    return found


def _read(path: Path) -> tuple[dict, bytes] | None:
    with contextlib.suppress(OSError, ValueError):
        return _unpack(path.name, path.read_bytes())
    return None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold an entry's lock, which its process's end releases. Goes on without it where there is none, or after the limit."""
    file = None
    if os.name == "posix":
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path.with_suffix(".lock"), "w")  # noqa: SIM115
    try:
        limit = time.monotonic() + WAIT_SECONDS
        while file is not None and time.monotonic() < limit:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL_SECONDS)
            except OSError:  # a file system without locks
                break
            else:
                break
        yield
    finally:
        if file is not None:
            file.close()


@functools.cache
def _warn_once(where: str, reason: str) -> None:
    warnings.warn(
        f"kernel cache: {where} must be writable; got {reason}; kernels stay in memory and are compiled again in the next "
        "process: free space, or set TILELANG_CACHE_DIR",
        stacklevel=2,
    )


@functools.cache
def _sources() -> str:
    """Return the digest of this package's sources. A cubin stays good when nvcc is updated."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _pack(name: str, data: dict, binary: bytes) -> bytes:
    text = json.dumps(data).encode()
    body = len(text).to_bytes(_LENGTH_BYTES, "little") + text + binary
    return hashlib.sha256(name.encode() + body).digest() + body


def _unpack(name: str, entry: bytes) -> tuple[dict, bytes]:
    """Return what was packed under this name. Raises ValueError for an entry that is not whole, or another's."""
    digest, body = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    if hashlib.sha256(name.encode() + body).digest() != digest:
        raise ValueError(f"cache: an entry must be whole and its own; got {len(entry)} bytes of another digest; remove it")
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
