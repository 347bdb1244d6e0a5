"""The frozen encoder's states on disk: computed once, and read by every training on the same speech."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from seam.data.dataset import SpeechDataset, encode
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train import made_from
from seam.train.recipe import StageRecipe
from seam.train.shards import Shards, States, written


def states_on_disk(
    recipe: StageRecipe, model: SeamForSpeechRecognition, processor: SeamProcessor, datasets: list[SpeechDataset]
) -> list[States]:
    """
    The training and the validation set with the encoder's states from `data.encoder_states`. Those that are not there
    are computed first, by all processes of the training together; where this is interrupted it goes on the next time.

    Raises:
        RecipeError: when the disk is too small for them, before any of them is computed.
        ValueError: for states of another encoder, other recordings or in another precision, and damaged ones.
    """
    folder = Path(recipe.data.encoder_states)
    dtype = getattr(torch, recipe.data.encoder_states_dtype)
    encoder = made_from.of_states(model, processor)
    bytes_per_state = model.config.audio_config.d_model * dtype.itemsize
    workers = max(2, recipe.training.dataloader_num_workers)
    sets = []
    for name, dataset in zip(("train", "validation"), datasets, strict=True):
        recordings = made_from.of_recordings(dataset.utterances)
        identity = {**encoder, **recordings, "dtype": recipe.data.encoder_states_dtype}
        sizes = [_states(utterance.duration, model, processor) for utterance in dataset.utterances]
        shards = Shards(dataset, folder, name, identity, sizes, bytes_per_state, "speech_states")
        sets.append((shards, partial(_encoded, model, dataset, workers)))
    return written(folder, "data.encoder_states", sets, dtype, recipe.training)


def _encoded(
    model: SeamForSpeechRecognition, dataset: SpeechDataset, workers: int, batches: list[list[int]]
) -> Iterator[list[torch.Tensor]]:
    for items in encode(model, dataset, batches, workers):
        yield [item["speech_states"] for item in items]


def _states(seconds: float, model: SeamForSpeechRecognition, processor: SeamProcessor) -> int:
    """Number of states of an utterance: two mel frames each."""
    if not model.config.mask_speech_padding:
        return model.config.audio_config.max_source_positions
    extractor = processor.feature_extractor
    return math.ceil(seconds * extractor.sampling_rate / (2 * extractor.hop_length))
