"""What a user imports: every public name, from the top of the package, loaded on first use."""

import importlib
import subprocess
import sys

import pytest

import tilelang_ext


@pytest.mark.parametrize("name", tilelang_ext.__all__)
def test_public_name(name):
    namespace = {}
    exec(f"from tilelang_ext import {name}", namespace)
    assert namespace[name] is getattr(tilelang_ext, name)


def test_functions_hide_no_module():
    """A module of a function's name would replace the function once it is imported."""
    for name in tilelang_ext.__all__:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"tilelang_ext.{name}")


def test_unknown_name():
    with pytest.raises(ImportError, match="cannot import name 'Experts'"):
        from tilelang_ext import Experts  # noqa: F401


def test_operators_are_loaded_on_use():
    """`import tilelang_ext` loads no operator, no simulator, and adds less than half a second to tilelang's own import."""
    program = """
import tilelang, torch, sys, time
start = time.process_time()
import tilelang_ext
seconds = time.process_time() - start
loaded = [name for name in sys.modules if name.startswith(("tilelang_ext.kernels.", "tilelang_ext.simulator"))]
assert not loaded, loaded
assert seconds < 0.5 * 2, seconds  # of CPU time; twice as long on a busy machine of continuous integration
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_version():
    assert tilelang_ext.__version__ == importlib.metadata.version("tilelang_ext")
