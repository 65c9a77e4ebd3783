"""Compiled kernels on disk: found again, built again where an entry is torn or foreign, and done without where need be."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings

import pytest
import tilelang.language as T
from tilelang.env import env

import tilelang_ext
from tilelang_ext.launch import cache, recipe

DATA, BINARY = {"name": "add", "steps": [["int32", 4]]}, b"\x7fELF\0\1\2"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder and an empty memory; each `cached` in a test is a process's first, unless it says otherwise."""
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "kernels")
    monkeypatch.setattr(cache, "_memory", Forgetful())
    cache._warn_once.cache_clear()
    return tmp_path / "kernels"


class Forgetful(dict):
    """A memory that another process has: it never knows an entry before it is built."""

    def __contains__(self, path):
        return False


class Build:
    """What builds an entry; counts how often."""

    def __init__(self, binary=BINARY):
        self.binary, self.count = binary, 0

    def __call__(self):
        self.count += 1
        return DATA, self.binary


def entries(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".kernel")


def test_built_once(folder):
    build = Build()
    assert not cache.is_cached(("add", 1))
    for _ in range(3):
        assert cache.cached(("add", 1), build) == (DATA, BINARY)
    assert build.count == 1
    assert cache.is_cached(("add", 1))
    assert not cache.is_cached(("add", 2))
    assert {path.suffix for path in folder.iterdir()} == {".kernel", ".lock"}, "nothing else is left beside the entry"


@pytest.mark.parametrize("key", [("add", 2), ("add", "1"), ("add", 1, ()), ("sub", 1)])
def test_other_keys(folder, key):
    cache.cached(("add", 1), Build())
    other = Build(b"other")
    assert cache.cached(key, other) == (DATA, b"other")
    assert other.count == 1


def test_other_sources(folder, monkeypatch):
    cache.cached(("add", 1), Build())
    monkeypatch.setattr(cache, "_sources", lambda: "digest of other sources")
    build = Build()
    cache.cached(("add", 1), build)
    assert build.count == 1


def test_another_version_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(type(env), "TILELANG_CACHE_DIR", str(tmp_path), raising=False)
    monkeypatch.setattr(cache, "_memory", Forgetful())
    for version in ("0.0.9", "0.1.0"):
        monkeypatch.setattr(tilelang_ext, "__version__", version)
        build = Build()
        for _ in range(2):
            cache.cached(("add", 1), build)
        assert build.count == 1
    folders = list((tmp_path / "tilelang_ext").iterdir())
    assert len(folders) == 2
    assert all(len(entries(each)) == 1 for each in folders)


TEARS = [lambda e: e[:-1], lambda e: e[:20], lambda e: b"", lambda e: e[:-1] + b"!", lambda e: b"?" * 99]


@pytest.mark.parametrize("tear", TEARS)
def test_torn_and_foreign_entries_are_built_again(folder, tear):
    cache.cached(("add", 1), Build())
    [entry] = entries(folder)
    entry.write_bytes(tear(entry.read_bytes()))
    build = Build()
    assert cache.cached(("add", 1), build) == (DATA, BINARY)
    assert cache.cached(("add", 1), build) == (DATA, BINARY)
    assert build.count == 1


def test_an_entry_in_another_s_place(folder):
    """Whole, and yet not what was asked for."""
    cache.cached(("add", 1), Build(b"one"))
    [one] = entries(folder)
    cache.cached(("add", 2), Build(b"two"))
    [two] = set(entries(folder)) - {one}
    two.write_bytes(one.read_bytes())
    assert cache.cached(("add", 2), Build(b"two")) == (DATA, b"two")


FAULTS = {
    "a file in the place of the folder": lambda folder, monkeypatch: folder.write_bytes(b""),
    "a full disk": lambda folder, monkeypatch: monkeypatch.setattr(cache, "_write", refuse(28, "No space left on device")),
    "a folder that is only read": lambda folder, monkeypatch: monkeypatch.setattr(os, "replace", refuse(30, "Read-only")),
}


def refuse(number, reason):
    def fail(*arguments):
        raise OSError(number, reason)

    return fail


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_written_stays_in_memory(folder, monkeypatch, fault):
    """One warning for all kernels, each built once; nothing half-written is left."""
    fault(folder, monkeypatch)
    monkeypatch.setattr(cache, "_memory", {})
    build = Build()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in (1, 2, 1, 2):
            assert cache.cached(("add", number), build) == (DATA, BINARY)
    assert re.match(r"kernel cache: .* must be writable; got \[Errno .*; kernels stay in memory", str(warned[0].message))
    assert (build.count, len(warned)) == (2, 1)
    assert folder.is_file() or not [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_reload(folder, monkeypatch):
    """What memory has is not looked for on disk, until it is forgotten; so are what stands on it."""
    monkeypatch.setattr(cache, "_memory", {})
    kept = cache.until_reload(object)
    assert cache.cached(("add", 1), Build(b"old")) == (DATA, b"old")
    first = kept()
    for entry in entries(folder):
        entry.unlink()
    assert cache.cached(("add", 1), Build(b"new")) == (DATA, b"old")
    assert kept() is first
    cache.reload()
    assert cache.cached(("add", 1), Build(b"new")) == (DATA, b"new")
    assert kept() is not first


def test_others_wait_for_who_builds(folder):
    """As another process would: by a file of its own. Who waited reads what was built."""
    building, builds = threading.Event(), []

    def build():
        builds.append(1)
        building.set()
        time.sleep(0.3)
        return DATA, BINARY

    first = threading.Thread(target=cache.cached, args=(("add", 1), build))
    first.start()
    building.wait()
    assert cache.cached(("add", 1), build) == (DATA, BINARY)
    first.join()
    assert len(builds) == 1


def test_nobody_waits_for_ever(folder, monkeypatch):
    monkeypatch.setattr(cache, "WAIT_SECONDS", 0.1)
    go_on, building = threading.Event(), threading.Event()

    def stuck():
        building.set()
        go_on.wait()
        return DATA, BINARY

    first = threading.Thread(target=cache.cached, args=(("add", 1), stuck))
    first.start()
    building.wait()
    build = Build()
    assert cache.cached(("add", 1), build) == (DATA, BINARY)
    go_on.set()
    first.join()
    assert build.count == 1


def test_where_the_cache_is_off(folder, monkeypatch):
    monkeypatch.setattr(type(env), "is_cache_enabled", lambda self: False)
    build = Build()
    for _ in range(2):
        cache.cached(("add", 1), build)
    assert (build.count, folder.exists()) == (2, False)


WRITERS = """
import sys
from pathlib import Path
from tilelang_ext.launch import cache
cache.folder = lambda: Path(sys.argv[1])
for number in range(200):
    data, binary = cache.cached(("add", number), lambda: ({"number": number}, bytes(4096)))
    assert data == {"number": number} and len(binary) == 4096
"""


def test_processes_that_write_at_the_same_time(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITERS, tmp_path], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for writer in writers:
        _, error = writer.communicate(timeout=300)
        assert writer.returncode == 0, error
    assert len(entries(tmp_path)) == 200


def test_a_kernel_comes_back_as_it_was(folder, monkeypatch):
    @T.prim_func
    def clear(x: T.Tensor((64,), "float32")):
        with T.Kernel(1, threads=64):
            for i in T.Parallel(64):
                x[i] = 0

    monkeypatch.setattr(recipe, "assemble", lambda source, arch, pass_configs: source.encode())
    made = recipe.compile_cached(("clear",), lambda: clear, "sm_90a")

    def lower_again():
        raise AssertionError("must be found")

    found = recipe.compile_cached(("clear",), lower_again, "sm_90a")
    assert found == made
    assert json.loads(json.dumps(made[0].variant)) == made[0].variant


def test_what_is_found_when_it_is_needed():
    found = []
    kept = cache.UntilReload(lambda: found.append(1) or len(found))
    assert found == []
    assert (kept.value, kept.value) == (1, 1)
    cache.reload()
    assert kept.value == 2
    with pytest.raises(AttributeError, match="other"):
        _ = kept.other
