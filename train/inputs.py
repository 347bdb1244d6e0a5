"""What a stage begins with: its utterances and batches, its model, and what of the LLM is trained."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from torch.utils.data import Dataset

from seam.data.bad_audio import Skipped
from seam.data.dataset import SpeechDataset, SpeechReader
from seam.data.manifest import CASINGS, Utterance, read_manifest
from seam.data.samplers import LengthBatches, budget_shares
from seam.data.streaming import SpeechStream
from seam.evaluation.transcription import load_checkpoint
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train.recipe import FULL, DataSettings, RecipeError, StageRecipe


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


def new_model(recipe: StageRecipe, **config) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """A model around the recipe's `encoder` and `llm`, and its processor. `config`: fields that the stage decides."""
    if recipe.encoder is None or recipe.llm is None:
        raise RecipeError("the recipe names neither a model nor both backbones (encoder and llm).")
    tokens = {key: value for key, value in asdict(recipe.processor).items() if value is not None}
    processor = SeamProcessor.from_backbones(recipe.encoder, recipe.llm, **tokens)
    torch.manual_seed(recipe.training.seed)  # of the fresh parts
    fields = {**recipe.config, **config}
    model = SeamForSpeechRecognition.from_backbones(
        recipe.encoder,
        recipe.llm,
        processor,
        llm_dtype=held_in(recipe),
        aligner_from_decoder=recipe.aligner_from_decoder,
        **fields,
    )
    return model, processor


def stage_before(recipe: StageRecipe) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """Model and processor that Stages 2 and 3 go on with; a checkpoint of Stage 1 gets its LLM here."""
    if recipe.model is None:
        raise RecipeError("the recipe names no model: give the checkpoint of the stage before as model=FOLDER.")
    # A GPU quantizes faster than its machine.
    place = {"device_map": str(recipe.training.device)} if recipe.llm_dtype == "4bit" else {}
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32, llm_dtype=held_in(recipe), **place)
    if model.config.alignment_only:
        if recipe.llm is None and model.config.backbones is None:
            raise RecipeError(
                f"{recipe.model} holds Stage 1 alone, trained with an LLM from a folder: name it, llm=FOLDER."
            )
        torch.manual_seed(recipe.training.seed)  # of the fresh LoRA
        model.add_llm(recipe.llm, held_in(recipe))
    elif recipe.llm is not None:
        raise RecipeError(f"{recipe.model} holds its LLM already: leave llm out.")
    return model, processor


def held_in(recipe: StageRecipe) -> str | None:
    """The precision of the LLM, as `from_pretrained` takes it. Raises `RecipeError` where it cannot be held so."""
    if recipe.llm_dtype == FULL:
        return None
    given = recipe.training.fsdp or recipe.training.deepspeed
    if given or any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))):
        raise RecipeError(
            f"llm_dtype is {recipe.llm_dtype!r}, but FSDP2 and DeepSpeed take weights of one precision only; accepted "
            "with them: float32. With the whole model on each GPU (recipes/accelerate/eight_gpus.yaml) all are."
        )
    return recipe.llm_dtype


def llm_adapters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
    """The LoRA parameters: what Stages 2 and 3 train."""
    parameters = [parameter for name, parameter in model.language_model.named_parameters() if "lora_" in name]
    if not parameters:
        raise RecipeError("the model has no LoRA adapters to train; build it with config.lora_rank above 0.")
    return parameters
