"""
Caches on disk of what frozen parts compute: the encoder's states, and the embeddings that the LLM reads in Stage 2.

They are computed once, by all processes of a training together, and read by every later training on the same speech.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature, TrainingArguments

from seam.data.dataset import ENCODER_BATCH_SIZE, SpeechCollator, SpeechDataset, batches_in_order, encode
from seam.data.files import replacing
from seam.data.manifest import CASINGS, Utterance
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.encoder_window import frames_with_margin
from seam.train.cache_keys import check_key, encoder_key, recordings_key, stage1_key, transcripts_key
from seam.train.recipe import RecipeError, StageRecipe

SHARD_BYTES = 512 * 1024**2

# From batches of positions in a data set to the states `(n, dim)` of each of their utterances.
Compute = Callable[[list[list[int]]], Iterator[list[torch.Tensor]]]


def cached_encoder_states(
    recipe: StageRecipe, model: SeamForSpeechRecognition, processor: SeamProcessor, datasets: list[SpeechDataset]
) -> list["CachedStates"]:
    """
    Return the training and the validation set with the encoder's states from `data.encoder_states`.

    States that are missing are computed first; where that is interrupted, the next run continues it.

    Args:
        recipe: of the training.
        model, processor: of the training.
        datasets: the training and the validation set.

    Raises:
        RecipeError: when the disk is too small for the states, before any is computed.
        ValueError: for states of another encoder, other recordings or in another precision, and for damaged ones.
    """
    folder = Path(recipe.data.encoder_states)
    dtype = getattr(torch, recipe.data.encoder_states_dtype)
    encoder = encoder_key(model, processor)
    bytes_per_state = model.config.audio_config.d_model * dtype.itemsize
    workers = recipe.cache_workers
    caches = []
    for name, dataset in zip(("train", "validation"), datasets, strict=True):
        key = {**encoder, **recordings_key(dataset.utterances), "dtype": recipe.data.encoder_states_dtype}
        key["computed_in"] = "bfloat16" if recipe.training.bf16 else "float32"
        counts = [_count_states(utterance.duration, model, processor) for utterance in dataset.utterances]
        shards = Shards(dataset, folder, name, key, counts, bytes_per_state, "speech_states")
        caches.append((shards, partial(_encode, model, dataset, recipe.training.bf16, workers)))
    return load_or_compute(folder, "data.encoder_states", caches, dtype, recipe.training)


def cached_aligned_embeds(
    recipe: StageRecipe,
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    dataset: Dataset,
    name: str,
    utterances: list[Utterance],
) -> "CachedStates":
    """
    Return a data set of the aligner's teacher-forced predictions as the LLM reads them, from `aligned_embeds`.

    Its items hold `aligned_embeds` `(tokens, d_llm)`. Those that are missing are computed first. They are computed and
    kept in bf16 where the training is in bf16, as it would compute them in every step.

    Args:
        recipe: of the training.
        model, processor: of the training.
        dataset: of features or of encoder states.
        name: of the data set, `train` or `validation`.
        utterances: of the data set, with their present transcripts.

    Raises:
        RecipeError: when the disk is too small for them, before any is computed.
        ValueError: for those of another Stage 1, other recordings or transcripts or in another precision.
    """
    folder = Path(recipe.aligned_embeds)
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    speech = SpeechDataset(utterances, processor, CASINGS[recipe.data.casing])
    transcripts = [speech.token_ids(index).tolist() for index in range(len(speech))]
    key = {
        **stage1_key(model, processor),
        **recordings_key(utterances),
        **transcripts_key(transcripts, recipe.data.casing),
        "llm_inputs": model.config.llm_inputs,
        "dtype": str(dtype).removeprefix("torch."),
    }
    bytes_per_token = model.config.get_text_config().hidden_size * dtype.itemsize
    shards = Shards(speech, folder, name, key, list(map(len, transcripts)), bytes_per_token, "aligned_embeds")
    compute = partial(_align, model, processor, dataset, dtype, recipe.cache_workers)
    (cached,) = load_or_compute(folder, "aligned_embeds", [(shards, compute)], dtype, recipe.training)
    return cached


def load_or_compute(
    folder: Path,
    setting: str,
    caches: list[tuple["Shards", Compute]],
    dtype: torch.dtype,
    training: TrainingArguments,
) -> list["CachedStates"]:
    """
    Return the states of data sets; all processes together compute and write those that are not on disk yet.

    Args:
        folder: of the shards.
        setting: of the recipe, that names the folder.
        caches: for each data set its shards, and what computes the states.
        dtype: of the states on disk.
        training: says which process this is.

    Raises:
        RecipeError: when the disk is too small, before anything is computed.
        ValueError: for shards that are stale or damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing, free = sum(shards.check() for shards, _ in caches), shutil.disk_usage(folder).free
    if missing > free:
        utterances = sum(len(shards.dataset) for shards, _ in caches)
        raise RecipeError(
            f"{setting}: the states of {utterances} utterances need {missing / 1e9:.3g} GB more in {folder}, whose "
            f"disk has {free / 1e9:.3g} GB left."
        )
    for shards, compute in caches:
        shards.write(compute, dtype, training.process_index, training.world_size)
    PartialState().wait_for_everyone()
    return [shards.read() for shards, _ in caches]


class Shard(NamedTuple):
    """One file of a cache: its path, the batches of positions that it holds, and its expected size in bytes."""

    path: Path
    batches: list[list[int]]
    size: int


class Shards:
    """
    Write and check the states of one data set, in `FOLDER/NAME-NUMBER.safetensors`.

    A shard holds the `states` `(n, dim)` of its utterances one after the other, their `lengths` `(utterances,)`, and
    its cache key in the file's metadata.

    Args:
        dataset: of the utterances' transcripts.
        folder, name: of the shards.
        key: the cache key, see `seam.train.cache_keys`.
        counts: expected number of states of each utterance.
        bytes_per_state: on disk.
        field: of an item, that holds its states.
    """

    def __init__(self, dataset, folder: Path, name: str, key, counts: list[int], bytes_per_state: int, field: str):
        self.dataset = dataset
        self.key = key
        self.field = field
        self.shards: list[Shard] = []
        batches, size = [], 0
        for batch in batches_in_order(len(dataset), ENCODER_BATCH_SIZE):
            batches.append(batch)
            size += bytes_per_state * sum(counts[index] for index in batch)
            if size >= SHARD_BYTES or batch[-1] == len(dataset) - 1:
                self.shards.append(Shard(folder / f"{name}-{len(self.shards):05d}.safetensors", batches, size))
                batches, size = [], 0

    def check(self) -> int:
        """Return the size in bytes of the missing shards. Raises `ValueError` for one that is stale or damaged."""
        missing = 0
        for shard in self.shards:
            if shard.path.is_file():
                self._lengths(shard)
            else:
                missing += shard.size
        return missing

    def write(self, compute: Compute, dtype: torch.dtype, rank: int, processes: int) -> None:
        """Write this rank's share of the shards, except those that are there."""
        missing = [shard for shard in self.shards[rank::processes] if not shard.path.is_file()]
        utterances = sum(len(batch) for shard in missing for batch in shard.batches)
        computed = compute([batch for shard in missing for batch in shard.batches])
        with tqdm(desc=self.field.replace("_", " "), unit="utterance", total=utterances, leave=False) as bar:
            for shard in missing:
                states = []
                for batch in shard.batches:
                    states += [one.to(dtype) for one in next(computed)]
                    bar.update(len(batch))
                self._write_shard(shard, states)

    def read(self) -> "CachedStates":
        """
        Return the data set with the states of all shards.

        Raises:
            FileNotFoundError: when a shard is missing.
            ValueError: when one is stale or damaged.
        """
        for shard in self.shards:
            if not shard.path.is_file():
                raise FileNotFoundError(f"{shard.path} is missing; all processes must see the same folder.")
        lengths = [self._lengths(shard) for shard in self.shards]
        return CachedStates(self.dataset, [shard.path for shard in self.shards], lengths, self.field)

    def _write_shard(self, shard: Shard, states: list[torch.Tensor]) -> None:
        tensors = {"states": torch.cat(states), "lengths": torch.tensor([len(one) for one in states])}
        # Two trainings may compute the same shard at the same time: each writes it, one after the other.
        with FileLock(shard.path.parent / ".lock"), replacing(shard.path) as temporary:
            try:
                save_file(tensors, temporary, {"made_from": json.dumps(self._shard_key(shard))})
            except SafetensorError as error:
                raise OSError(f"{shard.path} cannot be written: {error}") from error

    def _shard_key(self, shard: Shard) -> dict[str, Any]:
        return {**self.key, "places": [shard.batches[0][0], shard.batches[-1][-1]]}

    def _lengths(self, shard: Shard) -> torch.LongTensor:
        """Return the number of states of each utterance in a shard, whose cache key is checked."""
        with _damage_named(shard.path), safe_open(shard.path, framework="pt") as opened:
            key = json.loads((opened.metadata() or {}).get("made_from", "{}"))
            lengths = opened.get_tensor("lengths").clone()
        check_key(shard.path, key, self._shard_key(shard))
        return lengths


class CachedStates(Dataset):
    """
    Items as `keep_encoder_states` makes them, with the states read from memory-mapped shards.

    Transcripts are not cached: one that was corrected since is learned as it is now.

    Args:
        dataset: of the same utterances.
        paths: of the shards.
        lengths: number of states of each utterance, by shard.
        field: of an item, that holds its states.
    """

    def __init__(self, dataset: SpeechDataset, paths: list[Path], lengths: list[torch.LongTensor], field: str):
        self.dataset = dataset
        self.paths = paths
        self.field = field
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
            with _damage_named(path):
                self._opened[shard] = safe_open(path, framework="pt").get_slice("states")
        states = self._opened[shard][int(self.start[index]) : int(self.end[index])]
        return {self.field: states.float(), "token_ids": self.dataset.token_ids(index)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # each worker opens the files itself


def _encode(
    model: SeamForSpeechRecognition,
    dataset: SpeechDataset,
    bf16: bool,
    workers: int,
    batches: list[list[int]],
) -> Iterator[list[torch.Tensor]]:
    """Compute the encoder's states of batches, in bf16 as a training in bf16 would."""
    for items in encode(model, dataset, batches, workers, bf16):
        yield [item["speech_states"] for item in items]


def _count_states(seconds: float, model: SeamForSpeechRecognition, processor: SeamProcessor) -> int:
    """Return the number of encoder states of an utterance, one for two mel frames."""
    if not model.config.mask_speech_padding:
        return model.config.audio_config.max_source_positions
    extractor = processor.feature_extractor
    frames = math.ceil(seconds * extractor.sampling_rate / extractor.hop_length)
    window = 2 * model.config.audio_config.max_source_positions
    return int(frames_with_margin(torch.tensor(frames), model.config.speech_margin, window)) // 2


@torch.no_grad()
def _align(
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    dataset: Dataset,
    dtype: torch.dtype,
    workers: int,
    batches: list[list[int]],
) -> Iterator[list[torch.Tensor]]:
    """Compute the aligned embeddings of batches, teacher-forced."""
    model.eval()
    collate = SpeechCollator(processor)
    for items in DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list):
        inputs = BatchFeature(collate(items)).to(model.device)
        labels = inputs.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            embeds, mask = model.aligned(*model.speech(**inputs), labels)
        yield [row[keep].cpu() for row, keep in zip(embeds, mask.bool(), strict=True)]


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn the error of a damaged shard into one that names its file."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}. Delete it: it is made again.") from error
