"""What tests of launches share."""

import pytest
from launch.fakes import FakeCuda


@pytest.fixture
def cuda():
    return FakeCuda()
