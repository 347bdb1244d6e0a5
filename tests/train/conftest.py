import pytest

from seam.tests.train.sounds import write_sounds


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> str:
    """Shared by all tests: read only."""
    return write_sounds(tmp_path_factory.mktemp("sounds"))
