"""
Every system trained on the same data with several seeds, and the paper's Table 1 of them. Resumable.

    seam compare RECIPE.yaml [key=value ...]
"""

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from tqdm.auto import tqdm

from seam.data.manifest import read_manifest
from seam.evaluation.comparison import Decoded, compare, write_comparison
from seam.evaluation.hypotheses import read_hypotheses, write_hypotheses
from seam.evaluation.table import WHISPER
from seam.evaluation.transcription import load_checkpoint
from seam.modeling_seam.aligner import SeamAligner
from seam.modeling_seam.bridges import BRIDGES
from seam.train import alignment, instruction, refinement
from seam.train.demo import WorldRecipe, foundation_key, make_control, make_world
from seam.train.parts import Parts
from seam.train.recipe import RecipeError, StageRecipe, build

STAGES = {"alignment": alignment.main, "instruction": instruction.main, "refinement": refinement.main}
# What is added to a system's name for each of its rows.
ROWS = {"stage1": "Stage 1", "full-noftg": "without FTG", "full": "with FTG"}
CONTROL = "control"


@strict
@dataclass
class SystemSettings:
    """
    One line of the comparison, or several: Stage 1, with and without First Token Guidance.

    Args:
        label: in the tables; by default its name.
        start: another system, with whose Stage 1 this one goes on instead of training one.
        llm: Hub id or folder, where it is not the recipe's.
        prompt: task instruction, where it is not the default one.
        config: fields of `SeamConfig`.
        alignment, instruction, refinement: fields of `StageRecipe` of the stages that it goes through.
        rows: what is evaluated (`seam evaluate --systems`); by default all that it has.
    """

    label: str | None = None
    start: str | None = None
    llm: str | None = None
    prompt: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    alignment: dict[str, Any] | None = None
    instruction: dict[str, Any] | None = None
    refinement: dict[str, Any] | None = None
    rows: list[str] | None = None

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Of those that it goes through, in order."""
        return {name: getattr(self, name) for name in STAGES if getattr(self, name) is not None}


@strict
@dataclass
class CompareRecipe:
    """
    Args:
        systems: by name, the fields of `SystemSettings`; a system that others `start` from comes first.
        encoder, llm: Hub ids or folders of the backbones that all systems share.
        world: made from nothing instead, in `output_dir`: speech, tests, both backbones, and `control/`, a language
            model that has not read the other domain (a system's `llm`). Paths of data and tests are relative to it.
        data: fields of `DataSettings`, of every stage that does not say otherwise.
        tests: manifests by the name of the test set.
        seeds: of the trainings.
        claims: pairs of rows, as they are named in the table; the first is said to be the better one.
        whisper: whether the encoder's own decoder is evaluated as well.
        output_dir: everything is written here.
    """

    systems: dict[str, Any]
    tests: dict[str, str]
    encoder: str | None = None
    llm: str | None = None
    world: WorldRecipe | None = None
    data: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    claims: list[Any] = field(default_factory=list)
    whisper: bool = True
    output_dir: str = "runs/compare"


def main(recipe: CompareRecipe) -> dict[str, Any]:
    """Train and evaluate whatever is not done yet. Returns what `seam.evaluation.comparison.compare` does."""
    systems = {name: build(SystemSettings, values, f"systems.{name}.") for name, values in recipe.systems.items()}
    folder = Path(recipe.output_dir)
    if recipe.world is not None:
        recipe, systems = _in_world(recipe, systems, folder)
    _check(recipe, systems, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.world is not None:
        parts = Parts(folder)
        make_world(recipe.world, folder, parts)
        if str(folder / CONTROL) in [system.llm for system in systems.values()]:
            key = foundation_key(recipe.world, recipe.world.llm)
            parts.run("control", key, lambda: make_control(recipe.world, folder))
    todo = [(seed, name) for seed in recipe.seeds for name in systems]
    for seed, name in (bar := tqdm(todo, desc="comparison")):
        bar.set_postfix_str(f"seed {seed}, {name}")
        _train(recipe, systems, name, seed, folder)
    if recipe.whisper:
        write_hypotheses(recipe.encoder, list(recipe.tests.values()), folder / "whisper", batch_size=32)
    results = compare(_rows(recipe, systems, folder), [tuple(pair) for pair in recipe.claims])
    write_comparison(results, folder)
    print((folder / "comparison.md").read_text(encoding="utf-8"))
    return results


def _in_world(recipe, systems, folder: Path) -> tuple[CompareRecipe, dict[str, SystemSettings]]:
    """The same with the paths of what is made in `folder`."""
    if recipe.encoder is not None or recipe.llm is not None:
        raise RecipeError("encoder and llm are made in the world: leave them out, or the world.")

    def inside(data: dict[str, Any]) -> dict[str, Any]:
        lists = {key: [str(folder / name) for name in data[key]] for key in ("train", "validation") if key in data}
        return {**data, **lists}

    def stage(values: dict[str, Any] | None) -> dict[str, Any] | None:
        return values if values is None or "data" not in values else {**values, "data": inside(values["data"])}

    systems = {
        name: replace(
            system,
            llm=system.llm and str(folder / system.llm),
            **{each: stage(getattr(system, each)) for each in STAGES},
        )
        for name, system in systems.items()
    }
    tests = {name: str(folder / manifest) for name, manifest in recipe.tests.items()}
    backbones = {"encoder": str(folder / "whisper"), "llm": str(folder / "llm")}
    return replace(recipe, data=inside(recipe.data), tests=tests, **backbones), systems


def _place(folder: Path, seed: int, name: str) -> Path:
    return folder / f"seed-{seed}" / name


def _check(recipe: CompareRecipe, systems: dict[str, SystemSettings], folder: Path) -> None:
    """Everything that can be known to be wrong before the first training."""
    names = list(systems)
    for index, (name, system) in enumerate(systems.items()):
        if system.start is not None and system.start not in names[:index]:
            raise RecipeError(f"systems.{name}.start: {system.start!r} is no system before it: {', '.join(names)}.")
        if system.start is None and not system.stages:
            raise RecipeError(f"systems.{name} has no stage and no start.")
        for stage in system.stages:
            _stage_recipe(recipe, system, name, stage, recipe.seeds[0], folder, {})
    if recipe.encoder is None or recipe.llm is None:
        raise RecipeError("the recipe names neither both backbones (encoder and llm) nor a world to make them in.")
    for manifest in recipe.tests.values() if recipe.world is None else ():
        read_manifest(manifest)
    labels = {label for system, name in zip(systems.values(), names, strict=True) for label in _labels(system, name)}
    labels.add(WHISPER)
    for pair in recipe.claims:
        unknown = [row for row in pair if row not in labels]
        if len(pair) != 2 or unknown:
            raise RecipeError(f"claims: {pair} is no pair of rows of the table; they are: {'; '.join(sorted(labels))}.")


def _labels(system: SystemSettings, name: str) -> dict[str, str]:
    """Names of a system's rows in the table, and which of `seam evaluate --systems` each is."""
    label = system.label or name
    bridge = BRIDGES.get(system.config.get("bridge"), SeamAligner)
    if not bridge.writes_tokens:
        return {label: "full"}
    has = ["stage1"] if list(system.stages) == ["alignment"] else ROWS
    return {f"{label}, {ROWS[row]}": row for row in ROWS if row in (system.rows or has)}


def _stage_recipe(recipe, system, name, stage, seed, folder, before) -> StageRecipe:
    values = dict(system.stages[stage])
    training = {"save_strategy": "no", **values.get("training", {})}
    values["training"] = {**training, "output_dir": str(_place(folder, seed, name) / stage), "seed": seed}
    values["data"] = {**recipe.data, **values.get("data", {})}
    return build(StageRecipe, {**before, **values}, f"systems.{name}.{stage}.")


def _train(recipe: CompareRecipe, systems: dict[str, SystemSettings], name: str, seed: int, folder: Path) -> None:
    """All stages of one system with one seed, and its hypotheses."""
    system, place = systems[name], _place(folder, seed, name)
    llm = system.llm or recipe.llm
    place.mkdir(parents=True, exist_ok=True)
    parts = Parts(place)
    shared = [recipe.encoder, llm, recipe.data, system.config, system.prompt]
    before = {
        "encoder": recipe.encoder,
        "llm": llm,
        "config": system.config,
        "processor": {"instruction": system.prompt},
    }
    if system.start is not None:
        heard = _place(folder, seed, system.start) / "alignment"
        key = [shared, (heard.parent / "parts.json").read_text(encoding="utf-8")]
        parts.run("start", key, lambda: _start(heard, llm, system, seed, place / "start"))
        before = {"model": str(place / "start")}
    last = place / "start"
    for stage, values in system.stages.items():
        stage_recipe = _stage_recipe(recipe, system, name, stage, seed, folder, before)
        parts.run(stage, [shared, values], lambda stage=stage, ready=stage_recipe: STAGES[stage](ready))
        last = place / stage
        before = {"model": str(last), **({"llm": llm} if stage == "alignment" else {})}
    tests = list(recipe.tests.values())
    key = [recipe.tests, system.rows]
    parts.run("evaluation", key, lambda: _evaluate(last, tests, place / "evaluation", system.rows))


def _start(heard: Path, llm: str, system: SystemSettings, seed: int, target: Path) -> None:
    """Stage 1 of another system, with the LLM, and with this system's settings of what comes after."""
    model, processor = load_checkpoint(str(heard), dtype=torch.float32)
    for key, value in system.config.items():
        setattr(model.config, key, value)
    model.config.validate_architecture()
    if system.prompt is not None:
        processor.instruction = system.prompt
        model.config.prompt_token_ids = processor.prompt_ids()
    torch.manual_seed(seed)  # of the fresh LoRA
    model.add_llm(llm).save_pretrained(target)
    processor.save_pretrained(target)


def _evaluate(model: Path, tests: list[str], target: Path, rows: list[str] | None) -> None:
    shutil.rmtree(target, ignore_errors=True)  # of a model that was trained with other settings
    write_hypotheses(str(model), tests, target, rows, batch_size=32)


def _rows(recipe: CompareRecipe, systems: dict[str, SystemSettings], folder: Path) -> dict[str, dict[str, Decoded]]:
    """What every row of the table wrote, by test set."""
    rows = {}
    if recipe.whisper:
        rows[WHISPER] = _by_test(recipe, [folder / "whisper"], "whisper")
    for name, system in systems.items():
        runs = [_place(folder, seed, name) / "evaluation" for seed in recipe.seeds]
        for label, row in _labels(system, name).items():
            rows[label] = _by_test(recipe, runs, row)
    return rows


def _by_test(recipe: CompareRecipe, runs: list[Path], row: str) -> dict[str, Decoded]:
    read = [read_hypotheses(run) for run in runs]
    found, first = {}, 0
    for test, manifest in zip(recipe.tests, read[0][0]["data"], strict=True):
        after = first + manifest["utterances"]
        found[test] = Decoded.of([systems[row][first:after] for _, systems in read])
        first = after
    return found
