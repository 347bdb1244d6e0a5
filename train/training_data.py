"""The data that a recipe trains on: as a data set or a stream, and in which batches."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from seam.data.bad_audio import Skipped
from seam.data.dataset import SpeechDataset, SpeechReader
from seam.data.manifest import CASINGS, Utterance, read_manifest
from seam.data.samplers import LengthBatches, budget_shares
from seam.data.streaming import SpeechStream
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.recipe import DataSettings, RecipeError, StageRecipe


def read_utterances(data: DataSettings) -> tuple[list[Utterance], list[Utterance]]:
    """
    Training and validation utterances of a recipe; a stream's training utterances are not read here. Raises
    `RecipeError` when one of them is not given.
    """
    for name in ("train", "validation"):
        if not getattr(data, name):
            raise RecipeError(f"the recipe names no data.{name} manifest.")
    train = [] if data.streaming else [u for path in data.train for u in read_manifest(path, data.train_split)]
    validation = [u for path in data.validation for u in read_manifest(path, data.validation_split)]
    return taken_evenly(train, data.train_limit), taken_evenly(validation, data.validation_limit)


def taken_evenly(utterances: list[Utterance], limit: int | None) -> list[Utterance]:
    """At most `limit` utterances, from everywhere in the list."""
    if limit is None or limit >= len(utterances):
        return utterances
    return [utterances[index * len(utterances) // limit] for index in range(limit)]


def longest_transcript(model: SeamForSpeechRecognition) -> int:
    """Tokens that the aligner has positions for, beside that of `<EOA>`."""
    return model.config.aligner_config.max_target_positions - 1


def check_fits(utterance: Utterance, model: SeamForSpeechRecognition, processor: SeamProcessor, casing: Callable):
    """Raise `RecipeError` for audio longer than the encoder's window or a transcript longer than the aligner's."""
    if utterance.duration > processor.max_seconds:
        raise RecipeError(
            f"{utterance.audio}: {utterance.duration:.1f} s of audio, but the encoder's window is "
            f"{processor.max_seconds} s."
        )
    tokens = len(processor.transcript_ids(casing(utterance.text)))
    limit = longest_transcript(model)
    if tokens > limit:
        raise RecipeError(
            f"{utterance.audio}: a transcript of {tokens} tokens, but the aligner has positions for {limit}."
        )


def training_data(
    recipe: StageRecipe,
    utterances: list[Utterance],
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    skipped: Skipped | None,
) -> SpeechDataset | SpeechStream:
    """
    Args:
        utterances: of a recipe that does not stream them.
        skipped: of `skipped_audio`.
    """
    data, training = recipe.data, recipe.training
    made = (processor, CASINGS[data.casing], data.augmentation, longest_transcript(model))
    if not data.streaming:
        return SpeechDataset(utterances, *made, seed=training.seed, skipped=skipped)
    return SpeechStream(
        data.train,
        SpeechReader(*made),
        partial(shares_of, recipe, processor),
        data.train_split,
        data.shuffle_buffer,
        training.seed,
        training.process_index,
        training.world_size,
        skipped,
    )


def skipped_audio(recipe: StageRecipe) -> Skipped | None:
    """Where the recordings are noted that a training leaves out, or `None` where it stops at them."""
    if recipe.data.on_bad_audio == "stop":
        return None
    folder = Path(recipe.training.output_dir)
    skipped = Skipped(folder / "skipped_audio.jsonl")
    if recipe.training.process_index == 0 and not any(folder.glob("checkpoint-*")):  # of a training before this one
        skipped.path.unlink(missing_ok=True)
    return skipped


def length_batches(
    recipe: StageRecipe, utterances: list[Utterance], items: Dataset, processor: SeamProcessor
) -> LengthBatches | None:
    """
    Batches by the recipe's budgets; `None` where it has none, and where the data is a stream, which makes its own.

    Args:
        items: the training items, made of some of the utterances: at `places`, or of all of them.
    """
    if recipe.data.streaming or not recipe.data.has_budget:
        return None
    kept = [utterances[place] for place in getattr(items, "places", range(len(items)))]
    return LengthBatches(shares_of(recipe, processor, kept), recipe.training.world_size, recipe.training.seed)


def shares_of(recipe: StageRecipe, processor: SeamProcessor, utterances: Sequence[Utterance]) -> np.ndarray:
    """
    The part that each utterance takes of the budgets of a batch, of which the number of utterances is one. Raises
    `RecipeError` where a budget is too small for one of them.
    """
    data, casing = recipe.data, CASINGS[recipe.data.casing]
    lengths, budgets = [np.ones(len(utterances))], [float(recipe.training.per_device_train_batch_size)]
    if data.batch_seconds is not None:
        lengths.append(np.array([one.duration for one in utterances]))
        budgets.append(data.batch_seconds)
    if data.batch_tokens is not None:
        lengths.append(np.array([len(processor.transcript_ids(casing(one.text))) for one in utterances]))
        budgets.append(data.batch_tokens)
    shares = budget_shares(np.stack(lengths, axis=1), budgets)
    if shares.max() > 1:
        longest = utterances[shares.argmax()]
        raise RecipeError(
            f"{longest.audio}: {longest.duration:.1f} s and its transcript take {shares.max():.1f} times the budget of "
            "a batch (data.batch_seconds, data.batch_tokens)."
        )
    return shares
