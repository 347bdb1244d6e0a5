"""One stage from its recipe to its checkpoint."""

from collections.abc import Callable
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from seam.data.dataset import SpeechCollator, SpeechDataset, keep_encoder_states
from seam.data.manifest import CASINGS
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.checkpoints import find_checkpoint, run_record, staging_folder
from seam.train.inputs import check_fits, length_batches, read_utterances, skipped_audio, training_data
from seam.train.monitoring import plot_training_curves
from seam.train.recipe import RecipeError, StageRecipe
from seam.train.state_cache import cached_encoder_states
from seam.train.trainer import StageTrainer


def run(
    recipe: StageRecipe,
    trainer_class: type[StageTrainer],
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    prepare: Callable = lambda dataset, name, utterances: dataset,
) -> dict[str, float]:
    """
    Train one stage and save the result in `training.output_dir`, from where the next stage and `from_pretrained` load.
    A run that was interrupted goes on from its last checkpoint there. Beside the checkpoint are the curves of the
    training, `curves.png`.

    Args:
        prepare: makes the training items of a stage from the (possibly encoded) data set, its name (`train` or
            `validation`) and its utterances.

    Returns:
        The metrics of the last evaluation.
    """
    check_best(recipe.training, ["loss", *trainer_class.metric_names(model)])
    set_seed(recipe.training.seed)
    train, validation = read_utterances(recipe.data)
    casing = CASINGS[recipe.data.casing]
    for utterance in (*train, *validation):
        check_fits(utterance, model, processor, casing)
    record = run_record(recipe, model, train, validation)
    checkpoint = find_checkpoint(recipe, record)
    model.to(recipe.training.device)
    skipped = skipped_audio(recipe)
    read = training_data(recipe, train, model, processor, skipped)
    datasets = [read, SpeechDataset(validation, processor, casing)]
    if recipe.data.keep_encoder_states:
        datasets = [keep_encoder_states(model, dataset) for dataset in datasets]
    elif recipe.data.encoder_states is not None:
        datasets = cached_encoder_states(recipe, model, processor, datasets)
    items = prepare(datasets[0], "train", train)
    trainer = trainer_class(
        model=model,
        args=recipe.training,
        data_collator=SpeechCollator(processor),
        train_dataset=items,
        batches=length_batches(recipe, train, items, processor),
        eval_dataset=prepare(datasets[1], "validation", validation),
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
    folder = Path(recipe.training.output_dir)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # of all ranks together
    if recipe.training.should_save:
        with staging_folder(folder) as staging:
            model.save_pretrained(staging, state_dict=weights)
            processor.save_pretrained(staging)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    if trainer.is_world_process_zero():
        best = trainer.state.best_global_step if recipe.training.load_best_model_at_end else None
        plot_training_curves(trainer.state.log_history, folder / "curves.png", str(folder), best)
    trainer.accelerator.wait_for_everyone()  # no rank reads what is not written yet
    return {**metrics, "output_dir": str(folder)}


def check_best(training: TrainingArguments, metrics: list[str]) -> None:
    """Raise `RecipeError` for a best model that no evaluation tells. `metrics`: what evaluations report, by name."""
    best = training.metric_for_best_model
    if best is not None and best.removeprefix("eval_") not in metrics:
        raise RecipeError(f"training.metric_for_best_model is {best!r}; this stage reports: {', '.join(metrics)}.")
    if best is None and training.save_strategy == SaveStrategy.BEST:
        raise RecipeError(
            f"training.save_strategy is 'best', by training.metric_for_best_model; accepted: {', '.join(metrics)}."
        )
