"""What every test shares: the checkout on the path, which tests a machine can run, and the same random numbers each time."""

import gc
import os
import random
import sys
import zlib
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "testing")) if p not in sys.path]

# Before torch and numpy are imported. There is a worker for each core, so that threads of theirs would wait for each other in
# spinning loops: half of the CPU time of tests that compute with torch.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

import c_compiler  # noqa: E402
from cpu_time import CpuTime  # noqa: E402

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--one-case-in", type=int, default=1, metavar="N",
        help="of the cases of each parametrised test run one in N, at least one, mixed over the values of its parameters",
    )  # fmt: skip


def pytest_configure(config):
    config.pluginmanager.register(CpuTime())
    if folder := c_compiler.with_precompiled_header():
        config.add_cleanup(folder.cleanup)
    gc.disable()  # until what is imported and collected, which stays, is out of the collector's sight


def pytest_collection_finish():
    """Let the garbage collector pass over what stays, and run seldom: it would take a tenth of the CPU time of lowering."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Seed what tests draw from, before any fixture: a test's numbers depend on its name, not on what ran before it."""
    import numpy
    import torch

    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_modifyitems(config, items):
    """A missing device is a visible skip; tests that download are run when asked for by name."""
    reasons = {
        "cuda": "needs an NVIDIA GPU" if _gpus() < 1 else None,
        "two_gpus": "needs two NVIDIA GPUs" if _gpus() < 2 else None,
        "hip": _no_amd_compiler(),
        "peers": "downloads other libraries' kernels: make test-peers" if "peers" not in config.option.markexpr else None,
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
    if config.option.one_case_in > 1:
        kept = _one_case_in(config.option.one_case_in, items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def _one_case_in(n: int, items) -> set:
    """Return the chosen cases: those whose names have the smallest checksums, hence no value of a parameter is preferred."""
    cases = {}
    for item in items:
        cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = set()
    for of_test in cases.values():
        of_test.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        chosen.update(of_test[: -(-len(of_test) // n)])
    return chosen


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _no_amd_compiler() -> str | None:
    from tilelang_ext.rocm import CompilerMissingError, find_compiler

    try:
        find_compiler()
    except CompilerMissingError as error:
        return str(error)
    return None
