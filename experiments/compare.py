"""
Train every system on the same data with several seeds, and compare them as in the paper's Table 1.

    seam compare RECIPE.yaml [key=value ...]

An interrupted comparison resumes where it stopped.
"""

import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from tqdm.auto import tqdm

from seam.configuration_seam import SeamConfig
from seam.data.manifest import read_manifest
from seam.evaluation.comparison import SystemOutput, compare, write_comparison
from seam.evaluation.decoding import decode_test_sets
from seam.evaluation.hypotheses import SYSTEMS, TABLE_1, read_hypotheses
from seam.experiments.demo import WorldRecipe, backbone_key, make_control, make_world
from seam.experiments.steps import Steps
from seam.modeling_seam import load_checkpoint
from seam.modeling_seam.bridges import BRIDGES
from seam.modeling_seam.saving import saved_together
from seam.train import alignment, instruction, refinement
from seam.train.recipe import ProcessorSettings, RecipeError, StageRecipe, build, check_stage, merged

STAGES = {"alignment": alignment.main, "instruction": instruction.main, "refinement": refinement.main}
# The rows that a trained system can have: all but Whisper's.
ROWS = TABLE_1[1:]
CONTROL = "control"


@strict
@dataclass
class SystemSettings:
    """
    A trained system, which has one or several rows: Stage 1, with and without First Token Guidance.

    Args:
        label: in the tables; by default its name.
        start: another system, whose Stage 1 this one continues from instead of training its own.
        llm: Hub id or folder, if it is not the recipe's.
        config: fields of `SeamConfig`.
        processor: see `ProcessorSettings`. A system that starts from another may only differ in its instruction.
        alignment, instruction, refinement: fields of `StageRecipe` of the stages that it is trained in.
        rows: what is evaluated (`seam evaluate --systems`); by default all that it has.
    """

    label: str | None = None
    start: str | None = None
    llm: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    processor: ProcessorSettings = field(default_factory=ProcessorSettings)
    alignment: dict[str, Any] | None = None
    instruction: dict[str, Any] | None = None
    refinement: dict[str, Any] | None = None
    rows: list[str] | None = None

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Return the settings of the stages that it is trained in, in order."""
        return {name: getattr(self, name) for name in STAGES if getattr(self, name) is not None}


@strict
@dataclass
class CompareRecipe:
    """
    A comparison of systems.

    Args:
        systems: by name, the fields of `SystemSettings`. With `like: NAME`, a system inherits all but the label from an
            earlier one. A system that others `start` from comes before them.
        encoder, llm: Hub ids or folders of the backbones that all systems share.
        world: instead of the backbones: what is made from nothing in `output_dir`, namely speech, test sets, both
            backbones, and `control/`, a language model that has not read the other domain (for a system's `llm`). Paths
            of data and tests are then relative to `output_dir`.
        data: fields of `DataSettings`, the defaults of every stage.
        tests: manifests by the name of the test set.
        seeds: of the trainings.
        claims: pairs of rows, as the table names them, of which the first is claimed to be the better one.
        whisper: whether the encoder's own decoder is evaluated as well.
        output_dir: everything is written here. Recipes may share it: a system that they share is trained once.
        report: name of the table's files.
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
    report: str = "comparison"


def main(recipe: CompareRecipe) -> dict[str, Any]:
    """Train and evaluate what is not done yet, and return the result of `seam.evaluation.comparison.compare`."""
    systems = _systems(recipe.systems)
    folder = Path(recipe.output_dir)
    if recipe.world is not None:
        recipe, systems = _in_world(recipe, systems, folder)
    _check(recipe, systems, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.world is not None:
        steps = Steps(folder)
        make_world(recipe.world, folder, steps)
        if str(folder / CONTROL) in [system.llm for system in systems.values()]:
            settings = backbone_key(recipe.world, recipe.world.llm)
            steps.run("control", settings, lambda: make_control(recipe.world, folder))
    todo = [(seed, name) for seed in recipe.seeds for name in systems]
    for seed, name in (bar := tqdm(todo, desc="comparison")):
        bar.set_postfix_str(f"seed {seed}, {name}")
        _train(recipe, systems, name, seed, folder)
    if recipe.whisper:
        decode_test_sets(recipe.encoder, list(recipe.tests.values()), folder / "whisper", batch_size=32)
    results = compare(_rows(recipe, systems, folder), [tuple(pair) for pair in recipe.claims])
    results["curves"] = _curves(recipe, systems, folder)
    write_comparison(results, folder, recipe.report)
    print((folder / f"{recipe.report}.md").read_text(encoding="utf-8"))
    return results


def _systems(recipes: dict[str, Any]) -> dict[str, SystemSettings]:
    """Return the settings of every system, including those inherited from the system that it is `like`."""
    read = {}
    for name, values in recipes.items():
        if isinstance(values, dict) and "like" in values:
            own = {key: value for key, value in values.items() if key != "like"}
            if values["like"] not in read:
                raise RecipeError(
                    f"systems.{name}.like is {values['like']!r}; accepted: a system before it ({', '.join(read)})."
                )
            values = merged({**read[values["like"]], "label": None}, own)
        read[name] = values
    return {name: build(SystemSettings, values, f"systems.{name}.") for name, values in read.items()}


def _in_world(recipe, systems, folder: Path) -> tuple[CompareRecipe, dict[str, SystemSettings]]:
    """Return recipe and systems with the paths of the world that is made in `folder`."""
    if recipe.encoder is not None or recipe.llm is not None:
        raise RecipeError("encoder and llm are made in the world: leave out either these or the world.")

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


def _run_folder(folder: Path, seed: int, name: str) -> Path:
    return folder / f"seed-{seed}" / name


def _check(recipe: CompareRecipe, systems: dict[str, SystemSettings], folder: Path) -> None:
    """Raise `RecipeError` for every mistake that can be found before the first training."""
    names = list(systems)
    for index, (name, system) in enumerate(systems.items()):
        if system.start is not None and system.start not in names[:index]:
            raise RecipeError(
                f"systems.{name}.start is {system.start!r}; accepted: a system before it ({', '.join(names[:index])})."
            )
        if system.start is None and not system.stages:
            raise RecipeError(f"systems.{name} has neither a stage nor a start.")
        for stage in system.stages:
            _stage_recipe(recipe, system, name, stage, recipe.seeds[0], folder, {"config": system.config})
        if system.start is not None:
            _check_start(name, system, systems[system.start])
    if recipe.encoder is None or recipe.llm is None:
        raise RecipeError("the recipe names neither both backbones (encoder and llm) nor a world to make them in.")
    for manifest in recipe.tests.values() if recipe.world is None else ():
        read_manifest(manifest)
    labels = {label for system, name in zip(systems.values(), names, strict=True) for label in _labels(system, name)}
    labels.add(SYSTEMS["whisper"].row)
    for pair in recipe.claims:
        unknown = [row for row in pair if row not in labels]
        if len(pair) != 2 or unknown:
            raise RecipeError(
                f"claims: {pair} is not a pair of rows of the table; these are: {'; '.join(sorted(labels))}."
            )


def _check_start(name: str, system: SystemSettings, start: SystemSettings) -> None:
    """Raise `RecipeError` if a system changes what the Stage 1 that it starts from was trained with."""
    tokens = [{**asdict(each.processor), "instruction": None} for each in (system, start)]
    if tokens[0] != tokens[1]:
        raise RecipeError(
            f"systems.{name}.processor may differ from systems.{system.start} in the instruction only: "
            "it has its Stage 1."
        )
    for key in (*SeamConfig.sub_configs, "bridge", "bridge_config"):
        if key in system.config and system.config[key] != start.config.get(key):
            raise RecipeError(
                f"systems.{name}.config.{key} may not differ from systems.{system.start}: it has its Stage 1."
            )


def _labels(system: SystemSettings, name: str) -> dict[str, str]:
    """Return the names of a system's rows in the table, and which of `seam evaluate --systems` each is."""
    label = system.label or name
    if not BRIDGES[system.config.get("bridge", "aligner")].has_stage_1:
        return {label: "full"}
    has = ["stage1"] if list(system.stages) == ["alignment"] else ROWS
    return {f"{label}, {SYSTEMS[row].suffix}": row for row in ROWS if row in (system.rows or has)}


def _stage_recipe(recipe, system, name, stage, seed, folder, before) -> StageRecipe:
    values = dict(system.stages[stage])
    training = {"save_strategy": "no", **values.get("training", {})}
    values["training"] = {**training, "output_dir": str(_run_folder(folder, seed, name) / stage), "seed": seed}
    values["data"] = {**recipe.data, **values.get("data", {})}
    stage_recipe = build(StageRecipe, {**before, **values}, f"systems.{name}.{stage}.")
    check_stage(stage_recipe, stage)
    return stage_recipe


def _train(recipe: CompareRecipe, systems: dict[str, SystemSettings], name: str, seed: int, folder: Path) -> None:
    """Train one system in all its stages with one seed, and evaluate it."""
    system, run = systems[name], _run_folder(folder, seed, name)
    llm = system.llm or recipe.llm
    run.mkdir(parents=True, exist_ok=True)
    steps = Steps(run)
    processor = {key: value for key, value in asdict(system.processor).items() if value is not None}
    shared = [recipe.encoder, llm, recipe.data, system.config, processor]
    before = {
        "encoder": recipe.encoder,
        "llm": llm,
        "config": system.config,
        "processor": processor,
    }
    if system.start is not None:
        stage1 = _run_folder(folder, seed, system.start) / "alignment"
        settings = [shared, (stage1.parent / "parts.json").read_text(encoding="utf-8")]
        steps.run("start", settings, lambda: _start(stage1, llm, system, seed, run / "start"))
        before = {"model": str(run / "start")}
    last = run / "start"
    for stage, values in system.stages.items():
        stage_recipe = _stage_recipe(recipe, system, name, stage, seed, folder, before)
        steps.run(stage, [shared, values], lambda stage=stage, ready=stage_recipe: STAGES[stage](ready))
        last = run / stage
        before = {"model": str(last), **({"llm": llm} if stage == "alignment" else {})}
    tests = list(recipe.tests.values())
    settings = [recipe.tests, system.rows]
    steps.run("evaluation", settings, lambda: _evaluate(last, tests, run / "evaluation", system.rows))


def _start(stage1: Path, llm: str, system: SystemSettings, seed: int, target: Path) -> None:
    """Save another system's Stage 1 with the LLM and this system's settings of the later stages."""
    model, processor = load_checkpoint(str(stage1), dtype=torch.float32)
    for key, value in system.config.items():
        if key not in SeamConfig.sub_configs:  # these cannot differ, by `_check_start`
            setattr(model.config, key, value)
    model.config.validate_architecture()
    if system.processor.instruction is not None:
        processor.instruction = system.processor.instruction
        model.config.prompt_token_ids = processor.prompt_ids()
    torch.manual_seed(seed)  # of the new LoRA
    with saved_together(target) as folder:
        model.add_llm(llm).save_pretrained(folder)
        processor.save_pretrained(folder)


def _evaluate(model: Path, tests: list[str], target: Path, rows: list[str] | None) -> None:
    shutil.rmtree(target, ignore_errors=True)  # left by a model that was trained with other settings
    decode_test_sets(str(model), tests, target, rows, batch_size=32)


def _rows(
    recipe: CompareRecipe, systems: dict[str, SystemSettings], folder: Path
) -> dict[str, dict[str, SystemOutput]]:
    """Return the outputs of every row of the table, by test set."""
    rows = {}
    if recipe.whisper:
        rows[SYSTEMS["whisper"].row] = _by_test(recipe, [folder / "whisper"], "whisper")
    for name, system in systems.items():
        runs = [_run_folder(folder, seed, name) / "evaluation" for seed in recipe.seeds]
        for label, row in _labels(system, name).items():
            rows[label] = _by_test(recipe, runs, row)
    return rows


def _by_test(recipe: CompareRecipe, runs: list[Path], row: str) -> dict[str, SystemOutput]:
    read = [read_hypotheses(run) for run in runs]
    outputs, first = {}, 0
    for test, manifest in zip(recipe.tests, read[0][0]["data"], strict=True):
        after = first + manifest["utterances"]
        outputs[test] = SystemOutput.from_rows([systems[row][first:after] for _, systems in read])
        first = after
    return outputs


def _curves(recipe: CompareRecipe, systems: dict[str, SystemSettings], folder: Path) -> dict[str, list[list]]:
    """
    Return the learning curves of the trainings that were evaluated on the way (`eval_strategy: steps`).

    They are the word error rates of the held-out utterances: by system and stage, for each seed `[step, percent]`.
    """
    curves = {}
    for name, system in systems.items():
        for stage in system.stages:
            metric = "eval_stage1_wer" if stage == "alignment" else "eval_wer"
            states = [_run_folder(folder, seed, name) / stage / "trainer_state.json" for seed in recipe.seeds]
            logs = [json.loads(state.read_text(encoding="utf-8"))["log_history"] for state in states]
            points = [[[entry["step"], entry[metric]] for entry in log if metric in entry] for log in logs]
            if len(points[0]) > 2:  # the last evaluation is logged twice
                curves[f"{system.label or name}, {stage}"] = points
    return curves
