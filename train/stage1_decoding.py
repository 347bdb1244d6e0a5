"""
What Stage 1 hears by itself (Algorithm 1), from which Stage 3 learns: decoded when Stage 3 begins, or ahead of it by
this command into the recipe's `alignment_cache`, by as many processes as there are.

    seam train decode RECIPE.yaml [key=value ...]
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import torch
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature

from seam.data.dataset import SpeechCollator, SpeechDataset, batches_by_length
from seam.data.files import read_json_lines, repair_json_lines
from seam.data.manifest import CASINGS, Utterance
from seam.evaluation.transcription import load_checkpoint
from seam.modeling_seam import SeamForSpeechRecognition, SeamProcessor
from seam.modeling_seam.backbones import EmbeddingTable
from seam.train import cache_keys
from seam.train.distributed import map_over_ranks
from seam.train.inputs import check_lengths, read_utterances
from seam.train.recipe import RecipeError, StageRecipe, check_stage

# How long to wait for a file's writer: workers of a killed process live on for a few seconds and hold its lock.
LOCK_SECONDS = 10

# An utterance's place, the ids of its transcript, and those that Stage 1 wrote.
Heard = tuple[int, torch.LongTensor, torch.LongTensor]


@torch.no_grad()
def decode_stage1(
    model: SeamForSpeechRecognition,
    processor: SeamProcessor,
    dataset: Dataset,
    batches: list[list[int]],
    workers: int = 2,
) -> Iterator[list[Heard]]:
    """
    Args:
        dataset: of features or of encoder states.
        batches: places in it.
        workers: processes that read it.

    Returns:
        What was heard, batch by batch.
    """
    model.eval()
    collate = SpeechCollator(processor)
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=list)
    for places, items in zip(batches, loader, strict=True):
        tensors = collate(items)
        del tensors["labels"]
        alignment = model.align(*model.speech(**BatchFeature(tensors).to(model.device)))
        rows = zip(places, items, alignment.sequences.cpu(), alignment.mask.bool().cpu(), strict=True)
        yield [(place, item["token_ids"].clone(), ids[keep]) for place, item, ids, keep in rows]


def decode_all(model, processor, dataset: Dataset, utterances: Sequence[Utterance], batch_size: int) -> list[Heard]:
    """What Stage 1 hears in every utterance of a data set, in their order. Several processes share it out."""

    def decode(batches: list[list[int]]) -> list[list[Heard]]:
        decoded = decode_stage1(model, processor, dataset, batches)
        return list(tqdm(decoded, desc="Stage 1 decoding", total=len(batches), leave=False))

    decoded = map_over_ranks(decode, batches_by_length([utterance.duration for utterance in utterances], batch_size))
    return sorted(chain.from_iterable(decoded), key=lambda heard: heard[0])


def read_cache(
    recipe: StageRecipe, model: SeamForSpeechRecognition, processor: SeamProcessor
) -> dict[str, list[Heard]]:
    """
    What `seam train decode` wrote for a recipe: of the data sets `train` and `validation`.

    Raises:
        ValueError: when it is stale, not finished or damaged; FileNotFoundError: when there is none.
    """
    folder = Path(recipe.alignment_cache)
    read = {}
    for name, (utterances, identity) in _data_sets(recipe, model, processor).items():
        files = _files(folder, name)
        if not files:
            raise FileNotFoundError(f"{folder} holds no {name} set; `seam train decode` with the same recipe makes it.")
        rows = {row["id"]: row for file in files for row in _rows(file, identity)}
        if len(rows) < len(utterances):
            raise ValueError(
                f"{folder} holds {len(rows)} of the {len(utterances)} utterances of the {name} set; the same "
                "`seam train decode` finishes it."
            )
        read[name] = [
            (place, torch.LongTensor(row["reference_tokens"]), torch.LongTensor(row["stage1_tokens"]))
            for place, row in sorted(rows.items())
        ]
    return read


def main(recipe: StageRecipe) -> dict[str, Any]:
    """
    Decode the training and validation utterances of a Stage-3 recipe with the Stage 1 of its `model`, for which the
    checkpoint of Stage 1 itself does as well. Rows are written batch by batch to `alignment_cache/SET-RANK.jsonl`:

    - `id`, `audio`: the utterance's place in the data set, and its recording;
    - `reference_tokens`, `stage1_tokens`: ids of its transcript, and those that Stage 1 wrote.

    The first line of every file says what it was made from. What is there is not decoded again, whichever process wrote
    it. Of N processes (`RANK` and `WORLD_SIZE`, as torchrun and `accelerate launch` set them) each takes every N-th
    batch; none waits for another.

    Returns:
        By data set: the number of utterances, those decoded now and those that are left to other processes.
    """
    check_stage(recipe, "refinement")
    if recipe.alignment_cache is None:
        raise RecipeError("the recipe names no alignment_cache, the folder to write what Stage 1 hears to.")
    if recipe.model is None:
        raise RecipeError("the recipe names no model: give the checkpoint of Stage 1 or 2 as model=FOLDER.")
    model, processor = load_checkpoint(recipe.model, dtype=torch.float32)
    if not model.aligner.writes_tokens:
        raise RecipeError(f"the bridge {model.config.bridge!r} has no Stage 1 to decode with.")
    folder = Path(recipe.alignment_cache)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < processes:
        raise ValueError(f"RANK is {rank}, but WORLD_SIZE is {processes}; accepted: 0 up to but not WORLD_SIZE.")
    casing = CASINGS[recipe.data.casing]
    todo = {}
    for name, (utterances, identity) in _data_sets(recipe, model, processor).items():
        check_lengths(utterances, recipe, model, processor)
        done = {row["id"] for file in _files(folder, name) for row in _rows(file, identity)}
        durations = [utterance.duration for utterance in utterances]
        mine = batches_by_length(durations, recipe.data.eval_batch_size)[rank::processes]
        left = [[place for place in batch if place not in done] for batch in mine]
        todo[name] = (utterances, identity, len(done), [batch for batch in left if batch])
    _without_llm(model).to(recipe.training.device)
    folder.mkdir(parents=True, exist_ok=True)
    said = {}
    for name, (utterances, identity, done, batches) in todo.items():
        dataset = SpeechDataset(utterances, processor, casing)
        number = sum(map(len, batches))
        workers = max(2, recipe.training.dataloader_num_workers)
        with (
            _opened(folder / f"{name}-{rank}.jsonl", identity) as file,
            tqdm(desc=name, unit="utterance", total=number, disable=None) as bar,
        ):
            for rows in decode_stage1(model, processor, dataset, batches, workers):
                for place, token_ids, alignment_ids in rows:
                    row = {
                        "id": place,
                        "audio": utterances[place].audio.name,
                        "reference_tokens": token_ids.tolist(),
                        "stage1_tokens": alignment_ids.tolist(),
                    }
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(rows))
        said[name] = {"utterances": len(utterances), "decoded": number, "left": len(utterances) - done - number}
    return {**said, "alignment_cache": str(folder)}


def _data_sets(recipe, model, processor) -> dict[str, tuple[list[Utterance], dict[str, Any]]]:
    """By name, the utterances and what their rows are made from."""
    casing = CASINGS[recipe.data.casing]
    stage1 = cache_keys.stage1_key(model, processor)
    sets = {}
    for name, utterances in zip(("train", "validation"), read_utterances(recipe.data), strict=True):
        transcripts = [processor.transcript_ids(casing(utterance.text)) for utterance in utterances]
        identity = cache_keys.recordings_key(utterances) | cache_keys.transcripts_key(transcripts, recipe.data.casing)
        sets[name] = (utterances, stage1 | identity)
    return sets


def _without_llm(model: SeamForSpeechRecognition) -> SeamForSpeechRecognition:
    """The model with no more of its LLM than Stage 1 needs, in place: it may be much the largest part."""
    with torch.device("meta"):
        table = EmbeddingTable(model.config.get_text_config())
    table.set_input_embeddings(model.get_input_embeddings())
    model.language_model = table
    return model


def _files(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.jsonl"))


def _rows(path: Path, identity: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file that another process may be writing to. Raises `ValueError` when it is stale."""
    first, *rows = read_json_lines(path, ignore_unfinished=True) or [{"made_from": identity}]
    cache_keys.check_key(path, first.get("made_from", {}), identity)
    return rows


@contextmanager
def _opened(path: Path, identity: dict[str, Any]) -> Iterator[TextIO]:
    """A file to write rows to, at the end of those that are there. Raises `OSError` while another process has it."""
    try:
        with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
            is_new = not repair_json_lines(path)
            with path.open("a", encoding="utf-8") as file:
                if is_new:
                    file.write(json.dumps({"made_from": identity}) + "\n")
                    file.flush()
                yield file
    except Timeout as error:
        raise OSError(
            f"{path} is being written by another process; torchrun and `accelerate launch` give each its own RANK."
        ) from error
