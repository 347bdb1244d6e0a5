"""
Train SEAM on people who read and speak English, on backbones that come from packages.

    seam train english RECIPE.yaml [key=value ...]

Each step is completed before the next begins, and is not repeated when the same command is given again; a stage that
was interrupted goes on at its last checkpoint.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict

from seam.data.files import copy_file
from seam.data.manifest import read_manifest
from seam.evaluation.table import write_table
from seam.evaluation.transcription import load_whisper
from seam.experiments.demo import compare_systems
from seam.experiments.english_speech import EnglishSpeech, make_test_speech, make_training_speech
from seam.experiments.english_text import EnglishText, make_training_text
from seam.experiments.packaged_backbones import packaged_backbones
from seam.experiments.steps import Steps
from seam.modeling_seam import SeamProcessor, build_untrained, load_checkpoint
from seam.publishing.card import write_card
from seam.train import alignment, draft, instruction, refinement, stage1_decoding
from seam.train.recipe import RecipeError, StageRecipe, load_recipe

CARD = Path(__file__).parents[1] / "recipes" / "english" / "card.json"
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
        text: see `EnglishText`; without files none is made.
        config: fields of `SeamConfig` that differ from those of `build_untrained`.
        stages: recipe files of the stages, by their names, in the order of `STAGES`.
        overrides: `key=value` for all of them. Where there is no GPU, `training.use_cpu=true` is the first.
    """

    output_dir: str = "runs/english"
    speech: EnglishSpeech = field(default_factory=EnglishSpeech)
    text: EnglishText = field(default_factory=EnglishText)
    config: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)


def main(recipe: EnglishRecipe) -> dict[str, Any]:
    """Run every step and return where the checkpoint is."""
    folder = Path(recipe.output_dir)
    for corpus in recipe.speech.corpora:
        read_manifest(corpus, "train")  # before anything is started
    for path in recipe.text.files:
        if not Path(path).is_file():
            raise RecipeError(f"text.files: {path}: no such file.")
    # Training in bf16 without a GPU is refused unless a recipe says so: at the sizes of the paper that would be slow.
    overrides = ["training.use_cpu=true"] * (not torch.accelerator.is_available()) + recipe.overrides
    stages = {name: load_recipe(StageRecipe, path, overrides) for name, path in recipe.stages.items()}
    folder.mkdir(parents=True, exist_ok=True)
    steps = Steps(folder)
    steps.run("untrained", recipe.config, lambda: build(folder / "untrained", recipe.config))
    settings = asdict(recipe.speech)
    labeller = str(folder / "untrained")
    tests = partial(make_test_speech, recipe.speech, folder / "tests")
    steps.run("test speech", settings, lambda: tests(SeamProcessor.from_pretrained(labeller)))
    steps.run("speech", settings, lambda: make_training_speech(recipe.speech, folder / "speech", labeller))
    if recipe.text.files:
        held_out = sorted((folder / "tests").glob("*.jsonl"))
        steps.run("text", asdict(recipe.text), lambda: make_training_text(recipe.text, folder / "text.txt", held_out))
    for name, stage in stages.items():
        if stage.alignment_cache is not None:
            steps.run(f"Stage 1 for {name}", asdict(stage), lambda stage=stage: stage1_decoding.main(stage))
        steps.run(name, asdict(stage), lambda name=name, stage=stage: STAGES[name](stage))
    last = stages[list(stages)[-1]].training.output_dir if stages else labeller
    steps.run("checkpoint", last, lambda: save_checkpoint(Path(last), folder / "model"))
    steps.run("evaluation", last, lambda: evaluate(folder))
    return {"checkpoint": str(folder / "model"), "wer": json.loads((folder / "table.json").read_text())["wer"]}


def build(folder: Path, config: dict[str, Any]) -> str:
    """Build the untrained model, and return which tokens bound Stage 1."""
    backbones = packaged_backbones(print)
    model, processor, tokens = build_untrained(str(backbones["encoder"]), str(backbones["llm"]), **config)
    for component in (model, processor):
        component.save_pretrained(folder)
    return tokens.reason


def save_checkpoint(source: Path, target: Path) -> None:
    """Save a trained model in bf16, without its backbones and without the other files of its training."""
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model, processor = load_checkpoint(str(source))
    trained = {name: value.bfloat16() for name, value in model.state_dict().items() if value.is_floating_point()}
    model.save_pretrained(temporary, light=True, state_dict=trained)
    processor.save_pretrained(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def evaluate(folder: Path) -> None:
    """Score every system on every kind of held-out speech: `table.json`, `table.md`, `table.png` and the card."""
    model, processor = load_checkpoint(str(folder / "model"))
    whisper, whisper_processor = load_whisper(str(packaged_backbones(print)["encoder"]), dtype=torch.float32)
    tests = {path.stem.removeprefix("test-"): read_manifest(path) for path in (folder / "tests").glob("test-*.jsonl")}
    write_table(compare_systems(model, processor, whisper, whisper_processor, tests, "english"), folder)
    for name in ("table.json", "table.png"):
        copy_file(folder / name, folder / "model" / name)
    copy_file(CARD, folder / "model" / "card.json")
    write_card(model, processor, folder / "model", "checkpoints/english")
