"""Load what a training starts from: its utterances, data sets and batches, and its model."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from torch.utils.data import Dataset

from seam.data.bad_audio import SkippedAudio
from seam.data.dataset import SpeechDataset, SpeechReader, keep_encoder_states
from seam.data.files import check_path
from seam.data.manifest import CASINGS, Utterance, read_manifest
from seam.data.samplers import LengthBatchSampler, budget_shares
from seam.data.streaming import SpeechStream
from seam.data.text import TextDataset, read_passages
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor, load_checkpoint
from seam.train.recipe import FULL, DataSettings, RecipeError, StageRecipe
from seam.train.state_cache import cached_encoder_states


def read_utterances(data: DataSettings) -> tuple[list[Utterance], list[Utterance]]:
    """
    Return the training and the validation utterances of a recipe; of a stream no training utterances.

    Passages of `data.text` are utterances without audio.

    Raises:
        RecipeError: when the recipe names no manifest for one of the two.
    """
    for name in ("train", "validation"):
        if not getattr(data, name) and not (name == "train" and data.text):
            raise RecipeError(f"the recipe names no data.{name} manifest.")
    train = [] if data.streaming else [u for path in data.train for u in read_manifest(path, data.train_split)]
    train += [passage for path in data.text for passage in read_passages(path)]
    validation = [u for path in data.validation for u in read_manifest(path, data.validation_split)]
    return _subsample(train, data.train_limit), _subsample(validation, data.validation_limit)


def check_lengths(
    utterances: Iterable[Utterance], recipe: StageRecipe, model: SeamForSpeechRecognition, processor: SeamProcessor
) -> None:
    """
    Check that the encoder's window and the aligner's positions are enough for every utterance.

    Raises:
        RecipeError: for the first that is too long.
    """
    reader = SpeechReader(processor, CASINGS[recipe.data.casing], max_tokens=_max_tokens(model))
    for utterance in utterances:
        if utterance.duration > processor.max_seconds:
            raise RecipeError(
                f"{utterance.audio}: {utterance.duration:.1f} s of audio, but the encoder's window is "
                f"{processor.max_seconds} s."
            )
        try:
            reader.check_transcript(reader.token_ids([utterance]))
        except ValueError as error:
            raise RecipeError(f"{utterance.audio}: {error}") from error


def skipped_recordings(recipe: StageRecipe) -> SkippedAudio | None:
    """Return the list, in the output folder, of recordings that training skips; `None` where it stops at them."""
    if recipe.data.on_bad_audio == "stop":
        return None
    folder = Path(recipe.training.output_dir)
    skipped = SkippedAudio(folder / "skipped_audio.jsonl")
    if recipe.training.process_index == 0 and not any(folder.glob("checkpoint-*")):
        skipped.path.unlink(missing_ok=True)  # left by another training
    return skipped


def build_datasets(
    recipe: StageRecipe,
    train: list[Utterance],
    validation: list[Utterance],
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    skipped: SkippedAudio | None,
) -> list[Dataset]:
    """
    Return the training and the validation set: features, or encoder states where the recipe keeps them.

    Args:
        recipe: of the training.
        train, validation: see `read_utterances`.
        model, processor: of the training.
        skipped: see `skipped_recordings`.
    """
    casing = CASINGS[recipe.data.casing]
    reading = {
        "processor": processor,
        "casing": casing,
        "augmentation": recipe.data.augmentation,
        "max_tokens": _max_tokens(model),
    }
    training_set: Dataset
    if recipe.data.text:
        validation_set = SpeechDataset(validation, processor, casing)
        if recipe.data.keep_encoder_states:
            validation_set = keep_encoder_states(model, validation_set)
        return [TextDataset(train, processor, casing), validation_set]
    if recipe.data.streaming:
        training_set = _stream(recipe, processor, SpeechReader(**reading), skipped)
    else:
        training_set = SpeechDataset(train, **reading, seed=recipe.training.seed, skipped=skipped)
    datasets = [training_set, SpeechDataset(validation, processor, casing)]
    if recipe.data.keep_encoder_states:
        return [keep_encoder_states(model, dataset) for dataset in datasets]
    if recipe.data.encoder_states is not None:
        return cached_encoder_states(recipe, model, processor, datasets)
    return datasets


def length_batches(
    recipe: StageRecipe, utterances: list[Utterance], items: Dataset, processor: SeamProcessor
) -> LengthBatchSampler | None:
    """
    Return batches within the recipe's budgets; `None` where it has none, and for a stream, which makes its own.

    Args:
        recipe: of the training.
        utterances: for training.
        items: the training items, of all utterances or of those at `items.positions`.
        processor: of the training.
    """
    if recipe.data.streaming or not recipe.data.has_budget:
        return None
    kept = [utterances[position] for position in getattr(items, "positions", range(len(items)))]
    return LengthBatchSampler(_batch_shares(recipe, processor, kept), recipe.training.world_size, recipe.training.seed)


def new_model(recipe: StageRecipe, **config) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """
    Build a model around the recipe's `encoder` and `llm`, and its processor.

    Args:
        recipe: names the backbones.
        config: fields of the config that the stage decides.

    Raises:
        RecipeError: when the recipe names no backbones.
    """
    if recipe.encoder is None or recipe.llm is None:
        raise RecipeError("the recipe names neither a model nor both backbones (encoder and llm).")
    for role in ("encoder", "llm"):
        _check_backbone(role, getattr(recipe, role))
    tokens = {key: value for key, value in asdict(recipe.processor).items() if value is not None}
    processor = SeamProcessor.from_backbones(recipe.encoder, recipe.llm, **tokens)
    torch.manual_seed(recipe.training.seed)  # the aligner and LoRA are initialized at random
    fields = {**recipe.config, **config}
    model = SeamForSpeechRecognition.from_backbones(
        recipe.encoder,
        recipe.llm,
        processor,
        llm_dtype=llm_precision(recipe),
        aligner_from_decoder=recipe.aligner_from_decoder,
        **fields,
    )
    return model, processor


def load_previous_stage(recipe: StageRecipe) -> tuple[SeamForSpeechRecognition, SeamProcessor]:
    """
    Load the model and processor that Stages 2 and 3 continue with; a checkpoint of Stage 1 gets its LLM here.

    Raises:
        RecipeError: when the recipe names no checkpoint, or lacks the LLM that goes with it, or names a second one.
    """
    if recipe.model is None:
        raise RecipeError("the recipe names no model: give the checkpoint of the stage before as model=FOLDER.")
    check_path(recipe.model)
    device = {"device_map": str(recipe.training.device)} if recipe.llm_dtype == "4bit" else {}  # CPUs quantize slowly
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32, llm_dtype=llm_precision(recipe), **device)
    if model.config.alignment_only:
        if recipe.llm is None and model.config.backbones is None:
            raise RecipeError(
                f"{recipe.model} holds Stage 1 alone, trained with an LLM from a folder: name it, llm=FOLDER."
            )
        torch.manual_seed(recipe.training.seed)  # LoRA is initialized at random
        model.add_llm(recipe.llm, llm_precision(recipe))
    elif recipe.llm is not None:
        raise RecipeError(f"{recipe.model} holds its LLM already: leave llm out.")
    return model, processor


def llm_precision(recipe: StageRecipe) -> str | None:
    """
    Return the precision to keep the LLM in, as `from_pretrained` takes it.

    Raises:
        RecipeError: for a lower precision with FSDP2 or DeepSpeed.
    """
    if recipe.llm_dtype == FULL:
        return None
    if (recipe.training.fsdp or recipe.training.deepspeed) or any(
        map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"))
    ):
        raise RecipeError(
            f"llm_dtype is {recipe.llm_dtype!r}, but FSDP2 and DeepSpeed take weights of one precision only; accepted "
            "with them: float32. With the whole model on each GPU (recipes/accelerate/eight_gpus.yaml) all are."
        )
    return recipe.llm_dtype


def lora_parameters(model: SeamForSpeechRecognition) -> list[torch.nn.Parameter]:
    """Return the LoRA parameters, which Stages 2 and 3 train; raise `RecipeError` for a model without."""
    parameters = [parameter for name, parameter in model.language_model.named_parameters() if "lora_" in name]
    if not parameters:
        raise RecipeError("the model has no LoRA adapters to train; build it with config.lora_rank above 0.")
    return parameters


def _check_backbone(role: str, name: str) -> None:
    """Raise an error for a mistyped path, and for a SEAM checkpoint in the place of one of its backbones."""
    check_path(name, f"the {role}")
    file = Path(name, "config.json")
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == "seam":
        raise RecipeError(
            f"{role}={name} is a SEAM checkpoint, not a backbone: to train it further, give model={name} instead of "
            "encoder and llm."
        )


def _subsample(utterances: list[Utterance], limit: int | None) -> list[Utterance]:
    """Return at most `limit` utterances, at even distances in the list."""
    if limit is None or limit >= len(utterances):
        return utterances
    return [utterances[index * len(utterances) // limit] for index in range(limit)]


def _max_tokens(model: SeamForSpeechRecognition) -> int:
    """Return how many tokens of a transcript the aligner has positions for, beside that of `<EOA>`."""
    return model.config.max_alignment_tokens


def _stream(
    recipe: StageRecipe, processor: SeamProcessor, reader: SpeechReader, skipped: SkippedAudio | None
) -> SpeechStream:
    """Return the training data of a recipe that streams it."""
    return SpeechStream(
        recipe.data.train,
        reader,
        shares=partial(_batch_shares, recipe, processor),
        split=recipe.data.train_split,
        buffer=recipe.data.shuffle_buffer,
        seed=recipe.training.seed,
        rank=recipe.training.process_index,
        ranks=recipe.training.world_size,
        skipped=skipped,
    )


def _batch_shares(recipe: StageRecipe, processor: SeamProcessor, utterances: Sequence[Utterance]) -> np.ndarray:
    """
    Return the largest share of a batch's budgets that each utterance takes; one budget is the number of utterances.

    Raises:
        RecipeError: for an utterance that takes more than a whole budget.
    """
    data, casing = recipe.data, CASINGS[recipe.data.casing]
    lengths, budgets = [np.ones(len(utterances))], [float(recipe.training.per_device_train_batch_size)]
    if data.batch_seconds is not None:
        lengths.append(np.array([utterance.duration for utterance in utterances]))
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
