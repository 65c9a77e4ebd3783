"""A recorded stand-in for MLX, for the tests of the Metal room."""

import pytest
from metal.recording import record_mlx


@pytest.fixture
def fake_mlx(monkeypatch):
    return record_mlx(monkeypatch)
