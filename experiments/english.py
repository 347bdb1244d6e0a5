"""
Train SEAM on people who read and speak English, on backbones that come from packages.

    seam train english RECIPE.yaml [key=value ...]

Each step is completed before the next begins, and is not repeated when the same command is given again; a stage that
was interrupted goes on at its last checkpoint.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict

from seam.data.manifest import read_manifest
from seam.experiments.english_speech import EnglishSpeech, make_test_speech, make_training_speech
from seam.experiments.packaged_backbones import packaged_backbones
from seam.experiments.steps import Steps
from seam.modeling_seam import build_untrained, load_checkpoint
from seam.train import alignment, draft, instruction, refinement
from seam.train.recipe import StageRecipe, load_recipe

STAGES: dict[str, Callable[[StageRecipe], dict[str, float]]] = {
    "alignment": alignment.main,
    "instruction": instruction.main,
    "refinement": refinement.main,
    "draft": draft.main,
}


@strict
@dataclass
class EnglishRecipe:
    """
    Settings of the English checkpoint.

    Args:
        output_dir: everything is written here; the checkpoint is in `model/`.
        speech: see `EnglishSpeech`.
        config: fields of `SeamConfig` that differ from those of `build_untrained`.
        stages: recipe files of the stages, by their names, in the order of `STAGES`.
        overrides: `key=value` for all of them.
    """

    output_dir: str = "runs/english"
    speech: EnglishSpeech = field(default_factory=EnglishSpeech)
    config: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)


def main(recipe: EnglishRecipe) -> dict[str, Any]:
    """Run every step and return where the checkpoint is."""
    folder = Path(recipe.output_dir)
    for corpus in recipe.speech.corpora:
        read_manifest(corpus, "train")  # before anything is started
    stages = {name: load_recipe(StageRecipe, path, recipe.overrides) for name, path in recipe.stages.items()}
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(folder)
    steps.run("untrained", recipe.config, lambda: build(folder / "untrained", recipe.config))
    settings = asdict(recipe.speech)
    steps.run("test speech", settings, lambda: make_test_speech(recipe.speech, folder / "tests"))
    labeller = str(folder / "untrained")
    steps.run("speech", settings, lambda: make_training_speech(recipe.speech, folder / "speech", labeller))
    for name, stage in stages.items():
        steps.run(name, asdict(stage), lambda name=name, stage=stage: STAGES[name](stage))
    last = stages[list(stages)[-1]].training.output_dir if stages else labeller
    steps.run("checkpoint", last, lambda: save_checkpoint(Path(last), folder / "model"))
    return {"checkpoint": str(folder / "model")}


def build(folder: Path, config: dict[str, Any]) -> str:
    """Build the untrained model, and return which tokens bound Stage 1."""
    backbones = packaged_backbones(print)
    model, processor, tokens = build_untrained(str(backbones["encoder"]), str(backbones["llm"]), **config)
    for component in (model, processor):
        component.save_pretrained(folder)
    return tokens.reason


def save_checkpoint(source: Path, target: Path) -> None:
    """Save a trained model without its backbones and without the other files of its training."""
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model, processor = load_checkpoint(str(source))
    model.save_pretrained(temporary, light=True)
    processor.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
