"""
What frozen parts compute, on disk: the encoder's states, and the embeddings that the LLM is given in Stage 2. Computed
once, in shards, and read by every training on the same speech.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature, TrainingArguments

from seam.data.dataset import ENCODED_AT_ONCE, SpeechCollator, SpeechDataset, batches_in_order, encode
from seam.data.files import replacing
from seam.data.manifest import CASINGS, Utterance
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.train import cache_keys
from seam.train.recipe import RecipeError, StageRecipe

SHARD_BYTES = 512 * 1024**2

# From batches of places to the states of each, `(n, dim)`.
Compute = Callable[[list[list[int]]], Iterator[list[torch.Tensor]]]


class Shards:
    """
    The states of one data set in `FOLDER/NAME-NUMBER.safetensors`. A shard holds `states` `(n, dim)` of its utterances
    one after the other and their `lengths` `(utterances,)`, and says what it was made from.

    Args:
        dataset: of the utterances' transcripts.
        folder, name: of the shards.
        identity: what they are made from.
        sizes: number of states of each utterance, as it is expected.
        bytes_per_state: on disk.
        key: of the states in an item.
    """

    def __init__(self, dataset, folder: Path, name: str, identity, sizes: list[int], bytes_per_state: int, key: str):
        self.dataset = dataset
        self.identity = identity
        self.key = key
        self.parts: list[tuple[Path, list[list[int]], int]] = []  # path, batches, bytes
        batches, size = [], 0
        for batch in batches_in_order(len(dataset), ENCODED_AT_ONCE):
            batches.append(batch)
            size += bytes_per_state * sum(sizes[place] for place in batch)
            if size >= SHARD_BYTES or batch[-1] == len(dataset) - 1:
                self.parts.append((folder / f"{name}-{len(self.parts):05d}.safetensors", batches, size))
                batches, size = [], 0

    def check(self) -> int:
        """The bytes of all shards that are not there yet. Raises `ValueError` for one that is stale or damaged."""
        missing = 0
        for path, batches, size in self.parts:
            if path.is_file():
                self._lengths(path, batches)
            else:
                missing += size
        return missing

    def write(self, compute: Compute, dtype: torch.dtype, rank: int, processes: int):
        """Write every `processes`-th shard, where it is not there yet."""
        mine = [part for part in self.parts[rank::processes] if not part[0].is_file()]
        utterances = sum(len(batch) for _, batches, _ in mine for batch in batches)
        computed = compute([batch for _, batches, _ in mine for batch in batches])
        with tqdm(desc=self.key.replace("_", " "), unit="utterance", total=utterances, leave=False) as bar:
            for path, batches, _ in mine:
                states = []
                for batch in batches:
                    states += [one.to(dtype) for one in next(computed)]
                    bar.update(len(batch))
                lengths = torch.tensor([len(one) for one in states])
                identity = json.dumps(self._identity(batches))
                # Trainings that make the same states at the same time write the same, but one after the other.
                with FileLock(path.parent / ".lock"), replacing(path) as temporary:
                    try:
                        save_file({"states": torch.cat(states), "lengths": lengths}, temporary, {"made_from": identity})
                    except SafetensorError as error:
                        raise OSError(f"{path} cannot be written: {error}") from error

    def read(self) -> "States":
        """Raises `FileNotFoundError` when a shard is missing, `ValueError` when one is stale or damaged."""
        for path, _, _ in self.parts:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; all processes must see the same folder.")
        lengths = [self._lengths(path, batches) for path, batches, _ in self.parts]
        return States(self.dataset, [path for path, _, _ in self.parts], lengths, self.key)

    def _identity(self, batches: list[list[int]]) -> dict[str, Any]:
        return {**self.identity, "places": [batches[0][0], batches[-1][-1]]}

    def _lengths(self, path: Path, batches: list[list[int]]) -> torch.LongTensor:
        with _naming_damage(path), safe_open(path, framework="pt") as opened:
            identity = json.loads((opened.metadata() or {}).get("made_from", "{}"))
            lengths = opened.get_tensor("lengths").clone()
        cache_keys.check_key(path, identity, self._identity(batches))
        return lengths


class States(Dataset):
    """
    Items as `keep_encoder_states` makes them, with the states read from mapped files. Transcripts are those of the
    data set: a corrected one is learned from as it is now.

    Args:
        dataset: of the same utterances.
        paths: of the shards.
        lengths: number of states of each utterance, by shard.
        key: of the states in an item.
    """

    def __init__(self, dataset: SpeechDataset, paths: list[Path], lengths: list[torch.LongTensor], key: str):
        self.dataset = dataset
        self.paths = paths
        self.key = key
        self.shard = torch.cat([torch.full_like(one, number) for number, one in enumerate(lengths)])
        self.end = torch.cat([one.cumsum(0) for one in lengths])
        self.start = self.end - torch.cat(lengths)
        self._opened = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shard = int(self.shard[index])
        if shard not in self._opened:
            path = self.paths[shard]
            with _naming_damage(path):
                self._opened[shard] = safe_open(path, framework="pt").get_slice("states")
        states = self._opened[shard][int(self.start[index]) : int(self.end[index])]
        return {self.key: states.float(), "token_ids": self.dataset.token_ids(index)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # a worker that is started anew opens them itself


def written(
    folder: Path,
    setting: str,
    sets: list[tuple[Shards, Compute]],
    dtype: torch.dtype,
    training: TrainingArguments,
) -> list[States]:
    """
    The states of data sets, of which those that are not on disk yet are computed and written by all processes together.

    Args:
        folder: of the shards.
        setting: the recipe's, that names it.
        sets: shards, and what computes the states of batches of places.
        dtype: on disk.

    Raises:
        RecipeError: when the disk is too small, before anything is computed.
        ValueError: for shards that are stale or damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing, free = sum(shards.check() for shards, _ in sets), shutil.disk_usage(folder).free
    if missing > free:
        utterances = sum(len(shards.dataset) for shards, _ in sets)
        raise RecipeError(
            f"{setting}: the states of {utterances} utterances need {missing / 1e9:.3g} GB more in {folder}, whose "
            f"disk has {free / 1e9:.3g} GB left."
        )
    for shards, compute in sets:
        shards.write(compute, dtype, training.process_index, training.world_size)
    PartialState().wait_for_everyone()
    return [shards.read() for shards, _ in sets]


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it: it is made again.") from error


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
    encoder = cache_keys.encoder_key(model, processor)
    bytes_per_state = model.config.audio_config.d_model * dtype.itemsize
    workers = max(2, recipe.training.dataloader_num_workers)
    sets = []
    for name, dataset in zip(("train", "validation"), datasets, strict=True):
        recordings = cache_keys.recordings_key(dataset.utterances)
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


def aligned_on_disk(
    recipe: StageRecipe,
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    dataset: Dataset,
    name: str,
    utterances: list[Utterance],
) -> States:
    """
    Items with `aligned_embeds` `(tokens, d_llm)`, the aligner's teacher-forced predictions as the LLM is given them,
    from the recipe's `aligned_embeds`. Those that are not there are computed first. Computed and kept in bf16 where
    the training is in bf16, as it would compute them in every step.

    Args:
        dataset: of features or of encoder states.
        name: of the data set.
        utterances: of the data set, whose transcripts are read as they are now.

    Raises:
        RecipeError: when the disk is too small for them, before any of them is computed.
        ValueError: for those of another Stage 1, other recordings or transcripts or in another precision.
    """
    folder = Path(recipe.aligned_embeds)
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    speech = SpeechDataset(utterances, processor, CASINGS[recipe.data.casing])
    transcripts = [speech.token_ids(place).tolist() for place in range(len(speech))]
    identity = {
        **cache_keys.stage1_key(model, processor),
        **cache_keys.recordings_key(utterances),
        **cache_keys.transcripts_key(transcripts, recipe.data.casing),
        "llm_inputs": model.config.llm_inputs,
        "dtype": str(dtype).removeprefix("torch."),
    }
    bytes_per_token = model.config.get_text_config().hidden_size * dtype.itemsize
    shards = Shards(speech, folder, name, identity, list(map(len, transcripts)), bytes_per_token, "aligned_embeds")
    compute = partial(_aligned, model, processor, dataset, dtype, max(2, recipe.training.dataloader_num_workers))
    (states,) = written(folder, "aligned_embeds", [(shards, compute)], dtype, recipe.training)
    return states


@torch.no_grad()
def _aligned(
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    dataset: Dataset,
    dtype: torch.dtype,
    workers: int,
    batches: list[list[int]],
) -> Iterator[list[torch.Tensor]]:
    model.eval()
    collate = SpeechCollator(processor)
    for items in DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list):
        inputs = BatchFeature(collate(items)).to(model.device)
        labels = inputs.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            embeds, mask = model.aligned(*model.speech(**inputs), labels)
        yield [row[keep].cpu() for row, keep in zip(embeds, mask.bool(), strict=True)]
