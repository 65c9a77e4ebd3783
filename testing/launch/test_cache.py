"""Compiled kernels on disk: found again, built again where an entry is torn or foreign, and done without where need be."""

import json
import os
import subprocess
import sys

import pytest
import tilelang.language as T
from tilelang.env import env

from tilelang_ext.launch import cache, recipe

DATA, BINARY = {"name": "add", "steps": [["int32", 4]]}, b"\x7fELF\0\1\2"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "folder", lambda: tmp_path / "kernels")
    return tmp_path / "kernels"


class Build:
    """What builds an entry; counts how often."""

    def __init__(self, binary=BINARY):
        self.binary, self.count = binary, 0

    def __call__(self):
        self.count += 1
        return DATA, self.binary


def test_built_once(folder):
    build = Build()
    for _ in range(3):
        assert cache.cached(("add", 1), build) == (DATA, BINARY)
    assert build.count == 1
    assert len(list(folder.iterdir())) == 1, "nothing is left beside the entry"


@pytest.mark.parametrize("key", [("add", 2), ("add", "1"), ("add", 1, ()), ("sub", 1)])
def test_other_keys(folder, key):
    cache.cached(("add", 1), Build())
    other = Build(b"other")
    assert cache.cached(key, other) == (DATA, b"other")
    assert other.count == 1


def test_other_sources_and_versions(folder, monkeypatch):
    cache.cached(("add", 1), Build())
    monkeypatch.setattr(cache, "_environment", lambda: ("digest of other sources", "0.1.15"))
    build = Build()
    cache.cached(("add", 1), build)
    assert build.count == 1


TEARS = [lambda e: e[:-1], lambda e: e[:20], lambda e: b"", lambda e: e[:-1] + b"!", lambda e: b"?" * 99]


@pytest.mark.parametrize("tear", TEARS)
def test_torn_and_foreign_entries_are_built_again(folder, tear):
    cache.cached(("add", 1), Build())
    [entry] = folder.iterdir()
    entry.write_bytes(tear(entry.read_bytes()))
    build = Build()
    assert cache.cached(("add", 1), build) == (DATA, BINARY)
    assert cache.cached(("add", 1), build) == (DATA, BINARY)
    assert build.count == 1


def test_a_folder_that_cannot_be_written(folder):
    folder.write_bytes(b"a file where the folder would be")
    build = Build()
    for _ in range(2):
        assert cache.cached(("add", 1), build) == (DATA, BINARY)
    assert build.count == 2


def test_a_full_disk(folder, monkeypatch):
    def full(path, entry):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "_write", full)
    assert cache.cached(("add", 1), Build()) == (DATA, BINARY)


def test_an_entry_that_cannot_be_moved_leaves_nothing(folder, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert cache.cached(("add", 1), Build()) == (DATA, BINARY)
    assert list(folder.iterdir()) == []


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
    assert len(list(tmp_path.iterdir())) == 200


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
