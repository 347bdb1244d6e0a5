import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from transformers import Trainer

from seam.tests.helpers.training_sounds import Killed, recipe, write_sounds
from seam.train import alignment, instruction, refinement


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> str:
    """Shared by all tests: read only."""
    return write_sounds(tmp_path_factory.mktemp("sounds"))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Share a folder among all processes that run tests, read only: `once(name, write)` has the first one write it."""

    def once(name: str, write: Callable[[Path], None]) -> Path:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
        with FileLock(f"{folder}.lock"):
            if not folder.with_suffix(".done").exists():
                folder.mkdir(exist_ok=True)
                write(folder)
                folder.with_suffix(".done").touch()
        return folder

    return once


@pytest.fixture(scope="session")
def stages(once, backbones, manifest) -> Path:
    """All three stages, trained far enough to know the eight sounds by heart, and what each reported: metrics.json."""

    def write(folder: Path):
        config = {"lora_rank": 8, "lora_dropout": 0.0}
        one, two, three = (str(folder / name) for name in ("alignment", "instruction", "refinement"))
        metrics = {
            "alignment": alignment.main(
                recipe(one, manifest, 250, encoder=backbones[0], llm=backbones[1], config=config)
            ),
            "instruction": instruction.main(recipe(two, manifest, 150, model=one, llm=backbones[1])),
            "refinement": refinement.main(recipe(three, manifest, 60, model=two)),
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))

    return once("stages", write)


@pytest.fixture(autouse=True)
def no_curves(request, monkeypatch):
    """Leave the curves of a training out where no test looks at them: drawing them takes longer than a few steps."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("seam.train.run.plot_training_curves", lambda *_: None)


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
