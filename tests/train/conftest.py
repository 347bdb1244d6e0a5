import pytest
from transformers import Trainer

from seam.tests.helpers.training_sounds import Killed, write_sounds


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> str:
    """Shared by all tests: read only."""
    return write_sounds(tmp_path_factory.mktemp("sounds"))


@pytest.fixture
def dies_after(monkeypatch):
    """Make the training die before micro-batch `count`, from 0."""
    step = Trainer.training_step

    def dies_after(count: int | None):
        seen = iter(range(10**6))

        def dying(self, *args, **kwargs):
            if next(seen) == count:
                raise Killed
            return step(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", dying)

    return dies_after
