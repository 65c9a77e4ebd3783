"""A recorded stand-in for the kernels, for the tests of `scaled_mm`."""

import pytest
from kernels.scaled_mm.recording import record_kernels


@pytest.fixture
def kernels(monkeypatch):
    return record_kernels(monkeypatch)
