"""Run one stage, from its recipe to its checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from seam.data.dataset import SpeechCollator
from seam.data.files import write_text
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.saving import saved_together
from seam.train.checkpoints import find_checkpoint, only_training_in, run_record
from seam.train.inputs import build_datasets, check_lengths, length_batches, read_utterances, skipped_recordings
from seam.train.lineage import CARD, inherited_card
from seam.train.monitoring import plot_training_curves
from seam.train.recipe import RecipeError, StageRecipe
from seam.train.trainer import StageTrainer
from seam.train.training_arguments import PUSHED_BY


def run(
    recipe: StageRecipe,
    trainer_class: type[StageTrainer],
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    prepare: Callable = lambda dataset, name, utterances: dataset,
) -> dict[str, float]:
    """
    Train one stage and save the result in `training.output_dir`, from where the next stage and `from_pretrained` load.

    A run that was interrupted resumes from its last checkpoint there. The curves of the training are saved beside the
    result, as `curves.png`.

    Args:
        recipe: of the stage.
        trainer_class: of the stage.
        model, processor: to train.
        prepare: makes the items of a stage from the (possibly encoded) data set, its name (`train` or `validation`)
            and its utterances.

    Returns:
        The metrics of the last evaluation.
    """
    with only_training_in(recipe.training):
        return _run(recipe, trainer_class, model, processor, prepare)


def _run(
    recipe: StageRecipe,
    trainer_class: type[StageTrainer],
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    prepare: Callable,
) -> dict[str, float]:
    if recipe.training.push_to_hub:
        raise RecipeError(PUSHED_BY)
    check_best_metric(recipe.training, ["loss", *trainer_class.metric_names(model)])
    set_seed(recipe.training.seed)
    train, validation = read_utterances(recipe.data)
    check_lengths((*train, *validation), recipe, model, processor)
    card = inherited_card(recipe, train)
    record = run_record(recipe, model, train, validation)
    checkpoint = find_checkpoint(recipe, record)
    model.to(recipe.training.device)
    skipped = skipped_recordings(recipe)
    training_set, validation_set = build_datasets(recipe, train, validation, model, processor, skipped)
    items = prepare(training_set, "train", train)
    trainer = trainer_class(
        model=model,
        args=recipe.training,
        data_collator=SpeechCollator(processor),
        train_dataset=items,
        batches=length_batches(recipe, train, items, processor),
        eval_dataset=prepare(validation_set, "validation", validation),
        run_record=record,
        processor=processor,
        validation=validation,
        data=recipe.data,
        **trainer_class.settings(recipe),
    )
    if recipe.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(recipe.early_stopping_patience))
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    if skipped is not None:
        metrics["skipped_audio"] = len(skipped)
    save_result(trainer, metrics)
    card_file = Path(recipe.training.output_dir, CARD)
    if card is not None and trainer.args.should_save and not card_file.exists():  # or the user wrote one
        write_text(card_file, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return {**metrics, "output_dir": str(Path(recipe.training.output_dir))}


def check_best_metric(training: TrainingArguments, metrics: list[str]) -> None:
    """
    Check that evaluations report the metric that decides which model is the best.

    Args:
        training: may name it, `metric_for_best_model`.
        metrics: names of those that evaluations report.

    Raises:
        RecipeError: for another metric, or for none where checkpoints of the best model only are saved.
    """
    best = training.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in metrics:
        raise RecipeError(f"training.metric_for_best_model is {best!r}; this stage reports: {', '.join(metrics)}.")
    if best is None and training.save_strategy == SaveStrategy.BEST:
        raise RecipeError(
            f"training.save_strategy is 'best', by training.metric_for_best_model; accepted: {', '.join(metrics)}."
        )


def save_result(trainer: StageTrainer, metrics: dict[str, float]) -> None:
    """Save the trained model, its processor, metrics and curves in the output folder."""
    folder = Path(trainer.args.output_dir)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathered from all ranks
    if trainer.args.should_save:
        with saved_together(folder) as staging:
            trainer.model.save_pretrained(staging, state_dict=weights)
            trainer.processing_class.save_pretrained(staging)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
        plot_training_curves(trainer.state.log_history, folder / "curves.png", str(folder), best)
    trainer.accelerator.wait_for_everyone()  # before any rank reads the result
